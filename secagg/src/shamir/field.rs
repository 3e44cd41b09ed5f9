//! GF(2^8): single public elements by tables, and vectors of secret bytes by shifts and masks in 64-bit words.

use zeroize::Zeroize;

/// 8 N bytes of a secret, multiplied by public elements without looking at them.
#[derive(Clone, Copy)]
pub(super) struct Bytes<const N: usize>([u64; N]);

const LOW_BITS: u64 = 0x0101_0101_0101_0101;
const HIGH_BITS: u64 = LOW_BITS << 7;
/// x^8 = x^4 + x^3 + x + 1, in every byte.
const REDUCTION: u64 = LOW_BITS * 0x1b;

impl<const N: usize> Bytes<N> {
    pub(super) fn zero() -> Self {
        Self([0; N])
    }

    pub(super) fn random(mut next: impl FnMut() -> u64) -> Self {
        Self(std::array::from_fn(|_| next()))
    }

    pub(super) fn read(bytes: &[u8]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        Self(std::array::from_fn(|i| u64::from_le_bytes(words[i])))
    }

    pub(super) fn write(&self, bytes: &mut [u8]) {
        let (words, _) = bytes.as_chunks_mut::<8>();
        for (word, value) in words.iter_mut().zip(self.0) {
            *word = value.to_le_bytes();
        }
    }

    /// Addition is exclusive or.
    #[inline(always)]
    pub(super) fn add(mut self, other: &Self) -> Self {
        for (word, other) in self.0.iter_mut().zip(other.0) {
            *word ^= other;
        }
        self
    }

    /// Multiplies every byte by a public element.
    #[inline(always)]
    pub(super) fn times(mut self, public: u8) -> Self {
        let (mut product, mut rest) = (Self::zero(), public);
        while rest != 0 {
            let chosen = u64::from(rest & 1).wrapping_neg();
            for (product, word) in product.0.iter_mut().zip(&mut self.0) {
                *product ^= *word & chosen;
                // Subtraction fills the bytes whose high bit is set; neither a branch nor a product.
                let high = *word & HIGH_BITS;
                *word = ((*word ^ high) << 1) ^ ((high - (high >> 7)) & REDUCTION);
            }
            rest >>= 1;
        }
        product
    }
}

impl<const N: usize> Zeroize for Bytes<N> {
    fn zeroize(&mut self) {
        self.0.zeroize();
    }
}

/// The product of two public elements.
pub(super) fn multiply(a: u8, b: u8) -> u8 {
    if a == 0 || b == 0 {
        return 0;
    }
    TABLES.powers
        [usize::from(TABLES.logarithms[usize::from(a)]) + usize::from(TABLES.logarithms[usize::from(b)])]
}

/// The inverse of a public element other than zero.
pub(super) fn inverse(a: u8) -> u8 {
    TABLES.powers[255 - usize::from(TABLES.logarithms[usize::from(a)])]
}

struct Tables {
    /// Powers of 3, which generates the group, twice around.
    powers: [u8; 510],
    logarithms: [u8; 256],
}

static TABLES: Tables = {
    let (mut powers, mut logarithms) = ([0; 510], [0; 256]);
    let (mut power, mut exponent) = (1u8, 0u8);
    while exponent < 255 {
        powers[exponent as usize] = power;
        powers[exponent as usize + 255] = power;
        logarithms[power as usize] = exponent;
        power ^= (power << 1) ^ (0x1b * (power >> 7));
        exponent += 1;
    }
    Tables { powers, logarithms }
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_products_and_inverses() {
        // FIPS 197, section 4.2: {57} {83} = {c1}, {57} {13} = {fe}; {53} and {ca} are inverse.
        assert_eq!((multiply(0x57, 0x83), multiply(0x57, 0x13)), (0xc1, 0xfe));
        assert_eq!((inverse(0x53), inverse(0xca)), (0xca, 0x53));
        for a in 1..=255 {
            assert_eq!(multiply(a, inverse(a)), 1);
        }
    }

    #[test]
    fn vectors_multiply_like_elements() {
        let bytes: [u8; 32] = std::array::from_fn(|i| u8::try_from(i * 8 + 5).unwrap());
        for public in 0..=255 {
            let mut product = [0; 32];
            Bytes::<4>::read(&bytes).times(public).write(&mut product);
            assert_eq!(product, bytes.map(|byte| multiply(byte, public)));
        }
    }
}
