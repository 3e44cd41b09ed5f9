//! The Gaussian mechanism on a Poisson sample: every device is in a round with the same probability,
//! independently, and nobody but the accountant's trusted sampler knows who was.
//!
//! Where devices choose when to check in, nobody samples like this: use the bound on participations instead.
//! Adjacency is adding or removing one device (equally: its contribution replaced by zero); sensitivity is 1.

use super::{
    convert::{AccountError, Delta, epsilon_at, outward},
    gaussian::LN_ROOT_TWO_PI,
    rdp::{ORDERS, RdpCurve},
};
use std::ops::RangeInclusive;

/// Fractional orders at which an epsilon is looked for, beside [`ORDERS`]: 1.1 to 10.9.
const FRACTIONAL: RangeInclusive<u8> = 11..=109;
/// Largest whole order; its sum has as many terms.
const WHOLE_MAX: f64 = 4096.0;
/// Largest fractional order; it decides how far the quadrature reaches.
const FRACTIONAL_MAX: f64 = 64.0;

/// The Gaussian mechanism on a Poisson sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SubsampledGaussian {
    sigma: f64,
    q: f64,
}

impl SubsampledGaussian {
    /// `noise_multiplier` is the noise's standard deviation over the L2 sensitivity.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless `noise_multiplier` lies in [0.05, 1e6] and `sampling_probability`
    /// in (0, 1].
    pub fn new(noise_multiplier: f64, sampling_probability: f64) -> Result<Self, AccountError> {
        let (sigma, q) = (noise_multiplier, sampling_probability);
        let range = "between 0.05 and 1e6";
        AccountError::check((0.05..=1e6).contains(&sigma), "noise multiplier", sigma, range)?;
        AccountError::check(q > 0.0 && q <= 1.0, "sampling probability", q, "above 0 and at most 1")?;
        Ok(Self { sigma, q })
    }

    /// The noise multiplier.
    #[must_use]
    pub fn noise_multiplier(&self) -> f64 {
        self.sigma
    }

    /// The sampling probability.
    #[must_use]
    pub fn sampling_probability(&self) -> f64 {
        self.q
    }

    /// Rényi divergence of order `order` above 1, of the mixture from the noise alone. Mironov, Talwar and
    /// Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", theorem 5: the divergence
    /// in the other direction is never larger.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless `order` lies above 1 and is whole and at most 4096, or at most 64.
    pub fn rdp(&self, order: f64) -> Result<f64, AccountError> {
        let whole = order.fract() == 0.0;
        let range = "above 1; whole and at most 4096, or at most 64";
        let fits = order > 1.0 && (order <= FRACTIONAL_MAX || (whole && order <= WHOLE_MAX));
        AccountError::check(fits, "order", order, range)?;
        let exact = whole || self.q >= 1.0;
        Ok(if exact { self.summed(order) } else { self.nodes(order).divergence(order) })
    }

    /// The divergences at all [`ORDERS`].
    #[must_use]
    pub fn curve(&self) -> RdpCurve {
        RdpCurve::from_fn(|order| self.summed(f64::from(order)))
    }

    /// Epsilon of `steps` rounds at `delta`, and the order it was found at: the least over [`ORDERS`] and the
    /// fractional orders from 1.1 to 10.9.
    #[must_use]
    pub fn epsilon_rdp(&self, steps: u32, delta: Delta) -> (f64, f64) {
        let whole = least_epsilon(|order| self.summed(f64::from(order)), steps, delta);
        // With one minimum over real orders, fractional ones can win only beside the best whole one.
        let near = FRACTIONAL.map(|tenth| f64::from(tenth) / 10.0).filter(|o| (o - whole.1).abs() < 1.05);
        let near: Vec<f64> = near.collect();
        let Some(last) = near.last() else { return whole };
        let nodes = self.nodes(*last);
        let each = near.iter().map(|order| {
            let rdp = if self.q < 1.0 { nodes.divergence(*order) } else { self.summed(*order) };
            (outward(epsilon_at(*order, f64::from(steps) * rdp, delta)), *order)
        });
        each.fold(whole, |best, next| if next.0 < best.0 { next } else { best })
    }

    /// Whole orders (Mironov, Talwar and Zhang 2019, section 3.3): `A = sum_k C(a, k) (1-q)^(a-k) q^k
    /// exp(k(k-1) / (2 sigma^2))`, divergence `ln(A) / (a - 1)`. The weights sum to 1, so `A - 1` is the same
    /// sum with `exp - 1`: positive terms, nothing cancels when little is given away.
    fn summed(&self, order: f64) -> f64 {
        let half = 0.5 / (self.sigma * self.sigma);
        if self.q >= 1.0 {
            return order * half;
        }
        let (ln_q, ln_rest) = (self.q.ln(), (-self.q).ln_1p());
        let mut ln_weight = order * ln_rest;
        let mut sum = LogSum::default();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 4096")]
        for k in 1..=order as u32 {
            let k = f64::from(k);
            ln_weight += ((order - k + 1.0) / k).ln() + ln_q - ln_rest;
            if k > 1.0 {
                sum.add(ln_weight + ln_exp_m1(k * (k - 1.0) * half));
            }
        }
        ln_1p_exp(sum.ln()) / (order - 1.0)
    }

    /// Fractional orders by quadrature over the noise, with a step in units of `sigma`. The integrand is
    /// entire but for zeros of the ratio at imaginary part `pi sigma`, so the trapezoid rule's error falls as
    /// `exp(-2 pi^2 sigma / step)`, and as `exp(-2 pi^2 / step^2)` for the Gaussian factor. Published series
    /// for these orders drop alternating signs and are upper bounds only.
    fn nodes(&self, order_max: f64) -> Nodes {
        let step = (self.sigma * 0.5).min(0.2);
        let (low, high) = (-14.0, 14.0 + order_max / self.sigma);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 6e4")]
        let count = ((high - low) / step) as u32;
        let shift = 0.5 / (self.sigma * self.sigma);
        let node = |i: u32| {
            let u = low + step * f64::from(i);
            let z = u / self.sigma - shift;
            let (w, ln_ratio) = if z < 30.0 {
                let w = self.q * z.exp_m1();
                (w, w.ln_1p())
            } else {
                let ln_ratio = self.q.ln() + z + ((1.0 / self.q - 1.0) * (-z).exp()).ln_1p();
                (ln_ratio.exp_m1(), ln_ratio)
            };
            Node { w, ln_ratio, ln_weight: -0.5 * u * u + step.ln() - LN_ROOT_TWO_PI }
        };
        Nodes((0..=count).map(node).collect())
    }
}

struct Node {
    /// The ratio of densities less 1.
    w: f64,
    ln_ratio: f64,
    ln_weight: f64,
}

struct Nodes(Vec<Node>);

impl Nodes {
    /// `A - 1` is the mean of `(1 + w)^a - 1 - a w`, which is nowhere negative.
    fn divergence(&self, order: f64) -> f64 {
        let mut sum = LogSum::default();
        for node in &self.0 {
            sum.add(node.ln_weight + ln_excess(node, order));
        }
        let divergence = ln_1p_exp(sum.ln()) / (order - 1.0);
        assert!(divergence >= 0.0, "a divergence is {divergence}");
        divergence
    }
}

/// ln of `(1 + w)^a - 1 - a w`, for small `a w` by the binomial series.
fn ln_excess(node: &Node, a: f64) -> f64 {
    let w = node.w;
    if (a * w).abs() < 0.02 {
        let mut term = 0.5 * a * (a - 1.0) * w * w;
        let mut sum = 0.0;
        for k in 2..10 {
            sum += term;
            term *= (a - f64::from(k)) / f64::from(k + 1) * w;
        }
        return sum.ln();
    }
    let power = a * node.ln_ratio;
    if power > 300.0 {
        // The power alone is left of the difference: a w is less than exp(power / a) a.
        return power + (-((a * (node.ln_ratio - power).exp()).min(1.0))).ln_1p();
    }
    (power.exp_m1() - a * w).ln()
}

/// The least epsilon over [`ORDERS`] and its order. `(a - 1) rdp(a)` is convex and so is the rest of the
/// conversion's numerator, hence epsilon has one minimum over the orders and the search ends once it rises.
pub(crate) fn least_epsilon(rdp: impl Fn(u32) -> f64, steps: u32, delta: Delta) -> (f64, f64) {
    let mut best = (f64::INFINITY, 2.0);
    for order in ORDERS {
        let epsilon = outward(epsilon_at(f64::from(order), f64::from(steps) * rdp(order), delta));
        if epsilon > best.0 {
            break;
        }
        best = (epsilon, f64::from(order));
    }
    best
}

/// A sum of numbers known by their logarithms.
#[derive(Debug)]
pub(crate) struct LogSum {
    top: f64,
    rest: f64,
}

impl Default for LogSum {
    fn default() -> Self {
        Self { top: f64::NEG_INFINITY, rest: 0.0 }
    }
}

impl LogSum {
    pub(crate) fn add(&mut self, ln_term: f64) {
        if ln_term == f64::NEG_INFINITY {
            return;
        }
        if ln_term <= self.top {
            self.rest += (ln_term - self.top).exp();
        } else {
            self.rest = self.rest * (self.top - ln_term).exp() + 1.0;
            self.top = ln_term;
        }
    }

    pub(crate) fn ln(&self) -> f64 {
        self.top + self.rest.ln()
    }
}

/// ln(exp(x) - 1).
pub(crate) fn ln_exp_m1(x: f64) -> f64 {
    if x > 30.0 { x + (-(-x).exp()).ln_1p() } else { x.exp_m1().ln() }
}

/// ln(1 + exp(x)).
pub(crate) fn ln_1p_exp(x: f64) -> f64 {
    if x > 0.0 { x + (-x).exp().ln_1p() } else { x.exp().ln_1p() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::known::{close, number, rows};
    use proptest::prelude::*;

    /// The mechanism, the rounds and the delta of a row.
    fn parts(row: &serde_json::Value) -> (SubsampledGaussian, u32, Delta) {
        let mechanism = SubsampledGaussian::new(number(row, "sigma"), number(row, "q")).unwrap();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number")]
        let steps = number(row, "steps") as u32;
        (mechanism, steps, Delta::new(number(row, "delta")).unwrap())
    }

    #[test]
    fn divergences_equal_the_reference_at_whole_and_fractional_orders() {
        for row in rows("poisson_gaussian_rdp_raw") {
            let mechanism = SubsampledGaussian::new(number(&row, "sigma"), number(&row, "q")).unwrap();
            let order = number(&row, "order");
            let rdp = mechanism.rdp(order).unwrap();
            // The reference's own quadrature is good to about 2e-11 in ln(A).
            let (expected, slack) = (number(&row, "rdp_quadrature"), 2e-11 / (order - 1.0));
            assert!((rdp - expected).abs() <= 1e-7 * expected + slack, "{rdp} in {row}");
            // Quadrature and sum agree far more closely than with the reference.
            if order.fract() == 0.0 {
                close(mechanism.nodes(order).divergence(order), rdp, 1e-12, &row);
            }
            let reverse = reverse(&mechanism, order);
            assert!(reverse <= rdp, "{reverse} in the other direction of {row}");
            if let Some(expected) = row["rdp_quadrature_reverse_direction"].as_f64() {
                assert!((reverse - expected).abs() <= 1e-7 * expected + slack, "{reverse} in {row}");
            }
        }
    }

    #[test]
    fn divergences_equal_a_quadrature_of_40_digits() {
        for (q, sigma, order, expected) in [
            (0.01, 1.0, 1.25, 0.000_105_398_005_098_176_23),
            (0.01, 1.0, 1.5, 0.000_127_253_743_327_449_83),
            (0.1, 2.0, 2.5, 0.003_594_077_199_413_228),
            (0.5, 4.0, 1.25, 0.009_879_625_928_566_867),
            (0.004, 0.8, 1.25, 3.686_943_625_038_375e-5),
            (0.001, 0.6, 4.9, 0.000_234_361_005_298_757_97),
            (0.01, 1.0, 2.0, 0.000_171_813_422_074_547_93),
            (1e-6, 0.5, 3.3, 8.855_432_938_194_343e-11),
            (0.9, 0.1, 1.1, 53.844_678_800_340_28),
        ] {
            let rdp = SubsampledGaussian::new(sigma, q).unwrap().rdp(order).unwrap();
            close(rdp, expected, 1e-12, &serde_json::json!([q, sigma, order]));
        }
    }

    /// The divergence of the noise alone from the mixture: the mean of `(1 + w)^(1 - a)`.
    fn reverse(mechanism: &SubsampledGaussian, order: f64) -> f64 {
        let nodes = mechanism.nodes(1.0);
        let excess = |node: &Node| ((1.0 - order) * node.ln_ratio).exp_m1() + (order - 1.0) * node.w;
        let each = nodes.0.iter().filter(|node| node.w.is_finite());
        each.map(|node| node.ln_weight.exp() * excess(node)).sum::<f64>().ln_1p() / (order - 1.0)
    }

    #[test]
    fn epsilons_equal_the_reference() {
        for row in rows("poisson_subsampled_gaussian") {
            let (mechanism, steps, delta) = parts(&row);
            let (epsilon, order) = least_epsilon(|order| mechanism.summed(f64::from(order)), steps, delta);
            close(epsilon, number(&row, "eps_rdp_integer_orders"), 1e-9, &row);
            close(order, number(&row, "order_integer"), 0.0, &row);
            close(mechanism.curve().times(steps).epsilon(delta).0, epsilon, 1e-12, &row);
            let (epsilon, order) = mechanism.epsilon_rdp(steps, delta);
            close(epsilon, number(&row, "eps_rdp_exact_fractional"), 1e-5, &row);
            close(order, number(&row, "order_exact_fractional"), 1e-12, &row);
        }
    }

    #[test]
    fn refuses_what_is_no_mechanism() {
        assert!(SubsampledGaussian::new(0.0, 0.1).is_err() && SubsampledGaussian::new(1.0, 0.0).is_err());
        assert!(
            SubsampledGaussian::new(1.0, 1.1).is_err() && SubsampledGaussian::new(f64::NAN, 0.1).is_err()
        );
        let mechanism = SubsampledGaussian::new(1.0, 0.1).unwrap();
        assert!(
            mechanism.rdp(1.0).is_err() && mechanism.rdp(64.5).is_err() && mechanism.rdp(5000.0).is_err()
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn epsilon_rises_with_sampling_and_rounds_and_falls_with_noise(
            sigma in 0.3..8.0f64, q in 1e-5..0.8f64, steps in 1..5000u32, more in 1.01..1.2f64,
        ) {
            let delta = Delta::new(1e-7).unwrap();
            let at = |sigma, q, steps| SubsampledGaussian::new(sigma, q).unwrap().epsilon_rdp(steps, delta).0;
            let base = at(sigma, q, steps);
            prop_assert!(at(sigma * more, q, steps) <= base);
            prop_assert!(at(sigma, q * more, steps) >= base);
            prop_assert!(at(sigma, q, steps + 1) >= base);
        }
    }
}
