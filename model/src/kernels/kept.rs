//! Activations kept for the backward pass: as they are, or rounded to bf16 in half the memory where products are
//! of bf16 factors anyway.

use super::bf16::Precision;
use super::scratch::{Buffer, buffer};
use super::simd::simd_fn;
use std::ops::Deref;

/// Values kept from the forward pass.
#[derive(Debug)]
pub(crate) enum Kept {
    Full(Buffer),
    /// Two bf16 a word: value i in the lower half of word i, value i + ceil(len / 2) in the upper half.
    Halves {
        words: Buffer,
        len: usize,
    },
}

/// Kept values as f32 again.
#[derive(Debug)]
pub(crate) enum Values<'a> {
    Borrowed(&'a [f32]),
    Expanded(Buffer),
}

impl Kept {
    pub(crate) fn new(values: Buffer, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::Full(values),
            Precision::Bf16 => {
                let len = values.len();
                let mut words = buffer(len.div_ceil(2));
                halve(&values, &mut words);
                Self::Halves { words, len }
            }
        }
    }

    pub(crate) fn values(&self) -> Values<'_> {
        match self {
            Self::Full(values) => Values::Borrowed(values),
            Self::Halves { words, len } => {
                let mut values = buffer(*len);
                expand(words, &mut values);
                Values::Expanded(values)
            }
        }
    }
}

impl Deref for Values<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            Self::Borrowed(values) => values,
            Self::Expanded(values) => values,
        }
    }
}

/// To nearest, ties to even, in the upper 16 bits; NaN stays NaN.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    if x.is_nan() { 0x7fc0_0000 } else { nearest }
}

simd_fn! {
    fn halve(values: &[f32], words: &mut [f32]) {
        let (low, high) = values.split_at(words.len());
        for (word, x) in words.iter_mut().zip(low) {
            *word = f32::from_bits(rounded(*x) >> 16);
        }
        for (word, x) in words.iter_mut().zip(high) {
            *word = f32::from_bits(word.to_bits() | rounded(*x));
        }
    }
}

simd_fn! {
    fn expand(words: &[f32], values: &mut [f32]) {
        let (low, high) = values.split_at_mut(words.len());
        for (x, word) in low.iter_mut().zip(words) {
            *x = f32::from_bits(word.to_bits() << 16);
        }
        for (x, word) in high.iter_mut().zip(words) {
            *x = f32::from_bits(word.to_bits() & 0xffff_0000);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn halves_are_the_nearest_bf16() {
        for count in [1usize, 2, 33, 100] {
            let mut given = buffer(count);
            for (i, x) in given.iter_mut().enumerate() {
                *x = (i as f32 - 7.3) * 1.234_567e-3 * 10f32.powi(i as i32 % 9);
            }
            given[count / 2] = f32::NAN;
            let expected: Vec<f32> = given.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
            let kept = Kept::new(given, Precision::Bf16);
            assert_eq!(kept.values().len(), count);
            for (found, expected) in kept.values().iter().zip(&expected) {
                assert!(found == expected || (found.is_nan() && expected.is_nan()), "{found} for {expected}");
            }
        }
        let mut full = buffer(3);
        full.copy_from_slice(&[1.000_01, 2.0, 3.0]);
        assert_eq!(Kept::new(full, Precision::F32).values()[..], [1.000_01, 2.0, 3.0]);
    }
}
