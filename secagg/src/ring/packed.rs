//! The wire form of a ring vector: values of b bits each, least significant bit first, without gaps. Eight
//! values take b bytes exactly, so each width has its own unrolled loop over groups of eight.

use super::RingBits;

/// Values that take a whole number of bytes at any width.
const GROUP: usize = 8;

/// Runs a function for the width at hand with the width as a constant.
macro_rules! per_width {
    ($bits:expr, $function:ident, $($argument:expr),*) => {
        per_width!(@ $bits, $function, ($($argument),*),
            8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32)
    };
    (@ $bits:expr, $function:ident, $arguments:tt, $($width:literal)*) => {
        match $bits.bits() {
            $($width => per_width!(@@ $function, $width, $arguments),)*
            width => unreachable!("a ring of {width} bits"),
        }
    };
    (@@ $function:ident, $width:literal, ($($argument:expr),*)) => {
        $function::<$width>($($argument),*)
    };
}

/// The unused bits of the last byte.
pub(super) fn padding(bits: RingBits, dimension: usize, bytes: &[u8]) -> u8 {
    let used = dimension * bits.bits() as usize % 8;
    if used == 0 { 0 } else { bytes.last().map_or(0, |last| last >> used) }
}

/// Hands each packed value to `take` with its lane. `bytes` has the packed length of `lanes`.
#[inline(always)]
pub(super) fn read(bits: RingBits, bytes: &[u8], lanes: &mut [u32], take: impl Fn(&mut u32, u32) + Copy) {
    per_width!(bits, read_width, bytes, lanes, take);
}

/// Packs values, each below 2^b.
pub(super) fn write(bits: RingBits, lanes: &[u32]) -> Vec<u8> {
    per_width!(bits, write_width, lanes)
}

fn read_width<const B: usize>(bytes: &[u8], lanes: &mut [u32], take: impl Fn(&mut u32, u32) + Copy) {
    // Whole words need no shifts.
    if B == 32 {
        let (words, _) = bytes.as_chunks::<4>();
        lanes.iter_mut().zip(words).for_each(|(lane, word)| take(lane, u32::from_le_bytes(*word)));
        return;
    }
    if B == 16 {
        let (words, _) = bytes.as_chunks::<2>();
        lanes.iter_mut().zip(words).for_each(|(lane, word)| take(lane, u16::from_le_bytes(*word).into()));
        return;
    }
    if B == 8 {
        lanes.iter_mut().zip(bytes).for_each(|(lane, byte)| take(lane, (*byte).into()));
        return;
    }
    let (groups, rest) = lanes.as_chunks_mut::<GROUP>();
    // A value is read as the eight bytes around it: the fast loop stops before that passes the end.
    let fast = if bytes.len() < 40 { 0 } else { (bytes.len() - 40) / B + 1 }.min(groups.len());
    let (fast_groups, slow_groups) = groups.split_at_mut(fast);
    for (i, group) in fast_groups.iter_mut().enumerate() {
        let window: &[u8; 40] = bytes[i * B..].first_chunk().expect("40 bytes are left");
        for (k, lane) in group.iter_mut().enumerate() {
            take(lane, value::<B>(window, k));
        }
    }
    let slow = slow_groups.iter_mut().flatten().chain(rest);
    for (lane, k) in slow.zip(0..) {
        let mut window = [0; 40];
        let from = fast * B + k / GROUP * B;
        let left = &bytes[from..bytes.len().min(from + 40)];
        window[..left.len()].copy_from_slice(left);
        take(lane, value::<B>(&window, k % GROUP));
    }
}

/// Value number `k` of the group that begins the window.
#[inline(always)]
fn value<const B: usize>(window: &[u8; 40], k: usize) -> u32 {
    let (from, shift) = (k * B / 8, k * B % 8);
    let word: [u8; 8] = window[from..from + 8].try_into().expect("the last value begins before byte 32");
    low_bits::<B>(u64::from_le_bytes(word) >> shift)
}

fn write_width<const B: usize>(lanes: &[u32]) -> Vec<u8> {
    let (groups, rest) = lanes.as_chunks::<GROUP>();
    let mut bytes = vec![0; (lanes.len() * B).div_ceil(8)];
    let (whole, tail) = bytes.split_at_mut(groups.len() * B);
    for (group, bytes) in groups.iter().zip(whole.chunks_exact_mut(B)) {
        bytes.copy_from_slice(&packed_group::<B>(group)[..B]);
    }
    let mut last = [0; GROUP];
    last[..rest.len()].copy_from_slice(rest);
    tail.copy_from_slice(&packed_group::<B>(&last)[..tail.len()]);
    bytes
}

/// The B bytes of a group, and zeros.
#[inline(always)]
fn packed_group<const B: usize>(group: &[u32; GROUP]) -> [u8; 32] {
    let mut words = [0u64; 4];
    for (k, lane) in group.iter().enumerate() {
        let (word, shift) = (k * B / 64, k * B % 64);
        words[word] |= u64::from(*lane) << shift;
        if shift + B > 64 {
            words[word + 1] |= u64::from(*lane) >> (64 - shift);
        }
    }
    let mut bytes = [0; 32];
    for (bytes, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
    bytes
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "masked to at most 32 bits")]
fn low_bits<const B: usize>(word: u64) -> u32 {
    (word & (u64::MAX >> (64 - B))) as u32
}

#[cfg(test)]
mod tests {
    use crate::ring::{RingBits, RingError, RingVector};
    use proptest::prelude::*;

    fn vector(bits: u32, lanes: &[u32]) -> RingVector {
        RingVector::from_lanes(RingBits::new(bits).unwrap(), lanes.to_vec())
    }

    /// The wire form bit by bit, as the module's first words have it.
    fn bit_by_bit(vector: &RingVector) -> Vec<u8> {
        let bits = vector.bits().bits() as usize;
        let mut bytes = vec![0; vector.bits().packed_len(vector.dimension())];
        for place in 0..bits * vector.dimension() {
            let bit = vector.lanes()[place / bits] >> (place % bits) & 1;
            bytes[place / 8] |= u8::try_from(bit).unwrap() << (place % 8);
        }
        bytes
    }

    #[test]
    fn every_width_and_every_odd_end() {
        for bits in 8..=32 {
            for dimension in 0..=67u32 {
                let lanes: Vec<u32> = (1..=dimension).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
                let vector = vector(bits, &lanes);
                let packed = vector.pack();
                assert_eq!(packed, bit_by_bit(&vector), "{dimension} values of {bits} bits");
                assert_eq!(RingVector::unpack(vector.bits(), lanes.len(), &packed), Ok(vector));
            }
        }
    }

    proptest! {
        #[test]
        fn adding_the_wire_form_is_adding_the_vector(
            bits in 8u32..=32,
            pairs in prop::collection::vec(any::<(u32, u32)>(), 0..300),
        ) {
            let (sum, added): (Vec<u32>, Vec<u32>) = pairs.into_iter().unzip();
            let (mut sum, added) = (vector(bits, &sum), vector(bits, &added));
            let mut expected = sum.clone();
            expected.add_assign(&added).unwrap();
            sum.add_packed(&added.pack()).unwrap();
            prop_assert_eq!(sum, expected);
        }

        #[test]
        fn a_refused_wire_form_changes_nothing(
            bits in 8u32..=32,
            lanes in prop::collection::vec(any::<u32>(), 1..100),
            flipped in 0u8..8,
        ) {
            let vector = vector(bits, &lanes);
            let mut sum = vector.clone();
            let packed = vector.pack();
            let longer = [&packed[..], &[0]].concat();
            for wrong in [&packed[1..], &longer, &[]] {
                let is_refused = matches!(sum.add_packed(wrong), Err(RingError::PackedLength { .. }));
                prop_assert!(is_refused, "{} bytes", wrong.len());
            }
            let used = lanes.len() * bits as usize % 8;
            if used != 0 && usize::from(flipped) >= used {
                let mut padded = packed;
                *padded.last_mut().unwrap() |= 1 << flipped;
                prop_assert_eq!(sum.add_packed(&padded), Err(RingError::Padding));
                prop_assert_eq!(RingVector::unpack(vector.bits(), lanes.len(), &padded), Err(RingError::Padding));
            }
            prop_assert_eq!(sum, vector);
        }
    }
}
