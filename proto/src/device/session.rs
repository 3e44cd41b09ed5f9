//! One session of the device: fetch, train, then contribute, in the clear (upload, submit) or by the steps
//! of secure aggregation (`secure.rs`).

use super::{
    Action, DeviceSetup, Request, Response, TrainOrder,
    kept::KeptSession,
    offer::inline,
    secure::{SecureStage, Surroundings},
    upload::Upload,
};
use crate::{
    digest::Digest,
    error::within,
    limits::{BACKOFF_MS_MIN, CHECKPOINT_HEADER_BYTES_MAX, RETRY_DELAY_MS_MAX},
    name::Name,
    plan::{TaskPlan, rotation_context},
    secure::parse_nonce,
    sign::Purpose,
    time::UnixMillis,
    wire::{self, AggregationProtocol, submit_update_response::Outcome},
};
use fleetune_privacy::{
    Charge, ChargeId, ClippingNorm, PrivacyPolicy, Purpose as BudgetPurpose, Scope, clip,
};
use fleetune_secagg::{RingVector, SessionId, SessionParts, Terms};
use rand_chacha::ChaCha20Rng;

/// Number of the step whose message is the masked vector.
const MASKED_STEP: u32 = 3;

enum Stage {
    FetchingBase,
    FetchingCheckpoint,
    Training,
    Uploading(Upload),
    Submitting(Upload),
    Secure(Box<SecureStage>),
}

/// What an answer leads to.
pub(super) enum Step {
    Continue {
        not_before_ms: u64,
    },
    Contributed,
    Ended(String),
    /// A check of secure aggregation failed; the coordinator is told, and nothing was revealed.
    Refused(String),
}

pub(super) struct Session {
    token: Vec<u8>,
    order: TrainOrder,
    deadline: UnixMillis,
    plan_sha256: [u8; 32],
    nonce: Option<[u8; 32]>,
    /// Of this round; only before the update is encoded.
    clipping_norm: ClippingNorm,
    stage: Stage,
}

impl Session {
    /// Verifies an assignment and its plan against the tasks the device has named; the error says
    /// what is wrong.
    pub(super) fn accept(
        assignment: wire::TaskAssignment,
        named: &[Name],
        setup: &DeviceSetup,
        now: UnixMillis,
    ) -> Result<Self, String> {
        let checkpoint =
            Digest::parse("assignment.checkpoint", assignment.checkpoint).map_err(|e| e.to_string())?;
        let (plan, plan_sha256) = verified_plan(&assignment.plan.unwrap_or_default(), setup, now)?;
        if plan.task.as_str() != assignment.task {
            return Err(format!("plan refused: it is for task {}, not {:?}", plan.task, assignment.task));
        }
        if !named.contains(&plan.task) {
            return Err(format!("assignment refused: this device has not named task {}", plan.task));
        }
        let (bytes, bytes_max) =
            (checkpoint.size, plan.adapter.dimension as u64 * 4 + CHECKPOINT_HEADER_BYTES_MAX);
        if bytes > bytes_max {
            return Err(format!("assignment refused: checkpoint of {bytes} bytes; at most {bytes_max}"));
        }
        let deadline = now.plus(assignment.deadline_ms.min(RETRY_DELAY_MS_MAX));
        // More rounds than the plan says would be more sums than the device has agreed to.
        let round = within("assignment.round", assignment.round, 0..=plan.rounds.saturating_sub(1))
            .map_err(|e| e.to_string())?;
        let nonce = match plan.aggregation.protocol {
            AggregationProtocol::SecaggPlus => {
                if setup.identity.is_none() {
                    return Err(
                        "assignment refused: this device has no identity for secure aggregation".into()
                    );
                }
                Some(parse_nonce(&assignment.aggregation_nonce).map_err(|e| e.to_string())?)
            }
            AggregationProtocol::InsecurePlaintext | AggregationProtocol::Unspecified => None,
        };
        let clipping_norm = round_norm(&plan, assignment.clipping_norm)?;
        let order = TrainOrder { plan, round, attempt: assignment.attempt, checkpoint };
        let (token, stage) = (assignment.session_token, Stage::FetchingBase);
        Ok(Self { token, order, deadline, plan_sha256, nonce, clipping_norm, stage })
    }

    /// Takes up a session that was saved in a step of secure aggregation.
    pub(super) fn restore(kept: &KeptSession) -> Option<Self> {
        let stage = Stage::Secure(Box::new(SecureStage::restore(kept)?));
        let checkpoint = Digest { sha256: kept.checkpoint_sha256.as_slice().try_into().ok()?, size: 0 };
        let plan = TaskPlan::parse(&kept.plan).ok()?;
        let order = TrainOrder { plan, round: kept.round, attempt: kept.attempt, checkpoint };
        let plan_sha256 = kept.plan_sha256.as_slice().try_into().ok()?;
        let (token, deadline) = (kept.token.clone(), UnixMillis(kept.deadline_unix_ms));
        let clipping_norm = order.plan.aggregation.clipping_norm;
        Some(Self { token, order, deadline, plan_sha256, nonce: None, clipping_norm, stage })
    }

    /// What must be on disk before the session's next message leaves; none while nothing is at stake.
    pub(super) fn to_kept(&self) -> Option<KeptSession> {
        let Stage::Secure(secure) = &self.stage else { return None };
        let mut kept = KeptSession {
            token: self.token(),
            plan: self.order.plan.to_bytes(),
            plan_sha256: self.plan_sha256.to_vec(),
            checkpoint_sha256: self.order.checkpoint.sha256.to_vec(),
            round: self.order.round,
            attempt: self.order.attempt,
            deadline_unix_ms: self.deadline.0,
            ..KeptSession::default()
        };
        secure.keep(&mut kept);
        Some(kept)
    }

    /// Changes with every message that is new: the number of the step of secure aggregation, 0 before.
    pub(super) fn secure_step(&self) -> u32 {
        if let Stage::Secure(secure) = &self.stage { secure.number() } else { 0 }
    }

    /// The plan and round in which shares are about to be revealed.
    pub(super) fn revealing(&self) -> Option<([u8; 32], u32)> {
        match &self.stage {
            Stage::Secure(secure) if secure.is_revealing() => Some((self.plan_sha256, self.order.round)),
            Stage::Secure(_)
            | Stage::FetchingBase
            | Stage::FetchingCheckpoint
            | Stage::Training
            | Stage::Uploading(_)
            | Stage::Submitting(_) => None,
        }
    }

    /// What the contribution costs; none without differential privacy. A simulated noise cohort costs nothing
    /// that is worth counting: it protects nobody, and only simulated devices take part.
    pub(super) fn charge(&self, policy: &PrivacyPolicy) -> Option<Charge> {
        let (plan, order) = (self.order.plan.privacy_plan()?, &self.order);
        let p = plan.parameters();
        if p.noise_cohort.is_some() {
            return None;
        }
        Some(Charge {
            scope: self.scope(),
            purpose: BudgetPurpose::Training,
            id: ChargeId::Unnamed,
            round: order.round,
            curve: plan.participation_curve(),
            participations_max: p.participations_max,
            separation_ms: p.separation_ms.max(policy.separation_ms_min),
            separation_rounds: p.separation_rounds,
        })
    }

    /// The charge that must be on disk before the session's next message leaves: the masked vector's. Its name
    /// comes from the keys that this device drew, never from the coordinator, whose word could name all charges
    /// alike and so make all but the first free.
    pub(super) fn due_charge(&self, policy: &PrivacyPolicy) -> Option<Charge> {
        let Stage::Secure(secure) = &self.stage else { return None };
        if secure.number() != MASKED_STEP {
            return None;
        }
        Some(Charge { id: ChargeId::Fresh(secure.keys_sha256()), ..self.charge(policy)? })
    }

    /// True as a masked vector without differential privacy is about to leave.
    pub(super) fn is_unprotected(&self) -> bool {
        self.secure_step() == MASKED_STEP && self.order.plan.aggregation.privacy.is_none()
    }

    /// The task, as the ledger knows it.
    pub(super) fn scope(&self) -> Scope {
        Scope::of_task(self.order.plan.population.as_str(), self.order.plan.task.as_str())
    }

    /// True if the plan promises privacy: then whether training failed must not be told, and zeros take part
    /// instead.
    pub(super) fn is_private(&self) -> bool {
        self.order.plan.aggregation.privacy.is_some()
    }

    pub(super) fn plan(&self) -> &TaskPlan {
        &self.order.plan
    }

    pub(super) fn plan_sha256(&self) -> [u8; 32] {
        self.plan_sha256
    }

    pub(super) fn is_secure(&self) -> bool {
        self.nonce.is_some()
    }

    pub(super) fn task(&self) -> &Name {
        &self.order.plan.task
    }

    pub(super) fn round(&self) -> u32 {
        self.order.round
    }

    /// True once a contribution would be refused.
    pub(super) fn is_late(&self, now: UnixMillis) -> bool {
        now >= self.deadline
    }

    pub(super) fn token(&self) -> Vec<u8> {
        self.token.clone()
    }

    pub(super) fn action(&self) -> Action {
        match &self.stage {
            Stage::FetchingBase => Action::Fetch(self.order.plan.base_model),
            Stage::FetchingCheckpoint => Action::Fetch(self.order.checkpoint),
            Stage::Training => Action::Train(Box::new(self.order.clone())),
            Stage::Uploading(upload) => upload.write_chunk(&self.token),
            Stage::Submitting(upload) => Action::Call(Request::SubmitUpdate(wire::SubmitUpdateRequest {
                session_token: self.token(),
                update: Some(upload.resource()),
            })),
            Stage::Secure(secure) => secure.action(&self.token),
        }
    }

    pub(super) fn fetched(&mut self) {
        self.stage = match self.stage {
            Stage::FetchingBase => Stage::FetchingCheckpoint,
            Stage::FetchingCheckpoint => Stage::Training,
            Stage::Training | Stage::Uploading(_) | Stage::Submitting(_) | Stage::Secure(_) => return,
        };
    }

    /// The road from a raw update to what leaves: clip, encode (with differential privacy also rotate, round and
    /// noise), then pack or mask.
    pub(super) fn trained(
        &mut self,
        delta: Vec<f32>,
        setup: &DeviceSetup,
        rng: &mut ChaCha20Rng,
    ) -> Result<(), String> {
        let (plan, expected) = (&self.order.plan.aggregation, self.order.plan.adapter.dimension);
        if delta.len() != expected {
            return Err(format!("update of {} values; the plan's adapter has {expected}", delta.len()));
        }
        let vector = match self.order.plan.privacy_plan() {
            Some(privacy) => {
                let rotation = rotation_context(&self.plan_sha256, self.order.round);
                let own = [rotation.as_slice(), &self.order.attempt.to_le_bytes()].concat();
                let noised = privacy.encode(delta, self.clipping_norm, &rotation, &setup.noise, &own);
                RingVector::from_signed(plan.ring_bits, noised.map_err(|e| e.to_string())?.values())
            }
            None => {
                let clipped = clip(delta, plan.clipping_norm).map_err(|e| e.to_string())?;
                let encoded = plan.fixed_point().encode(&clipped).map_err(|e| e.to_string())?;
                RingVector::from_signed(plan.ring_bits, encoded.values())
            }
        };
        self.stage = match (self.terms(), &setup.identity) {
            (Some(terms), Some(identity)) => {
                Stage::Secure(Box::new(SecureStage::begin(terms, identity, vector, rng)))
            }
            (_, _) => {
                let upload = Upload::new(vector.pack());
                if upload.is_inline() { Stage::Submitting(upload) } else { Stage::Uploading(upload) }
            }
        };
        Ok(())
    }

    pub(super) fn response(&mut self, response: Response, around: &mut Surroundings<'_>) -> Step {
        match (&mut self.stage, response) {
            (Stage::Uploading(upload), Response::WriteBlobChunk(answer)) => {
                let not_before_ms = upload.written(&answer);
                if upload.is_complete() {
                    self.stage = Stage::Submitting(upload.clone());
                }
                Step::Continue { not_before_ms }
            }
            (Stage::Submitting(_), Response::SubmitUpdate(answer)) => submitted(answer),
            (Stage::Secure(secure), response) => secure.response(response, around),
            (_, _) => Step::Ended("the answer is for another step".into()),
        }
    }

    /// What a session of secure aggregation is about; none under the plaintext protocol.
    fn terms(&self) -> Option<Terms> {
        let (plan, order) = (&self.order.plan, &self.order);
        let session = SessionId::derive(&SessionParts {
            population: plan.population.as_str(),
            task: plan.task.as_str(),
            round: order.round,
            attempt: order.attempt,
            model_sha256: order.checkpoint.sha256,
            config_sha256: self.plan_sha256,
            server_nonce: self.nonce?,
        });
        let suite = plan.aggregation.secure?.mask_suite;
        let (bits, dimension) = (plan.aggregation.ring_bits, plan.vector_len());
        Some(Terms { session, config_sha256: self.plan_sha256, suite, bits, dimension })
    }
}

/// The clipping norm of a round: the plan's, or under adaptive clipping the coordinator's within the plan's
/// bounds.
fn round_norm(plan: &TaskPlan, assigned: f32) -> Result<ClippingNorm, String> {
    let own = plan.aggregation.clipping_norm;
    if assigned == 0.0 {
        return Ok(own);
    }
    let refused = |problem: &str| format!("assignment refused: clipping norm {assigned}: {problem}");
    let Some(adaptation) = plan.aggregation.privacy.and_then(|privacy| privacy.adaptation) else {
        return Err(refused("the plan's clipping norm does not vary"));
    };
    let norm = ClippingNorm::new(assigned).map_err(|error| refused(&error.to_string()))?;
    let (low, high) = adaptation.norms();
    if (low.value()..=high.value()).contains(&assigned) {
        Ok(norm)
    } else {
        Err(refused(&format!("the plan allows {} to {}", low.value(), high.value())))
    }
}

fn submitted(answer: wire::SubmitUpdateResponse) -> Step {
    match answer.outcome {
        Some(Outcome::Pending(pending)) => {
            Step::Continue { not_before_ms: pending.poll_after_ms.max(BACKOFF_MS_MIN) }
        }
        Some(Outcome::Ended(ended)) => ended_step(&ended),
        None => Step::Ended("submit_update.outcome: missing".into()),
    }
}

/// The coordinator says that the session is over.
pub(super) fn ended_step(ended: &wire::Ended) -> Step {
    match wire::EndReason::try_from(ended.reason) {
        Ok(wire::EndReason::Contributed) => Step::Contributed,
        Ok(wire::EndReason::TooLate) => Step::Ended("too late for the round".into()),
        Ok(wire::EndReason::RoundFailed) => Step::Ended("the round failed".into()),
        Ok(wire::EndReason::Unspecified) | Err(_) => Step::Ended("ended for an unknown reason".into()),
    }
}

fn verified_plan(
    resource: &wire::Resource,
    setup: &DeviceSetup,
    now: UnixMillis,
) -> Result<(TaskPlan, [u8; 32]), String> {
    let envelope = inline("assignment.plan", resource).map_err(|e| e.to_string())?;
    let bytes = setup.trust_root.open(Purpose::Plan, envelope).map_err(|e| e.to_string())?;
    let plan = TaskPlan::parse(&bytes).map_err(|e| e.to_string())?;
    if plan.population != setup.population {
        return Err(format!("plan refused: it is for population {}", plan.population));
    }
    if plan.expires <= now {
        return Err("plan refused: expired".into());
    }
    setup.floors.check(&plan).map_err(|e| e.to_string())?;
    Ok((plan, Digest::of(&bytes).sha256))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::{plan, private_plan};

    /// A coordinator that sends another clipping norm than the plan allows: it could not weaken privacy, but it
    /// could make one device's update stand out or vanish.
    #[test]
    fn clipping_norms_outside_the_plan_are_refused() {
        let check = |plan: &TaskPlan, norm: f32, expected: Result<f32, &str>| {
            let found = round_norm(plan, norm).map(ClippingNorm::value);
            match (found, expected) {
                (Ok(found), Ok(expected)) => assert!((found - expected).abs() < 1e-9),
                (Err(found), Err(expected)) => assert!(found.contains(expected), "{found}"),
                (found, expected) => panic!("{found:?} for {expected:?}"),
            }
        };
        check(&plan(), 0.0, Ok(10.0));
        check(&plan(), 5.0, Err("the plan's clipping norm does not vary"));
        check(&private_plan(), 0.0, Ok(10.0));
        check(&private_plan(), 0.5, Ok(0.5));
        check(&private_plan(), 0.05, Err("the plan allows 0.1 to 10"));
        check(&private_plan(), 11.0, Err("the plan allows 0.1 to 10"));
        check(&private_plan(), f32::NAN, Err("clipping norm NaN"));
        check(&private_plan(), f32::INFINITY, Err("clipping norm inf"));
    }
}
