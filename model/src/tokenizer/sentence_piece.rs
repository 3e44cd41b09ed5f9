//! SentencePiece's BPE (Kudo and Richardson 2018): a text is its characters, spaces written as U+2581; of all neighbours
//! that make a piece together, those of the highest score are joined, the leftmost first, until none do; a character that
//! is no piece becomes its bytes. Scores decide rather than a list of merges, as in SentencePiece itself and in llama.cpp.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::{TokenKind, Vocabulary};

/// What stands for a space in pieces.
pub(super) const SPACE: char = '\u{2581}';

/// Longer pieces are no words of any language, and checking them takes the square of their length.
const PIECE_BYTES_MAX: usize = 512;

/// A vocabulary of pieces, ready to encode.
pub(super) struct SentencePiece {
    /// Every token; those that are no part of a text are not joined to.
    ids: HashMap<String, u32>,
    /// By id; none for tokens that text is not made of.
    scores: Vec<Option<f32>>,
    bytes: [u32; 256],
    add_space_prefix: bool,
}

/// A run of the text; empty once it was joined to the one before.
struct Symbol {
    start: usize,
    len: usize,
    before: Option<usize>,
    after: Option<usize>,
}

/// Two neighbours that make a piece. The greatest is joined first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    score: Ordered,
    left: Reverse<usize>,
    right: usize,
    len: usize,
}

struct Ordered(f32);

impl PartialEq for Ordered {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Ordered {}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl SentencePiece {
    /// Checks that there is a score for each token and a token for each byte.
    pub(super) fn new(
        vocabulary: &Vocabulary,
        scores: &[f32],
        add_space_prefix: bool,
    ) -> Result<Self, String> {
        let count = vocabulary.tokens.len();
        if scores.len() != count {
            return Err(format!("{count} tokens, but {} scores", scores.len()));
        }
        if let Some(id) = scores.iter().position(|score| !score.is_finite()) {
            return Err(format!("the score of token {id} is not finite"));
        }
        let ids: HashMap<_, _> = vocabulary.tokens.iter().cloned().zip(0..).collect();
        let mut bytes = [0; 256];
        for (byte, id) in bytes.iter_mut().enumerate() {
            let token = format!("<0x{byte:02X}>");
            *id = *ids.get(&token).ok_or_else(|| format!("there is no token {token} for that byte"))?;
        }
        let is_text = |kind: &TokenKind| matches!(kind, TokenKind::Normal | TokenKind::UserDefined);
        let scores =
            scores.iter().zip(&vocabulary.kinds).map(|(score, kind)| is_text(kind).then_some(*score));
        Ok(Self { scores: scores.collect(), ids, bytes, add_space_prefix })
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// Appends the ids of a text that stands at the beginning or behind a token that is kept whole.
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let prefix = if self.add_space_prefix { " " } else { "" };
        let text = [prefix, text].concat().replace(' ', SPACE.encode_utf8(&mut [0; 4]));
        for Symbol { start, len, .. } in self.joined(&text) {
            let piece = &text[start..start + len];
            match self.piece(piece) {
                Some((id, _)) => out.push(id),
                None => out.extend(piece.bytes().map(|byte| self.bytes[usize::from(byte)])),
            }
        }
    }

    fn piece(&self, text: &str) -> Option<(u32, f32)> {
        let id = self.id(text)?;
        self.scores[id as usize].map(|score| (id, score))
    }

    fn joined(&self, text: &str) -> impl Iterator<Item = Symbol> {
        let count = text.chars().count();
        let symbol = |(index, (start, character)): (usize, (usize, char))| Symbol {
            start,
            len: character.len_utf8(),
            before: index.checked_sub(1),
            after: Some(index + 1).filter(|next| *next < count),
        };
        let mut symbols: Vec<Symbol> = text.char_indices().enumerate().map(symbol).collect();
        let mut pairs = BinaryHeap::new();
        for right in 1..count {
            pairs.extend(self.pair(text, &symbols, right - 1, right));
        }
        while let Some(Pair { left: Reverse(left), right, len, .. }) = pairs.pop() {
            let lengths = (symbols[left].len, symbols[right].len);
            if lengths.0 == 0 || lengths.1 == 0 || lengths.0 + lengths.1 != len {
                continue;
            }
            let after = symbols[right].after;
            symbols[left].len = len;
            symbols[left].after = after;
            symbols[right].len = 0;
            if let Some(after) = after {
                symbols[after].before = Some(left);
                pairs.extend(self.pair(text, &symbols, left, after));
            }
            if let Some(before) = symbols[left].before {
                pairs.extend(self.pair(text, &symbols, before, left));
            }
        }
        symbols.into_iter().filter(|symbol| symbol.len > 0)
    }

    fn pair(&self, text: &str, symbols: &[Symbol], left: usize, right: usize) -> Option<Pair> {
        let (start, len) = (symbols[left].start, symbols[left].len + symbols[right].len);
        let (_, score) = self.piece(&text[start..start + len])?;
        Some(Pair { score: Ordered(score), left: Reverse(left), right, len })
    }
}

/// The bytes that a token's text stands for, by its kind.
pub(super) fn token_bytes(token: &str, kind: TokenKind) -> Vec<u8> {
    match kind {
        TokenKind::Control | TokenKind::Unknown | TokenKind::Unused => Vec::new(),
        TokenKind::Normal | TokenKind::UserDefined => token.replace(SPACE, " ").into_bytes(),
        TokenKind::Byte => byte_of(token).into_iter().collect(),
    }
}

/// The byte of a token like `<0x0A>`.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Scores that join in the order of a list of merges, for files without scores. The list must be the one that follows
/// from such scores: every way to make a piece of two, pieces one after the other.
pub(super) fn scores_of_merges(
    tokens: &[String],
    kinds: &[TokenKind],
    merges: &[(String, String)],
) -> Result<Vec<f32>, String> {
    let ids: HashMap<&str, usize> = tokens.iter().map(String::as_str).zip(0..).collect();
    let mut scores = vec![0f32; tokens.len()];
    let mut ways = vec![0usize; tokens.len()];
    let (mut last, mut rank) = (None, 0f32);
    for (left, right) in merges {
        let joined = [left.as_str(), right].concat();
        let id =
            *ids.get(joined.as_str()).ok_or_else(|| format!("merge to {joined:?}, which is no token"))?;
        if last != Some(id) {
            if ways[id] > 0 {
                return Err(format!("merges to {joined:?} do not follow each other"));
            }
            (last, rank) = (Some(id), rank - 1.0);
        }
        (ways[id], scores[id]) = (ways[id] + 1, rank);
    }
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| kinds[*id] == TokenKind::Normal) {
        if token.len() > PIECE_BYTES_MAX {
            return Err(format!("token {id} is longer than {PIECE_BYTES_MAX} bytes"));
        }
        let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let possible = cuts.filter(|(left, right)| ids.contains_key(left) && ids.contains_key(right)).count();
        if possible != ways[id] {
            return Err(format!("{possible} ways to make {token:?} of two pieces, but {} merges", ways[id]));
        }
    }
    Ok(scores)
}
