//! Where each weight of a small model lies in one flat vector, and the way from the vector to a model file and back.
//!
//! The vector holds the weights themselves, not their difference to a base: whoever trains it takes the first values
//! from the base ([`FullLayout::values_of`]) and from then on needs of it the sizes and the tokenizer alone.

use std::fmt::Write as _;
use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::base::{BaseModel, LayerExtras, LayerWeights, ModelParts};
use crate::config::{ModelConfig, Projection};
use crate::error::ModelError;
use crate::family::Family;
use crate::tokenizer::Tokenizer;
use crate::weights::{WeightFormat, WeightMatrix};

/// Most values of a fully trained model: 32 Mi. Training keeps some five vectors of that length (values, gradient,
/// the optimizer's two, a copy for the graph), together 640 MiB; beyond it an adapter is the better choice.
pub const FULL_VALUES_MAX: usize = 1 << 25;

/// The meaning of every value of the flat vector: token embedding (which is the output matrix too), final norm, then
/// each layer's two norms and seven projections.
#[derive(Debug, Clone, PartialEq)]
pub struct FullLayout {
    config: ModelConfig,
}

/// One layer's parts, relative to the layer's slice.
pub(super) struct LayerParts {
    pub(super) attn_norm: Range<usize>,
    pub(super) ffn_norm: Range<usize>,
    pub(super) projections: [Range<usize>; 7],
    len: usize,
}

impl FullLayout {
    /// The layout of all weights of a model of those sizes with a tied output.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the sizes contradict each other, [`ModelError::Unsupported`] for a family but Llama.
    pub fn new(config: ModelConfig) -> Result<Self, ModelError> {
        if config.family != Family::Llama {
            return Err(ModelError::Unsupported {
                key: "family".to_owned(),
                found: config.family.architecture().to_owned(),
                reason: "only llama is trained in full; adapters can be trained for the others".to_owned(),
            });
        }
        Ok(Self { config: config.validated()? })
    }

    /// The layout of all weights of that model.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for a model with an output matrix of its own or of more than
    /// [`FULL_VALUES_MAX`] weights.
    pub fn of_base(base: &BaseModel) -> Result<Self, ModelError> {
        let refuse = |key: &str, found: String, reason: String| {
            Err(ModelError::Unsupported { key: key.to_owned(), found, reason })
        };
        if base.output.is_some() {
            let reason = "only a model with a tied output is trained fully".to_owned();
            return refuse("output.weight", "a matrix of its own".to_owned(), reason);
        }
        let count = base.parameter_count();
        if count > FULL_VALUES_MAX as u64 {
            let reason = format!("at most {FULL_VALUES_MAX} weights are trained fully; train an adapter");
            return refuse("weights", count.to_string(), reason);
        }
        Self::new(base.config.clone())
    }

    /// The model's sizes.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Values in the flat vector.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a model without weights cannot be made")]
    pub fn len(&self) -> usize {
        self.layer(self.config.layers).start
    }

    /// Hash of all that gives the values their meaning: two vectors may be added if and only if it agrees.
    #[must_use]
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(self.description()).into()
    }

    /// The model's weights, dequantized.
    ///
    /// # Panics
    /// When the model has other sizes.
    #[must_use]
    pub fn values_of(&self, base: &BaseModel) -> Vec<f32> {
        assert!(base.parameter_count() == self.len() as u64, "the model has the layout's sizes");
        let parts = self.parts();
        let mut values = vec![0f32; self.len()];
        let mut put = |at: Range<usize>, weights: &[f32]| values[at].copy_from_slice(weights);
        put(self.embedding(), &base.token_embedding.to_f32());
        put(self.output_norm(), &base.output_norm);
        for (index, layer) in base.layers.iter().enumerate() {
            let first = self.layer(index).start;
            let within = |part: &Range<usize>| first + part.start..first + part.end;
            put(within(&parts.attn_norm), &layer.attn_norm);
            put(within(&parts.ffn_norm), &layer.ffn_norm);
            for (part, matrix) in parts.projections.iter().zip(&layer.projections) {
                put(within(part), &matrix.to_f32());
            }
        }
        values
    }

    /// The model of those values, its matrices in `format`; norms stay f32. `values` are as long as the layout says.
    ///
    /// # Errors
    /// [`ModelError`] if a value is not finite, the format does not fit a width, or the tokenizer's vocabulary
    /// is not the model's.
    pub fn to_base(
        &self,
        values: &[f32],
        tokenizer: Tokenizer,
        chat_template: Option<String>,
        format: WeightFormat,
    ) -> Result<BaseModel, ModelError> {
        let config = &self.config;
        let layers = (0..config.layers).map(|index| self.layer_weights(values, index, format));
        BaseModel::from_parts(ModelParts {
            config: config.clone(),
            tokenizer,
            token_embedding: matrix(
                "token_embd.weight".to_owned(),
                &values[self.embedding()],
                (config.vocab_size, config.hidden),
                format,
            )?,
            layers: layers.collect::<Result<_, _>>()?,
            output_norm: values[self.output_norm()].to_vec(),
            output: None,
            chat_template,
        })
    }

    fn layer_weights(
        &self,
        values: &[f32],
        index: usize,
        format: WeightFormat,
    ) -> Result<LayerWeights, ModelError> {
        let (theta, parts) = (&values[self.layer(index)], self.parts());
        let mut projections = Vec::with_capacity(7);
        for p in Projection::ALL {
            let name = format!("blk.{index}.{}.weight", p.gguf_name());
            let values = &theta[parts.projections[p as usize].clone()];
            projections.push(matrix(name, values, p.shape(&self.config), format)?);
        }
        let Ok(projections) = projections.try_into() else {
            unreachable!("seven projections give seven matrices")
        };
        let (attn_norm, ffn_norm) = (theta[parts.attn_norm].to_vec(), theta[parts.ffn_norm].to_vec());
        Ok(LayerWeights { attn_norm, ffn_norm, projections, extras: LayerExtras::default() })
    }

    pub(super) fn embedding(&self) -> Range<usize> {
        0..self.config.vocab_size * self.config.hidden
    }

    pub(super) fn output_norm(&self) -> Range<usize> {
        let start = self.embedding().end;
        start..start + self.config.hidden
    }

    /// Embedding and final norm together: what the first and the last operation share.
    pub(super) fn outer(&self) -> Range<usize> {
        0..self.output_norm().end
    }

    pub(super) fn layer(&self, index: usize) -> Range<usize> {
        let (first, len) = (self.outer().end, self.parts().len);
        first + index * len..first + (index + 1) * len
    }

    pub(super) fn parts(&self) -> LayerParts {
        let mut end = 0;
        let mut next = |len: usize| {
            end += len;
            end - len..end
        };
        let (attn_norm, ffn_norm) = (next(self.config.hidden), next(self.config.hidden));
        let projections = Projection::ALL.map(|p| {
            let (rows, cols) = p.shape(&self.config);
            next(rows * cols)
        });
        LayerParts { attn_norm, ffn_norm, projections, len: end }
    }

    /// The hashed text. Sizes follow from it, and so does every value's place; the name and the context length of the
    /// model do not count.
    fn description(&self) -> String {
        let ModelConfig { vocab_size, hidden, layers, feed_forward, heads, kv_heads, head_dim, .. } =
            &self.config;
        let mut text =
            format!("fleetune-full-layout-v1\nvocab {vocab_size}\nhidden {hidden}\nlayers {layers}\n");
        let _ = writeln!(text, "feed_forward {feed_forward}\nheads {heads} {kv_heads} {head_dim}");
        let (rope, eps) = (self.config.rope_base.to_bits(), self.config.rms_eps.to_bits());
        let _ = writeln!(text, "rope_base {rope:08x}\nrms_eps {eps:08x}");
        text
    }
}

fn matrix(
    name: String,
    values: &[f32],
    (rows, cols): (usize, usize),
    format: WeightFormat,
) -> Result<WeightMatrix, ModelError> {
    WeightMatrix::from_f32(values, rows, cols, format)
        .map_err(|source| ModelError::Weights { tensor: name, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::tests::{tiny_base, tiny_parts};

    #[test]
    fn a_model_goes_to_values_and_back() {
        for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Q8_0] {
            let base = tiny_base(format);
            let layout = FullLayout::of_base(&base).unwrap();
            let values = layout.values_of(&base);
            assert_eq!(values.len() as u64, base.parameter_count());
            let back = layout.to_base(&values, base.tokenizer.clone(), None, WeightFormat::F32).unwrap();
            assert_eq!(layout.values_of(&back), values, "{format:?}");
        }
        let base = tiny_base(WeightFormat::F32);
        let layout = FullLayout::of_base(&base).unwrap();
        let same = layout.to_base(&layout.values_of(&base), base.tokenizer.clone(), None, WeightFormat::F32);
        assert_eq!(same.unwrap().sha256, base.sha256, "the same file");
    }

    #[test]
    fn the_hash_counts_what_gives_values_their_meaning() {
        let base = tiny_base(WeightFormat::F32);
        let hash = |change: fn(&mut ModelConfig)| {
            let mut config = base.config.clone();
            change(&mut config);
            FullLayout::new(config).unwrap().sha256()
        };
        let plain = hash(|_| ());
        assert_eq!(plain, hash(|config| config.name = "other".into()));
        assert_ne!(plain, hash(|config| config.layers += 1));
        assert_ne!(plain, hash(|config| config.rope_base *= 2.0));
        assert_ne!(plain, hash(|config| (config.heads, config.kv_heads, config.head_dim) = (2, 1, 32)));
    }

    #[test]
    fn an_output_matrix_of_its_own_is_refused() {
        let mut parts = tiny_parts(WeightFormat::F32);
        parts.output = Some(parts.token_embedding.clone());
        let base = BaseModel::from_parts(parts).unwrap();
        let error = FullLayout::of_base(&base).unwrap_err().to_string();
        assert!(error.contains("tied output"), "{error}");
    }
}
