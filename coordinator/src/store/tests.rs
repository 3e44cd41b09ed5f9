//! The store on real files: what is kept comes back, also after a restart, and nothing is half-kept.

use super::{Store, StoreError};
use crate::{
    AggregationRecord, CohortRecord, Commit, PublishedRelease, RoundOutcome, RoundRecord, SumCharge,
    TaskProgress, config::Storage, machine::CommitId,
};
use fleetune_proto::{Digest, Name, ReleaseManifest, UnixMillis};
use std::{path::Path, sync::Arc};

fn name(text: &str) -> Name {
    Name::parse("test", text).unwrap()
}

fn storage(folder: &Path) -> Storage {
    Storage { database: folder.join("c.sqlite"), blobs: folder.join("blobs") }
}

async fn open(folder: &Path) -> Result<Store, StoreError> {
    Store::open(&storage(folder), &name("roles")).await
}

async fn begun(folder: &Path) -> Store {
    let store = open(folder).await.unwrap();
    store.begin_task(&name("lora"), 3, UnixMillis(7)).await.unwrap();
    store
}

fn commit(round: u32, attempt: u32, failed: bool) -> Commit {
    let bytes = Arc::new(format!("checkpoint {round}").into_bytes());
    let checkpoint = Digest::of(&bytes);
    let outcome = if failed { RoundOutcome::Failed("too few".into()) } else { RoundOutcome::Finished };
    let record = RoundRecord {
        round: round.saturating_sub(u32::from(!failed)),
        attempt: attempt.saturating_sub(u32::from(failed)),
        outcome,
        selected: 4,
        completed: 3,
        withdrawn: 1,
        update_norm: (!failed).then_some(0.25),
        aggregation: aggregation(failed),
        opened_unix_ms: 10,
        finished_unix_ms: 20,
    };
    let progress = TaskProgress {
        round,
        attempt,
        adapter: vec![1.0],
        optimizer_state: vec![round as f32, 2.0],
        clipping_norm: Some(0.5),
        protection: "secagg".into(),
    };
    Commit {
        id: CommitId(1),
        task: name("lora"),
        checkpoint,
        blobs: if failed { Vec::new() } else { vec![(checkpoint, bytes)] },
        progress: Arc::new(progress),
        record: (round > 0 || failed).then_some(record),
        release: None,
    }
}

fn aggregation(failed: bool) -> AggregationRecord {
    let cohort = CohortRecord {
        members: 4,
        degree: 3,
        threshold: 2,
        dropouts: [0, 1, 0, u32::from(failed)],
        survivors: (!failed).then_some(3),
        failure: failed.then(|| "its sum was not opened in time".into()),
    };
    AggregationRecord { protocol: "secagg+".into(), cohorts: vec![cohort], privacy: None }
}

fn release(version: u64, adapter: Digest) -> PublishedRelease {
    let manifest = ReleaseManifest {
        population: name("roles"),
        version,
        task: name("lora"),
        base_model: Digest::of(b"base"),
        adapter: Some(adapter),
        rounds: 3,
        created: UnixMillis(1),
        expires: UnixMillis(2),
        privacy_statement: "none".into(),
        privacy_statement_json: "{}".into(),
    };
    PublishedRelease { manifest, envelope: vec![1, 2, 3] }
}

fn blob_count(folder: &Path) -> usize {
    std::fs::read_dir(folder.join("blobs")).unwrap().count() - 1
}

#[tokio::test]
async fn what_is_kept_comes_back_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = begun(folder.path()).await;
    assert_eq!(store.task(&name("lora")).await.unwrap().unwrap().progress, None);
    let adapter = Arc::new(b"adapter".to_vec());
    let mut last = commit(1, 0, false);
    last.blobs.push((Digest::of(&adapter), adapter.clone()));
    last.release = Some(release(1, Digest::of(&adapter)));
    last.record.as_mut().unwrap().attempt = 1;
    for commit in [commit(0, 0, false), commit(0, 1, true), last.clone()] {
        store.keep(&commit).await.unwrap();
    }
    drop(store);
    let store = open(folder.path()).await.unwrap();
    assert_eq!(store.begin_task(&name("lora"), 5, UnixMillis(99)).await.unwrap(), UnixMillis(7));
    let task = store.task(&name("lora")).await.unwrap().unwrap();
    let progress = task.progress.unwrap();
    assert_eq!((task.rounds, progress.round, progress.attempt), (5, 1, 0));
    assert_eq!(store.blobs().read(&progress.checkpoint).unwrap(), b"checkpoint 1");
    assert_eq!(
        store.blobs().read(&progress.optimizer).unwrap(),
        [1.0f32.to_le_bytes(), 2.0f32.to_le_bytes()].concat()
    );
    let rounds = store.rounds(&name("lora")).await.unwrap();
    assert_eq!(rounds, [commit(0, 1, true).record.unwrap(), last.record.unwrap()]);
    assert_eq!(store.releases().await.unwrap(), [release(1, Digest::of(&adapter))]);
    assert_eq!(store.blobs().read(&Digest::of(&adapter)).unwrap(), *adapter);
}

#[tokio::test]
async fn charges_are_written_once_and_outlive_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let charge = |attempt: u32, survivors: u32| SumCharge {
        task: name("lora"),
        round: 2,
        attempt,
        cohort: 0,
        survivors,
        honest: survivors - 1,
        rho: 0.125,
        epsilon: 2.5,
        delta: 1e-6,
        simulated: false,
    };
    {
        let store = begun(folder.path()).await;
        store.charge(&charge(0, 9), UnixMillis(5)).await.unwrap();
        // The process died before it opened the sum: the same sum again is the same row.
        store.charge(&charge(0, 9), UnixMillis(6)).await.unwrap();
        store.charge(&charge(1, 8), UnixMillis(7)).await.unwrap();
        store.keep(&commit(1, 0, false)).await.unwrap();
    }
    let store = open(folder.path()).await.unwrap();
    let charges = store.charges(&name("lora")).await.unwrap();
    let seen: Vec<_> =
        charges.iter().map(|c| (c.attempt, c.survivors, c.honest, c.charged_unix_ms)).collect();
    assert_eq!(seen, [(0, 9, 8, 5), (1, 8, 7, 7)]);
    assert!(charges.iter().all(|c| c.purpose == "training" && c.rho == 0.125 && c.epsilon == 2.5));
    assert!(store.charges(&name("other")).await.unwrap().is_empty());
    let progress = store.task(&name("lora")).await.unwrap().unwrap().progress.unwrap();
    assert_eq!(progress.clipping_norm, Some(0.5));
}

#[tokio::test]
async fn a_repeated_commit_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = begun(folder.path()).await;
    for commit in [commit(0, 0, false), commit(1, 0, false), commit(1, 0, false)] {
        store.keep(&commit).await.unwrap();
    }
    assert_eq!(store.rounds(&name("lora")).await.unwrap().len(), 1);
    assert!(
        store.blobs().read(&Digest::of(b"checkpoint 0")).is_ok(),
        "the one before is kept for late readers"
    );
}

#[tokio::test]
async fn blobs_do_not_pile_up() {
    let folder = tempfile::tempdir().unwrap();
    let store = begun(folder.path()).await;
    for round in 0..6 {
        store.keep(&commit(round, 0, false)).await.unwrap();
    }
    assert_eq!(blob_count(folder.path()), 4, "two checkpoints and two optimizer states");
    assert!(store.blobs().read(&Digest::of(b"checkpoint 5")).is_ok());
    assert!(store.blobs().read(&Digest::of(b"checkpoint 3")).is_err());
}

#[tokio::test]
async fn a_crash_between_blob_and_row_leaves_no_orphan() {
    let folder = tempfile::tempdir().unwrap();
    let store = begun(folder.path()).await;
    store.keep(&commit(0, 0, false)).await.unwrap();
    store.blobs().put(&Digest::of(b"orphan"), b"orphan").unwrap();
    std::fs::write(folder.path().join("blobs/notes.txt"), "the operator's").unwrap();
    drop(store);
    let store = open(folder.path()).await.unwrap();
    assert!(store.blobs().read(&Digest::of(b"orphan")).is_err());
    assert!(store.blobs().read(&Digest::of(b"checkpoint 0")).is_ok());
    assert!(folder.path().join("blobs/notes.txt").exists());
}

#[tokio::test]
async fn a_commit_that_cannot_be_written_is_an_error_and_half_of_it_is_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let store = begun(folder.path()).await;
    store.keep(&commit(0, 0, false)).await.unwrap();
    let (blobs, aside) = (folder.path().join("blobs"), folder.path().join("aside"));
    std::fs::rename(&blobs, &aside).unwrap();
    let error = store.keep(&commit(1, 0, false)).await.unwrap_err();
    assert!(matches!(error, StoreError::Blob { .. }), "{error}");
    let progress = store.task(&name("lora")).await.unwrap().unwrap().progress.unwrap();
    assert_eq!((progress.round, store.rounds(&name("lora")).await.unwrap().len()), (0, 0));
    std::fs::rename(&aside, &blobs).unwrap();
    store.keep(&commit(1, 0, false)).await.unwrap();
    assert_eq!(store.task(&name("lora")).await.unwrap().unwrap().progress.unwrap().round, 1);
}

#[tokio::test]
async fn a_damaged_blob_is_found_when_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let store = begun(folder.path()).await;
    store.keep(&commit(0, 0, false)).await.unwrap();
    let digest = Digest::of(b"checkpoint 0");
    std::fs::write(store.blobs().path(&digest), b"checkpoint 1").unwrap();
    assert!(matches!(store.blobs().read(&digest), Err(StoreError::Damaged { .. })));
}

#[tokio::test]
async fn an_unknown_schema_is_refused_and_so_is_a_file_that_is_no_database() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).await.unwrap();
    sqlx::query("UPDATE _sqlx_migrations SET version = 99 WHERE version = 3")
        .execute(&store.pool)
        .await
        .unwrap();
    drop(store);
    let error = open(folder.path()).await.err().unwrap();
    assert!(matches!(error, StoreError::Schema { .. }), "{error}");
    let other = tempfile::tempdir().unwrap();
    std::fs::write(
        other.path().join("c.sqlite"),
        "no database at all, but long enough to be read as one".repeat(99),
    )
    .unwrap();
    assert!(open(other.path()).await.is_err());
}

#[tokio::test]
async fn the_records_of_the_first_schema_are_read_after_the_migration() {
    let folder = tempfile::tempdir().unwrap();
    let store = begun(folder.path()).await;
    store.keep(&commit(1, 0, false)).await.unwrap();
    for statement in [
        "ALTER TABLE rounds DROP COLUMN aggregation",
        "ALTER TABLE tasks DROP COLUMN clipping_norm",
        "ALTER TABLE tasks DROP COLUMN protection",
        "DROP TABLE privacy_ledger",
        "DELETE FROM _sqlx_migrations WHERE version >= 2",
    ] {
        sqlx::query(statement).execute(&store.pool).await.unwrap();
    }
    drop(store);
    let store = open(folder.path()).await.unwrap();
    let record =
        RoundRecord { aggregation: AggregationRecord::default(), ..commit(1, 0, false).record.unwrap() };
    assert_eq!(store.rounds(&name("lora")).await.unwrap(), [record]);
    assert_eq!(store.task(&name("lora")).await.unwrap().unwrap().progress.unwrap().clipping_norm, None);
    assert!(store.charges(&name("lora")).await.unwrap().is_empty());
}

#[tokio::test]
async fn one_process_serves_and_another_may_look() {
    let folder = tempfile::tempdir().unwrap();
    let store = begun(folder.path()).await;
    store.keep(&commit(0, 0, false)).await.unwrap();
    assert!(matches!(open(folder.path()).await.err(), Some(StoreError::InUse { .. })));
    let reader = Store::open_to_read(&storage(folder.path()), &name("roles")).await.unwrap();
    assert_eq!(reader.tasks().await.unwrap().len(), 1);
    assert!(reader.begin_task(&name("other"), 1, UnixMillis(0)).await.is_err());
    assert!(Store::open_to_read(&storage(&folder.path().join("nowhere")), &name("roles")).await.is_err());
}

#[tokio::test]
async fn populations_do_not_mix() {
    let folder = tempfile::tempdir().unwrap();
    begun(folder.path()).await;
    let store = Store::open(&storage(folder.path()), &name("others")).await.unwrap();
    assert!(store.tasks().await.unwrap().is_empty());
}
