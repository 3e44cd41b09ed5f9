//! From a target (epsilon, delta) back to the noise: the least multiplier that reaches it.

use super::{
    convert::{AccountError, Delta, zcdp_epsilon},
    gaussian::least,
    subsampled::SubsampledGaussian,
};

/// Relative precision of a noise multiplier; the error is upwards.
const PRECISION: f64 = 1e-6;
/// The noise multipliers that are tried.
const MULTIPLIERS: (f64, f64) = (0.05, 1e6);

/// Least noise multiplier with which `steps` rounds on Poisson samples are (epsilon, delta) by Rényi
/// divergences, to 1e-6 from above.
///
/// # Errors
/// [`AccountError::Parameter`], or [`AccountError::Unreachable`] if no multiplier up to 1e6 is enough.
pub fn noise_multiplier(
    epsilon: f64,
    delta: Delta,
    steps: u32,
    sampling_probability: f64,
) -> Result<f64, AccountError> {
    check_epsilon(epsilon)?;
    let (mut low, mut high) = MULTIPLIERS;
    let holds = |sigma: f64| -> Result<bool, AccountError> {
        Ok(SubsampledGaussian::new(sigma, sampling_probability)?.epsilon_rdp(steps, delta).0 <= epsilon)
    };
    if !holds(high)? {
        let problem =
            format!("no noise multiplier up to {high} gives epsilon {epsilon} after {steps} rounds");
        return Err(AccountError::Unreachable(problem));
    }
    if holds(low)? {
        return Ok(low);
    }
    while high > low * (1.0 + PRECISION) {
        let middle = (low * high).sqrt();
        if holds(middle)? { high = middle } else { low = middle }
    }
    Ok(high)
}

/// Least noise multiplier with which a device may take part in `participations` rounds within (epsilon,
/// delta), whoever chooses the rounds: `sqrt(participations / (2 rho))` at the largest rho that
/// [`zcdp_epsilon`] allows.
///
/// # Errors
/// [`AccountError::Parameter`] unless `epsilon` is finite and positive and `participations` is positive.
pub fn noise_multiplier_zcdp(epsilon: f64, delta: Delta, participations: u32) -> Result<f64, AccountError> {
    check_epsilon(epsilon)?;
    AccountError::check(participations > 0, "participations", 0.0, "positive")?;
    let rho = |sigma: f64| f64::from(participations) / (2.0 * sigma * sigma);
    let holds = |sigma: f64| zcdp_epsilon(rho(sigma), delta).is_ok_and(|reached| reached <= epsilon);
    Ok(least(holds, 1.0))
}

fn check_epsilon(epsilon: f64) -> Result<(), AccountError> {
    AccountError::check(epsilon.is_finite() && epsilon > 0.0, "epsilon", epsilon, "finite and positive")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::known::{close, number, rows};
    use serde_json::json;

    fn delta(value: f64) -> Delta {
        Delta::new(value).unwrap()
    }

    #[test]
    fn equals_what_others_calibrated() {
        // dp-accounting 0.6.0 at whole orders, to about three digits, and epsilon there by a sum of 15 digits.
        // Fractional orders need a little less noise.
        for (epsilon, q, steps, theirs, reached) in [
            (2.0, 1e-3, 16, 0.6783, 1.998_875_985_272_647_9),
            (8.0, 1e-3, 16, 0.3924, 7.998_694_501_746_218),
            (2.0, 1e-3, 100, 0.6927, 2.000_246_944_342_614_5),
            (8.0, 1e-3, 100, 0.4138, 7.994_091_289_552_658),
            (2.0, 1e-2, 100, 0.8961, 2.000_149_744_607_171),
        ] {
            let (row, at) = (json!([epsilon, q, steps]), delta(1e-6));
            let of = |sigma: f64| SubsampledGaussian::new(sigma, q).unwrap();
            close(of(theirs).curve().times(steps).epsilon(at).0, reached, 1e-11, &row);
            let found = noise_multiplier(epsilon, at, steps, q).unwrap();
            assert!(found <= theirs * (1.0 + 1e-4) && found >= theirs * 0.95, "{found} for {row}");
            // The least: a little less noise is too little. And enough by another accountant.
            let again = of(found).epsilon_rdp(steps, at).0;
            assert!(again <= epsilon && of(found * (1.0 - 2e-6)).epsilon_rdp(steps, at).0 > epsilon, "{row}");
            assert!(of(found).epsilon_pld(steps, at) < epsilon, "{row}");
        }
    }

    #[test]
    fn inverts_the_conversion_of_concentrated_divergence() {
        for row in rows("participation_limited") {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number")]
            let times = number(&row, "max_participations") as u32;
            let found =
                noise_multiplier_zcdp(number(&row, "eps_cks"), delta(number(&row, "delta")), times).unwrap();
            close(found, number(&row, "noise_multiplier"), 1e-9, &row);
            let reached =
                zcdp_epsilon(f64::from(times) / (2.0 * found * found), delta(number(&row, "delta"))).unwrap();
            assert!(reached <= number(&row, "eps_cks"), "{row}");
        }
    }

    #[test]
    fn refuses_what_no_noise_reaches() {
        assert!(noise_multiplier(0.0, delta(1e-6), 10, 0.1).is_err());
        assert!(noise_multiplier(1e-9, delta(1e-12), 1_000_000, 1.0).is_err());
        assert!(noise_multiplier(1.0, delta(1e-6), 10, 2.0).is_err());
        assert!(noise_multiplier_zcdp(1.0, delta(1e-6), 0).is_err());
    }
}
