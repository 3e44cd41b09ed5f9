//! A weight matrix as it rests: its storage format and its bytes, owned or shared with the model file.
//! How values become blocks is in `weights/quantize.rs`, `weights/k_quants.rs` and `weights/search.rs`, the way back in
//! `weights/dequantize.rs`.

mod dequantize;
#[cfg(test)]
mod ggml;
mod k_quants;
mod quantize;
mod search;

use std::fmt;
use std::ops::Range;

use crate::bytes::SharedBytes;
use crate::error::WeightError;
pub(crate) use dequantize::six_bit_pair;

/// Values in one block of the plain quantized formats.
pub(crate) const BLOCK: usize = 32;
/// Values in one block of the K formats.
pub(crate) const K_BLOCK: usize = 256;

/// How the values of a matrix are stored; names and bytes are those of ggml.
#[allow(non_camel_case_types, reason = "the names are ggml's")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    BF16,
    /// 32 signed bytes with one half-precision scale (8.5 bits a value).
    Q8_0,
    /// 32 four-bit values centred on 8 with one half-precision scale (4.5 bits a value).
    Q4_0,
    /// 32 four-bit values with a half-precision scale and minimum (5 bits a value).
    Q4_1,
    /// 32 five-bit values centred on 16 with one half-precision scale (5.5 bits a value).
    Q5_0,
    /// 256 four-bit values in 8 groups with a 6-bit scale and minimum each, in units of two half-precision
    /// numbers (4.5 bits a value).
    Q4_K,
    /// 256 six-bit values centred on 32 in 16 groups with an 8-bit scale each, in units of one half-precision
    /// number (6.5625 bits a value).
    Q6_K,
}

impl WeightFormat {
    /// Every format.
    pub const ALL: [Self; 9] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q4_K,
        Self::Q6_K,
    ];

    /// The format's name, as ggml writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q4_K => "Q4_K",
            Self::Q6_K => "Q6_K",
        }
    }

    /// The format of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Values that are stored together, and the bytes they take.
    #[must_use]
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q8_0 => (BLOCK, 2 + BLOCK),
            Self::Q4_0 => (BLOCK, 2 + BLOCK / 2),
            Self::Q4_1 => (BLOCK, 4 + BLOCK / 2),
            Self::Q5_0 => (BLOCK, 2 + 4 + BLOCK / 2),
            Self::Q4_K => (K_BLOCK, 4 + 12 + K_BLOCK / 2),
            Self::Q6_K => (K_BLOCK, K_BLOCK / 2 + K_BLOCK / 4 + 16 + 2),
        }
    }

    /// Bytes of a row of `cols` values, if they are whole blocks and the size is representable.
    #[must_use]
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        let (values, bytes) = self.block();
        if !cols.is_multiple_of(values) {
            return None;
        }
        (cols / values).checked_mul(bytes)
    }
}

/// How the scales of blocks are chosen. The formats, and so the readers, are the same.
#[derive(Debug, Clone, Copy, Default)]
pub enum QuantizeMethod<'a> {
    /// As ggml's plain quantizers, bit for bit.
    #[default]
    Ggml,
    /// By search for the least squared error in Q4_0, Q4_1, Q5_0 and Q8_0; as ggml in the other formats.
    Search {
        /// How often the squared error of each column counts; without it all count alike.
        importance: Option<&'a [f32]>,
    },
}

/// A frozen weight: `rows` (out) by `cols` (in), row-major, in its format at rest.
#[derive(Clone)]
pub struct WeightMatrix {
    rows: usize,
    cols: usize,
    format: WeightFormat,
    storage: Storage,
}

/// `Floats` if and only if the format is F32, so that those can always be borrowed as values.
#[derive(Clone)]
enum Storage {
    Floats(Floats),
    Blocks(SharedBytes, Range<usize>),
}

#[derive(Clone)]
enum Floats {
    Owned(Vec<f32>),
    /// Checked to be aligned when it was made.
    Shared(SharedBytes, Range<usize>),
}

impl WeightMatrix {
    /// Stores `rows * cols` values in the format, quantizing as ggml does, bit for bit.
    ///
    /// # Errors
    /// When the length is not that of the shape, the columns are not whole blocks, or a value is not finite
    /// or beyond the range of half precision where the format needs it.
    pub fn from_f32(
        values: &[f32],
        rows: usize,
        cols: usize,
        format: WeightFormat,
    ) -> Result<Self, WeightError> {
        Self::quantize(values, rows, cols, format, QuantizeMethod::Ggml)
    }

    /// Stores `rows * cols` values in the format, with scales chosen by the method.
    ///
    /// # Errors
    /// As [`WeightMatrix::from_f32`]; [`WeightError::Length`] also when not every column has its importance.
    pub fn quantize(
        values: &[f32],
        rows: usize,
        cols: usize,
        format: WeightFormat,
        method: QuantizeMethod<'_>,
    ) -> Result<Self, WeightError> {
        byte_len(rows, cols, format)?;
        if values.len() != rows * cols {
            return Err(WeightError::Length {
                rows,
                cols,
                expected: rows * cols,
                found: values.len(),
                unit: "values",
            });
        }
        quantize::check_range(values, format)?;
        if format == WeightFormat::F32 {
            let storage = Storage::Floats(Floats::Owned(values.to_vec()));
            return Ok(Self { rows, cols, format, storage });
        }
        let bytes = match method {
            QuantizeMethod::Ggml => quantize::quantize(values, format),
            QuantizeMethod::Search { importance: None } => search::search(values, format, &vec![1.0; cols]),
            QuantizeMethod::Search { importance: Some(importance) } => {
                if importance.len() != cols {
                    let (expected, found) = (cols, importance.len());
                    return Err(WeightError::Length { rows: 1, cols, expected, found, unit: "importances" });
                }
                search::search(values, format, importance)
            }
        };
        Self::from_bytes(bytes, rows, cols, format)
    }

    /// Takes bytes that are already in the format.
    ///
    /// # Errors
    /// When the number of bytes is not that of the shape or the columns are not whole blocks.
    pub fn from_bytes(
        bytes: Vec<u8>,
        rows: usize,
        cols: usize,
        format: WeightFormat,
    ) -> Result<Self, WeightError> {
        let range = 0..bytes.len();
        Self::from_shared(&SharedBytes::from(bytes), range, (rows, cols), format)
    }

    /// A view of `range` in shared bytes; copies only F32 values that are not aligned.
    pub(crate) fn from_shared(
        bytes: &SharedBytes,
        range: Range<usize>,
        (rows, cols): (usize, usize),
        format: WeightFormat,
    ) -> Result<Self, WeightError> {
        let expected = byte_len(rows, cols, format)?;
        let view = bytes.as_ref().get(range.clone()).unwrap_or_default();
        if view.len() != expected {
            return Err(WeightError::Length { rows, cols, expected, found: view.len(), unit: "bytes" });
        }
        let storage = match (format, bytemuck::try_cast_slice::<u8, f32>(view)) {
            (WeightFormat::F32, Ok(_)) => Storage::Floats(Floats::Shared(bytes.clone(), range)),
            (WeightFormat::F32, Err(_)) => Storage::Floats(Floats::Owned(bytemuck::pod_collect_to_vec(view))),
            (_, _) => Storage::Blocks(bytes.clone(), range),
        };
        Ok(Self { rows, cols, format, storage })
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the values are stored.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// The stored bytes, row after row.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match &self.storage {
            Storage::Floats(floats) => bytemuck::cast_slice(floats.as_slice()),
            Storage::Blocks(bytes, range) => &bytes.as_ref()[range.clone()],
        }
    }

    /// The values, if they are stored as F32.
    #[must_use]
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.storage {
            Storage::Floats(floats) => Some(floats.as_slice()),
            Storage::Blocks(..) => None,
        }
    }

    /// Expands `rows` rows from `first_row` into the first `rows * cols` values of `dst`; the same bits on
    /// every processor.
    ///
    /// # Panics
    /// When the rows are not in the matrix or `dst` is too short.
    pub fn dequantize_rows(&self, first_row: usize, rows: usize, dst: &mut [f32]) {
        assert!(first_row + rows <= self.rows, "rows {first_row}..+{rows} of {}", self.rows);
        let dst = &mut dst[..rows * self.cols];
        if let Some(values) = self.as_f32() {
            return dst.copy_from_slice(&values[first_row * self.cols..][..dst.len()]);
        }
        let bytes = self.as_bytes();
        let row = bytes.len() / self.rows;
        dequantize::dequantize(self.format, &bytes[first_row * row..][..rows * row], dst);
    }

    /// Expands part of a row from column `first_col` into all of `dst`; both ends lie between blocks.
    pub(crate) fn dequantize_span(&self, row: usize, first_col: usize, dst: &mut [f32]) {
        assert!(row < self.rows && first_col + dst.len() <= self.cols, "columns of row {row}");
        if let Some(values) = self.as_f32() {
            return dst.copy_from_slice(&values[row * self.cols + first_col..][..dst.len()]);
        }
        let (block, bytes_each) = self.format.block();
        assert!(first_col.is_multiple_of(block) && dst.len().is_multiple_of(block), "whole blocks");
        let first = (row * self.cols + first_col) / block * bytes_each;
        let bytes = &self.as_bytes()[first..][..dst.len() / block * bytes_each];
        dequantize::dequantize(self.format, bytes, dst);
    }

    /// Whether the values lie in a mapped file.
    pub(crate) fn is_mapped(&self) -> bool {
        match &self.storage {
            Storage::Blocks(bytes, _) | Storage::Floats(Floats::Shared(bytes, _)) => bytes.is_mapped(),
            Storage::Floats(Floats::Owned(_)) => false,
        }
    }

    /// Gives back the memory of a weight that lies in a mapped file, until it is read again.
    pub(crate) fn release(&self) {
        match &self.storage {
            Storage::Blocks(bytes, range) | Storage::Floats(Floats::Shared(bytes, range)) => {
                bytes.release(range.clone());
            }
            Storage::Floats(Floats::Owned(_)) => {}
        }
    }

    /// All values, row-major.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        self.dequantize_rows(0, self.rows, &mut values);
        values
    }
}

impl Floats {
    fn as_slice(&self) -> &[f32] {
        match self {
            Self::Owned(values) => values,
            Self::Shared(bytes, range) => bytemuck::cast_slice(&bytes.as_ref()[range.clone()]),
        }
    }
}

impl fmt::Debug for WeightMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WeightMatrix({} x {}, {})", self.rows, self.cols, self.format.name())
    }
}

fn byte_len(rows: usize, cols: usize, format: WeightFormat) -> Result<usize, WeightError> {
    if rows == 0 || cols == 0 || rows.checked_mul(cols).is_none_or(|count| count > isize::MAX as usize / 4) {
        return Err(WeightError::Shape { rows, cols });
    }
    let (block, _) = format.block();
    let columns = || WeightError::Columns { format: format.name(), block, cols };
    Ok(format.row_bytes(cols).ok_or_else(columns)? * rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f32_is_borrowed_where_it_is_aligned_and_copied_where_not() {
        let values = [1.0f32, -2.0, 3.5, 0.25];
        let mut bytes = vec![0; 3];
        bytes.extend(bytemuck::cast_slice::<f32, u8>(&values));
        let shared = SharedBytes::from(bytes);
        let matrix = WeightMatrix::from_shared(&shared, 3..19, (2, 2), WeightFormat::F32).unwrap();
        assert_eq!(matrix.as_f32(), Some(&values[..]));
        assert_eq!(matrix.as_bytes(), bytemuck::cast_slice::<f32, u8>(&values));
        let cut = WeightMatrix::from_shared(&shared, 4..20, (2, 2), WeightFormat::F32).unwrap_err();
        assert!(matches!(cut, WeightError::Length { expected: 16, found: 0, .. }), "{cut}");
    }

    #[test]
    fn rows_are_expanded_where_they_lie() {
        const COLS: usize = 512;
        let values: Vec<f32> = (0..5 * COLS).map(|i| (i % 37) as f32 - 18.0).collect();
        for format in WeightFormat::ALL {
            let matrix = WeightMatrix::from_f32(&values, 5, COLS, format).unwrap();
            let mut rows = vec![0.0; 3 * COLS + 1];
            matrix.dequantize_rows(1, 3, &mut rows);
            assert_eq!(rows[..3 * COLS], matrix.to_f32()[COLS..4 * COLS], "{format:?}");
            assert_eq!(rows[3 * COLS], 0.0);
            assert_eq!(matrix.as_f32().is_some(), format == WeightFormat::F32);
        }
    }

    #[test]
    fn names_lead_back() {
        for format in WeightFormat::ALL {
            assert_eq!(WeightFormat::from_name(format.name()), Some(format));
        }
        assert_eq!(WeightFormat::from_name("Q3_K"), None);
    }
}
