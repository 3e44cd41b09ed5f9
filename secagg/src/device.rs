//! A device's side of a session (Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic
//! Overhead", algorithm 3, with the signed consistency check of Bonawitz et al. 2017, figure 4).
//!
//! Five steps, each taken once: advertise, share, mask, confirm, reveal. Every answer of the coordinator is
//! held to the device's own [`Floors`] and to what it can compute itself; the first thing that is wrong ends
//! the session with a named [`Abort`], and its secrets are wiped. [`Device::to_record`] saves a session
//! between steps, so that a device that lost its process sends the same bytes again.

mod abort;
mod floors;
mod record;
mod roster;

pub use abort::Abort;
pub use floors::{DevicePolicy, Floors};

use crate::{
    identity::Identity,
    key_schedule::{advertised, agree},
    mask::{MaskSeed, Sign, add_masks},
    messages::{
        Advertisement, Confirmation, Reveal, RevealedShare, RosterView, SealedShare, ShareBundle, SurvivorSet,
    },
    ring::{RingError, RingVector},
    session_id::Terms,
    shamir::{SharePair, split},
};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit, aead::AeadInOut};
use rand::{CryptoRng, RngExt};
use roster::{Neighbour, Roster, SHARE_NONCE};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, Zeroizing};

/// A vector that may leave the device: only [`Device::handle_shares`] makes one.
#[derive(Clone, PartialEq, Eq)]
pub struct MaskedVector(RingVector);

/// One device in one session.
pub struct Device {
    terms: Terms,
    secrets: Secrets,
    advertisement: Advertisement,
    step: Step,
}

/// Everything that must not outlive the session.
struct Secrets {
    share_key: StaticSecret,
    mask_key: StaticSecret,
    self_mask: Zeroizing<[u8; 32]>,
}

/// The last step taken, and what the next needs.
enum Step {
    Advertised,
    Shared(Roster),
    Masked(Roster, Vec<Held>),
    Confirmed(Roster, Vec<Held>, SurvivorSet),
    Revealed,
    Aborted,
}

/// What is known of one neighbour once shares were forwarded, in roster order.
enum Held {
    /// It never shared: no mask, nothing to reveal.
    Nothing,
    /// It shared, but what arrived does not decrypt: the mask is there, no share to reveal.
    MaskOnly,
    /// The shares of its two secrets.
    Shares(SharePair),
}

impl MaskedVector {
    /// The bytes that leave: see [`RingVector::pack`].
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        self.0.pack()
    }

    /// The masked values; uniform to everybody who lacks the seeds.
    #[must_use]
    pub fn vector(&self) -> &RingVector {
        &self.0
    }
}

impl Device {
    /// Step 0: fresh keys, signed for this session.
    pub fn advertise(terms: Terms, identity: &Identity, rng: &mut impl CryptoRng) -> (Self, Advertisement) {
        let mut secret = || {
            let bytes = Zeroizing::new(rng.random::<[u8; 32]>());
            StaticSecret::from(*bytes)
        };
        let (share_secret, mask_secret) = (secret(), secret());
        let (self_mask, nonce) = (Zeroizing::new(rng.random()), rng.random());
        let share_key = PublicKey::from(&share_secret).to_bytes();
        let mask_key = PublicKey::from(&mask_secret).to_bytes();
        let signature = identity.sign(&advertised(&terms.session, &share_key, &mask_key, &nonce));
        let certificate = identity.certificate().clone();
        let advertisement = Advertisement { certificate, share_key, mask_key, nonce, signature };
        let secrets = Secrets { share_key: share_secret, mask_key: mask_secret, self_mask };
        let device = Self { terms, secrets, advertisement: advertisement.clone(), step: Step::Advertised };
        (device, advertisement)
    }

    /// Step 1: checks the roster and shares both secrets with the neighbours.
    ///
    /// # Errors
    /// [`Abort`]; the session is over.
    pub fn handle_roster(
        &mut self,
        view: &RosterView,
        policy: &DevicePolicy,
        now_unix_ms: u64,
        rng: &mut impl CryptoRng,
    ) -> Result<ShareBundle, Abort> {
        let taken = self.take_roster(view, policy, now_unix_ms, rng);
        self.end_if_aborted(taken)
    }

    /// Step 2: opens the neighbours' shares and masks the vector. `forwarded` holds what those neighbours
    /// sent that are still there.
    ///
    /// # Errors
    /// [`Abort`]; the session is over.
    pub fn handle_shares(
        &mut self,
        forwarded: &[SealedShare],
        vector: RingVector,
    ) -> Result<MaskedVector, Abort> {
        let masked = self.take_shares(forwarded, vector);
        self.end_if_aborted(masked)
    }

    /// Step 3: checks the set of survivors and signs it.
    ///
    /// # Errors
    /// [`Abort`]; the session is over.
    pub fn handle_survivors(
        &mut self,
        survivors: &SurvivorSet,
        policy: &DevicePolicy,
        identity: &Identity,
    ) -> Result<Confirmation, Abort> {
        let signed = self.take_survivors(survivors, policy, identity);
        self.end_if_aborted(signed)
    }

    /// Step 4: once enough neighbours have signed the same survivors, reveals one share a neighbour. The
    /// session is over afterwards and its secrets are gone.
    ///
    /// # Errors
    /// [`Abort`]; the session is over.
    pub fn handle_confirmations(&mut self, confirmations: &[Confirmation]) -> Result<Reveal, Abort> {
        let reveal = self.take_confirmations(confirmations);
        let reveal = self.end_if_aborted(reveal)?;
        self.secrets.wipe();
        Ok(reveal)
    }

    /// What both sides agreed on.
    #[must_use]
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// The keys advertised in step 0.
    #[must_use]
    pub fn advertisement(&self) -> &Advertisement {
        &self.advertisement
    }

    /// Members, degree and threshold, once the roster is known.
    #[must_use]
    pub fn cohort(&self) -> Option<(u32, crate::Degrees)> {
        match &self.step {
            Step::Shared(roster) | Step::Masked(roster, _) | Step::Confirmed(roster, ..) => {
                Some((roster.members, roster.degrees))
            }
            Step::Advertised | Step::Revealed | Step::Aborted => None,
        }
    }

    fn take_roster(
        &mut self,
        view: &RosterView,
        policy: &DevicePolicy,
        now_unix_ms: u64,
        rng: &mut impl CryptoRng,
    ) -> Result<ShareBundle, Abort> {
        let Step::Advertised = self.step else { return Err(self.out_of_order("a roster")) };
        policy.floors.check_roster(view)?;
        let roster = Roster::accept(
            view,
            &self.terms,
            &self.advertisement,
            &self.secrets.share_key,
            policy,
            now_unix_ms,
        )?;
        let mut secret = Zeroizing::new([0; 64]);
        secret[..32].copy_from_slice(self.secrets.self_mask.as_ref());
        secret[32..].copy_from_slice(self.secrets.mask_key.as_bytes());
        let threshold = roster.degrees.threshold as usize;
        let pairs = split(&secret, threshold, roster.neighbours.len(), rng);
        let seal = |(neighbour, pair): (&Neighbour, &SharePair)| roster.seal(neighbour, pair);
        let shares = roster.neighbours.iter().zip(&pairs).map(seal).collect();
        let commitment = roster.binding.commitment(&self.secrets.self_mask, &self.advertisement.id());
        self.step = Step::Shared(roster);
        Ok(ShareBundle { commitment, shares })
    }

    fn take_shares(
        &mut self,
        forwarded: &[SealedShare],
        mut vector: RingVector,
    ) -> Result<MaskedVector, Abort> {
        let Step::Shared(roster) = &self.step else { return Err(self.out_of_order("shares")) };
        self.check_vector(&vector)?;
        let held = roster.open_all(forwarded)?;
        let present = held.iter().filter(|held| held.is_present()).count();
        roster.check_present(present, "shared their secrets")?;
        let masks = self.masks(roster, &held)?;
        add_masks(self.terms.suite, &mut vector, &masks);
        let Step::Shared(roster) = std::mem::replace(&mut self.step, Step::Aborted) else {
            unreachable!("looked at above")
        };
        self.step = Step::Masked(roster, held);
        Ok(MaskedVector(vector))
    }

    /// Own mask, and one a neighbour that shared: plus towards later places, minus towards earlier ones.
    fn masks(&self, roster: &Roster, held: &[Held]) -> Result<Vec<(MaskSeed, Sign)>, Abort> {
        let own = roster.binding.self_seed(&self.secrets.self_mask, &self.advertisement.id());
        let mut masks = vec![(own, Sign::Plus)];
        for (neighbour, _) in roster.neighbours.iter().zip(held).filter(|(_, held)| held.is_present()) {
            let shared = agree(&self.secrets.mask_key, &neighbour.mask_key)
                .map_err(|_| Abort::LowOrderKey(neighbour.index))?;
            let (me, peer) = (roster.own_mask_end(&self.advertisement), neighbour.mask_end());
            let sign = if neighbour.index > roster.index { Sign::Plus } else { Sign::Minus };
            masks.push((roster.binding.pair_seed(&shared, me, peer), sign));
        }
        Ok(masks)
    }

    fn take_survivors(
        &mut self,
        survivors: &SurvivorSet,
        policy: &DevicePolicy,
        identity: &Identity,
    ) -> Result<Confirmation, Abort> {
        let Step::Masked(roster, held) = &self.step else { return Err(self.out_of_order("survivors")) };
        let (expected, found) = (roster.members, survivors.members());
        if expected != found {
            return Err(Abort::SurvivorsOfOtherRoster { expected, found });
        }
        if !survivors.contains(roster.index) {
            return Err(Abort::NotASurvivor);
        }
        // Differencing: a sum of too few says too much of each.
        policy.floors.check_survivors(survivors, roster.degrees.degree)?;
        let mut present = 0;
        for (neighbour, held) in roster.neighbours.iter().zip(held) {
            if survivors.contains(neighbour.index) {
                if !held.is_present() {
                    return Err(Abort::SurvivorWithoutShares(neighbour.index));
                }
                present += 1;
            }
        }
        roster.check_present(present, "survive")?;
        let message = roster.binding.survivors_message(&survivors.sha256());
        let confirmation = Confirmation { index: roster.index, signature: identity.sign(&message) };
        let Step::Masked(roster, held) = std::mem::replace(&mut self.step, Step::Aborted) else {
            unreachable!("looked at above")
        };
        self.step = Step::Confirmed(roster, held, survivors.clone());
        Ok(confirmation)
    }

    /// Stops equivocation: with 2t > k + corrupted neighbours, two different sets of survivors cannot both
    /// gather t signatures around one honest device (Bell et al. 2020, section 5).
    fn take_confirmations(&mut self, confirmations: &[Confirmation]) -> Result<Reveal, Abort> {
        let Step::Confirmed(roster, held, survivors) = &self.step else {
            return Err(self.out_of_order("confirmations"));
        };
        let threshold = roster.degrees.threshold;
        let valid = roster.confirmed(confirmations, survivors);
        if valid < threshold {
            return Err(Abort::Unconfirmed { valid, threshold });
        }
        let shares = roster.neighbours.iter().zip(held).filter_map(|(neighbour, held)| match held {
            Held::Nothing | Held::MaskOnly => None,
            Held::Shares(pair) => Some((neighbour.index, reveal(pair, survivors.contains(neighbour.index)))),
        });
        let shares = shares.collect();
        self.step = Step::Revealed;
        Ok(Reveal { shares })
    }

    fn check_vector(&self, vector: &RingVector) -> Result<(), RingError> {
        let (terms, bits) = (&self.terms, vector.bits());
        if bits != terms.bits {
            return Err(RingError::Modulus { expected: terms.bits.bits(), actual: bits.bits() });
        }
        if vector.dimension() != terms.dimension {
            return Err(RingError::Dimension { expected: terms.dimension, actual: vector.dimension() });
        }
        Ok(())
    }

    fn out_of_order(&self, found: &'static str) -> Abort {
        let expected = match self.step {
            Step::Advertised => "waiting for the roster",
            Step::Shared(_) => "waiting for shares",
            Step::Masked(..) => "waiting for the survivors",
            Step::Confirmed(..) => "waiting for confirmations",
            Step::Revealed => "a session that is over",
            Step::Aborted => "a session that was aborted",
        };
        Abort::OutOfOrder { expected, found }
    }

    fn end_if_aborted<T>(&mut self, outcome: Result<T, Abort>) -> Result<T, Abort> {
        if outcome.is_err() {
            self.step = Step::Aborted;
            self.secrets.wipe();
        }
        outcome
    }
}

impl Held {
    fn is_present(&self) -> bool {
        matches!(self, Self::MaskOnly | Self::Shares(_))
    }
}

impl Secrets {
    /// The keys wipe themselves as they are dropped.
    fn wipe(&mut self) {
        self.share_key = StaticSecret::from([0; 32]);
        self.mask_key = StaticSecret::from([0; 32]);
        self.self_mask.zeroize();
    }
}

/// One of the two shares, never both: with both the coordinator could unmask a vector that it already holds.
fn reveal(pair: &SharePair, survived: bool) -> RevealedShare {
    if survived {
        RevealedShare::SelfMask(Zeroizing::new(*pair.self_mask()))
    } else {
        RevealedShare::MaskKey(Zeroizing::new(*pair.mask_key()))
    }
}

impl Roster {
    fn seal(&self, neighbour: &Neighbour, pair: &SharePair) -> SealedShare {
        let mut ciphertext = [0; crate::SEALED_SHARE_BYTES];
        let (text, tag) = ciphertext.split_at_mut(64);
        text.copy_from_slice(pair.as_bytes());
        let data = self.binding.share_data(self.index, neighbour.index);
        let sealed = ChaCha20Poly1305::new((&*neighbour.key_out).into())
            .encrypt_inout_detached(&SHARE_NONCE.into(), &data, text.into())
            .expect("64 bytes are within the cipher's bound");
        tag.copy_from_slice(&sealed);
        SealedShare { peer: neighbour.index, ciphertext }
    }

    /// Opens what each neighbour sent. What does not decrypt costs its sender a share, not the session: a
    /// single malicious neighbour must not be able to end the session of all around it.
    fn open_all(&self, forwarded: &[SealedShare]) -> Result<Vec<Held>, Abort> {
        let mut held: Vec<Held> = self.neighbours.iter().map(|_| Held::Nothing).collect();
        for sealed in forwarded {
            let place = self.neighbours.binary_search_by_key(&sealed.peer, |n| n.index);
            let place = place.map_err(|_| Abort::UnexpectedShares(sealed.peer))?;
            if held[place].is_present() {
                return Err(Abort::UnexpectedShares(sealed.peer));
            }
            held[place] = self.open(&self.neighbours[place], sealed);
        }
        Ok(held)
    }

    fn open(&self, neighbour: &Neighbour, sealed: &SealedShare) -> Held {
        let mut text = Zeroizing::new([0; 64]);
        text.copy_from_slice(&sealed.ciphertext[..64]);
        let tag: [u8; 16] = sealed.ciphertext[64..].try_into().expect("80 bytes");
        let data = self.binding.share_data(neighbour.index, self.index);
        let opened = ChaCha20Poly1305::new((&*neighbour.key_in).into()).decrypt_inout_detached(
            &SHARE_NONCE.into(),
            &data,
            text.as_mut_slice().into(),
            &tag.into(),
        );
        if opened.is_ok() { Held::Shares(SharePair::from_bytes(&text)) } else { Held::MaskOnly }
    }

    /// Neighbours that have signed these survivors, counted up to the threshold.
    fn confirmed(&self, confirmations: &[Confirmation], survivors: &SurvivorSet) -> u32 {
        let survivors_sha256 = survivors.sha256();
        let surviving = self.neighbours.iter().filter(|n| survivors.contains(n.index));
        let of = |neighbour: &Neighbour| confirmations.iter().find(|c| c.index == neighbour.index);
        let signed: Vec<(&Confirmation, &[u8; 32])> =
            surviving.filter_map(|n| of(n).map(|c| (c, &n.public_key))).collect();
        let threshold = self.degrees.threshold as usize;
        let first = &signed[..signed.len().min(threshold)];
        let count = if Confirmation::verify_all(first, &self.binding, &survivors_sha256) {
            first.len()
        } else {
            let is_valid =
                |(c, key): &&(&Confirmation, &[u8; 32])| c.verify(&self.binding, &survivors_sha256, key);
            signed.iter().filter(is_valid).take(threshold).count()
        };
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    fn check_present(&self, present: usize, step: &'static str) -> Result<(), Abort> {
        let (present, threshold) = (u32::try_from(present).unwrap_or(u32::MAX), self.degrees.threshold);
        if present < threshold {
            return Err(Abort::TooFewNeighbours { present, threshold, step });
        }
        Ok(())
    }
}
