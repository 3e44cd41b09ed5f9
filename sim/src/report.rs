//! What a run leaves behind: one value, written as `report.json`, drawn as `report.html`
//! (`report/html.rs`), and printed as a short table.

pub(crate) mod html;
mod privacy;
#[cfg(test)]
mod sample;
mod secure;
pub(crate) mod table;
mod words;

pub use privacy::PrivacyReport;

use crate::next_word::NextWord;
use fleetune_coordinator::{CohortRecord, PrivacyRecord};
use serde::{Deserialize, Serialize};

/// Everything a run found out. `report.json` is this value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the program.
    pub version: String,
    /// The base model.
    pub model: ModelReport,
    /// The data.
    pub data: DataReport,
    /// Seed of everything random in the run.
    pub seed: u64,
    /// The scenario as it was run, defaults filled in.
    pub scenario: serde_json::Value,
    /// One entry a finished round.
    pub rounds: Vec<RoundReport>,
    /// The base model without an adapter.
    pub base: Scores,
    /// Central training on the same number of tokens.
    pub central: CentralReport,
    /// Devices that trained alone.
    pub local_only: LocalOnlyReport,
    /// The federated model.
    pub r#final: FinalReport,
    /// Share of central training's gain over the base that federated training reached.
    pub gain: GainReport,
    /// How often the next token and word were among the first guesses, model by model; empty if it was not asked for.
    #[serde(default)]
    pub next_word: Vec<NextWord>,
    /// The release that devices installed.
    pub release: Option<ReleaseReport>,
    /// Peak resident memory of the process, MiB.
    pub peak_rss_mib: f64,
    /// Wall-clock seconds of the run.
    pub seconds: f64,
    /// Worker threads.
    pub threads: usize,
    /// Aggregation protocol: "secagg+" or "insecure_plaintext".
    pub aggregation: String,
    /// Numbers of secure aggregation; null under the plaintext protocol.
    pub secure_aggregation: Option<SecureReport>,
    /// What is claimed; null for a run without differential privacy.
    pub privacy: Option<PrivacyReport>,
    /// The same in words.
    pub privacy_in_words: String,
}

/// The base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    /// Its name.
    pub name: String,
    /// SHA-256 of its file.
    pub sha256: String,
    /// Parameters of the base.
    pub parameters: u64,
    /// Values that are trained and sent.
    pub trainable: u64,
    /// What they are: "adapter", or "model" for all weights.
    #[serde(default = "adapter")]
    pub trains: String,
}

fn adapter() -> String {
    "adapter".to_owned()
}

/// The data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataReport {
    /// File name.
    pub name: String,
    /// SHA-256 of its bytes.
    pub sha256: String,
    /// Users that may train.
    pub users: usize,
    /// Users never trained on.
    pub heldout_users: usize,
    /// Blocks that seen users are evaluated on.
    pub eval_blocks: usize,
    /// Blocks that held-out users are evaluated on.
    pub heldout_blocks: usize,
    /// Predicted tokens a block.
    pub block_tokens: usize,
}

/// One finished round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Round, from 1.
    pub round: u32,
    /// Failed attempts before it.
    pub failed_attempts: u32,
    /// Devices selected.
    pub selected: u32,
    /// Contributions in the sum.
    pub completed: u32,
    /// Devices lost: vanished, withdrawn or too late.
    pub dropped: u32,
    /// Cohorts of secure aggregation; empty under the plaintext protocol.
    pub cohorts: Vec<CohortRecord>,
    /// Clipping and noise of the round; null without differential privacy.
    pub privacy: Option<PrivacyRecord>,
    /// Mean training NLL of the contributors, nats a token.
    pub train_nll: f64,
    /// NLL on seen users' test text; null where this round was not evaluated.
    pub eval_nll: Option<f64>,
    /// NLL on held-out users' text; null where this round was not evaluated.
    pub heldout_nll: Option<f64>,
    /// L2 norm of the mean update.
    pub update_norm: f64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Virtual seconds of the fleet's life at the end of the round.
    pub virtual_seconds: f64,
    /// Wall-clock seconds that the simulation took.
    pub seconds: f64,
}

/// Secure aggregation over all finished rounds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SecureReport {
    /// Members of the largest cohort.
    pub cohort: u32,
    /// Neighbours of each of them.
    pub k: u32,
    /// Shares that rebuild a secret there.
    pub t: u32,
    /// Cohorts whose sum was opened.
    pub opened: u32,
    /// Cohorts that failed.
    pub failed: u32,
    /// Devices lost, by step.
    pub dropouts: Dropouts,
}

/// Devices lost, by step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Dropouts {
    /// Selected, but never advertised keys: lost while it trained, or too late.
    pub advertise: u32,
    /// Lost before it shared its secrets.
    pub share: u32,
    /// Lost before it delivered its masked update: not in the sum.
    pub mask: u32,
    /// In the sum, lost before it confirmed the survivors.
    pub confirm: u32,
    /// In the sum, lost before it revealed shares.
    pub reveal: u32,
}

/// Two mean NLLs in nats a token, and next-token accuracies.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Seen users' test text.
    pub eval_nll: f64,
    /// Held-out users' text.
    pub heldout_nll: f64,
    /// Share of tokens predicted exactly, seen users.
    pub eval_accuracy: f64,
    /// Share of tokens predicted exactly, held-out users.
    pub heldout_accuracy: f64,
}

/// Central training on the same number of tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CentralReport {
    /// At the end.
    #[serde(flatten)]
    pub scores: Scores,
    /// Tokens trained on.
    pub tokens: u64,
    /// On the way.
    pub curve: Vec<CentralPoint>,
}

/// Central training on the way.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CentralPoint {
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Seen users' test text.
    pub eval_nll: f64,
    /// Held-out users' text.
    pub heldout_nll: f64,
}

/// Devices that trained alone, and the federated model on the same texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LocalOnlyReport {
    /// Mean NLL of the devices' own models on their own test texts.
    pub eval_nll: f64,
    /// The base on the same texts.
    pub base_eval_nll: f64,
    /// The federated model on the same texts.
    pub federated_eval_nll: f64,
    /// Optimizer steps of each.
    pub steps: u32,
    /// One entry a device.
    pub devices: Vec<LocalOnlyDevice>,
}

/// One device that trained alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LocalOnlyDevice {
    /// The user, as the data names it.
    pub user: String,
    /// Base model.
    pub base_nll: f64,
    /// Its own model.
    pub local_nll: f64,
    /// The federated model.
    pub federated_nll: f64,
    /// Predicted tokens of its test text.
    pub tokens: u64,
}

/// The federated model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FinalReport {
    /// Its scores.
    #[serde(flatten)]
    pub scores: Scores,
    /// SHA-256 of the final checkpoint, of an adapter or a model.
    pub adapter_sha256: String,
}

/// (base - federated) / (base - central).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GainReport {
    /// On seen users' test text.
    pub seen: f64,
    /// On held-out users.
    pub heldout: f64,
}

/// The release that devices installed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReleaseReport {
    /// Its version.
    pub version: u64,
    /// Bytes of the quantized base, or of the fully trained model.
    pub base_bytes: u64,
    /// Bytes of the adapter; 0 for a fully trained model.
    pub adapter_bytes: u64,
    /// Devices of the simulation that fetched, verified and opened it.
    pub devices_active: u32,
    /// NLL of the released files, opened as a device opens them, on seen users' test text.
    pub eval_nll: f64,
    /// What the base and the released model say to the same prompts.
    pub samples: Vec<Sample>,
}

/// One prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The prompt.
    pub prompt: String,
    /// The base model's greedy answer.
    pub base: String,
    /// The released model's greedy answer.
    pub released: String,
}
