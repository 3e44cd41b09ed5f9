//! The integer product with NEON, a row of activations at a time: `smlal` on every 64-bit ARM processor, `sdot` where
//! there are dot products.
#![allow(unsafe_code, reason = "vector instructions on pointers; each entry checks features and lengths")]

use std::arch::aarch64::*;
use std::arch::asm;
use std::arch::is_aarch64_feature_detected;

use super::form::Form;
use super::neon::*;
use super::{Panel, Quantized};
use crate::kernels::simd::has_neon;
use crate::weights::BLOCK;

/// Dot products of four bytes.
pub(super) fn has_dot() -> bool {
    has_neon() && is_aarch64_feature_detected!("dotprod")
}

/// The panel with baseline NEON.
pub(super) fn panel_neon(panel: Panel<'_>, x: &Quantized, y: &mut [f32], stride: usize) {
    assert!(has_neon());
    macro_rules! tiles {
        ($form:ident) => {
            // SAFETY: the feature was just detected, and `for_each_tile` has checked that the panel and the tile's rows
            // of activations and sums lie inside their slices. A panel has four quarters.
            for_each_tile(panel, Rows::from(x, 0), 4, y, stride, |tile, take| unsafe {
                match take {
                    4 => (0..4).for_each(|quarter| neon::<4, 1, $form>(tile, quarter)),
                    2 => (0..4).for_each(|quarter| neon::<2, 1, $form>(tile, quarter)),
                    _ => neon::<1, 4, $form>(tile, 0),
                }
            })
        };
    }
    by_form!(panel.form, tiles);
}

/// The panel with dot products, from row `first` of the activations on. The fewer rows, the more quarters at once, so
/// that four sums or more are on their way together.
pub(super) fn panel_dot(panel: Panel<'_>, x: &Quantized, first: usize, y: &mut [f32], stride: usize) {
    assert!(has_dot());
    let y = y.get_mut(first * stride..).unwrap_or_default();
    macro_rules! tiles {
        ($form:ident) => {
            // SAFETY: as above.
            for_each_tile(panel, Rows::from(x, first), 8, y, stride, |tile, take| unsafe {
                match take {
                    8 => (0..4).for_each(|quarter| dot::<8, 1, $form>(tile, quarter)),
                    4 => (0..4).for_each(|quarter| dot::<4, 1, $form>(tile, quarter)),
                    2 => (0..4).step_by(2).for_each(|quarter| dot::<2, 2, $form>(tile, quarter)),
                    _ => dot::<1, 4, $form>(tile, 0),
                }
            })
        };
    }
    by_form!(panel.form, tiles);
}

#[target_feature(enable = "neon")]
unsafe fn neon<const T: usize, const Q: usize, const FORM: u8>(tile: Tile, quarter: usize) {
    // SAFETY: as the caller vouches; `run` hands the bytes of a block to the function.
    unsafe { run::<T, Q, FORM>(tile, quarter, |start, w, x| dots_neon::<FORM>(start, w, x)) }
}

#[target_feature(enable = "neon,dotprod")]
unsafe fn dot<const T: usize, const Q: usize, const FORM: u8>(tile: Tile, quarter: usize) {
    // SAFETY: as above.
    unsafe { run::<T, Q, FORM>(tile, quarter, |start, w, x| dots(start, w, x)) }
}

/// T rows of activations against Q quarters of a panel. `dots` adds the products of a block, or of half of it, to four
/// integers; all of it is compiled into the entries above, with their features.
///
/// # Safety
/// A tile of [`for_each_tile`] with T rows, NEON, and `quarter + Q <= 4`.
#[inline(always)]
unsafe fn run<const T: usize, const Q: usize, const FORM: u8>(
    tile: Tile,
    quarter: usize,
    dots: impl Fn(int32x4_t, &[int8x16_t], *const i8) -> int32x4_t,
) {
    // SAFETY (of the whole body): the caller vouches for `blocks` blocks of integers, scales and activations, and for
    // the sums of each of T rows.
    unsafe {
        let mut acc = [[vdupq_n_f32(0.0); T]; Q];
        for block in 0..tile.blocks {
            for (q, acc) in acc.iter_mut().enumerate() {
                let part = tile.quarter::<FORM>(block, quarter + q);
                let w = unpacked::<FORM>(part.lines);
                // A loop is not unrolled by itself, and its sums would lie in memory.
                macro_rules! rows {
                    ($($t:literal)*) => {
                        $(if $t < T {
                            let at = $t * tile.blocks + block;
                            let x = tile.values.add(at * BLOCK);
                            let start = |sum: *const i32| vdupq_n_s32(-excess::<FORM>() * *sum);
                            let scale = *tile.scales.add(at);
                            if FORM == SIX_BIT_GROUPS {
                                let low = dots(start(tile.halves.add(2 * at)), &w[..4], x);
                                let high = dots(start(tile.halves.add(2 * at + 1)), &w[4..], x.add(BLOCK / 2));
                                let sum = vmulq_f32(vcvtq_f32_s32(low), part.scales);
                                let sum = vfmaq_f32(sum, vcvtq_f32_s32(high), part.second);
                                acc[$t] = vfmaq_n_f32(acc[$t], sum, scale);
                            } else {
                                let start = if excess::<FORM>() == 0 { vdupq_n_s32(0) } else { start(tile.sums.add(at)) };
                                let dot = vcvtq_f32_s32(dots(start, &w, x));
                                acc[$t] = vfmaq_f32(acc[$t], dot, vmulq_n_f32(part.scales, scale));
                            }
                            if has_minimum::<FORM>() {
                                acc[$t] = vfmaq_n_f32(acc[$t], part.second, *tile.offsets.add(at));
                            }
                        })*
                    };
                }
                rows!(0 1 2 3 4 5 6 7);
            }
        }
        for (q, acc) in acc.iter().enumerate() {
            for (t, acc) in acc.iter().enumerate() {
                tile.store(quarter + q, t, *acc);
            }
        }
    }
}

/// Adds the products of 4 or 8 registers, four columns each, with as many columns of activations. Sums fit 16 bits
/// that have two bytes (128 * 127 * 2), four times six bits (63 * 127 * 4) or eight times five (31 * 127 * 8).
///
/// # Safety
/// `x` points to four bytes for each register.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn dots_neon<const FORM: u8>(start: int32x4_t, w: &[int8x16_t], x: *const i8) -> int32x4_t {
    let at_once = if FORM == BYTES { 2 } else { w.len() };
    // Of rows 0 and 1 and of rows 2 and 3, two sums each.
    let (mut upper, mut lower) = (vdupq_n_s32(0), vdupq_n_s32(0));
    for (i, w) in w.chunks_exact(at_once).enumerate() {
        let (mut first, mut second) = (vdupq_n_s16(0), vdupq_n_s16(0));
        for (j, w) in w.iter().enumerate() {
            // SAFETY: word number `i * at_once + j`, one for each register; words may lie anywhere.
            let x = unsafe { x.cast::<i32>().add(i * at_once + j).read_unaligned() };
            let x = vreinterpretq_s8_s32(vdupq_n_s32(x));
            first = vmlal_s8(first, vget_low_s8(*w), vget_low_s8(x));
            second = vmlal_high_s8(second, *w, x);
        }
        upper = vpadalq_s16(upper, first);
        lower = vpadalq_s16(lower, second);
    }
    vaddq_s32(start, vpaddq_s32(upper, lower))
}

/// The same with dot products.
///
/// # Safety
/// As above.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn dots(start: int32x4_t, w: &[int8x16_t], x: *const i8) -> int32x4_t {
    let mut sum = start;
    for (i, w) in w.as_chunks::<4>().0.iter().enumerate() {
        // SAFETY: the 16 bytes for four registers.
        let x = unsafe { vld1q_s8(x.add(16 * i)) };
        sum = sdot::<0>(sum, w[0], x);
        sum = sdot::<1>(sum, w[1], x);
        sum = sdot::<2>(sum, w[2], x);
        sum = sdot::<3>(sum, w[3], x);
    }
    sum
}

/// Adds to each of four integers the products of four bytes with word number LANE of x.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot<const LANE: i32>(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut sum = sum;
    // SAFETY: the function is compiled for the instruction, which reads and writes these registers alone.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{lane}]",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
