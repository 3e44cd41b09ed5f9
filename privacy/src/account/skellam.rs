//! The Skellam mechanism on integer vectors (Agarwal, Kairouz and Liu 2021, "The Skellam Mechanism for
//! Differentially Private Federated Learning").

use super::{
    convert::AccountError,
    rdp::{ORDERS, RdpCurve},
};

/// What a vector of bounded integers plus symmetric Skellam noise gives away.
///
/// Sums of independent Skellam variables are Skellam, so the law of any set of survivors is exact: no
/// dropout pattern and no rounding stands between this formula and the sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Skellam {
    l2: f64,
    l1: f64,
    variance: f64,
}

impl Skellam {
    /// `l2` bounds how far one contribution moves the sum in the L2 norm, in units of the grid;
    /// `dimension` is the vector's length; `variance` is the sum's noise per coordinate, in units squared.
    ///
    /// The L1 bound follows: integers have |z| <= z^2, so it is `l2 * min(sqrt(dimension), l2)`.
    ///
    /// # Errors
    /// [`AccountError::Parameter`].
    pub fn new(l2: f64, dimension: u64, variance: f64) -> Result<Self, AccountError> {
        AccountError::check(l2.is_finite() && l2 >= 0.0, "sensitivity", l2, "finite and not negative")?;
        AccountError::check(
            variance.is_finite() && variance > 0.0,
            "variance",
            variance,
            "finite and positive",
        )?;
        #[expect(clippy::cast_precision_loss, reason = "dimensions are far below 2^53")]
        let root = (dimension as f64).sqrt();
        AccountError::check(dimension > 0, "dimension", 0.0, "positive")?;
        Ok(Self { l2, l1: l2 * root.min(l2), variance })
    }

    /// The L1 bound, in units of the grid.
    #[must_use]
    pub fn l1(&self) -> f64 {
        self.l1
    }

    /// Rényi divergence of integer order `alpha` (Agarwal et al. 2021, theorem 3.5 and corollary 3.6):
    /// `alpha D2^2 / (2v) + min(((2 alpha - 1) D2^2 + 6 D1) / (4 v^2), 3 D1 / (2v))`.
    #[must_use]
    pub fn rdp(&self, alpha: u32) -> f64 {
        let (alpha, v, squared) = (f64::from(alpha), self.variance, self.l2 * self.l2);
        let second = ((2.0 * alpha - 1.0) * squared + 6.0 * self.l1) / (4.0 * v * v);
        alpha * squared / (2.0 * v) + second.min(1.5 * self.l1 / v)
    }

    /// The divergences at all [`ORDERS`].
    #[must_use]
    pub fn curve(&self) -> RdpCurve {
        RdpCurve::from_fn(|alpha| self.rdp(alpha))
    }

    /// A number `rho` with `rdp(alpha) <= rho alpha` at every integer order, for people who think in zCDP:
    /// `D2^2 / (2v) + (2 D2^2 + 6 D1) / (4 v^2)`. Official epsilons come from the curve, never from this: it
    /// holds at integer orders only.
    #[must_use]
    pub fn rho(&self) -> f64 {
        let (v, squared) = (self.variance, self.l2 * self.l2);
        let whole = squared / (2.0 * v) + (2.0 * squared + 6.0 * self.l1) / (4.0 * v * v);
        debug_assert!(ORDERS.iter().all(|a| self.rdp(*a) <= whole * f64::from(*a) * (1.0 + 1e-12)));
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::{
        Delta,
        known::{close, number, rows},
    };

    #[test]
    fn equals_the_reference() {
        for row in rows("distributed_mechanisms") {
            let of = |field| number(&row, field);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number")]
            let dimension = of("dim") as u64;
            let variance = of("num_clients") * of("local_sigma_int").powi(2);
            let sum = Skellam::new(of("l2_sens_int_rounded"), dimension, variance).unwrap();
            close(sum.l1(), of("l1_sens_int"), 1e-9, &row);
            close(sum.rdp(2), of("skellam_rdp_order2"), 1e-9, &row);
            close(sum.rdp(32), of("skellam_rdp_order32"), 1e-9, &row);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number")]
            let rounds = of("rounds") as u32;
            let (epsilon, order) = sum.curve().times(rounds).epsilon(Delta::new(of("delta")).unwrap());
            close(epsilon, of("eps_skellam_rdp"), 1e-9, &row);
            assert_eq!(f64::from(order), of("order_skellam"));
            assert!(ORDERS.iter().all(|alpha| sum.rdp(*alpha) <= sum.rho() * f64::from(*alpha)));
        }
    }

    #[test]
    fn refuses_what_is_no_mechanism() {
        assert!(Skellam::new(1.0, 4, 0.0).is_err());
        assert!(Skellam::new(f64::INFINITY, 4, 1.0).is_err());
        assert!(Skellam::new(1.0, 0, 1.0).is_err());
    }
}
