//! The bearer secret of one session.

use crate::error::WireError;
use std::hash::{Hash, Hasher};
use subtle::ConstantTimeEq;
use zeroize::Zeroize;

/// 32 random bytes that authorize every call of one session. No `Debug`: it must not reach a log.
/// Guessing one, or recognizing one by the time a comparison takes, is what the length and the
/// constant-time comparison stop.
#[derive(Clone)]
pub struct SessionToken([u8; 32]);

impl SessionToken {
    /// Wraps fresh random bytes.
    pub fn from_random(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Parses the wire form.
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let length = bytes.len();
        let problem = |_| WireError::invalid("session_token", format!("{length} bytes; a token has 32"));
        bytes.try_into().map(Self).map_err(problem)
    }

    /// The wire form.
    pub fn to_wire(&self) -> Vec<u8> {
        self.0.to_vec()
    }
}

impl Drop for SessionToken {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl PartialEq for SessionToken {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for SessionToken {}

impl Hash for SessionToken {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}
