//! Judging a finished model file on text.

use std::path::Path;

use fleetune_client::data::{self, Dataset, Group};
use fleetune_model::base::BaseModel;
use fleetune_model::eval::evaluate;

use super::record::{Measured, Probe};

/// At most `count` blocks, evenly spread over the text.
pub(super) fn sample(blocks: Vec<Vec<u32>>, count: usize) -> Vec<Vec<u32>> {
    let stride = blocks.len().div_ceil(count).max(1);
    blocks.into_iter().step_by(stride).collect()
}

/// The model's loss on blocks of a text with this many tokens a byte.
pub(super) fn measure(
    model: &BaseModel,
    blocks: &[Vec<u32>],
    tokens_per_byte: f64,
) -> anyhow::Result<Measured> {
    let evaluation = evaluate(model, None, blocks)?;
    Ok(Measured {
        nll_per_token: evaluation.nll,
        nll_per_byte: evaluation.nll * tokens_per_byte,
        accuracy: evaluation.accuracy,
        tokens: evaluation.tokens,
    })
}

/// The model's loss on the evaluation texts of a data set's users.
pub(super) fn probe(model: &BaseModel, path: &Path, block_tokens: usize) -> anyhow::Result<Probe> {
    let data = Dataset::load(path)?;
    Ok(Probe {
        data: path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        data_sha256: hex::encode(data.sha256),
        block_tokens,
        seen: probe_group(model, &data, Group::Train, block_tokens)?,
        heldout: probe_group(model, &data, Group::HeldOut, block_tokens)?,
    })
}

fn probe_group(
    model: &BaseModel,
    data: &Dataset,
    group: Group,
    block_tokens: usize,
) -> anyhow::Result<Measured> {
    let mut blocks = Vec::new();
    let (mut tokens, mut bytes) = (0, 0);
    for user in data.group(group) {
        let texts = user.evaluation_texts();
        let of_user = data::blocks(&model.tokenizer, &texts, block_tokens);
        let read: Vec<u32> = of_user.iter().flat_map(|block| &block[1..]).copied().collect();
        tokens += read.len();
        bytes += model.tokenizer.decode(&read).len();
        blocks.extend(of_user);
    }
    measure(model, &blocks, tokens as f64 / bytes.max(1) as f64)
}
