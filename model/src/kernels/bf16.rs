//! Matrix products of bf16 factors with f32 sums: both factors are rounded to bf16 (to nearest, ties to even)
//! while they are packed, products are exact, sums are f32.
//!
//! A weight goes from its stored blocks straight into packed tiles of at most [`TILE_PAIRS_MAX`] pairs; it
//! never exists as a whole in another form. This file blocks the product; `bf16/avx512.rs` packs and multiplies
//! with AVX512-BF16, about twice as fast as f32 there, `bf16/neon.rs` with ARM's bf16 instructions; `bf16/portable.rs`
//! does the same in plain Rust and is what the fast ones are tested against.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(test)]
mod portable;
#[cfg(test)]
mod tests;

use super::matrix::{Into, View, ViewMut};
use super::scratch::buffer;
use crate::weights::{WeightFormat, WeightMatrix};

/// Number format of the factors of training's large products.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// Single precision throughout.
    #[default]
    F32,
    /// Factors rounded to bf16 (8 bits of mantissa), sums in f32, where the processor multiplies bf16 pairs
    /// (AVX512-BF16, ARM's FEAT_BF16); elsewhere the same as [`Precision::F32`], which is faster than emulating it. Weights in Q5_0,
    /// Q4_K and Q6_K are multiplied in f32 either way.
    Bf16,
}

/// Whether weights of that format are packed; the others are multiplied in f32.
pub(crate) fn packs(format: WeightFormat) -> bool {
    match format {
        WeightFormat::F32
        | WeightFormat::F16
        | WeightFormat::BF16
        | WeightFormat::Q8_0
        | WeightFormat::Q4_0
        | WeightFormat::Q4_1 => true,
        WeightFormat::Q5_0 | WeightFormat::Q4_K | WeightFormat::Q6_K => false,
    }
}

/// Columns of a panel: four registers of 16 sums, or of four.
const PANEL: usize = if cfg!(target_arch = "aarch64") { 16 } else { 64 };

/// Rows of the output that are summed at once; with a panel, 24 registers of sums, or 16.
const ROWS: usize = if cfg!(target_arch = "aarch64") { 4 } else { 6 };

/// Longest stretch of the summed dimension that is packed at once.
const DEPTH_MAX: usize = 768;

/// Pairs of values in a packed tile of the right factor: 512 KiB, half of a second-level cache.
const TILE_PAIRS_MAX: usize = 1 << 17;

/// Words in a cache line.
const LINE: usize = 16;

/// Values of a stored row that are expanded together; stretches and tiles start at multiples of it.
const GROUP: usize = 32;

/// What multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Vector instructions for pairs of bf16.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// Vector instructions for two pairs of bf16 in two rows and two columns.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// Plain Rust.
    #[cfg(test)]
    Portable,
}

/// The right factor of a product, `[depth, columns]`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Right<'a> {
    /// f32 values.
    Values(View<'a>),
    /// A stored weight; its rows are summed over.
    Stored(&'a WeightMatrix),
    /// The transpose of a stored weight; its columns are summed over.
    StoredTransposed(&'a WeightMatrix),
}

/// Rows of a matrix as they rest; a packer reads `GROUP` values of a row at a time.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rows<'a> {
    Values { data: &'a [f32], stride: usize },
    Stored(&'a WeightMatrix),
}

/// The part of some [`Rows`] that is packed.
#[derive(Debug, Clone, Copy)]
struct Part {
    first_row: usize,
    rows: usize,
    first_col: usize,
    cols: usize,
}

/// A rounded left factor: the pair `j` of row `i` lies at `i * row_stride + j * pair_stride`.
#[derive(Debug, Clone, Copy)]
struct Left<'a> {
    pairs: &'a [u32],
    row_stride: usize,
    pair_stride: usize,
}

/// One call of the inner kernel: rows of the output by one panel.
#[derive(Debug, Clone, Copy)]
struct Block {
    /// Output rows, at most [`ROWS`].
    rows: usize,
    /// Output columns, at most [`PANEL`].
    cols: usize,
    /// Pairs to sum over.
    pairs: usize,
    /// Values between output rows.
    stride: usize,
    into: Into,
}

impl Precision {
    /// The kernel of products whose factors are rounded; `None` for f32 products.
    pub(crate) fn kernel(self) -> Option<Kernel> {
        match self {
            Self::F32 => None,
            Self::Bf16 => Kernel::detect(),
        }
    }
}

impl Kernel {
    /// What this processor multiplies fastest with; `None` where f32 products are faster.
    pub(crate) fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if avx512::available() {
            return Some(Self::Avx512);
        }
        #[cfg(target_arch = "aarch64")]
        if neon::available() {
            return Some(Self::Neon);
        }
        None
    }

    /// Packs pairs of neighbouring rows into panels of `width` columns: the pair of rows `2j` and `2j + 1` in
    /// column `c` goes to `[c / width][j][c % width]`. What a panel has beyond the part is zero.
    fn interleave_rows(self, source: Rows<'_>, part: Part, width: usize, panels: &mut [u32]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::interleave_rows(source, part, width, panels),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::interleave_rows(source, part, width, panels),
            #[cfg(test)]
            Self::Portable => portable::interleave_rows(source, part, width, panels),
        }
    }

    /// Packs the transpose: the pair of columns `2j` and `2j + 1` in row `r` goes to
    /// `[r / PANEL][j][r % PANEL]`. What a panel has beyond the part is zero.
    fn transpose_rows(self, source: Rows<'_>, part: Part, panels: &mut [u32]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::transpose_rows(source, part, panels),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::transpose_rows(source, part, panels),
            #[cfg(test)]
            Self::Portable => portable::transpose_rows(source, part, panels),
        }
    }

    /// Rounds rows: the pair `j` of row `r` goes to `r * stride + j`.
    fn round_rows(self, source: Rows<'_>, part: Part, stride: usize, out: &mut [u32]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::round_rows(source, part, stride, out),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::round_rows(source, part, stride, out),
            #[cfg(test)]
            Self::Portable => portable::round_rows(source, part, stride, out),
        }
    }

    fn multiply(self, block: Block, left: Left<'_>, panel: &[u32], out: &mut [f32]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::multiply(block, left, panel, out),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::multiply(block, left, panel, out),
            #[cfg(test)]
            Self::Portable => portable::multiply(block, left, panel, out),
        }
    }
}

impl<'a> Right<'a> {
    pub(super) fn shape(&self) -> (usize, usize) {
        match self {
            Self::Values(view) => (view.rows, view.cols),
            Self::Stored(w) => (w.rows(), w.cols()),
            Self::StoredTransposed(w) => (w.cols(), w.rows()),
        }
    }

    /// The rows as they rest, and whether the product sums over their columns.
    pub(super) fn rest(&self) -> (Rows<'a>, bool) {
        match self {
            Self::Values(view) => Rows::of(view),
            Self::Stored(w) => (Rows::Stored(w), false),
            Self::StoredTransposed(w) => (Rows::Stored(w), true),
        }
    }
}

impl<'a> Rows<'a> {
    /// The rows of a view or, if those are not contiguous, its columns; and whether it is the latter.
    fn of(view: &View<'a>) -> (Self, bool) {
        let View { data, row_stride, col_stride, .. } = *view;
        if col_stride == 1 {
            return (Self::Values { data, stride: row_stride }, false);
        }
        assert!(row_stride == 1, "a view has contiguous rows or columns");
        (Self::Values { data, stride: col_stride }, true)
    }
}

/// `out = left * right`, or added to `out`. Single-threaded.
pub(crate) fn product(kernel: Kernel, out: ViewMut<'_>, into: Into, left: View<'_>, right: Right<'_>) {
    let (depth, columns) = right.shape();
    assert!(
        out.rows == left.rows && out.cols == columns && left.cols == depth,
        "product [{}, {}] * [{depth}, {columns}] into [{}, {}]",
        left.rows,
        left.cols,
        out.rows,
        out.cols,
    );
    if depth == 0 && into == Into::Overwrite {
        out.data.chunks_mut(out.row_stride.max(1)).take(out.rows).for_each(|row| row[..columns].fill(0.0));
    }
    let stretch = depth.div_ceil(depth.div_ceil(DEPTH_MAX).max(1)).next_multiple_of(GROUP).max(GROUP);
    let whole = PANEL.max(GROUP);
    let tile_columns = (2 * TILE_PAIRS_MAX / stretch / whole * whole).min(columns.next_multiple_of(PANEL));
    let mut left_memory = buffer(left_pairs(&left, stretch) + LINE);
    let mut tile_memory = buffer(tile_columns * stretch / 2 + LINE);
    for first in (0..depth).step_by(stretch) {
        let len = stretch.min(depth - first);
        let left = pack_left(kernel, &left, (first, len), on_lines(&mut left_memory));
        let into = if first == 0 { into } else { Into::Add };
        for column in (0..columns).step_by(tile_columns) {
            let cols = tile_columns.min(columns - column);
            let tile = &mut on_lines(&mut tile_memory)[..cols.next_multiple_of(PANEL) * len.div_ceil(2)];
            pack_right(kernel, right, (first, len), (column, cols), tile);
            let block = Block { rows: out.rows, cols, pairs: len.div_ceil(2), stride: out.row_stride, into };
            multiply_tile(kernel, block, left, tile, &mut out.data[column..]);
        }
    }
}

/// All rows of the output by the columns of one tile. A few rows of the left factor stay in the first-level
/// cache while the tile streams past from the second.
fn multiply_tile(kernel: Kernel, all: Block, left: Left<'_>, tile: &[u32], out: &mut [f32]) {
    for row in (0..all.rows).step_by(ROWS) {
        let left = Left { pairs: &left.pairs[row * left.row_stride..], ..left };
        for (panel, column) in tile.chunks_exact(PANEL * all.pairs).zip((0..all.cols).step_by(PANEL)) {
            let block = Block { rows: ROWS.min(all.rows - row), cols: PANEL.min(all.cols - column), ..all };
            kernel.multiply(block, left, panel, &mut out[row * all.stride + column..]);
        }
    }
}

/// Room that [`pack_left`] needs for a stretch.
fn left_pairs(left: &View<'_>, stretch: usize) -> usize {
    let by_rows = left.rows * row_stride(stretch);
    let by_columns = stretch / 2 * left.rows.next_multiple_of(PANEL);
    by_rows.max(by_columns)
}

/// Pairs between rounded rows: one cache line more than they need, so that rows do not share a cache set.
fn row_stride(len: usize) -> usize {
    len.next_multiple_of(GROUP) / 2 + LINE
}

fn pack_left<'a>(
    kernel: Kernel,
    left: &View<'_>,
    (first, len): (usize, usize),
    memory: &'a mut [u32],
) -> Left<'a> {
    match Rows::of(left) {
        (rows, false) => {
            let part = Part { first_row: 0, rows: left.rows, first_col: first, cols: len };
            let row_stride = row_stride(len);
            kernel.round_rows(rows, part, row_stride, memory);
            Left { pairs: memory, row_stride, pair_stride: 1 }
        }
        (columns, true) => {
            let part = Part { first_row: first, rows: len, first_col: 0, cols: left.rows };
            let pair_stride = left.rows.next_multiple_of(PANEL);
            kernel.interleave_rows(columns, part, pair_stride, memory);
            Left { pairs: memory, row_stride: 1, pair_stride }
        }
    }
}

fn pack_right(
    kernel: Kernel,
    right: Right<'_>,
    (first, len): (usize, usize),
    (column, cols): (usize, usize),
    tile: &mut [u32],
) {
    match right.rest() {
        (rows, false) => {
            let part = Part { first_row: first, rows: len, first_col: column, cols };
            kernel.interleave_rows(rows, part, PANEL, tile);
        }
        (rows, true) => {
            let part = Part { first_row: column, rows: cols, first_col: first, cols: len };
            kernel.transpose_rows(rows, part, tile);
        }
    }
}

/// The memory from its first cache line on.
fn on_lines(memory: &mut [f32]) -> &mut [u32] {
    let words: &mut [u32] = bytemuck::cast_slice_mut(memory);
    let skipped = words.as_ptr().align_offset(4 * LINE).min(LINE);
    &mut words[skipped..]
}
