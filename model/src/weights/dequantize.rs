//! From stored bytes to values. One body, compiled for three instruction sets and chosen at run time; no
//! operation is reordered or fused, so all of them give the same bits.

#![allow(unsafe_code, reason = "calls of functions compiled for instruction sets found at run time")]

use super::{BLOCK, WeightFormat};

/// Expands whole blocks of any format; `dst` is as long as the values that `bytes` hold.
pub(super) fn dequantize(format: WeightFormat, bytes: &[u8], dst: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the processor has the features that the function is compiled for.
            return unsafe { dequantize_avx512(format, bytes, dst) };
        }
        if is_x86_feature_detected!("avx2") {
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
        WeightFormat::Q8_0 => blocks::<34>(bytes, dst, q8_0),
        WeightFormat::Q4_0 => blocks::<18>(bytes, dst, q4_0),
        WeightFormat::Q4_1 => blocks::<20>(bytes, dst, q4_1),
    }
}

#[inline(always)]
fn each<const N: usize>(bytes: &[u8], dst: &mut [f32], value: impl Fn(&[u8; N]) -> f32) {
    for (out, stored) in dst.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = value(stored);
    }
}

#[inline(always)]
fn blocks<const N: usize>(bytes: &[u8], dst: &mut [f32], expand: impl Fn(&[u8; N], &mut [f32; BLOCK])) {
    for (out, block) in dst.as_chunks_mut::<BLOCK>().0.iter_mut().zip(bytes.as_chunks::<N>().0) {
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

#[inline(always)]
fn scale(block: &[u8], at: usize) -> f32 {
    half_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Half to single precision without branches or subnormal arithmetic, so that it vectorizes: normal numbers
/// by moving the exponent (a multiplication by 2^-112), subnormal ones by subtracting a magic 0.5.
#[inline(always)]
fn half_to_f32(bits: u16) -> f32 {
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
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the feature was just found.
                unsafe { dequantize_avx2(format, &stored, &mut dispatched) };
                assert_eq!(bits(&dispatched), bits(&portable), "{format:?} on AVX2");
            }
        }
    }
}
