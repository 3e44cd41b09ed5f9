//! What a coordinator that writes its own messages, and a peer that signs what it is told, have in hand.

use crate::{
    Abort, Advertisement, Cohort, Confirmation, Degrees, Identity, MaskedVector, Reveal, RosterView,
    SealedShare, ShareBundle, SurvivorSet, Terms,
    key_schedule::advertised,
    tests::world::{NOW, Script, World},
};
use x25519_dalek::{PublicKey, StaticSecret};

impl World {
    pub(super) fn frozen(script: Script) -> (Self, Cohort) {
        let mut world = Self::new(script);
        let cohort = world.freeze();
        (world, cohort)
    }

    pub(super) fn shared(script: Script) -> (Self, Cohort) {
        let (mut world, mut cohort) = Self::frozen(script);
        world.share(&mut cohort).unwrap();
        (world, cohort)
    }

    pub(super) fn delivered(script: Script) -> (Self, Cohort) {
        let (mut world, mut cohort) = Self::shared(script);
        world.mask(&mut cohort).unwrap();
        (world, cohort)
    }

    pub(super) fn confirmed(script: Script) -> (Self, Cohort) {
        let (mut world, mut cohort) = Self::delivered(script);
        world.confirm(&mut cohort).unwrap();
        (world, cohort)
    }

    pub(super) fn see_roster(&mut self, place: u32, view: &RosterView) -> Result<ShareBundle, Abort> {
        let ticket = self.order[place as usize];
        self.devices[ticket].handle_roster(view, &self.policy, NOW, &mut self.rng)
    }

    pub(super) fn see_shares(&mut self, place: u32, sealed: &[SealedShare]) -> Result<MaskedVector, Abort> {
        let vector = self.vectors[self.order[place as usize]].clone();
        self.device(place).handle_shares(sealed, vector)
    }

    pub(super) fn see_survivors(
        &mut self,
        place: u32,
        survivors: &SurvivorSet,
    ) -> Result<Confirmation, Abort> {
        let ticket = self.order[place as usize];
        self.devices[ticket].handle_survivors(survivors, &self.policy, &self.identities[ticket])
    }

    pub(super) fn see_confirmations(&mut self, place: u32, signed: &[Confirmation]) -> Result<Reveal, Abort> {
        self.device(place).handle_confirmations(signed)
    }

    pub(super) fn identity(&self, place: u32) -> &Identity {
        &self.identities[self.order[place as usize]]
    }

    /// What everybody has advertised, in the order of the roster.
    pub(super) fn advertisements(&self) -> Vec<Advertisement> {
        self.order.iter().map(|ticket| self.devices[*ticket].advertisement().clone()).collect()
    }

    /// The device has left for this reason, takes no further step, and has nothing left to tell.
    #[track_caller]
    pub(super) fn assert_left<T>(&mut self, place: u32, outcome: Result<T, Abort>, expected: &Abort) {
        assert_eq!(outcome.err().as_ref(), Some(expected));
        assert_empty(&self.device(place).to_record(), 5);
        let view = RosterView {
            members: 8,
            ids: Vec::new(),
            root: [0; 32],
            degrees: Degrees { degree: 7, threshold: 5 },
            index: 0,
            path: Vec::new(),
            neighbours: Vec::new(),
        };
        let later = [
            self.see_roster(place, &view).err(),
            self.see_shares(place, &[]).err(),
            self.see_survivors(place, &SurvivorSet::of(8, |_| true)).err(),
            self.see_confirmations(place, &[]).err(),
        ];
        let is_over = |abort: &Option<Abort>| matches!(abort, Some(Abort::OutOfOrder { .. }));
        assert!(later.iter().all(is_over), "{later:?}");
    }
}

/// A record of nothing but the terms and what was advertised: version, terms, three secrets wiped, public
/// keys, last step.
#[track_caller]
pub(super) fn assert_empty(record: &[u8], last_step: u8) {
    const SECRETS_FROM: usize = 1 + 32 + 32 + 4 + 4 + 8;
    const PUBLIC_FROM: usize = SECRETS_FROM + 3 * 32;
    assert_eq!(record[SECRETS_FROM..PUBLIC_FROM], [0; 96], "the secrets are wiped");
    assert_eq!((record.len(), record.last()), (PUBLIC_FROM + 104 + 3 * 32 + 64 + 1, Some(&last_step)));
}

/// Keys of the liar's choice, signed all the same.
pub(super) fn advertise_as(
    identity: &Identity,
    terms: &Terms,
    share_key: [u8; 32],
    mask_key: [u8; 32],
) -> Advertisement {
    let nonce = [11; 32];
    let signature = identity.sign(&advertised(&terms.session, &share_key, &mask_key, &nonce));
    Advertisement { certificate: identity.certificate().clone(), share_key, mask_key, nonce, signature }
}

/// A public key whose secret half the liar knows.
pub(super) fn known_key(seed: u8) -> [u8; 32] {
    PublicKey::from(&StaticSecret::from([seed; 32])).to_bytes()
}

/// A roster made by hand, consistent in itself: root, paths and graph are those of its entries.
pub(super) fn forged_view(
    terms: &Terms,
    roster: &[Advertisement],
    degrees: Degrees,
    index: u32,
) -> RosterView {
    Cohort::new(*terms, roster.to_vec(), degrees, 0).roster_view(index)
}
