//! From concentrated and Rényi divergence to (epsilon, delta).

use thiserror::Error;

/// What an accountant cannot work with.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum AccountError {
    /// A parameter is out of its range.
    #[error("{parameter} is {value}; it must be {range}")]
    Parameter {
        /// Its name.
        parameter: &'static str,
        /// What was given.
        value: f64,
        /// What is allowed.
        range: &'static str,
    },
    /// No parameter reaches the target.
    #[error("{0}")]
    Unreachable(String),
}

impl AccountError {
    /// Fails with the parameter's name unless `holds`.
    pub(crate) fn check(
        holds: bool,
        parameter: &'static str,
        value: f64,
        range: &'static str,
    ) -> Result<(), Self> {
        if holds { Ok(()) } else { Err(Self::Parameter { parameter, value, range }) }
    }
}

/// The probability delta of (epsilon, delta): above 0 and below 1.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Delta(f64);

impl Delta {
    /// Accepts numbers strictly between 0 and 1.
    ///
    /// # Errors
    /// [`AccountError::Parameter`].
    pub fn new(delta: f64) -> Result<Self, AccountError> {
        AccountError::check(delta > 0.0 && delta < 1.0, "delta", delta, "above 0 and below 1")?;
        Ok(Self(delta))
    }

    /// The number.
    #[must_use]
    pub fn value(self) -> f64 {
        self.0
    }
}

/// What every reported epsilon is raised by, relatively: more than the rounding of the formulas in
/// f64, so that no report is below the true value of its bound.
const OUTWARD: f64 = 1e-13;

/// Epsilon of a mechanism whose Rényi divergence of order `alpha` is `rdp` (Canonne, Kamath and
/// Steinke 2020, "The Discrete Gaussian for Differential Privacy", proposition 12):
/// `rdp + (ln(1/delta) - ln(alpha - 1) + alpha ln(1 - 1/alpha)) / (alpha - 1)`.
pub(crate) fn epsilon_at(alpha: f64, rdp: f64, delta: Delta) -> f64 {
    let tail = -delta.value().ln() - (alpha - 1.0).ln() + alpha * (-1.0 / alpha).ln_1p();
    let epsilon = rdp + tail / (alpha - 1.0);
    // `max` would turn what is not a number into no loss at all.
    if epsilon.is_nan() { f64::INFINITY } else { epsilon.max(0.0) }
}

/// ln(delta) at `epsilon` of a mechanism whose Rényi divergence of order `alpha` is `rdp`; the same source.
pub(crate) fn ln_delta_at(alpha: f64, rdp: f64, epsilon: f64) -> f64 {
    (alpha - 1.0) * (rdp - epsilon) - (alpha - 1.0).ln() + alpha * (-1.0 / alpha).ln_1p()
}

pub(crate) fn outward(value: f64) -> f64 {
    value * (1.0 + OUTWARD)
}

/// Epsilon of `rho`-zCDP at `delta`: the infimum over real orders of [`epsilon_at`] with `alpha rho`
/// (Canonne, Kamath and Steinke 2020, corollary 13). Not the looser `rho + 2 sqrt(rho ln(1/delta))`.
///
/// # Errors
/// [`AccountError::Parameter`] unless `rho` is finite and not negative.
pub fn zcdp_epsilon(rho: f64, delta: Delta) -> Result<f64, AccountError> {
    AccountError::check(rho.is_finite() && rho >= 0.0, "rho", rho, "finite and not negative")?;
    if rho == 0.0 {
        return Ok(0.0);
    }
    // The minimum lies near 1 + sqrt(ln(1/delta) / rho).
    let start = (-delta.value().ln() / rho).sqrt().max(1e-9).ln();
    let best = minimum(|x| epsilon_at(1.0 + x.exp(), rho * (1.0 + x.exp()), delta), start);
    Ok(outward(best))
}

/// Delta of `rho`-zCDP at `epsilon`; the same source.
///
/// # Errors
/// [`AccountError::Parameter`] unless both are finite and not negative.
pub fn zcdp_delta(rho: f64, epsilon: f64) -> Result<f64, AccountError> {
    AccountError::check(rho.is_finite() && rho >= 0.0, "rho", rho, "finite and not negative")?;
    let range = "finite and not negative";
    AccountError::check(epsilon.is_finite() && epsilon >= 0.0, "epsilon", epsilon, range)?;
    if rho == 0.0 {
        return Ok(0.0);
    }
    let start = ((epsilon + rho) / (2.0 * rho) - 1.0).max(1e-9).ln();
    let ln_delta = |x: f64| ln_delta_at(1.0 + x.exp(), rho * (1.0 + x.exp()), epsilon);
    Ok(outward(minimum(ln_delta, start).exp()).min(1.0))
}

/// Least value of a function with one minimum, from a bracket grown around `start` and then narrowed
/// by golden section. Any value it returns is attained, so the result is an upper bound of the infimum.
pub(crate) fn minimum(f: impl Fn(f64) -> f64, start: f64) -> f64 {
    let (mut low, mut high) = (start - 1.0, start + 1.0);
    for _ in 0..200 {
        if f(low) >= f(low + 0.25) {
            break;
        }
        low -= 1.0;
    }
    for _ in 0..200 {
        if f(high) >= f(high - 0.25) {
            break;
        }
        high += 1.0;
    }
    let golden = 0.5 * (5f64.sqrt() - 1.0);
    let (mut a, mut b) = (high - golden * (high - low), low + golden * (high - low));
    let (mut at_a, mut at_b) = (f(a), f(b));
    for _ in 0..100 {
        if at_a < at_b {
            (high, b, at_b) = (b, a, at_a);
            a = high - golden * (high - low);
            at_a = f(a);
        } else {
            (low, a, at_a) = (a, b, at_b);
            b = low + golden * (high - low);
            at_b = f(b);
        }
    }
    at_a.min(at_b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::known::{close, number, rows};

    #[test]
    fn zcdp_equals_the_reference_of_30_digits_and_is_never_below_it() {
        for row in rows("zcdp_to_approx_dp") {
            let delta = Delta::new(number(&row, "delta")).unwrap();
            let (epsilon, expected) =
                (zcdp_epsilon(number(&row, "rho"), delta).unwrap(), number(&row, "eps_cks"));
            close(epsilon, expected, 1e-12, &row);
            assert!(epsilon >= expected, "{epsilon} below {expected}");
        }
        for row in rows("participation_limited") {
            let delta = Delta::new(number(&row, "delta")).unwrap();
            let epsilon = zcdp_epsilon(number(&row, "rho"), delta).unwrap();
            close(epsilon, number(&row, "eps_cks"), 1e-9, &row);
        }
        for row in rows("zcdp_delta_at_eps") {
            let delta = zcdp_delta(number(&row, "rho"), number(&row, "eps")).unwrap();
            close(delta, number(&row, "delta_cks"), 1e-8, &row);
        }
    }

    #[test]
    fn refuses_what_is_no_parameter() {
        assert!(Delta::new(0.0).is_err() && Delta::new(1.0).is_err() && Delta::new(f64::NAN).is_err());
        let delta = Delta::new(1e-6).unwrap();
        assert!(zcdp_epsilon(f64::NAN, delta).is_err() && zcdp_epsilon(-1.0, delta).is_err());
        assert_eq!(zcdp_epsilon(0.0, delta).unwrap(), 0.0);
        assert_eq!(epsilon_at(2.0, f64::NAN, delta), f64::INFINITY);
    }
}
