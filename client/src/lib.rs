//! The crate a device embeds: local training, contribution and release slots behind a few traits.
//!
//! An app gives an [`App`] (its user's text, when the device may work, what the user agreed to) and a
//! [`Transport`], builds a [`Client`] with [`ClientBuilder`] and runs it on a thread of its own.
//! `examples/embed.rs` is a whole app. The protocol's decisions are made in `fleetune_proto::device`;
//! this crate is its disk, its network and its trainer.

mod app;
mod client;
mod clock;

mod transport;

#[cfg(feature = "grpc")]
pub mod grpc;

pub mod data;
pub mod training;

pub mod blobs;
mod fetch;
pub mod files;
pub mod identity;
pub mod release;
mod state;

#[cfg(test)]
mod fixture;

pub use app::{App, Conditions, Consent, ExampleError, ExampleSource};
pub use client::{Client, ClientBuilder, Step, privacy_ledger};
pub use clock::{Clock, SystemClock};
pub use fleetune_proto::device::{DeviceFloors, Event};
pub use fleetune_proto::{
    AggregationProtocol, CallFailure, Digest, FailureKind, Name, TaskOffer, TrustRoot, UnixMillis,
};
pub use fleetune_secagg::{Certificate, Registrars};
#[cfg(feature = "grpc")]
pub use grpc::{GrpcOptions, GrpcTransport};
pub use transport::Transport;
