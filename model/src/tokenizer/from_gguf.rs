//! The tokenizer's keys in GGUF metadata, both ways.

use super::{PRE_TOKENIZER, TokenKind, Tokenizer, Vocabulary};
use crate::error::ModelError;
use crate::gguf::{Metadata, MetadataArray, MetadataValue};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const KINDS: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
const PADDING: &str = "tokenizer.ggml.padding_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";

impl Tokenizer {
    /// Reads the tokenizer of a GGUF file.
    ///
    /// # Errors
    /// For missing or mistyped keys, and for any kind of tokenizer but byte-level BPE with the one supported
    /// way of cutting words.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self, ModelError> {
        supported(metadata, MODEL, "gpt2", "only byte-level BPE (gpt2) is supported")?;
        supported(
            metadata,
            PRE,
            PRE_TOKENIZER,
            "another way of cutting words gives other ids; only smollm is known",
        )?;
        Self::new(Vocabulary {
            tokens: metadata.strings(TOKENS)?.to_vec(),
            kinds: kinds(metadata)?,
            merges: merges(metadata)?,
            bos: metadata.optional_u32(BOS)?,
            eos: metadata.optional_u32(EOS)?,
            unknown: metadata.optional_u32(UNKNOWN)?,
            padding: metadata.optional_u32(PADDING)?,
            add_bos: metadata.optional_bool(ADD_BOS)?.unwrap_or(false),
            add_eos: metadata.optional_bool(ADD_EOS)?.unwrap_or(false),
        })
    }

    /// Adds the tokenizer's keys to the metadata of a GGUF file.
    pub fn write_gguf(&self, metadata: &mut Metadata) {
        let vocabulary = self.vocabulary();
        let kinds = vocabulary.kinds.iter().map(|&kind| kind as i32).collect();
        let merges = vocabulary.merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
        metadata.set(MODEL, "gpt2");
        metadata.set(PRE, PRE_TOKENIZER);
        metadata.set(TOKENS, MetadataValue::Array(MetadataArray::String(vocabulary.tokens.clone())));
        metadata.set(KINDS, MetadataValue::Array(MetadataArray::I32(kinds)));
        metadata.set(MERGES, MetadataValue::Array(MetadataArray::String(merges)));
        metadata.set(ADD_BOS, vocabulary.add_bos);
        metadata.set(ADD_EOS, vocabulary.add_eos);
        metadata.set(ADD_SPACE_PREFIX, false);
        let named = [
            (BOS, vocabulary.bos),
            (EOS, vocabulary.eos),
            (UNKNOWN, vocabulary.unknown),
            (PADDING, vocabulary.padding),
        ];
        named.into_iter().for_each(|(key, id)| id.into_iter().for_each(|id| metadata.set(key, id)));
    }
}

fn supported(metadata: &Metadata, key: &str, only: &str, reason: &str) -> Result<(), ModelError> {
    let found = metadata.string(key)?;
    if found == only {
        return Ok(());
    }
    Err(ModelError::Unsupported {
        key: key.to_owned(),
        found: format!("{found:?}"),
        reason: reason.to_owned(),
    })
}

fn kinds(metadata: &Metadata) -> Result<Vec<TokenKind>, ModelError> {
    let numbers = metadata.integers(KINDS)?;
    let kind = |number| {
        TokenKind::from_number(number)
            .ok_or_else(|| malformed(KINDS, format!("no token kind has the number {number}")))
    };
    numbers.into_iter().map(kind).collect()
}

fn merges(metadata: &Metadata) -> Result<Vec<(String, String)>, ModelError> {
    let split = |(rank, merge): (usize, &String)| match merge.split_once(' ') {
        Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
        None => Err(malformed(MERGES, format!("merge {rank} has no space between its parts"))),
    };
    metadata.strings(MERGES)?.iter().enumerate().map(split).collect()
}

fn malformed(what: &str, reason: String) -> ModelError {
    ModelError::Malformed { what: what.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::super::tests::tiny_tokenizer;
    use super::*;

    fn metadata() -> Metadata {
        let mut metadata = Metadata::default();
        tiny_tokenizer().write_gguf(&mut metadata);
        metadata
    }

    #[test]
    fn comes_back_from_its_metadata() {
        let back = Tokenizer::from_gguf(&metadata()).unwrap();
        assert_eq!(back.vocabulary(), tiny_tokenizer().vocabulary());
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        let check = |key: &str, value: MetadataValue, expected: &str| {
            let mut metadata = metadata();
            metadata.set(key, value);
            let error = Tokenizer::from_gguf(&metadata).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(expected), "{error}");
        };
        check(MODEL, "llama".into(), "only byte-level");
        check(PRE, "llama-bpe".into(), "llama-bpe");
        check(PRE, true.into(), "expected string, found bool");
        check(KINDS, MetadataValue::Array(MetadataArray::I32(vec![9])), "number 9");
        check(MERGES, MetadataValue::Array(MetadataArray::String(vec!["ab".to_owned()])), "merge 0");
        check(TOKENS, 7u32.into(), "expected array of strings, found u32");
        check(EOS, "x".into(), "expected");
        let error = Tokenizer::from_gguf(&Metadata::default()).unwrap_err().to_string();
        assert!(error.contains("missing key tokenizer.ggml.model"), "{error}");
    }
}
