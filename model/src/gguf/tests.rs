//! GGUF files that are sound, cut short, changed at random, or built to mislead.

use proptest::prelude::*;

use super::*;
use crate::base::BaseModel;
use crate::base::tests::{noise, tiny_base, tiny_parts};

/// A sound file taken apart, to be put together again with one thing changed.
struct Parts {
    metadata: Metadata,
    tensors: Vec<(String, Vec<u64>, WeightFormat, Vec<u8>)>,
}

impl Parts {
    fn of(base: &BaseModel) -> Self {
        let file = Gguf::parse(base.to_gguf_bytes(&Metadata::default()).into()).unwrap();
        let bytes = |tensor: &TensorInfo| file.bytes.as_ref()[tensor.range.clone()].to_vec();
        let tensors = file.tensors.iter();
        let tensors = tensors.map(|(name, info)| (name.clone(), info.dims.clone(), info.format, bytes(info)));
        Self { tensors: tensors.collect(), metadata: file.metadata }
    }

    fn bytes(&self) -> Vec<u8> {
        let entries: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, dims, format, bytes)| TensorEntry {
                name: name.clone(),
                dims: dims.clone(),
                format: *format,
                bytes,
            })
            .collect();
        let mut out = Vec::new();
        write(&self.metadata, &entries, &mut out).unwrap();
        out
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Vec<u64>, WeightFormat, Vec<u8>) {
        self.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
    }
}

fn refused(spoil: impl Fn(&mut Parts)) -> ModelError {
    let mut parts = Parts::of(&tiny_base(WeightFormat::Q4_1));
    spoil(&mut parts);
    BaseModel::from_gguf_bytes(parts.bytes()).unwrap_err()
}

fn refused_with(expected: &str, spoil: impl Fn(&mut Parts)) {
    let error = refused(spoil).to_string();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn models_round_trip_in_every_format() {
    for format in WeightFormat::ALL {
        let base = tiny_base(format);
        let back = BaseModel::from_gguf_bytes(base.to_gguf_bytes(&Metadata::default())).unwrap();
        assert_eq!(back.config, base.config);
        assert_eq!(back.tokenizer.vocabulary(), base.tokenizer.vocabulary());
        assert_eq!(back.token_embedding.as_bytes(), base.token_embedding.as_bytes());
        assert_eq!(back.output_norm, base.output_norm);
        for (ours, theirs) in back.layers.iter().zip(&base.layers) {
            assert_eq!((&ours.attn_norm, &ours.ffn_norm), (&theirs.attn_norm, &theirs.ffn_norm));
            for (ours, theirs) in ours.projections.iter().zip(&theirs.projections) {
                assert_eq!((ours.format(), ours.as_bytes()), (format, theirs.as_bytes()));
            }
        }
    }
}

#[test]
fn a_separate_output_and_extra_keys_are_kept() {
    let mut parts = tiny_parts(WeightFormat::F16);
    let (rows, cols) = (parts.config.vocab_size, parts.config.hidden);
    parts.output =
        Some(WeightMatrix::from_f32(&noise(rows * cols, 5), rows, cols, WeightFormat::BF16).unwrap());
    parts.chat_template = Some("{{ x }}".to_owned());
    let base = BaseModel::from_parts(parts).unwrap();
    let mut extra = Metadata::default();
    extra.set("general.name", "renamed");
    extra.set("general.license", "cc0-1.0");
    let back = BaseModel::from_gguf_bytes(base.to_gguf_bytes(&extra)).unwrap();
    assert_eq!(back.config.name, "renamed");
    assert_eq!(back.chat_template.as_deref(), Some("{{ x }}"));
    assert_eq!(back.head().as_bytes(), base.output.as_ref().unwrap().as_bytes());
    assert_eq!(back.parameter_count(), base.config.parameter_count() + (rows * cols) as u64);
    assert_ne!(back.sha256, base.sha256);
}

#[test]
fn opens_a_file_by_mapping_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let base = tiny_base(WeightFormat::F32);
    let bytes = base.to_gguf_bytes(&Metadata::default());
    std::fs::write(&path, &bytes).unwrap();
    let opened = BaseModel::open(&path).unwrap();
    assert_eq!(opened.sha256, base.sha256);
    assert_eq!(opened.token_embedding.as_f32(), base.token_embedding.as_f32());
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let error = BaseModel::open(&path).unwrap_err().to_string();
    assert!(error.contains("tiny.gguf: truncated: tensor"), "{error}");
    std::fs::write(&path, b"").unwrap();
    assert!(BaseModel::open(&path).unwrap_err().to_string().contains("the magic number"));
}

#[test]
fn every_kind_of_value_comes_back() {
    let arrays = [
        MetadataArray::U8(vec![1, 255]),
        MetadataArray::I8(vec![-1]),
        MetadataArray::U16(vec![65_535]),
        MetadataArray::I16(vec![-2]),
        MetadataArray::U32(vec![]),
        MetadataArray::I32(vec![-3, 4]),
        MetadataArray::F32(vec![0.5]),
        MetadataArray::Bool(vec![true, false]),
        MetadataArray::String(vec!["ä".to_owned(), String::new()]),
        MetadataArray::U64(vec![u64::MAX]),
        MetadataArray::I64(vec![i64::MIN]),
        MetadataArray::F64(vec![1e300]),
    ];
    let mut values: Vec<MetadataValue> = arrays.into_iter().map(MetadataValue::Array).collect();
    values.extend([
        MetadataValue::U8(1),
        MetadataValue::I8(-1),
        MetadataValue::U16(2),
        MetadataValue::I16(-2),
        MetadataValue::U32(3),
        MetadataValue::I32(-3),
        MetadataValue::F32(0.25),
        MetadataValue::Bool(true),
        MetadataValue::String("text".to_owned()),
        MetadataValue::U64(4),
        MetadataValue::I64(-4),
        MetadataValue::F64(-0.125),
    ]);
    let mut metadata = Metadata::default();
    values.into_iter().enumerate().for_each(|(index, value)| metadata.set(&format!("key.{index:02}"), value));
    let mut bytes = Vec::new();
    write(&metadata, &[], &mut bytes).unwrap();
    assert_eq!(Gguf::parse(bytes.into()).unwrap().metadata, metadata);
}

#[test]
fn every_prefix_is_reported_as_truncated() {
    let bytes = tiny_base(WeightFormat::Q4_0).to_gguf_bytes(&Metadata::default());
    for cut in 0..bytes.len() {
        let error = BaseModel::from_gguf_bytes(bytes[..cut].to_vec()).unwrap_err();
        assert!(matches!(error, ModelError::Truncated { .. }), "{cut} of {}: {error}", bytes.len());
    }
}

#[test]
fn counts_and_lengths_beyond_the_file_are_refused_at_once() {
    let head = |tensors: u64, keys: u64, rest: &[u8]| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(keys.to_le_bytes());
        bytes.extend(rest);
        BaseModel::from_gguf_bytes(bytes).unwrap_err().to_string()
    };
    let key = |code: u32, rest: &[u8]| {
        let mut bytes = 1u64.to_le_bytes().to_vec();
        bytes.push(b'k');
        bytes.extend(code.to_le_bytes());
        bytes.extend(rest);
        bytes
    };
    let array = |code: u32, count: u64| key(9, &[&code.to_le_bytes()[..], &count.to_le_bytes()].concat());
    assert!(head(u64::MAX, 0, &[]).contains("truncated: a tensor's name"));
    assert!(head(0, u64::MAX, &[]).contains("truncated: a key"));
    assert!(head(0, 1, &u64::MAX.to_le_bytes()).contains("truncated: a key"));
    assert!(head(0, 1, &key(8, &u64::MAX.to_le_bytes())).contains("truncated: k needs"));
    assert!(head(0, 1, &array(5, u64::MAX)).contains("truncated: k needs"));
    assert!(head(0, 1, &array(8, u64::MAX)).contains("truncated: k needs"));
    assert!(head(0, 1, &array(9, 1)).contains("arrays of arrays"));
    assert!(head(0, 1, &key(13, &[])).contains("unknown value type 13"));
    assert!(head(0, 1, &key(7, &[2])).contains("neither true nor false"));
    assert!(head(0, 1, &key(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])).contains("UTF-8"));
    assert!(head(0, 2, &[key(0, &[1]), key(0, &[1])].concat()).contains("k: the key occurs twice"));
    assert!(BaseModel::from_gguf_bytes(b"GGML".to_vec()).unwrap_err().to_string().contains("no GGUF file"));
    assert!(
        BaseModel::from_gguf_bytes(&b"GGUF\x02\0\0\0"[..]).unwrap_err().to_string().contains("version 2")
    );
}

#[test]
fn tensor_headers_that_mislead_are_refused() {
    let file = |dims: &[u64], code: u32, offset: u64, alignment: u32| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([1u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
        bytes.extend((ALIGNMENT_KEY.len() as u64).to_le_bytes());
        bytes.extend(ALIGNMENT_KEY.as_bytes());
        bytes.extend([4u32.to_le_bytes(), alignment.to_le_bytes()].concat());
        bytes.extend(1u64.to_le_bytes());
        bytes.push(b't');
        bytes.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
        bytes.extend(code.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes.resize(256, 0);
        Gguf::parse(bytes.into()).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(file(&[2, 2], 0, 0, 32), Ok(()));
    let check = |expected: &str, dims: &[u64], code, offset, alignment| {
        let error = file(dims, code, offset, alignment).unwrap_err();
        assert!(error.contains(expected), "{error}");
    };
    check("t: 0 dimensions", &[], 0, 0, 32);
    check("t: 5 dimensions", &[1; 5], 0, 0, 32);
    check("t: dimensions [0, 2] are empty", &[0, 2], 0, 0, 32);
    check("overflow", &[1 << 40, 1 << 40], 0, 0, 32);
    check("truncated: tensor t", &[1 << 40], 0, 0, 32);
    check("truncated: tensor t", &[2], 0, u64::MAX - 31, 32);
    check("offset 8", &[2], 0, 8, 32);
    check("tensor t: unsupported type Q3_K", &[256], 11, 0, 32);
    check("tensor t: unsupported type number 99", &[256], 99, 0, 32);
    check("33 columns", &[33], 2, 0, 32);
    check("32 columns are no multiple of the 256 of a Q4_K block", &[32], 12, 0, 32);
    check(ALIGNMENT_KEY, &[2], 0, 0, 24);
    check(ALIGNMENT_KEY, &[2], 0, 0, 0);
    check(ALIGNMENT_KEY, &[2], 0, 0, 1 << 30);
}

#[test]
fn tensors_that_share_bytes_are_refused() {
    let file = |offset: u64| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([2u64.to_le_bytes(), 0u64.to_le_bytes()].concat());
        for (name, offset) in [(b'b', 0), (b'a', offset)] {
            bytes.extend(1u64.to_le_bytes());
            bytes.push(name);
            bytes.extend(1u32.to_le_bytes());
            bytes.extend(9u64.to_le_bytes());
            bytes.extend(0u32.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
        }
        bytes.resize(256, 0);
        Gguf::parse(bytes.into()).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(file(64), Ok(()));
    let error = file(32).unwrap_err();
    assert!(error.contains("a: its bytes are also those of b"), "{error}");
    assert!(file(0).unwrap_err().contains("are also those of"));
}

#[test]
fn hyperparameters_are_checked() {
    let set = |key: &'static str, value: MetadataValue| {
        move |parts: &mut Parts| parts.metadata.set(key, value.clone())
    };
    let error = refused(set("general.architecture", "gpt2".into()));
    assert!(matches!(&error, ModelError::UnknownArchitecture { found } if found == "gpt2"), "{error}");
    refused_with("missing key llama.block_count", |parts| {
        parts.metadata.values.remove("llama.block_count");
    });
    refused_with(
        "key llama.block_count: expected unsigned integer, found string",
        set("llama.block_count", "2".into()),
    );
    refused_with("hyperparameter layers", set("llama.block_count", u32::MAX.into()));
    refused_with("missing tensor blk.2.", set("llama.block_count", 3u32.into()));
    refused_with("unexpected tensor blk.1.", set("llama.block_count", 1u32.into()));
    refused_with("wrong shape", set("llama.feed_forward_length", 64u32.into()));
    refused_with("hyperparameter heads", set("llama.attention.head_count", 0u32.into()));
    refused_with("hyperparameter kv_heads", set("llama.attention.head_count_kv", 3u32.into()));
    refused_with("llama.rope.dimension_count = 8", set("llama.rope.dimension_count", 8u32.into()));
    refused_with("llama.rope.scaling.type = yarn", set("llama.rope.scaling.type", "yarn".into()));
    refused_with("llama.expert_count = 8", set("llama.expert_count", 8u32.into()));
    refused_with("llama.logit_scale = 0.5", set("llama.logit_scale", 0.5f32.into()));
    refused_with("tokenizer.ggml.pre = \"gpt-2\"", set("tokenizer.ggml.pre", "gpt-2".into()));
}

#[test]
fn tensors_are_checked() {
    refused_with("missing tensor blk.0.attn_q.weight", |parts| {
        parts.tensors.retain(|tensor| tensor.0 != "blk.0.attn_q.weight");
    });
    refused_with("unexpected tensor blk.0.attn_q.bias", |parts| {
        parts.tensors.push(("blk.0.attn_q.bias".to_owned(), vec![64], WeightFormat::F32, vec![0; 256]));
    });
    refused_with("tensor blk.1.attn_k.weight: wrong shape: expected [32, 64], found [64, 32]", |parts| {
        parts.tensor("blk.1.attn_k.weight").1 = vec![32, 64];
    });
    refused_with("tensor output_norm.weight: wrong shape: expected [64], found [32]", |parts| {
        let norm = parts.tensor("output_norm.weight");
        (norm.1, norm.3) = (vec![32], vec![0; 128]);
    });
    refused_with("output_norm.weight: value 1 is not finite", |parts| {
        parts.tensor("output_norm.weight").3[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    refused_with("token_embd.weight", |parts| parts.tensor("token_embd.weight").1 = vec![8, 8, 288]);
    refused_with("rows", |parts| {
        let embedding = parts.tensor("token_embd.weight");
        embedding.1[1] -= 1;
        embedding.3.truncate(287 * 40);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Changed bytes may give another model or an error, but neither a panic nor a runaway.
    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5)) {
        static SOUND: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let sound = SOUND.get_or_init(|| tiny_base(WeightFormat::Q4_1).to_gguf_bytes(&Metadata::default()));
        let mut bytes = sound.clone();
        let head = bytes.len() - tiny_base_data_len();
        for (index, byte) in changes {
            // Nearly all that can go wrong is in the head.
            bytes[index.index(head)] = byte;
        }
        let _ = BaseModel::from_gguf_bytes(bytes);
    }
}

/// Bytes of the tests' Q4_1 model behind its head.
fn tiny_base_data_len() -> usize {
    static LEN: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    *LEN.get_or_init(|| {
        let bytes = tiny_base(WeightFormat::Q4_1).to_gguf_bytes(&Metadata::default());
        let file = Gguf::parse(bytes.clone().into()).unwrap();
        bytes.len() - file.tensors.values().map(|tensor| tensor.range.start).min().unwrap()
    })
}
