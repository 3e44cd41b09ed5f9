//! A release: the model that devices of a population may run.

use crate::{
    digest::Digest,
    error::{self, WireError, within},
    limits::ROUNDS_MAX,
    name::Name,
    time::UnixMillis,
    wire,
};
use prost::Message;

/// Base and adapter of one release, or one fully trained model. Base and adapter are never merged: a merge into a
/// 4-bit base keeps a tenth of the update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseManifest {
    /// Population it is for.
    pub population: Name,
    /// Strictly increasing, from 1.
    pub version: u64,
    /// Task that trained it.
    pub task: Name,
    /// The quantized base model, a GGUF file; without an adapter the fully trained model, whole.
    pub base_model: Digest,
    /// The adapter, a GGUF LoRA file bound to the base; absent when all weights were trained.
    pub adapter: Option<Digest>,
    /// Rounds it was trained for.
    pub rounds: u32,
    /// When it was made.
    pub created: UnixMillis,
    /// Not to be installed after this time.
    pub expires: UnixMillis,
    /// What can be said of the privacy of those who trained it, in words.
    pub privacy_statement: String,
    /// The same for machines, as JSON; empty in releases of earlier versions.
    pub privacy_statement_json: String,
}

impl ReleaseManifest {
    /// Parses bytes whose signature has been verified.
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let wire: wire::ReleaseManifest = error::decode("ReleaseManifest", bytes)?;
        Ok(Self {
            population: Name::parse("manifest.population", &wire.population)?,
            version: within("manifest.version", wire.version, 1..=u64::MAX)?,
            task: Name::parse("manifest.task", &wire.task)?,
            base_model: Digest::parse("manifest.base_model", wire.base_model)?,
            adapter: wire
                .adapter
                .map(|adapter| Digest::parse("manifest.adapter", Some(adapter)))
                .transpose()?,
            rounds: within("manifest.rounds", wire.rounds, 1..=ROUNDS_MAX)?,
            created: UnixMillis(wire.created_unix_ms),
            expires: UnixMillis(wire.expires_unix_ms),
            privacy_statement: wire.privacy_statement,
            privacy_statement_json: wire.privacy_statement_json,
        })
    }

    /// The file that the task made: the adapter, or the model.
    #[must_use]
    pub fn trained(&self) -> Digest {
        self.adapter.unwrap_or(self.base_model)
    }

    /// Every blob that a device needs to run it.
    pub fn blobs(&self) -> impl Iterator<Item = Digest> {
        std::iter::once(self.base_model).chain(self.adapter)
    }

    /// The bytes to sign.
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::ReleaseManifest {
            population: self.population.as_str().into(),
            version: self.version,
            task: self.task.as_str().into(),
            base_model: Some(self.base_model.to_wire()),
            adapter: self.adapter.map(Digest::to_wire),
            rounds: self.rounds,
            created_unix_ms: self.created.0,
            expires_unix_ms: self.expires.0,
            privacy_statement: self.privacy_statement.clone(),
            privacy_statement_json: self.privacy_statement_json.clone(),
        }
        .encode_to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_inverts_to_bytes_and_refuses_version_zero() {
        let mut manifest = ReleaseManifest {
            population: Name::parse("p", "roles").unwrap(),
            version: 3,
            task: Name::parse("t", "lora").unwrap(),
            base_model: Digest::of(b"base"),
            adapter: Some(Digest::of(b"adapter")),
            rounds: 16,
            created: UnixMillis(1),
            expires: UnixMillis(2),
            privacy_statement: "none".into(),
            privacy_statement_json: "{}".into(),
        };
        assert_eq!(ReleaseManifest::parse(&manifest.to_bytes()).unwrap(), manifest);
        let whole = ReleaseManifest { adapter: None, ..manifest.clone() };
        assert_eq!(ReleaseManifest::parse(&whole.to_bytes()).unwrap(), whole);
        assert_eq!((whole.trained(), manifest.trained()), (Digest::of(b"base"), Digest::of(b"adapter")));
        manifest.version = 0;
        assert!(ReleaseManifest::parse(&manifest.to_bytes()).is_err());
    }
}
