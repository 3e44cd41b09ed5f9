//! The calls of secure aggregation: each is a step of a device, taken by its round. The long computation at
//! the end of a cohort is given out as [`OpeningWork`] and comes back as [`OpenedCohort`].

use super::{Core, contribution::submitted_digest, error::invalid, session::SessionKey};
use fleetune_privacy::PrivacyPlan;
use fleetune_proto::{
    CallFailure, Digest, FailureKind, Name, UnixMillis,
    round::{Answer, Participant, Round, SecureError},
    secure::{
        confirmations_to_wire, parse_advertisement, parse_bundle, parse_confirmation, parse_reveal,
        roster_to_wire, shares_to_wire,
    },
    wire::{self, EndReason},
};
use fleetune_secagg::{OpenError, Opened, Opening, StepError};

/// A cohort's sum that is to be opened: pure computation, to be run away from the core.
pub struct OpeningWork {
    place: Place,
    opening: Opening,
    charge: Option<SumCharge>,
}

/// What opening a cohort's sum gives away: for the coordinator's ledger, written before the sum is opened.
#[derive(Debug, Clone, PartialEq)]
pub struct SumCharge {
    /// The task.
    pub task: Name,
    /// Round, from 0.
    pub round: u32,
    /// Attempt, from 0.
    pub attempt: u32,
    /// Cohort, from 0.
    pub cohort: u32,
    /// Vectors in the sum.
    pub survivors: u32,
    /// Survivors whose noise is counted on.
    pub honest: u32,
    /// `RDP(alpha) <= rho alpha` of this sum for each device in it, with the noise that was really there.
    pub rho: f64,
    /// Epsilon of this sum alone.
    pub epsilon: f64,
    /// At this delta.
    pub delta: f64,
    /// True if the noise is that of an imagined cohort, which protects nobody.
    pub simulated: bool,
}

/// What came of it; for [`Core::handle_opened`].
pub struct OpenedCohort {
    place: Place,
    result: Result<Opened, OpenError>,
}

struct Place {
    task: Name,
    round: u32,
    attempt: u32,
    cohort: u32,
}

impl OpeningWork {
    /// What opening gives away; none without differential privacy.
    #[must_use]
    pub fn charge(&self) -> Option<&SumCharge> {
        self.charge.as_ref()
    }

    /// Removes the masks on up to `threads` threads.
    #[must_use]
    pub fn run(self, threads: usize) -> OpenedCohort {
        OpenedCohort { place: self.place, result: self.opening.run(threads) }
    }
}

impl Core {
    /// AggregationService.AdvertiseKeys: step 0. The same bytes get the same answer however often they come,
    /// here and in every step.
    ///
    /// # Errors
    /// Unauthenticated for an unknown session, InvalidArgument for malformed or refused keys, AlreadyExists
    /// for other bytes than before, FailedPrecondition for a round that does not aggregate securely.
    pub fn handle_advertise_keys(
        &mut self,
        request: &wire::AdvertiseKeysRequest,
        now: UnixMillis,
    ) -> Result<wire::AdvertiseKeysResponse, CallFailure> {
        use wire::advertise_keys_response::Outcome;
        let digest = digest_of(&request.keys);
        let answer = self.take_step(&request.session_token, now, |round, participant| {
            let advertisement = parse_advertisement(request.keys.clone()).map_err(|e| invalid(&e))?;
            round.handle_advertisement(participant, digest, advertisement, now).map_err(|e| refusal(&e))
        })?;
        let outcome = Some(match answer {
            Answer::Ready(view) => Outcome::Roster(roster_to_wire(&view)),
            Answer::Pending(ms) => Outcome::Pending(pending(ms)),
            Answer::TooLate => Outcome::Ended(ended(EndReason::TooLate)),
            Answer::Failed => Outcome::Ended(ended(EndReason::RoundFailed)),
        });
        Ok(wire::AdvertiseKeysResponse { outcome })
    }

    /// AggregationService.ShareKeys: step 1.
    ///
    /// # Errors
    /// As [`Core::handle_advertise_keys`]; FailedPrecondition before the device's own step 0.
    pub fn handle_share_keys(
        &mut self,
        request: &wire::ShareKeysRequest,
        now: UnixMillis,
    ) -> Result<wire::ShareKeysResponse, CallFailure> {
        use wire::share_keys_response::Outcome;
        let answer = self.take_step(&request.session_token, now, |round, participant| {
            let bundle = parse_bundle(request).map_err(|e| invalid(&e))?;
            round.handle_shares(participant, bundle, now).map_err(|e| refusal(&e))
        })?;
        let outcome = Some(match answer {
            Answer::Ready(shares) => Outcome::Shares(wire::SealedShares { shares: shares_to_wire(&shares) }),
            Answer::Pending(ms) => Outcome::Pending(pending(ms)),
            Answer::TooLate => Outcome::Ended(ended(EndReason::TooLate)),
            Answer::Failed => Outcome::Ended(ended(EndReason::RoundFailed)),
        });
        Ok(wire::ShareKeysResponse { outcome })
    }

    /// AggregationService.SubmitMaskedUpdate: step 2. The vector is added to its cohort's sum, and forgotten.
    ///
    /// # Errors
    /// As [`Core::handle_share_keys`]; FailedPrecondition also if the upload is not complete.
    pub fn handle_submit_masked(
        &mut self,
        request: &wire::SubmitMaskedUpdateRequest,
        now: UnixMillis,
    ) -> Result<wire::SubmitMaskedUpdateResponse, CallFailure> {
        use wire::submit_masked_update_response::Outcome;
        let source = request.masked_update.as_ref().and_then(|update| update.source.as_ref());
        let digest = submitted_digest("submit_masked_update.masked_update", source)?;
        let before = self.take_step(&request.session_token, now, |round, participant| {
            match round.masked_before(participant, digest, now).map_err(|e| refusal(&e))? {
                Some(answer) => Ok(answer_some(answer)),
                None => Ok(Answer::Ready(None)),
            }
        })?;
        let answer = match before {
            Answer::Ready(Some(survivors)) => Answer::Ready(survivors),
            Answer::Ready(None) => self.take_masked(&request.session_token, source, digest, now)?,
            Answer::Pending(ms) => Answer::Pending(ms),
            Answer::TooLate => Answer::TooLate,
            Answer::Failed => Answer::Failed,
        };
        let outcome = Some(match answer {
            Answer::Ready(survivors) => {
                Outcome::Survivors(wire::Survivors { bitmap: survivors.as_bytes().to_vec() })
            }
            Answer::Pending(ms) => Outcome::Pending(pending(ms)),
            Answer::TooLate => Outcome::Ended(ended(EndReason::TooLate)),
            Answer::Failed => Outcome::Ended(ended(EndReason::RoundFailed)),
        });
        Ok(wire::SubmitMaskedUpdateResponse { outcome })
    }

    /// AggregationService.ConfirmSurvivors: step 3.
    ///
    /// # Errors
    /// As [`Core::handle_share_keys`].
    pub fn handle_confirm_survivors(
        &mut self,
        request: &wire::ConfirmSurvivorsRequest,
        now: UnixMillis,
    ) -> Result<wire::ConfirmSurvivorsResponse, CallFailure> {
        use wire::confirm_survivors_response::Outcome;
        let answer = self.take_step(&request.session_token, now, |round, participant| {
            let signed = parse_confirmation(request.index, &request.signature).map_err(|e| invalid(&e))?;
            round.handle_confirmation(participant, signed, now).map_err(|e| refusal(&e))
        })?;
        let outcome = Some(match answer {
            Answer::Ready(confirmations) => Outcome::Confirmations(confirmations_to_wire(&confirmations)),
            Answer::Pending(ms) => Outcome::Pending(pending(ms)),
            Answer::TooLate => Outcome::Ended(ended(EndReason::TooLate)),
            Answer::Failed => Outcome::Ended(ended(EndReason::RoundFailed)),
        });
        Ok(wire::ConfirmSurvivorsResponse { outcome })
    }

    /// AggregationService.RevealShares: step 4. The device's part is done when it is answered.
    ///
    /// # Errors
    /// As [`Core::handle_share_keys`].
    pub fn handle_reveal_shares(
        &mut self,
        request: &wire::RevealSharesRequest,
        now: UnixMillis,
    ) -> Result<wire::RevealSharesResponse, CallFailure> {
        self.handle_timeout(now);
        let digest = shares_digest(&request.shares);
        let (key, session) = self.sessions.find(&request.session_token)?;
        let reason = if session.has_revealed(digest)? {
            EndReason::Contributed
        } else {
            self.take_reveal(key, request, digest, now)?
        };
        Ok(wire::RevealSharesResponse { ended: Some(ended(reason)) })
    }

    /// The next cohort's sum to open; each is given out once.
    pub fn poll_opening(&mut self) -> Option<OpeningWork> {
        self.tasks.values_mut().find_map(|task| {
            let name = task.spec.name.clone();
            let round = &mut task.open()?.round;
            let (cohort, opening) = round.poll_opening()?;
            let (round, attempt) = (round.id().round, round.id().attempt);
            let place = Place { task: name, round, attempt, cohort };
            let charge = task.plan.privacy_plan().map(|plan| sum_charge(&place, &plan, opening.survivors()));
            Some(OpeningWork { place, opening, charge })
        })
    }

    /// A cohort's sum is opened, or cannot be. One that nobody waits for any more is dropped.
    pub fn handle_opened(&mut self, opened: OpenedCohort, now: UnixMillis) {
        let Place { task: name, round, attempt, cohort } = opened.place;
        let Some(open) = self.tasks.get_mut(&name).and_then(|task| task.open()) else { return };
        if (open.round.id().round, open.round.id().attempt) != (round, attempt) {
            return;
        }
        for suspicion in opened.result.as_ref().map_or_else(|e| &e.suspicions, |o| &o.suspicions) {
            let (owner, revealer) = (suspicion.owner, suspicion.revealer);
            tracing::warn!(task = %name, round, attempt, %owner, %revealer, "a share was wrong");
        }
        if let Err(error) = &opened.result {
            tracing::warn!(task = %name, round, attempt, owners = ?error.owners, "secrets cannot be rebuilt");
        }
        open.round.handle_opened(cohort, opened.result, now);
        self.settle(&name, now);
    }

    fn take_step<T>(
        &mut self,
        token: &[u8],
        now: UnixMillis,
        take: impl FnOnce(&mut Round, Participant) -> Result<Answer<T>, CallFailure>,
    ) -> Result<Answer<T>, CallFailure> {
        self.handle_timeout(now);
        let (key, session) = self.sessions.find(token)?;
        match session.ended()? {
            Some(EndReason::RoundFailed) => return Ok(Answer::Failed),
            Some(_) => return Ok(Answer::TooLate),
            None => {}
        }
        let (name, participant) = self.place(key);
        let Some(open) = self.task(&name).open() else { return Ok(Answer::TooLate) };
        let answer = take(&mut open.round, participant);
        self.settle(&name, now);
        answer
    }

    fn take_masked(
        &mut self,
        token: &[u8],
        source: Option<&wire::resource::Source>,
        digest: Digest,
        now: UnixMillis,
    ) -> Result<Answer<fleetune_secagg::SurvivorSet>, CallFailure> {
        let (key, _) = self.sessions.find(token)?;
        let bytes = self.update_bytes(key, source, digest)?.into_owned();
        let answer = self.take_step(token, now, |round, participant| {
            round.handle_masked(participant, digest, &bytes, now).map_err(|e| refusal(&e))
        })?;
        if matches!(answer, Answer::Pending(_) | Answer::Ready(_)) {
            self.sessions.get_mut(key).contributed(digest);
        }
        Ok(answer)
    }

    fn take_reveal(
        &mut self,
        key: SessionKey,
        request: &wire::RevealSharesRequest,
        digest: Digest,
        now: UnixMillis,
    ) -> Result<EndReason, CallFailure> {
        let answer = self.take_step(&request.session_token, now, |round, participant| {
            let reveal = parse_reveal(&request.shares).map_err(|e| invalid(&e))?;
            round.handle_reveal(participant, reveal, now).map_err(|e| refusal(&e))
        })?;
        Ok(match answer {
            Answer::Ready(()) | Answer::Pending(_) => {
                self.sessions.get_mut(key).revealed(digest);
                EndReason::Contributed
            }
            Answer::TooLate => EndReason::TooLate,
            Answer::Failed => EndReason::RoundFailed,
        })
    }
}

fn answer_some<T>(answer: Answer<T>) -> Answer<Option<T>> {
    match answer {
        Answer::Ready(ready) => Answer::Ready(Some(ready)),
        Answer::Pending(ms) => Answer::Pending(ms),
        Answer::TooLate => Answer::TooLate,
        Answer::Failed => Answer::Failed,
    }
}

fn digest_of(keys: &Option<wire::KeyAdvertisement>) -> Digest {
    use prost::Message;
    Digest::of(&keys.as_ref().map(Message::encode_to_vec).unwrap_or_default())
}

fn shares_digest(shares: &[wire::RevealedShare]) -> Digest {
    use prost::Message;
    let message = wire::RevealSharesRequest { session_token: Vec::new(), shares: shares.to_vec() };
    Digest::of(&message.encode_to_vec())
}

fn pending(poll_after_ms: u64) -> wire::Pending {
    wire::Pending { poll_after_ms }
}

fn ended(reason: EndReason) -> wire::Ended {
    wire::Ended { reason: reason.into() }
}

/// The table from a refused message to what the device does about it.
fn refusal(error: &SecureError) -> CallFailure {
    let kind = match error {
        SecureError::NotSecure | SecureError::NotAdvertised | SecureError::Step(StepError::Early) => {
            FailureKind::FailedPrecondition
        }
        SecureError::Step(StepError::OtherBytes) => FailureKind::AlreadyExists,
        SecureError::Excluded
        | SecureError::Admit(_)
        | SecureError::Step(StepError::Malformed(_) | StepError::Vector(_)) => FailureKind::InvalidArgument,
    };
    CallFailure::new(kind, error.to_string())
}

/// With `survivors` in the sum, all but the colluders assumed have added their noise: at least as many as the
/// plan counts on, usually more.
fn sum_charge(place: &Place, plan: &PrivacyPlan, survivors: u32) -> SumCharge {
    let parameters = plan.parameters();
    let honest = plan.honest_among(survivors);
    let curve = plan.sum_curve(honest).unwrap_or_else(|_| plan.participation_curve());
    SumCharge {
        task: place.task.clone(),
        round: place.round,
        attempt: place.attempt,
        cohort: place.cohort,
        survivors,
        honest,
        rho: curve.rho(),
        epsilon: curve.epsilon(parameters.delta).0,
        delta: parameters.delta.value(),
        simulated: parameters.noise_cohort.is_some(),
    }
}
