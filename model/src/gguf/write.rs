//! Writing GGUF: the same metadata and tensors always give the same bytes.

use std::io::{self, Write};

use super::read::type_code;
use super::{ALIGNMENT, ALIGNMENT_KEY, MAGIC, Metadata, MetadataArray, MetadataValue, VERSION};
use crate::weights::{WeightFormat, WeightMatrix};

/// A tensor to be written.
pub(crate) struct TensorEntry<'a> {
    pub(crate) name: String,
    /// Columns first.
    pub(crate) dims: Vec<u64>,
    pub(crate) format: WeightFormat,
    pub(crate) bytes: &'a [u8],
}

impl<'a> TensorEntry<'a> {
    pub(crate) fn of_matrix(name: String, matrix: &'a WeightMatrix) -> Self {
        let dims = vec![matrix.cols() as u64, matrix.rows() as u64];
        Self { name, dims, format: matrix.format(), bytes: matrix.as_bytes() }
    }

    pub(crate) fn of_vector(name: String, values: &'a [f32]) -> Self {
        let bytes = bytemuck::cast_slice(values);
        Self { name, dims: vec![values.len() as u64], format: WeightFormat::F32, bytes }
    }
}

/// Writes a file with keys in sorted order and tensors in the order given.
///
/// # Errors
/// Those of `out`.
///
/// # Panics
/// When the metadata sets another alignment than the one written.
pub(crate) fn write(metadata: &Metadata, tensors: &[TensorEntry<'_>], out: &mut dyn Write) -> io::Result<()> {
    assert!(metadata.value(ALIGNMENT_KEY).is_none(), "the alignment is always {ALIGNMENT}");
    let head = head(metadata, tensors);
    out.write_all(&head)?;
    out.write_all(padding(head.len()))?;
    for tensor in tensors {
        out.write_all(tensor.bytes)?;
        out.write_all(padding(tensor.bytes.len()))?;
    }
    Ok(())
}

fn head(metadata: &Metadata, tensors: &[TensorEntry<'_>]) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((metadata.iter().count() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        put_string(&mut head, key);
        put_value(&mut head, value);
    }
    let mut offset = 0u64;
    for tensor in tensors {
        put_string(&mut head, &tensor.name);
        head.extend((tensor.dims.len() as u32).to_le_bytes());
        tensor.dims.iter().for_each(|dim| head.extend(dim.to_le_bytes()));
        head.extend(type_code(tensor.format).to_le_bytes());
        head.extend(offset.to_le_bytes());
        offset += (tensor.bytes.len() as u64).next_multiple_of(ALIGNMENT);
    }
    head
}

/// The zeros that bring a length to the next multiple of the alignment.
fn padding(len: usize) -> &'static [u8] {
    const ZEROS: [u8; ALIGNMENT as usize] = [0; ALIGNMENT as usize];
    &ZEROS[..len.next_multiple_of(ZEROS.len()) - len]
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &MetadataValue) {
    let mut put = |code: u32, bytes: &[u8]| {
        out.extend(code.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        MetadataValue::U8(number) => put(0, &number.to_le_bytes()),
        MetadataValue::I8(number) => put(1, &number.to_le_bytes()),
        MetadataValue::U16(number) => put(2, &number.to_le_bytes()),
        MetadataValue::I16(number) => put(3, &number.to_le_bytes()),
        MetadataValue::U32(number) => put(4, &number.to_le_bytes()),
        MetadataValue::I32(number) => put(5, &number.to_le_bytes()),
        MetadataValue::F32(number) => put(6, &number.to_le_bytes()),
        MetadataValue::Bool(truth) => put(7, &[u8::from(*truth)]),
        MetadataValue::String(text) => {
            put(8, &[]);
            put_string(out, text);
        }
        MetadataValue::Array(array) => {
            put(9, &[]);
            put_array(out, array);
        }
        MetadataValue::U64(number) => put(10, &number.to_le_bytes()),
        MetadataValue::I64(number) => put(11, &number.to_le_bytes()),
        MetadataValue::F64(number) => put(12, &number.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &MetadataArray) {
    fn put<const N: usize, T: Copy>(
        out: &mut Vec<u8>,
        code: u32,
        values: &[T],
        bytes: impl Fn(T) -> [u8; N],
    ) {
        out.extend(code.to_le_bytes());
        out.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|&value| out.extend(bytes(value)));
    }
    match array {
        MetadataArray::U8(values) => put(out, 0, values, u8::to_le_bytes),
        MetadataArray::I8(values) => put(out, 1, values, i8::to_le_bytes),
        MetadataArray::U16(values) => put(out, 2, values, u16::to_le_bytes),
        MetadataArray::I16(values) => put(out, 3, values, i16::to_le_bytes),
        MetadataArray::U32(values) => put(out, 4, values, u32::to_le_bytes),
        MetadataArray::I32(values) => put(out, 5, values, i32::to_le_bytes),
        MetadataArray::F32(values) => put(out, 6, values, f32::to_le_bytes),
        MetadataArray::Bool(values) => put(out, 7, values, |truth| [u8::from(truth)]),
        MetadataArray::String(values) => {
            out.extend(8u32.to_le_bytes());
            out.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| put_string(out, value));
        }
        MetadataArray::U64(values) => put(out, 10, values, u64::to_le_bytes),
        MetadataArray::I64(values) => put(out, 11, values, i64::to_le_bytes),
        MetadataArray::F64(values) => put(out, 12, values, f64::to_le_bytes),
    }
}
