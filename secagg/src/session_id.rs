//! What a session is about, and the one hash that names it.
//!
//! Every signature, key and mask of a session is bound to its [`SessionId`]. A coordinator that tells two
//! devices different things about the task, the round, the attempt, the model or the plan has put them into
//! two sessions: their signatures do not verify for each other and their masks do not cancel. That is what
//! defeats model inconsistency (Pasquini et al. 2022, "Eluding Secure Aggregation in Federated Learning via
//! Model Inconsistency") and replay from another round or attempt.

use crate::{mask::MaskSuite, ring::RingBits};
use sha2::{Digest, Sha256};

/// SHA-256 over everything in [`SessionParts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId([u8; 32]);

/// What a session is about.
#[derive(Debug, Clone, Copy)]
pub struct SessionParts<'a> {
    /// Population.
    pub population: &'a str,
    /// Task.
    pub task: &'a str,
    /// Round, from 0.
    pub round: u32,
    /// Attempt at the round, from 0.
    pub attempt: u32,
    /// SHA-256 of the checkpoint that local training starts from.
    pub model_sha256: [u8; 32],
    /// SHA-256 of the signed plan: ring, dimension, suite, floors, clipping, all of it.
    pub config_sha256: [u8; 32],
    /// Fresh randomness of the coordinator: two attempts never share an id, even after it lost its memory.
    pub server_nonce: [u8; 32],
}

/// What both sides of a session must agree on to compute in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// The session.
    pub session: SessionId,
    /// SHA-256 of the signed plan.
    pub config_sha256: [u8; 32],
    /// Cipher that expands masks.
    pub suite: MaskSuite,
    /// The ring of the vectors.
    pub bits: RingBits,
    /// Values of a vector.
    pub dimension: usize,
}

impl SessionId {
    /// Names a session.
    #[must_use]
    pub fn derive(parts: &SessionParts<'_>) -> Self {
        let mut hash = Labelled::new("session");
        hash.text(parts.population);
        hash.text(parts.task);
        hash.bytes(&parts.round.to_le_bytes());
        hash.bytes(&parts.attempt.to_le_bytes());
        hash.bytes(&parts.model_sha256);
        hash.bytes(&parts.config_sha256);
        hash.bytes(&parts.server_nonce);
        Self(hash.finish())
    }

    /// A session of which only the id is known.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// SHA-256 under a label of this protocol. Labels end with a zero byte and texts carry their length, so no
/// two inputs run into each other; everything else that is hashed has a fixed length.
pub(crate) struct Labelled(Sha256);

impl Labelled {
    pub(crate) fn new(label: &str) -> Self {
        Self(Sha256::new_with_prefix(labelled(label)))
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn text(&mut self, text: &str) {
        self.0.update((text.len() as u64).to_le_bytes());
        self.0.update(text.as_bytes());
    }

    pub(crate) fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

/// The prefix of everything that is hashed, signed or derived under `label`.
pub(crate) fn labelled(label: &str) -> Vec<u8> {
    [b"fleetune-sa/v1/", label.as_bytes(), b"\0"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> SessionParts<'static> {
        SessionParts {
            population: "roles",
            task: "lora",
            round: 3,
            attempt: 1,
            model_sha256: [7; 32],
            config_sha256: [8; 32],
            server_nonce: [9; 32],
        }
    }

    #[test]
    fn every_part_changes_the_id() {
        let original = SessionId::derive(&parts());
        let others = [
            SessionParts { population: "rolesl", task: "ora", ..parts() },
            SessionParts { task: "lorb", ..parts() },
            SessionParts { round: 4, ..parts() },
            SessionParts { attempt: 2, ..parts() },
            SessionParts { model_sha256: [0; 32], ..parts() },
            SessionParts { config_sha256: [0; 32], ..parts() },
            SessionParts { server_nonce: [0; 32], ..parts() },
        ];
        for (i, other) in others.iter().enumerate() {
            assert_ne!(SessionId::derive(other), original, "part {i}");
        }
    }
}
