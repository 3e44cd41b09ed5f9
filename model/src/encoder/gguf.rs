//! The keys and tensors of architecture `bert` in a GGUF file, as llama.cpp writes and reads them, and the encoder
//! they make, both ways.
//!
//! llama.cpp's files do not name the activation: BERT's is the exact GELU, and that is taken unless a key of our
//! own says otherwise (llama.cpp itself computes the tanh form). Nor do they say how text is cleaned: llama.cpp
//! lowers letters and drops accents, and so does a file without our keys here.

use std::collections::BTreeSet;
use std::io::{self, Write};

use sha2::{Digest, Sha256};

use super::config::{Activation, EncoderConfig, EncoderProjection, Pooling};
use super::model::{EncoderLayer, EncoderParts, LayerNormWeights, LinearWeights};
use super::tokenizer::{CONTINUATION, CONTROL, WordPieceSettings, WordPieceTokenizer};
use crate::bytes::SharedBytes;
use crate::error::ModelError;
use crate::gguf::model::sha256_of;
use crate::gguf::{Gguf, Metadata, MetadataArray, MetadataValue, TensorEntry};

const ARCHITECTURE: &str = "bert";
const TOKEN_EMBEDDING: &str = "token_embd.weight";
const POSITION_EMBEDDING: &str = "position_embd.weight";
const TOKEN_TYPES: &str = "token_types.weight";
const EMBEDDING_NORM: &str = "token_embd_norm";
const ATTENTION_NORM: &str = "attn_output_norm";
const OUTPUT_NORM: &str = "layer_output_norm";
/// What llama.cpp calls the dense layer before a classifier's last one.
const POOLER: &str = "cls";

const POOLING: &str = "bert.pooling_type";
const ACTIVATION: &str = "fleetune.activation";
const LOWERCASE: &str = "fleetune.tokenizer.lowercase";
const STRIP_ACCENTS: &str = "fleetune.tokenizer.strip_accents";
const SPLIT_CHINESE: &str = "fleetune.tokenizer.split_chinese";

const TOKENIZER: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const KINDS: &str = "tokenizer.ggml.token_type";
/// Keys that name control tokens; the misspelt one is llama.cpp's.
const ROLES: [(&str, &str); 6] = [
    ("tokenizer.ggml.cls_token_id", "[CLS]"),
    ("tokenizer.ggml.bos_token_id", "[CLS]"),
    ("tokenizer.ggml.seperator_token_id", "[SEP]"),
    ("tokenizer.ggml.unknown_token_id", "[UNK]"),
    ("tokenizer.ggml.padding_token_id", "[PAD]"),
    ("tokenizer.ggml.mask_token_id", "[MASK]"),
];
/// Opens a token that begins a word; one without it continues a word.
const WORD_START: char = '\u{2581}';
/// Numbers in `tokenizer.ggml.token_type`.
const NORMAL: i64 = 1;
const CONTROL_KIND: i64 = 3;

/// Reads an encoder and the hash of its file.
pub(super) fn read(bytes: SharedBytes) -> Result<(EncoderParts, [u8; 32]), ModelError> {
    let sha256 = Sha256::digest(bytes.as_ref()).into();
    let file = Gguf::parse(bytes)?;
    let config = config(&file)?.validated()?;
    check_names(&file, config.layers)?;
    let tokenizer = tokenizer(&file.metadata)?;
    let hidden = config.hidden;
    let pooler = has(&file, &format!("{POOLER}.weight"));
    let parts = EncoderParts {
        tokenizer,
        token_embedding: file.matrix(TOKEN_EMBEDDING, config.vocab_size, hidden)?,
        position_embedding: file.matrix(POSITION_EMBEDDING, config.positions, hidden)?,
        token_types: file.matrix(TOKEN_TYPES, config.token_types, hidden)?,
        embedding_norm: norm(&file, EMBEDDING_NORM, hidden)?,
        layers: (0..config.layers).map(|index| layer(&file, &config, index)).collect::<Result<_, _>>()?,
        pooler: pooler.then(|| linear(&file, POOLER, (hidden, hidden))).transpose()?,
        config,
    };
    Ok((parts, sha256))
}

fn config(file: &Gguf) -> Result<EncoderConfig, ModelError> {
    let metadata = &file.metadata;
    let architecture = metadata.string("general.architecture")?;
    if architecture != ARCHITECTURE {
        return Err(unsupported("general.architecture", architecture, "an encoder must be bert"));
    }
    if metadata.optional_bool("bert.attention.causal")?.unwrap_or(false) {
        return Err(unsupported("bert.attention.causal", "true", "only false is supported"));
    }
    let size = |key: &str| metadata.u32(key).map(|size| size as usize);
    let (positions, announced) = (file.shape(POSITION_EMBEDDING)?.0, size("bert.context_length")?);
    if positions != announced {
        let reason = format!("must be the rows of {POSITION_EMBEDDING}, {positions}");
        return Err(unsupported("bert.context_length", &announced.to_string(), &reason));
    }
    Ok(EncoderConfig {
        name: metadata.optional_string("general.name")?.unwrap_or("unnamed").to_owned(),
        vocab_size: file.shape(TOKEN_EMBEDDING)?.0,
        hidden: size("bert.embedding_length")?,
        layers: size("bert.block_count")?,
        feed_forward: size("bert.feed_forward_length")?,
        heads: size("bert.attention.head_count")?,
        positions,
        token_types: file.shape(TOKEN_TYPES)?.0,
        norm_eps: metadata.f32("bert.attention.layer_norm_epsilon")?,
        activation: match metadata.optional_string(ACTIVATION)? {
            None | Some("gelu") => Activation::Gelu,
            Some("gelu_tanh") => Activation::GeluTanh,
            Some(other) => {
                return Err(unsupported(ACTIVATION, other, "only gelu and gelu_tanh are supported"));
            }
        },
        // llama.cpp's numbers; without a key, or with its 0 for none, the mean.
        pooling: match metadata.optional_u32(POOLING)? {
            None | Some(0 | 1) => Pooling::Mean,
            Some(2) => Pooling::Cls,
            Some(other) => {
                return Err(unsupported(
                    POOLING,
                    &other.to_string(),
                    "only 0, 1 (mean) and 2 (cls) are supported",
                ));
            }
        },
    })
}

fn tokenizer(metadata: &Metadata) -> Result<WordPieceTokenizer, ModelError> {
    let model = metadata.string(TOKENIZER)?;
    if model != "bert" {
        return Err(unsupported(TOKENIZER, model, "only WordPiece (bert) is supported"));
    }
    let (tokens, kinds) = (metadata.strings(TOKENS)?, metadata.integers(KINDS)?);
    if tokens.len() != kinds.len() {
        let reason = format!("{} tokens, but {} kinds", tokens.len(), kinds.len());
        return Err(ModelError::Tokenizer { reason });
    }
    let token = |(token, kind): (&String, i64)| {
        if kind != NORMAL || CONTROL.contains(&token.as_str()) {
            return token.clone();
        }
        token.strip_prefix(WORD_START).map_or_else(|| format!("{CONTINUATION}{token}"), str::to_owned)
    };
    let tokens = tokens.iter().zip(kinds).map(token).collect();
    let lowercase = metadata.optional_bool(LOWERCASE)?.unwrap_or(true);
    let settings = WordPieceSettings {
        lowercase,
        strip_accents: metadata.optional_bool(STRIP_ACCENTS)?.unwrap_or(lowercase),
        split_chinese: metadata.optional_bool(SPLIT_CHINESE)?.unwrap_or(true),
    };
    let tokenizer = WordPieceTokenizer::new(tokens, settings)?;
    for (key, token) in ROLES {
        let found = metadata.optional_u32(key)?;
        if let Some(id) = found.filter(|id| tokenizer.token_id(token) != Some(*id)) {
            return Err(unsupported(key, &id.to_string(), &format!("must be the id of {token}")));
        }
    }
    Ok(tokenizer)
}

fn has(file: &Gguf, name: &str) -> bool {
    file.tensor_names().any(|found| found == name)
}

/// What is not read here must not be there.
fn check_names(file: &Gguf, layers: usize) -> Result<(), ModelError> {
    let mut known: BTreeSet<String> =
        [TOKEN_EMBEDDING, POSITION_EMBEDDING, TOKEN_TYPES].map(str::to_owned).into();
    let mut both = |name: &str| known.extend(["weight", "bias"].map(|part| format!("{name}.{part}")));
    both(EMBEDDING_NORM);
    both(POOLER);
    for layer in 0..layers {
        EncoderProjection::ALL
            .into_iter()
            .map(EncoderProjection::gguf_name)
            .chain([ATTENTION_NORM, OUTPUT_NORM])
            .for_each(|name| both(&layer_name(layer, name)));
    }
    match file.tensor_names().find(|name| !known.contains(*name)) {
        Some(name) => Err(ModelError::UnexpectedTensor { tensor: name.to_owned() }),
        None => Ok(()),
    }
}

fn layer_name(layer: usize, name: &str) -> String {
    format!("blk.{layer}.{name}")
}

fn linear(file: &Gguf, name: &str, (rows, cols): (usize, usize)) -> Result<LinearWeights, ModelError> {
    Ok(LinearWeights {
        weight: file.matrix(&format!("{name}.weight"), rows, cols)?,
        bias: file.vector(&format!("{name}.bias"), rows)?,
    })
}

fn norm(file: &Gguf, name: &str, len: usize) -> Result<LayerNormWeights, ModelError> {
    Ok(LayerNormWeights {
        gain: file.vector(&format!("{name}.weight"), len)?,
        bias: file.vector(&format!("{name}.bias"), len)?,
    })
}

fn layer(file: &Gguf, config: &EncoderConfig, index: usize) -> Result<EncoderLayer, ModelError> {
    let matrix = |projection: EncoderProjection| {
        linear(file, &layer_name(index, projection.gguf_name()), projection.shape(config))
    };
    let [q, k, v, o, up, down] = EncoderProjection::ALL.map(matrix);
    Ok(EncoderLayer {
        projections: [q?, k?, v?, o?, up?, down?],
        attention_norm: norm(file, &layer_name(index, ATTENTION_NORM), config.hidden)?,
        output_norm: norm(file, &layer_name(index, OUTPUT_NORM), config.hidden)?,
    })
}

/// Writes the encoder as a GGUF file.
pub(super) fn write(parts: &EncoderParts, extra: &Metadata, out: &mut dyn Write) -> io::Result<()> {
    let mut metadata = metadata(parts);
    metadata.extend(extra);
    crate::gguf::write(&metadata, &tensors(parts), out)
}

/// The hash of that file, which is never held in memory.
pub(super) fn sha256_when_written(parts: &EncoderParts) -> [u8; 32] {
    sha256_of(|hash| write(parts, &Metadata::default(), hash))
}

fn metadata(parts: &EncoderParts) -> Metadata {
    let (config, tokenizer) = (&parts.config, &parts.tokenizer);
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", ARCHITECTURE);
    metadata.set("general.type", "model");
    metadata.set("general.name", config.name.as_str());
    let sizes = [
        ("bert.block_count", config.layers),
        ("bert.context_length", config.positions),
        ("bert.embedding_length", config.hidden),
        ("bert.feed_forward_length", config.feed_forward),
        ("bert.attention.head_count", config.heads),
        ("tokenizer.ggml.token_type_count", config.token_types),
    ];
    sizes.into_iter().for_each(|(key, size)| metadata.set(key, size as u32));
    metadata.set("bert.attention.layer_norm_epsilon", config.norm_eps);
    metadata.set("bert.attention.causal", false);
    // The file's pooling is a sentence's; a pooler is a classifier's.
    metadata.set(POOLING, if config.pooling == Pooling::Mean { 1u32 } else { 2u32 });
    if config.activation == Activation::GeluTanh {
        metadata.set(ACTIVATION, "gelu_tanh");
    }
    let is_control = |token: &String| CONTROL.contains(&token.as_str());
    let written = |token: &String| match token.strip_prefix(CONTINUATION) {
        _ if is_control(token) => token.clone(),
        Some(rest) => rest.to_owned(),
        None => format!("{WORD_START}{token}"),
    };
    let kind = |token: &String| (if is_control(token) { CONTROL_KIND } else { NORMAL }) as i32;
    let tokens = tokenizer.tokens();
    metadata.set(TOKENIZER, "bert");
    metadata.set(TOKENS, MetadataValue::Array(MetadataArray::String(tokens.iter().map(written).collect())));
    metadata.set(KINDS, MetadataValue::Array(MetadataArray::I32(tokens.iter().map(kind).collect())));
    for (key, token) in ROLES {
        tokenizer.token_id(token).iter().for_each(|id| metadata.set(key, *id));
    }
    let settings = tokenizer.settings();
    metadata.set(LOWERCASE, settings.lowercase);
    metadata.set(STRIP_ACCENTS, settings.strip_accents);
    metadata.set(SPLIT_CHINESE, settings.split_chinese);
    metadata
}

fn tensors(parts: &EncoderParts) -> Vec<TensorEntry<'_>> {
    let mut tensors = vec![
        TensorEntry::of_matrix(TOKEN_EMBEDDING.to_owned(), &parts.token_embedding),
        TensorEntry::of_matrix(POSITION_EMBEDDING.to_owned(), &parts.position_embedding),
        TensorEntry::of_matrix(TOKEN_TYPES.to_owned(), &parts.token_types),
    ];
    let norm = |name: &str, norm| norm_tensors(name, norm);
    tensors.extend(norm(EMBEDDING_NORM, &parts.embedding_norm));
    for (index, layer) in parts.layers.iter().enumerate() {
        for (projection, linear) in EncoderProjection::ALL.into_iter().zip(&layer.projections) {
            tensors.extend(linear_tensors(&layer_name(index, projection.gguf_name()), linear));
        }
        tensors.extend(norm(&layer_name(index, ATTENTION_NORM), &layer.attention_norm));
        tensors.extend(norm(&layer_name(index, OUTPUT_NORM), &layer.output_norm));
    }
    tensors.extend(parts.pooler.iter().flat_map(|pooler| linear_tensors(POOLER, pooler)));
    tensors
}

fn linear_tensors<'a>(name: &str, linear: &'a LinearWeights) -> [TensorEntry<'a>; 2] {
    [
        TensorEntry::of_matrix(format!("{name}.weight"), &linear.weight),
        TensorEntry::of_vector(format!("{name}.bias"), &linear.bias),
    ]
}

fn norm_tensors<'a>(name: &str, norm: &'a LayerNormWeights) -> [TensorEntry<'a>; 2] {
    [
        TensorEntry::of_vector(format!("{name}.weight"), &norm.gain),
        TensorEntry::of_vector(format!("{name}.bias"), &norm.bias),
    ]
}

fn unsupported(key: &str, found: &str, reason: &str) -> ModelError {
    ModelError::Unsupported { key: key.to_owned(), found: found.to_owned(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::EncoderModel;
    use crate::encoder::fixtures::tiny_model;
    use crate::weights::WeightFormat;

    fn bytes(model: &EncoderModel, extra: &Metadata) -> Vec<u8> {
        let mut bytes = Vec::new();
        model.write_gguf(extra, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn comes_back_from_its_file() {
        for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Q8_0, WeightFormat::Q4_1] {
            let model = tiny_model().in_format(format).unwrap();
            let file = bytes(&model, &Metadata::default());
            let back = EncoderModel::from_gguf_bytes(file.clone()).unwrap();
            assert_eq!(back.sha256(), model.sha256());
            assert_eq!(back.config(), model.config());
            assert_eq!(back.tokenizer().tokens(), model.tokenizer().tokens());
            assert_eq!(bytes(&back, &Metadata::default()), file);
            let ids: &[u32] = &[2, 30, 40, 50, 3];
            assert_eq!(back.hidden_states(&[ids]), model.hidden_states(&[ids]));
        }
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        let check = |key: &str, value: MetadataValue, expected: &str| {
            let mut extra = Metadata::default();
            extra.set(key, value);
            let error = EncoderModel::from_gguf_bytes(bytes(&tiny_model(), &extra)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("general.architecture", "nomic-bert".into(), "an encoder must be bert");
        check("bert.attention.causal", true.into(), "causal");
        check("bert.context_length", 65u32.into(), "rows of position_embd");
        check("bert.block_count", 3u32.into(), "missing tensor blk.2.attn_q.weight");
        check("bert.block_count", 1u32.into(), "unexpected tensor blk.1.");
        check("bert.embedding_length", 64u32.into(), "wrong shape");
        check("bert.attention.layer_norm_epsilon", 0f32.into(), "norm_eps");
        check(POOLING, 3u32.into(), "only 0, 1");
        check(ACTIVATION, "relu".into(), "fleetune.activation");
        check(TOKENIZER, "gpt2".into(), "only WordPiece");
        check("tokenizer.ggml.cls_token_id", 7u32.into(), "the id of [CLS]");
        check(KINDS, MetadataValue::Array(MetadataArray::I32(vec![1])), "kinds");
        let tokens = vec!["[CLS]".to_owned(); 160];
        check(TOKENS, MetadataValue::Array(MetadataArray::String(tokens)), "repetition");
    }

    #[test]
    fn every_truncation_is_refused() {
        let file = bytes(&tiny_model(), &Metadata::default());
        for cut in (0..file.len()).step_by(997) {
            assert!(EncoderModel::from_gguf_bytes(file[..cut].to_vec()).is_err(), "{cut}");
        }
    }
}
