//! What must survive a restart: tasks, rounds and releases in SQLite, their bytes as blobs on disk.
//!
//! SQL stands in the file of its table (`store/tasks.rs`, `store/rounds.rs`, `store/releases.rs`,
//! `store/ledger.rs`), bytes in
//! `store/blobs.rs`. One commit of the core is one transaction ([`Store::keep`]); its blobs are durable
//! before it, so a row never names bytes that are not there. No contribution of a device is ever stored.

mod blobs;
mod error;
mod ledger;
mod releases;
mod rounds;
mod tasks;

#[cfg(test)]
mod tests;

pub use blobs::BlobStore;
pub use error::StoreError;
pub use ledger::ChargedSum;
pub use tasks::{StoredProgress, StoredTask};

use crate::{Commit, PublishedRelease, RoundRecord, SumCharge, config::Storage};
use fleetune_proto::{Digest, Name, UnixMillis};
use sqlx::{
    SqlSafeStr, SqlitePool,
    migrate::{Migration, MigrationType, Migrator},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use std::{path::Path, sync::Arc, time::Duration};

/// How long a statement waits for another process's lock: `status` reads while `serve` writes.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The state of one coordinator.
#[derive(Clone)]
pub struct Store {
    pool: SqlitePool,
    blobs: BlobStore,
    population: Name,
}

impl Store {
    /// Opens the store to serve from it, creating it if need be; one process at a time. Blobs that no row
    /// names (left by a crash between the two) are removed.
    ///
    /// # Errors
    /// [`StoreError::Schema`] for a schema of a newer version, [`StoreError::InUse`] while another process
    /// serves from it, [`StoreError::Blob`] and [`StoreError::Database`] otherwise.
    pub async fn open(storage: &Storage, population: &Name) -> Result<Self, StoreError> {
        let blobs = BlobStore::open(&storage.blobs)?;
        let pool = connect(&storage.database, true).await?;
        migrator().run(&pool).await.map_err(|source| StoreError::schema(&storage.database, source))?;
        let store = Self { pool, blobs, population: population.clone() };
        store.sweep().await?;
        Ok(store)
    }

    /// Opens an existing store to look at it, while another process may serve from it.
    ///
    /// # Errors
    /// [`StoreError::Database`] when there is none.
    pub async fn open_to_read(storage: &Storage, population: &Name) -> Result<Self, StoreError> {
        let pool = connect(&storage.database, false).await?;
        let blobs = BlobStore::unlocked(&storage.blobs);
        Ok(Self { pool, blobs, population: population.clone() })
    }

    /// The bytes that rows name.
    #[must_use]
    pub fn blobs(&self) -> &BlobStore {
        &self.blobs
    }

    /// Notes a task when it is first served; answers with that time, now or then.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn begin_task(
        &self,
        task: &Name,
        rounds: u32,
        now: UnixMillis,
    ) -> Result<UnixMillis, StoreError> {
        tasks::begin(&self.pool, &self.population, task, rounds, now).await
    }

    /// A task and where it stands.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn task(&self, task: &Name) -> Result<Option<StoredTask>, StoreError> {
        Ok(self.tasks().await?.into_iter().find(|stored| stored.name == *task))
    }

    /// All tasks, by name.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn tasks(&self) -> Result<Vec<StoredTask>, StoreError> {
        tasks::all(&self.pool, &self.population).await
    }

    /// The attempts of a task, oldest first.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn rounds(&self, task: &Name) -> Result<Vec<RoundRecord>, StoreError> {
        rounds::all(&self.pool, &self.population, task).await
    }

    /// Charges a sum to the privacy ledger, durably: before it is opened.
    ///
    /// # Errors
    /// [`StoreError::Database`]; the sum then stays masked.
    pub async fn charge(&self, charge: &SumCharge, now: UnixMillis) -> Result<(), StoreError> {
        ledger::charge(&self.pool, &self.population, charge, now).await
    }

    /// What the opened sums of a task gave away, oldest first.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn charges(&self, task: &Name) -> Result<Vec<ChargedSum>, StoreError> {
        ledger::all(&self.pool, &self.population, task).await
    }

    /// All releases, oldest first.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn releases(&self) -> Result<Vec<PublishedRelease>, StoreError> {
        releases::all(&self.pool, &self.population).await
    }

    /// Makes a commit durable: blobs first, then one transaction. It may be repeated. On error nothing is
    /// lost and nothing half-kept is visible.
    ///
    /// # Errors
    /// [`StoreError::Blob`] (a full disk) or [`StoreError::Database`].
    pub async fn keep(&self, commit: &Commit) -> Result<(), StoreError> {
        let optimizer = Arc::new(optimizer_bytes(&commit.progress.optimizer_state));
        let optimizer_digest = Digest::of(&optimizer);
        let mut blobs = commit.blobs.clone();
        blobs.push((optimizer_digest, optimizer));
        self.blobs.put_all(blobs).await?;
        let superseded = self.transaction(commit, optimizer_digest).await?;
        if let Err(error) = self.prune(superseded).await {
            tracing::warn!(%error, "superfluous blobs stay until the next start");
        }
        Ok(())
    }

    /// The transaction "keep". Answers with blobs that may have become superfluous.
    async fn transaction(&self, commit: &Commit, optimizer: Digest) -> Result<Vec<String>, StoreError> {
        let failed = |source| StoreError::Database { transaction: "keep", source };
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        let superseded = tasks::advance(&mut transaction, &self.population, commit, optimizer).await?;
        if let Some(record) = &commit.record {
            rounds::insert(&mut transaction, &self.population, &commit.task, record).await?;
        }
        if let Some(release) = &commit.release {
            releases::insert(&mut transaction, &self.population, release).await?;
        }
        transaction.commit().await.map_err(failed)?;
        Ok(superseded)
    }

    async fn prune(&self, superseded: Vec<String>) -> Result<(), StoreError> {
        if superseded.is_empty() {
            return Ok(());
        }
        let named = self.named_blobs().await?;
        let superfluous = superseded.into_iter().filter(|blob| !named.contains(blob)).collect();
        self.blobs.remove_all(superfluous).await
    }

    async fn sweep(&self) -> Result<(), StoreError> {
        let named = self.named_blobs().await?;
        let superfluous = self.blobs.list()?.into_iter().filter(|blob| !named.contains(blob)).collect();
        self.blobs.remove_all(superfluous).await
    }

    /// Every blob that a row names, of any population in the database.
    async fn named_blobs(&self) -> Result<Vec<String>, StoreError> {
        let mut named = tasks::blobs(&self.pool).await?;
        named.extend(releases::blobs(&self.pool).await?);
        Ok(named)
    }
}

/// The wire form of optimizer state at rest: f32, little-endian.
fn optimizer_bytes(state: &[f32]) -> Vec<u8> {
    state.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// One connection: the coordinator writes rarely and from one task. Commits are synced in full, since a lost
/// one costs a cohort its work.
async fn connect(database: &Path, create: bool) -> Result<SqlitePool, StoreError> {
    let options = SqliteConnectOptions::new()
        .filename(database)
        .create_if_missing(create)
        .read_only(!create)
        .busy_timeout(BUSY_TIMEOUT)
        .synchronous(SqliteSynchronous::Full);
    let options = if create { options.journal_mode(SqliteJournalMode::Wal) } else { options };
    let pool = SqlitePoolOptions::new().max_connections(1).connect_with(options).await;
    pool.map_err(|source| StoreError::Open { path: database.to_owned(), source })
}

/// The schema, embedded. Migrations are numbered and append-only; a database that has one more than this
/// list is refused.
fn migrator() -> Migrator {
    let start = include_str!("../migrations/0001_start.sql").into_sql_str();
    let aggregation = include_str!("../migrations/0002_aggregation.sql").into_sql_str();
    let privacy = include_str!("../migrations/0003_privacy.sql").into_sql_str();
    Migrator::with_migrations(vec![
        Migration::new(1, "start".into(), MigrationType::Simple, start, false),
        Migration::new(2, "aggregation".into(), MigrationType::Simple, aggregation, false),
        Migration::new(3, "privacy".into(), MigrationType::Simple, privacy, false),
    ])
}
