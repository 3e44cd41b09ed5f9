//! The coordinator's core as a value: calls and times in, answers, commits and events out.
//!
//! A round's life: [`Core::handle_check_in`] selects devices, [`Core::handle_submit`] adds their updates to
//! one running sum, and when the round is over [`Core::poll_commit`] offers the new adapter. Only
//! [`Core::handle_committed`] lets the next round begin. No update outlives the call that completes it.
//! Sums are of integers, so the order in which devices arrive does not change a result.

mod answers;
mod check_in;
mod commit;
mod contribution;
mod error;
mod event;
mod finish;
mod pace;
mod secure;
mod session;
mod task;

#[cfg(test)]
mod tests;

pub use commit::{
    AggregationRecord, CohortRecord, Commit, CommitId, PrivacyRecord, PublishedRelease, RoundOutcome,
    RoundRecord, TaskProgress,
};
pub use error::CoreError;
pub use event::CoreEvent;
pub use pace::PacePolicy;
pub use secure::{OpenedCohort, OpeningWork, SumCharge};
pub use task::{TaskSpec, TaskStatus};

use crate::limits::{COMMIT_DELAY_MS_MAX, COMMIT_DELAY_MS_MIN, EXCLUDED_MAX, backoff_ms};
use answers::Answers;
use contribution::{read_update, submitted_digest};
use ed25519_dalek::SigningKey;
use error::invalid;
use finish::Ending;
use fleetune_model::base::BaseModel;
use fleetune_proto::{
    CallFailure, Digest, FailureKind, Name, PopulationPolicy, Purpose, TASKS_MAX, UnixMillis,
    round::{Contribution, ContributionError, Phase},
    seal,
    wire::{self, EndReason, TaskResult},
};
use fleetune_secagg::Registrars;
use pace::Pace;
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use session::{Closed, SessionKey, Sessions, transfer_failure};
use std::{borrow::Cow, collections::BTreeMap, sync::Arc};
use task::{Pending, Stage, Task};

/// What a core is set up with.
#[derive(Clone)]
pub struct CoreSetup {
    /// The one population it serves.
    pub population: Name,
    /// Signs plans, policies and releases.
    pub signing_key: SigningKey,
    /// When devices are asked to come back.
    pub pace: PacePolicy,
    /// Uploads held in memory at once; at least one. Each takes an update's packed bytes.
    pub upload_slots: usize,
    /// Drives session tokens and nonces; fresh randomness outside simulations.
    pub seed: [u8; 32],
    /// Who certifies the devices of secure aggregation.
    pub registrars: Registrars,
}

/// The coordinator without its shell. See the module's words.
pub struct Core {
    setup: CoreSetup,
    rng: ChaCha20Rng,
    tasks: BTreeMap<Name, Task>,
    sessions: Sessions,
    answers: Answers,
    pace: Pace,
    policy: Envelope,
    release: Option<PublishedRelease>,
    versions_issued: u64,
    commits_issued: u64,
    turns: u64,
    events: Vec<CoreEvent>,
}

/// Signed bytes and their hash.
struct Envelope {
    bytes: Vec<u8>,
    sha256: [u8; 32],
}

impl Core {
    /// A core without tasks.
    #[must_use]
    pub fn new(setup: CoreSetup) -> Self {
        Self {
            rng: ChaCha20Rng::from_seed(setup.seed),
            tasks: BTreeMap::new(),
            sessions: Sessions::new(setup.upload_slots),
            answers: Answers::default(),
            pace: Pace::new(setup.pace),
            policy: seal_policy(&setup, &BTreeMap::new()),
            setup,
            release: None,
            versions_issued: 0,
            commits_issued: 0,
            turns: 0,
            events: Vec::new(),
        }
    }

    /// Takes up a task, from its start or from `resume`; the attempt that may have been under way then is
    /// given up and a new one begins. `base_digest` addresses the GGUF file of `base`. The first commit
    /// keeps the checkpoint that the first devices will read.
    ///
    /// # Errors
    /// [`CoreError`] when the spec contradicts itself, the base or the progress; nothing has changed then.
    pub fn add_task(
        &mut self,
        spec: TaskSpec,
        base: Arc<BaseModel>,
        base_digest: Digest,
        resume: Option<TaskProgress>,
        now: UnixMillis,
    ) -> Result<(), CoreError> {
        let name = spec.name.clone();
        if self.tasks.contains_key(&name) {
            return Err(CoreError::Duplicate(name));
        }
        if self.tasks.len() >= TASKS_MAX {
            return Err(CoreError::TooMany { task: name, max: TASKS_MAX });
        }
        let id = CommitId(self.commits_issued + 1);
        let task = Task::new(spec, base, base_digest, resume, &self.setup, id)?;
        self.commits_issued = id.0;
        self.tasks.insert(name, task);
        self.policy = seal_policy(&self.setup, &self.tasks);
        self.handle_timeout(now);
        Ok(())
    }

    /// Puts a release on offer again after a restart; of several the highest version counts.
    ///
    /// # Errors
    /// [`CoreError::Release`] when it is for another population.
    pub fn restore_release(&mut self, release: PublishedRelease) -> Result<(), CoreError> {
        if release.manifest.population != self.setup.population {
            let (version, population) = (release.version(), release.manifest.population);
            return Err(CoreError::Release { version, population });
        }
        self.versions_issued = self.versions_issued.max(release.version());
        self.offer_release(release);
        Ok(())
    }

    /// TaskService.CheckIn.
    ///
    /// # Errors
    /// InvalidArgument for a malformed request, NotFound for another population.
    pub fn handle_check_in(
        &mut self,
        request: &wire::CheckInRequest,
        now: UnixMillis,
    ) -> Result<wire::CheckInResponse, CallFailure> {
        self.handle_timeout(now);
        self.answer_check_in(request, now)
    }

    /// BlobService.WriteBlobChunk.
    ///
    /// # Errors
    /// Unauthenticated for an unknown session, AlreadyExists for other bytes than before, InvalidArgument
    /// for a wrong length, DataLoss for a damaged chunk, ResourceExhausted while all slots are taken,
    /// FailedPrecondition once the round is over.
    pub fn handle_write_chunk(
        &mut self,
        request: &wire::WriteBlobChunkRequest,
        now: UnixMillis,
    ) -> Result<wire::WriteBlobChunkResponse, CallFailure> {
        self.handle_timeout(now);
        let (key, session) = self.sessions.find(&request.session_token)?;
        let plan = &self.tasks[&session.task].plan;
        let size = plan.aggregation.ring_bits.packed_len(plan.vector_len()) as u64;
        let committed_bytes = self.sessions.write_chunk(key, request, size, now)?;
        Ok(wire::WriteBlobChunkResponse { committed_bytes })
    }

    /// AggregationService.SubmitUpdate. The same bytes get the same answer however often they come.
    ///
    /// # Errors
    /// Unauthenticated for an unknown session, AlreadyExists for other bytes than before, InvalidArgument
    /// for bytes that are no update of the task, FailedPrecondition if the upload is not complete.
    pub fn handle_submit(
        &mut self,
        request: &wire::SubmitUpdateRequest,
        now: UnixMillis,
    ) -> Result<wire::SubmitUpdateResponse, CallFailure> {
        self.handle_timeout(now);
        let (key, session) = self.sessions.find(&request.session_token)?;
        let source = request.update.as_ref().and_then(|update| update.source.as_ref());
        let digest = submitted_digest("submit_update.update", source)?;
        let reason = match session.settled(digest)? {
            Some(reason) => reason,
            None => self.contribute(key, source, digest, now)?,
        };
        let ended = wire::Ended { reason: reason.into() };
        Ok(wire::SubmitUpdateResponse { outcome: Some(wire::submit_update_response::Outcome::Ended(ended)) })
    }

    /// TaskService.ReportTaskResult.
    ///
    /// # Errors
    /// Unauthenticated for an unknown session, InvalidArgument for an unknown result.
    pub fn handle_report_task(
        &mut self,
        request: &wire::ReportTaskResultRequest,
        now: UnixMillis,
    ) -> Result<wire::ReportTaskResultResponse, CallFailure> {
        self.handle_timeout(now);
        let (key, session) = self.sessions.find(&request.session_token)?;
        let already_revealed = match TaskResult::try_from(request.result) {
            Ok(TaskResult::Unspecified) | Err(_) => {
                return Err(invalid(&"report_task_result.result: unknown"));
            }
            Ok(TaskResult::AlreadyRevealed) => true,
            Ok(
                TaskResult::Interrupted
                | TaskResult::InsufficientData
                | TaskResult::PlanRejected
                | TaskResult::TrainingFailed
                | TaskResult::AggregationRefused,
            ) => false,
        };
        if session.is_open() {
            let (name, participant) = (session.task.clone(), session.participant);
            self.sessions.withdraw(key);
            if let Some(open) = self.task(&name).open() {
                open.already_revealed += u32::from(already_revealed);
                open.round.handle_withdrawal(participant, now);
            }
            self.settle(&name, now);
        }
        Ok(wire::ReportTaskResultResponse {})
    }

    /// ReleaseService.ReportRelease.
    ///
    /// # Errors
    /// NotFound for another population or a version never published, InvalidArgument for an unknown state.
    pub fn handle_report_release(
        &mut self,
        request: &wire::ReportReleaseRequest,
        now: UnixMillis,
    ) -> Result<wire::ReportReleaseResponse, CallFailure> {
        self.handle_timeout(now);
        self.check_population(&request.population)?;
        let published = self.release.as_ref().map_or(0, PublishedRelease::version);
        if request.version == 0 || request.version > published {
            let problem = format!("release {}: not published", request.version);
            return Err(CallFailure::new(FailureKind::NotFound, problem));
        }
        match wire::ReleaseState::try_from(request.state) {
            Ok(state @ (wire::ReleaseState::Active | wire::ReleaseState::Rejected)) => {
                self.events.push(CoreEvent::ReleaseReported { version: request.version, state });
                Ok(wire::ReportReleaseResponse {})
            }
            Ok(wire::ReleaseState::Unspecified) | Err(_) => Err(invalid(&"report_release.state: unknown")),
        }
    }

    /// Lets deadlines take effect.
    pub fn handle_timeout(&mut self, now: UnixMillis) {
        self.sessions.forget(now);
        let names: Vec<Name> = self.tasks.keys().cloned().collect();
        for name in names {
            self.handle_task_timeout(&name, now);
        }
    }

    /// When [`Core::handle_timeout`] has something to do next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<UnixMillis> {
        self.tasks.values().filter_map(Task::poll_timeout).min()
    }

    /// The next thing to keep, each once; after a failure again.
    pub fn poll_commit(&mut self) -> Option<Commit> {
        let waiting = |pending: &&mut Pending| !pending.offered && pending.retry_at.is_none();
        let pending = self.tasks.values_mut().filter_map(Task::pending).find(waiting)?;
        pending.offered = true;
        Some(pending.commit.clone())
    }

    /// The commit is durable.
    pub fn handle_committed(&mut self, id: CommitId, now: UnixMillis) {
        let Some(name) = self.find_commit(id) else { return };
        let task = self.task(&name);
        let release = task.pending().and_then(|pending| pending.commit.release.take());
        task.committed(now);
        let (round, checkpoint, finished) = (task.progress.round, task.checkpoint, !task.is_active());
        self.events.push(CoreEvent::Committed { task: name.clone(), round, checkpoint });
        if let Some(release) = release {
            let (version, adapter) = (release.version(), release.manifest.trained());
            self.events.push(CoreEvent::ReleasePublished { task: name.clone(), version, adapter });
            self.offer_release(release);
        }
        if finished {
            self.events.push(CoreEvent::TaskFinished { task: name });
            self.policy = seal_policy(&self.setup, &self.tasks);
        }
    }

    /// The commit could not be made durable (a full disk). Its content is kept and offered again after a
    /// delay; the task waits.
    pub fn handle_commit_failed(&mut self, id: CommitId, now: UnixMillis) {
        let Some(name) = self.find_commit(id) else { return };
        let Some(pending) = self.task(&name).pending() else { return };
        let retry_at = now.plus(backoff_ms(COMMIT_DELAY_MS_MIN, COMMIT_DELAY_MS_MAX, pending.failures));
        (pending.offered, pending.retry_at) = (false, Some(retry_at));
        pending.failures = pending.failures.saturating_add(1);
        self.events.push(CoreEvent::CommitFailed { task: name, retry_at });
    }

    /// What happened since the last call.
    pub fn poll_events(&mut self) -> Vec<CoreEvent> {
        std::mem::take(&mut self.events)
    }

    /// Where a task stands.
    #[must_use]
    pub fn task_status(&self, task: &Name) -> Option<TaskStatus> {
        self.tasks.get(task).map(Task::status)
    }

    /// True when no task will ask for devices again.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.tasks.values().all(|task| !task.is_active())
    }

    /// The release on offer.
    #[must_use]
    pub fn release(&self) -> Option<&PublishedRelease> {
        self.release.as_ref()
    }

    /// Adds an update to its round's sum, and forgets it.
    fn contribute(
        &mut self,
        key: SessionKey,
        source: Option<&wire::resource::Source>,
        digest: Digest,
        now: UnixMillis,
    ) -> Result<EndReason, CallFailure> {
        let (name, participant) = self.place(key);
        let bytes = self.update_bytes(key, source, digest)?;
        let task = self.task(&name);
        let vector = read_update(&task.plan.aggregation, task.plan.adapter.dimension, &bytes)?;
        let Some(open) = task.open() else { return Ok(EndReason::TooLate) };
        let reason = match open.round.handle_contribution(participant, digest, &vector, now) {
            Ok(Contribution::Added | Contribution::Repeated) => EndReason::Contributed,
            Ok(Contribution::TooLate) => EndReason::TooLate,
            Err(ContributionError::OtherBytes) => unreachable!("the session has not contributed"),
            Err(ContributionError::Vector(error)) => return Err(invalid(&error)),
        };
        if reason == EndReason::Contributed {
            self.sessions.get_mut(key).contributed(digest);
        }
        self.settle(&name, now);
        Ok(reason)
    }

    /// The bytes of an update: those inline, or a complete upload, whose slot is free afterwards.
    fn update_bytes<'a>(
        &mut self,
        key: SessionKey,
        source: Option<&'a wire::resource::Source>,
        digest: Digest,
    ) -> Result<Cow<'a, [u8]>, CallFailure> {
        match source {
            Some(wire::resource::Source::Inline(bytes)) => Ok(Cow::Borrowed(bytes)),
            Some(wire::resource::Source::Blob(_)) | None => {
                let upload = self.sessions.take_upload(key, digest)?;
                upload.into_verified().map(Cow::Owned).map_err(|error| transfer_failure(&error))
            }
        }
    }

    fn place(&mut self, key: SessionKey) -> (Name, fleetune_proto::round::Participant) {
        let session = self.sessions.get_mut(key);
        (session.task.clone(), session.participant)
    }

    fn handle_task_timeout(&mut self, name: &Name, now: UnixMillis) {
        let task = self.task(name);
        match &mut task.stage {
            Stage::Ready(_) if now >= task.spec.expires => {
                task.stage = Stage::Expired;
                let round = task.progress.round;
                self.events.push(CoreEvent::TaskExpired { task: name.clone(), round });
                self.policy = seal_policy(&self.setup, &self.tasks);
            }
            Stage::Open(open) => {
                open.round.handle_timeout(now);
                self.settle(name, now);
            }
            Stage::Committing(pending) => pending.retry_at = pending.retry_at.filter(|at| now < *at),
            Stage::Ready(_) | Stage::Finished | Stage::Expired => {}
        }
    }

    /// Turns an attempt that is over into a commit, and tells its sessions.
    fn settle(&mut self, name: &Name, now: UnixMillis) {
        let task = self.tasks.get_mut(name).expect("sessions and stages name tasks that exist");
        let Stage::Open(open) = &mut task.stage else { return };
        let closed = match open.round.phase() {
            Phase::Selecting | Phase::Collecting | Phase::Aggregating => return,
            Phase::Finished => Closed::Finished,
            Phase::Failed(_) => Closed::Failed,
        };
        self.sessions.close(std::mem::take(&mut open.sessions), closed, now);
        self.commits_issued += 1;
        let (id, version) = (CommitId(self.commits_issued), self.versions_issued + 1);
        let Stage::Open(open) = &task.stage else { return };
        let commit = Ending { setup: &self.setup, id, version, now }.commit(task, open);
        self.versions_issued += u64::from(commit.release.is_some());
        // A round that shares were revealed for is given up, so a forgiving next one would be broken as well.
        let room = EXCLUDED_MAX.saturating_sub(task.excluded.len());
        task.excluded.extend(open.round.blamed().into_iter().take(room));
        if let Some(record) = commit.record.clone() {
            self.events.push(CoreEvent::RoundEnded { task: name.clone(), record });
        }
        task.stage = Stage::Committing(Box::new(Pending::new(commit)));
    }

    fn find_commit(&mut self, id: CommitId) -> Option<Name> {
        let is_it = |task: &mut Task| task.pending().is_some_and(|pending| pending.commit.id == id);
        self.tasks.iter_mut().find_map(|(name, task)| is_it(task).then(|| name.clone()))
    }

    fn offer_release(&mut self, release: PublishedRelease) {
        if self.release.as_ref().is_none_or(|held| held.version() < release.version()) {
            self.release = Some(release);
        }
    }

    fn check_population(&self, population: &str) -> Result<(), CallFailure> {
        if population == self.setup.population.as_str() {
            return Ok(());
        }
        let name = Name::parse("population", population).map_err(|error| invalid(&error))?;
        Err(CallFailure::new(FailureKind::NotFound, format!("population {name}: not served here")))
    }

    fn task(&mut self, name: &Name) -> &mut Task {
        self.tasks.get_mut(name).expect("sessions and stages name tasks that exist")
    }
}

/// The tasks that want devices, as devices read them.
fn seal_policy(setup: &CoreSetup, tasks: &BTreeMap<Name, Task>) -> Envelope {
    let tasks = tasks.values().filter(|task| task.is_active()).map(Task::offer).collect();
    let policy = PopulationPolicy { population: setup.population.clone(), tasks };
    let bytes = seal(Purpose::Policy, policy.to_bytes(), &[&setup.signing_key]);
    Envelope { sha256: Digest::of(&bytes).sha256, bytes }
}
