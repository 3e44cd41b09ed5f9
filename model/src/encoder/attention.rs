//! Attention of one sequence in which every row sees every row, forward and backward.
//!
//! The decoder's kernel (`kernels/attention.rs`) skips what lies ahead; here nothing does, and the loops stay
//! simple. Scores exist for one head and a tile of queries at a time; the backward pass rebuilds the probabilities
//! from the saved log-sum-exp of each row (Dao et al. 2022).

use crate::kernels::matrix::{Into, View, ViewMut, product};
use crate::kernels::scratch::buffer;
use crate::kernels::simd::{dot, exp, max, simd_fn, sum};

/// Queries whose scores are held at once.
const TILE_ROWS: usize = 128;

/// One sequence's rows of `heads * head_dim` values.
#[derive(Debug, Clone, Copy)]
pub(super) struct SelfAttention<'a> {
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
}

/// Gradients of its three inputs, as long as they.
#[derive(Debug)]
pub(super) struct SelfAttentionGradients<'a> {
    pub(super) dq: &'a mut [f32],
    pub(super) dk: &'a mut [f32],
    pub(super) dv: &'a mut [f32],
}

impl SelfAttention<'_> {
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn rows(&self) -> usize {
        self.q.len() / self.width()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// One head's columns of `rows` rows from `first`.
    fn view<'a>(&self, data: &'a [f32], head: usize, first: usize, rows: usize) -> View<'a> {
        let width = self.width();
        View::strided(&data[first * width + head * self.head_dim..], rows, self.head_dim, width)
    }

    fn view_mut<'a>(&self, data: &'a mut [f32], head: usize, first: usize, rows: usize) -> ViewMut<'a> {
        let width = self.width();
        ViewMut::strided(&mut data[first * width + head * self.head_dim..], rows, self.head_dim, width)
    }

    /// Writes the context, as wide as the queries, and the log-sum-exp of the scaled scores, `[heads, rows]`.
    pub(super) fn forward(&self, context: &mut [f32], log_sum: &mut [f32]) {
        let rows = self.rows();
        let mut scores = buffer(TILE_ROWS.min(rows) * rows);
        for head in 0..self.heads {
            let (keys, values) = (self.view(self.k, head, 0, rows), self.view(self.v, head, 0, rows));
            for first in (0..rows).step_by(TILE_ROWS) {
                let n = TILE_ROWS.min(rows - first);
                let p = &mut scores[..n * rows];
                let queries = self.view(self.q, head, first, n);
                product(ViewMut::new(p, n, rows), Into::Overwrite, queries, keys.t(), self.scale());
                softmax(p, rows, &mut log_sum[head * rows + first..][..n]);
                let out = self.view_mut(context, head, first, n);
                product(out, Into::Overwrite, View::new(p, n, rows), values, 1.0);
            }
        }
    }

    /// Overwrites the gradients, given that of the context.
    pub(super) fn backward(&self, log_sum: &[f32], dcontext: &[f32], out: &mut SelfAttentionGradients<'_>) {
        let rows = self.rows();
        let mut p = buffer(TILE_ROWS.min(rows) * rows);
        let mut dp = buffer(TILE_ROWS.min(rows) * rows);
        for head in 0..self.heads {
            let (keys, values) = (self.view(self.k, head, 0, rows), self.view(self.v, head, 0, rows));
            for first in (0..rows).step_by(TILE_ROWS) {
                let n = TILE_ROWS.min(rows - first);
                let into = if first == 0 { Into::Overwrite } else { Into::Add };
                let (p, dp) = (&mut p[..n * rows], &mut dp[..n * rows]);
                let (queries, scale) = (self.view(self.q, head, first, n), self.scale());
                let dcontext = self.view(dcontext, head, first, n);
                product(ViewMut::new(p, n, rows), Into::Overwrite, queries, keys.t(), scale);
                probabilities(p, rows, &log_sum[head * rows + first..][..n]);
                product(ViewMut::new(dp, n, rows), Into::Overwrite, dcontext, values.t(), 1.0);
                let dv = self.view_mut(out.dv, head, 0, rows);
                product(dv, into, View::new(p, n, rows).t(), dcontext, 1.0);
                softmax_backward(p, dp, rows);
                let dscores = View::new(dp, n, rows);
                product(self.view_mut(out.dq, head, first, n), Into::Overwrite, dscores, keys, scale);
                product(self.view_mut(out.dk, head, 0, rows), into, dscores.t(), queries, scale);
            }
        }
    }
}

simd_fn! {
    fn softmax(p: &mut [f32], keys: usize, log_sum: &mut [f32]) {
        for (row, lse) in p.chunks_exact_mut(keys).zip(log_sum) {
            let m = max(row);
            for x in row.iter_mut() {
                *x = exp(*x - m);
            }
            let total = sum(row);
            for x in row.iter_mut() {
                *x /= total;
            }
            *lse = m + total.ln();
        }
    }
}

simd_fn! {
    /// The probabilities again, from scaled scores and the saved log-sum-exp.
    fn probabilities(p: &mut [f32], keys: usize, log_sum: &[f32]) {
        for (row, lse) in p.chunks_exact_mut(keys).zip(log_sum) {
            for x in row {
                *x = exp(*x - lse);
            }
        }
    }
}

simd_fn! {
    /// `dp = p * (dp - <p, dp>)` by row: the gradient of the scaled scores.
    fn softmax_backward(p: &[f32], dp: &mut [f32], keys: usize) {
        for (p, dp) in p.chunks_exact(keys).zip(dp.chunks_exact_mut(keys)) {
            let mean = dot(p, dp);
            for (d, p) in dp.iter_mut().zip(p) {
                *d = p * (*d - mean);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::noise;

    const HEADS: usize = 2;
    const HEAD_DIM: usize = 4;
    const WIDTH: usize = HEADS * HEAD_DIM;

    /// The context weighted by `weights` and summed, in f64.
    fn weighted([q, k, v]: [&[f32]; 3], weights: &[f32]) -> f64 {
        let rows = q.len() / WIDTH;
        let at =
            |x: &[f32], row: usize, head: usize, i: usize| f64::from(x[row * WIDTH + head * HEAD_DIM + i]);
        let mut total = 0.0;
        for head in 0..HEADS {
            for row in 0..rows {
                let score = |key: usize| -> f64 {
                    (0..HEAD_DIM).map(|i| at(q, row, head, i) * at(k, key, head, i)).sum::<f64>() / 2.0
                };
                let shares: Vec<f64> = (0..rows).map(|key| score(key).exp()).collect();
                let sum: f64 = shares.iter().sum();
                for (key, share) in shares.iter().enumerate() {
                    let values = (0..HEAD_DIM).map(|i| at(v, key, head, i) * at(weights, row, head, i));
                    total += share / sum * values.sum::<f64>();
                }
            }
        }
        total
    }

    #[test]
    fn gradients_are_slopes_below_and_above_a_tile() {
        for rows in [1, 5, TILE_ROWS + 3] {
            let [q, k, v, weights] = [1, 2, 3, 4].map(|salt| noise(rows * WIDTH, 1.0, salt));
            let attention = SelfAttention { heads: HEADS, head_dim: HEAD_DIM, q: &q, k: &k, v: &v };
            let (mut context, mut log_sum) = (vec![9.0; q.len()], vec![9.0; HEADS * rows]);
            attention.forward(&mut context, &mut log_sum);
            let found: f64 = context.iter().zip(&weights).map(|(c, w)| f64::from(c * w)).sum();
            assert!((found - weighted([&q, &k, &v], &weights)).abs() < 1e-4);
            let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![9.0; q.len()]);
            let mut out = SelfAttentionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
            attention.backward(&log_sum, &weights, &mut out);
            for (input, gradient) in [&dq, &dk, &dv].into_iter().enumerate() {
                for index in [0, rows * WIDTH / 2, rows * WIDTH - 1] {
                    let moved = |by: f32| {
                        let mut inputs = [q.clone(), k.clone(), v.clone()];
                        inputs[input][index] += by;
                        weighted(inputs.each_ref().map(Vec::as_slice), &weights)
                    };
                    let slope = (moved(0.01) - moved(-0.01)) / 0.02;
                    assert!((slope - f64::from(gradient[index])).abs() < 1e-3, "{rows} {input} {index}");
                }
            }
        }
    }
}
