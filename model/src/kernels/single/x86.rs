//! The inner kernels of `single.rs` with AVX2 and FMA (blocks of 6 x 16) and with AVX-512 (12 x 32).
#![allow(unsafe_code, reason = "vector instructions; bounds are asserted where pointers are made")]

use std::arch::x86_64::*;

use super::{Block, Left, TRANSPOSED_ROWS};
use crate::kernels::matrix::Into;
use crate::kernels::simd::{has_avx2, has_avx512};

/// Sums of a block: 12 of 16 registers.
pub(super) const AVX2_ROWS: usize = 6;
pub(super) const AVX2_PANEL: usize = 16;

/// Sums of a block: 24 of 32 registers.
pub(super) const AVX512_ROWS: usize = 12;
pub(super) const AVX512_PANEL: usize = 32;

/// Values in a register.
const LANES_AVX2: usize = 8;
const LANES_AVX512: usize = 16;

/// Rows whose addresses are one pointer and an offset.
const ROWS_A_POINTER: usize = 4;

/// What both kernels rely on.
fn assert_inside(block: Block, left: Left<'_>, panel: &[f32], panel_columns: usize, out: &[f32]) {
    let last = block.rows - 1;
    assert!(block.depth > 0 && (1..=panel_columns).contains(&block.cols), "not empty");
    assert!(last * left.row_stride + (block.depth - 1) * left.depth_stride < left.values.len(), "left factor");
    assert!(block.depth * panel_columns <= panel.len() && last * block.stride + block.cols <= out.len(), "output");
}

/// Calls the version of a kernel for the block's rows.
macro_rules! by_rows {
    ($kernel:ident, $registers:literal, $block:expr, ($($rows:literal)*), $arguments:tt) => {
        match $block.rows {
            $($rows => by_rows!(@call $kernel, $rows, $registers, $arguments),)*
            rows => unreachable!("{rows} rows at once"),
        }
    };
    (@call $kernel:ident, $rows:literal, $registers:literal, ($($argument:expr),*)) => {
        $kernel::<$rows, $registers>($($argument),*)
    };
}

pub(super) fn multiply_avx2(block: Block, left: Left<'_>, panel: &[f32], out: &mut [f32]) {
    assert!(has_avx2(), "detected");
    assert_inside(block, left, panel, AVX2_PANEL, out);
    // SAFETY: the instructions were detected, and the bounds that the kernel names were just checked.
    unsafe {
        if block.cols <= LANES_AVX2 {
            by_rows!(avx2, 1, block, (1 2 3 4 5 6), (block, left, panel, out));
        } else {
            by_rows!(avx2, 2, block, (1 2 3 4 5 6), (block, left, panel, out));
        }
    }
}

pub(super) fn multiply_avx512(block: Block, left: Left<'_>, panel: &[f32], out: &mut [f32]) {
    assert!(has_avx512(), "detected");
    assert_inside(block, left, panel, AVX512_PANEL, out);
    // SAFETY: the instructions were detected, and the bounds that the kernel names were just checked.
    unsafe {
        if block.cols <= LANES_AVX512 {
            by_rows!(avx512, 1, block, (1 2 3 4 5 6 7 8 9 10 11 12), (block, left, panel, out));
        } else {
            by_rows!(avx512, 2, block, (1 2 3 4 5 6 7 8 9 10 11 12), (block, left, panel, out));
        }
    }
}

/// Where the rows of a left factor are at one depth.
#[derive(Clone, Copy)]
struct Cursor {
    /// Every fourth row.
    pointers: [*const f32; 3],
    /// The rows between.
    offsets: [usize; ROWS_A_POINTER],
    depth_stride: usize,
}

impl Cursor {
    #[inline(always)]
    fn new(left: Left<'_>) -> Self {
        let (start, stride) = (left.values.as_ptr(), left.row_stride);
        // Known to be multiples of each other, the offsets would become a chain of additions from row to row, which
        // takes longer than the products.
        let offset = |i: usize| std::hint::black_box(i * stride);
        Self {
            pointers: std::array::from_fn(|i| start.wrapping_add(i * ROWS_A_POINTER * stride)),
            offsets: [0, offset(1), offset(2), offset(3)],
            depth_stride: left.depth_stride,
        }
    }

    #[inline(always)]
    fn row(&self, i: usize) -> *const f32 {
        self.pointers[i / ROWS_A_POINTER].wrapping_add(self.offsets[i % ROWS_A_POINTER])
    }

    #[inline(always)]
    fn advance(&mut self) {
        self.pointers = self.pointers.map(|p| p.wrapping_add(self.depth_stride));
    }
}

/// Sums `M` rows by `R` registers of a panel.
///
/// # Safety
/// `M == block.rows` and `block.cols` are in `R` registers; the last value of the last row lies in `left.values`,
/// `block.depth` lines in the panel, the last column of the last row in `out`.
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const M: usize, const R: usize>(block: Block, left: Left<'_>, panel: &[f32], out: &mut [f32]) {
    let mut sums = [[_mm256_setzero_ps(); R]; M];
    let (mut a, mut b) = (Cursor::new(left), panel.as_ptr());
    for i in 0..M {
        _mm_prefetch::<_MM_HINT_T0>(out.as_ptr().wrapping_add(i * block.stride).cast());
    }
    let mut step = || {
        // SAFETY: `a` is at a column of the rows, `b` at a line of the panel; see above for their ends.
        let line: [__m256; R] = std::array::from_fn(|r| unsafe { _mm256_loadu_ps(b.add(r * LANES_AVX2)) });
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let x = unsafe { _mm256_broadcast_ss(&*a.row(i)) };
            for (sum, line) in sums.iter_mut().zip(line) {
                *sum = _mm256_fmadd_ps(x, line, *sum);
            }
        }
        a.advance();
        b = b.wrapping_add(AVX2_PANEL);
    };
    for _ in 0..block.depth / 2 {
        step();
        step();
    }
    if block.depth % 2 == 1 {
        step();
    }
    let alpha = _mm256_set1_ps(block.alpha);
    if block.cols == R * LANES_AVX2 {
        for (i, sums) in sums.iter().enumerate() {
            for (r, sum) in sums.iter().enumerate() {
                // SAFETY: all the registers' columns are the output's.
                unsafe {
                    let to = out.as_mut_ptr().wrapping_add(i * block.stride + r * LANES_AVX2);
                    let value = match block.into {
                        Into::Overwrite => _mm256_mul_ps(alpha, *sum),
                        Into::Add => _mm256_fmadd_ps(alpha, *sum, _mm256_loadu_ps(to)),
                    };
                    _mm256_storeu_ps(to, value);
                }
            }
        }
        return;
    }
    for (i, sums) in sums.iter().enumerate() {
        for (r, sum) in sums.iter().enumerate() {
            let mask = first_lanes(block.cols.saturating_sub(r * LANES_AVX2));
            // SAFETY: the mask keeps to the columns of the output.
            unsafe {
                let to = out.as_mut_ptr().wrapping_add(i * block.stride + r * LANES_AVX2);
                let value = match block.into {
                    Into::Overwrite => _mm256_mul_ps(alpha, *sum),
                    Into::Add => _mm256_fmadd_ps(alpha, *sum, _mm256_maskload_ps(to, mask)),
                };
                _mm256_maskstore_ps(to, mask, value);
            }
        }
    }
}

/// The same with AVX-512.
///
/// # Safety
/// As above.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
unsafe fn avx512<const M: usize, const R: usize>(block: Block, left: Left<'_>, panel: &[f32], out: &mut [f32]) {
    let mut sums = [[_mm512_setzero_ps(); R]; M];
    let (mut a, mut b) = (Cursor::new(left), panel.as_ptr());
    for i in 0..M {
        let line = out.as_ptr().wrapping_add(i * block.stride);
        _mm_prefetch::<_MM_HINT_T0>(line.cast());
        _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(block.cols - 1).cast());
    }
    for _ in 0..block.depth {
        // SAFETY: `a` is at a column of the rows, `b` at a line of the panel; see above for their ends.
        let line: [__m512; R] = std::array::from_fn(|r| unsafe { _mm512_loadu_ps(b.add(r * LANES_AVX512)) });
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let x = _mm512_set1_ps(unsafe { *a.row(i) });
            for (sum, line) in sums.iter_mut().zip(line) {
                *sum = _mm512_fmadd_ps(x, line, *sum);
            }
        }
        a.advance();
        b = b.wrapping_add(AVX512_PANEL);
    }
    let alpha = _mm512_set1_ps(block.alpha);
    for (i, sums) in sums.iter().enumerate() {
        for (r, sum) in sums.iter().enumerate() {
            let mask = ((1u32 << block.cols.saturating_sub(r * LANES_AVX512).min(LANES_AVX512)) - 1) as u16;
            // SAFETY: the mask keeps to the columns of the output.
            unsafe {
                let to = out.as_mut_ptr().wrapping_add(i * block.stride + r * LANES_AVX512);
                let value = match block.into {
                    Into::Overwrite => _mm512_mul_ps(alpha, *sum),
                    Into::Add => _mm512_fmadd_ps(alpha, *sum, _mm512_maskz_loadu_ps(mask, to)),
                };
                _mm512_mask_storeu_ps(to, mask, value);
            }
        }
    }
}

/// A mask of the first `count` lanes, at most all.
#[inline]
#[target_feature(enable = "avx2")]
fn first_lanes(count: usize) -> __m256i {
    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_cmpgt_epi32(_mm256_set1_epi32(count.min(LANES_AVX2) as i32), lanes)
}

pub(super) fn transpose(values: &[f32], stride: usize, cols: usize, panel: &mut [f32], width: usize) {
    assert!(has_avx2(), "detected");
    assert!((TRANSPOSED_ROWS - 1) * stride + cols <= values.len(), "eight rows");
    assert!(cols == 0 || (cols - 1) * width + TRANSPOSED_ROWS <= panel.len(), "lines of the panel");
    // SAFETY: the instructions were detected, and the bounds just checked.
    unsafe { transpose_rows(values, stride, cols, panel, width) }
}

/// # Safety
/// Eight rows of `cols` values lie in `values`, `cols` lines of eight in `panel`.
#[target_feature(enable = "avx2")]
unsafe fn transpose_rows(values: &[f32], stride: usize, cols: usize, panel: &mut [f32], width: usize) {
    let (from, to) = (values.as_ptr(), panel.as_mut_ptr());
    let whole = cols / LANES_AVX2 * LANES_AVX2;
    for col in (0..whole).step_by(LANES_AVX2) {
        // SAFETY: eight values of eight rows, and eight lines, all inside as named above.
        unsafe {
            let rows: [__m256; 8] = std::array::from_fn(|i| _mm256_loadu_ps(from.add(i * stride + col)));
            for (j, line) in transposed(rows).into_iter().enumerate() {
                _mm256_storeu_ps(to.add((col + j) * width), line);
            }
        }
    }
    for col in whole..cols {
        for i in 0..TRANSPOSED_ROWS {
            panel[col * width + i] = values[i * stride + col];
        }
    }
}

/// The 8 x 8 transpose.
#[inline]
#[target_feature(enable = "avx2")]
fn transposed(rows: [__m256; 8]) -> [__m256; 8] {
    let pairs: [__m256; 8] = std::array::from_fn(|i| {
        let (a, b) = (rows[i / 2 * 2], rows[i / 2 * 2 + 1]);
        if i % 2 == 0 { _mm256_unpacklo_ps(a, b) } else { _mm256_unpackhi_ps(a, b) }
    });
    // quads[c] of four rows: column c in the lower half, column c + 4 in the upper.
    let quads = |first: usize| {
        let p = &pairs[first..first + 4];
        [
            _mm256_shuffle_ps::<0x44>(p[0], p[2]),
            _mm256_shuffle_ps::<0xee>(p[0], p[2]),
            _mm256_shuffle_ps::<0x44>(p[1], p[3]),
            _mm256_shuffle_ps::<0xee>(p[1], p[3]),
        ]
    };
    let (upper, lower) = (quads(0), quads(4));
    std::array::from_fn(|c| {
        let (a, b) = (upper[c % 4], lower[c % 4]);
        if c < 4 { _mm256_permute2f128_ps::<0x20>(a, b) } else { _mm256_permute2f128_ps::<0x31>(a, b) }
    })
}
