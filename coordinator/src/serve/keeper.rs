//! Keeps deadlines and commits, and opens sums: the one writer of the store.

use super::{ServeError, clock, shell::Shell};
use crate::limits::TICK_MS_MAX;
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

/// Runs until told to stop; what is on offer then is still kept.
pub(super) async fn run(shell: Arc<Shell>, mut stopping: watch::Receiver<bool>) -> Result<(), ServeError> {
    loop {
        let stop = *stopping.borrow_and_update();
        let next = shell.with_core(|core, now| {
            core.handle_timeout(now);
            core.poll_timeout()
        })?;
        open_sums(&shell).await?;
        keep_commits(&shell).await?;
        if stop {
            return Ok(());
        }
        let wait = next.map_or(TICK_MS_MAX, |at| at.since(clock::now()).min(TICK_MS_MAX));
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(wait)) => {}
            () = shell.wake.notified() => {}
            _ = stopping.changed() => {}
        }
    }
}

/// Takes the masks off, away from the core's lock and the async threads: it may take seconds.
async fn open_sums(shell: &Arc<Shell>) -> Result<(), ServeError> {
    while let Some(work) = shell.with_core(|core, _| core.poll_opening())? {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let opened = tokio::task::spawn_blocking(move || work.run(threads)).await;
        let opened = opened.map_err(|_| ServeError::Panicked)?;
        shell.with_core(|core, now| core.handle_opened(opened, now))?;
    }
    Ok(())
}

async fn keep_commits(shell: &Shell) -> Result<(), ServeError> {
    while let Some(commit) = shell.with_core(|core, _| core.poll_commit())? {
        let (id, kept) = (commit.id, shell.store.keep(&commit).await);
        shell.with_core(|core, now| match &kept {
            Ok(()) => core.handle_committed(id, now),
            Err(error) => {
                tracing::error!(task = %commit.task, %error, "commit failed");
                core.handle_commit_failed(id, now);
            }
        })?;
    }
    Ok(())
}
