//! The crate a device embeds: local training, contribution and release slots behind a few traits.

pub mod data;
pub mod training;
