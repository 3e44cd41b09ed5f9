//! What happened in the core, for logs and progress. Nothing here is of a single device.

use super::commit::RoundRecord;
use fleetune_proto::{Digest, Name, UnixMillis, wire::ReleaseState};

/// One thing that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum CoreEvent {
    /// The first device of an attempt joined.
    RoundOpened {
        /// The task.
        task: Name,
        /// Round, from 0.
        round: u32,
        /// Attempt, from 0.
        attempt: u32,
    },
    /// An attempt ended; its commit is on offer.
    RoundEnded {
        /// The task.
        task: Name,
        /// What came of it.
        record: RoundRecord,
    },
    /// Progress is durable.
    Committed {
        /// The task.
        task: Name,
        /// The round to run next.
        round: u32,
        /// The adapter it starts from.
        checkpoint: Digest,
    },
    /// Progress could not be made durable; it is kept and offered again.
    CommitFailed {
        /// The task.
        task: Name,
        /// When it is offered again.
        retry_at: UnixMillis,
    },
    /// A release is on offer to devices.
    ReleasePublished {
        /// The task.
        task: Name,
        /// Its version.
        version: u64,
        /// Its adapter, a GGUF file.
        adapter: Digest,
    },
    /// A device reported a release state.
    ReleaseReported {
        /// The release.
        version: u64,
        /// What happened on the device.
        state: ReleaseState,
    },
    /// The task has run all its rounds.
    TaskFinished {
        /// The task.
        task: Name,
    },
    /// The task's plan is void before its rounds were run.
    TaskExpired {
        /// The task.
        task: Name,
        /// The round that was due.
        round: u32,
    },
}
