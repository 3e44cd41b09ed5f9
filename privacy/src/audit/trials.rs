//! Auditing by many independent runs, with and without one canary, and the exact limits of Clopper and Pearson on
//! how often each was taken for a run with it.

use super::{
    assert_chance, assert_delta, assert_scores,
    binomial::{lower_limit, upper_limit},
};

/// Runs with and without a canary, and how many of each were said to be with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trials {
    /// Runs with it.
    pub positives: u64,
    /// Runs with it that were recognized; at most all.
    pub true_positives: u64,
    /// Runs without it.
    pub negatives: u64,
    /// Runs without it that were taken for runs with it; at most all.
    pub false_positives: u64,
}

/// A lower bound on epsilon at `delta`: `ln((TPR - delta) / FPR)` with the true positive rate at its lower limit and
/// the false positive rate at its upper, each at half the `significance` (Jagielski, Ullman
/// and Oprea 2020, "Auditing Differentially Private Machine Learning"); 0 where that is negative.
///
/// # Panics
/// Where delta is not at least 0 and below 1, the significance not above 0 and below 1, or the counts contradict
/// each other.
#[must_use]
pub fn epsilon_clopper_pearson(trials: Trials, delta: f64, significance: f64) -> f64 {
    assert_delta(delta);
    assert_chance("significance", significance);
    let Trials { positives, true_positives, negatives, false_positives } = trials;
    let ordered = true_positives <= positives && false_positives <= negatives;
    assert!(ordered, "what was recognized is part of what was tried: {trials:?}");
    let rate = lower_limit(true_positives, positives, 0.5 * significance) - delta;
    if rate <= 0.0 {
        return 0.0;
    }
    (rate / upper_limit(false_positives, negatives, 0.5 * significance)).ln().max(0.0)
}

/// A lower bound on epsilon at `delta` from the scores of independent runs with a canary and without it.
///
/// Every second run serves to choose the threshold, and whether to look for runs with or without the canary; the
/// bound is computed on the others, so that the choice needs no correction.
///
/// # Panics
/// Where delta is not at least 0 and below 1, the confidence not above 0 and below 1, or a score not finite.
#[must_use]
pub fn clopper_pearson(scores_with: &[f64], scores_without: &[f64], delta: f64, confidence: f64) -> f64 {
    assert_delta(delta);
    assert_chance("confidence", confidence);
    assert_scores(scores_with);
    assert_scores(scores_without);
    let bound = |trials: Trials| epsilon_clopper_pearson(trials, delta, 1.0 - confidence);
    let directions = [(scores_with, scores_without, 1.0), (scores_without, scores_with, -1.0)];
    let mut best = (0.0, 0.0);
    for (positives, negatives, sign) in directions {
        let [choose, judge] = [0, 1].map(|first| Half::new(positives, negatives, sign, first));
        for threshold in choose.thresholds() {
            let promised = bound(choose.trials(threshold));
            if promised > best.0 {
                best = (promised, bound(judge.trials(threshold)));
            }
        }
    }
    best.1
}

/// Every second score of both kinds, in rising order.
struct Half {
    positives: Vec<f64>,
    negatives: Vec<f64>,
}

impl Half {
    fn new(positives: &[f64], negatives: &[f64], sign: f64, first: usize) -> Self {
        let half = |scores: &[f64]| {
            let mut half: Vec<f64> = scores.iter().skip(first).step_by(2).map(|score| sign * score).collect();
            half.sort_by(f64::total_cmp);
            half
        };
        Self { positives: half(positives), negatives: half(negatives) }
    }

    /// A run is taken for a positive where its score is above the threshold.
    fn trials(&self, threshold: f64) -> Trials {
        let above =
            |scores: &[f64]| (scores.len() - scores.partition_point(|score| *score <= threshold)) as u64;
        Trials {
            positives: self.positives.len() as u64,
            true_positives: above(&self.positives),
            negatives: self.negatives.len() as u64,
            false_positives: above(&self.negatives),
        }
    }

    /// Thresholds with 0, 1, 3, 7, … of either kind above them, each halfway to the next score of any kind, so that
    /// kinds which a gap divides are divided by its middle.
    fn thresholds(&self) -> Vec<f64> {
        let next =
            |scores: &[f64], at: f64| scores.get(scores.partition_point(|score| *score <= at)).copied();
        let halfway = |at: f64| {
            let above = [next(&self.positives, at), next(&self.negatives, at)].into_iter().flatten();
            let above = above.fold(f64::INFINITY, f64::min);
            if above.is_finite() { at + 0.5 * (above - at) } else { at }
        };
        let ranks = |scores: &[f64]| {
            let ranks = std::iter::successors(Some(1usize), |rank| Some(rank * 2));
            ranks
                .take_while(|rank| *rank <= scores.len())
                .map(|rank| halfway(scores[scores.len() - rank]))
                .collect()
        };
        let each: [Vec<f64>; 2] = [ranks(&self.negatives), ranks(&self.positives)];
        each.concat()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::simulated::Scores, *};
    use crate::account::known::{number, rows};

    #[test]
    fn bounds_on_gaussian_noise_are_as_strong_as_expected_and_below_the_truth() {
        for (seed, row) in rows("clopper_pearson_sim").into_iter().enumerate() {
            let runs = usize::try_from(row["trials"].as_u64().unwrap()).unwrap();
            let (mut scores, sigma) = (Scores::new(seed as u64), number(&row, "sigma"));
            let (with, without) = (scores.gaussian(runs, 1.0, sigma), scores.gaussian(runs, 0.0, sigma));
            let (bound, expected) = (clopper_pearson(&with, &without, 1e-5, 0.95), number(&row, "eps_lb"));
            assert!(bound > 0.5 * expected && bound < 1.5 * expected, "{bound} in {row}");
            assert!(bound < number(&row, "eps_true"), "{bound} in {row}");
            // The same mechanism with a quarter of its noise is caught.
            let [with, without] = [1.0, 0.0].map(|shift| scores.gaussian(10_000, shift, 0.25 * sigma));
            let broken = clopper_pearson(&with, &without, 1e-5, 0.95);
            assert!(broken > 1.3 * number(&row, "eps_true"), "{broken} in {row}");
        }
    }

    #[test]
    fn a_bound_is_that_of_its_limits() {
        let trials = Trials { positives: 1000, true_positives: 1000, negatives: 1000, false_positives: 0 };
        // Both limits have closed forms: 1 - a/2^(1/n) and its complement.
        let miss = -(0.025f64.ln() / 1000.0).exp_m1();
        let expected = ((1.0 - miss - 1e-5) / miss).ln();
        assert!((epsilon_clopper_pearson(trials, 1e-5, 0.05) - expected).abs() < 1e-9);
        let none = Trials { true_positives: 0, ..trials };
        assert_eq!(epsilon_clopper_pearson(none, 1e-5, 0.05), 0.0);
        let even = Trials { true_positives: 500, false_positives: 500, ..trials };
        assert_eq!(epsilon_clopper_pearson(even, 0.0, 0.05), 0.0);
        let empty = Trials { positives: 0, true_positives: 0, negatives: 0, false_positives: 0 };
        assert_eq!(epsilon_clopper_pearson(empty, 0.0, 0.05), 0.0);
    }

    #[test]
    fn bounds_hold_with_their_confidence() {
        // Randomized response of epsilon 1: every attack on one bit is the best.
        let mut scores = Scores::new(11);
        let told_rightly = 1.0 / (1.0 + (-1f64).exp());
        let mut answers = |truth: f64| -> Vec<f64> {
            (0..2000).map(|_| if scores.uniform() <= told_rightly { truth } else { -truth }).collect()
        };
        let bounds: Vec<f64> =
            (0..200).map(|_| clopper_pearson(&answers(1.0), &answers(-1.0), 0.0, 0.9)).collect();
        let wrong = bounds.iter().filter(|bound| **bound > 1.0).count();
        let mean = bounds.iter().sum::<f64>() / 200.0;
        assert!(wrong <= 36 && mean > 0.8, "{wrong} of 200 wrong, {mean} on average");
    }

    #[test]
    fn the_choice_of_a_threshold_is_made_on_other_runs() {
        // Scores that say nothing: any bound above 0 is wrong. At confidence 1/2, and judged by the runs that chose
        // the threshold, most would be.
        let mut scores = Scores::new(17);
        let mut refutes = || {
            let [with, without] = [0; 2].map(|_| scores.gaussian(1000, 0.0, 1.0));
            clopper_pearson(&with, &without, 0.0, 0.5) > 0.0
        };
        let wrong = (0..200).filter(|_| refutes()).count();
        assert!((5..=100).contains(&wrong), "{wrong} of 200 wrong");
    }

    #[test]
    fn scores_that_say_nothing_prove_nothing_and_those_that_say_all_prove_much() {
        assert_eq!(clopper_pearson(&[0.0; 100], &[0.0; 100], 0.0, 0.95), 0.0);
        assert_eq!(clopper_pearson(&[], &[1.0], 0.0, 0.95), 0.0);
        let rising: Vec<f64> = (0..1000).map(f64::from).collect();
        let far: Vec<f64> = rising.iter().map(|score| score + 5000.0).collect();
        // The gap between the kinds is found, so the half that judges has no wrong guess either.
        let miss = -(0.025f64.ln() / 500.0).exp_m1();
        let bound = clopper_pearson(&far, &rising, 0.0, 0.95);
        assert!((bound - ((1.0 - miss) / miss).ln()).abs() < 1e-9, "{bound}");
        // An attack the wrong way round is no evidence.
        assert_eq!(clopper_pearson(&rising, &far, 0.0, 0.95), 0.0);
    }

    #[test]
    #[should_panic(expected = "scores must be finite")]
    fn refuses_scores_that_are_no_numbers() {
        let _ = clopper_pearson(&[f64::NAN], &[0.0], 0.0, 0.95);
    }
}
