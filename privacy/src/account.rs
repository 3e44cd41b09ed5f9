//! Privacy accounting: from a mechanism's parameters to (epsilon, delta), always from above.
//!
//! A device needs `convert`, `rdp` and `skellam` to hold a plan against its policy; everything
//! else is for people who plan a run and lies behind the feature `planning`.

mod convert;
mod discrete_gaussian;
mod rdp;
mod skellam;

pub use convert::{AccountError, Delta, zcdp_delta, zcdp_epsilon};
pub use discrete_gaussian::DistributedGaussian;
pub use rdp::{ORDERS, RdpCurve};
pub use skellam::Skellam;

#[cfg(test)]
pub(crate) mod known;
