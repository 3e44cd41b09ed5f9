//! Rényi differential privacy at fixed integer orders (Mironov 2017).

use super::convert::{AccountError, Delta, epsilon_at, ln_delta_at, outward};

/// The orders: integers only, because Skellam's bound is stated for those.
pub const ORDERS: [u32; 130] = orders();

const fn orders() -> [u32; 130] {
    let mut orders = [0; 130];
    let mut at = 0;
    while at < 127 {
        orders[at] = at as u32 + 2;
        at += 1;
    }
    (orders[127], orders[128], orders[129]) = (256, 512, 1024);
    orders
}

/// Rényi divergences of a mechanism, or of many composed, at [`ORDERS`].
#[derive(Debug, Clone, PartialEq)]
pub struct RdpCurve(Vec<f64>);

impl RdpCurve {
    /// The curve of a mechanism that releases nothing.
    #[must_use]
    pub fn zero() -> Self {
        Self(vec![0.0; ORDERS.len()])
    }

    /// The divergence at each order.
    #[must_use]
    pub fn from_fn(rdp: impl Fn(u32) -> f64) -> Self {
        Self(ORDERS.iter().map(|order| rdp(*order)).collect())
    }

    /// A stored curve: one finite value, not negative, for each of [`ORDERS`].
    #[must_use]
    pub fn from_values(values: Vec<f64>) -> Option<Self> {
        let fits = values.len() == ORDERS.len() && values.iter().all(|v| v.is_finite() && *v >= 0.0);
        fits.then_some(Self(values))
    }

    /// The divergences, in the order of [`ORDERS`].
    #[must_use]
    pub fn values(&self) -> &[f64] {
        &self.0
    }

    /// The curve of `times` such mechanisms, each free to depend on the answers of those before
    /// (Mironov 2017, proposition 1).
    #[must_use]
    pub fn times(&self, times: u32) -> Self {
        Self(self.0.iter().map(|rdp| rdp * f64::from(times)).collect())
    }

    /// The curve of this and another mechanism; the same source.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a + b).collect())
    }

    /// The least `rho` with `RDP(alpha) <= rho alpha` at all [`ORDERS`], for people who think in zCDP. It holds
    /// at those orders only, so official epsilons come from the curve.
    #[must_use]
    pub fn rho(&self) -> f64 {
        let each = ORDERS.iter().zip(&self.0).map(|(order, rdp)| rdp / f64::from(*order));
        each.fold(0.0, f64::max)
    }

    /// Epsilon at `delta` and the order it was found at: the least over [`ORDERS`] of the conversion of
    /// Canonne, Kamath and Steinke 2020, proposition 12.
    #[must_use]
    pub fn epsilon(&self, delta: Delta) -> (f64, u32) {
        let each = ORDERS.iter().zip(&self.0);
        let each = each.map(|(order, rdp)| (epsilon_at(f64::from(*order), *rdp, delta), *order));
        let (epsilon, order) = each.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::INFINITY, ORDERS[0]));
        (outward(epsilon), order)
    }

    /// Delta at `epsilon`; the same source.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless `epsilon` is finite and not negative.
    pub fn delta(&self, epsilon: f64) -> Result<f64, AccountError> {
        let range = "finite and not negative";
        AccountError::check(epsilon.is_finite() && epsilon >= 0.0, "epsilon", epsilon, range)?;
        let each =
            ORDERS.iter().zip(&self.0).map(|(order, rdp)| ln_delta_at(f64::from(*order), *rdp, epsilon));
        Ok(outward(each.fold(0.0, f64::min).exp()))
    }
}
