//! The inner kernel of `single.rs` with NEON: blocks of 6 x 16.
#![allow(unsafe_code, reason = "vector instructions; bounds are asserted where pointers are made")]

use std::arch::aarch64::*;

use super::{Block, Left, TRANSPOSED_ROWS};
use crate::kernels::matrix::Into;
use crate::kernels::simd::has_neon;

/// Sums of a block: 24 of 32 registers.
pub(super) const ROWS: usize = 6;
pub(super) const PANEL: usize = 16;

/// Values in a register.
const LANES: usize = 4;

pub(super) fn multiply(block: Block, left: Left<'_>, panel: &[f32], out: &mut [f32]) {
    let last = block.rows - 1;
    assert!(has_neon() && block.depth > 0 && (1..=PANEL).contains(&block.cols), "detected, and not empty");
    assert!(
        last * left.row_stride + (block.depth - 1) * left.depth_stride < left.values.len(),
        "left factor"
    );
    assert!(block.depth * PANEL <= panel.len() && last * block.stride + block.cols <= out.len(), "output");
    // SAFETY: the instructions were detected, and the bounds that the kernel names were just checked.
    unsafe {
        match block.rows {
            1 => multiply_rows::<1>(block, left, panel, out),
            2 => multiply_rows::<2>(block, left, panel, out),
            3 => multiply_rows::<3>(block, left, panel, out),
            4 => multiply_rows::<4>(block, left, panel, out),
            5 => multiply_rows::<5>(block, left, panel, out),
            ROWS => multiply_rows::<ROWS>(block, left, panel, out),
            rows => unreachable!("{rows} rows at once"),
        }
    }
}

/// Sums `M` rows by a panel in registers.
///
/// # Safety
/// `M == block.rows`; the last value of the last row lies in `left.values`, `block.depth` lines in the panel, the
/// last column of the last row in `out`.
#[target_feature(enable = "neon")]
unsafe fn multiply_rows<const M: usize>(block: Block, left: Left<'_>, panel: &[f32], out: &mut [f32]) {
    let mut sums = [[vdupq_n_f32(0.0); PANEL / LANES]; M];
    let mut rows: [*const f32; M] =
        std::array::from_fn(|i| left.values.as_ptr().wrapping_add(i * left.row_stride));
    let mut b = panel.as_ptr();
    for _ in 0..block.depth {
        // SAFETY: `b` is at a line of the panel, and `rows` at a value of each row; see above for their ends.
        let line: [float32x4_t; PANEL / LANES] =
            std::array::from_fn(|c| unsafe { vld1q_f32(b.add(c * LANES)) });
        for (sums, row) in sums.iter_mut().zip(&mut rows) {
            // SAFETY: as above.
            let x = unsafe { vld1q_dup_f32(*row) };
            for (sum, line) in sums.iter_mut().zip(line) {
                *sum = vfmaq_f32(*sum, x, line);
            }
            *row = row.wrapping_add(left.depth_stride);
        }
        b = b.wrapping_add(PANEL);
    }
    for (i, sums) in sums.iter().enumerate() {
        for (sum, to) in sums.iter().zip(out[i * block.stride..][..block.cols].chunks_mut(LANES)) {
            write(block, *sum, to);
        }
    }
}

/// Writes up to four sums to as many places, or adds them.
#[inline]
#[target_feature(enable = "neon")]
fn write(block: Block, sum: float32x4_t, to: &mut [f32]) {
    let mut four = [0f32; LANES];
    four[..to.len()].copy_from_slice(to);
    // SAFETY: four values from four and into four.
    unsafe {
        let value = match block.into {
            Into::Overwrite => vmulq_n_f32(sum, block.alpha),
            Into::Add => vfmaq_n_f32(vld1q_f32(four.as_ptr()), sum, block.alpha),
        };
        vst1q_f32(four.as_mut_ptr(), value);
    }
    to.copy_from_slice(&four[..to.len()]);
}

pub(super) fn transpose(values: &[f32], stride: usize, cols: usize, panel: &mut [f32], width: usize) {
    assert!(has_neon(), "detected");
    assert!((TRANSPOSED_ROWS - 1) * stride + cols <= values.len(), "eight rows");
    assert!(cols == 0 || (cols - 1) * width + TRANSPOSED_ROWS <= panel.len(), "lines of the panel");
    // SAFETY: the instructions were detected, and the bounds just checked.
    unsafe { transpose_rows(values, stride, cols, panel, width) }
}

/// # Safety
/// Eight rows of `cols` values lie in `values`, `cols` lines of eight in `panel`.
#[target_feature(enable = "neon")]
unsafe fn transpose_rows(values: &[f32], stride: usize, cols: usize, panel: &mut [f32], width: usize) {
    let whole = cols / LANES * LANES;
    for first in (0..TRANSPOSED_ROWS).step_by(LANES) {
        for col in (0..whole).step_by(LANES) {
            // SAFETY: four values of four rows, and four lines, all inside as named above.
            unsafe {
                let from = values.as_ptr().add(first * stride + col);
                let rows: [float32x4_t; LANES] = std::array::from_fn(|i| vld1q_f32(from.add(i * stride)));
                for (j, line) in transposed(rows).into_iter().enumerate() {
                    vst1q_f32(panel.as_mut_ptr().add((col + j) * width + first), line);
                }
            }
        }
    }
    for col in whole..cols {
        for i in 0..TRANSPOSED_ROWS {
            panel[col * width + i] = values[i * stride + col];
        }
    }
}

/// The 4 x 4 transpose.
#[inline]
#[target_feature(enable = "neon")]
fn transposed([a, b, c, d]: [float32x4_t; LANES]) -> [float32x4_t; LANES] {
    let (low, high) = ([vzip1q_f32(a, c), vzip1q_f32(b, d)], [vzip2q_f32(a, c), vzip2q_f32(b, d)]);
    [
        vzip1q_f32(low[0], low[1]),
        vzip2q_f32(low[0], low[1]),
        vzip1q_f32(high[0], high[1]),
        vzip2q_f32(high[0], high[1]),
    ]
}
