//! GGUF LoRA, the file that llama.cpp loads beside a model. Rows of Q and K are in GGUF order as in the base.

use std::collections::{BTreeMap, BTreeSet};

use super::{StoredPair, adapter_of_pairs, malformed};
use crate::adapter::Adapter;
use crate::base::BaseModel;
use crate::config::Projection;
use crate::error::AdapterError;
use crate::gguf::{self, Gguf, Metadata, TensorEntry};
use crate::weights::{WeightFormat, WeightMatrix};

/// The key that binds an adapter to the hash of its base model's file.
pub const BASE_SHA256_KEY: &str = "fleetune.base_sha256";

const ALPHA: &str = "adapter.lora.alpha";
/// What makes a GGUF file a LoRA adapter for that model.
fn marks(base: &BaseModel) -> [(&'static str, &'static str); 3] {
    let architecture = base.config.family.architecture();
    [("general.architecture", architecture), ("general.type", "adapter"), ("adapter.type", "lora")]
}

/// Writes an adapter, bound to its base, with values stored as `format` (F32 or F16); `extra` adds keys such
/// as the round or the parent and wins over those written. A frozen A is written like a trained one.
///
/// # Errors
/// [`AdapterError::Malformed`] for another format, and for values that half precision cannot hold.
pub fn to_gguf_lora(
    adapter: &Adapter,
    base: &BaseModel,
    format: WeightFormat,
    extra: &Metadata,
) -> Result<Vec<u8>, AdapterError> {
    if !matches!(format, WeightFormat::F32 | WeightFormat::F16) {
        return Err(malformed(
            "format",
            format!("{} is not offered for adapters, only F32 and F16", format.name()),
        ));
    }
    let factors = stored_factors(adapter, base, format)?;
    let tensors: Vec<_> =
        factors.iter().map(|(name, matrix)| TensorEntry::of_matrix(name.clone(), matrix)).collect();
    let mut metadata = Metadata::default();
    marks(base).into_iter().for_each(|(key, value)| metadata.set(key, value));
    metadata.set(ALPHA, adapter.layout.config().alpha);
    metadata.set(BASE_SHA256_KEY, hex::encode(base.sha256));
    metadata.extend(extra);
    let mut bytes = Vec::new();
    gguf::write(&metadata, &tensors, &mut bytes).expect("a vector takes all bytes");
    Ok(bytes)
}

/// Reads an adapter for that base, whichever program wrote it. The result's A is trainable. A file without
/// [`BASE_SHA256_KEY`] (llama.cpp's converter writes none) is taken if its shapes fit.
///
/// # Errors
/// [`AdapterError::BaseMismatch`] for another base, [`AdapterError::Gguf`] for a broken container,
/// [`AdapterError::Malformed`] for tensors that do not fit.
pub fn from_gguf_lora(bytes: &[u8], base: &BaseModel) -> Result<Adapter, AdapterError> {
    let file = Gguf::parse(bytes.to_vec().into())?;
    check_marks(&file.metadata, base)?;
    check_base(&file.metadata, base)?;
    let pairs = read_pairs(&file)?;
    adapter_of_pairs(&base.config, file.metadata.f32(ALPHA)?, pairs)
}

fn stored_factors(
    adapter: &Adapter,
    base: &BaseModel,
    format: WeightFormat,
) -> Result<Vec<(String, WeightMatrix)>, AdapterError> {
    let rank = adapter.layout.config().rank;
    let mut factors = Vec::new();
    for layer in 0..base.config.layers {
        for &projection in &adapter.layout.config().targets {
            let (out, cols_in) = projection.shape(&base.config);
            let (a, b) = (adapter.factor_a(layer, projection), adapter.factor_b(layer, projection));
            for (suffix, values, rows, cols) in [("a", &*a, rank, cols_in), ("b", b, out, rank)] {
                let name = tensor_name(layer, projection, suffix);
                let matrix = WeightMatrix::from_f32(values, rows, cols, format)
                    .map_err(|error| malformed(&name, error.to_string()))?;
                factors.push((name, matrix));
            }
        }
    }
    Ok(factors)
}

fn tensor_name(layer: usize, projection: Projection, suffix: &str) -> String {
    format!("{}.lora_{suffix}", gguf::model::layer_tensor(layer, projection.gguf_name()))
}

fn check_marks(metadata: &Metadata, base: &BaseModel) -> Result<(), AdapterError> {
    for (key, expected) in marks(base) {
        let found = metadata.string(key)?;
        if found != expected {
            return Err(malformed(key, format!("expected {expected:?}, found {found:?}")));
        }
    }
    Ok(())
}

fn check_base(metadata: &Metadata, base: &BaseModel) -> Result<(), AdapterError> {
    let expected = hex::encode(base.sha256);
    match metadata.optional_string(BASE_SHA256_KEY)? {
        Some(found) if found != expected => {
            Err(AdapterError::BaseMismatch { expected, found: found.to_owned() })
        }
        Some(_) | None => Ok(()),
    }
}

fn read_pairs(file: &Gguf) -> Result<Vec<StoredPair>, AdapterError> {
    let mut seen: BTreeMap<(usize, Projection), BTreeSet<&str>> = BTreeMap::new();
    for name in file.tensor_names() {
        // A layer written as 00 would pass for another tensor's.
        let (layer, projection, suffix) = parse_name(name)
            .filter(|&(layer, projection, suffix)| tensor_name(layer, projection, suffix) == name)
            .ok_or_else(|| malformed(name, "unknown tensor"))?;
        seen.entry((layer, projection)).or_default().insert(suffix);
    }
    let read = |name: &str| -> Result<(Vec<usize>, Vec<f32>), AdapterError> {
        let (rows, cols) = file.shape(name)?;
        Ok((vec![rows, cols], file.matrix(name, rows, cols)?.to_f32()))
    };
    let pair = |(layer, projection): (usize, Projection)| {
        let (a, b) = (tensor_name(layer, projection, "a"), tensor_name(layer, projection, "b"));
        Ok(StoredPair { layer, projection, a: read(&a)?, b: read(&b)? })
    };
    seen.into_keys().map(pair).collect()
}

fn parse_name(name: &str) -> Option<(usize, Projection, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (projection, suffix) = rest.split_once(".weight.lora_")?;
    let projection = Projection::ALL.into_iter().find(|known| known.gguf_name() == projection)?;
    matches!(suffix, "a" | "b").then_some((layer.parse().ok()?, projection, suffix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::tests::counted;
    use crate::base::tests::tiny_base;
    use crate::error::ModelError;

    #[test]
    fn round_trips_as_f32() {
        let (base, adapter) = (tiny_base(WeightFormat::F32), counted(&Projection::ALL, false));
        let bytes = to_gguf_lora(&adapter, &base, WeightFormat::F32, &Metadata::default()).unwrap();
        let back = from_gguf_lora(&bytes, &base).unwrap();
        assert_eq!(back.values, adapter.values);
        assert_eq!(back.layout.sha256(), adapter.layout.sha256());
    }

    #[test]
    fn half_precision_keeps_eleven_bits() {
        let (base, adapter) = (tiny_base(WeightFormat::F32), counted(&[Projection::K], false));
        let bytes = to_gguf_lora(&adapter, &base, WeightFormat::F16, &Metadata::default()).unwrap();
        let back = from_gguf_lora(&bytes, &base).unwrap();
        for (ours, theirs) in adapter.values.iter().zip(&back.values) {
            assert!((ours - theirs).abs() <= ours.abs() / 2048.0);
        }
    }

    #[test]
    fn extra_keys_are_kept_and_the_base_is_bound() {
        let (base, adapter) = (tiny_base(WeightFormat::F32), counted(&[Projection::Q], true));
        let mut extra = Metadata::default();
        extra.set("fleetune.round", 7u32);
        let bytes = to_gguf_lora(&adapter, &base, WeightFormat::F16, &extra).unwrap();
        let file = Gguf::parse(bytes.clone().into()).unwrap();
        assert_eq!(file.metadata.u32("fleetune.round").unwrap(), 7);
        assert_eq!(file.metadata.string(BASE_SHA256_KEY).unwrap(), hex::encode(base.sha256));
        let other = tiny_base(WeightFormat::Q8_0);
        let error = from_gguf_lora(&bytes, &other).unwrap_err();
        assert!(matches!(error, AdapterError::BaseMismatch { .. }), "{error}");
    }

    #[test]
    fn refuses_what_is_no_adapter_of_this_model() {
        let (base, adapter) = (tiny_base(WeightFormat::F32), counted(&[Projection::Q], false));
        let with = |key: &str, value: &str| {
            let mut extra = Metadata::default();
            extra.set(key, value);
            let bytes = to_gguf_lora(&adapter, &base, WeightFormat::F32, &extra).unwrap();
            from_gguf_lora(&bytes, &base).unwrap_err().to_string()
        };
        assert!(with("adapter.type", "control_vector").contains("adapter.type"));
        assert!(with("general.architecture", "qwen2").contains("qwen2"));
        let model = base.to_gguf_bytes(&Metadata::default());
        assert!(from_gguf_lora(&model, &base).unwrap_err().to_string().contains("general.type"));
        assert!(to_gguf_lora(&adapter, &base, WeightFormat::Q8_0, &Metadata::default()).is_err());
    }

    #[test]
    fn refuses_names_that_stand_for_others() {
        let (base, adapter) = (tiny_base(WeightFormat::F32), counted(&[Projection::V], true));
        let bytes = to_gguf_lora(&adapter, &base, WeightFormat::F32, &Metadata::default()).unwrap();
        let at = bytes.windows(6).position(|bytes| bytes == b"blk.1.").unwrap();
        let mut renamed = bytes.clone();
        renamed[at - 8] += 1;
        renamed.splice(at + 4..at + 4, [b'0']);
        let error = from_gguf_lora(&renamed, &base).unwrap_err().to_string();
        assert!(error.contains("blk.01.attn_v.weight.lora_a: unknown tensor"), "{error}");
    }

    #[test]
    fn refuses_every_prefix() {
        let (base, adapter) = (tiny_base(WeightFormat::F32), counted(&[Projection::V], true));
        let bytes = to_gguf_lora(&adapter, &base, WeightFormat::F32, &Metadata::default()).unwrap();
        for cut in 0..bytes.len() {
            let error = from_gguf_lora(&bytes[..cut], &base).unwrap_err();
            assert!(matches!(error, AdapterError::Gguf(ModelError::Truncated { .. })), "{cut}: {error}");
        }
    }
}
