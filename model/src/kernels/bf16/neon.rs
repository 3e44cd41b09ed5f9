//! Packing and inner kernel with NEON and its bf16 instructions (FEAT_BF16).
//!
//! Stretches of a row are expanded to f32 and rounded with `bfcvtn`, to nearest with ties to even. `bfmmla` sums two
//! rows by two columns over two pairs at once. Products are exact there too, but its sums are rounded to odd, not to
//! nearest, and subnormal numbers become zero: a sum is off by at most twice what plain Rust's may be. std has no
//! stable functions for either instruction.
#![allow(unsafe_code, reason = "vector instructions; bounds are asserted where pointers are made")]

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use super::{Block, Left, PANEL, Part, ROWS, Rows};
use crate::kernels::matrix::Into;
use crate::kernels::simd::has_neon;

/// Values of a row that are expanded and rounded together; a whole number of stored blocks.
const STRETCH: usize = 256;

/// Words in a register.
const LANES: usize = 4;

/// A rounded stretch of a row.
type Words = [u32; STRETCH / 2];

/// Whether the processor has the instructions of this file.
pub(super) fn available() -> bool {
    has_neon() && is_aarch64_feature_detected!("bf16")
}

pub(super) fn interleave_rows(source: Rows<'_>, part: Part, width: usize, panels: &mut [u32]) {
    assert!(available() && width.is_multiple_of(PANEL), "detected, and whole lines");
    // SAFETY: the instructions were detected.
    unsafe { interleave(source, part, width, panels) }
}

pub(super) fn transpose_rows(source: Rows<'_>, part: Part, panels: &mut [u32]) {
    assert!(available(), "detected");
    // SAFETY: the instructions were detected.
    unsafe { transpose(source, part, panels) }
}

pub(super) fn round_rows(source: Rows<'_>, part: Part, stride: usize, out: &mut [u32]) {
    assert!(available() && stride >= part.cols.div_ceil(2), "detected, and rows do not overlap");
    let mut words = [0; STRETCH / 2];
    for row in 0..part.rows {
        for col in (0..part.cols).step_by(STRETCH) {
            // SAFETY: the instructions were detected.
            unsafe { stretch(source, part, row, col, &mut words) };
            let pairs = (part.cols - col).min(STRETCH).div_ceil(2);
            out[row * stride + col / 2..][..pairs].copy_from_slice(&words[..pairs]);
        }
    }
}

pub(super) fn multiply(block: Block, left: Left<'_>, panel: &[u32], out: &mut [f32]) {
    let last = block.rows - 1;
    assert!(available() && block.pairs > 0 && (1..=PANEL).contains(&block.cols), "detected, and not empty");
    assert!(block.rows <= ROWS, "{} rows at once", block.rows);
    assert!(last * left.row_stride + (block.pairs - 1) * left.pair_stride < left.pairs.len(), "left factor");
    assert!(
        block.pairs * PANEL <= panel.len() && last * block.stride + block.cols <= out.len(),
        "panel, output"
    );
    // SAFETY: the instructions were detected, and the bounds that the kernels name were just checked.
    unsafe {
        match (block.rows.div_ceil(2), left.pair_stride == 1) {
            (1, true) => multiply_rows::<1, true>(block, left, panel, out),
            (_, true) => multiply_rows::<2, true>(block, left, panel, out),
            (1, false) => multiply_rows::<1, false>(block, left, panel, out),
            (_, false) => multiply_rows::<2, false>(block, left, panel, out),
        }
    }
}

/// Sums of two rows by two columns: the first row's, then the second's.
type Square = float32x4_t;

/// Sums `M` pairs of rows by one panel in registers; a last odd row is taken twice and written once.
///
/// # Safety
/// `M == block.rows.div_ceil(2)`; the last pair of the last row lies in `left.pairs`, `block.pairs` rows of the
/// panel in `panel`, the last column of the last row in `out`; `DENSE` if pairs of a row are neighbours.
#[target_feature(enable = "neon,bf16")]
unsafe fn multiply_rows<const M: usize, const DENSE: bool>(
    block: Block,
    left: Left<'_>,
    panel: &[u32],
    out: &mut [f32],
) {
    let mut sums = [[vdupq_n_f32(0.0); PANEL / 2]; M];
    let row = |i: usize| left.pairs.as_ptr().wrapping_add(i.min(block.rows - 1) * left.row_stride);
    let mut rows: [[*const u32; 2]; M] = std::array::from_fn(|i| [row(2 * i), row(2 * i + 1)]);
    let mut columns = panel.as_ptr();
    for _ in 0..block.pairs / 2 {
        // SAFETY: two pairs of each row and two rows of the panel are left; see above for their ends.
        unsafe { step::<M, DENSE, 2>(&mut sums, rows, left.pair_stride, columns) };
        rows = rows.map(|two| two.map(|row| row.wrapping_add(2 * left.pair_stride)));
        columns = columns.wrapping_add(2 * PANEL);
    }
    if block.pairs % 2 == 1 {
        // SAFETY: one of each is left.
        unsafe { step::<M, DENSE, 1>(&mut sums, rows, left.pair_stride, columns) };
    }
    for (i, sums) in sums.iter().enumerate() {
        for (c, [a, b]) in sums.as_chunks::<2>().0.iter().enumerate() {
            let (a, b) = (vreinterpretq_f64_f32(*a), vreinterpretq_f64_f32(*b));
            let both = [vzip1q_f64(a, b), vzip2q_f64(a, b)].map(|row| vreinterpretq_f32_f64(row));
            for (i, sums) in (2 * i..block.rows).zip(both) {
                let columns = LANES * c..block.cols.min(LANES * (c + 1));
                if !columns.is_empty() {
                    write(block.into, sums, &mut out[i * block.stride..][columns]);
                }
            }
        }
    }
}

/// Adds the products of one or two pairs of each row with as many rows of the panel.
///
/// # Safety
/// `PAIRS` pairs lie at each of `rows`, `stride` words apart (neighbours if `DENSE`), and `PAIRS` rows of the panel at
/// `columns`.
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn step<const M: usize, const DENSE: bool, const PAIRS: usize>(
    sums: &mut [[Square; PANEL / 2]; M],
    rows: [[*const u32; 2]; M],
    stride: usize,
    columns: *const u32,
) {
    // SAFETY (of both blocks): the caller vouches for two pairs, or for one where no second is read.
    let rows = rows.map(|[a, b]| unsafe {
        if PAIRS == 2 && DENSE {
            return vcombine_u32(vld1_u32(a), vld1_u32(b));
        }
        let second = |row: *const u32| if PAIRS == 2 { *row.add(stride) } else { 0 };
        let words = [*a, second(a), *b, second(b)];
        vld1q_u32(words.as_ptr())
    });
    for c in 0..PANEL / LANES {
        let (first, second) = unsafe {
            let first = vld1q_u32(columns.add(LANES * c));
            (first, if PAIRS == 2 { vld1q_u32(columns.add(PANEL + LANES * c)) } else { vdupq_n_u32(0) })
        };
        let (low, high) = (vzip1q_u32(first, second), vzip2q_u32(first, second));
        for (sums, row) in sums.iter_mut().zip(rows) {
            sums[2 * c] = bfmmla(sums[2 * c], row, low);
            sums[2 * c + 1] = bfmmla(sums[2 * c + 1], row, high);
        }
    }
}

/// Writes up to four sums to as many places, or adds them.
#[inline]
#[target_feature(enable = "neon")]
fn write(into: Into, sums: float32x4_t, to: &mut [f32]) {
    let mut four = [0f32; LANES];
    // SAFETY: four values into four.
    unsafe { vst1q_f32(four.as_mut_ptr(), sums) };
    for (to, sum) in to.iter_mut().zip(four) {
        *to = if into == Into::Add { *to + sum } else { sum };
    }
}

#[target_feature(enable = "neon,bf16")]
fn interleave(source: Rows<'_>, part: Part, width: usize, panels: &mut [u32]) {
    let pairs = part.rows.div_ceil(2);
    let (mut first, mut second) = ([0; STRETCH / 2], [0; STRETCH / 2]);
    for j in 0..pairs {
        for from in (0..part.cols.next_multiple_of(width)).step_by(STRETCH) {
            stretch(source, part, 2 * j, from, &mut first);
            stretch(source, part, 2 * j + 1, from, &mut second);
            let end = part.cols.next_multiple_of(width).min(from + STRETCH);
            for (group, col) in (from..end).step_by(PANEL).enumerate() {
                let words = group * PANEL / 2..(group + 1) * PANEL / 2;
                let line = &mut panels[(col / width * pairs + j) * width + col % width..][..PANEL];
                zip(&first[words.clone()], &second[words], line);
            }
        }
    }
}

#[target_feature(enable = "neon,bf16")]
fn transpose(source: Rows<'_>, part: Part, panels: &mut [u32]) {
    let pairs = part.cols.div_ceil(2);
    let mut words = [[0; STRETCH / 2]; LANES];
    for row in (0..part.rows.next_multiple_of(PANEL)).step_by(LANES) {
        let panel = &mut panels[row / PANEL * pairs * PANEL..][..pairs * PANEL];
        for col in (0..part.cols).step_by(STRETCH) {
            for (i, words) in words.iter_mut().enumerate() {
                stretch(source, part, row + i, col, words);
            }
            let lines = panel[col / 2 * PANEL..].chunks_mut(LANES * PANEL).take(STRETCH / 2 / LANES);
            for (group, lines) in lines.enumerate() {
                let rows = words.each_ref().map(|words| load(&words[group * LANES..][..LANES]));
                for (line, column) in lines.chunks_exact_mut(PANEL).zip(transposed(rows)) {
                    store(&mut line[row % PANEL..][..LANES], column);
                }
            }
        }
    }
}

/// The 4 x 4 transpose of words.
#[inline]
#[target_feature(enable = "neon")]
fn transposed([a, b, c, d]: [uint32x4_t; LANES]) -> [uint32x4_t; LANES] {
    let (low, high) = ([vzip1q_u32(a, c), vzip1q_u32(b, d)], [vzip2q_u32(a, c), vzip2q_u32(b, d)]);
    [
        vzip1q_u32(low[0], low[1]),
        vzip2q_u32(low[0], low[1]),
        vzip1q_u32(high[0], high[1]),
        vzip2q_u32(high[0], high[1]),
    ]
}

/// The values of a row of the part from column `col` of the part on, rounded; zero where the part has none.
#[target_feature(enable = "neon,bf16")]
fn stretch(source: Rows<'_>, part: Part, row: usize, col: usize, words: &mut Words) {
    let count = part.cols.saturating_sub(col).min(STRETCH);
    if row >= part.rows || count == 0 {
        return words.fill(0);
    }
    let (row, col) = (part.first_row + row, part.first_col + col);
    let mut values = [0f32; STRETCH];
    match source {
        Rows::Values { data, stride } => {
            values[..count].copy_from_slice(&data[row * stride + col..][..count]);
        }
        Rows::Stored(w) => w.dequantize_span(row, col, &mut values[..count]),
    }
    for (words, values) in words.as_chunks_mut::<LANES>().0.iter_mut().zip(values.as_chunks::<8>().0) {
        // SAFETY: a register from each half of eight values.
        let (low, high) = unsafe { (vld1q_f32(values.as_ptr()), vld1q_f32(values[LANES..].as_ptr())) };
        store(words, rounded(low, high));
    }
}

/// A line of pairs of what two rows hold: `PANEL` values each.
#[inline]
#[target_feature(enable = "neon")]
fn zip(first: &[u32], second: &[u32], line: &mut [u32]) {
    let halves = first.chunks_exact(LANES).zip(second.chunks_exact(LANES));
    for ((first, second), out) in halves.zip(line.chunks_exact_mut(2 * LANES)) {
        let (first, second) = (vreinterpretq_u16_u32(load(first)), vreinterpretq_u16_u32(load(second)));
        let (low, high) = out.split_at_mut(LANES);
        store(low, vreinterpretq_u32_u16(vzip1q_u16(first, second)));
        store(high, vreinterpretq_u32_u16(vzip2q_u16(first, second)));
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load(from: &[u32]) -> uint32x4_t {
    assert!(from.len() == LANES, "a register of words");
    // SAFETY: the slice is as long as a register.
    unsafe { vld1q_u32(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store(to: &mut [u32], words: uint32x4_t) {
    assert!(to.len() == LANES, "a register of words");
    // SAFETY: the slice is as long as a register.
    unsafe { vst1q_u32(to.as_mut_ptr(), words) }
}

/// Eight values rounded, `low` first.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn rounded(low: float32x4_t, high: float32x4_t) -> uint32x4_t {
    let words: uint32x4_t;
    // SAFETY: the function is compiled for the instructions, which read and write these registers alone.
    unsafe {
        asm!(
            "bfcvtn {words:v}.4h, {low:v}.4s",
            "bfcvtn2 {words:v}.8h, {high:v}.4s",
            words = out(vreg) words,
            low = in(vreg) low,
            high = in(vreg) high,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    words
}

/// Adds the products of two rows of four bf16 with two columns of four.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn bfmmla(sums: Square, rows: uint32x4_t, columns: uint32x4_t) -> Square {
    let mut sums = sums;
    // SAFETY: as above.
    unsafe {
        asm!(
            "bfmmla {sums:v}.4s, {rows:v}.8h, {columns:v}.8h",
            sums = inout(vreg) sums,
            rows = in(vreg) rows,
            columns = in(vreg) columns,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}
