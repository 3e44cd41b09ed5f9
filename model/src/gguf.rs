//! The GGUF container, version 3: typed metadata and named tensors. `gguf/read.rs` parses bytes that may be
//! hostile, `gguf/write.rs` writes, `gguf/model.rs` maps keys and tensors to a base model.

mod family;
pub(crate) mod model;
mod read;
#[cfg(test)]
mod tests;
mod write;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::bytes::SharedBytes;
use crate::error::ModelError;
use crate::weights::{WeightFormat, WeightMatrix};
pub(crate) use write::{TensorEntry, write};

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// Where no key says otherwise, tensors start at multiples of this.
const ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";

/// A parsed file: every tensor's bytes are known to be there.
pub(crate) struct Gguf {
    pub(crate) metadata: Metadata,
    bytes: SharedBytes,
    tensors: BTreeMap<String, TensorInfo>,
}

struct TensorInfo {
    /// Columns first, as in the file; no trailing ones.
    dims: Vec<u64>,
    format: WeightFormat,
    range: Range<usize>,
}

/// Keys and values of a GGUF file, sorted by key.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    values: BTreeMap<String, MetadataValue>,
}

/// One value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum MetadataValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(MetadataArray),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// Many values of one type; arrays of arrays are not supported.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum MetadataArray {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

impl Gguf {
    /// Parses a whole file.
    ///
    /// # Errors
    /// Any but those about files and hyperparameters.
    pub(crate) fn parse(bytes: SharedBytes) -> Result<Self, ModelError> {
        read::parse(bytes)
    }

    pub(crate) fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor of two dimensions as (rows, columns); of one, as one row.
    pub(crate) fn shape(&self, name: &str) -> Result<(usize, usize), ModelError> {
        let tensor = self.find(name)?;
        match *tensor.dims.as_slice() {
            [cols] => Ok((1, cols as usize)),
            [cols, rows] => Ok((rows as usize, cols as usize)),
            _ => Err(wrong_shape(name, vec![], tensor)),
        }
    }

    /// The tensor, if it has exactly that shape.
    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<WeightMatrix, ModelError> {
        let tensor = self.find(name)?;
        if self.shape(name)? != (rows, cols) {
            return Err(wrong_shape(name, vec![rows as u64, cols as u64], tensor));
        }
        WeightMatrix::from_shared(&self.bytes, tensor.range.clone(), (rows, cols), tensor.format)
            .map_err(|source| ModelError::Weights { tensor: name.to_owned(), source })
    }

    /// The values of a tensor of one dimension.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.find(name)?;
        if tensor.dims != [len as u64] {
            return Err(wrong_shape(name, vec![len as u64], tensor));
        }
        let values = self.matrix(name, 1, len)?.to_f32();
        match values.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(malformed(name, format!("value {index} is not finite"))),
            None => Ok(values),
        }
    }

    fn find(&self, name: &str) -> Result<&TensorInfo, ModelError> {
        self.tensors.get(name).ok_or_else(|| ModelError::MissingTensor { tensor: name.to_owned() })
    }
}

impl Metadata {
    /// The value of a key.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&MetadataValue> {
        self.values.get(key)
    }

    /// Sets a key, replacing what it held.
    pub fn set(&mut self, key: &str, value: impl Into<MetadataValue>) {
        self.values.insert(key.to_owned(), value.into());
    }

    /// Every key and value, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &MetadataValue)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Adds all of `other`, which wins where both have a key.
    pub fn extend(&mut self, other: &Self) {
        self.values.extend(other.values.iter().map(|(key, value)| (key.clone(), value.clone())));
    }

    /// A key that must hold a string.
    ///
    /// # Errors
    /// [`ModelError::MissingKey`] or [`ModelError::WrongKeyType`].
    pub fn string(&self, key: &str) -> Result<&str, ModelError> {
        required(key, self.optional_string(key)?)
    }

    /// A key that holds a string if it is there.
    ///
    /// # Errors
    /// [`ModelError::WrongKeyType`].
    pub fn optional_string(&self, key: &str) -> Result<Option<&str>, ModelError> {
        self.typed(key, "string", |value| {
            let MetadataValue::String(text) = value else { return None };
            Some(text.as_str())
        })
    }

    /// A key that holds a whole number from 0 to 2^32 - 1, of any integer type, if it is there.
    ///
    /// # Errors
    /// [`ModelError::WrongKeyType`].
    pub fn optional_u32(&self, key: &str) -> Result<Option<u32>, ModelError> {
        self.typed(key, "unsigned integer", |value| u32::try_from(value.integer()?).ok())
    }

    /// A key that must hold a whole number from 0 to 2^32 - 1.
    ///
    /// # Errors
    /// [`ModelError::MissingKey`] or [`ModelError::WrongKeyType`].
    pub fn u32(&self, key: &str) -> Result<u32, ModelError> {
        required(key, self.optional_u32(key)?)
    }

    /// A key that holds a number with a fraction if it is there.
    ///
    /// # Errors
    /// [`ModelError::WrongKeyType`].
    pub fn optional_f32(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.typed(key, "float", MetadataValue::float)
    }

    /// A key that must hold a number with a fraction.
    ///
    /// # Errors
    /// [`ModelError::MissingKey`] or [`ModelError::WrongKeyType`].
    pub fn f32(&self, key: &str) -> Result<f32, ModelError> {
        required(key, self.optional_f32(key)?)
    }

    /// A key that holds true or false if it is there.
    ///
    /// # Errors
    /// [`ModelError::WrongKeyType`].
    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.typed(key, "bool", |value| {
            let MetadataValue::Bool(truth) = value else { return None };
            Some(*truth)
        })
    }

    /// A key that must hold an array of strings.
    ///
    /// # Errors
    /// [`ModelError::MissingKey`] or [`ModelError::WrongKeyType`].
    pub fn strings(&self, key: &str) -> Result<&[String], ModelError> {
        let found = self.typed(key, "array of strings", |value| {
            let MetadataValue::Array(MetadataArray::String(strings)) = value else { return None };
            Some(strings.as_slice())
        })?;
        required(key, found)
    }

    /// A key that must hold an array of integers of at most 32 bits.
    ///
    /// # Errors
    /// [`ModelError::MissingKey`] or [`ModelError::WrongKeyType`].
    pub fn integers(&self, key: &str) -> Result<Vec<i64>, ModelError> {
        let found = self.typed(key, "array of integers", |value| {
            let MetadataValue::Array(array) = value else { return None };
            array.integers()
        })?;
        required(key, found)
    }

    /// A key that must hold an array of floating-point numbers.
    ///
    /// # Errors
    /// [`ModelError::MissingKey`] or [`ModelError::WrongKeyType`].
    pub fn floats(&self, key: &str) -> Result<&[f32], ModelError> {
        let found = self.typed(key, "array of f32", |value| {
            let MetadataValue::Array(MetadataArray::F32(numbers)) = value else { return None };
            Some(numbers.as_slice())
        })?;
        required(key, found)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&'a MetadataValue) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let found = value.type_name();
        let wrong = || ModelError::WrongKeyType { key: key.to_owned(), expected, found };
        read(value).ok_or_else(wrong).map(Some)
    }
}

impl MetadataValue {
    fn integer(&self) -> Option<i64> {
        match *self {
            Self::U8(number) => Some(number.into()),
            Self::I8(number) => Some(number.into()),
            Self::U16(number) => Some(number.into()),
            Self::I16(number) => Some(number.into()),
            Self::U32(number) => Some(number.into()),
            Self::I32(number) => Some(number.into()),
            Self::U64(number) => i64::try_from(number).ok(),
            Self::I64(number) => Some(number),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) | Self::Array(_) => None,
        }
    }

    fn float(&self) -> Option<f32> {
        if let Self::F64(number) = self {
            return Some(*number as f32);
        }
        let Self::F32(number) = self else { return None };
        Some(*number)
    }

    /// Its type, as messages name it.
    fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::F32(_) => "f32",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(_) => "array",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F64(_) => "f64",
        }
    }
}

impl MetadataArray {
    fn integers(&self) -> Option<Vec<i64>> {
        fn wide<T: Copy + Into<i64>>(numbers: &[T]) -> Vec<i64> {
            numbers.iter().map(|&number| number.into()).collect()
        }
        match self {
            Self::U8(numbers) => Some(wide(numbers)),
            Self::I8(numbers) => Some(wide(numbers)),
            Self::U16(numbers) => Some(wide(numbers)),
            Self::I16(numbers) => Some(wide(numbers)),
            Self::U32(numbers) => Some(wide(numbers)),
            Self::I32(numbers) => Some(wide(numbers)),
            Self::I64(numbers) => Some(numbers.clone()),
            Self::U64(_) | Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) => None,
        }
    }
}

macro_rules! from_value {
    ($($from:ty => $variant:ident),* $(,)?) => { $(
        impl From<$from> for MetadataValue {
            fn from(value: $from) -> Self {
                Self::$variant(value.into())
            }
        }
    )* };
}
from_value!(u32 => U32, u64 => U64, f32 => F32, bool => Bool, &str => String, String => String);

fn required<T>(key: &str, value: Option<T>) -> Result<T, ModelError> {
    value.ok_or_else(|| ModelError::MissingKey { key: key.to_owned() })
}

fn wrong_shape(tensor: &str, expected: Vec<u64>, info: &TensorInfo) -> ModelError {
    let found = info.dims.iter().rev().copied().collect();
    ModelError::WrongShape { tensor: tensor.to_owned(), expected, found }
}

fn malformed(what: &str, reason: impl Into<String>) -> ModelError {
    ModelError::Malformed { what: what.to_owned(), reason: reason.into() }
}
