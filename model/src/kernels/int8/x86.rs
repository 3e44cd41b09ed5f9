//! The integer product with AVX-512 VNNI (`vpdpbusd`) and with AVX2 (`vpmaddubsw`).
//!
//! A tile is one panel against up to 8 rows of activations: its integers are unpacked once for all of them.
#![allow(unsafe_code, reason = "vector instructions on pointers; each entry checks features and lengths")]

use std::arch::x86_64::*;

use super::pack::{Form, PANEL};
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
            offsets: x.offsets[first * blocks..].as_ptr(),
            y: y[first * stride..].as_mut_ptr(),
            stride,
            rows: panel.rows,
        };
        run(tile, take);
        first += take;
    }
}

/// The panel with AVX-512 VNNI.
pub(super) fn panel_vnni(panel: Panel<'_>, x: &Quantized, y: &mut [f32], stride: usize) {
    assert!(has_vnni());
    const MINIMUM: u8 = 0;
    const NIBBLES: u8 = 1;
    const BYTES: u8 = 2;
    macro_rules! tiles {
        ($form:expr) => {
            // SAFETY: the features were just detected, and `for_each_tile` has checked that the panel and the
            // tile's rows of activations and sums lie inside their slices.
            for_each_tile(panel, x, y, stride, |tile, take| unsafe {
                match take {
                    8 => vnni::<8, { $form }>(tile),
                    4 => vnni::<4, { $form }>(tile),
                    2 => vnni::<2, { $form }>(tile),
                    _ => vnni::<1, { $form }>(tile),
                }
            })
        };
    }
    match panel.form {
        Form::NibblesMinimum => tiles!(MINIMUM),
        Form::Nibbles => tiles!(NIBBLES),
        Form::Bytes => tiles!(BYTES),
    }
}

/// T rows of activations against a panel; FORM is 0 for nibbles with minima, 1 for nibbles, 2 for bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn vnni<const T: usize, const FORM: u8>(tile: Tile) {
    let form = match FORM {
        0 => Form::NibblesMinimum,
        1 => Form::Nibbles,
        _ => Form::Bytes,
    };
    let low = _mm512_set1_epi8(15);
    let mut acc = [_mm512_setzero_ps(); T];
    for block in 0..tile.blocks {
        // SAFETY (of the whole block): the caller vouches for `blocks` blocks of integers, scales and
        // activations; offsets below stay inside block number `block`. Prefetching takes any address.
        unsafe {
            let (scales, quants) = form.offsets(block);
            let (scales, quants) = (tile.panel.add(scales), tile.panel.add(quants));
            if T == 1 {
                for line in 0..form.lines() + 1 {
                    _mm_prefetch::<_MM_HINT_T0>(quants.wrapping_add(AHEAD + line * 64).cast());
                }
            }
            let mut w = [_mm512_setzero_si512(); 8];
            if FORM == 2 {
                for (i, w) in w.iter_mut().enumerate() {
                    *w = _mm512_load_si512(quants.add(i * 64).cast());
                }
            } else {
                for i in 0..4 {
                    let both = _mm512_load_si512(quants.add(i * 64).cast());
                    w[i] = _mm512_and_si512(both, low);
                    w[4 + i] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                }
            }
            let minima = if FORM == 0 {
                _mm512_cvtph_ps(_mm256_load_si256(scales.add(32).cast()))
            } else {
                _mm512_setzero_ps()
            };
            let scales = _mm512_cvtph_ps(_mm256_load_si256(scales.cast()));
            for (t, acc) in acc.iter_mut().enumerate() {
                let at = t * tile.blocks + block;
                let x: *const i32 = tile.values.add(at * BLOCK).cast();
                let mut dot = match FORM {
                    0 => _mm512_setzero_si512(),
                    1 => _mm512_set1_epi32(-8 * *tile.sums.add(at)),
                    _ => _mm512_set1_epi32(-128 * *tile.sums.add(at)),
                };
                for (i, w) in w.iter().enumerate() {
                    dot = _mm512_dpbusd_epi32(dot, *w, _mm512_set1_epi32(x.add(i).read_unaligned()));
                }
                let scale = _mm512_mul_ps(scales, _mm512_set1_ps(*tile.x_scales.add(at)));
                *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, *acc);
                if FORM == 0 {
                    *acc = _mm512_fmadd_ps(minima, _mm512_set1_ps(*tile.offsets.add(at)), *acc);
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

/// The panel with AVX2.
pub(super) fn panel_avx2(panel: Panel<'_>, x: &Quantized, y: &mut [f32], stride: usize) {
    assert!(has_avx2());
    let form = panel.form;
    for_each_tile(panel, x, y, stride, |tile, take| {
        for half in 0..2 {
            for t in 0..take {
                // SAFETY: the features were just detected, and `for_each_tile` has checked the lengths; row t is
                // one of the tile's.
                unsafe { avx2(tile, form, half, t) };
            }
        }
    });
}

/// One row of activations against 8 rows of a panel.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2(tile: Tile, form: Form, half: usize, t: usize) {
    let first = half * 8;
    if tile.rows <= first {
        return;
    }
    let (low, ones, flip) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1), _mm256_set1_epi8(-128));
    let mut acc = _mm256_setzero_ps();
    for block in 0..tile.blocks {
        // SAFETY (of the whole block): as in `vnni`; a half is 32 bytes of each line and 16 of scales.
        unsafe {
            let (scales, quants) = form.offsets(block);
            let (scales, quants) = (tile.panel.add(scales + first * 2), tile.panel.add(quants + half * 32));
            let at = t * tile.blocks + block;
            let x: *const i32 = tile.values.add(at * BLOCK).cast();
            let word = |i: usize| _mm256_set1_epi32(x.add(i).read_unaligned());
            // Unsigned times signed bytes, summed by four. Pairs fit 16 bits: 15 and 128 times 127 twice.
            let times = |w, x| _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones);
            let mut dot = _mm256_setzero_si256();
            for i in 0..form.lines() {
                let line = _mm256_load_si256(quants.add(i * 64).cast());
                if form == Form::Bytes {
                    let w = _mm256_xor_si256(line, flip);
                    dot = _mm256_add_epi32(dot, times(_mm256_abs_epi8(w), _mm256_sign_epi8(word(i), w)));
                } else {
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(line), low);
                    dot = _mm256_add_epi32(dot, times(_mm256_and_si256(line, low), word(i)));
                    dot = _mm256_add_epi32(dot, times(high, word(4 + i)));
                }
            }
            if form == Form::Nibbles {
                dot = _mm256_sub_epi32(dot, _mm256_set1_epi32(8 * *tile.sums.add(at)));
            }
            let minima = scales.add(32);
            let scales = _mm256_cvtph_ps(_mm_load_si128(scales.cast()));
            let scales = _mm256_mul_ps(scales, _mm256_set1_ps(*tile.x_scales.add(at)));
            acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scales, acc);
            if form == Form::NibblesMinimum {
                let minima = _mm256_cvtph_ps(_mm_load_si128(minima.cast()));
                acc = _mm256_fmadd_ps(minima, _mm256_set1_ps(*tile.offsets.add(at)), acc);
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
