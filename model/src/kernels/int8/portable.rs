//! The integer product without vector instructions named: the measure of the others, and the path of
//! processors that have none of theirs.

use super::pack::{Form, PANEL};
use super::{Panel, Quantized};
use crate::kernels::simd::simd_fn;
use crate::weights::BLOCK;
use half::f16;

pub(super) fn panel(panel: Panel<'_>, x: &Quantized, y: &mut [f32], stride: usize) {
    let mut weights = [[0i8; BLOCK]; PANEL];
    (0..x.rows()).for_each(|token| y[token * stride..token * stride + panel.rows].fill(0.0));
    for block in 0..panel.blocks {
        expand(panel, block, &mut weights);
        let (scales, minima) = scales(panel, block);
        for token in 0..x.rows() {
            let at = token * panel.blocks + block;
            let values = &x.values[at * BLOCK..(at + 1) * BLOCK];
            let y = &mut y[token * stride..token * stride + panel.rows];
            let (scale, offset) = (x.scales[at], x.offsets[at]);
            add_block(&weights, values, &scales, &minima, scale, offset, y);
        }
    }
}

/// The block's integers without their offset (8 or 128), but nibbles with a minimum as they are.
fn expand(panel: Panel<'_>, block: usize, weights: &mut [[i8; BLOCK]; PANEL]) {
    let (_, quants) = panel.form.offsets(block);
    let bytes: &[u8] = bytemuck::cast_slice(panel.lines);
    let lines = bytes[quants..quants + 64 * panel.form.lines()].chunks_exact(64);
    for (i, line) in lines.enumerate() {
        for (r, row) in weights.iter_mut().enumerate() {
            for b in 0..4 {
                let byte = line[4 * r + b];
                match panel.form {
                    Form::Bytes => row[4 * i + b] = (byte ^ 0x80) as i8,
                    Form::Nibbles => {
                        row[4 * i + b] = (byte & 15) as i8 - 8;
                        row[16 + 4 * i + b] = (byte >> 4) as i8 - 8;
                    }
                    Form::NibblesMinimum => {
                        row[4 * i + b] = (byte & 15) as i8;
                        row[16 + 4 * i + b] = (byte >> 4) as i8;
                    }
                }
            }
        }
    }
}

fn scales(panel: Panel<'_>, block: usize) -> ([f32; PANEL], [f32; PANEL]) {
    let (at, _) = panel.form.offsets(block);
    let bytes: &[u8] = bytemuck::cast_slice(panel.lines);
    let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
    let minimum = |r| match panel.form {
        Form::NibblesMinimum => half(at + 32 + 2 * r),
        Form::Nibbles | Form::Bytes => 0.0,
    };
    (std::array::from_fn(|r| half(at + 2 * r)), std::array::from_fn(minimum))
}

simd_fn! {
    fn add_block(
        weights: &[[i8; BLOCK]; PANEL], x: &[i8], scales: &[f32; PANEL], minima: &[f32; PANEL], scale: f32,
        offset: f32, y: &mut [f32],
    ) {
        for (((y, w), d), m) in y.iter_mut().zip(weights).zip(scales).zip(minima) {
            let mut dot = 0i32;
            for (w, x) in w.iter().zip(x) {
                dot += i32::from(*w) * i32::from(*x);
            }
            *y += d * scale * dot as f32;
            *y += m * offset;
        }
    }
}
