//! What the device machine asks of its shell, and what the shell answers.

use super::kept::DeviceRecord;
use crate::{
    digest::Digest,
    manifest::ReleaseManifest,
    plan::TaskPlan,
    policy::PopulationPolicy,
    wire::{self, TaskResult},
};
use thiserror::Error;

/// One thing to do; each is answered by one `handle_*` call of the machine.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Call the coordinator: `handle_response` or `handle_call_failed`.
    Call(Request),
    /// Ask the app which tasks it takes part in now: `handle_choice`.
    Choose(PopulationPolicy),
    /// Hold this blob, verified: `handle_fetched` or `handle_call_failed`. Held already is fine.
    Fetch(Digest),
    /// Train: `handle_trained` or `handle_training_failed`.
    Train(Box<TrainOrder>),
    /// Put this on disk in place of what was kept before, durably: `handle_kept` or `handle_keep_failed`.
    Keep(DeviceRecord),
    /// Switch to this release, whose blobs are held: `handle_installed` or `handle_install_failed`.
    Install(Box<InstallOrder>),
}

/// A call to the coordinator.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// TaskService.CheckIn.
    CheckIn(wire::CheckInRequest),
    /// TaskService.ReportTaskResult.
    ReportTaskResult(wire::ReportTaskResultRequest),
    /// BlobService.WriteBlobChunk.
    WriteBlobChunk(wire::WriteBlobChunkRequest),
    /// AggregationService.SubmitUpdate.
    SubmitUpdate(wire::SubmitUpdateRequest),
    /// AggregationService.AdvertiseKeys.
    AdvertiseKeys(wire::AdvertiseKeysRequest),
    /// AggregationService.ShareKeys.
    ShareKeys(wire::ShareKeysRequest),
    /// AggregationService.SubmitMaskedUpdate.
    SubmitMaskedUpdate(wire::SubmitMaskedUpdateRequest),
    /// AggregationService.ConfirmSurvivors.
    ConfirmSurvivors(wire::ConfirmSurvivorsRequest),
    /// AggregationService.RevealShares.
    RevealShares(wire::RevealSharesRequest),
    /// ReleaseService.ReportRelease.
    ReportRelease(wire::ReportReleaseRequest),
}

/// The coordinator's answer to a [`Request`].
#[derive(Debug, Clone, PartialEq)]
pub enum Response {
    /// To [`Request::CheckIn`].
    CheckIn(wire::CheckInResponse),
    /// To [`Request::ReportTaskResult`].
    ReportTaskResult,
    /// To [`Request::WriteBlobChunk`].
    WriteBlobChunk(wire::WriteBlobChunkResponse),
    /// To [`Request::SubmitUpdate`].
    SubmitUpdate(wire::SubmitUpdateResponse),
    /// To [`Request::AdvertiseKeys`].
    AdvertiseKeys(wire::AdvertiseKeysResponse),
    /// To [`Request::ShareKeys`].
    ShareKeys(wire::ShareKeysResponse),
    /// To [`Request::SubmitMaskedUpdate`].
    SubmitMaskedUpdate(wire::SubmitMaskedUpdateResponse),
    /// To [`Request::ConfirmSurvivors`].
    ConfirmSurvivors(wire::ConfirmSurvivorsResponse),
    /// To [`Request::RevealShares`].
    RevealShares(wire::RevealSharesResponse),
    /// To [`Request::ReportRelease`].
    ReportRelease,
}

/// A verified plan to carry out once.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOrder {
    /// The plan.
    pub plan: TaskPlan,
    /// Round, from 0.
    pub round: u32,
    /// Attempt, from 0.
    pub attempt: u32,
    /// The adapter to start from; held.
    pub checkpoint: Digest,
}

/// A verified release to switch to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstallOrder {
    /// Its manifest.
    pub manifest: ReleaseManifest,
}

/// Why training gave no update.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TrainingFailure {
    /// Conditions no longer held.
    #[error("interrupted: {0}")]
    Interrupted(String),
    /// Too few local examples.
    #[error("{held} local training examples; the plan wants {needed}")]
    InsufficientData {
        /// Examples held.
        held: usize,
        /// Examples needed.
        needed: usize,
    },
    /// The plan does not fit the base model or the adapter here.
    #[error("plan refused: {0}")]
    PlanRejected(String),
    /// It does not fit the memory or the time that this device gives to training.
    #[error("beyond this device's budget: {0}")]
    OverBudget(String),
    /// Training diverged or failed.
    #[error("training failed: {0}")]
    Failed(String),
}

impl TrainingFailure {
    pub(super) fn result(&self) -> TaskResult {
        match self {
            Self::Interrupted(_) => TaskResult::Interrupted,
            Self::InsufficientData { .. } => TaskResult::InsufficientData,
            Self::PlanRejected(_) | Self::OverBudget(_) => TaskResult::PlanRejected,
            Self::Failed(_) => TaskResult::TrainingFailed,
        }
    }
}
