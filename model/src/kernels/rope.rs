//! Rotary position embedding in GGUF's order for arch llama: inside a head the pair (2j, 2j + 1) rotates by
//! `position * base^(-2j / head_dim)`.

use super::simd::simd_fn;

/// Cosines and sines for positions `0..positions()`.
#[derive(Debug)]
pub(crate) struct RopeTable {
    pairs: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Which way a vector is turned.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Turn {
    /// The forward rotation.
    Forward,
    /// Its inverse, which is also the rotation of a gradient.
    Backward,
}

impl RopeTable {
    /// A table for `positions` positions and heads of `head_dim` (even) values.
    pub(crate) fn new(positions: usize, head_dim: usize, base: f32) -> Self {
        Self::from_position(0, positions, head_dim, base)
    }

    /// The same for `positions` positions from `first` on, which [`RopeTable::rotate`] counts from 0.
    pub(crate) fn from_position(first: usize, positions: usize, head_dim: usize, base: f32) -> Self {
        let pairs = head_dim / 2;
        let frequency = |j: usize| f64::from(base).powf(-((2 * j) as f64) / head_dim as f64);
        let frequencies: Vec<f64> = (0..pairs).map(frequency).collect();
        let range = first..first + positions;
        let angles = || range.clone().flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        Self {
            pairs,
            cos: angles().map(|a| a.cos() as f32).collect(),
            sin: angles().map(|a| a.sin() as f32).collect(),
        }
    }

    /// Positions the table covers.
    pub(crate) fn positions(&self) -> usize {
        self.cos.len() / self.pairs
    }

    /// Rotates rows of `heads` heads in place; row `i` stands at position `first + i % length`.
    pub(crate) fn rotate(&self, x: &mut [f32], heads: usize, first: usize, length: usize, turn: Turn) {
        assert!(first + length <= self.positions(), "position {} beyond the rope table", first + length);
        let sign = match turn {
            Turn::Forward => 1.0,
            Turn::Backward => -1.0,
        };
        let (from, to) = (first * self.pairs, (first + length) * self.pairs);
        for sequence in x.chunks_mut(length * heads * 2 * self.pairs) {
            rotate_rows(sequence, heads, &self.cos[from..to], &self.sin[from..to], self.pairs, sign);
        }
    }
}

simd_fn! {
    fn rotate_rows(x: &mut [f32], heads: usize, cos: &[f32], sin: &[f32], pairs: usize, sign: f32) {
        let rows = x.chunks_exact_mut(heads * 2 * pairs);
        for ((row, cos), sin) in rows.zip(cos.chunks_exact(pairs)).zip(sin.chunks_exact(pairs)) {
            for head in row.chunks_exact_mut(2 * pairs) {
                for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                    let (a, b) = (pair[0], pair[1]);
                    pair[0] = a * c - sign * b * s;
                    pair[1] = b * c + sign * a * s;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backward_undoes_forward() {
        let table = RopeTable::new(7, 6, 10_000.0);
        let original: Vec<f32> = (0..2 * 5 * 3 * 6).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut x = original.clone();
        table.rotate(&mut x, 3, 2, 5, Turn::Forward);
        let expected = original[1] * (2f32).cos() + original[0] * (2f32).sin();
        assert!((x[1] - expected).abs() < 1e-6);
        table.rotate(&mut x, 3, 2, 5, Turn::Backward);
        assert!(x.iter().zip(&original).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}
