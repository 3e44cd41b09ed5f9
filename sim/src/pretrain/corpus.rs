//! Plain text as training data: documents, their tokens, and batches of blocks in a seeded order.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use fleetune_model::tokenizer::Tokenizer;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// Text files, read whole.
pub(super) struct Corpus {
    /// File names without folders, and the SHA-256 of each file.
    pub(super) files: Vec<(String, String)>,
    /// All documents: what stands between blank lines.
    pub(super) documents: Vec<String>,
}

impl Corpus {
    pub(super) fn read(paths: &[PathBuf]) -> anyhow::Result<Self> {
        let mut corpus = Self { files: Vec::new(), documents: Vec::new() };
        for path in paths {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read corpus {}", path.display()))?;
            corpus.files.push((file_name(path), hex::encode(Sha256::digest(text.as_bytes()))));
            corpus
                .documents
                .extend(text.split("\n\n").map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned));
        }
        ensure!(!corpus.documents.is_empty(), "the corpus holds no text");
        Ok(corpus)
    }

    /// Bytes of text, separators not counted.
    pub(super) fn bytes(&self) -> usize {
        self.documents.iter().map(String::len).sum()
    }

    /// One stream of ids in which `boundary` stands before each document and at the end.
    pub(super) fn ids(&self, tokenizer: &Tokenizer, boundary: u32) -> Vec<u32> {
        let mut ids = vec![boundary];
        for document in &self.documents {
            ids.extend(tokenizer.encode_ordinary(document));
            ids.push(boundary);
        }
        ids
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Consecutive blocks of `block_tokens + 1` ids that overlap by one; the remainder is dropped.
pub(super) fn blocks(ids: &[u32], block_tokens: usize) -> Vec<Vec<u32>> {
    ids.windows(block_tokens + 1).step_by(block_tokens).map(<[u32]>::to_vec).collect()
}

/// An endless supply of batches. In each epoch the stream is cut anew, from another first id, and the blocks
/// are shuffled.
pub(super) struct Batches<'a> {
    ids: &'a [u32],
    block_tokens: usize,
    order: Vec<usize>,
    rng: ChaCha8Rng,
}

impl<'a> Batches<'a> {
    /// Fails when the stream is too short for one block.
    pub(super) fn new(ids: &'a [u32], block_tokens: usize, seed: u64) -> anyhow::Result<Self> {
        ensure!(block_tokens > 0, "a block must hold at least one token");
        ensure!(
            ids.len() > 2 * block_tokens,
            "{} tokens are too few for blocks of {block_tokens}",
            ids.len()
        );
        Ok(Self { ids, block_tokens, order: Vec::new(), rng: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// `count` blocks of `block_tokens + 1` ids.
    pub(super) fn next(&mut self, count: usize) -> Vec<&'a [u32]> {
        (0..count).map(|_| self.next_block()).collect()
    }

    fn next_block(&mut self) -> &'a [u32] {
        if self.order.is_empty() {
            let first = self.rng.random_range(0..self.block_tokens);
            self.order = (first..self.ids.len() - self.block_tokens).step_by(self.block_tokens).collect();
            self.order.shuffle(&mut self.rng);
        }
        let start = self.order.pop().unwrap_or_default();
        &self.ids[start..=start + self.block_tokens]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_sees_every_block_once() {
        let ids: Vec<u32> = (0..100).collect();
        let mut batches = Batches::new(&ids, 10, 5).expect("long enough");
        batches.next(1);
        let blocks_left = batches.order.len();
        let mut seen = batches.next(blocks_left);
        seen.sort_unstable();
        assert!(batches.order.is_empty() && (8..=9).contains(&blocks_left));
        seen.dedup();
        assert_eq!(seen.len(), blocks_left);
        assert!(
            seen.iter().all(|block| block.len() == 11 && block.windows(2).all(|pair| pair[1] == pair[0] + 1))
        );
    }

    #[test]
    fn a_seed_gives_one_order() {
        let ids: Vec<u32> = (0..1000).collect();
        let draw = |seed| Batches::new(&ids, 10, seed).expect("long enough").next(300).concat();
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn too_little_text_is_refused() {
        assert!(Batches::new(&[1, 2, 3], 10, 0).is_err());
        assert!(Batches::new(&[1, 2, 3], 0, 0).is_err());
    }

    #[test]
    fn documents_stand_between_blank_lines() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "one\ntwo\n\n\n\nthree\n").expect("written");
        let corpus = Corpus::read(&[path]).expect("valid");
        assert_eq!(corpus.documents, ["one\ntwo", "three"]);
        assert_eq!((corpus.files[0].0.as_str(), corpus.bytes()), ("a.txt", 12));
    }
}
