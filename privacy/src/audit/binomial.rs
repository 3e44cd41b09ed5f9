//! Tails of the binomial law and the limits of Clopper and Pearson, in log space.

use libm::lgamma;

/// The number of successes in independent trials, each with the same chance strictly between 0 and 1.
///
/// Logarithms of both chances are kept, so that neither loses digits next to 1. Probabilities are off by less
/// than 1e-9 relatively up to 10^5 trials and 1e-7 up to 10^7: what `lgamma` loses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Binomial {
    trials: u64,
    ln_success: f64,
    ln_failure: f64,
}

impl Binomial {
    /// Trials that succeed with the chance `1 / (1 + exp(-logit))`.
    pub(super) fn from_logit(trials: u64, logit: f64) -> Self {
        let ln_chance = |x: f64| if x > 0.0 { -(-x).exp().ln_1p() } else { x - x.exp().ln_1p() };
        Self { trials, ln_success: ln_chance(logit), ln_failure: ln_chance(-logit) }
    }

    fn from_chance(trials: u64, chance: f64) -> Self {
        Self { trials, ln_success: chance.ln(), ln_failure: (-chance).ln_1p() }
    }

    /// The number of failures.
    fn swapped(self) -> Self {
        Self { ln_success: self.ln_failure, ln_failure: self.ln_success, ..self }
    }

    /// The probability of exactly `k`, at most the number of trials.
    pub(super) fn exactly(self, k: u64) -> f64 {
        let (n, k) = (float(self.trials), float(k));
        let ways = lgamma(n + 1.0) - lgamma(k + 1.0) - lgamma(n - k + 1.0);
        (ways + k * self.ln_success + (n - k) * self.ln_failure).exp()
    }

    /// The probability of `least` or more: outward from the likeliest term, until terms no longer count.
    pub(super) fn at_least(self, least: u64) -> f64 {
        if least == 0 || least > self.trials {
            return if least == 0 { 1.0 } else { 0.0 };
        }
        let odds = (self.ln_success - self.ln_failure).exp();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "between 0 and the trials"
        )]
        let mode = ((float(self.trials) + 1.0) * self.ln_success.exp()) as u64;
        let peak = mode.clamp(least, self.trials);
        let first = self.exactly(peak);
        let up = |k: u64| float(self.trials - k) / float(k + 1) * odds;
        let down = |k: u64| float(k) / (float(self.trials - k + 1) * odds);
        let mut sum = first;
        let mut term = first;
        for k in peak..self.trials {
            term *= up(k);
            sum += term;
            if term <= sum * NEGLIGIBLE {
                break;
            }
        }
        term = first;
        for k in (least + 1..=peak).rev() {
            term *= down(k);
            sum += term;
            if term <= sum * NEGLIGIBLE {
                break;
            }
        }
        sum.min(1.0)
    }
}

/// Terms fall faster than geometrically behind the first that is so small beside the sum.
const NEGLIGIBLE: f64 = 1e-18;

/// The greatest chance with which `successes` or fewer of `trials` still have probability `significance`
/// (Clopper and Pearson 1934), from above.
pub(super) fn upper_limit(successes: u64, trials: u64, significance: f64) -> f64 {
    if successes >= trials {
        return 1.0;
    }
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..64 {
        let middle: f64 = 0.5 * (low + high);
        let failures = Binomial::from_chance(trials, middle).swapped();
        if failures.at_least(trials - successes) > significance { low = middle } else { high = middle }
    }
    high
}

/// The least chance with which `successes` or more of `trials` still have probability `significance`, from below.
pub(super) fn lower_limit(successes: u64, trials: u64, significance: f64) -> f64 {
    1.0 - upper_limit(trials - successes, trials, significance)
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
pub(super) fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_equal_sums_of_whole_numbers() {
        // All 2^20 outcomes of fair coins, counted exactly.
        let coins = Binomial::from_logit(20, 0.0);
        let mut ways = 1u64;
        let mut at_least = 0;
        for k in (0..=20u64).rev() {
            at_least += ways;
            let expected = float(at_least) / float(1 << 20);
            let actual = coins.at_least(k);
            assert!((actual / expected - 1.0).abs() < 1e-13, "{actual} for {expected} at {k}");
            ways = ways * k / (21 - k);
        }
        assert_eq!(coins.at_least(21), 0.0);
    }

    #[test]
    fn tails_have_their_closed_forms_at_the_ends() {
        for (trials, chance) in [(1000u64, 0.01), (1000, 0.999), (100_000, 1e-5), (5, 0.5)] {
            let law = Binomial::from_chance(trials, chance);
            let (none, all) =
                ((float(trials) * (-chance).ln_1p()).exp(), (float(trials) * chance.ln()).exp());
            assert!((law.at_least(1) / (1.0 - none) - 1.0).abs() < 1e-9, "{law:?}");
            assert!(all == 0.0 || (law.at_least(trials) / all - 1.0).abs() < 1e-9, "{law:?}");
            let both = law.at_least(trials / 2) + law.swapped().at_least(trials - trials / 2 + 1);
            assert!((both - 1.0).abs() < 1e-9, "{both} {law:?}");
        }
    }

    #[test]
    fn limits_have_their_closed_forms_at_the_ends() {
        for (trials, significance) in [(10u64, 0.05f64), (5000, 0.025), (500_000, 0.001)] {
            let expected = -(significance.ln() / float(trials)).exp_m1();
            for (limit, expected) in [
                (upper_limit(0, trials, significance), expected),
                (1.0 - lower_limit(trials, trials, significance), expected),
                (upper_limit(trials, trials, significance), 1.0),
                (lower_limit(0, trials, significance), 0.0),
            ] {
                assert!((limit - expected).abs() <= 1e-9 * expected, "{limit} for {expected}");
            }
        }
        // Clopper and Pearson's interval for 7 of 10 as in any table: 0.3475 to 0.9333.
        assert!(
            (lower_limit(7, 10, 0.025) - 0.3475).abs() < 5e-5
                && (upper_limit(7, 10, 0.025) - 0.9333).abs() < 5e-5
        );
    }
}
