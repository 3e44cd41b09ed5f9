//! What a device never goes below, whatever a signed plan says.

use crate::{digest::Digest, plan::TaskPlan, wire::AggregationProtocol};
use fleetune_privacy::{LedgerError, PrivacyPolicy};
use fleetune_secagg::Floors;
use thiserror::Error;

/// The device's own bounds. A coordinator that signs a worse plan gets no update.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceFloors {
    /// Aggregation protocols that its owner allows. Secure aggregation by default: the plaintext protocol
    /// must be allowed by name.
    pub protocols: Vec<AggregationProtocol>,
    /// Fewest contributions in any sum.
    pub summands_min: u32,
    /// Largest clipping norm.
    pub clipping_norm_max: f32,
    /// Largest base model, bytes.
    pub base_model_bytes_max: u64,
    /// Most optimizer steps a round.
    pub steps_max: u32,
    /// Cohort, threshold and survivors of secure aggregation.
    pub secure: Floors,
    /// What may be given away.
    pub privacy: PrivacyPolicy,
}

impl Default for DeviceFloors {
    fn default() -> Self {
        Self {
            protocols: vec![AggregationProtocol::SecaggPlus],
            summands_min: 2,
            clipping_norm_max: 100.0,
            base_model_bytes_max: 1 << 30,
            steps_max: 1000,
            secure: Floors::default(),
            privacy: PrivacyPolicy::default(),
        }
    }
}

/// Which floor a plan is below.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum FloorError {
    /// The protocol is not allowed here.
    #[error("plan refused: aggregation protocol {0:?} is not allowed on this device")]
    Protocol(AggregationProtocol),
    /// The sum may be of too few devices.
    #[error("plan refused: sums of {planned} contributions; this device demands {floor}")]
    Summands {
        /// The plan's minimum.
        planned: u32,
        /// The device's.
        floor: u32,
    },
    /// The clipping norm is too large.
    #[error("plan refused: clipping norm {planned}; this device allows {max}")]
    ClippingNorm {
        /// The plan's norm.
        planned: f32,
        /// The device's.
        max: f32,
    },
    /// The base model is too large.
    #[error("plan refused: base model {digest} of {bytes} bytes; this device allows {max}", bytes = digest.size)]
    BaseModel {
        /// The model.
        digest: Digest,
        /// The device's bound.
        max: u64,
    },
    /// Too much work.
    #[error("plan refused: {planned} optimizer steps; this device allows {max}")]
    Steps {
        /// The plan's steps.
        planned: u32,
        /// The device's bound.
        max: u32,
    },
    /// It counts on the noise of devices that may collude.
    #[error(
        "plan refused: it discounts the noise of {planned} colluders a cohort; this device demands {floor}"
    )]
    Colluders {
        /// The plan's number.
        planned: u32,
        /// The device's.
        floor: u32,
    },
    /// It gives too much away.
    #[error(transparent)]
    Privacy(#[from] LedgerError),
}

impl DeviceFloors {
    /// The floors of a session: the device's own and those of the signed plan, whichever are higher. A
    /// coordinator cannot go below the plan that it shows to everybody.
    pub(super) fn secure_floors(&self, plan: &TaskPlan) -> Floors {
        let own = &self.secure;
        let survivors_min = own.survivors_min.max(self.summands_min).max(plan.aggregation.summands_min);
        let Some(secure) = &plan.aggregation.secure else { return Floors { survivors_min, ..*own } };
        let assumed = &secure.assumptions;
        Floors {
            survivors_min,
            corrupted_permille: own.corrupted_permille.max(assumed.corrupted_permille),
            sigma: own.sigma.max(assumed.sigma),
            sparse_dropout_permille: own.sparse_dropout_permille.min(assumed.dropout_permille),
            members_max: own.members_max.min(secure.cohort_max),
            ..*own
        }
    }

    /// The plan must not count on the noise of more devices than this device's owner believes honest.
    fn check_colluders(&self, plan: &TaskPlan) -> Result<(), FloorError> {
        let (Some(privacy), Some(secure)) = (&plan.aggregation.privacy, &plan.aggregation.secure) else {
            return Ok(());
        };
        let share = u64::from(secure.assumptions.corrupted_permille.max(self.secure.corrupted_permille));
        let floor = u32::try_from(u64::from(secure.cohort_max) * share / 1000).unwrap_or(u32::MAX);
        let planned = privacy.colluders_max;
        if planned < floor { Err(FloorError::Colluders { planned, floor }) } else { Ok(()) }
    }

    /// Holds a plan against the floors.
    pub fn check(&self, plan: &TaskPlan) -> Result<(), FloorError> {
        let (aggregation, steps) = (&plan.aggregation, plan.training.steps);
        if !self.protocols.contains(&aggregation.protocol) {
            return Err(FloorError::Protocol(aggregation.protocol));
        }
        if aggregation.summands_min < self.summands_min {
            return Err(FloorError::Summands { planned: aggregation.summands_min, floor: self.summands_min });
        }
        let varying = aggregation.privacy.and_then(|privacy| privacy.adaptation);
        let largest = varying.map_or(0.0, |adaptation| adaptation.norms().1.value());
        let (planned, max) = (aggregation.clipping_norm.value().max(largest), self.clipping_norm_max);
        if planned > max {
            return Err(FloorError::ClippingNorm { planned, max });
        }
        if plan.base_model.size > self.base_model_bytes_max {
            return Err(FloorError::BaseModel { digest: plan.base_model, max: self.base_model_bytes_max });
        }
        if steps > self.steps_max {
            return Err(FloorError::Steps { planned: steps, max: self.steps_max });
        }
        self.check_colluders(plan)?;
        Ok(self.privacy.check_plan(plan.privacy_plan().as_ref())?)
    }
}
