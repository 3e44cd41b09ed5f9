//! What a device keeps on its own disk between two messages: the session under way, in which rounds it has
//! revealed shares, and its privacy ledger. One write: a charge and the message it is for cannot come apart.
//! The shell stores the bytes as they are, readable by their owner alone.

use super::session::Session;
use crate::digest::Digest;
use fleetune_privacy::Ledger;
use prost::Message;
use std::{collections::BTreeMap, fmt};
use zeroize::{Zeroize, Zeroizing};

/// Plans whose last revealed round is remembered; the least recent make room.
const REVEALED_MAX: usize = 256;
/// A record begins with the SHA-256 of the rest: a shorter file is no empty ledger, and an empty one no record.
const CHECKSUM_BYTES: usize = 32;

/// A device's record: secrets included.
#[derive(Clone, PartialEq, Eq)]
pub struct DeviceRecord(Zeroizing<Vec<u8>>);

/// The saved session.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub(super) struct KeptSession {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) token: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) plan: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) plan_sha256: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) checkpoint_sha256: Vec<u8>,
    #[prost(uint32, tag = "5")]
    pub(super) round: u32,
    #[prost(uint32, tag = "6")]
    pub(super) attempt: u32,
    #[prost(uint64, tag = "7")]
    pub(super) deadline_unix_ms: u64,
    /// Number of the step whose message is to be sent.
    #[prost(uint32, tag = "8")]
    pub(super) step: u32,
    /// That message, without the token; in step 2 the packed masked vector.
    #[prost(bytes = "vec", tag = "9")]
    pub(super) message: Vec<u8>,
    /// The secure aggregation session.
    #[prost(bytes = "vec", tag = "10")]
    pub(super) session: Vec<u8>,
    /// Packed vector that is still to be masked.
    #[prost(bytes = "vec", tag = "11")]
    pub(super) vector: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct Revealed {
    #[prost(bytes = "vec", tag = "1")]
    plan_sha256: Vec<u8>,
    #[prost(uint32, tag = "2")]
    round: u32,
    #[prost(uint64, tag = "3")]
    order: u64,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct Kept {
    #[prost(message, repeated, tag = "1")]
    revealed: Vec<Revealed>,
    #[prost(message, optional, tag = "2")]
    session: Option<KeptSession>,
    #[prost(bytes = "vec", tag = "3")]
    ledger: Vec<u8>,
}

/// The last round of each plan in which the device has revealed shares.
#[derive(Default)]
pub(super) struct RevealedRounds(BTreeMap<[u8; 32], (u32, u64)>);

impl DeviceRecord {
    /// Bytes that a shell has stored.
    #[must_use]
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes to store.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The privacy ledger in the record.
    ///
    /// # Errors
    /// [`DamagedRecord`].
    pub fn ledger(&self) -> Result<Ledger, DamagedRecord> {
        self.read().map(|kept| kept.ledger)
    }

    pub(super) fn write(revealed: &RevealedRounds, session: Option<&Session>, ledger: &Ledger) -> Self {
        let one = |(plan, (round, order)): (&[u8; 32], &(u32, u64))| Revealed {
            plan_sha256: plan.to_vec(),
            round: *round,
            order: *order,
        };
        let revealed = revealed.0.iter().map(one).collect();
        let session = session.and_then(Session::to_kept);
        let mut kept = Kept { revealed, session, ledger: ledger.to_bytes() };
        let body = Zeroizing::new(kept.encode_to_vec());
        let mut bytes = Zeroizing::new(Vec::with_capacity(CHECKSUM_BYTES + body.len()));
        bytes.extend(Digest::of(&body).sha256);
        bytes.extend(body.as_slice());
        let record = Self(bytes);
        if let Some(session) = &mut kept.session {
            session.wipe();
        }
        record
    }

    /// What the bytes hold. A damaged record is an error: to forget what was revealed would be to allow
    /// revealing it again.
    pub(super) fn read(&self) -> Result<Restored, DamagedRecord> {
        let (checksum, body) = self.as_bytes().split_at_checked(CHECKSUM_BYTES).ok_or(DamagedRecord)?;
        if Digest::of(body).sha256 != checksum {
            return Err(DamagedRecord);
        }
        let mut kept = Kept::decode(body).map_err(|_| DamagedRecord)?;
        let mut revealed = RevealedRounds::default();
        for one in &kept.revealed {
            let plan = one.plan_sha256.as_slice().try_into().map_err(|_| DamagedRecord)?;
            revealed.0.insert(plan, (one.round, one.order));
        }
        let session = kept.session.as_ref().map(|kept| Session::restore(kept).ok_or(DamagedRecord));
        let session = session.transpose()?.map(Box::new);
        if let Some(session) = &mut kept.session {
            session.wipe();
        }
        let ledger = Ledger::from_bytes(&kept.ledger).ok_or(DamagedRecord)?;
        Ok(Restored { revealed, session, ledger })
    }
}

/// What a record holds.
pub(super) struct Restored {
    pub(super) revealed: RevealedRounds,
    pub(super) session: Option<Box<Session>>,
    pub(super) ledger: Ledger,
}

/// The record's bytes are not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the device's record is damaged; without it the device cannot know which rounds it has taken part in, nor \
     what it has given away"
)]
pub struct DamagedRecord;

impl fmt::Debug for DeviceRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceRecord({} bytes)", self.0.len())
    }
}

impl KeptSession {
    fn wipe(&mut self) {
        for secret in [&mut self.token, &mut self.message, &mut self.session, &mut self.vector] {
            secret.zeroize();
        }
    }
}

impl RevealedRounds {
    /// True if shares were revealed for this round of the plan, or a later one.
    pub(super) fn contains(&self, plan_sha256: &[u8; 32], round: u32) -> bool {
        self.0.get(plan_sha256).is_some_and(|(last, _)| *last >= round)
    }

    pub(super) fn insert(&mut self, plan_sha256: [u8; 32], round: u32) {
        let order = self.0.values().map(|(_, order)| order + 1).max().unwrap_or(0);
        self.0.insert(plan_sha256, (round, order));
        if self.0.len() > REVEALED_MAX
            && let Some(oldest) = self.0.iter().min_by_key(|(_, (_, order))| *order).map(|(plan, _)| *plan)
        {
            self.0.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who can cut a file short (a full disk, a hand) must not make the device forget what it spent.
    #[test]
    fn a_record_that_is_not_whole_is_damaged_and_no_empty_ledger() {
        let mut ledger = Ledger::default();
        ledger.note_unprotected();
        let record = DeviceRecord::write(&RevealedRounds::default(), None, &ledger);
        assert_eq!(record.read().unwrap().ledger, ledger);
        let bytes = record.as_bytes();
        for length in 0..bytes.len() {
            assert!(DeviceRecord::from_bytes(bytes[..length].to_vec()).read().is_err(), "{length} bytes");
        }
        for at in 0..bytes.len() {
            let mut spoiled = bytes.to_vec();
            spoiled[at] ^= 1;
            assert!(DeviceRecord::from_bytes(spoiled).read().is_err(), "byte {at}");
        }
        // A whole file, but without a ledger.
        let mut bare = Digest::of(&[]).sha256.to_vec();
        assert!(DeviceRecord::from_bytes(bare.clone()).read().is_err());
        bare.push(0);
        assert!(DeviceRecord::from_bytes(bare).read().is_err());
    }
}
