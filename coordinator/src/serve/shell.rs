//! What all calls share: the core behind its lock, the store, and the bounds on what goes on at once.

use super::{ServeError, clock};
use crate::{Core, CoreEvent, RoundOutcome, config::Listen, store::Store};
use fleetune_proto::{CallFailure, Digest, FailureKind, UnixMillis};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
};
use tokio::sync::{Notify, Semaphore};
use tonic::{Code, Response, Status};

pub(super) struct Shell {
    core: Mutex<Core>,
    pub(super) store: Store,
    /// Base models, served from where the operator keeps them.
    pub(super) bases: BTreeMap<Digest, PathBuf>,
    /// Blobs whose bytes this process has hashed.
    pub(super) verified: Mutex<BTreeSet<Digest>>,
    pub(super) downloads: Arc<Semaphore>,
    /// Wakes the keeper when a call may have changed what it waits for.
    pub(super) wake: Notify,
    calls: Semaphore,
}

impl Shell {
    pub(super) fn new(core: Core, store: Store, bases: BTreeMap<Digest, PathBuf>, listen: &Listen) -> Self {
        Self {
            core: Mutex::new(core),
            store,
            verified: Mutex::new(bases.keys().copied().collect()),
            bases,
            downloads: Arc::new(Semaphore::new(listen.downloads_max)),
            wake: Notify::new(),
            calls: Semaphore::new(listen.calls_max),
        }
    }

    /// One call of the core, away from the async threads: adding a large update takes milliseconds.
    pub(super) async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        call: impl FnOnce(&mut Core, UnixMillis) -> Result<T, CallFailure> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let _permit = self
            .calls
            .try_acquire()
            .map_err(|_| Status::resource_exhausted("calls_max calls are under way"))?;
        let shell = self.clone();
        let answer = tokio::task::spawn_blocking(move || shell.with_core(call)).await;
        self.wake.notify_one();
        match answer {
            Ok(Ok(answer)) => answer.map(Response::new).map_err(|failure| status(&failure)),
            Ok(Err(_)) | Err(_) => Err(Status::unavailable("the coordinator is about to restart")),
        }
    }

    /// Runs the core under its lock, and logs what happened.
    pub(super) fn with_core<T>(&self, run: impl FnOnce(&mut Core, UnixMillis) -> T) -> Result<T, ServeError> {
        let mut core: MutexGuard<'_, Core> = self.core.lock().map_err(|_| ServeError::Panicked)?;
        let answer = run(&mut core, clock::now());
        let events = core.poll_events();
        drop(core);
        events.iter().for_each(log);
        Ok(answer)
    }
}

/// The table from a failure to gRPC's code; the device's reactions hang on it.
pub(super) fn status(failure: &CallFailure) -> Status {
    let code = match failure.kind {
        FailureKind::Unavailable => Code::Unavailable,
        FailureKind::DeadlineExceeded => Code::DeadlineExceeded,
        FailureKind::ResourceExhausted => Code::ResourceExhausted,
        FailureKind::Unauthenticated => Code::Unauthenticated,
        FailureKind::NotFound => Code::NotFound,
        FailureKind::FailedPrecondition => Code::FailedPrecondition,
        FailureKind::AlreadyExists => Code::AlreadyExists,
        FailureKind::InvalidArgument => Code::InvalidArgument,
        FailureKind::DataLoss => Code::DataLoss,
        FailureKind::Unimplemented => Code::Unimplemented,
        FailureKind::Internal => Code::Internal,
    };
    Status::new(code, failure.message.clone())
}

fn log(event: &CoreEvent) {
    match event {
        CoreEvent::RoundOpened { task, round, attempt } => {
            tracing::info!(%task, round, attempt, "round opened")
        }
        CoreEvent::RoundEnded { task, record } => {
            let (round, attempt, selected) = (record.round, record.attempt, record.selected);
            let (completed, withdrawn) = (record.completed, record.withdrawn);
            match &record.outcome {
                RoundOutcome::Finished => {
                    tracing::info!(%task, round, attempt, selected, completed, withdrawn, "round finished");
                }
                RoundOutcome::Failed(reason) => {
                    tracing::warn!(%task, round, attempt, selected, completed, withdrawn, reason, "round failed");
                }
            }
        }
        CoreEvent::Committed { task, round, checkpoint } => {
            tracing::info!(%task, round, %checkpoint, "checkpoint kept");
        }
        CoreEvent::CommitFailed { task, retry_at } => {
            tracing::warn!(%task, retry_at_unix_ms = retry_at.0, "checkpoint not kept; it is held and tried again");
        }
        CoreEvent::ReleasePublished { task, version, adapter } => {
            tracing::info!(%task, version, %adapter, "release published");
        }
        CoreEvent::ReleaseReported { version, state } => {
            tracing::debug!(version, state = state.as_str_name(), "release reported");
        }
        CoreEvent::TaskFinished { task } => tracing::info!(%task, "task finished"),
        CoreEvent::TaskExpired { task, round } => tracing::warn!(%task, round, "task expired"),
    }
}
