//! One session of the device: fetch, train, upload, submit.

use super::{Action, DeviceSetup, Request, Response, TrainOrder, inline};
use crate::{
    digest::Digest,
    error::within,
    limits::{BACKOFF_MS_MIN, CHECKPOINT_HEADER_BYTES_MAX, INLINE_BYTES_MAX, RETRY_DELAY_MS_MAX, ROUNDS_MAX},
    name::Name,
    plan::TaskPlan,
    sign::Purpose,
    time::UnixMillis,
    transfer::chunk_at,
    wire::{self, submit_update_response::Outcome},
};
use fleetune_privacy::clip;
use fleetune_secagg::RingVector;

enum Stage {
    FetchingBase,
    FetchingCheckpoint,
    Training,
    Uploading { update: Vec<u8>, digest: Digest, offset: u64 },
    Submitting { update: Vec<u8>, digest: Digest },
}

/// What an answer leads to.
pub(super) enum Step {
    Continue { not_before_ms: u64 },
    Contributed,
    Ended(String),
}

pub(super) struct Session {
    token: Vec<u8>,
    order: TrainOrder,
    deadline: UnixMillis,
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
        let plan = verified_plan(&assignment.plan.unwrap_or_default(), setup, now)?;
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
        let round =
            within("assignment.round", assignment.round, 0..=ROUNDS_MAX).map_err(|e| e.to_string())?;
        let order = TrainOrder { plan, round, attempt: assignment.attempt, checkpoint };
        Ok(Self { token: assignment.session_token, order, deadline, stage: Stage::FetchingBase })
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
            Stage::Uploading { update, digest, offset } => self.write_chunk(update, *digest, *offset),
            Stage::Submitting { update, digest } => self.submit(update, *digest),
        }
    }

    pub(super) fn fetched(&mut self) {
        self.stage = match self.stage {
            Stage::FetchingBase => Stage::FetchingCheckpoint,
            Stage::FetchingCheckpoint => Stage::Training,
            Stage::Training | Stage::Uploading { .. } | Stage::Submitting { .. } => return,
        };
    }

    /// The road from a raw update to the bytes that leave: clip, encode, pack.
    pub(super) fn trained(&mut self, delta: Vec<f32>) -> Result<(), String> {
        let (plan, expected) = (&self.order.plan.aggregation, self.order.plan.adapter.dimension);
        if delta.len() != expected {
            return Err(format!("update of {} values; the plan's adapter has {expected}", delta.len()));
        }
        let clipped = clip(delta, plan.clipping_norm).map_err(|e| e.to_string())?;
        let encoded = plan.fixed_point().encode(&clipped).map_err(|e| e.to_string())?;
        let update = RingVector::from_signed(plan.ring_bits, encoded.values()).pack();
        let digest = Digest::of(&update);
        self.stage = if update.len() <= INLINE_BYTES_MAX {
            Stage::Submitting { update, digest }
        } else {
            Stage::Uploading { update, digest, offset: 0 }
        };
        Ok(())
    }

    pub(super) fn response(&mut self, response: Response) -> Step {
        match (&mut self.stage, response) {
            (Stage::Uploading { update, digest, offset }, Response::WriteBlobChunk(answer)) => {
                let before = std::mem::replace(offset, answer.committed_bytes.min(digest.size));
                let not_before_ms = if *offset > before { 0 } else { BACKOFF_MS_MIN };
                if *offset == digest.size {
                    self.stage = Stage::Submitting { update: std::mem::take(update), digest: *digest };
                }
                Step::Continue { not_before_ms }
            }
            (Stage::Submitting { .. }, Response::SubmitUpdate(answer)) => self.submitted(answer),
            (_, _) => Step::Ended("the answer is for another step".into()),
        }
    }

    fn submitted(&mut self, answer: wire::SubmitUpdateResponse) -> Step {
        match answer.outcome {
            Some(Outcome::Pending(pending)) => {
                Step::Continue { not_before_ms: pending.poll_after_ms.max(BACKOFF_MS_MIN) }
            }
            Some(Outcome::Ended(ended)) => match wire::EndReason::try_from(ended.reason) {
                Ok(wire::EndReason::Contributed) => Step::Contributed,
                Ok(wire::EndReason::TooLate) => Step::Ended("too late for the round".into()),
                Ok(wire::EndReason::RoundFailed) => Step::Ended("the round failed".into()),
                Ok(wire::EndReason::Unspecified) | Err(_) => {
                    Step::Ended("ended for an unknown reason".into())
                }
            },
            None => Step::Ended("submit_update.outcome: missing".into()),
        }
    }

    fn write_chunk(&self, update: &[u8], digest: Digest, offset: u64) -> Action {
        let (data, crc32c) = chunk_at(update, offset);
        Action::Call(Request::WriteBlobChunk(wire::WriteBlobChunkRequest {
            session_token: self.token(),
            digest: Some(digest.to_wire()),
            offset,
            data: data.to_vec(),
            crc32c,
        }))
    }

    fn submit(&self, update: &[u8], digest: Digest) -> Action {
        let source = if update.len() <= INLINE_BYTES_MAX {
            wire::resource::Source::Inline(update.to_vec())
        } else {
            wire::resource::Source::Blob(digest.to_wire())
        };
        let update = Some(wire::Resource { source: Some(source) });
        Action::Call(Request::SubmitUpdate(wire::SubmitUpdateRequest { session_token: self.token(), update }))
    }
}

fn verified_plan(
    resource: &wire::Resource,
    setup: &DeviceSetup,
    now: UnixMillis,
) -> Result<TaskPlan, String> {
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
    Ok(plan)
}
