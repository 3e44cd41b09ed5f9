//! Who this device is to its peers in secure aggregation: a signing key of its own, and a registrar's
//! certificate for it. Both are files in the state directory; the key never leaves it.

use std::path::{Path, PathBuf};

use ed25519_dalek::SigningKey;
use fleetune_secagg::{Certificate, Identity, Registrars};

use crate::files::{self, StoreError};
use crate::state::seed_in;

/// How long a certificate lasts that a device writes for itself, milliseconds: ten years.
const SELF_SIGNED_MS: u64 = 10 * 365 * 24 * 3600 * 1000;

/// The public half of the device's signing key, which is drawn once: what a registrar certifies.
///
/// # Errors
/// [`StoreError`] when the state directory cannot be used, or the key in it is damaged.
pub fn public_key(state: &Path) -> Result<[u8; 32], StoreError> {
    files::create_directory(state)?;
    Ok(key(state)?.verifying_key().to_bytes())
}

/// The certificate that is kept, if there is one.
///
/// # Errors
/// [`StoreError`] for a file that is none.
pub fn certificate(state: &Path) -> Result<Option<Certificate>, StoreError> {
    let path = certificate_path(state);
    let Some(text) = files::read_if_there(&path, 1024)? else { return Ok(None) };
    let bytes = hex::decode(text.trim_ascii()).ok();
    match bytes.and_then(|bytes| Certificate::from_bytes(&bytes)) {
        Some(certificate) => Ok(Some(certificate)),
        None => Err(StoreError::damaged(&path, "not 208 hexadecimal digits")),
    }
}

/// The identity with the certificate that is `given` now (and kept) or was kept before. None without one: the
/// device then takes no part in secure aggregation.
pub(crate) fn identity(
    state: &Path,
    population: &str,
    given: Option<&Certificate>,
    registrars: &Registrars,
    now_unix_ms: u64,
) -> Result<Option<Identity>, StoreError> {
    let key = key(state)?;
    let kept = certificate(state)?;
    let certificate = match (given.cloned().or(kept), registrars) {
        (Some(certificate), _) => certificate,
        (None, Registrars::InsecureAnyone) => {
            Certificate::insecure_self_signed(&key, population, now_unix_ms.saturating_add(SELF_SIGNED_MS))
        }
        (None, Registrars::Keys(_)) => return Ok(None),
    };
    let path = certificate_path(state);
    registrars
        .verify(&certificate, population, now_unix_ms)
        .map_err(|error| StoreError::damaged(&path, error.to_string()))?;
    let identity = Identity::new(key, certificate)
        .map_err(|_| StoreError::damaged(&path, "the certificate is for another device's key"))?;
    if given.is_some() {
        files::write_atomically(&path, hex::encode(identity.certificate().to_bytes()).as_bytes())?;
    }
    Ok(Some(identity))
}

fn key(state: &Path) -> Result<SigningKey, StoreError> {
    Ok(SigningKey::from_bytes(&seed_in(&state.join("identity"), None)?))
}

fn certificate_path(state: &Path) -> PathBuf {
    state.join("certificate")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registrar() -> SigningKey {
        SigningKey::from_bytes(&[3; 32])
    }

    fn certified(state: &Path, expires: u64) -> Certificate {
        Certificate::issue(&registrar(), "roles", public_key(state).unwrap(), expires)
    }

    #[test]
    fn a_certificate_is_kept_and_must_be_this_devices() {
        let dir = tempfile::tempdir().unwrap();
        let registrars = Registrars::Keys(vec![registrar().verifying_key()]);
        let with = |given: Option<&Certificate>, now| identity(dir.path(), "roles", given, &registrars, now);
        assert!(with(None, 5).unwrap().is_none());
        let certificate = certified(dir.path(), 100);
        assert!(with(Some(&certificate), 5).unwrap().is_some());
        assert_eq!(*with(None, 5).unwrap().unwrap().certificate(), certificate);
        let expired = with(None, 100).err().unwrap().to_string();
        assert!(expired.contains("certificate") && expired.contains("expired"), "{expired}");
        let other = tempfile::tempdir().unwrap();
        let foreign = with(Some(&certified(other.path(), 100)), 5).err().unwrap().to_string();
        assert!(foreign.contains("another device"), "{foreign}");
    }

    #[test]
    fn without_registrars_a_device_certifies_itself_only_if_that_is_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let anyone = identity(dir.path(), "roles", None, &Registrars::InsecureAnyone, 5).unwrap();
        assert!(anyone.is_some());
        let nobody = identity(dir.path(), "roles", None, &Registrars::Keys(Vec::new()), 5).unwrap();
        assert!(nobody.is_none());
    }

    #[test]
    fn damaged_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let key = public_key(dir.path()).unwrap();
        assert_eq!(public_key(dir.path()).unwrap(), key);
        std::fs::write(dir.path().join("certificate"), "00").unwrap();
        assert!(certificate(dir.path()).unwrap_err().to_string().contains("certificate: not 208"));
        std::fs::write(dir.path().join("identity"), "no key").unwrap();
        assert!(public_key(dir.path()).unwrap_err().to_string().contains("identity: not 64"));
    }
}
