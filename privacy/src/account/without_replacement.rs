//! The Gaussian mechanism on a cohort of fixed size, drawn without replacement.
//!
//! Adjacency is replacing one device's data. That moves a clipped sum by up to twice the clipping norm, so
//! the noise multiplier here is the noise's standard deviation over `2 C`.

use super::{
    convert::{AccountError, Delta},
    gaussian::LN_ROOT_TWO_PI,
    rdp::RdpCurve,
    subsampled::{LogSum, ln_1p_exp, ln_exp_m1},
};

/// The Gaussian mechanism on a cohort of fixed size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FixedCohortGaussian {
    sigma: f64,
    fraction: f64,
}

impl FixedCohortGaussian {
    /// A cohort of `cohort` devices out of `population`, uniform among all such cohorts, in each round anew.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless `noise_multiplier` lies in [0.05, 1e6] and `cohort` in
    /// [1, `population`].
    pub fn new(noise_multiplier: f64, population: u64, cohort: u64) -> Result<Self, AccountError> {
        let range = "between 0.05 and 1e6";
        AccountError::check(
            (0.05..=1e6).contains(&noise_multiplier),
            "noise multiplier",
            noise_multiplier,
            range,
        )?;
        #[expect(clippy::cast_precision_loss, reason = "numbers of devices are far below 2^53")]
        let (cohort, population) = (cohort as f64, population as f64);
        let fits = cohort >= 1.0 && cohort <= population;
        AccountError::check(fits, "cohort", cohort, "at least 1 and at most the population")?;
        Ok(Self { sigma: noise_multiplier, fraction: cohort / population })
    }

    /// Upper bound of the Rényi divergence of integer order `order` (Wang, Balle and Kasiviswanathan 2019,
    /// "Subsampled Rényi Differential Privacy and Analytical Moments Accountant", theorem 27): with g the
    /// cohort's fraction, e(a) the Gaussian's divergence and B(j) the mean of `(ratio - 1)^j`,
    /// `ln(1 + g^2 C(a,2) min(4 (exp(e(2)) - 1), 2 exp(e(2))) + sum_{j=3}^a g^j C(a,j) min(4 sqrt(B(2
    /// floor(j/2)) B(2 ceil(j/2))), 2 exp((j-1) e(j)))) / (a - 1)`. Never above the Gaussian's own.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless `order` lies in [2, 1024].
    pub fn rdp(&self, order: u32) -> Result<f64, AccountError> {
        let range = "between 2 and 1024";
        AccountError::check((2..=1024).contains(&order), "order", f64::from(order), range)?;
        Ok(self.bound(order, &self.even_moments(order)))
    }

    /// The divergences at all [`super::ORDERS`].
    #[must_use]
    pub fn curve(&self) -> RdpCurve {
        let moments = self.even_moments(1024);
        RdpCurve::from_fn(|order| self.bound(order, &moments))
    }

    /// Epsilon of `steps` rounds at `delta`, and the order it was found at.
    #[must_use]
    pub fn epsilon_rdp(&self, steps: u32, delta: Delta) -> (f64, u32) {
        self.curve().times(steps).epsilon(delta)
    }

    fn bound(&self, order: u32, even_moments: &[f64]) -> f64 {
        let (a, ln_g) = (f64::from(order), self.fraction.ln());
        let own = |order: f64| 0.5 * order / (self.sigma * self.sigma);
        let mut ln_weight = a.ln() + ln_g;
        let mut sum = LogSum::default();
        for j in 2..=order {
            let at = f64::from(j);
            ln_weight += ((a - at + 1.0) / at).ln() + ln_g;
            let plain = 2f64.ln() + (at - 1.0) * own(at);
            let (low, high) = ((j / 2) as usize, j.div_ceil(2) as usize);
            let fine = match (j, even_moments.get(low - 1), even_moments.get(high - 1)) {
                (2, _, _) => 4f64.ln() + ln_exp_m1(own(2.0)),
                (_, Some(low), Some(high)) => 4f64.ln() + 0.5 * (low + high),
                (_, _, _) => f64::INFINITY,
            };
            sum.add(ln_weight + plain.min(fine));
        }
        (ln_1p_exp(sum.ln()) / (a - 1.0)).min(own(a))
    }

    /// ln B(2), ln B(4), .. up to `order` rounded up, but no further than B(256): beyond, the second bound of
    /// each term is the least of the two in every useful case. By the trapezoid rule; the integrand is entire.
    fn even_moments(&self, order: u32) -> Vec<f64> {
        let last = order.div_ceil(2).min(128);
        let (step, reach) = (0.25, 14.0 + f64::from(2 * last).sqrt());
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 3e4")]
        let count = ((2.0 * reach + f64::from(2 * last) / self.sigma) / step) as u32;
        let node = |i: u32| {
            let u = step * f64::from(i) - reach;
            let z = (u - 0.5 / self.sigma) / self.sigma;
            let ln_distance = if z > 0.0 { ln_exp_m1(z) } else { (-z.exp_m1()).ln() };
            (ln_distance, -0.5 * u * u + step.ln() - LN_ROOT_TWO_PI)
        };
        let nodes: Vec<(f64, f64)> = (0..=count).map(node).collect();
        let moment = |m: u32| {
            let mut sum = LogSum::default();
            for (ln_distance, ln_weight) in &nodes {
                sum.add(ln_weight + f64::from(2 * m) * ln_distance);
            }
            sum.ln()
        };
        (1..=last).map(moment).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::known::{close, number, rows};

    #[test]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole numbers")]
    fn equals_the_reference() {
        for row in rows("without_replacement_gaussian") {
            let of = |field| number(&row, field);
            let (population, cohort) = (of("population") as u64, of("cohort") as u64);
            let mechanism = FixedCohortGaussian::new(of("sigma"), population, cohort).unwrap();
            let (epsilon, order) =
                mechanism.epsilon_rdp(of("steps") as u32, Delta::new(of("delta")).unwrap());
            close(epsilon, of("eps_rdp"), 1e-9, &row);
            close(f64::from(order), of("rdp_order"), 0.0, &row);
            close(mechanism.rdp(order).unwrap(), mechanism.curve().values()[order as usize - 2], 1e-12, &row);
        }
    }

    #[test]
    fn moments_equal_alternating_sums_where_these_still_have_digits() {
        let mechanism = FixedCohortGaussian::new(0.9, 10, 1).unwrap();
        // The mean of (ratio - 1)^4 by the binomial theorem; the ratio's k-th moment is exp(k(k-1) / 2 s^2).
        let half = 0.5 / 0.81;
        let power = |k: f64| (k * (k - 1.0) * half).exp();
        let fourth = power(4.0) - 4.0 * power(3.0) + 6.0 * power(2.0) - 3.0;
        let row = serde_json::json!("fourth moment");
        close(mechanism.even_moments(4)[1].exp(), fourth, 1e-12, &row);
        close(mechanism.even_moments(4)[0].exp(), power(2.0) - 1.0, 1e-12, &row);
    }

    #[test]
    fn a_whole_population_gains_nothing() {
        let mechanism = FixedCohortGaussian::new(2.0, 10, 10).unwrap();
        assert_eq!(mechanism.rdp(8).unwrap(), 8.0 / (2.0 * 4.0));
        assert!(FixedCohortGaussian::new(2.0, 10, 11).is_err() && mechanism.rdp(1).is_err());
    }
}
