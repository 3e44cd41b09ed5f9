//! From stored bytes to values. One body, compiled for three instruction sets and chosen at run time; no
//! operation is reordered or fused, so all of them give the same bits.

#![allow(unsafe_code, reason = "calls of functions compiled for instruction sets found at run time")]

#[cfg(target_arch = "x86_64")]
use crate::kernels::simd::{has_avx2, has_avx512};

use super::{BLOCK, K_BLOCK, WeightFormat};

/// Expands whole blocks of any format; `dst` is as long as the values that `bytes` hold.
pub(super) fn dequantize(format: WeightFormat, bytes: &[u8], dst: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if has_avx512() {
            // SAFETY: the processor has the features that the function is compiled for.
            return unsafe { dequantize_avx512(format, bytes, dst) };
        }
        if has_avx2() {
            // SAFETY: as above.
            return unsafe { dequantize_avx2(format, bytes, dst) };
        }
    }
    dequantize_portable(format, bytes, dst);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn dequantize_avx512(format: WeightFormat, bytes: &[u8], dst: &mut [f32]) {
    dequantize_portable(format, bytes, dst);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn dequantize_avx2(format: WeightFormat, bytes: &[u8], dst: &mut [f32]) {
    dequantize_portable(format, bytes, dst);
}

#[inline(always)]
fn dequantize_portable(format: WeightFormat, bytes: &[u8], dst: &mut [f32]) {
    match format {
        WeightFormat::F32 => each::<4>(bytes, dst, |&b| f32::from_le_bytes(b)),
        WeightFormat::F16 => each::<2>(bytes, dst, |&b| half_to_f32(u16::from_le_bytes(b))),
        WeightFormat::BF16 => each::<2>(bytes, dst, |&[low, high]| f32::from_le_bytes([0, 0, low, high])),
        WeightFormat::Q8_0 => blocks::<34, BLOCK>(bytes, dst, q8_0),
        WeightFormat::Q4_0 => blocks::<18, BLOCK>(bytes, dst, q4_0),
        WeightFormat::Q4_1 => blocks::<20, BLOCK>(bytes, dst, q4_1),
        WeightFormat::Q5_0 => blocks::<22, BLOCK>(bytes, dst, q5_0),
        WeightFormat::Q4_K => blocks::<144, K_BLOCK>(bytes, dst, q4_k),
        WeightFormat::Q6_K => blocks::<210, K_BLOCK>(bytes, dst, q6_k),
    }
}

#[inline(always)]
fn each<const N: usize>(bytes: &[u8], dst: &mut [f32], value: impl Fn(&[u8; N]) -> f32) {
    for (out, stored) in dst.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = value(stored);
    }
}

#[inline(always)]
fn blocks<const N: usize, const VALUES: usize>(
    bytes: &[u8],
    dst: &mut [f32],
    expand: impl Fn(&[u8; N], &mut [f32; VALUES]),
) {
    for (out, block) in dst.as_chunks_mut::<VALUES>().0.iter_mut().zip(bytes.as_chunks::<N>().0) {
        expand(block, out);
    }
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; BLOCK]) {
    let d = scale(block, 0);
    for j in 0..BLOCK {
        out[j] = d * f32::from(block[2 + j] as i8);
    }
}

#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; BLOCK]) {
    let d = scale(block, 0);
    for j in 0..BLOCK / 2 {
        out[j] = d * (f32::from(block[2 + j] & 15) - 8.0);
        out[j + BLOCK / 2] = d * (f32::from(block[2 + j] >> 4) - 8.0);
    }
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; BLOCK]) {
    let (d, min) = (scale(block, 0), scale(block, 2));
    for j in 0..BLOCK / 2 {
        out[j] = d * f32::from(block[4 + j] & 15) + min;
        out[j + BLOCK / 2] = d * f32::from(block[4 + j] >> 4) + min;
    }
}

/// The fifth bits of all values stand together, as one number, between the scale and the rest.
#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; BLOCK]) {
    let d = scale(block, 0);
    let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for j in 0..BLOCK / 2 {
        let (low, high) = (block[6 + j] & 15, block[6 + j] >> 4);
        let bit = |at: usize| (fifth >> at & 1) as u8;
        out[j] = d * (f32::from(low | bit(j) << 4) - 16.0);
        out[j + BLOCK / 2] = d * (f32::from(high | bit(j + BLOCK / 2) << 4) - 16.0);
    }
}

/// Scale and minimum in units of two halves, 12 bytes of packed 6-bit numbers, then 4 runs of 32 bytes, each
/// with the values of two groups of 32: one in the low halves, the next in the high ones.
#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; K_BLOCK]) {
    let (d, min) = (scale(block, 0), scale(block, 2));
    let (packed, levels) = block[4..].split_at(12);
    for (pair, (out, levels)) in
        out.as_chunks_mut::<64>().0.iter_mut().zip(levels.as_chunks::<32>().0).enumerate()
    {
        let (low, high) = (six_bit_pair(packed, 2 * pair), six_bit_pair(packed, 2 * pair + 1));
        let (d_low, min_low) = (d * f32::from(low.0), min * f32::from(low.1));
        let (d_high, min_high) = (d * f32::from(high.0), min * f32::from(high.1));
        for l in 0..32 {
            out[l] = d_low * f32::from(levels[l] & 15) - min_low;
            out[l + 32] = d_high * f32::from(levels[l] >> 4) - min_high;
        }
    }
}

/// Scale and minimum of group `j` of 8 among the 12 packed bytes of Q4_K. Those of the first four groups lie
/// in the low 6 bits of bytes 0 to 7; of the others, 4 bits of both lie in bytes 8 to 11 and 2 bits on top of
/// the first ones.
#[inline(always)]
pub(crate) fn six_bit_pair(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        return (packed[j] & 63, packed[j + 4] & 63);
    }
    (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
}

/// Low 4 bits (128 bytes), high 2 bits (64), 16 scales, their unit. In each half of the block, byte l of the
/// low parts has values l and l + 64, byte l + 32 values l + 32 and l + 96; byte l of the high parts has all
/// four.
#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; K_BLOCK]) {
    let d = scale(block, 208);
    for (half, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let (low, high) = (&block[64 * half..][..64], &block[128 + 32 * half..][..32]);
        for quarter in 0..4 {
            let (low, shift) = (&low[32 * (quarter % 2)..][..32], 4 * (quarter / 2));
            for group in 0..2 {
                let scale = d * f32::from(block[192 + 8 * half + 2 * quarter + group] as i8);
                for l in 16 * group..16 * group + 16 {
                    let level = low[l] >> shift & 15 | (high[l] >> (2 * quarter) & 3) << 4;
                    out[32 * quarter + l] = scale * (f32::from(level) - 32.0);
                }
            }
        }
    }
}

#[inline(always)]
pub(super) fn scale(block: &[u8], at: usize) -> f32 {
    half_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Half to single precision without branches or subnormal arithmetic, so that it vectorizes: normal numbers
/// by moving the exponent (a multiplication by 2^-112), subnormal ones by subtracting a magic 0.5.
#[inline(always)]
pub(super) fn half_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    let normal = f32::from_bits((magnitude << 13) + (0xe0 << 23)) * f32::from_bits(0x0780_0000);
    let subnormal = f32::from_bits(magnitude | 126 << 23) - 0.5;
    // A subnormal's 10 bits land on the lowest bits of 0.5, whose unit is 2^-24.
    let value = if magnitude < 1 << 10 { subnormal } else { normal };
    f32::from_bits(sign | value.to_bits())
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn every_half_is_converted_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (half_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{bits:#06x}");
        }
    }

    #[test]
    fn all_paths_give_the_same_bits() {
        let mut state = 1u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        for format in WeightFormat::ALL {
            let (values, bytes) = format.block();
            let stored: Vec<u8> = (0..bytes * 192).map(|_| noise() & 0x7b).collect();
            let mut dispatched = vec![0.0; values * 192];
            let mut portable = dispatched.clone();
            dequantize(format, &stored, &mut dispatched);
            dequantize_portable(format, &stored, &mut portable);
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&dispatched), bits(&portable), "{format:?}");
            #[cfg(target_arch = "x86_64")]
            if has_avx2() {
                // SAFETY: the feature was just found.
                unsafe { dequantize_avx2(format, &stored, &mut dispatched) };
                assert_eq!(bits(&dispatched), bits(&portable), "{format:?} on AVX2");
            }
        }
    }
}
