//! Weights in panels of 16 rows, made once from their stored blocks: the same bits in another order.

use super::Panel;
use crate::weights::{BLOCK, WeightFormat, WeightMatrix};

/// Rows of a panel.
pub(super) const PANEL: usize = 16;

/// A cache line and a vector register.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

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
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 => None,
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

    /// Lines of scales for so many blocks: 16 scales and 16 minima a block, or the scales of two blocks.
    pub(super) fn scale_lines(self, blocks: usize) -> usize {
        match self {
            Self::NibblesMinimum => blocks,
            Self::Nibbles | Self::Bytes => blocks.div_ceil(2),
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

/// A quantized weight `[rows, cols]` for the integer kernels.
pub(crate) struct Packed {
    form: Form,
    rows: usize,
    cols: usize,
    quants: Vec<Line>,
    scales: Vec<Line>,
}

impl Packed {
    /// None for formats without blocks of 32.
    pub(crate) fn new(weight: &WeightMatrix) -> Option<Self> {
        let form = Form::of(weight.format())?;
        let (rows, cols) = (weight.rows(), weight.cols());
        let (panels, blocks) = (rows.div_ceil(PANEL), cols / BLOCK);
        let mut packed = Self {
            form,
            rows,
            cols,
            quants: Vec::with_capacity(panels * blocks * form.lines()),
            scales: vec![Line([0; 64]); panels * form.scale_lines(blocks)],
        };
        let row_bytes = weight.as_bytes().len() / rows;
        let panels = weight.as_bytes().chunks(PANEL * row_bytes);
        for (stored, scales) in panels.zip(packed.scales.chunks_exact_mut(form.scale_lines(blocks))) {
            let rows: Vec<&[u8]> = stored.chunks_exact(row_bytes).collect();
            pack_panel(form, &rows, blocks, &mut packed.quants, scales);
        }
        Some(packed)
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        (self.quants.len() + self.scales.len()) * size_of::<Line>()
    }

    pub(super) fn panels(&self) -> impl Iterator<Item = Panel<'_>> {
        let blocks = self.cols / BLOCK;
        let quants = self.quants.chunks_exact(blocks * self.form.lines());
        let scales = self.scales.chunks_exact(self.form.scale_lines(blocks));
        quants.zip(scales).enumerate().map(move |(index, (quants, scales))| Panel {
            form: self.form,
            quants,
            scales,
            blocks,
            rows: PANEL.min(self.rows - index * PANEL),
        })
    }
}

fn pack_panel(form: Form, rows: &[&[u8]], blocks: usize, quants: &mut Vec<Line>, scales: &mut [Line]) {
    let stride = rows[0].len() / blocks;
    // Bytes are stored with a sign and multiplied without.
    let flip = if form == Form::Bytes { 0x80 } else { 0 };
    for block in 0..blocks {
        let at = block * stride;
        let mut lines = [Line([0; 64]); 8];
        for (r, row) in rows.iter().enumerate() {
            let stored = &row[at + form.header()..at + stride];
            for (line, four) in lines.iter_mut().zip(stored.chunks_exact(4)) {
                let word = u32::from_le_bytes([four[0], four[1], four[2], four[3]]) ^ (flip * 0x0101_0101);
                line.0[4 * r..4 * r + 4].copy_from_slice(&word.to_le_bytes());
            }
            let (line, first) = match form {
                Form::NibblesMinimum => (&mut scales[block], 0),
                Form::Nibbles | Form::Bytes => (&mut scales[block / 2], block % 2 * 32),
            };
            line.0[first + 2 * r..first + 2 * r + 2].copy_from_slice(&row[at..at + 2]);
            if form == Form::NibblesMinimum {
                line.0[32 + 2 * r..34 + 2 * r].copy_from_slice(&row[at + 2..at + 4]);
            }
        }
        quants.extend_from_slice(&lines[..form.lines()]);
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packed({} x {}, {:?})", self.rows, self.cols, self.form)
    }
}
