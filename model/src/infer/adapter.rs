//! An adapter as inference applies it: beside the base, to the rows of one sequence.

use crate::adapter::Adapter;
use crate::batch::InputError;
use crate::config::{ModelConfig, Projection};
use crate::decoder::LoraPlan;
use crate::kernels::linear::LowRank;
use crate::kernels::matrix::{Into, View, ViewMut, product};
use crate::kernels::scratch::buffer;
use crate::kernels::simd::{dot, simd_fn};

/// Rows from which general matrix products pay.
const MANY_ROWS: usize = 8;

/// An adapter's factors, ready for a model. Shared by all sequences that use it.
#[derive(Debug)]
pub struct LoadedAdapter {
    /// By layer, then by `Projection as usize`.
    layers: Vec<[Option<Factors>; 7]>,
}

#[derive(Debug)]
struct Factors {
    rank: usize,
    /// `[rank, in]`.
    a: Vec<f32>,
    /// `[rank, out]`: transposed, and times the adapter's scale.
    b: Vec<f32>,
}

impl LoadedAdapter {
    pub(super) fn new(adapter: &Adapter, config: &ModelConfig) -> Result<Self, InputError> {
        let plan = LoraPlan::new(&adapter.layout, config)?;
        let layers = (0..config.layers).map(|layer| {
            let theta = &adapter.values[plan.values(layer)];
            Projection::ALL.map(|p| plan.low_rank(layer, p, theta).map(Factors::new))
        });
        Ok(Self { layers: layers.collect() })
    }

    /// `y += scale (x A^T) B^T`, if the projection is adapted.
    pub(super) fn add(&self, layer: usize, projection: Projection, x: &[f32], y: &mut [f32]) {
        if let Some(factors) = &self.layers[layer][projection as usize] {
            factors.add(x, y);
        }
    }
}

impl Factors {
    fn new(low: LowRank<'_>) -> Self {
        let out = low.b.len() / low.rank;
        let mut b = vec![0.0; low.b.len()];
        for (i, row) in low.b.chunks_exact(low.rank).enumerate() {
            row.iter().enumerate().for_each(|(r, value)| b[r * out + i] = value * low.scale);
        }
        Self { rank: low.rank, a: low.a.to_vec(), b }
    }

    fn add(&self, x: &[f32], y: &mut [f32]) {
        let (inputs, out, r) = (self.a.len() / self.rank, self.b.len() / self.rank, self.rank);
        let m = x.len() / inputs;
        let mut low = buffer(m * r);
        if m < MANY_ROWS {
            for ((x, y), low) in x.chunks(inputs).zip(y.chunks_mut(out)).zip(low.chunks_mut(r)) {
                add_row(x, &self.a, &self.b, low, y);
            }
            return;
        }
        let (x, a, b) = (View::new(x, m, inputs), View::new(&self.a, r, inputs), View::new(&self.b, r, out));
        product(ViewMut::new(&mut low, m, r), Into::Overwrite, x, a.t(), 1.0);
        product(ViewMut::new(y, m, out), Into::Add, View::new(&low, m, r), b, 1.0);
    }
}

simd_fn! {
    fn add_row(x: &[f32], a: &[f32], b: &[f32], low: &mut [f32], y: &mut [f32]) {
        for (low, a) in low.iter_mut().zip(a.chunks_exact(x.len())) {
            *low = dot(x, a);
        }
        for (low, b) in low.iter().zip(b.chunks_exact(y.len())) {
            for (y, b) in y.iter_mut().zip(b) {
                *y += low * b;
            }
        }
    }
}
