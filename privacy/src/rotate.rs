//! A seeded randomized Walsh-Hadamard rotation, in blocks.
//!
//! It spreads an update's weight evenly, so that the integers on the grid are small and the ring can be narrow.
//! It keeps the L2 norm; privacy rests on the integer check that comes after it, never on this.

use chacha20::ChaCha20;
use cipher::{KeyIvInit, StreamCipher};
use sha2::{Digest, Sha256};

/// Longest block: 16 KiB of values stay in the first-level cache, and padding costs under one block.
const BLOCK_MAX: usize = 4096;

/// Signs, then the orthonormal Walsh-Hadamard transform of each block (Suresh et al. 2017, "Distributed Mean
/// Estimation with Limited Communication", section 3). Public: device and coordinator derive the same one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation {
    seed: [u8; 32],
    dimension: usize,
}

impl Rotation {
    /// The rotation of vectors of `dimension` values; `context` is public and differs by round.
    #[must_use]
    pub fn new(dimension: usize, context: &[u8]) -> Self {
        let hash = Sha256::new().chain_update("fleetune rotation v1").chain_update(context);
        Self { seed: hash.finalize().into(), dimension }
    }

    /// Length of a rotated vector of `dimension` values: whole blocks.
    #[must_use]
    pub fn rotated_len(dimension: usize) -> usize {
        dimension.next_multiple_of(block_len(dimension))
    }

    /// Rotates and scales by `factor`; the result is padded to whole blocks.
    ///
    /// # Panics
    /// If the length is not the rotation's.
    #[must_use]
    pub fn apply(&self, values: &[f32], factor: f64) -> Vec<f32> {
        assert_eq!(values.len(), self.dimension, "the rotation is for vectors of its own dimension");
        let mut rotated = values.to_vec();
        rotated.resize(Self::rotated_len(self.dimension), 0.0);
        let block = block_len(self.dimension);
        let factor = narrow(factor / root(block));
        self.for_each_block(&mut rotated, |values, signs| {
            sign(values, signs, factor);
            transform(values);
        });
        rotated
    }

    /// Undoes [`Rotation::apply`], with its own factor, and cuts the padding off.
    ///
    /// # Panics
    /// If the length is not that of a rotated vector.
    #[must_use]
    pub fn undo(&self, mut rotated: Vec<f32>, factor: f64) -> Vec<f32> {
        assert_eq!(rotated.len(), Self::rotated_len(self.dimension), "a rotated vector has whole blocks");
        let factor = narrow(factor / root(block_len(self.dimension)));
        self.for_each_block(&mut rotated, |values, signs| {
            transform(values);
            sign(values, signs, factor);
        });
        rotated.truncate(self.dimension);
        rotated
    }

    /// Calls `work` with each block and its random bits, one a value.
    fn for_each_block(&self, values: &mut [f32], work: impl Fn(&mut [f32], &[u8])) {
        let mut cipher = ChaCha20::new(&self.seed.into(), &[0; 12].into());
        let block = block_len(self.dimension);
        let mut bits = vec![0u8; block.div_ceil(8)];
        for values in values.chunks_exact_mut(block) {
            bits.fill(0);
            cipher.apply_keystream(&mut bits);
            work(values, &bits);
        }
    }
}

/// The least power of two that holds the vector, up to [`BLOCK_MAX`].
fn block_len(dimension: usize) -> usize {
    dimension.max(1).next_power_of_two().min(BLOCK_MAX)
}

#[expect(clippy::cast_precision_loss, reason = "blocks are short")]
fn root(block: usize) -> f64 {
    (block as f64).sqrt()
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
fn narrow(value: f64) -> f32 {
    value as f32
}

fn sign(values: &mut [f32], signs: &[u8], factor: f32) {
    for (values, bits) in values.chunks_mut(8).zip(signs) {
        for (at, value) in values.iter_mut().enumerate() {
            let flip = u32::from((bits >> at) & 1) << 31;
            *value = f32::from_bits((*value * factor).to_bits() ^ flip);
        }
    }
}

/// The Walsh-Hadamard transform in natural order, not normalised. Two levels a pass: half the loads.
fn transform(values: &mut [f32]) {
    let mut half = 1;
    if values.len().trailing_zeros() % 2 == 1 {
        for pair in values.chunks_exact_mut(2) {
            (pair[0], pair[1]) = (pair[0] + pair[1], pair[0] - pair[1]);
        }
        half = 2;
    }
    while half < values.len() {
        for four in values.chunks_exact_mut(4 * half) {
            let (low, high) = four.split_at_mut(2 * half);
            let ((a, b), (c, d)) = (low.split_at_mut(half), high.split_at_mut(half));
            for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
                let (p, q, r, s) = (*a + *b, *a - *b, *c + *d, *c - *d);
                (*a, *b, *c, *d) = (p + r, q + s, p - r, q - s);
            }
        }
        half *= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::known::value;
    use proptest::prelude::*;

    #[test]
    fn the_transform_equals_the_reference() {
        let known = value("walsh_hadamard");
        let numbers = |field: &str| -> Vec<f64> {
            known[field].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
        };
        let mut values: Vec<f32> = numbers("input").into_iter().map(narrow).collect();
        transform(&mut values);
        for (value, expected) in values.iter().zip(numbers("output")) {
            assert!((f64::from(*value) / 8f64.sqrt() - expected).abs() < 1e-5, "{value} for {expected}");
        }
    }

    #[test]
    fn a_spike_is_spread_over_its_block_and_the_seed_matters() {
        let mut spike = vec![0f32; 10_000];
        spike[777] = 1.0;
        let rotated = Rotation::new(10_000, b"a").apply(&spike, 1.0);
        assert_eq!(rotated.len(), 12_288);
        let largest = rotated.iter().fold(0f32, |most, v| most.max(v.abs()));
        assert!((largest - 1.0 / 64.0).abs() < 1e-6, "{largest}");
        assert_ne!(rotated, Rotation::new(10_000, b"b").apply(&spike, 1.0));
    }

    proptest! {
        #[test]
        fn undone_it_is_the_vector_and_the_norm_is_kept(
            values in prop::collection::vec(-10f32..10.0, 1..9000), seed in any::<[u8; 4]>(),
        ) {
            let rotation = Rotation::new(values.len(), &seed);
            let rotated = rotation.apply(&values, 3.0);
            let norm = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            prop_assert!((norm(&rotated) - 3.0 * norm(&values)).abs() <= 1e-5 * (1.0 + norm(&rotated)));
            let back = rotation.undo(rotated, 1.0 / 3.0);
            prop_assert_eq!(back.len(), values.len());
            for (a, b) in back.iter().zip(&values) {
                prop_assert!((a - b).abs() < 1e-3);
            }
        }
    }
}
