//! From values to stored bytes, bit-equal to ggml's reference quantizers (`ggml-quants.c`,
//! `quantize_row_q*_ref`): the same operations in the same order in single precision. The K formats are in
//! `k_quants.rs`.

use half::{bf16, f16};

use super::{BLOCK, WeightFormat, k_quants};
use crate::error::WeightError;

/// Stores values that [`check_range`] has accepted, in whole blocks.
pub(super) fn quantize(values: &[f32], format: WeightFormat) -> Vec<u8> {
    match format {
        WeightFormat::F32 => bytemuck::cast_slice(values).to_vec(),
        WeightFormat::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        WeightFormat::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        WeightFormat::Q8_0 => blocks(values, format, q8_0),
        WeightFormat::Q4_0 => blocks(values, format, q4_0),
        WeightFormat::Q4_1 => blocks(values, format, q4_1),
        WeightFormat::Q5_0 => blocks(values, format, q5_0),
        WeightFormat::Q4_K => blocks(values, format, k_quants::q4_k),
        WeightFormat::Q6_K => blocks(values, format, k_quants::q6_k),
    }
}

/// Refuses values that the format would turn into infinities or NaN.
pub(super) fn check_range(values: &[f32], format: WeightFormat) -> Result<(), WeightError> {
    let most = match format {
        WeightFormat::F32 => f32::MAX,
        WeightFormat::BF16 => bf16::MAX.to_f32(),
        WeightFormat::F16
        | WeightFormat::Q8_0
        | WeightFormat::Q4_0
        | WeightFormat::Q4_1
        | WeightFormat::Q5_0
        | WeightFormat::Q4_K
        | WeightFormat::Q6_K => f16::MAX.to_f32(),
    };
    match values.iter().position(|x| x.is_nan() || x.abs() > most) {
        Some(index) => Err(WeightError::Value { index, format: format.name() }),
        None => Ok(()),
    }
}

fn blocks(values: &[f32], format: WeightFormat, quantize: fn(&[f32], &mut Vec<u8>)) -> Vec<u8> {
    let (block_values, block_bytes) = format.block();
    let mut bytes = Vec::with_capacity(values.len() / block_values * block_bytes);
    for block in values.chunks_exact(block_values) {
        quantize(block, &mut bytes);
    }
    bytes
}

fn q8_0(block: &[f32], bytes: &mut Vec<u8>) {
    let amax = block.iter().fold(0f32, |most, x| most.max(x.abs()));
    let d = amax / 127.0;
    let inverse = inverse(d);
    bytes.extend(f16::from_f32(d).to_le_bytes());
    bytes.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
}

fn q4_0(block: &[f32], bytes: &mut Vec<u8>) {
    let d = outermost(block) / -8.0;
    let inverse = inverse(d);
    bytes.extend(f16::from_f32(d).to_le_bytes());
    nibbles(block, bytes, |x| x * inverse + 8.5);
}

fn q4_1(block: &[f32], bytes: &mut Vec<u8>) {
    let min = block.iter().fold(f32::MAX, |least, &x| if x < least { x } else { least });
    let max = block.iter().fold(f32::MIN, |most, &x| if x > most { x } else { most });
    let d = (max - min) / 15.0;
    let inverse = inverse(d);
    bytes.extend(f16::from_f32(d).to_le_bytes());
    bytes.extend(f16::from_f32(min).to_le_bytes());
    nibbles(block, bytes, |x| (x - min) * inverse + 0.5);
}

/// The fifth bits of all values come first, as one little-endian number; then the low four as in Q4_0.
fn q5_0(block: &[f32], bytes: &mut Vec<u8>) {
    let d = outermost(block) / -16.0;
    let inverse = inverse(d);
    let level = |x: f32| ((x * inverse + 16.5) as u8).min(31);
    let fifth = |bits: u32, (at, &x): (usize, &f32)| bits | u32::from(level(x) >> 4) << at;
    bytes.extend(f16::from_f32(d).to_le_bytes());
    bytes.extend(block.iter().enumerate().fold(0, fifth).to_le_bytes());
    let (low, high) = block.split_at(BLOCK / 2);
    bytes.extend(low.iter().zip(high).map(|(&x, &y)| level(x) & 15 | level(y) << 4));
}

/// The first value that is farthest from zero, with its sign.
pub(super) fn outermost(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most: f32, &x| if x.abs() > most.abs() { x } else { most })
}

/// Byte j holds value j in its low half and value j + 16 in its high half; levels are truncated.
pub(super) fn nibbles(block: &[f32], bytes: &mut Vec<u8>, level: impl Fn(f32) -> f32) {
    let (low, high) = block.split_at(BLOCK / 2);
    let nibble = |x: f32| (level(x) as u8).min(15);
    bytes.extend(low.iter().zip(high).map(|(&x, &y)| nibble(x) | nibble(y) << 4));
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{K_BLOCK, WeightMatrix};
    use super::*;

    fn ramp(scale: f32, shift: f32) -> Vec<f32> {
        (0..BLOCK).map(|i| (i as f32 - 16.0) * scale + shift).collect()
    }

    #[test]
    fn known_answers() {
        let check = |values: &[f32], format, expected: &str| {
            assert_eq!(hex::encode(quantize(values, format)), expected, "{format:?}");
        };
        check(&[1.0, -2.5], WeightFormat::F32, "0000803f000020c0");
        check(&[1.0, -2.5, 65504.0], WeightFormat::F16, "003c00c1ff7b");
        check(&[1.0, -2.5, 1.003_906_3], WeightFormat::BF16, "803f20c0803f");
        KNOWN_BLOCKS
            .iter()
            .for_each(|&(scale, shift, format, bytes)| check(&ramp(scale, shift), format, bytes));
    }

    /// Ramps quantized by the Python package `gguf` 0.19 (`gguf.quants`), which is bit-equal to ggml.
    const KNOWN_BLOCKS: &[(f32, f32, WeightFormat, &str)] = &[
        (
            0.37,
            0.11,
            WeightFormat::Q8_0,
            "db2981899199a1a9b2bac2cad2dae2eaf2fa020a131b232b333b434b535b636c747c",
        ),
        (0.37, 0.11, WeightFormat::Q4_0, "cf39809191a2a2b3b3c4c4d5d5e6e6f7f7f8"),
        (0.37, 0.11, WeightFormat::Q4_1, "1e3acfc580809191a2a2b3b3c4c4d5d5e6e6f7f7"),
        (
            -1.3,
            5.0,
            WeightFormat::Q8_0,
            "80327f79726c655f59524c453f39322c251f19120c05fff9f2ece5dfd9d2ccc5bfb9",
        ),
        (-1.3, 5.0, WeightFormat::Q4_0, "73c26070718182829293a3a4a4b4b5c5c6c6"),
        (-1.3, 5.0, WeightFormat::Q4_1, "604140cb7f7f6e6e5d5d4c4c3b3b2a2a19190808"),
    ];

    /// All 210 projections of a file that llama.cpp quantized.
    #[test]
    fn requantizing_smollm2_gives_its_own_bytes() {
        let Some(base) = crate::reference::smollm2() else { return };
        for layer in &base.layers {
            for matrix in &layer.projections {
                assert_eq!(matrix.format(), WeightFormat::Q4_1);
                let again = quantize(&matrix.to_f32(), WeightFormat::Q4_1);
                assert!(again == matrix.as_bytes(), "{matrix:?}");
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for format in WeightFormat::ALL {
            let zeros = WeightMatrix::from_f32(&[0.0; 512], 2, 256, format).unwrap();
            assert!(zeros.to_f32().iter().all(|&x| x == 0.0), "{format:?}");
        }
    }

    #[test]
    fn refuses_what_it_cannot_hold() {
        for (value, format) in [
            (f32::NAN, WeightFormat::F32),
            (f32::INFINITY, WeightFormat::BF16),
            (7e4, WeightFormat::F16),
            (7e4, WeightFormat::Q4_1),
        ] {
            let mut values = [0.5; 32];
            values[9] = value;
            let error = WeightMatrix::from_f32(&values, 1, 32, format).unwrap_err();
            assert_eq!(error, WeightError::Value { index: 9, format: format.name() });
        }
        let error = WeightMatrix::from_f32(&[0.0; 48], 1, 48, WeightFormat::Q4_0).unwrap_err();
        assert_eq!(error, WeightError::Columns { format: "Q4_0", block: 32, cols: 48 });
        let error = WeightMatrix::from_f32(&[0.0; 64], 2, 32, WeightFormat::Q6_K).unwrap_err();
        assert_eq!(error, WeightError::Columns { format: "Q6_K", block: 256, cols: 32 });
        assert!(WeightMatrix::from_f32(&[0.0; 48], 2, 32, WeightFormat::F32).is_err());
        assert!(WeightMatrix::from_f32(&[], 0, 32, WeightFormat::F32).is_err());
        assert!(WeightMatrix::from_bytes(vec![], usize::MAX, 2, WeightFormat::F32).is_err());
    }

    proptest! {
        /// At most half a level (a whole one where Q4_0's positive end is cut off), and the scale's own rounding.
        #[test]
        fn error_is_bounded(values in prop::collection::vec(-100f32..100.0, K_BLOCK)) {
            let spread = values.iter().fold(0f32, |most, x| most.max(x.abs()));
            for (format, levels) in [
                (WeightFormat::F16, 1000.0), (WeightFormat::BF16, 200.0), (WeightFormat::Q8_0, 225.0),
                (WeightFormat::Q4_0, 7.9), (WeightFormat::Q4_1, 14.0), (WeightFormat::Q5_0, 15.9),
                (WeightFormat::Q4_K, 8.0), (WeightFormat::Q6_K, 24.0),
            ] {
                let back = WeightMatrix::from_f32(&values, 1, K_BLOCK, format).unwrap().to_f32();
                for (x, y) in values.iter().zip(back) {
                    prop_assert!((x - y).abs() <= spread / levels, "{format:?}: {x} became {y}");
                }
            }
        }
    }
}
