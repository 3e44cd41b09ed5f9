//! The decoder families, and what a layer of each computes differently from Llama's: the one place that says so. Readers,
//! kernels' callers and adapter formats ask [`ModelConfig::layer`]; no other file decides by a family's name but for the
//! names of keys and tensors.

use crate::config::ModelConfig;
use crate::error::ModelError;

/// Layers from which llama.cpp takes a Gemma 3 model for the one of 27 billion parameters, whose queries are scaled by
/// the width of the residual stream over the heads.
const GEMMA3_27B_LAYERS: usize = 62;

/// How a model's layers are built.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2 and others of that form.
    #[default]
    Llama,
    /// Qwen2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen3: queries and keys normalized by head.
    Qwen3,
    /// Gemma 3's text models.
    Gemma3(Gemma3),
}

/// Constants that only Gemma 3 has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gemma3 {
    /// What attention scores are multiplied by: 1 over the root of `query_pre_attn_scalar`.
    pub attention_scale: f32,
    /// Tokens that a local layer looks back on, the current one included.
    pub window: usize,
    /// Every so many layers one is global: layers `period - 1`, `2 * period - 1`..
    pub period: usize,
    /// Base of the rotary frequencies in local layers; [`ModelConfig::rope_base`] is that of global ones.
    pub local_rope_base: f32,
    /// Positions are divided by this in global layers; 1 leaves them.
    pub rope_factor: f32,
}

/// What a layer computes, beside its weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LayerDescription {
    pub(crate) rope: Rope,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
    /// Tokens a query sees, itself included; `usize::MAX` for all before it.
    pub(crate) window: usize,
    pub(crate) activation: Activation,
}

/// Rotary positions of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rope {
    pub(crate) head_dim: usize,
    pub(crate) base: f32,
    /// Positions are divided by this.
    pub(crate) factor: f32,
    pub(crate) order: RowOrder,
}

/// Which two values of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// 2j and 2j + 1: architecture `llama` in GGUF files, whose rows of Q and K are permuted for it.
    Pairs,
    /// j and j + half: Hugging Face, and the other architectures in GGUF files.
    Halves,
}

/// What the gate goes through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `x * sigmoid(x)`.
    #[default]
    Silu,
    /// GELU by its approximation with tanh.
    GeluTanh,
}

/// Vectors of a layer that only some families have; numbers are places in [`crate::base::LayerExtras`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extra {
    /// Added to the queries, `[heads * head_dim]`.
    QBias,
    /// Added to the keys, `[kv_heads * head_dim]`.
    KBias,
    /// Added to the values, `[kv_heads * head_dim]`.
    VBias,
    /// RMSNorm weights of each head's queries, `[head_dim]`.
    QNorm,
    /// RMSNorm weights of each head's keys, `[head_dim]`.
    KNorm,
    /// RMSNorm weights of what attention adds to the residual stream, `[hidden]`.
    PostAttnNorm,
    /// RMSNorm weights of what the feed-forward part adds, `[hidden]`.
    PostFfnNorm,
}

impl Family {
    /// Its name as GGUF's `general.architecture`.
    #[must_use]
    pub fn architecture(&self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3(_) => "gemma3",
        }
    }

    /// Hugging Face stores Gemma's norm weights less one; here and in GGUF files they are whole.
    pub(crate) fn norm_offset(&self) -> f32 {
        match self {
            Self::Llama | Self::Qwen2 | Self::Qwen3 => 0.0,
            Self::Gemma3(_) => 1.0,
        }
    }

    pub(crate) fn row_order(&self) -> RowOrder {
        match self {
            Self::Llama => RowOrder::Pairs,
            Self::Qwen2 | Self::Qwen3 | Self::Gemma3(_) => RowOrder::Halves,
        }
    }

    fn has(&self, extra: Extra) -> bool {
        match extra {
            Extra::QBias | Extra::KBias | Extra::VBias => *self == Self::Qwen2,
            Extra::QNorm | Extra::KNorm => matches!(self, Self::Qwen3 | Self::Gemma3(_)),
            Extra::PostAttnNorm | Extra::PostFfnNorm => matches!(self, Self::Gemma3(_)),
        }
    }
}

impl Gemma3 {
    /// What scores are multiplied by in a model of that shape, where a file does not say.
    pub(crate) fn usual_attention_scale(layers: usize, hidden: usize, heads: usize, head_dim: usize) -> f32 {
        let width = if layers == GEMMA3_27B_LAYERS { hidden / heads.max(1) } else { head_dim };
        1.0 / (width as f32).sqrt()
    }

    fn is_global(&self, layer: usize) -> bool {
        (layer + 1).is_multiple_of(self.period)
    }

    /// # Errors
    /// [`ModelError::Config`] names the field at fault.
    pub(crate) fn check(&self) -> Result<(), ModelError> {
        let refuse = |field, found: &dyn std::fmt::Display, rule: &str| {
            Err(ModelError::Config { field, reason: format!("{found} is not {rule}") })
        };
        if self.window == 0 {
            return refuse("window", &self.window, "1 or more");
        }
        if self.period == 0 {
            return refuse("period", &self.period, "1 or more");
        }
        let numbers = [
            ("attention_scale", self.attention_scale),
            ("local_rope_base", self.local_rope_base),
            ("rope_factor", self.rope_factor),
        ];
        match numbers.into_iter().find(|(_, number)| !(number.is_finite() && *number > 0.0)) {
            Some((field, number)) => refuse(field, &number, "a positive number"),
            None => Ok(()),
        }
    }
}

impl ModelConfig {
    /// What the layer of that index computes.
    pub(crate) fn layer(&self, index: usize) -> LayerDescription {
        let rope = Rope {
            head_dim: self.head_dim,
            base: self.rope_base,
            factor: 1.0,
            order: self.family.row_order(),
        };
        let plain = LayerDescription {
            rope,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: usize::MAX,
            activation: Activation::Silu,
        };
        let Family::Gemma3(own) = self.family else { return plain };
        let (rope, window) = if own.is_global(index) {
            (Rope { factor: own.rope_factor, ..rope }, usize::MAX)
        } else {
            (Rope { base: own.local_rope_base, ..rope }, own.window)
        };
        LayerDescription { rope, scale: own.attention_scale, window, activation: Activation::GeluTanh }
    }

    /// What embeddings are multiplied by before the first layer.
    pub(crate) fn embedding_scale(&self) -> f32 {
        match self.family {
            Family::Llama | Family::Qwen2 | Family::Qwen3 => 1.0,
            Family::Gemma3(_) => (self.hidden as f32).sqrt(),
        }
    }
}

impl Extra {
    /// All seven, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::QBias,
        Self::KBias,
        Self::VBias,
        Self::QNorm,
        Self::KNorm,
        Self::PostAttnNorm,
        Self::PostFfnNorm,
    ];

    /// How long it is in each layer of that model; nothing if its family has none.
    #[must_use]
    pub fn len(self, config: &ModelConfig) -> Option<usize> {
        let len = match self {
            Self::QBias => config.query_width(),
            Self::KBias | Self::VBias => config.kv_width(),
            Self::QNorm | Self::KNorm => config.head_dim,
            Self::PostAttnNorm | Self::PostFfnNorm => config.hidden,
        };
        config.family.has(self).then_some(len)
    }

    /// Its name in GGUF tensors behind `blk.N.`.
    pub(crate) fn gguf_name(self) -> &'static str {
        match self {
            Self::QBias => "attn_q.bias",
            Self::KBias => "attn_k.bias",
            Self::VBias => "attn_v.bias",
            Self::QNorm => "attn_q_norm.weight",
            Self::KNorm => "attn_k_norm.weight",
            Self::PostAttnNorm => "post_attention_norm.weight",
            Self::PostFfnNorm => "post_ffw_norm.weight",
        }
    }

    /// Its name in Hugging Face tensors behind `model.layers.N.`.
    pub(crate) fn hugging_face_name(self) -> &'static str {
        match self {
            Self::QBias => "self_attn.q_proj.bias",
            Self::KBias => "self_attn.k_proj.bias",
            Self::VBias => "self_attn.v_proj.bias",
            Self::QNorm => "self_attn.q_norm.weight",
            Self::KNorm => "self_attn.k_norm.weight",
            Self::PostAttnNorm => "post_attention_layernorm.weight",
            Self::PostFfnNorm => "post_feedforward_layernorm.weight",
        }
    }

    /// Whether it is a norm's weights.
    pub(crate) fn is_norm(self) -> bool {
        match self {
            Self::QBias | Self::KBias | Self::VBias => false,
            Self::QNorm | Self::KNorm | Self::PostAttnNorm | Self::PostFfnNorm => true,
        }
    }
}

#[cfg(test)]
mod file_tests;
#[cfg(test)]
mod tests;
