//! The integer product with NEON, a row of activations at a time: `smlal` on every 64-bit ARM processor, `sdot` where
//! there are dot products.
#![allow(unsafe_code, reason = "vector instructions on pointers; each entry checks features and lengths")]

use std::arch::aarch64::*;
use std::arch::asm;
use std::arch::is_aarch64_feature_detected;

use super::neon::{BYTES, MINIMUM, NIBBLES, Rows, Tile, for_each_tile, unpacked};
use super::pack::Form;
use super::{Panel, Quantized};
use crate::weights::BLOCK;

/// Baseline NEON.
pub(super) fn has_neon() -> bool {
    is_aarch64_feature_detected!("neon")
}

/// Dot products of four bytes.
pub(super) fn has_dot() -> bool {
    has_neon() && is_aarch64_feature_detected!("dotprod")
}

/// The panel with an entry below, `fn<ROWS, QUARTERS, FORM>(tile, first quarter)`: the fewer rows of activations, the
/// more quarters at once, so that four sums or more are on their way together. A tile has 8 rows at most with dot
/// products, and 4 with baseline NEON, which needs more registers for each.
macro_rules! tiles {
    ($entry:ident, $form:ident, $most:expr, $panel:expr, $x:expr, $y:expr, $stride:expr) => {
        // SAFETY: the caller has detected the features, and `for_each_tile` has checked that the panel and the tile's
        // rows of activations and sums lie inside their slices. A panel has four quarters.
        for_each_tile($panel, $x, $most, $y, $stride, |tile, take| unsafe {
            match take {
                8 => (0..4).for_each(|quarter| $entry::<8, 1, { $form }>(tile, quarter)),
                4 => (0..4).for_each(|quarter| $entry::<4, 1, { $form }>(tile, quarter)),
                2 => (0..4).step_by(2).for_each(|quarter| $entry::<2, 2, { $form }>(tile, quarter)),
                _ => $entry::<1, 4, { $form }>(tile, 0),
            }
        })
    };
}

/// The panel with baseline NEON.
pub(super) fn panel_neon(panel: Panel<'_>, x: &Quantized, y: &mut [f32], stride: usize) {
    assert!(has_neon());
    let x = Rows::from(x, 0);
    match panel.form {
        Form::NibblesMinimum => tiles!(neon, MINIMUM, 4, panel, x, y, stride),
        Form::Nibbles => tiles!(neon, NIBBLES, 4, panel, x, y, stride),
        Form::Bytes => tiles!(neon, BYTES, 4, panel, x, y, stride),
    }
}

/// The panel with dot products, from row `first` of the activations on.
pub(super) fn panel_dot(panel: Panel<'_>, x: &Quantized, first: usize, y: &mut [f32], stride: usize) {
    assert!(has_dot());
    let (x, y) = (Rows::from(x, first), y.get_mut(first * stride..).unwrap_or_default());
    match panel.form {
        Form::NibblesMinimum => tiles!(dot, MINIMUM, 8, panel, x, y, stride),
        Form::Nibbles => tiles!(dot, NIBBLES, 8, panel, x, y, stride),
        Form::Bytes => tiles!(dot, BYTES, 8, panel, x, y, stride),
    }
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

/// T rows of activations against Q quarters of a panel. `dots` adds the products of a block to four integers; all of
/// it is compiled into the entries above, with their features.
///
/// # Safety
/// A tile of [`for_each_tile`] with T rows, NEON, and `quarter + Q <= 4`.
#[inline(always)]
unsafe fn run<const T: usize, const Q: usize, const FORM: u8>(
    tile: Tile,
    quarter: usize,
    dots: impl Fn(int32x4_t, &[int8x16_t; 8], *const i8) -> int32x4_t,
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
                            let start = if FORM == NIBBLES { -8 * *tile.sums.add(at) } else { 0 };
                            let dot = dots(vdupq_n_s32(start), &w, tile.values.add(at * BLOCK));
                            let scale = vmulq_n_f32(part.scales, *tile.scales.add(at));
                            acc[$t] = vfmaq_f32(acc[$t], vcvtq_f32_s32(dot), scale);
                            if FORM == MINIMUM {
                                acc[$t] = vfmaq_n_f32(acc[$t], part.minima, *tile.offsets.add(at));
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

/// Adds the products of a block in four rows with a row of activations. Nibbles fit 16 bits eight times over (15 * 127
/// * 8), bytes twice (128 * 127 * 2).
///
/// # Safety
/// `x` points to the block's 32 bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn dots_neon<const FORM: u8>(start: int32x4_t, w: &[int8x16_t; 8], x: *const i8) -> int32x4_t {
    let at_once = if FORM == BYTES { 2 } else { 8 };
    // Of rows 0 and 1 and of rows 2 and 3, two sums each.
    let (mut upper, mut lower) = (vdupq_n_s32(0), vdupq_n_s32(0));
    for (i, w) in w.chunks_exact(at_once).enumerate() {
        let (mut first, mut second) = (vdupq_n_s16(0), vdupq_n_s16(0));
        for (j, w) in w.iter().enumerate() {
            // SAFETY: word number `i * at_once + j`, below 8, of the 32 bytes; words may lie anywhere.
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
unsafe fn dots(start: int32x4_t, w: &[int8x16_t; 8], x: *const i8) -> int32x4_t {
    // SAFETY: the 32 bytes of the block.
    let (low, high) = unsafe { (vld1q_s8(x), vld1q_s8(x.add(16))) };
    let mut sum = start;
    sum = sdot::<0>(sum, w[0], low);
    sum = sdot::<1>(sum, w[1], low);
    sum = sdot::<2>(sum, w[2], low);
    sum = sdot::<3>(sum, w[3], low);
    sum = sdot::<0>(sum, w[4], high);
    sum = sdot::<1>(sum, w[5], high);
    sum = sdot::<2>(sum, w[6], high);
    sdot::<3>(sum, w[7], high)
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
