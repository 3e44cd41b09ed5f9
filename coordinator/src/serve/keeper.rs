//! Keeps deadlines and commits, and opens sums: the one writer of the store.

use super::{ServeError, clock, shell::Shell};
use crate::{OpeningWork, SumCharge, limits::TICK_MS_MAX};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

/// Runs until told to stop; what is on offer then is still kept.
pub(super) async fn run(shell: Arc<Shell>, mut stopping: watch::Receiver<bool>) -> Result<(), ServeError> {
    let mut uncharged = None;
    loop {
        let stop = *stopping.borrow_and_update();
        let next = shell.with_core(|core, now| {
            core.handle_timeout(now);
            core.poll_timeout()
        })?;
        open_sums(&shell, &mut uncharged).await?;
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

/// Takes the masks off, away from the core's lock and the async threads: it may take seconds. A sum whose
/// charge cannot be written (a full disk) stays masked, and is tried again at the next turn.
async fn open_sums(shell: &Arc<Shell>, uncharged: &mut Option<OpeningWork>) -> Result<(), ServeError> {
    loop {
        let held = match uncharged.take() {
            Some(work) => Some(work),
            None => shell.with_core(|core, _| core.poll_opening())?,
        };
        let Some(work) = held else { return Ok(()) };
        if let Some(charge) = work.charge() {
            if let Err(error) = shell.store.charge(charge, clock::now()).await {
                let (task, round) = (&charge.task, charge.round);
                tracing::error!(%task, round, %error, "privacy charge not kept; the sum stays masked");
                *uncharged = Some(work);
                return Ok(());
            }
            let SumCharge { task, round, survivors, rho, epsilon, delta, .. } = charge;
            tracing::info!(%task, round, survivors, rho, epsilon, delta, "sum charged");
        }
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let opened = tokio::task::spawn_blocking(move || work.run(threads)).await;
        let opened = opened.map_err(|_| ServeError::Panicked)?;
        shell.with_core(|core, now| core.handle_opened(opened, now))?;
    }
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
