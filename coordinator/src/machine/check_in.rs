//! The one way in: policy first, then a place in a round, then a time to come back.

use super::{
    Core, CoreEvent,
    answers::{Answer, Nonce, Outcome},
    error::invalid,
    task::{Opener, Task},
};
use crate::limits::CAPABILITY_BYTES_MAX;
use fleetune_proto::{
    AggregationProtocol, CallFailure, Name, SessionToken, TASKS_MAX, UnixMillis,
    wire::{self, resource::Source},
};
use rand::RngExt;

/// A check-in, parsed.
struct CheckIn {
    nonce: Nonce,
    policy_sha256: Vec<u8>,
    eligible: Vec<Name>,
    protocols: Vec<AggregationProtocol>,
    release_version: u64,
}

impl Core {
    pub(super) fn answer_check_in(
        &mut self,
        request: &wire::CheckInRequest,
        now: UnixMillis,
    ) -> Result<wire::CheckInResponse, CallFailure> {
        self.check_population(&request.population)?;
        let check_in = parse(request)?;
        self.pace.arrival(now);
        let answer = match self.answers.recall(&check_in.nonce) {
            Some(answer) => answer.clone(),
            None => self.decide(&check_in, now),
        };
        Ok(self.respond(answer, check_in.release_version, now))
    }

    fn decide(&mut self, check_in: &CheckIn, now: UnixMillis) -> Answer {
        let answer = if check_in.policy_sha256 != self.policy.sha256 {
            Answer { outcome: Outcome::Policy, retry_window: self.pace.soon(0) }
        } else if let Some(answer) = self.select(check_in, now) {
            answer
        } else {
            Answer { outcome: Outcome::NoAssignment, retry_window: self.window_without_work(check_in) }
        };
        self.answers.remember(check_in.nonce, answer.clone(), now);
        answer
    }

    /// A place in the eligible task whose turn it is.
    fn select(&mut self, check_in: &CheckIn, now: UnixMillis) -> Option<Answer> {
        if !self.sessions.has_room() {
            return None;
        }
        let fits =
            |task: &&Task| task.accepts(now) && check_in.protocols.contains(&task.spec.aggregation.protocol);
        let eligible = check_in.eligible.iter().filter_map(|name| self.tasks.get(name)).filter(fits);
        let name = eligible.min_by_key(|task| (task.last_turn, &task.spec.name))?.spec.name.clone();
        self.turns += 1;
        self.join(&name, now)
    }

    fn join(&mut self, name: &Name, now: UnixMillis) -> Option<Answer> {
        let token = SessionToken::from_random(self.rng.random());
        let opener = Opener { setup: &self.setup, nonce: self.rng.random(), now };
        let task = self.tasks.get_mut(name)?;
        task.last_turn = self.turns;
        let (participant, opened) = task.join(&opener)?;
        let is_secure = task.plan.aggregation.secure.is_some();
        let (norm, adapts) =
            (task.clipping_norm(), task.plan.aggregation.privacy.is_some_and(|p| p.adaptation.is_some()));
        let key = self.sessions.open(&token, name.clone(), participant, is_secure);
        let (checkpoint, plan) = (task.checkpoint, task.plan_envelope.clone());
        let selection_ms = task.spec.round_policy.selection_ms;
        let open = task.open()?;
        open.sessions.push(key);
        let (round, attempt) = (open.round.id().round, open.round.id().attempt);
        let deadline = open.round.session_deadline().unwrap_or(now);
        let clipping_norm = if adapts { norm.value() } else { 0.0 };
        let aggregation_nonce = if is_secure { open.nonce.to_vec() } else { Vec::new() };
        let assignment = wire::TaskAssignment {
            task: name.as_str().into(),
            session_token: token.to_wire(),
            plan: Some(wire::Resource { source: Some(Source::Inline(plan)) }),
            round,
            attempt,
            checkpoint: Some(checkpoint.to_wire()),
            deadline_ms: 0,
            aggregation_nonce,
            clipping_norm,
        };
        // A device that came back while its round still selects would count twice in one sum.
        let retry_window = self.pace.soon(open.opened.plus(selection_ms).since(now));
        if opened {
            self.events.push(CoreEvent::RoundOpened { task: name.clone(), round, attempt });
        }
        let outcome = Outcome::Assignment { assignment: Box::new(assignment), deadline };
        Some(Answer { outcome, retry_window })
    }

    /// Soon if a task of the device's still has rounds to run.
    fn window_without_work(&self, check_in: &CheckIn) -> wire::RetryWindow {
        let active = |name: &Name| self.tasks.get(name).is_some_and(Task::is_active);
        if check_in.eligible.iter().any(active) { self.pace.soon(0) } else { self.pace.idle() }
    }

    fn respond(&self, answer: Answer, release_version: u64, now: UnixMillis) -> wire::CheckInResponse {
        use wire::check_in_response::Outcome as Wire;
        let inline = |bytes: &[u8]| wire::Resource { source: Some(Source::Inline(bytes.to_vec())) };
        let outcome = match answer.outcome {
            Outcome::Policy => Wire::Policy(inline(&self.policy.bytes)),
            Outcome::Assignment { assignment, deadline } => {
                Wire::Assignment(wire::TaskAssignment { deadline_ms: deadline.since(now), ..*assignment })
            }
            Outcome::NoAssignment => Wire::NoAssignment(wire::NoAssignment {}),
        };
        let newer =
            self.release.as_ref().filter(|held| held.version() > release_version && held.is_valid(now));
        wire::CheckInResponse {
            outcome: Some(outcome),
            retry_window: Some(answer.retry_window),
            release_manifest: newer.map(|release| inline(&release.envelope)),
        }
    }
}

fn parse(request: &wire::CheckInRequest) -> Result<CheckIn, CallFailure> {
    let length = request.nonce.len();
    let nonce = request.nonce.as_slice().try_into();
    let nonce = nonce.map_err(|_| invalid(&format!("check_in.nonce: {length} bytes; a nonce has 16")))?;
    let capabilities = request.capabilities.clone().unwrap_or_default();
    for text in [&capabilities.client_version, &capabilities.device_class] {
        if text.len() > CAPABILITY_BYTES_MAX {
            let problem =
                format!("check_in.capabilities: {} bytes; at most {CAPABILITY_BYTES_MAX}", text.len());
            return Err(invalid(&problem));
        }
    }
    if request.eligible_tasks.len() > TASKS_MAX {
        return Err(invalid(&format!("check_in.eligible_tasks: at most {TASKS_MAX}")));
    }
    let parse_task = |task: &String| Name::parse("check_in.eligible_tasks", task);
    let eligible = request.eligible_tasks.iter().map(parse_task).collect::<Result<_, _>>();
    let known = |protocol: &i32| AggregationProtocol::try_from(*protocol).ok();
    Ok(CheckIn {
        nonce,
        policy_sha256: request.policy_sha256.clone(),
        eligible: eligible.map_err(|error| invalid(&error))?,
        protocols: capabilities.aggregation_protocols.iter().filter_map(known).collect(),
        release_version: request.release_version,
    })
}
