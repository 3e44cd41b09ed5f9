//! From a raw update to noised integers, and what they give away: clipping, rotation, rounding, noise,
//! accounting, ledgers, statements.
//!
//! Pure but for one thing: noise is keyed by the operating system, so that nobody else can. The stages are
//! types. Only [`clip`] makes a [`ClippedDelta`], only the exact norm check of [`IntegerBound::round`] makes a
//! [`BoundedVector`], only noise makes a [`NoisedVector`]; forgetting a stage does not compile. Tasks without
//! privacy go from [`ClippedDelta`] through [`FixedPoint`] and say so.

mod account;
mod adapt;
#[cfg(feature = "planning")]
pub mod audit;
mod bound;
mod clip;
mod encode;
mod ledger;
mod mechanism;
mod noise;
#[cfg(feature = "opendp")]
mod release;
mod rotate;
mod statement;
mod target;

pub use account::*;
pub use adapt::{BIT_UNITS, ClipAdaptation, noise_multiplier_beside_bit};
pub use bound::{BoundedVector, IntegerBound};
pub use clip::{ClipError, ClippedDelta, ClippingNorm, clip};
pub use encode::{EncodeError, EncodedDelta, FixedPoint};
pub use ledger::{
    Charge, ChargeId, Ledger, LedgerError, LedgerLine, PrivacyPolicy, Purpose, SCOPES_MAX, Scope,
    spent_epsilon,
};
pub use mechanism::{Mechanism, NoiseCohort, NoisedVector, PrivacyParameters, PrivacyPlan, PrivateMean};
pub use noise::{GridVariance, Law, NoiseError, NoiseOrigin, NoiseSource, NoiseTable};
#[cfg(feature = "opendp")]
pub use release::*;
pub use rotate::Rotation;
pub use statement::{DeviceGuarantee, Guarantee, PrivacyStatement, STATEMENT_VERSION, StatementParts};
pub use target::{AdaptationTarget, PrivacyTarget, clip_units};
