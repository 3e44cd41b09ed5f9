//! What a failed call means to a device: one table from failure to reaction.

use thiserror::Error;

/// Why a call failed, as far as it changes what the device does. The names are gRPC's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailureKind {
    /// No connection, a reset, a restart of the server.
    Unavailable,
    /// The call took too long.
    DeadlineExceeded,
    /// A bound of the server was reached; there will be room later.
    ResourceExhausted,
    /// The session is not known: it ended, or the coordinator was restarted.
    Unauthenticated,
    /// The blob, task or population does not exist.
    NotFound,
    /// The session has no place for this step.
    FailedPrecondition,
    /// Other bytes were taken for this step before.
    AlreadyExists,
    /// The server read the message and found it wrong.
    InvalidArgument,
    /// The chunk arrived damaged, or the stored bytes are.
    DataLoss,
    /// The server does not know the call.
    Unimplemented,
    /// Anything else.
    Internal,
}

/// What the device does about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    /// Send the same bytes again, later.
    RetrySame,
    /// Forget the session and check in again.
    RestartSession,
    /// Forget the session and stay away for the retry window.
    StopUntilWindow,
    /// Stay away until the client crate is updated.
    StopUntilUpdate,
}

/// A failed call.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{kind:?}: {message}")]
pub struct CallFailure {
    /// Why.
    pub kind: FailureKind,
    /// The server's or the transport's words.
    pub message: String,
}

impl CallFailure {
    /// A failure with its words.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl FailureKind {
    /// The table.
    pub fn reaction(self) -> Reaction {
        match self {
            Self::Unavailable | Self::DeadlineExceeded | Self::ResourceExhausted | Self::DataLoss => {
                Reaction::RetrySame
            }
            Self::Unauthenticated | Self::NotFound | Self::FailedPrecondition => Reaction::RestartSession,
            Self::AlreadyExists | Self::InvalidArgument | Self::Internal => Reaction::StopUntilWindow,
            Self::Unimplemented => Reaction::StopUntilUpdate,
        }
    }
}
