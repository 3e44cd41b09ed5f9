//! The safetensors container: a writer whose bytes depend on nothing but its input, and a reader of small
//! files held in memory. Whole models in this container are read by `hugging_face.rs`.

use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

/// One tensor to be written.
pub(crate) struct TensorBytes {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl TensorBytes {
    pub(crate) fn f32(name: &str, shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "shape of {name}");
        let bytes = bytemuck::cast_slice(values).to_vec();
        Self { name: name.to_owned(), dtype: "F32", shape: shape.to_vec(), bytes }
    }
}

/// Header (its length, then JSON padded to 8 bytes), then the tensors in the order given.
pub(crate) fn encode(metadata: &[(&str, &str)], tensors: &[TensorBytes]) -> Vec<u8> {
    let mut header = header(metadata, tensors).into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let data: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();
    let mut bytes = Vec::with_capacity(8 + header.len() + data);
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(header);
    tensors.iter().for_each(|tensor| bytes.extend(&tensor.bytes));
    bytes
}

/// Keys in the order given, so that equal input gives equal bytes whatever map `serde_json` is built with.
fn header(metadata: &[(&str, &str)], tensors: &[TensorBytes]) -> String {
    let quoted = |text: &str| Value::from(text).to_string();
    let pairs: Vec<_> =
        metadata.iter().map(|(key, value)| format!("{}:{}", quoted(key), quoted(value))).collect();
    let mut fields = vec![format!("\"__metadata__\":{{{}}}", pairs.join(","))];
    let mut offset = 0;
    for TensorBytes { name, dtype, shape, bytes } in tensors {
        let end = offset + bytes.len();
        let shape = json!(shape);
        let name = quoted(name);
        fields
            .push(format!(r#"{name}:{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{offset},{end}]}}"#));
        offset = end;
    }
    format!("{{{}}}", fields.join(","))
}

/// A file whose header, shapes and offsets have been checked.
pub(crate) struct TensorFile<'a> {
    metadata: Map<String, Value>,
    tensors: SafeTensors<'a>,
}

pub(crate) fn decode(bytes: &[u8]) -> Result<TensorFile<'_>, String> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let metadata = header.metadata().iter().flatten();
    let metadata = metadata.map(|(key, value)| (key.clone(), Value::from(value.as_str()))).collect();
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    Ok(TensorFile { metadata, tensors })
}

impl TensorFile<'_> {
    pub(crate) fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key)?.as_str()
    }

    /// Names in sorted order.
    pub(crate) fn names(&self) -> Vec<&str> {
        let mut names = self.tensors.names();
        names.sort_unstable();
        names
    }

    /// Shape and values of a tensor stored as F32, F16 or BF16.
    pub(crate) fn f32(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), String> {
        let tensor = self.tensors.tensor(name).map_err(|error| error.to_string())?;
        Ok((tensor.shape().to_vec(), to_f32(tensor.dtype(), tensor.data())?))
    }
}

fn to_f32(dtype: Dtype, data: &[u8]) -> Result<Vec<f32>, String> {
    let (pairs, quads) = (data.as_chunks::<2>().0, data.as_chunks::<4>().0);
    if dtype == Dtype::F32 {
        return Ok(quads.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect());
    }
    if dtype == Dtype::F16 {
        return Ok(pairs.iter().map(|&bytes| half::f16::from_le_bytes(bytes).to_f32()).collect());
    }
    if dtype == Dtype::BF16 {
        return Ok(pairs.iter().map(|&bytes| half::bf16::from_le_bytes(bytes).to_f32()).collect());
    }
    Err(format!("values of type {dtype:?} are not supported"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_known_bytes_that_read_back() {
        let tensors = [TensorBytes::f32("a", &[2, 1], &[1.0, -2.0]), TensorBytes::f32("b", &[1], &[0.5])];
        let bytes = encode(&[("format", "pt"), ("q\"", "1")], &tensors);
        let header = concat!(
            r#"{"__metadata__":{"format":"pt","q\"":"1"},"#,
            r#""a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"#,
            r#""b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}"#
        );
        assert_eq!(&bytes[8..8 + header.len()], header.as_bytes());
        assert_eq!((bytes.len() - 12) % 8, 0);
        let file = decode(&bytes).unwrap();
        assert_eq!(file.metadata("q\""), Some("1"));
        assert_eq!(file.names(), ["a", "b"]);
        assert_eq!(file.f32("a").unwrap(), (vec![2, 1], vec![1.0, -2.0]));
        assert!(file.f32("c").is_err());
    }

    #[test]
    fn refuses_every_prefix() {
        let bytes = encode(&[], &[TensorBytes::f32("a", &[2], &[1.0, 2.0])]);
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut]).is_err(), "{cut}");
        }
    }
}
