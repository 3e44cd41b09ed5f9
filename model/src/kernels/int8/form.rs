//! How a panel's bytes become weights: where scales and integers lie, and how stored blocks get there.
//!
//! In each line of integers, byte `4 r + b` belongs to row r of the panel. Low halves of line i hold columns
//! `4 i + b` of a block of 32, high ones columns `16 + 4 i + b`; with whole bytes, line i holds columns `4 i + b`.
//! Bits above the fourth follow in lines of their own, at the same bytes.

use super::pack::PANEL;
use crate::weights::{WeightFormat, six_bit_pair};

/// Blocks of 32 columns in a superblock of the forms with groups.
const GROUP_BLOCKS: usize = 8;
/// Lines before a superblock's integers: one of units, four with 16 scales and 16 minima, or two times 16 scales,
/// of each block.
const GROUP_HEADER: usize = 5;

/// How a line's bytes become integers, and what a block adds to a sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Form {
    /// Nibbles n; weight = scale n + minimum.
    NibblesMinimum,
    /// Nibbles n; weight = scale (n - 8).
    Nibbles,
    /// Bytes n; weight = scale (n - 128).
    Bytes,
    /// Nibbles with a fifth bit, n; weight = scale (n - 16). Bit i of the last line's bytes is that of line i, as if
    /// there were eight.
    FiveBits,
    /// Nibbles n in groups of 32 columns; weight = unit scale n - unit of minima minimum.
    NibbleGroups,
    /// Six bits n in groups of 16 columns; weight = unit scale (n - 32). Of the last two lines, one has the upper
    /// bits of columns 0 to 15, one those of columns 16 to 31: bits 2 i and 2 i + 1 are those of line i.
    SixBitGroups,
}

impl Form {
    pub(super) fn of(format: WeightFormat) -> Option<Self> {
        match format {
            WeightFormat::Q4_1 => Some(Self::NibblesMinimum),
            WeightFormat::Q4_0 => Some(Self::Nibbles),
            WeightFormat::Q8_0 => Some(Self::Bytes),
            WeightFormat::Q5_0 => Some(Self::FiveBits),
            WeightFormat::Q4_K => Some(Self::NibbleGroups),
            WeightFormat::Q6_K => Some(Self::SixBitGroups),
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 => None,
        }
    }

    /// Lines of integers a block.
    pub(super) fn lines(self) -> usize {
        match self {
            Self::NibblesMinimum | Self::Nibbles | Self::NibbleGroups => 4,
            Self::FiveBits => 5,
            Self::SixBitGroups => 6,
            Self::Bytes => 8,
        }
    }

    /// Lines of so many blocks. A line with 16 scales and 16 minima precedes each block, or one with the scales of
    /// two blocks both of them, or a header a superblock: the kernels read a panel from its first line to its last.
    pub(super) fn panel_lines(self, blocks: usize) -> usize {
        let scales = match self {
            Self::NibblesMinimum => blocks,
            Self::Nibbles | Self::Bytes | Self::FiveBits => blocks.div_ceil(2),
            Self::NibbleGroups | Self::SixBitGroups => blocks / GROUP_BLOCKS * GROUP_HEADER,
        };
        scales + blocks * self.lines()
    }

    /// Bytes before a block's scales and its integers in a panel. The minima follow 32 bytes after the scales; in the
    /// forms with groups, minima or second scales follow after 16, and all of these are bytes.
    #[inline(always)]
    pub(super) fn offsets(self, block: usize) -> (usize, usize) {
        match self {
            Self::NibblesMinimum => (block * 320, block * 320 + 64),
            Self::Nibbles | Self::Bytes | Self::FiveBits => {
                let (pair, odd) = (block / 2 * (64 + 128 * self.lines()), block % 2);
                (pair + odd * 32, pair + 64 + odd * 64 * self.lines())
            }
            Self::NibbleGroups | Self::SixBitGroups => {
                let (start, group) = (self.units(block), block % GROUP_BLOCKS);
                (start + 64 + group * 32, start + 64 * (GROUP_HEADER + group * self.lines()))
            }
        }
    }

    /// Bytes before the units that a block's group scales are in (and 32 further those of the minima).
    #[inline(always)]
    pub(super) fn units(self, block: usize) -> usize {
        block / GROUP_BLOCKS * 64 * (GROUP_HEADER + GROUP_BLOCKS * self.lines())
    }

    /// Bytes before the integers in a stored block without groups.
    fn header(self) -> usize {
        match self {
            Self::NibblesMinimum => 4,
            Self::FiveBits => 6,
            Self::Nibbles | Self::Bytes | Self::NibbleGroups | Self::SixBitGroups => 2,
        }
    }

    /// Writes one panel from the stored rows.
    pub(super) fn pack_panel(self, rows: &[&[u8]], blocks: usize, panel: &mut [u8]) {
        assert!(rows.len() <= PANEL, "rows of one panel");
        match self {
            Self::NibblesMinimum | Self::Nibbles | Self::Bytes | Self::FiveBits => {
                self.pack_blocks(rows, blocks, panel);
            }
            Self::NibbleGroups => self.pack_nibble_groups(rows, blocks, panel),
            Self::SixBitGroups => self.pack_six_bit_groups(rows, blocks, panel),
        }
    }

    fn pack_blocks(self, rows: &[&[u8]], blocks: usize, panel: &mut [u8]) {
        let stride = rows[0].len() / blocks;
        // Bytes are stored with a sign and multiplied without.
        let flip = if self == Self::Bytes { 0x8080_8080 } else { 0 };
        for block in 0..blocks {
            let (scales, quants) = self.offsets(block);
            for (r, row) in rows.iter().enumerate() {
                let stored = &row[block * stride..(block + 1) * stride];
                let words = stored[self.header()..].chunks_exact(4);
                let lines = panel[quants..quants + 64 * self.lines()].chunks_exact_mut(64);
                for (line, four) in lines.zip(words) {
                    put_word(line, r, word(four, 0) ^ flip);
                }
                panel[scales + 2 * r..scales + 2 * r + 2].copy_from_slice(&stored[..2]);
                if self == Self::NibblesMinimum {
                    panel[scales + 32 + 2 * r..scales + 34 + 2 * r].copy_from_slice(&stored[2..4]);
                }
                if self == Self::FiveBits {
                    put_word(&mut panel[quants + 4 * 64..], r, fifth_bits(word(stored, 2)));
                }
            }
        }
    }

    /// Q4_K: 144 bytes a superblock, told in `weights/dequantize.rs`.
    fn pack_nibble_groups(self, rows: &[&[u8]], blocks: usize, panel: &mut [u8]) {
        for block in 0..blocks {
            let (units, (scales, quants)) = (self.units(block), self.offsets(block));
            let (superblock, group) = (block / GROUP_BLOCKS, block % GROUP_BLOCKS);
            for (r, row) in rows.iter().enumerate() {
                let stored = &row[superblock * 144..(superblock + 1) * 144];
                panel[units + 2 * r..units + 2 * r + 2].copy_from_slice(&stored[..2]);
                panel[units + 32 + 2 * r..units + 34 + 2 * r].copy_from_slice(&stored[2..4]);
                let (scale, minimum) = six_bit_pair(&stored[4..16], group);
                (panel[scales + r], panel[scales + 16 + r]) = (scale, minimum);
                let shift = 4 * (group % 2);
                let four = |at: usize| word(stored, 16 + 32 * (group / 2) + 4 * at) >> shift & 0x0f0f_0f0f;
                for i in 0..4 {
                    put_word(&mut panel[quants + i * 64..], r, four(i) | four(i + 4) << 4);
                }
            }
        }
    }

    /// Q6_K: 210 bytes a superblock, told in `weights/dequantize.rs`.
    fn pack_six_bit_groups(self, rows: &[&[u8]], blocks: usize, panel: &mut [u8]) {
        for block in 0..blocks {
            let (units, (scales, quants)) = (self.units(block), self.offsets(block));
            let (superblock, group) = (block / GROUP_BLOCKS, block % GROUP_BLOCKS);
            let (half, quarter) = (group / 4, group % 4);
            for (r, row) in rows.iter().enumerate() {
                let stored = &row[superblock * 210..(superblock + 1) * 210];
                panel[units + 2 * r..units + 2 * r + 2].copy_from_slice(&stored[208..]);
                panel[scales + r] = stored[192 + 2 * group];
                panel[scales + 16 + r] = stored[193 + 2 * group];
                let (low, high) = (64 * half + 32 * (quarter % 2), 128 + 32 * half);
                let low = |at: usize| word(stored, low + 4 * at) >> (4 * (quarter / 2)) & 0x0f0f_0f0f;
                let high = |at: usize| word(stored, high + 4 * at) >> (2 * quarter) & 0x0303_0303;
                for i in 0..4 {
                    put_word(&mut panel[quants + i * 64..], r, low(i) | low(i + 4) << 4);
                }
                for part in 0..2 {
                    let bits = (0..4).fold(0, |bits, i| bits | high(4 * part + i) << (2 * i));
                    put_word(&mut panel[quants + (4 + part) * 64..], r, bits);
                }
            }
        }
    }
}

/// Four bytes as one number.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Row r's four bytes of a line.
fn put_word(line: &mut [u8], r: usize, word: u32) {
    line[4 * r..4 * r + 4].copy_from_slice(&word.to_le_bytes());
}

/// From one bit a column to four bytes: bit i of byte b is that of column `4 i + b`.
fn fifth_bits(columns: u32) -> u32 {
    // The product has a copy of the four bits at 0, 7, 14 and 21, which puts bit b at 8 b.
    (0..8).fold(0, |bits, i| bits | (((columns >> (4 * i) & 15) * 0x0020_4081) & 0x0101_0101) << i)
}
