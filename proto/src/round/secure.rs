//! Secure aggregation inside a round: who has advertised, the cohorts and the step each is at, and the
//! openings that are out. `round.rs` decides when keys are no longer awaited and what the result means.

use super::Participant;
use crate::{digest::Digest, time::UnixMillis};
use fleetune_secagg::{
    AdmitError, Advertisement, Cohort, CohortPlan, CohortStep, Confirmation, Degrees, DeviceId,
    DropoutCounts, Gathering, OpenError, Opened, Opening, Registrars, Reveal, RosterView, SealedShare, Seat,
    ShareBundle, StepError, SurvivorSet, Taken, Terms,
};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// What a round needs to aggregate securely.
#[derive(Debug, Clone)]
pub struct SecureSetup {
    /// The session of this attempt.
    pub terms: Terms,
    /// How cohorts are made.
    pub plan: CohortPlan,
    /// Population that devices must be certified for.
    pub population: String,
    /// Who certifies devices.
    pub registrars: Registrars,
    /// Devices that broke an earlier attempt of the task: not let in again.
    pub excluded: BTreeSet<DeviceId>,
    /// Longest time of one step, milliseconds.
    pub step_ms: u64,
}

/// The coordinator's answer to a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<T> {
    /// The step is taken; ask again after this many milliseconds.
    Pending(u64),
    /// The next step.
    Ready(T),
    /// The round went on without the device.
    TooLate,
    /// The device's cohort or the round has failed.
    Failed,
}

/// Why a message of secure aggregation is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SecureError {
    /// The round adds up plain updates.
    #[error("this round does not aggregate securely")]
    NotSecure,
    /// The device must advertise first.
    #[error("the device has not advertised")]
    NotAdvertised,
    /// The device has broken an earlier attempt.
    #[error("the device's shares broke an earlier attempt")]
    Excluded,
    /// Its keys are refused.
    #[error(transparent)]
    Admit(#[from] AdmitError),
    /// Its message is refused.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// Numbers of one cohort, for records and people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CohortSummary {
    /// Members.
    pub members: u32,
    /// Neighbours a member, and shares that rebuild a secret.
    pub degrees: Degrees,
    /// Devices lost, by step.
    pub dropouts: DropoutCounts,
    /// Vectors in its sum, or why there is none.
    pub outcome: Result<u32, String>,
}

/// A certificate must outlive its admission by this: peers check it later, by clocks of their own.
const CERTIFICATE_MARGIN_MS: u64 = 3600 * 1000;
/// Shortest and longest time between two polls while others train, milliseconds.
const GATHERING_POLL_MS: (u64, u64) = (200, 15_000);
/// The same while a step is under way: steps are quick, everybody in them is awake.
const STEP_POLL_MS: (u64, u64) = (200, 2_000);

pub(super) struct SecureAggregate {
    setup: SecureSetup,
    stage: Stage,
    tickets: BTreeMap<Participant, Ticket>,
    seats: Vec<Seat>,
    blamed: BTreeSet<DeviceId>,
}

struct Ticket {
    number: u32,
    digest: Digest,
    gone: bool,
}

enum Stage {
    Gathering(Box<Gathering>),
    Cohorts(Vec<CohortRun>),
}

struct CohortRun {
    state: State,
    members: u32,
    degrees: Degrees,
    dropouts: DropoutCounts,
    deadline: UnixMillis,
    /// True once devices may have revealed shares.
    revealing: bool,
}

enum State {
    Running(Box<Cohort>),
    /// The opening, until somebody takes it to compute.
    Opening(Option<Box<Opening>>),
    Opened(u32),
    Failed(String),
}

impl SecureAggregate {
    pub(super) fn new(setup: SecureSetup) -> Self {
        let gathering = Gathering::new(setup.terms, &setup.population, setup.registrars.clone());
        let stage = Stage::Gathering(Box::new(gathering));
        Self { setup, stage, tickets: BTreeMap::new(), seats: Vec::new(), blamed: BTreeSet::new() }
    }

    /// Devices that have advertised and not withdrawn since.
    pub(super) fn advertised(&self) -> u32 {
        let there = self.tickets.values().filter(|ticket| !ticket.gone).count();
        u32::try_from(there).expect("bounded by the selection")
    }

    pub(super) fn has_advertised(&self, participant: Participant) -> bool {
        self.tickets.contains_key(&participant)
    }

    pub(super) fn is_gathering(&self) -> bool {
        matches!(self.stage, Stage::Gathering(_))
    }

    /// True once every cohort is opened or lost.
    pub(super) fn is_over(&self) -> bool {
        match &self.stage {
            Stage::Gathering(_) => false,
            Stage::Cohorts(runs) => {
                runs.iter().all(|run| matches!(run.state, State::Opened(_) | State::Failed(_)))
            }
        }
    }

    pub(super) fn advertise(
        &mut self,
        participant: Participant,
        digest: Digest,
        advertisement: Advertisement,
        now: UnixMillis,
    ) -> Result<(), SecureError> {
        if let Some(ticket) = self.tickets.get(&participant) {
            let same = ticket.digest == digest;
            return if same { Ok(()) } else { Err(StepError::OtherBytes.into()) };
        }
        let Stage::Gathering(gathering) = &mut self.stage else { return Ok(()) };
        if self.setup.excluded.contains(&advertisement.id()) {
            return Err(SecureError::Excluded);
        }
        let number = gathering.admit(advertisement, now.plus(CERTIFICATE_MARGIN_MS).0)?;
        self.tickets.insert(participant, Ticket { number, digest, gone: false });
        Ok(())
    }

    /// Freezes the rosters and opens step 1 in every cohort. The error says why no cohort can be made.
    pub(super) fn freeze(&mut self, now: UnixMillis) -> Result<(), String> {
        let deadline = now.plus(self.setup.step_ms);
        let Stage::Gathering(gathering) = std::mem::replace(&mut self.stage, Stage::Cohorts(Vec::new()))
        else {
            return Ok(());
        };
        let (cohorts, seats) = gathering.into_cohorts(&self.setup.plan).map_err(|error| error.to_string())?;
        let run = |cohort: Cohort| CohortRun {
            members: cohort.count(),
            degrees: cohort.degrees(),
            dropouts: DropoutCounts::default(),
            state: State::Running(Box::new(cohort)),
            deadline,
            revealing: false,
        };
        (self.stage, self.seats) = (Stage::Cohorts(cohorts.into_iter().map(run).collect()), seats);
        let gone: Vec<Participant> = self.tickets.iter().filter(|(_, t)| t.gone).map(|(p, _)| *p).collect();
        gone.into_iter().for_each(|participant| self.withdraw(participant));
        self.advance(now);
        Ok(())
    }

    /// Step 0's answer.
    pub(super) fn roster(
        &self,
        participant: Participant,
        now: UnixMillis,
        until: UnixMillis,
    ) -> Answer<RosterView> {
        if self.is_gathering() {
            return Answer::Pending(poll_after(now, until, 16, GATHERING_POLL_MS));
        }
        match self.seated(participant) {
            None => Answer::TooLate,
            Some((run, index)) => match &run.state {
                State::Running(cohort) if cohort.step() == CohortStep::Sharing => {
                    Answer::Ready(cohort.roster_view(index))
                }
                State::Running(_) | State::Opening(_) | State::Opened(_) => Answer::TooLate,
                State::Failed(_) => Answer::Failed,
            },
        }
    }

    pub(super) fn shares(
        &mut self,
        participant: Participant,
        bundle: ShareBundle,
        now: UnixMillis,
    ) -> Result<Answer<Vec<SealedShare>>, SecureError> {
        let take = |cohort: &mut Cohort, index| cohort.handle_shares(index, bundle);
        self.take(participant, now, take, |cohort, index| {
            (cohort.step() > CohortStep::Sharing).then(|| cohort.forwarded(index))
        })
    }

    /// The answer to a masked vector that is in the sum already; none if it is not.
    pub(super) fn masked_before(
        &mut self,
        participant: Participant,
        digest: Digest,
        now: UnixMillis,
    ) -> Result<Option<Answer<SurvivorSet>>, SecureError> {
        let held = match self.seated(participant) {
            Some((CohortRun { state: State::Running(cohort), .. }, index)) => cohort.masked_digest(index),
            Some(_) => return Ok(Some(Answer::TooLate)),
            None => None,
        };
        match held {
            Some(held) if held != digest.sha256 => Err(StepError::OtherBytes.into()),
            Some(_) => self.masked(participant, digest, &[], now).map(Some),
            None => Ok(None),
        }
    }

    pub(super) fn masked(
        &mut self,
        participant: Participant,
        digest: Digest,
        packed: &[u8],
        now: UnixMillis,
    ) -> Result<Answer<SurvivorSet>, SecureError> {
        let take = |cohort: &mut Cohort, index| cohort.handle_masked(index, digest.sha256, packed);
        self.take(participant, now, take, |cohort, _| {
            (cohort.step() > CohortStep::Masking).then(|| Some(cohort.survivors().clone()))
        })
    }

    pub(super) fn confirmation(
        &mut self,
        participant: Participant,
        confirmation: Confirmation,
        now: UnixMillis,
    ) -> Result<Answer<Vec<Confirmation>>, SecureError> {
        let take = |cohort: &mut Cohort, index| cohort.handle_confirmation(index, confirmation);
        self.take(participant, now, take, |cohort, index| {
            (cohort.step() > CohortStep::Confirming).then(|| cohort.confirmations(index))
        })
    }

    pub(super) fn reveal(
        &mut self,
        participant: Participant,
        reveal: Reveal,
        now: UnixMillis,
    ) -> Result<Answer<()>, SecureError> {
        let take = |cohort: &mut Cohort, index| cohort.handle_reveal(index, reveal);
        Ok(match self.take(participant, now, take, |_, _| Some(Some(())))? {
            // Its shares are in; whether they suffice is not the device's concern.
            Answer::Pending(_) | Answer::Ready(()) => Answer::Ready(()),
            Answer::TooLate => Answer::TooLate,
            Answer::Failed => Answer::Failed,
        })
    }

    pub(super) fn withdraw(&mut self, participant: Participant) {
        let Some(ticket) = self.tickets.get_mut(&participant) else { return };
        ticket.gone = true;
        let seat = self.seats.get(ticket.number as usize).copied();
        if let (Some(seat), Stage::Cohorts(runs)) = (seat, &mut self.stage)
            && let State::Running(cohort) = &mut runs[seat.cohort as usize].state
        {
            cohort.handle_withdrawal(seat.index);
        }
    }

    /// Lets every cohort go as far as it can: a step ends when nobody is awaited or its time is up.
    pub(super) fn advance(&mut self, now: UnixMillis) {
        let step_ms = self.setup.step_ms;
        if let Stage::Cohorts(runs) = &mut self.stage {
            runs.iter_mut().for_each(|run| run.advance(now, step_ms));
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<UnixMillis> {
        let Stage::Cohorts(runs) = &self.stage else { return None };
        let waiting = |run: &&CohortRun| matches!(run.state, State::Running(_) | State::Opening(_));
        runs.iter().filter(waiting).map(|run| run.deadline).min()
    }

    pub(super) fn poll_opening(&mut self) -> Option<(u32, Opening)> {
        let Stage::Cohorts(runs) = &mut self.stage else { return None };
        (0..).zip(runs).find_map(|(cohort, run)| match &mut run.state {
            State::Opening(opening) => opening.take().map(|opening| (cohort, *opening)),
            State::Running(_) | State::Opened(_) | State::Failed(_) => None,
        })
    }

    /// An opening is done. The sum to add, if there is one and it is still awaited.
    pub(super) fn opened(&mut self, cohort: u32, result: Result<Opened, OpenError>) -> Option<Opened> {
        let Stage::Cohorts(runs) = &mut self.stage else { return None };
        let run = runs.get_mut(cohort as usize).filter(|run| matches!(run.state, State::Opening(_)))?;
        match result {
            Ok(opened) => {
                run.state = State::Opened(opened.survivors);
                Some(opened)
            }
            Err(error) => {
                self.blamed.extend(&error.blamed);
                run.state = State::Failed(error.to_string());
                None
            }
        }
    }

    /// Devices whose shares made a cohort fail.
    pub(super) fn blamed(&self) -> &BTreeSet<DeviceId> {
        &self.blamed
    }

    /// True if some devices may have revealed shares: the round must not be tried again under its number.
    pub(super) fn has_revealed(&self) -> bool {
        let Stage::Cohorts(runs) = &self.stage else { return false };
        runs.iter().any(|run| run.revealing)
    }

    pub(super) fn summaries(&self) -> Vec<CohortSummary> {
        let Stage::Cohorts(runs) = &self.stage else { return Vec::new() };
        let summary = |run: &CohortRun| CohortSummary {
            members: run.members,
            degrees: run.degrees,
            dropouts: run.dropouts,
            outcome: match &run.state {
                State::Opened(survivors) => Ok(*survivors),
                State::Failed(reason) => Err(reason.clone()),
                State::Running(_) | State::Opening(_) => Err("not over".into()),
            },
        };
        runs.iter().map(summary).collect()
    }

    /// One step of one device: take its message, let the cohort go on, and give the answer when there is one.
    fn take<T>(
        &mut self,
        participant: Participant,
        now: UnixMillis,
        take: impl FnOnce(&mut Cohort, u32) -> Result<Taken, StepError>,
        answer: impl FnOnce(&Cohort, u32) -> Option<Option<T>>,
    ) -> Result<Answer<T>, SecureError> {
        let step_ms = self.setup.step_ms;
        let ticket = self.tickets.get(&participant).ok_or(SecureError::NotAdvertised)?;
        let Stage::Cohorts(runs) = &mut self.stage else { return Err(StepError::Early.into()) };
        let Some(seat) = self.seats.get(ticket.number as usize) else { return Ok(Answer::Failed) };
        let run = &mut runs[seat.cohort as usize];
        let State::Running(cohort) = &mut run.state else {
            return Ok(if matches!(run.state, State::Failed(_)) { Answer::Failed } else { Answer::TooLate });
        };
        if take(cohort, seat.index)? == Taken::TooLate {
            return Ok(Answer::TooLate);
        }
        run.advance(now, step_ms);
        let pending = Answer::Pending(poll_after(now, run.deadline, 64, STEP_POLL_MS));
        Ok(match &run.state {
            State::Running(cohort) => match answer(cohort, seat.index) {
                Some(Some(ready)) => Answer::Ready(ready),
                // The step is closed, and what this device needs to go on is not there.
                Some(None) => Answer::Failed,
                None => pending,
            },
            State::Failed(_) => Answer::Failed,
            // Only a reveal leads here.
            State::Opening(_) | State::Opened(_) => pending,
        })
    }

    fn seated(&self, participant: Participant) -> Option<(&CohortRun, u32)> {
        let Stage::Cohorts(runs) = &self.stage else { return None };
        let seat = self.seats.get(self.tickets.get(&participant)?.number as usize)?;
        Some((&runs[seat.cohort as usize], seat.index))
    }
}

impl CohortRun {
    fn advance(&mut self, now: UnixMillis, step_ms: u64) {
        if let State::Opening(_) = self.state
            && now >= self.deadline
        {
            self.state = State::Failed("its sum was not opened in time".into());
        }
        while let State::Running(cohort) = &mut self.state {
            if cohort.is_awaiting() && now < self.deadline {
                return;
            }
            let last = cohort.step() == CohortStep::Revealing;
            let closed = cohort.close_step();
            self.dropouts = cohort.dropouts();
            self.deadline = now.plus(if last { OPENING_MS_MAX } else { step_ms });
            self.revealing |= closed.is_ok() && cohort.step() == CohortStep::Revealing;
            if let Err(failure) = closed {
                self.state = State::Failed(failure.to_string());
            } else if last {
                let State::Running(cohort) = std::mem::replace(&mut self.state, State::Opening(None)) else {
                    unreachable!("looked at above")
                };
                self.state = State::Opening(Some(Box::new(cohort.into_opening())));
            }
        }
    }
}

/// Longest time that opening a sum may take before it is given up.
const OPENING_MS_MAX: u64 = 10 * 60 * 1000;

/// A fraction of the time that is left, within bounds.
fn poll_after(now: UnixMillis, until: UnixMillis, fraction: u64, bounds: (u64, u64)) -> u64 {
    (until.since(now) / fraction).clamp(bounds.0, bounds.1)
}
