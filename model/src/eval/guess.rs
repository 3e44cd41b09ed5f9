//! Which token a model would have offered at each place of a text, and how high the right one stood: what a keyboard's
//! suggestions are judged by.

use crate::adapter::Adapter;
use crate::base::BaseModel;
use crate::batch::{InputError, check_ids};
use crate::decoder::Decoder;

/// Rows of logits held at once.
const ROWS: usize = 64;

/// A model's answer at one place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guess {
    /// The most likely token; of equals the one with the least id.
    pub best: u32,
    /// Tokens that are more likely than the right one, or as likely with a lesser id; 0: it is the first guess.
    pub rank: u32,
    /// Negative log-likelihood of the right one, nats.
    pub nll: f64,
}

impl Guess {
    /// The answer that scores (logits or logarithms of probabilities) give where `right` was next.
    ///
    /// # Panics
    /// When there is no score of `right`.
    #[must_use]
    pub fn of_scores(scores: &[f32], right: u32) -> Self {
        let score = scores[right as usize];
        let (mut best, mut rank) = (0, 0u32);
        for (id, other) in scores.iter().enumerate() {
            if *other > scores[best] {
                best = id;
            }
            rank += u32::from(*other > score || (*other == score && id < right as usize));
        }
        let top = f64::from(scores[best]);
        let total: f64 = scores.iter().map(|x| (f64::from(*x) - top).exp()).sum();
        Self { best: best as u32, rank, nll: top + total.ln() - f64::from(score) }
    }
}

/// For each block the model's answers at its ids but the first, each from those before it.
///
/// # Errors
/// [`InputError`] if a block is shorter than two ids, longer than the context plus one, or holds an unknown id,
/// or if the adapter is for a model of another shape.
pub fn guesses(
    base: &BaseModel,
    adapter: Option<&Adapter>,
    blocks: &[Vec<u32>],
) -> Result<Vec<Vec<Guess>>, InputError> {
    let longest = blocks.iter().map(Vec::len).max().unwrap_or(0).saturating_sub(1);
    if longest > base.config.context_length {
        return Err(InputError::TooLong { found: longest, limit: base.config.context_length });
    }
    let decoder = Decoder::new(base, adapter, longest)?;
    blocks.iter().map(|block| of_block(base, &decoder, block)).collect()
}

fn of_block(base: &BaseModel, decoder: &Decoder<'_>, block: &[u32]) -> Result<Vec<Guess>, InputError> {
    if block.len() < 2 {
        return Err(InputError::TooShort { found: block.len(), needed: 2 });
    }
    check_ids(block, base.config.vocab_size)?;
    let (inputs, rights) = (&block[..block.len() - 1], &block[1..]);
    let hidden = decoder.hidden(inputs, inputs.len());
    let mut found = Vec::with_capacity(rights.len());
    for (rows, rights) in hidden.chunks(ROWS * base.config.hidden).zip(rights.chunks(ROWS)) {
        let logits = decoder.head().logits(rows);
        let rows = logits.chunks_exact(base.config.vocab_size);
        found.extend(rows.zip(rights).map(|(row, right)| Guess::of_scores(row, *right)));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Projection;
    use crate::eval::{evaluate, token_nlls};
    use crate::fixtures::{adapter, base, blocks, layout};

    #[test]
    fn ranks_count_what_stands_above() {
        let rank = |right| Guess::of_scores(&[0.5, 2.0, -1.0, 2.0, 0.5], right).rank;
        assert_eq!([rank(1), rank(3), rank(0), rank(4), rank(2)], [0, 1, 2, 3, 4]);
        assert_eq!(Guess::of_scores(&[0.5, 2.0, -1.0, 2.0], 2).best, 1);
        let even = Guess::of_scores(&[1.0; 8], 5);
        assert!((even.nll - 8f64.ln()).abs() < 1e-12 && even.rank == 5);
    }

    #[test]
    fn guesses_agree_with_the_evaluation() {
        let base = base();
        let adapter = adapter(&layout(&base.config, &Projection::ALL, false));
        let mut blocks = blocks(&base.config, 3, 90);
        blocks[1].truncate(7);
        let found = guesses(&base, Some(&adapter), &blocks).unwrap();
        let evaluation = evaluate(&base, Some(&adapter), &blocks).unwrap();
        let all: Vec<Guess> = found.concat();
        assert_eq!(all.len() as u64, evaluation.tokens);
        let first = all.iter().filter(|guess| guess.rank == 0).count();
        assert!((first as f64 / all.len() as f64 - evaluation.accuracy).abs() < 1e-9);
        for (guesses, block) in found.iter().zip(&blocks) {
            let nlls = token_nlls(&base, Some(&adapter), block).unwrap();
            assert!(guesses.iter().zip(nlls).all(|(g, nll)| (g.nll - f64::from(nll)).abs() < 1e-4));
        }
        assert!(guesses(&base, None, &[vec![1]]).is_err());
        assert!(guesses(&base, None, &[vec![1, 999_999]]).is_err());
    }
}
