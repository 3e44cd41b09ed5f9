//! Randomized response: a device answers a question with noise of its own, so that nobody need be
//! trusted (Warner 1965; Kairouz, Bonawitz and Ramage 2016, "Discrete Distribution Estimation under Local
//! Privacy"). To answer the same question again costs again: a device keeps its first answer.

use super::{ReleaseCost, ReleaseError};
use crate::account::AccountError;
use opendp::{
    error::Fallible,
    measurements::{make_randomized_response, make_randomized_response_bool},
};
use std::collections::HashSet;

/// An answer is searched and stored among so many.
const CATEGORIES_MAX: u32 = 1024;

/// More than this is as good as the truth.
const EPSILON_MAX: f64 = 16.0;

/// What a device may send, and what it cost that device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answer<T> {
    /// The truth, or with a known probability something else.
    pub value: T,
    /// Pure: delta is 0.
    pub cost: ReleaseCost,
}

/// How many of the devices that answered have a value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Without bias; noise may carry it below 0 or above the number of answers.
    pub count: f64,
    /// Standard deviation of what the devices' noise did to `count`. What it says about devices that did not
    /// answer is not in it.
    pub standard_error: f64,
}

/// Randomized response to a question of yes or no.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BooleanResponse(CategoricalResponse);

impl BooleanResponse {
    /// Tells the truth with `probability`, and otherwise the opposite.
    ///
    /// # Errors
    /// [`ReleaseError`] unless `probability` is above 1/2 and epsilon at most 16.
    pub fn new(probability: f64) -> Result<Self, ReleaseError> {
        CategoricalResponse::new(2, probability).map(Self)
    }

    /// Tells the truth as often as `epsilon` allows.
    ///
    /// # Errors
    /// [`ReleaseError`] unless `epsilon` is from 1e-3 to 16.
    pub fn for_epsilon(epsilon: f64) -> Result<Self, ReleaseError> {
        CategoricalResponse::for_epsilon(2, epsilon).map(Self)
    }

    /// What one answer costs its device.
    #[must_use]
    pub fn epsilon(&self) -> f64 {
        self.0.epsilon
    }

    /// A device's answer.
    ///
    /// # Errors
    /// [`ReleaseError::Opendp`] without randomness.
    pub fn answer(&self, truth: bool) -> Result<Answer<bool>, ReleaseError> {
        // The time that it takes says nothing about whether this is the truth.
        let constant_time = true;
        let value = make_randomized_response_bool(self.0.probability, constant_time)
            .and_then(|respond| respond.invoke(&truth))
            .map_err(ReleaseError::opendp("answer"))?;
        Ok(Answer { value, cost: self.0.cost() })
    }

    /// How many devices would have said yes without noise, of `answers` of which `yes` did with it.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] if `yes` is above `answers`, or `answers` is zero or above 2^52.
    pub fn estimate(&self, yes: u64, answers: u64) -> Result<Estimate, AccountError> {
        AccountError::check(yes <= answers, "yes", yes as f64, "at most the number of answers")?;
        check_answers(answers)?;
        Ok(self.0.count(yes, answers))
    }
}

/// Randomized response to a question with some answers, numbered from 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CategoricalResponse {
    categories: u32,
    probability: f64,
    epsilon: f64,
}

impl CategoricalResponse {
    /// Tells the truth with `probability`, and otherwise one of the other `categories`, each as likely.
    ///
    /// # Errors
    /// [`ReleaseError`] unless there are 2 to 1024 categories, `probability` is above that of a guess, and
    /// epsilon at most 16.
    pub fn new(categories: u32, probability: f64) -> Result<Self, ReleaseError> {
        let held = (2..=CATEGORIES_MAX).contains(&categories);
        AccountError::check(held, "categories", categories.into(), "from 2 to 1024")?;
        let held = probability > 1.0 / f64::from(categories) && probability < 1.0;
        AccountError::check(held, "probability", probability, "above that of a guess and below 1")?;
        let epsilon =
            epsilon(categories, probability).map_err(ReleaseError::opendp("account for an answer"))?;
        AccountError::check(
            epsilon > 0.0 && epsilon <= EPSILON_MAX,
            "epsilon",
            epsilon,
            "above 0 and at most 16",
        )?;
        Ok(Self { categories, probability, epsilon })
    }

    /// Tells the truth as often as `epsilon` allows: `e^epsilon / (e^epsilon + categories - 1)`.
    ///
    /// # Errors
    /// [`ReleaseError`] unless there are 2 to 1024 categories and `epsilon` is from 1e-3 to 16.
    pub fn for_epsilon(categories: u32, epsilon: f64) -> Result<Self, ReleaseError> {
        let held = (1e-3..=EPSILON_MAX).contains(&epsilon);
        AccountError::check(held, "epsilon", epsilon, "from 1e-3 to 16")?;
        let mut probability = 1.0 / (1.0 + (f64::from(categories) - 1.0) * (-epsilon).exp());
        // A few units in the last place make up for the rounding of the formula. The bound of `new` is on the
        // rounded epsilon, so it too may need a step.
        for _ in 0..64 {
            let found = Self::new(categories, probability);
            if found.as_ref().map_or(epsilon < EPSILON_MAX, |found| found.epsilon <= epsilon) {
                return found;
            }
            probability = probability.next_down();
        }
        Err(AccountError::Unreachable(format!("no probability of truth costs at most epsilon {epsilon}"))
            .into())
    }

    /// What one answer costs its device.
    #[must_use]
    pub fn epsilon(&self) -> f64 {
        self.epsilon
    }

    /// A device's answer, below the number of categories.
    ///
    /// # Errors
    /// [`ReleaseError`] if `truth` is no category, or without randomness.
    pub fn answer(&self, truth: u32) -> Result<Answer<u32>, ReleaseError> {
        let held = truth < self.categories;
        AccountError::check(held, "truth", truth.into(), "below the number of categories")?;
        let value =
            make_randomized_response((0..self.categories).collect::<HashSet<u32>>(), self.probability)
                .and_then(|respond| respond.invoke(&truth))
                .map_err(ReleaseError::opendp("answer"))?;
        Ok(Answer { value, cost: self.cost() })
    }

    /// How many devices have each category, from how many answered it. The estimates add up to the answers.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless there is one number a category, and in all from 1 to 2^52 answers.
    pub fn estimate(&self, answered: &[u64]) -> Result<Vec<Estimate>, AccountError> {
        let held = answered.len() == self.categories as usize;
        AccountError::check(held, "length of answered", answered.len() as f64, "the number of categories")?;
        let answers = answered.iter().fold(0u64, |sum, count| sum.saturating_add(*count));
        check_answers(answers)?;
        Ok(answered.iter().map(|count| self.count(*count, answers)).collect())
    }

    fn cost(&self) -> ReleaseCost {
        ReleaseCost::Approximate { epsilon: self.epsilon, delta: 0.0 }
    }

    /// With p the probability of the truth and q that of each other answer, E[observed] = q n + (p - q) c and
    /// Var[observed] = c p (1 - p) + (n - c) q (1 - q), where c of n devices have the category (Kairouz et al.
    /// 2016, section 4). The variance is taken at the estimate of c.
    fn count(&self, observed: u64, answers: u64) -> Estimate {
        let (p, n) = (self.probability, answers as f64);
        let q = (1.0 - p) / (f64::from(self.categories) - 1.0);
        let count = (observed as f64 - q * n) / (p - q);
        let within = count.clamp(0.0, n);
        let variance = within * p * (1.0 - p) + (n - within) * q * (1.0 - q);
        Estimate { count, standard_error: variance.sqrt() / (p - q) }
    }
}

/// By opendp's own privacy map, whose distance is whether two truths differ.
fn epsilon(categories: u32, probability: f64) -> Fallible<f64> {
    if categories == 2 {
        return make_randomized_response_bool(probability, true)?.map(&1);
    }
    make_randomized_response((0..categories).collect::<HashSet<u32>>(), probability)?.map(&1)
}

fn check_answers(answers: u64) -> Result<(), AccountError> {
    AccountError::check((1..=1 << 52).contains(&answers), "answers", answers as f64, "from 1 to 2^52")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        account::known::{close, number, rows},
        release::oracle::T,
    };

    #[test]
    fn epsilon_equals_the_reference() {
        let mut compared = 0;
        for row in rows("laplace_rr").into_iter().filter(|row| row["mech"] != "laplace") {
            let (categories, truth) = (number(&row, "k"), number(&row, "p_truth"));
            let (epsilon, by_boolean) = if categories == 2.0 {
                let boolean = BooleanResponse::new(truth).unwrap();
                (boolean.epsilon(), boolean.answer(true).unwrap().cost)
            } else {
                let response = CategoricalResponse::new(4, truth).unwrap();
                (response.epsilon(), response.answer(3).unwrap().cost)
            };
            close(epsilon, number(&row, "eps"), 1e-12, &row);
            assert_eq!(by_boolean, ReleaseCost::Approximate { epsilon, delta: 0.0 });
            compared += 1;
        }
        assert_eq!(compared, 2);
    }

    #[test]
    fn what_is_asked_for_is_not_passed() {
        for epsilon in [1e-3, 0.1, 1.0, 3f64.ln(), 8.0, 16.0] {
            for categories in [2, 3, 16, 1024] {
                let found = CategoricalResponse::for_epsilon(categories, epsilon).unwrap().epsilon();
                assert!(
                    found <= epsilon && found > epsilon * (1.0 - 1e-9),
                    "{found} for {epsilon}, {categories}"
                );
            }
        }
        assert!((BooleanResponse::for_epsilon(3f64.ln()).unwrap().0.probability - 0.75).abs() < 1e-15);
    }

    /// Answers are true with their probability, by Hoeffding's inequality.
    #[test]
    fn the_truth_is_told_as_often_as_was_said() {
        let slack = (T / 40_000.0).sqrt();
        let boolean = BooleanResponse::new(0.75).unwrap();
        for truth in [true, false] {
            let told = (0..20_000).filter(|_| boolean.answer(truth).unwrap().value == truth).count();
            assert!((told as f64 / 20_000.0 - 0.75).abs() <= slack, "{told} for {truth}");
        }
        let categorical = CategoricalResponse::new(4, 0.7).unwrap();
        let mut answered = [0u32; 4];
        (0..20_000).for_each(|_| answered[categorical.answer(2).unwrap().value as usize] += 1);
        for (answered, expected) in answered.iter().zip([0.1, 0.1, 0.7, 0.1]) {
            assert!((f64::from(*answered) / 20_000.0 - expected).abs() <= slack, "{answered}: {expected}");
        }
    }

    /// Over every outcome of four devices, weighted with its probability: no bias, and for two categories
    /// the variance is exact whatever the outcome.
    #[test]
    fn estimates_have_no_bias_and_the_stated_error() {
        let (boolean, p, n, truth) = (BooleanResponse::new(0.8).unwrap(), 0.8f64, 4u32, 3u32);
        let (mut mean, mut square) = (0.0, 0.0);
        for outcome in 0..1u32 << n {
            let honest = |device: u32| ((outcome >> device) & 1 == 1) == (device < truth);
            let weight: f64 = (0..n).map(|device| if honest(device) { p } else { 1.0 - p }).product();
            let estimate = boolean.estimate(outcome.count_ones().into(), n.into()).unwrap();
            mean += weight * estimate.count;
            square += weight * (estimate.count - f64::from(truth)).powi(2);
            assert!((estimate.standard_error - (4.0 * 0.16f64).sqrt() / 0.6).abs() < 1e-12);
        }
        assert!((mean - 3.0).abs() < 1e-12, "{mean}");
        assert!((square.sqrt() - (4.0 * 0.16f64).sqrt() / 0.6).abs() < 1e-12, "{square}");
    }

    #[test]
    fn a_population_is_found_again() {
        let response = CategoricalResponse::for_epsilon(3, 2.0).unwrap();
        let truth = [12_000u32, 7_000, 1_000];
        let mut answered = [0u64; 3];
        for (category, devices) in (0u32..).zip(truth) {
            for _ in 0..devices {
                answered[response.answer(category).unwrap().value as usize] += 1;
            }
        }
        let estimates = response.estimate(&answered).unwrap();
        let sum: f64 = estimates.iter().map(|estimate| estimate.count).sum();
        assert!((sum - 20_000.0).abs() < 1e-6, "{sum}");
        // Hoeffding again; its slack is that of the answers, stretched as the estimate stretches them.
        let q = (1.0 - response.probability) / 2.0;
        let slack = (T * 20_000.0 / 2.0).sqrt() / (response.probability - q);
        for (estimate, truth) in estimates.iter().zip(truth) {
            assert!((estimate.count - f64::from(truth)).abs() <= slack, "{estimate:?} for {truth}");
            // In the mean over outcomes the plugged-in variance is the true one; here near it.
            let (p, c) = (response.probability, f64::from(truth));
            let exact = (c * p * (1.0 - p) + (20_000.0 - c) * q * (1.0 - q)).sqrt() / (p - q);
            assert!((estimate.standard_error / exact - 1.0).abs() < 0.05, "{estimate:?} for {exact}");
        }
    }

    #[test]
    fn refuses_what_is_no_response() {
        for probability in [0.5, 0.3, 1.0, f64::NAN, 1.0 - 1e-9] {
            assert!(BooleanResponse::new(probability).is_err(), "{probability}");
        }
        assert!(CategoricalResponse::new(1, 0.9).is_err() && CategoricalResponse::new(1025, 0.9).is_err());
        assert!(CategoricalResponse::for_epsilon(0, 1.0).is_err());
        for epsilon in [0.0, -1.0, f64::NAN, 17.0] {
            let error = CategoricalResponse::for_epsilon(4, epsilon).unwrap_err().to_string();
            assert!(error.starts_with("epsilon is ") && error.ends_with("from 1e-3 to 16"), "{error}");
        }
        let response = CategoricalResponse::new(4, 0.7).unwrap();
        let error = response.answer(4).unwrap_err().to_string();
        assert_eq!(error, "truth is 4; it must be below the number of categories");
        assert!(response.estimate(&[1, 2, 3]).is_err() && response.estimate(&[0; 4]).is_err());
        assert!(BooleanResponse::new(0.75).unwrap().estimate(3, 2).is_err());
    }
}
