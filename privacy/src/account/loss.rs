//! One direction of a privacy loss distribution on a grid, and many of them composed.
//!
//! `pld` builds these from mechanisms. Everything here errs upwards: rounding a loss to the grid, what lies
//! beyond the window, what wraps around in the Fourier transform and what the transform rounds all add to
//! delta.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "grid indices are below 2^40 and indices into arrays are reduced first"
)]

use super::{
    convert::{AccountError, Delta, outward},
    subsampled::LogSum,
};
use rustfft::{FftPlanner, num_complex::Complex};

/// Most cells of one transform: 128 MiB.
const CELLS_MAX: usize = 1 << 23;
/// Most cells of one round's distribution.
const ROUND_CELLS_MAX: f64 = (1 << 23) as f64;
/// Cells whose moments are taken together.
const BLOCK: usize = 64;
/// Share of delta that may lie above the window: it is added in full.
const ABOVE: f64 = 1e-7;
/// Share of the tilted distribution that may lie below the window, and above: it wraps around.
const OUTSIDE: f64 = 1e-9;

/// What every delta is raised by, relatively: more than quadrature and rounding take off in 10^4 rounds.
const ROUNDING: f64 = 1e-9;

/// Losses `k interval` with their probabilities under the first of two neighbours, and the probability of an
/// infinite loss.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Losses {
    interval: f64,
    first: i64,
    mass: Vec<f64>,
    infinite: f64,
}

impl Losses {
    /// No losses yet, with room for those in [`low`, `high`].
    pub(crate) fn empty(interval: f64, low: f64, high: f64) -> Result<Self, AccountError> {
        let fits = interval >= 1e-12 && (high - low) / interval < ROUND_CELLS_MAX;
        AccountError::check(
            fits,
            "interval",
            interval,
            "at least 1e-12, and at least 2^-23 of the losses' range",
        )?;
        let (first, last) = ((low / interval).floor() as i64, (high / interval).floor() as i64 + 1);
        Ok(Self { interval, first, mass: vec![0.0; (last - first + 1) as usize], infinite: 0.0 })
    }

    pub(crate) fn interval(&self) -> f64 {
        self.interval
    }

    /// The cell that a loss lies in, by its lower end.
    pub(crate) fn cell(&self, loss: f64) -> i64 {
        ((loss / self.interval).floor() as i64).clamp(self.first, self.first + self.mass.len() as i64 - 2)
    }

    /// Shares the losses inside one cell between the cell's ends such that their probability under both
    /// neighbours stays what it was (Doroshenko, Ghazi, Kamath, Kumar and Manurangsi 2022, "Connect the Dots:
    /// Tighter Discrete Approximations of Privacy Loss Distributions", section 4): delta is exact at grid
    /// points and above the truth between them. `excess` is the mean of `1 - exp(lower end - loss)`.
    pub(crate) fn add(&mut self, cell: i64, probability: f64, excess: f64) {
        let upper = (excess / -(-self.interval).exp_m1()).clamp(0.0, probability);
        let at = (cell - self.first) as usize;
        self.mass[at] += probability - upper;
        self.mass[at + 1] += upper;
    }

    /// One loss with its probability.
    pub(crate) fn add_atom(&mut self, probability: f64, loss: f64) {
        let cell = self.cell(loss);
        self.add(cell, probability, -probability * (self.interval * cell as f64 - loss).exp_m1());
    }

    pub(crate) fn add_infinite(&mut self, probability: f64) {
        self.infinite += probability;
    }

    /// The distribution, once all of it is in.
    pub(crate) fn whole(self) -> Self {
        let total = self.mass.iter().sum::<f64>() + self.infinite;
        assert!((total - 1.0).abs() < 1e-9, "a privacy loss distribution has the mass {total}");
        self
    }

    fn last(&self) -> i64 {
        self.first + self.mass.len() as i64 - 1
    }

    /// ln of the mean of `exp(theta loss)` over the finite losses.
    fn cumulant(&self, theta: f64) -> f64 {
        let (ratio, mut sum) = ((theta * self.interval).exp(), LogSum::default());
        for (at, block) in self.mass.chunks(BLOCK).enumerate() {
            let inner = block.iter().rev().fold(0.0, |above, mass| above * ratio + mass);
            sum.add(inner.ln() + theta * self.interval * (self.first + (at * BLOCK) as i64) as f64);
        }
        sum.ln()
    }

    /// The transform of the tilted finite losses, index `k` at `k mod cells`.
    fn spectrum(&self, theta: f64, planner: &mut FftPlanner<f64>, cells: usize) -> Vec<Complex<f64>> {
        let (ratio, cumulant) = ((theta * self.interval).exp(), self.cumulant(theta));
        let mut buffer = vec![Complex::default(); cells];
        for (at, block) in self.mass.chunks(BLOCK).enumerate() {
            let start = self.first + (at * BLOCK) as i64;
            let mut factor = (theta * self.interval * start as f64 - cumulant).exp();
            for (k, mass) in block.iter().enumerate() {
                let index = (start + k as i64).rem_euclid(cells as i64) as usize;
                buffer[index].re += if *mass > 0.0 { mass * factor } else { 0.0 };
                factor *= ratio;
            }
        }
        planner.plan_fft_forward(cells).process(&mut buffer);
        buffer
    }
}

/// Epsilon at `delta` of rounds composed, each distribution as often as the number beside it says; infinite
/// where infinite losses alone reach `delta`.
pub(crate) fn epsilon(parts: &[(&Losses, u32)], delta: Delta) -> Result<f64, AccountError> {
    let composed = Composed::near(parts, |infinite| Target::Delta(delta.value() - infinite))?;
    let Some(composed) = composed else { return Ok(f64::INFINITY) };
    Ok(outward(composed.epsilon(delta.value() * (1.0 - ROUNDING))))
}

/// Delta at `epsilon`, likewise.
pub(crate) fn delta(parts: &[(&Losses, u32)], epsilon: f64) -> Result<f64, AccountError> {
    let range = "finite and not negative";
    AccountError::check(epsilon.is_finite() && epsilon >= 0.0, "epsilon", epsilon, range)?;
    let composed = Composed::near(parts, |_| Target::Epsilon(epsilon))?;
    Ok(composed.map_or(1.0, |composed| (composed.delta(epsilon) * (1.0 + ROUNDING)).min(1.0)))
}

/// Where a composition has to be sharp.
#[derive(Clone, Copy)]
enum Target {
    Delta(f64),
    Epsilon(f64),
}

/// Composed losses of a window around the target.
struct Composed {
    interval: f64,
    first: i64,
    /// Tilted masses; a cell's own is `exp(ln_total - theta loss)` times as much.
    tilted: Vec<f64>,
    theta: f64,
    ln_total: f64,
    infinite: f64,
}

impl Composed {
    /// Composes under an exponential tilt: weights `exp(theta loss)` move the bulk of the distribution to
    /// where delta is decided, so a transform in f64 has relative, not absolute, precision there, however
    /// small delta is. `theta` is that of the least Chernoff bound, which is a Rényi order less 1.
    ///
    /// A transform is cyclic, so what lies outside the window appears inside as well. That only adds to
    /// delta; what is above the window is added once more by its Chernoff bound.
    fn near(parts: &[(&Losses, u32)], target: impl Fn(f64) -> Target) -> Result<Option<Self>, AccountError> {
        let interval = parts[0].0.interval;
        assert!(parts.iter().all(|(part, _)| part.interval == interval), "grids differ");
        let certain: f64 =
            parts.iter().map(|(part, times)| f64::from(*times) * (-part.infinite).ln_1p()).sum();
        let infinite = -certain.exp_m1();
        let target = target(infinite);
        if matches!(target, Target::Delta(delta) if delta <= 0.0) || certain == f64::NEG_INFINITY {
            return Ok(None);
        }
        let cumulants = cumulants(parts, interval);
        let window = window(parts, interval, &cumulants, target);
        let cells = ((window.last - window.first + 1) as usize).next_power_of_two();
        if cells > CELLS_MAX {
            let problem =
                format!("{cells} cells, {CELLS_MAX} are allowed; choose a coarser interval than {interval}");
            return Err(AccountError::Unreachable(problem));
        }
        let tilted = convolve(parts, window.theta, window.first, cells);
        let infinite = infinite + window.above;
        Ok(Some(Self {
            interval,
            first: window.first,
            tilted,
            theta: window.theta,
            ln_total: window.ln_total,
            infinite,
        }))
    }

    /// Cells from the highest down, each with its loss' index, delta at its loss, and `sum over higher cells
    /// j of mass_j exp(loss - loss_j)`. Delta grows by positive steps: nothing cancels.
    fn cells(&self) -> impl Iterator<Item = (i64, f64, f64)> {
        let shrink = (-self.interval).exp();
        let (mut delta, mut above) = (self.infinite, 0.0);
        self.tilted.iter().enumerate().rev().map(move |(at, tilted)| {
            let index = self.first + at as i64;
            delta += (1.0 - shrink) * above;
            let mass = tilted * (self.ln_total - self.theta * self.interval * index as f64).exp();
            let higher = above * shrink;
            above = above * shrink + mass;
            (index, delta, higher)
        })
    }

    /// The least epsilon, at least 0, whose delta is no more than `delta`.
    fn epsilon(&self, delta: f64) -> f64 {
        let mut best = f64::INFINITY;
        let mut held = self.infinite;
        for (index, at_index, higher) in self.cells() {
            if at_index > delta {
                // Between this cell and the next, delta is held + (1 - exp(epsilon - next)) above, where
                // above is higher / exp(-interval).
                let share = (delta - held) / (higher * self.interval.exp());
                let next = self.interval * (index + 1) as f64;
                return best.min(next + (-share).ln_1p()).max(0.0);
            }
            best = self.interval * index as f64;
            held = at_index;
        }
        best.max(0.0)
    }

    /// Delta at `epsilon`.
    fn delta(&self, epsilon: f64) -> f64 {
        let mut held = self.infinite;
        for (index, at_index, higher) in self.cells() {
            let loss = self.interval * index as f64;
            if loss <= epsilon {
                let gap = epsilon - loss - self.interval;
                return held - gap.min(0.0).exp_m1() * higher * self.interval.exp();
            }
            held = at_index;
        }
        1.0
    }
}

/// Orders less 1 that are tried, with the composition's cumulant at each; 0 first.
fn cumulants(parts: &[(&Losses, u32)], interval: f64) -> Vec<(f64, f64)> {
    let at = |theta: f64| -> f64 {
        parts.iter().map(|(part, times)| f64::from(*times) * part.cumulant(theta)).sum()
    };
    // A block's sum of exp(theta loss) must not overflow.
    let highest = 500.0 / (BLOCK as f64 * interval);
    let thetas = (0..).map(|i| 1e-3 * 1.2f64.powi(i)).take_while(|theta| *theta <= highest.min(1e5));
    std::iter::once(0.0).chain(thetas).map(|theta| (theta, at(theta))).collect()
}

struct Window {
    theta: f64,
    /// The composition's cumulant at `theta`.
    ln_total: f64,
    first: i64,
    last: i64,
    /// Bound on the probability above `last`.
    above: f64,
}

fn window(parts: &[(&Losses, u32)], interval: f64, cumulants: &[(f64, f64)], target: Target) -> Window {
    let least = |f: &dyn Fn(f64, f64) -> f64| {
        let each =
            cumulants.iter().filter(|(theta, _)| *theta > 0.0).map(|(theta, k)| (f(*theta, *k), *theta, *k));
        each.fold((f64::INFINITY, 1.0, 0.0), |best, next| if next.0 < best.0 { next } else { best })
    };
    let (theta, ln_total, ln_delta) = match target {
        Target::Delta(delta) => {
            let (_, theta, k) = least(&|theta, k| (k - delta.ln() + hockey_stick(theta)) / theta);
            (theta, k, delta.ln())
        }
        Target::Epsilon(epsilon) => {
            let (bound, theta, k) = least(&|theta, k| k - theta * epsilon + hockey_stick(theta));
            (theta, k, bound.min(0.0))
        }
    };
    let ln_above = ln_delta + ABOVE.ln();
    let (certain, ..) = least(&|theta, k| (k - ln_above) / theta);
    // Chernoff's bounds of the tilted distribution's two tails.
    let tail = |other: f64, k: f64| (ln_total - k + OUTSIDE.ln()) / (theta - other);
    let higher = cumulants.iter().filter(|(other, _)| *other > theta).map(|(other, k)| tail(*other, *k));
    let top = higher.fold(f64::INFINITY, f64::min).max(certain);
    let lower = cumulants.iter().filter(|(other, _)| *other < theta).map(|(other, k)| tail(*other, *k));
    let bottom = lower.fold(f64::NEG_INFINITY, f64::max).min(0.0);
    let sum = |of: fn(&Losses) -> i64| -> i64 {
        parts.iter().map(|(part, times)| of(part) * i64::from(*times)).sum()
    };
    let (lowest, highest) = (sum(|part| part.first), sum(Losses::last));
    // Casts of floats saturate.
    let last = (top / interval).ceil() as i64;
    let above = if last < highest { ln_above.exp() } else { 0.0 };
    let last = last.clamp(lowest, highest);
    let first = ((bottom / interval).floor() as i64).saturating_sub(1).clamp(lowest, last);
    Window { theta, ln_total, first, last, above }
}

/// By how much delta's bound is below Chernoff's, in ln: the last terms of [`super::convert::ln_delta_at`].
fn hockey_stick(theta: f64) -> f64 {
    -theta.ln() - (1.0 + theta) * theta.recip().ln_1p()
}

/// Tilted masses of the composition in the `cells` cells from `first`, with the transform's rounding added.
fn convolve(parts: &[(&Losses, u32)], theta: f64, first: i64, cells: usize) -> Vec<f64> {
    let mut planner = FftPlanner::new();
    let mut product = vec![Complex::new(1.0 / cells as f64, 0.0); cells];
    for (part, times) in parts {
        let spectrum = part.spectrum(theta, &mut planner, cells);
        product.iter_mut().zip(&spectrum).for_each(|(product, factor)| *product *= factor.powu(*times));
    }
    planner.plan_fft_inverse(cells).process(&mut product);
    // A power amplifies the relative rounding of its base; over all cells together the errors stay below
    // a tenth of this.
    let times: f64 = parts.iter().map(|(_, times)| f64::from(*times)).sum();
    let rounding = 64.0 * f64::EPSILON * (times + (cells as f64).log2()) / cells as f64;
    let at = |k: usize| product[(first + k as i64).rem_euclid(cells as i64) as usize].re;
    (0..cells).map(|k| at(k).max(0.0) + rounding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::known::close;
    use serde_json::json;

    /// Two answers, one of them with probability `p`; losses at grid points.
    fn two_answers(p: f64, interval: f64, cells: f64) -> Losses {
        let mut losses = Losses::empty(interval, -cells * interval, cells * interval).unwrap();
        losses.add_atom(p, cells * interval);
        losses.add_atom(1.0 - p, -cells * interval);
        losses.whole()
    }

    #[test]
    fn rounding_of_the_transform_is_far_below_what_is_added_for_it() {
        for times in [10, 300, 3000] {
            let (interval, theta, cells) = (0.01, 0.7, 1 << 14);
            let losses = two_answers(0.6, interval, 1.0);
            let composed = convolve(&[(&losses, times)], theta, -i64::from(times), cells);
            let tilted = 0.6 * (theta * interval - losses.cumulant(theta)).exp();
            let mut exact = vec![0.0; cells];
            exact[0] = 1.0;
            for round in 1..=times as usize {
                for k in (0..=round).rev() {
                    let below = if k > 0 { exact[k - 1] } else { 0.0 };
                    exact[k] = exact[k] * (1.0 - tilted) + below * tilted;
                }
            }
            let added = 64.0 * f64::EPSILON * (f64::from(times) + 14.0);
            let at = |k: usize| if k.is_multiple_of(2) { exact[k / 2] } else { 0.0 };
            let error: f64 = (0..cells).map(|k| (composed[k] - added / cells as f64 - at(k)).abs()).sum();
            assert!(error < added / 10.0, "{error:e} of {added:e} after {times} rounds");
        }
    }

    #[test]
    fn delta_is_exact_at_grid_points_and_above_between_them() {
        let losses = two_answers(0.75, 3f64.ln() / 40.0, 40.0);
        for (steps, epsilon) in [(1, 0.5), (5, 1.0), (5, 5.4), (40, 3.0), (40, 40.0), (400, 250.0)] {
            let row = json!([steps, epsilon]);
            let found = delta(&[(&losses, steps)], epsilon).unwrap();
            close(found, two_answers_delta(steps, epsilon), 1e-6, &row);
            assert!(found >= two_answers_delta(steps, epsilon), "{row}");
            let split = steps / 3;
            let again = delta(&[(&losses, split), (&losses, steps - split)], epsilon).unwrap();
            close(again, found, 1e-6, &row);
        }
        // Off the grid: no cell's end is a multiple of ln 3.
        let losses = Losses::empty(0.01, -3f64.ln(), 3f64.ln()).map(|mut losses| {
            losses.add_atom(0.75, 3f64.ln());
            losses.add_atom(0.25, -(3f64.ln()));
            losses.whole()
        });
        let losses = losses.unwrap();
        for (steps, epsilon) in [(1, 0.5), (1, 1.09), (5, 5.4), (40, 3.0), (40, 40.0)] {
            let (found, exact) =
                (delta(&[(&losses, steps)], epsilon).unwrap(), two_answers_delta(steps, epsilon));
            assert!(
                found >= exact && found <= exact * 1.02,
                "{found} for {exact} after {steps} at {epsilon}"
            );
        }
    }

    /// Exact delta of randomized response with the truth at 3/4.
    fn two_answers_delta(steps: u32, epsilon: f64) -> f64 {
        let of = |up: u32| {
            let ways = (1..=up).fold(1.0, |ways, k| ways * f64::from(steps - up + k) / f64::from(k));
            let loss = (2.0 * f64::from(up) - f64::from(steps)) * 3f64.ln();
            ways * 0.75f64.powf(f64::from(up))
                * 0.25f64.powf(f64::from(steps - up))
                * -(epsilon - loss).min(0.0).exp_m1()
        };
        (0..=steps).map(of).sum()
    }

    #[test]
    fn what_is_infinite_stays_so() {
        let mut losses = Losses::empty(0.01, -1.0, 1.0).unwrap();
        losses.add_atom(0.999, 0.0);
        losses.add_infinite(0.001);
        let losses = losses.whole();
        let lost = 1.0 - 0.999f64.powi(3);
        let row = json!("three rounds");
        close(delta(&[(&losses, 3)], 0.5).unwrap(), lost, 2e-9, &row);
        let below = Delta::new(lost * 0.999).unwrap();
        assert_eq!(epsilon(&[(&losses, 3)], below).unwrap(), f64::INFINITY);
        assert!(epsilon(&[(&losses, 3)], Delta::new(lost * 1.001).unwrap()).unwrap() < 0.01);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        assert!(Losses::empty(0.0, -1.0, 1.0).is_err() && Losses::empty(1e-9, -1.0, 1.0).is_err());
        let losses = two_answers(0.9, 1e-6, 4e6);
        assert!(epsilon(&[(&losses, 100_000)], Delta::new(1e-6).unwrap()).is_err());
        assert!(delta(&[(&losses, 1)], f64::NAN).is_err());
    }
}
