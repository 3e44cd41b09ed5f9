//! The table `privacy_ledger`: one row a sum, written before the sum is opened.

use super::error::{StoreError, from_row, to_row};
use crate::SumCharge;
use fleetune_privacy::Purpose;
use fleetune_proto::{Name, UnixMillis};
use serde::Serialize;
use sqlx::{Row, SqlitePool, sqlite::SqliteRow};

/// What one opened sum gave away.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChargedSum {
    /// Round, from 0.
    pub round: u32,
    /// Attempt, from 0.
    pub attempt: u32,
    /// Cohort, from 0.
    pub cohort: u32,
    /// What the contributions were for.
    pub purpose: String,
    /// Vectors in the sum.
    pub survivors: u32,
    /// Vectors whose noise is counted on.
    pub honest: u32,
    /// `RDP(alpha) <= rho alpha` for each device in the sum.
    pub rho: f64,
    /// Epsilon of this sum alone.
    pub epsilon: f64,
    /// At this delta.
    pub delta: f64,
    /// When it was charged, milliseconds since 1970.
    pub charged_unix_ms: u64,
}

/// Charges a sum; the same sum again is the same row.
pub(super) async fn charge(
    pool: &SqlitePool,
    population: &Name,
    charge: &SumCharge,
    now: UnixMillis,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO privacy_ledger (population, task, round, attempt, cohort, purpose, survivors, honest, rho,
                                     epsilon, delta, charged_unix_ms)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
         ON CONFLICT (population, task, round, attempt, cohort, purpose) DO NOTHING",
    )
    .bind(population.as_str())
    .bind(charge.task.as_str())
    .bind(i64::from(charge.round))
    .bind(i64::from(charge.attempt))
    .bind(i64::from(charge.cohort))
    .bind(Purpose::Training.word())
    .bind(i64::from(charge.survivors))
    .bind(i64::from(charge.honest))
    .bind(charge.rho)
    .bind(charge.epsilon)
    .bind(charge.delta)
    .bind(to_row(now.0))
    .execute(pool)
    .await
    .map_err(|source| StoreError::Database { transaction: "charge_sum", source })?;
    Ok(())
}

pub(super) async fn all(
    pool: &SqlitePool,
    population: &Name,
    task: &Name,
) -> Result<Vec<ChargedSum>, StoreError> {
    let rows = sqlx::query(
        "SELECT round, attempt, cohort, purpose, survivors, honest, rho, epsilon, delta, charged_unix_ms
         FROM privacy_ledger WHERE population = $1 AND task = $2 ORDER BY round, attempt, cohort, purpose",
    )
    .bind(population.as_str())
    .bind(task.as_str())
    .fetch_all(pool)
    .await
    .map_err(failed)?;
    rows.iter().map(read).collect()
}

fn read(row: &SqliteRow) -> Result<ChargedSum, StoreError> {
    Ok(ChargedSum {
        round: number(row, "round")?,
        attempt: number(row, "attempt")?,
        cohort: number(row, "cohort")?,
        purpose: row.try_get("purpose").map_err(failed)?,
        survivors: number(row, "survivors")?,
        honest: number(row, "honest")?,
        rho: row.try_get("rho").map_err(failed)?,
        epsilon: row.try_get("epsilon").map_err(failed)?,
        delta: row.try_get("delta").map_err(failed)?,
        charged_unix_ms: number(row, "charged_unix_ms")?,
    })
}

fn number<T: TryFrom<i64>>(row: &SqliteRow, column: &str) -> Result<T, StoreError> {
    from_row("privacy_ledger", row.try_get(column).map_err(failed)?)
}

fn failed(source: sqlx::Error) -> StoreError {
    StoreError::Database { transaction: "read_ledger", source }
}
