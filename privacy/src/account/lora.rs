//! What noise on low-rank factors does to their product, and why one factor is frozen under privacy.

use super::convert::AccountError;

/// The product `B A` of an adapter, with `B` of `rows` by `rank` and `A` of `rank` by `columns`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraProduct {
    /// Rows of B.
    pub rows: u32,
    /// Columns of A.
    pub columns: u32,
    /// Columns of B and rows of A.
    pub rank: u32,
    /// The Frobenius norm of A, squared.
    pub a_norm_squared: f64,
    /// The Frobenius norm of B, squared.
    pub b_norm_squared: f64,
}

/// Expected squared Frobenius norm of the noise in a product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraNoise {
    /// Where both factors have noise: `m s^2 |A|^2 + n s^2 |B|^2 + m n r s^4`.
    pub both: f64,
    /// The last term of it, which no aggregation over coordinates evens out.
    pub quadratic: f64,
    /// Where A is frozen and only B has noise: `m s^2 |A|^2`.
    pub frozen: f64,
}

/// What independent noise of standard deviation `noise_sd` on each coordinate of the factors does to the product:
/// `E |(B + N_B)(A + N_A) - B A|^2`, whose three terms are uncorrelated (Sun, Li, Li and Ding 2024, "Improving
/// LoRA in Privacy-preserving Federated Learning", for the case against noise on both).
///
/// # Errors
/// [`AccountError::Parameter`] unless the deviation and both norms are finite and not negative.
pub fn lora_noise(product: LoraProduct, noise_sd: f64) -> Result<LoraNoise, AccountError> {
    let LoraProduct { rows, columns, rank, a_norm_squared, b_norm_squared } = product;
    let numbers =
        [("noise_sd", noise_sd), ("a_norm_squared", a_norm_squared), ("b_norm_squared", b_norm_squared)];
    for (parameter, value) in numbers {
        let range = "finite and not negative";
        AccountError::check(value.is_finite() && value >= 0.0, parameter, value, range)?;
    }
    let (rows, columns, variance) = (f64::from(rows), f64::from(columns), noise_sd * noise_sd);
    let frozen = rows * variance * a_norm_squared;
    let quadratic = rows * columns * f64::from(rank) * variance * variance;
    Ok(LoraNoise { both: frozen + columns * variance * b_norm_squared + quadratic, quadratic, frozen })
}

#[cfg(test)]
mod tests {
    use rand_chacha::{
        ChaCha8Rng,
        rand_core::{Rng, SeedableRng},
    };

    use super::*;
    use crate::account::known::{close, number, rows};

    #[test]
    fn equals_the_reference() {
        for row in rows("lora_noise") {
            let of = |field| number(&row, field);
            let whole = |field: &str| u32::try_from(row[field].as_u64().unwrap()).unwrap();
            let (noise_sd, frozen) = (of("noise_sd"), of("theory_ffa"));
            // The norms of the reference's factors, from its own terms.
            let a_norm_squared = frozen / (of("m") * noise_sd * noise_sd);
            let rest = of("theory_full") - frozen - of("theory_cross_only");
            let b_norm_squared = rest / (of("n") * noise_sd * noise_sd);
            let product = LoraProduct {
                rows: whole("m"),
                columns: whole("n"),
                rank: whole("r"),
                a_norm_squared,
                b_norm_squared,
            };
            let noise = lora_noise(product, noise_sd).unwrap();
            close(noise.quadratic, of("theory_cross_only"), 1e-12, &row);
            close(noise.both, of("theory_full"), 1e-12, &row);
            // One draw each.
            close(noise.both, of("mc_full"), 0.05, &row);
            close(noise.frozen, of("mc_ffa"), 0.05, &row);
        }
    }

    /// Row-major.
    struct Matrix(usize, Vec<f64>);

    impl Matrix {
        fn gaussian(rng: &mut ChaCha8Rng, rows: usize, columns: usize, sd: f64) -> Self {
            #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
            let mut uniform = || ((rng.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
            let mut each = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
            Self(columns, (0..rows * columns).map(|_| sd * each()).collect())
        }

        fn plus(&self, other: &Self) -> Self {
            Self(self.0, self.1.iter().zip(&other.1).map(|(a, b)| a + b).collect())
        }

        fn times(&self, other: &Self) -> Self {
            let row = |row: &[f64]| -> Vec<f64> {
                let at =
                    |column| row.iter().enumerate().map(|(k, x)| x * other.1[k * other.0 + column]).sum();
                (0..other.0).map(at).collect()
            };
            Self(other.0, self.1.chunks(self.0).flat_map(row).collect())
        }

        fn distance_squared(&self, other: &Self) -> f64 {
            self.1.iter().zip(&other.1).map(|(a, b)| (a - b) * (a - b)).sum()
        }
    }

    #[test]
    fn equals_the_mean_of_many_draws() {
        let (m, n, r, noise_sd) = (12, 9, 3, 0.4);
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let (a, b) = (Matrix::gaussian(&mut rng, r, n, 0.7), Matrix::gaussian(&mut rng, m, r, 0.3));
        let norm = |matrix: &Matrix| matrix.1.iter().map(|x| x * x).sum::<f64>();
        let whole = |n: usize| u32::try_from(n).unwrap();
        let (rows, columns, rank) = (whole(m), whole(n), whole(r));
        let product = LoraProduct { rows, columns, rank, a_norm_squared: norm(&a), b_norm_squared: norm(&b) };
        let expected = lora_noise(product, noise_sd).unwrap();
        let clean = b.times(&a);
        let (mut both, mut frozen) = (Vec::new(), Vec::new());
        for _ in 0..4000 {
            let noisy_b = b.plus(&Matrix::gaussian(&mut rng, m, r, noise_sd));
            let noisy_a = a.plus(&Matrix::gaussian(&mut rng, r, n, noise_sd));
            both.push(noisy_b.times(&noisy_a).distance_squared(&clean));
            frozen.push(noisy_b.times(&a).distance_squared(&clean));
        }
        // Four standard errors, which is less than the least of the terms.
        for (draws, expected) in [(both, expected.both), (frozen, expected.frozen)] {
            let mean = draws.iter().sum::<f64>() / 4000.0;
            let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 4000.0;
            let error = (variance / 4000.0).sqrt();
            assert!((mean - expected).abs() < 4.0 * error, "{mean} for {expected}, {error}");
            assert!(4.0 * error < columns_term(product, noise_sd).min(0.03 * expected), "{error}");
        }
    }

    fn columns_term(product: LoraProduct, noise_sd: f64) -> f64 {
        f64::from(product.columns) * noise_sd * noise_sd * product.b_norm_squared
    }

    #[test]
    fn refuses_what_is_no_noise() {
        let product = LoraProduct { rows: 2, columns: 2, rank: 1, a_norm_squared: 1.0, b_norm_squared: 0.0 };
        assert!(lora_noise(product, -1.0).is_err() && lora_noise(product, f64::NAN).is_err());
        assert!(lora_noise(LoraProduct { a_norm_squared: f64::INFINITY, ..product }, 1.0).is_err());
    }
}
