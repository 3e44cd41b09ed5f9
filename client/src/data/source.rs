//! Bytes of data files: bounded reading and gzip. Knows nothing of users or JSON.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;

use super::error::DataError;
use super::limits::DataLimits;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Refuses a file name that ends in none of `extensions`.
pub(super) fn require_extension(path: &Path, extensions: &[&str]) -> Result<(), DataError> {
    let name = path.to_string_lossy().to_lowercase();
    if extensions.iter().any(|extension| name.ends_with(&format!(".{extension}"))) {
        return Ok(());
    }
    let expected = extensions.iter().map(|extension| format!(".{extension}")).collect::<Vec<_>>().join(", ");
    Err(DataError::Format { path: path.to_owned(), expected })
}

/// The file's bytes, decompressed.
pub(super) fn read(path: &Path, limits: &DataLimits) -> Result<Vec<u8>, DataError> {
    let file = File::open(path).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
    let name = path.display().to_string();
    let bytes = read_bounded(&name, file, limits)?;
    inflate(&name, &bytes, limits)
}

/// `bytes` themselves, or what they decompress to when they start as gzip does.
pub(super) fn inflate(name: &str, bytes: &[u8], limits: &DataLimits) -> Result<Vec<u8>, DataError> {
    if bytes.starts_with(&GZIP_MAGIC) {
        read_bounded(name, MultiGzDecoder::new(bytes), limits)
    } else {
        read_bounded(name, bytes, limits)
    }
}

fn read_bounded(name: &str, source: impl Read, limits: &DataLimits) -> Result<Vec<u8>, DataError> {
    let max = limits.file_bytes_max;
    let mut bytes = Vec::new();
    source
        .take(max as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| DataError::Read { path: name.into(), source })?;
    if bytes.len() > max {
        return Err(DataError::Limit { file: name.to_owned(), limit: "file_bytes_max", max });
    }
    Ok(bytes)
}
