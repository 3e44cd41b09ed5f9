use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::fixtures::noise;
use crate::weights::{WeightFormat, WeightMatrix};

fn kernels() -> Vec<Kernel> {
    Kernel::detect().into_iter().chain([Kernel::Portable]).collect()
}

fn rounded(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(bf16::from_f32(*x).to_f32())).collect()
}

/// The product of rounded factors in f64, and the sum of the absolute terms of each element.
fn exact(left: &[f32], right: &[f32], (m, k, n): (usize, usize, usize)) -> Vec<(f64, f64)> {
    let (left, right) = (rounded(left), rounded(right));
    let element = |i: usize, j: usize| {
        let terms = (0..k).map(|p| left[i * k + p] * right[p * n + j]);
        terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
    };
    (0..m * n).map(|at| element(at / n, at % n)).collect()
}

fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|at| values[at % rows * cols + at / rows]).collect()
}
