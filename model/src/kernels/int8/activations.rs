//! Activations in 8 bits: each block of 32 values has its own scale, the largest magnitude over 127.

#[cfg(target_arch = "aarch64")]
use super::{neon::Rows, neon_i8mm::Pairs};
use crate::kernels::simd::simd_fn;
use crate::weights::BLOCK;

/// Rows of activations as the integer kernels read them. Vectors keep their memory from use to use.
#[derive(Debug, Default)]
pub(crate) struct Quantized {
    rows: usize,
    cols: usize,
    /// `[rows, cols]`.
    pub(super) values: Vec<i8>,
    /// Of each block, `[rows, cols / 32]`, as sums and offsets.
    pub(super) scales: Vec<f32>,
    /// Sum of the integers.
    pub(super) sums: Vec<i32>,
    /// The same of the block's first and last 16 columns, `[rows, cols / 16]`.
    pub(super) halves: Vec<i32>,
    /// Sum of the values: scale times integer sum.
    pub(super) offsets: Vec<f32>,
    /// The same for the kernel that reads two rows at once.
    #[cfg(target_arch = "aarch64")]
    pub(super) pairs: Pairs,
}

impl Quantized {
    /// Rounds `x`, `[rows, cols]`, to the nearest multiples of its blocks' scales.
    #[cfg(test)]
    pub(crate) fn new(x: &[f32], cols: usize) -> Self {
        let mut quantized = Self::default();
        quantized.assign(x, cols);
        quantized
    }

    /// The same in place of what was there.
    pub(crate) fn assign(&mut self, x: &[f32], cols: usize) {
        assert!(cols.is_multiple_of(BLOCK) && x.len().is_multiple_of(cols), "whole blocks of activations");
        (self.rows, self.cols) = (x.len() / cols, cols);
        let blocks = x.len() / BLOCK;
        self.values.resize(x.len(), 0);
        self.scales.resize(blocks, 0.0);
        self.sums.resize(blocks, 0);
        self.offsets.resize(blocks, 0.0);
        self.halves.resize(2 * blocks, 0);
        quantize(x, &mut self.values, &mut self.scales, &mut self.halves);
        let halves = self.halves.chunks_exact(2).zip(&mut self.sums);
        halves.for_each(|(halves, sum)| *sum = halves[0] + halves[1]);
        let blocks = self.sums.iter().zip(&self.scales).zip(&mut self.offsets);
        blocks.for_each(|((sum, scale), offset)| *offset = *scale * *sum as f32);
        #[cfg(target_arch = "aarch64")]
        {
            let mut pairs = std::mem::take(&mut self.pairs);
            pairs.assign(Rows::from(self, 0), cols / BLOCK);
            self.pairs = pairs;
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    #[cfg(test)]
    pub(super) fn to_f32(&self) -> Vec<f32> {
        let blocks = self.values.chunks_exact(BLOCK).zip(&self.scales);
        blocks.flat_map(|(block, scale)| block.iter().map(move |q| f32::from(*q) * scale)).collect()
    }
}

/// Adding it rounds to an integer (ties to even) and leaves it in the low bits of the sum.
const ROUNDER: f32 = 12_582_912.0;

simd_fn! {
    fn quantize(x: &[f32], values: &mut [i8], scales: &mut [f32], halves: &mut [i32]) {
        let blocks = x.chunks_exact(BLOCK).zip(values.chunks_exact_mut(BLOCK));
        for (((x, q), scale), sums) in blocks.zip(scales).zip(halves.chunks_exact_mut(2)) {
            let mut lanes = [0f32; 16];
            for half in x.chunks_exact(16) {
                for i in 0..16 {
                    lanes[i] = lanes[i].max(half[i].abs());
                }
            }
            let most = lanes.iter().fold(0f32, |m, v| m.max(*v));
            let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
            let parts = q.chunks_exact_mut(BLOCK / 2).zip(x.chunks_exact(BLOCK / 2));
            for ((q, x), sum) in parts.zip(sums) {
                let mut total = 0i32;
                for (q, x) in q.iter_mut().zip(x) {
                    let rounded = (x * inverse + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()) as i32;
                    *q = rounded as i8;
                    total += rounded;
                }
                *sum = total;
            }
            *scale = most / 127.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::tests::noise;

    #[test]
    fn values_are_kept_to_half_a_step() {
        let mut x = noise(4 * 64, 9);
        x[64..96].fill(0.0);
        x[5] = -40.0;
        let quantized = Quantized::new(&x, 64);
        for (i, (kept, x)) in quantized.to_f32().iter().zip(&x).enumerate() {
            let scale = quantized.scales[i / BLOCK];
            assert!((kept - x).abs() <= 0.500_1 * scale, "{x} became {kept} at scale {scale}");
        }
        for (b, block) in quantized.values.chunks_exact(BLOCK).enumerate() {
            let sum: i32 = block.iter().map(|q| i32::from(*q)).sum();
            assert_eq!(quantized.sums[b], sum);
            let second: i32 = block[BLOCK / 2..].iter().map(|q| i32::from(*q)).sum();
            assert_eq!(quantized.halves[2 * b..2 * b + 2], [sum - second, second]);
            assert_eq!(quantized.offsets[b], quantized.scales[b] * sum as f32);
        }
        assert_eq!(quantized.values[5], -127);
    }
}
