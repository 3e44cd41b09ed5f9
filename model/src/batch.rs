//! Batches of token sequences and what can be wrong with them.

use crate::generate::SamplingError;

/// Token ids that the model at hand cannot take.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InputError {
    /// There is nothing to predict.
    #[error("no tokens to predict: {found} ids given, at least {needed} needed")]
    TooShort {
        /// Ids given.
        found: usize,
        /// Ids needed.
        needed: usize,
    },
    /// More tokens than the context holds.
    #[error("{found} tokens exceed the limit of {limit}")]
    TooLong {
        /// Tokens given.
        found: usize,
        /// The model's context length or the plan's block length.
        limit: usize,
    },
    /// An id outside the vocabulary.
    #[error("token {id} at position {position} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        id: i64,
        /// Where it stands in the batch.
        position: usize,
        /// The vocabulary's size.
        vocab_size: usize,
    },
    /// A vector whose length contradicts the model or its layout.
    #[error("{what}: expected {expected} values, found {found}")]
    WrongLength {
        /// Which vector.
        what: &'static str,
        /// Its length by the model.
        expected: usize,
        /// Its length.
        found: usize,
    },
    /// An adapter made for a model of another shape.
    #[error("the adapter's {projection} factors in layer {layer} do not fit model {model}")]
    AdapterShape {
        /// The layer of the first factor that does not fit.
        layer: usize,
        /// Its projection's short name.
        projection: &'static str,
        /// The model's name.
        model: String,
    },
    /// A class beyond the classifier's.
    #[error("class {class} is beyond the {classes} classes")]
    UnknownClass {
        /// The class.
        class: usize,
        /// How many there are.
        classes: usize,
    },
    /// A classifier made for an encoder of other sizes.
    #[error("the classifier does not fit model {model}")]
    ClassifierShape {
        /// The model's name.
        model: String,
    },
    /// Pooling that the encoder has no weights for.
    #[error("model {model} has no pooler: pool by mean or cls")]
    NoPooler {
        /// The model's name.
        model: String,
    },
    /// A setting that no choice of a next token can follow.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
}

/// Sequences of one length with a target for each input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens in each of them.
    pub length: usize,
    /// Ids, `[sequences, length]`.
    pub inputs: Vec<u32>,
    /// The id that should follow each input; negative is ignored.
    pub targets: Vec<i32>,
}

impl Batch {
    /// Each block's ids but the last predict its ids but the first. Shorter blocks are padded with ignored
    /// targets to the length of the longest; causal attention keeps padding from touching what comes before.
    ///
    /// # Errors
    /// [`InputError::TooShort`] if there is no block or one of fewer than two ids; [`InputError::UnknownToken`]
    /// for an id no vocabulary has.
    pub fn from_blocks(blocks: &[&[u32]]) -> Result<Self, InputError> {
        let shortest = blocks.iter().map(|b| b.len()).min().unwrap_or(0);
        if shortest < 2 {
            return Err(InputError::TooShort { found: shortest, needed: 2 });
        }
        let length = blocks.iter().map(|b| b.len()).max().unwrap_or(0) - 1;
        let mut batch = Self { sequences: blocks.len(), length, inputs: Vec::new(), targets: Vec::new() };
        for block in blocks {
            batch.push(block)?;
        }
        Ok(batch)
    }

    /// Targets that are not ignored.
    #[must_use]
    pub fn predicted(&self) -> usize {
        self.targets.iter().filter(|t| **t >= 0).count()
    }

    fn push(&mut self, block: &[u32]) -> Result<(), InputError> {
        let end = self.inputs.len() + self.length;
        self.inputs.extend(&block[..block.len() - 1]);
        for (position, id) in block[1..].iter().enumerate() {
            let unknown =
                |_| InputError::UnknownToken { id: i64::from(*id), position, vocab_size: i32::MAX as usize };
            self.targets.push(i32::try_from(*id).map_err(unknown)?);
        }
        self.inputs.resize(end, 0);
        self.targets.resize(end, -1);
        Ok(())
    }

    /// Refuses ids and lengths the model cannot take.
    pub(crate) fn check(&self, vocab_size: usize, context_length: usize) -> Result<(), InputError> {
        let tokens = self.sequences * self.length;
        for (what, found) in [("batch inputs", self.inputs.len()), ("batch targets", self.targets.len())] {
            if found != tokens {
                return Err(InputError::WrongLength { what, expected: tokens, found });
            }
        }
        if self.length > context_length {
            return Err(InputError::TooLong { found: self.length, limit: context_length });
        }
        check_ids(&self.inputs, vocab_size)?;
        match self.targets.iter().position(|t| *t >= 0 && *t as usize >= vocab_size) {
            Some(position) => {
                Err(InputError::UnknownToken { id: i64::from(self.targets[position]), position, vocab_size })
            }
            None if self.predicted() == 0 => Err(InputError::TooShort { found: 0, needed: 2 }),
            None => Ok(()),
        }
    }

    /// The sequences `range` alone.
    pub(crate) fn slice(&self, range: std::ops::Range<usize>) -> Self {
        let tokens = range.start * self.length..range.end * self.length;
        Self {
            sequences: range.len(),
            length: self.length,
            inputs: self.inputs[tokens.clone()].to_vec(),
            targets: self.targets[tokens].to_vec(),
        }
    }
}

/// Refuses ids outside the vocabulary.
pub(crate) fn check_ids(ids: &[u32], vocab_size: usize) -> Result<(), InputError> {
    match ids.iter().position(|id| *id as usize >= vocab_size) {
        Some(position) => {
            Err(InputError::UnknownToken { id: i64::from(ids[position]), position, vocab_size })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_shift_and_pad() {
        let batch = Batch::from_blocks(&[&[1, 2, 3], &[4, 5]]).unwrap();
        assert_eq!((batch.sequences, batch.length), (2, 2));
        assert_eq!(batch.inputs, [1, 2, 4, 0]);
        assert_eq!(batch.targets, [2, 3, 5, -1]);
        assert_eq!(batch.predicted(), 3);
        assert_eq!(batch.slice(1..2).targets, [5, -1]);
    }

    #[test]
    fn what_a_model_cannot_take_is_refused() {
        let batch = Batch::from_blocks(&[&[1, 2, 9]]).unwrap();
        assert_eq!(batch.check(9, 8), Err(InputError::UnknownToken { id: 9, position: 1, vocab_size: 9 }));
        assert_eq!(batch.check(10, 1), Err(InputError::TooLong { found: 2, limit: 1 }));
        assert_eq!(batch.check(10, 2), Ok(()));
        assert_eq!(Batch::from_blocks(&[]), Err(InputError::TooShort { found: 0, needed: 2 }));
        assert_eq!(Batch::from_blocks(&[&[1]]), Err(InputError::TooShort { found: 1, needed: 2 }));
        let ignored = Batch { targets: vec![-1; 2], ..batch };
        assert!(ignored.check(10, 2).is_err());
    }
}
