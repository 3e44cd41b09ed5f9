//! Conversations as one prompt: the model's own Jinja template, rendered, and encoded so that only the template
//! can write control tokens.
//!
//! Two dangers stand behind this file. A message that contains `<|im_end|>` must not end its turn and speak as
//! the system (prompt injection by control tokens). So the template never sees what a message says: it sees one
//! private character for it, with the white space around it. What stands for that character is put in after
//! rendering, and control tokens are looked for only in what the template wrote between these places. That also
//! stops a token made of two halves, one in a message and one in the next or in the template.
//! The price: a template that looks into messages (`'x' in message.content`) does not find anything there.
//!
//! The other danger is the template itself, which comes with the model file. It is run with a budget of
//! instructions and of output, without access to files, clock or network. Strings that it builds inside are
//! not counted: a template written for it can use up memory, so one of unknown origin is to be read first.

use std::fmt;
use std::io;
use std::ops::Range;

use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, context};

use crate::base::BaseModel;
use crate::tokenizer::{TokenKind, Tokenizer};

/// Bytes of a template; SmolLM2's has 400, the longest in use for tools about 15,000.
const TEMPLATE_BYTES_MAX: usize = 1 << 16;
/// Messages of a conversation: each takes a private character, and about thirty instructions of the budget.
const MESSAGES_MAX: usize = 8192;
/// Instructions of one rendering.
const INSTRUCTIONS_MAX: u64 = 1_000_000;
/// Bytes a template may write of its own.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Calls within calls, of macros.
const DEPTH_MAX: usize = 64;
/// The first private character; those of this plane mean nothing in any text that is exchanged.
const PRIVATE: u32 = 0xf_0000;
/// Characters of a template's own message that an error shows.
const RAISED_CHARACTERS_MAX: usize = 200;
/// How models of the Llama family end a turn or a text.
const KNOWN_ENDS: [&str; 7] =
    ["<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>"];
const NAME: &str = "chat template";

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Says how to answer.
    System,
    /// Asks.
    User,
    /// Answers: the model.
    Assistant,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; nothing in it is a control token.
    pub content: String,
}

/// A conversation that cannot become a prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// The model is not made for conversations, or its file does not say how.
    #[error("the model has no chat template")]
    NoTemplate,
    /// The template is longer than any known one.
    #[error("the chat template has {found} bytes, {TEMPLATE_BYTES_MAX} are allowed")]
    TemplateTooLong {
        /// Bytes of the template.
        found: usize,
    },
    /// The template is no Jinja, or uses what is not there.
    #[error("{reason}")]
    Template {
        /// What and in which line.
        reason: String,
    },
    /// The template refuses the conversation.
    #[error("the chat template refuses the conversation: {message}")]
    Refused {
        /// The template's words.
        message: String,
    },
    /// The template takes too many steps.
    #[error("the chat template takes more than {INSTRUCTIONS_MAX} instructions")]
    TooManyInstructions,
    /// The template writes too much.
    #[error("the chat template writes more than {OUTPUT_BYTES_MAX} bytes")]
    OutputTooLong,
    /// More messages than a conversation may have.
    #[error("{found} messages, {MESSAGES_MAX} are allowed")]
    TooManyMessages {
        /// Messages given.
        found: usize,
    },
}

impl Role {
    /// As templates write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

impl Message {
    /// What somebody says.
    #[must_use]
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// A model's template, parsed, with the tokenizer it is written for.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokenizer: Tokenizer,
}

impl ChatTemplate {
    /// The template in the model's file.
    ///
    /// # Errors
    /// [`ChatError::NoTemplate`], or those of [`ChatTemplate::new`].
    pub fn of(base: &BaseModel) -> Result<Self, ChatError> {
        let template = base.chat_template.as_deref().ok_or(ChatError::NoTemplate)?;
        Self::new(template, &base.tokenizer)
    }

    /// Parses a template as transformers does: blocks take their line's end and indentation with them.
    ///
    /// # Errors
    /// [`ChatError::TemplateTooLong`] or [`ChatError::Template`].
    pub fn new(template: &str, tokenizer: &Tokenizer) -> Result<Self, ChatError> {
        if template.len() > TEMPLATE_BYTES_MAX {
            return Err(ChatError::TemplateTooLong { found: template.len() });
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(INSTRUCTIONS_MAX));
        environment.set_recursion_limit(DEPTH_MAX);
        environment.add_function("raise_exception", raise_exception);
        environment.add_template_owned(NAME, template.to_owned()).map_err(|error| explain(&error))?;
        Ok(Self { environment, tokenizer: tokenizer.clone() })
    }

    /// The text of a conversation, as transformers' `apply_chat_template` gives it. With `open_answer` it ends
    /// where the assistant begins to speak. To be shown, not to be encoded: that is [`ChatTemplate::encode`].
    ///
    /// # Errors
    /// Any [`ChatError`] but the two of parsing.
    pub fn render(&self, messages: &[Message], open_answer: bool) -> Result<String, ChatError> {
        let rendered = self.rendered(messages, open_answer)?;
        Ok(parts(&rendered, messages).map(Part::text).collect())
    }

    /// The ids of a conversation. Control tokens are those that the template writes, opening ones included;
    /// what messages say is ordinary text.
    ///
    /// # Errors
    /// Any [`ChatError`] but the two of parsing.
    pub fn encode(&self, messages: &[Message], open_answer: bool) -> Result<Vec<u32>, ChatError> {
        let rendered = self.rendered(messages, open_answer)?;
        let mut ids = Vec::new();
        // Words are cut in all that stands between two control tokens, whoever wrote it.
        let mut ordinary = String::new();
        for part in parts(&rendered, messages) {
            let mut rest = match part {
                Part::Said(text, _) => {
                    ordinary.push_str(text);
                    continue;
                }
                Part::Template(text) => text,
            };
            while let Some((at, token, id)) = self.tokenizer.next_whole(rest) {
                ordinary.push_str(&rest[..at]);
                ids.extend(self.tokenizer.encode_ordinary(&ordinary));
                ordinary.clear();
                ids.push(id);
                rest = &rest[at + token.len()..];
            }
            ordinary.push_str(rest);
        }
        ids.extend(self.tokenizer.encode_ordinary(&ordinary));
        Ok(ids)
    }

    /// Tokens with which the model may end its answer: the tokenizer's end token, the one that the template
    /// writes after an answer, and those that models of the family are known to use, where the vocabulary has
    /// them as control tokens. In order of their ids.
    #[must_use]
    pub fn end_tokens(&self) -> Vec<u32> {
        let known = KNOWN_ENDS.iter().filter_map(|end| self.tokenizer.token_id(end));
        let mut ends: Vec<u32> = known
            .chain(self.end_of_turn())
            .filter(|id| self.is_control(*id))
            .chain(self.tokenizer.eos())
            .collect();
        ends.sort_unstable();
        ends.dedup();
        ends
    }

    /// The token that the template writes right after an answer.
    fn end_of_turn(&self) -> Option<u32> {
        let messages = [Message::new(Role::User, "a"), Message::new(Role::Assistant, "b")];
        let rendered = self.rendered(&messages, false).ok()?;
        let mut parts =
            parts(&rendered, &messages).skip_while(|part| !matches!(part, Part::Said(_, 1))).skip(1);
        let Part::Template(after) = parts.next()? else { return None };
        let (at, _, id) = self.tokenizer.next_whole(after)?;
        after[..at].trim().is_empty().then_some(id)
    }

    fn is_control(&self, id: u32) -> bool {
        self.tokenizer.vocabulary().kinds.get(id as usize) == Some(&TokenKind::Control)
    }

    /// The template's output, a private character for what each message says.
    fn rendered(&self, messages: &[Message], open_answer: bool) -> Result<String, ChatError> {
        if messages.len() > MESSAGES_MAX {
            return Err(ChatError::TooManyMessages { found: messages.len() });
        }
        let shown = (0u32..).zip(messages).map(|(index, message)| {
            context! { role => message.role.name(), content => disguised(index, &message.content) }
        });
        let values = context! {
            messages => shown.collect::<Vec<Value>>(),
            add_generation_prompt => open_answer,
            bos_token => self.text_of(self.tokenizer.bos()),
            eos_token => self.text_of(self.tokenizer.eos()),
        };
        let mut output = Bounded(Vec::new());
        let template = self.environment.get_template(NAME).map_err(|error| explain(&error))?;
        let written = template.render_captured_to(values, &mut output).map(drop);
        written.map_err(|error| explain(&error))?;
        Ok(String::from_utf8(output.0).expect("a template writes strings"))
    }

    fn text_of(&self, token: Option<u32>) -> &str {
        token.map_or("", |id| self.tokenizer.vocabulary().tokens[id as usize].as_str())
    }
}

/// A message's words as one private character; white space around them stays, and so does emptiness.
fn disguised(index: u32, content: &str) -> String {
    let range = words(content);
    if range.is_empty() {
        return content.to_owned();
    }
    let stand_in =
        char::from_u32(PRIVATE + index).expect("a plane has more characters than messages are allowed");
    format!("{}{stand_in}{}", &content[..range.start], &content[range.end..])
}

/// Where a message's words are: all but the white space around them.
fn words(content: &str) -> Range<usize> {
    let start = content.len() - content.trim_start().len();
    start..start + content.trim().len()
}

/// What a rendered conversation is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part<'a> {
    /// The template's own words.
    Template(&'a str),
    /// The words of the message of that number.
    Said(&'a str, usize),
}

impl<'a> Part<'a> {
    fn text(self) -> &'a str {
        match self {
            Self::Template(text) | Self::Said(text, _) => text,
        }
    }
}

/// Cuts a template's output at the private characters.
fn parts<'a>(rendered: &'a str, messages: &'a [Message]) -> impl Iterator<Item = Part<'a>> {
    let message = move |character: char| {
        let index = (character as u32).checked_sub(PRIVATE)? as usize;
        messages.get(index).map(|message| Part::Said(&message.content[words(&message.content)], index))
    };
    rendered.split_inclusive(move |character| message(character).is_some()).flat_map(move |piece| {
        let said = piece.chars().next_back().and_then(message);
        let own = piece.len() - if said.is_some() { PRIVATE_BYTES } else { 0 };
        [Some(Part::Template(&piece[..own])), said].into_iter().flatten()
    })
}

/// Bytes of a private character.
const PRIVATE_BYTES: usize = 4;

/// Takes so much and no more.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a template said when it refused a conversation.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// Templates refuse conversations by it, as in transformers.
fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

fn explain(error: &Error) -> ChatError {
    let mut source = Some(error as &(dyn std::error::Error + 'static));
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            let readable = message.chars().filter(|character| (*character as u32) < PRIVATE);
            return ChatError::Refused { message: readable.take(RAISED_CHARACTERS_MAX).collect() };
        }
        match cause.downcast_ref::<Error>().map(Error::kind) {
            Some(ErrorKind::OutOfFuel) => return ChatError::TooManyInstructions,
            Some(ErrorKind::WriteFailure) => return ChatError::OutputTooLong,
            Some(_) | None => source = cause.source(),
        }
    }
    ChatError::Template { reason: error.to_string() }
}

#[cfg(test)]
mod tests;
