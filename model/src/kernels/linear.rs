//! Linear projections: `y = x W^T`, with W stored or trained, and LoRA's side branch.
//!
//! A quantized W is expanded a tile at a time; it never exists as a whole in f32.
//! LoRA (Hu et al. 2021) in PEFT's orientation: `y += scale * (x A^T) B^T`, A `[rank, in]`, B `[out, rank]`.

use super::bf16::{self, Precision, Right};
use super::matrix::{Into, View, ViewMut, product};
use super::scratch::{Buffer, buffer};
use super::simd::{dot, simd_fn};
use super::single;
use crate::weights::WeightMatrix;

/// Rows of x up to which a product is done by dot products over tiles that stay in the first-level cache.
const FEW_ROWS: usize = 4;

/// Values of an expanded tile for a product of few rows: 32 KiB.
const TILE_VALUES: usize = 1 << 13;

/// A weight `[rows = out, cols = in]`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Weight<'a> {
    /// As the model file holds it.
    Stored(&'a WeightMatrix),
    /// Row-major values under training.
    Trained { values: &'a [f32], rows: usize, cols: usize },
}

/// LoRA's two factors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LowRank<'a> {
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

/// One of the seven projections of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Linear<'a> {
    pub(crate) weight: Weight<'a>,
    pub(crate) lora: Option<LowRank<'a>>,
    /// Of the product with the weight; LoRA's branch is always f32.
    pub(crate) precision: Precision,
}

/// Where the gradients of one projection go; `None` is not computed.
#[derive(Debug, Default)]
pub(crate) struct LinearGradients<'a> {
    pub(crate) weight: Option<&'a mut [f32]>,
    pub(crate) a: Option<&'a mut [f32]>,
    pub(crate) b: Option<&'a mut [f32]>,
}

impl LinearGradients<'_> {
    /// Whether the projection's input is needed to compute them.
    pub(crate) fn need_input(&self) -> bool {
        self.weight.is_some() || self.a.is_some()
    }
}

impl<'a> Weight<'a> {
    pub(crate) fn rows(&self) -> usize {
        match self {
            Weight::Stored(w) => w.rows(),
            Weight::Trained { rows, .. } => *rows,
        }
    }

    pub(crate) fn cols(&self) -> usize {
        match self {
            Weight::Stored(w) => w.cols(),
            Weight::Trained { cols, .. } => *cols,
        }
    }

    /// `y = x W^T`; x `[m, cols]`, y `[m, rows]`.
    pub(crate) fn forward(&self, x: &[f32], y: &mut [f32], precision: Precision) {
        let (n, k) = (self.rows(), self.cols());
        let m = x.len() / k;
        if m <= FEW_ROWS {
            return self.for_each_tile(|first, tile| dot_tile(x, tile, k, &mut y[first..], n));
        }
        if let Some(kernel) = self.kernel(precision) {
            let left = View::new(x, m, k);
            return bf16::product(
                kernel,
                ViewMut::new(y, m, n),
                Into::Overwrite,
                left,
                self.right_transposed(),
            );
        }
        let (kernel, left) = (single::Kernel::detect(), View::new(x, m, k));
        single::product(kernel, ViewMut::new(y, m, n), Into::Overwrite, left, self.right_transposed(), 1.0);
    }

    /// `dx = dy W`, or added to dx; dy `[m, rows]`, dx `[m, cols]`.
    pub(crate) fn backward_input(&self, dy: &[f32], dx: &mut [f32], into: Into, precision: Precision) {
        let (n, k) = (self.rows(), self.cols());
        let m = dy.len() / n;
        if let Some(kernel) = self.kernel(precision).filter(|_| m > FEW_ROWS) {
            let left = View::new(dy, m, n);
            return bf16::product(kernel, ViewMut::new(dx, m, k), into, left, self.right());
        }
        let (kernel, left) = (single::Kernel::detect(), View::new(dy, m, n));
        single::product(kernel, ViewMut::new(dx, m, k), into, left, self.right(), 1.0);
    }

    fn right(&self) -> Right<'a> {
        match *self {
            Weight::Stored(w) => Right::Stored(w),
            Weight::Trained { values, rows, cols } => Right::Values(View::new(values, rows, cols)),
        }
    }

    fn right_transposed(&self) -> Right<'a> {
        match *self {
            Weight::Stored(w) => Right::StoredTransposed(w),
            Weight::Trained { values, rows, cols } => Right::Values(View::new(values, rows, cols).t()),
        }
    }

    /// What multiplies the weight in that precision, if not the f32 product.
    fn kernel(&self, precision: Precision) -> Option<bf16::Kernel> {
        precision.kernel().filter(|_| match self {
            Weight::Stored(w) => bf16::packs(w.format()),
            Weight::Trained { .. } => true,
        })
    }

    /// Calls `f(first row, values of the rows)`: once for f32 weights, tile by tile for others.
    fn for_each_tile(&self, mut f: impl FnMut(usize, &[f32])) {
        let stored = match self {
            Weight::Trained { values, .. } => return f(0, values),
            Weight::Stored(w) => *w,
        };
        if let Some(values) = stored.as_f32() {
            return f(0, values);
        }
        let (n, k) = (stored.rows(), stored.cols());
        let tile_rows = (TILE_VALUES / k).next_multiple_of(16).min(n);
        let mut tile = buffer(tile_rows * k);
        for first in (0..n).step_by(tile_rows) {
            let rows = tile_rows.min(n - first);
            stored.dequantize_rows(first, rows, &mut tile[..rows * k]);
            f(first, &tile[..rows * k]);
        }
    }
}

simd_fn! {
    /// `y[i, j] = <x[i], w[j]>` for the few rows of x; y's rows are `stride` apart.
    fn dot_tile(x: &[f32], w: &[f32], width: usize, y: &mut [f32], stride: usize) {
        for (j, w) in w.chunks_exact(width).enumerate() {
            for (i, x) in x.chunks_exact(width).enumerate() {
                y[i * stride + j] = dot(x, w);
            }
        }
    }
}

impl LowRank<'_> {
    /// `x A^T`, `[rows of x, rank]`.
    pub(crate) fn project(&self, x: &[f32]) -> Buffer {
        let k = self.a.len() / self.rank;
        let m = x.len() / k;
        let mut low = buffer(m * self.rank);
        let a = View::new(self.a, self.rank, k).t();
        product(ViewMut::new(&mut low, m, self.rank), Into::Overwrite, View::new(x, m, k), a, 1.0);
        low
    }
}

impl Linear<'_> {
    /// `y = x W^T + scale (x A^T) B^T`; returns `x A^T` for the backward pass.
    pub(crate) fn forward(&self, x: &[f32], y: &mut [f32]) -> Option<Buffer> {
        self.weight.forward(x, y, self.precision);
        let lora = self.lora?;
        let (n, k, r) = (self.weight.rows(), self.weight.cols(), lora.rank);
        let m = x.len() / k;
        let low = lora.project(x);
        product(
            ViewMut::new(y, m, n),
            Into::Add,
            View::new(&low, m, r),
            View::new(lora.b, n, r).t(),
            lora.scale,
        );
        Some(low)
    }

    /// Gradients of this projection given that of its output, and of its input when `dx` is given.
    ///
    /// `x` is the input (may be empty if `!gradients.need_input()`), `low` what `forward` returned.
    pub(crate) fn backward(
        &self,
        x: &[f32],
        low: Option<&Buffer>,
        dy: &[f32],
        gradients: &mut LinearGradients<'_>,
        mut dx: Option<(&mut [f32], Into)>,
    ) {
        let (n, k) = (self.weight.rows(), self.weight.cols());
        let m = dy.len() / n;
        let dy_view = View::new(dy, m, n);
        if let Some(dw) = gradients.weight.as_deref_mut() {
            product(ViewMut::new(dw, n, k), Into::Overwrite, dy_view.t(), View::new(x, m, k), 1.0);
        }
        if let Some((dx, into)) = &mut dx {
            self.weight.backward_input(dy, dx, *into, self.precision);
        }
        let (Some(lora), Some(low)) = (self.lora, low) else { return };
        let r = lora.rank;
        if let Some(db) = gradients.b.as_deref_mut() {
            product(ViewMut::new(db, n, r), Into::Overwrite, dy_view.t(), View::new(low, m, r), lora.scale);
        }
        if dx.is_none() && gradients.a.is_none() {
            return;
        }
        let mut dlow = buffer(m * r);
        product(ViewMut::new(&mut dlow, m, r), Into::Overwrite, dy_view, View::new(lora.b, n, r), lora.scale);
        let dlow = View::new(&dlow, m, r);
        if let Some(da) = gradients.a.as_deref_mut() {
            product(ViewMut::new(da, r, k), Into::Overwrite, dlow.t(), View::new(x, m, k), 1.0);
        }
        if let Some((dx, _)) = dx {
            product(ViewMut::new(dx, m, k), Into::Add, dlow, View::new(lora.a, r, k), 1.0);
        }
    }
}
