//! A fleet's text: users, their texts and the split into training, validation and test.
//!
//! Reads one user a line (JSONL, gzip or not), or a folder with one file a user; a device reads its
//! own single file with [`load_device`]. Everything is checked before anything is returned: a broken
//! line gives an error with file, line and reason, and no half-loaded data. Nothing here tokenizes but
//! [`blocks`]; the format is described in `docs/data.md`.

mod blocks;
mod device;
mod error;
mod folder;
mod jsonl;
mod limits;
mod record;
mod source;

use std::collections::BTreeSet;
use std::path::Path;

use sha2::{Digest, Sha256};

pub use blocks::{TEXT_SEPARATOR, blocks};
pub use device::load_device;
pub use error::{BadLine, DataError, LineError};
pub use limits::DataLimits;

/// Whether a user takes part in training or is only evaluated on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Group {
    /// The user's device trains.
    #[default]
    Train,
    /// The user is never trained on: how the model does on people it has not met.
    HeldOut,
}

/// One natural user: a device's whole text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserData {
    /// Unique in its data set; never sent anywhere.
    pub user: String,
    /// Trained on or held out.
    pub group: Group,
    /// Texts to train on, oldest first.
    pub train: Vec<String>,
    /// Texts for choices during training; may be empty.
    pub val: Vec<String>,
    /// Texts for the final figure; may be empty.
    pub test: Vec<String>,
}

impl UserData {
    /// The texts this user is evaluated on: a trained-on user's test texts, all texts of a held-out user.
    #[must_use]
    pub fn evaluation_texts(&self) -> Vec<&str> {
        match self.group {
            Group::Train => self.test.iter().map(String::as_str).collect(),
            Group::HeldOut => self.texts().collect(),
        }
    }

    /// Every text: training, validation, test.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.train.iter().chain(&self.val).chain(&self.test).map(String::as_str)
    }
}

/// All users of a fleet, in the order of the file (or of the sorted file names of a folder).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// At least one user; names are unique.
    pub users: Vec<UserData>,
    /// Names the content: equal for equal users, however they were stored (gzip, file or folder).
    pub sha256: [u8; 32],
    /// What the loader met and did not use, each once, sorted: `key "n_words"`, `file "notes.md"`.
    pub ignored: Vec<String>,
}

impl Dataset {
    /// Loads a `.jsonl` or `.jsonl.gz` file, or a folder with one `.txt` or `.jsonl` file a user.
    ///
    /// # Errors
    /// [`DataError`] for an unreadable or unsupported path, a bound that is passed, or bad lines.
    pub fn load(path: &Path) -> Result<Self, DataError> {
        Self::load_within(path, &DataLimits::default())
    }

    /// [`Dataset::load`] with the caller's own bounds.
    ///
    /// # Errors
    /// As [`Dataset::load`].
    pub fn load_within(path: &Path, limits: &DataLimits) -> Result<Self, DataError> {
        if path.is_dir() {
            return folder::load(path, limits);
        }
        let name = path.display().to_string();
        source::require_extension(path, &["jsonl", "jsonl.gz"])?;
        jsonl::load(&name, &source::read(path, limits)?, limits)
    }

    /// Loads JSONL bytes, gzip or not; `name` stands for the file in errors.
    ///
    /// # Errors
    /// As [`Dataset::load`].
    pub fn from_jsonl_bytes(name: &str, bytes: &[u8]) -> Result<Self, DataError> {
        let limits = DataLimits::default();
        jsonl::load(name, &source::inflate(name, bytes, &limits)?, &limits)
    }

    /// The users of one group, in order.
    pub fn group(&self, group: Group) -> impl Iterator<Item = &UserData> {
        self.users.iter().filter(move |user| user.group == group)
    }

    fn new(users: Vec<UserData>, ignored: BTreeSet<String>) -> Self {
        Self { sha256: content_sha256(&users), users, ignored: ignored.into_iter().collect() }
    }
}

/// Every string is length-prefixed and every list counted, so no two data sets share a byte stream.
fn content_sha256(users: &[UserData]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"fleetune-dataset-v1\0");
    for user in users {
        hash_text(&mut hash, &user.user);
        hash.update([u8::from(user.group == Group::HeldOut)]);
        for texts in [&user.train, &user.val, &user.test] {
            hash.update((texts.len() as u64).to_le_bytes());
            texts.iter().for_each(|text| hash_text(&mut hash, text));
        }
    }
    hash.finalize().into()
}

fn hash_text(hash: &mut Sha256, text: &str) {
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text.as_bytes());
}

#[cfg(test)]
mod tests;
