//! Why a device leaves a session. Each reason names the check that failed; nothing is revealed after any.

use crate::{messages::AdvertisementError, parameters::ParameterError, ring::RingError};
use thiserror::Error;

/// A device's refusal to go on. The session's secrets are gone when it is returned.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Abort {
    /// An answer to another step than the one under way, or a second answer to a step.
    #[error("secure aggregation: {found} arrived while {expected} is under way")]
    OutOfOrder {
        /// The step under way.
        expected: &'static str,
        /// What arrived.
        found: &'static str,
    },
    /// The cohort is smaller than this device accepts.
    #[error("secure aggregation: a cohort of {members} devices; this device demands {floor}")]
    CohortTooSmall {
        /// Members of the roster.
        members: u32,
        /// The device's floor.
        floor: u32,
    },
    /// The cohort is larger than the protocol allows.
    #[error("secure aggregation: a cohort of {members} devices; at most {max}")]
    CohortTooLarge {
        /// Members of the roster.
        members: u32,
        /// The protocol's bound.
        max: u32,
    },
    /// A small cohort that is not fully connected.
    #[error(
        "secure aggregation: {degree} neighbours in a cohort of {members}; below {below} all are neighbours"
    )]
    SparseGraph {
        /// Neighbours named.
        degree: u32,
        /// Members of the roster.
        members: u32,
        /// Size from which a sparse graph is accepted.
        below: u32,
    },
    /// The number of neighbours or the threshold is not secure under this device's own assumptions.
    #[error("secure aggregation: degree and threshold refused: {0}")]
    Degrees(#[from] ParameterError),
    /// The ids of the roster are not ascending, or a member is not in the place of its id.
    #[error("secure aggregation: the roster's members are not in the order of their ids, each once")]
    RosterOrder,
    /// The device is not in the roster with its own keys.
    #[error("secure aggregation: the roster does not hold this device's own keys at place {0}")]
    OwnEntry(u32),
    /// The neighbours named are not those that the graph gives.
    #[error("secure aggregation: the neighbours named are not those of the graph")]
    WrongNeighbours,
    /// A neighbour's entry is not in the tree whose root was named.
    #[error("secure aggregation: the entry of neighbour {0} is not in the roster")]
    NotInRoster(u32),
    /// A neighbour's keys are not its own, or it is nobody.
    #[error("secure aggregation: neighbour {index}: {source}")]
    Neighbour {
        /// Its place.
        index: u32,
        /// What is wrong with its advertisement.
        source: AdvertisementError,
    },
    /// Two members share an identity or a key.
    #[error("secure aggregation: neighbour {0} has an identity or a key that occurs twice")]
    Duplicate(u32),
    /// A neighbour's public key is of low order: the secret would be known to all.
    #[error("secure aggregation: neighbour {0} has a key of low order")]
    LowOrderKey(u32),
    /// Shares are forwarded from a device that is no neighbour, or twice from one.
    #[error("secure aggregation: shares from place {0}, which is no neighbour or named twice")]
    UnexpectedShares(u32),
    /// Too few neighbours are left to rebuild this device's secrets.
    #[error("secure aggregation: {present} neighbours {step}; the threshold is {threshold}")]
    TooFewNeighbours {
        /// Neighbours present.
        present: u32,
        /// The threshold.
        threshold: u32,
        /// What they should have done.
        step: &'static str,
    },
    /// The vector to be masked is not one of this session.
    #[error("secure aggregation: {0}")]
    Vector(#[from] RingError),
    /// The survivors do not include this device, though it has delivered.
    #[error("secure aggregation: this device is not among the survivors")]
    NotASurvivor,
    /// A survivor never shared its secrets: its masks could not be removed honestly.
    #[error("secure aggregation: survivor {0} has not shared its secrets")]
    SurvivorWithoutShares(u32),
    /// Fewer survivors than this device accepts.
    #[error("secure aggregation: {survivors} survivors; this device demands {floor}")]
    TooFewSurvivors {
        /// Survivors named.
        survivors: u32,
        /// The device's floor.
        floor: u32,
    },
    /// The survivors are said of another number of members.
    #[error("secure aggregation: survivors among {found} members; the roster has {expected}")]
    SurvivorsOfOtherRoster {
        /// Members of the roster.
        expected: u32,
        /// Members said.
        found: u32,
    },
    /// Too few neighbours have signed the same survivors: others may have been told of other ones.
    #[error("secure aggregation: {valid} neighbours signed the same survivors; the threshold is {threshold}")]
    Unconfirmed {
        /// Valid signatures.
        valid: u32,
        /// The threshold.
        threshold: u32,
    },
    /// A saved session cannot be taken up.
    #[error("secure aggregation: the saved session is damaged")]
    Record,
}
