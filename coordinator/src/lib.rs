//! The coordinator: tasks, rounds, server optimizers, checkpoints and releases.
//!
//! The core ([`Core`]) is a value without a socket, a clock, a file or a random source of its own: calls
//! and times go in, answers, [`Commit`]s and [`CoreEvent`]s come out. The simulator runs it as it is. With
//! the feature `server` a shell stands around it: configuration, SQLite and blob store, gRPC.

pub mod limits;
pub mod optimizer;
pub mod privacy;

pub(crate) mod machine;

#[cfg(feature = "server")]
pub mod config;
#[cfg(feature = "server")]
pub mod serve;
#[cfg(feature = "server")]
pub mod store;

pub use machine::{
    AggregationRecord, CohortRecord, Commit, CommitId, Core, CoreError, CoreEvent, CoreSetup, OpenedCohort,
    OpeningWork, PacePolicy, PrivacyRecord, PublishedRelease, RoundOutcome, RoundRecord, SumCharge,
    TaskProgress, TaskSpec, TaskStatus,
};
pub use optimizer::ServerOptimizer;
pub use privacy::{NoiseSpec, PrivacySpec};
