//! Tokens as text that can be shown at once. A character that several tokens spell comes out whole, and what
//! may be the beginning of a stop string is held back until it is known not to be one.

use std::mem;
use std::ops::ControlFlow;

use super::{Sampling, generate};
use crate::base::BaseModel;
use crate::batch::InputError;
use crate::infer::{Engine, Sequence};
use crate::tokenizer::Tokenizer;

/// What ends a text besides its length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ends {
    /// Tokens that end it and are no part of it, beside the tokenizer's own end token.
    pub tokens: Vec<u32>,
    /// Strings that end it and are no part of it; an empty one ends nothing.
    pub strings: Vec<String>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The model ended it.
    EndToken,
    /// A stop string was complete.
    StopString,
    /// As many tokens as were asked for.
    MaxTokens,
    /// The model's context holds no more.
    ContextFull,
    /// Whoever listened had enough.
    Cancelled,
}

/// Text that may be shown now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Whole characters; empty where everything is held back.
    pub text: String,
    /// Set with the last piece.
    pub end: Option<EndReason>,
}

/// Turns ids into pieces of text. Joined, the pieces are what [`Tokenizer::decode`] makes of all ids, up to
/// the first end token or to the stop string that is complete first (of several, the longest).
#[derive(Debug, Clone)]
pub struct TextStream {
    tokenizer: Tokenizer,
    ends: Ends,
    /// Bytes of a character that is not complete.
    bytes: Vec<u8>,
    /// Text that may be the beginning of a stop string.
    held: String,
    end: Option<EndReason>,
}

impl TextStream {
    /// Nothing was said yet.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer, mut ends: Ends) -> Self {
        ends.strings.retain(|stop| !stop.is_empty());
        ends.tokens.extend(tokenizer.eos());
        Self { tokenizer: tokenizer.clone(), ends, bytes: Vec::new(), held: String::new(), end: None }
    }

    /// Takes the next id and hands over what can be shown. After the end, nothing.
    pub fn push(&mut self, id: u32) -> Piece {
        if self.end.is_some() {
            return Piece { text: String::new(), end: self.end };
        }
        if self.ends.tokens.contains(&id) {
            return self.finish(EndReason::EndToken);
        }
        self.bytes.extend(self.tokenizer.token_bytes(id));
        let text = self.whole_characters();
        self.take_in(&text)
    }

    /// Hands over what was held back: no more tokens will come. A character that never became whole is
    /// U+FFFD.
    pub fn finish(&mut self, reason: EndReason) -> Piece {
        if self.end.is_none() {
            let rest = mem::take(&mut self.bytes);
            let mut piece = self.take_in(&String::from_utf8_lossy(&rest));
            piece.text.push_str(&mem::take(&mut self.held));
            self.end.get_or_insert(reason);
            return Piece { end: self.end, ..piece };
        }
        Piece { text: String::new(), end: self.end }
    }

    /// Cuts off the bytes that are whole characters, or can never become one.
    fn whole_characters(&mut self) -> String {
        let mut text = String::new();
        let mut done = 0;
        while let Err(error) = str::from_utf8(&self.bytes[done..]) {
            let wrong = error.valid_up_to() + error.error_len().unwrap_or(0);
            text.push_str(&String::from_utf8_lossy(&self.bytes[done..done + wrong]));
            done += wrong;
            if error.error_len().is_none() {
                self.bytes.drain(..done);
                return text;
            }
        }
        text.push_str(&String::from_utf8_lossy(&self.bytes[done..]));
        self.bytes.clear();
        text
    }

    fn take_in(&mut self, text: &str) -> Piece {
        for character in text.chars() {
            self.held.push(character);
            let complete = self.ends.strings.iter().filter(|stop| self.held.ends_with(*stop));
            if let Some(length) = complete.map(String::len).max() {
                self.held.truncate(self.held.len() - length);
                self.end = Some(EndReason::StopString);
                return Piece { text: mem::take(&mut self.held), end: self.end };
            }
        }
        let begun = self.ends.strings.iter().map(|stop| begun(&self.held, stop)).max().unwrap_or(0);
        let kept = self.held.split_off(self.held.len() - begun);
        Piece { text: mem::replace(&mut self.held, kept), end: None }
    }
}

/// How many bytes at the end of `text` are the beginning of `stop`.
fn begun(text: &str, stop: &str) -> usize {
    let beginnings = stop.char_indices().rev().map(|(end, _)| &stop[..end]);
    beginnings.into_iter().find(|beginning| text.ends_with(beginning)).map_or(0, str::len)
}

/// A text that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// All pieces joined.
    pub text: String,
    /// Its tokens, without the one that ended it; those of a stop string are among them.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub end: EndReason,
}

/// Continues `prompt` and hands over each piece of text as soon as it can be shown, until an end of `ends`,
/// the tokenizer's end token, `max_tokens`, the end of the context, or a break of `on_text`.
///
/// # Errors
/// Those of [`generate`].
pub fn generate_text(
    engine: &Engine,
    sequence: &mut Sequence,
    prompt: &[u32],
    sampling: &Sampling,
    ends: Ends,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Answer, InputError> {
    let base = engine.base();
    let stream = TextStream::new(&base.tokenizer, ends);
    let mut shown = Shown { stream, text: String::new(), cancelled: false, on_text };
    let mut ids = generate(engine, sequence, prompt, sampling, &mut |token| {
        let piece = shown.stream.push(token);
        shown.show(&piece)
    })?;
    let found = shown.stream.end;
    if found == Some(EndReason::EndToken) {
        ids.pop();
    }
    let end = match found {
        Some(end) => end,
        None if shown.cancelled => EndReason::Cancelled,
        None => shown.finish(by_length(base, prompt, &ids, sampling)),
    };
    Ok(Answer { text: shown.text, ids, end })
}

/// Why a text ended that neither a stop string nor its listener ended.
fn by_length(base: &BaseModel, prompt: &[u32], ids: &[u32], sampling: &Sampling) -> EndReason {
    if ids.len() >= sampling.max_tokens {
        EndReason::MaxTokens
    } else if prompt.len() + ids.len() >= base.config.context_length {
        EndReason::ContextFull
    } else {
        EndReason::EndToken
    }
}

struct Shown<'a> {
    stream: TextStream,
    text: String,
    cancelled: bool,
    on_text: &'a mut dyn FnMut(&str) -> ControlFlow<()>,
}

impl Shown<'_> {
    fn show(&mut self, piece: &Piece) -> ControlFlow<()> {
        self.text.push_str(&piece.text);
        self.cancelled |= !piece.text.is_empty() && (self.on_text)(&piece.text).is_break();
        if self.cancelled || piece.end.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn finish(&mut self, reason: EndReason) -> EndReason {
        let piece = self.stream.finish(reason);
        _ = self.show(&piece);
        piece.end.unwrap_or(reason)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use proptest::prelude::*;

    use super::*;
    use crate::fixtures::base;
    use crate::tokenizer::tests::tiny_tokenizer;

    fn tokenizer() -> &'static Tokenizer {
        static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
        TOKENIZER.get_or_init(tiny_tokenizer)
    }

    fn ends(strings: &[&str]) -> Ends {
        Ends { tokens: Vec::new(), strings: strings.iter().map(|stop| (*stop).to_owned()).collect() }
    }

    /// The pieces of ids and why they ended.
    fn pieces(ids: &[u32], ends: Ends) -> (Vec<String>, EndReason) {
        let mut stream = TextStream::new(tokenizer(), ends);
        let mut pieces = Vec::new();
        for id in ids {
            let piece = stream.push(*id);
            pieces.push(piece.text);
            if let Some(end) = piece.end {
                return (pieces, end);
            }
        }
        let piece = stream.finish(EndReason::MaxTokens);
        pieces.push(piece.text);
        (pieces, piece.end.unwrap())
    }

    /// The ids of the bytes one by one.
    fn bytewise(text: &str) -> Vec<u32> {
        let of = |byte: u8| {
            let ids = 0..tokenizer().vocab_size() as u32;
            ids.into_iter().find(|id| tokenizer().token_bytes(*id) == [byte]).unwrap()
        };
        text.bytes().map(of).collect()
    }

    #[test]
    fn characters_come_out_whole() {
        let (found, end) = pieces(&bytewise("aé€😀b"), Ends::default());
        assert_eq!(found, ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]);
        assert_eq!(end, EndReason::MaxTokens);
        let cut = bytewise("a€");
        assert_eq!(pieces(&cut[..3], Ends::default()).0, ["a", "", "", "\u{fffd}"]);
    }

    #[test]
    fn the_beginning_of_a_stop_string_is_held_back() {
        let (found, end) = pieces(&bytewise("x<en<end>y"), ends(&["<end>"]));
        assert_eq!(found, ["x", "", "", "", "<en", "", "", "", ""]);
        assert_eq!(end, EndReason::StopString);
        let (found, end) = pieces(&bytewise("x<en"), ends(&["<end>"]));
        assert_eq!(found.concat(), "x<en");
        assert_eq!(end, EndReason::MaxTokens);
    }

    #[test]
    fn the_stop_string_that_is_complete_first_wins_and_of_two_the_longest() {
        let check = |text: &str, stops: &[&str], expected: &str| {
            assert_eq!(pieces(&bytewise(text), ends(stops)).0.concat(), expected, "{text:?}, {stops:?}");
        };
        check("one two", &["two", "one two", "e"], "on");
        check("one two", &["two", "ne two"], "o");
        check("aaab", &["aab"], "a");
        check("ababac", &["abac"], "ab");
        check("a€b", &["€"], "a");
        check("abc", &["", "c"], "ab");
    }

    #[test]
    fn end_tokens_end_and_are_not_shown() {
        let tokenizer = tokenizer();
        let (start, end) = (tokenizer.token_id("<|im_start|>").unwrap(), tokenizer.eos().unwrap());
        let mut ids = tokenizer.encode_ordinary("the");
        ids.extend([end, ids[0]]);
        assert_eq!(
            pieces(&ids, Ends::default()),
            (vec!["the".to_owned(), String::new()], EndReason::EndToken)
        );
        ids[1] = start;
        let found = pieces(&ids, Ends { tokens: vec![start], strings: vec!["then".to_owned()] });
        assert_eq!(found, (vec![String::new(), "the".to_owned()], EndReason::EndToken));
        let mut stream = TextStream::new(tokenizer, Ends::default());
        stream.push(end);
        let nothing = Piece { text: String::new(), end: Some(EndReason::EndToken) };
        assert_eq!(stream.push(ids[0]), nothing);
        assert_eq!(stream.finish(EndReason::MaxTokens), nothing);
    }

    /// What the pieces must join to, and whether a stop string ended them.
    fn by_definition(text: &str, stops: &[String]) -> (String, bool) {
        for (at, character) in text.char_indices() {
            let until = &text[..at + character.len_utf8()];
            let starts =
                stops.iter().filter(|stop| !stop.is_empty()).filter_map(|stop| until.strip_suffix(&**stop));
            if let Some(before) = starts.min_by_key(|before| before.len()) {
                return (before.to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Any ids (so any bytes, of which many are no UTF-8), few letters so that stop strings are met.
        #[test]
        fn joined_pieces_are_the_decoded_text(
            text in "[ab\u{e9}\u{20ac}]{0,12}",
            noise in proptest::collection::vec((0usize..12, 3u32..288), 0..3),
            stops in proptest::collection::vec("[ab\u{e9}]{0,4}", 0..3),
        ) {
            let mut ids = bytewise(&text);
            for (at, id) in noise {
                ids.insert(at.min(ids.len()), id);
            }
            let (found, end) = pieces(&ids, Ends { tokens: Vec::new(), strings: stops.clone() });
            let (expected, stopped) = by_definition(&tokenizer().decode(&ids), &stops);
            prop_assert_eq!(found.concat(), expected);
            prop_assert_eq!(end == EndReason::StopString, stopped);
        }
    }

    #[test]
    fn a_text_that_is_made_says_why_it_ended() {
        let engine = Engine::new(base());
        let base = engine.base();
        let sampling =
            Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, max_tokens: 40, ..Sampling::default() };
        let run = |prompt: &[u32], sampling: &Sampling, ends: Ends, listen: usize| {
            let mut heard = String::new();
            let mut left = listen;
            let answer =
                generate_text(&engine, &mut engine.sequence(None), prompt, sampling, ends, &mut |text| {
                    heard.push_str(text);
                    left -= 1;
                    if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                });
            let answer = answer.unwrap();
            assert_eq!(answer.text, heard);
            answer
        };
        let full = run(&[5, 6], &sampling, Ends::default(), 999);
        assert_eq!(full.text, base.tokenizer.decode(&full.ids));
        assert_eq!((full.end, full.ids.len()), (EndReason::MaxTokens, 40));
        let last = full.ids[20];
        let first = full.ids.iter().position(|id| *id == last).unwrap();
        let ended = run(&[5, 6], &sampling, Ends { tokens: vec![last], strings: Vec::new() }, 999);
        assert_eq!((ended.end, &ended.ids[..]), (EndReason::EndToken, &full.ids[..first]));
        let stop: String = full.text.chars().skip(10).take(3).collect();
        let stopped = run(&[5, 6], &sampling, ends(&[&stop]), 999);
        assert_eq!(stopped.end, EndReason::StopString);
        assert_eq!(Some(stopped.text.as_str()), full.text.split(&stop).next());
        assert_eq!(run(&[5, 6], &sampling, Ends::default(), 1).end, EndReason::Cancelled);
        let context = base.config.context_length;
        let crowded = run(&vec![5; context - 2], &sampling, Ends::default(), 999);
        assert_eq!((crowded.end, crowded.ids.len()), (EndReason::ContextFull, 2));
        let none = run(&[5], &Sampling { max_tokens: 0, ..sampling }, Ends::default(), 999);
        assert_eq!((none.end, none.text.as_str()), (EndReason::MaxTokens, ""));
    }
}
