//! The inner kernel of `single.rs` in plain Rust: for processors without a kernel of their own, and what those are
//! tested against.

use super::{Block, Left, TRANSPOSED_ROWS};
use crate::kernels::matrix::Into;

/// Sums of a block: few enough for sixteen registers of four values.
pub(super) const ROWS: usize = 4;
pub(super) const PANEL: usize = 8;

/// `a * b + c`: rounded once where the compiler may use an instruction for that (ARMv8; and in tests, where speed
/// does not matter), else twice, for a fused multiply-add in software takes fifty times as long.
#[inline(always)]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64", test)) { a.mul_add(b, c) } else { a * b + c }
}

pub(super) fn multiply(block: Block, left: Left<'_>, panel: &[f32], out: &mut [f32]) {
    let mut sums = [[0f32; PANEL]; ROWS];
    let lines = panel.as_chunks::<PANEL>().0;
    if block.rows == ROWS {
        for (k, line) in lines.iter().take(block.depth).enumerate() {
            let at = k * left.depth_stride;
            let a: [f32; ROWS] = std::array::from_fn(|i| left.values[at + i * left.row_stride]);
            for (sums, a) in sums.iter_mut().zip(a) {
                for (sum, b) in sums.iter_mut().zip(line) {
                    *sum = fused(a, *b, *sum);
                }
            }
        }
    } else {
        for (i, sums) in sums.iter_mut().enumerate().take(block.rows) {
            for (k, line) in lines.iter().take(block.depth).enumerate() {
                let a = left.values[k * left.depth_stride + i * left.row_stride];
                for (sum, b) in sums.iter_mut().zip(line) {
                    *sum = fused(a, *b, *sum);
                }
            }
        }
    }
    for (i, sums) in sums.iter().enumerate().take(block.rows) {
        for (out, sum) in out[i * block.stride..][..block.cols].iter_mut().zip(sums) {
            *out = match block.into {
                Into::Overwrite => block.alpha * sum,
                Into::Add => fused(block.alpha, *sum, *out),
            };
        }
    }
}

pub(super) fn transpose(values: &[f32], stride: usize, cols: usize, panel: &mut [f32], width: usize) {
    for i in 0..TRANSPOSED_ROWS {
        for (j, x) in values[i * stride..][..cols].iter().enumerate() {
            panel[j * width + i] = *x;
        }
    }
}
