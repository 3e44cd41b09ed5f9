//! The tokenizer of a Hugging Face folder: `tokenizer.json`, with the special tokens' roles from the files
//! beside it. Every setting that would change the ids is read and refused unless it is the supported one.

use serde::Deserialize;
use serde_json::{Value, json};

use super::sentence_piece::{SPACE, byte_of, scores_of_merges};
use super::{Method, QWEN2_PATTERN, TokenKind, Tokenizer, Vocabulary};
use crate::error::ModelError;

/// What the folder's other files say about special tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenRoles {
    /// `bos_token_id` of config.json.
    pub bos: Option<u32>,
    /// `eos_token_id` of config.json.
    pub eos: Option<u32>,
    /// `pad_token_id` of config.json.
    pub padding: Option<u32>,
    /// `add_bos_token` of tokenizer_config.json.
    pub add_bos: bool,
    /// `add_eos_token` of tokenizer_config.json.
    pub add_eos: bool,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    model: Bpe,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

#[derive(Deserialize)]
struct Bpe {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    vocab: std::collections::BTreeMap<String, u32>,
    merges: Vec<Merge>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// Older files join the two parts with a space.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Joined(String),
}

impl Tokenizer {
    /// Reads `tokenizer.json`.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the file is not such a tokenizer or has a setting that is not supported.
    pub fn from_json(bytes: &[u8], roles: &TokenRoles) -> Result<Self, ModelError> {
        let refused = |reason| ModelError::Tokenizer { reason };
        let file: File = serde_json::from_slice(bytes).map_err(|error| refused(error.to_string()))?;
        let form = file.form().map_err(refused)?;
        Self::new(file.into_vocabulary(form, roles).map_err(refused)?)
    }
}

/// Which of the known kinds of tokenizer a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    SmolLm,
    Qwen2,
    SentencePiece { add_space_prefix: bool },
}

impl File {
    fn form(&self) -> Result<Form, String> {
        let form = match (&self.normalizer, &self.pre_tokenizer) {
            (None, Some(words)) if is_smollm(words) => Form::SmolLm,
            (Some(normalizer), Some(words))
                if has(normalizer, &json!({"type": "NFC"})) && is_qwen2(words) =>
            {
                Form::Qwen2
            }
            (Some(normalizer), words) if words.as_ref().is_none_or(splits_spaces) => {
                let add_space_prefix = writes_spaces(normalizer).ok_or(FORMS)?;
                Form::SentencePiece { add_space_prefix }
            }
            _ => return Err(FORMS.to_owned()),
        };
        let falls_back = matches!(form, Form::SentencePiece { .. });
        self.check(falls_back).map(|()| form)
    }

    fn check(&self, falls_back: bool) -> Result<(), String> {
        let plain = |text: &Option<String>| text.as_deref().unwrap_or_default().is_empty();
        let rules = [
            (self.model.kind.as_deref().is_none_or(|kind| kind == "BPE"), "model must be BPE"),
            (self.model.dropout.is_none_or(|dropout| dropout == 0.0), "dropout must be null"),
            (plain(&self.model.continuing_subword_prefix), "continuing_subword_prefix must be empty"),
            (plain(&self.model.end_of_word_suffix), "end_of_word_suffix must be empty"),
            (
                self.model.byte_fallback == falls_back,
                "byte_fallback must be true for pieces with U+2581, else false",
            ),
            (!self.model.ignore_merges, "ignore_merges must be false"),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err((*rule).to_owned()),
            None => Ok(()),
        }
    }

    fn into_vocabulary(self, form: Form, roles: &TokenRoles) -> Result<Vocabulary, String> {
        let is_pieces = matches!(form, Form::SentencePiece { .. });
        let unknown_token = self.model.unk_token.filter(|_| is_pieces);
        // Ids without a gap are below the number of entries.
        let mut slots = vec![None; self.model.vocab.len() + self.added_tokens.len()];
        for (token, id) in self.model.vocab {
            let is_byte = is_pieces && byte_of(&token).is_some();
            place(&mut slots, id, token, if is_byte { TokenKind::Byte } else { TokenKind::Normal })?;
        }
        for added in self.added_tokens {
            if added.lstrip || added.rstrip || added.single_word {
                return Err(format!(
                    "token {:?}: lstrip, rstrip and single_word are not supported",
                    added.content
                ));
            }
            let kind = match () {
                () if unknown_token.as_ref() == Some(&added.content) => TokenKind::Unknown,
                () if added.special => TokenKind::Control,
                () => TokenKind::UserDefined,
            };
            place(&mut slots, added.id, added.content, kind)?;
        }
        let gap = || "ids have a gap".to_owned();
        while slots.pop_if(|slot| slot.is_none()).is_some() {}
        let (tokens, kinds): (Vec<String>, Vec<_>) =
            slots.into_iter().collect::<Option<Vec<_>>>().ok_or_else(gap)?.into_iter().unzip();
        let mut merges = self.model.merges.into_iter().map(Merge::parts).collect::<Result<Vec<_>, _>>()?;
        let method = match form {
            Form::SmolLm => Method::SmolLm,
            Form::Qwen2 => Method::Qwen2,
            Form::SentencePiece { add_space_prefix } => {
                let scores = scores_of_merges(&tokens, &kinds, &std::mem::take(&mut merges))?;
                Method::SentencePiece { scores, add_space_prefix }
            }
        };
        let unknown = unknown_token.and_then(|token| tokens.iter().position(|known| *known == token));
        Ok(Vocabulary {
            method,
            tokens,
            kinds,
            merges,
            bos: roles.bos,
            eos: roles.eos,
            unknown: unknown.map(|id| id as u32),
            padding: roles.padding,
            add_bos: roles.add_bos,
            add_eos: roles.add_eos,
        })
    }
}

fn place(
    slots: &mut [Option<(String, TokenKind)>],
    id: u32,
    token: String,
    kind: TokenKind,
) -> Result<(), String> {
    let entries = slots.len();
    let Some(slot) = slots.get_mut(id as usize) else {
        return Err(format!("id {id} of {token:?} is beyond the {entries} entries"));
    };
    match slot {
        Some((other, _)) if *other != token => Err(format!("id {id} is both {other:?} and {token:?}")),
        Some(_) | None => {
            *slot = Some((token, kind));
            Ok(())
        }
    }
}

impl Merge {
    fn parts(self) -> Result<(String, String), String> {
        match self {
            Self::Pair(left, right) => Ok((left, right)),
            Self::Joined(text) => match text.split_once(' ') {
                Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
                None => Err(format!("merge {text:?} has no space between its parts")),
            },
        }
    }
}

/// What other pairs of normalizer and pre_tokenizer are answered.
const FORMS: &str = "normalizer and pre_tokenizer must be null and digits, then byte level (as SmolLM2); NFC and Qwen2's \
                     pattern, then byte level; or spaces written as U+2581 and nothing (as Gemma)";

fn has(value: &Value, fields: &Value) -> bool {
    fields.as_object().is_some_and(|fields| fields.iter().all(|(key, field)| value.get(key) == Some(field)))
}

/// Whether the settings are those of `qwen2_cutter`.
fn is_qwen2(value: &Value) -> bool {
    let split = json!({"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
    match value.get("pretokenizers").and_then(Value::as_array).map(Vec::as_slice) {
        Some([first, second]) => has(first, &split) && has(second, &bytes),
        Some(_) | None => false,
    }
}

/// Whether a normalizer writes spaces as U+2581 and does nothing else, but perhaps put one before the text: then true.
fn writes_spaces(value: &Value) -> Option<bool> {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let prepend = json!({"type": "Prepend", "prepend": SPACE});
    match value.get("normalizers").and_then(Value::as_array).map(Vec::as_slice) {
        None => has(value, &replace).then_some(false),
        Some([first, second]) => (has(first, &prepend) && has(second, &replace)).then_some(true),
        Some(_) => None,
    }
}

/// Gemma's cutting at spaces, of which none is left where it stands.
fn splits_spaces(value: &Value) -> bool {
    has(value, &json!({"type": "Split", "pattern": {"String": " "}}))
}

/// Whether the settings are those of `word_cutter`; `trim_offsets` changes no ids.
fn is_smollm(value: &Value) -> bool {
    let digits = json!({"type": "Digits", "individual_digits": true});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false});
    let parts = value.get("pretokenizers").and_then(Value::as_array);
    let regex = |part: &Value| part.get("use_regex").is_none_or(|on| on == &json!(true));
    match parts.map(Vec::as_slice) {
        Some([first, second]) => has(first, &digits) && has(second, &bytes) && regex(second),
        Some(_) | None => false,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::tests::tiny_tokenizer;
    use super::*;

    /// tokenizer.json of the tests' tokenizer.
    pub(crate) fn tiny_json() -> Value {
        let vocabulary = tiny_tokenizer().vocabulary().clone();
        let vocab: serde_json::Map<String, Value> =
            vocabulary.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
        let added = |id: u32| json!({"id": id, "content": vocabulary.tokens[id as usize], "special": true});
        json!({
            "version": "1.0",
            "added_tokens": [added(0), added(1), added(2)],
            "normalizer": null,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
            ]},
            "model": {"type": "BPE", "dropout": null, "vocab": vocab, "merges": vocabulary.merges},
        })
    }

    fn read(json: &Value) -> Result<Tokenizer, ModelError> {
        let roles = TokenRoles { bos: Some(1), eos: Some(2), ..TokenRoles::default() };
        Tokenizer::from_json(json.to_string().as_bytes(), &roles)
    }

    #[test]
    fn reads_both_spellings_of_merges() {
        let mut json = tiny_json();
        assert_eq!(read(&json).unwrap().vocabulary(), tiny_tokenizer().vocabulary());
        let merges = tiny_tokenizer().vocabulary().merges.clone();
        json["model"]["merges"] = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
        assert_eq!(read(&json).unwrap().vocabulary(), tiny_tokenizer().vocabulary());
    }

    #[test]
    fn refuses_settings_that_would_change_ids() {
        let check = |pointer: &str, value: Value, expected: &str| {
            let mut json = tiny_json();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            json.pointer_mut(parent).unwrap()[key] = value;
            let error = read(&json).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("/normalizer", json!({"type": "NFC"}), "normalizer and pre_tokenizer");
        check("/pre_tokenizer", json!({"type": "ByteLevel"}), "pre_tokenizer");
        check("/model/type", json!("Unigram"), "model");
        check("/model/ignore_merges", json!(true), "ignore_merges");
        check("/model/merges", json!(["ab"]), "no space");
        check("/model/vocab", json!({"a": 4_000_000_000u32}), "beyond");
        check("/model/vocab", json!({"<|endoftext|>": 0, "a": 4}), "gap");
        let error = Tokenizer::from_json(b"{}", &TokenRoles::default()).unwrap_err();
        assert!(error.to_string().contains("model"), "{error}");
    }
}
