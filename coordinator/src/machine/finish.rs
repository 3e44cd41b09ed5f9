//! The end of an attempt: from the sum to the next adapter, the record and, after the last round, the
//! release. All of it becomes one commit.

use super::{
    CoreSetup,
    commit::{Commit, CommitId, PublishedRelease, RoundOutcome, RoundRecord, TaskProgress},
    contribution::l2_norm,
    task::{OpenRound, Task},
};
use fleetune_model::{
    adapter::Adapter, adapter_formats::to_gguf_lora, error::AdapterError, gguf::Metadata,
    weights::WeightFormat,
};
use fleetune_proto::{Digest, Purpose, ReleaseManifest, UnixMillis, round::Phase, seal};
use fleetune_secagg::RunningSum;
use std::sync::Arc;

const PRIVACY_STATEMENT: &str =
    "none: trained without differential privacy and without secure aggregation (insecure_plaintext)";

/// What the core hands to the end of an attempt.
pub(super) struct Ending<'a> {
    pub(super) setup: &'a CoreSetup,
    pub(super) id: CommitId,
    /// Version that a release would get.
    pub(super) version: u64,
    pub(super) now: UnixMillis,
}

struct Advance {
    adapter: Adapter,
    optimizer_state: Vec<f32>,
    update_norm: f64,
}

impl Ending<'_> {
    /// The commit of an attempt that is over.
    pub(super) fn commit(&self, task: &Task, open: &OpenRound) -> Commit {
        match (open.round.sum(), open.round.phase()) {
            (Some(sum), _) => match advance(task, sum).and_then(|step| self.finished(task, open, step)) {
                Ok(commit) => commit,
                Err(error) => self.failed(task, open, error.to_string()),
            },
            (None, Phase::Failed(failure)) => self.failed(task, open, failure.to_string()),
            (None, Phase::Selecting | Phase::Collecting | Phase::Finished) => {
                unreachable!("an attempt that is over is finished with a sum, or failed")
            }
        }
    }

    fn finished(&self, task: &Task, open: &OpenRound, step: Advance) -> Result<Commit, AdapterError> {
        let bytes = Arc::new(step.adapter.to_checkpoint_bytes());
        let checkpoint = Digest::of(&bytes);
        let mut blobs = vec![(checkpoint, bytes)];
        let round = task.progress.round + 1;
        let mut release = None;
        if round >= task.spec.rounds {
            let gguf = Arc::new(release_bytes(task, &step.adapter)?);
            release = Some(self.publish(task, Digest::of(&gguf)));
            blobs.push((Digest::of(&gguf), gguf));
        }
        let progress = TaskProgress {
            round,
            attempt: 0,
            adapter: step.adapter.values,
            optimizer_state: step.optimizer_state,
        };
        let record = Some(self.record(open, RoundOutcome::Finished, Some(step.update_norm)));
        let (id, task, progress) = (self.id, task.spec.name.clone(), Arc::new(progress));
        Ok(Commit { id, task, checkpoint, blobs, progress, record, release })
    }

    fn failed(&self, task: &Task, open: &OpenRound, reason: String) -> Commit {
        let mut progress = TaskProgress::clone(&task.progress);
        progress.attempt = progress.attempt.saturating_add(1);
        Commit {
            id: self.id,
            task: task.spec.name.clone(),
            checkpoint: task.checkpoint,
            blobs: Vec::new(),
            progress: Arc::new(progress),
            record: Some(self.record(open, RoundOutcome::Failed(reason), None)),
            release: None,
        }
    }

    fn record(&self, open: &OpenRound, outcome: RoundOutcome, update_norm: Option<f64>) -> RoundRecord {
        let (id, counts) = (open.round.id(), open.round.counts());
        RoundRecord {
            round: id.round,
            attempt: id.attempt,
            outcome,
            selected: counts.selected,
            completed: counts.completed,
            withdrawn: counts.withdrawn,
            update_norm,
            opened_unix_ms: open.opened.0,
            finished_unix_ms: self.now.0,
        }
    }

    fn publish(&self, task: &Task, adapter: Digest) -> PublishedRelease {
        let manifest = ReleaseManifest {
            population: self.setup.population.clone(),
            version: self.version,
            task: task.spec.name.clone(),
            base_model: task.plan.base_model,
            adapter,
            rounds: task.spec.rounds,
            created: self.now,
            expires: self.now.plus(task.spec.release_valid_ms),
            privacy_statement: PRIVACY_STATEMENT.to_owned(),
        };
        let envelope = seal(Purpose::Release, manifest.to_bytes(), &[&self.setup.signing_key]);
        PublishedRelease { manifest, envelope }
    }
}

/// Mean, server optimizer, next adapter.
fn advance(task: &Task, sum: &RunningSum) -> Result<Advance, AdapterError> {
    let grid = task.plan.aggregation.fixed_point();
    let mean = grid
        .decode_mean(&sum.sum().to_signed(), sum.contributions())
        .expect("a finished round has between one and summands_max contributions");
    let mut values = task.progress.adapter.clone();
    let mut optimizer_state = task.progress.optimizer_state.clone();
    task.spec.server_optimizer.step(&mut values, &mut optimizer_state, &mean);
    let adapter = Adapter::new(task.layout.clone(), values)?;
    Ok(Advance { adapter, optimizer_state, update_norm: l2_norm(&mean) })
}

/// The adapter as devices run it: GGUF LoRA in half precision, bound to the base model's hash.
fn release_bytes(task: &Task, adapter: &Adapter) -> Result<Vec<u8>, AdapterError> {
    to_gguf_lora(adapter, &task.base, WeightFormat::F16, &Metadata::default())
}
