//! The coordinator's side of a session: it gathers keys, splits large rounds into cohorts, carries sealed
//! shares between neighbours, adds masked vectors on arrival, and removes from their sum the masks whose
//! seeds the survivors let it rebuild.
//!
//! It holds one vector a cohort, whatever the number of devices, and never an unmasked one: what it adds up
//! is uniform until the whole set of survivors is unmasked at once.

mod cohort;
mod gathering;
mod opening;

pub use cohort::{Cohort, CohortFailure, CohortStep, DropoutCounts, StepError, Taken};
pub use gathering::{AdmitError, CohortPlan, Gathering, Seat};
pub use opening::{OpenError, Opened, Opening, Suspicion};
