//! The integer product without vector instructions named: the measure of the others, and the path of
//! processors that have none of theirs.

use super::form::Form;
use super::pack::PANEL;
use super::{Panel, Quantized};
use crate::kernels::simd::simd_fn;
use crate::weights::BLOCK;
use half::f16;

/// What a block's integers of one row are multiplied with.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Factors {
    /// Of columns 0 to 15 and of columns 16 to 31.
    pub(super) scales: [f32; 2],
    pub(super) minimum: f32,
}

pub(super) fn panel(panel: Panel<'_>, x: &Quantized, y: &mut [f32], stride: usize) {
    (0..x.rows()).for_each(|token| y[token * stride..token * stride + panel.rows].fill(0.0));
    for block in 0..panel.blocks {
        let weights: [_; PANEL] = std::array::from_fn(|row| integers(panel, block, row));
        let factors: [_; PANEL] = std::array::from_fn(|row| factors(panel, block, row));
        for token in 0..x.rows() {
            let at = token * panel.blocks + block;
            let values = &x.values[at * BLOCK..(at + 1) * BLOCK];
            let y = &mut y[token * stride..token * stride + panel.rows];
            let (scale, offset) = (x.scales[at], x.offsets[at]);
            match panel.form {
                Form::SixBitGroups => add_halves(&weights, values, &factors, scale, y),
                Form::NibblesMinimum | Form::Nibbles | Form::Bytes | Form::FiveBits | Form::NibbleGroups => {
                    add_block(&weights, values, &factors, scale, offset, y)
                }
            }
        }
    }
}

/// A block's integers of one row without their offset (8, 16, 32 or 128), but those with a minimum as they are.
pub(super) fn integers(panel: Panel<'_>, block: usize, row: usize) -> [i8; BLOCK] {
    let (_, quants) = panel.form.offsets(block);
    let bytes: &[u8] = bytemuck::cast_slice(panel.lines);
    let lines = &bytes[quants..quants + 64 * panel.form.lines()];
    let byte = |line: usize, b: usize| lines[64 * line + 4 * row + b];
    let mut integers = [0; BLOCK];
    for (column, integer) in integers.iter_mut().enumerate() {
        let (line, b) = (column / 4, column % 4);
        let nibble = || byte(line % 4, b) >> (4 * (line / 4)) & 15;
        *integer = match panel.form {
            Form::Bytes => (byte(line, b) ^ 0x80) as i8,
            Form::Nibbles => nibble() as i8 - 8,
            Form::NibblesMinimum | Form::NibbleGroups => nibble() as i8,
            Form::FiveBits => (nibble() | (byte(4, b) >> line & 1) << 4) as i8 - 16,
            Form::SixBitGroups => {
                (nibble() | (byte(4 + line / 4, b) >> (2 * (line % 4)) & 3) << 4) as i8 - 32
            }
        };
    }
    integers
}

/// What they are multiplied with, in the same operations as when the weight is expanded.
pub(super) fn factors(panel: Panel<'_>, block: usize, row: usize) -> Factors {
    let (at, _) = panel.form.offsets(block);
    let units = panel.form.units(block);
    let bytes: &[u8] = bytemuck::cast_slice(panel.lines);
    let half = |at: usize| f16::from_le_bytes([bytes[at + 2 * row], bytes[at + 2 * row + 1]]).to_f32();
    let byte = |at: usize| bytes[at + row];
    match panel.form {
        Form::Nibbles | Form::Bytes | Form::FiveBits => Factors { scales: [half(at); 2], minimum: 0.0 },
        Form::NibblesMinimum => Factors { scales: [half(at); 2], minimum: half(at + 32) },
        Form::NibbleGroups => Factors {
            scales: [half(units) * f32::from(byte(at)); 2],
            minimum: -(half(units + 32) * f32::from(byte(at + 16))),
        },
        Form::SixBitGroups => {
            Factors { scales: [at, at + 16].map(|at| half(units) * f32::from(byte(at) as i8)), minimum: 0.0 }
        }
    }
}

simd_fn! {
    fn add_block(
        weights: &[[i8; BLOCK]; PANEL], x: &[i8], factors: &[Factors; PANEL], scale: f32, offset: f32,
        y: &mut [f32],
    ) {
        for ((y, w), factors) in y.iter_mut().zip(weights).zip(factors) {
            let mut dot = 0i32;
            for (w, x) in w.iter().zip(x) {
                dot += i32::from(*w) * i32::from(*x);
            }
            *y += factors.scales[0] * scale * dot as f32;
            *y += factors.minimum * offset;
        }
    }
}

simd_fn! {
    /// The same with two scales a block and no minimum.
    fn add_halves(
        weights: &[[i8; BLOCK]; PANEL], x: &[i8], factors: &[Factors; PANEL], scale: f32, y: &mut [f32],
    ) {
        for ((y, w), factors) in y.iter_mut().zip(weights).zip(factors) {
            let halves = w.chunks_exact(BLOCK / 2).zip(x.chunks_exact(BLOCK / 2));
            for ((w, x), d) in halves.zip(factors.scales) {
                let mut dot = 0i32;
                for (w, x) in w.iter().zip(x) {
                    dot += i32::from(*w) * i32::from(*x);
                }
                *y += d * scale * dot as f32;
            }
        }
    }
}
