//! Blobs on disk: one file a blob, named by its SHA-256. A file under its final name is whole: it is
//! written beside it, synced, renamed, and the folder synced.

use super::error::StoreError;
use fleetune_proto::Digest;
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

const LOCK: &str = "lock";
const UNFINISHED: &str = ".unfinished";

/// A folder of blobs.
#[derive(Clone)]
pub struct BlobStore {
    folder: PathBuf,
    _lock: Option<Arc<File>>,
}

impl BlobStore {
    /// Opens the folder for this process alone, creating it if need be.
    ///
    /// # Errors
    /// [`StoreError::InUse`] or [`StoreError::Blob`].
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(folder).map_err(|source| at(folder, source))?;
        let path = folder.join(LOCK);
        let lock = File::create(&path).map_err(|source| at(&path, source))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { folder: folder.to_owned(), _lock: Some(Arc::new(lock)) }),
            Err(fs::TryLockError::WouldBlock) => Err(StoreError::InUse { path: folder.to_owned() }),
            Err(fs::TryLockError::Error(source)) => Err(at(&path, source)),
        }
    }

    /// The folder as it is, to look at.
    #[must_use]
    pub fn unlocked(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), _lock: None }
    }

    /// Where a blob is, if it is there.
    #[must_use]
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.folder.join(digest.hex())
    }

    /// Reads a blob and checks it against its name.
    ///
    /// # Errors
    /// [`StoreError::Blob`] or [`StoreError::Damaged`].
    pub fn read(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let path = self.path(digest);
        let bytes = fs::read(&path).map_err(|source| at(&path, source))?;
        let actual = Digest::of(&bytes);
        if actual == *digest {
            Ok(bytes)
        } else {
            Err(StoreError::Damaged { digest: *digest, actual: actual.hex() })
        }
    }

    /// Makes a blob durable; one that is there already is left alone.
    ///
    /// # Errors
    /// [`StoreError::Blob`], for example when the disk is full; no file is left behind then.
    pub fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.path(digest);
        if fs::metadata(&path).is_ok_and(|found| found.len() == digest.size) {
            return Ok(());
        }
        let unfinished = self.folder.join(format!("{}{UNFINISHED}", digest.hex()));
        let written = write_synced(&unfinished, bytes).and_then(|()| fs::rename(&unfinished, &path));
        if let Err(source) = written.and_then(|()| File::open(&self.folder)?.sync_all()) {
            let _ = fs::remove_file(&unfinished);
            return Err(at(&path, source));
        }
        Ok(())
    }

    /// Makes several durable, away from the async threads.
    pub(super) async fn put_all(&self, blobs: Vec<(Digest, Arc<Vec<u8>>)>) -> Result<(), StoreError> {
        let store = self.clone();
        blocking(move || blobs.iter().try_for_each(|(digest, bytes)| store.put(digest, bytes))).await
    }

    /// Removes blobs by their names; those that are gone already are fine.
    pub(super) async fn remove_all(&self, names: Vec<String>) -> Result<(), StoreError> {
        let folder = self.folder.clone();
        blocking(move || names.iter().try_for_each(|name| remove(&folder.join(name)))).await
    }

    /// The names of all blobs, finished or not.
    pub(super) fn list(&self) -> Result<Vec<String>, StoreError> {
        let entries = fs::read_dir(&self.folder).map_err(|source| at(&self.folder, source))?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let names: Vec<String> =
            names.collect::<std::io::Result<_>>().map_err(|source| at(&self.folder, source))?;
        Ok(names.into_iter().filter(|name| is_blob(name)).collect())
    }
}

/// Only what this store writes is ever removed.
fn is_blob(name: &str) -> bool {
    let name = name.strip_suffix(UNFINISHED).unwrap_or(name);
    name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(at(path, error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

async fn blocking(work: impl FnOnce() -> Result<(), StoreError> + Send + 'static) -> Result<(), StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

fn at(path: &Path, source: std::io::Error) -> StoreError {
    StoreError::Blob { path: path.to_owned(), source }
}
