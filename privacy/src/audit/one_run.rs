//! Auditing in one run: each of many canaries takes part by the toss of a fair coin, and an attacker guesses the
//! coins of those that it likes (Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run").

use super::{
    assert_chance, assert_delta, assert_scores,
    binomial::{Binomial, float},
};

/// How an attacker fared in one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guesses {
    /// Canaries whose coin was tossed.
    pub canaries: u64,
    /// Canaries whose coin was guessed; at most all.
    pub made: u64,
    /// Right guesses; at most those made.
    pub correct: u64,
}

impl Guesses {
    fn assert_ordered(self) {
        let ordered = self.correct <= self.made && self.made <= self.canaries;
        assert!(ordered, "right guesses are guesses, and each canary is guessed once: {self:?}");
    }
}

/// The chance, at most, to guess so well if the run was (`epsilon`, `delta`) differentially private (Steinke et
/// al. 2023, the theorem for approximate privacy): `beta + 2 m delta max_i (P[X >= v - i] - beta) / i` with `beta = P[X >= v]`, X binomial
/// over the guesses made with success `1 / (1 + e^-epsilon)`, m canaries and v right guesses.
///
/// # Panics
/// Where delta is not at least 0 and below 1, epsilon is no number, or the counts contradict each other.
#[must_use]
pub fn one_run_p_value(guesses: Guesses, epsilon: f64, delta: f64) -> f64 {
    assert_delta(delta);
    assert!(!epsilon.is_nan(), "epsilon must be a number");
    guesses.assert_ordered();
    let law = Binomial::from_logit(guesses.made, epsilon);
    let beta = law.at_least(guesses.correct);
    if delta == 0.0 {
        return beta;
    }
    let (mut steepest, mut sum) = (0f64, 0.0);
    for i in 1..=guesses.correct {
        // No later sum passes 1.
        if steepest * float(i) >= 1.0 {
            break;
        }
        sum += law.exactly(guesses.correct - i);
        steepest = steepest.max(sum / float(i));
    }
    (beta + 2.0 * float(guesses.canaries) * delta * steepest).min(1.0)
}

/// The greatest epsilon that the guesses refute at `significance` and `delta`, and so a lower bound on that of the
/// run; 0 where they refute none.
///
/// # Panics
/// As [`one_run_p_value`], and where the significance is not above 0 and below 1.
#[must_use]
pub fn epsilon_one_run(guesses: Guesses, delta: f64, significance: f64) -> f64 {
    assert_chance("significance", significance);
    let refuted = |epsilon: f64| one_run_p_value(guesses, epsilon, delta) <= significance;
    if !refuted(0.0) {
        return 0.0;
    }
    let (mut low, mut high) = (0.0, 1.0);
    while refuted(high) && high < EPSILON_MAX {
        (low, high) = (high, 2.0 * high);
    }
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if refuted(middle) { low = middle } else { high = middle }
    }
    low
}

/// Where the search ends: no run has guesses enough to refute more.
const EPSILON_MAX: f64 = 64.0;

/// A lower bound on epsilon at `delta` from the scores of the canaries that took part and of those that did not.
///
/// Which canaries took part must have been decided by a fair coin for each, apart from the scores of others. The
/// highest scores are guessed to have taken part and as many of the lowest not; how many is tried at [`SHARES`],
/// with the significance split evenly among them. Where scores are equal the wrong guesses count first, since an
/// attacker cannot tell them apart: coarse scores deserve a random tie break by the caller.
///
/// # Panics
/// Where delta is not at least 0 and below 1, the confidence not above 0 and below 1, or a score not finite.
#[must_use]
pub fn one_run(scores_in: &[f64], scores_out: &[f64], delta: f64, confidence: f64) -> f64 {
    assert_delta(delta);
    assert_chance("confidence", confidence);
    assert_scores(scores_in);
    assert_scores(scores_out);
    let canaries = scores_in.len() + scores_out.len();
    let highest = ranked(scores_in, scores_out, 1.0);
    let lowest = ranked(scores_out, scores_in, -1.0);
    let significance = (1.0 - confidence) / float(SHARES.len() as u64);
    let bound = |share: usize| {
        let guessed = (canaries / 2).div_ceil(share);
        let right = |ranked: &[bool]| ranked.iter().take(guessed).filter(|right| **right).count() as u64;
        let correct = right(&highest) + right(&lowest);
        let guesses = Guesses { canaries: canaries as u64, made: 2 * guessed as u64, correct };
        epsilon_one_run(guesses, delta, significance)
    };
    SHARES.into_iter().map(bound).fold(0.0, f64::max)
}

/// One of how many canaries is guessed. Few guesses are surer, many bear more evidence.
pub const SHARES: [usize; 4] = [1, 4, 16, 64];

/// Whether a guess would be right, from the greatest score times `sign` down; wrong ones first among equals.
fn ranked(right: &[f64], wrong: &[f64], sign: f64) -> Vec<bool> {
    let label = |scores: &[f64], is: bool| scores.iter().map(|score| (sign * score, is)).collect::<Vec<_>>();
    let mut all = [label(wrong, false), label(right, true)].concat();
    // Stable, and -0 equals 0.
    all.sort_by(|a, b| (b.0 + 0.0).total_cmp(&(a.0 + 0.0)));
    all.into_iter().map(|(_, is)| is).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::simulated::Scores, *};
    use crate::account::known::{close, number, rows};

    fn guesses(row: &serde_json::Value) -> Guesses {
        let whole = |field: &str| row[field].as_u64().unwrap();
        Guesses { canaries: whole("m"), made: whole("guesses"), correct: whole("correct") }
    }

    #[test]
    fn p_values_and_bounds_equal_the_reference() {
        for row in rows("one_run_audit") {
            let p_value = one_run_p_value(guesses(&row), number(&row, "eps"), number(&row, "delta"));
            close(p_value, number(&row, "p_value"), 1e-9, &row);
        }
        for row in rows("one_run_audit_bound") {
            let bound = epsilon_one_run(guesses(&row), number(&row, "delta"), number(&row, "significance"));
            close(bound, number(&row, "eps_lower_bound"), 1e-9, &row);
        }
    }

    #[test]
    fn bounds_on_gaussian_noise_are_as_strong_as_expected_and_below_the_truth() {
        for (seed, row) in rows("one_run_sim_expectation").into_iter().enumerate() {
            let canaries = usize::try_from(row["m"].as_u64().unwrap()).unwrap();
            let (mut scores, sigma) = (Scores::new(seed as u64), number(&row, "sigma"));
            let taking_part = scores.heads(canaries);
            let inside = scores.gaussian(taking_part, 1.0, sigma);
            let outside = scores.gaussian(canaries - taking_part, 0.0, sigma);
            let (bound, expected) =
                (one_run(&inside, &outside, 1e-5, 0.95), number(&row, "eps_lb_one_run_best"));
            // The reference takes the best of many shares at the whole significance.
            assert!(bound > 0.5 * expected && bound < 1.5 * expected, "{bound} in {row}");
            assert!(bound < number(&row, "eps_true"), "{bound} in {row}");
        }
    }

    #[test]
    fn a_quarter_of_the_noise_is_caught() {
        // With sigma 1 epsilon is 4.38 at delta 1e-5, with sigma 2 it is 1.99.
        for (sigma, canaries, claim) in [(1.0, 10_000, 4.38), (2.0, 1000, 1.99)] {
            let mut scores = Scores::new(3);
            let [inside, outside] =
                [1.0, 0.0].map(|shift| scores.gaussian(canaries / 2, shift, 0.25 * sigma));
            let bound = one_run(&inside, &outside, 1e-5, 0.95);
            assert!(bound > claim, "{bound} for {claim}");
        }
    }

    #[test]
    fn bounds_hold_with_their_confidence_and_are_close_where_the_attack_is_best() {
        // Randomized response: each coin is told rightly with chance e^1 / (1 + e^1), so epsilon is 1.
        let mut scores = Scores::new(7);
        let told_rightly = 1.0 / (1.0 + (-1f64).exp());
        let mut bounds = Vec::new();
        for _ in 0..200 {
            let taking_part = scores.heads(2000);
            let mut answer = |truth: f64| {
                let told = if scores.uniform() <= told_rightly { truth } else { -truth };
                told + 0.1 * scores.uniform()
            };
            let inside: Vec<f64> = (0..taking_part).map(|_| answer(1.0)).collect();
            let outside: Vec<f64> = (taking_part..2000).map(|_| answer(-1.0)).collect();
            bounds.push(one_run(&inside, &outside, 0.0, 0.9));
        }
        let wrong = bounds.iter().filter(|bound| **bound > 1.0).count();
        let mean = bounds.iter().sum::<f64>() / 200.0;
        // 20 expected at most; 36 is four standard deviations above.
        assert!(wrong <= 36 && mean > 0.8, "{wrong} of 200 wrong, {mean} on average");
    }

    #[test]
    fn the_best_of_several_shares_is_paid_for() {
        // Scores that say nothing: any bound above 0 is wrong. At confidence 1/2 and without the split most would be.
        let mut scores = Scores::new(13);
        let mut refutes = || {
            let taking_part = scores.heads(4000);
            let [inside, outside] =
                [taking_part, 4000 - taking_part].map(|count| scores.gaussian(count, 0.0, 1.0));
            one_run(&inside, &outside, 0.0, 0.5) > 0.0
        };
        let wrong = (0..200).filter(|_| refutes()).count();
        assert!((20..=100).contains(&wrong), "{wrong} of 200 wrong");
    }

    #[test]
    fn equal_scores_prove_nothing() {
        assert_eq!(one_run(&[0.0; 500], &[0.0; 500], 0.0, 0.95), 0.0);
        assert_eq!(one_run(&[0.0; 500], &[-0.0; 500], 0.0, 0.95), 0.0);
        assert_eq!(one_run(&[], &[], 1e-5, 0.95), 0.0);
        assert!(one_run(&[1.0; 500], &[0.0; 500], 0.0, 0.95) > 4.0);
        // An attack the wrong way round is no evidence.
        assert_eq!(one_run(&[0.0; 500], &[1.0; 500], 0.0, 0.95), 0.0);
    }

    #[test]
    fn p_values_grow_with_epsilon_and_delta() {
        let guesses = Guesses { canaries: 2000, made: 2000, correct: 2000 };
        // The likeliest count lies far below: its probability must not be lost with that of the last.
        assert!(one_run_p_value(guesses, 0.0, 1e-3) > 1e-4);
        let mut last = 0.0;
        for step in 0..40 {
            let p_value = one_run_p_value(guesses, f64::from(step) * 0.25, 1e-9);
            assert!(p_value >= last);
            last = p_value;
        }
    }

    #[test]
    #[should_panic(expected = "right guesses are guesses")]
    fn refuses_counts_that_contradict_each_other() {
        let _ = epsilon_one_run(Guesses { canaries: 10, made: 5, correct: 6 }, 0.0, 0.05);
    }
}
