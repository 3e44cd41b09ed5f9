//! Integer noise: exact tables of a law, the random source, and their meeting.
//!
//! What it draws does not depend on the update, so its running time says nothing about one.

mod source;
mod table;

pub use source::{NoiseError, NoiseOrigin, NoiseSource};
pub use table::{GridVariance, Law, NoiseTable};

use source::WORDS;

impl NoiseTable {
    /// Adds one independent draw to each value, reduced mod 2^32 as every ring of at most 32 bits is.
    pub fn add_to(&self, values: &mut [i32], source: &mut NoiseSource) {
        let mut words = [0u64; WORDS];
        for chunk in values.chunks_mut(64) {
            let (signs, draws) = source.fill(&mut words, chunk.len());
            for (at, (value, draw)) in chunk.iter_mut().zip(draws).enumerate() {
                let magnitude = self.magnitude(*draw, source).cast_signed();
                let sign = -((signs >> at) & 1).cast_signed();
                #[expect(clippy::cast_possible_truncation, reason = "zero or minus one")]
                let sign = sign as i32;
                *value = value.wrapping_add((magnitude ^ sign) - sign);
            }
        }
    }
}

#[cfg(test)]
mod tests;
