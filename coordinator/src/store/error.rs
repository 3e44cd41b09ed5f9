//! What can go wrong with stored state.

use fleetune_proto::Digest;
use sqlx::migrate::MigrateError;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// State that cannot be read or kept.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The database cannot be opened.
    #[error("database {}: {source}", path.display())]
    Open {
        /// Its file.
        path: PathBuf,
        /// What the driver said.
        source: sqlx::Error,
    },
    /// The database has a schema that this version does not know, or it could not be brought up to date.
    #[error("database {}: schema: {source}", path.display())]
    Schema {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<MigrateError>,
    },
    /// A statement failed.
    #[error("database, transaction {transaction}: {source}")]
    Database {
        /// The transaction's name.
        transaction: &'static str,
        /// What the driver said.
        source: sqlx::Error,
    },
    /// A row holds what no version writes.
    #[error("database, table {table}: {problem}")]
    Corrupt {
        /// The table.
        table: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A blob cannot be read or written.
    #[error("blob {}: {source}", path.display())]
    Blob {
        /// Its file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A blob's bytes are not those it is named by.
    #[error("blob {digest}: the stored bytes have SHA-256 {actual}")]
    Damaged {
        /// The blob.
        digest: Digest,
        /// What its bytes hash to.
        actual: String,
    },
    /// Another process serves from this store.
    #[error("blobs {}: in use by another process", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
}

impl StoreError {
    pub(super) fn schema(path: &Path, source: MigrateError) -> Self {
        Self::Schema { path: path.to_owned(), source: Box::new(source) }
    }
}

/// A whole number as both databases store it.
pub(super) fn to_row(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A whole number as it was stored.
pub(super) fn from_row<T: TryFrom<i64>>(table: &'static str, value: i64) -> Result<T, StoreError> {
    T::try_from(value)
        .map_err(|_| StoreError::Corrupt { table, problem: format!("number {value} is out of range") })
}
