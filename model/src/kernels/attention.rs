//! Causal grouped-query attention of one sequence, forward and backward.
//!
//! Scores exist for one head and at most a tile of queries at a time. The backward pass rebuilds the
//! probabilities from the saved log-sum-exp of each row (Dao et al. 2022).

use std::ops::Range;

use super::bf16::{self, Precision, Right};
use super::matrix::{Into, View, ViewMut, product};
use super::scratch::buffer;
use super::simd::{dot, exp, max, simd_fn, sum};

/// Queries whose scores are held at once. Fewer skip more of the keys that lie ahead, and are enough to keep
/// the bf16 kernel busy.
const TILE_ROWS_F32: usize = 128;
const TILE_ROWS_BF16: usize = 64;

/// How queries, keys and values are laid out: rows of `heads * head_dim` and `kv_heads * head_dim` values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
    /// Keys a query sees, its own included; `usize::MAX` for all up to its own.
    pub(crate) window: usize,
}

/// Queries at positions `past..past + rows` with the keys and values of positions `0..past + rows`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attention<'a> {
    pub(crate) shape: Heads,
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) past: usize,
    pub(crate) precision: Precision,
}

/// Gradients of the rotated queries and keys and of the values.
#[derive(Debug)]
pub(crate) struct AttentionGradients<'a> {
    pub(crate) dq: &'a mut [f32],
    pub(crate) dk: &'a mut [f32],
    pub(crate) dv: &'a mut [f32],
}

impl Heads {
    /// Values in one row of queries.
    pub(crate) fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Values in one row of keys or values.
    pub(crate) fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn kv_head(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads)
    }

    /// One head's `[rows, head_dim]` columns of a row-major buffer of `width`, from row `first`.
    fn view<'a>(&self, data: &'a [f32], width: usize, head: usize, first: usize, rows: usize) -> View<'a> {
        View::strided(&data[first * width + head * self.head_dim..], rows, self.head_dim, width)
    }

    fn view_mut<'a>(
        &self,
        data: &'a mut [f32],
        width: usize,
        head: usize,
        first: usize,
        rows: usize,
    ) -> ViewMut<'a> {
        ViewMut::strided(&mut data[first * width + head * self.head_dim..], rows, self.head_dim, width)
    }

    /// The first key that the query at that position sees.
    pub(crate) fn first_seen(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window)
    }
}

impl Attention<'_> {
    fn rows(&self) -> usize {
        self.q.len() / self.shape.q_width()
    }

    fn tile_rows(&self) -> usize {
        match self.precision.kernel() {
            Some(_) => TILE_ROWS_BF16,
            None => TILE_ROWS_F32,
        }
    }

    /// Queries of the tile that starts there, and the keys that one of them sees.
    fn tile(&self, first: usize) -> (usize, Range<usize>) {
        let n = self.tile_rows().min(self.rows() - first);
        (n, self.shape.first_seen(self.past + first)..self.past + first + n)
    }

    fn product(&self, out: ViewMut<'_>, into: Into, left: View<'_>, right: View<'_>) {
        match self.precision.kernel() {
            Some(kernel) => bf16::product(kernel, out, into, left, Right::Values(right)),
            None => product(out, into, left, right, 1.0),
        }
    }

    /// Writes the context `[rows, heads * head_dim]` and the log-sum-exp of the scores `[heads, rows]`.
    pub(crate) fn forward(&self, context: &mut [f32], log_sum: &mut [f32]) {
        let (s, rows) = (self.shape, self.rows());
        let mut scores = buffer(self.tile_rows().min(rows) * (self.past + rows));
        for head in 0..s.heads {
            for first in (0..rows).step_by(self.tile_rows()) {
                let (n, seen) = self.tile(first);
                let keys = seen.len();
                let p = &mut scores[..n * keys];
                self.product(
                    ViewMut::new(p, n, keys),
                    Into::Overwrite,
                    self.queries(head, first, n),
                    self.keys(head, &seen).t(),
                );
                let mask = Mask { keys, first: self.past + first - seen.start, window: s.window };
                causal_softmax(p, mask, s.scale, &mut log_sum[head * rows + first..][..n]);
                let out = s.view_mut(context, s.q_width(), head, first, n);
                self.product(out, Into::Overwrite, View::new(p, n, keys), self.values(head, &seen));
            }
        }
    }

    /// Overwrites the gradients, given that of the context. Only for `past == 0`.
    pub(crate) fn backward(&self, log_sum: &[f32], dcontext: &[f32], out: &mut AttentionGradients<'_>) {
        assert!(self.past == 0, "attention gradients need the whole sequence");
        let rows = self.rows();
        let mut p = buffer(self.tile_rows().min(rows) * rows);
        let mut dp = buffer(self.tile_rows().min(rows) * rows);
        let windowed = self.shape.window < rows;
        if windowed {
            out.dk.fill(0.0);
            out.dv.fill(0.0);
        }
        for head in 0..self.shape.heads {
            let mut first_of_group = !windowed && head % (self.shape.heads / self.shape.kv_heads) == 0;
            // Without a window the last tile reaches every key, so it alone overwrites dk and dv.
            for first in (0..rows).step_by(self.tile_rows()).rev() {
                let (n, seen) = self.tile(first);
                let keys = seen.len();
                let tile = Tile {
                    head,
                    first,
                    rows: n,
                    seen,
                    into: if first_of_group { Into::Overwrite } else { Into::Add },
                };
                let lse = &log_sum[head * rows + first..][..n];
                self.tile_backward(&tile, lse, dcontext, (&mut p[..n * keys], &mut dp[..n * keys]), out);
                first_of_group = false;
            }
        }
    }

    fn tile_backward(
        &self,
        t: &Tile,
        lse: &[f32],
        dcontext: &[f32],
        scores: (&mut [f32], &mut [f32]),
        out: &mut AttentionGradients<'_>,
    ) {
        let (s, (p, dp)) = (self.shape, scores);
        let (n, keys, scale, from) = (t.rows, t.seen.len(), self.shape.scale, t.seen.start);
        let (q, k, v) =
            (self.queries(t.head, t.first, n), self.keys(t.head, &t.seen), self.values(t.head, &t.seen));
        let dctx = s.view(dcontext, s.q_width(), t.head, t.first, n);
        let kv = s.kv_head(t.head);
        self.product(ViewMut::new(p, n, keys), Into::Overwrite, q, k.t());
        causal_probabilities(p, Mask { keys, first: t.first - from, window: s.window }, scale, lse);
        self.product(ViewMut::new(dp, n, keys), Into::Overwrite, dctx, v.t());
        self.product(
            s.view_mut(out.dv, s.kv_width(), kv, from, keys),
            t.into,
            View::new(p, n, keys).t(),
            dctx,
        );
        softmax_backward(p, dp, keys, scale);
        self.product(
            s.view_mut(out.dq, s.q_width(), t.head, t.first, n),
            Into::Overwrite,
            View::new(dp, n, keys),
            k,
        );
        self.product(s.view_mut(out.dk, s.kv_width(), kv, from, keys), t.into, View::new(dp, n, keys).t(), q);
    }

    fn queries(&self, head: usize, first: usize, rows: usize) -> View<'_> {
        self.shape.view(self.q, self.shape.q_width(), head, first, rows)
    }

    fn keys(&self, head: usize, seen: &Range<usize>) -> View<'_> {
        self.shape.view(self.k, self.shape.kv_width(), self.shape.kv_head(head), seen.start, seen.len())
    }

    fn values(&self, head: usize, seen: &Range<usize>) -> View<'_> {
        self.shape.view(self.v, self.shape.kv_width(), self.shape.kv_head(head), seen.start, seen.len())
    }
}

/// `rows` queries of one head from row `first`, against the keys that one of them sees.
struct Tile {
    head: usize,
    first: usize,
    rows: usize,
    seen: Range<usize>,
    into: Into,
}

/// Which of a tile's `keys` a row sees: row `i` the last `window` of the first `first + i + 1`.
#[derive(Debug, Clone, Copy)]
struct Mask {
    keys: usize,
    first: usize,
    window: usize,
}

impl Mask {
    #[inline(always)]
    fn split<'a>(&self, row: &'a mut [f32], i: usize) -> [&'a mut [f32]; 3] {
        let (upto, ahead) = row.split_at_mut(self.first + i + 1);
        let (before, seen) = upto.split_at_mut((self.first + i + 1).saturating_sub(self.window));
        [before, seen, ahead]
    }
}

simd_fn! {
    /// Softmax of each row over its visible keys, in place.
    fn causal_softmax(p: &mut [f32], mask: Mask, scale: f32, log_sum: &mut [f32]) {
        for (i, (row, lse)) in p.chunks_exact_mut(mask.keys).zip(log_sum).enumerate() {
            let [before, seen, ahead] = mask.split(row, i);
            let m = max(seen) * scale;
            for x in seen.iter_mut() {
                *x = exp(*x * scale - m);
            }
            let total = sum(seen);
            for x in seen.iter_mut() {
                *x /= total;
            }
            before.fill(0.0);
            ahead.fill(0.0);
            *lse = m + total.ln();
        }
    }
}

simd_fn! {
    /// The probabilities again, from raw scores and the saved log-sum-exp.
    fn causal_probabilities(p: &mut [f32], mask: Mask, scale: f32, log_sum: &[f32]) {
        for (i, (row, lse)) in p.chunks_exact_mut(mask.keys).zip(log_sum).enumerate() {
            let [before, seen, ahead] = mask.split(row, i);
            for x in seen {
                *x = exp(*x * scale - lse);
            }
            before.fill(0.0);
            ahead.fill(0.0);
        }
    }
}

simd_fn! {
    /// `dp = p * (dp - <p, dp>) * scale` by row: the gradient of the raw scores.
    fn softmax_backward(p: &[f32], dp: &mut [f32], keys: usize, scale: f32) {
        for (p, dp) in p.chunks_exact(keys).zip(dp.chunks_exact_mut(keys)) {
            let mean = dot(p, dp);
            for (d, p) in dp.iter_mut().zip(p) {
                *d = p * (*d - mean) * scale;
            }
        }
    }
}
