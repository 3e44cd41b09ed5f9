//! A projection's weight as inference multiplies it, and rows of activations in the forms that needs.

use super::observe::Observed;
use crate::kernels::bf16::Precision;
use crate::kernels::int8::{Packed, Quantized};
use crate::kernels::linear::Weight;
use crate::kernels::scratch::{Buffer, buffer};
use crate::weights::WeightMatrix;

/// How a weight is multiplied.
#[derive(Debug)]
pub(super) enum Matrix {
    /// In 8 bits, from a packed copy.
    Packed(Packed),
    /// In f32, from the weight itself.
    Stored,
}

/// Rows of activations; in 8 bits from the first time that they are asked for so.
#[derive(Debug, Default)]
pub(super) struct Input {
    values: Option<Buffer>,
    width: usize,
    quantized: Quantized,
    is_quantized: bool,
    observed: Option<Observed>,
}

impl Input {
    /// Whose rows are measured.
    pub(super) fn observed(observed: Observed) -> Self {
        Self { observed: Some(observed), ..Self::default() }
    }

    /// What was measured, if it was.
    pub(super) fn into_observed(self) -> Option<Observed> {
        self.observed
    }

    /// New rows of `width` values.
    pub(super) fn set(&mut self, values: Buffer, width: usize) {
        if let Some(observed) = &mut self.observed {
            observed.add(&values, width);
        }
        (self.values, self.width, self.is_quantized) = (Some(values), width, false);
    }

    pub(super) fn values(&self) -> &[f32] {
        self.values.as_deref().unwrap_or_default()
    }

    fn quantized(&mut self) -> &Quantized {
        if !self.is_quantized {
            let values = self.values.as_deref().unwrap_or_default();
            self.quantized.assign(values, self.width);
            self.is_quantized = true;
        }
        &self.quantized
    }
}

impl Matrix {
    pub(super) fn new(packed: Option<Packed>) -> Self {
        packed.map_or(Self::Stored, Self::Packed)
    }

    /// The packed copy, if there is one.
    pub(super) fn packed(&self) -> Option<&Packed> {
        match self {
            Self::Packed(packed) => Some(packed),
            Self::Stored => None,
        }
    }

    /// `x W^T`; `weight` is what the matrix was made of.
    pub(super) fn forward(&self, weight: &WeightMatrix, x: &mut Input) -> Buffer {
        let rows = x.values().len() / weight.cols();
        let mut y = buffer(rows * weight.rows());
        match self {
            Self::Packed(packed) => packed.forward(x.quantized(), &mut y),
            Self::Stored => Weight::Stored(weight).forward(x.values(), &mut y, Precision::F32),
        }
        y
    }
}
