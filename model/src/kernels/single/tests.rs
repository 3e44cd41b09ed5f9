use proptest::prelude::*;

use super::*;
use crate::fixtures::noise;
use crate::weights::{WeightFormat, WeightMatrix};

fn kernels() -> Vec<Kernel> {
    vec![
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512,
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2,
        #[cfg(target_arch = "aarch64")]
        Kernel::Neon,
        Kernel::Portable,
    ]
    .into_iter()
    .filter(|kernel| available(*kernel))
    .collect()
}

fn available(kernel: Kernel) -> bool {
    match kernel {
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512 => has_avx512(),
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 => has_avx2(),
        #[cfg(target_arch = "aarch64")]
        Kernel::Neon => has_neon(),
        Kernel::Portable => true,
    }
}

/// The product in f64, and the sum of the absolute terms of each element.
fn exact(left: &[f32], right: &[f32], (m, k, n): (usize, usize, usize)) -> Vec<(f64, f64)> {
    let element = |i: usize, j: usize| {
        let terms = (0..k).map(|p| f64::from(left[i * k + p]) * f64::from(right[p * n + j]));
        terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
    };
    (0..m * n).map(|at| element(at / n.max(1), at % n.max(1))).collect()
}

fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|at| values[at % rows * cols + at / rows]).collect()
}

/// Checks one product, plain and added, with each kernel: near the exact one, and the same bits.
fn check(left: View<'_>, right: Right<'_>, exact: &[(f64, f64)]) {
    let (m, n, alpha) = (left.rows, right.shape().1, 0.75f32);
    let stride = n + 3;
    let start = noise(m * stride, 1.0, 9);
    for into in [Into::Overwrite, Into::Add] {
        let mut first: Option<Vec<u32>> = None;
        for kernel in kernels() {
            let mut out = start.clone();
            product(kernel, ViewMut::strided(&mut out, m, n, stride), into, left, right, alpha);
            for (at, (found, before)) in out.iter().zip(&start).enumerate() {
                let (i, j) = (at / stride, at % stride);
                if j >= n {
                    assert_eq!(found.to_bits(), before.to_bits(), "{kernel:?} wrote beyond column {n}");
                    continue;
                }
                let (sum, size) = exact[i * n + j];
                let base = if into == Into::Add { f64::from(*before) } else { 0.0 };
                let error = (f64::from(*found) - base - f64::from(alpha) * sum).abs();
                assert!(
                    error <= 2e-6 * (size + base.abs()) + 1e-30,
                    "{kernel:?} {into:?} [{i}, {j}]: {error:e}"
                );
            }
            let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
            assert!(first.get_or_insert_with(|| bits.clone()) == &bits, "{kernel:?} {into:?}: other bits");
        }
    }
}

fn check_views(m: usize, k: usize, n: usize, salt: u32) {
    let (left, right) = (noise(m * k, 2.0, salt), noise(k * n, 0.5, salt + 1));
    let (left_t, right_t) = (transpose(&left, m, k), transpose(&right, k, n));
    let exact = exact(&left, &right, (m, k, n));
    for left in [View::new(&left, m, k), View::new(&left_t, k, m).t()] {
        check(left, Right::Values(View::new(&right, k, n)), &exact);
        check(left, Right::Values(View::new(&right_t, n, k).t()), &exact);
    }
}

fn check_stored(format: WeightFormat, rows: usize, cols: usize, m: usize) {
    let weight = WeightMatrix::from_f32(&noise(rows * cols, 0.3, 3), rows, cols, format).unwrap();
    let values = weight.to_f32();
    let (x, dy) = (noise(m * cols, 1.0, 4), noise(m * rows, 1.0, 5));
    let forward = exact(&x, &transpose(&values, rows, cols), (m, cols, rows));
    let backward = exact(&dy, &values, (m, rows, cols));
    check(View::new(&x, m, cols), Right::StoredTransposed(&weight), &forward);
    check(View::new(&dy, m, rows), Right::Stored(&weight), &backward);
}

#[test]
fn stored_weights_of_every_format_and_both_directions() {
    for format in WeightFormat::ALL {
        let block = format.block().0.max(32);
        check_stored(format, 70, 3 * block, 13);
        check_stored(format, 1, block, 6);
        // Several stretches and several tiles, each with a rest.
        check_stored(format, 801, 416_usize.next_multiple_of(block), 3);
        check_stored(format, 33, 1568_usize.next_multiple_of(block), 5);
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
fn long_sums_and_many_rows() {
    check_views(7, 1601, 65, 1);
    check_views(65, 800, 300, 2);
    check_views(900, 200, 40, 3);
}

#[test]
fn a_product_without_rows_columns_or_depth() {
    for kernel in kernels() {
        let mut out = [1f32; 4];
        let right = Right::Values(View::new(&[0.0; 6], 3, 2));
        product(kernel, ViewMut::new(&mut [], 0, 2), Into::Overwrite, View::new(&[], 0, 3), right, 1.0);
        let right = Right::Values(View::new(&[], 3, 0));
        product(kernel, ViewMut::new(&mut [], 2, 0), Into::Overwrite, View::new(&[0.0; 6], 2, 3), right, 1.0);
        let right = Right::Values(View::new(&[], 0, 2));
        product(kernel, ViewMut::new(&mut out, 2, 2), Into::Overwrite, View::new(&[], 2, 0), right, 1.0);
        assert_eq!(out, [0.0; 4]);
    }
}

/// A row alone gets the same bits as among others, and so does a column: results do not depend on how a batch is cut.
#[test]
fn bits_do_not_depend_on_the_other_rows_and_columns() {
    let (m, k, n) = (29, 700, 150);
    let (left, right) = (noise(m * k, 1.0, 1), noise(k * n, 1.0, 2));
    for kernel in kernels() {
        let mut all = vec![0f32; m * n];
        let whole = Right::Values(View::new(&right, k, n));
        product(kernel, ViewMut::new(&mut all, m, n), Into::Overwrite, View::new(&left, m, k), whole, 1.0);
        for (i, j) in [(0, 0), (7, 33), (28, 149)] {
            let mut row = vec![0f32; n];
            let left = View::new(&left[i * k..(i + 1) * k], 1, k);
            product(kernel, ViewMut::new(&mut row, 1, n), Into::Overwrite, left, whole, 1.0);
            assert_eq!(row, all[i * n..(i + 1) * n]);
            let mut one = [0f32];
            let column = Right::Values(View::strided(&right[j..], k, 1, n));
            product(kernel, ViewMut::new(&mut one, 1, 1), Into::Overwrite, left, column, 1.0);
            assert_eq!(one[0].to_bits(), all[i * n + j].to_bits());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_small_shape(m in 1usize..80, k in 1usize..150, n in 1usize..150, salt in 0u32..1000) {
        check_views(m, k, n, salt);
    }
}
