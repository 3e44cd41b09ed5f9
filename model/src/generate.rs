//! Text generation with cached keys and values: greedy, or sampled with temperature, top-k and top-p.

use std::ops::ControlFlow;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::adapter::Adapter;
use crate::base::BaseModel;
use crate::batch::{InputError, check_ids};
use crate::decoder::Decoder;
use crate::kernels::layer::KeyValues;

/// Prompt tokens that run through the layers together.
const PROMPT_CHUNK: usize = 128;

/// How the next token is chosen and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the most likely token.
    pub temperature: f32,
    /// Only the so many most likely tokens; 0 is all of them.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability; 1 is all of them.
    pub top_p: f32,
    /// Seed of the choices.
    pub seed: u64,
    /// New tokens at most.
    pub max_tokens: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 40, top_p: 0.95, seed: 0, max_tokens: 64 }
    }
}

/// Continues `prompt`; hands over each new token as it is made and returns all of them.
///
/// Ends at the tokenizer's end token (which is not returned), after `max_tokens`, when the context is full, or
/// when `on_token` breaks.
///
/// # Errors
/// [`InputError`] if the prompt is empty, does not fit the context or holds an unknown id, or if the adapter is
/// for a model of another shape.
pub fn generate(
    base: &BaseModel,
    adapter: Option<&Adapter>,
    prompt: &[u32],
    sampling: &Sampling,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>, InputError> {
    if prompt.is_empty() {
        return Err(InputError::TooShort { found: 0, needed: 1 });
    }
    check_ids(prompt, base.config.vocab_size)?;
    let positions = (prompt.len() + sampling.max_tokens).min(base.config.context_length).max(prompt.len());
    let decoder = Decoder::new(base, adapter, positions)?;
    let mut session = Session { cache: decoder.cache(), decoder, width: base.config.hidden };
    let mut sampler = Sampler { sampling, rng: ChaCha8Rng::seed_from_u64(sampling.seed) };
    let mut logits = session.read(prompt);
    let mut made = Vec::new();
    while prompt.len() + made.len() < positions {
        let token = sampler.choose(&logits);
        if base.tokenizer.eos() == Some(token) {
            break;
        }
        made.push(token);
        if on_token(token).is_break() || prompt.len() + made.len() == positions {
            break;
        }
        logits = session.read(&[token]);
    }
    Ok(made)
}

struct Session<'a> {
    decoder: Decoder<'a>,
    cache: Vec<KeyValues>,
    width: usize,
}

impl Session<'_> {
    /// Takes in ids and returns the logits of the token after them.
    fn read(&mut self, ids: &[u32]) -> Vec<f32> {
        let mut logits = Vec::new();
        for chunk in ids.chunks(PROMPT_CHUNK) {
            let hidden = self.decoder.extend(chunk, &mut self.cache);
            if std::ptr::eq(chunk.as_ptr_range().end, ids.as_ptr_range().end) {
                logits = self.decoder.head().logits(&hidden[hidden.len() - self.width..]);
            }
        }
        logits
    }
}

struct Sampler<'a> {
    sampling: &'a Sampling,
    rng: ChaCha8Rng,
}

impl Sampler<'_> {
    fn choose(&mut self, logits: &[f32]) -> u32 {
        if self.sampling.temperature <= 0.0 {
            return most_likely(logits);
        }
        let candidates = self.candidates(logits);
        let total: f64 = candidates.iter().map(|(_, p)| p).sum();
        let mut point = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        for (token, p) in &candidates {
            point -= p;
            if point < 0.0 {
                return *token;
            }
        }
        candidates.last().map_or_else(|| most_likely(logits), |(token, _)| *token)
    }

    /// Tokens left by top-k and top-p with weights in proportion to their probability, most likely first.
    fn candidates(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let k = if self.sampling.top_k == 0 { order.len() } else { self.sampling.top_k.min(order.len()) };
        if k < order.len() {
            order.select_nth_unstable_by(k, by_logit);
            order.truncate(k);
        }
        order.sort_unstable_by(by_logit);
        let highest = f64::from(logits[order[0] as usize]);
        let temperature = f64::from(self.sampling.temperature);
        let weight = |token: &u32| ((f64::from(logits[*token as usize]) - highest) / temperature).exp();
        let mut candidates: Vec<(u32, f64)> = order.iter().map(|t| (*t, weight(t))).collect();
        candidates.truncate(nucleus(&candidates, f64::from(self.sampling.top_p)));
        candidates
    }
}

/// How many of the most likely tokens together reach the share `top_p`; at least one.
fn nucleus(candidates: &[(u32, f64)], top_p: f64) -> usize {
    let total: f64 = candidates.iter().map(|(_, p)| p).sum();
    let mut sum = 0.0;
    let reached = candidates.iter().position(|(_, p)| {
        sum += p;
        sum >= top_p * total
    });
    reached.map_or(candidates.len(), |i| i + 1)
}

fn most_likely(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best });
    best.unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Projection;
    use crate::eval::last_logits;
    use crate::fixtures::{adapter, base, blocks, layout};

    fn sampler(sampling: &Sampling) -> Sampler<'_> {
        Sampler { sampling, rng: ChaCha8Rng::seed_from_u64(sampling.seed) }
    }

    #[test]
    fn top_k_and_top_p_keep_the_most_likely() {
        let logits = [0.0f32, 3.0, 1.0, 2.0];
        let tokens = |top_k, top_p| {
            let sampling = Sampling { temperature: 1.0, top_k, top_p, ..Sampling::default() };
            sampler(&sampling).candidates(&logits).iter().map(|(t, _)| *t).collect::<Vec<_>>()
        };
        assert_eq!(tokens(0, 1.0), [1, 3, 2, 0]);
        assert_eq!(tokens(2, 1.0), [1, 3]);
        assert_eq!(tokens(0, 0.5), [1]);
        assert_eq!(tokens(0, 0.7), [1, 3]);
    }

    #[test]
    fn sampling_follows_the_probabilities() {
        let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 3, max_tokens: 0 };
        let mut sampler = sampler(&sampling);
        let logits = [0.0, (3.0f32).ln()];
        let ones = (0..4000).filter(|_| sampler.choose(&logits) == 1).count();
        assert!((2900..3100).contains(&ones), "{ones}");
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(sampler(&Sampling::default()).choose(&[1.0, 2.0, 2.0]), 1);
    }

    #[test]
    fn the_cache_changes_nothing() {
        let base = base();
        let adapter = adapter(&layout(&base.config, &Projection::ALL, false));
        let prompt = &blocks(&base.config, 1, 150)[0];
        let sampling = Sampling { max_tokens: 6, ..Sampling::default() };
        let mut heard = Vec::new();
        let mut hear = |token| {
            heard.push(token);
            ControlFlow::Continue(())
        };
        let made = generate(&base, Some(&adapter), prompt, &sampling, &mut hear).unwrap();
        assert_eq!(heard, made);
        let mut ids = prompt.clone();
        for token in made {
            let logits = last_logits(&base, Some(&adapter), &ids).unwrap();
            let best = logits.iter().copied().fold(f32::MIN, f32::max);
            assert!(logits[token as usize] > best - 1e-3);
            ids.push(token);
        }
    }

    #[test]
    fn generation_ends_where_it_must() {
        let base = base();
        let mut sampling =
            Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, max_tokens: 9, ..Sampling::default() };
        let go_on = &mut |_| ControlFlow::Continue(());
        let first = generate(&base, None, &[1, 2], &sampling, go_on).unwrap();
        assert_eq!(generate(&base, None, &[1, 2], &sampling, go_on).unwrap(), first);
        assert_eq!(
            generate(&base, None, &[1, 2], &sampling, &mut |_| ControlFlow::Break(())).unwrap().len(),
            1
        );
        sampling.max_tokens = 5;
        assert!(generate(&base, None, &vec![1; 298], &sampling, go_on).unwrap().len() <= 2);
        sampling.max_tokens = 0;
        assert!(generate(&base, None, &[1], &sampling, go_on).unwrap().is_empty());
        assert!(matches!(generate(&base, None, &[], &sampling, go_on), Err(InputError::TooShort { .. })));
        assert!(matches!(
            generate(&base, None, &[1; 301], &sampling, go_on),
            Err(InputError::TooLong { .. })
        ));
    }
}
