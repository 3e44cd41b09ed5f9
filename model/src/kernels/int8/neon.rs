//! What the integer products with NEON share: tiles, and how a panel is unpacked. `neon_dot.rs` multiplies one row of
//! activations at a time, on every 64-bit ARM processor; `neon_i8mm.rs` two, where there are matrix products.
//!
//! A quarter of a panel is four rows: a register holds four columns of each, and eight registers a block. They are
//! unpacked once for some rows of activations. Sums are taken in the order of the other vector kernels, so all of
//! them give the same bits. What std has no stable function for is written as an instruction.
#![allow(unsafe_code, reason = "vector instructions on pointers; each entry checks features and lengths")]

use std::arch::aarch64::*;
use std::arch::asm;

use super::pack::{Form, PANEL};
use super::{Panel, Quantized};
use crate::weights::BLOCK;

/// [`Form`] as a constant parameter.
pub(super) const MINIMUM: u8 = 0;
pub(super) const NIBBLES: u8 = 1;
pub(super) const BYTES: u8 = 2;

pub(super) const fn form(constant: u8) -> Form {
    match constant {
        MINIMUM => Form::NibblesMinimum,
        NIBBLES => Form::Nibbles,
        _ => Form::Bytes,
    }
}

/// Rows of quantized activations, one by one or two by two: either way a row has as many of each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) count: usize,
    pub(super) values: &'a [i8],
    pub(super) scales: &'a [f32],
    pub(super) sums: &'a [i32],
    pub(super) offsets: &'a [f32],
}

impl<'a> Rows<'a> {
    /// One by one, from row `first` on.
    pub(super) fn from(x: &'a Quantized, first: usize) -> Self {
        let block = first * (x.cols() / BLOCK);
        Self {
            count: x.rows() - first,
            values: &x.values[block * BLOCK..],
            scales: &x.scales[block..],
            sums: &x.sums[block..],
            offsets: &x.offsets[block..],
        }
    }
}

/// Pointers into one panel and to the first of a tile's rows of activations and sums.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) panel: *const u8,
    pub(super) blocks: usize,
    pub(super) values: *const i8,
    pub(super) scales: *const f32,
    pub(super) sums: *const i32,
    pub(super) offsets: *const f32,
    y: *mut f32,
    stride: usize,
    rows: usize,
}

/// Checks every length that the tiles rely on, and runs them: of `most` rows (a power of two), then of the largest
/// powers of two that are left.
pub(super) fn for_each_tile(
    panel: Panel<'_>,
    x: Rows<'_>,
    most: usize,
    y: &mut [f32],
    stride: usize,
    run: impl Fn(Tile, usize),
) {
    let blocks = panel.blocks;
    assert!(panel.lines.len() == panel.form.panel_lines(blocks));
    assert!(x.values.len() == x.count * blocks * BLOCK && x.scales.len() == x.count * blocks);
    assert!(x.sums.len() == x.count * blocks && x.offsets.len() == x.count * blocks);
    assert!(panel.rows <= PANEL && panel.rows <= stride);
    assert!(x.count == 0 || y.len() >= (x.count - 1) * stride + panel.rows);
    let mut first = 0;
    while first < x.count {
        let left = x.count - first;
        let take = if left >= most { most } else { 1 << left.ilog2() };
        let tile = Tile {
            panel: panel.lines.as_ptr().cast(),
            blocks,
            values: x.values[first * blocks * BLOCK..].as_ptr(),
            scales: x.scales[first * blocks..].as_ptr(),
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

/// A block of a quarter, unpacked.
#[derive(Clone, Copy)]
pub(super) struct Quarter {
    /// The bytes of its lines; of nibbles the first four registers count.
    pub(super) lines: [uint8x16_t; 8],
    pub(super) scales: float32x4_t,
    /// Zero but with [`MINIMUM`].
    pub(super) minima: float32x4_t,
}

impl Tile {
    /// # Safety
    /// `block` is one of the panel's, `quarter < 4`.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn quarter<const FORM: u8>(self, block: usize, quarter: usize) -> Quarter {
        // SAFETY: lines of 64 bytes hold 16 of each quarter, and 32 bytes of scales 8; minima follow 32 bytes later.
        unsafe {
            let (scales, quants) = form(FORM).offsets(block);
            let (scales, quants) =
                (self.panel.add(scales + 8 * quarter), self.panel.add(quants + 16 * quarter));
            let mut lines = [vdupq_n_u8(0); 8];
            for (i, line) in lines.iter_mut().enumerate().take(form(FORM).lines()) {
                *line = vld1q_u8(quants.add(64 * i));
            }
            let minima = if FORM == MINIMUM { halves(scales.add(32)) } else { vdupq_n_f32(0.0) };
            Quarter { lines, scales: halves(scales), minima }
        }
    }

    /// Writes the four sums of a quarter in row t, or those of them that are there.
    ///
    /// # Safety
    /// Row t is one of the tile's, `quarter < 4`.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn store(self, quarter: usize, t: usize, sums: float32x4_t) {
        let there = self.rows.saturating_sub(4 * quarter);
        if there == 0 {
            return;
        }
        // SAFETY: `rows` sums of row t are inside y, of which `there` are from this quarter's first on.
        unsafe {
            let y = self.y.add(t * self.stride + 4 * quarter);
            if there >= 4 {
                vst1q_f32(y, sums);
            } else {
                let mut four = [0f32; 4];
                vst1q_f32(four.as_mut_ptr(), sums);
                std::ptr::copy_nonoverlapping(four.as_ptr(), y, there);
            }
        }
    }
}

/// The integers in the bytes of a block: nibbles with their low halves first, bytes with their sign.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn unpacked<const FORM: u8>(lines: [uint8x16_t; 8]) -> [int8x16_t; 8] {
    let mut w = [vdupq_n_s8(0); 8];
    if FORM == BYTES {
        for (w, line) in w.iter_mut().zip(lines) {
            *w = vreinterpretq_s8_u8(veorq_u8(line, vdupq_n_u8(0x80)));
        }
        return w;
    }
    let (low, high) = w.split_at_mut(4);
    for ((low, high), both) in low.iter_mut().zip(high).zip(lines) {
        *low = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
        *high = vreinterpretq_s8_u8(vshrq_n_u8::<4>(both));
    }
    w
}

/// Four numbers in half precision.
///
/// # Safety
/// `from` points to 8 bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn halves(from: *const u8) -> float32x4_t {
    // SAFETY: the caller vouches for the bytes; the instruction is part of NEON and reads a register.
    unsafe {
        let bits = vld1_u8(from);
        let values: float32x4_t;
        asm!(
            "fcvtl {values:v}.4s, {bits:v}.4h",
            values = lateout(vreg) values,
            bits = in(vreg) bits,
            options(pure, nomem, nostack, preserves_flags),
        );
        values
    }
}
