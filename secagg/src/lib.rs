//! Secure-aggregation arithmetic: vectors over the ring of integers mod 2^b, their wire form and
//! their running sum.
//!
//! Pure: no I/O, no clock, no randomness, nothing of the other crates. What a device uploads and
//! what the coordinator adds is always a [`RingVector`], also under the plaintext protocol, so
//! that masks enter between the two without changing either side.

mod ring;
mod sum;

pub use ring::{RingBits, RingError, RingVector};
pub use sum::RunningSum;
