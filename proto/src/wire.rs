//! The generated wire messages. Raw: everything that enters is parsed into the typed values of
//! this crate before it is used.

#![allow(
    missing_docs,
    clippy::pedantic,
    clippy::use_self,
    clippy::large_enum_variant,
    clippy::wildcard_enum_match_arm,
    unused_qualifications,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

include!(concat!(env!("OUT_DIR"), "/fleetune.v1.rs"));

/// The compiled schema with its annotations, as a serialized `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Shares are secret until the coordinator holds them: they do not reach a log.
impl std::fmt::Debug for RevealedShare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RevealedShare").field("peer", &self.peer).finish_non_exhaustive()
    }
}
