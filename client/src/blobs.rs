//! Content-addressed blobs on disk: base models, checkpoints, adapters.
//!
//! A file under its final name has been verified. A download grows in `SHA256.partial`, survives a crash,
//! and is hashed again before it goes on. The network is `fetch.rs`'s.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use fleetune_proto::transfer::{Download, TransferError};
use fleetune_proto::{CHUNK_BYTES_MAX, Digest, wire};
use thiserror::Error;

use crate::files::{self, StoreError};

const PARTIAL: &str = ".partial";

/// Why a download stopped.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// The bytes are damaged or are not the blob's.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The bytes cannot be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The blobs of one device.
#[derive(Debug, Clone)]
pub struct BlobStore {
    dir: PathBuf,
}

impl BlobStore {
    /// The blobs in `dir`, which is created if need be.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be created.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let dir = dir.into();
        files::create_directory(&dir)?;
        Ok(Self { dir })
    }

    /// Where the blob is, or would be.
    #[must_use]
    pub fn path(&self, digest: Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }

    /// True when the blob is here; it was verified when it came.
    #[must_use]
    pub fn holds(&self, digest: Digest) -> bool {
        fs::metadata(self.path(digest)).is_ok_and(|meta| meta.is_file() && meta.len() == digest.size)
    }

    /// The blob's bytes, verified again: disks forget too.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when the bytes are no longer the blob's, [`StoreError::Io`] when it is not here.
    pub fn read(&self, digest: Digest) -> Result<Vec<u8>, StoreError> {
        let path = self.path(digest);
        let bytes = fs::read(&path).map_err(|e| StoreError::io("read", &path, e))?;
        let actual = Digest::of(&bytes);
        if actual != digest {
            return Err(StoreError::damaged(&path, format!("the bytes have SHA-256 {actual}")));
        }
        Ok(bytes)
    }

    /// Takes in a blob that the app brought along, such as its base model: devices do not read what they hold.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be written; nothing is left under its name.
    pub fn insert(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        if !self.holds(digest) {
            files::write_atomically(&self.path(digest), bytes)?;
        }
        Ok(digest)
    }

    /// Begins a download, or goes on with the one that an earlier try left behind.
    ///
    /// # Errors
    /// [`StoreError`] when the partial file cannot be opened or read.
    pub fn receive(&self, digest: Digest) -> Result<Incoming<'_>, StoreError> {
        let partial = self.partial(digest);
        let failed = |e| StoreError::io("open", &partial, e);
        let mut file = files::private_file().truncate(false).open(&partial).map_err(failed)?;
        if file.metadata().map_err(failed)?.len() > digest.size {
            file.set_len(0).map_err(failed)?;
        }
        let mut download = Download::new(digest);
        rehash(&mut file, &mut download).map_err(|e| StoreError::io("read", &partial, e))?;
        Ok(Incoming { store: self, digest, partial, file, download })
    }

    /// Forgets a blob; one that is not here is fine.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the system refuses.
    pub fn remove(&self, digest: Digest) -> Result<(), StoreError> {
        files::remove_if_there(&self.path(digest))
    }

    /// Forgets all blobs but those, with what downloads and crashes left behind.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the system refuses.
    pub fn retain(&self, keep: &BTreeSet<Digest>) -> Result<(), StoreError> {
        let keep: BTreeSet<String> = keep.iter().map(Digest::hex).collect();
        let unneeded = |name: &String| !keep.contains(name) && !keep.contains(name.trim_end_matches(PARTIAL));
        files::names_in(&self.dir)?.iter().filter(|n| unneeded(n)).try_for_each(|name| {
            tracing::debug!(blob = name, "no longer needed");
            files::remove_if_there(&self.dir.join(name))
        })
    }

    /// Number and bytes of the verified blobs.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the directory cannot be read.
    pub fn usage(&self) -> Result<(u64, u64), StoreError> {
        let sizes = files::names_in(&self.dir)?.into_iter().filter(|name| !name.contains('.')).map(|name| {
            let path = self.dir.join(name);
            fs::metadata(&path).map(|meta| meta.len()).map_err(|e| StoreError::io("read", &path, e))
        });
        sizes.into_iter().try_fold((0, 0), |(count, bytes), size| Ok((count + 1, bytes + size?)))
    }

    fn partial(&self, digest: Digest) -> PathBuf {
        self.dir.join(digest.hex() + PARTIAL)
    }
}

/// One blob on its way in.
pub struct Incoming<'a> {
    store: &'a BlobStore,
    digest: Digest,
    partial: PathBuf,
    file: File,
    download: Download,
}

impl Incoming<'_> {
    /// The byte to ask for next.
    #[must_use]
    pub fn next_offset(&self) -> u64 {
        self.download.next_offset()
    }

    /// True once all bytes are there.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.download.is_complete()
    }

    /// Keeps the next chunk. When the disk is full the partial file is given up: the space is its owner's.
    ///
    /// # Errors
    /// [`ReceiveError`]; after one of them this download must be begun again with [`BlobStore::receive`].
    pub fn accept(&mut self, chunk: &wire::ReadBlobResponse) -> Result<(), ReceiveError> {
        self.download.accept(chunk.offset, &chunk.data, chunk.crc32c)?;
        self.file.write_all(&chunk.data).map_err(|e| self.lost(e).into())
    }

    /// Verifies the whole and gives it its name.
    ///
    /// # Errors
    /// [`ReceiveError::Transfer`] when the bytes are not the blob's; they are thrown away.
    pub fn finish(self) -> Result<(), ReceiveError> {
        if let Err(error) = self.download.clone().finish() {
            files::remove_if_there(&self.partial)?;
            return Err(error.into());
        }
        self.file.sync_all().map_err(|e| self.lost(e))?;
        Ok(files::publish(&self.partial, &self.store.path(self.digest))?)
    }

    fn lost(&self, error: std::io::Error) -> StoreError {
        let error = StoreError::io("write", &self.partial, error);
        if matches!(error, StoreError::Full { .. }) {
            // The full disk is the error to tell.
            let _ = files::remove_if_there(&self.partial);
        }
        error
    }
}

fn rehash(file: &mut File, download: &mut Download) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES_MAX];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            read => download.resume(&buffer[..read]),
        }
    }
}

/// Used by [`crate::release`] and the device program: where a state directory keeps its blobs.
pub(crate) fn in_state(state: &Path) -> PathBuf {
    state.join("blobs")
}

#[cfg(test)]
mod tests;
