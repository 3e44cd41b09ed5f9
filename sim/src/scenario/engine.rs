//! How the simulated devices compute.

use anyhow::Result;
use fleetune_model::train::{Precision, TrainerOptions};
use serde::{Deserialize, Serialize};

/// How the simulated devices compute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Engine {
    /// Factors of the large products: "f32", with which runs repeat bit for bit anywhere, or "bf16".
    pub precision: String,
}

impl Engine {
    /// The same for a trainer: one thread a device, as many devices at once as there are processors.
    pub fn options(&self) -> Result<TrainerOptions> {
        let precision = match self.precision.as_str() {
            "f32" => Precision::F32,
            "bf16" => Precision::Bf16,
            other => anyhow::bail!("engine.precision: {other:?}; f32 or bf16"),
        };
        Ok(TrainerOptions { precision, ..TrainerOptions::default() })
    }
}
