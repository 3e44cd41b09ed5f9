//! The table `releases`: every release with its manifest and signed envelope.

use super::error::{StoreError, to_row};
use crate::PublishedRelease;
use fleetune_proto::{Name, ReleaseManifest};
use sqlx::{Row, SqliteConnection, SqlitePool, sqlite::SqliteRow};

pub(super) async fn insert(
    connection: &mut SqliteConnection,
    population: &Name,
    release: &PublishedRelease,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO releases (population, version, task, adapter, manifest, envelope)
         VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT (population, version) DO NOTHING",
    )
    .bind(population.as_str())
    .bind(to_row(release.version()))
    .bind(release.manifest.task.as_str())
    .bind(release.manifest.trained().hex()) // the adapter, or the whole model
    .bind(release.manifest.to_bytes())
    .bind(release.envelope.as_slice())
    .execute(connection)
    .await
    .map_err(|source| StoreError::Database { transaction: "keep", source })?;
    Ok(())
}

pub(super) async fn all(pool: &SqlitePool, population: &Name) -> Result<Vec<PublishedRelease>, StoreError> {
    let rows = sqlx::query("SELECT manifest, envelope FROM releases WHERE population = $1 ORDER BY version")
        .bind(population.as_str())
        .fetch_all(pool)
        .await
        .map_err(failed)?;
    rows.iter().map(read).collect()
}

/// Blobs that rows of this table name.
pub(super) async fn blobs(pool: &SqlitePool) -> Result<Vec<String>, StoreError> {
    let rows = sqlx::query("SELECT adapter FROM releases").fetch_all(pool).await.map_err(failed)?;
    rows.iter().map(|row| row.try_get(0).map_err(failed)).collect()
}

fn read(row: &SqliteRow) -> Result<PublishedRelease, StoreError> {
    let manifest: Vec<u8> = row.try_get("manifest").map_err(failed)?;
    let manifest = ReleaseManifest::parse(&manifest)
        .map_err(|error| StoreError::Corrupt { table: "releases", problem: error.to_string() })?;
    Ok(PublishedRelease { manifest, envelope: row.try_get("envelope").map_err(failed)? })
}

fn failed(source: sqlx::Error) -> StoreError {
    StoreError::Database { transaction: "read_releases", source }
}
