//! Products of quantized weights with activations in 8 bits, for inference.
//!
//! [`Packed`] holds a weight in panels of 16 rows: within a block of 32 columns, a 64-byte line holds four bytes
//! of each row, so that one instruction multiplies four values of 16 rows. [`Quantized`] holds activations in
//! blocks of 32 bytes with one scale. A dot product over a block is an exact integer; only the sums over
//! blocks are rounded, so all instruction sets agree to the rounding of f32 sums.

mod activations;
mod form;
mod lines;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_dot;
#[cfg(target_arch = "aarch64")]
mod neon_i8mm;
mod pack;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use activations::Quantized;
pub(crate) use pack::Packed;

use form::Form;
use lines::Line;
use pack::PANEL;

/// One panel: 16 rows (fewer in the last one) of a packed weight.
#[derive(Debug, Clone, Copy)]
struct Panel<'a> {
    form: Form,
    /// Scales and integers: see [`Form::offsets`].
    lines: &'a [Line],
    blocks: usize,
    /// Rows that are there, up to 16.
    rows: usize,
}

/// Which code multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "aarch64")]
    NeonDot,
    #[cfg(target_arch = "aarch64")]
    NeonI8mm,
}

impl Kernel {
    fn best() -> Self {
        Self::available().last().unwrap_or(Self::Portable)
    }

    /// What this processor has, the best last.
    fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let vector = [(Self::Avx2, x86::has_avx2()), (Self::Vnni, x86::has_vnni())];
        #[cfg(target_arch = "aarch64")]
        let vector = [
            (Self::Neon, super::simd::has_neon()),
            (Self::NeonDot, neon_dot::has_dot()),
            (Self::NeonI8mm, neon_i8mm::has_i8mm()),
        ];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let vector: [(Self, bool); 0] = [];
        let vector = vector.into_iter().filter_map(|(kernel, there)| there.then_some(kernel));
        std::iter::once(Self::Portable).chain(vector)
    }

    /// Writes `y[t * stride + r]` for all rows t of x and rows r of the panel.
    fn run(self, panel: Panel<'_>, x: &Quantized, y: &mut [f32], stride: usize) {
        match self {
            Self::Portable => portable::panel(panel, x, y, stride),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => x86::panel_avx2(panel, x, y, stride),
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => x86::panel_vnni(panel, x, y, stride),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon_dot::panel_neon(panel, x, y, stride),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => neon_dot::panel_dot(panel, x, 0, y, stride),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm => neon_i8mm::panel_i8mm(panel, x, y, stride),
        }
    }
}

impl Packed {
    /// `y = x W^T`; y `[x.rows(), rows]`.
    pub(crate) fn forward(&self, x: &Quantized, y: &mut [f32]) {
        self.forward_with(Kernel::best(), x, y);
    }

    fn forward_with(&self, kernel: Kernel, x: &Quantized, y: &mut [f32]) {
        assert!(x.cols() == self.cols() && y.len() == x.rows() * self.rows(), "shapes of a packed product");
        for (index, panel) in self.panels().enumerate() {
            kernel.run(panel, x, &mut y[index * PANEL..], self.rows());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::tests::noise;
    use crate::weights::{WeightFormat, WeightMatrix};
    use proptest::prelude::*;

    const FORMATS: [WeightFormat; 6] = [
        WeightFormat::Q4_0,
        WeightFormat::Q4_1,
        WeightFormat::Q8_0,
        WeightFormat::Q5_0,
        WeightFormat::Q4_K,
        WeightFormat::Q6_K,
    ];

    /// What the kernels compute, in f64 from the expanded values of both sides.
    fn expected(w: &WeightMatrix, x: &Quantized) -> Vec<f64> {
        let (values, x) = (w.to_f32(), x.to_f32());
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let rows = x.chunks_exact(w.cols());
        rows.flat_map(|x| values.chunks_exact(w.cols()).map(move |w| dot(x, w))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn every_kernel_gives_the_product_of_the_quantized_values(
            rows in 1usize..70, blocks in 1usize..7, tokens in 1usize..30, seed in 0u32..1000, extreme: bool,
        ) {
            for format in FORMATS {
                let cols = (32 * blocks).next_multiple_of(format.block().0);
                let mut values = noise(rows * cols, seed);
                let mut x = noise(tokens * cols, seed + 1);
                if extreme {
                    values.iter_mut().for_each(|v| *v = v.signum());
                    x.iter_mut().for_each(|v| *v = 3.0 * v.signum());
                }
                let w = WeightMatrix::from_f32(&values, rows, cols, format).unwrap();
                let packed = Packed::all(&[&w]).remove(0).unwrap();
                let x = Quantized::new(&x, cols);
                let expected = expected(&w, &x);
                let mut vectors: Option<Vec<u32>> = None;
                for kernel in Kernel::available() {
                    let mut y = vec![f32::NAN; tokens * rows];
                    packed.forward_with(kernel, &x, &mut y);
                    for (i, (found, expected)) in y.iter().zip(&expected).enumerate() {
                        let close = (f64::from(*found) - expected).abs() <= 2e-5 * (1.0 + expected.abs()) * (cols / 32) as f64;
                        prop_assert!(close, "{format:?} {kernel:?} at {i}: {found} for {expected}");
                    }
                    if kernel != Kernel::Portable {
                        let bits: Vec<u32> = y.iter().map(|y| y.to_bits()).collect();
                        let first = vectors.get_or_insert_with(|| bits.clone());
                        prop_assert!(*first == bits, "{format:?} {kernel:?}: other bits than another vector kernel's");
                    }
                }
            }
        }
    }

    /// Whoever knows the processor says in FLEETUNE_INT8_KERNELS what it has, as `tests/arm/run` does.
    #[test]
    fn the_kernels_of_this_processor_are_found() {
        let found: Vec<String> = Kernel::available().map(|kernel| format!("{kernel:?}")).collect();
        assert_eq!(found[0], "Portable");
        assert_eq!(found.last(), Some(&format!("{:?}", Kernel::best())));
        if let Ok(expected) = std::env::var("FLEETUNE_INT8_KERNELS") {
            assert_eq!(found.join(" "), expected);
        }
    }

    /// Bytes that no quantizer makes, too: all scales, minima and levels that can be stored.
    #[test]
    fn rows_come_back_from_their_panels() {
        let (rows, cols) = (37, 512);
        for format in FORMATS {
            let bytes = format.row_bytes(cols).unwrap() * rows;
            // Without the highest exponents, so that scales are finite.
            let noise =
                (0..bytes).map(|i| ((i as u32).wrapping_mul(2_654_435_761) >> 13) as u8 & 0xbb).collect();
            let w = WeightMatrix::from_bytes(noise, rows, cols, format).unwrap();
            let packed = Packed::all(&[&w]).remove(0).unwrap();
            let expected = w.to_f32();
            for row in 0..rows {
                let mut found = vec![f32::NAN; cols];
                packed.row(row, &mut found);
                assert_eq!(found, expected[row * cols..(row + 1) * cols], "{format:?}, row {row}");
            }
        }
    }

    #[test]
    fn formats_without_a_packed_form_are_left_alone() {
        let [half, bytes] = [WeightFormat::F16, WeightFormat::Q8_0]
            .map(|format| WeightMatrix::from_f32(&noise(64, 1), 2, 32, format).unwrap());
        let packed = Packed::all(&[&half, &bytes, &half]);
        assert!(packed[0].is_none() && packed[1].is_some() && packed[2].is_none());
    }
}
