//! Files of the state directory that are whole or absent, whenever the process or the power dies.
//!
//! Blobs, the release pointer and the device seed are written with it. Nothing here knows what the
//! bytes mean.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// The state directory could not be read or written. What was there before is still there.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The disk, a quota or a file size limit is full.
    #[error("no space left to write {}: {source}", path.display())]
    Full {
        /// What was to be written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Any other failure of the system.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file does not hold what this program wrote.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Two processes must not be one device.
    #[error("state directory {} is in use by another process", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        let path = path.to_owned();
        if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge) {
            return Self::Full { path, source };
        }
        Self::Io { action, path, source }
    }

    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), reason: reason.into() }
    }
}

/// Writes a file so that a reader finds the old bytes or the new ones, never a part of them: a new
/// file, its bytes flushed, its name switched, the directory flushed. Readable by its owner only.
///
/// # Errors
/// [`StoreError`]; the old file, if any, is untouched.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = PathBuf::from(name);
    let written = write_flushed(&temporary, bytes).and_then(|()| publish(&temporary, path));
    if written.is_err() {
        // The error that matters is the first one.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Gives a flushed file its final name, durably.
pub(crate) fn publish(temporary: &Path, path: &Path) -> Result<(), StoreError> {
    fs::rename(temporary, path).map_err(|e| StoreError::io("rename to", path, e))?;
    flush_directory(path.parent().unwrap_or_else(|| Path::new(".")))
}

/// Creates a directory, and those above it, for its owner only. One that exists is left as it is.
pub(crate) fn create_directory(path: &Path) -> Result<(), StoreError> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).map_err(|e| StoreError::io("create", path, e))
}

/// Options for a file that its owner alone may read.
pub(crate) fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// A small file's bytes; none when there is no such file. More than `bytes_max` is damage.
pub(crate) fn read_if_there(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::metadata(path) {
        Ok(meta) if meta.len() > bytes_max => {
            Err(StoreError::damaged(path, format!("{} bytes; at most {bytes_max}", meta.len())))
        }
        Ok(_) => fs::read(path).map(Some).map_err(|e| StoreError::io("read", path, e)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io("read", path, error)),
    }
}

/// Removes a file; one that is not there is fine.
pub(crate) fn remove_if_there(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io("remove", path, error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Names in a directory, sorted.
pub(crate) fn names_in(path: &Path) -> Result<Vec<String>, StoreError> {
    let failed = |e| StoreError::io("list", path, e);
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)? {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

fn write_flushed(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut file = private_file().truncate(true).open(path).map_err(|e| StoreError::io("create", path, e))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| StoreError::io("write", path, e))
}

/// Without it a power cut may undo a rename. Other systems than Unix cannot open a directory.
fn flush_directory(path: &Path) -> Result<(), StoreError> {
    if cfg!(not(unix)) {
        return Ok(());
    }
    let opened = File::open(path).and_then(|directory| directory.sync_all());
    opened.map_err(|e| StoreError::io("flush", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_whole_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write_atomically(&path, b"one").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names_in(dir.path()).unwrap(), ["file"]);
    }

    #[test]
    fn what_a_crash_left_behind_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(dir.path().join("file.tmp"), b"a longer text of a write that did not finish").unwrap();
        write_atomically(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn a_failed_write_names_the_file() {
        let error = write_atomically(Path::new("/nowhere/at/all"), b"x").unwrap_err().to_string();
        assert!(error.starts_with("cannot create /nowhere/at/all.tmp"), "{error}");
    }
}
