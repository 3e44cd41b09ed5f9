//! Content addresses.

use crate::{error::WireError, wire};
use sha2::{Digest as _, Sha256};
use std::fmt;

/// SHA-256 and length of some bytes: the name of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest {
    /// SHA-256 of the bytes.
    pub sha256: [u8; 32],
    /// Number of bytes.
    pub size: u64,
}

impl Digest {
    /// The address of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self { sha256: Sha256::digest(bytes).into(), size: bytes.len() as u64 }
    }

    /// Parses the wire form; `field` is named in the error.
    pub fn parse(field: &'static str, wire: Option<wire::Digest>) -> Result<Self, WireError> {
        let wire = wire.ok_or(WireError::Missing(field))?;
        Ok(Self { sha256: parse_sha256(field, &wire.sha256)?, size: wire.size_bytes })
    }

    /// The wire form.
    pub fn to_wire(self) -> wire::Digest {
        wire::Digest { sha256: self.sha256.to_vec(), size_bytes: self.size }
    }

    /// Lower-case hexadecimal SHA-256.
    pub fn hex(&self) -> String {
        hex::encode(self.sha256)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hex())
    }
}

/// Parses 32 bytes.
pub(crate) fn parse_sha256(field: &'static str, bytes: &[u8]) -> Result<[u8; 32], WireError> {
    bytes.try_into().map_err(|_| WireError::invalid(field, format!("{} bytes; SHA-256 has 32", bytes.len())))
}
