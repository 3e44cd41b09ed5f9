//! Text generation with cached keys and values. How a token is chosen is in `generate/sample.rs`, how tokens
//! become text that can be shown at once in `generate/stream.rs`.

mod sample;
mod stream;

use std::ops::ControlFlow;

use crate::adapter::Adapter;
use crate::base::BaseModel;
use crate::batch::{InputError, check_ids};
use crate::decoder::Decoder;
use crate::kernels::layer::KeyValues;
pub use sample::{Sampler, Sampling, SamplingError};
pub use stream::{Answer, EndReason, Ends, Piece, TextStream, generate_text};

/// Prompt tokens that run through the layers together.
const PROMPT_CHUNK: usize = 128;

/// Continues `prompt`; hands over each new token as it is made and returns all of them.
///
/// Ends at the tokenizer's end token (which is not returned), after `max_tokens`, when the context is full, or
/// when `on_token` breaks.
///
/// # Errors
/// [`InputError`] if the prompt is empty, does not fit the context or holds an unknown id, if the adapter is
/// for a model of another shape, or if no choice can follow the sampling's settings.
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
    let mut sampler = Sampler::new(sampling)?;
    let positions = (prompt.len() + sampling.max_tokens).min(base.config.context_length).max(prompt.len());
    let decoder = Decoder::new(base, adapter, positions)?;
    let mut session = Session { cache: decoder.cache(), decoder, width: base.config.hidden };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Projection;
    use crate::eval::last_logits;
    use crate::fixtures::{adapter, base, blocks, layout};

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
        sampling.top_p = 0.0;
        let error = generate(&base, None, &[1], &sampling, go_on);
        assert_eq!(error, Err(InputError::Sampling(SamplingError::TopP(0.0))));
    }
}
