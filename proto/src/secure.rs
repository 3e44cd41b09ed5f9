//! Secure aggregation's messages between their wire form and the typed values of `fleetune_secagg`.
//!
//! Lengths and kinds are checked here; what the values mean is checked by the two sides of a session.

use crate::{
    error::{WireError, required},
    limits::INLINE_BYTES_MAX,
    wire,
};
use fleetune_secagg::{
    Advertisement, Certificate, Confirmation, Degrees, DeviceId, MEMBERS_MAX, Reveal, RevealedShare,
    RosterEntry, RosterView, SealedShare, ShareBundle, SurvivorSet,
};
use zeroize::Zeroizing;

/// Most steps of a Merkle path: the bound on members is far below 2^32.
const PATH_STEPS_MAX: usize = 32;
/// Most neighbours, shares or signatures in one message: shares have one-byte places.
const NEIGHBOURS_MAX: usize = 255;
/// Longest bitmap of survivors, bytes.
const BITMAP_BYTES_MAX: usize = MEMBERS_MAX.div_ceil(8);
const _: () = assert!(BITMAP_BYTES_MAX <= INLINE_BYTES_MAX);

/// A device's keys on the wire.
pub fn advertisement_to_wire(advertisement: &Advertisement) -> wire::KeyAdvertisement {
    wire::KeyAdvertisement {
        certificate: advertisement.certificate.to_bytes().to_vec(),
        share_key: advertisement.share_key.to_vec(),
        mask_key: advertisement.mask_key.to_vec(),
        nonce: advertisement.nonce.to_vec(),
        signature: advertisement.signature.to_vec(),
    }
}

/// Reads a device's keys; nothing is verified.
pub fn parse_advertisement(wire: Option<wire::KeyAdvertisement>) -> Result<Advertisement, WireError> {
    let wire = required("keys", wire)?;
    let certificate = Certificate::from_bytes(&wire.certificate).ok_or_else(|| {
        WireError::invalid("keys.certificate", format!("{} bytes; it has 104", wire.certificate.len()))
    })?;
    Ok(Advertisement {
        certificate,
        share_key: array("keys.share_key", &wire.share_key)?,
        mask_key: array("keys.mask_key", &wire.mask_key)?,
        nonce: array("keys.nonce", &wire.nonce)?,
        signature: array("keys.signature", &wire.signature)?,
    })
}

/// A member's view of the roster on the wire.
pub fn roster_to_wire(view: &RosterView) -> wire::Roster {
    let member = |entry: &RosterEntry| wire::RosterMember {
        index: entry.index,
        keys: Some(advertisement_to_wire(&entry.advertisement)),
        path: entry.path.concat(),
    };
    wire::Roster {
        members: view.members,
        root: view.root.to_vec(),
        degree: view.degrees.degree,
        threshold: view.degrees.threshold,
        index: view.index,
        path: view.path.concat(),
        neighbours: view.neighbours.iter().map(member).collect(),
        ids: view.ids.iter().flat_map(|id| id.0).collect(),
    }
}

/// Reads a view of a roster; nothing is verified.
pub fn parse_roster(wire: wire::Roster) -> Result<RosterView, WireError> {
    bounded("roster.neighbours", wire.neighbours.len(), NEIGHBOURS_MAX)?;
    let (ids, rest) = wire.ids.as_chunks::<32>();
    if ids.len() > MEMBERS_MAX || !rest.is_empty() {
        let problem = format!("{} bytes; at most {MEMBERS_MAX} ids of 32", wire.ids.len());
        return Err(WireError::invalid("roster.ids", problem));
    }
    let entry = |member: wire::RosterMember| {
        Ok(RosterEntry {
            index: member.index,
            advertisement: parse_advertisement(member.keys)?,
            path: path("roster.neighbours.path", &member.path)?,
        })
    };
    Ok(RosterView {
        members: wire.members,
        ids: ids.iter().map(|id| DeviceId(*id)).collect(),
        root: array("roster.root", &wire.root)?,
        degrees: Degrees { degree: wire.degree, threshold: wire.threshold },
        index: wire.index,
        path: path("roster.path", &wire.path)?,
        neighbours: wire.neighbours.into_iter().map(entry).collect::<Result<_, _>>()?,
    })
}

/// Sealed shares on the wire.
pub fn shares_to_wire(shares: &[SealedShare]) -> Vec<wire::SealedShare> {
    let share =
        |share: &SealedShare| wire::SealedShare { peer: share.peer, ciphertext: share.ciphertext.to_vec() };
    shares.iter().map(share).collect()
}

/// Reads sealed shares.
pub fn parse_shares(wire: &[wire::SealedShare]) -> Result<Vec<SealedShare>, WireError> {
    bounded("shares", wire.len(), NEIGHBOURS_MAX)?;
    let share = |share: &wire::SealedShare| {
        Ok(SealedShare { peer: share.peer, ciphertext: array("shares.ciphertext", &share.ciphertext)? })
    };
    wire.iter().map(share).collect()
}

/// Reads a device's shares.
pub fn parse_bundle(wire: &wire::ShareKeysRequest) -> Result<ShareBundle, WireError> {
    let commitment = array("share_keys.commitment", &wire.commitment)?;
    Ok(ShareBundle { commitment, shares: parse_shares(&wire.shares)? })
}

/// Reads the survivors among `members`.
pub fn parse_survivors(members: u32, wire: &wire::Survivors) -> Result<SurvivorSet, WireError> {
    bounded("survivors.bitmap", wire.bitmap.len(), BITMAP_BYTES_MAX)?;
    SurvivorSet::from_bytes(members, &wire.bitmap)
        .map_err(|error| WireError::invalid("survivors.bitmap", error.to_string()))
}

/// Neighbours' signatures on the wire.
pub fn confirmations_to_wire(confirmations: &[Confirmation]) -> wire::Confirmations {
    let one = |c: &Confirmation| wire::Confirmation { index: c.index, signature: c.signature.to_vec() };
    wire::Confirmations { confirmations: confirmations.iter().map(one).collect() }
}

/// Reads neighbours' signatures.
pub fn parse_confirmations(wire: &wire::Confirmations) -> Result<Vec<Confirmation>, WireError> {
    bounded("confirmations", wire.confirmations.len(), NEIGHBOURS_MAX)?;
    let one = |c: &wire::Confirmation| parse_confirmation(c.index, &c.signature);
    wire.confirmations.iter().map(one).collect()
}

/// Reads one device's signature.
pub fn parse_confirmation(index: u32, signature: &[u8]) -> Result<Confirmation, WireError> {
    Ok(Confirmation { index, signature: array("confirmation.signature", signature)? })
}

/// Revealed shares on the wire.
pub fn reveal_to_wire(reveal: &Reveal) -> Vec<wire::RevealedShare> {
    use wire::revealed_share::Secret;
    let share = |(peer, share): &(u32, RevealedShare)| wire::RevealedShare {
        peer: *peer,
        secret: Some(match share {
            RevealedShare::SelfMask(bytes) => Secret::SelfMask(bytes.to_vec()),
            RevealedShare::MaskKey(bytes) => Secret::MaskKey(bytes.to_vec()),
        }),
    };
    reveal.shares.iter().map(share).collect()
}

/// Reads revealed shares.
pub fn parse_reveal(wire: &[wire::RevealedShare]) -> Result<Reveal, WireError> {
    use wire::revealed_share::Secret;
    bounded("reveal_shares.shares", wire.len(), NEIGHBOURS_MAX)?;
    let share = |share: &wire::RevealedShare| {
        let secret = match &share.secret {
            Some(Secret::SelfMask(bytes)) => {
                RevealedShare::SelfMask(Zeroizing::new(array("reveal_shares.shares.self_mask", bytes)?))
            }
            Some(Secret::MaskKey(bytes)) => {
                RevealedShare::MaskKey(Zeroizing::new(array("reveal_shares.shares.mask_key", bytes)?))
            }
            None => return Err(WireError::Missing("reveal_shares.shares.secret")),
        };
        Ok((share.peer, secret))
    };
    Ok(Reveal { shares: wire.iter().map(share).collect::<Result<_, _>>()? })
}

/// The nonce of an attempt.
pub(crate) fn parse_nonce(bytes: &[u8]) -> Result<[u8; 32], WireError> {
    array("assignment.aggregation_nonce", bytes)
}

fn array<const N: usize>(field: &'static str, bytes: &[u8]) -> Result<[u8; N], WireError> {
    bytes.try_into().map_err(|_| WireError::invalid(field, format!("{} bytes; it has {N}", bytes.len())))
}

fn path(field: &'static str, bytes: &[u8]) -> Result<Vec<[u8; 32]>, WireError> {
    let (steps, rest) = bytes.as_chunks::<32>();
    if !rest.is_empty() || steps.len() > PATH_STEPS_MAX {
        let problem = format!("{} bytes; at most {PATH_STEPS_MAX} steps of 32", bytes.len());
        return Err(WireError::invalid(field, problem));
    }
    Ok(steps.to_vec())
}

fn bounded(field: &'static str, count: usize, max: usize) -> Result<(), WireError> {
    if count > max { Err(WireError::invalid(field, format!("{count}; at most {max}"))) } else { Ok(()) }
}
