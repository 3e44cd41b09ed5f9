//! The road to the coordinator, as the client needs it. `grpc.rs` is the usual one.

use std::ops::ControlFlow;

use fleetune_proto::device::{Request, Response};
use fleetune_proto::{CallFailure, Digest, wire};

/// Moves calls and bytes, and decides nothing. Every call ends within a deadline of the transport's own.
pub trait Transport {
    /// One call and its answer.
    ///
    /// # Errors
    /// [`CallFailure`] with the kind that says what the device does about it.
    fn call(&mut self, request: Request) -> Result<Response, CallFailure>;

    /// Reads a blob from `offset` on and hands over each chunk as it comes; a sink that breaks ends the
    /// reading without an error.
    ///
    /// # Errors
    /// As [`Transport::call`].
    fn read_blob(
        &mut self,
        digest: Digest,
        offset: u64,
        sink: &mut dyn FnMut(wire::ReadBlobResponse) -> ControlFlow<()>,
    ) -> Result<(), CallFailure>;
}
