//! What must be kept: the progress of a task, the record of a round, a release. The core offers each as a
//! [`Commit`]; the shell makes it durable at once or not at all.

use fleetune_proto::{Digest, Name, ReleaseManifest, UnixMillis};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Names one commit of one core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommitId(pub(crate) u64);

/// All that a task needs to go on after a restart.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TaskProgress {
    /// The round to run next, from 0; the task's number of rounds once it is finished.
    pub round: u32,
    /// The attempt to make next, from 0.
    pub attempt: u32,
    /// The adapter, in its layout's order.
    pub adapter: Vec<f32>,
    /// The server optimizer's state; empty before the first round and for FedAvg.
    pub optimizer_state: Vec<f32>,
    /// The next round's clipping norm under adaptive clipping, once it has moved.
    #[serde(default)]
    pub clipping_norm: Option<f32>,
    /// The protection that all rounds so far ran under ([`fleetune_proto::AggregationPlan::protection`]); empty in
    /// the progress of earlier versions.
    #[serde(default)]
    pub protection: String,
}

/// How an attempt at a round ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RoundOutcome {
    /// The adapter has moved on.
    Finished,
    /// Nothing was learned; the reason in words.
    Failed(String),
}

/// One attempt at one round, for people. Holds nothing of a single device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundRecord {
    /// Round, from 0.
    pub round: u32,
    /// Attempt, from 0.
    pub attempt: u32,
    /// How it ended.
    pub outcome: RoundOutcome,
    /// Devices that joined.
    pub selected: u32,
    /// Contributions in the sum.
    pub completed: u32,
    /// Devices that said they would not contribute.
    pub withdrawn: u32,
    /// L2 norm of the mean update; absent when the round failed.
    pub update_norm: Option<f64>,
    /// How the contributions were added up.
    #[serde(default)]
    pub aggregation: AggregationRecord,
    /// When it opened, milliseconds since 1970.
    pub opened_unix_ms: u64,
    /// When it ended, milliseconds since 1970.
    pub finished_unix_ms: u64,
}

/// How an attempt added contributions up.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct AggregationRecord {
    /// `secagg+` or `insecure_plaintext`; empty in records of earlier versions.
    pub protocol: String,
    /// The cohorts of secure aggregation; none if it did not come to that.
    pub cohorts: Vec<CohortRecord>,
    /// Differential privacy of the round's sums; absent without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub privacy: Option<PrivacyRecord>,
}

/// Differential privacy of one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PrivacyRecord {
    /// Clipping norm that the devices were given.
    pub clipping_norm: f32,
    /// Noised share of updates that were within it; only with adaptive clipping.
    pub unclipped: Option<f64>,
    /// Standard deviation of the noise on a coordinate of the mean, in the update's units.
    pub noise_deviation: Option<f64>,
}

/// One cohort of secure aggregation.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CohortRecord {
    /// Devices in the roster.
    pub members: u32,
    /// Neighbours of each.
    pub degree: u32,
    /// Shares that rebuild a secret.
    pub threshold: u32,
    /// Devices lost in steps 1 to 4: sharing, masking, confirming, revealing.
    pub dropouts: [u32; 4],
    /// Vectors in the sum; absent if the cohort failed.
    pub survivors: Option<u32>,
    /// Why it failed.
    pub failure: Option<String>,
}

/// A release with the envelope that devices receive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedRelease {
    /// The manifest inside the envelope.
    pub manifest: ReleaseManifest,
    /// The signed manifest.
    pub envelope: Vec<u8>,
}

impl PublishedRelease {
    /// Its version, from 1.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.manifest.version
    }

    /// True until it expires.
    #[must_use]
    pub fn is_valid(&self, now: UnixMillis) -> bool {
        self.manifest.expires > now
    }
}

/// What the shell makes durable in one step, and then names to [`super::Core::handle_committed`]. Until
/// then the task stands still.
#[derive(Debug, Clone)]
pub struct Commit {
    /// Names the commit.
    pub id: CommitId,
    /// The task.
    pub task: Name,
    /// The adapter checkpoint that the task's next attempt starts from.
    pub checkpoint: Digest,
    /// New blobs that devices will read: the checkpoint if it is new, and a release's adapter.
    pub blobs: Vec<(Digest, Arc<Vec<u8>>)>,
    /// The task's new progress.
    pub progress: Arc<TaskProgress>,
    /// The attempt that led here; absent when a task begins or is resumed.
    pub record: Option<RoundRecord>,
    /// The release that the last round gave.
    pub release: Option<PublishedRelease>,
}
