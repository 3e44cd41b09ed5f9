//! Signed bytes: Ed25519 over verbatim bytes, verified before they are parsed.
//!
//! The purpose is part of what is signed, so a signature made for a plan is worthless on a
//! release (cross-protocol reuse), and the length is, so nothing can be moved between the two.

use crate::{error, limits::SIGNATURES_MAX, wire};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use prost::Message;
use sha2::{Digest as _, Sha256};
use thiserror::Error;

/// What a signature is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A [`crate::TaskPlan`].
    Plan,
    /// A [`crate::PopulationPolicy`].
    Policy,
    /// A [`crate::ReleaseManifest`].
    Release,
}

impl Purpose {
    fn label(self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Policy => "policy",
            Self::Release => "release",
        }
    }
}

/// Why signed bytes are refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SignatureError {
    /// The bytes are no envelope.
    #[error("signed {purpose}: {reason}")]
    Envelope {
        /// What was expected.
        purpose: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Not enough valid signatures by distinct keys of the trust root.
    #[error("signed {purpose}: {valid} valid signatures by trusted keys, {threshold} needed")]
    Untrusted {
        /// What was expected.
        purpose: &'static str,
        /// Valid signatures by distinct trusted keys.
        valid: usize,
        /// Signatures needed.
        threshold: usize,
    },
    /// The trust root itself makes no sense.
    #[error("trust root: {0}")]
    Root(String),
}

/// The public keys that a device trusts, and how many of them must have signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustRoot {
    keys: Vec<VerifyingKey>,
    threshold: usize,
}

impl TrustRoot {
    /// `threshold` of `keys` must sign; keys are 32-byte Ed25519 public keys, all different.
    pub fn new(keys: &[[u8; 32]], threshold: usize) -> Result<Self, SignatureError> {
        if keys.is_empty() || keys.len() > SIGNATURES_MAX || threshold == 0 || threshold > keys.len() {
            let problem = format!("{threshold} of {} keys (at most {SIGNATURES_MAX})", keys.len());
            return Err(SignatureError::Root(problem));
        }
        if (1..keys.len()).any(|i| keys[..i].contains(&keys[i])) {
            return Err(SignatureError::Root("a key stands twice".into()));
        }
        let parse = |key: &[u8; 32]| {
            let parsed = VerifyingKey::from_bytes(key).ok().filter(|key| !key.is_weak());
            parsed.ok_or_else(|| SignatureError::Root(format!("{} is not an Ed25519 key", hex::encode(key))))
        };
        Ok(Self { keys: keys.iter().map(parse).collect::<Result<_, _>>()?, threshold })
    }

    /// The signed bytes, if enough trusted keys signed them for `purpose`.
    pub fn open(&self, purpose: Purpose, envelope: &[u8]) -> Result<Vec<u8>, SignatureError> {
        let bad = |reason: String| SignatureError::Envelope { purpose: purpose.label(), reason };
        let envelope: wire::SignedEnvelope =
            error::decode("SignedEnvelope", envelope).map_err(|e| bad(e.to_string()))?;
        if envelope.signatures.len() > SIGNATURES_MAX {
            return Err(bad(format!("{} signatures; at most {SIGNATURES_MAX}", envelope.signatures.len())));
        }
        let message = signed_message(purpose, &envelope.signed_bytes);
        let signed_by = |key: &&VerifyingKey| envelope.signatures.iter().any(|s| is_by(key, s, &message));
        let valid = self.keys.iter().filter(signed_by).count();
        if valid < self.threshold {
            let threshold = self.threshold;
            return Err(SignatureError::Untrusted { purpose: purpose.label(), valid, threshold });
        }
        Ok(envelope.signed_bytes)
    }
}

/// A serialized envelope around `bytes`, signed with each of `keys`.
pub fn seal(purpose: Purpose, bytes: Vec<u8>, keys: &[&SigningKey]) -> Vec<u8> {
    let message = signed_message(purpose, &bytes);
    let sign = |key: &&SigningKey| wire::Signature {
        key_id: key_id(&key.verifying_key()),
        signature: key.sign(&message).to_vec(),
    };
    wire::SignedEnvelope { signatures: keys.iter().map(sign).collect(), signed_bytes: bytes }.encode_to_vec()
}

fn is_by(key: &VerifyingKey, signature: &wire::Signature, message: &[u8]) -> bool {
    signature.key_id == key_id(key)
        && Signature::from_slice(&signature.signature).is_ok_and(|s| key.verify_strict(message, &s).is_ok())
}

fn key_id(key: &VerifyingKey) -> Vec<u8> {
    Sha256::digest(key.as_bytes())[..8].to_vec()
}

fn signed_message(purpose: Purpose, bytes: &[u8]) -> Vec<u8> {
    let mut message = b"fleetune signed ".to_vec();
    message.extend_from_slice(purpose.label().as_bytes());
    message.push(0);
    message.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
    message.extend_from_slice(bytes);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn root(seeds: &[u8], threshold: usize) -> TrustRoot {
        let keys: Vec<_> = seeds.iter().map(|s| key(*s).verifying_key().to_bytes()).collect();
        TrustRoot::new(&keys, threshold).unwrap()
    }

    #[test]
    fn opens_what_enough_trusted_keys_signed() {
        let sealed = seal(Purpose::Plan, b"plan".to_vec(), &[&key(1), &key(2)]);
        assert_eq!(root(&[1, 2, 3], 2).open(Purpose::Plan, &sealed).unwrap(), b"plan");
        assert!(root(&[1, 3], 2).open(Purpose::Plan, &sealed).is_err());
    }

    #[test]
    fn one_key_signing_twice_does_not_count_twice() {
        let sealed = seal(Purpose::Plan, b"plan".to_vec(), &[&key(1), &key(1)]);
        let error = root(&[1, 2], 2).open(Purpose::Plan, &sealed).unwrap_err();
        assert_eq!(error, SignatureError::Untrusted { purpose: "plan", valid: 1, threshold: 2 });
    }

    #[test]
    fn a_signature_for_another_purpose_is_worthless() {
        let sealed = seal(Purpose::Plan, b"plan".to_vec(), &[&key(1)]);
        assert!(root(&[1], 1).open(Purpose::Release, &sealed).is_err());
    }

    #[test]
    fn any_flipped_bit_is_refused() {
        let sealed = seal(Purpose::Release, b"release bytes".to_vec(), &[&key(1)]);
        for i in 0..sealed.len() * 8 {
            let mut forged = sealed.clone();
            forged[i / 8] ^= 1 << (i % 8);
            assert!(root(&[1], 1).open(Purpose::Release, &forged).is_err(), "bit {i}");
        }
    }

    #[test]
    fn refuses_senseless_roots() {
        let k = key(1).verifying_key().to_bytes();
        assert!(TrustRoot::new(&[], 1).is_err() && TrustRoot::new(&[k], 0).is_err());
        assert!(TrustRoot::new(&[k], 2).is_err() && TrustRoot::new(&[k, k], 1).is_err());
        assert!(TrustRoot::new(&[[0; 32]], 1).is_err(), "a weak key signs for anybody");
    }
}
