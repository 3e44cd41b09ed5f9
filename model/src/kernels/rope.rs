//! Rotary position embedding: inside a head the pair (2j, 2j + 1), or (j, j + half) in the other order, rotates by
//! `position / factor * base^(-2j / head_dim)`.

use super::simd::simd_fn;
use crate::family::{Rope, RowOrder};

/// Cosines and sines for positions `0..positions()`.
#[derive(Debug)]
pub(crate) struct RopeTable {
    pairs: usize,
    order: RowOrder,
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
    /// A table for `positions` positions from `first` on, which [`RopeTable::rotate`] counts from 0.
    pub(crate) fn new(first: usize, positions: usize, rope: &Rope) -> Self {
        let Rope { head_dim, base, factor, order } = *rope;
        let pairs = head_dim / 2;
        let frequency =
            |j: usize| f64::from(base).powf(-((2 * j) as f64) / head_dim as f64) / f64::from(factor);
        let frequencies: Vec<f64> = (0..pairs).map(frequency).collect();
        let range = first..first + positions;
        let angles = || range.clone().flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        Self {
            pairs,
            order,
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
            let (cos, sin) = (&self.cos[from..to], &self.sin[from..to]);
            match self.order {
                RowOrder::Pairs => rotate_pairs(sequence, heads, cos, sin, self.pairs, sign),
                RowOrder::Halves => rotate_halves(sequence, heads, cos, sin, self.pairs, sign),
            }
        }
    }
}

simd_fn! {
    fn rotate_pairs(x: &mut [f32], heads: usize, cos: &[f32], sin: &[f32], pairs: usize, sign: f32) {
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

simd_fn! {
    fn rotate_halves(x: &mut [f32], heads: usize, cos: &[f32], sin: &[f32], pairs: usize, sign: f32) {
        let rows = x.chunks_exact_mut(heads * 2 * pairs);
        for ((row, cos), sin) in rows.zip(cos.chunks_exact(pairs)).zip(sin.chunks_exact(pairs)) {
            for head in row.chunks_exact_mut(2 * pairs) {
                let (first, second) = head.split_at_mut(pairs);
                for (((x, y), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    let (a, b) = (*x, *y);
                    *x = a * c - sign * b * s;
                    *y = b * c + sign * a * s;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotary;

    fn rope(factor: f32, order: RowOrder) -> Rope {
        Rope { head_dim: 6, base: 10_000.0, factor, order }
    }

    #[test]
    fn both_orders_turn_the_same_pairs_and_a_factor_slows_them() {
        let values: Vec<f32> = (0..8 * 12).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut pairs = values.clone();
        RopeTable::new(0, 8, &rope(1.0, RowOrder::Pairs)).rotate(&mut pairs, 2, 0, 8, Turn::Forward);
        let reordered = |row: &[f32]| rotary::to_hugging_face(row, 12, 2);
        let mut halves: Vec<f32> = values.chunks(12).flat_map(reordered).collect();
        RopeTable::new(0, 8, &rope(1.0, RowOrder::Halves)).rotate(&mut halves, 2, 0, 8, Turn::Forward);
        assert_eq!(halves, pairs.chunks(12).flat_map(reordered).collect::<Vec<_>>());
        let mut slow = values.clone();
        RopeTable::new(4, 4, &rope(2.0, RowOrder::Pairs)).rotate(&mut slow[..12], 2, 0, 1, Turn::Forward);
        let mut second = values.clone();
        RopeTable::new(0, 8, &rope(1.0, RowOrder::Pairs)).rotate(&mut second[..12], 2, 2, 1, Turn::Forward);
        assert_eq!(slow, second);
    }

    #[test]
    fn backward_undoes_forward() {
        let table = RopeTable::new(0, 7, &rope(1.0, RowOrder::Pairs));
        let original: Vec<f32> = (0..2 * 5 * 3 * 6).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut x = original.clone();
        table.rotate(&mut x, 3, 2, 5, Turn::Forward);
        let expected = original[1] * (2f32).cos() + original[0] * (2f32).sin();
        assert!((x[1] - expected).abs() < 1e-6);
        table.rotate(&mut x, 3, 2, 5, Turn::Backward);
        assert!(x.iter().zip(&original).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}
