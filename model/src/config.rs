//! Hyperparameters of a decoder and the seven projections of its layers. What the families differ in is in `family.rs`.

use crate::error::ModelError;
use crate::family::{Extra, Family, RowOrder};

/// Upper bounds on what a model file may claim; far above any model a device can train, low enough that no
/// product of two of them overflows.
mod bound {
    /// Tokens in the vocabulary.
    pub(super) const VOCAB: usize = 1 << 20;
    /// Width of the residual stream, of the feed-forward layer and of all heads together.
    pub(super) const WIDTH: usize = 1 << 17;
    /// Decoder layers.
    pub(super) const LAYERS: usize = 1 << 10;
    /// Tokens in the context.
    pub(super) const CONTEXT: usize = 1 << 24;
}

/// Sizes and constants of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// A name for people.
    pub name: String,
    /// How its layers are built.
    pub family: Family,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the gated layer.
    pub feed_forward: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Values in a head.
    pub head_dim: usize,
    /// Tokens the model was trained to attend over.
    pub context_length: usize,
    /// Base of the rotary position frequencies.
    pub rope_base: f32,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f32,
}

impl ModelConfig {
    /// Checks every size against its bound and against the others.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the field at fault.
    pub fn validated(self) -> Result<Self, ModelError> {
        in_range("vocab_size", self.vocab_size, bound::VOCAB)?;
        in_range("hidden", self.hidden, bound::WIDTH)?;
        in_range("layers", self.layers, bound::LAYERS)?;
        in_range("feed_forward", self.feed_forward, bound::WIDTH)?;
        in_range("heads", self.heads, bound::WIDTH)?;
        in_range("kv_heads", self.kv_heads, self.heads)?;
        in_range("head_dim", self.head_dim, bound::WIDTH / self.heads)?;
        in_range("context_length", self.context_length, bound::CONTEXT)?;
        divides("kv_heads", self.heads.is_multiple_of(self.kv_heads), "must divide the number of heads")?;
        divides("head_dim", self.head_dim.is_multiple_of(2), "must be even for rotary positions")?;
        positive("rope_base", self.rope_base)?;
        positive("rms_eps", self.rms_eps)?;
        if let Family::Gemma3(own) = self.family {
            own.check()?;
        }
        Ok(self)
    }

    /// Parameters with a tied output; a separate output adds `vocab_size * hidden`.
    #[must_use]
    pub fn parameter_count(&self) -> u64 {
        let projections: u64 = Projection::ALL
            .iter()
            .map(|projection| {
                let (rows, cols) = projection.shape(self);
                rows as u64 * cols as u64
            })
            .sum();
        let extras: u64 = Extra::ALL.iter().filter_map(|extra| extra.len(self)).map(|len| len as u64).sum();
        let hidden = self.hidden as u64;
        self.vocab_size as u64 * hidden + self.layers as u64 * (projections + extras + 2 * hidden) + hidden
    }

    /// Width of all query heads together.
    #[must_use]
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// One of the seven weight matrices of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// Attention queries.
    Q,
    /// Attention keys.
    K,
    /// Attention values.
    V,
    /// Attention output.
    O,
    /// SwiGLU gate.
    Gate,
    /// SwiGLU input.
    Up,
    /// SwiGLU output.
    Down,
}

impl Projection {
    /// All seven, in the order of their numbers.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The shape of its weight as (out, in).
    #[must_use]
    pub fn shape(self, config: &ModelConfig) -> (usize, usize) {
        match self {
            Self::Q => (config.query_width(), config.hidden),
            Self::K | Self::V => (config.kv_width(), config.hidden),
            Self::O => (config.hidden, config.query_width()),
            Self::Gate | Self::Up => (config.feed_forward, config.hidden),
            Self::Down => (config.hidden, config.feed_forward),
        }
    }

    /// Its short name, as in scenario files: `q`, `k`, `v`, `o`, `gate`, `up`, `down`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
            Self::O => "o",
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        }
    }

    /// The projection of that short name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|projection| projection.name() == name)
    }

    /// Its name in GGUF tensors, as in `blk.0.attn_q.weight`.
    #[must_use]
    pub fn gguf_name(self) -> &'static str {
        match self {
            Self::Q => "attn_q",
            Self::K => "attn_k",
            Self::V => "attn_v",
            Self::O => "attn_output",
            Self::Gate => "ffn_gate",
            Self::Up => "ffn_up",
            Self::Down => "ffn_down",
        }
    }

    /// Its name in Hugging Face tensors, as in `model.layers.0.self_attn.q_proj.weight`.
    #[must_use]
    pub fn hugging_face_name(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// How many rotary heads its rows form, if Hugging Face orders them otherwise than GGUF files of the family.
    #[must_use]
    pub fn reordered_heads(self, config: &ModelConfig) -> Option<usize> {
        match (self, config.family.row_order()) {
            (Self::Q, RowOrder::Pairs) => Some(config.heads),
            (Self::K, RowOrder::Pairs) => Some(config.kv_heads),
            (Self::Q | Self::K, RowOrder::Halves)
            | (Self::V | Self::O | Self::Gate | Self::Up | Self::Down, _) => None,
        }
    }
}

fn in_range(field: &'static str, value: usize, most: usize) -> Result<(), ModelError> {
    if (1..=most).contains(&value) {
        return Ok(());
    }
    Err(ModelError::Config { field, reason: format!("{value} is not in 1..={most}") })
}

fn divides(field: &'static str, holds: bool, rule: &str) -> Result<(), ModelError> {
    if holds {
        return Ok(());
    }
    Err(ModelError::Config { field, reason: rule.to_owned() })
}

fn positive(field: &'static str, value: f32) -> Result<(), ModelError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(ModelError::Config { field, reason: format!("{value} is not a positive number") })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The smallest shape on which every index of the formats differs from the others.
    pub(crate) fn tiny() -> ModelConfig {
        ModelConfig {
            name: "tiny".to_owned(),
            family: Family::Llama,
            vocab_size: 288,
            hidden: 64,
            layers: 2,
            feed_forward: 96,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            context_length: 128,
            rope_base: 10_000.0,
            rms_eps: 1e-5,
        }
    }

    #[test]
    fn counts_the_parameters_of_smollm2() {
        let config = ModelConfig {
            vocab_size: 49_152,
            hidden: 576,
            layers: 30,
            feed_forward: 1536,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            ..tiny()
        };
        assert_eq!(config.validated().unwrap().parameter_count(), 134_515_008);
    }

    #[test]
    fn refuses_sizes_that_contradict() {
        type Spoil = fn(&mut ModelConfig);
        let cases: [(&str, Spoil); 7] = [
            ("vocab_size", |c| c.vocab_size = 0),
            ("hidden", |c| c.hidden = usize::MAX),
            ("kv_heads", |c| c.kv_heads = 3),
            ("kv_heads", |c| c.kv_heads = 8),
            ("head_dim", |c| c.head_dim = 15),
            ("rope_base", |c| c.rope_base = f32::NAN),
            ("rms_eps", |c| c.rms_eps = 0.0),
        ];
        for (expected, spoil) in cases {
            let mut config = tiny();
            spoil(&mut config);
            let error = config.validated().unwrap_err();
            assert!(matches!(error, ModelError::Config { field, .. } if field == expected), "{error}");
        }
    }

    #[test]
    fn names_lead_back() {
        for projection in Projection::ALL {
            assert_eq!(Projection::from_name(projection.name()), Some(projection));
            assert_eq!(Projection::ALL[projection as usize], projection);
        }
        assert_eq!(Projection::from_name("w"), None);
    }
}
