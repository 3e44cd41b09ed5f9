//! Vectors mod 2^b in u32 lanes, and their bit-packed wire form (`ring/packed.rs`). Adding many of them is
//! `sum.rs`.

mod packed;

use thiserror::Error;

/// What can be wrong with a ring vector that comes from outside.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RingError {
    /// The modulus is outside 2^8..=2^32.
    #[error("ring of {0} bits; 8 to 32 are supported")]
    Bits(u32),
    /// The packed bytes do not hold exactly the expected number of values.
    #[error("packed vector of {actual} bytes; {dimension} values of {bits} bits take {expected}")]
    PackedLength {
        /// Values expected.
        dimension: usize,
        /// Bits a value.
        bits: u32,
        /// Bytes expected.
        expected: usize,
        /// Bytes found.
        actual: usize,
    },
    /// The unused bits of the last byte are not zero: two encodings of one vector must not exist.
    #[error("padding bits of the last byte are not zero")]
    Padding,
    /// Two vectors of one sum differ in length.
    #[error("vector of {actual} values where {expected} were expected")]
    Dimension {
        /// Values expected.
        expected: usize,
        /// Values found.
        actual: usize,
    },
    /// Two vectors of one sum differ in modulus.
    #[error("vector mod 2^{actual} where 2^{expected} was expected")]
    Modulus {
        /// Bits expected.
        expected: u32,
        /// Bits found.
        actual: u32,
    },
}

/// Width b of the ring of integers mod 2^b, 8..=32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RingBits(u32);

impl RingBits {
    /// Accepts 8..=32.
    pub fn new(bits: u32) -> Result<Self, RingError> {
        if (8..=32).contains(&bits) { Ok(Self(bits)) } else { Err(RingError::Bits(bits)) }
    }

    /// The width in bits.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// The largest element, 2^b - 1, which is also the reduction mask.
    pub fn mask(self) -> u32 {
        u32::MAX >> (32 - self.0)
    }

    /// Bytes that `dimension` packed values take.
    pub fn packed_len(self, dimension: usize) -> usize {
        (dimension * self.0 as usize).div_ceil(8)
    }
}

/// A vector of elements mod 2^b; every lane is below 2^b.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingVector {
    bits: RingBits,
    lanes: Vec<u32>,
}

impl RingVector {
    /// The zero vector of `dimension` values.
    pub fn zeros(bits: RingBits, dimension: usize) -> Self {
        Self { bits, lanes: vec![0; dimension] }
    }

    /// Reduces signed integers mod 2^b (two's complement).
    pub fn from_signed(bits: RingBits, values: &[i32]) -> Self {
        let mask = bits.mask();
        Self { bits, lanes: values.iter().map(|v| v.cast_unsigned() & mask).collect() }
    }

    /// The representatives in [-2^(b-1), 2^(b-1)).
    pub fn to_signed(&self) -> Vec<i32> {
        let shift = 32 - self.bits.bits();
        self.lanes.iter().map(|lane| (lane << shift).cast_signed() >> shift).collect()
    }

    /// Reads the wire form: values of b bits each, least significant bit first, without gaps.
    pub fn unpack(bits: RingBits, dimension: usize, bytes: &[u8]) -> Result<Self, RingError> {
        let expected = bits.packed_len(dimension);
        if bytes.len() != expected {
            return Err(RingError::PackedLength {
                dimension,
                bits: bits.bits(),
                expected,
                actual: bytes.len(),
            });
        }
        if packed::padding(bits, dimension, bytes) != 0 {
            return Err(RingError::Padding);
        }
        let mut lanes = vec![0; dimension];
        packed::read(bits, bytes, &mut lanes, |lane, value| *lane = value);
        Ok(Self { bits, lanes })
    }

    /// The wire form read by [`RingVector::unpack`].
    pub fn pack(&self) -> Vec<u8> {
        packed::write(self.bits, &self.lanes)
    }

    /// Reduces values mod 2^b.
    pub fn from_lanes(bits: RingBits, mut lanes: Vec<u32>) -> Self {
        let mask = bits.mask();
        lanes.iter_mut().for_each(|lane| *lane &= mask);
        Self { bits, lanes }
    }

    /// Adds a vector in its wire form, mod 2^b, without unpacking it into memory. On error nothing has
    /// changed.
    pub fn add_packed(&mut self, bytes: &[u8]) -> Result<(), RingError> {
        let (bits, dimension) = (self.bits, self.lanes.len());
        let expected = bits.packed_len(dimension);
        if bytes.len() != expected {
            let (bits, actual) = (bits.bits(), bytes.len());
            return Err(RingError::PackedLength { dimension, bits, expected, actual });
        }
        if packed::padding(bits, dimension, bytes) != 0 {
            return Err(RingError::Padding);
        }
        let mask = bits.mask();
        packed::read(bits, bytes, &mut self.lanes, |lane, value| *lane = lane.wrapping_add(value) & mask);
        Ok(())
    }

    /// The elements; whoever changes them reduces them mod 2^b.
    pub(crate) fn lanes_mut(&mut self) -> &mut [u32] {
        &mut self.lanes
    }

    /// Number of values.
    pub fn dimension(&self) -> usize {
        self.lanes.len()
    }

    /// The ring.
    pub fn bits(&self) -> RingBits {
        self.bits
    }

    /// The elements, each below 2^b.
    pub fn lanes(&self) -> &[u32] {
        &self.lanes
    }

    /// Adds `other` in place, mod 2^b.
    pub fn add_assign(&mut self, other: &Self) -> Result<(), RingError> {
        if other.bits != self.bits {
            return Err(RingError::Modulus { expected: self.bits.bits(), actual: other.bits.bits() });
        }
        if other.dimension() != self.dimension() {
            return Err(RingError::Dimension { expected: self.dimension(), actual: other.dimension() });
        }
        let mask = self.bits.mask();
        for (sum, lane) in self.lanes.iter_mut().zip(&other.lanes) {
            *sum = sum.wrapping_add(*lane) & mask;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn packs_least_significant_bit_first() {
        let bits = RingBits::new(12).unwrap();
        let vector = RingVector::from_signed(bits, &[0x123, -1, 0x456]);
        assert_eq!(vector.pack(), [0x23, 0xf1, 0xff, 0x56, 0x04]);
    }

    #[test]
    fn refuses_wrong_lengths_and_padding() {
        let bits = RingBits::new(12).unwrap();
        assert_eq!(
            RingVector::unpack(bits, 3, &[0; 4]),
            Err(RingError::PackedLength { dimension: 3, bits: 12, expected: 5, actual: 4 })
        );
        assert_eq!(RingVector::unpack(bits, 3, &[0, 0, 0, 0, 0x10]), Err(RingError::Padding));
        assert_eq!(RingBits::new(33), Err(RingError::Bits(33)));
        assert_eq!(RingBits::new(7), Err(RingError::Bits(7)));
    }

    proptest! {
        #[test]
        fn unpack_inverts_pack(bits in 8u32..=32, values in prop::collection::vec(any::<i32>(), 0..70)) {
            let bits = RingBits::new(bits).unwrap();
            let vector = RingVector::from_signed(bits, &values);
            let packed = vector.pack();
            prop_assert_eq!(packed.len(), bits.packed_len(values.len()));
            prop_assert_eq!(RingVector::unpack(bits, values.len(), &packed).unwrap(), vector);
        }

        #[test]
        fn sums_equal_integer_sums_while_they_fit(
            bits in 12u32..=32,
            rows in prop::collection::vec(prop::collection::vec(-100i32..=100, 5), 1..10),
        ) {
            let bits = RingBits::new(bits).unwrap();
            let mut sum = RingVector::zeros(bits, 5);
            for row in &rows {
                sum.add_assign(&RingVector::from_signed(bits, row)).unwrap();
            }
            let expected: Vec<i32> = (0..5).map(|i| rows.iter().map(|row| row[i]).sum()).collect();
            prop_assert_eq!(sum.to_signed(), expected);
        }
    }
}
