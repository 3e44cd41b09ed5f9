//! Sums of independent discrete Gaussians on integer vectors (Kairouz, Liu and Steinke 2021, "The
//! Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation").

use super::{convert::AccountError, rdp::RdpCurve};

/// Least standard deviation of one device's discrete Gaussian, in units of the grid. From here on the sum
/// is so close to a discrete Gaussian that tau is below `10 n e^-61`; below it the bound collapses.
pub(super) const LOCAL_SIGMA_MIN: f64 = 2.5;

/// What a vector of bounded integers plus a sum of discrete Gaussians gives away.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DistributedGaussian {
    l2: f64,
    l1: f64,
    dimension: f64,
    sigma: f64,
    tau: f64,
}

impl DistributedGaussian {
    /// `summands` devices add noise of standard deviation `local_sigma` each; the rest as for
    /// [`super::Skellam::new`].
    ///
    /// # Errors
    /// [`AccountError::Parameter`], also for a `local_sigma` below 2.5 units.
    pub fn new(l2: f64, dimension: u64, summands: u32, local_sigma: f64) -> Result<Self, AccountError> {
        let enough = local_sigma.is_finite() && local_sigma >= LOCAL_SIGMA_MIN;
        AccountError::check(enough, "local sigma", local_sigma, "at least 2.5 units of the grid")?;
        Self::unchecked(l2, dimension, summands, local_sigma)
    }

    /// For comparison with published tables, which go below the least sigma.
    fn unchecked(l2: f64, dimension: u64, summands: u32, local_sigma: f64) -> Result<Self, AccountError> {
        AccountError::check(l2.is_finite() && l2 >= 0.0, "sensitivity", l2, "finite and not negative")?;
        AccountError::check(dimension > 0, "dimension", 0.0, "positive")?;
        AccountError::check(summands > 0, "summands", 0.0, "positive")?;
        #[expect(clippy::cast_precision_loss, reason = "dimensions are far below 2^53")]
        let dimension = dimension as f64;
        let sigma = local_sigma * f64::from(summands).sqrt();
        let l1 = l2 * dimension.sqrt().min(l2);
        Ok(Self { l2, l1, dimension, sigma, tau: tau(summands, local_sigma) })
    }

    /// Distance of the sum from a discrete Gaussian (Kairouz et al. 2021, theorem 1).
    #[must_use]
    pub fn tau(&self) -> f64 {
        self.tau
    }

    /// Rényi divergence of order `alpha` (Kairouz et al. 2021, corollary 12): the least of
    /// `alpha/2 D2^2/s^2 + tau d`, `alpha/2 (D2^2/s^2 + 2 D1 tau/s + tau^2 d)` and
    /// `alpha/2 (D2/s + sqrt(d) tau)^2`.
    #[must_use]
    pub fn rdp(&self, alpha: u32) -> f64 {
        let (half, ratio, tau, d) = (0.5 * f64::from(alpha), self.l2 / self.sigma, self.tau, self.dimension);
        let first = half * ratio * ratio + tau * d;
        let second = half * (ratio * ratio + 2.0 * self.l1 * tau / self.sigma + tau * tau * d);
        let third = half * (ratio + d.sqrt() * tau).powi(2);
        first.min(second).min(third)
    }

    /// The divergences at all [`super::ORDERS`].
    #[must_use]
    pub fn curve(&self) -> RdpCurve {
        RdpCurve::from_fn(|alpha| self.rdp(alpha))
    }
}

/// `10 sum_{k=1}^{n-1} exp(-2 pi^2 sigma^2 k/(k+1))`.
fn tau(summands: u32, sigma: f64) -> f64 {
    let scale = -2.0 * std::f64::consts::PI.powi(2) * sigma * sigma;
    let term = |k: u32| (scale * f64::from(k) / (f64::from(k) + 1.0)).exp();
    10.0 * (1..summands).map(term).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::{
        Delta,
        known::{close, number, rows},
    };

    #[test]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole numbers")]
    fn equals_the_reference() {
        for row in rows("distributed_mechanisms") {
            let of = |field| number(&row, field);
            let (dimension, summands) = (of("dim") as u64, of("num_clients") as u32);
            let sum = DistributedGaussian::unchecked(
                of("l2_sens_int_rounded"),
                dimension,
                summands,
                of("local_sigma_int"),
            )
            .unwrap();
            assert!((sum.tau() - of("tau")).abs() <= 1e-9 * of("tau") + 1e-20, "{row}");
            close(sum.rdp(2), of("ddg_rdp_order2"), 1e-9, &row);
            close(sum.rdp(32), of("ddg_rdp_order32"), 1e-9, &row);
            let curve = sum.curve().times(of("rounds") as u32);
            close(curve.epsilon(Delta::new(of("delta")).unwrap()).0, of("eps_ddg_rdp"), 1e-9, &row);
        }
    }

    #[test]
    fn refuses_noise_that_is_too_narrow_to_be_one_discrete_gaussian() {
        let error = DistributedGaussian::new(20.0, 4096, 50, 0.6).unwrap_err();
        assert_eq!(error.to_string(), "local sigma is 0.6; it must be at least 2.5 units of the grid");
        assert!(DistributedGaussian::new(20.0, 4096, 50, 2.5).unwrap().tau() < 1e-24 * 50.0);
    }
}
