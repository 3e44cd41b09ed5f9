//! Privacy accounting: from a mechanism's parameters to (epsilon, delta), always from above.
//!
//! A device needs `convert`, `rdp` and `skellam` to hold a plan against its policy; everything
//! else is for people who plan a run and lies behind the feature `planning`.

pub(crate) use convert::epsilon_at;

mod convert;
mod discrete_gaussian;
#[cfg(feature = "planning")]
mod lora;
#[cfg(feature = "planning")]
mod matrix;
mod rdp;
mod skellam;

#[cfg(feature = "planning")]
mod calibrate;
#[cfg(feature = "planning")]
mod gaussian;
#[cfg(feature = "planning")]
mod loss;
#[cfg(feature = "planning")]
mod pld;
#[cfg(feature = "planning")]
mod subsampled;
#[cfg(feature = "planning")]
mod without_replacement;

pub use convert::{AccountError, Delta, zcdp_delta, zcdp_epsilon};
pub use discrete_gaussian::DistributedGaussian;
#[cfg(feature = "planning")]
pub use lora::{LoraNoise, LoraProduct, lora_noise};
#[cfg(feature = "planning")]
pub use matrix::{
    BufferedToeplitz, MatrixSensitivity, NoiseBuffers, Participation, TREE_PARTICIPATIONS_MAX,
    TREE_STEPS_MAX, Toeplitz, banded_sensitivity, tree_sensitivity, tree_single_epoch_sensitivity,
};
pub use rdp::{ORDERS, RdpCurve};
pub use skellam::Skellam;

#[cfg(feature = "planning")]
pub use calibrate::{noise_multiplier, noise_multiplier_zcdp};
#[cfg(feature = "planning")]
pub use gaussian::{discrete_gaussian_delta, gaussian_delta, gaussian_epsilon, gaussian_sigma};
#[cfg(feature = "planning")]
pub use pld::{LOSS_INTERVAL, PrivacyLoss};
#[cfg(feature = "planning")]
pub use subsampled::SubsampledGaussian;
#[cfg(feature = "planning")]
pub use without_replacement::FixedCohortGaussian;

#[cfg(test)]
pub(crate) mod known;
