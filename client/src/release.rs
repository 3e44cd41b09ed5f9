//! Releases on the device: which one serves, the one before it, and the switch between them.
//!
//! `STATE/releases/VERSION/manifest` names the blobs of a release, `STATE/active` the release that serves.
//! That one small file is the whole switch: it is replaced as one, after the model has been opened and
//! asked. Whatever fails before leaves the old release serving.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fleetune_model::adapter::Adapter;
use fleetune_model::adapter_formats::from_gguf_lora;
use fleetune_model::base::BaseModel;
use fleetune_model::error::{AdapterError, ModelError};
use fleetune_model::eval::last_logits;
use fleetune_proto::{Digest, ReleaseManifest};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::blobs::{self, BlobStore};
use crate::files::{self, StoreError};

/// The pointer file holds three numbers, a manifest some hundred bytes.
const SMALL_FILE_BYTES_MAX: u64 = 64 << 10;

/// Why a release does not serve. The one before it does.
#[derive(Debug, Error)]
pub enum ReleaseError {
    /// An older release, or the same again: going back is an operator's new version.
    #[error("release {version} refused: version {version_max} was here")]
    Rollback {
        /// The version offered.
        version: u64,
        /// The highest that was ever accepted or refused here.
        version_max: u64,
    },
    /// The base model does not open.
    #[error("release {version}: base model: {source}")]
    Base {
        /// The release.
        version: u64,
        /// What is wrong.
        source: ModelError,
    },
    /// The adapter does not open, or is not for this base.
    #[error("release {version}: adapter: {source}")]
    Adapter {
        /// The release.
        version: u64,
        /// What is wrong.
        source: AdapterError,
    },
    /// The model opens and does not work.
    #[error("release {version}: {reason}")]
    SelfCheck {
        /// The release.
        version: u64,
        /// What is wrong.
        reason: String,
    },
    /// The state directory could not be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ReleaseError {
    /// True when the release itself is at fault, so that trying it again would end the same way.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::Rollback { .. } | Self::Base { .. } | Self::Adapter { .. } | Self::SelfCheck { .. } => true,
            Self::Store(_) => false,
        }
    }
}

/// What `STATE/active` says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseVersions {
    /// The release that serves.
    pub active: Option<u64>,
    /// The one before it, kept.
    pub previous: Option<u64>,
    /// The highest version ever accepted, or refused for good.
    pub version_max: u64,
}

/// A release that was opened and works.
#[derive(Debug)]
pub struct ReleasedModel {
    /// What was signed.
    pub manifest: ReleaseManifest,
    /// The quantized base; without an adapter the fully trained model.
    pub base: Arc<BaseModel>,
    /// The adapter beside it; the two are never merged. None when all weights were trained.
    pub adapter: Option<Adapter>,
}

/// The releases of one device.
#[derive(Debug)]
pub struct ReleaseSlots {
    state: PathBuf,
    blobs: BlobStore,
    versions: ReleaseVersions,
}

impl ReleaseSlots {
    /// The releases in a state directory, which is created if need be.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when the pointer file is not one, else what the system said.
    pub fn open(state: &Path) -> Result<Self, StoreError> {
        files::create_directory(&state.join("releases"))?;
        let blobs = BlobStore::open(blobs::in_state(state))?;
        let versions = read_pointer(&state.join("active"))?;
        Ok(Self { state: state.to_owned(), blobs, versions })
    }

    /// Which versions are here.
    #[must_use]
    pub fn versions(&self) -> ReleaseVersions {
        self.versions
    }

    /// Switches to a release whose blobs are held: opens it, asks it, and only then replaces the pointer.
    ///
    /// # Errors
    /// [`ReleaseError`]; the release before serves on.
    pub fn install(&mut self, manifest: &ReleaseManifest) -> Result<ReleasedModel, ReleaseError> {
        self.check_version(manifest.version)?;
        self.stage(manifest)?;
        let model = self.open_release(manifest.clone())?;
        self.switch(manifest.version)?;
        Ok(model)
    }

    /// Remembers a version that is not to be tried again.
    ///
    /// # Errors
    /// [`StoreError`] when the pointer cannot be written.
    pub fn reject(&mut self, version: u64) -> Result<(), StoreError> {
        let version_max = self.versions.version_max.max(version);
        self.point(ReleaseVersions { version_max, ..self.versions })
    }

    /// Forgets all releases but the active and the previous one, and all blobs but theirs and `needed`.
    ///
    /// # Errors
    /// [`StoreError`] when the system refuses.
    pub fn prune(&self, needed: &[Digest]) -> Result<(), StoreError> {
        let kept: Vec<u64> = self.versions.active.into_iter().chain(self.versions.previous).collect();
        for name in files::names_in(&self.state.join("releases"))? {
            let keep = name.parse().is_ok_and(|version: u64| kept.contains(&version));
            if !keep {
                let path = self.state.join("releases").join(name);
                fs::remove_dir_all(&path).map_err(|e| StoreError::io("remove", &path, e))?;
            }
        }
        let mut keep: BTreeSet<Digest> = needed.iter().copied().collect();
        for version in kept {
            let manifest = self.manifest(version)?;
            keep.extend(manifest.blobs());
        }
        self.blobs.retain(&keep)
    }

    /// The manifest of a release that is here.
    ///
    /// # Errors
    /// [`StoreError`] when it is not, or is damaged.
    pub fn manifest(&self, version: u64) -> Result<ReleaseManifest, StoreError> {
        let path = self.manifest_path(version);
        let bytes = files::read_if_there(&path, SMALL_FILE_BYTES_MAX)?;
        let bytes = bytes.ok_or_else(|| StoreError::damaged(&path, "missing"))?;
        let manifest =
            ReleaseManifest::parse(&bytes).map_err(|e| StoreError::damaged(&path, e.to_string()))?;
        if manifest.version != version {
            return Err(StoreError::damaged(&path, format!("the manifest of release {}", manifest.version)));
        }
        Ok(manifest)
    }

    /// The model that serves: the active release, or the previous one if the active one no longer opens.
    /// None before the first release.
    ///
    /// # Errors
    /// Why the active release does not open, when there is no other.
    pub fn open_model(&self) -> Result<Option<ReleasedModel>, ReleaseError> {
        let Some(active) = self.versions.active else { return Ok(None) };
        let failed = match self.open_version(active) {
            Ok(model) => return Ok(Some(model)),
            Err(error) => error,
        };
        let Some(previous) = self.versions.previous else { return Err(failed) };
        tracing::warn!(release = active, error = %failed, "the active release does not open; the previous one serves");
        self.open_version(previous).map(Some).map_err(|_| failed)
    }

    fn check_version(&self, version: u64) -> Result<(), ReleaseError> {
        let version_max = self.versions.version_max;
        if version <= version_max { Err(ReleaseError::Rollback { version, version_max }) } else { Ok(()) }
    }

    fn stage(&self, manifest: &ReleaseManifest) -> Result<(), StoreError> {
        let path = self.manifest_path(manifest.version);
        files::create_directory(path.parent().unwrap_or(&self.state))?;
        files::write_atomically(&path, &manifest.to_bytes())
    }

    fn switch(&mut self, version: u64) -> Result<(), StoreError> {
        let previous = self.versions.active;
        self.point(ReleaseVersions { active: Some(version), previous, version_max: version })
    }

    fn point(&mut self, versions: ReleaseVersions) -> Result<(), StoreError> {
        let text = serde_json::to_string(&versions).expect("three numbers are JSON");
        files::write_atomically(&self.state.join("active"), text.as_bytes())?;
        self.versions = versions;
        Ok(())
    }

    fn open_version(&self, version: u64) -> Result<ReleasedModel, ReleaseError> {
        self.open_release(self.manifest(version)?)
    }

    fn open_release(&self, manifest: ReleaseManifest) -> Result<ReleasedModel, ReleaseError> {
        let version = manifest.version;
        let base = BaseModel::open(&self.blobs.path(manifest.base_model))
            .map_err(|source| ReleaseError::Base { version, source })?;
        if base.sha256 != manifest.base_model.sha256 {
            let path = self.blobs.path(manifest.base_model);
            let reason = format!("the bytes have SHA-256 {}", hex::encode(base.sha256));
            return Err(StoreError::damaged(&path, reason).into());
        }
        let adapter = match manifest.adapter {
            Some(adapter) => {
                let bytes = self.blobs.read(adapter)?;
                let adapter = from_gguf_lora(&bytes, &base);
                Some(adapter.map_err(|source| ReleaseError::Adapter { version, source })?)
            }
            None => None,
        };
        check_answer(version, &base, adapter.as_ref())?;
        Ok(ReleasedModel { manifest, base: Arc::new(base), adapter })
    }

    fn manifest_path(&self, version: u64) -> PathBuf {
        self.state.join("releases").join(version.to_string()).join("manifest")
    }
}

/// One token through the whole model: weights that give no numbers are found before they serve.
fn check_answer(version: u64, base: &BaseModel, adapter: Option<&Adapter>) -> Result<(), ReleaseError> {
    let refused = |reason: String| ReleaseError::SelfCheck { version, reason };
    let first = base.tokenizer.bos().unwrap_or(0);
    let logits = last_logits(base, adapter, &[first]).map_err(|e| refused(e.to_string()))?;
    match logits.iter().position(|logit| !logit.is_finite()) {
        Some(token) => Err(refused(format!("the logit of token {token} is {}", logits[token]))),
        None => Ok(()),
    }
}

fn read_pointer(path: &Path) -> Result<ReleaseVersions, StoreError> {
    let Some(bytes) = files::read_if_there(path, SMALL_FILE_BYTES_MAX)? else {
        return Ok(ReleaseVersions::default());
    };
    serde_json::from_slice(&bytes).map_err(|e| StoreError::damaged(path, e.to_string()))
}

#[cfg(test)]
mod tests;
