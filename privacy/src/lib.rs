//! From a raw update to bounded integers: clipping and fixed-point encoding.
//!
//! Pure. The stages are types: only [`clip`] makes a [`ClippedDelta`], only
//! [`FixedPoint::encode`] makes an [`EncodedDelta`], so forgetting a stage does not compile. Noise
//! takes its place between the two last stages; until then nothing here is differentially
//! private, and nothing says it is.

mod account;
#[cfg(feature = "planning")]
pub mod audit;
mod clip;
mod encode;

pub use account::*;
pub use clip::{ClipError, ClippedDelta, ClippingNorm, clip};
pub use encode::{EncodeError, EncodedDelta, FixedPoint};
