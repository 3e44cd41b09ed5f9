//! Text to token ids and back: byte-level BPE as SmolLM2 and Qwen use it, and SentencePiece's BPE. Control tokens are
//! split off here; of the text between them byte-level BPE is cut into words and merged by `tokenizers`, SentencePiece is
//! in `tokenizer/sentence_piece.rs`. Where vocabularies come from is in `tokenizer/` (GGUF metadata, tokenizer.json,
//! training).

mod from_gguf;
mod from_json;
mod sentence_piece;
mod train;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, OnceLock};

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    Model as _, NormalizedString, Normalizer as _, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer as _, SplitDelimiterBehavior,
};

use crate::error::ModelError;
pub use from_json::TokenRoles;
use sentence_piece::SentencePiece;
pub use train::{SpecialTokens, train_bpe};

/// Qwen2's pattern of words.
const QWEN2_PATTERN: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// Turns text into ids and ids into text. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    vocabulary: Vocabulary,
    cutter: Cutter,
    /// Tokens that are found in the text before it is cut into words: by first byte, then longest first.
    whole: Vec<Vec<(String, u32)>>,
}

/// What makes ids of the text between control tokens.
enum Cutter {
    ByteLevel { bpe: Box<BPE>, words: Sequence, normalizes: bool },
    Pieces(Box<SentencePiece>),
}

/// How a vocabulary is applied to text.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Method {
    /// Byte-level BPE of words that are cut by GPT-2's pattern, every digit alone: `smollm` in GGUF files.
    #[default]
    SmolLm,
    /// Byte-level BPE of words that are cut by Qwen2's pattern, after Unicode normalization C: `qwen2` in GGUF files.
    /// llama.cpp leaves the normalization out, which shows in text that is not normalized already.
    Qwen2,
    /// SentencePiece's BPE with byte tokens: `llama` in GGUF files.
    SentencePiece {
        /// By id; neighbours that make the piece of the highest score are joined first.
        scores: Vec<f32>,
        /// Whether a space is put before text, at its beginning and behind control tokens.
        add_space_prefix: bool,
    },
}

/// What a tokenizer is made of, in the terms of its file formats.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Vocabulary {
    /// How it is applied to text.
    pub method: Method,
    /// Each token's text: in byte-level BPE bytes as GPT-2's printable characters, in SentencePiece spaces as U+2581,
    /// control tokens as they are. By id.
    pub tokens: Vec<String>,
    /// What each token is. By id.
    pub kinds: Vec<TokenKind>,
    /// Pairs of token texts in the order in which they are merged; none for SentencePiece.
    pub merges: Vec<(String, String)>,
    /// Token that opens a sequence.
    pub bos: Option<u32>,
    /// Token that ends an answer.
    pub eos: Option<u32>,
    /// Token that stands for what cannot be encoded; kept for other readers of the file.
    pub unknown: Option<u32>,
    /// Token that fills batches; kept for other readers of the file.
    pub padding: Option<u32>,
    /// Whether a sequence starts with `bos`.
    pub add_bos: bool,
    /// Whether a sequence ends with `eos`.
    pub add_eos: bool,
}

/// What a token is; numbers as in GGUF's `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// Made of bytes by merging.
    Normal = 1,
    /// Stands for what cannot be encoded.
    Unknown = 2,
    /// Steers the model and is no part of the text.
    Control = 3,
    /// Text that is always one token.
    UserDefined = 4,
    /// Fills the vocabulary.
    Unused = 5,
    /// A single raw byte.
    Byte = 6,
}

impl Tokenizer {
    /// Assembles a tokenizer, after checking that ids, kinds and merges agree.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] names what does not agree.
    pub fn new(vocabulary: Vocabulary) -> Result<Self, ModelError> {
        vocabulary.check().map_err(|reason| ModelError::Tokenizer { reason })?;
        let whole = vocabulary.whole_tokens();
        let cutter = vocabulary.cutter().map_err(|reason| ModelError::Tokenizer { reason })?;
        Ok(Self { inner: Arc::new(Inner { vocabulary, cutter, whole }) })
    }

    /// With unused tokens up to that size, as llama.cpp's converter fills a vocabulary that is smaller than its model's
    /// embedding; itself if there is nothing to fill.
    pub(crate) fn padded(self, vocab_size: usize) -> Result<Self, ModelError> {
        if self.vocab_size() >= vocab_size {
            return Ok(self);
        }
        let mut vocabulary = self.vocabulary().clone();
        vocabulary.tokens.extend((self.vocab_size()..vocab_size).map(|id| format!("[PAD{id}]")));
        vocabulary.kinds.resize(vocab_size, TokenKind::Unused);
        if let Method::SentencePiece { scores, .. } = &mut vocabulary.method {
            scores.resize(vocab_size, 0.0);
        }
        Self::new(vocabulary)
    }

    /// The ids of a text in which control tokens are recognized. With `add_special`, the model's opening and
    /// closing tokens are added if its file asks for them.
    #[must_use]
    pub fn encode(&self, text: &str, add_special: bool) -> Vec<u32> {
        let Vocabulary { bos, eos, add_bos, add_eos, .. } = self.vocabulary();
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        ids.extend(bos.filter(|_| add_special && *add_bos));
        self.encode_between(text, |_| true, &mut ids);
        ids.extend(eos.filter(|_| add_special && *add_eos));
        ids
    }

    /// The ids of a text that is nothing but text: what looks like a control token is spelt out, so a user's
    /// words cannot steer the model.
    #[must_use]
    pub fn encode_ordinary(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        match &self.inner.cutter {
            Cutter::ByteLevel { .. } => self.encode_words(text, &mut ids),
            // SentencePiece's own user-defined pieces are text.
            Cutter::Pieces(_) => self.encode_between(text, |kind| kind == TokenKind::UserDefined, &mut ids),
        }
        ids
    }

    /// The text of ids, without control tokens; bytes that are no UTF-8 become U+FFFD, ids beyond the
    /// vocabulary nothing.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).collect();
        let bytes = match &self.vocabulary().method {
            Method::SentencePiece { add_space_prefix: true, .. } => {
                bytes.strip_prefix(b" ").unwrap_or(&bytes)
            }
            Method::SentencePiece { .. } | Method::SmolLm | Method::Qwen2 => &bytes,
        };
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// The bytes one id stands for in a text (perhaps a part of a character): none for control tokens.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let vocabulary = self.vocabulary();
        let Some(token) = vocabulary.tokens.get(id as usize) else { return Vec::new() };
        let kind = vocabulary.kinds[id as usize];
        if let Cutter::Pieces(_) = self.inner.cutter {
            return sentence_piece::token_bytes(token, kind);
        }
        match kind {
            TokenKind::Control | TokenKind::Unknown | TokenKind::Unused => Vec::new(),
            TokenKind::UserDefined => token.as_bytes().to_vec(),
            TokenKind::Normal | TokenKind::Byte => token.chars().flat_map(byte_of).collect(),
        }
    }

    /// The id of a token by its text in the vocabulary, as in `<|im_end|>`.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        match &self.inner.cutter {
            Cutter::ByteLevel { bpe, .. } => bpe.token_to_id(token),
            Cutter::Pieces(pieces) => pieces.id(token),
        }
    }

    /// Token that ends an answer.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.vocabulary().eos
    }

    /// Token that opens a sequence.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.vocabulary().bos
    }

    /// How many ids there are.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocabulary().tokens.len()
    }

    /// What the tokenizer is made of.
    #[must_use]
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.inner.vocabulary
    }

    /// The first token in the text that is to stay whole: where, its text, its id.
    pub(crate) fn next_whole(&self, text: &str) -> Option<(usize, &str, u32)> {
        self.next_whole_of(text, |_| true)
    }

    fn next_whole_of(&self, text: &str, is_meant: impl Fn(TokenKind) -> bool) -> Option<(usize, &str, u32)> {
        let Inner { vocabulary, whole, .. } = &*self.inner;
        text.bytes().enumerate().find_map(|(at, byte)| {
            let found = whole[usize::from(byte)].iter().find(|(token, id)| {
                is_meant(vocabulary.kinds[*id as usize])
                    && text.as_bytes()[at..].starts_with(token.as_bytes())
            })?;
            Some((at, found.0.as_str(), found.1))
        })
    }

    /// Keeps the tokens of those kinds whole.
    fn encode_between(&self, text: &str, is_meant: impl Fn(TokenKind) -> bool, ids: &mut Vec<u32>) {
        let mut rest = text;
        while let Some((at, token, id)) = self.next_whole_of(rest, &is_meant) {
            self.encode_words(&rest[..at], ids);
            ids.push(id);
            rest = &rest[at + token.len()..];
        }
        self.encode_words(rest, ids);
    }

    /// A word that occurs again is looked up among those of this text.
    fn encode_words(&self, text: &str, ids: &mut Vec<u32>) {
        let (bpe, words) = match &self.inner.cutter {
            Cutter::Pieces(pieces) => return pieces.encode(text, ids),
            Cutter::ByteLevel { bpe, words, normalizes: true } if !text.is_ascii() => {
                let mut text = NormalizedString::from(text);
                NFC.normalize(&mut text).expect("normalization C cannot fail on any text");
                (bpe, cut_words(words, text.get()))
            }
            Cutter::ByteLevel { bpe, words, .. } => (bpe, cut_words(words, text)),
        };
        let mut known: HashMap<&str, Vec<u32>> = HashMap::new();
        for word in &words {
            ids.extend_from_slice(known.entry(word).or_insert_with(|| word_ids(bpe, word)));
        }
    }
}

fn word_ids(bpe: &BPE, word: &str) -> Vec<u32> {
    let tokens = bpe.tokenize(word).expect("BPE without dropout or unknown token cannot fail");
    tokens.into_iter().map(|token| token.id).collect()
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({} tokens)", self.vocab_size())
    }
}

impl Vocabulary {
    fn check(&self) -> Result<(), String> {
        let count = self.tokens.len();
        if self.kinds.len() != count {
            return Err(format!("{count} tokens, but {} kinds", self.kinds.len()));
        }
        let mut seen = HashSet::with_capacity(count);
        for (id, token) in self.tokens.iter().enumerate() {
            if token.is_empty() || !seen.insert(token.as_str()) {
                return Err(format!("token {id} is empty or a repetition of another"));
            }
        }
        let mut joined = String::new();
        for (rank, (left, right)) in self.merges.iter().enumerate() {
            joined.clear();
            joined.extend([left.as_str(), right]);
            if ![left.as_str(), right, &joined].iter().all(|part| seen.contains(part)) {
                return Err(format!("merge {rank} is not made of tokens of the vocabulary"));
            }
        }
        let named =
            [("bos", self.bos), ("eos", self.eos), ("unknown", self.unknown), ("padding", self.padding)];
        match named.iter().find(|(_, id)| id.is_some_and(|id| id as usize >= count)) {
            Some((name, _)) => Err(format!("{name} token is beyond the vocabulary")),
            None => Ok(()),
        }
    }

    fn whole_tokens(&self) -> Vec<Vec<(String, u32)>> {
        let mut whole = vec![Vec::new(); 256];
        for (id, (token, kind)) in (0..).zip(self.tokens.iter().zip(&self.kinds)) {
            match kind {
                TokenKind::Control | TokenKind::UserDefined | TokenKind::Unknown => {
                    whole[usize::from(token.as_bytes()[0])].push((token.clone(), id));
                }
                TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => (),
            }
        }
        whole.iter_mut().for_each(|group| group.sort_by_key(|(token, _)| std::cmp::Reverse(token.len())));
        whole
    }

    fn cutter(&self) -> Result<Cutter, String> {
        let (words, normalizes) = match &self.method {
            Method::SmolLm => (word_cutter(), false),
            Method::Qwen2 => (qwen2_cutter(), true),
            Method::SentencePiece { scores, add_space_prefix } => {
                let pieces = SentencePiece::new(self, scores, *add_space_prefix)?;
                return Ok(Cutter::Pieces(Box::new(pieces)));
            }
        };
        Ok(Cutter::ByteLevel { bpe: Box::new(self.bpe()?), words, normalizes })
    }

    fn bpe(&self) -> Result<BPE, String> {
        let ids: Vocab = self.tokens.iter().cloned().zip(0..).collect();
        // Its own cache would keep the words of users' texts in every thread, even after the tokenizer is gone.
        let builder = BPE::builder().vocab_and_merges(ids, self.merges.clone()).cache_capacity(0);
        builder.build().map_err(|error| error.to_string())
    }
}

impl TokenKind {
    /// The kind of that number.
    #[must_use]
    pub fn from_number(number: i64) -> Option<Self> {
        let all = [Self::Normal, Self::Unknown, Self::Control, Self::UserDefined, Self::Unused, Self::Byte];
        all.into_iter().find(|&kind| kind as i64 == number)
    }
}

/// [`Method::SmolLm`]: this order, these settings; a single ByteLevel (as in GPT-2) or another pattern gives
/// other ids around digits.
fn word_cutter() -> Sequence {
    Sequence::new(vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()])
}

/// [`Method::Qwen2`].
fn qwen2_cutter() -> Sequence {
    let pattern = SplitPattern::Regex(QWEN2_PATTERN.to_owned());
    let split =
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).expect("a fixed pattern is well formed");
    Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()])
}

/// The words of a text, bytes as printable characters.
fn cut_words(cutter: &Sequence, text: &str) -> Vec<String> {
    let mut text = PreTokenizedString::from(text);
    cutter.pre_tokenize(&mut text).expect("digits and a fixed pattern cannot fail on any text");
    let splits = text.get_splits(OffsetReferential::Original, OffsetType::None);
    splits.into_iter().map(|(word, _, _)| word.to_owned()).collect()
}

/// The byte that GPT-2's alphabet writes as this character.
fn byte_of(character: char) -> Option<u8> {
    static BYTES: OnceLock<Vec<Option<u8>>> = OnceLock::new();
    let bytes = BYTES.get_or_init(|| {
        let mut bytes = vec![None; 256 + 256];
        byte_alphabet().zip(0..=u8::MAX).for_each(|(character, byte)| bytes[character as usize] = Some(byte));
        bytes
    });
    bytes.get(character as usize).copied().flatten()
}

/// GPT-2's characters for the bytes 0 to 255: a printable Latin-1 character is itself, the others are
/// U+0100 and up, in order.
fn byte_alphabet() -> impl Iterator<Item = char> {
    let mut next = '\u{100}'..;
    (0..=u8::MAX).map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0..=b' ' | 0x7f..=0xa0 | 0xad => next.next().unwrap_or_default(),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) use super::from_json::tests::tiny_json;

    /// 3 control tokens, the 256 bytes and a few merges.
    pub(crate) fn tiny_tokenizer() -> Tokenizer {
        let text = "the theatre of the weather, then there; 1234 other mothers gather the feathers. ";
        let texts = std::iter::repeat_n(text.to_owned(), 4);
        train_bpe(texts, 288, &SpecialTokens::default()).unwrap()
    }

    #[test]
    fn the_alphabet_is_that_of_byte_level() {
        let ours: HashSet<char> = byte_alphabet().collect();
        let theirs: HashSet<char> = ByteLevel::alphabet().into_iter().collect();
        assert_eq!(ours, theirs);
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of('a'), Some(b'a'));
        assert_eq!(byte_of('€'), None);
    }

    #[test]
    fn control_tokens_are_found_or_spelt_out() {
        let tokenizer = tiny_tokenizer();
        let text = "<|im_start|>the<|im_end|>";
        let ids = tokenizer.encode(text, false);
        assert_eq!((ids[0], ids[ids.len() - 1]), (1, 2));
        assert_eq!(tokenizer.decode(&ids), "the");
        let spelt = tokenizer.encode_ordinary(text);
        assert!(spelt.iter().all(|&id| id > 2));
        assert_eq!(tokenizer.decode(&spelt), text);
    }

    #[test]
    fn opening_and_closing_tokens_come_only_when_asked_for() {
        let mut vocabulary = tiny_tokenizer().vocabulary().clone();
        (vocabulary.add_bos, vocabulary.add_eos) = (true, true);
        let tokenizer = Tokenizer::new(vocabulary).unwrap();
        assert_eq!(tokenizer.encode("", true), [tokenizer.bos().unwrap(), tokenizer.eos().unwrap()]);
        assert!(tokenizer.encode("", false).is_empty());
    }

    #[test]
    fn refuses_vocabularies_that_do_not_agree() {
        let check = |expected: &str, spoil: fn(&mut Vocabulary)| {
            let mut vocabulary = tiny_tokenizer().vocabulary().clone();
            spoil(&mut vocabulary);
            let error = Tokenizer::new(vocabulary).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("kinds", |vocabulary| _ = vocabulary.kinds.pop());
        check("token 9", |vocabulary| vocabulary.tokens[9] = vocabulary.tokens[8].clone());
        check("token 0", |vocabulary| vocabulary.tokens[0].clear());
        check("merge 1", |vocabulary| vocabulary.merges[1].0 = "zzz".to_owned());
        check("merge 0", |vocabulary| vocabulary.merges[0] = ("a".to_owned(), "Z".to_owned()));
        check("eos", |vocabulary| vocabulary.eos = Some(288));
    }

    #[test]
    fn unknown_ids_decode_to_nothing() {
        assert_eq!(tiny_tokenizer().decode(&[u32::MAX, 0, 288]), "");
    }

    /// Ids that llama.cpp gives, control tokens recognized.
    #[test]
    fn ids_of_smollm2_are_those_of_llama_cpp() {
        #[derive(serde::Deserialize)]
        struct Reference {
            samples: Vec<Sample>,
        }
        #[derive(serde::Deserialize)]
        struct Sample {
            text: String,
            ids: Vec<u32>,
        }
        let Some(base) = crate::reference::smollm2() else { return };
        let reference: Reference =
            serde_json::from_str(include_str!("../data/reference/smollm2_tokens.json")).unwrap();
        assert_eq!(reference.samples.len(), 396);
        for Sample { text, ids } in reference.samples {
            assert_eq!(base.tokenizer.encode(&text, true), ids, "{text:?}");
            let ordinary = base.tokenizer.encode_ordinary(&text);
            assert_eq!(base.tokenizer.decode(&ordinary), text);
        }
    }

    proptest! {
        #[test]
        fn any_text_comes_back(text in any::<String>()) {
            static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
            let tokenizer = TOKENIZER.get_or_init(tiny_tokenizer);
            prop_assert_eq!(tokenizer.decode(&tokenizer.encode_ordinary(&text)), text);
        }
    }
}
