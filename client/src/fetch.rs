//! One blob from the coordinator into the store: resumes, verifies, and tells what went wrong in the
//! protocol's words.

use std::ops::ControlFlow;

use fleetune_proto::{CallFailure, Digest, FailureKind};

use crate::blobs::{BlobStore, Incoming, ReceiveError};
use crate::files::StoreError;
use crate::transport::Transport;

/// Why a blob is not here.
#[derive(Debug)]
pub(crate) enum FetchFailure {
    /// To be told to the device machine, which repeats the fetch or gives up.
    Call(CallFailure),
    /// `lapsed` said that the device should not go on now.
    Interrupted(String),
}

/// Holds the blob; asks `lapsed` at every chunk whether there is a reason to stop.
pub(crate) fn fetch(
    store: &BlobStore,
    transport: &mut impl Transport,
    digest: Digest,
    lapsed: &mut dyn FnMut() -> Option<String>,
) -> Result<(), FetchFailure> {
    if store.holds(digest) {
        return Ok(());
    }
    let mut incoming = store.receive(digest).map_err(|e| FetchFailure::Call(stored(&e)))?;
    if !incoming.is_complete() {
        read(&mut incoming, transport, digest, lapsed)?;
    }
    incoming.finish().map_err(|e| FetchFailure::Call(received(&e)))
}

fn read(
    incoming: &mut Incoming<'_>,
    transport: &mut impl Transport,
    digest: Digest,
    lapsed: &mut dyn FnMut() -> Option<String>,
) -> Result<(), FetchFailure> {
    let offset = incoming.next_offset();
    let mut stopped = None;
    let ended = transport.read_blob(digest, offset, &mut |chunk| {
        stopped = match lapsed() {
            Some(reason) => Some(FetchFailure::Interrupted(reason)),
            None => incoming.accept(&chunk).err().map(|e| FetchFailure::Call(received(&e))),
        };
        if stopped.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    if let Some(failure) = stopped {
        return Err(failure);
    }
    ended.map_err(FetchFailure::Call)?;
    if incoming.is_complete() {
        return Ok(());
    }
    let message = format!("blob {digest}: the stream ended at byte {}", incoming.next_offset());
    Err(FetchFailure::Call(CallFailure::new(FailureKind::Unavailable, message)))
}

/// Damage on the way is worth another try; a disk that cannot take the bytes is not, for now.
fn received(error: &ReceiveError) -> CallFailure {
    match error {
        ReceiveError::Transfer(error) => CallFailure::new(FailureKind::DataLoss, error.to_string()),
        ReceiveError::Store(error) => stored(error),
    }
}

fn stored(error: &StoreError) -> CallFailure {
    CallFailure::new(FailureKind::Internal, error.to_string())
}
