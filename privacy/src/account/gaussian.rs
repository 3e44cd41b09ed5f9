//! The Gaussian mechanism exactly: no Rényi order, no conversion, no slack.
//!
//! Sensitivity is 1 throughout, so `sigma` is the noise multiplier. `steps` rounds with `sigma` are one
//! round with `sigma / sqrt(steps)`.

use super::convert::{AccountError, Delta, outward};

/// ln(sqrt(2 pi)).
pub(crate) const LN_ROOT_TWO_PI: f64 = 0.918_938_533_204_672_8;

/// Delta of the Gaussian mechanism at `epsilon` (Balle and Wang 2018, "Improving the Gaussian Mechanism for
/// Differential Privacy", theorem 8).
///
/// # Errors
/// [`AccountError::Parameter`] unless `sigma` is finite and positive and `epsilon` finite and not negative.
pub fn gaussian_delta(sigma: f64, epsilon: f64) -> Result<f64, AccountError> {
    check_sigma(sigma)?;
    let range = "finite and not negative";
    AccountError::check(epsilon.is_finite() && epsilon >= 0.0, "epsilon", epsilon, range)?;
    Ok(outward(ln_delta(sigma, epsilon).exp()).min(1.0))
}

/// Epsilon of the Gaussian mechanism at `delta`; the same source.
///
/// # Errors
/// [`AccountError::Parameter`] unless `sigma` is finite and positive.
pub fn gaussian_epsilon(sigma: f64, delta: Delta) -> Result<f64, AccountError> {
    check_sigma(sigma)?;
    let target = delta.value().ln();
    let holds = |epsilon: f64| ln_delta(sigma, epsilon) <= target;
    Ok(if holds(0.0) { 0.0 } else { outward(least(holds, 1.0)) })
}

/// Least noise multiplier with which one round is (epsilon, delta); the same source, algorithm 1's purpose.
///
/// # Errors
/// [`AccountError::Parameter`] unless `epsilon` is finite and positive.
pub fn gaussian_sigma(epsilon: f64, delta: Delta) -> Result<f64, AccountError> {
    AccountError::check(epsilon.is_finite() && epsilon > 0.0, "epsilon", epsilon, "finite and positive")?;
    let target = delta.value().ln();
    Ok(outward(least(|sigma| ln_delta(sigma, epsilon) <= target, 1.0)))
}

/// Delta at `epsilon` of one integer plus a discrete Gaussian of parameter `sigma`, moved by `sensitivity`
/// (Canonne, Kamath and Steinke 2020, theorem 7): the sum over the integers, as it stands.
///
/// # Errors
/// [`AccountError::Parameter`].
pub fn discrete_gaussian_delta(sigma: f64, sensitivity: u32, epsilon: f64) -> Result<f64, AccountError> {
    let range = "finite and not negative";
    AccountError::check(epsilon.is_finite() && epsilon >= 0.0, "epsilon", epsilon, range)?;
    let over = |(probability, loss): (f64, f64)| -probability * (epsilon - loss).min(0.0).exp_m1();
    Ok(outward(discrete_gaussian_losses(sigma, sensitivity)?.map(over).sum::<f64>()))
}

/// Probability and privacy loss of each integer that a discrete Gaussian gives, as far as f64 reaches.
pub(crate) fn discrete_gaussian_losses(
    sigma: f64,
    sensitivity: u32,
) -> Result<impl Iterator<Item = (f64, f64)>, AccountError> {
    let range = "positive and at most 65536";
    AccountError::check(sigma > 0.0 && sigma <= 65536.0, "sigma", sigma, range)?;
    let (shift, variance) = (f64::from(sensitivity), sigma * sigma);
    #[expect(clippy::cast_possible_truncation, reason = "at most 38 * 65536 and one")]
    let reach = (38.0 * sigma).ceil() as i32 + 1;
    let density = move |x: i32| (-f64::from(x).powi(2) / (2.0 * variance)).exp();
    let whole: f64 = (-reach..=reach).map(density).sum();
    let loss = move |x: i32| shift * (shift - 2.0 * f64::from(x)) / (2.0 * variance);
    Ok((-reach..=reach).map(move |x| (density(x) / whole, loss(x))))
}

fn check_sigma(sigma: f64) -> Result<(), AccountError> {
    AccountError::check(sigma.is_finite() && sigma > 0.0, "sigma", sigma, "finite and positive")
}

/// ln(delta). With `a = epsilon sigma - 1/(2 sigma)`, theorem 8's difference of two tails is the integral
/// over t > 0 of `phi(a + t) (1 - exp(-t / sigma))`: nothing cancels, however small delta is.
///
/// After `t = e^x` the trapezoid rule converges geometrically (Trefethen and Weideman 2014, section 5): the
/// integrand is analytic for |Im x| < pi/4, so a step of 1/8 leaves exp(-2 pi (pi/4) 8), below 1e-17.
fn ln_delta(sigma: f64, epsilon: f64) -> f64 {
    let a = epsilon * sigma - 0.5 / sigma;
    if a < -1.0 {
        // Here sigma < 1/2, the tails are far apart, and the integrand's peak is too narrow for the step.
        let far = (-0.5 * a * a).exp() * tail_ratio(a + 1.0 / sigma);
        return (0.5 * libm::erfc(a / 2f64.sqrt()) - far).ln();
    }
    let step = 0.125;
    let middle = -(a.max(1.0).ln());
    let term = |i: i32| {
        let x = middle + step * f64::from(i);
        let t = x.exp();
        (x - a * t - 0.5 * t * t).exp() * -(-t / sigma).exp_m1()
    };
    // Below, terms fall as t^2; above, faster than exp(-t).
    let sum: f64 = (-320..=40).map(term).sum();
    -0.5 * a * a - LN_ROOT_TWO_PI + (step * sum).ln()
}

/// `exp(b^2 / 2)` times the probability that a standard normal variable exceeds `b`, for `b` above 1: from 6
/// on by Laplace's continued fraction, of which 60 terms are exact to the last digit there.
fn tail_ratio(b: f64) -> f64 {
    if b < 6.0 {
        return 0.5 * libm::erfc(b / 2f64.sqrt()) * (0.5 * b * b).exp();
    }
    let fraction = (1..=60).rev().fold(b, |below, k| b + f64::from(k) / below);
    (-LN_ROOT_TWO_PI).exp() / fraction
}

/// Least positive number, to the last digits and from above, from which on `holds`; `holds` must turn true
/// once and stay so.
pub(crate) fn least(holds: impl Fn(f64) -> bool, start: f64) -> f64 {
    let (mut low, mut high) = (start, start);
    while !holds(high) && high < f64::MAX / 4.0 {
        high *= 2.0;
    }
    while holds(low) && low > f64::MIN_POSITIVE * 4.0 {
        low *= 0.5;
    }
    while high - low > 1e-15 * high {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            break;
        }
        if holds(middle) { high = middle } else { low = middle }
    }
    high
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::known::{close, number, rows};

    fn delta(value: f64) -> Delta {
        Delta::new(value).unwrap()
    }

    #[test]
    fn equals_the_reference() {
        for row in rows("gaussian_composition") {
            let sigma = number(&row, "sigma") / number(&row, "steps").sqrt();
            let at = number(&row, "delta");
            let epsilon = gaussian_epsilon(sigma, delta(at)).unwrap();
            close(epsilon, number(&row, "eps_exact"), 1e-9, &row);
            close(gaussian_delta(sigma, epsilon).unwrap(), at, 1e-8, &row);
        }
        for row in rows("participation_limited") {
            let sigma = number(&row, "noise_multiplier") / number(&row, "max_participations").sqrt();
            let epsilon = gaussian_epsilon(sigma, delta(number(&row, "delta"))).unwrap();
            close(epsilon, number(&row, "eps_gaussian_exact"), 1e-9, &row);
        }
        for row in rows("zcdp_to_approx_dp") {
            let sigma = (2.0 * number(&row, "rho")).sqrt().recip();
            let epsilon = gaussian_epsilon(sigma, delta(number(&row, "delta"))).unwrap();
            close(epsilon, number(&row, "eps_exact_if_gaussian"), 1e-9, &row);
        }
        for row in rows("calibration_gaussian") {
            let sigma = gaussian_sigma(number(&row, "eps"), delta(number(&row, "delta"))).unwrap();
            close(sigma, number(&row, "sigma"), 1e-9, &row);
        }
    }

    #[test]
    fn discrete_profile_equals_the_reference() {
        for row in rows("discrete_gaussian_profile") {
            let (sigma, epsilon) = (number(&row, "sigma"), number(&row, "eps"));
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number")]
            let sensitivity = number(&row, "sensitivity") as u32;
            let exact = discrete_gaussian_delta(sigma, sensitivity, epsilon).unwrap();
            close(exact, number(&row, "delta_exact"), 1e-9, &row);
            close(
                gaussian_delta(sigma, epsilon).unwrap(),
                number(&row, "delta_continuous_gaussian"),
                1e-9,
                &row,
            );
        }
    }

    #[test]
    fn holds_where_tails_are_tiny_and_where_tails_cancel() {
        for (sigma, at) in
            [(1.0, 1e-300), (0.05, 1e-200), (30.0, 1e-300), (1e6, 1e-9), (1e6, 1e-12), (3e3, 0.4)]
        {
            let epsilon = gaussian_epsilon(sigma, delta(at)).unwrap();
            let expected = serde_json::json!({ "sigma": sigma, "delta": at });
            if epsilon > 0.0 {
                close(ln_delta(sigma, epsilon), f64::ln(at), 1e-11, &expected);
            }
        }
        // At epsilon 0 delta is the distance in total variation, erf(1 / (2 sqrt(2) sigma)).
        for sigma in [0.3, 0.5, 1.0, 40.0, 1e7] {
            let row = serde_json::json!({ "sigma": sigma });
            close(gaussian_delta(sigma, 0.0).unwrap(), libm::erf(0.5 / (2f64.sqrt() * sigma)), 1e-11, &row);
        }
    }

    #[test]
    fn refuses_what_is_no_mechanism() {
        assert!(gaussian_delta(0.0, 1.0).is_err() && gaussian_delta(1.0, -1.0).is_err());
        assert!(gaussian_epsilon(f64::NAN, delta(1e-6)).is_err());
        assert!(gaussian_sigma(0.0, delta(1e-6)).is_err());
        assert!(discrete_gaussian_delta(0.0, 1, 1.0).is_err());
    }
}
