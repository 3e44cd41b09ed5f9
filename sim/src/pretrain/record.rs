//! The training record that is written beside a pretrained model: enough to repeat the run and to judge it.

use serde::Serialize;
use sha2::{Digest, Sha256};

/// What the model is and what it was made of; its hash goes into the model file.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Recipe {
    pub(super) name: String,
    pub(super) vocab_size: usize,
    pub(super) hidden: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) feed_forward: usize,
    pub(super) corpus: Vec<(String, String)>,
    pub(super) steps: u32,
    pub(super) batch: usize,
    pub(super) block_tokens: usize,
    pub(super) learning_rate: f32,
    pub(super) warmup_steps: u32,
    pub(super) weight_decay: f32,
    pub(super) seed: u64,
}

impl Recipe {
    /// SHA-256 of the recipe as compact JSON, in hex.
    pub(super) fn sha256(&self) -> anyhow::Result<String> {
        Ok(hex::encode(Sha256::digest(serde_json::to_vec(self)?)))
    }
}

/// The whole record.
#[derive(Debug, Serialize)]
pub(super) struct Record {
    pub(super) recipe: Recipe,
    pub(super) recipe_sha256: String,
    pub(super) licence: String,
    pub(super) parameters: u64,
    pub(super) corpus_tokens: usize,
    pub(super) corpus_bytes: usize,
    pub(super) tokens_trained: u64,
    pub(super) threads: usize,
    pub(super) seconds: f64,
    pub(super) file_bytes: usize,
    pub(super) file_sha256: String,
    pub(super) curve: Vec<CurvePoint>,
    pub(super) validation: Measured,
    /// The finished model on a data set it was not trained on, if one was named.
    pub(super) probe: Option<Probe>,
}

/// A point of the learning curve.
#[derive(Clone, Debug, Serialize)]
pub(super) struct CurvePoint {
    pub(super) step: u32,
    /// Mean over the steps since the point before, nats a token.
    pub(super) train_nll: f64,
    /// Of the quantized model on a part of the validation text.
    pub(super) validation_nll: f64,
}

/// How well the quantized file predicts a text.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Measured {
    pub(super) nll_per_token: f64,
    /// Nats a byte of text: comparable between vocabularies.
    pub(super) nll_per_byte: f64,
    pub(super) accuracy: f64,
    pub(super) tokens: u64,
}

/// The finished model on users' texts.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Probe {
    pub(super) data: String,
    pub(super) data_sha256: String,
    pub(super) block_tokens: usize,
    pub(super) seen: Measured,
    pub(super) heldout: Measured,
}
