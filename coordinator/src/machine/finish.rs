//! The end of an attempt: from the sum to the next adapter, the record and, after the last round, the
//! release. All of it becomes one commit.

use super::{
    CoreSetup,
    commit::{
        AggregationRecord, CohortRecord, Commit, CommitId, PrivacyRecord, PublishedRelease, RoundOutcome,
        RoundRecord, TaskProgress,
    },
    contribution::l2_norm,
    task::{OpenRound, Task, TaskSpec},
};
use fleetune_model::{
    adapter::Adapter,
    adapter_formats::to_gguf_lora,
    base::BaseModel,
    error::AdapterError,
    gguf::Metadata,
    trained::{TrainedLayout, stored},
    weights::WeightFormat,
};
use fleetune_privacy::{PrivacyStatement, StatementParts};
use fleetune_proto::{
    Digest, Purpose, ReleaseManifest, UnixMillis, rotation_context,
    round::{CohortSummary, Phase},
    seal,
};
use fleetune_secagg::RunningSum;
use std::sync::Arc;

/// What the core hands to the end of an attempt.
pub(super) struct Ending<'a> {
    pub(super) setup: &'a CoreSetup,
    pub(super) id: CommitId,
    /// Version that a release would get.
    pub(super) version: u64,
    pub(super) now: UnixMillis,
}

struct Advance {
    values: Vec<f32>,
    optimizer_state: Vec<f32>,
    update_norm: f64,
    clipping_norm: Option<f32>,
    privacy: Option<PrivacyRecord>,
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
            (None, Phase::Selecting | Phase::Collecting | Phase::Aggregating | Phase::Finished) => {
                unreachable!("an attempt that is over is finished with a sum, or failed")
            }
        }
    }

    fn finished(&self, task: &Task, open: &OpenRound, step: Advance) -> Result<Commit, AdapterError> {
        let bytes = Arc::new(task.layout.to_checkpoint_bytes(&step.values));
        let checkpoint = Digest::of(&bytes);
        let mut commit = Commit {
            id: self.id,
            task: task.spec.name.clone(),
            checkpoint,
            blobs: vec![(checkpoint, bytes)],
            progress: Arc::clone(&task.progress),
            record: Some(self.record(open, RoundOutcome::Finished, Some(step.update_norm), step.privacy)),
            release: None,
        };
        let round = task.progress.round + 1;
        self.release_if_last(task, round, &step.values, &mut commit)?;
        let (adapter, optimizer_state) = (step.values, step.optimizer_state);
        let clipping_norm = step.clipping_norm;
        let protection = task.progress.protection.clone();
        let progress =
            TaskProgress { round, attempt: 0, adapter, optimizer_state, clipping_norm, protection };
        commit.progress = Arc::new(progress);
        Ok(commit)
    }

    /// The attempt gave nothing. The round is tried again, unless devices have revealed shares for it: they
    /// do that once a round, so its number is given up and the adapter stays as it is.
    fn failed(&self, task: &Task, open: &OpenRound, reason: String) -> Commit {
        let mut progress = TaskProgress::clone(&task.progress);
        let given_up = open.round.has_revealed() || open.already_revealed > 0;
        let mut reason = [vec![reason], open.round.troubles()].concat().join("; ");
        if given_up {
            reason.push_str("; the round is given up, since devices have revealed shares for it");
            (progress.round, progress.attempt) = (progress.round + 1, 0);
        } else {
            progress.attempt = progress.attempt.saturating_add(1);
        }
        let round = progress.round;
        let mut commit = Commit {
            id: self.id,
            task: task.spec.name.clone(),
            checkpoint: task.checkpoint,
            blobs: Vec::new(),
            progress: Arc::new(progress),
            record: Some(self.record(open, RoundOutcome::Failed(reason), None, None)),
            release: None,
        };
        self.release_if_last(task, round, &task.progress.adapter, &mut commit)
            .expect("the values were checked when they were made, and their layout fits the base");
        commit
    }

    fn release_if_last(
        &self,
        task: &Task,
        round: u32,
        values: &[f32],
        commit: &mut Commit,
    ) -> Result<(), AdapterError> {
        if round >= task.spec.rounds {
            let gguf = Arc::new(release_bytes(&task.spec, &task.base, &task.layout, values)?);
            commit.release = Some(self.publish(task, Digest::of(&gguf)));
            commit.blobs.push((Digest::of(&gguf), gguf));
        }
        Ok(())
    }

    fn record(
        &self,
        open: &OpenRound,
        outcome: RoundOutcome,
        update_norm: Option<f64>,
        privacy: Option<PrivacyRecord>,
    ) -> RoundRecord {
        let (id, counts) = (open.round.id(), open.round.counts());
        RoundRecord {
            round: id.round,
            attempt: id.attempt,
            outcome,
            selected: counts.selected,
            completed: counts.completed,
            withdrawn: counts.withdrawn,
            update_norm,
            aggregation: AggregationRecord { privacy, ..aggregation_record(open) },
            opened_unix_ms: open.opened.0,
            finished_unix_ms: self.now.0,
        }
    }

    /// `made` is the file that the task made: an adapter for its base, or a model.
    fn publish(&self, task: &Task, made: Digest) -> PublishedRelease {
        let statement = statement(task);
        let (base_model, adapter) = match &task.layout {
            TrainedLayout::Lora(_) => (task.plan.base_model, Some(made)),
            TrainedLayout::Full(_) => (made, None),
        };
        let manifest = ReleaseManifest {
            population: self.setup.population.clone(),
            version: self.version,
            task: task.spec.name.clone(),
            base_model,
            adapter,
            rounds: task.spec.rounds,
            created: self.now,
            expires: self.now.plus(task.spec.release_valid_ms),
            privacy_statement: statement.words(),
            privacy_statement_json: statement.to_json(),
        };
        let envelope = seal(Purpose::Release, manifest.to_bytes(), &[&self.setup.signing_key]);
        PublishedRelease { manifest, envelope }
    }
}

/// What may be said of those who trained the model: it follows from the plan that the devices enforced.
fn statement(task: &Task) -> PrivacyStatement {
    let aggregation = &task.plan.aggregation;
    let parts = StatementParts {
        population: task.plan.population.as_str(),
        task: task.plan.task.as_str(),
        rounds: task.spec.rounds,
        aggregation: if aggregation.secure.is_some() { "secagg+" } else { "insecure_plaintext" },
        survivors_min: aggregation.summands_min,
        summands_max: aggregation.summands_max,
    };
    PrivacyStatement::new(&parts, task.plan.privacy_plan().as_ref())
}

fn aggregation_record(open: &OpenRound) -> AggregationRecord {
    let cohort = |cohort: CohortSummary| CohortRecord {
        members: cohort.members,
        degree: cohort.degrees.degree,
        threshold: cohort.degrees.threshold,
        dropouts: [
            cohort.dropouts.sharing,
            cohort.dropouts.masking,
            cohort.dropouts.confirming,
            cohort.dropouts.revealing,
        ],
        survivors: cohort.outcome.as_ref().ok().copied(),
        failure: cohort.outcome.err(),
    };
    let protocol = if open.round.is_secure() { "secagg+" } else { "insecure_plaintext" };
    let cohorts = open.round.cohorts().into_iter().map(cohort).collect();
    AggregationRecord { protocol: protocol.to_owned(), cohorts, privacy: None }
}

/// Mean, server optimizer, next adapter.
fn advance(task: &Task, sum: &RunningSum) -> Result<Advance, AdapterError> {
    let (mean, privacy) = mean(task, sum);
    let clipping_norm = next_norm(task, privacy.as_ref());
    let mut values = task.progress.adapter.clone();
    let mut optimizer_state = task.progress.optimizer_state.clone();
    task.spec.server_optimizer.step(&mut values, &mut optimizer_state, &mean);
    task.layout.check(&values)?;
    Ok(Advance { values, optimizer_state, update_norm: l2_norm(&mean), clipping_norm, privacy })
}

fn mean(task: &Task, sum: &RunningSum) -> (Vec<f32>, Option<PrivacyRecord>) {
    let (values, contributions) = (sum.sum().to_signed(), sum.contributions());
    let Some(plan) = task.plan.privacy_plan() else {
        let mean = task.plan.aggregation.fixed_point().decode_mean(&values, contributions);
        return (mean.expect("a finished round has between one and summands_max contributions"), None);
    };
    let norm = task.clipping_norm();
    let rotation = rotation_context(&task.plan_sha256, task.progress.round);
    let private = plan.decode_mean(&values, contributions, norm, &rotation);
    let record = PrivacyRecord {
        clipping_norm: norm.value(),
        unclipped: private.unclipped,
        noise_deviation: Some(plan.mean_noise(norm, contributions)),
    };
    (private.mean, Some(record))
}

/// The clipping norm follows the noised share of updates that were within it.
fn next_norm(task: &Task, privacy: Option<&PrivacyRecord>) -> Option<f32> {
    let adaptation = task.plan.aggregation.privacy?.adaptation?;
    let unclipped = privacy?.unclipped?;
    Some(adaptation.next(task.clipping_norm(), unclipped).value())
}

/// What devices run: an adapter as GGUF LoRA in half precision, bound to the base model's hash, or a whole model.
pub(super) fn release_bytes(
    spec: &TaskSpec,
    base: &BaseModel,
    layout: &TrainedLayout,
    values: &[f32],
) -> Result<Vec<u8>, AdapterError> {
    match layout {
        TrainedLayout::Lora(layout) => {
            let adapter = Adapter { layout: Arc::clone(layout), values: values.to_vec() };
            to_gguf_lora(&adapter, base, WeightFormat::F16, &Metadata::default())
        }
        TrainedLayout::Full(layout) => {
            Ok(stored(layout, base, values, spec.release_format)?.to_gguf_bytes(&Metadata::default()))
        }
    }
}
