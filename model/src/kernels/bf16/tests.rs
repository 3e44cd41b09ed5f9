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

/// Checks one product, plain and added, with each kernel, against the f64 product of the rounded factors.
fn check(kernel: Kernel, left: View<'_>, right: Right<'_>, exact: &[(f64, f64)]) {
    let (m, n) = (left.rows, right.shape().1);
    let stride = n + 3;
    for into in [Into::Overwrite, Into::Add] {
        let start = noise(m * stride, 1.0, 9);
        let mut out = start.clone();
        product(kernel, ViewMut::strided(&mut out, m, n, stride), into, left, right);
        for (at, (found, before)) in out.iter().zip(&start).enumerate() {
            let (i, j) = (at / stride, at % stride);
            if j >= n {
                assert_eq!(found.to_bits(), before.to_bits(), "{kernel:?} wrote beyond column {n}");
                continue;
            }
            let (sum, size) = exact[i * n + j];
            let base = if into == Into::Add { f64::from(*before) } else { 0.0 };
            let error = (f64::from(*found) - base - sum).abs();
            assert!(error <= 2e-6 * (size + base.abs()) + 1e-30, "{kernel:?} {into:?} [{i}, {j}]: {error:e}");
        }
    }
}

fn check_views(m: usize, k: usize, n: usize, salt: u32) {
    let (left, right) = (noise(m * k, 2.0, salt), noise(k * n, 0.5, salt + 1));
    let (left_t, right_t) = (transpose(&left, m, k), transpose(&right, k, n));
    let exact = exact(&left, &right, (m, k, n));
    for kernel in kernels() {
        for left in [View::new(&left, m, k), View::new(&left_t, k, m).t()] {
            check(kernel, left, Right::Values(View::new(&right, k, n)), &exact);
            check(kernel, left, Right::Values(View::new(&right_t, n, k).t()), &exact);
        }
    }
}

fn check_stored(format: WeightFormat, rows: usize, cols: usize, m: usize) {
    let weight = WeightMatrix::from_f32(&noise(rows * cols, 0.3, 3), rows, cols, format).unwrap();
    let values = weight.to_f32();
    let (x, dy) = (noise(m * cols, 1.0, 4), noise(m * rows, 1.0, 5));
    let forward = exact(&x, &transpose(&values, rows, cols), (m, cols, rows));
    let backward = exact(&dy, &values, (m, rows, cols));
    for kernel in kernels() {
        check(kernel, View::new(&x, m, cols), Right::StoredTransposed(&weight), &forward);
        check(kernel, View::new(&dy, m, rows), Right::Stored(&weight), &backward);
    }
}

/// Whoever knows the processor says in FLEETUNE_BF16_KERNEL what it has, as `tests/arm/run` does.
#[test]
fn the_kernel_of_this_processor_is_found() {
    let found = Kernel::detect().map_or_else(|| "none".to_owned(), |kernel| format!("{kernel:?}"));
    assert_ne!(found, "Portable");
    if let Ok(expected) = std::env::var("FLEETUNE_BF16_KERNEL") {
        assert_eq!(found, expected);
    }
}

#[test]
fn stored_weights_of_every_format_and_both_directions() {
    for format in WeightFormat::ALL.into_iter().filter(|format| packs(*format)) {
        check_stored(format, 70, 96, 13);
        check_stored(format, 1, 32, 6);
        // Several stretches and several tiles, each with a rest.
        check_stored(format, 801, 416, 3);
        check_stored(format, 33, 1568, 5);
    }
}

#[test]
fn rows_that_are_no_whole_groups() {
    for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::BF16] {
        check_stored(format, 19, 33, 7);
        check_stored(format, 5, 1, 8);
    }
}

#[test]
fn long_sums_of_views() {
    check_views(7, 1601, 65, 1);
    check_views(65, 800, 700, 2);
}

#[test]
fn a_product_without_rows_columns_or_depth() {
    for kernel in kernels() {
        let mut out = [1f32; 4];
        product(
            kernel,
            ViewMut::new(&mut [], 0, 2),
            Into::Overwrite,
            View::new(&[], 0, 3),
            Right::Values(View::new(&[0.0; 6], 3, 2)),
        );
        product(
            kernel,
            ViewMut::new(&mut out, 2, 2),
            Into::Overwrite,
            View::new(&[], 2, 0),
            Right::Values(View::new(&[], 0, 2)),
        );
        assert_eq!(out, [0.0; 4]);
    }
}

/// Where vector instructions for bf16 are, they must pack the same bits as plain Rust, rounding ties to even.
#[test]
fn both_kernels_pack_the_same_bits() {
    let ties: Vec<f32> = (0..37 * 96).map(|i| f32::from_bits(0x3f80_8000 + (i as u32) * 0x8000)).collect();
    let part = Part { first_row: 2, rows: 31, first_col: 32, cols: 64 };
    for format in WeightFormat::ALL.into_iter().filter(|format| packs(*format)) {
        let weight = WeightMatrix::from_f32(&noise(37 * 96, 0.3, 3), 37, 96, format).unwrap();
        for rows in [Rows::Stored(&weight), Rows::Values { data: &ties, stride: 96 }] {
            let packed = kernels().into_iter().map(|kernel| {
                let mut out = vec![vec![0u32; 4096]; 4];
                kernel.interleave_rows(rows, part, PANEL, &mut out[0]);
                kernel.interleave_rows(rows, part, 2 * PANEL, &mut out[1]);
                kernel.transpose_rows(rows, part, &mut out[2]);
                kernel.round_rows(rows, part, 48, &mut out[3]);
                out
            });
            let packed: Vec<_> = packed.collect();
            assert!(packed.iter().all(|p| *p == packed[0]), "{format:?}");
            assert!(packed[0].iter().all(|p| p.iter().any(|word| *word != 0)));
        }
    }
}

/// Against unrounded factors: each is off by at most 2^-9 of itself, so a term by little over 2^-8.
#[test]
fn the_error_is_that_of_bf16() {
    let (m, k, n) = (24, 576, 96);
    let (left, right) = (noise(m * k, 1.0, 1), noise(k * n, 1.0, 2));
    let mut f32_product = vec![0f32; m * n];
    crate::kernels::matrix::product(
        ViewMut::new(&mut f32_product, m, n),
        Into::Overwrite,
        View::new(&left, m, k),
        View::new(&right, k, n),
        1.0,
    );
    let sizes = exact(&left, &right, (m, k, n));
    for kernel in kernels() {
        let mut out = vec![0f32; m * n];
        let right = Right::Values(View::new(&right, k, n));
        product(kernel, ViewMut::new(&mut out, m, n), Into::Overwrite, View::new(&left, m, k), right);
        let mut largest = 0f64;
        for ((found, expected), (_, size)) in out.iter().zip(&f32_product).zip(&sizes) {
            let error = f64::from((found - expected).abs()) / size;
            assert!(error < 1.01 / 256.0, "{kernel:?}: {error}");
            largest = largest.max(error);
        }
        assert!(largest > 1e-5, "{kernel:?}: the factors were not rounded");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_small_shape(m in 1usize..80, k in 1usize..150, n in 1usize..150, salt in 0u32..1000) {
        check_views(m, k, n, salt);
    }
}
