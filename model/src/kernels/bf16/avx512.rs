//! Packing and inner kernel with AVX-512 and AVX512-BF16.
//!
//! A group of 32 values of a row becomes one register of 32 bf16, whatever its format. Rounding is
//! `vcvtneps2bf16`, to nearest with ties to even; subnormal numbers become zero. Four-bit blocks have sixteen
//! possible values: those are computed and rounded once a block and looked up.
#![allow(unsafe_code, reason = "vector instructions; bounds are asserted where pointers are made")]

use std::arch::x86_64::*;

use super::{Block, GROUP, Left, PANEL, Part, ROWS, Rows};
use crate::kernels::matrix::Into;
use crate::kernels::simd::has_avx512;
use crate::weights::WeightFormat;

/// Words in a register.
const LANES: usize = 16;

/// Whether the processor has the instructions of this file.
pub(super) fn available() -> bool {
    has_avx512() && std::is_x86_feature_detected!("avx512bf16")
}

pub(super) fn interleave_rows(source: Rows<'_>, part: Part, width: usize, panels: &mut [u32]) {
    assert!(available() && width.is_multiple_of(PANEL), "detected, and whole registers");
    // SAFETY: the instructions were detected.
    unsafe { interleave_any(source, part, width, panels) }
}

pub(super) fn transpose_rows(source: Rows<'_>, part: Part, panels: &mut [u32]) {
    assert!(available(), "detected");
    // SAFETY: the instructions were detected.
    unsafe { transpose_any(source, part, panels) }
}

pub(super) fn round_rows(source: Rows<'_>, part: Part, stride: usize, out: &mut [u32]) {
    assert!(
        available() && stride >= part.cols.next_multiple_of(GROUP) / 2,
        "detected, and rows do not overlap"
    );
    // SAFETY: the instructions were detected.
    unsafe { round_any(source, part, stride, out) }
}

pub(super) fn multiply(block: Block, left: Left<'_>, panel: &[u32], out: &mut [f32]) {
    let last = block.rows - 1;
    assert!(available() && block.pairs > 0 && (1..=PANEL).contains(&block.cols), "detected, and not empty");
    assert!(last * left.row_stride + (block.pairs - 1) * left.pair_stride < left.pairs.len(), "left factor");
    assert!(
        block.pairs * PANEL <= panel.len() && last * block.stride + block.cols <= out.len(),
        "panel, output"
    );
    // SAFETY: the instructions were detected, and the bounds that the kernels name were just checked.
    unsafe {
        match block.rows {
            1 => multiply_rows::<1>(block, left, panel, out),
            2 => multiply_rows::<2>(block, left, panel, out),
            3 => multiply_rows::<3>(block, left, panel, out),
            4 => multiply_rows::<4>(block, left, panel, out),
            5 => multiply_rows::<5>(block, left, panel, out),
            ROWS => multiply_rows::<ROWS>(block, left, panel, out),
            rows => unreachable!("{rows} rows at once"),
        }
    }
}

/// Sums `M` rows by one panel in registers.
///
/// # Safety
/// `M == block.rows`; the last pair of the last row lies in `left.pairs`, `block.pairs` rows of the panel in
/// `panel`, the last column of the last row in `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn multiply_rows<const M: usize>(block: Block, left: Left<'_>, panel: &[u32], out: &mut [f32]) {
    let mut sums = [[_mm512_setzero_ps(); PANEL / LANES]; M];
    let (mut a, mut b) = (left.pairs.as_ptr(), panel.as_ptr());
    for _ in 0..block.pairs {
        // SAFETY: `a` is at a pair of the first row, `b` at a row of the panel; see above for their ends.
        let columns: [__m512bh; PANEL / LANES] =
            std::array::from_fn(|c| unsafe { as_bf16(_mm512_loadu_si512(b.add(c * LANES).cast())) });
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let pair = as_bf16(_mm512_set1_epi32(unsafe { *a.add(i * left.row_stride) } as i32));
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = _mm512_dpbf16_ps(*sum, pair, column);
            }
        }
        a = a.wrapping_add(left.pair_stride);
        b = b.wrapping_add(PANEL);
    }
    for (i, sums) in sums.iter().enumerate() {
        for (c, sum) in sums.iter().enumerate() {
            let mask = mask(block.cols.saturating_sub(c * LANES));
            // SAFETY: the mask keeps to the columns of the output.
            unsafe {
                let to = out.as_mut_ptr().wrapping_add(i * block.stride + c * LANES);
                let sum = match block.into {
                    Into::Overwrite => *sum,
                    Into::Add => _mm512_add_ps(*sum, _mm512_maskz_loadu_ps(mask, to)),
                };
                _mm512_mask_storeu_ps(to, mask, sum);
            }
        }
    }
}

/// Runs `$body` with `$load(row, col, count)` reading 32 values of a row as bf16; those from `count` on are zero.
macro_rules! with_format {
    ($source:expr, $load:ident => $body:expr) => {
        match $source {
            Rows::Values { data, stride, .. } => {
                let $load = |row: usize, col: usize, count| f32_group(&data[row * stride + col..], count);
                $body
            }
            Rows::Stored(w) => {
                let (bytes, cols) = (w.as_bytes(), w.cols());
                let block = |row: usize, col: usize| (row * cols + col) / GROUP;
                let halves = bytes.as_chunks::<2>().0;
                match w.format() {
                    WeightFormat::F32 => {
                        let values: &[f32] = w.as_f32().unwrap_or_default();
                        let $load =
                            |row: usize, col: usize, count| f32_group(&values[row * cols + col..], count);
                        $body
                    }
                    WeightFormat::F16 => {
                        let $load =
                            |row: usize, col: usize, count| f16_group(&halves[row * cols + col..], count);
                        $body
                    }
                    WeightFormat::BF16 => {
                        let $load =
                            |row: usize, col: usize, count| bf16_group(&halves[row * cols + col..], count);
                        $body
                    }
                    WeightFormat::Q8_0 => {
                        let blocks = bytes.as_chunks::<34>().0;
                        let $load = |row: usize, col: usize, _| q8_0_group(&blocks[block(row, col)]);
                        $body
                    }
                    WeightFormat::Q4_0 => {
                        let blocks = bytes.as_chunks::<18>().0;
                        let $load = |row: usize, col: usize, _| q4_0_group(&blocks[block(row, col)]);
                        $body
                    }
                    WeightFormat::Q4_1 => {
                        let blocks = bytes.as_chunks::<20>().0;
                        let $load = |row: usize, col: usize, _| q4_1_group(&blocks[block(row, col)]);
                        $body
                    }
                    WeightFormat::Q5_0 | WeightFormat::Q4_K | WeightFormat::Q6_K => {
                        unreachable!("{} is not packed: see `packs`", w.format().name())
                    }
                }
            }
        }
    };
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn interleave_any(source: Rows<'_>, part: Part, width: usize, panels: &mut [u32]) {
    with_format!(source, load => interleave(load, part, width, panels));
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn transpose_any(source: Rows<'_>, part: Part, panels: &mut [u32]) {
    with_format!(source, load => transpose(load, Memory::of(source), part, panels));
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn round_any(source: Rows<'_>, part: Part, stride: usize, out: &mut [u32]) {
    with_format!(source, load => round(load, part, stride, out));
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn interleave(load: impl Fn(usize, usize, usize) -> __m512i, part: Part, width: usize, panels: &mut [u32]) {
    let pairs = part.rows.div_ceil(2);
    let order: [u16; 64] = std::array::from_fn(|i| (i / 2 + 32 * (i % 2)) as u16);
    let (low, high) = (load_words(&order[..32]), load_words(&order[32..]));
    for j in 0..pairs {
        let row = part.first_row + 2 * j;
        for (panel, start) in (0..part.cols).step_by(width).enumerate() {
            let line = &mut panels[(panel * pairs + j) * width..][..width];
            for (out, col) in line.as_chunks_mut::<GROUP>().0.iter_mut().zip((start..).step_by(GROUP)) {
                if col >= part.cols {
                    out.fill(0);
                    continue;
                }
                let (from, count) = (part.first_col + col, part.cols - col);
                let first = load(row, from, count);
                let last = 2 * j + 1 == part.rows;
                let second = if last { _mm512_setzero_si512() } else { load(row + 1, from, count) };
                store(&mut out[..LANES], _mm512_permutex2var_epi16(first, low, second));
                store(&mut out[LANES..], _mm512_permutex2var_epi16(first, high, second));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn transpose(
    load: impl Fn(usize, usize, usize) -> __m512i,
    memory: Memory<'_>,
    part: Part,
    panels: &mut [u32],
) {
    let pairs = part.cols.div_ceil(2);
    for row in (0..part.rows.next_multiple_of(PANEL)).step_by(LANES) {
        let panel = &mut panels[row / PANEL * pairs * PANEL..][..pairs * PANEL];
        let rows = part.rows.saturating_sub(row).min(LANES);
        for col in (0..part.cols).step_by(GROUP) {
            let (at, from, count) = (part.first_row + row, part.first_col + col, part.cols - col);
            memory.prefetch(at + LANES, from);
            let words: [__m512i; LANES] = if rows == LANES {
                std::array::from_fn(|i| load(at + i, from, count))
            } else {
                std::array::from_fn(
                    |i| if i < rows { load(at + i, from, count) } else { _mm512_setzero_si512() },
                )
            };
            let lines = panel[col / 2 * PANEL..].as_chunks_mut::<PANEL>().0;
            for (word, line) in transposed(words).into_iter().zip(lines) {
                store(&mut line[row % PANEL..][..LANES], word);
            }
        }
    }
}

/// Where rows lie. Sixteen streams of short rows are more than the processor foresees by itself.
#[derive(Clone, Copy)]
struct Memory<'a> {
    bytes: &'a [u8],
    row_bytes: usize,
    cols: usize,
}

impl<'a> Memory<'a> {
    fn of(source: Rows<'a>) -> Self {
        match source {
            Rows::Values { data, stride } => {
                Self { bytes: bytemuck::cast_slice(data), row_bytes: 4 * stride, cols: stride }
            }
            Rows::Stored(w) => {
                let bytes = w.as_bytes();
                Self { bytes, row_bytes: bytes.len() / w.rows(), cols: w.cols() }
            }
        }
    }

    /// Asks for a column of the sixteen rows from `row`.
    #[inline]
    fn prefetch(&self, row: usize, col: usize) {
        let start = row * self.row_bytes + col * self.row_bytes / self.cols;
        for i in 0..LANES {
            let at = self.bytes.as_ptr().wrapping_add(start + i * self.row_bytes);
            // SAFETY: a hint that may name any address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn round(load: impl Fn(usize, usize, usize) -> __m512i, part: Part, stride: usize, out: &mut [u32]) {
    for row in 0..part.rows {
        for col in (0..part.cols).step_by(GROUP) {
            let words = load(part.first_row + row, part.first_col + col, part.cols - col);
            store(&mut out[row * stride + col / 2..][..LANES], words);
        }
    }
}

/// The 16 x 16 transpose of words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn transposed(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut quads = rows;
    for (quad, r) in quads.chunks_exact_mut(4).zip(rows.chunks_exact(4)) {
        let (a, b) = (_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[0], r[1]));
        let (c, d) = (_mm512_unpacklo_epi32(r[2], r[3]), _mm512_unpackhi_epi32(r[2], r[3]));
        quad[0] = _mm512_unpacklo_epi64(a, c);
        quad[1] = _mm512_unpackhi_epi64(a, c);
        quad[2] = _mm512_unpacklo_epi64(b, d);
        quad[3] = _mm512_unpackhi_epi64(b, d);
    }
    // Lane l of quads[4 i + c] now holds column 4 l + c of rows 4 i to 4 i + 3.
    let mut out = quads;
    for c in 0..4 {
        let (upper, lower) = ((quads[c], quads[4 + c]), (quads[8 + c], quads[12 + c]));
        let even =
            (_mm512_shuffle_i32x4::<0x88>(upper.0, upper.1), _mm512_shuffle_i32x4::<0x88>(lower.0, lower.1));
        let odd =
            (_mm512_shuffle_i32x4::<0xdd>(upper.0, upper.1), _mm512_shuffle_i32x4::<0xdd>(lower.0, lower.1));
        out[c] = _mm512_shuffle_i32x4::<0x88>(even.0, even.1);
        out[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd.0, odd.1);
        out[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even.0, even.1);
        out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd.0, odd.1);
    }
    out
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn f32_group(values: &[f32], count: usize) -> __m512i {
    let count = count.min(values.len());
    let (low, high) = (mask(count), mask(count.saturating_sub(LANES)));
    let from = values.as_ptr();
    // SAFETY: the masks keep to the first `count` values, which are in the slice.
    let (a, b) =
        unsafe { (_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from.wrapping_add(LANES))) };
    rounded(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn f16_group(values: &[[u8; 2]], count: usize) -> __m512i {
    let count = count.min(values.len());
    let (low, high) = (mask(count), mask(count.saturating_sub(LANES)));
    let from = values.as_ptr();
    // SAFETY: the masks keep to the first `count` values, which are in the slice.
    let (a, b) = unsafe {
        (
            _mm256_maskz_loadu_epi16(low, from.cast()),
            _mm256_maskz_loadu_epi16(high, from.wrapping_add(LANES).cast()),
        )
    };
    rounded(_mm512_cvtph_ps(a), _mm512_cvtph_ps(b))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn bf16_group(values: &[[u8; 2]], count: usize) -> __m512i {
    let count = count.min(values.len()).min(GROUP);
    // SAFETY: the mask keeps to the first `count` values, which are in the slice.
    unsafe { _mm512_maskz_loadu_epi16(u32::MAX >> (GROUP - count), values.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn q8_0_group(block: &[u8; 34]) -> __m512i {
    let d = half(block[0], block[1]);
    // SAFETY: the 32 bytes after the scale are in the block.
    let bytes = unsafe { _mm256_loadu_si256(block[2..].as_ptr().cast()) };
    let value = |bytes| _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
    rounded(value(_mm256_castsi256_si128(bytes)), value(_mm256_extracti128_si256::<1>(bytes)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn q4_0_group(block: &[u8; 18]) -> __m512i {
    let steps = _mm512_sub_ps(sixteen_steps(), _mm512_set1_ps(8.0));
    let table = _mm512_mul_ps(half(block[0], block[1]), steps);
    // SAFETY: the 16 bytes after the scale are in the block.
    look_up(table, unsafe { _mm_loadu_si128(block[2..].as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn q4_1_group(block: &[u8; 20]) -> __m512i {
    let scaled = _mm512_mul_ps(half(block[0], block[1]), sixteen_steps());
    let table = _mm512_add_ps(scaled, half(block[2], block[3]));
    // SAFETY: the 16 bytes after the scale and the minimum are in the block.
    look_up(table, unsafe { _mm_loadu_si128(block[4..].as_ptr().cast()) })
}

/// The rounded table entries of 32 four-bit numbers: the low halves of the bytes, then the high ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn look_up(table: __m512, bytes: __m128i) -> __m512i {
    let table = rounded(table, table);
    let four_bits = _mm_set1_epi8(15);
    let (low, high) = (_mm_and_si128(bytes, four_bits), _mm_and_si128(_mm_srli_epi16::<4>(bytes), four_bits));
    _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm256_set_m128i(high, low)), table)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn sixteen_steps() -> __m512 {
    _mm512_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0)
}

/// A half-precision number in every lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn half(low: u8, high: u8) -> __m512 {
    _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes([low, high])))
}

/// 32 values rounded, `a` first.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn rounded(a: __m512, b: __m512) -> __m512i {
    // SAFETY: both types are 64 bytes without invalid values.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn as_bf16(words: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes without invalid values.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(words) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn load_words(from: &[u16]) -> __m512i {
    assert!(from.len() == 2 * LANES, "a register of words");
    // SAFETY: the slice is as long as a register.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn store(to: &mut [u32], words: __m512i) {
    assert!(to.len() == LANES, "a register of words");
    // SAFETY: the slice is as long as a register.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), words) }
}

/// The first `count` lanes, at most all.
#[inline]
fn mask(count: usize) -> u16 {
    ((1u32 << count.min(LANES)) - 1) as u16
}
