//! Which token comes next: the likeliest, or a seeded draw from the tokens that top-k, top-p and min-p leave.
//!
//! The filters run in llama.cpp's order: top-k, top-p, min-p, and the temperature last. So top-p and min-p
//! look at the probabilities as the model gave them, and a high temperature does not let unlikely tokens back
//! in. A draw takes one number of the seeded stream, whatever the settings; tokens are walked from the
//! likeliest down until their probabilities have passed that number.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Likeliest tokens that are looked at first where top-k names no number.
const FIRST_LOOK: usize = 256;
/// By how much more tokens are looked at where those were too few.
const LOOK_FURTHER: usize = 8;

/// How the next token is chosen and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits of the tokens that the filters leave; 0 always takes the most likely token.
    pub temperature: f32,
    /// Only the so many most likely tokens; 0 is all of them.
    pub top_k: usize,
    /// Of those, only the most likely that together have this share of their probability; 1 is all of them.
    /// Holtzman et al. 2020, *The Curious Case of Neural Text Degeneration*, section 3.1.
    pub top_p: f32,
    /// Of those, only tokens with at least this share of the likeliest token's probability; 0 is all of them.
    /// Nguyen et al. 2024, *Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs*.
    pub min_p: f32,
    /// Seed of the choices.
    pub seed: u64,
    /// New tokens at most.
    pub max_tokens: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 40, top_p: 0.95, min_p: 0.0, seed: 0, max_tokens: 64 }
    }
}

/// A setting that no choice can follow.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// Negative, infinite or no number.
    #[error("temperature {0}: a finite number, 0 or more")]
    Temperature(f32),
    /// Would leave no token, or is no share.
    #[error("top-p {0}: above 0, at most 1")]
    TopP(f32),
    /// Would leave no token, or is no share.
    #[error("min-p {0}: 0 or more, below 1")]
    MinP(f32),
}

impl Sampling {
    /// Refuses what no choice can follow.
    ///
    /// # Errors
    /// [`SamplingError`] names the setting.
    pub fn check(&self) -> Result<(), SamplingError> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return Err(SamplingError::Temperature(self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(SamplingError::TopP(self.top_p));
        }
        if !(0.0..1.0).contains(&self.min_p) {
            return Err(SamplingError::MinP(self.min_p));
        }
        Ok(())
    }
}

/// Chooses token after token; two of the same settings choose alike.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
    /// Kept between tokens for its room.
    keys: Vec<u64>,
}

impl Sampler {
    /// Begins at the settings' seed.
    ///
    /// # Errors
    /// Those of [`Sampling::check`].
    pub fn new(sampling: &Sampling) -> Result<Self, SamplingError> {
        sampling.check()?;
        let rng = ChaCha8Rng::seed_from_u64(sampling.seed);
        Ok(Self { sampling: sampling.clone(), rng, keys: Vec::new() })
    }

    /// The next token by the logits of all tokens, `[vocab]`. Logits that are not finite are never drawn.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        if self.sampling.temperature == 0.0 {
            return most_likely(logits);
        }
        let point = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let candidates = self.candidates(logits);
        let mut left = point * candidates.iter().map(|(_, weight)| weight).sum::<f64>();
        for (token, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        candidates.last().map_or_else(|| most_likely(logits), |(token, _)| *token)
    }

    /// Tokens left by the filters, most likely first, with weights in proportion to their probability at the
    /// temperature.
    fn candidates(&mut self, logits: &[f32]) -> Vec<(u32, f64)> {
        let kept = self.filter(logits);
        let highest = self.keys.first().map_or(0.0, |key| logit_of(logits, *key));
        let temperature = f64::from(self.sampling.temperature);
        let weight = |key: &u64| (token_of(*key), ((logit_of(logits, *key) - highest) / temperature).exp());
        self.keys[..kept].iter().map(weight).collect()
    }

    /// Leaves the keys of the most likely tokens in `keys`; says how many of them pass every filter.
    fn filter(&mut self, logits: &[f32]) -> usize {
        let Sampling { top_k, top_p, min_p, .. } = self.sampling;
        let (top_p, min_p) = (f64::from(top_p), f64::from(min_p));
        if top_k > 0 && top_k < logits.len() {
            most_likely_keys(logits, top_k, &mut self.keys);
            let weights = plain_weights(logits, &self.keys);
            let total = weights.iter().sum();
            return nucleus(&weights, top_p, total).unwrap_or(weights.len()).min(above(&weights, min_p));
        }
        let mut look = if top_p < 1.0 || min_p > 0.0 { FIRST_LOOK } else { logits.len() };
        let total = if top_p < 1.0 { plain_total(logits) } else { 0.0 };
        loop {
            most_likely_keys(logits, look, &mut self.keys);
            let weights = plain_weights(logits, &self.keys);
            let (by_share, by_floor) = (nucleus(&weights, top_p, total), above(&weights, min_p));
            if by_share.is_some() || by_floor < weights.len() || look >= logits.len() {
                return by_share.unwrap_or(weights.len()).min(by_floor);
            }
            look *= LOOK_FURTHER;
        }
    }
}

/// The likeliest token, the first of equals.
fn most_likely(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best });
    best.unwrap_or(0) as u32
}

/// The keys of the `count` likeliest tokens, likeliest first, of equals the first. One pass with a bound that
/// tightens, so that a vocabulary is not sorted for a few tokens of it.
fn most_likely_keys(logits: &[f32], count: usize, keys: &mut Vec<u64>) {
    keys.clear();
    let full = count.saturating_mul(2).max(64);
    let mut bound = u64::MAX;
    for (token, logit) in logits.iter().enumerate() {
        let key = key(token, *logit);
        if key >= bound || !logit.is_finite() {
            continue;
        }
        keys.push(key);
        if keys.len() == full {
            bound = *keys.select_nth_unstable(count - 1).1;
            keys.truncate(count);
        }
    }
    keys.sort_unstable();
    keys.truncate(count);
}

/// Smaller for a larger logit, then for a smaller token, which is the low half.
fn key(token: usize, logit: f32) -> u64 {
    // A zero has one rank, whatever its sign.
    let bits = (logit + 0.0).to_bits();
    let descending = if bits >> 31 == 0 { !bits & 0x7fff_ffff } else { bits };
    u64::from(descending) << 32 | token as u64
}

fn token_of(key: u64) -> u32 {
    key as u32
}

fn logit_of(logits: &[f32], key: u64) -> f64 {
    f64::from(logits[token_of(key) as usize])
}

/// Probabilities as multiples of the likeliest token's.
fn plain_weights(logits: &[f32], keys: &[u64]) -> Vec<f64> {
    let highest = keys.first().map_or(0.0, |key| logit_of(logits, *key));
    keys.iter().map(|key| (logit_of(logits, *key) - highest).exp()).collect()
}

/// The sum of such multiples over all tokens.
fn plain_total(logits: &[f32]) -> f64 {
    let finite = || logits.iter().filter(|logit| logit.is_finite());
    let highest = f64::from(finite().copied().fold(f32::MIN, f32::max));
    finite().map(|logit| (f64::from(*logit) - highest).exp()).sum()
}

/// How many of the most likely tokens together reach the share `top_p` of `total`, if all of these do.
fn nucleus(weights: &[f64], top_p: f64, total: f64) -> Option<usize> {
    if top_p >= 1.0 {
        return None;
    }
    let mut sum = 0.0;
    let reached = weights.iter().position(|weight| {
        sum += weight;
        sum >= top_p * total
    });
    reached.map(|last| last + 1)
}

/// How many weights are at least `floor`.
fn above(weights: &[f64], floor: f64) -> usize {
    weights.partition_point(|weight| *weight >= floor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::noise;

    fn open() -> Sampling {
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, ..Sampling::default() }
    }

    fn left(sampling: &Sampling, logits: &[f32]) -> Vec<u32> {
        Sampler::new(sampling).unwrap().candidates(logits).iter().map(|(token, _)| *token).collect()
    }

    /// The definition: sort everything, cut three times, temper what is left.
    fn by_definition(sampling: &Sampling, logits: &[f32]) -> Vec<(u32, f64)> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap().then(a.cmp(b)));
        if sampling.top_k > 0 {
            order.truncate(sampling.top_k);
        }
        let p = |token: &usize| (f64::from(logits[*token]) - f64::from(logits[order[0]])).exp();
        let total: f64 = order.iter().map(p).sum();
        let mut sum = 0.0;
        let mut kept = Vec::new();
        for token in &order {
            let enough = sampling.top_p < 1.0 && sum >= f64::from(sampling.top_p) * total;
            if enough || p(token) < f64::from(sampling.min_p) {
                break;
            }
            sum += p(token);
            kept.push((*token as u32, p(token).powf(1.0 / f64::from(sampling.temperature))));
        }
        kept
    }

    #[test]
    fn each_filter_keeps_the_most_likely() {
        // Probabilities .0321 .6439 .0871 .2369.
        let logits = [0.0f32, 3.0, 1.0, 2.0];
        assert_eq!(left(&open(), &logits), [1, 3, 2, 0]);
        assert_eq!(left(&Sampling { top_k: 2, ..open() }, &logits), [1, 3]);
        assert_eq!(left(&Sampling { top_p: 0.5, ..open() }, &logits), [1]);
        assert_eq!(left(&Sampling { top_p: 0.7, ..open() }, &logits), [1, 3]);
        assert_eq!(left(&Sampling { min_p: 0.1, ..open() }, &logits), [1, 3, 2]);
        assert_eq!(left(&Sampling { min_p: 0.2, ..open() }, &logits), [1, 3]);
        assert_eq!(left(&Sampling { min_p: 0.99, ..open() }, &logits), [1]);
    }

    #[test]
    fn top_p_looks_at_what_top_k_left_and_temperature_comes_last() {
        let logits = [0.0f32, 3.0, 1.0, 2.0];
        // Of the two that top-k leaves the first has .731, of all four .644.
        assert_eq!(left(&Sampling { top_k: 2, top_p: 0.7, ..open() }, &logits), [1]);
        for temperature in [0.1, 1.0, 50.0] {
            assert_eq!(left(&Sampling { temperature, top_p: 0.7, ..open() }, &logits), [1, 3]);
            assert_eq!(left(&Sampling { temperature, min_p: 0.2, ..open() }, &logits), [1, 3]);
        }
    }

    #[test]
    fn candidates_are_those_of_the_definition() {
        for (salt, scale) in [(1, 1.0), (2, 4.0), (3, 12.0)] {
            let logits = noise(5000, scale, salt);
            for (top_k, top_p, min_p) in [
                (0, 1.0, 0.0),
                (40, 1.0, 0.0),
                (40, 0.9, 0.05),
                (3000, 0.8, 0.0),
                (0, 0.9, 0.0),
                (0, 0.999, 0.01),
                (0, 1.0, 0.3),
                (9000, 0.5, 0.0),
            ] {
                let sampling = Sampling { temperature: 1.3, top_k, top_p, min_p, ..Sampling::default() };
                let found = Sampler::new(&sampling).unwrap().candidates(&logits);
                let expected = by_definition(&sampling, &logits);
                assert_eq!(found.len(), expected.len(), "{sampling:?} at scale {scale}");
                for (found, expected) in found.iter().zip(&expected) {
                    assert_eq!(found.0, expected.0, "{sampling:?}");
                    assert!((found.1 - expected.1).abs() < 1e-6 * expected.1, "{sampling:?}");
                }
            }
        }
    }

    #[test]
    fn sampling_follows_the_probabilities() {
        let count = |temperature, logits: [f32; 2]| {
            let mut sampler = Sampler::new(&Sampling { temperature, seed: 3, ..open() }).unwrap();
            (0..4000).filter(|_| sampler.choose(&logits) == 1).count()
        };
        let ones = count(1.0, [0.0, 3.0f32.ln()]);
        assert!((2900..3100).contains(&ones), "{ones}");
        // The square root of 9 to 1.
        let ones = count(2.0, [0.0, 9.0f32.ln()]);
        assert!((2900..3100).contains(&ones), "{ones}");
    }

    #[test]
    fn one_seed_chooses_alike() {
        let chosen = |seed| {
            let mut sampler = Sampler::new(&Sampling { seed, ..open() }).unwrap();
            (0..50).map(|salt| sampler.choose(&noise(300, 2.0, salt))).collect::<Vec<_>>()
        };
        assert_eq!(chosen(1), chosen(1));
        assert_ne!(chosen(1), chosen(2));
    }

    #[test]
    fn equals_come_in_the_order_of_their_ids() {
        let mut greedy = Sampler::new(&Sampling::default()).unwrap();
        assert_eq!(greedy.choose(&[1.0, 2.0, 2.0]), 1);
        assert_eq!(left(&open(), &[-1.0, 0.0, -0.0, 0.0, 5.0]), [4, 1, 2, 3, 0]);
        assert_eq!(left(&Sampling { top_k: 70, ..open() }, &[1.0; 500]), (0..70).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_not_finite_is_never_drawn() {
        let logits = [f32::NAN, f32::NEG_INFINITY, 1.0, f32::INFINITY, 0.0];
        for sampling in [open(), Sampling { top_k: 4, ..open() }, Sampling { top_p: 0.99, ..open() }] {
            assert_eq!(left(&sampling, &logits), [2, 4], "{sampling:?}");
        }
        assert_eq!(Sampler::new(&open()).unwrap().choose(&[f32::NAN; 3]), 0);
    }

    #[test]
    fn impossible_settings_are_named() {
        let check = |expected: &str, sampling: Sampling| {
            let error = Sampler::new(&sampling).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        };
        for temperature in [-0.1, f32::NAN, f32::INFINITY] {
            check("temperature", Sampling { temperature, ..open() });
        }
        for top_p in [0.0, -1.0, 1.01, f32::NAN] {
            check("top-p", Sampling { top_p, ..open() });
        }
        for min_p in [1.0, -0.1, f32::NAN] {
            check("min-p", Sampling { min_p, ..open() });
        }
    }
}
