//! What the integer products with NEON share: tiles, and how a panel is unpacked. `neon_dot.rs` multiplies one row of
//! activations at a time, on every 64-bit ARM processor; `neon_i8mm.rs` two, where there are matrix products.
//!
//! A quarter of a panel is four rows: a register holds four columns of each, and eight registers a block. They are
//! unpacked once for some rows of activations. Sums are taken in the order of the other vector kernels, so all of
//! them give the same bits. What std has no stable function for is written as an instruction.
#![allow(unsafe_code, reason = "vector instructions on pointers; each entry checks features and lengths")]

use std::arch::aarch64::*;
use std::arch::asm;

use super::form::Form;
use super::pack::PANEL;
use super::{Panel, Quantized};
use crate::weights::BLOCK;

/// [`Form`] as a constant parameter.
pub(super) const NIBBLES_MINIMUM: u8 = Form::NibblesMinimum as u8;
pub(super) const NIBBLES: u8 = Form::Nibbles as u8;
pub(super) const BYTES: u8 = Form::Bytes as u8;
pub(super) const FIVE_BITS: u8 = Form::FiveBits as u8;
pub(super) const NIBBLE_GROUPS: u8 = Form::NibbleGroups as u8;
pub(super) const SIX_BIT_GROUPS: u8 = Form::SixBitGroups as u8;

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
pub(super) use by_form;

/// What the integers of a form, as [`unpacked`] makes them, are above the weight's; none where it has a minimum.
pub(super) const fn excess<const FORM: u8>() -> i32 {
    match form::<FORM>() {
        Form::NibblesMinimum | Form::NibbleGroups | Form::Bytes => 0,
        Form::Nibbles => 8,
        Form::FiveBits => 16,
        Form::SixBitGroups => 32,
    }
}

/// Whether a block adds a minimum.
pub(super) const fn has_minimum<const FORM: u8>() -> bool {
    matches!(form::<FORM>(), Form::NibblesMinimum | Form::NibbleGroups)
}

/// Rows of quantized activations, one by one or two by two: either way a row has as many of each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) count: usize,
    pub(super) values: &'a [i8],
    pub(super) scales: &'a [f32],
    pub(super) sums: &'a [i32],
    pub(super) halves: &'a [i32],
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
            halves: &x.halves[2 * block..],
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
    pub(super) halves: *const i32,
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
    assert!(x.halves.len() == 2 * x.count * blocks);
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

/// A block of a quarter.
#[derive(Clone, Copy)]
pub(super) struct Quarter {
    /// The bytes of its lines, as many as the form has.
    pub(super) lines: [uint8x16_t; 8],
    pub(super) scales: float32x4_t,
    /// Minima, or the scales of the last 16 columns, where the form has these.
    pub(super) second: float32x4_t,
}

impl Tile {
    /// # Safety
    /// `block` is one of the panel's, `quarter < 4`.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn quarter<const FORM: u8>(self, block: usize, quarter: usize) -> Quarter {
        // SAFETY (of both blocks): a quarter has 16 of a line's 64 bytes, 8 of the 32 of scales in half precision, and 4
        // of the 16 of scales in bytes; minima and second scales follow after all of these.
        let half = |at: usize| unsafe { halves(self.panel.add(at + 8 * quarter)) };
        let word = |at: usize| unsafe { self.panel.add(at + 4 * quarter).cast::<u32>().read_unaligned() };
        let unsigned = |at: usize| {
            let bytes = vreinterpret_u8_u32(vdup_n_u32(word(at)));
            vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))))
        };
        let signed = |at: usize| {
            let bytes = vreinterpret_s8_u32(vdup_n_u32(word(at)));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))
        };
        let (at, quants) = form::<FORM>().offsets(block);
        let units = form::<FORM>().units(block);
        let (scales, second) = match form::<FORM>() {
            Form::NibblesMinimum => (half(at), half(at + 32)),
            Form::Nibbles | Form::Bytes | Form::FiveBits => (half(at), vdupq_n_f32(0.0)),
            Form::NibbleGroups => {
                let negative = vsubq_f32(vdupq_n_f32(0.0), half(units + 32));
                (vmulq_f32(half(units), unsigned(at)), vmulq_f32(negative, unsigned(at + 16)))
            }
            Form::SixBitGroups => {
                (vmulq_f32(half(units), signed(at)), vmulq_f32(half(units), signed(at + 16)))
            }
        };
        let mut lines = [vdupq_n_u8(0); 8];
        for (i, line) in lines.iter_mut().enumerate().take(form::<FORM>().lines()) {
            // SAFETY: as above.
            *line = unsafe { vld1q_u8(self.panel.add(quants + 64 * i + 16 * quarter)) };
        }
        Quarter { lines, scales, second }
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

/// The integers in the lines of a block, above the weight's by their [`excess`]; whole bytes with their sign.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn unpacked<const FORM: u8>(lines: [uint8x16_t; 8]) -> [int8x16_t; 8] {
    if FORM == BYTES {
        return lines.map(|line| vreinterpretq_s8_u8(veorq_u8(line, vdupq_n_u8(0x80))));
    }
    let mut w = [vdupq_n_u8(0); 8];
    for i in 0..4 {
        w[i] = vandq_u8(lines[i], vdupq_n_u8(15));
        w[4 + i] = vshrq_n_u8::<4>(lines[i]);
    }
    if FORM == FIVE_BITS {
        let (h, fifth) = (lines[4], vdupq_n_u8(16));
        let lower = [vshlq_n_u8::<4>(h), vshlq_n_u8::<3>(h), vshlq_n_u8::<2>(h), vshlq_n_u8::<1>(h)];
        let upper = [h, vshrq_n_u8::<1>(h), vshrq_n_u8::<2>(h), vshrq_n_u8::<3>(h)];
        for i in 0..4 {
            w[i] = vorrq_u8(w[i], vandq_u8(lower[i], fifth));
            w[4 + i] = vorrq_u8(w[4 + i], vandq_u8(upper[i], fifth));
        }
    }
    if FORM == SIX_BIT_GROUPS {
        let upper = vdupq_n_u8(0x30);
        for part in 0..2 {
            let h = lines[4 + part];
            let high = [vshlq_n_u8::<4>(h), vshlq_n_u8::<2>(h), h, vshrq_n_u8::<2>(h)];
            for (w, high) in w[4 * part..].iter_mut().zip(high) {
                *w = vorrq_u8(*w, vandq_u8(high, upper));
            }
        }
    }
    w.map(|w| vreinterpretq_s8_u8(w))
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
