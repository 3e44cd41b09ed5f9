//! Fleets on one machine, running the shipped device and coordinator sides.

pub mod account;
pub mod baselines;
pub mod bench;
pub mod chat;
pub mod classify;
pub mod experiment;
pub mod fleet;
pub mod next_word;
pub mod pool;
pub mod pretrain;
pub mod quantize;
pub mod report;
pub mod run;
pub mod scenario;
pub mod tools;
