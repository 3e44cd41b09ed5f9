//! Privacy loss distributions: the tightest accountant here, for every mechanism whose two neighbouring
//! outputs are known in full.
//!
//! A distribution describes one round; [`PrivacyLoss::epsilon`] composes. Results are upper bounds at every
//! interval of the grid, and a finer interval only tightens them. `loss` has the grid and the composition.

use super::{
    convert::{AccountError, Delta},
    gaussian::discrete_gaussian_losses,
    loss::{self, Losses},
    subsampled::SubsampledGaussian,
};

/// The interval of the grid of losses that published comparisons use.
pub const LOSS_INTERVAL: f64 = 1e-4;

/// Standard deviations from the middle at which a continuous distribution is cut: 6e-39 lies beyond, and
/// counts as infinite loss.
const REACH: f64 = 13.0;

/// The privacy loss distribution of one round, in both directions: a device removed, and a device added.
#[derive(Debug, Clone, PartialEq)]
pub struct PrivacyLoss {
    remove: Losses,
    /// None where it equals the other direction.
    add: Option<Losses>,
}

impl PrivacyLoss {
    /// The Gaussian mechanism on a Poisson sample; with the sampling probability 1, the Gaussian mechanism.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] for an `interval` too fine for the range of the losses.
    pub fn subsampled_gaussian(mechanism: &SubsampledGaussian, interval: f64) -> Result<Self, AccountError> {
        let (sigma, q) = (mechanism.noise_multiplier(), mechanism.sampling_probability());
        let remove = remove_direction(sigma, q, interval)?;
        let add = if q < 1.0 { Some(add_direction(sigma, q, interval)?) } else { None };
        Ok(Self { remove, add })
    }

    /// Laplace noise of the given scale over a sensitivity of 1.
    ///
    /// # Errors
    /// [`AccountError::Parameter`].
    pub fn laplace(scale: f64, interval: f64) -> Result<Self, AccountError> {
        AccountError::check(scale.is_finite() && scale > 0.0, "scale", scale, "finite and positive")?;
        let end = scale.recip();
        let mut losses = Losses::empty(interval, -end, end)?;
        losses.add_atom(0.5, end);
        losses.add_atom(0.5 * (-end).exp(), -end);
        // Between the two means, mirrored such that the loss rises with x.
        let line = Line {
            density: &|x: f64| 0.5 * end * ((x - 1.0) * end).exp(),
            loss: &|x: f64| (2.0 * x - 1.0) * end,
            at_loss: &|loss: f64| 0.5 * (loss * scale + 1.0),
            range: (0.0, 1.0),
            panel: 0.05 * scale,
        };
        line.fill(&mut losses);
        Ok(Self { remove: losses.whole(), add: None })
    }

    /// Randomized response among `answers` answers: the truth with probability `truth`, else one of the others.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless there are two answers or more and the truth is the likeliest.
    pub fn randomized_response(truth: f64, answers: u32, interval: f64) -> Result<Self, AccountError> {
        AccountError::check(answers >= 2, "answers", f64::from(answers), "at least 2")?;
        let other = (1.0 - truth) / f64::from(answers - 1);
        let fits = truth >= other && truth < 1.0;
        AccountError::check(
            fits,
            "probability of the truth",
            truth,
            "below 1, and at least any other answer's",
        )?;
        let end = (truth / other).ln();
        let mut losses = Losses::empty(interval, -end, end)?;
        losses.add_atom(truth, end);
        losses.add_atom(other, -end);
        losses.add_atom(other * f64::from(answers - 2), 0.0);
        Ok(Self { remove: losses.whole(), add: None })
    }

    /// An integer that one device moves by at most `sensitivity`, plus discrete Gaussian noise.
    ///
    /// # Errors
    /// [`AccountError::Parameter`].
    pub fn discrete_gaussian(sigma: f64, sensitivity: u32, interval: f64) -> Result<Self, AccountError> {
        let shift = f64::from(sensitivity);
        let cut = shift * (shift + 2.0 * REACH * sigma) / (2.0 * sigma * sigma);
        let each = discrete_gaussian_losses(sigma, sensitivity)?;
        let mut losses = Losses::empty(interval, -cut, cut)?;
        for (probability, loss) in each {
            if loss <= cut {
                losses.add_atom(probability, loss.max(-cut));
            } else {
                losses.add_infinite(probability);
            }
        }
        Ok(Self { remove: losses.whole(), add: None })
    }

    /// Epsilon of `steps` rounds at `delta`; infinite if `delta` is below what was cut off.
    ///
    /// # Errors
    /// [`AccountError::Unreachable`] if the composition's range is too wide for the interval.
    pub fn epsilon(&self, steps: u32, delta: Delta) -> Result<f64, AccountError> {
        Self::epsilon_of(&[(self, steps)], delta)
    }

    /// Delta of `steps` rounds at `epsilon`.
    ///
    /// # Errors
    /// As [`Self::epsilon`], and [`AccountError::Parameter`] for an `epsilon` that is negative or not finite.
    pub fn delta(&self, steps: u32, epsilon: f64) -> Result<f64, AccountError> {
        let remove = loss::delta(&[(&self.remove, steps)], epsilon)?;
        let add = self.add.as_ref().map(|add| loss::delta(&[(add, steps)], epsilon)).transpose()?;
        Ok(remove.max(add.unwrap_or(0.0)))
    }

    /// Epsilon at `delta` of different mechanisms together, each as often as the number beside it says. All
    /// need the same interval.
    ///
    /// # Errors
    /// As [`Self::epsilon`], and [`AccountError::Parameter`] if intervals differ or nothing is composed.
    pub fn epsilon_of(parts: &[(&Self, u32)], delta: Delta) -> Result<f64, AccountError> {
        AccountError::check(!parts.is_empty(), "mechanisms", 0.0, "at least 1")?;
        let interval = parts[0].0.remove.interval();
        for (part, _) in parts {
            let own = part.remove.interval();
            AccountError::check(own == interval, "interval", own, "the same for all mechanisms")?;
        }
        let remove: Vec<(&Losses, u32)> = parts.iter().map(|(part, times)| (&part.remove, *times)).collect();
        let epsilon = loss::epsilon(&remove, delta)?;
        if parts.iter().all(|(part, _)| part.add.is_none()) {
            return Ok(epsilon);
        }
        let add = parts.iter().map(|(part, times)| (part.add.as_ref().unwrap_or(&part.remove), *times));
        let add: Vec<(&Losses, u32)> = add.collect();
        Ok(epsilon.max(loss::epsilon(&add, delta)?))
    }
}

impl SubsampledGaussian {
    /// Epsilon of `steps` rounds at `delta` by privacy loss distributions, on a grid chosen such that it costs
    /// about 1e-4 of epsilon, and more only where a grid of bounded size cannot be as fine; never above
    /// [`Self::epsilon_rdp`].
    #[must_use]
    pub fn epsilon_pld(&self, steps: u32, delta: Delta) -> f64 {
        let (bound, order) = self.epsilon_rdp(steps, delta);
        if bound == 0.0 || steps == 0 {
            return 0.0;
        }
        // Losses may spread too widely for the grid; then a coarser one.
        let interval = self.interval(bound, order, steps);
        let grids = (0..=10).map(|coarser| interval * f64::from(1 << coarser));
        let Some(epsilon) = grids.map(|interval| self.on_grid(interval, steps, delta)).find_map(Result::ok)
        else {
            return bound;
        };
        // What decides a smaller epsilon is a larger order, in proportion.
        let (epsilon, share) = (epsilon.min(bound), epsilon / bound);
        if share == 0.0 || share > 0.7 {
            return epsilon;
        }
        let finer = self.interval(epsilon, order / share, steps);
        self.on_grid(finer, steps, delta).map_or(epsilon, |finer| finer.min(epsilon))
    }

    fn on_grid(&self, interval: f64, steps: u32, delta: Delta) -> Result<f64, AccountError> {
        PrivacyLoss::subsampled_gaussian(self, interval)?.epsilon(steps, delta)
    }

    /// Sharing a loss between a cell's ends adds about `interval^2 / 6` to its variance, hence `steps order
    /// interval^2 / 12` to epsilon at the order that decides it.
    fn interval(&self, epsilon: f64, order: f64, steps: u32) -> f64 {
        let fine = (12.0 * 5e-5 * epsilon / (f64::from(steps.max(1)) * order)).sqrt().min(0.05 / order);
        let (sigma, q) = (self.noise_multiplier(), self.sampling_probability());
        let range = loss_at(REACH + sigma.recip(), sigma, q) - loss_at(-REACH, sigma, q);
        fine.max(range / f64::from(1 << 20)).max(1e-9)
    }
}

/// The loss of a device's removal at the output `u sigma`: ln of `1 - q + q exp((2x - 1) / (2 sigma^2))`.
fn loss_at(u: f64, sigma: f64, q: f64) -> f64 {
    let z = (u - 0.5 / sigma) / sigma;
    if q < 1.0 { (q * z.exp_m1()).ln_1p() } else { z }
}

/// The inverse of [`loss_at`].
fn output_at(loss: f64, sigma: f64, q: f64) -> f64 {
    let z = if q < 1.0 { (loss.exp_m1() / q).max(-1.0).ln_1p() } else { loss };
    sigma * z + 0.5 / sigma
}

/// First neighbour: the mixture; second: the noise alone.
fn remove_direction(sigma: f64, q: f64, interval: f64) -> Result<Losses, AccountError> {
    let range = (-REACH, REACH + sigma.recip());
    let line = Line {
        density: &|u: f64| (1.0 - q) * normal(u) + q * normal(u - sigma.recip()),
        loss: &|u: f64| loss_at(u, sigma, q),
        at_loss: &|loss: f64| output_at(loss, sigma, q),
        range,
        panel: 0.05,
    };
    let mut losses = Losses::empty(interval, (line.loss)(range.0), (line.loss)(range.1))?;
    line.fill(&mut losses);
    let below = (1.0 - q) * upper_tail(REACH) + q * upper_tail(REACH + sigma.recip());
    losses.add_atom(below, (line.loss)(range.0));
    losses.add_infinite((1.0 - q) * upper_tail(range.1) + q * upper_tail(REACH));
    Ok(losses.whole())
}

/// First neighbour: the noise alone; second: the mixture. Mirrored such that the loss rises with u.
fn add_direction(sigma: f64, q: f64, interval: f64) -> Result<Losses, AccountError> {
    let range = (-REACH, REACH);
    let line = Line {
        density: &normal,
        loss: &|u: f64| -loss_at(-u, sigma, q),
        at_loss: &|loss: f64| -output_at(-loss, sigma, q),
        range,
        panel: 0.05,
    };
    let mut losses = Losses::empty(interval, (line.loss)(range.0), (line.loss)(range.1))?;
    line.fill(&mut losses);
    losses.add_atom(upper_tail(REACH), (line.loss)(range.0));
    losses.add_infinite(upper_tail(REACH));
    Ok(losses.whole())
}

fn normal(u: f64) -> f64 {
    (-0.5 * u * u).exp() / std::f64::consts::TAU.sqrt()
}

fn upper_tail(u: f64) -> f64 {
    0.5 * libm::erfc(u / 2f64.sqrt())
}

/// A continuous part of a privacy loss distribution whose loss rises with the output.
struct Line<'a> {
    density: &'a dyn Fn(f64) -> f64,
    loss: &'a dyn Fn(f64) -> f64,
    at_loss: &'a dyn Fn(f64) -> f64,
    range: (f64, f64),
    /// Widest piece that is integrated at once.
    panel: f64,
}

impl Line<'_> {
    /// Integrates each cell by Gauss and Legendre's rule of three points: probability and excess are sums of
    /// positive terms, so both keep their relative precision in the far tail.
    fn fill(&self, losses: &mut Losses) {
        let (first, last) = (losses.cell((self.loss)(self.range.0)), losses.cell((self.loss)(self.range.1)));
        let mut from = self.range.0;
        for cell in first..=last {
            #[expect(clippy::cast_precision_loss, reason = "indices of cells are far below 2^53")]
            let (low, high) = (losses.interval() * cell as f64, losses.interval() * (cell + 1) as f64);
            let to = if cell == last { self.range.1 } else { (self.at_loss)(high).clamp(from, self.range.1) };
            let (probability, excess) = self.cell(from, to, low);
            losses.add(cell, probability, excess);
            from = to;
        }
    }

    /// Probability of [`from`, `to`], and the mean of `1 - exp(low - loss)` over it.
    fn cell(&self, from: f64, to: f64, low: f64) -> (f64, f64) {
        const NODES: [(f64, f64); 3] =
            [(-0.774_596_669_241_483_4, 5.0 / 18.0), (0.0, 4.0 / 9.0), (0.774_596_669_241_483_4, 5.0 / 18.0)];
        let panels = ((to - from) / self.panel).ceil().max(1.0);
        let width = (to - from) / panels;
        let (mut probability, mut excess) = (0.0, 0.0);
        let mut panel = 0.0;
        while panel < panels {
            for (node, weight) in NODES {
                let at = from + width * (panel + 0.5 + 0.5 * node);
                let mass = weight * width * (self.density)(at);
                probability += mass;
                excess -= mass * (low - (self.loss)(at)).exp_m1();
            }
            panel += 1.0;
        }
        (probability, excess)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::{
        gaussian::{discrete_gaussian_delta, gaussian_delta, gaussian_epsilon},
        known::{close, number, rows},
    };
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn delta(value: f64) -> Delta {
        Delta::new(value).unwrap()
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole numbers")]
    fn parts(row: &Value) -> (SubsampledGaussian, u32, Delta) {
        let mechanism = SubsampledGaussian::new(number(row, "sigma"), number(row, "q")).unwrap();
        (mechanism, number(row, "steps") as u32, delta(number(row, "delta")))
    }

    #[test]
    fn subsampled_gaussian_lies_between_the_references() {
        for row in rows("poisson_subsampled_gaussian") {
            let (mechanism, steps, delta) = parts(&row);
            let epsilon = mechanism.epsilon_pld(steps, delta);
            assert!(epsilon >= number(&row, "eps_pld_lower"), "{epsilon} in {row}");
            // The grid costs less than 1e-4; the reference's own grid costs it up to 4e-4.
            assert!(epsilon <= number(&row, "eps_pld_upper") * (1.0 + 1e-4), "{epsilon} in {row}");
            assert!(epsilon >= number(&row, "eps_pld_upper") * (1.0 - 5e-4), "{epsilon} in {row}");
        }
        for row in rows("prv_accountant_0_2_0_crosscheck") {
            let (mechanism, steps, delta) = parts(&row);
            let epsilon = mechanism.epsilon_pld(steps, delta);
            close(epsilon, number(&row, "eps_est"), 3e-4, &row);
            assert!(
                epsilon > number(&row, "eps_low") && epsilon < number(&row, "eps_up"),
                "{epsilon} in {row}"
            );
        }
    }

    #[test]
    fn the_gaussian_is_above_its_exact_epsilon_by_little() {
        for (sigma, steps, at) in [(10.0, 200, 1e-6), (1.0, 1, 1e-8), (5.0, 1000, 1e-10), (2.0, 100, 1e-20)] {
            let mechanism = SubsampledGaussian::new(sigma, 1.0).unwrap();
            let epsilon = mechanism.epsilon_pld(steps, delta(at));
            let exact = gaussian_epsilon(sigma / f64::from(steps).sqrt(), delta(at)).unwrap();
            let ratio = epsilon / exact;
            assert!((1.0..1.0001).contains(&ratio), "{epsilon} for {exact}, sigma {sigma}");
        }
        let mechanism = SubsampledGaussian::new(1.0, 1.0).unwrap();
        let loss = PrivacyLoss::subsampled_gaussian(&mechanism, 0.01).unwrap();
        // One round is exact at grid points, a tail of 1e-15 included.
        for epsilon in [0.0, 0.5, 2.0, 8.0] {
            let exact = gaussian_delta(1.0, epsilon).unwrap();
            close(loss.delta(1, epsilon).unwrap(), exact, 1e-6, &json!(epsilon));
        }
    }

    #[test]
    fn other_mechanisms_equal_the_reference() {
        for row in rows("pld_laplace") {
            let loss = PrivacyLoss::laplace(number(&row, "scale"), LOSS_INTERVAL).unwrap();
            let epsilon = loss.epsilon(10, delta(number(&row, "delta"))).unwrap();
            close(epsilon, number(&row, "eps_pld"), 1e-8, &row);
        }
        for row in rows("pld_rr") {
            let loss = PrivacyLoss::randomized_response(0.75, 2, LOSS_INTERVAL).unwrap();
            let epsilon = loss.epsilon(5, delta(number(&row, "delta"))).unwrap();
            // Only five truths pass this epsilon: 0.75^5 (1 - exp(epsilon - 5 ln 3)) = delta. The reference
            // rounds each loss up to its grid.
            let exact = 5.0 * 3f64.ln() + (-0.001 / 0.75f64.powi(5)).ln_1p();
            close(epsilon, exact, 1e-7, &row);
            close(epsilon, number(&row, "eps_pld"), 1e-4, &row);
            assert!(epsilon >= exact, "{epsilon} below {exact}");
        }
        for row in rows("pld_discrete_gaussian") {
            let loss = PrivacyLoss::discrete_gaussian(number(&row, "sigma"), 1, LOSS_INTERVAL).unwrap();
            let epsilon = loss.epsilon(20, delta(number(&row, "delta"))).unwrap();
            close(epsilon, number(&row, "eps_pld"), 1e-5, &row);
        }
        for row in rows("discrete_gaussian_profile") {
            let (sigma, epsilon) = (number(&row, "sigma"), number(&row, "eps"));
            let found = PrivacyLoss::discrete_gaussian(sigma, 1, 1e-3).unwrap().delta(1, epsilon).unwrap();
            let exact = discrete_gaussian_delta(sigma, 1, epsilon).unwrap();
            // Beyond 13 standard deviations all loss counts as infinite.
            assert!(found >= exact && found <= exact * (1.0 + 1e-3) + 1e-37, "{found} in {row}");
        }
    }

    #[test]
    fn pure_mechanisms_have_their_epsilon() {
        for row in rows("laplace_rr") {
            let loss = match row["mech"].as_str() {
                Some("laplace") => PrivacyLoss::laplace(number(&row, "scale"), 1e-3).unwrap(),
                _ => {
                    let answers = u32::try_from(row["k"].as_u64().unwrap()).unwrap();
                    PrivacyLoss::randomized_response(number(&row, "p_truth"), answers, 1e-3).unwrap()
                }
            };
            let (epsilon, expected) = (loss.epsilon(1, delta(1e-12)).unwrap(), number(&row, "eps"));
            assert!((-1e-9..2e-3).contains(&(epsilon - expected)), "{epsilon} in {row}");
        }
    }

    #[test]
    fn mechanisms_compose_with_each_other() {
        let mechanism = SubsampledGaussian::new(1.0, 0.01).unwrap();
        let gaussian = PrivacyLoss::subsampled_gaussian(&mechanism, 1e-3).unwrap();
        let answers = PrivacyLoss::randomized_response(0.6, 2, 1e-3).unwrap();
        let at = delta(1e-6);
        let together = PrivacyLoss::epsilon_of(&[(&gaussian, 100), (&answers, 2)], at).unwrap();
        let apart = gaussian.epsilon(100, at).unwrap();
        assert!(together > apart && together < apart + 2.0 * 1.5f64.ln(), "{together} for {apart}");
        let again = PrivacyLoss::epsilon_of(&[(&gaussian, 60), (&answers, 2), (&gaussian, 40)], at).unwrap();
        close(again, together, 1e-9, &json!("split"));
        let other = PrivacyLoss::laplace(1.0, 1e-2).unwrap();
        assert!(PrivacyLoss::epsilon_of(&[(&gaussian, 1), (&other, 1)], at).is_err());
        assert!(PrivacyLoss::epsilon_of(&[], at).is_err());
    }

    #[test]
    fn refuses_what_is_no_mechanism() {
        assert!(PrivacyLoss::laplace(0.0, 1e-3).is_err() && PrivacyLoss::laplace(1.0, 1e-9).is_err());
        assert!(PrivacyLoss::randomized_response(0.4, 2, 1e-3).is_err());
        assert!(PrivacyLoss::randomized_response(1.0, 2, 1e-3).is_err());
        assert!(PrivacyLoss::discrete_gaussian(f64::NAN, 1, 1e-3).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]
        #[test]
        fn never_above_renyi_nor_below_a_finer_grid(
            sigma in 0.5..6.0f64, q in 1e-4..0.6f64, steps in 1..2000u32, digits in 4..12i32,
        ) {
            let (mechanism, at) = (SubsampledGaussian::new(sigma, q).unwrap(), delta(10f64.powi(-digits)));
            let epsilon = mechanism.epsilon_pld(steps, at);
            prop_assert!(epsilon <= mechanism.epsilon_rdp(steps, at).0 * (1.0 + 1e-9));
            let (bound, order) = mechanism.epsilon_rdp(steps, at);
            // Half the finer of the two grids that may have decided; where losses spread too widely for it there is
            // nothing to compare with, and where the grid's own width decides Renyi's bound does.
            let share = (epsilon / bound).max(1e-3);
            let interval = mechanism.interval(bound, order, steps).min(mechanism.interval(epsilon, order / share, steps));
            let Ok(finer) = mechanism.on_grid(interval / 2.0, steps, at) else { return Ok(()) };
            let finer = finer.min(bound);
            prop_assert!(finer <= epsilon * (1.0 + 1e-9), "{finer} for {epsilon}");
            prop_assert!(epsilon < 0.01 || finer >= epsilon * (1.0 - 5e-4), "{finer} for {epsilon}");
        }
    }
}
