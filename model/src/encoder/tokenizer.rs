//! WordPiece as BERT uses it: text is cleaned, cut at spaces and punctuation, and each word becomes the longest
//! pieces of the vocabulary from left to right (Devlin et al. 2018). The steps are those of `tokenizers`; the
//! settings that come from files are checked here.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::Vocab;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{
    Model as _, NormalizedString, Normalizer as _, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer as _,
};

use crate::error::ModelError;

/// What continues a word in the vocabulary.
pub(super) const CONTINUATION: &str = "##";
/// Longer words are unknown, as in BERT's own code.
const WORD_CHARS_MAX: usize = 100;

const UNKNOWN: &str = "[UNK]";
const OPENING: &str = "[CLS]";
const CLOSING: &str = "[SEP]";
const PADDING: &str = "[PAD]";
/// Tokens that no text can contain.
pub(super) const CONTROL: [&str; 5] = [PADDING, UNKNOWN, OPENING, CLOSING, "[MASK]"];

/// How text is cleaned before it is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WordPieceSettings {
    /// Letters become small ones.
    pub lowercase: bool,
    /// Accents are dropped.
    pub strip_accents: bool,
    /// Each Chinese character is a word.
    pub split_chinese: bool,
}

impl Default for WordPieceSettings {
    /// Those of the uncased models.
    fn default() -> Self {
        Self { lowercase: true, strip_accents: true, split_chinese: true }
    }
}

/// Turns text into ids. Cheap to clone.
#[derive(Clone)]
pub struct WordPieceTokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    tokens: Vec<String>,
    settings: WordPieceSettings,
    normalizer: BertNormalizer,
    pieces: WordPiece,
    opening: u32,
    closing: u32,
}

impl WordPieceTokenizer {
    /// A tokenizer of that vocabulary, by id, with `##` before what continues a word.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when a token repeats or `[CLS]`, `[SEP]` or `[UNK]` is not there.
    pub fn new(tokens: Vec<String>, settings: WordPieceSettings) -> Result<Self, ModelError> {
        let refused = |reason: String| ModelError::Tokenizer { reason };
        let mut seen = HashSet::with_capacity(tokens.len());
        if let Some(id) = tokens.iter().position(|token| token.is_empty() || !seen.insert(token.as_str())) {
            return Err(refused(format!("token {id} is empty or a repetition of another")));
        }
        let vocabulary: Vocab = tokens.iter().cloned().zip(0..).collect();
        let id = |token: &str| {
            vocabulary.get(token).copied().ok_or_else(|| refused(format!("{token} is not in the vocabulary")))
        };
        let (opening, closing, _) = (id(OPENING)?, id(CLOSING)?, id(UNKNOWN)?);
        let pieces = WordPiece::builder()
            .vocab(vocabulary)
            .unk_token(UNKNOWN.to_owned())
            .continuing_subword_prefix(CONTINUATION.to_owned())
            .max_input_chars_per_word(WORD_CHARS_MAX)
            .build()
            .map_err(|error| refused(error.to_string()))?;
        let WordPieceSettings { lowercase, strip_accents, split_chinese } = settings;
        let normalizer = BertNormalizer::new(true, split_chinese, Some(strip_accents), lowercase);
        Ok(Self { inner: Arc::new(Inner { tokens, settings, normalizer, pieces, opening, closing }) })
    }

    /// Reads `tokenizer.json`. Its truncation and padding are left out: lengths are the caller's.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the file is no such tokenizer or has a setting that is not supported.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ModelError> {
        let refused = |reason| ModelError::Tokenizer { reason };
        let file: File = serde_json::from_slice(bytes).map_err(|error| refused(error.to_string()))?;
        let settings = file.settings().map_err(refused)?;
        Self::new(file.tokens().map_err(refused)?, settings)
    }

    /// Reads `vocab.txt`: one token a line, in the order of the ids.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when it is not UTF-8 or no vocabulary.
    pub fn from_vocabulary_text(bytes: &[u8], settings: WordPieceSettings) -> Result<Self, ModelError> {
        let text = str::from_utf8(bytes).map_err(|error| ModelError::Tokenizer {
            reason: format!("the vocabulary is not UTF-8: {error}"),
        })?;
        Self::new(text.lines().map(|line| line.trim_end().to_owned()).collect(), settings)
    }

    /// `[CLS]`, the ids of the text, `[SEP]`; at most `length_max` ids, the text's end is cut off.
    ///
    /// The text is nothing but text: what looks like a control token is cut like any word, as transformers does
    /// with `split_special_tokens`.
    ///
    /// # Panics
    /// When `length_max` leaves no room for the two.
    #[must_use]
    pub fn encode(&self, text: &str, length_max: usize) -> Vec<u32> {
        assert!(length_max >= 2, "a sequence holds at least [CLS] and [SEP]");
        let mut ids = vec![self.inner.opening];
        for word in self.words(text) {
            let pieces = self.inner.pieces.tokenize(&word).expect("an unknown word has its token");
            ids.extend(pieces.into_iter().map(|piece| piece.id));
            if ids.len() >= length_max {
                break;
            }
        }
        ids.truncate(length_max - 1);
        ids.push(self.inner.closing);
        ids
    }

    /// Each token's text, by id.
    #[must_use]
    pub fn tokens(&self) -> &[String] {
        &self.inner.tokens
    }

    /// How text is cleaned.
    #[must_use]
    pub fn settings(&self) -> WordPieceSettings {
        self.inner.settings
    }

    /// The id of a token by its text in the vocabulary.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.pieces.token_to_id(token)
    }

    fn words(&self, text: &str) -> Vec<String> {
        let mut text = NormalizedString::from(text);
        self.inner.normalizer.normalize(&mut text).expect("cleaning takes any text");
        let mut text = PreTokenizedString::from(text);
        BertPreTokenizer.pre_tokenize(&mut text).expect("cutting takes any text");
        let words = text.get_splits(OffsetReferential::Normalized, OffsetType::None);
        words.into_iter().map(|(word, ..)| word.to_owned()).filter(|word| !word.is_empty()).collect()
    }
}

impl fmt::Debug for WordPieceTokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WordPieceTokenizer({} tokens)", self.tokens().len())
    }
}

/// The parts of tokenizer.json that decide the ids.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Normalization>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    model: Pieces,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct Normalization {
    #[serde(rename = "type")]
    kind: String,
    clean_text: Option<bool>,
    handle_chinese_chars: Option<bool>,
    strip_accents: Option<bool>,
    lowercase: Option<bool>,
}

#[derive(Deserialize)]
struct Pieces {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    vocab: std::collections::BTreeMap<String, u32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    max_input_chars_per_word: Option<usize>,
}

impl File {
    fn settings(&self) -> Result<WordPieceSettings, String> {
        let is = |value: &Option<Value>, names: &[&str]| {
            let found = value.as_ref().and_then(|value| value["type"].as_str());
            found.is_some_and(|found| names.contains(&found))
        };
        let Some(cleaning) = &self.normalizer else {
            return Err("normalizer must be BertNormalizer".to_owned());
        };
        let model = &self.model;
        let rules = [
            (cleaning.kind == "BertNormalizer", "normalizer must be BertNormalizer"),
            (cleaning.clean_text.unwrap_or(true), "clean_text must be true"),
            (is(&self.pre_tokenizer, &["BertPreTokenizer"]), "pre_tokenizer must be BertPreTokenizer"),
            (
                is(&self.post_processor, &["BertProcessing", "TemplateProcessing"]),
                "post_processor must be BertProcessing or TemplateProcessing",
            ),
            (model.kind.as_deref().is_none_or(|kind| kind == "WordPiece"), "model must be WordPiece"),
            (model.unk_token.as_deref().is_none_or(|token| token == UNKNOWN), "unk_token must be [UNK]"),
            (
                model.continuing_subword_prefix.as_deref().is_none_or(|prefix| prefix == CONTINUATION),
                "continuing_subword_prefix must be ##",
            ),
            (
                model.max_input_chars_per_word.is_none_or(|most| most == WORD_CHARS_MAX),
                "max_input_chars_per_word must be 100",
            ),
        ];
        if let Some((_, rule)) = rules.iter().find(|(holds, _)| !holds) {
            return Err((*rule).to_owned());
        }
        self.check_template()?;
        let lowercase = cleaning.lowercase.unwrap_or(true);
        Ok(WordPieceSettings {
            lowercase,
            strip_accents: cleaning.strip_accents.unwrap_or(lowercase),
            split_chinese: cleaning.handle_chinese_chars.unwrap_or(true),
        })
    }

    /// A template may put anything around a text; only `[CLS] text [SEP]` is known.
    fn check_template(&self) -> Result<(), String> {
        let Some(template) =
            self.post_processor.as_ref().and_then(|processor| processor["single"].as_array())
        else {
            return Ok(());
        };
        let name = |part: &Value| {
            let special = part["SpecialToken"]["id"].as_str();
            special.or_else(|| part["Sequence"]["id"].as_str()).unwrap_or_default().to_owned()
        };
        let names: Vec<String> = template.iter().map(name).collect();
        if names == [OPENING, "A", CLOSING] {
            return Ok(());
        }
        Err(format!("post_processor must put a text between {OPENING} and {CLOSING}, found {names:?}"))
    }

    fn tokens(self) -> Result<Vec<String>, String> {
        // Ids without a gap are below the number of entries.
        let mut slots = vec![None; self.model.vocab.len() + self.added_tokens.len()];
        let added = self.added_tokens.into_iter().map(|token| {
            let known = CONTROL.contains(&token.content.as_str());
            (token.content, token.id, known)
        });
        for (token, id, known) in
            self.model.vocab.into_iter().map(|(token, id)| (token, id, true)).chain(added)
        {
            if !known {
                return Err(format!("added token {token:?} is none of {CONTROL:?}"));
            }
            match slots.get_mut(id as usize) {
                Some(slot @ None) => *slot = Some(token),
                Some(Some(found)) if *found == token => {}
                Some(Some(found)) => return Err(format!("id {id} is both {found:?} and {token:?}")),
                None => return Err(format!("id {id} of {token:?} leaves a gap")),
            }
        }
        while slots.pop_if(|slot| slot.is_none()).is_some() {}
        slots.into_iter().collect::<Option<_>>().ok_or_else(|| "ids have a gap".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::encoder::fixtures::tiny_tokenizer;

    fn file() -> Value {
        let tokenizer = tiny_tokenizer();
        let vocabulary: serde_json::Map<String, Value> =
            tokenizer.tokens().iter().cloned().zip((0..).map(|id: u32| json!(id))).collect();
        let special = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
        json!({
            "added_tokens": [{"id": tokenizer.token_id("[CLS]"), "content": "[CLS]", "special": true}],
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                           "strip_accents": null, "lowercase": true},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "TemplateProcessing",
                               "single": [special("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, special("[SEP]")]},
            "model": {"type": "WordPiece", "vocab": vocabulary, "unk_token": "[UNK]",
                      "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        })
    }

    #[test]
    fn comes_back_from_its_files() {
        let expected = tiny_tokenizer();
        let from_json = WordPieceTokenizer::from_json(file().to_string().as_bytes()).unwrap();
        let text = expected.tokens().join("\n") + "\n";
        let from_text =
            WordPieceTokenizer::from_vocabulary_text(text.as_bytes(), WordPieceSettings::default()).unwrap();
        for found in [from_json, from_text] {
            assert_eq!(found.tokens(), expected.tokens());
            assert_eq!(found.settings(), expected.settings());
            assert_eq!(found.encode("The king, my lord", 64), expected.encode("The king, my lord", 64));
        }
    }

    #[test]
    fn refuses_settings_that_change_the_ids() {
        let check = |pointer: &str, value: Value, expected: &str| {
            let mut file = file();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            file.pointer_mut(parent).unwrap()[key] = value;
            let error = WordPieceTokenizer::from_json(file.to_string().as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("/normalizer", Value::Null, "normalizer");
        check("/normalizer/clean_text", json!(false), "clean_text");
        check("/pre_tokenizer/type", json!("Whitespace"), "pre_tokenizer");
        check("/post_processor", Value::Null, "post_processor");
        check("/post_processor/single", json!([{"Sequence": {"id": "A"}}]), "between [CLS] and [SEP]");
        check("/model/type", json!("BPE"), "model must be WordPiece");
        check("/model/continuing_subword_prefix", json!("@@"), "##");
        check("/model/max_input_chars_per_word", json!(5), "100");
        check("/model/vocab/extra", json!(7), "both");
        check("/model/vocab/extra", json!(4_000_000_000u32), "gap");
        check("/added_tokens", json!([{"id": 500, "content": "<user>"}]), "added token");
        let error = WordPieceTokenizer::new(
            vec!["[CLS]".to_owned(), "[SEP]".to_owned()],
            WordPieceSettings::default(),
        );
        assert!(error.unwrap_err().to_string().contains("[UNK]"));
        assert!(
            WordPieceTokenizer::from_vocabulary_text(
                b"[UNK]\n[CLS]\n[SEP]\na\na",
                WordPieceSettings::default()
            )
            .is_err()
        );
    }

    #[test]
    fn a_long_text_keeps_its_closing_token() {
        let tokenizer = tiny_tokenizer();
        let whole = tokenizer.encode("the king of the king of the king", 64);
        for most in 2..whole.len() + 2 {
            let ids = tokenizer.encode("the king of the king of the king", most);
            assert_eq!(ids.len(), most.min(whole.len()));
            assert_eq!(ids.last(), whole.last());
            assert_eq!(ids[..ids.len() - 1], whole[..ids.len() - 1]);
        }
    }

    #[test]
    fn a_text_cannot_hold_control_tokens() {
        let tokenizer = tiny_tokenizer();
        let closing = tokenizer.token_id("[SEP]").unwrap();
        let ids = tokenizer.encode("a [SEP] b", 64);
        assert_eq!(ids.iter().filter(|id| **id == closing).count(), 1);
    }
}
