//! The integer product of several rows of activations with i8mm: `smmla` multiplies two rows of eight bytes with two
//! others. A single row is left to the dot products of `neon_dot.rs`.
//!
//! Activations are laid out in pairs of rows once, for all products that read them. A quarter of a panel becomes two
//! pairs of rows, each in four registers of eight columns, by zipping its lines.
#![allow(unsafe_code, reason = "vector instructions on pointers; each entry checks features and lengths")]

use std::arch::aarch64::*;
use std::arch::asm;
use std::arch::is_aarch64_feature_detected;
use std::ops::Range;

use super::form::Form;
use super::neon::*;
use super::neon_dot::{has_dot, panel_dot};
use super::{Panel, Quantized};
use crate::weights::BLOCK;

/// Matrix products of bytes, and dot products for what they leave.
pub(super) fn has_i8mm() -> bool {
    has_dot() && is_aarch64_feature_detected!("i8mm")
}

/// Rows of activations two by two, without a last odd one. Within a block eight columns of one row and of the other
/// take turns; the numbers of a block are followed by those of the other row's.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    values: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    halves: Vec<i32>,
    offsets: Vec<f32>,
}

impl Pairs {
    /// Lays out rows of so many blocks, where this processor multiplies them in pairs.
    pub(super) fn assign(&mut self, x: Rows<'_>, blocks: usize) {
        if !has_i8mm() {
            return;
        }
        interleave::<i8, BLOCK, 8>(x.values, blocks, &mut self.values);
        interleave::<f32, 1, 1>(x.scales, blocks, &mut self.scales);
        interleave::<i32, 1, 1>(x.sums, blocks, &mut self.sums);
        interleave::<i32, 2, 1>(x.halves, blocks, &mut self.halves);
        interleave::<f32, 1, 1>(x.offsets, blocks, &mut self.offsets);
    }

    fn rows(&self, count: usize) -> Rows<'_> {
        let Self { values, scales, sums, halves, offsets } = self;
        Rows { count, values, scales, sums, halves, offsets }
    }
}

/// Of each pair of rows, each with `blocks` times N values, in turns M of the first and M of the second.
fn interleave<V: Copy, const N: usize, const M: usize>(rows: &[V], blocks: usize, pairs: &mut Vec<V>) {
    pairs.clear();
    for two in rows.chunks_exact((2 * blocks * N).max(1)) {
        let (first, second) = two.split_at(blocks * N);
        for (a, b) in first.as_chunks::<M>().0.iter().zip(second.as_chunks::<M>().0) {
            pairs.extend_from_slice(a);
            pairs.extend_from_slice(b);
        }
    }
}

/// The panel with matrix products, and a last odd row of activations with dot products.
pub(super) fn panel_i8mm(panel: Panel<'_>, x: &Quantized, y: &mut [f32], stride: usize) {
    assert!(has_i8mm());
    let even = x.rows() / 2 * 2;
    macro_rules! tiles {
        ($form:ident) => {
            // SAFETY: the features were just detected, and `for_each_tile` has checked that the panel and the tile's
            // rows of activations and sums lie inside their slices. An even number of rows is cut into even tiles; a
            // panel has four quarters.
            for_each_tile(panel, x.pairs.rows(even), 8, y, stride, |tile, take| unsafe {
                match take {
                    8 => (0..4).for_each(|quarter| run::<4, 1, $form>(tile, quarter)),
                    4 => (0..4).for_each(|quarter| run::<2, 1, $form>(tile, quarter)),
                    _ => (0..4).step_by(2).for_each(|quarter| run::<1, 2, $form>(tile, quarter)),
                }
            })
        };
    }
    by_form!(panel.form, tiles);
    if even < x.rows() {
        panel_dot(panel, x, even, y, stride);
    }
}

/// P pairs of rows of activations against Q quarters of a panel.
///
/// # Safety
/// A tile of [`for_each_tile`] with 2 P rows of [`Pairs`], and `quarter + Q <= 4`.
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn run<const P: usize, const Q: usize, const FORM: u8>(tile: Tile, quarter: usize) {
    // SAFETY (of the whole body): the caller vouches for `blocks` blocks of integers, scales and pairs of
    // activations, and for the sums of each of 2 P rows.
    unsafe {
        // Of two rows of weights and two of activations: the first with both, then the second.
        let mut acc = [[[vdupq_n_f32(0.0); 2]; P]; Q];
        for block in 0..tile.blocks {
            for (q, acc) in acc.iter_mut().enumerate() {
                let part = tile.quarter::<FORM>(block, quarter + q);
                let w = paired::<FORM>(part.lines);
                let scales = [vzip1q_f32(part.scales, part.scales), vzip2q_f32(part.scales, part.scales)];
                let second = [vzip1q_f32(part.second, part.second), vzip2q_f32(part.second, part.second)];
                for (p, acc) in acc.iter_mut().enumerate() {
                    let at = 2 * (p * tile.blocks + block);
                    let x: [int8x16_t; 4] =
                        std::array::from_fn(|c| vld1q_s8(tile.values.add(at * BLOCK + 16 * c)));
                    let scale = both(tile.scales.add(at));
                    let start = |sum: *const i32| {
                        vmulq_n_s32(vreinterpretq_s32_f32(both(sum.cast())), -excess::<FORM>())
                    };
                    for (half, acc) in acc.iter_mut().enumerate() {
                        let dots = |start, columns: Range<usize>| {
                            columns.fold(start, |dot, c| smmla(dot, w[half][c], x[c]))
                        };
                        if FORM == SIX_BIT_GROUPS {
                            let low = vcvtq_f32_s32(dots(start(tile.halves.add(2 * at)), 0..2));
                            let high = vcvtq_f32_s32(dots(start(tile.halves.add(2 * at + 2)), 2..4));
                            let sum = vfmaq_f32(vmulq_f32(low, scales[half]), high, second[half]);
                            *acc = vfmaq_f32(*acc, sum, scale);
                        } else {
                            let start =
                                if excess::<FORM>() == 0 { vdupq_n_s32(0) } else { start(tile.sums.add(at)) };
                            let dot = vcvtq_f32_s32(dots(start, 0..4));
                            *acc = vfmaq_f32(*acc, dot, vmulq_f32(scales[half], scale));
                        }
                        if has_minimum::<FORM>() {
                            *acc = vfmaq_f32(*acc, second[half], both(tile.offsets.add(at)));
                        }
                    }
                }
            }
        }
        for (q, acc) in acc.iter().enumerate() {
            for (p, acc) in acc.iter().enumerate() {
                tile.store(quarter + q, 2 * p, vuzp1q_f32(acc[0], acc[1]));
                tile.store(quarter + q, 2 * p + 1, vuzp2q_f32(acc[0], acc[1]));
            }
        }
    }
}

/// A quarter's rows 0 and 1 and its rows 2 and 3, each with columns 0 to 7, 8 to 15 and so on of the block.
#[inline]
#[target_feature(enable = "neon")]
fn paired<const FORM: u8>(lines: [uint8x16_t; 8]) -> [[int8x16_t; 4]; 2] {
    let words = unpacked::<FORM>(lines).map(|w| vreinterpretq_s32_s8(w));
    [
        std::array::from_fn(|c| vreinterpretq_s8_s32(vzip1q_s32(words[2 * c], words[2 * c + 1]))),
        std::array::from_fn(|c| vreinterpretq_s8_s32(vzip2q_s32(words[2 * c], words[2 * c + 1]))),
    ]
}

/// Two numbers, twice.
///
/// # Safety
/// `from` points to two numbers.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn both(from: *const f32) -> float32x4_t {
    // SAFETY: the caller vouches for eight bytes.
    unsafe { vreinterpretq_f32_u64(vdupq_n_u64(from.cast::<u64>().read_unaligned())) }
}

/// Adds to the 2 x 2 integers the products of two rows of eight bytes with two others.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut sum = sum;
    // SAFETY: the function is compiled for the instruction, which reads and writes these registers alone.
    unsafe {
        asm!(
            "smmla {sum:v}.4s, {w:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
