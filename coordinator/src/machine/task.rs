//! One task: its plan, its progress, and the stage it is in. The stages go committing -> ready -> open ->
//! committing, round by round, until the task is finished or its plan expires.

use super::{
    CoreSetup,
    commit::{Commit, CommitId, TaskProgress},
    error::CoreError,
    finish::release_bytes,
    session::SessionKey,
};
use crate::{
    limits::{ATTEMPT_DELAY_MS_MAX, ATTEMPT_DELAY_MS_MIN, backoff_ms},
    optimizer::ServerOptimizer,
    privacy::PrivacySpec,
};
use fleetune_model::{
    base::BaseModel,
    trained::{TrainedConfig, TrainedLayout},
    weights::WeightFormat,
};
use fleetune_privacy::ClippingNorm;
use fleetune_proto::{
    AdapterPlan, AggregationPlan, Digest, LoraShape, Name, Purpose, SecurePlan, TaskOffer, TaskPlan,
    TrainedShape, TrainingPlan, UnixMillis,
    round::{Participant, Phase, Round, RoundCounts, RoundId, RoundPolicy, SecureSetup},
    seal,
};
use fleetune_secagg::{CohortPlan, DeviceId, SessionId, SessionParts, Terms, solve};
use std::{collections::BTreeSet, sync::Arc};

/// What an operator asks for: one adapter or small model, trained over some rounds, released at the end.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskSpec {
    /// The task.
    pub name: Name,
    /// What is trained.
    pub trained: TrainedConfig,
    /// How a fully trained model is released: F32, F16 or Q8_0. Adapters are released in F16 whatever this says.
    pub release_format: WeightFormat,
    /// Local training.
    pub training: TrainingPlan,
    /// From the update to the aggregate.
    pub aggregation: AggregationPlan,
    /// Rounds to run.
    pub rounds: u32,
    /// Selection and deadlines of a round.
    pub round_policy: RoundPolicy,
    /// From the aggregate to the next adapter.
    pub server_optimizer: ServerOptimizer,
    /// The plan is void after this time.
    pub expires: UnixMillis,
    /// How long the release may be installed.
    pub release_valid_ms: u64,
    /// Differential privacy; `aggregation.privacy` follows from it and is not read.
    pub privacy: Option<PrivacySpec>,
}

/// Where a task stands, for people.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskStatus {
    /// The round that is due, from 0; the number of rounds once it is finished.
    pub round: u32,
    /// Its attempt, from 0.
    pub attempt: u32,
    /// Rounds the task runs.
    pub rounds: u32,
    /// `committing`, `ready`, `selecting`, `collecting`, `aggregating`, `finished` or `expired`.
    pub stage: &'static str,
    /// The numbers of the round that is open.
    pub counts: RoundCounts,
    /// The checkpoint that the round starts from.
    pub checkpoint: Digest,
}

pub(super) struct Task {
    pub(super) spec: TaskSpec,
    pub(super) base: Arc<BaseModel>,
    pub(super) layout: TrainedLayout,
    pub(super) plan: TaskPlan,
    pub(super) plan_envelope: Vec<u8>,
    pub(super) plan_sha256: [u8; 32],
    pub(super) progress: Arc<TaskProgress>,
    pub(super) checkpoint: Digest,
    pub(super) stage: Stage,
    /// When the task last took a device, as a count: tasks take turns.
    pub(super) last_turn: u64,
    /// Devices whose shares broke an earlier attempt: they would break the next one too.
    pub(super) excluded: BTreeSet<DeviceId>,
}

/// What opening an attempt takes from the core.
pub(super) struct Opener<'a> {
    pub(super) setup: &'a CoreSetup,
    /// Fresh randomness of the attempt.
    pub(super) nonce: [u8; 32],
    pub(super) now: UnixMillis,
}

pub(super) enum Stage {
    /// The next attempt opens with the first device that asks, from this time.
    Ready(UnixMillis),
    Open(Box<OpenRound>),
    Committing(Box<Pending>),
    Finished,
    Expired,
}

pub(super) struct OpenRound {
    pub(super) round: Round,
    pub(super) opened: UnixMillis,
    pub(super) sessions: Vec<SessionKey>,
    /// Part of the secure aggregation session's id.
    pub(super) nonce: [u8; 32],
    /// Devices that had revealed shares in an earlier attempt at this round.
    pub(super) already_revealed: u32,
}

/// A commit that is not durable yet.
pub(super) struct Pending {
    pub(super) commit: Commit,
    pub(super) offered: bool,
    pub(super) retry_at: Option<UnixMillis>,
    pub(super) failures: u32,
}

impl Task {
    /// Checks everything, and offers the first (or resumed) checkpoint to be kept.
    pub(super) fn new(
        spec: TaskSpec,
        base: Arc<BaseModel>,
        base_digest: Digest,
        resume: Option<TaskProgress>,
        setup: &CoreSetup,
        commit_id: CommitId,
    ) -> Result<Self, CoreError> {
        let task = spec.name.clone();
        let refused = |source| CoreError::Adapter { task: task.clone(), source };
        let layout = TrainedLayout::new(&base, &spec.trained).map_err(refused)?;
        let plan = checked_plan(&spec, &base, base_digest, &layout, setup)?;
        let plan_sha256 = Digest::of(&plan.to_bytes()).sha256;
        let plan_envelope = seal(Purpose::Plan, plan.to_bytes(), &[&setup.signing_key]);
        let progress = Arc::new(first_progress(&spec, &base, &layout, &plan, resume)?);
        layout.check(&progress.adapter).map_err(refused)?;
        if spec.trained == TrainedConfig::Full {
            // A format that does not fit the model is better refused now than after the last round.
            release_bytes(&spec, &base, &layout, &progress.adapter).map_err(refused)?;
        }
        let bytes = Arc::new(layout.to_checkpoint_bytes(&progress.adapter));
        let checkpoint = Digest::of(&bytes);
        let stage = if progress.round >= spec.rounds {
            Stage::Finished
        } else {
            let blobs = vec![(checkpoint, bytes)];
            let progress = progress.clone();
            let commit =
                Commit { id: commit_id, task, checkpoint, blobs, progress, record: None, release: None };
            Stage::Committing(Box::new(Pending::new(commit)))
        };
        let (last_turn, excluded) = (0, BTreeSet::new());
        Ok(Self {
            spec,
            base,
            layout,
            plan,
            plan_envelope,
            plan_sha256,
            progress,
            checkpoint,
            stage,
            last_turn,
            excluded,
        })
    }

    /// The clipping norm of the next round.
    pub(super) fn clipping_norm(&self) -> ClippingNorm {
        let varying = self.plan.aggregation.privacy.and_then(|privacy| privacy.adaptation);
        let own = self.plan.aggregation.clipping_norm;
        let kept = varying.and(self.progress.clipping_norm);
        let (Some(norm), Some(adaptation)) = (kept, varying) else { return own };
        let (low, high) = adaptation.norms();
        ClippingNorm::new(norm.clamp(low.value(), high.value())).unwrap_or(own)
    }

    pub(super) fn offer(&self) -> TaskOffer {
        TaskOffer {
            task: self.spec.name.clone(),
            examples_min: self.spec.training.examples_min,
            protocol: self.spec.aggregation.protocol,
        }
    }

    pub(super) fn is_active(&self) -> bool {
        match self.stage {
            Stage::Ready(_) | Stage::Open(_) | Stage::Committing(_) => true,
            Stage::Finished | Stage::Expired => false,
        }
    }

    /// True if a device that asks now would get a place.
    pub(super) fn accepts(&self, now: UnixMillis) -> bool {
        match &self.stage {
            Stage::Ready(not_before) => now >= *not_before && now < self.spec.expires,
            Stage::Open(open) => open.round.phase() == Phase::Selecting,
            Stage::Committing(_) | Stage::Finished | Stage::Expired => false,
        }
    }

    /// Gives a device a place, opening the attempt if it is the first. The caller has asked
    /// [`Task::accepts`]. True in the second place if the attempt was opened.
    pub(super) fn join(&mut self, opener: &Opener<'_>) -> Option<(Participant, bool)> {
        let opens = matches!(self.stage, Stage::Ready(_));
        if opens {
            self.stage = Stage::Open(Box::new(self.open_round(opener)));
        }
        let participant = self.open()?.round.handle_join(opener.now)?;
        Some((participant, opens))
    }

    pub(super) fn open(&mut self) -> Option<&mut OpenRound> {
        match &mut self.stage {
            Stage::Open(open) => Some(open),
            Stage::Ready(_) | Stage::Committing(_) | Stage::Finished | Stage::Expired => None,
        }
    }

    pub(super) fn pending(&mut self) -> Option<&mut Pending> {
        match &mut self.stage {
            Stage::Committing(pending) => Some(pending),
            Stage::Ready(_) | Stage::Open(_) | Stage::Finished | Stage::Expired => None,
        }
    }

    /// The commit is durable: on to the next round, or the end.
    pub(super) fn committed(&mut self, now: UnixMillis) {
        let Some(pending) = self.pending() else { return };
        let (progress, checkpoint) = (pending.commit.progress.clone(), pending.commit.checkpoint);
        let delay = match progress.attempt {
            0 => 0,
            attempt => backoff_ms(ATTEMPT_DELAY_MS_MIN, ATTEMPT_DELAY_MS_MAX, attempt - 1),
        };
        let finished = progress.round >= self.spec.rounds;
        self.stage = if finished { Stage::Finished } else { Stage::Ready(now.plus(delay)) };
        (self.progress, self.checkpoint) = (progress, checkpoint);
    }

    pub(super) fn poll_timeout(&self) -> Option<UnixMillis> {
        match &self.stage {
            Stage::Ready(_) => Some(self.spec.expires),
            Stage::Open(open) => open.round.poll_timeout().map(|(at, _)| at),
            Stage::Committing(pending) => pending.retry_at,
            Stage::Finished | Stage::Expired => None,
        }
    }

    pub(super) fn status(&self) -> TaskStatus {
        let (stage, counts) = match &self.stage {
            Stage::Ready(_) => ("ready", RoundCounts::default()),
            Stage::Open(open) if open.round.phase() == Phase::Selecting => ("selecting", open.round.counts()),
            Stage::Open(open) if open.round.phase() == Phase::Aggregating => {
                ("aggregating", open.round.counts())
            }
            Stage::Open(open) => ("collecting", open.round.counts()),
            Stage::Committing(_) => ("committing", RoundCounts::default()),
            Stage::Finished => ("finished", RoundCounts::default()),
            Stage::Expired => ("expired", RoundCounts::default()),
        };
        let (round, attempt, rounds) = (self.progress.round, self.progress.attempt, self.spec.rounds);
        TaskStatus { round, attempt, rounds, stage, counts, checkpoint: self.checkpoint }
    }

    fn open_round(&self, opener: &Opener<'_>) -> OpenRound {
        let (round, attempt) = (self.progress.round, self.progress.attempt);
        let id = RoundId { task: self.spec.name.clone(), round, attempt };
        let (policy, plan, now) = (self.spec.round_policy, &self.plan.aggregation, opener.now);
        let secure = plan.secure.as_ref().map(|secure| self.secure_setup(secure, opener));
        let round = Round::open(id, policy, plan, self.plan.vector_len(), secure, now);
        OpenRound { round, opened: now, sessions: Vec::new(), nonce: opener.nonce, already_revealed: 0 }
    }

    fn secure_setup(&self, secure: &SecurePlan, opener: &Opener<'_>) -> SecureSetup {
        let (plan, population) = (&self.plan.aggregation, opener.setup.population.as_str());
        let session = SessionId::derive(&SessionParts {
            population,
            task: self.spec.name.as_str(),
            round: self.progress.round,
            attempt: self.progress.attempt,
            model_sha256: self.checkpoint.sha256,
            config_sha256: self.plan_sha256,
            server_nonce: opener.nonce,
        });
        SecureSetup {
            terms: Terms {
                session,
                config_sha256: self.plan_sha256,
                suite: secure.mask_suite,
                bits: plan.ring_bits,
                dimension: self.plan.vector_len(),
            },
            plan: CohortPlan {
                members_max: secure.cohort_max,
                survivors_min: plan.summands_min,
                assumptions: secure.assumptions,
                degrees: None,
            },
            population: population.to_owned(),
            registrars: opener.setup.registrars.clone(),
            excluded: self.excluded.clone(),
            step_ms: self.spec.round_policy.step_ms,
        }
    }
}

impl Pending {
    pub(super) fn new(commit: Commit) -> Self {
        Self { commit, offered: false, retry_at: None, failures: 0 }
    }
}

/// Where the task begins, or goes on: an attempt that may have been under way is not taken up again.
fn first_progress(
    spec: &TaskSpec,
    base: &BaseModel,
    layout: &TrainedLayout,
    plan: &TaskPlan,
    resume: Option<TaskProgress>,
) -> Result<TaskProgress, CoreError> {
    let dimension = layout.len();
    let protection = plan.aggregation.protection();
    if let Some(held) = &resume {
        check_protection(held, plan, &protection)
            .map_err(|problem| CoreError::Privacy { task: spec.name.clone(), problem })?;
    }
    let mut progress = match resume {
        Some(held) => TaskProgress { attempt: held.attempt.saturating_add(1), ..held },
        None => TaskProgress { adapter: layout.initial_values(base), ..TaskProgress::default() },
    };
    progress.protection = protection;
    if progress.optimizer_state.is_empty() {
        progress.optimizer_state = spec.server_optimizer.initial_state(dimension);
    }
    spec.server_optimizer
        .check()
        .and_then(|()| spec.server_optimizer.check_state(&progress.optimizer_state, dimension))
        .map_err(|source| CoreError::Optimizer { task: spec.name.clone(), source })?;
    Ok(progress)
}

/// A release says one thing of all rounds, so all rounds run under the same protection: a model of ten rounds
/// without noise and one with it must not be called private.
fn check_protection(held: &TaskProgress, plan: &TaskPlan, protection: &str) -> Result<(), String> {
    let begun = held.round > 0 || held.attempt > 0;
    let earlier_version = held.protection.is_empty() && plan.aggregation.privacy.is_none();
    if !begun || earlier_version || held.protection == protection {
        return Ok(());
    }
    Err(format!(
        "{} rounds ran under other protection (protocol, summands_min or privacy), and a release says one thing of all \
         its rounds: restore those settings, or give the task another name",
        held.round
    ))
}

/// The plan as devices will read it: parsed back from its bytes, so that no device refuses its form.
fn checked_plan(
    spec: &TaskSpec,
    base: &BaseModel,
    base_digest: Digest,
    layout: &TrainedLayout,
    setup: &CoreSetup,
) -> Result<TaskPlan, CoreError> {
    if base_digest.sha256 != base.sha256 {
        let opened = Digest { sha256: base.sha256, size: base_digest.size }.hex();
        return Err(CoreError::Base { task: spec.name.clone(), digest: base_digest.hex(), opened });
    }
    let mut aggregation = AggregationPlan { privacy: None, ..spec.aggregation };
    if let Some(privacy) = &spec.privacy {
        privacy
            .apply(&mut aggregation, layout.len())
            .map_err(|problem| CoreError::Privacy { task: spec.name.clone(), problem })?;
    }
    let plan = TaskPlan {
        population: setup.population.clone(),
        task: spec.name.clone(),
        base_model: base_digest,
        adapter: adapter_plan(layout),
        training: spec.training.clone(),
        aggregation,
        rounds: spec.rounds,
        expires: spec.expires,
    };
    check_round_policy(spec)?;
    TaskPlan::parse(&plan.to_bytes()).map_err(|source| CoreError::Plan { task: spec.name.clone(), source })
}

fn adapter_plan(layout: &TrainedLayout) -> AdapterPlan {
    let shape = match layout {
        TrainedLayout::Full(_) => TrainedShape::Full,
        TrainedLayout::Lora(layout) => {
            let config = layout.config();
            TrainedShape::Lora(LoraShape {
                rank: u32::try_from(config.rank).expect("the layout bounds the rank"),
                alpha: config.alpha,
                targets: config.targets.iter().map(|target| target.name().to_owned()).collect(),
                freeze_a: config.freeze_a,
                init_seed: config.init_seed,
            })
        }
    };
    AdapterPlan { shape, layout_sha256: layout.sha256(), dimension: layout.len() }
}

fn check_round_policy(spec: &TaskSpec) -> Result<(), CoreError> {
    let (policy, plan) = (&spec.round_policy, &spec.aggregation);
    let rules = [
        (
            policy.selected_max <= fleetune_proto::COHORT_MAX,
            "selected_max is above the protocol's largest cohort",
        ),
        (policy.selected_max >= policy.report_goal, "selected_max is below report_goal"),
        (policy.report_goal >= policy.reports_min, "report_goal is below reports_min"),
        (policy.reports_min >= plan.summands_min, "reports_min is below the plan's summands_min"),
        (policy.report_goal <= plan.summands_max, "report_goal is above the plan's summands_max"),
        (policy.selection_ms > 0 && policy.report_ms > 0 && policy.step_ms > 0, "a deadline is zero"),
    ];
    match rules.iter().find(|(holds, _)| !holds) {
        Some((_, problem)) => Err(CoreError::RoundPolicy { task: spec.name.clone(), problem }),
        None => plan.secure.as_ref().map_or(Ok(()), |secure| check_cohorts(spec, secure)),
    }
}

/// The smallest, the intended and the largest cohort must have a degree and threshold: better refused now
/// than in the first round.
fn check_cohorts(spec: &TaskSpec, secure: &SecurePlan) -> Result<(), CoreError> {
    let policy = &spec.round_policy;
    let sizes = [policy.reports_min, policy.report_goal, policy.selected_max];
    let halves = [secure.cohort_max.div_ceil(2), secure.cohort_max];
    let split = halves.iter().filter(|_| policy.selected_max > secure.cohort_max);
    let small = sizes.iter().filter(|size| **size <= secure.cohort_max);
    for size in small.chain(split) {
        solve(*size, &secure.assumptions)
            .map_err(|source| CoreError::Cohort { task: spec.name.clone(), source })?;
    }
    Ok(())
}
