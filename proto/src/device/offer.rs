//! What a check-in brings: a policy, an assignment, a release. Everything in it is verified before it counts.

use super::{Device, Event, State, report_task, session::Session};
use crate::{
    digest::Digest,
    error::WireError,
    limits::{INLINE_BYTES_MAX, POLICIES_IN_A_ROW_MAX},
    manifest::ReleaseManifest,
    name::Name,
    policy::PopulationPolicy,
    sign::Purpose,
    time::UnixMillis,
    wire::{self, TaskResult},
};
use fleetune_privacy::LedgerError;

impl Device {
    /// Reads a check-in's answer: the next state, or none when there is nothing to do.
    pub(super) fn take_offer(
        &mut self,
        answer: wire::CheckInResponse,
        named: &[Name],
        now: UnixMillis,
    ) -> Result<Option<State>, String> {
        use wire::check_in_response::Outcome;
        if let Some(resource) = answer.release_manifest
            && let Err(refusal) = self.take_release(&resource, now)
        {
            self.events.push(Event::Refused(refusal));
        }
        match answer.outcome {
            Some(Outcome::Policy(resource)) => self.take_policy(&resource).map(Some),
            Some(Outcome::Assignment(assignment)) => Ok(Some(self.take_assignment(assignment, named, now))),
            Some(Outcome::NoAssignment(_)) => {
                self.events.push(Event::NoWork);
                Ok(None)
            }
            None => Err(WireError::Missing("check_in.outcome").to_string()),
        }
    }

    fn take_policy(&mut self, resource: &wire::Resource) -> Result<State, String> {
        let envelope = inline("check_in.policy", resource).map_err(|e| e.to_string())?;
        let sha256 = Digest::of(envelope).sha256.to_vec();
        if self.policy.as_ref().is_some_and(|(held, _)| *held == sha256) {
            return Err("check_in.policy: the coordinator sent the policy that this device named".into());
        }
        if self.policies_in_a_row >= POLICIES_IN_A_ROW_MAX {
            return Err(format!("check_in.policy: more than {POLICIES_IN_A_ROW_MAX} policies in a row"));
        }
        let bytes = self.setup.trust_root.open(Purpose::Policy, envelope).map_err(|e| e.to_string())?;
        let policy = PopulationPolicy::parse(&bytes).map_err(|e| e.to_string())?;
        if policy.population != self.setup.population {
            return Err(format!("check_in.policy: for population {}", policy.population));
        }
        self.policy = Some((sha256, policy.clone()));
        self.policies_in_a_row += 1;
        Ok(State::Choosing(policy))
    }

    fn take_assignment(
        &mut self,
        assignment: wire::TaskAssignment,
        named: &[Name],
        now: UnixMillis,
    ) -> State {
        let token = assignment.session_token.clone();
        match Session::accept(assignment, named, &self.setup, now) {
            // Of two sums over one round that differ by one device, the difference is that device's update.
            Ok(session)
                if session.is_secure() && self.revealed.contains(&session.plan_sha256(), session.round()) =>
            {
                let refusal = format!("round {}: this device has revealed shares for it", session.round());
                self.events.push(Event::Refused(refusal));
                report_task(token, TaskResult::AlreadyRevealed)
            }
            Ok(session) => {
                let policy = &self.setup.floors.privacy;
                let refusal = match session.charge(policy) {
                    Some(charge) => self.ledger.check(&charge, policy, now.0),
                    None if !session.is_private() && self.ledger.knows(session.scope()) => {
                        Err(LedgerError::PrivacyDropped)
                    }
                    None => Ok(()),
                };
                if let Err(refusal) = refusal {
                    self.events.push(Event::Refused(refusal.to_string()));
                    return report_task(token, TaskResult::PlanRejected);
                }
                let (task, round) = (session.task().clone(), session.round());
                self.events.push(Event::Selected { task, round });
                State::InSession(Box::new(session))
            }
            Err(refusal) => {
                self.events.push(Event::Refused(refusal));
                report_task(token, TaskResult::PlanRejected)
            }
        }
    }

    fn take_release(&mut self, resource: &wire::Resource, now: UnixMillis) -> Result<(), String> {
        let envelope = inline("check_in.release_manifest", resource).map_err(|e| e.to_string())?;
        let bytes = self.setup.trust_root.open(Purpose::Release, envelope).map_err(|e| e.to_string())?;
        let manifest = ReleaseManifest::parse(&bytes).map_err(|e| e.to_string())?;
        if manifest.population != self.setup.population {
            return Err(format!("release {}: for population {}", manifest.version, manifest.population));
        }
        if manifest.expires <= now {
            return Err(format!("release {}: expired", manifest.version));
        }
        if manifest.version > self.setup.release_version_max {
            self.release = Some(manifest);
        }
        Ok(())
    }
}

/// The bytes of a resource that must be inline.
pub(super) fn inline<'a>(field: &'static str, resource: &'a wire::Resource) -> Result<&'a [u8], WireError> {
    match &resource.source {
        Some(wire::resource::Source::Inline(bytes)) if bytes.len() <= INLINE_BYTES_MAX => Ok(bytes),
        Some(wire::resource::Source::Inline(bytes)) => Err(WireError::invalid(
            field,
            format!("{} bytes inline; at most {INLINE_BYTES_MAX}", bytes.len()),
        )),
        Some(wire::resource::Source::Blob(_)) => Err(WireError::invalid(field, "expected inline")),
        None => Err(WireError::Missing(field)),
    }
}
