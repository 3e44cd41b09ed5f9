//! LoRA adapters: the settings, the layout of the one flat vector that travels, and its checkpoint bytes.
//! Other programs' formats are in `adapter_formats.rs`; training is in `train.rs`.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::ops::Range;
use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use crate::config::{ModelConfig, Projection};
use crate::error::AdapterError;
use crate::safetensors::{self, TensorBytes};

/// The highest rank; beyond it full fine-tuning is cheaper for every model this crate can train.
pub const RANK_MAX: usize = 512;

const CHECKPOINT_FORMAT: &str = "fleetune-adapter-v1";

/// Which projections get a low-rank side branch and how it is scaled (Hu et al. 2021, LoRA, section 4.1).
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Columns of B and rows of A.
    pub rank: usize,
    /// The branch is multiplied by `alpha / rank`.
    pub alpha: f32,
    /// The adapted projections, in any order, each once.
    pub targets: Vec<Projection>,
    /// Train B only and draw A from the seed (Sun et al. 2024, FFA-LoRA).
    pub freeze_a: bool,
    /// Seed of A's first values.
    pub init_seed: u64,
}

impl LoraConfig {
    /// The factor in front of the branch.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }
}

/// One of the two low-rank factors; the branch computes `scale * B A x`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Factor {
    /// `[rank, in]`, row-major.
    A,
    /// `[out, rank]`, row-major.
    B,
}

/// Where one trained factor stands in the flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutEntry {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// The adapted projection.
    pub projection: Projection,
    /// Which factor.
    pub factor: Factor,
    /// Rows of the factor.
    pub rows: usize,
    /// Columns of the factor.
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

/// The meaning of every value of an adapter's flat vector: layer by layer, projection by projection in the
/// order of [`Projection::ALL`], A then B; with `freeze_a` B alone.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterLayout {
    config: LoraConfig,
    /// (out, in) of each projection, targeted or not.
    shapes: [(usize, usize); 7],
    layers: usize,
    entries: Vec<LayoutEntry>,
    len: usize,
}

impl AdapterLayout {
    /// Lays out the adapter of that model.
    ///
    /// # Errors
    /// [`AdapterError::Config`] for a rank, scale or set of targets out of range.
    pub fn new(model: &ModelConfig, config: &LoraConfig) -> Result<Self, AdapterError> {
        let config = checked(config)?;
        let shapes = Projection::ALL.map(|projection| projection.shape(model));
        let mut layout = Self { config, shapes, layers: model.layers, entries: Vec::new(), len: 0 };
        for layer in 0..model.layers {
            for projection in layout.config.targets.clone() {
                layout.push_pair(layer, projection);
            }
        }
        Ok(layout)
    }

    fn push_pair(&mut self, layer: usize, projection: Projection) {
        let (out, cols_in) = self.shapes[projection as usize];
        if !self.config.freeze_a {
            self.push(layer, projection, Factor::A, (self.config.rank, cols_in));
        }
        self.push(layer, projection, Factor::B, (out, self.config.rank));
    }

    fn push(&mut self, layer: usize, projection: Projection, factor: Factor, (rows, cols): (usize, usize)) {
        self.entries.push(LayoutEntry { layer, projection, factor, rows, cols, offset: self.len });
        self.len += rows * cols;
    }

    /// Values in the flat vector.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a layout without targets cannot be made")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Columns of a projection's weight, and of its factor A.
    pub(crate) fn inputs(&self, projection: Projection) -> usize {
        self.shapes[projection as usize].1
    }

    /// Every trained factor, in the order of the flat vector.
    #[must_use]
    pub fn entries(&self) -> &[LayoutEntry] {
        &self.entries
    }

    /// The settings it was made from, targets in order.
    #[must_use]
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Decoder layers of the model it was made for.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Where a factor stands; `None` if it is frozen or the projection is not adapted.
    #[must_use]
    pub fn find(&self, layer: usize, projection: Projection, factor: Factor) -> Option<Range<usize>> {
        let target = self.config.targets.iter().position(|&target| target == projection)?;
        let pair = layer * self.config.targets.len() + target;
        let index = match (self.config.freeze_a, factor) {
            (false, Factor::A) => 2 * pair,
            (false, Factor::B) => 2 * pair + 1,
            (true, Factor::A) => return None,
            (true, Factor::B) => pair,
        };
        self.entries.get(index).map(LayoutEntry::range)
    }

    /// A's first (and, if frozen, only) values, `[rank, in]`, uniform in plus or minus `1 / sqrt(in)`: the
    /// bound that PEFT's `kaiming_uniform(a = sqrt 5)` comes to. The same on every machine.
    #[must_use]
    pub fn frozen_a(&self, layer: usize, projection: Projection) -> Vec<f32> {
        let cols = self.shapes[projection as usize].1;
        let bound = 1.0 / (cols as f32).sqrt();
        let mut rng = initial_rng(self.config.init_seed, layer, projection);
        (0..self.config.rank * cols).map(|_| bound * (2.0 * unit(rng.next_u32()) - 1.0)).collect()
    }

    /// Hash of all that gives the values their meaning: two adapters may be added if and only if it agrees.
    #[must_use]
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(self.description()).into()
    }

    /// The hashed text. The seed counts only where it decides A; the scale counts by its bits.
    fn description(&self) -> String {
        let LoraConfig { rank, alpha, freeze_a, init_seed, .. } = &self.config;
        let mut text = format!("fleetune-adapter-layout-v1\nrank {rank}\nalpha {:08x}\n", alpha.to_bits());
        if *freeze_a {
            let _ = writeln!(text, "frozen A from seed {init_seed}");
        }
        for LayoutEntry { layer, projection, factor, rows, cols, offset } in &self.entries {
            let _ = writeln!(text, "{layer} {} {factor:?} {rows} {cols} {offset}", projection.name());
        }
        text
    }
}

/// One adapter: a vector and what its values mean.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// What the values mean.
    pub layout: Arc<AdapterLayout>,
    /// The trained values, as long as the layout says.
    pub values: Vec<f32>,
}

impl Adapter {
    /// An adapter that changes nothing yet: A as in [`AdapterLayout::frozen_a`], B zero.
    #[must_use]
    pub fn init(layout: Arc<AdapterLayout>) -> Self {
        let mut values = vec![0.0; layout.len()];
        for entry in layout.entries().iter().filter(|entry| entry.factor == Factor::A) {
            values[entry.range()].copy_from_slice(&layout.frozen_a(entry.layer, entry.projection));
        }
        Self { layout, values }
    }

    /// Takes values that are already in the layout's order.
    ///
    /// # Errors
    /// [`AdapterError::WrongLength`] or [`AdapterError::NonFinite`].
    pub fn new(layout: Arc<AdapterLayout>, values: Vec<f32>) -> Result<Self, AdapterError> {
        if values.len() != layout.len() {
            return Err(AdapterError::WrongLength { expected: layout.len(), found: values.len() });
        }
        match values.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(AdapterError::NonFinite { index }),
            None => Ok(Self { layout, values }),
        }
    }

    /// A of an adapted projection, `[rank, in]`, trained or frozen.
    ///
    /// # Panics
    /// When the projection is not adapted.
    #[must_use]
    pub fn factor_a(&self, layer: usize, projection: Projection) -> Cow<'_, [f32]> {
        match self.layout.find(layer, projection, Factor::A) {
            Some(range) => Cow::Borrowed(&self.values[range]),
            None => {
                assert!(self.layout.config.targets.contains(&projection), "{projection:?} is not adapted");
                Cow::Owned(self.layout.frozen_a(layer, projection))
            }
        }
    }

    /// B of an adapted projection, `[out, rank]`.
    ///
    /// # Panics
    /// When the projection is not adapted.
    #[must_use]
    pub fn factor_b(&self, layer: usize, projection: Projection) -> &[f32] {
        let range = self.layout.find(layer, projection, Factor::B);
        &self.values[range.unwrap_or_else(|| panic!("{projection:?} of layer {layer} is not adapted"))]
    }

    /// The checkpoint: a safetensors file with one F32 tensor `adapter` and the layout's hash; equal
    /// adapters give equal bytes.
    #[must_use]
    pub fn to_checkpoint_bytes(&self) -> Vec<u8> {
        let layout = hex::encode(self.layout.sha256());
        let metadata = [("format", CHECKPOINT_FORMAT), ("layout_sha256", &layout)];
        let tensor = TensorBytes::f32("adapter", &[self.values.len()], &self.values);
        safetensors::encode(&metadata, &[tensor])
    }

    /// Reads a checkpoint of that layout.
    ///
    /// # Errors
    /// When the bytes are not such a file, belong to another layout, or hold values that are not finite.
    pub fn from_checkpoint_bytes(layout: Arc<AdapterLayout>, bytes: &[u8]) -> Result<Self, AdapterError> {
        let file = safetensors::decode(bytes).map_err(|reason| malformed("checkpoint", reason))?;
        if file.metadata("format") != Some(CHECKPOINT_FORMAT) {
            return Err(malformed("format", format!("expected {CHECKPOINT_FORMAT}")));
        }
        let expected = hex::encode(layout.sha256());
        let found = file.metadata("layout_sha256").unwrap_or("none");
        if found != expected {
            return Err(AdapterError::LayoutMismatch { expected, found: found.to_owned() });
        }
        let (_, values) = file.f32("adapter").map_err(|reason| malformed("adapter", reason))?;
        Self::new(layout, values)
    }

    /// Hash of the checkpoint's bytes: the adapter's name.
    #[must_use]
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(self.to_checkpoint_bytes()).into()
    }
}

/// Sorted targets and settings in range.
fn checked(config: &LoraConfig) -> Result<LoraConfig, AdapterError> {
    let refuse = |field, reason: String| Err(AdapterError::Config { field, reason });
    if !(1..=RANK_MAX).contains(&config.rank) {
        return refuse("rank", format!("{} is not in 1..={RANK_MAX}", config.rank));
    }
    if !(config.alpha.is_finite() && config.alpha > 0.0) {
        return refuse("alpha", format!("{} is not a positive number", config.alpha));
    }
    let mut config = config.clone();
    config.targets.sort_unstable();
    if config.targets.is_empty() {
        return refuse("targets", "none given".to_owned());
    }
    match config.targets.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => refuse("targets", format!("{} is named twice", pair[0].name())),
        None => Ok(config),
    }
}

/// One stream a factor, so that A of a layer does not depend on which other projections are adapted.
fn initial_rng(seed: u64, layer: usize, projection: Projection) -> ChaCha8Rng {
    let mut key = *b"fleetune lora A, seed/layer/proj";
    key[8..16].copy_from_slice(&seed.to_le_bytes());
    key[16..24].copy_from_slice(&(layer as u64).to_le_bytes());
    key[24..32].copy_from_slice(&(projection as u64).to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// The upper 24 bits as a number in [0, 1), exact in single precision.
fn unit(bits: u32) -> f32 {
    (bits >> 8) as f32 / (1u32 << 24) as f32
}

fn malformed(what: &str, reason: impl Into<String>) -> AdapterError {
    AdapterError::Malformed { what: what.to_owned(), reason: reason.into() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::tests::tiny;

    pub(crate) fn lora(targets: &[Projection], freeze_a: bool) -> LoraConfig {
        LoraConfig { rank: 4, alpha: 8.0, targets: targets.to_vec(), freeze_a, init_seed: 7 }
    }

    pub(crate) fn layout(targets: &[Projection], freeze_a: bool) -> Arc<AdapterLayout> {
        Arc::new(AdapterLayout::new(&tiny(), &lora(targets, freeze_a)).unwrap())
    }

    /// An adapter in which every value differs.
    pub(crate) fn counted(targets: &[Projection], freeze_a: bool) -> Adapter {
        let layout = layout(targets, freeze_a);
        let values = (0..layout.len()).map(|i| (i as f32 + 1.0) / 1024.0).collect();
        Adapter::new(layout, values).unwrap()
    }

    #[test]
    fn entries_tile_the_vector_in_order() {
        for freeze_a in [false, true] {
            let layout = layout(&[Projection::Down, Projection::Q], freeze_a);
            let mut next = 0;
            for entry in layout.entries() {
                assert_eq!(entry.offset, next);
                assert_eq!(layout.find(entry.layer, entry.projection, entry.factor), Some(entry.range()));
                next = entry.range().end;
            }
            assert_eq!(next, layout.len());
            assert_eq!(layout.find(0, Projection::V, Factor::B), None);
            assert_eq!(layout.find(2, Projection::Q, Factor::B), None);
        }
        let order: Vec<_> = layout(&[Projection::Down, Projection::Q], false).entries()[..5]
            .iter()
            .map(|entry| (entry.layer, entry.projection.name(), entry.factor, entry.rows, entry.cols))
            .collect();
        assert_eq!(
            order,
            [
                (0, "q", Factor::A, 4, 64),
                (0, "q", Factor::B, 64, 4),
                (0, "down", Factor::A, 4, 96),
                (0, "down", Factor::B, 64, 4),
                (1, "q", Factor::A, 4, 64)
            ]
        );
    }

    #[test]
    fn rank_8_on_attention_of_smollm2_has_the_known_size() {
        let model = ModelConfig {
            hidden: 576,
            layers: 30,
            feed_forward: 1536,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            ..tiny()
        };
        let size = |targets: &[Projection], freeze_a| {
            let config = LoraConfig { rank: 8, ..lora(targets, freeze_a) };
            AdapterLayout::new(&model, &config).unwrap().len()
        };
        assert_eq!(size(&Projection::ALL[..4], false), 921_600);
        assert_eq!(size(&[Projection::Q, Projection::V], true), 184_320);
    }

    #[test]
    fn the_hash_tells_layouts_apart() {
        let hash = |change: fn(&mut LoraConfig)| {
            let mut config = lora(&[Projection::Q], false);
            change(&mut config);
            hex::encode(AdapterLayout::new(&tiny(), &config).unwrap().sha256())
        };
        let plain = hash(|_| ());
        assert_eq!(plain, hash(|config| config.init_seed = 8), "the seed only says where A starts");
        assert_ne!(plain, hash(|config| config.rank = 5));
        assert_ne!(plain, hash(|config| config.alpha = 4.0));
        assert_ne!(plain, hash(|config| config.targets = vec![Projection::O]));
        let frozen = hash(|config| config.freeze_a = true);
        assert_ne!(plain, frozen);
        assert_ne!(frozen, hash(|config| (config.freeze_a, config.init_seed) = (true, 8)));
    }

    #[test]
    fn a_starts_the_same_everywhere() {
        let layout = layout(&[Projection::Q, Projection::V], false);
        let adapter = Adapter::init(layout.clone());
        let a = adapter.factor_a(1, Projection::V);
        let digest: [u8; 32] = Sha256::digest(bytemuck::cast_slice::<f32, u8>(&a)).into();
        assert_eq!(hex::encode(&digest[..8]), "c3b529f1febb357c");
        assert!(a.iter().all(|x| x.abs() <= 0.125));
        assert!(a.iter().sum::<f32>().abs() < 5.0);
        assert!(adapter.factor_b(1, Projection::V).iter().all(|&x| x == 0.0));
        let frozen =
            Adapter::init(Arc::new(AdapterLayout::new(&tiny(), &lora(&[Projection::V], true)).unwrap()));
        assert_eq!(frozen.factor_a(1, Projection::V), a);
        assert!(frozen.values.iter().all(|&x| x == 0.0));
    }

    #[test]
    fn checkpoints_round_trip_and_are_bound_to_their_layout() {
        let adapter = counted(&[Projection::Q, Projection::Up], false);
        let bytes = adapter.to_checkpoint_bytes();
        assert_eq!(bytes, adapter.to_checkpoint_bytes());
        let back = Adapter::from_checkpoint_bytes(adapter.layout.clone(), &bytes).unwrap();
        assert_eq!(back.values, adapter.values);
        assert_eq!(back.sha256(), adapter.sha256());
        let other = Adapter::from_checkpoint_bytes(layout(&[Projection::Q], false), &bytes).unwrap_err();
        assert!(matches!(other, AdapterError::LayoutMismatch { .. }), "{other}");
        for cut in 0..bytes.len() {
            assert!(Adapter::from_checkpoint_bytes(adapter.layout.clone(), &bytes[..cut]).is_err());
        }
    }

    #[test]
    fn refuses_vectors_that_do_not_fit() {
        let layout = layout(&[Projection::Q], false);
        let short = Adapter::new(layout.clone(), vec![0.0; 3]).unwrap_err();
        assert!(matches!(short, AdapterError::WrongLength { found: 3, .. }));
        let mut values = vec![0.0; layout.len()];
        values[5] = f32::NAN;
        let nan = Adapter::new(layout.clone(), values.clone()).unwrap_err();
        assert!(matches!(nan, AdapterError::NonFinite { index: 5 }));
        let smuggled = Adapter { layout: layout.clone(), values }.to_checkpoint_bytes();
        assert!(matches!(
            Adapter::from_checkpoint_bytes(layout, &smuggled).unwrap_err(),
            AdapterError::NonFinite { index: 5 }
        ));
    }

    #[test]
    fn refuses_settings_out_of_range() {
        let check = |expected: &str, spoil: fn(&mut LoraConfig)| {
            let mut config = lora(&[Projection::Q], false);
            spoil(&mut config);
            let error = AdapterLayout::new(&tiny(), &config).unwrap_err();
            assert!(matches!(error, AdapterError::Config { field, .. } if field == expected), "{error}");
        };
        check("rank", |config| config.rank = 0);
        check("rank", |config| config.rank = RANK_MAX + 1);
        check("alpha", |config| config.alpha = f32::INFINITY);
        check("targets", |config| config.targets.clear());
        check("targets", |config| config.targets = vec![Projection::Q, Projection::Q]);
    }
}
