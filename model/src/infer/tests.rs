//! The engine against the f32 path, against itself in other groupings, and against bad input.

use super::*;
use crate::eval::{last_logits, token_nlls};
use crate::fixtures::{adapter, base_of, blocks, config, layout};
use crate::weights::WeightFormat;

fn engine(format: WeightFormat) -> Engine {
    Engine::new(base_of(&config(4, 2, 16), format))
}

fn ids(engine: &Engine, salt: usize, count: usize) -> Vec<u32> {
    blocks(&engine.base().config, salt + 1, count - 1).remove(salt)
}

fn read(engine: &Engine, sequence: &mut Sequence, ids: &[u32]) -> Vec<f32> {
    engine.read(&mut [Span { sequence, ids }]).unwrap()
}

fn probabilities(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::MIN, f32::max);
    let weights: Vec<f64> = logits.iter().map(|x| f64::from(x - most).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / total).collect()
}

/// Kullback-Leibler divergence of q from p, in nats.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let (p, q) = (probabilities(p), probabilities(q));
    p.iter().zip(&q).map(|(p, q)| if *p > 0.0 { p * (p / q).ln() } else { 0.0 }).sum()
}

#[test]
fn f32_weights_give_the_f32_path_and_quantized_ones_stay_close() {
    for (format, bound) in [
        (WeightFormat::F32, 1e-5),
        (WeightFormat::Q8_0, 2e-3),
        (WeightFormat::Q4_1, 2e-3),
        (WeightFormat::Q4_0, 2e-3),
    ] {
        let engine = engine(format);
        let adapter = adapter(&layout(&engine.base().config, &Projection::ALL, false));
        let loaded = engine.load_adapter(&adapter).unwrap();
        for (own, loaded) in [(None, None), (Some(&adapter), Some(loaded))] {
            // 280 tokens are more than one pass.
            for count in [1, 7, 280] {
                let ids = ids(&engine, 1, count);
                let expected = last_logits(engine.base(), own, &ids).unwrap();
                let found = read(&engine, &mut engine.sequence(loaded.clone()), &ids);
                let kl = divergence(&expected, &found);
                assert!(kl < bound, "{format:?}, {count} tokens: {kl}");
            }
        }
    }
}

#[test]
fn one_token_after_the_other_is_the_whole() {
    let engine = engine(WeightFormat::Q8_0);
    let ids = ids(&engine, 0, 40);
    let whole = read(&engine, &mut engine.sequence(None), &ids);
    let mut sequence = engine.sequence(None);
    let mut last = Vec::new();
    for id in &ids {
        last = read(&engine, &mut sequence, &[*id]);
    }
    assert_eq!(sequence.len(), 40);
    let most = whole.iter().zip(&last).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(most < 1e-3, "{most}");
}

/// Who shares a batch changes nothing for anybody in it.
#[test]
fn sequences_with_different_adapters_are_read_together_as_if_alone() {
    let engine = engine(WeightFormat::Q4_1);
    let layout = layout(&engine.base().config, &[Projection::Q, Projection::Down], false);
    let loaded = engine.load_adapter(&adapter(&layout)).unwrap();
    let mut sequences: Vec<Sequence> =
        [None, Some(loaded.clone()), None, Some(loaded)].into_iter().map(|a| engine.sequence(a)).collect();
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| ids(&engine, i / 2, 3 + 2 * (i / 2))).collect();
    for (sequence, prompt) in sequences.iter_mut().zip(&prompts) {
        read(&engine, sequence, prompt);
    }
    let mut spans: Vec<Span<'_>> =
        sequences.iter_mut().map(|sequence| Span { sequence, ids: &[5] }).collect();
    let together = engine.read(&mut spans).unwrap();
    let width = together.len() / 4;
    for (i, prompt) in prompts.iter().enumerate() {
        let mut alone = engine.sequence(sequences[i].adapter.clone());
        read(&engine, &mut alone, prompt);
        assert_eq!(together[i * width..(i + 1) * width], read(&engine, &mut alone, &[5]), "sequence {i}");
    }
    assert_ne!(together[..width], together[width..2 * width], "the adapter does something");
}

#[test]
fn a_sequence_that_was_cut_goes_on_as_if_it_had_never_been_longer() {
    let engine = engine(WeightFormat::Q4_0);
    let ids = ids(&engine, 0, 30);
    let (mut long, mut short) = (engine.sequence(None), engine.sequence(None));
    read(&engine, &mut long, &ids);
    read(&engine, &mut short, &ids[..11]);
    long.truncate(11);
    long.truncate(20);
    assert_eq!(long.len(), 11);
    assert_eq!(read(&engine, &mut long, &ids[20..]), read(&engine, &mut short, &ids[20..]));
}

#[test]
fn texts_are_scored_token_by_token() {
    let engine = engine(WeightFormat::F32);
    let ids = ids(&engine, 0, 90);
    let expected = token_nlls(engine.base(), None, &ids).unwrap();
    let found = engine.token_nlls(&mut engine.sequence(None), &ids).unwrap();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-2, "{found}, expected {expected}");
    }
}

#[test]
fn bad_input_is_refused_before_anything_is_taken_in() {
    let engine = engine(WeightFormat::Q8_0);
    let mut good = engine.sequence(None);
    let mut other = engine.sequence(None);
    let limit = engine.base().config.context_length;
    let vocab = engine.base().config.vocab_size as u32;
    let mut check = |ids: &[u32], expected: &str| {
        let mut spans = [Span { sequence: &mut good, ids: &[1] }, Span { sequence: &mut other, ids }];
        let error = engine.read(&mut spans).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(good.is_empty() && other.is_empty());
    };
    check(&[], "no tokens");
    check(&[1, vocab], "outside the vocabulary");
    check(&vec![1; limit + 1], "exceed the limit");
    let error = engine.token_nlls(&mut good, &[1]).unwrap_err();
    assert!(matches!(error, InputError::TooShort { found: 1, needed: 2 }));
}

/// SmolLM2: the integer path beside the f32 path, by the measure that other programs' are held to.
#[test]
fn smollm2_in_eight_bits_stays_close_to_f32() {
    let Some(base) = crate::reference::smollm2() else { return };
    let engine = Engine::new(Arc::new(base));
    let ids = crate::reference::paragraph();
    let expected = token_nlls(engine.base(), None, &ids).unwrap();
    let found = engine.token_nlls(&mut engine.sequence(None), &ids).unwrap();
    let mean = |nlls: &[f32]| nlls.iter().map(|x| f64::from(*x)).sum::<f64>() / nlls.len() as f64;
    assert!((mean(&found) - mean(&expected)).abs() < 0.02, "{} and {}", mean(&found), mean(&expected));
    let mut sequence = engine.sequence(None);
    let mut total = 0.0;
    for end in 1..ids.len() {
        let logits = read(&engine, &mut sequence, &ids[end - 1..end]);
        total += divergence(&last_logits(engine.base(), None, &ids[..end]).unwrap(), &logits);
    }
    let kl = total / (ids.len() - 1) as f64;
    eprintln!("mean NLL {} in f32, {} in 8 bits; KL {kl}", mean(&expected), mean(&found));
    assert!(kl < 0.01, "{kl}");
}
