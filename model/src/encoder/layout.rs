//! The meaning of every value that a classifier trains: LoRA's factors layer by layer, then the head. One flat
//! vector, so that what averages, clips or masks an adapter does the same with a classifier.

use std::fmt::Write as _;
use std::ops::Range;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::config::{EncoderConfig, EncoderProjection, Pooling};
use crate::adapter::{Factor, RANK_MAX};
use crate::error::AdapterError;

/// More classes than anybody names by hand.
const LABELS_MAX: usize = 1 << 14;
/// Deviation of the head's first weights, as in transformers.
const HEAD_DEVIATION: f32 = 0.02;

/// What is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassifierConfig {
    /// The classes' names; a class's number is its place here.
    pub labels: Vec<String>,
    /// How a sequence becomes the vector that the head sees.
    pub pooling: Pooling,
    /// LoRA in every layer; `None` trains the head alone.
    pub lora: Option<EncoderLora>,
    /// Seed of the head's and of A's first values.
    pub init_seed: u64,
}

/// Which projections get a low-rank side branch (Hu et al. 2021) and how it is scaled.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderLora {
    /// Columns of B and rows of A.
    pub rank: usize,
    /// The branch is multiplied by `alpha / rank`.
    pub alpha: f32,
    /// The adapted projections, in any order, each once.
    pub targets: Vec<EncoderProjection>,
    /// Train B only and draw A from the seed (Sun et al. 2024, FFA-LoRA).
    pub freeze_a: bool,
}

impl EncoderLora {
    /// The factor in front of the branch.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }
}

/// What a stretch of the flat vector is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A factor of a projection: A is `[rank, in]`, B `[out, rank]`.
    Low {
        /// Encoder layer, from 0.
        layer: usize,
        /// The adapted projection.
        projection: EncoderProjection,
        /// Which factor.
        factor: Factor,
    },
    /// The head's weight, `[classes, hidden]`.
    HeadWeight,
    /// The head's bias, `[1, classes]`.
    HeadBias,
}

/// Where a part stands in the flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutEntry {
    /// What it is.
    pub part: Part,
    /// Its rows.
    pub rows: usize,
    /// Its columns.
    pub cols: usize,
    /// Its first value in the flat vector.
    pub offset: usize,
}

impl LayoutEntry {
    /// Its values in the flat vector.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.rows * self.cols
    }
}

/// The flat vector: layer by layer, projection by projection in the order of [`EncoderProjection::ALL`], A then B
/// (B alone with `freeze_a`); then the head's weight and its bias.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassifierLayout {
    config: ClassifierConfig,
    /// (out, in) of each projection, adapted or not.
    shapes: [(usize, usize); 6],
    layers: usize,
    hidden: usize,
    entries: Vec<LayoutEntry>,
    len: usize,
}

impl ClassifierLayout {
    /// Lays out the classifier of that model.
    ///
    /// # Errors
    /// [`AdapterError::Config`] for labels, rank, scale or targets out of range.
    pub fn new(model: &EncoderConfig, config: &ClassifierConfig) -> Result<Self, AdapterError> {
        let config = checked(config)?;
        let shapes = EncoderProjection::ALL.map(|projection| projection.shape(model));
        let (layers, hidden, classes) = (model.layers, model.hidden, config.labels.len());
        let mut layout = Self { config, shapes, layers, hidden, entries: Vec::new(), len: 0 };
        if let Some(lora) = layout.config.lora.clone() {
            for layer in 0..layers {
                for &projection in &lora.targets {
                    let (rows, cols) = shapes[projection as usize];
                    if !lora.freeze_a {
                        layout.push(Part::Low { layer, projection, factor: Factor::A }, (lora.rank, cols));
                    }
                    layout.push(Part::Low { layer, projection, factor: Factor::B }, (rows, lora.rank));
                }
            }
        }
        layout.push(Part::HeadWeight, (classes, hidden));
        layout.push(Part::HeadBias, (1, classes));
        Ok(layout)
    }

    fn push(&mut self, part: Part, (rows, cols): (usize, usize)) {
        self.entries.push(LayoutEntry { part, rows, cols, offset: self.len });
        self.len += rows * cols;
    }

    /// Values in the flat vector.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a head always has values")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Every trained part, in the order of the flat vector.
    #[must_use]
    pub fn entries(&self) -> &[LayoutEntry] {
        &self.entries
    }

    /// The settings it was made from, targets in order.
    #[must_use]
    pub fn config(&self) -> &ClassifierConfig {
        &self.config
    }

    /// Number of classes.
    #[must_use]
    pub fn classes(&self) -> usize {
        self.config.labels.len()
    }

    /// Whether it was made for a model of those sizes.
    #[must_use]
    pub fn fits(&self, model: &EncoderConfig) -> bool {
        let shapes = EncoderProjection::ALL.map(|projection| projection.shape(model));
        (self.shapes, self.layers, self.hidden) == (shapes, model.layers, model.hidden)
    }

    /// Where a factor stands; `None` if it is frozen or the projection is not adapted.
    #[must_use]
    pub fn find(&self, layer: usize, projection: EncoderProjection, factor: Factor) -> Option<Range<usize>> {
        let lora = self.config.lora.as_ref()?;
        let target = lora.targets.iter().position(|&target| target == projection)?;
        let pair = layer * lora.targets.len() + target;
        let index = match (lora.freeze_a, factor) {
            (false, Factor::A) => 2 * pair,
            (false, Factor::B) => 2 * pair + 1,
            (true, Factor::A) => return None,
            (true, Factor::B) => pair,
        };
        (layer < self.layers).then(|| self.entries[index].range())
    }

    /// The head's weight in the flat vector.
    #[must_use]
    pub fn head_weight(&self) -> Range<usize> {
        self.entries[self.entries.len() - 2].range()
    }

    /// The head's bias in the flat vector.
    #[must_use]
    pub fn head_bias(&self) -> Range<usize> {
        self.entries[self.entries.len() - 1].range()
    }

    /// A's first (and, if frozen, only) values, `[rank, in]`, uniform in plus or minus `1 / sqrt(in)`: the bound
    /// that PEFT's `kaiming_uniform(a = sqrt 5)` comes to. The same on every machine.
    ///
    /// # Panics
    /// When there is no LoRA.
    #[must_use]
    pub fn initial_a(&self, layer: usize, projection: EncoderProjection) -> Vec<f32> {
        let lora = self.config.lora.as_ref().expect("only an adapted projection has an A");
        let cols = self.shapes[projection as usize].1;
        let stream = 1 + (layer * EncoderProjection::ALL.len() + projection as usize) as u64;
        uniform(self.config.init_seed, stream, lora.rank * cols, 1.0 / (cols as f32).sqrt())
    }

    /// First values: A as in [`ClassifierLayout::initial_a`], B and the bias zero, the head's weight uniform with a
    /// deviation of 0.02.
    #[must_use]
    pub fn initial_values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.len];
        for entry in &self.entries {
            let out = &mut values[entry.range()];
            match entry.part {
                Part::Low { layer, projection, factor: Factor::A } => {
                    out.copy_from_slice(&self.initial_a(layer, projection));
                }
                Part::HeadWeight => {
                    let bound = HEAD_DEVIATION * 3f32.sqrt();
                    out.copy_from_slice(&uniform(self.config.init_seed, 0, out.len(), bound));
                }
                Part::Low { factor: Factor::B, .. } | Part::HeadBias => {}
            }
        }
        values
    }

    /// Hash of all that gives the values their meaning: two classifiers may be averaged if and only if it agrees.
    #[must_use]
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(self.description()).into()
    }

    /// The hashed text. The seed counts only where it decides A; the scale counts by its bits.
    fn description(&self) -> String {
        let ClassifierConfig { labels, pooling, lora, init_seed } = &self.config;
        let mut text = format!("fleetune-classifier-layout-v1\npooling {}\n", pooling.name());
        for label in labels {
            let _ = writeln!(text, "label {}", Value::from(label.as_str()));
        }
        if let Some(lora) = lora {
            let _ = writeln!(text, "rank {}\nalpha {:08x}", lora.rank, lora.alpha.to_bits());
            if lora.freeze_a {
                let _ = writeln!(text, "frozen A from seed {init_seed}");
            }
        }
        for LayoutEntry { part, rows, cols, offset } in &self.entries {
            let name = match part {
                Part::Low { layer, projection, factor } => {
                    format!("{layer} {} {factor:?}", projection.name())
                }
                Part::HeadWeight => "head weight".to_owned(),
                Part::HeadBias => "head bias".to_owned(),
            };
            let _ = writeln!(text, "{name} {rows} {cols} {offset}");
        }
        text
    }
}

/// Sorted targets and settings in range.
fn checked(config: &ClassifierConfig) -> Result<ClassifierConfig, AdapterError> {
    let refuse = |field, reason: String| Err(AdapterError::Config { field, reason });
    let mut config = config.clone();
    if !(2..=LABELS_MAX).contains(&config.labels.len()) {
        return refuse("labels", format!("{} is not in 2..={LABELS_MAX}", config.labels.len()));
    }
    let mut labels: Vec<_> = config.labels.iter().collect();
    labels.sort_unstable();
    if let Some(pair) = labels.windows(2).find(|pair| pair[0] == pair[1]) {
        return refuse("labels", format!("{:?} is named twice", pair[0]));
    }
    let Some(lora) = &mut config.lora else { return Ok(config) };
    if !(1..=RANK_MAX).contains(&lora.rank) {
        return refuse("rank", format!("{} is not in 1..={RANK_MAX}", lora.rank));
    }
    if !(lora.alpha.is_finite() && lora.alpha > 0.0) {
        return refuse("alpha", format!("{} is not a positive number", lora.alpha));
    }
    lora.targets.sort_unstable();
    if lora.targets.is_empty() {
        return refuse("targets", "none given".to_owned());
    }
    match lora.targets.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => refuse("targets", format!("{} is named twice", pair[0].name())),
        None => Ok(config),
    }
}

/// One stream a part, so that a part's first values do not depend on which others there are.
fn uniform(seed: u64, stream: u64, count: usize, bound: f32) -> Vec<f32> {
    let mut key = *b"fleetune classifier, seed/stream";
    key[8..16].copy_from_slice(&seed.to_le_bytes());
    key[16..24].copy_from_slice(&stream.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    // The upper 24 bits as a number in [0, 1), exact in single precision.
    let mut unit = || (rng.next_u32() >> 8) as f32 / (1u32 << 24) as f32;
    (0..count).map(|_| bound * (2.0 * unit() - 1.0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::fixtures::{classifier_config, tiny_config};

    fn layout(freeze_a: bool) -> ClassifierLayout {
        let config = classifier_config(&[EncoderProjection::Output, EncoderProjection::Query], freeze_a);
        ClassifierLayout::new(&tiny_config(), &config).unwrap()
    }

    #[test]
    fn entries_tile_the_vector_in_order() {
        for freeze_a in [false, true] {
            let layout = layout(freeze_a);
            let mut next = 0;
            for entry in layout.entries() {
                assert_eq!(entry.offset, next);
                next = entry.range().end;
                if let Part::Low { layer, projection, factor } = entry.part {
                    assert_eq!(layout.find(layer, projection, factor), Some(entry.range()));
                }
            }
            assert_eq!(layout.len(), next);
            assert_eq!(layout.head_bias().end, next);
            assert_eq!(layout.head_weight().end, layout.head_bias().start);
            assert_eq!(layout.find(0, EncoderProjection::Key, Factor::B), None);
            assert_eq!(layout.find(2, EncoderProjection::Query, Factor::B), None);
            assert_eq!(layout.find(0, EncoderProjection::Query, Factor::A).is_none(), freeze_a);
        }
    }

    #[test]
    fn first_values_change_nothing_yet() {
        let layout = layout(false);
        let values = layout.initial_values();
        assert!(
            values[layout.find(1, EncoderProjection::Query, Factor::B).unwrap()].iter().all(|x| *x == 0.0)
        );
        let a = &values[layout.find(1, EncoderProjection::Query, Factor::A).unwrap()];
        assert_eq!(a, layout.initial_a(1, EncoderProjection::Query));
        let head = &values[layout.head_weight()];
        let deviation = (head.iter().map(|x| x * x).sum::<f32>() / head.len() as f32).sqrt();
        assert!((deviation - 0.02).abs() < 0.003, "{deviation}");
    }

    /// What must change the hash, and what must not.
    #[test]
    fn the_hash_is_of_the_meaning() {
        let base = classifier_config(&[EncoderProjection::Query], false);
        let hash =
            |config: &ClassifierConfig| ClassifierLayout::new(&tiny_config(), config).unwrap().sha256();
        let check = |changes: bool, change: fn(&mut ClassifierConfig)| {
            let mut other = base.clone();
            change(&mut other);
            assert_eq!(hash(&other) != hash(&base), changes, "{other:?}");
        };
        check(false, |c| c.init_seed += 1);
        check(true, |c| c.labels.swap(0, 1));
        check(true, |c| c.pooling = Pooling::Cls);
        check(true, |c| c.lora = None);
        check(true, |c| c.lora.as_mut().unwrap().alpha += 1.0);
        check(true, |c| c.lora.as_mut().unwrap().freeze_a = true);
        check(true, |c| c.lora.as_mut().unwrap().targets.push(EncoderProjection::Key));
        let known = hex::encode(layout(false).sha256());
        assert_eq!(known, "a49a01563165db9a5689f58d7cd134581be43c57c02c4c916b60a08e1d3a864f");
    }

    #[test]
    fn refuses_settings_out_of_range() {
        let check = |expected: &str, spoil: fn(&mut ClassifierConfig)| {
            let mut config = classifier_config(&[EncoderProjection::Query], false);
            spoil(&mut config);
            let error = ClassifierLayout::new(&tiny_config(), &config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("labels: 1 is not", |c| c.labels.truncate(1));
        check("named twice", |c| c.labels[0] = c.labels[1].clone());
        check("rank", |c| c.lora.as_mut().unwrap().rank = 0);
        check("alpha", |c| c.lora.as_mut().unwrap().alpha = f32::NAN);
        check("targets: none", |c| c.lora.as_mut().unwrap().targets.clear());
        check("query is named twice", |c| c.lora.as_mut().unwrap().targets.push(EncoderProjection::Query));
    }
}
