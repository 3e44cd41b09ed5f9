//! The state directory as a whole: who owns it now, and the device's own seed.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::files::{self, StoreError};

/// Holds the state directory for this process; another one is turned away until it is dropped or dies.
#[derive(Debug)]
pub(crate) struct StateLock {
    _file: File,
}

impl StateLock {
    /// Takes the directory, which is created if need be.
    pub(crate) fn take(state: &Path) -> Result<Self, StoreError> {
        files::create_directory(state)?;
        let path = state.join("lock");
        let file = files::private_file().open(&path).map_err(|e| StoreError::io("open", &path, e))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(StoreError::InUse { path: state.to_owned() }),
            Err(TryLockError::Error(source)) => Err(StoreError::io("lock", &path, source)),
        }
    }
}

/// The device's seed, from which its batches are drawn: `given` is kept from now on, else the one kept
/// before, else a fresh one. It never leaves the device.
pub(crate) fn device_seed(state: &Path, given: Option<[u8; 32]>) -> Result<[u8; 32], StoreError> {
    seed_in(&state.join("device-seed"), given)
}

/// The 32 secret bytes kept in a file, or drawn for it.
pub(crate) fn seed_in(path: &Path, given: Option<[u8; 32]>) -> Result<[u8; 32], StoreError> {
    let kept = match files::read_if_there(path, 64)? {
        Some(bytes) => Some(parse_seed(path, &bytes)?),
        None => None,
    };
    match (given, kept) {
        (None, Some(kept)) => Ok(kept),
        (given, kept) => {
            let seed = given.unwrap_or_else(fresh_seed);
            if kept != Some(seed) {
                files::write_atomically(path, hex::encode(seed).as_bytes())?;
            }
            Ok(seed)
        }
    }
}

/// 32 bytes from the system.
pub(crate) fn fresh_seed() -> [u8; 32] {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).expect("the system has randomness");
    seed
}

fn parse_seed(path: &Path, bytes: &[u8]) -> Result<[u8; 32], StoreError> {
    let mut seed = [0; 32];
    hex::decode_to_slice(bytes, &mut seed)
        .map_err(|_| StoreError::damaged(path, "not 64 hexadecimal digits"))?;
    Ok(seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_drawn_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let seed = device_seed(dir.path(), None).unwrap();
        assert_ne!(seed, [0; 32]);
        assert_eq!(device_seed(dir.path(), None).unwrap(), seed);
        assert_eq!(device_seed(dir.path(), Some([7; 32])).unwrap(), [7; 32]);
        assert_eq!(device_seed(dir.path(), None).unwrap(), [7; 32]);
    }

    #[cfg(unix)]
    #[test]
    fn the_seed_is_its_owners() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        device_seed(dir.path(), None).unwrap();
        let mode = std::fs::metadata(dir.path().join("device-seed")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_seed_is_told_and_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("device-seed"), "no seed").unwrap();
        let error = device_seed(dir.path(), None).unwrap_err().to_string();
        assert!(error.ends_with("device-seed: not 64 hexadecimal digits"), "{error}");
    }

    #[test]
    fn one_process_one_device() {
        let dir = tempfile::tempdir().unwrap();
        let held = StateLock::take(dir.path()).unwrap();
        let error = StateLock::take(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::InUse { .. }));
        drop(held);
        StateLock::take(dir.path()).unwrap();
    }
}
