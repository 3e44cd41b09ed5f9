//! The table `tasks`: one row a task, with its latest commit and the one before.

use super::error::{StoreError, from_row, to_row};
use crate::Commit;
use fleetune_proto::{Digest, Name, UnixMillis};
use sqlx::{Row, SqliteConnection, SqlitePool, sqlite::SqliteRow};

/// A task as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTask {
    /// The task.
    pub name: Name,
    /// When it was first served.
    pub created: UnixMillis,
    /// Rounds it was last configured to run.
    pub rounds: u32,
    /// Its latest commit.
    pub progress: Option<StoredProgress>,
}

/// Where a task stands: numbers, and the blobs that hold the rest.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredProgress {
    /// The round that is due, from 0.
    pub round: u32,
    /// Its attempt, from 0.
    pub attempt: u32,
    /// The adapter checkpoint.
    pub checkpoint: Digest,
    /// The server optimizer's state: f32, little-endian.
    pub optimizer: Digest,
    /// The next round's clipping norm under adaptive clipping, once it has moved.
    pub clipping_norm: Option<f64>,
    /// The protection that all rounds so far ran under.
    pub protection: String,
}

pub(super) async fn begin(
    pool: &SqlitePool,
    population: &Name,
    task: &Name,
    rounds: u32,
    now: UnixMillis,
) -> Result<UnixMillis, StoreError> {
    sqlx::query(
        "INSERT INTO tasks (population, name, created_unix_ms, rounds) VALUES ($1, $2, $3, $4)
         ON CONFLICT (population, name) DO UPDATE SET rounds = excluded.rounds",
    )
    .bind(population.as_str())
    .bind(task.as_str())
    .bind(to_row(now.0))
    .bind(i64::from(rounds))
    .execute(pool)
    .await
    .map_err(|source| StoreError::Database { transaction: "begin_task", source })?;
    let row = sqlx::query("SELECT created_unix_ms FROM tasks WHERE population = $1 AND name = $2")
        .bind(population.as_str())
        .bind(task.as_str())
        .fetch_one(pool)
        .await
        .map_err(failed)?;
    Ok(UnixMillis(from_row("tasks", row.try_get(0).map_err(failed)?)?))
}

pub(super) async fn all(pool: &SqlitePool, population: &Name) -> Result<Vec<StoredTask>, StoreError> {
    let rows = sqlx::query(
        "SELECT name, created_unix_ms, rounds, round, attempt, checkpoint, checkpoint_bytes, optimizer,
                optimizer_bytes, clipping_norm, protection
         FROM tasks WHERE population = $1 ORDER BY name",
    )
    .bind(population.as_str())
    .fetch_all(pool)
    .await
    .map_err(failed)?;
    rows.iter().map(read).collect()
}

/// Moves a task to a commit. Answers with the blobs that no longer belong to its last two.
pub(super) async fn advance(
    connection: &mut SqliteConnection,
    population: &Name,
    commit: &Commit,
    optimizer: Digest,
) -> Result<Vec<String>, StoreError> {
    let superseded = blobs_before(connection, population, &commit.task).await?;
    sqlx::query(
        "UPDATE tasks SET
             checkpoint_before = CASE WHEN checkpoint = $1 THEN checkpoint_before ELSE checkpoint END,
             optimizer_before = CASE WHEN checkpoint = $1 THEN optimizer_before ELSE optimizer END,
             checkpoint = $1, checkpoint_bytes = $2, optimizer = $3, optimizer_bytes = $4,
             round = $5, attempt = $6, clipping_norm = $7, protection = $8
         WHERE population = $9 AND name = $10",
    )
    .bind(commit.checkpoint.hex())
    .bind(to_row(commit.checkpoint.size))
    .bind(optimizer.hex())
    .bind(to_row(optimizer.size))
    .bind(i64::from(commit.progress.round))
    .bind(i64::from(commit.progress.attempt))
    .bind(commit.progress.clipping_norm.map(f64::from))
    .bind(commit.progress.protection.as_str())
    .bind(population.as_str())
    .bind(commit.task.as_str())
    .execute(connection)
    .await
    .map_err(|source| StoreError::Database { transaction: "keep", source })?;
    Ok(superseded)
}

/// Blobs that rows of this table name.
pub(super) async fn blobs(pool: &SqlitePool) -> Result<Vec<String>, StoreError> {
    let rows = sqlx::query("SELECT checkpoint, optimizer, checkpoint_before, optimizer_before FROM tasks")
        .fetch_all(pool)
        .await
        .map_err(failed)?;
    let mut named = Vec::new();
    for row in &rows {
        for column in 0..4 {
            named.extend(row.try_get::<Option<String>, _>(column).map_err(failed)?);
        }
    }
    Ok(named)
}

async fn blobs_before(
    connection: &mut SqliteConnection,
    population: &Name,
    task: &Name,
) -> Result<Vec<String>, StoreError> {
    let row = sqlx::query(
        "SELECT checkpoint_before, optimizer_before FROM tasks WHERE population = $1 AND name = $2",
    )
    .bind(population.as_str())
    .bind(task.as_str())
    .fetch_one(connection)
    .await
    .map_err(|source| StoreError::Database { transaction: "keep", source })?;
    let column = |index: usize| row.try_get::<Option<String>, _>(index).map_err(failed);
    Ok(column(0)?.into_iter().chain(column(1)?).collect())
}

fn read(row: &SqliteRow) -> Result<StoredTask, StoreError> {
    let name: String = row.try_get("name").map_err(failed)?;
    Ok(StoredTask {
        name: Name::parse("tasks.name", &name).map_err(|error| corrupt(&error))?,
        created: UnixMillis(from_row("tasks", row.try_get("created_unix_ms").map_err(failed)?)?),
        rounds: from_row("tasks", row.try_get("rounds").map_err(failed)?)?,
        progress: read_progress(row)?,
    })
}

fn read_progress(row: &SqliteRow) -> Result<Option<StoredProgress>, StoreError> {
    let Some(round) = row.try_get::<Option<i64>, _>("round").map_err(failed)? else { return Ok(None) };
    let attempt: Option<i64> = row.try_get("attempt").map_err(failed)?;
    Ok(Some(StoredProgress {
        round: from_row("tasks", round)?,
        attempt: from_row("tasks", attempt.unwrap_or(0))?,
        checkpoint: read_digest(row, "checkpoint", "checkpoint_bytes")?,
        optimizer: read_digest(row, "optimizer", "optimizer_bytes")?,
        clipping_norm: row.try_get("clipping_norm").map_err(failed)?,
        protection: row.try_get("protection").map_err(failed)?,
    }))
}

fn read_digest(row: &SqliteRow, sha256: &str, size: &str) -> Result<Digest, StoreError> {
    let hex: Option<String> = row.try_get(sha256).map_err(failed)?;
    let size: Option<i64> = row.try_get(size).map_err(failed)?;
    let mut digest = Digest { sha256: [0; 32], size: from_row("tasks", size.unwrap_or(-1))? };
    hex::decode_to_slice(hex.unwrap_or_default(), &mut digest.sha256).map_err(|error| corrupt(&error))?;
    Ok(digest)
}

fn failed(source: sqlx::Error) -> StoreError {
    StoreError::Database { transaction: "read_tasks", source }
}

fn corrupt(problem: &dyn std::fmt::Display) -> StoreError {
    StoreError::Corrupt { table: "tasks", problem: problem.to_string() }
}
