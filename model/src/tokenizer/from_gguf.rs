//! The tokenizer's keys in GGUF metadata, both ways.

use super::{Method, TokenKind, Tokenizer, Vocabulary};
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
const SCORES: &str = "tokenizer.ggml.scores";
/// Normalization that is not done here.
const OFF: [&str; 2] = ["tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"];

/// Values of [`MODEL`] and [`PRE`].
const BYTE_LEVEL: &str = "gpt2";
const SENTENCE_PIECE: &str = "llama";
const SMOLLM: &str = "smollm";
const QWEN2: &str = "qwen2";
const DEFAULT: &str = "default";

impl Tokenizer {
    /// Reads the tokenizer of a GGUF file.
    ///
    /// # Errors
    /// For missing or mistyped keys, and for any kind of tokenizer but byte-level BPE with a way of cutting words that
    /// is known, and SentencePiece's BPE.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self, ModelError> {
        let method = method(metadata)?;
        let is_pieces = matches!(method, Method::SentencePiece { .. });
        // SentencePiece's own ids, where a file names none.
        let or_usual = |id: Option<u32>, usual| if is_pieces { id.or(Some(usual)) } else { id };
        Self::new(Vocabulary {
            method,
            tokens: metadata.strings(TOKENS)?.to_vec(),
            kinds: kinds(metadata)?,
            merges: if is_pieces { Vec::new() } else { merges(metadata)? },
            bos: or_usual(metadata.optional_u32(BOS)?, 1),
            eos: or_usual(metadata.optional_u32(EOS)?, 2),
            unknown: or_usual(metadata.optional_u32(UNKNOWN)?, 0),
            padding: metadata.optional_u32(PADDING)?,
            add_bos: metadata.optional_bool(ADD_BOS)?.unwrap_or(is_pieces),
            add_eos: metadata.optional_bool(ADD_EOS)?.unwrap_or(false),
        })
    }

    /// Adds the tokenizer's keys to the metadata of a GGUF file.
    pub fn write_gguf(&self, metadata: &mut Metadata) {
        let vocabulary = self.vocabulary();
        let kinds = vocabulary.kinds.iter().map(|&kind| kind as i32).collect();
        let (model, pre, prefix) = match &vocabulary.method {
            Method::SmolLm => (BYTE_LEVEL, SMOLLM, false),
            Method::Qwen2 => (BYTE_LEVEL, QWEN2, false),
            Method::SentencePiece { add_space_prefix, .. } => (SENTENCE_PIECE, DEFAULT, *add_space_prefix),
        };
        if let Method::SentencePiece { scores, .. } = &vocabulary.method {
            metadata.set(SCORES, MetadataValue::Array(MetadataArray::F32(scores.clone())));
        } else {
            let merges = vocabulary.merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
            metadata.set(MERGES, MetadataValue::Array(MetadataArray::String(merges)));
        }
        metadata.set(MODEL, model);
        metadata.set(PRE, pre);
        metadata.set(TOKENS, MetadataValue::Array(MetadataArray::String(vocabulary.tokens.clone())));
        metadata.set(KINDS, MetadataValue::Array(MetadataArray::I32(kinds)));
        metadata.set(ADD_BOS, vocabulary.add_bos);
        metadata.set(ADD_EOS, vocabulary.add_eos);
        metadata.set(ADD_SPACE_PREFIX, prefix);
        let named = [
            (BOS, vocabulary.bos),
            (EOS, vocabulary.eos),
            (UNKNOWN, vocabulary.unknown),
            (PADDING, vocabulary.padding),
        ];
        named.into_iter().for_each(|(key, id)| id.into_iter().for_each(|id| metadata.set(key, id)));
    }
}

fn method(metadata: &Metadata) -> Result<Method, ModelError> {
    let model = metadata.string(MODEL)?;
    if model == SENTENCE_PIECE {
        return pieces(metadata);
    }
    if model != BYTE_LEVEL {
        let reason = "only byte-level BPE (gpt2) and SentencePiece's BPE (llama) are supported";
        return Err(unsupported(MODEL, model, reason));
    }
    match metadata.string(PRE)? {
        SMOLLM => Ok(Method::SmolLm),
        QWEN2 => Ok(Method::Qwen2),
        other => {
            let reason = "another way of cutting words gives other ids; only smollm and qwen2 are known";
            Err(unsupported(PRE, other, reason))
        }
    }
}

fn pieces(metadata: &Metadata) -> Result<Method, ModelError> {
    if let Some(other) = metadata.optional_string(PRE)?.filter(|pre| *pre != DEFAULT) {
        return Err(unsupported(PRE, other, "SentencePiece's BPE knows only default"));
    }
    let is_off = |key: &&str| matches!(metadata.value(key), None | Some(MetadataValue::Bool(false)));
    if let Some(key) = OFF.into_iter().find(|key| !is_off(key)) {
        return Err(unsupported(key, "something", "text is not normalized here"));
    }
    Ok(Method::SentencePiece {
        scores: metadata.floats(SCORES)?.to_vec(),
        add_space_prefix: metadata.optional_bool(ADD_SPACE_PREFIX)?.unwrap_or(true),
    })
}

fn unsupported(key: &str, found: &str, reason: &str) -> ModelError {
    ModelError::Unsupported { key: key.to_owned(), found: format!("{found:?}"), reason: reason.to_owned() }
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
        check(MODEL, "t5".into(), "only byte-level");
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
