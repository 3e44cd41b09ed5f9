//! The protocol between devices and the coordinator: schema, typed values, and both sans-io state
//! machines.
//!
//! Nothing here owns a socket, a clock, a thread, a file or a random source. Time comes in as
//! [`UnixMillis`], randomness as a seed. The `client` and `server` features add tonic's stubs.

pub mod wire;

mod digest;
mod error;
mod limits;
mod manifest;
mod name;
mod plan;
mod policy;
mod rpc;
mod session;
mod sign;
mod time;

pub mod device;
pub mod round;
pub mod secure;
pub mod transfer;

pub use digest::Digest;
pub use error::WireError;
pub use limits::*;
pub use manifest::ReleaseManifest;
pub use name::Name;
pub use plan::{
    AdapterPlan, AggregationPlan, LoraShape, Optimizer, SecurePlan, TaskPlan, TrainedShape, TrainingPlan,
    rotation_context,
};
pub use policy::{PopulationPolicy, TaskOffer};
pub use rpc::{CallFailure, FailureKind, Reaction};
pub use session::SessionToken;
pub use sign::{Purpose, SignatureError, TrustRoot, seal};
pub use time::UnixMillis;
pub use wire::AggregationProtocol;
