//! The table from gRPC's status codes to what the device machine knows.

use std::error::Error;

use fleetune_proto::{CallFailure, FailureKind};
use tonic::{Code, Status};

use super::causes;

/// A status as the machine's failure, with all that is known of its cause.
pub(super) fn failure(status: &Status) -> CallFailure {
    let cause = status.source().map(|source| format!(": {}", causes(source))).unwrap_or_default();
    CallFailure::new(kind(status), format!("{}{cause}", status.message()))
}

/// Codes without a place in the protocol count as the server's fault. A status that has a source was made
/// on this side, when the connection broke: tonic gives it any of three codes.
fn kind(status: &Status) -> FailureKind {
    match status.code() {
        Code::Unknown | Code::Internal | Code::Cancelled if status.source().is_some() => {
            FailureKind::Unavailable
        }
        Code::Unavailable | Code::Cancelled => FailureKind::Unavailable,
        Code::DeadlineExceeded => FailureKind::DeadlineExceeded,
        Code::ResourceExhausted => FailureKind::ResourceExhausted,
        Code::Unauthenticated | Code::PermissionDenied => FailureKind::Unauthenticated,
        Code::NotFound => FailureKind::NotFound,
        Code::FailedPrecondition | Code::Aborted => FailureKind::FailedPrecondition,
        Code::AlreadyExists => FailureKind::AlreadyExists,
        Code::InvalidArgument | Code::OutOfRange => FailureKind::InvalidArgument,
        Code::DataLoss => FailureKind::DataLoss,
        Code::Unimplemented => FailureKind::Unimplemented,
        Code::Ok | Code::Unknown | Code::Internal => FailureKind::Internal,
    }
}
