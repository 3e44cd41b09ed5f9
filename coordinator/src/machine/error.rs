//! Why a task or a release cannot be taken up, and the way from an error to a failed call.

use crate::optimizer::OptimizerError;
use fleetune_model::error::AdapterError;
use fleetune_proto::{CallFailure, FailureKind, Name, WireError};
use fleetune_secagg::ParameterError;
use thiserror::Error;

/// A task or release that the core does not take up.
#[derive(Debug, Error)]
pub enum CoreError {
    /// Two tasks of one name.
    #[error("task {0}: added twice")]
    Duplicate(Name),
    /// More tasks than a policy carries.
    #[error("task {task}: a population has at most {max} tasks")]
    TooMany {
        /// The task that is one too many.
        task: Name,
        /// The bound.
        max: usize,
    },
    /// The plan would be refused by every device.
    #[error("task {task}: {source}")]
    Plan {
        /// The task.
        task: Name,
        /// The field at fault.
        source: WireError,
    },
    /// The round's numbers contradict each other or the plan.
    #[error("task {task}: round policy: {problem}")]
    RoundPolicy {
        /// The task.
        task: Name,
        /// The rule that is broken.
        problem: &'static str,
    },
    /// The privacy asked for cannot be had.
    #[error("task {task}: privacy: {problem}")]
    Privacy {
        /// The task.
        task: Name,
        /// What stands against it.
        problem: String,
    },
    /// No degree and threshold of secure aggregation fit a cohort's size.
    #[error("task {task}: secure aggregation: {source}")]
    Cohort {
        /// The task.
        task: Name,
        /// What does not fit.
        source: ParameterError,
    },
    /// The server optimizer cannot be used.
    #[error("task {task}: {source}")]
    Optimizer {
        /// The task.
        task: Name,
        /// What is wrong.
        source: OptimizerError,
    },
    /// The adapter does not fit the base model, or the progress does not fit the adapter.
    #[error("task {task}: {source}")]
    Adapter {
        /// The task.
        task: Name,
        /// What is wrong.
        source: AdapterError,
    },
    /// The digest is not that of the base model.
    #[error("task {task}: base model digest {digest} is not the opened model's {opened}")]
    Base {
        /// The task.
        task: Name,
        /// The digest given.
        digest: String,
        /// The model's own.
        opened: String,
    },
    /// A release of another population.
    #[error("release {version}: for population {population}")]
    Release {
        /// Its version.
        version: u64,
        /// Its population.
        population: Name,
    },
}

/// A call that is wrong in itself.
pub(super) fn invalid(problem: &dyn std::fmt::Display) -> CallFailure {
    CallFailure::new(FailureKind::InvalidArgument, problem.to_string())
}

/// A call whose session is not known.
pub(super) fn unknown_session() -> CallFailure {
    CallFailure::new(FailureKind::Unauthenticated, "session_token: no such session")
}
