//! Exact tables of symmetric integer laws, 128 bits deep.
//!
//! `cumulative[m] = floor(2^128 P(|X| <= m))`. A draw compares 64 uniform bits with the upper halves; only if
//! they are equal, with probability below `len 2^-64`, it takes 64 more. Each probability is off by less than
//! 2^-127 and the tail that is cut weighs less than 2^-127, so the total variation distance from the law is
//! at most `(len + 2) 2^-127`, which is below 2^-110 for the 2^16 entries that are allowed. `docs/privacy.md`
//! carries the proof. The tables equal an independent computation with 80 digits, bit for bit.

use super::source::NoiseSource;
use crate::account::AccountError;
use dashu_int::UBig;

/// A noise variance in grid units squared, in steps of 2^-16: exact, so that every party builds the same
/// table from the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct GridVariance(u64);

impl GridVariance {
    /// Steps in one unit squared.
    pub const STEPS: u64 = 1 << 16;
    /// Largest: a standard deviation of 4096 units, whose table still takes under a megabyte.
    pub const MAX: Self = Self(Self::STEPS << 24);

    /// From steps of 2^-16.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] for zero and above [`GridVariance::MAX`].
    pub fn from_steps(steps: u64) -> Result<Self, AccountError> {
        #[expect(clippy::cast_precision_loss, reason = "only for the message")]
        let value = steps as f64 / Self::STEPS as f64;
        let range = "above 0 and at most 2^24 units squared";
        AccountError::check(steps > 0 && steps <= Self::MAX.0, "noise variance", value, range)?;
        Ok(Self(steps))
    }

    /// The least variance that is not below `variance`, in units squared.
    ///
    /// # Errors
    /// As for [`GridVariance::from_steps`].
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a negative, NaN or too large number saturates and is refused"
    )]
    pub fn at_least(variance: f64) -> Result<Self, AccountError> {
        Self::from_steps((variance * Self::STEPS as f64).ceil() as u64)
    }

    /// In steps of 2^-16.
    #[must_use]
    pub fn steps(self) -> u64 {
        self.0
    }

    /// In units squared; exact.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "at most 2^40, so exact")]
    pub fn value(self) -> f64 {
        self.0 as f64 / Self::STEPS as f64
    }
}

/// The law of a device's noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Law {
    /// Difference of two independent Poisson variables of half the variance each: sums stay Skellam.
    Skellam(GridVariance),
    /// `P(x)` proportional to `exp(-x^2 / (2 sigma^2))`; the parameter is `sigma^2`, at least 1/2.
    DiscreteGaussian(GridVariance),
}

/// Bits of the guide: enough that most draws take one comparison.
const GUIDE_BITS_MAX: u32 = 16;
/// Fixed-point bits of the Gaussian's terms.
const FIXED_BITS: usize = 384;

/// A law's table. Building one takes milliseconds (11 for a standard deviation of 1000); one serves a plan.
#[derive(Clone)]
pub struct NoiseTable {
    law: Law,
    cumulative: Vec<u128>,
    high: Vec<u64>,
    guide: Vec<u16>,
    guide_shift: u32,
}

impl NoiseTable {
    /// The table of a law.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] for a discrete Gaussian below half a unit squared.
    pub fn new(law: Law) -> Result<Self, AccountError> {
        let weights = match law {
            Law::Skellam(variance) => skellam_weights(variance),
            Law::DiscreteGaussian(variance) => {
                let enough = variance.value() >= 0.5;
                AccountError::check(enough, "discrete Gaussian variance", variance.value(), "at least 0.5")?;
                gaussian_weights(variance)
            }
        };
        Ok(Self::from_weights(law, &weights))
    }

    /// The law.
    #[must_use]
    pub fn law(&self) -> Law {
        self.law
    }

    /// Largest magnitude that is ever drawn: where the tail that is left weighs less than 2^-127.
    #[must_use]
    pub fn magnitude_max(&self) -> u32 {
        u32::try_from(self.cumulative.len() - 1).expect("tables are short")
    }

    /// `floor(2^128 P(|X| <= m))` for m from 0.
    #[must_use]
    pub fn cumulative(&self) -> &[u128] {
        &self.cumulative
    }

    /// Natural logarithm of the total variation distance between a draw and the law: at most this.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "tables are short")]
    pub fn ln_total_variation(&self) -> f64 {
        ((self.cumulative.len() + 2) as f64).ln() - 127.0 * std::f64::consts::LN_2
    }

    /// The magnitude that the uniform word `draw` stands for.
    #[inline]
    pub(super) fn magnitude(&self, draw: u64, source: &mut NoiseSource) -> u32 {
        let from = usize::from(self.guide[(draw >> self.guide_shift) as usize]);
        let at = from + usize::from(draw > self.high[from]);
        let at = if draw < self.high[at] { at } else { self.scan(at, draw, source) };
        at as u32
    }

    /// The rare cases: several entries within one step of the guide, or equal upper halves.
    #[cold]
    fn scan(&self, mut at: usize, draw: u64, source: &mut NoiseSource) -> usize {
        while self.high[at] < draw {
            at += 1;
        }
        if self.high[at] == draw {
            let whole = u128::from(draw) << 64 | u128::from(source.word());
            while at + 1 < self.cumulative.len() && self.cumulative[at] <= whole {
                at += 1;
            }
        }
        at
    }

    /// `weights[m]` is proportional to P(X = m), with at least 2^-256 relative precision where it matters.
    fn from_weights(law: Law, weights: &[UBig]) -> Self {
        let total = weights[1..].iter().fold(weights[0].clone(), |sum, w| sum + (w << 1));
        let mut sum = UBig::ZERO;
        let mut cumulative = Vec::new();
        for (m, weight) in weights.iter().enumerate() {
            sum += if m == 0 { weight.clone() } else { weight << 1 };
            let share = (&sum << 128) / &total;
            let Ok(share) = u128::try_from(share) else { break };
            cumulative.push(share);
            if share >= u128::MAX - 1 {
                break;
            }
        }
        // The last entry takes what is left.
        *cumulative.last_mut().expect("a law has a value") = u128::MAX;
        let high: Vec<u64> = cumulative.iter().map(|c| (c >> 64) as u64).collect();
        let bits = (usize::BITS - (4 * high.len()).leading_zeros()).clamp(8, GUIDE_BITS_MAX);
        let guide_shift = 64 - bits;
        let mut at = 0;
        let mut first = |step: u64| {
            while high[at] < step << guide_shift {
                at += 1;
            }
            u16::try_from(at).expect("tables have at most 2^16 entries")
        };
        let guide = (0..1u64 << bits).map(&mut first).collect();
        Self { law, cumulative, high, guide, guide_shift }
    }
}

/// Modified Bessel functions `I_k(v)`, whose share of the whole is P(X = k), by Miller's backward recurrence
/// `I_{k-1} = I_{k+1} + (2k/v) I_k` in integers (Abramowitz and Stegun 1964, section 9.12). The start lies where
/// the law weighs less than 2^-256; each step rounds integers above 2^256, so what comes out is true to a
/// relative `k 2^-256`.
fn skellam_weights(variance: GridVariance) -> Vec<UBig> {
    let start = start_of_tail(variance);
    let (scale, divisor) = (UBig::from(2 * GridVariance::STEPS), UBig::from(variance.steps()));
    let mut weights = vec![UBig::ZERO; start + 1];
    weights[start] = UBig::ONE << 320;
    let mut above = UBig::ZERO;
    for k in (1..=start).rev() {
        let below = &above + &weights[k] * (&scale * UBig::from(k)) / &divisor;
        above = weights[k].clone();
        weights[k - 1] = below;
    }
    weights
}

/// 20 standard deviations and 80 units: beyond, both laws weigh less than 2^-256 of their middle, so that what is
/// left out moves no cumulative probability by 2^-200.
fn start_of_tail(variance: GridVariance) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and positive")]
    let start = (20.0 * variance.value().sqrt()).ceil() as usize + 80;
    start
}

/// `exp(-m^2 / (2v))` in fixed point of 384 bits: `g_{m+1} = g_m r_m`, `r_{m+1} = r_m q` with `q = exp(-1/v)`.
fn gaussian_weights(variance: GridVariance) -> Vec<UBig> {
    let (steps, half) = (UBig::from(GridVariance::STEPS), UBig::from(2 * variance.steps()));
    let mut ratio = exp_of_minus(&steps, &half);
    let square = exp_of_minus(&steps, &UBig::from(variance.steps()));
    let mut weights = vec![UBig::ONE << FIXED_BITS];
    for m in 0..start_of_tail(variance) {
        let next = (&weights[m] * &ratio) >> FIXED_BITS;
        ratio = (ratio * &square) >> FIXED_BITS;
        weights.push(next);
    }
    weights
}

/// `exp(-numerator / denominator)` in fixed point of 384 bits, by its series, for arguments up to 2.
fn exp_of_minus(numerator: &UBig, denominator: &UBig) -> UBig {
    let (mut plus, mut minus) = (UBig::ZERO, UBig::ZERO);
    // 64 more bits than are kept: the series' rounding stays below them.
    let mut term = UBig::ONE << (FIXED_BITS + 64);
    let mut k = 0u32;
    while term != UBig::ZERO {
        if k.is_multiple_of(2) {
            plus += &term
        } else {
            minus += &term
        }
        k += 1;
        term = term * numerator / (denominator * UBig::from(k));
    }
    (plus - minus) >> 64
}
