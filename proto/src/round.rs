//! One attempt at one round, as a value: who joined, who contributed, and the running sum.
//!
//! The phases go selecting -> collecting -> (aggregating ->) finished or failed. What is collected are
//! updates under the plaintext protocol, and keys under secure aggregation: a device advertises once it
//! has trained, so a cohort is made of devices that are there. Aggregating takes the cohorts through the
//! other four steps. Both may be collected while others still join. The caller maps sessions to
//! [`Participant`]s, moves the bytes, and calls [`Round::handle_timeout`] at [`Round::poll_timeout`].

mod secure;

pub use secure::{Answer, CohortSummary, SecureError, SecureSetup};

use crate::{digest::Digest, name::Name, plan::AggregationPlan, time::UnixMillis};
use fleetune_secagg::{
    Advertisement, Confirmation, DeviceId, OpenError, Opened, Opening, Reveal, RingError, RingVector,
    RosterView, RunningSum, SealedShare, ShareBundle, SurvivorSet,
};
use secure::SecureAggregate;
use std::collections::BTreeSet;
use thiserror::Error;

/// Which attempt at which round of which task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoundId {
    /// The task.
    pub task: Name,
    /// Round, from 0.
    pub round: u32,
    /// Attempt, from 0.
    pub attempt: u32,
}

/// How a round selects and how long it waits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundPolicy {
    /// Contributions at which the round is finished at once.
    pub report_goal: u32,
    /// Devices selected: the goal and what is expected to be lost. At least the goal.
    pub selected_max: u32,
    /// Contributions with which a round may still finish at its deadline.
    pub reports_min: u32,
    /// Time devices may join.
    pub selection_ms: u64,
    /// Time from the first join until the last contribution; under secure aggregation, the last keys.
    pub report_ms: u64,
    /// Time of each of the four steps of secure aggregation that follow.
    pub step_ms: u64,
}

/// A device's place in one round, meaningless outside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Participant(u32);

/// Where the round stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Devices may join.
    Selecting,
    /// Contributions are awaited; nobody joins any more.
    Collecting,
    /// The cohorts aggregate securely.
    Aggregating,
    /// The sum is there.
    Finished,
    /// There is no sum and none will come.
    Failed(RoundFailure),
}

/// Why a round failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RoundFailure {
    /// Too few devices joined in time.
    #[error("{joined} devices joined in time, {needed} needed")]
    Selection {
        /// Devices that joined.
        joined: u32,
        /// Devices needed.
        needed: u32,
    },
    /// Too few contributions arrived in time.
    #[error("{contributed} contributions arrived in time, {needed} needed")]
    Reports {
        /// Contributions that arrived.
        contributed: u32,
        /// Contributions needed.
        needed: u32,
    },
    /// Secure aggregation gave too little.
    #[error("secure aggregation gave a sum of {summed} contributions, {needed} needed")]
    Aggregation {
        /// Contributions in the sums that opened.
        summed: u32,
        /// Contributions needed.
        needed: u32,
    },
}

/// What became of a contribution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contribution {
    /// It is in the sum now.
    Added,
    /// The same bytes were in the sum already.
    Repeated,
    /// The round had ended without it.
    TooLate,
}

/// Why a contribution is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ContributionError {
    /// The device delivered other bytes before; counting both would count it twice.
    #[error("another contribution of this session is in the sum already")]
    OtherBytes,
    /// The vector does not belong to this sum.
    #[error("contribution: {0}")]
    Vector(#[from] RingError),
}

/// Numbers of a round for records and progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoundCounts {
    /// Devices that joined.
    pub selected: u32,
    /// Contributions in the sum.
    pub completed: u32,
    /// Devices that said they will not contribute.
    pub withdrawn: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Joined,
    Contributed(Digest),
    Withdrawn,
    Excluded,
}

/// One attempt at one round.
pub struct Round {
    id: RoundId,
    policy: RoundPolicy,
    phase: Phase,
    opened: UnixMillis,
    first_join: Option<UnixMillis>,
    participants: Vec<Progress>,
    sum: RunningSum,
    secure: Option<SecureAggregate>,
    trouble: Option<String>,
}

impl Round {
    /// Opens an attempt; `dimension` is the adapter's length. With `secure` it collects keys, without it
    /// plain updates.
    pub fn open(
        id: RoundId,
        policy: RoundPolicy,
        plan: &AggregationPlan,
        dimension: usize,
        secure: Option<SecureSetup>,
        now: UnixMillis,
    ) -> Self {
        assert!(policy.selected_max >= policy.report_goal, "a round selects at least its goal");
        assert!(policy.report_goal >= policy.reports_min, "the goal is at least the minimum");
        assert!(policy.reports_min >= plan.summands_min, "the plan's minimum binds the round");
        assert!(policy.report_goal <= plan.summands_max, "the sum has room for the goal");
        let sum = RunningSum::new(plan.ring_bits, dimension);
        Self {
            id,
            policy,
            phase: Phase::Selecting,
            opened: now,
            first_join: None,
            participants: Vec::new(),
            sum,
            secure: secure.map(SecureAggregate::new),
            trouble: None,
        }
    }

    /// A device asks for a place; none when nobody joins any more.
    pub fn handle_join(&mut self, now: UnixMillis) -> Option<Participant> {
        self.handle_timeout(now);
        if self.phase != Phase::Selecting {
            return None;
        }
        self.first_join.get_or_insert(now);
        let participant = Participant(u32::try_from(self.participants.len()).expect("selected_max is a u32"));
        self.participants.push(Progress::Joined);
        if self.selected() >= self.policy.selected_max {
            self.phase = Phase::Collecting;
        }
        Some(participant)
    }

    /// A device's vector arrived whole. `digest` names its bytes.
    pub fn handle_contribution(
        &mut self,
        participant: Participant,
        digest: Digest,
        vector: &RingVector,
        now: UnixMillis,
    ) -> Result<Contribution, ContributionError> {
        if let Some(before) = self.contributed(participant) {
            return if before == digest {
                Ok(Contribution::Repeated)
            } else {
                Err(ContributionError::OtherBytes)
            };
        }
        self.handle_timeout(now);
        // A plain update has no place in a sum of masked ones.
        if self.is_over() || self.secure.is_some() {
            return Ok(Contribution::TooLate);
        }
        self.sum.add(vector)?;
        self.participants[participant.0 as usize] = Progress::Contributed(digest);
        self.settle(now);
        Ok(Contribution::Added)
    }

    /// A device says that it will not contribute.
    pub fn handle_withdrawal(&mut self, participant: Participant, now: UnixMillis) {
        self.handle_timeout(now);
        let progress = &mut self.participants[participant.0 as usize];
        if *progress == Progress::Joined {
            *progress = Progress::Withdrawn;
        }
        if let Some(secure) = &mut self.secure {
            secure.withdraw(participant);
            secure.advance(now);
        }
        self.settle(now);
    }

    /// Secure aggregation, step 0: a device has trained and publishes its keys. `digest` names the bytes.
    ///
    /// # Errors
    /// [`SecureError`]; nothing has changed, but that nobody waits for an excluded device. The same holds for
    /// the other steps.
    pub fn handle_advertisement(
        &mut self,
        participant: Participant,
        digest: Digest,
        advertisement: Advertisement,
        now: UnixMillis,
    ) -> Result<Answer<RosterView>, SecureError> {
        self.handle_timeout(now);
        let until = self.report_deadline().unwrap_or(now);
        let is_failed = matches!(self.phase, Phase::Failed(_));
        let secure = self.secure.as_mut().ok_or(SecureError::NotSecure)?;
        if is_failed {
            return Ok(Answer::Failed);
        }
        let taken = secure.advertise(participant, digest, advertisement, now);
        if taken == Err(SecureError::Excluded) {
            // Nobody waits for it.
            self.participants[participant.0 as usize] = Progress::Excluded;
        }
        self.settle(now);
        taken?;
        Ok(self.secure.as_ref().map_or(Answer::Failed, |secure| secure.roster(participant, now, until)))
    }

    /// Step 1: a device's sealed shares.
    pub fn handle_shares(
        &mut self,
        participant: Participant,
        bundle: ShareBundle,
        now: UnixMillis,
    ) -> Result<Answer<Vec<SealedShare>>, SecureError> {
        self.step(now, |secure| secure.shares(participant, bundle, now))
    }

    /// Step 2 again: the answer to a masked vector that is in the sum already, none if it is not.
    pub fn masked_before(
        &mut self,
        participant: Participant,
        digest: Digest,
        now: UnixMillis,
    ) -> Result<Option<Answer<SurvivorSet>>, SecureError> {
        self.step(now, |secure| secure.masked_before(participant, digest, now))
    }

    /// Step 2: a device's masked vector, packed. It is in the sum afterwards and nowhere else.
    pub fn handle_masked(
        &mut self,
        participant: Participant,
        digest: Digest,
        packed: &[u8],
        now: UnixMillis,
    ) -> Result<Answer<SurvivorSet>, SecureError> {
        self.step(now, |secure| secure.masked(participant, digest, packed, now))
    }

    /// Step 3: a device's signature under the survivors.
    pub fn handle_confirmation(
        &mut self,
        participant: Participant,
        confirmation: Confirmation,
        now: UnixMillis,
    ) -> Result<Answer<Vec<Confirmation>>, SecureError> {
        self.step(now, |secure| secure.confirmation(participant, confirmation, now))
    }

    /// Step 4: the shares that a device reveals. Ready means that its part is done.
    pub fn handle_reveal(
        &mut self,
        participant: Participant,
        reveal: Reveal,
        now: UnixMillis,
    ) -> Result<Answer<()>, SecureError> {
        self.step(now, |secure| secure.reveal(participant, reveal, now))
    }

    /// The next sum to open: a long computation, to be run anywhere and answered with
    /// [`Round::handle_opened`]. Each is given out once.
    pub fn poll_opening(&mut self) -> Option<(u32, Opening)> {
        self.secure.as_mut()?.poll_opening()
    }

    /// A cohort's sum is opened, or cannot be.
    pub fn handle_opened(&mut self, cohort: u32, result: Result<Opened, OpenError>, now: UnixMillis) {
        let opened = self.secure.as_mut().and_then(|secure| secure.opened(cohort, result));
        if let Some(opened) = opened {
            self.sum.add_sum(&opened.sum, opened.survivors).expect("a cohort's sum is of this round's terms");
        }
        self.handle_timeout(now);
        self.settle(now);
    }

    /// Lets deadlines take effect.
    pub fn handle_timeout(&mut self, now: UnixMillis) {
        if self.phase == Phase::Selecting && now >= self.selection_deadline() {
            self.close_selection(now);
        }
        let collecting = matches!(self.phase, Phase::Selecting | Phase::Collecting);
        if collecting && self.report_deadline().is_some_and(|deadline| now >= deadline) {
            self.close_reports(now);
        }
        if self.phase == Phase::Aggregating {
            if let Some(secure) = &mut self.secure {
                secure.advance(now);
            }
            self.settle(now);
        }
    }

    /// The next deadline and its name.
    pub fn poll_timeout(&self) -> Option<(UnixMillis, &'static str)> {
        match self.phase {
            Phase::Selecting => {
                let selection = (self.selection_deadline(), "selection deadline");
                let report = self.report_deadline().map(|at| (at, "report deadline"));
                Some(report.filter(|report| report.0 < selection.0).unwrap_or(selection))
            }
            Phase::Collecting => self.report_deadline().map(|at| (at, "report deadline")),
            Phase::Aggregating => {
                self.secure.as_ref().and_then(SecureAggregate::poll_timeout).map(|at| (at, "step deadline"))
            }
            Phase::Finished | Phase::Failed(_) => None,
        }
    }

    /// Which attempt this is.
    pub fn id(&self) -> &RoundId {
        &self.id
    }

    /// Where the round stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// When contributions end, once a device has joined.
    pub fn report_deadline(&self) -> Option<UnixMillis> {
        self.first_join.map(|first| first.plus(self.policy.report_ms))
    }

    /// When nothing more can come of a session, once a device has joined.
    pub fn session_deadline(&self) -> Option<UnixMillis> {
        let steps_ms = if self.secure.is_some() { 4 * self.policy.step_ms } else { 0 };
        self.report_deadline().map(|deadline| deadline.plus(steps_ms))
    }

    /// True if it aggregates securely.
    pub fn is_secure(&self) -> bool {
        self.secure.is_some()
    }

    /// The cohorts, once there are any.
    pub fn cohorts(&self) -> Vec<CohortSummary> {
        self.secure.as_ref().map(SecureAggregate::summaries).unwrap_or_default()
    }

    /// Why a round failed or lost cohorts, in words; empty if nothing went wrong.
    pub fn troubles(&self) -> Vec<String> {
        let failed = self.cohorts().into_iter().filter_map(|cohort| cohort.outcome.err());
        self.trouble.iter().cloned().chain(failed).collect()
    }

    /// Devices whose shares made a cohort fail.
    pub fn blamed(&self) -> BTreeSet<DeviceId> {
        self.secure.as_ref().map(|secure| secure.blamed().clone()).unwrap_or_default()
    }

    /// True if devices may have revealed shares. They will not do so again for this round, so it cannot be
    /// tried again under its number.
    pub fn has_revealed(&self) -> bool {
        self.secure.as_ref().is_some_and(SecureAggregate::has_revealed)
    }

    /// The numbers so far.
    pub fn counts(&self) -> RoundCounts {
        let withdrawn = self.participants.iter().filter(|p| **p == Progress::Withdrawn).count();
        RoundCounts {
            selected: self.selected(),
            completed: self.sum.contributions(),
            withdrawn: u32::try_from(withdrawn).expect("at most selected_max"),
        }
    }

    /// The sum, only of a finished round: fewer contributions than the minimum never open.
    pub fn sum(&self) -> Option<&RunningSum> {
        (self.phase == Phase::Finished).then_some(&self.sum)
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Finished | Phase::Failed(_))
    }

    fn selected(&self) -> u32 {
        u32::try_from(self.participants.len()).expect("at most selected_max")
    }

    fn contributed(&self, participant: Participant) -> Option<Digest> {
        match self.participants[participant.0 as usize] {
            Progress::Contributed(digest) => Some(digest),
            Progress::Joined | Progress::Withdrawn | Progress::Excluded => None,
        }
    }

    fn selection_deadline(&self) -> UnixMillis {
        self.opened.plus(self.policy.selection_ms)
    }

    /// Devices whose update or keys are in.
    fn collected(&self) -> u32 {
        self.secure.as_ref().map_or_else(|| self.sum.contributions(), SecureAggregate::advertised)
    }

    fn step<T>(
        &mut self,
        now: UnixMillis,
        take: impl FnOnce(&mut SecureAggregate) -> Result<T, SecureError>,
    ) -> Result<T, SecureError> {
        self.handle_timeout(now);
        let taken = take(self.secure.as_mut().ok_or(SecureError::NotSecure)?);
        self.settle(now);
        taken
    }

    fn close_selection(&mut self, now: UnixMillis) {
        let (joined, needed) = (self.selected(), self.policy.reports_min);
        self.phase = if joined >= needed {
            Phase::Collecting
        } else {
            Phase::Failed(RoundFailure::Selection { joined, needed })
        };
        self.settle(now);
    }

    fn close_reports(&mut self, now: UnixMillis) {
        let (contributed, needed) = (self.collected(), self.policy.reports_min);
        self.phase = if contributed < needed {
            Phase::Failed(RoundFailure::Reports { contributed, needed })
        } else if let Some(secure) = &mut self.secure {
            match secure.freeze(now) {
                Ok(()) => Phase::Aggregating,
                Err(reason) => {
                    self.trouble = Some(reason);
                    Phase::Failed(RoundFailure::Aggregation { summed: 0, needed })
                }
            }
        } else {
            Phase::Finished
        };
    }

    /// Ends the phase when nothing more can change: the goal is met, or nobody is awaited.
    fn settle(&mut self, now: UnixMillis) {
        if self.phase == Phase::Aggregating {
            return self.settle_cohorts();
        }
        if self.is_over() {
            return;
        }
        let reached = self.collected() >= self.policy.report_goal;
        if reached || (self.phase == Phase::Collecting && !self.is_awaiting()) {
            self.close_reports(now);
        }
    }

    fn settle_cohorts(&mut self) {
        if self.secure.as_ref().is_some_and(SecureAggregate::is_over) {
            let (summed, needed) = (self.sum.contributions(), self.policy.reports_min);
            self.phase = if summed >= needed {
                Phase::Finished
            } else {
                Phase::Failed(RoundFailure::Aggregation { summed, needed })
            };
        }
    }

    fn is_awaiting(&self) -> bool {
        let has_advertised = |participant| {
            self.secure.as_ref().is_some_and(|secure| secure.has_advertised(Participant(participant)))
        };
        let mut places = (0..).zip(&self.participants);
        places.any(|(place, progress)| *progress == Progress::Joined && !has_advertised(place))
    }
}

#[cfg(test)]
mod tests;
