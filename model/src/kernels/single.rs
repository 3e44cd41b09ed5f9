//! Matrix products in single precision, single-threaded.
//!
//! The right factor goes from where it rests (values, or the blocks of a stored weight) straight into packed panels
//! of a few columns; the left factor is read where it lies. This file blocks the product; `single/x86.rs` multiplies
//! with AVX2 or AVX-512, `single/neon.rs` with NEON, `single/portable.rs` in plain Rust.
//!
//! Every element of the output is summed in one order: over each stretch of the summed dimension in turn, with fused
//! multiply-adds, the stretches then added up. So the bits depend neither on the instruction set nor on the other
//! rows and columns; only plain Rust without the instruction (`portable::fused`) rounds otherwise.

#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::bf16::{Right, Rows};
use super::matrix::{Into, View, ViewMut};
use super::scratch::buffer;
#[cfg(target_arch = "aarch64")]
use super::simd::has_neon;
#[cfg(target_arch = "x86_64")]
use super::simd::{has_avx2, has_avx512};

/// Longest stretch of the summed dimension: a panel of it stays in the first-level cache.
const DEPTH_MAX: usize = 384;

/// Columns that are packed at once.
const TILE_COLUMNS: usize = 128;

/// Values of the left factor that are used for a whole tile before the next: half of a second-level cache.
const LEFT_VALUES: usize = 1 << 17;

/// Stretches start at multiples of it, or of a weight's blocks.
const GROUP: usize = 32;

/// Columns from which a left factor that lies in columns is worth copying into rows of a block.
const COPY_COLUMNS_MIN: usize = 64;

/// Values in a cache line.
const LINE: usize = 16;

/// What multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// Plain Rust.
    Portable,
}

/// A left factor from the start of a stretch on: the value of row `i` and depth `k` lies at
/// `i * row_stride + k * depth_stride`.
#[derive(Debug, Clone, Copy)]
struct Left<'a> {
    values: &'a [f32],
    row_stride: usize,
    depth_stride: usize,
}

/// One call of the inner kernel: some rows of the output by one panel.
#[derive(Debug, Clone, Copy)]
struct Block {
    /// Output rows and columns, at most those of [`Kernel::shape`].
    rows: usize,
    cols: usize,
    /// Products in a sum.
    depth: usize,
    /// Values between output rows.
    stride: usize,
    into: Into,
    alpha: f32,
}

/// The part of some [`Rows`] that is packed.
#[derive(Debug, Clone, Copy)]
struct Part {
    first_row: usize,
    rows: usize,
    first_col: usize,
    cols: usize,
}

impl Kernel {
    /// The fastest that this processor has and [`super::simd::limit_simd`] allows.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                return Self::Avx512;
            }
            if has_avx2() {
                return Self::Avx2;
            }
        }
        #[cfg(target_arch = "aarch64")]
        if has_neon() {
            return Self::Neon;
        }
        Self::Portable
    }

    /// Rows that are summed at once, and columns of a panel.
    fn shape(self) -> (usize, usize) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => (x86::AVX512_ROWS, x86::AVX512_PANEL),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => (x86::AVX2_ROWS, x86::AVX2_PANEL),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => (neon::ROWS, neon::PANEL),
            Self::Portable => (portable::ROWS, portable::PANEL),
        }
    }

    /// Multiplies a block: `out = alpha * left * panel`, or added to `out`.
    fn multiply(self, block: Block, left: Left<'_>, panel: &[f32], out: &mut [f32]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => x86::multiply_avx512(block, left, panel, out),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => x86::multiply_avx2(block, left, panel, out),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::multiply(block, left, panel, out),
            Self::Portable => portable::multiply(block, left, panel, out),
        }
    }

    /// Eight rows of `values`, `stride` apart, become eight columns of the panel whose lines are `width` wide.
    fn transpose(self, values: &[f32], stride: usize, cols: usize, panel: &mut [f32], width: usize) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx2 => x86::transpose(values, stride, cols, panel, width),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::transpose(values, stride, cols, panel, width),
            Self::Portable => portable::transpose(values, stride, cols, panel, width),
        }
    }
}

/// `out = alpha * left * right`, or added to `out`.
pub(crate) fn product(
    kernel: Kernel,
    out: ViewMut<'_>,
    into: Into,
    left: View<'_>,
    right: Right<'_>,
    alpha: f32,
) {
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
    let stretch = stretch(depth, &right);
    let (rows_at_once, panel) = kernel.shape();
    let tile_columns = TILE_COLUMNS.max(columns_at_once(&right)).min(columns.next_multiple_of(panel));
    let mut tile = buffer(tile_columns * stretch.min(depth) + LINE);
    let tile = on_lines(&mut tile);
    let copied = left.col_stride != 1 && columns >= COPY_COLUMNS_MIN;
    let copied_values = left.rows.next_multiple_of(rows_at_once) * stretch.min(depth);
    let mut left_memory = buffer(if copied { copied_values + LINE } else { 0 });
    for first in (0..depth).step_by(stretch.max(1)) {
        let len = stretch.min(depth - first);
        let lefts = if copied {
            let memory = on_lines(&mut left_memory);
            copy_blocks(&left, (first, len), rows_at_once, memory);
            Lefts::Blocks(memory)
        } else {
            Lefts::InPlace(Left {
                values: &left.data[(first * left.col_stride).min(left.data.len())..],
                row_stride: left.row_stride,
                depth_stride: left.col_stride,
            })
        };
        let into = if first == 0 { into } else { Into::Add };
        for column in (0..columns).step_by(tile_columns.max(1)) {
            let cols = tile_columns.min(columns - column);
            let tile = &mut tile[..cols.next_multiple_of(panel) * len];
            pack(kernel, right, (first, len), (column, cols), tile);
            let block = Block { rows: out.rows, cols, depth: len, stride: out.row_stride, into, alpha };
            multiply_tile(kernel, block, lefts, tile, &mut out.data[column..]);
        }
    }
}

/// A stretch of the left factor.
#[derive(Debug, Clone, Copy)]
enum Lefts<'a> {
    InPlace(Left<'a>),
    /// Blocks of as many rows as are summed at once; in a block, rows of one depth lie together.
    Blocks(&'a [f32]),
}

impl<'a> Lefts<'a> {
    /// From a row on that starts a block of rows.
    fn at_row(self, row: usize, depth: usize, rows_at_once: usize) -> Left<'a> {
        match self {
            Self::InPlace(left) => Left { values: &left.values[row * left.row_stride..], ..left },
            Self::Blocks(values) => {
                Left { values: &values[row * depth..], row_stride: 1, depth_stride: rows_at_once }
            }
        }
    }
}

/// All rows of the output by the columns of one tile. A panel stays in the first-level cache while rows stream past
/// from the second.
fn multiply_tile(kernel: Kernel, all: Block, lefts: Lefts<'_>, tile: &[f32], out: &mut [f32]) {
    let (rows_at_once, panel_columns) = kernel.shape();
    let chunk = (LEFT_VALUES / all.depth).next_multiple_of(rows_at_once);
    for first in (0..all.rows).step_by(chunk) {
        let end = all.rows.min(first + chunk);
        let panels = tile.chunks_exact(panel_columns * all.depth);
        for (panel, column) in panels.zip((0..all.cols).step_by(panel_columns)) {
            for row in (first..end).step_by(rows_at_once) {
                let block = Block {
                    rows: rows_at_once.min(end - row),
                    cols: panel_columns.min(all.cols - column),
                    ..all
                };
                let left = lefts.at_row(row, all.depth, rows_at_once);
                kernel.multiply(block, left, panel, &mut out[row * all.stride + column..]);
            }
        }
    }
}

/// Length of the stretches of a sum.
fn stretch(depth: usize, right: &Right<'_>) -> usize {
    let group = match right {
        Right::StoredTransposed(w) => w.format().block().0.max(GROUP),
        Right::Values(_) | Right::Stored(_) => GROUP,
    };
    depth.div_ceil(depth.div_ceil(DEPTH_MAX).max(1)).next_multiple_of(group)
}

/// Columns that must be packed together for whole blocks of the weight.
fn columns_at_once(right: &Right<'_>) -> usize {
    match right {
        Right::Stored(w) => w.format().block().0,
        Right::Values(_) | Right::StoredTransposed(_) => 1,
    }
}

/// Packs a tile into panels: depth `j` of column `c` goes to `[c / panel][j][c % panel]`; columns beyond the tile's
/// are zero.
fn pack(
    kernel: Kernel,
    right: Right<'_>,
    (first, len): (usize, usize),
    (column, cols): (usize, usize),
    tile: &mut [f32],
) {
    let (rows, transposed) = right.rest();
    if transposed {
        pack_transposed(
            kernel,
            rows,
            Part { first_row: column, rows: cols, first_col: first, cols: len },
            tile,
        );
    } else {
        pack_rows(kernel, rows, Part { first_row: first, rows: len, first_col: column, cols }, tile);
    }
}

fn pack_rows(kernel: Kernel, source: Rows<'_>, part: Part, tile: &mut [f32]) {
    let width = kernel.shape().1;
    let mut expanded = buffer(part.cols);
    for j in 0..part.rows {
        let row = part.first_row + j;
        let values = match source {
            Rows::Values { data, stride } => &data[row * stride + part.first_col..][..part.cols],
            Rows::Stored(w) => match w.as_f32() {
                Some(values) => &values[row * w.cols() + part.first_col..][..part.cols],
                None => {
                    w.dequantize_span(row, part.first_col, &mut expanded);
                    &expanded
                }
            },
        };
        for (c, values) in values.chunks(width).enumerate() {
            let line = &mut tile[(c * part.rows + j) * width..][..width];
            if values.len() == width {
                line.copy_from_slice(values);
            } else {
                line[..values.len()].copy_from_slice(values);
                line[values.len()..].fill(0.0);
            }
        }
    }
}

/// Rows that [`Kernel::transpose`] takes at once.
const TRANSPOSED_ROWS: usize = 8;

fn pack_transposed(kernel: Kernel, source: Rows<'_>, part: Part, tile: &mut [f32]) {
    let width = kernel.shape().1;
    let mut expanded = buffer(TRANSPOSED_ROWS * part.cols);
    for c in (0..part.rows.next_multiple_of(width)).step_by(TRANSPOSED_ROWS) {
        let panel = &mut tile[c / width * part.cols * width..][..part.cols * width];
        let panel = &mut panel[c % width..];
        let rows = part.rows.saturating_sub(c).min(TRANSPOSED_ROWS);
        let row = part.first_row + c;
        let lying = match source {
            Rows::Values { data, stride } => Some((data, stride)),
            Rows::Stored(w) => w.as_f32().map(|values| (values, w.cols())),
        };
        if let Some((data, stride)) = lying.filter(|_| rows == TRANSPOSED_ROWS) {
            let values = &data[row * stride + part.first_col..];
            kernel.transpose(values, stride, part.cols, panel, width);
            continue;
        }
        for (i, out) in expanded.chunks_exact_mut(part.cols).enumerate() {
            match (source, lying) {
                _ if i >= rows => out.fill(0.0),
                (_, Some((data, stride))) => {
                    out.copy_from_slice(&data[(row + i) * stride + part.first_col..][..part.cols]);
                }
                (Rows::Stored(w), None) => w.dequantize_span(row + i, part.first_col, out),
                (Rows::Values { .. }, None) => unreachable!("values lie in memory"),
            }
        }
        kernel.transpose(&expanded, part.cols, part.cols, panel, width);
    }
}

/// Copies a left factor that lies in columns into blocks of rows.
fn copy_blocks(left: &View<'_>, (first, len): (usize, usize), rows_at_once: usize, blocks: &mut [f32]) {
    for k in 0..len {
        let column = &left.data[(first + k) * left.col_stride..][..left.rows];
        for (block, values) in column.chunks(rows_at_once).enumerate() {
            let at = (block * len + k) * rows_at_once;
            blocks[at..at + values.len()].copy_from_slice(values);
        }
    }
}

/// The memory from its first cache line on.
fn on_lines(memory: &mut [f32]) -> &mut [f32] {
    let skipped = memory.as_ptr().align_offset(4 * LINE).min(LINE).min(memory.len());
    &mut memory[skipped..]
}
