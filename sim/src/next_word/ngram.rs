//! Counting as a predictor: bigrams with absolute discounting that back off to unigrams (Ney, Essen and Kneser 1994).

use fleetune_model::eval::Guess;
use std::collections::BTreeMap;

/// Taken from each bigram's count and given to the unigrams.
const DISCOUNT: f64 = 0.75;

/// Counts of tokens, and of tokens after tokens.
pub(super) struct Bigrams {
    /// Logarithm of each token's share, one added to each count.
    unigrams: Vec<f64>,
    /// After each token: how often each other came.
    after: Vec<BTreeMap<u32, u32>>,
}

impl Bigrams {
    pub(super) fn count<'a>(vocabulary: usize, blocks: impl Iterator<Item = &'a Vec<u32>>) -> Self {
        let (mut counts, mut after) = (vec![1u64; vocabulary], vec![BTreeMap::new(); vocabulary]);
        for block in blocks {
            for pair in block.windows(2) {
                counts[pair[1] as usize] += 1;
                *after[pair[0] as usize].entry(pair[1]).or_insert(0) += 1;
            }
        }
        let total = counts.iter().sum::<u64>() as f64;
        Self { unigrams: counts.iter().map(|count| *count as f64 / total).collect(), after }
    }

    /// Guesses at a block's ids but the first, each from the one before, or without looking at it.
    pub(super) fn guesses(&self, block: &[u32], with_context: bool) -> Vec<Guess> {
        let guess = |pair: &[u32]| {
            let probabilities = if with_context { self.after(pair[0]) } else { self.unigrams.clone() };
            #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
            let scores: Vec<f32> = probabilities.iter().map(|p| p.ln() as f32).collect();
            Guess::of_scores(&scores, pair[1])
        };
        block.windows(2).map(guess).collect()
    }

    /// The probability of each token after `before`.
    fn after(&self, before: u32) -> Vec<f64> {
        let followers = &self.after[before as usize];
        let total: f64 = followers.values().map(|count| f64::from(*count)).sum();
        if total == 0.0 {
            return self.unigrams.clone();
        }
        let left = DISCOUNT * followers.len() as f64 / total;
        let mut probabilities: Vec<f64> = self.unigrams.iter().map(|share| left * share).collect();
        for (id, count) in followers {
            probabilities[*id as usize] += (f64::from(*count) - DISCOUNT) / total;
        }
        probabilities
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_follow_the_counts() {
        let blocks = [vec![0, 1, 2, 1, 2, 1, 3], vec![1, 2]];
        let bigrams = Bigrams::count(5, blocks.iter());
        for before in 0..5 {
            let sum: f64 = bigrams.after(before).iter().sum();
            assert!((sum - 1.0).abs() < 1e-12, "after {before}: {sum}");
        }
        assert_eq!(bigrams.after(4), bigrams.unigrams, "nothing is known of what follows 4");
        let guesses = bigrams.guesses(&[1, 2, 4], true);
        assert_eq!((guesses[0].best, guesses[0].rank), (2, 0));
        let expected = (3.0 - 0.75) / 4.0 + 0.75 * 2.0 / 4.0 * bigrams.unigrams[2];
        assert!((guesses[0].nll + expected.ln()).abs() < 1e-6);
        let without = bigrams.guesses(&[3, 2, 1], false);
        assert_eq!(without[0].best, without[1].best);
    }
}
