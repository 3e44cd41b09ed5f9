//! Weights in panels of 16 rows, made once from their stored blocks: the same bits in another order.

use std::ops::Range;
use std::sync::Arc;

use super::Panel;
use super::lines::{Line, Lines, Shared};
use crate::weights::{BLOCK, WeightFormat, WeightMatrix};

/// Rows of a panel.
pub(super) const PANEL: usize = 16;

/// How a line's bytes become integers, and what a block adds to a sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Nibbles n; weight = scale n + minimum.
    NibblesMinimum,
    /// Nibbles n; weight = scale (n - 8).
    Nibbles,
    /// Bytes n; weight = scale (n - 128).
    Bytes,
}

impl Form {
    fn of(format: WeightFormat) -> Option<Self> {
        match format {
            WeightFormat::Q4_1 => Some(Self::NibblesMinimum),
            WeightFormat::Q4_0 => Some(Self::Nibbles),
            WeightFormat::Q8_0 => Some(Self::Bytes),
            WeightFormat::F32
            | WeightFormat::F16
            | WeightFormat::BF16
            | WeightFormat::Q5_0
            | WeightFormat::Q4_K
            | WeightFormat::Q6_K => None,
        }
    }

    /// Lines of integers a block. Line i of nibbles holds columns 4 i to 4 i + 3 of the block in the low halves and
    /// 16 more in the high ones; of bytes, columns 4 i to 4 i + 3.
    pub(super) fn lines(self) -> usize {
        match self {
            Self::NibblesMinimum | Self::Nibbles => 4,
            Self::Bytes => 8,
        }
    }

    /// Lines of so many blocks. A line with 16 scales and 16 minima precedes each block, or one with the scales of
    /// two blocks both of them: the kernels read a panel from its first line to its last.
    pub(super) fn panel_lines(self, blocks: usize) -> usize {
        let scales = match self {
            Self::NibblesMinimum => blocks,
            Self::Nibbles | Self::Bytes => blocks.div_ceil(2),
        };
        scales + blocks * self.lines()
    }

    /// Bytes before a block's scales and its integers in a panel. The minima follow 32 bytes after the scales.
    #[inline(always)]
    pub(super) fn offsets(self, block: usize) -> (usize, usize) {
        match self {
            Self::NibblesMinimum => (block * 320, block * 320 + 64),
            Self::Nibbles | Self::Bytes => {
                let (pair, odd) = (block / 2 * (64 + 128 * self.lines()), block % 2);
                (pair + odd * 32, pair + 64 + odd * 64 * self.lines())
            }
        }
    }

    /// Bytes before the integers in a stored block.
    fn header(self) -> usize {
        match self {
            Self::NibblesMinimum => 4,
            Self::Nibbles | Self::Bytes => 2,
        }
    }
}

/// A quantized weight `[rows, cols]` for the integer kernels: panel after panel, each its integers and then its
/// scales.
pub(crate) struct Packed {
    shape: Shape,
    lines: Shared,
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    form: Form,
    rows: usize,
    cols: usize,
}

impl Shape {
    /// None for formats that have no packed form.
    fn of(weight: &WeightMatrix) -> Option<Self> {
        let form = Form::of(weight.format())?;
        Some(Self { form, rows: weight.rows(), cols: weight.cols() })
    }

    fn blocks(self) -> usize {
        self.cols / BLOCK
    }

    fn panel_lines(self) -> usize {
        self.form.panel_lines(self.blocks())
    }

    fn lines(self) -> usize {
        self.rows.div_ceil(PANEL) * self.panel_lines()
    }
}

impl Packed {
    /// Packs weights into one region of memory; none for those whose format has no packed form. Each is let go
    /// as soon as it is packed.
    pub(crate) fn all(weights: &[&WeightMatrix]) -> Vec<Option<Self>> {
        let shapes: Vec<Option<Shape>> = weights.iter().map(|weight| Shape::of(weight)).collect();
        let total = shapes.iter().flatten().map(|shape| shape.lines()).sum();
        let mut lines = Lines::new(total);
        let mut rest = lines.as_mut_slice();
        for (weight, shape) in weights.iter().zip(&shapes) {
            let Some(shape) = shape else { continue };
            let (own, others) = rest.split_at_mut(shape.lines());
            pack(weight, *shape, own);
            weight.release();
            rest = others;
        }
        let lines = Arc::new(lines);
        let mut first = 0;
        let mut packed = |shape: Shape| {
            let range: Range<usize> = first..first + shape.lines();
            first = range.end;
            Self { shape, lines: Shared::new(Arc::clone(&lines), range) }
        };
        shapes.into_iter().map(|shape| shape.map(&mut packed)).collect()
    }

    pub(crate) fn rows(&self) -> usize {
        self.shape.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.shape.cols
    }

    pub(super) fn panels(&self) -> impl Iterator<Item = Panel<'_>> {
        let shape = self.shape;
        let panels = self.lines.as_slice().chunks_exact(shape.panel_lines());
        panels.enumerate().map(move |(index, lines)| {
            let rows = PANEL.min(shape.rows - index * PANEL);
            Panel { form: shape.form, lines, blocks: shape.blocks(), rows }
        })
    }
}

fn pack(weight: &WeightMatrix, shape: Shape, lines: &mut [Line]) {
    let bytes = weight.as_bytes();
    let row_bytes = bytes.len() / shape.rows;
    let panels = bytes.chunks(PANEL * row_bytes).zip(lines.chunks_exact_mut(shape.panel_lines()));
    for (stored, lines) in panels {
        let rows: Vec<&[u8]> = stored.chunks_exact(row_bytes).collect();
        pack_panel(shape.form, &rows, shape.blocks(), bytemuck::cast_slice_mut(lines));
    }
}

fn pack_panel(form: Form, rows: &[&[u8]], blocks: usize, panel: &mut [u8]) {
    let stride = rows[0].len() / blocks;
    // Bytes are stored with a sign and multiplied without.
    let flip = if form == Form::Bytes { 0x8080_8080 } else { 0 };
    for block in 0..blocks {
        let (scales, quants) = form.offsets(block);
        for (r, row) in rows.iter().enumerate() {
            let stored = &row[block * stride..(block + 1) * stride];
            let words = stored[form.header()..].chunks_exact(4);
            let lines = panel[quants..quants + 64 * form.lines()].chunks_exact_mut(64);
            for (line, four) in lines.zip(words) {
                let word = u32::from_le_bytes([four[0], four[1], four[2], four[3]]) ^ flip;
                line[4 * r..4 * r + 4].copy_from_slice(&word.to_le_bytes());
            }
            panel[scales + 2 * r..scales + 2 * r + 2].copy_from_slice(&stored[..2]);
            if form == Form::NibblesMinimum {
                panel[scales + 32 + 2 * r..scales + 34 + 2 * r].copy_from_slice(&stored[2..4]);
            }
        }
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packed({:?})", self.shape)
    }
}
