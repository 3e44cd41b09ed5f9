//! Counts, sums and means of one bounded number a device, with discrete Gaussian noise (Canonne, Kamath
//! and Steinke 2020, "The Discrete Gaussian for Differential Privacy").

use super::{Noised, ReleaseCost, ReleaseError};
use crate::account::AccountError;
use opendp::{
    domains::AtomDomain, error::Fallible, measurements::make_gaussian, measures::ZeroConcentratedDivergence,
    metrics::AbsoluteDistance,
};

/// The grid's steps from 0 to the greater bound. Rounding moves a value by 2^-21 of that bound at most.
const STEPS: i64 = 1 << 20;

/// Sums of so many values fill 52 bits, and with the noise still fit an f64 exactly.
const VALUES_MAX: u64 = 1 << 32;

/// Below it the noise would leave the 53 bits that an f64 holds exactly; above it nothing is private.
const RHO_RANGE: (f64, f64) = (1e-9, 100.0);

/// The least and the greatest value that a device can contribute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScalarBounds {
    lower: f64,
    upper: f64,
}

impl ScalarBounds {
    /// Values are clamped to `lower..=upper`; both must be chosen without looking at the data.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless `lower <= upper`, and the greater magnitude is from 1e-100 to 1e100.
    pub fn new(lower: f64, upper: f64) -> Result<Self, AccountError> {
        AccountError::check(lower.is_finite(), "lower", lower, "finite")?;
        AccountError::check(
            upper.is_finite() && lower <= upper,
            "upper",
            upper,
            "finite and at least lower",
        )?;
        let bounds = Self { lower, upper };
        let held = (1e-100..=1e100).contains(&bounds.sensitivity());
        AccountError::check(
            held,
            "greater bound",
            bounds.sensitivity(),
            "from 1e-100 to 1e100 in magnitude",
        )?;
        Ok(bounds)
    }

    /// How far one device can move the sum under zero-out adjacency: the greater bound's magnitude.
    #[must_use]
    pub fn sensitivity(&self) -> f64 {
        self.lower.abs().max(self.upper.abs())
    }

    /// The value in steps of the grid, at most [`STEPS`] in magnitude whatever it was. What is not a number
    /// counts as zero: a device that fails must not show.
    fn steps(&self, value: f64) -> i64 {
        if value.is_nan() {
            return 0;
        }
        let share = value.clamp(self.lower, self.upper) / self.sensitivity();
        let steps = (share * STEPS as f64).round() as i64;
        steps.clamp(-STEPS, STEPS)
    }

    /// One step of the grid, in the values' unit.
    fn step(&self) -> f64 {
        self.sensitivity() / STEPS as f64
    }
}

/// The number of devices of which something holds, each counted at most once: sensitivity 1.
///
/// # Errors
/// [`ReleaseError`], for a count above 2^52 or `rho` outside 1e-9 to 100.
pub fn private_count(count: u64, rho: f64) -> Result<Noised<i64>, ReleaseError> {
    let held = i64::try_from(count).ok().filter(|count| *count <= 1 << 52);
    let given = count as f64;
    let count =
        held.ok_or(AccountError::Parameter { parameter: "count", value: given, range: "at most 2^52" })?;
    noised(count, 1, rho)
}

/// The sum of one value a device, clamped and rounded to 2^20 steps of the greater bound. Sensitivity under
/// zero-out is [`ScalarBounds::sensitivity`]; the true `rho` charged is at most the `rho` asked for.
///
/// # Errors
/// [`ReleaseError`], for more than 2^32 values or `rho` outside 1e-9 to 100.
pub fn private_sum(values: &[f64], bounds: ScalarBounds, rho: f64) -> Result<Noised<f64>, ReleaseError> {
    let count = values.len() as u64;
    AccountError::check(count <= VALUES_MAX, "number of values", count as f64, "at most 2^32")?;
    let sum = values.iter().map(|value| bounds.steps(*value)).sum();
    let steps = noised(sum, STEPS, rho)?;
    let value = steps.value as f64 * bounds.step();
    Ok(Noised { value, standard_error: steps.standard_error * bounds.step(), cost: steps.cost })
}

/// The noised sum over `public_count`, which everybody may know and which is not protected: the number of
/// devices that were asked, say, of which those without a value count as zero.
///
/// # Errors
/// [`ReleaseError`], as for [`private_sum`], and for more values than `public_count`.
pub fn private_mean(
    values: &[f64],
    public_count: u32,
    bounds: ScalarBounds,
    rho: f64,
) -> Result<Noised<f64>, ReleaseError> {
    let divisor = f64::from(public_count);
    let held = public_count > 0 && values.len() as u64 <= u64::from(public_count);
    AccountError::check(held, "public count", divisor, "positive and at least the number of values")?;
    let sum = private_sum(values, bounds, rho)?;
    Ok(Noised { value: sum.value / divisor, standard_error: sum.standard_error / divisor, cost: sum.cost })
}

/// Adds the least discrete Gaussian noise that costs at most `rho`, and charges what opendp's own privacy
/// map says it costs. An i64 saturates far beyond what the noise reaches, and that is postprocessing.
fn noised(value: i64, sensitivity: i64, rho: f64) -> Result<Noised<i64>, ReleaseError> {
    let held = rho >= RHO_RANGE.0 && rho <= RHO_RANGE.1;
    AccountError::check(held, "rho", rho, "from 1e-9 to 100")?;
    let distance = sensitivity as f64;
    let mut sigma = distance / (2.0 * rho).sqrt();
    // A few units in the last place make up for the rounding of the formula.
    for _ in 0..16 {
        let (charged, value) =
            gaussian(value, distance, sigma, rho).map_err(ReleaseError::opendp("add noise"))?;
        if let Some(value) = value {
            let cost = ReleaseCost::Zcdp { rho: charged };
            return Ok(Noised { value, standard_error: gaussian_deviation(sigma), cost });
        }
        sigma = sigma.next_up();
    }
    let error = AccountError::Unreachable(format!("no noise costs at most rho {rho}"));
    Err(error.into())
}

/// What noise of `sigma` costs, and the noised value if that is at most `rho_max`.
fn gaussian(value: i64, distance: f64, sigma: f64, rho_max: f64) -> Fallible<(f64, Option<i64>)> {
    let mechanism = make_gaussian::<_, _, ZeroConcentratedDivergence>(
        AtomDomain::<i64>::default(),
        AbsoluteDistance::<f64>::default(),
        sigma,
        None,
    )?;
    let rho = mechanism.map(&distance)?;
    let value = if rho <= rho_max { Some(mechanism.invoke(&value)?) } else { None };
    Ok((rho, value))
}

/// Standard deviation of the discrete Gaussian, which is below its parameter where that is small.
pub(super) fn gaussian_deviation(sigma: f64) -> f64 {
    // Poisson summation: from 2 on the two differ by less than 1e-30, relatively.
    if sigma >= 2.0 {
        return sigma;
    }
    let weight = |x: f64| (-0.5 * (x / sigma).powi(2)).exp();
    let all = (1..100)
        .map(f64::from)
        .fold((0.0, 1.0), |(square, total), x| (square + 2.0 * x * x * weight(x), total + 2.0 * weight(x)));
    (all.0 / all.1).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::release::oracle::check_moments;

    fn rho_of(cost: ReleaseCost) -> f64 {
        match cost {
            ReleaseCost::Zcdp { rho } => rho,
            ReleaseCost::Approximate { .. } => panic!("{cost:?} is not concentrated"),
        }
    }

    #[test]
    fn values_are_bounded_whatever_they_were() {
        let bounds = ScalarBounds::new(-3.0, 0.7).unwrap();
        assert_eq!(bounds.sensitivity(), 3.0);
        for value in [f64::NEG_INFINITY, -1e308, -3.1, -3.0] {
            assert_eq!(bounds.steps(value), -STEPS);
        }
        for value in [f64::INFINITY, f64::MAX, 0.7] {
            assert_eq!(bounds.steps(value), 244_668);
        }
        assert_eq!(bounds.steps(f64::NAN), 0);
        assert_eq!(bounds.steps(f64::MIN_POSITIVE), 0);
    }

    #[test]
    fn the_charge_is_the_formula_s_and_never_above_what_was_allowed() {
        let bounds = ScalarBounds::new(0.0, 10.0).unwrap();
        for rho in [1e-9, 1e-3, 0.1, 1.0 / 3.0, 0.5, 0.77, 7.0, 100.0] {
            for noised in [
                private_sum(&[1.0], bounds, rho).unwrap(),
                private_mean(&[1.0, 2.0], 4, bounds, rho).unwrap(),
            ] {
                let charged = rho_of(noised.cost);
                assert!(charged <= rho && charged >= rho * (1.0 - 1e-14), "{charged} for {rho}");
            }
            let sum = private_sum(&[1.0], bounds, rho).unwrap();
            let formula = 0.5 * (bounds.sensitivity() / sum.standard_error).powi(2);
            assert!((formula / rho - 1.0).abs() < 1e-13, "{formula} for {rho}");
            assert!(rho_of(private_count(7, rho).unwrap().cost) <= rho);
        }
    }

    #[test]
    fn noise_has_its_variance_and_no_bias() {
        let bounds = ScalarBounds::new(-2.0, 8.0).unwrap();
        let values = [5.0, -3.0, 9.0, f64::NAN, 0.5];
        let exact = 5.0 - 2.0 + 8.0 + 0.0 + 0.5;
        let draw = |_| private_sum(&values, bounds, 0.08).unwrap();
        // sigma is 8 / sqrt(2 * 0.08) = 20.
        check_moments((0..20_000).map(|at| draw(at).value - exact), 20.0);
        assert!((draw(0).standard_error - 20.0).abs() < 1e-12);
        let mean = |_| private_mean(&values, 10, bounds, 0.08).unwrap();
        check_moments((0..20_000).map(|at| mean(at).value - exact / 10.0), 2.0);
        assert!((mean(0).standard_error - 2.0).abs() < 1e-12);
    }

    #[test]
    fn counts_have_their_own_small_grid() {
        let count = |_| private_count(41, 0.02).unwrap();
        check_moments((0..20_000).map(|at| count(at).value as f64 - 41.0), 5.0);
        // Against the sum over the law at sigma 1/2: weights 1, e^-2, e^-8, e^-18.
        let (e2, e8, e18) = ((-2f64).exp(), (-8f64).exp(), (-18f64).exp());
        let exact = (2.0 * (e2 + 4.0 * e8 + 9.0 * e18) / (1.0 + 2.0 * (e2 + e8 + e18))).sqrt();
        let noised = private_count(3, 2.0).unwrap();
        assert!((noised.standard_error / exact - 1.0).abs() < 1e-9, "{} for {exact}", noised.standard_error);
    }

    #[test]
    fn refuses_what_it_cannot_bound() {
        for (lower, upper) in [(1.0, 0.0), (f64::NAN, 1.0), (0.0, f64::INFINITY), (0.0, 0.0), (0.0, 1e-200)] {
            assert!(ScalarBounds::new(lower, upper).is_err(), "{lower} {upper}");
        }
        let bounds = ScalarBounds::new(0.0, 1.0).unwrap();
        for rho in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-10, 101.0] {
            let error = private_sum(&[1.0], bounds, rho).unwrap_err().to_string();
            assert!(error.starts_with("rho is ") && error.ends_with("from 1e-9 to 100"), "{error}");
        }
        assert!(private_mean(&[1.0], 0, bounds, 1.0).is_err());
        assert!(private_mean(&[1.0, 1.0], 1, bounds, 1.0).is_err());
        assert!(private_count((1 << 52) + 1, 1.0).is_err());
    }
}
