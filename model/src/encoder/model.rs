//! An encoder as it is trained upon: frozen weights, tokenizer and sizes, named by a hash.
//! Reading is in `gguf.rs` (one file) and `hugging_face.rs` (a folder).

use std::io;
use std::path::Path;

use super::config::{EncoderConfig, EncoderProjection, Pooling};
use super::pass::{Pass, pooled};
use super::tokenizer::WordPieceTokenizer;
use super::{gguf, hugging_face};
use crate::base::check_shape;
use crate::batch::{InputError, check_ids};
use crate::bytes::SharedBytes;
use crate::error::ModelError;
use crate::gguf::Metadata;
use crate::kernels::bf16::Precision;
use crate::weights::{WeightFormat, WeightMatrix};

/// A dense layer.
#[derive(Debug, Clone)]
pub struct LinearWeights {
    /// `[out, in]`.
    pub weight: WeightMatrix,
    /// `[out]`.
    pub bias: Vec<f32>,
}

/// A layer normalization.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerNormWeights {
    /// Multiplies the normalized values, `[hidden]`.
    pub gain: Vec<f32>,
    /// Added to them, `[hidden]`.
    pub bias: Vec<f32>,
}

/// The frozen weights of one layer.
#[derive(Debug, Clone)]
pub struct EncoderLayer {
    /// By `EncoderProjection as usize`.
    pub projections: [LinearWeights; 6],
    /// After attention.
    pub attention_norm: LayerNormWeights,
    /// After the feed-forward part.
    pub output_norm: LayerNormWeights,
}

/// All of an encoder but its hash.
#[derive(Debug, Clone)]
pub struct EncoderParts {
    /// Sizes and constants.
    pub config: EncoderConfig,
    /// Text to ids.
    pub tokenizer: WordPieceTokenizer,
    /// `[vocab, hidden]`.
    pub token_embedding: WeightMatrix,
    /// `[positions, hidden]`.
    pub position_embedding: WeightMatrix,
    /// `[token types, hidden]`.
    pub token_types: WeightMatrix,
    /// After the sum of the three embeddings.
    pub embedding_norm: LayerNormWeights,
    /// The layers.
    pub layers: Vec<EncoderLayer>,
    /// `[hidden, hidden]`, if the model has one.
    pub pooler: Option<LinearWeights>,
}

/// An encoder that is never changed.
#[derive(Debug, Clone)]
pub struct EncoderModel {
    parts: EncoderParts,
    sha256: [u8; 32],
}

impl EncoderModel {
    /// Opens a GGUF file of architecture `bert` (mapped, not copied) or a folder with `config.json`,
    /// `tokenizer.json` or `vocab.txt`, and `model.safetensors`.
    ///
    /// # Errors
    /// [`ModelError::Read`] when the path cannot be read, [`ModelError::File`] with the cause otherwise.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if path.is_dir() {
            return hugging_face::open(path).and_then(Self::from_parts).map_err(|error| error.in_file(path));
        }
        Self::from_gguf_bytes(SharedBytes::map(path)?).map_err(|error| error.in_file(path))
    }

    /// Reads a GGUF file from memory.
    ///
    /// # Errors
    /// Any but [`ModelError::Read`] and [`ModelError::File`].
    pub fn from_gguf_bytes(bytes: impl Into<SharedBytes>) -> Result<Self, ModelError> {
        let (parts, sha256) = gguf::read(bytes.into())?;
        Ok(Self { parts: checked(parts)?, sha256 })
    }

    /// Takes weights made in memory, checks every shape, and names the model by the GGUF file it would be written
    /// as.
    ///
    /// # Errors
    /// [`ModelError::WrongShape`], [`ModelError::Config`], [`ModelError::Malformed`] or [`ModelError::Tokenizer`].
    pub fn from_parts(parts: EncoderParts) -> Result<Self, ModelError> {
        let parts = checked(parts)?;
        let sha256 = gguf::sha256_when_written(&parts);
        Ok(Self { parts, sha256 })
    }

    /// The same model with its projections, its token embedding and its pooler in another format; what has rows
    /// that are no whole blocks is refused.
    ///
    /// # Errors
    /// [`ModelError::Weights`] names the tensor.
    pub fn in_format(&self, format: WeightFormat) -> Result<Self, ModelError> {
        let convert = |name: String, matrix: &mut WeightMatrix| {
            let (rows, cols) = (matrix.rows(), matrix.cols());
            *matrix = WeightMatrix::from_f32(&matrix.to_f32(), rows, cols, format)
                .map_err(|source| ModelError::Weights { tensor: name, source })?;
            Ok(())
        };
        let mut parts = self.parts.clone();
        convert("token_embd".to_owned(), &mut parts.token_embedding)?;
        for (index, layer) in parts.layers.iter_mut().enumerate() {
            for (projection, linear) in EncoderProjection::ALL.into_iter().zip(&mut layer.projections) {
                convert(format!("blk.{index}.{}", projection.gguf_name()), &mut linear.weight)?;
            }
        }
        parts.pooler.iter_mut().try_for_each(|pooler| convert("cls".to_owned(), &mut pooler.weight))?;
        Self::from_parts(parts)
    }

    /// Writes the model as a GGUF file; `extra` adds to the metadata and wins over it.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_gguf(&self, extra: &Metadata, out: &mut dyn io::Write) -> io::Result<()> {
        gguf::write(&self.parts, extra, out)
    }

    /// Sizes and constants.
    #[must_use]
    pub fn config(&self) -> &EncoderConfig {
        &self.parts.config
    }

    /// Text to ids.
    #[must_use]
    pub fn tokenizer(&self) -> &WordPieceTokenizer {
        &self.parts.tokenizer
    }

    /// Everything but the hash.
    #[must_use]
    pub fn parts(&self) -> &EncoderParts {
        &self.parts
    }

    /// SHA-256 of the GGUF file's bytes; for a model that came otherwise, of the file that
    /// [`EncoderModel::write_gguf`] makes of it.
    #[must_use]
    pub fn sha256(&self) -> [u8; 32] {
        self.sha256
    }

    /// The last layer's rows, `[rows, hidden]`, of all sequences one behind another.
    ///
    /// # Errors
    /// [`InputError`] if a sequence is empty, too long, or holds an unknown id.
    pub fn hidden_states(&self, sequences: &[&[u32]]) -> Result<Vec<f32>, InputError> {
        self.check(sequences)?;
        let pass = Pass { model: &self.parts, lora: &|_, _| None, precision: Precision::F32 };
        Ok(pass.forward(sequences, false).hidden.to_vec())
    }

    /// One vector of `hidden` values a sequence, not normalized to length 1.
    ///
    /// # Errors
    /// As [`EncoderModel::hidden_states`]; [`InputError::NoPooler`].
    pub fn embed(&self, sequences: &[&[u32]], pooling: Pooling) -> Result<Vec<f32>, InputError> {
        self.check(sequences)?;
        self.check_pooling(pooling)?;
        let pass = Pass { model: &self.parts, lora: &|_, _| None, precision: Precision::F32 };
        let forward = pass.forward(sequences, false);
        Ok(pooled(&self.parts, pooling, &forward.hidden, &forward.sequences).to_vec())
    }

    pub(super) fn check(&self, sequences: &[&[u32]]) -> Result<(), InputError> {
        let config = self.config();
        for ids in sequences {
            if ids.is_empty() {
                return Err(InputError::TooShort { found: 0, needed: 1 });
            }
            if ids.len() > config.positions {
                return Err(InputError::TooLong { found: ids.len(), limit: config.positions });
            }
            check_ids(ids, config.vocab_size)?;
        }
        Ok(())
    }

    pub(super) fn check_pooling(&self, pooling: Pooling) -> Result<(), InputError> {
        if pooling == Pooling::Pooler && self.parts.pooler.is_none() {
            return Err(InputError::NoPooler { model: self.config().name.clone() });
        }
        Ok(())
    }
}

/// The same parts, if every shape is what the sizes say and every vector is finite.
fn checked(parts: EncoderParts) -> Result<EncoderParts, ModelError> {
    let config = parts.config.clone().validated()?;
    let (hidden, tokens) = (config.hidden, parts.tokenizer.tokens().len());
    if tokens != config.vocab_size {
        let reason = format!("{tokens} tokens, but the token embedding has {} rows", config.vocab_size);
        return Err(ModelError::Tokenizer { reason });
    }
    if parts.layers.len() != config.layers {
        let reason = format!("{} layers announced, {} given", config.layers, parts.layers.len());
        return Err(ModelError::Config { field: "layers", reason });
    }
    for (name, matrix, rows) in [
        ("token_embd", &parts.token_embedding, config.vocab_size),
        ("position_embd", &parts.position_embedding, config.positions),
        ("token_types", &parts.token_types, config.token_types),
    ] {
        check_shape(name, &[rows, hidden], &[matrix.rows(), matrix.cols()])?;
    }
    check_norm("token_embd_norm", &parts.embedding_norm, hidden)?;
    for (index, layer) in parts.layers.iter().enumerate() {
        for (projection, linear) in EncoderProjection::ALL.into_iter().zip(&layer.projections) {
            check_linear(
                &format!("blk.{index}.{}", projection.gguf_name()),
                linear,
                projection.shape(&config),
            )?;
        }
        check_norm(&format!("blk.{index}.attn_output_norm"), &layer.attention_norm, hidden)?;
        check_norm(&format!("blk.{index}.layer_output_norm"), &layer.output_norm, hidden)?;
    }
    if let Some(pooler) = &parts.pooler {
        check_linear("cls", pooler, (hidden, hidden))?;
    }
    Ok(EncoderParts { config, ..parts })
}

fn check_linear(name: &str, linear: &LinearWeights, (rows, cols): (usize, usize)) -> Result<(), ModelError> {
    check_shape(name, &[rows, cols], &[linear.weight.rows(), linear.weight.cols()])?;
    check_vector(name, &linear.bias, rows)
}

fn check_norm(name: &str, norm: &LayerNormWeights, len: usize) -> Result<(), ModelError> {
    check_vector(name, &norm.gain, len)?;
    check_vector(name, &norm.bias, len)
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
