//! The device's side as a value: check in, train, contribute, done; a release beside it.
//!
//! The shell asks [`Device::poll_action`] what to do, does it, and answers with one `handle_*`
//! call. At most one action is out at a time. The machine decides, checks signatures and floors,
//! clips and encodes; the shell only moves bytes, trains and keeps files.

mod action;
mod floors;
mod kept;
mod offer;
mod secure;
mod session;
mod upload;

pub use action::{Action, InstallOrder, Request, Response, TrainOrder, TrainingFailure};
pub use floors::{DeviceFloors, FloorError};
pub use kept::{DamagedRecord, DeviceRecord};

use crate::{
    digest::Digest,
    limits::*,
    manifest::ReleaseManifest,
    name::Name,
    plan::TaskPlan,
    policy::PopulationPolicy,
    rpc::{CallFailure, FailureKind, Reaction},
    sign::TrustRoot,
    time::UnixMillis,
    wire::{self, TaskResult},
};
use fleetune_privacy::{Ledger, NoiseOrigin, Scope};
use fleetune_secagg::{DevicePolicy, Identity, Registrars};
use kept::RevealedRounds;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;
use secure::Surroundings;
use session::{Session, Step};
use std::sync::Arc;

/// What a device is set up with.
#[derive(Clone)]
pub struct DeviceSetup {
    /// Population it belongs to.
    pub population: Name,
    /// Keys that it trusts for plans, policies and releases.
    pub trust_root: TrustRoot,
    /// Vendor's device class; coarse.
    pub device_class: String,
    /// What it never goes below.
    pub floors: DeviceFloors,
    /// Version of the release it runs; 0 for none.
    pub release_version: u64,
    /// Highest release version ever accepted: nothing below it is installed again (rollback attack).
    pub release_version_max: u64,
    /// Its certified identity; without one it takes no part in secure aggregation.
    pub identity: Option<Arc<Identity>>,
    /// Who certifies its peers.
    pub registrars: Registrars,
    /// Where the noise of differential privacy comes from.
    pub noise: NoiseOrigin,
}

/// What happened, for logs and progress. Holds nothing derived from private data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The coordinator had no work.
    NoWork,
    /// Selected for a round.
    Selected {
        /// The task.
        task: Name,
        /// The round.
        round: u32,
    },
    /// The contribution is in.
    Contributed {
        /// The task.
        task: Name,
        /// The round.
        round: u32,
    },
    /// The session ended without a contribution.
    Ended(String),
    /// The coordinator's words were refused.
    Refused(String),
    /// A call failed and will be repeated.
    Retrying(String),
    /// A release serves now.
    ReleaseActive(u64),
    /// A release was refused.
    ReleaseRejected {
        /// Its version.
        version: u64,
        /// Why.
        reason: String,
    },
}

enum State {
    /// Nothing to do before this time.
    Idle(UnixMillis),
    CheckingIn(wire::CheckInRequest),
    Choosing(PopulationPolicy),
    InSession(Box<Session>),
    Reporting(wire::ReportTaskResultRequest),
    Fetching(Box<InstallOrder>, Digest),
    Installing(Box<InstallOrder>),
    ReportingRelease(wire::ReportReleaseRequest),
}

/// One device. See the module's words.
pub struct Device {
    setup: DeviceSetup,
    rng: ChaCha20Rng,
    state: State,
    in_flight: bool,
    failures: u32,
    not_before: UnixMillis,
    policy: Option<(Vec<u8>, PopulationPolicy)>,
    chosen: Option<Vec<Name>>,
    policies_in_a_row: u32,
    return_at: UnixMillis,
    release: Option<ReleaseManifest>,
    revealed: RevealedRounds,
    ledger: Ledger,
    /// Step of secure aggregation that is on disk; 0 for no session.
    saved_step: u32,
    saving: bool,
    events: Vec<Event>,
}

impl Device {
    /// A device that checks in at once. `seed` drives nonces and the times it comes back; fresh
    /// randomness outside simulations.
    pub fn new(setup: DeviceSetup, seed: [u8; 32], now: UnixMillis) -> Self {
        Self {
            setup,
            rng: ChaCha20Rng::from_seed(seed),
            state: State::Idle(now),
            in_flight: false,
            failures: 0,
            not_before: now,
            policy: None,
            chosen: None,
            policies_in_a_row: 0,
            return_at: now,
            release: None,
            revealed: RevealedRounds::default(),
            ledger: Ledger::default(),
            saved_step: 0,
            saving: false,
            events: Vec::new(),
        }
    }

    /// A device that goes on from what it kept: a session in the middle of secure aggregation sends its last
    /// message again, byte for byte.
    ///
    /// # Errors
    /// [`DamagedRecord`]; nothing of it may be forgotten silently.
    pub fn restore(
        setup: DeviceSetup,
        seed: [u8; 32],
        record: &DeviceRecord,
        now: UnixMillis,
    ) -> Result<Self, DamagedRecord> {
        let mut device = Self::new(setup, seed, now);
        let kept = record.read()?;
        (device.revealed, device.ledger) = (kept.revealed, kept.ledger);
        if let Some(session) = kept.session {
            device.saved_step = session.secure_step();
            device.state = State::InSession(session);
        }
        Ok(device)
    }

    /// What to do now; none while an action is out or before [`Device::poll_timeout`].
    pub fn poll_action(&mut self, now: UnixMillis) -> Option<Action> {
        if self.in_flight || now < self.not_before {
            return None;
        }
        self.ledger.observe_clock(now.0);
        self.leave_late_session(now);
        // Before a rest: the secrets of a session that is over do not stay on disk until the next.
        if let Some(record) = self.unsaved_record(now) {
            (self.in_flight, self.saving) = (true, true);
            return Some(Action::Keep(record));
        }
        if let State::Idle(until) = self.state {
            if now < until {
                return None;
            }
            self.wake(now);
        }
        self.in_flight = true;
        Some(self.current_action())
    }

    /// When to poll again; none while an action is out.
    pub fn poll_timeout(&self) -> Option<UnixMillis> {
        if self.in_flight {
            return None;
        }
        match self.state {
            State::Idle(_) if self.secure_step() != self.saved_step => Some(self.not_before),
            State::Idle(until) => Some(until.max(self.not_before)),
            State::CheckingIn(_)
            | State::Choosing(_)
            | State::InSession(_)
            | State::Reporting(_)
            | State::Fetching(..)
            | State::Installing(_)
            | State::ReportingRelease(_) => Some(self.not_before),
        }
    }

    /// What happened since the last call.
    pub fn poll_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// What it has given away so far.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// True between check-ins, with nothing under way.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle(_))
    }

    /// Answers [`Action::Keep`]: the record is on disk.
    pub fn handle_kept(&mut self, _now: UnixMillis) {
        (self.in_flight, self.saving) = (false, false);
        self.saved_step = self.secure_step();
    }

    /// Answers [`Action::Keep`] that failed: what is not on disk must not leave, so the session ends here.
    pub fn handle_keep_failed(&mut self, reason: &str, now: UnixMillis) {
        (self.in_flight, self.saving) = (false, false);
        let reason = format!("the session's record could not be kept: {reason}");
        if matches!(self.state, State::InSession(_)) {
            self.withdraw(TaskResult::Interrupted, &reason, now);
        } else {
            self.events.push(Event::Retrying(reason));
        }
        // An old record on disk is harmless: it repeats what was sent before.
        self.saved_step = self.secure_step();
    }

    /// Answers [`Action::Choose`]: the tasks the app takes part in now, none of them included.
    pub fn handle_choice(&mut self, tasks: Vec<Name>, now: UnixMillis) {
        self.in_flight = false;
        let State::Choosing(policy) = &self.state else { return };
        let offered = |task: &Name| policy.tasks.iter().any(|offer| offer.task == *task);
        self.chosen = Some(tasks.into_iter().filter(offered).collect());
        self.state = State::CheckingIn(self.check_in(now));
    }

    /// Answers [`Action::Call`] with the coordinator's answer.
    pub fn handle_response(&mut self, response: Response, now: UnixMillis) {
        (self.in_flight, self.failures) = (false, 0);
        match (std::mem::replace(&mut self.state, State::Idle(now)), response) {
            (State::CheckingIn(_), Response::CheckIn(answer)) => self.handle_check_in(answer, now),
            (State::InSession(session), response) => self.handle_session_response(session, response, now),
            (State::Reporting(_), Response::ReportTaskResult)
            | (State::ReportingRelease(_), Response::ReportRelease) => self.rest(now),
            (state, _) => {
                self.state = state;
                let failure = CallFailure::new(FailureKind::Internal, "the answer is for another call");
                self.handle_call_failed(&failure, now);
            }
        }
    }

    /// Answers [`Action::Call`] or [`Action::Fetch`] that failed.
    pub fn handle_call_failed(&mut self, failure: &CallFailure, now: UnixMillis) {
        self.in_flight = false;
        self.failures += 1;
        let reaction = failure.kind.reaction();
        if reaction == Reaction::RetrySame && self.failures < CALL_ATTEMPTS_MAX {
            self.not_before = now.plus(self.backoff());
            self.events.push(Event::Retrying(failure.to_string()));
            return;
        }
        self.events.push(Event::Ended(failure.to_string()));
        self.give_up(reaction, now);
    }

    /// Answers [`Action::Fetch`]: the blob is held and verified.
    pub fn handle_fetched(&mut self, now: UnixMillis) {
        (self.in_flight, self.failures) = (false, 0);
        match &mut self.state {
            State::InSession(session) => session.fetched(),
            State::Fetching(order, digest) => match order.manifest.adapter {
                Some(adapter) if *digest != adapter => *digest = adapter,
                Some(_) | None => self.state = State::Installing(order.clone()),
            },
            State::Idle(_)
            | State::CheckingIn(_)
            | State::Choosing(_)
            | State::Reporting(_)
            | State::Installing(_)
            | State::ReportingRelease(_) => self.rest(now),
        }
    }

    /// Answers [`Action::Train`] with the raw update: final minus initial values. It is clipped and
    /// encoded here; one that holds NaN or infinity ends the session and is reported as failed, but under a plan
    /// with differential privacy takes part as zero.
    pub fn handle_trained(&mut self, delta: Vec<f32>, now: UnixMillis) {
        self.in_flight = false;
        let State::InSession(session) = &mut self.state else { return };
        if let Err(reason) = session.trained(delta, &self.setup, &mut self.rng) {
            self.withdraw(TaskResult::TrainingFailed, &reason, now);
        }
    }

    /// Answers [`Action::Train`] that produced no update.
    ///
    /// Under a plan with differential privacy a failure that depends on the data (too little of it, or a loss that
    /// is no number) is not told: zeros take part instead. The coordinator chooses the checkpoint, and could
    /// choose one that fails exactly where some text is there; each such answer would be one bit, free and exact.
    pub fn handle_training_failed(&mut self, failure: &TrainingFailure, now: UnixMillis) {
        let depends_on_data = match failure {
            TrainingFailure::Failed(_) | TrainingFailure::InsufficientData { .. } => true,
            // Budgets are held against the plan's shapes and the clock, never against the text.
            TrainingFailure::Interrupted(_)
            | TrainingFailure::PlanRejected(_)
            | TrainingFailure::OverBudget(_) => false,
        };
        if let State::InSession(session) = &self.state
            && session.is_private()
            && depends_on_data
        {
            let zeros = vec![0.0; session.plan().adapter.dimension];
            return self.handle_trained(zeros, now);
        }
        self.in_flight = false;
        self.withdraw(failure.result(), &failure.to_string(), now);
    }

    /// Answers [`Action::Install`]: the release serves.
    pub fn handle_installed(&mut self, now: UnixMillis) {
        self.in_flight = false;
        if let State::Installing(order) = &self.state {
            let version = order.manifest.version;
            self.setup.release_version = version;
            self.setup.release_version_max = self.setup.release_version_max.max(version);
            self.events.push(Event::ReleaseActive(version));
            self.state = self.report_release(version, wire::ReleaseState::Active);
        } else {
            self.rest(now);
        }
    }

    /// Answers [`Action::Install`] that failed: the previous model serves, and this version is not
    /// tried again.
    pub fn handle_install_failed(&mut self, reason: &str, now: UnixMillis) {
        self.in_flight = false;
        if let State::Installing(order) = &self.state {
            let version = order.manifest.version;
            self.setup.release_version_max = self.setup.release_version_max.max(version);
            self.events.push(Event::ReleaseRejected { version, reason: reason.to_owned() });
            self.state = self.report_release(version, wire::ReleaseState::Rejected);
        } else {
            self.rest(now);
        }
    }

    fn secure_step(&self) -> u32 {
        if let State::InSession(session) = &self.state { session.secure_step() } else { 0 }
    }

    /// Write-ahead: a message of secure aggregation leaves only once it is on disk, and a session that is
    /// over is taken off it. What the masked vector gives away is charged in the same write.
    fn unsaved_record(&mut self, now: UnixMillis) -> Option<DeviceRecord> {
        if self.secure_step() != self.saved_step
            && let Err(refusal) = self.charge(now)
        {
            self.withdraw(TaskResult::PlanRejected, &refusal, now);
        }
        let session = if let State::InSession(session) = &self.state { Some(&**session) } else { None };
        if self.secure_step() == self.saved_step {
            return None;
        }
        if let Some((plan, round)) = session.and_then(Session::revealing) {
            self.revealed.insert(plan, round);
        }
        Some(DeviceRecord::write(&self.revealed, session, &self.ledger))
    }

    /// Charges the contribution that is about to leave. It was found affordable when the session began, so
    /// this fails only if the clock or another task has come between.
    fn charge(&mut self, now: UnixMillis) -> Result<(), String> {
        let State::InSession(session) = &self.state else { return Ok(()) };
        if session.is_unprotected() {
            self.ledger.note_unprotected();
        }
        let Some(charge) = session.due_charge(&self.setup.floors.privacy) else { return Ok(()) };
        self.ledger.charge(&charge, &self.setup.floors.privacy, now.0).map_err(|error| error.to_string())
    }

    fn current_action(&self) -> Action {
        match &self.state {
            State::Idle(_) => unreachable!("woken before"),
            State::CheckingIn(request) => Action::Call(Request::CheckIn(request.clone())),
            State::Choosing(policy) => Action::Choose(policy.clone()),
            State::InSession(session) => session.action(),
            State::Reporting(request) => Action::Call(Request::ReportTaskResult(request.clone())),
            State::Fetching(_, digest) => Action::Fetch(*digest),
            State::Installing(order) => Action::Install(order.clone()),
            State::ReportingRelease(request) => Action::Call(Request::ReportRelease(request.clone())),
        }
    }

    /// What arrives after the deadline is refused anyway, so nothing is repeated for ever.
    fn leave_late_session(&mut self, now: UnixMillis) {
        if matches!(&self.state, State::InSession(session) if session.is_late(now)) {
            self.events.push(Event::Ended("the round's deadline is over".into()));
            self.rest(now);
        }
    }

    fn wake(&mut self, now: UnixMillis) {
        self.policies_in_a_row = 0;
        self.state = match (self.release.take(), &self.policy) {
            (Some(manifest), _) => {
                let digest = manifest.base_model;
                State::Fetching(Box::new(InstallOrder { manifest }), digest)
            }
            (None, Some((_, policy))) if self.chosen.is_none() => State::Choosing(policy.clone()),
            (None, _) => State::CheckingIn(self.check_in(now)),
        };
    }

    fn check_in(&mut self, now: UnixMillis) -> wire::CheckInRequest {
        let nonce: [u8; 16] = self.rng.random();
        // A place in a round that the ledger would then refuse helps nobody.
        let population = self.setup.population.as_str();
        let open = |task: &Name| !self.ledger.is_closed(Scope::of_task(population, task.as_str()), now.0);
        let mut tasks = self.chosen.take().unwrap_or_default();
        tasks.retain(open);
        self.chosen = Some(tasks.clone());
        wire::CheckInRequest {
            population: self.setup.population.as_str().into(),
            nonce: nonce.to_vec(),
            capabilities: Some(wire::DeviceCapabilities {
                client_version: env!("CARGO_PKG_VERSION").into(),
                device_class: self.setup.device_class.clone(),
                aggregation_protocols: self.protocols().map(i32::from).collect(),
            }),
            policy_sha256: self.policy.as_ref().map(|(sha256, _)| sha256.clone()).unwrap_or_default(),
            eligible_tasks: tasks.iter().map(|task| task.as_str().into()).collect(),
            release_version: self.setup.release_version,
        }
    }

    /// What it can take part in: secure aggregation only with an identity.
    fn protocols(&self) -> impl Iterator<Item = wire::AggregationProtocol> {
        let able = |protocol: &wire::AggregationProtocol| {
            *protocol != wire::AggregationProtocol::SecaggPlus || self.setup.identity.is_some()
        };
        self.setup.floors.protocols.iter().copied().filter(able)
    }

    fn handle_check_in(&mut self, answer: wire::CheckInResponse, now: UnixMillis) {
        let named = self.chosen.take().unwrap_or_default();
        self.return_at = self.draw_return(answer.retry_window.unwrap_or_default(), now);
        let outcome = self.take_offer(answer, &named, now).unwrap_or_else(|refusal| {
            self.events.push(Event::Refused(refusal));
            None
        });
        match outcome {
            Some(state) => self.state = state,
            None => self.rest(now),
        }
    }

    fn handle_session_response(&mut self, mut session: Box<Session>, response: Response, now: UnixMillis) {
        let policy = self.secure_policy(session.plan());
        let mut around = Surroundings {
            policy: &policy,
            identity: self.setup.identity.as_deref(),
            rng: &mut self.rng,
            now,
        };
        match session.response(response, &mut around) {
            Step::Continue { not_before_ms } => {
                self.not_before = now.plus(not_before_ms.min(RETRY_DELAY_MS_MAX));
                self.state = State::InSession(session);
            }
            Step::Contributed => {
                let (task, round) = (session.task().clone(), session.round());
                self.events.push(Event::Contributed { task, round });
                self.rest(now);
            }
            Step::Ended(reason) => {
                self.events.push(Event::Ended(reason));
                self.rest(now);
            }
            Step::Refused(reason) => {
                self.events.push(Event::Refused(reason));
                self.state = report_task(session.token(), TaskResult::AggregationRefused);
            }
        }
    }

    fn secure_policy(&self, plan: &TaskPlan) -> DevicePolicy {
        DevicePolicy {
            population: self.setup.population.as_str().to_owned(),
            registrars: self.setup.registrars.clone(),
            floors: self.setup.floors.secure_floors(plan),
        }
    }

    fn withdraw(&mut self, result: TaskResult, reason: &str, now: UnixMillis) {
        let State::InSession(session) = &self.state else { return self.rest(now) };
        self.events.push(Event::Ended(reason.to_owned()));
        self.state = report_task(session.token(), result);
    }

    fn report_release(&self, version: u64, state: wire::ReleaseState) -> State {
        let population = self.setup.population.as_str().into();
        State::ReportingRelease(wire::ReportReleaseRequest { population, version, state: state.into() })
    }

    fn give_up(&mut self, reaction: Reaction, now: UnixMillis) {
        self.failures = 0;
        let stay_away = match reaction {
            Reaction::RestartSession => BACKOFF_MS_MIN,
            Reaction::RetrySame | Reaction::StopUntilWindow => BACKOFF_MS_MAX,
            Reaction::StopUntilUpdate => RETRY_DELAY_MS_MAX,
        };
        let jitter = self.rng.random_range(0..=stay_away / 2);
        self.return_at = self.return_at.max(now.plus(stay_away + jitter));
        self.state = State::Idle(self.return_at);
        self.not_before = now;
    }

    /// Back to idle until the window, or on to a release that waits.
    fn rest(&mut self, now: UnixMillis) {
        let until = if self.release.is_some() { now } else { self.return_at };
        (self.state, self.not_before) = (State::Idle(until), now);
    }

    fn draw_return(&mut self, window: wire::RetryWindow, now: UnixMillis) -> UnixMillis {
        let min = window.delay_min_ms.clamp(RETRY_DELAY_MS_MIN, RETRY_DELAY_MS_MAX);
        let max = window.delay_max_ms.clamp(min, RETRY_DELAY_MS_MAX);
        now.plus(self.rng.random_range(min..=max))
    }

    fn backoff(&mut self) -> u64 {
        let full = (BACKOFF_MS_MIN << self.failures.min(16)).min(BACKOFF_MS_MAX);
        self.rng.random_range(full / 2..=full)
    }
}

fn report_task(session_token: Vec<u8>, result: TaskResult) -> State {
    State::Reporting(wire::ReportTaskResultRequest { session_token, result: result.into() })
}

#[cfg(test)]
mod tests;
