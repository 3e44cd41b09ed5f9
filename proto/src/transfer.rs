//! Moving blobs in chunks: the receiving side of a download and both sides of an upload.
//!
//! A chunk carries a CRC-32C against damage on the way; the whole carries its SHA-256 against a
//! sender that lies. Nothing counts as held before the SHA-256 agrees.

use crate::{digest::Digest, limits::CHUNK_BYTES_MAX};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

/// Why bytes of a blob are refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TransferError {
    /// The chunk is not the one that comes next.
    #[error("blob {digest}: chunk at byte {offset} where {expected} was expected")]
    Offset {
        /// The blob.
        digest: Digest,
        /// Offset of the chunk.
        offset: u64,
        /// Offset that comes next.
        expected: u64,
    },
    /// The chunk was damaged on the way.
    #[error(
        "blob {digest}: chunk at byte {offset} is damaged (CRC-32C {actual:08x}, {expected:08x} announced)"
    )]
    Damaged {
        /// The blob.
        digest: Digest,
        /// Offset of the chunk.
        offset: u64,
        /// Checksum announced.
        expected: u32,
        /// Checksum of the bytes.
        actual: u32,
    },
    /// More bytes than the blob has, or than a chunk may have.
    #[error(
        "blob {digest}: chunk of {length} bytes at byte {offset} of {size}; at most {CHUNK_BYTES_MAX} a chunk"
    )]
    Length {
        /// The blob.
        digest: Digest,
        /// Offset of the chunk.
        offset: u64,
        /// Length of the chunk.
        length: usize,
        /// Length of the blob.
        size: u64,
    },
    /// All bytes are there and they are not the blob.
    #[error("blob {digest}: the bytes received have SHA-256 {actual}")]
    Content {
        /// The blob.
        digest: Digest,
        /// What the bytes hash to.
        actual: String,
    },
}

/// Checks one chunk against its checksum, its place and its blob's length.
pub fn check_chunk(digest: Digest, offset: u64, data: &[u8], crc32c: u32) -> Result<(), TransferError> {
    let length = data.len();
    let end = offset.checked_add(length as u64);
    if length > CHUNK_BYTES_MAX || end.is_none_or(|end| end > digest.size) {
        return Err(TransferError::Length { digest, offset, length, size: digest.size });
    }
    let actual = crc32c::crc32c(data);
    if actual != crc32c {
        return Err(TransferError::Damaged { digest, offset, expected: crc32c, actual });
    }
    Ok(())
}

/// The next chunk of `bytes` at `offset`, empty at the end, with its CRC-32C.
pub fn chunk_at(bytes: &[u8], offset: u64) -> (&[u8], u32) {
    let start = usize::try_from(offset).map_or(bytes.len(), |offset| offset.min(bytes.len()));
    let chunk = &bytes[start..bytes.len().min(start + CHUNK_BYTES_MAX)];
    (chunk, crc32c::crc32c(chunk))
}

/// A download in progress: hashes the bytes as they come. The caller stores them.
#[derive(Clone)]
pub struct Download {
    digest: Digest,
    received: u64,
    hasher: Sha256,
}

impl Download {
    /// A download from the start.
    pub fn new(digest: Digest) -> Self {
        Self { digest, received: 0, hasher: Sha256::new() }
    }

    /// Bytes that an earlier, interrupted download left behind: hashed again, not trusted.
    pub fn resume(&mut self, held: &[u8]) {
        self.hasher.update(held);
        self.received += held.len() as u64;
    }

    /// The byte to ask for next.
    pub fn next_offset(&self) -> u64 {
        self.received
    }

    /// Takes the next chunk. On error nothing has changed and the chunk must not be stored.
    pub fn accept(&mut self, offset: u64, data: &[u8], crc32c: u32) -> Result<(), TransferError> {
        if offset != self.received {
            return Err(TransferError::Offset { digest: self.digest, offset, expected: self.received });
        }
        check_chunk(self.digest, offset, data, crc32c)?;
        self.hasher.update(data);
        self.received += data.len() as u64;
        Ok(())
    }

    /// True once all bytes are there.
    pub fn is_complete(&self) -> bool {
        self.received >= self.digest.size
    }

    /// Checks the whole; only then the stored bytes are the blob.
    pub fn finish(self) -> Result<Digest, TransferError> {
        let actual: [u8; 32] = self.hasher.finalize().into();
        if actual == self.digest.sha256 && self.received == self.digest.size {
            return Ok(self.digest);
        }
        Err(TransferError::Content { digest: self.digest, actual: hex::encode(actual) })
    }
}

/// An upload in progress on the receiving side, held in memory: an update is never at rest.
pub struct UploadBuffer {
    digest: Digest,
    bytes: Vec<u8>,
}

impl UploadBuffer {
    /// Room for a blob; the caller has checked its size against the plan.
    pub fn new(digest: Digest) -> Self {
        Self { digest, bytes: Vec::new() }
    }

    /// The blob.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Bytes held without a gap from the start.
    pub fn committed(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Takes a chunk that starts at or before the committed bytes: a repeated chunk changes
    /// nothing, other bytes for committed ones are refused by the hash at the end.
    pub fn accept(&mut self, offset: u64, data: &[u8], crc32c: u32) -> Result<u64, TransferError> {
        check_chunk(self.digest, offset, data, crc32c)?;
        if offset > self.committed() {
            return Err(TransferError::Offset { digest: self.digest, offset, expected: self.committed() });
        }
        let known = usize::try_from(self.committed() - offset).unwrap_or(usize::MAX).min(data.len());
        self.bytes.extend_from_slice(&data[known..]);
        Ok(self.committed())
    }

    /// The whole blob, if its bytes are all there and are the blob.
    pub fn finish(&self) -> Result<&[u8], TransferError> {
        let actual = Digest::of(&self.bytes);
        if actual == self.digest {
            return Ok(&self.bytes);
        }
        Err(TransferError::Content { digest: self.digest, actual: actual.hex() })
    }

    /// The same, giving the bytes away.
    pub fn into_verified(self) -> Result<Vec<u8>, TransferError> {
        self.finish()?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn blob() -> Vec<u8> {
        (0..2_500_000u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect()
    }

    #[test]
    fn a_download_resumes_and_verifies() {
        let bytes = blob();
        let mut download = Download::new(Digest::of(&bytes));
        let (first, crc) = chunk_at(&bytes, 0);
        download.accept(0, first, crc).unwrap();
        let mut resumed = Download::new(Digest::of(&bytes));
        resumed.resume(first);
        while !resumed.is_complete() {
            let (chunk, crc) = chunk_at(&bytes, resumed.next_offset());
            resumed.accept(resumed.next_offset(), chunk, crc).unwrap();
        }
        assert_eq!(resumed.finish().unwrap(), Digest::of(&bytes));
    }

    #[test]
    fn a_flipped_bit_is_found_by_the_checksum_and_a_lie_by_the_hash() {
        let bytes = b"some bytes of a model".to_vec();
        let mut damaged = bytes.clone();
        damaged[3] ^= 1;
        let mut download = Download::new(Digest::of(&bytes));
        let error = download.accept(0, &damaged, crc32c::crc32c(&bytes)).unwrap_err();
        assert!(matches!(error, TransferError::Damaged { offset: 0, .. }), "{error}");
        download.accept(0, &damaged, crc32c::crc32c(&damaged)).unwrap();
        assert!(matches!(download.finish(), Err(TransferError::Content { .. })));
    }

    #[test]
    fn chunks_out_of_place_or_too_long_are_refused() {
        let digest = Digest::of(b"12345678");
        let mut upload = UploadBuffer::new(digest);
        let crc = crc32c::crc32c(b"5678");
        assert!(matches!(upload.accept(4, b"5678", crc), Err(TransferError::Offset { expected: 0, .. })));
        assert!(matches!(upload.accept(6, b"5678", crc), Err(TransferError::Length { .. })));
        assert!(matches!(upload.accept(u64::MAX, b"5678", crc), Err(TransferError::Length { .. })));
        assert_eq!(upload.committed(), 0);
    }

    proptest! {
        #[test]
        fn repeated_and_overlapping_chunks_are_idempotent(cuts in prop::collection::vec(0usize..40, 1..20)) {
            let bytes: Vec<u8> = (0..40).collect();
            let mut upload = UploadBuffer::new(Digest::of(&bytes));
            for cut in cuts {
                let offset = cut.min(usize::try_from(upload.committed()).unwrap());
                let data = &bytes[offset..bytes.len().min(offset + 7)];
                upload.accept(offset as u64, data, crc32c::crc32c(data)).unwrap();
            }
            let rest = usize::try_from(upload.committed()).unwrap();
            upload.accept(rest as u64, &bytes[rest..], crc32c::crc32c(&bytes[rest..])).unwrap();
            prop_assert_eq!(upload.finish().unwrap(), &bytes[..]);
        }
    }
}
