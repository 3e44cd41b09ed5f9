//! Strided matrix views over slices, and the product of two of them.

use super::bf16::Right;
use super::single;

/// A read-only matrix inside a slice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

/// A writable matrix inside a slice; its columns are contiguous.
#[derive(Debug)]
pub(crate) struct ViewMut<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
}

impl<'a> View<'a> {
    /// A dense row-major `[rows, cols]` matrix.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `[rows, cols]` whose rows start `row_stride` values apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert_inside(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose of the same memory.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

impl<'a> ViewMut<'a> {
    /// A dense row-major `[rows, cols]` matrix.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `[rows, cols]` whose rows start `row_stride` values apart.
    pub(crate) fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert_inside(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride }
    }
}

fn assert_inside(len: usize, rows: usize, cols: usize, row_stride: usize) {
    assert!(cols <= row_stride || rows <= 1, "matrix rows of {cols} overlap at stride {row_stride}");
    let needed = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
    assert!(needed <= len, "matrix [{rows}, {cols}] stride {row_stride} does not fit {len} values");
}

/// What a kernel does with the values its output already holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// They are overwritten.
    Overwrite,
    /// The result is added to them.
    Add,
}

/// `out = alpha * left * right`, or added to `out`. Single-threaded.
pub(crate) fn product(out: ViewMut<'_>, into: Into, left: View<'_>, right: View<'_>, alpha: f32) {
    single::product(single::Kernel::detect(), out, into, left, Right::Values(right), alpha);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_of_transposes_and_strides() {
        let a: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let b: Vec<f32> = (0..8).map(|i| i as f32 - 3.0).collect();
        let mut out = vec![1f32; 6];
        // a is [2, 3]; b's first two columns of four are used: [2, 2].
        product(
            ViewMut::new(&mut out, 3, 2),
            Into::Add,
            View::new(&a, 2, 3).t(),
            View::strided(&b, 2, 2, 4),
            2.0,
        );
        let mut expected = [0f32; 6];
        for i in 0..3 {
            for j in 0..2 {
                let sum: f32 = (0..2).map(|k| a[k * 3 + i] * b[k * 4 + j]).sum();
                expected[i * 2 + j] = 1.0 + 2.0 * sum;
            }
        }
        assert_eq!(out, expected);
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_view_past_its_slice_is_refused() {
        let _ = View::strided(&[0.0; 7], 2, 4, 4);
    }
}
