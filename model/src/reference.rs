//! SmolLM2-135M-Instruct against figures computed by transformers in f32 (`data/reference/`). The model file is
//! not in the repository: without it these tests say that they were skipped.

use std::env;
use std::path::PathBuf;

use serde::Deserialize;

use crate::base::BaseModel;
use crate::eval::{evaluate, last_logits, token_nlls};

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

#[derive(Deserialize)]
struct Logits {
    paragraph_ids: Vec<u32>,
    paragraph_nll: Vec<f32>,
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    text: String,
    ids: Vec<u32>,
    top5_ids: Vec<usize>,
    top5_logits: Vec<f32>,
    logsumexp: f64,
    greedy16_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct EvalBlocks {
    seen: Vec<EvalBlock>,
    heldout: Vec<EvalBlock>,
}

#[derive(Deserialize)]
struct EvalBlock {
    ids: Vec<u32>,
}

/// The model named by `FLEETUNE_SMOLLM2` or in the user's cache folder, if it is there.
pub(crate) fn smollm2() -> Option<BaseModel> {
    let cache = || {
        env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))
    };
    let path = env::var_os("FLEETUNE_SMOLLM2")
        .map(PathBuf::from)
        .or_else(|| Some(cache()?.join("fleetune").join(FILE)))?;
    if !path.exists() {
        eprintln!("skipped: {} is not there (set FLEETUNE_SMOLLM2)", path.display());
        return None;
    }
    Some(BaseModel::open(&path).unwrap())
}

fn logits() -> Logits {
    serde_json::from_str(include_str!("../data/reference/smollm2_logits.json")).unwrap()
}

/// The reference paragraph's ids.
pub(crate) fn paragraph() -> Vec<u32> {
    logits().paragraph_ids
}

#[test]
fn every_token_of_the_paragraph_has_its_likelihood() {
    let Some(base) = smollm2() else { return };
    let reference = logits();
    let found = token_nlls(&base, None, &reference.paragraph_ids).unwrap();
    assert_eq!(found.len(), reference.paragraph_nll.len());
    for (position, (found, expected)) in found.iter().zip(&reference.paragraph_nll).enumerate() {
        assert!((found - expected).abs() < 1e-4, "token {position}: {found}, expected {expected}");
    }
}

#[test]
fn prompts_have_their_logits_and_greedy_continuations() {
    let Some(base) = smollm2() else { return };
    for prompt in logits().prompts {
        let logits = last_logits(&base, None, &prompt.ids).unwrap();
        for (id, expected) in prompt.top5_ids.iter().zip(&prompt.top5_logits) {
            assert!(
                (logits[*id] - expected).abs() < 1e-2,
                "{:?} token {id}: {}, expected {expected}",
                prompt.text,
                logits[*id]
            );
        }
        let log_sum = logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
        assert!((log_sum - prompt.logsumexp).abs() < 1e-2, "{:?}: {log_sum}", prompt.text);
        let mut ids = prompt.ids.clone();
        for expected in &prompt.greedy16_ids {
            let logits = last_logits(&base, None, &ids).unwrap();
            let likeliest = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
            assert_eq!(likeliest as u32, *expected, "{:?}", prompt.text);
            ids.push(*expected);
        }
    }
}

#[test]
fn the_fixed_blocks_have_the_reference_loss() {
    let Some(base) = smollm2() else { return };
    let blocks: EvalBlocks =
        serde_json::from_str(include_str!("../data/reference/smollm2_eval_blocks.json")).unwrap();
    for (name, blocks, expected) in [("seen", blocks.seen, 4.782), ("held-out", blocks.heldout, 4.723)] {
        let blocks: Vec<Vec<u32>> = blocks.into_iter().map(|b| b.ids).collect();
        let found = evaluate(&base, None, &blocks).unwrap();
        assert!((found.nll - expected).abs() < 0.01, "{name}: {}", found.nll);
        assert!(found.accuracy > 0.1 && found.tokens == 48 * 64, "{name}: {found:?}");
    }
}
