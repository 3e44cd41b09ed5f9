//! Toeplitz and banded strategies: `C[t][s]` depends on `t - s` only, and is 0 where that passes the bands.

use super::{MatrixSensitivity, Participation};
use crate::account::convert::AccountError;

/// A lower triangular Toeplitz matrix, by its first column. What the column lacks is 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Toeplitz(Vec<f64>);

impl Toeplitz {
    /// The matrix with this first column.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless all coefficients are finite and the first is positive.
    pub fn new(coefficients: Vec<f64>) -> Result<Self, AccountError> {
        for value in &coefficients {
            AccountError::check(value.is_finite(), "coefficient", *value, "finite")?;
        }
        let first = coefficients.first().copied().unwrap_or(0.0);
        AccountError::check(first > 0.0, "first coefficient", first, "positive")?;
        Ok(Self(coefficients))
    }

    /// Independent noise.
    #[must_use]
    pub fn identity() -> Self {
        Self(vec![1.0])
    }

    /// The square root of the matrix of prefix sums, which has the least greatest error of all Toeplitz
    /// strategies where each device takes part once: `c_j = c_{j-1} (2j - 1) / (2j)` (Fichtenberger,
    /// Henzinger and Upadhyay 2023, "Constant Matters").
    #[must_use]
    pub fn optimal(steps: u32) -> Self {
        let next = |c: &mut f64, j: u32| {
            *c *= if j == 0 { 1.0 } else { 1.0 - 0.5 / f64::from(j) };
            Some(*c)
        };
        Self((0..steps.max(1)).scan(1.0, next).collect())
    }

    /// The same matrix with all but its first `bands` diagonals set to 0; at least one remains.
    #[must_use]
    pub fn banded(mut self, bands: u32) -> Self {
        self.0.truncate(bands.max(1) as usize);
        self
    }

    /// The first column.
    #[must_use]
    pub fn coefficients(&self) -> &[f64] {
        &self.0
    }

    /// Sensitivity under a participation pattern: `|| sum_{j<k} shift(c, j b) ||^2` (Kalinin and Lampert 2024,
    /// "Banded Square Root Matrix Factorization for Differentially Private Model Training", theorem 2).
    ///
    /// Exact where the column is not negative and does not increase. Otherwise an upper bound: each coefficient
    /// is raised to the greatest magnitude at or behind it, which raises every inner product of two columns.
    #[must_use]
    pub fn sensitivity(&self, participation: Participation) -> MatrixSensitivity {
        let steps = participation.steps() as usize;
        let column: Vec<f64> = decreasing(&self.0).into_iter().take(steps).collect();
        let mut sum = vec![0.0; steps];
        for j in 0..participation.participations() as usize {
            let shifted = &mut sum[j * participation.min_sep() as usize..];
            shifted.iter_mut().zip(&column).for_each(|(sum, c)| *sum += c);
        }
        let squared: f64 = sum.iter().map(|x| x * x).sum();
        // Twice the shifts for the square, one unit for each addition and product: above what f64 lost.
        #[expect(clippy::cast_precision_loss, reason = "steps are below 2^32")]
        let lost = (steps as f64 + 2.0 * f64::from(participation.participations()) + 2.0) * f64::EPSILON;
        MatrixSensitivity::from_squared(squared * (1.0 + lost))
    }

    /// The first `steps` coefficients of the inverse, which is Toeplitz too; its band is not finite.
    #[must_use]
    pub fn inverse(&self, steps: u32) -> Self {
        let (first, rest) = (self.0[0], &self.0[1..]);
        let mut inverse = vec![1.0 / first];
        while inverse.len() < steps as usize {
            let dot: f64 = rest.iter().zip(inverse.iter().rev()).map(|(c, d)| c * d).sum();
            inverse.push(-dot / first);
        }
        Self(inverse)
    }

    /// The greatest variance, over the rounds, of the noise in the sum of all rounds so far, per coordinate and
    /// per unit of the variance of `Z`: that of the last round, `|| (A C^-1)[last] ||^2`.
    #[must_use]
    pub fn max_error(&self, steps: u32) -> f64 {
        prefix_error(self.inverse(steps).0)
    }

    /// What to compare strategies by at equal privacy: the root of sensitivity squared times [`Self::max_error`].
    /// Independent noise has `sqrt(k n)`.
    #[must_use]
    pub fn rms_loss(&self, participation: Participation) -> f64 {
        (self.sensitivity(participation).squared() * self.max_error(participation.steps())).sqrt()
    }
}

/// Sensitivity of any matrix of `bands` diagonals whose columns have squared norms of at most
/// `column_norm_squared`, Toeplitz or not: `k` times that, since columns at least `bands` apart share no row
/// (Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization").
///
/// # Errors
/// [`AccountError::Parameter`] where rounds of one device may be closer than the bands, or the norm is not
/// finite and positive.
pub fn banded_sensitivity(
    column_norm_squared: f64,
    bands: u32,
    participation: Participation,
) -> Result<MatrixSensitivity, AccountError> {
    let positive = column_norm_squared.is_finite() && column_norm_squared > 0.0;
    AccountError::check(positive, "column_norm_squared", column_norm_squared, "finite and positive")?;
    let disjoint = bands <= participation.min_sep() || participation.participations() == 1;
    AccountError::check(disjoint, "bands", f64::from(bands), "at most the separation of a device's rounds")?;
    Ok(MatrixSensitivity::from_squared(column_norm_squared * f64::from(participation.participations())))
}

/// The squared norm of the prefix sums of a column.
pub(super) fn prefix_error(column: impl IntoIterator<Item = f64>) -> f64 {
    let sums = column.into_iter().scan(0.0, |sum, d| {
        *sum += d;
        Some(*sum)
    });
    sums.map(|sum| sum * sum).sum()
}

/// The least column that does not increase and is nowhere below the magnitudes of this one.
fn decreasing(column: &[f64]) -> Vec<f64> {
    let mut greatest = 0f64;
    let mut all: Vec<f64> = column
        .iter()
        .rev()
        .map(|c| {
            greatest = greatest.max(c.abs());
            greatest
        })
        .collect();
    all.reverse();
    all
}

#[cfg(test)]
mod tests {
    use super::{super::brute, *};
    use crate::account::known::{close, number, rows};

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole numbers")]
    fn whole(row: &serde_json::Value, field: &str) -> u32 {
        number(row, field) as u32
    }

    #[test]
    fn optimal_toeplitz_equals_the_reference() {
        for row in rows("optimal_toeplitz") {
            let (n, b, k) = (whole(&row, "n"), whole(&row, "min_sep"), whole(&row, "max_participations"));
            let participation = Participation::new(n, b, k).unwrap();
            let both = [(Toeplitz::optimal(n), ""), (Toeplitz::identity(), "identity_")];
            for (strategy, name) in both {
                let squared = if name.is_empty() { "sensitivity_squared" } else { "identity_sens_sq" };
                let error =
                    if name.is_empty() { "max_error_variance_unit_noise" } else { "identity_max_error" };
                close(strategy.sensitivity(participation).squared(), number(&row, squared), 1e-11, &row);
                close(strategy.max_error(n), number(&row, error), 1e-11, &row);
                close(
                    strategy.rms_loss(participation),
                    number(&row, &format!("{name}rms_loss")),
                    1e-11,
                    &row,
                );
            }
        }
    }

    #[test]
    fn equals_every_pattern_tried_where_it_is_exact_and_is_above_where_it_is_not() {
        let exact = [vec![1.0, 0.5, 0.375, 0.3125, 0.25, 0.2, 0.1], vec![2.0, 2.0, 0.5], vec![1.0]];
        let bound = [vec![1.0, -0.5, 0.25, -0.6], vec![0.5, 1.0, 0.1, 0.3], vec![1.0, -0.9, 0.8, -0.7, 0.6]];
        for (column, is_exact) in exact.iter().map(|c| (c, true)).chain(bound.iter().map(|c| (c, false))) {
            for participation in brute::participations() {
                let most = brute::patterns(participation)
                    .into_iter()
                    .map(|set| greatest(column, participation, set));
                let most = most.fold(0.0, f64::max);
                let squared = Toeplitz::new(column.clone()).unwrap().sensitivity(participation).squared();
                assert!(squared >= most, "{squared} below {most}: {column:?} {participation:?}");
                assert!(
                    !is_exact || squared <= most * (1.0 + 1e-12),
                    "{squared}, {most}: {column:?} {participation:?}"
                );
            }
        }
    }

    /// The greatest `|| sum of the columns of C in the set, each with either sign ||^2`.
    fn greatest(column: &[f64], participation: Participation, set: u32) -> f64 {
        let chosen: Vec<usize> =
            (0..participation.steps() as usize).filter(|at| set >> at & 1 == 1).collect();
        // All signs for few columns; a Gray code would be faster and no clearer.
        let signs = if chosen.len() <= 5 { 1 << (chosen.len() - 1) } else { 1u32 };
        let norm = |sign: u32| -> f64 {
            let mut sum = vec![0.0; participation.steps() as usize];
            for (j, at) in chosen.iter().enumerate() {
                let factor = if sign >> j & 1 == 1 { -1.0 } else { 1.0 };
                sum[*at..].iter_mut().zip(column).for_each(|(sum, c)| *sum += factor * c);
            }
            sum.iter().map(|x| x * x).sum()
        };
        (0..signs).map(norm).fold(0.0, f64::max)
    }

    #[test]
    fn inverse_times_matrix_is_the_identity() {
        for strategy in [Toeplitz::optimal(50), Toeplitz::optimal(50).banded(7), Toeplitz::identity()] {
            let inverse = strategy.inverse(50);
            for t in 0..50 {
                let terms = (0..=t).filter_map(|s| Some(strategy.0.get(s)? * inverse.0[t - s]));
                let expected = if t == 0 { 1.0 } else { 0.0 };
                assert!((terms.sum::<f64>() - expected).abs() < 1e-14, "row {t}");
            }
        }
    }

    #[test]
    fn bands_within_the_separation_cost_the_same_for_each_round() {
        let participation = Participation::new(200, 20, 4).unwrap();
        let banded = Toeplitz::optimal(200).banded(20);
        assert_eq!(banded.coefficients().len(), 20);
        let column: f64 = banded.coefficients().iter().map(|c| c * c).sum();
        let any = banded_sensitivity(column, 20, participation).unwrap();
        let close = (banded.sensitivity(participation).squared() / any.squared() - 1.0).abs() < 1e-12;
        assert!(close, "{any:?}");
        assert!(banded_sensitivity(column, 21, participation).is_err());
        assert!(banded_sensitivity(column, 21, Participation::new(20, 20, 4).unwrap()).is_ok());
        assert!(banded_sensitivity(0.0, 20, participation).is_err());
        // Fewer bands: less sensitive, more noise in the sums.
        assert!(banded.max_error(200) > Toeplitz::optimal(200).max_error(200));
    }

    #[test]
    fn refuses_what_is_no_strategy() {
        assert!(Toeplitz::new(vec![]).is_err() && Toeplitz::new(vec![0.0, 1.0]).is_err());
        assert!(Toeplitz::new(vec![1.0, f64::NAN]).is_err());
    }
}
