//! Parsing GGUF bytes that may come from anyone. Every length is compared with what is left before it is
//! used, and nothing is reserved beyond what the bytes at hand can fill.

use std::collections::BTreeMap;

use super::{
    ALIGNMENT, ALIGNMENT_KEY, Gguf, MAGIC, Metadata, MetadataArray, MetadataValue, TensorInfo, VERSION,
    malformed,
};
use crate::bytes::SharedBytes;
use crate::error::ModelError;
use crate::weights::WeightFormat;

/// The format's own limit.
const DIMS_MAX: u32 = 4;
/// The largest alignment that makes sense: a page of the systems with the largest pages.
const ALIGNMENT_MAX: u32 = 1 << 16;
/// Names and keys are for people; the format's limits are 64 and 65,535 bytes.
const NAME_BYTES_MAX: u64 = (1 << 16) - 1;

/// Parses a whole file.
pub(super) fn parse(bytes: SharedBytes) -> Result<Gguf, ModelError> {
    let mut reader = Reader { bytes: bytes.as_ref(), at: 0 };
    if reader.take("the magic number", 4)? != MAGIC {
        return Err(malformed("the magic number", "this is no GGUF file"));
    }
    let version = reader.u32("the version")?;
    if version != VERSION {
        return Err(malformed("the version", format!("version {version} is not supported, only {VERSION}")));
    }
    let tensor_count = reader.u64("the number of tensors")?;
    let key_count = reader.u64("the number of keys")?;
    let metadata = parse_metadata(&mut reader, key_count)?;
    let headers = parse_tensor_headers(&mut reader, tensor_count)?;
    let start = data_start(&metadata, reader.at)?;
    let tensors = place_tensors(headers, start, reader.bytes.len())?;
    Ok(Gguf { metadata, bytes, tensors })
}

/// A tensor as the file announces it.
struct TensorHeader {
    dims: Vec<u64>,
    format: WeightFormat,
    offset: u64,
}

fn parse_metadata(reader: &mut Reader<'_>, count: u64) -> Result<Metadata, ModelError> {
    let mut metadata = Metadata::default();
    for _ in 0..count {
        let key = reader.name("a key")?;
        let value = reader.value(&key)?;
        if metadata.values.insert(key.clone(), value).is_some() {
            return Err(malformed(&key, "the key occurs twice"));
        }
    }
    Ok(metadata)
}

fn parse_tensor_headers(
    reader: &mut Reader<'_>,
    count: u64,
) -> Result<BTreeMap<String, TensorHeader>, ModelError> {
    let mut headers = BTreeMap::new();
    for _ in 0..count {
        let name = reader.name("a tensor's name")?;
        let header = reader.tensor_header(&name)?;
        if headers.insert(name.clone(), header).is_some() {
            return Err(malformed(&name, "the tensor occurs twice"));
        }
    }
    Ok(headers)
}

/// Where the tensors' bytes begin, and their alignment.
fn data_start(metadata: &Metadata, headers_end: usize) -> Result<(u64, u64), ModelError> {
    let alignment = match metadata.optional_u32(ALIGNMENT_KEY)? {
        None => ALIGNMENT,
        Some(alignment) if alignment.is_power_of_two() && alignment <= ALIGNMENT_MAX => alignment.into(),
        Some(other) => {
            return Err(malformed(
                ALIGNMENT_KEY,
                format!("{other} is no power of two up to {ALIGNMENT_MAX}"),
            ));
        }
    };
    Ok(((headers_end as u64).next_multiple_of(alignment), alignment))
}

fn place_tensors(
    headers: BTreeMap<String, TensorHeader>,
    (start, alignment): (u64, u64),
    file_len: usize,
) -> Result<BTreeMap<String, TensorInfo>, ModelError> {
    let place = |(name, header): (String, TensorHeader)| {
        if !header.offset.is_multiple_of(alignment) {
            return Err(malformed(&name, format!("offset {} is no multiple of {alignment}", header.offset)));
        }
        let size = byte_len(&name, &header)?;
        let begin = start.saturating_add(header.offset);
        let available = (file_len as u64).saturating_sub(begin);
        if size > available {
            return Err(ModelError::Truncated {
                what: format!("tensor {name}"),
                offset: begin,
                needed: size,
                available,
            });
        }
        let range = begin as usize..(begin + size) as usize;
        Ok((name, TensorInfo { dims: header.dims, format: header.format, range }))
    };
    let tensors = headers.into_iter().map(place).collect::<Result<BTreeMap<_, _>, _>>()?;
    refuse_overlaps(&tensors)?;
    Ok(tensors)
}

/// Bytes that many tensors share would let a small file fill the memory where each is expanded.
fn refuse_overlaps(tensors: &BTreeMap<String, TensorInfo>) -> Result<(), ModelError> {
    let mut in_file_order: Vec<_> = tensors.iter().collect();
    in_file_order.sort_by_key(|(_, tensor)| tensor.range.start);
    let overlap = in_file_order.windows(2).find(|pair| pair[0].1.range.end > pair[1].1.range.start);
    match overlap {
        Some(pair) => Err(malformed(pair[1].0, format!("its bytes are also those of {}", pair[0].0))),
        None => Ok(()),
    }
}

fn byte_len(name: &str, header: &TensorHeader) -> Result<u64, ModelError> {
    let (values, bytes) = header.format.block();
    let cols = header.dims[0];
    if !cols.is_multiple_of(values as u64) {
        let format = header.format.name();
        return Err(malformed(
            name,
            format!("{cols} columns are no multiple of the {values} of a {format} block"),
        ));
    }
    let rows = header.dims[1..].iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
    let size = rows.and_then(|rows| (cols / values as u64).checked_mul(rows)?.checked_mul(bytes as u64));
    size.ok_or_else(|| malformed(name, format!("dimensions {:?} overflow", header.dims)))
}

/// A position in the bytes.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, what: &str, count: u64) -> Result<&'a [u8], ModelError> {
        let rest = &self.bytes[self.at..];
        if count > rest.len() as u64 {
            let (offset, available) = (self.at as u64, rest.len() as u64);
            return Err(ModelError::Truncated { what: what.to_owned(), offset, needed: count, available });
        }
        self.at += count as usize;
        Ok(&rest[..count as usize])
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(what, N as u64)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn string(&mut self, what: &str) -> Result<String, ModelError> {
        let len = self.u64(what)?;
        let bytes = self.take(what, len)?;
        let text = str::from_utf8(bytes).map_err(|_| malformed(what, "a string is not UTF-8"))?;
        Ok(text.to_owned())
    }

    fn name(&mut self, what: &str) -> Result<String, ModelError> {
        let name = self.string(what)?;
        if name.is_empty() || name.len() as u64 > NAME_BYTES_MAX {
            return Err(malformed(
                what,
                format!("its length of {} bytes is not in 1..={NAME_BYTES_MAX}", name.len()),
            ));
        }
        Ok(name)
    }

    fn value(&mut self, key: &str) -> Result<MetadataValue, ModelError> {
        Ok(match self.u32(key)? {
            0 => MetadataValue::U8(u8::from_le_bytes(self.array(key)?)),
            1 => MetadataValue::I8(i8::from_le_bytes(self.array(key)?)),
            2 => MetadataValue::U16(u16::from_le_bytes(self.array(key)?)),
            3 => MetadataValue::I16(i16::from_le_bytes(self.array(key)?)),
            4 => MetadataValue::U32(self.u32(key)?),
            5 => MetadataValue::I32(i32::from_le_bytes(self.array(key)?)),
            6 => MetadataValue::F32(f32::from_le_bytes(self.array(key)?)),
            7 => MetadataValue::Bool(truth(key, u8::from_le_bytes(self.array(key)?))?),
            8 => MetadataValue::String(self.string(key)?),
            9 => MetadataValue::Array(self.values(key)?),
            10 => MetadataValue::U64(self.u64(key)?),
            11 => MetadataValue::I64(i64::from_le_bytes(self.array(key)?)),
            12 => MetadataValue::F64(f64::from_le_bytes(self.array(key)?)),
            code => return Err(malformed(key, format!("unknown value type {code}"))),
        })
    }

    fn values(&mut self, key: &str) -> Result<MetadataArray, ModelError> {
        let code = self.u32(key)?;
        let count = self.u64(key)?;
        Ok(match code {
            0 => MetadataArray::U8(self.numbers(key, count, u8::from_le_bytes)?),
            1 => MetadataArray::I8(self.numbers(key, count, i8::from_le_bytes)?),
            2 => MetadataArray::U16(self.numbers(key, count, u16::from_le_bytes)?),
            3 => MetadataArray::I16(self.numbers(key, count, i16::from_le_bytes)?),
            4 => MetadataArray::U32(self.numbers(key, count, u32::from_le_bytes)?),
            5 => MetadataArray::I32(self.numbers(key, count, i32::from_le_bytes)?),
            6 => MetadataArray::F32(self.numbers(key, count, f32::from_le_bytes)?),
            7 => MetadataArray::Bool(self.truths(key, count)?),
            8 => MetadataArray::String(self.strings(key, count)?),
            9 => return Err(malformed(key, "arrays of arrays are not supported")),
            10 => MetadataArray::U64(self.numbers(key, count, u64::from_le_bytes)?),
            11 => MetadataArray::I64(self.numbers(key, count, i64::from_le_bytes)?),
            12 => MetadataArray::F64(self.numbers(key, count, f64::from_le_bytes)?),
            code => return Err(malformed(key, format!("unknown value type {code}"))),
        })
    }

    fn numbers<const N: usize, T>(
        &mut self,
        key: &str,
        count: u64,
        number: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, ModelError> {
        let bytes = self.take(key, count.saturating_mul(N as u64))?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|&bytes| number(bytes)).collect())
    }

    fn truths(&mut self, key: &str, count: u64) -> Result<Vec<bool>, ModelError> {
        self.take(key, count)?.iter().map(|&byte| truth(key, byte)).collect()
    }

    /// Grows as it reads: a string takes at least 8 bytes of the file and 24 of memory.
    fn strings(&mut self, key: &str, count: u64) -> Result<Vec<String>, ModelError> {
        let mut strings = Vec::new();
        for _ in 0..count {
            strings.push(self.string(key)?);
        }
        Ok(strings)
    }

    fn tensor_header(&mut self, name: &str) -> Result<TensorHeader, ModelError> {
        let count = self.u32(name)?;
        if !(1..=DIMS_MAX).contains(&count) {
            return Err(malformed(name, format!("{count} dimensions are not in 1..={DIMS_MAX}")));
        }
        let mut dims = (0..count).map(|_| self.u64(name)).collect::<Result<Vec<_>, _>>()?;
        if dims.contains(&0) {
            return Err(malformed(name, format!("dimensions {dims:?} are empty")));
        }
        while dims.len() > 2 && dims.pop_if(|dim| *dim == 1).is_some() {}
        let format = tensor_format(name, self.u32(name)?)?;
        Ok(TensorHeader { dims, format, offset: self.u64(name)? })
    }
}

fn truth(key: &str, byte: u8) -> Result<bool, ModelError> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(malformed(key, format!("{other} is neither true nor false"))),
    }
}

fn tensor_format(name: &str, code: u32) -> Result<WeightFormat, ModelError> {
    let format = WeightFormat::ALL.into_iter().find(|&format| type_code(format) == code);
    format
        .ok_or_else(|| ModelError::UnsupportedTensorType { tensor: name.to_owned(), found: type_name(code) })
}

/// ggml's number of a format.
pub(super) fn type_code(format: WeightFormat) -> u32 {
    match format {
        WeightFormat::F32 => 0,
        WeightFormat::F16 => 1,
        WeightFormat::Q4_0 => 2,
        WeightFormat::Q4_1 => 3,
        WeightFormat::Q5_0 => 6,
        WeightFormat::Q8_0 => 8,
        WeightFormat::Q4_K => 12,
        WeightFormat::Q6_K => 14,
        WeightFormat::BF16 => 30,
    }
}

/// Names of the formats that people meet and this crate does not read.
fn type_name(code: u32) -> String {
    let name = match code {
        7 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K",
        13 => "Q5_K",
        15 => "Q8_K",
        20 => "IQ4_NL",
        23 => "IQ4_XS",
        _ => return format!("number {code}"),
    };
    name.to_owned()
}
