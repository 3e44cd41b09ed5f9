//! The bytes of one contribution on their way: in chunks if they are many, inline if they are few.

use super::{Action, Request};
use crate::{
    digest::Digest,
    limits::{BACKOFF_MS_MIN, INLINE_BYTES_MAX},
    transfer::chunk_at,
    wire,
};

/// An upload and how far it has come.
#[derive(Clone)]
pub(super) struct Upload {
    bytes: Vec<u8>,
    digest: Digest,
    offset: u64,
}

impl Upload {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { digest: Digest::of(&bytes), bytes, offset: 0 }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn is_inline(&self) -> bool {
        self.bytes.len() <= INLINE_BYTES_MAX
    }

    pub(super) fn is_complete(&self) -> bool {
        self.offset == self.digest.size
    }

    /// The next chunk to send.
    pub(super) fn write_chunk(&self, token: &[u8]) -> Action {
        let (data, crc32c) = chunk_at(&self.bytes, self.offset);
        Action::Call(Request::WriteBlobChunk(wire::WriteBlobChunkRequest {
            session_token: token.to_vec(),
            digest: Some(self.digest.to_wire()),
            offset: self.offset,
            data: data.to_vec(),
            crc32c,
        }))
    }

    /// Takes the coordinator's word on how much it holds; the delay before the next chunk.
    pub(super) fn written(&mut self, answer: &wire::WriteBlobChunkResponse) -> u64 {
        let before = std::mem::replace(&mut self.offset, answer.committed_bytes.min(self.digest.size));
        if self.offset > before { 0 } else { BACKOFF_MS_MIN }
    }

    /// The bytes themselves, or their address once they are up.
    pub(super) fn resource(&self) -> wire::Resource {
        let source = if self.is_inline() {
            wire::resource::Source::Inline(self.bytes.clone())
        } else {
            wire::resource::Source::Blob(self.digest.to_wire())
        };
        wire::Resource { source: Some(source) }
    }
}
