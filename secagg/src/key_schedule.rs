//! Every key, seed and commitment of a session, each under its own label and bound to the session and the
//! roster (HKDF-SHA256, RFC 5869).
//!
//! A pair's secrets name both devices in roster order with their public keys of this session, so a peer that
//! was shown other keys derives other secrets.

use crate::{
    identity::DeviceId,
    mask::MaskSeed,
    session_id::{Labelled, SessionId, Terms, labelled},
};
use hkdf::Hkdf;
use sha2::Sha256;
use x25519_dalek::{PublicKey, SharedSecret, StaticSecret};
use zeroize::Zeroizing;

/// What every derivation of a session is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Binding {
    pub(crate) session: SessionId,
    pub(crate) config_sha256: [u8; 32],
    pub(crate) roster_root: [u8; 32],
}

/// One end of a pair.
#[derive(Clone, Copy)]
pub(crate) struct End<'a> {
    pub(crate) index: u32,
    pub(crate) id: &'a DeviceId,
    pub(crate) key: &'a [u8; 32],
}

/// The key's other half is a point of low order: the shared secret would be known to everybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LowOrder;

/// X25519 (RFC 7748) that refuses non-contributory results.
pub(crate) fn agree(secret: &StaticSecret, public: &[u8; 32]) -> Result<SharedSecret, LowOrder> {
    let shared = secret.diffie_hellman(&PublicKey::from(*public));
    if shared.was_contributory() { Ok(shared) } else { Err(LowOrder) }
}

/// True for a key whose shared secret is zero with everybody: the u-coordinates of order 1, 2, 4 and 8 on
/// the curve and its twist, and their encodings above the field's prime (Bernstein 2006, "Curve25519",
/// section on contributory behaviour). The top bit is ignored, as X25519 does.
pub(crate) fn is_low_order(key: &[u8; 32]) -> bool {
    let mut masked = *key;
    masked[31] &= 0x7f;
    LOW_ORDER.contains(&masked)
}

const LOW_ORDER: [[u8; 32]; 7] = [
    [0; 32],
    with_ends(1, 0, 0),
    with_ends(0xec, 0xff, 0x7f),
    with_ends(0xed, 0xff, 0x7f),
    with_ends(0xee, 0xff, 0x7f),
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda,
        0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ],
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04,
        0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ],
];

const fn with_ends(first: u8, middle: u8, last: u8) -> [u8; 32] {
    let mut bytes = [middle; 32];
    bytes[0] = first;
    bytes[31] = last;
    bytes
}

impl Binding {
    /// Binds to a session and a roster: the Merkle root over the entries, their number, and whose they are.
    pub(crate) fn new(terms: &Terms, merkle_root: &[u8; 32], ids: &[DeviceId]) -> Self {
        let mut hash = Labelled::new("roster");
        hash.bytes(&(ids.len() as u64).to_le_bytes());
        hash.bytes(merkle_root);
        ids.iter().for_each(|id| hash.bytes(&id.0));
        let Terms { session, config_sha256, .. } = *terms;
        Self { session, config_sha256, roster_root: hash.finish() }
    }

    /// The AEAD key for shares from `from` to `to`. Each direction has its own, used for one message.
    pub(crate) fn share_key(&self, shared: &SharedSecret, from: End<'_>, to: End<'_>) -> Zeroizing<[u8; 32]> {
        let mut info = self.pair_info("share-aead", from, to);
        info.extend_from_slice(&from.id.0);
        self.expand(shared.as_bytes(), &info)
    }

    /// The additional data of that message.
    pub(crate) fn share_data(&self, from: u32, to: u32) -> [u8; 40] {
        let mut data = [0; 40];
        data[..32].copy_from_slice(self.session.as_bytes());
        data[32..36].copy_from_slice(&from.to_le_bytes());
        data[36..].copy_from_slice(&to.to_le_bytes());
        data
    }

    /// The seed of the mask that a pair shares.
    pub(crate) fn pair_seed(&self, shared: &SharedSecret, a: End<'_>, b: End<'_>) -> MaskSeed {
        let mut info = self.pair_info("pair-mask", a, b);
        info.extend_from_slice(&self.config_sha256);
        MaskSeed::new(*self.expand(shared.as_bytes(), &info))
    }

    /// The seed of a device's own mask.
    pub(crate) fn self_seed(&self, secret: &[u8; 32], id: &DeviceId) -> MaskSeed {
        let mut info = labelled("self-mask");
        info.extend_from_slice(&self.roster_root);
        info.extend_from_slice(&id.0);
        info.extend_from_slice(&self.config_sha256);
        MaskSeed::new(*self.expand(secret, &info))
    }

    /// What a device publishes of its self-mask secret, so that a wrong reconstruction is noticed.
    pub(crate) fn commitment(&self, secret: &[u8; 32], id: &DeviceId) -> [u8; 32] {
        let mut hash = Labelled::new("self-mask-commitment");
        hash.bytes(self.session.as_bytes());
        hash.bytes(&id.0);
        hash.bytes(secret);
        hash.finish()
    }

    /// Seed of the graph. It depends on every device's fresh keys and nonce through the roster's root, and
    /// is fixed once the roster is: the coordinator can only draw again, by changing the roster.
    pub(crate) fn graph_seed(&self) -> [u8; 32] {
        let mut hash = Labelled::new("graph");
        hash.bytes(self.session.as_bytes());
        hash.bytes(&self.roster_root);
        hash.finish()
    }

    /// What a device signs about the set of survivors.
    pub(crate) fn survivors_message(&self, survivors_sha256: &[u8; 32]) -> Vec<u8> {
        let mut message = labelled("survivors");
        message.extend_from_slice(self.session.as_bytes());
        message.extend_from_slice(&self.roster_root);
        message.extend_from_slice(survivors_sha256);
        message
    }

    fn pair_info(&self, label: &str, a: End<'_>, b: End<'_>) -> Vec<u8> {
        let (i, j) = if a.index < b.index { (a, b) } else { (b, a) };
        let mut info = labelled(label);
        info.extend_from_slice(&self.roster_root);
        for part in [&i.id.0, &j.id.0, i.key, j.key] {
            info.extend_from_slice(part);
        }
        info
    }

    fn expand(&self, secret: &[u8; 32], info: &[u8]) -> Zeroizing<[u8; 32]> {
        let mut key = Zeroizing::new([0; 32]);
        Hkdf::<Sha256>::new(Some(self.session.as_bytes()), secret)
            .expand(info, key.as_mut())
            .expect("HKDF-SHA256 gives up to 8160 bytes");
        key
    }
}

/// What a device signs about its keys of a session.
pub(crate) fn advertised(
    session: &SessionId,
    share_key: &[u8; 32],
    mask_key: &[u8; 32],
    nonce: &[u8; 32],
) -> Vec<u8> {
    let mut message = labelled("advertise");
    for part in [session.as_bytes(), share_key, mask_key, nonce] {
        message.extend_from_slice(part);
    }
    message
}

#[cfg(test)]
mod tests;
