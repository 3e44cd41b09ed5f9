//! The end of a session at the coordinator: rebuild the secrets that the survivors have revealed, check each
//! against what its owner published, and take the masks off the sum.

use super::{Cohort, cohort::Member};
use crate::{
    identity::DeviceId,
    key_schedule::{Binding, End, agree},
    mask::{MaskSeed, Sign, add_masks_parallel},
    messages::RevealedShare,
    ring::RingVector,
    session_id::Terms,
    shamir::join_checked,
};
use std::{collections::BTreeSet, thread};
use subtle::ConstantTimeEq;
use thiserror::Error;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

/// Everything that opening takes; [`Opening::run`] is pure computation.
pub struct Opening {
    terms: Terms,
    binding: Binding,
    threshold: usize,
    members: Vec<Member>,
    sum: RingVector,
}

/// A share that is not the one its owner sent: either the owner sealed a wrong one, or the revealer changed
/// it. Which of the two is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suspicion {
    /// Whose secret it is a share of.
    pub owner: DeviceId,
    /// Who revealed it.
    pub revealer: DeviceId,
}

/// The sum of the survivors' vectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// Their sum mod 2^b.
    pub sum: RingVector,
    /// Vectors in it.
    pub survivors: u32,
    /// Shares that were wrong; the sum is right all the same.
    pub suspicions: Vec<Suspicion>,
}

/// Some secrets cannot be rebuilt: the sum stays masked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the secrets of {} devices cannot be rebuilt from the shares revealed", owners.len())]
pub struct OpenError {
    /// Whose secrets.
    pub owners: Vec<DeviceId>,
    /// Those among them that must have sealed wrong shares: enough of them came from neighbours whose shares
    /// of other secrets were right. Too few shares, or a neighbour's lie, are nobody's blame.
    pub blamed: Vec<DeviceId>,
    /// Shares known to be wrong.
    pub suspicions: Vec<Suspicion>,
}

/// One member's contribution to the masks to be removed.
struct Recovered {
    masks: Vec<(MaskSeed, Sign)>,
    suspicions: Vec<Suspicion>,
}

impl Opening {
    /// Vectors in the sum.
    #[must_use]
    pub fn survivors(&self) -> u32 {
        let survivors = self.members.iter().filter(|member| member.is_survivor()).count();
        u32::try_from(survivors).expect("bounded by MEMBERS_MAX")
    }

    pub(super) fn new(cohort: Cohort) -> Self {
        let Cohort { terms, binding, degrees, members, sum, .. } = cohort;
        Self { terms, binding, threshold: degrees.threshold as usize, members, sum }
    }

    /// Removes the masks on up to `threads` threads; the result does not depend on their number.
    ///
    /// # Errors
    /// [`OpenError`] names the devices whose secrets could not be rebuilt.
    pub fn run(mut self, threads: usize) -> Result<Opened, OpenError> {
        let threads = threads.max(1);
        let (mut found, mut failed) = (Vec::new(), Vec::new());
        for recovered in self.recover_all(threads) {
            match recovered {
                Ok(recovered) => found.push(recovered),
                Err(owner) => failed.push(owner),
            }
        }
        let suspicions: Vec<Suspicion> = found.iter().flat_map(|r| r.suspicions.iter().copied()).collect();
        if !failed.is_empty() {
            let proven = self.proven(&failed, &suspicions);
            failed.retain(|owner| match self.recover(*owner, &|peer| proven.contains(&peer)) {
                Some(Ok(recovered)) => {
                    found.push(recovered);
                    false
                }
                Some(Err(_)) | None => true,
            });
            if !failed.is_empty() {
                return Err(self.error(&failed, &proven, suspicions));
            }
        }
        let masks: Vec<(MaskSeed, Sign)> = found.into_iter().flat_map(|recovered| recovered.masks).collect();
        add_masks_parallel(self.terms.suite, &mut self.sum, &masks, threads);
        let survivors = self.survivors();
        Ok(Opened { sum: self.sum, survivors, suspicions })
    }

    /// Places of the devices whose shares of the secrets that were rebuilt are all right.
    fn proven(&self, failed: &[u32], suspicions: &[Suspicion]) -> BTreeSet<u32> {
        let failed: BTreeSet<u32> = failed.iter().copied().collect();
        let liars: BTreeSet<DeviceId> = suspicions.iter().map(|suspicion| suspicion.revealer).collect();
        let is_rebuilt =
            |(place, member): &(u32, &Member)| member.bundle.is_some() && !failed.contains(place);
        let rebuilt = (0..).zip(&self.members).filter(is_rebuilt);
        let mut proven: BTreeSet<u32> = rebuilt.flat_map(|(owner, _)| self.revealers(owner)).collect();
        proven.retain(|revealer| !liars.contains(&self.id(*revealer)));
        proven
    }

    fn error(&self, failed: &[u32], proven: &BTreeSet<u32>, suspicions: Vec<Suspicion>) -> OpenError {
        let right = |owner: u32| self.revealers(owner).filter(|revealer| proven.contains(revealer)).count();
        let sealed_wrong = failed.iter().filter(|owner| right(**owner) >= self.threshold);
        OpenError {
            blamed: sealed_wrong.map(|owner| self.id(*owner)).collect(),
            owners: failed.iter().map(|owner| self.id(*owner)).collect(),
            suspicions,
        }
    }

    fn id(&self, place: u32) -> DeviceId {
        self.members[place as usize].advertisement.id()
    }

    /// The neighbours that revealed a share of the secret of `owner`.
    fn revealers(&self, owner: u32) -> impl Iterator<Item = u32> {
        let has_share = move |peer: &u32| {
            let reveal = self.members[*peer as usize].reveal.as_ref();
            reveal.is_some_and(|r| r.shares.binary_search_by_key(&owner, |(of, _)| *of).is_ok())
        };
        self.members[owner as usize].neighbours.iter().copied().filter(has_share)
    }

    fn recover_all(&self, threads: usize) -> Vec<Result<Recovered, u32>> {
        let owners: Vec<u32> = (0..).take(self.members.len()).collect();
        let part = owners.len().div_ceil(threads).max(1);
        let one = |owner: &u32| self.recover(*owner, &|_| true);
        let recover = |owners: &[u32]| owners.iter().filter_map(one).collect::<Vec<_>>();
        if threads == 1 {
            return recover(&owners);
        }
        thread::scope(|scope| {
            let parts: Vec<_> = owners.chunks(part).map(|part| scope.spawn(move || recover(part))).collect();
            parts.into_iter().flat_map(|part| part.join().expect("recovering does not panic")).collect()
        })
    }

    /// The masks that this member left in the sum, from the shares of the peers that `believed` names. None
    /// if it left none; its place if they cannot be found.
    fn recover(&self, owner: u32, believed: &dyn Fn(u32) -> bool) -> Option<Result<Recovered, u32>> {
        let member = &self.members[owner as usize];
        let recovered = match (&member.bundle, member.is_survivor()) {
            (None, _) => return None,
            (Some(bundle), true) => self.self_mask(owner, &bundle.commitment, believed),
            (Some(_), false) => self.pair_masks(owner, believed)?,
        };
        Some(recovered.ok_or(owner))
    }

    fn self_mask(
        &self,
        owner: u32,
        commitment: &[u8; 32],
        believed: &dyn Fn(u32) -> bool,
    ) -> Option<Recovered> {
        let id = self.id(owner);
        let is_right = |secret: &[u8; 32]| self.binding.commitment(secret, &id).ct_eq(commitment).into();
        let (secret, suspicions) = self.join(owner, &is_right, believed)?;
        let masks = vec![(self.binding.self_seed(&secret, &id), Sign::Minus)];
        Some(Recovered { masks, suspicions })
    }

    /// The masks that survivors share with a dropout. None if no survivor does.
    fn pair_masks(&self, index: u32, believed: &dyn Fn(u32) -> bool) -> Option<Option<Recovered>> {
        let dropout = &self.members[index as usize];
        let survivors: Vec<u32> = dropout
            .neighbours
            .iter()
            .copied()
            .filter(|peer| self.members[*peer as usize].is_survivor())
            .collect();
        if survivors.is_empty() {
            return None;
        }
        let public = &dropout.advertisement.mask_key;
        let is_right =
            |secret: &[u8; 32]| PublicKey::from(&StaticSecret::from(*secret)).as_bytes().ct_eq(public).into();
        let Some((secret, suspicions)) = self.join(index, &is_right, believed) else { return Some(None) };
        let secret = StaticSecret::from(*secret);
        let id = dropout.advertisement.id();
        let mask = |peer: &u32| {
            let other = &self.members[*peer as usize].advertisement;
            let (ends, other_id) = (other.mask_key, other.id());
            let a = End { index, id: &id, key: public };
            let b = End { index: *peer, id: &other_id, key: &ends };
            let shared = agree(&secret, &other.mask_key).ok()?;
            // The survivor added it if the dropout's place is later than its own.
            let sign = if index > *peer { Sign::Minus } else { Sign::Plus };
            Some((self.binding.pair_seed(&shared, a, b), sign))
        };
        // A survivor with a key of low order would have made the dropout abort instead of sharing.
        let masks = survivors.iter().filter_map(mask).collect();
        Some(Some(Recovered { masks, suspicions }))
    }

    /// Rebuilds the secret of `owner` from what its neighbours revealed.
    fn join(
        &self,
        owner: u32,
        is_right: &dyn Fn(&[u8; 32]) -> bool,
        believed: &dyn Fn(u32) -> bool,
    ) -> Option<(Zeroizing<[u8; 32]>, Vec<Suspicion>)> {
        let member = &self.members[owner as usize];
        let share = |(x, peer): (u8, &u32)| {
            let reveal = self.members[*peer as usize].reveal.as_ref()?;
            let found = reveal.shares.binary_search_by_key(&owner, |(peer, _)| *peer).ok()?;
            match &reveal.shares[found].1 {
                RevealedShare::SelfMask(share) | RevealedShare::MaskKey(share) => Some((x, &**share)),
            }
        };
        let places = (1..=u8::MAX).zip(&member.neighbours).filter(|(_, peer)| believed(**peer));
        let shares: Vec<(u8, &[u8; 32])> = places.filter_map(share).collect();
        let joined = join_checked(self.threshold, &shares, is_right).ok()?;
        let revealer =
            |x: &u8| self.members[member.neighbours[usize::from(*x) - 1] as usize].advertisement.id();
        let owner = member.advertisement.id();
        let suspicions = joined.bad.iter().map(|x| Suspicion { owner, revealer: revealer(x) }).collect();
        Some((joined.secret, suspicions))
    }
}
