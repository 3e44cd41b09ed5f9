//! What the owner of a device allows, and the ways a charge can be over it.

use crate::{
    account::{Delta, ORDERS, RdpCurve, epsilon_at},
    mechanism::PrivacyPlan,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What a contribution is for; each has a budget of its own within the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Updates of a model.
    Training,
    /// Metrics of a model on local data.
    Evaluation,
    /// How the device and the app fare.
    Telemetry,
}

impl Purpose {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Training, Self::Evaluation, Self::Telemetry];

    /// Its word in records.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Evaluation => "evaluation",
            Self::Telemetry => "telemetry",
        }
    }

    pub(super) fn index(self) -> usize {
        usize::from(self.number())
    }

    pub(super) fn number(self) -> u8 {
        match self {
            Self::Training => 0,
            Self::Evaluation => 1,
            Self::Telemetry => 2,
        }
    }

    pub(super) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|purpose| purpose.number() == number)
    }
}

/// The device's bounds on what it gives away. All epsilons are at `delta`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrivacyPolicy {
    /// True if the device takes part only with differential privacy.
    pub required: bool,
    /// Delta of its bounds, and the largest of a plan.
    pub delta: Delta,
    /// Most that one task's plan may cost with all its participations.
    pub epsilon_task_max: f64,
    /// Most that each purpose may cost over the device's life: training, evaluation, telemetry.
    pub epsilon_purpose_max: [f64; 3],
    /// Most that everything may cost over the device's life.
    pub epsilon_max: f64,
    /// Least time between two contributions to a task, milliseconds, whatever a plan says.
    pub separation_ms_min: u64,
    /// Takes part in simulations whose noise protects nobody.
    pub insecure_noise_cohort: bool,
}

impl Default for PrivacyPolicy {
    fn default() -> Self {
        Self {
            required: false,
            delta: Delta::new(1e-6).expect("a probability"),
            epsilon_task_max: 10.0,
            epsilon_purpose_max: [20.0, 2.0, 2.0],
            epsilon_max: 20.0,
            separation_ms_min: 0,
            insecure_noise_cohort: false,
        }
    }
}

/// Why a device does not take part.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum LedgerError {
    /// The plan has no differential privacy and the policy demands it.
    #[error("plan refused: it has no differential privacy, and this device demands it")]
    NotPrivate,
    /// The plan's noise is an imagined cohort's.
    #[error("plan refused: its noise is that of an imagined cohort of {cohort}, which protects nobody")]
    NoiseCohort {
        /// The cohort imagined.
        cohort: u32,
    },
    /// The plan's delta is too large.
    #[error("plan refused: delta {planned:e}; this device allows {max:e}")]
    Delta {
        /// The plan's.
        planned: f64,
        /// The device's.
        max: f64,
    },
    /// The plan may cost too much.
    #[error("plan refused: epsilon {planned:.3} over its participations; this device allows {max}")]
    Task {
        /// The plan's, at the device's delta.
        planned: f64,
        /// The device's bound.
        max: f64,
    },
    /// The task has had all that it may cost.
    #[error("the task's budget is epsilon {max}; with this contribution it would be {after:.3}")]
    TaskBudget {
        /// The bound.
        max: f64,
        /// Epsilon afterwards.
        after: f64,
    },
    /// The task went on with privacy before and now has none.
    #[error("plan refused: this task had differential privacy before and has none now")]
    PrivacyDropped,
    /// All participations are taken.
    #[error("no participation is left: {taken} of {max} taken")]
    Participations {
        /// Charged so far.
        taken: u32,
        /// Allowed.
        max: u32,
    },
    /// The round is too near to the last one taken part in, or before it.
    #[error("round {round} refused: the next that this device takes part in is {next}")]
    Rounds {
        /// The round asked for.
        round: u32,
        /// The least that is allowed.
        next: u32,
    },
    /// Too little time has passed.
    #[error("the next participation is due in {wait_ms} ms")]
    Separation {
        /// Time left.
        wait_ms: u64,
    },
    /// A budget over the device's life would be passed.
    #[error("privacy budget of {what} is {max}; with this contribution it would be {after:.3}")]
    Budget {
        /// `training`, `evaluation`, `telemetry` or `the device`.
        what: &'static str,
        /// The bound.
        max: f64,
        /// Epsilon afterwards.
        after: f64,
    },
    /// Too many tasks to remember.
    #[error("the ledger holds {max} tasks and forgets none")]
    Scopes {
        /// The bound.
        max: usize,
    },
}

impl PrivacyPolicy {
    /// Holds a plan against the policy, before any work is done for it.
    ///
    /// # Errors
    /// [`LedgerError`] names what the device does not allow.
    pub fn check_plan(&self, plan: Option<&PrivacyPlan>) -> Result<(), LedgerError> {
        let Some(plan) = plan else {
            return if self.required { Err(LedgerError::NotPrivate) } else { Ok(()) };
        };
        if let Some(imagined) = &plan.parameters().noise_cohort {
            let cohort = imagined.cohort;
            return if self.insecure_noise_cohort {
                Ok(())
            } else {
                Err(LedgerError::NoiseCohort { cohort })
            };
        }
        let (planned, max) = (plan.parameters().delta.value(), self.delta.value());
        if planned > max {
            return Err(LedgerError::Delta { planned, max });
        }
        let max = self.epsilon_task_max;
        let planned = filtered_epsilon(&plan.task_curve(), max, self.delta);
        if planned > max { Err(LedgerError::Task { planned, max }) } else { Ok(()) }
    }

    pub(super) fn check_task(&self, after: &RdpCurve) -> Result<(), LedgerError> {
        let max = self.epsilon_task_max;
        let after = filtered_epsilon(after, max, self.delta);
        if after > max { Err(LedgerError::TaskBudget { max, after }) } else { Ok(()) }
    }

    pub(super) fn check_budget(
        &self,
        purpose: Purpose,
        after: &RdpCurve,
        all: &RdpCurve,
    ) -> Result<(), LedgerError> {
        let own = (purpose.word(), self.epsilon_purpose_max[purpose.index()], after);
        for (what, max, curve) in [own, ("the device", self.epsilon_max, all)] {
            let after = filtered_epsilon(curve, max, self.delta);
            if after > max {
                return Err(LedgerError::Budget { what, max, after });
            }
        }
        Ok(())
    }
}

/// Epsilon of a curve at the one order that a budget of `max` is kept at. A budget over plans that may be chosen
/// after seeing earlier results is a filter, and a Rényi filter holds at an order that is fixed beforehand
/// (Feldman and Zrnic 2021, "Individual Privacy Accounting via a Rényi Filter"), not at whichever order suits the
/// result. The order is the best one for a curve that is linear in the order and spends just the budget.
fn filtered_epsilon(curve: &RdpCurve, max: f64, delta: Delta) -> f64 {
    if curve.values().iter().all(|v| *v == 0.0) {
        return 0.0;
    }
    if !max.is_finite() {
        return 0.0;
    }
    let order = filter_order(max, delta);
    let at = ORDERS.iter().position(|candidate| *candidate == order).unwrap_or(0);
    epsilon_at(f64::from(order), curve.values()[at], delta)
}

fn filter_order(max: f64, delta: Delta) -> u32 {
    let linear = |rho: f64| RdpCurve::from_fn(|order| rho * f64::from(order)).epsilon(delta);
    let (mut low, mut high) = (1e-9f64, 1e4f64);
    for _ in 0..60 {
        let middle = (low * high).sqrt();
        if linear(middle).0 <= max { low = middle } else { high = middle }
    }
    linear(low).1
}
