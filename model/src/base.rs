//! A base model: frozen weights, tokenizer and hyperparameters, with the hash that names it.
//! Reading is in `gguf/model.rs` (one file) and `hugging_face.rs` (a folder).

use std::io;
use std::path::Path;

use crate::bytes::SharedBytes;
use crate::config::{ModelConfig, Projection};
use crate::error::ModelError;
use crate::family::Extra;
use crate::gguf::{self, Metadata};
use crate::hugging_face;
use crate::tokenizer::Tokenizer;
use crate::weights::WeightMatrix;

/// The frozen weights of one decoder layer.
#[derive(Debug, Clone)]
pub struct LayerWeights {
    /// RMSNorm weights before attention, `[hidden]`.
    pub attn_norm: Vec<f32>,
    /// RMSNorm weights before the feed-forward part, `[hidden]`.
    pub ffn_norm: Vec<f32>,
    /// The seven projections, by `Projection as usize`. Rows of Q and K are in the GGUF order of the family: for Llama
    /// rows 2j and 2j + 1 of a head rotate together, for the others rows j and j + half.
    pub projections: [WeightMatrix; 7],
    /// What only some families have.
    pub extras: LayerExtras,
}

/// Vectors of a layer by `Extra as usize`; empty where the family has none.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerExtras(pub [Vec<f32>; 7]);

impl LayerExtras {
    /// The vector, if the layer has it.
    #[must_use]
    pub fn get(&self, extra: Extra) -> Option<&[f32]> {
        Some(self.0[extra as usize].as_slice()).filter(|values| !values.is_empty())
    }

    /// Those vectors, if the layer has all of them.
    pub(crate) fn all<const N: usize>(&self, extras: [Extra; N]) -> Option<[&[f32]; N]> {
        extras
            .iter()
            .all(|extra| self.get(*extra).is_some())
            .then(|| extras.map(|extra| &*self.0[extra as usize]))
    }

    /// What `read` gives for the vectors that the model has in each layer: their names' place and their length.
    pub(crate) fn read(
        config: &ModelConfig,
        read: impl Fn(Extra, usize) -> Result<Vec<f32>, ModelError>,
    ) -> Result<Self, ModelError> {
        let mut extras = Self::default();
        for extra in Extra::ALL {
            if let Some(len) = extra.len(config) {
                extras.0[extra as usize] = read(extra, len)?;
            }
        }
        Ok(extras)
    }
}

impl LayerWeights {
    /// The weight of one projection, `[out, in]`.
    #[must_use]
    pub fn projection(&self, projection: Projection) -> &WeightMatrix {
        &self.projections[projection as usize]
    }
}

/// All of a model but its hash.
#[derive(Debug, Clone)]
pub struct ModelParts {
    /// Sizes and constants.
    pub config: ModelConfig,
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// `[vocab, hidden]`.
    pub token_embedding: WeightMatrix,
    /// The decoder layers.
    pub layers: Vec<LayerWeights>,
    /// Final RMSNorm weights, `[hidden]`.
    pub output_norm: Vec<f32>,
    /// `[vocab, hidden]`; `None` when the output shares the token embedding.
    pub output: Option<WeightMatrix>,
    /// Jinja template that turns messages into one prompt.
    pub chat_template: Option<String>,
}

/// A model as it is trained upon: never changed, named by its hash.
#[derive(Debug, Clone)]
pub struct BaseModel {
    /// Sizes and constants.
    pub config: ModelConfig,
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// `[vocab, hidden]`.
    pub token_embedding: WeightMatrix,
    /// The decoder layers.
    pub layers: Vec<LayerWeights>,
    /// Final RMSNorm weights, `[hidden]`.
    pub output_norm: Vec<f32>,
    /// `[vocab, hidden]`; `None` when the output shares the token embedding.
    pub output: Option<WeightMatrix>,
    /// SHA-256 of the GGUF file's bytes; for a model that came otherwise, of the GGUF file that
    /// [`BaseModel::write_gguf`] makes of it.
    pub sha256: [u8; 32],
    /// Jinja template that turns messages into one prompt.
    pub chat_template: Option<String>,
}

impl BaseModel {
    /// Opens a GGUF file (mapped, not copied) or a folder with `config.json`, `tokenizer.json` and
    /// safetensors files.
    ///
    /// # Errors
    /// [`ModelError::Read`] when the path cannot be read, [`ModelError::File`] with the cause otherwise.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if path.is_dir() {
            return hugging_face::open(path);
        }
        let bytes = SharedBytes::map(path)?;
        gguf::model::read(bytes).map_err(|error| error.in_file(path))
    }

    /// Reads a GGUF file from memory: a `Vec<u8>`, or a `&'static [u8]` that is not copied.
    ///
    /// # Errors
    /// Any but [`ModelError::Read`] and [`ModelError::File`].
    pub fn from_gguf_bytes(bytes: impl Into<SharedBytes>) -> Result<Self, ModelError> {
        gguf::model::read(bytes.into())
    }

    /// Takes weights made in memory, checks every shape against the hyperparameters, and names the model by
    /// the GGUF file it would be written as.
    ///
    /// # Errors
    /// [`ModelError::WrongShape`], [`ModelError::Config`] or [`ModelError::Tokenizer`].
    pub fn from_parts(parts: ModelParts) -> Result<Self, ModelError> {
        let config = parts.config.validated()?;
        let mut model = Self {
            config,
            tokenizer: parts.tokenizer,
            token_embedding: parts.token_embedding,
            layers: parts.layers,
            output_norm: parts.output_norm,
            output: parts.output,
            sha256: [0; 32],
            chat_template: parts.chat_template,
        };
        model.check_shapes()?;
        model.sha256 = gguf::model::sha256_when_written(&model);
        Ok(model)
    }

    /// The output matrix, `[vocab, hidden]`: separate or the token embedding.
    #[must_use]
    pub fn head(&self) -> &WeightMatrix {
        self.output.as_ref().unwrap_or(&self.token_embedding)
    }

    /// Every weight, a shared one once.
    #[must_use]
    pub fn parameter_count(&self) -> u64 {
        let output = self.output.as_ref().map_or(0, |output| output.rows() as u64 * output.cols() as u64);
        self.config.parameter_count() + output
    }

    /// Writes the model as a GGUF file; `extra` adds to the metadata and wins over it.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_gguf(&self, extra: &Metadata, out: &mut dyn io::Write) -> io::Result<()> {
        gguf::model::write(self, extra, out)
    }

    /// The same file in memory.
    #[must_use]
    pub fn to_gguf_bytes(&self, extra: &Metadata) -> Vec<u8> {
        gguf::model::to_bytes(self, extra)
    }

    fn check_shapes(&self) -> Result<(), ModelError> {
        let config = &self.config;
        let vocabulary = (config.vocab_size, config.hidden);
        if self.layers.len() != config.layers {
            let reason = format!("{} layers announced, {} given", config.layers, self.layers.len());
            return Err(ModelError::Config { field: "layers", reason });
        }
        check_vocabulary(&self.tokenizer, config.vocab_size)?;
        check_matrix("token_embd.weight", &self.token_embedding, vocabulary)?;
        check_vector("output_norm.weight", &self.output_norm, config.hidden)?;
        if let Some(output) = &self.output {
            check_matrix("output.weight", output, vocabulary)?;
        }
        self.layers.iter().enumerate().try_for_each(|(index, layer)| check_layer(index, layer, config))
    }
}

/// The tokenizer must name exactly the ids that the embedding has rows for.
pub(crate) fn check_vocabulary(tokenizer: &Tokenizer, vocab_size: usize) -> Result<(), ModelError> {
    let tokens = tokenizer.vocab_size();
    if tokens == vocab_size {
        return Ok(());
    }
    let reason = format!("{tokens} tokens, but the token embedding has {vocab_size} rows");
    Err(ModelError::Tokenizer { reason })
}

fn check_layer(index: usize, layer: &LayerWeights, config: &ModelConfig) -> Result<(), ModelError> {
    check_vector(&gguf::model::layer_tensor(index, "attn_norm"), &layer.attn_norm, config.hidden)?;
    check_vector(&gguf::model::layer_tensor(index, "ffn_norm"), &layer.ffn_norm, config.hidden)?;
    for (extra, values) in Extra::ALL.into_iter().zip(&layer.extras.0) {
        let len = extra.len(config).unwrap_or_default();
        check_vector(&gguf::model::extra_tensor(index, extra), values, len)?;
    }
    Projection::ALL.into_iter().try_for_each(|projection| {
        let name = gguf::model::layer_tensor(index, projection.gguf_name());
        check_matrix(&name, layer.projection(projection), projection.shape(config))
    })
}

fn check_matrix(name: &str, matrix: &WeightMatrix, (rows, cols): (usize, usize)) -> Result<(), ModelError> {
    check_shape(name, &[rows, cols], &[matrix.rows(), matrix.cols()])
}

fn check_vector(name: &str, vector: &[f32], len: usize) -> Result<(), ModelError> {
    check_shape(name, &[len], &[vector.len()])?;
    match vector.iter().position(|value| !value.is_finite()) {
        Some(index) => {
            let reason = format!("value {index} is not finite");
            Err(ModelError::Malformed { what: name.to_owned(), reason })
        }
        None => Ok(()),
    }
}

/// Shapes as (rows, columns) or (length).
pub(crate) fn check_shape(tensor: &str, expected: &[usize], found: &[usize]) -> Result<(), ModelError> {
    if expected == found {
        return Ok(());
    }
    let wide = |shape: &[usize]| shape.iter().map(|&size| size as u64).collect();
    Err(ModelError::WrongShape { tensor: tensor.to_owned(), expected: wide(expected), found: wide(found) })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::tests::tiny;
    use crate::tokenizer::tests::tiny_tokenizer;
    use crate::weights::WeightFormat;

    /// Values that look like weights and are the same everywhere.
    pub(crate) fn noise(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| 0.3 * (next() + next())).collect()
    }

    fn matrix((rows, cols): (usize, usize), format: WeightFormat, seed: u32) -> WeightMatrix {
        WeightMatrix::from_f32(&noise(rows * cols, seed), rows, cols, format).unwrap()
    }

    /// The parts of a model of the smallest shape, or of the smallest whose rows are whole blocks of 256;
    /// projections in that format.
    pub(crate) fn tiny_parts(format: WeightFormat) -> ModelParts {
        let tokenizer = tiny_tokenizer();
        let sizes = match format.block().0 {
            256 => ModelConfig { hidden: 256, feed_forward: 512, head_dim: 64, ..tiny() },
            _ => tiny(),
        };
        let config = ModelConfig { vocab_size: tokenizer.vocab_size(), ..sizes };
        let norm = |seed| noise(config.hidden, seed).iter().map(|x| 1.0 + x).collect::<Vec<_>>();
        let layer = |index: usize| LayerWeights {
            attn_norm: norm(100 + index as u32),
            ffn_norm: norm(200 + index as u32),
            projections: Projection::ALL.map(|projection| {
                matrix(projection.shape(&config), format, (8 * index + projection as usize) as u32)
            }),
            extras: LayerExtras::default(),
        };
        ModelParts {
            token_embedding: matrix((config.vocab_size, config.hidden), format, 300),
            layers: (0..config.layers).map(layer).collect(),
            output_norm: norm(400),
            output: None,
            chat_template: None,
            tokenizer,
            config,
        }
    }

    /// A model of the smallest shape, projections in that format.
    pub(crate) fn tiny_base(format: WeightFormat) -> BaseModel {
        BaseModel::from_parts(tiny_parts(format)).unwrap()
    }

    #[test]
    fn parts_must_have_the_announced_shapes() {
        let check = |expected: &str, spoil: fn(&mut ModelParts)| {
            let mut parts = tiny_parts(WeightFormat::F32);
            spoil(&mut parts);
            let error = BaseModel::from_parts(parts).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("blk.1.attn_k.weight", |parts| {
            parts.layers[1].projections[Projection::K as usize] = matrix((64, 64), WeightFormat::F32, 1);
        });
        check("blk.0.ffn_norm.weight", |parts| _ = parts.layers[0].ffn_norm.pop());
        check("output.weight", |parts| parts.output = Some(matrix((2, 64), WeightFormat::F32, 1)));
        check("layers", |parts| _ = parts.layers.pop());
        check("output_norm.weight: value 2 is not finite", |parts| parts.output_norm[2] = f32::NAN);
        check("rows", |parts| parts.config.vocab_size += 1);
    }

    #[test]
    fn the_hash_is_that_of_the_written_file() {
        let base = tiny_base(WeightFormat::Q4_1);
        let bytes = base.to_gguf_bytes(&Metadata::default());
        let back = BaseModel::from_gguf_bytes(bytes).unwrap();
        assert_eq!(back.sha256, base.sha256);
        assert_ne!(tiny_base(WeightFormat::Q4_0).sha256, base.sha256);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = BaseModel::open(Path::new("no/such/model.gguf")).unwrap_err();
        assert!(
            matches!(&error, ModelError::Read { .. }) && error.to_string().contains("no/such/model.gguf")
        );
    }
}
