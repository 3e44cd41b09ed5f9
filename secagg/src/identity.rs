//! Who takes part: a device's long-lived signing key, and the registrar's word that it is one device.
//!
//! Without registrars the coordinator could make up as many peers as it likes and surround a device with
//! them (a Sybil attack). A [`Certificate`] is signed by a registrar, which must not be the coordinator;
//! devices accept only peers that a registrar of theirs has certified for their population.

use crate::session_id::labelled;
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use sha2::{Digest, Sha256};
use std::fmt;
use thiserror::Error;

/// SHA-256 of a device's public signing key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub [u8; 32]);

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A registrar's word that a public key belongs to one device of a population.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// The device's Ed25519 public key.
    pub public_key: [u8; 32],
    /// Void after this time, milliseconds since 1970.
    pub expires_unix_ms: u64,
    /// The registrar's Ed25519 signature.
    pub signature: [u8; 64],
}

/// Why a certificate is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CertificateError {
    /// The key is no curve point, or one whose signatures anybody can make.
    #[error("the public key is malformed or weak")]
    Key,
    /// No registrar that is trusted here has signed it, for this population.
    #[error("no trusted registrar has certified the key for this population")]
    Registrar,
    /// It is too old.
    #[error("the certificate has expired")]
    Expired,
}

/// Whom a device or a coordinator accepts as a participant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Registrars {
    /// Devices that one of these keys has certified.
    Keys(Vec<VerifyingKey>),
    /// Any key that signs for itself. The coordinator can then make up any number of peers, and the
    /// aggregate hides a device among fictions: tests and closed laboratories only.
    InsecureAnyone,
}

/// A device's own identity.
pub struct Identity {
    key: SigningKey,
    certificate: Certificate,
}

impl Certificate {
    /// Certifies `public_key` for `population`; what a registrar does.
    #[must_use]
    pub fn issue(
        registrar: &SigningKey,
        population: &str,
        public_key: [u8; 32],
        expires_unix_ms: u64,
    ) -> Self {
        let message = certified(population, &public_key, expires_unix_ms);
        Self { public_key, expires_unix_ms, signature: registrar.sign(&message).to_bytes() }
    }

    /// A certificate that the device wrote for itself: worth something only under
    /// [`Registrars::InsecureAnyone`].
    #[must_use]
    pub fn insecure_self_signed(key: &SigningKey, population: &str, expires_unix_ms: u64) -> Self {
        Self::issue(key, population, key.verifying_key().to_bytes(), expires_unix_ms)
    }

    /// The device's name in rosters.
    #[must_use]
    pub fn id(&self) -> DeviceId {
        DeviceId(Sha256::digest(self.public_key).into())
    }

    /// What the registrar has signed.
    pub(crate) fn message(&self, population: &str) -> Vec<u8> {
        certified(population, &self.public_key, self.expires_unix_ms)
    }

    /// The bytes that travel: 32 of the key, 8 of the time (little-endian), 64 of the signature.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 104] {
        let mut bytes = [0; 104];
        bytes[..32].copy_from_slice(&self.public_key);
        bytes[32..40].copy_from_slice(&self.expires_unix_ms.to_le_bytes());
        bytes[40..].copy_from_slice(&self.signature);
        bytes
    }

    /// Inverts [`Certificate::to_bytes`]; nothing is verified. None if the length is wrong.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 104] = bytes.try_into().ok()?;
        let (key, rest) = bytes.split_first_chunk::<32>()?;
        let (time, signature) = rest.split_first_chunk::<8>()?;
        Some(Self {
            public_key: *key,
            expires_unix_ms: u64::from_le_bytes(*time),
            signature: signature.try_into().ok()?,
        })
    }
}

impl Registrars {
    /// Registrars by their public keys.
    ///
    /// # Errors
    /// [`CertificateError::Key`] for a malformed or weak key.
    pub fn from_keys(keys: &[[u8; 32]]) -> Result<Self, CertificateError> {
        keys.iter().map(verifying_key).collect::<Result<_, _>>().map(Self::Keys)
    }

    /// The registrar, if there is one and no other.
    pub(crate) fn only(&self) -> Option<&VerifyingKey> {
        match self {
            Self::Keys(keys) if keys.len() == 1 => keys.first(),
            Self::Keys(_) | Self::InsecureAnyone => None,
        }
    }

    /// True if no key whatever can certify a device.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Keys(keys) if keys.is_empty())
    }

    /// The key of a certificate that is valid for `population` now.
    ///
    /// # Errors
    /// [`CertificateError`] names what is wrong with it.
    pub fn verify(
        &self,
        certificate: &Certificate,
        population: &str,
        now_unix_ms: u64,
    ) -> Result<VerifyingKey, CertificateError> {
        let key = verifying_key(&certificate.public_key)?;
        if certificate.expires_unix_ms <= now_unix_ms {
            return Err(CertificateError::Expired);
        }
        let message = certificate.message(population);
        let signature = Signature::from_bytes(&certificate.signature);
        let signed = |registrar: &VerifyingKey| registrar.verify_strict(&message, &signature).is_ok();
        let is_certified = match self {
            Self::Keys(keys) => keys.iter().any(signed),
            Self::InsecureAnyone => signed(&key),
        };
        if is_certified { Ok(key) } else { Err(CertificateError::Registrar) }
    }
}

impl Identity {
    /// An identity with its certificate.
    ///
    /// # Errors
    /// [`CertificateError::Key`] if the certificate is for another key.
    pub fn new(key: SigningKey, certificate: Certificate) -> Result<Self, CertificateError> {
        if key.verifying_key().to_bytes() == certificate.public_key {
            Ok(Self { key, certificate })
        } else {
            Err(CertificateError::Key)
        }
    }

    /// The certificate that peers see.
    #[must_use]
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    pub(crate) fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.key.sign(message).to_bytes()
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self { key: self.key.clone(), certificate: self.certificate.clone() }
    }
}

/// A point that signs for nobody in particular (low order) is refused.
pub(crate) fn verifying_key(bytes: &[u8; 32]) -> Result<VerifyingKey, CertificateError> {
    let key = VerifyingKey::from_bytes(bytes).map_err(|_| CertificateError::Key)?;
    if key.is_weak() { Err(CertificateError::Key) } else { Ok(key) }
}

fn certified(population: &str, public_key: &[u8; 32], expires_unix_ms: u64) -> Vec<u8> {
    let mut message = labelled("certificate");
    message.extend_from_slice(&(population.len() as u64).to_le_bytes());
    message.extend_from_slice(population.as_bytes());
    message.extend_from_slice(public_key);
    message.extend_from_slice(&expires_unix_ms.to_le_bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    #[test]
    fn only_a_registrar_makes_a_device_and_only_for_its_population_and_time() {
        let (registrar, device) = (key(1), key(2).verifying_key().to_bytes());
        let trusted = Registrars::Keys(vec![key(9).verifying_key(), registrar.verifying_key()]);
        let certificate = Certificate::issue(&registrar, "roles", device, 100);
        assert!(trusted.verify(&certificate, "roles", 99).is_ok());
        assert_eq!(trusted.verify(&certificate, "roles", 100), Err(CertificateError::Expired));
        assert_eq!(trusted.verify(&certificate, "others", 99), Err(CertificateError::Registrar));
        let forged = Certificate::insecure_self_signed(&key(2), "roles", 100);
        assert_eq!(trusted.verify(&forged, "roles", 99), Err(CertificateError::Registrar));
        assert!(Registrars::InsecureAnyone.verify(&forged, "roles", 99).is_ok());
        let longer = Certificate { expires_unix_ms: 200, ..certificate };
        assert_eq!(trusted.verify(&longer, "roles", 99), Err(CertificateError::Registrar));
    }

    #[test]
    fn a_weak_key_is_refused() {
        let mut weak = [0; 32];
        weak[0] = 1; // the neutral element
        let certificate = Certificate::issue(&key(1), "roles", weak, 100);
        let trusted = Registrars::Keys(vec![key(1).verifying_key()]);
        assert_eq!(trusted.verify(&certificate, "roles", 0), Err(CertificateError::Key));
    }

    #[test]
    fn bytes_round_trip_and_other_lengths_are_refused() {
        let certificate = Certificate::insecure_self_signed(&key(2), "roles", 77);
        let bytes = certificate.to_bytes();
        assert_eq!(Certificate::from_bytes(&bytes), Some(certificate));
        assert_eq!(Certificate::from_bytes(&bytes[..103]), None);
    }
}
