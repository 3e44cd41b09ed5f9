//! One cohort through steps 1 to 4. Steps are closed by the caller, when nobody is awaited any more or time
//! is up; what arrives after a step is closed is turned away and never mixed in.

use super::Opening;
use crate::{
    graph::Graph,
    identity::DeviceId,
    key_schedule::Binding,
    messages::{
        Advertisement, Confirmation, Reveal, RevealedShare, RosterEntry, RosterView, SealedShare,
        ShareBundle, SurvivorSet,
    },
    parameters::Degrees,
    ring::{RingError, RingVector},
    roster_tree::RosterTree,
    session_id::Terms,
};
use thiserror::Error;

/// Which step is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CohortStep {
    /// Shares are awaited.
    Sharing,
    /// Masked vectors are awaited.
    Masking,
    /// Signatures under the survivors are awaited.
    Confirming,
    /// Shares of the survivors' masks and the dropouts' keys are awaited.
    Revealing,
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It counts.
    Added,
    /// The same message was there already.
    Repeated,
    /// Its step is closed and went on without it.
    TooLate,
}

/// Why a message is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StepError {
    /// The device said something else before: counting both would count it twice.
    #[error("another message of this device was taken for this step")]
    OtherBytes,
    /// The step has not begun, or the device has not taken the one before.
    #[error("the step before has not been taken")]
    Early,
    /// It does not fit the roster or the survivors.
    #[error("{0}")]
    Malformed(&'static str),
    /// The vector does not belong to this sum.
    #[error("masked vector: {0}")]
    Vector(#[from] RingError),
}

/// Why a cohort cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CohortFailure {
    /// Too few are left.
    #[error("{present} of {members} devices {step}; {needed} needed")]
    TooFew {
        /// Devices left.
        present: u32,
        /// Members of the cohort.
        members: u32,
        /// Devices needed.
        needed: u32,
        /// What they should have done.
        step: &'static str,
    },
}

/// Devices lost in each step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DropoutCounts {
    /// Advertised, but never shared.
    pub sharing: u32,
    /// Shared, but delivered no masked vector.
    pub masking: u32,
    /// Survivors that signed nothing.
    pub confirming: u32,
    /// Survivors that signed, but revealed nothing.
    pub revealing: u32,
}

/// What the coordinator holds of one member.
pub(super) struct Member {
    pub(super) advertisement: Advertisement,
    pub(super) neighbours: Vec<u32>,
    pub(super) bundle: Option<ShareBundle>,
    masked: Option<[u8; 32]>,
    confirmed: Option<Confirmation>,
    pub(super) reveal: Option<Reveal>,
    gone: bool,
}

/// One cohort.
pub struct Cohort {
    pub(super) terms: Terms,
    pub(super) binding: Binding,
    pub(super) degrees: Degrees,
    pub(super) members: Vec<Member>,
    tree: RosterTree,
    ids: Vec<DeviceId>,
    step: CohortStep,
    survivors_min: u32,
    pub(super) sum: RingVector,
    survivors: SurvivorSet,
}

impl Cohort {
    pub(crate) fn new(
        terms: Terms,
        roster: Vec<Advertisement>,
        degrees: Degrees,
        survivors_min: u32,
    ) -> Self {
        let tree = RosterTree::new(roster.iter().map(Advertisement::leaf).collect());
        let ids: Vec<DeviceId> = roster.iter().map(Advertisement::id).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "a roster is in the order of its ids");
        let Terms { bits, dimension, .. } = terms;
        let binding = Binding::new(&terms, &tree.root(), &ids);
        let count = u32::try_from(roster.len()).expect("bounded by MEMBERS_MAX");
        let graph = Graph::new(count, degrees.degree, &binding.graph_seed());
        let member = |(index, advertisement)| Member {
            advertisement,
            neighbours: graph.neighbours(index),
            bundle: None,
            masked: None,
            confirmed: None,
            reveal: None,
            gone: false,
        };
        Self {
            terms,
            binding,
            degrees,
            members: (0..).zip(roster).map(member).collect(),
            tree,
            ids,
            step: CohortStep::Sharing,
            survivors_min,
            sum: RingVector::zeros(bits, dimension),
            survivors: SurvivorSet::of(count, |_| false),
        }
    }

    /// Members.
    #[must_use]
    pub fn count(&self) -> u32 {
        u32::try_from(self.members.len()).expect("bounded by MEMBERS_MAX")
    }

    /// Neighbours a member and shares that rebuild a secret.
    #[must_use]
    pub fn degrees(&self) -> Degrees {
        self.degrees
    }

    /// The step under way.
    #[must_use]
    pub fn step(&self) -> CohortStep {
        self.step
    }

    /// The roster as the member at `index` sees it.
    #[must_use]
    pub fn roster_view(&self, index: u32) -> RosterView {
        let entry = |peer: &u32| RosterEntry {
            index: *peer,
            advertisement: self.member(*peer).advertisement.clone(),
            path: self.tree.path(*peer),
        };
        RosterView {
            members: self.count(),
            ids: self.ids.clone(),
            root: self.tree.root(),
            degrees: self.degrees,
            index,
            path: self.tree.path(index),
            neighbours: self.member(index).neighbours.iter().map(entry).collect(),
        }
    }

    /// Step 1: a member's shares.
    ///
    /// # Errors
    /// [`StepError`]; nothing has changed.
    pub fn handle_shares(&mut self, index: u32, bundle: ShareBundle) -> Result<Taken, StepError> {
        let step = self.step;
        let member = self.member_mut(index);
        if let Some(held) = &member.bundle {
            return repeated(*held == bundle);
        }
        if step > CohortStep::Sharing {
            return Ok(Taken::TooLate);
        }
        if !bundle.shares.iter().map(|share| share.peer).eq(member.neighbours.iter().copied()) {
            return Err(StepError::Malformed("shares: not one for each neighbour, in roster order"));
        }
        member.bundle = Some(bundle);
        Ok(Taken::Added)
    }

    /// Step 1's answer: what the member's neighbours sent to it. None if the member came too late.
    #[must_use]
    pub fn forwarded(&self, index: u32) -> Option<Vec<SealedShare>> {
        let member = self.member(index);
        if self.step == CohortStep::Sharing || member.bundle.is_none() {
            return None;
        }
        let sealed = |peer: &u32| {
            let sender = self.member(*peer);
            let place = sender.neighbours.binary_search(&index).expect("the graph is symmetric");
            let share = &sender.bundle.as_ref()?.shares[place];
            Some(SealedShare { peer: *peer, ciphertext: share.ciphertext })
        };
        Some(member.neighbours.iter().filter_map(sealed).collect())
    }

    /// Step 2: a member's masked vector, packed; it is in the sum afterwards and nowhere else. `digest`
    /// names its bytes.
    ///
    /// # Errors
    /// [`StepError`]; nothing has changed.
    pub fn handle_masked(&mut self, index: u32, digest: [u8; 32], packed: &[u8]) -> Result<Taken, StepError> {
        let member = self.member(index);
        if let Some(held) = member.masked {
            return repeated(held == digest);
        }
        match self.step {
            CohortStep::Sharing => return Err(StepError::Early),
            CohortStep::Masking => {}
            CohortStep::Confirming | CohortStep::Revealing => return Ok(Taken::TooLate),
        }
        if member.bundle.is_none() {
            return Ok(Taken::TooLate);
        }
        self.sum.add_packed(packed)?;
        self.member_mut(index).masked = Some(digest);
        Ok(Taken::Added)
    }

    /// Names the bytes of the member's masked vector, once it is in the sum.
    #[must_use]
    pub fn masked_digest(&self, index: u32) -> Option<[u8; 32]> {
        self.member(index).masked
    }

    /// Step 2's answer, the same for everybody: who is in the sum.
    #[must_use]
    pub fn survivors(&self) -> &SurvivorSet {
        &self.survivors
    }

    /// Step 3: a member's signature under the survivors.
    ///
    /// # Errors
    /// [`StepError`]; nothing has changed.
    pub fn handle_confirmation(
        &mut self,
        index: u32,
        confirmation: Confirmation,
    ) -> Result<Taken, StepError> {
        if self.step < CohortStep::Confirming {
            return Err(StepError::Early);
        }
        let member = self.member(index);
        if let Some(held) = member.confirmed {
            return repeated(held == confirmation);
        }
        if self.step > CohortStep::Confirming || member.masked.is_none() {
            return Ok(Taken::TooLate);
        }
        let key = &member.advertisement.certificate.public_key;
        // Passed on, a bad signature would cost every neighbour a check.
        if confirmation.index != index || !confirmation.verify(&self.binding, &self.survivors.sha256(), key) {
            return Err(StepError::Malformed(
                "confirmation: not this device's signature under the survivors",
            ));
        }
        self.member_mut(index).confirmed = Some(confirmation);
        Ok(Taken::Added)
    }

    /// Step 3's answer: as many of the neighbours' signatures as the threshold. None if there are fewer, or
    /// the member came too late.
    #[must_use]
    pub fn confirmations(&self, index: u32) -> Option<Vec<Confirmation>> {
        let member = self.member(index);
        if self.step < CohortStep::Revealing || member.confirmed.is_none() {
            return None;
        }
        let threshold = self.degrees.threshold as usize;
        let signed = member.neighbours.iter().filter_map(|peer| self.member(*peer).confirmed);
        let signed: Vec<Confirmation> = signed.take(threshold).collect();
        (signed.len() == threshold).then_some(signed)
    }

    /// Step 4: the shares that a member reveals.
    ///
    /// # Errors
    /// [`StepError`]; nothing has changed.
    pub fn handle_reveal(&mut self, index: u32, reveal: Reveal) -> Result<Taken, StepError> {
        if self.step < CohortStep::Revealing {
            return Err(StepError::Early);
        }
        let member = self.member(index);
        if let Some(held) = &member.reveal {
            return repeated(*held == reveal);
        }
        if member.confirmed.is_none() {
            return Ok(Taken::TooLate);
        }
        let in_order = reveal.shares.windows(2).all(|pair| pair[0].0 < pair[1].0);
        let fits = |(peer, share): &(u32, RevealedShare)| {
            let survived = self.survivors.contains(*peer);
            member.neighbours.binary_search(peer).is_ok()
                && match share {
                    RevealedShare::SelfMask(_) => survived,
                    RevealedShare::MaskKey(_) => !survived,
                }
        };
        if !in_order || !reveal.shares.iter().all(fits) {
            return Err(StepError::Malformed("reveal: not at most one share a neighbour, of the right kind"));
        }
        self.member_mut(index).reveal = Some(reveal);
        Ok(Taken::Added)
    }

    /// The member will not go on; nobody waits for it.
    pub fn handle_withdrawal(&mut self, index: u32) {
        self.member_mut(index).gone = true;
    }

    /// True while someone may still take the step under way.
    #[must_use]
    pub fn is_awaiting(&self) -> bool {
        self.members.iter().any(|member| !member.gone && member.is_expected(self.step))
    }

    /// Closes the step under way and opens the next; after the last, see [`Cohort::into_opening`].
    ///
    /// # Errors
    /// [`CohortFailure`] when too few are left; the session is lost, and nothing was learned.
    pub fn close_step(&mut self) -> Result<(), CohortFailure> {
        let counted = |test: fn(&Member) -> bool| self.members.iter().filter(|member| test(member)).count();
        let (present, step, next) = match self.step {
            CohortStep::Sharing => {
                (counted(|m| m.bundle.is_some()), "shared their secrets", CohortStep::Masking)
            }
            CohortStep::Masking => {
                (counted(|m| m.masked.is_some()), "delivered a masked vector", CohortStep::Confirming)
            }
            CohortStep::Confirming => {
                (counted(|m| m.confirmed.is_some()), "confirmed the survivors", CohortStep::Revealing)
            }
            CohortStep::Revealing => return Ok(()),
        };
        let present = u32::try_from(present).expect("bounded by MEMBERS_MAX");
        let needed = match self.step {
            CohortStep::Sharing | CohortStep::Masking => self.survivors_min.max(self.degrees.threshold + 1),
            CohortStep::Confirming | CohortStep::Revealing => self.degrees.threshold + 1,
        };
        if present < needed {
            return Err(CohortFailure::TooFew { present, members: self.count(), needed, step });
        }
        if self.step == CohortStep::Masking {
            let members = &self.members;
            self.survivors = SurvivorSet::of(self.count(), |i| members[i as usize].masked.is_some());
        }
        self.step = next;
        Ok(())
    }

    /// True once every member that must be unmasked has as many shares as the threshold.
    #[must_use]
    pub fn is_openable(&self) -> bool {
        if self.step != CohortStep::Revealing {
            return false;
        }
        let revealed = |peer: &&u32| self.member(**peer).reveal.is_some();
        let enough = |member: &&Member| {
            member.neighbours.iter().filter(revealed).count() >= self.degrees.threshold as usize
        };
        self.members.iter().filter(|member| member.bundle.is_some()).all(|member| enough(&member))
    }

    /// Takes the cohort to its end: the long computation that removes the masks, to be run anywhere.
    #[must_use]
    pub fn into_opening(self) -> Opening {
        Opening::new(self)
    }

    /// Devices lost so far, by step.
    #[must_use]
    pub fn dropouts(&self) -> DropoutCounts {
        let lost = |step: CohortStep| {
            let lost = self.members.iter().filter(|member| member.is_expected(step)).count();
            if step <= self.step { u32::try_from(lost).expect("bounded by MEMBERS_MAX") } else { 0 }
        };
        DropoutCounts {
            sharing: lost(CohortStep::Sharing),
            masking: lost(CohortStep::Masking),
            confirming: lost(CohortStep::Confirming),
            revealing: lost(CohortStep::Revealing),
        }
    }

    fn member(&self, index: u32) -> &Member {
        &self.members[index as usize]
    }

    fn member_mut(&mut self, index: u32) -> &mut Member {
        &mut self.members[index as usize]
    }
}

impl Member {
    pub(super) fn is_survivor(&self) -> bool {
        self.masked.is_some()
    }

    /// True if the member has taken every step before `step`, and not `step` itself.
    fn is_expected(&self, step: CohortStep) -> bool {
        match step {
            CohortStep::Sharing => self.bundle.is_none(),
            CohortStep::Masking => self.bundle.is_some() && self.masked.is_none(),
            CohortStep::Confirming => self.masked.is_some() && self.confirmed.is_none(),
            CohortStep::Revealing => self.confirmed.is_some() && self.reveal.is_none(),
        }
    }
}

fn repeated(same: bool) -> Result<Taken, StepError> {
    if same { Ok(Taken::Repeated) } else { Err(StepError::OtherBytes) }
}
