//! The one running sum of a round. Vectors are added on arrival and forgotten: memory is one
//! vector, whatever the cohort.

use crate::ring::{RingBits, RingError, RingVector};

/// The sum of the contributions so far, mod 2^b. Independent of the order of arrival.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningSum {
    sum: RingVector,
    contributions: u32,
}

impl RunningSum {
    /// The empty sum.
    pub fn new(bits: RingBits, dimension: usize) -> Self {
        Self { sum: RingVector::zeros(bits, dimension), contributions: 0 }
    }

    /// Adds one contribution. On error nothing has changed.
    pub fn add(&mut self, vector: &RingVector) -> Result<(), RingError> {
        self.sum.add_assign(vector)?;
        self.contributions += 1;
        Ok(())
    }

    /// Adds the opened sum of a cohort. On error nothing has changed.
    pub fn add_sum(&mut self, sum: &RingVector, contributions: u32) -> Result<(), RingError> {
        self.sum.add_assign(sum)?;
        self.contributions += contributions;
        Ok(())
    }

    /// Contributions added.
    pub fn contributions(&self) -> u32 {
        self.contributions
    }

    /// The sum.
    pub fn sum(&self) -> &RingVector {
        &self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_vector_changes_nothing() {
        let bits = RingBits::new(16).unwrap();
        let mut sum = RunningSum::new(bits, 2);
        sum.add(&RingVector::from_signed(bits, &[1, -2])).unwrap();
        let before = sum.clone();
        assert!(sum.add(&RingVector::zeros(bits, 3)).is_err());
        assert!(sum.add(&RingVector::zeros(RingBits::new(17).unwrap(), 2)).is_err());
        assert_eq!(sum, before);
        assert_eq!((sum.contributions(), sum.sum().to_signed()), (1, vec![1, -2]));
    }
}
