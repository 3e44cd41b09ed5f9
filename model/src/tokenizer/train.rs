//! Learning a byte-level BPE vocabulary from text, for models that are trained from nothing.

use serde::Deserialize;
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::tokenizer::Trainer as _;

use super::{TokenKind, Tokenizer, Vocabulary, cut_words, word_cutter};
use crate::error::ModelError;

/// A pair of tokens is merged only if it occurs at least this often.
const PAIR_COUNT_MIN: u64 = 2;

/// The control tokens of a new vocabulary; they get the first ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Their texts, by id.
    pub control: Vec<String>,
    /// Index of the one that opens a sequence.
    pub bos: Option<u32>,
    /// Index of the one that ends an answer.
    pub eos: Option<u32>,
}

impl Default for SpecialTokens {
    /// SmolLM2's first three: end of text, and the brackets of a chat message.
    fn default() -> Self {
        let control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned).to_vec();
        Self { control, bos: Some(1), eos: Some(2) }
    }
}

/// Learns at most `vocab_size` tokens: the control tokens, the 256 bytes, and merges by how often they
/// occur. The same texts give the same tokenizer, in any order and on any number of threads.
///
/// # Errors
/// [`ModelError::Tokenizer`] when the size leaves no room for control tokens and bytes, or a special token
/// is not usable.
pub fn train_bpe(
    texts: impl Iterator<Item = String> + Send,
    vocab_size: usize,
    special: &SpecialTokens,
) -> Result<Tokenizer, ModelError> {
    let least = special.control.len() + 256;
    if vocab_size < least {
        return Err(refused(format!(
            "a vocabulary of {vocab_size} has no room for {least} control tokens and bytes"
        )));
    }
    let learned = learn(texts, vocab_size, special).map_err(|error| refused(error.to_string()))?;
    Tokenizer::new(learned.into_vocabulary(special))
}

/// The part of `tokenizers`' own serialization that holds what was learned.
#[derive(Deserialize)]
struct Learned {
    vocab: std::collections::HashMap<String, u32>,
    merges: Vec<(String, String)>,
}

fn learn(
    texts: impl Iterator<Item = String> + Send,
    vocab_size: usize,
    special: &SpecialTokens,
) -> tokenizers::Result<Learned> {
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(PAIR_COUNT_MIN)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special.control.iter().map(|token| AddedToken::from(token.as_str(), true)).collect())
        .build();
    let cutter = word_cutter();
    trainer.feed(texts, |text| Ok(cut_words(&cutter, text)))?;
    let mut bpe = BPE::default();
    trainer.train(&mut bpe)?;
    Ok(serde_json::from_value(serde_json::to_value(&bpe)?)?)
}

impl Learned {
    fn into_vocabulary(self, special: &SpecialTokens) -> Vocabulary {
        let mut tokens: Vec<_> = self.vocab.into_iter().collect();
        tokens.sort_unstable_by_key(|&(_, id)| id);
        let kinds = (0..tokens.len()).map(|id| kind(id, special)).collect();
        Vocabulary {
            tokens: tokens.into_iter().map(|(token, _)| token).collect(),
            kinds,
            merges: self.merges,
            bos: special.bos,
            eos: special.eos,
            ..Vocabulary::default()
        }
    }
}

fn kind(id: usize, special: &SpecialTokens) -> TokenKind {
    if id < special.control.len() { TokenKind::Control } else { TokenKind::Normal }
}

fn refused(reason: String) -> ModelError {
    ModelError::Tokenizer { reason }
}

#[cfg(test)]
mod tests {
    use super::super::tests::tiny_tokenizer;
    use super::*;

    #[test]
    fn learns_the_same_from_the_same_texts() {
        let texts = ["all the small things", "all the tall walls", "3 small 33 walls"].map(str::to_owned);
        let train =
            |texts: Vec<String>| train_bpe(texts.into_iter(), 280, &SpecialTokens::default()).unwrap();
        let forward = train(texts.to_vec());
        let backward = train(texts.iter().rev().cloned().collect());
        assert_eq!(forward.vocabulary(), backward.vocabulary());
        assert!(forward.vocab_size() > 262, "{}", forward.vocab_size());
        assert!(forward.encode("all the small walls", false).len() < 10);
    }

    #[test]
    fn digits_are_never_merged() {
        let tokenizer =
            train_bpe(std::iter::repeat_n("1234 ".repeat(9), 9), 300, &SpecialTokens::default()).unwrap();
        assert_eq!(tokenizer.encode("1234", false).len(), 4);
    }

    #[test]
    fn control_tokens_come_first_then_every_byte() {
        let vocabulary = tiny_tokenizer().vocabulary().clone();
        assert_eq!(vocabulary.tokens[..3], SpecialTokens::default().control);
        assert_eq!(
            vocabulary.kinds[..4],
            [TokenKind::Control, TokenKind::Control, TokenKind::Control, TokenKind::Normal]
        );
        assert!(vocabulary.tokens[3..259].iter().all(|token| token.chars().count() == 1));
        assert_eq!((vocabulary.bos, vocabulary.eos), (Some(1), Some(2)));
    }

    #[test]
    fn refuses_a_vocabulary_without_room() {
        let error = train_bpe(std::iter::empty(), 258, &SpecialTokens::default()).unwrap_err();
        assert!(error.to_string().contains("no room for 259"), "{error}");
    }
}
