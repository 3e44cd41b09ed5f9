//! The quantized formats against ggml's own library: every block and every expanded value, bit for bit. The
//! answers in `data/reference/ggml_blocks.json` are made by `tests/peers/ggml_blocks.py` from the same inputs.

use std::collections::BTreeMap;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{K_BLOCK, WeightFormat, WeightMatrix};

#[derive(Deserialize)]
struct Answers {
    formats: BTreeMap<String, FormatAnswers>,
}

#[derive(Deserialize)]
struct FormatAnswers {
    /// Of bytes that no quantizer makes.
    noise_values_sha256: String,
    cases: BTreeMap<String, Answer>,
}

/// Small cases have their blocks, large ones only hashes.
#[derive(Deserialize)]
struct Answer {
    blocks: Option<String>,
    blocks_sha256: String,
    values_sha256: String,
}

/// Values of a small case.
const SMALL: usize = 512;

fn answers() -> Answers {
    serde_json::from_str(include_str!("../../data/reference/ggml_blocks.json")).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// The upper halves of a linear congruential generator's states.
fn states(count: usize, seed: u32) -> Vec<u16> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as u16
    };
    (0..count).map(|_| next()).collect()
}

/// Sums of four uniform numbers of -1..1: exact, and about as weights are spread.
fn bell(count: usize, seed: u32) -> Vec<f32> {
    let sum = |four: &[u16]| four.iter().map(|&x| f32::from(x)).sum::<f32>() - 131_072.0;
    states(4 * count, seed).chunks_exact(4).map(|four| sum(four) / 32_768.0).collect()
}

fn cases() -> Vec<(&'static str, Vec<f32>)> {
    let small = |seed, value: fn(usize, f32) -> f32| -> Vec<f32> {
        bell(SMALL, seed).into_iter().enumerate().map(|(i, x)| value(i, x)).collect()
    };
    vec![
        ("bell", small(1, |_, x| x * 0.0371)),
        ("spikes", small(2, |i, x| if i % 37 == 5 { 3.1 * x.signum() } else { x * 0.01 })),
        ("zeros", small(0, |_, _| 0.0)),
        ("constant", small(0, |_, _| 0.7)),
        ("constant_below_zero", small(0, |_, _| -0.7)),
        ("subnormal_scales", small(3, |_, x| x * 2f32.powi(-20))),
        ("vanishing", small(4, |_, x| x * 2f32.powi(-60))),
        ("below_zero", small(5, |_, x| -x.abs() - 0.01)),
        ("above_zero", small(6, |_, x| x * 0.1 + 5.0)),
        ("groups_of_many_sizes", small(7, |i, x| x * 2f32.powi((i / 16 % 13) as i32 - 6))),
        ("large", small(8, |_, x| x * 16_000.0)),
        ("ties", small(0, |i, _| ((i % 37) as f32 - 18.0) * 0.5)),
        ("one_in_a_block", small(0, |i, _| if i % 256 == 77 { -1.25 } else { 0.0 })),
        ("zero_groups", small(9, |i, x| if i / 32 % 3 == 1 { 0.0 } else { x })),
        ("many", bell(1 << 16, 10).into_iter().map(|x| x * 0.05).collect()),
    ]
}

#[test]
fn blocks_and_values_are_those_of_ggml() {
    let answers = answers();
    let cases = cases();
    for (name, format) in &answers.formats {
        let format_of_name = WeightFormat::from_name(name).unwrap();
        assert_eq!(format.cases.len(), cases.len(), "{name}");
        for (case, values) in &cases {
            let answer = &format.cases[*case];
            let rows = values.len() / K_BLOCK;
            let matrix = WeightMatrix::from_f32(values, rows, K_BLOCK, format_of_name).unwrap();
            if let Some(blocks) = &answer.blocks {
                assert_eq!(&hex::encode(matrix.as_bytes()), blocks, "{name}, {case}");
            }
            assert_eq!(sha256(matrix.as_bytes()), answer.blocks_sha256, "{name}, {case}");
            let expanded = matrix.to_f32();
            assert_eq!(sha256(bytemuck::cast_slice(&expanded)), answer.values_sha256, "{name}, {case}");
        }
    }
}

#[test]
fn blocks_that_no_quantizer_makes_have_ggmls_values() {
    let answers = answers();
    let blocked = WeightFormat::ALL.into_iter().filter(|format| format.block().0 > 1);
    for format in blocked {
        let (values, bytes) = format.block();
        let noise = states(64 * bytes, 11).into_iter().map(|state| (state >> 8) as u8 & 0x7b).collect();
        let matrix = WeightMatrix::from_bytes(noise, 64, values, format).unwrap();
        let expected = &answers.formats[format.name()].noise_values_sha256;
        assert_eq!(&sha256(bytemuck::cast_slice(&matrix.to_f32())), expected, "{format:?}");
    }
}
