//! Secure aggregation: the coordinator learns the sum of the devices' vectors and nothing else, also when it
//! lies, when devices vanish at any step, and when some of them collude with it.
//!
//! The protocol is SecAgg+ (Bell et al. 2020) in its version against a malicious coordinator; `docs/protocol.md`
//! describes it message by message and `docs/threat-model.md` says what it does not stop. [`Device`] is one
//! device's side of a session, [`Gathering`] and [`Cohort`] are the coordinator's.
//!
//! Pure: no I/O, no clock, no global randomness, nothing of the other crates. What a device uploads and what
//! the coordinator adds is always a [`RingVector`], also under the plaintext protocol.

mod ring;
mod sum;

mod mask;
mod shamir;

mod graph;
mod parameters;
mod roster_tree;

mod identity;
mod key_schedule;
mod messages;
mod session_id;

mod coordinator;
mod device;

pub use coordinator::{
    AdmitError, Cohort, CohortFailure, CohortPlan, CohortStep, DropoutCounts, Gathering, OpenError, Opened,
    Opening, Seat, StepError, Suspicion, Taken,
};
pub use device::{Abort, Device, DevicePolicy, Floors, MaskedVector};
pub use graph::Graph;
pub use identity::{Certificate, CertificateError, DeviceId, Identity, Registrars};
pub use mask::{MaskSeed, MaskSuite, Sign, UnknownSuite, add_masks, add_masks_parallel};
pub use messages::{
    Advertisement, AdvertisementError, Confirmation, Reveal, RevealedShare, RosterEntry, RosterView,
    SEALED_SHARE_BYTES, SealedShare, ShareBundle, SurvivorSet, SurvivorSetError,
};
pub use parameters::{
    Assumptions, DEGREE_MAX, Degrees, FULL_GRAPH_BELOW, ParameterError, check, solve, solve_sparse,
};
pub use ring::{RingBits, RingError, RingVector};
pub use roster_tree::{RosterTree, leaf_hash, verify_path};
pub use session_id::{SessionId, SessionParts, Terms};
pub use shamir::{JoinError, Joined, SECRET_BYTES, SHARES_MAX, SharePair, join, join_checked, split};
pub use sum::RunningSum;

#[cfg(test)]
mod known_answers;
#[cfg(test)]
mod tests;

/// Most members of one cohort, and devices of one session.
pub const MEMBERS_MAX: usize = 1 << 16;
