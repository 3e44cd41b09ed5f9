//! Model bytes that many tensors share: a mapped file, a constant in the program, or a vector.

#![allow(unsafe_code, reason = "memory-mapping a file is unsafe by its nature; see the SAFETY comments")]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

use crate::error::ModelError;

/// Bytes that are cheap to clone; made from a `Vec<u8>` or a `&'static [u8]`, or by mapping a file.
#[derive(Clone)]
pub struct SharedBytes(Source);

#[derive(Clone)]
enum Source {
    Mapped(Arc<Mmap>),
    Static(&'static [u8]),
    Owned(Arc<Vec<u8>>),
}

impl SharedBytes {
    /// Maps a file for reading; an empty file gives no bytes.
    ///
    /// # Errors
    /// [`ModelError::Read`].
    pub fn map(path: &Path) -> Result<Self, ModelError> {
        let failed = |source| ModelError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.len() == 0 {
            return Ok(Self(Source::Static(&[])));
        }
        // SAFETY: the map is read-only and private to this process. A base model is named by the hash of its
        // bytes and replaced as a whole, never edited in place; a program that truncates it while it is in
        // use gets a bus error, as with every mapped program or library file.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Ok(Self(Source::Mapped(Arc::new(map))))
    }

    /// Whether the bytes are a mapped file's.
    pub(crate) fn is_mapped(&self) -> bool {
        match self.0 {
            Source::Mapped(_) => true,
            Source::Owned(_) | Source::Static(_) => false,
        }
    }

    /// Gives the memory of whole pages inside `range` back where they can be read from a file again.
    pub(crate) fn release(&self, range: std::ops::Range<usize>) {
        #[cfg(unix)]
        if let Source::Mapped(map) = &self.0 {
            const PAGE: usize = 4096;
            let (first, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
            if first < end && end <= map.len() {
                // SAFETY: the map is of a file and read-only: what is dropped is read again when it is touched.
                let released =
                    unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, first, end - first) };
                // Only memory is at stake.
                drop(released);
            }
        }
        #[cfg(not(unix))]
        drop(range);
    }
}

impl From<Vec<u8>> for SharedBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Source::Owned(Arc::new(bytes)))
    }
}

impl From<&'static [u8]> for SharedBytes {
    fn from(bytes: &'static [u8]) -> Self {
        Self(Source::Static(bytes))
    }
}

impl AsRef<[u8]> for SharedBytes {
    fn as_ref(&self) -> &[u8] {
        match &self.0 {
            Source::Mapped(map) => map,
            Source::Static(bytes) => bytes,
            Source::Owned(bytes) => bytes,
        }
    }
}
