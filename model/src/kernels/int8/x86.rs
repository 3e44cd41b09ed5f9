//! The integer product with AVX-512 VNNI (`vpdpbusd`) and with AVX2 (`vpmaddubsw`).
//!
//! A tile is one panel against up to 8 rows of activations: its integers are unpacked once for all of them.
#![allow(unsafe_code, reason = "vector instructions on pointers; each entry checks features and lengths")]

use std::arch::x86_64::*;

use super::form::Form;
use super::pack::PANEL;
use super::{Panel, Quantized};
use crate::kernels::simd;
use crate::weights::BLOCK;

/// AVX-512 with `vpdpbusd`.
pub(super) fn has_vnni() -> bool {
    simd::has_avx512() && std::is_x86_feature_detected!("avx512vnni")
}

/// AVX2 and the conversion of half precision.
pub(super) fn has_avx2() -> bool {
    simd::has_avx2() && std::is_x86_feature_detected!("f16c")
}

/// Rows of activations of a tile, at most.
const TILE: usize = 8;
/// Bytes ahead of those in use that a single row's product asks for.
const AHEAD: usize = 2048;

/// Pointers into one panel and to the first of a tile's rows of activations and sums.
#[derive(Clone, Copy)]
struct Tile {
    panel: *const u8,
    blocks: usize,
    values: *const i8,
    x_scales: *const f32,
    sums: *const i32,
    halves: *const i32,
    offsets: *const f32,
    y: *mut f32,
    stride: usize,
    rows: usize,
}

/// Checks every length that the tiles rely on, and runs them.
fn for_each_tile(panel: Panel<'_>, x: &Quantized, y: &mut [f32], stride: usize, run: impl Fn(Tile, usize)) {
    let (tokens, blocks) = (x.rows(), panel.blocks);
    assert!(panel.lines.len() == panel.form.panel_lines(blocks));
    assert!(x.values.len() == tokens * blocks * BLOCK && x.scales.len() == tokens * blocks);
    assert!(x.sums.len() == tokens * blocks && x.offsets.len() == tokens * blocks);
    assert!(x.halves.len() == 2 * tokens * blocks);
    assert!(panel.rows <= PANEL && panel.rows <= stride);
    assert!(tokens == 0 || y.len() >= (tokens - 1) * stride + panel.rows);
    let mut first = 0;
    while first < tokens {
        let left = tokens - first;
        let take = if left >= TILE { TILE } else { 1 << left.ilog2() };
        let tile = Tile {
            panel: panel.lines.as_ptr().cast(),
            blocks,
            values: x.values[first * blocks * BLOCK..].as_ptr(),
            x_scales: x.scales[first * blocks..].as_ptr(),
            sums: x.sums[first * blocks..].as_ptr(),
            halves: x.halves[2 * first * blocks..].as_ptr(),
            offsets: x.offsets[first * blocks..].as_ptr(),
            y: y[first * stride..].as_mut_ptr(),
            stride,
            rows: panel.rows,
        };
        run(tile, take);
        first += take;
    }
}

const NIBBLES_MINIMUM: u8 = Form::NibblesMinimum as u8;
const NIBBLES: u8 = Form::Nibbles as u8;
const BYTES: u8 = Form::Bytes as u8;
const FIVE_BITS: u8 = Form::FiveBits as u8;
const NIBBLE_GROUPS: u8 = Form::NibbleGroups as u8;
const SIX_BIT_GROUPS: u8 = Form::SixBitGroups as u8;

/// The form of that number.
const fn form<const FORM: u8>() -> Form {
    match FORM {
        NIBBLES_MINIMUM => Form::NibblesMinimum,
        NIBBLES => Form::Nibbles,
        BYTES => Form::Bytes,
        FIVE_BITS => Form::FiveBits,
        NIBBLE_GROUPS => Form::NibbleGroups,
        SIX_BIT_GROUPS => Form::SixBitGroups,
        _ => panic!("a form's number"),
    }
}

/// Calls a macro's arm with the panel's form as a constant.
macro_rules! by_form {
    ($form:expr, $tiles:ident) => {
        match $form {
            Form::NibblesMinimum => $tiles!(NIBBLES_MINIMUM),
            Form::Nibbles => $tiles!(NIBBLES),
            Form::Bytes => $tiles!(BYTES),
            Form::FiveBits => $tiles!(FIVE_BITS),
            Form::NibbleGroups => $tiles!(NIBBLE_GROUPS),
            Form::SixBitGroups => $tiles!(SIX_BIT_GROUPS),
        }
    };
}

/// What the stored integers of a form are above the weight's.
const fn excess<const FORM: u8>() -> i32 {
    match form::<FORM>() {
        Form::NibblesMinimum | Form::NibbleGroups => 0,
        Form::Nibbles => 8,
        Form::FiveBits => 16,
        Form::SixBitGroups => 32,
        Form::Bytes => 128,
    }
}

/// The panel with AVX-512 VNNI.
pub(super) fn panel_vnni(panel: Panel<'_>, x: &Quantized, y: &mut [f32], stride: usize) {
    assert!(has_vnni());
    macro_rules! tiles {
        ($form:ident) => {
            // SAFETY: the features were just detected, and `for_each_tile` has checked that the panel and the
            // tile's rows of activations and sums lie inside their slices.
            for_each_tile(panel, x, y, stride, |tile, take| unsafe {
                match take {
                    8 => vnni::<8, $form>(tile),
                    4 => vnni::<4, $form>(tile),
                    2 => vnni::<2, $form>(tile),
                    _ => vnni::<1, $form>(tile),
                }
            })
        };
    }
    by_form!(panel.form, tiles);
}

/// T rows of activations against a panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn vnni<const T: usize, const FORM: u8>(tile: Tile) {
    let mut acc = [_mm512_setzero_ps(); T];
    for block in 0..tile.blocks {
        // SAFETY (of the whole block): the caller vouches for `blocks` blocks of integers, scales and
        // activations; offsets below stay inside block number `block`. Prefetching takes any address.
        unsafe {
            let quants = tile.panel.add(form::<FORM>().offsets(block).1);
            if T == 1 {
                for line in 0..form::<FORM>().lines() + 1 {
                    _mm_prefetch::<_MM_HINT_T0>(quants.wrapping_add(AHEAD + line * 64).cast());
                }
            }
            let w = integers_512::<FORM>(quants);
            let (scales, second) = factors_512::<FORM>(tile.panel, block);
            for (t, acc) in acc.iter_mut().enumerate() {
                let at = t * tile.blocks + block;
                let x: *const i32 = tile.values.add(at * BLOCK).cast();
                let x = |i: usize| _mm512_set1_epi32(x.add(i).read_unaligned());
                let x_scale = _mm512_set1_ps(*tile.x_scales.add(at));
                let start = |sum: i32| _mm512_set1_epi32(-excess::<FORM>() * sum);
                if FORM == SIX_BIT_GROUPS {
                    let (mut low, mut high) =
                        (start(*tile.halves.add(2 * at)), start(*tile.halves.add(2 * at + 1)));
                    for i in 0..4 {
                        low = _mm512_dpbusd_epi32(low, w[i], x(i));
                        high = _mm512_dpbusd_epi32(high, w[4 + i], x(4 + i));
                    }
                    let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(low), scales);
                    let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), second, sum);
                    *acc = _mm512_fmadd_ps(sum, x_scale, *acc);
                    continue;
                }
                let mut dot =
                    if excess::<FORM>() == 0 { _mm512_setzero_si512() } else { start(*tile.sums.add(at)) };
                for (i, w) in w.iter().enumerate() {
                    dot = _mm512_dpbusd_epi32(dot, *w, x(i));
                }
                *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scales, x_scale), *acc);
                if excess::<FORM>() == 0 {
                    *acc = _mm512_fmadd_ps(second, _mm512_set1_ps(*tile.offsets.add(at)), *acc);
                }
            }
        }
    }
    let mask = ((1u32 << tile.rows) - 1) as __mmask16;
    for (t, acc) in acc.iter().enumerate() {
        // SAFETY: the caller vouches for `rows` sums of each of T rows.
        unsafe { _mm512_mask_storeu_ps(tile.y.add(t * tile.stride), mask, *acc) };
    }
}

/// A block's integers, columns 4 i to 4 i + 3 of 16 rows each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn integers_512<const FORM: u8>(quants: *const u8) -> [__m512i; 8] {
    let mut w = [_mm512_setzero_si512(); 8];
    // SAFETY: the caller vouches for the form's lines.
    let line = |i: usize| unsafe { _mm512_load_si512(quants.add(i * 64).cast()) };
    if FORM == BYTES {
        w.iter_mut().enumerate().for_each(|(i, w)| *w = line(i));
        return w;
    }
    let low = _mm512_set1_epi8(15);
    for i in 0..4 {
        w[i] = _mm512_and_si512(line(i), low);
        w[4 + i] = _mm512_and_si512(_mm512_srli_epi16::<4>(line(i)), low);
    }
    if FORM == FIVE_BITS {
        let (h, fifth) = (line(4), _mm512_set1_epi8(16));
        let (first, second, third) =
            (_mm512_slli_epi16::<4>(h), _mm512_slli_epi16::<3>(h), _mm512_slli_epi16::<2>(h));
        let (fourth, sixth) = (_mm512_slli_epi16::<1>(h), _mm512_srli_epi16::<1>(h));
        let (seventh, eighth) = (_mm512_srli_epi16::<2>(h), _mm512_srli_epi16::<3>(h));
        let high = [first, second, third, fourth, h, sixth, seventh, eighth];
        w.iter_mut().zip(high).for_each(|(w, high)| *w = _mm512_or_si512(*w, _mm512_and_si512(high, fifth)));
    }
    if FORM == SIX_BIT_GROUPS {
        let upper = _mm512_set1_epi8(0x30);
        for part in 0..2 {
            let h = line(4 + part);
            let high = [_mm512_slli_epi16::<4>(h), _mm512_slli_epi16::<2>(h), h, _mm512_srli_epi16::<2>(h)];
            for (w, high) in w[4 * part..].iter_mut().zip(high) {
                *w = _mm512_or_si512(*w, _mm512_and_si512(high, upper));
            }
        }
    }
    w
}

/// A block's scales, and its minima or the scales of its last 16 columns, where the form has these.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
unsafe fn factors_512<const FORM: u8>(panel: *const u8, block: usize) -> (__m512, __m512) {
    // SAFETY: the caller vouches for the panel's block; scales of halves begin at multiples of 32 bytes, groups'
    // at multiples of 16.
    unsafe {
        let half = |at: usize| _mm512_cvtph_ps(_mm256_load_si256(panel.add(at).cast()));
        let bytes = |at: usize| _mm_load_si128(panel.add(at).cast());
        let (scales, _) = form::<FORM>().offsets(block);
        let units = form::<FORM>().units(block);
        match form::<FORM>() {
            Form::NibblesMinimum => (half(scales), half(scales + 32)),
            Form::Nibbles | Form::Bytes | Form::FiveBits => (half(scales), _mm512_setzero_ps()),
            Form::NibbleGroups => {
                let scale = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes(scales)));
                let minimum = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes(scales + 16)));
                let negative = _mm512_sub_ps(_mm512_setzero_ps(), half(units + 32));
                (_mm512_mul_ps(half(units), scale), _mm512_mul_ps(negative, minimum))
            }
            Form::SixBitGroups => {
                let scale = |at: usize| {
                    _mm512_mul_ps(half(units), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(at))))
                };
                (scale(scales), scale(scales + 16))
            }
        }
    }
}

/// The panel with AVX2.
pub(super) fn panel_avx2(panel: Panel<'_>, x: &Quantized, y: &mut [f32], stride: usize) {
    assert!(has_avx2());
    macro_rules! tiles {
        ($form:ident) => {
            for_each_tile(panel, x, y, stride, |tile, take| {
                for half in 0..2 {
                    for t in 0..take {
                        // SAFETY: the features were just detected, and `for_each_tile` has checked the lengths;
                        // row t is one of the tile's.
                        unsafe { avx2::<$form>(tile, half, t) };
                    }
                }
            })
        };
    }
    by_form!(panel.form, tiles);
}

/// One row of activations against 8 rows of a panel.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<const FORM: u8>(tile: Tile, half: usize, t: usize) {
    let first = half * 8;
    if tile.rows <= first {
        return;
    }
    let ones = _mm256_set1_epi16(1);
    let mut acc = _mm256_setzero_ps();
    for block in 0..tile.blocks {
        // SAFETY (of the whole block): as in `vnni`; a half is 32 bytes of each line and half of all scales.
        unsafe {
            let quants = tile.panel.add(form::<FORM>().offsets(block).1 + half * 32);
            let at = t * tile.blocks + block;
            let x: *const i32 = tile.values.add(at * BLOCK).cast();
            let x = |i: usize| _mm256_set1_epi32(x.add(i).read_unaligned());
            // Unsigned times signed bytes, summed by four. Pairs fit 16 bits: 63 and 128 times 127 twice.
            let times = |w, x| _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones);
            let w = integers_256::<FORM>(quants);
            let mut dots = [_mm256_setzero_si256(); 2];
            for (i, w) in w.iter().enumerate() {
                // Bytes come with their sign, which goes to the other factor.
                let product = if FORM == BYTES {
                    times(_mm256_abs_epi8(*w), _mm256_sign_epi8(x(i), *w))
                } else {
                    times(*w, x(i))
                };
                dots[i / 4] = _mm256_add_epi32(dots[i / 4], product);
            }
            let less = |dot, sum: i32| {
                let excess = if FORM == BYTES { 0 } else { excess::<FORM>() };
                _mm256_cvtepi32_ps(_mm256_sub_epi32(dot, _mm256_set1_epi32(excess * sum)))
            };
            let x_scale = _mm256_set1_ps(*tile.x_scales.add(at));
            let (scales, second) = factors_256::<FORM>(tile.panel, block, half);
            if FORM == SIX_BIT_GROUPS {
                let halves = tile.halves.add(2 * at);
                let sum = _mm256_mul_ps(less(dots[0], *halves), scales);
                let sum = _mm256_fmadd_ps(less(dots[1], *halves.add(1)), second, sum);
                acc = _mm256_fmadd_ps(sum, x_scale, acc);
                continue;
            }
            let dot = less(_mm256_add_epi32(dots[0], dots[1]), *tile.sums.add(at));
            acc = _mm256_fmadd_ps(dot, _mm256_mul_ps(scales, x_scale), acc);
            if excess::<FORM>() == 0 {
                acc = _mm256_fmadd_ps(second, _mm256_set1_ps(*tile.offsets.add(at)), acc);
            }
        }
    }
    let mut sums = [0f32; 8];
    // SAFETY: eight values into eight; the caller vouches for `rows` sums of row t.
    unsafe {
        _mm256_storeu_ps(sums.as_mut_ptr(), acc);
        let y = tile.y.add(t * tile.stride + first);
        std::ptr::copy_nonoverlapping(sums.as_ptr(), y, 8.min(tile.rows - first));
    }
}

/// As [`integers_512`], of 8 rows; whole bytes with their sign.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn integers_256<const FORM: u8>(quants: *const u8) -> [__m256i; 8] {
    let mut w = [_mm256_setzero_si256(); 8];
    // SAFETY: the caller vouches for the form's lines.
    let line = |i: usize| unsafe { _mm256_load_si256(quants.add(i * 64).cast()) };
    if FORM == BYTES {
        let flip = _mm256_set1_epi8(-128);
        w.iter_mut().enumerate().for_each(|(i, w)| *w = _mm256_xor_si256(line(i), flip));
        return w;
    }
    let low = _mm256_set1_epi8(15);
    for i in 0..4 {
        w[i] = _mm256_and_si256(line(i), low);
        w[4 + i] = _mm256_and_si256(_mm256_srli_epi16::<4>(line(i)), low);
    }
    if FORM == FIVE_BITS {
        let (h, fifth) = (line(4), _mm256_set1_epi8(16));
        let (first, second, third) =
            (_mm256_slli_epi16::<4>(h), _mm256_slli_epi16::<3>(h), _mm256_slli_epi16::<2>(h));
        let (fourth, sixth) = (_mm256_slli_epi16::<1>(h), _mm256_srli_epi16::<1>(h));
        let (seventh, eighth) = (_mm256_srli_epi16::<2>(h), _mm256_srli_epi16::<3>(h));
        let high = [first, second, third, fourth, h, sixth, seventh, eighth];
        w.iter_mut().zip(high).for_each(|(w, high)| *w = _mm256_or_si256(*w, _mm256_and_si256(high, fifth)));
    }
    if FORM == SIX_BIT_GROUPS {
        let upper = _mm256_set1_epi8(0x30);
        for part in 0..2 {
            let h = line(4 + part);
            let high = [_mm256_slli_epi16::<4>(h), _mm256_slli_epi16::<2>(h), h, _mm256_srli_epi16::<2>(h)];
            for (w, high) in w[4 * part..].iter_mut().zip(high) {
                *w = _mm256_or_si256(*w, _mm256_and_si256(high, upper));
            }
        }
    }
    w
}

/// As [`factors_512`], of 8 rows.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn factors_256<const FORM: u8>(panel: *const u8, block: usize, half: usize) -> (__m256, __m256) {
    // SAFETY: as in `factors_512`; half of its scales are 16 and 8 bytes.
    unsafe {
        let halves = |at: usize| _mm256_cvtph_ps(_mm_load_si128(panel.add(at + half * 16).cast()));
        let bytes = |at: usize| _mm_loadl_epi64(panel.add(at + half * 8).cast());
        let (scales, _) = form::<FORM>().offsets(block);
        let units = form::<FORM>().units(block);
        match form::<FORM>() {
            Form::NibblesMinimum => (halves(scales), halves(scales + 32)),
            Form::Nibbles | Form::Bytes | Form::FiveBits => (halves(scales), _mm256_setzero_ps()),
            Form::NibbleGroups => {
                let scale = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes(scales)));
                let minimum = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes(scales + 16)));
                let negative = _mm256_sub_ps(_mm256_setzero_ps(), halves(units + 32));
                (_mm256_mul_ps(halves(units), scale), _mm256_mul_ps(negative, minimum))
            }
            Form::SixBitGroups => {
                let scale = |at: usize| {
                    _mm256_mul_ps(halves(units), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes(at))))
                };
                (scale(scales), scale(scales + 16))
            }
        }
    }
}
