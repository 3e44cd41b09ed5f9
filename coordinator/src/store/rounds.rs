//! The table `rounds`: one row an attempt, for people.

use super::error::{StoreError, from_row, to_row};
use crate::{RoundOutcome, RoundRecord};
use fleetune_proto::Name;
use sqlx::{Row, SqliteConnection, SqlitePool, sqlite::SqliteRow};

pub(super) async fn insert(
    connection: &mut SqliteConnection,
    population: &Name,
    task: &Name,
    record: &RoundRecord,
) -> Result<(), StoreError> {
    let failure = match &record.outcome {
        RoundOutcome::Finished => None,
        RoundOutcome::Failed(reason) => Some(reason.as_str()),
    };
    sqlx::query(
        "INSERT INTO rounds (population, task, round, attempt, failure, selected, completed, withdrawn,
                             update_norm, opened_unix_ms, finished_unix_ms, aggregation)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
         ON CONFLICT (population, task, round, attempt) DO NOTHING",
    )
    .bind(population.as_str())
    .bind(task.as_str())
    .bind(i64::from(record.round))
    .bind(i64::from(record.attempt))
    .bind(failure)
    .bind(i64::from(record.selected))
    .bind(i64::from(record.completed))
    .bind(i64::from(record.withdrawn))
    .bind(record.update_norm)
    .bind(to_row(record.opened_unix_ms))
    .bind(to_row(record.finished_unix_ms))
    .bind(serde_json::to_string(&record.aggregation).expect("strings and numbers become JSON"))
    .execute(connection)
    .await
    .map_err(|source| StoreError::Database { transaction: "keep", source })?;
    Ok(())
}

pub(super) async fn all(
    pool: &SqlitePool,
    population: &Name,
    task: &Name,
) -> Result<Vec<RoundRecord>, StoreError> {
    let rows = sqlx::query(
        "SELECT round, attempt, failure, selected, completed, withdrawn, update_norm, opened_unix_ms,
                finished_unix_ms, aggregation
         FROM rounds WHERE population = $1 AND task = $2 ORDER BY round, attempt",
    )
    .bind(population.as_str())
    .bind(task.as_str())
    .fetch_all(pool)
    .await
    .map_err(failed)?;
    rows.iter().map(read).collect()
}

fn read(row: &SqliteRow) -> Result<RoundRecord, StoreError> {
    let failure: Option<String> = row.try_get("failure").map_err(failed)?;
    let aggregation: String = row.try_get("aggregation").map_err(failed)?;
    Ok(RoundRecord {
        round: number(row, "round")?,
        attempt: number(row, "attempt")?,
        outcome: failure.map_or(RoundOutcome::Finished, RoundOutcome::Failed),
        selected: number(row, "selected")?,
        completed: number(row, "completed")?,
        withdrawn: number(row, "withdrawn")?,
        update_norm: row.try_get("update_norm").map_err(failed)?,
        aggregation: serde_json::from_str(&aggregation).unwrap_or_default(),
        opened_unix_ms: number(row, "opened_unix_ms")?,
        finished_unix_ms: number(row, "finished_unix_ms")?,
    })
}

fn number<T: TryFrom<i64>>(row: &SqliteRow, column: &str) -> Result<T, StoreError> {
    from_row("rounds", row.try_get(column).map_err(failed)?)
}

fn failed(source: sqlx::Error) -> StoreError {
    StoreError::Database { transaction: "read_rounds", source }
}
