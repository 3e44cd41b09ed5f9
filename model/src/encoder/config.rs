//! Sizes and constants of an encoder, and the names of its six projections in both families of files.

use crate::error::ModelError;

const VOCAB_MAX: usize = 1 << 20;
const WIDTH_MAX: usize = 1 << 16;
const LAYERS_MAX: usize = 256;
const POSITIONS_MAX: usize = 1 << 16;
const TYPES_MAX: usize = 64;

/// Sizes and constants of a BERT encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    /// The model's name, for people.
    pub name: String,
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Encoder layers.
    pub layers: usize,
    /// Width between the two feed-forward projections.
    pub feed_forward: usize,
    /// Attention heads; they divide `hidden`.
    pub heads: usize,
    /// Rows of the position embedding: the longest sequence, `[CLS]` and `[SEP]` included.
    pub positions: usize,
    /// Rows of the token type embedding, of which the first is used.
    pub token_types: usize,
    /// Added to the variance in layer normalization.
    pub norm_eps: f32,
    /// Between the two feed-forward projections.
    pub activation: Activation,
    /// How the files say that a sequence becomes one vector.
    pub pooling: Pooling,
}

/// The feed-forward part's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * Phi(x)` with the normal distribution function (Hendrycks and Gimpel 2016).
    Gelu,
    /// Its approximation with a hyperbolic tangent.
    GeluTanh,
}

/// How the rows of a sequence become the vector that the head sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pooling {
    /// The mean of all rows, `[CLS]` and `[SEP]` included, as sentence-transformers takes it.
    Mean,
    /// The row of `[CLS]`.
    Cls,
    /// That row through the model's pooler, a dense layer with tanh: what `BertForSequenceClassification` takes.
    Pooler,
}

impl Pooling {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Mean, Self::Cls, Self::Pooler];

    /// Its name in commands and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Cls => "cls",
            Self::Pooler => "pooler",
        }
    }

    /// The pooling of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|pooling| pooling.name() == name)
    }
}

impl EncoderConfig {
    /// The same, if the sizes are in range and agree.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the field.
    pub fn validated(self) -> Result<Self, ModelError> {
        let sizes = [
            ("vocab_size", self.vocab_size, VOCAB_MAX),
            ("hidden", self.hidden, WIDTH_MAX),
            ("layers", self.layers, LAYERS_MAX),
            ("feed_forward", self.feed_forward, WIDTH_MAX),
            ("heads", self.heads, WIDTH_MAX),
            ("positions", self.positions, POSITIONS_MAX),
            ("token_types", self.token_types, TYPES_MAX),
        ];
        let refuse = |field, reason| Err(ModelError::Config { field, reason });
        if let Some((field, value, most)) =
            sizes.into_iter().find(|(_, size, most)| !(1..=*most).contains(size))
        {
            return refuse(field, format!("{value} is not in 1..={most}"));
        }
        if !self.hidden.is_multiple_of(self.heads) {
            return refuse("heads", format!("{} do not divide {}", self.heads, self.hidden));
        }
        if self.positions < 2 {
            return refuse("positions", "there is no room for [CLS] and [SEP]".to_owned());
        }
        // Below, the variance of a constant row would not be told from nothing; 1e-12 is BERT's own.
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return refuse("norm_eps", format!("{} is not a positive number", self.norm_eps));
        }
        Ok(self)
    }

    /// Values of one head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }
}

/// One of the six weight matrices of an encoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EncoderProjection {
    /// Attention queries.
    Query,
    /// Attention keys.
    Key,
    /// Attention values.
    Value,
    /// Attention output.
    AttentionOutput,
    /// Up to the feed-forward width.
    Intermediate,
    /// Back down from it.
    Output,
}

impl EncoderProjection {
    /// All six, in the order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::Query, Self::Key, Self::Value, Self::AttentionOutput, Self::Intermediate, Self::Output];

    /// The shape of its weight as (out, in).
    #[must_use]
    pub fn shape(self, config: &EncoderConfig) -> (usize, usize) {
        match self {
            Self::Query | Self::Key | Self::Value | Self::AttentionOutput => (config.hidden, config.hidden),
            Self::Intermediate => (config.feed_forward, config.hidden),
            Self::Output => (config.hidden, config.feed_forward),
        }
    }

    /// Its short name, as in commands: `query`, `key`, `value`, `attention_output`, `intermediate`, `output`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::AttentionOutput => "attention_output",
            Self::Intermediate => "intermediate",
            Self::Output => "output",
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
            Self::Query => "attn_q",
            Self::Key => "attn_k",
            Self::Value => "attn_v",
            Self::AttentionOutput => "attn_output",
            Self::Intermediate => "ffn_up",
            Self::Output => "ffn_down",
        }
    }

    /// Its name in Hugging Face tensors, as in `encoder.layer.0.attention.self.query.weight`.
    #[must_use]
    pub fn hugging_face_name(self) -> &'static str {
        match self {
            Self::Query => "attention.self.query",
            Self::Key => "attention.self.key",
            Self::Value => "attention.self.value",
            Self::AttentionOutput => "attention.output.dense",
            Self::Intermediate => "intermediate.dense",
            Self::Output => "output.dense",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::fixtures::tiny_config;

    #[test]
    fn refuses_sizes_that_contradict() {
        type Spoil = fn(&mut EncoderConfig);
        let cases: [(&str, Spoil); 6] = [
            ("vocab_size", |c| c.vocab_size = 0),
            ("hidden", |c| c.hidden = usize::MAX),
            ("heads", |c| c.heads = 3),
            ("positions", |c| c.positions = 1),
            ("token_types", |c| c.token_types = 65),
            ("norm_eps", |c| c.norm_eps = f32::NAN),
        ];
        for (expected, spoil) in cases {
            let mut config = tiny_config();
            spoil(&mut config);
            let error = config.validated().unwrap_err();
            assert!(matches!(error, ModelError::Config { field, .. } if field == expected), "{error}");
        }
    }

    #[test]
    fn names_lead_back() {
        for projection in EncoderProjection::ALL {
            assert_eq!(EncoderProjection::from_name(projection.name()), Some(projection));
            assert_eq!(EncoderProjection::ALL[projection as usize], projection);
        }
        for pooling in Pooling::ALL {
            assert_eq!(Pooling::from_name(pooling.name()), Some(pooling));
        }
        assert_eq!(EncoderProjection::from_name("q"), None);
        assert_eq!(Pooling::from_name("max"), None);
    }
}
