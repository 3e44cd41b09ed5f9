//! The keys and tensors of a decoder in a GGUF file, and the base model they make, both ways. What differs by family is
//! in `gguf/family.rs`.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::thread;

use sha2::{Digest, Sha256};

use super::family::{check_architecture, read_family, refuse_other_computations, unsupported, write_family};
use super::{Gguf, Metadata, TensorEntry};
use crate::base::{BaseModel, LayerExtras, LayerWeights, check_vocabulary};
use crate::bytes::SharedBytes;
use crate::config::{ModelConfig, Projection};
use crate::error::ModelError;
use crate::family::Extra;
use crate::tokenizer::Tokenizer;
use crate::weights::WeightFormat;

/// Bytes of a file from which its hash is taken on a thread of its own.
const HASHED_BESIDE: usize = 1 << 22;
/// Bytes of a mapped file that are in memory for its hash.
const HASHED_AT_ONCE: usize = 1 << 20;
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
const TOKEN_EMBEDDING: &str = "token_embd.weight";
const OUTPUT_NORM: &str = "output_norm.weight";
const OUTPUT: &str = "output.weight";
/// Llama's own base of the rotary frequencies, where a file names none.
const ROPE_BASE: f32 = 10_000.0;

/// The name of a layer's tensor, as in `blk.0.attn_q.weight`.
pub(crate) fn layer_tensor(layer: usize, name: &str) -> String {
    format!("blk.{layer}.{name}.weight")
}

/// The name of a layer's vector that only some families have, as in `blk.0.attn_q.bias`.
pub(crate) fn extra_tensor(layer: usize, extra: Extra) -> String {
    format!("blk.{layer}.{}", extra.gguf_name())
}

/// Reads a base model from the bytes of a GGUF file.
pub(crate) fn read(bytes: SharedBytes) -> Result<BaseModel, ModelError> {
    let hashed = bytes.clone();
    let digest = move || sha256(&hashed);
    // Hashing takes as long as all the rest: half a second a gigabyte.
    let thread = (bytes.as_ref().len() > HASHED_BESIDE).then(|| thread::Builder::new().spawn(digest.clone()));
    let model = parse(bytes);
    let sha256 = match thread {
        Some(Ok(thread)) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        Some(Err(_)) | None => digest(),
    };
    Ok(BaseModel { sha256, ..model? })
}

/// Of all bytes; those of a mapped file are let go as soon as they are hashed.
fn sha256(bytes: &SharedBytes) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut first = 0;
    for chunk in bytes.as_ref().chunks(HASHED_AT_ONCE) {
        hash.update(chunk);
        bytes.release(first..first + chunk.len());
        first += chunk.len();
    }
    hash.finalize().into()
}

fn parse(bytes: SharedBytes) -> Result<BaseModel, ModelError> {
    let file = Gguf::parse(bytes)?;
    let config = read_config(&file)?;
    check_tensor_names(&file, &config)?;
    let tokenizer = Tokenizer::from_gguf(&file.metadata)?;
    check_vocabulary(&tokenizer, config.vocab_size)?;
    let (vocab, hidden) = (config.vocab_size, config.hidden);
    let has_output = file.tensor_names().any(|name| name == OUTPUT);
    Ok(BaseModel {
        token_embedding: file.matrix(TOKEN_EMBEDDING, vocab, hidden)?,
        layers: (0..config.layers)
            .map(|layer| read_layer(&file, &config, layer))
            .collect::<Result<_, _>>()?,
        output_norm: file.vector(OUTPUT_NORM, hidden)?,
        output: has_output.then(|| file.matrix(OUTPUT, vocab, hidden)).transpose()?,
        chat_template: file.metadata.optional_string(CHAT_TEMPLATE)?.map(str::to_owned),
        config,
        tokenizer,
        sha256: [0; 32],
    })
}

/// Writes the model as a GGUF file.
pub(crate) fn write(model: &BaseModel, extra: &Metadata, out: &mut dyn Write) -> io::Result<()> {
    let mut metadata = metadata(model);
    metadata.extend(extra);
    super::write(&metadata, &tensors(model), out)
}

/// The same file in memory.
pub(crate) fn to_bytes(model: &BaseModel, extra: &Metadata) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(model, extra, &mut bytes).expect("a vector takes all bytes");
    bytes
}

/// The hash of the file, which is never held in memory.
pub(crate) fn sha256_when_written(model: &BaseModel) -> [u8; 32] {
    sha256_of(|hash| write(model, &Metadata::default(), hash))
}

/// The hash of what is written.
pub(crate) fn sha256_of(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> [u8; 32] {
    let mut hash = HashWriter(Sha256::new());
    write(&mut hash).expect("a hash takes all bytes");
    hash.0.finalize().into()
}

struct HashWriter(Sha256);

impl Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn read_config(file: &Gguf) -> Result<ModelConfig, ModelError> {
    let metadata = &file.metadata;
    let architecture = metadata.string("general.architecture")?;
    check_architecture(architecture)?;
    refuse_other_computations(metadata, architecture)?;
    let key = |name: &str| format!("{architecture}.{name}");
    let size = |name: &str| metadata.u32(&key(name)).map(|size| size as usize);
    let (hidden, layers) = (size("embedding_length")?, size("block_count")?);
    let heads = size("attention.head_count")?;
    let kv_heads = metadata.optional_u32(&key("attention.head_count_kv"))?;
    let head_dim = head_dim(metadata, &key, hidden, heads)?;
    let config = ModelConfig {
        name: metadata.optional_string("general.name")?.unwrap_or("unnamed").to_owned(),
        family: read_family(metadata, architecture, layers, (hidden, heads, head_dim))?,
        vocab_size: file.shape(TOKEN_EMBEDDING)?.0,
        hidden,
        layers,
        feed_forward: size("feed_forward_length")?,
        heads,
        kv_heads: kv_heads.map_or(heads, |count| count as usize),
        head_dim,
        context_length: size("context_length")?,
        rope_base: metadata.optional_f32(&key("rope.freq_base"))?.unwrap_or(ROPE_BASE),
        rms_eps: metadata.f32(&key("attention.layer_norm_rms_epsilon"))?,
    };
    config.validated()
}

/// From the key length if there is one; keys, values and rotated parts must all be that long.
fn head_dim(
    metadata: &Metadata,
    key: &dyn Fn(&str) -> String,
    hidden: usize,
    heads: usize,
) -> Result<usize, ModelError> {
    let split = || hidden.checked_div(heads).filter(|dim| dim * heads == hidden);
    let uneven = || ModelError::Config { field: "heads", reason: format!("{heads} do not divide {hidden}") };
    let dim = match metadata.optional_u32(&key("attention.key_length"))? {
        Some(dim) => dim as usize,
        None => split().ok_or_else(uneven)?,
    };
    for key in ["attention.value_length", "rope.dimension_count"].map(key) {
        let found = metadata.optional_u32(&key)?.map_or(dim, |found| found as usize);
        if found != dim {
            return Err(unsupported(&key, found, format!("must be the head length, {dim}")));
        }
    }
    Ok(dim)
}

/// Biases, rotary factors, experts: what is not read here must not be there.
fn check_tensor_names(file: &Gguf, config: &ModelConfig) -> Result<(), ModelError> {
    let known: BTreeSet<String> = tensor_names(config).into_iter().collect();
    match file.tensor_names().find(|&name| !known.contains(name)) {
        Some(name) => Err(ModelError::UnexpectedTensor { tensor: name.to_owned() }),
        None => Ok(()),
    }
}

fn tensor_names(config: &ModelConfig) -> Vec<String> {
    let mut names = [TOKEN_EMBEDDING, OUTPUT_NORM, OUTPUT].map(str::to_owned).to_vec();
    for layer in 0..config.layers {
        let extras = Extra::ALL.into_iter().filter(|extra| extra.len(config).is_some());
        names.extend(extras.map(|extra| extra_tensor(layer, extra)));
        names.extend(["attn_norm", "ffn_norm"].map(|name| layer_tensor(layer, name)));
        names.extend(Projection::ALL.map(|projection| layer_tensor(layer, projection.gguf_name())));
    }
    names
}

fn read_layer(file: &Gguf, config: &ModelConfig, layer: usize) -> Result<LayerWeights, ModelError> {
    let matrix = |projection: Projection| {
        let (rows, cols) = projection.shape(config);
        file.matrix(&layer_tensor(layer, projection.gguf_name()), rows, cols)
    };
    let [q, k, v, o, gate, up, down] = Projection::ALL.map(matrix);
    Ok(LayerWeights {
        attn_norm: file.vector(&layer_tensor(layer, "attn_norm"), config.hidden)?,
        ffn_norm: file.vector(&layer_tensor(layer, "ffn_norm"), config.hidden)?,
        projections: [q?, k?, v?, o?, gate?, up?, down?],
        extras: LayerExtras::read(config, |extra, len| file.vector(&extra_tensor(layer, extra), len))?,
    })
}

fn metadata(model: &BaseModel) -> Metadata {
    let config = &model.config;
    let architecture = config.family.architecture();
    let key = |name: &str| format!("{architecture}.{name}");
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", architecture);
    metadata.set("general.type", "model");
    metadata.set("general.name", config.name.as_str());
    metadata.set("general.file_type", file_type(model.layers[0].projections[0].format()));
    metadata.set("general.quantization_version", 2u32);
    let sizes = [
        ("block_count", config.layers),
        ("context_length", config.context_length),
        ("embedding_length", config.hidden),
        ("feed_forward_length", config.feed_forward),
        ("attention.head_count", config.heads),
        ("attention.head_count_kv", config.kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
        ("vocab_size", config.vocab_size),
    ];
    sizes.into_iter().for_each(|(name, size)| metadata.set(&key(name), size as u32));
    metadata.set(&key("rope.freq_base"), config.rope_base);
    metadata.set(&key("attention.layer_norm_rms_epsilon"), config.rms_eps);
    write_family(config, &mut metadata);
    model.tokenizer.write_gguf(&mut metadata);
    model.chat_template.iter().for_each(|template| metadata.set(CHAT_TEMPLATE, template.as_str()));
    metadata
}

/// llama.cpp's number for a file that is mostly of that format.
fn file_type(format: WeightFormat) -> u32 {
    match format {
        WeightFormat::F32 => 0,
        WeightFormat::F16 => 1,
        WeightFormat::Q4_0 => 2,
        WeightFormat::Q4_1 => 3,
        WeightFormat::Q8_0 => 7,
        WeightFormat::Q5_0 => 8,
        WeightFormat::Q4_K => 14,
        WeightFormat::Q6_K => 18,
        WeightFormat::BF16 => 32,
    }
}

fn tensors(model: &BaseModel) -> Vec<TensorEntry<'_>> {
    let mut tensors = vec![TensorEntry::of_matrix(TOKEN_EMBEDDING.to_owned(), &model.token_embedding)];
    for (index, layer) in model.layers.iter().enumerate() {
        tensors.push(TensorEntry::of_vector(layer_tensor(index, "attn_norm"), &layer.attn_norm));
        tensors.push(TensorEntry::of_vector(layer_tensor(index, "ffn_norm"), &layer.ffn_norm));
        tensors.extend(Extra::ALL.into_iter().filter_map(|extra| {
            Some(TensorEntry::of_vector(extra_tensor(index, extra), layer.extras.get(extra)?))
        }));
        tensors.extend(Projection::ALL.map(|projection| {
            TensorEntry::of_matrix(layer_tensor(index, projection.gguf_name()), layer.projection(projection))
        }));
    }
    tensors.push(TensorEntry::of_vector(OUTPUT_NORM.to_owned(), &model.output_norm));
    tensors.extend(model.output.as_ref().map(|output| TensorEntry::of_matrix(OUTPUT.to_owned(), output)));
    tensors
}
