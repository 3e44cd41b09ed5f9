//! Text generation with cached keys and values. How a token is chosen is in `generate/sample.rs`, how tokens
//! become text that can be shown at once in `generate/stream.rs`.

mod sample;
mod stream;

use std::ops::ControlFlow;

use crate::batch::{InputError, check_ids};
use crate::infer::{Engine, Sequence, Span};
pub use sample::{Sampler, Sampling, SamplingError};
pub use stream::{Answer, EndReason, Ends, Piece, TextStream, generate_text};

/// Continues `prompt`; hands over each new token as it is made and returns all of them.
///
/// Of what the sequence holds already, what the prompt begins with is kept and not read again; the rest is
/// forgotten. Ends at the tokenizer's end token (which is not returned), after `max_tokens`, when the context is
/// full, or when `on_token` breaks.
///
/// # Errors
/// [`InputError`] if the prompt is empty, does not fit the context or holds an unknown id, if the sequence is
/// another model's, or if no choice can follow the sampling's settings.
pub fn generate(
    engine: &Engine,
    sequence: &mut Sequence,
    prompt: &[u32],
    sampling: &Sampling,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>, InputError> {
    if prompt.is_empty() {
        return Err(InputError::TooShort { found: 0, needed: 1 });
    }
    let (config, eos) = (&engine.base().config, engine.base().tokenizer.eos());
    check_ids(prompt, config.vocab_size)?;
    let mut sampler = Sampler::new(sampling)?;
    let positions = (prompt.len() + sampling.max_tokens).min(config.context_length).max(prompt.len());
    let kept = sequence.keep_beginning_of(prompt);
    let mut logits = engine.read(&mut [Span { sequence, ids: &prompt[kept..] }])?;
    let mut made = Vec::new();
    while prompt.len() + made.len() < positions {
        let token = sampler.choose(&logits);
        if eos == Some(token) {
            break;
        }
        made.push(token);
        if on_token(token).is_break() || prompt.len() + made.len() == positions {
            break;
        }
        logits = engine.read(&mut [Span { sequence, ids: &[token] }])?;
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Projection;
    use crate::eval::last_logits;
    use crate::fixtures::{adapter, base, blocks, layout};

    fn go(engine: &Engine, prompt: &[u32], sampling: &Sampling) -> Result<Vec<u32>, InputError> {
        generate(engine, &mut engine.sequence(None), prompt, sampling, &mut |_| ControlFlow::Continue(()))
    }

    #[test]
    fn greedy_tokens_are_the_likeliest_of_the_f32_path() {
        let engine = Engine::new(base());
        let base = engine.base();
        let adapter = adapter(&layout(&base.config, &Projection::ALL, false));
        let prompt = &blocks(&base.config, 1, 150)[0];
        let sampling = Sampling { max_tokens: 6, ..Sampling::default() };
        let mut heard = Vec::new();
        let mut hear = |token| {
            heard.push(token);
            ControlFlow::Continue(())
        };
        let mut sequence = engine.sequence(Some(engine.load_adapter(&adapter).unwrap()));
        let made = generate(&engine, &mut sequence, prompt, &sampling, &mut hear).unwrap();
        assert_eq!(heard, made);
        let mut ids = prompt.clone();
        for token in &made {
            let logits = last_logits(base, Some(&adapter), &ids).unwrap();
            let best = logits.iter().copied().fold(f32::MIN, f32::max);
            // Products in 8 bits: nearly as likely is as good.
            assert!(logits[*token as usize] > best - 0.1, "{} of {best}", logits[*token as usize]);
            ids.push(*token);
        }
        // The same again, from a sequence that holds it all, and from one that holds something else.
        for prompt in [prompt.clone(), [&[1, 2], &prompt[..]].concat()] {
            let again =
                generate(&engine, &mut sequence, &prompt, &sampling, &mut |_| ControlFlow::Continue(()));
            let mut fresh = engine.sequence(Some(engine.load_adapter(&adapter).unwrap()));
            let anew = generate(&engine, &mut fresh, &prompt, &sampling, &mut |_| ControlFlow::Continue(()));
            assert_eq!(again, anew);
        }
    }

    #[test]
    fn generation_ends_where_it_must() {
        let engine = Engine::new(base());
        let mut sampling =
            Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, max_tokens: 9, ..Sampling::default() };
        let first = go(&engine, &[1, 2], &sampling).unwrap();
        assert_eq!(go(&engine, &[1, 2], &sampling).unwrap(), first);
        assert_eq!(
            generate(
                &engine,
                &mut engine.sequence(None),
                &[1, 2],
                &sampling,
                &mut |_| ControlFlow::Break(())
            )
            .unwrap()
            .len(),
            1
        );
        sampling.max_tokens = 5;
        assert!(go(&engine, &vec![1; 298], &sampling).unwrap().len() <= 2);
        sampling.max_tokens = 0;
        assert!(go(&engine, &[1], &sampling).unwrap().is_empty());
        assert!(matches!(go(&engine, &[], &sampling), Err(InputError::TooShort { .. })));
        assert!(matches!(go(&engine, &[1; 301], &sampling), Err(InputError::TooLong { .. })));
        sampling.top_p = 0.0;
        let error = go(&engine, &[1], &sampling);
        assert_eq!(error, Err(InputError::Sampling(SamplingError::TopP(0.0))));
    }
}
