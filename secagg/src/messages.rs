//! What devices and coordinator tell each other in a session, as typed values. Their wire form is in the
//! protocol's schema.
//!
//! | step | device to coordinator | coordinator to device |
//! |---|---|---|
//! | 0 | [`Advertisement`] | [`RosterView`] |
//! | 1 | [`ShareBundle`] | [`SealedShare`]s from the neighbours |
//! | 2 | [`crate::MaskedVector`] | [`SurvivorSet`] |
//! | 3 | [`Confirmation`] | the neighbours' [`Confirmation`]s |
//! | 4 | [`Reveal`] | |

use crate::{
    identity::{Certificate, CertificateError, DeviceId, Registrars, verifying_key},
    key_schedule::{Binding, advertised, is_low_order},
    parameters::Degrees,
    roster_tree::leaf_hash,
    session_id::{Labelled, SessionId},
};
use ed25519_dalek::{Signature, verify_batch};
use thiserror::Error;
use zeroize::Zeroizing;

/// Bytes of a sealed share: two secrets of 32 bytes and the tag.
pub const SEALED_SHARE_BYTES: usize = 64 + 16;

/// A device's keys for one session, signed by its identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertisement {
    /// Who.
    pub certificate: Certificate,
    /// X25519 key for the encryption of shares.
    pub share_key: [u8; 32],
    /// X25519 key for pairwise masks; its secret half is what peers can rebuild if the device vanishes.
    pub mask_key: [u8; 32],
    /// Fresh randomness: part of what the graph is drawn from.
    pub nonce: [u8; 32],
    /// Ed25519 signature over session, keys and nonce.
    pub signature: [u8; 64],
}

/// Why an advertisement is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum AdvertisementError {
    /// Its certificate.
    #[error("certificate: {0}")]
    Certificate(#[from] CertificateError),
    /// It was not signed by its owner for this session.
    #[error("the keys are not signed by their owner for this session")]
    Signature,
    /// A key of low order: secrets agreed with it are known to everybody.
    #[error("a key of it is of low order")]
    LowOrder,
}

/// A member of the roster as a neighbour sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RosterEntry {
    /// Place in the roster, meaningless outside it.
    pub index: u32,
    /// Its keys.
    pub advertisement: Advertisement,
    /// Merkle path from its leaf to the roster's root.
    pub path: Vec<[u8; 32]>,
}

/// The roster as one member sees it: the root, itself and its neighbours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RosterView {
    /// Members.
    pub members: u32,
    /// The ids of all members, ascending. Each device holds its neighbours to them, so an identity has one
    /// place in the roster and the coordinator cannot choose which.
    pub ids: Vec<DeviceId>,
    /// Merkle root over the members' entries in that order.
    pub root: [u8; 32],
    /// Neighbours of each member, and shares that rebuild a secret.
    pub degrees: Degrees,
    /// The member's own place.
    pub index: u32,
    /// Its own Merkle path.
    pub path: Vec<[u8; 32]>,
    /// Its neighbours in the order of their places.
    pub neighbours: Vec<RosterEntry>,
}

/// The shares of one device's secrets for one neighbour, encrypted to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedShare {
    /// The other end: the receiver on the way up, the sender on the way down.
    pub peer: u32,
    /// ChaCha20-Poly1305 ciphertext and tag.
    pub ciphertext: [u8; SEALED_SHARE_BYTES],
}

/// One device's shares, and the commitment to its self-mask secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareBundle {
    /// SHA-256 commitment.
    pub commitment: [u8; 32],
    /// One a neighbour, in roster order.
    pub shares: Vec<SealedShare>,
}

/// Whose masked vectors are in the sum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SurvivorSet {
    members: u32,
    bitmap: Vec<u8>,
}

/// The bytes are not the set's only encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("survivors: {bytes} bytes, or bits beyond the last of {members} members")]
pub struct SurvivorSetError {
    /// Members of the roster.
    pub members: u32,
    /// Bytes found.
    pub bytes: usize,
}

/// A device's signature under session, roster and survivors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confirmation {
    /// Who, by place in the roster.
    pub index: u32,
    /// Ed25519 signature.
    pub signature: [u8; 64],
}

/// One share handed to the coordinator: of a survivor its self mask, of a dropout its mask key. There is
/// no way to say both of one peer.
#[derive(Clone, PartialEq, Eq)]
pub enum RevealedShare {
    /// The peer's vector is in the sum: its own mask must go.
    SelfMask(Zeroizing<[u8; 32]>),
    /// The peer's vector is missing: the masks it shared with survivors must go.
    MaskKey(Zeroizing<[u8; 32]>),
}

/// What one device reveals: at most one share a peer.
#[derive(Clone, PartialEq, Eq)]
pub struct Reveal {
    /// Place of the peer and the share of its secret, in roster order.
    pub shares: Vec<(u32, RevealedShare)>,
}

impl Advertisement {
    /// The owner's name in the roster.
    #[must_use]
    pub fn id(&self) -> DeviceId {
        self.certificate.id()
    }

    /// Checks certificate and signature. Stops substituted keys (a coordinator in the middle), keys replayed
    /// from another session, and peers that no registrar knows.
    ///
    /// # Errors
    /// [`AdvertisementError`].
    pub fn verify(
        &self,
        session: &SessionId,
        registrars: &Registrars,
        population: &str,
        now_unix_ms: u64,
    ) -> Result<(), AdvertisementError> {
        self.check_keys()?;
        let key = registrars.verify(&self.certificate, population, now_unix_ms)?;
        key.verify_strict(&self.message(session), &Signature::from_bytes(&self.signature))
            .map_err(|_| AdvertisementError::Signature)
    }

    /// Checks several at once, in half the time: all their signatures in one equation (Bernstein et al. 2012,
    /// "High-speed high-security signatures", section 5), and one by one only if that does not hold. Only the
    /// owner of a key can make a signature that passes here and not in [`Advertisement::verify`].
    ///
    /// # Errors
    /// The place of the first that is refused, and why.
    pub fn verify_all(
        advertisements: &[&Self],
        session: &SessionId,
        registrars: &Registrars,
        population: &str,
        now_unix_ms: u64,
    ) -> Result<(), (usize, AdvertisementError)> {
        if Self::verify_batch(advertisements, session, registrars, population, now_unix_ms) {
            return Ok(());
        }
        let verify =
            |advertisement: &Self| advertisement.verify(session, registrars, population, now_unix_ms);
        let mut refused =
            (0..).zip(advertisements).filter_map(|(i, a)| verify(a).err().map(|error| (i, error)));
        refused.next().map_or(Ok(()), Err)
    }

    fn verify_batch(
        advertisements: &[&Self],
        session: &SessionId,
        registrars: &Registrars,
        population: &str,
        now_unix_ms: u64,
    ) -> bool {
        let (mut messages, mut signatures, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        for advertisement in advertisements {
            let certificate = &advertisement.certificate;
            let Some(registrar) = registrars.only() else { return false };
            let Ok(key) = verifying_key(&certificate.public_key) else { return false };
            if advertisement.check_keys().is_err() || certificate.expires_unix_ms <= now_unix_ms {
                return false;
            }
            messages.extend([certificate.message(population), advertisement.message(session)]);
            signatures.extend([&certificate.signature, &advertisement.signature].map(Signature::from_bytes));
            keys.extend([*registrar, key]);
        }
        let messages: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
        verify_batch(&messages, &signatures, &keys).is_ok()
    }

    fn check_keys(&self) -> Result<(), AdvertisementError> {
        let low = is_low_order(&self.share_key) || is_low_order(&self.mask_key);
        if low { Err(AdvertisementError::LowOrder) } else { Ok(()) }
    }

    fn message(&self, session: &SessionId) -> Vec<u8> {
        advertised(session, &self.share_key, &self.mask_key, &self.nonce)
    }

    /// The roster's leaf: everything but the signatures, which cover it.
    #[must_use]
    pub fn leaf(&self) -> [u8; 32] {
        let parts = [&self.certificate.public_key, &self.share_key, &self.mask_key, &self.nonce];
        leaf_hash(&parts.map(|part| part.as_slice()).concat())
    }
}

impl SurvivorSet {
    /// The set of the places for which `is_in` holds.
    pub fn of(members: u32, mut is_in: impl FnMut(u32) -> bool) -> Self {
        let mut bitmap = vec![0; (members as usize).div_ceil(8)];
        for index in (0..members).filter(|index| is_in(*index)) {
            bitmap[index as usize / 8] |= 1 << (index % 8);
        }
        Self { members, bitmap }
    }

    /// Reads a bitmap, least significant bit first.
    ///
    /// # Errors
    /// [`SurvivorSetError`] for a wrong length or a set bit beyond the last member.
    pub fn from_bytes(members: u32, bytes: &[u8]) -> Result<Self, SurvivorSetError> {
        let set = Self { members, bitmap: bytes.to_vec() };
        let canonical = Self::of(members, |index| set.bit(index));
        if canonical == set { Ok(set) } else { Err(SurvivorSetError { members, bytes: bytes.len() }) }
    }

    /// The bitmap.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bitmap
    }

    /// True if the member's vector is in the sum.
    #[must_use]
    pub fn contains(&self, index: u32) -> bool {
        index < self.members && self.bit(index)
    }

    /// Survivors.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.bitmap.iter().map(|byte| byte.count_ones()).sum()
    }

    /// Members of the roster.
    #[must_use]
    pub fn members(&self) -> u32 {
        self.members
    }

    pub(crate) fn sha256(&self) -> [u8; 32] {
        let mut hash = Labelled::new("survivor-set");
        hash.bytes(&self.members.to_le_bytes());
        hash.bytes(&self.bitmap);
        hash.finish()
    }

    fn bit(&self, index: u32) -> bool {
        self.bitmap.get(index as usize / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1)
    }
}

impl Confirmation {
    /// True if every one of them is its owner's signature under the same survivors.
    pub(crate) fn verify_all(signed: &[(&Self, &[u8; 32])], binding: &Binding, survivors: &[u8; 32]) -> bool {
        let message = binding.survivors_message(survivors);
        let messages = vec![message.as_slice(); signed.len()];
        let signatures: Vec<Signature> =
            signed.iter().map(|(c, _)| Signature::from_bytes(&c.signature)).collect();
        let keys: Result<Vec<_>, _> = signed.iter().map(|(_, key)| verifying_key(key)).collect();
        keys.is_ok_and(|keys| verify_batch(&messages, &signatures, &keys).is_ok())
    }

    /// True if the owner of `public_key` signed these survivors in this session and roster.
    pub(crate) fn verify(&self, binding: &Binding, survivors: &[u8; 32], public_key: &[u8; 32]) -> bool {
        let message = binding.survivors_message(survivors);
        let signature = Signature::from_bytes(&self.signature);
        verifying_key(public_key).is_ok_and(|key| key.verify_strict(&message, &signature).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_survivor_set_has_one_encoding() {
        let set = SurvivorSet::of(10, |index| index % 3 == 0);
        assert_eq!((set.as_bytes(), set.count()), (&[0b0100_1001, 0b10][..], 4));
        assert_eq!(SurvivorSet::from_bytes(10, set.as_bytes()), Ok(set.clone()));
        assert!(set.contains(9) && !set.contains(1) && !set.contains(10) && !set.contains(u32::MAX));
        assert!(SurvivorSet::from_bytes(10, &[0, 0b100]).is_err(), "a bit beyond the last member");
        assert!(SurvivorSet::from_bytes(10, &[0]).is_err() && SurvivorSet::from_bytes(10, &[0; 3]).is_err());
        assert_ne!(SurvivorSet::of(9, |_| false).sha256(), SurvivorSet::of(10, |_| false).sha256());
    }
}
