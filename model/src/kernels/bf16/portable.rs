//! The packing and the inner kernel of `bf16.rs` in plain Rust: what the vector instructions must agree with.

use half::bf16;

use super::{Block, Left, PANEL, Part, Rows};
use crate::kernels::matrix::Into;

/// The part's values, row-major.
fn values(source: Rows<'_>, part: Part) -> Vec<f32> {
    let cols = part.first_col..part.first_col + part.cols;
    let rows = part.first_row..part.first_row + part.rows;
    match source {
        Rows::Values { data, stride, .. } => {
            rows.flat_map(|r| data[r * stride..][cols.clone()].iter().copied()).collect()
        }
        Rows::Stored(w) => {
            let all = w.to_f32();
            rows.flat_map(|r| all[r * w.cols()..][cols.clone()].to_vec()).collect()
        }
    }
}

fn pair(low: Option<&f32>, high: Option<&f32>) -> u32 {
    let bits = |x: Option<&f32>| u32::from(bf16::from_f32(x.copied().unwrap_or(0.0)).to_bits());
    bits(low) | bits(high) << 16
}

/// The two values of a pair.
pub(super) fn unpair(pair: u32) -> [f32; 2] {
    [bf16::from_bits(pair as u16).to_f32(), bf16::from_bits((pair >> 16) as u16).to_f32()]
}

pub(super) fn interleave_rows(source: Rows<'_>, part: Part, width: usize, panels: &mut [u32]) {
    let (values, pairs) = (values(source, part), part.rows.div_ceil(2));
    panels[..part.cols.next_multiple_of(width) * pairs].fill(0);
    for j in 0..pairs {
        for c in 0..part.cols {
            let low = values.get(2 * j * part.cols + c);
            let high = values.get((2 * j + 1) * part.cols + c);
            panels[(c / width * pairs + j) * width + c % width] = pair(low, high);
        }
    }
}

pub(super) fn transpose_rows(source: Rows<'_>, part: Part, panels: &mut [u32]) {
    let (values, pairs) = (values(source, part), part.cols.div_ceil(2));
    panels[..part.rows.next_multiple_of(PANEL) * pairs].fill(0);
    for (r, row) in values.chunks_exact(part.cols).enumerate() {
        for (j, two) in row.chunks(2).enumerate() {
            panels[(r / PANEL * pairs + j) * PANEL + r % PANEL] = pair(two.first(), two.get(1));
        }
    }
}

pub(super) fn round_rows(source: Rows<'_>, part: Part, stride: usize, out: &mut [u32]) {
    for (r, row) in values(source, part).chunks_exact(part.cols).enumerate() {
        for (j, two) in row.chunks(2).enumerate() {
            out[r * stride + j] = pair(two.first(), two.get(1));
        }
    }
}

pub(super) fn multiply(block: Block, left: Left<'_>, panel: &[u32], out: &mut [f32]) {
    for i in 0..block.rows {
        for c in 0..block.cols {
            let out = &mut out[i * block.stride + c];
            let mut sum = 0f32;
            for j in 0..block.pairs {
                let [a, b] = unpair(left.pairs[i * left.row_stride + j * left.pair_stride]);
                let [x, y] = unpair(panel[j * PANEL + c]);
                sum += a * x + b * y;
            }
            *out = if block.into == Into::Add { *out + sum } else { sum };
        }
    }
}
