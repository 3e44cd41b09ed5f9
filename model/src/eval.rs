//! How well a model, with or without an adapter, predicts given text. One thread; no gradients.

mod guess;

use crate::adapter::Adapter;
use crate::base::BaseModel;
use crate::batch::{Batch, InputError, check_ids};
use crate::decoder::Decoder;
use crate::kernels::scratch::buffer;

pub use guess::{Guess, guesses};

/// Tokens that run through the layers together.
const GROUP_TOKENS: usize = 1024;

/// Mean quality over a set of predictions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Mean negative log-likelihood in nats per token.
    pub nll: f64,
    /// Share of predictions whose most likely token is the right one.
    pub accuracy: f64,
    /// Predictions made.
    pub tokens: u64,
}

impl Evaluation {
    /// The mean over several sets of predictions, weighted by their tokens; `None` without any token.
    #[must_use]
    pub fn merge(parts: &[Self]) -> Option<Self> {
        let tokens: u64 = parts.iter().map(|p| p.tokens).sum();
        let mean =
            |f: fn(&Self) -> f64| parts.iter().map(|p| f(p) * p.tokens as f64).sum::<f64>() / tokens as f64;
        (tokens > 0).then(|| Self { nll: mean(|p| p.nll), accuracy: mean(|p| p.accuracy), tokens })
    }
}

/// Predicts each block's ids but the first from those before them.
///
/// Blocks are grouped in their order, so the same blocks give the same bits; another split of them over
/// several calls may differ in the last digits.
///
/// # Errors
/// [`InputError`] if a block is shorter than two ids, longer than the context plus one, or holds an unknown id,
/// or if the adapter is for a model of another shape.
pub fn evaluate(
    base: &BaseModel,
    adapter: Option<&Adapter>,
    blocks: &[Vec<u32>],
) -> Result<Evaluation, InputError> {
    let longest = blocks.iter().map(Vec::len).max().unwrap_or(0);
    let decoder = Decoder::new(base, adapter, longest.saturating_sub(1))?;
    let (mut nll_sum, mut hits, mut tokens) = (0f64, 0u64, 0u64);
    for group in groups(blocks, longest) {
        let batch = Batch::from_blocks(&group.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
        batch.check(base.config.vocab_size, base.config.context_length)?;
        let mut nll = buffer(batch.targets.len());
        let hidden = decoder.hidden(&batch.inputs, batch.length);
        hits += decoder.head().score(&hidden, &batch.targets, &mut nll);
        nll_sum += nll.iter().map(|x| f64::from(*x)).sum::<f64>();
        tokens += batch.predicted() as u64;
    }
    if tokens == 0 {
        return Err(InputError::TooShort { found: 0, needed: 2 });
    }
    Ok(Evaluation { nll: nll_sum / tokens as f64, accuracy: hits as f64 / tokens as f64, tokens })
}

fn groups(blocks: &[Vec<u32>], longest: usize) -> std::slice::Chunks<'_, Vec<u32>> {
    blocks.chunks((GROUP_TOKENS / longest.max(1)).max(1))
}

/// Negative log-likelihood of `ids[1..]`, each from those before it, in nats.
///
/// # Errors
/// As [`evaluate`].
pub fn token_nlls(base: &BaseModel, adapter: Option<&Adapter>, ids: &[u32]) -> Result<Vec<f32>, InputError> {
    let batch = Batch::from_blocks(&[ids])?;
    let decoder = Decoder::new(base, adapter, batch.length)?;
    batch.check(base.config.vocab_size, base.config.context_length)?;
    let mut nll = vec![0f32; batch.length];
    decoder.head().score(&decoder.hidden(&batch.inputs, batch.length), &batch.targets, &mut nll);
    Ok(nll)
}

/// Logits of the token after `ids`, `[vocabulary]`.
///
/// # Errors
/// As [`evaluate`], for no ids at all.
pub fn last_logits(base: &BaseModel, adapter: Option<&Adapter>, ids: &[u32]) -> Result<Vec<f32>, InputError> {
    if ids.is_empty() {
        return Err(InputError::TooShort { found: 0, needed: 1 });
    }
    let decoder = Decoder::new(base, adapter, ids.len())?;
    check_ids(ids, base.config.vocab_size)?;
    let hidden = decoder.hidden(ids, ids.len());
    Ok(decoder.head().logits(&hidden[(ids.len() - 1) * base.config.hidden..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Projection;
    use crate::fixtures::{adapter, base, blocks, layout};

    #[test]
    fn the_mean_is_that_of_the_tokens() {
        let base = base();
        let adapter = adapter(&layout(&base.config, &Projection::ALL, false));
        let mut blocks = blocks(&base.config, 9, 30);
        blocks[4].truncate(11);
        let all: Vec<f64> = blocks
            .iter()
            .flat_map(|b| token_nlls(&base, Some(&adapter), b).unwrap())
            .map(f64::from)
            .collect();
        let found = evaluate(&base, Some(&adapter), &blocks).unwrap();
        assert_eq!(found.tokens, 8 * 30 + 10);
        assert!((found.nll - all.iter().sum::<f64>() / all.len() as f64).abs() < 1e-5);
        let halves = [&blocks[..4], &blocks[4..]].map(|b| evaluate(&base, Some(&adapter), b).unwrap());
        let merged = Evaluation::merge(&halves).unwrap();
        assert!((merged.nll - found.nll).abs() < 1e-6 && merged.tokens == found.tokens);
        assert!((merged.accuracy - found.accuracy).abs() < 1e-9);
        assert_ne!(found.nll, evaluate(&base, None, &blocks).unwrap().nll);
    }

    #[test]
    fn likelihoods_and_logits_agree() {
        let base = base();
        let ids = blocks(&base.config, 1, 20).remove(0);
        let logits = last_logits(&base, None, &ids[..20]).unwrap();
        let log_sum = logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
        let nll = token_nlls(&base, None, &ids).unwrap();
        assert!((log_sum - f64::from(logits[ids[20] as usize]) - f64::from(nll[19])).abs() < 1e-5);
    }

    #[test]
    fn an_untrained_adapter_changes_nothing() {
        let base = base();
        let fresh = Adapter::init(layout(&base.config, &[Projection::Q, Projection::Gate], true));
        let blocks = blocks(&base.config, 3, 12);
        assert_eq!(evaluate(&base, Some(&fresh), &blocks).unwrap(), evaluate(&base, None, &blocks).unwrap());
    }

    #[test]
    fn nothing_and_too_much_are_refused() {
        let base = base();
        assert!(matches!(evaluate(&base, None, &[]), Err(InputError::TooShort { .. })));
        assert!(matches!(
            evaluate(&base, None, &[vec![0; 302]]),
            Err(InputError::TooLong { found: 301, limit: 300 })
        ));
        assert!(matches!(last_logits(&base, None, &[99_999]), Err(InputError::UnknownToken { .. })));
    }
}
