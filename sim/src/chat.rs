//! `fleetune-sim chat`: a conversation with a model on the terminal or through a pipe. A line is a message;
//! answers appear as they are made. Answers go to standard output, all else to standard error.

use crate::tools::{ChoiceArgs, ModelArgs, open, sequence};
use anyhow::{Context, Result, ensure};
use fleetune_model::{
    chat::{ChatTemplate, Message, Role},
    generate::{Answer, EndReason, Ends, Sampling, generate_text},
    infer::{Engine, Sequence},
};
use std::{
    io::{self, BufRead, IsTerminal, Write},
    ops::ControlFlow,
    sync::Arc,
};

/// Temperature where none is given.
const TEMPERATURE: f32 = 0.2;

/// Talks with a model that has a chat template.
#[derive(Clone, Debug, clap::Args)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Says how to answer; without it, what the model's template says.
    #[arg(long)]
    system: Option<String>,
    #[command(flatten)]
    choice: ChoiceArgs,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 512)]
    max_tokens: usize,
    /// Ends an answer and is not shown; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// Answers this one message and ends.
    #[arg(long)]
    once: Option<String>,
}

/// Talks until the input ends.
pub fn run(args: &ChatArgs) -> Result<()> {
    let mut chat = Chat::open(args)?;
    if let Some(message) = &args.once {
        return match chat.exchange(message, &mut io::stdout().lock(), &mut io::stderr().lock())? {
            Turn::Answered => Ok(()),
            Turn::Refused(reason) => Err(reason),
        };
    }
    let terminal = io::stdin().is_terminal() && io::stderr().is_terminal();
    chat.converse(io::stdin().lock(), &mut io::stdout().lock(), &mut io::stderr(), terminal)
}

/// What became of a message.
#[derive(Debug)]
enum Turn {
    Answered,
    /// The conversation is as it was before.
    Refused(anyhow::Error),
}

/// A model and what was said so far.
struct Chat {
    engine: Engine,
    /// What the model holds of the conversation: only what is new is read.
    sequence: Sequence,
    template: ChatTemplate,
    sampling: Sampling,
    ends: Ends,
    conversation: Conversation,
}

impl Chat {
    fn open(args: &ChatArgs) -> Result<Self> {
        let sampling = args.choice.sampling(TEMPERATURE, args.max_tokens);
        sampling.check()?;
        ensure!(args.max_tokens > 0, "--max-tokens: at least 1");
        ensure!(args.stop.iter().all(|stop| !stop.is_empty()), "--stop: a text that is not empty");
        let (base, adapter) = open(&args.model)?;
        let name = args.model.model.display();
        let template = ChatTemplate::of(&base).with_context(|| format!("model {name}"))?;
        let ends = Ends { tokens: template.end_tokens(), strings: args.stop.clone() };
        let conversation = Conversation::new(args.system.as_deref());
        let engine = Engine::new(Arc::new(base));
        let sequence = sequence(&engine, adapter.as_ref())?;
        Ok(Self { engine, sequence, template, sampling, ends, conversation })
    }

    /// A message a line, until the input ends or nobody listens.
    fn converse(
        &mut self,
        input: impl BufRead,
        out: &mut dyn Write,
        notes: &mut dyn Write,
        terminal: bool,
    ) -> Result<()> {
        let mut lines = input.lines();
        loop {
            if terminal {
                write!(notes, "> ")?;
                notes.flush()?;
            }
            let Some(line) = lines.next() else { break };
            let line = line.context("standard input")?;
            if line.trim().is_empty() {
                continue;
            }
            match self.exchange(&line, out, notes)? {
                Turn::Answered => {}
                Turn::Refused(reason) => writeln!(notes, "not answered: {reason:#}")?,
            }
        }
        if terminal {
            writeln!(notes)?;
        }
        Ok(())
    }

    /// Answers one message, in the light of those before it.
    fn exchange(&mut self, message: &str, out: &mut dyn Write, notes: &mut dyn Write) -> Result<Turn> {
        let before = self.conversation.messages.clone();
        self.conversation.push(Role::User, message);
        let context = self.engine.base().config.context_length;
        let (prompt, dropped) = match self.prompt(context) {
            Ok(fitted) => fitted,
            Err(reason) => {
                self.conversation.messages = before;
                return Ok(Turn::Refused(reason));
            }
        };
        if dropped > 0 {
            writeln!(notes, "the context is full: the oldest {dropped} messages are forgotten")?;
        }
        let mut written = Ok(());
        let answer = self.answer(&prompt, &mut |text| {
            written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        written.context("standard output")?;
        writeln!(out)?;
        self.conversation.push(Role::Assistant, &answer.text);
        match answer.end {
            EndReason::MaxTokens => writeln!(notes, "cut after {} tokens", answer.ids.len())?,
            EndReason::ContextFull => writeln!(notes, "cut: the context of {context} tokens is full")?,
            EndReason::EndToken | EndReason::StopString | EndReason::Cancelled => {}
        }
        Ok(Turn::Answered)
    }

    /// Tokens of the conversation, and how many of its oldest messages were forgotten to make room for an answer.
    fn prompt(&mut self, context: usize) -> Result<(Vec<u32>, usize)> {
        let template = &self.template;
        let room = context.saturating_sub(self.sampling.max_tokens);
        let (prompt, dropped) =
            self.conversation.fit(room, |messages| Ok(template.encode(messages, true)?))?;
        let found = prompt.len();
        ensure!(found < context, "the message takes {found} tokens, the model's context holds {context}");
        Ok((prompt, dropped))
    }

    /// The one place where the model runs.
    fn answer(&mut self, prompt: &[u32], on_text: &mut dyn FnMut(&str) -> ControlFlow<()>) -> Result<Answer> {
        // Other choices each turn, from one seed.
        let seed = self.sampling.seed.wrapping_add(self.conversation.answers as u64);
        let sampling = Sampling { seed, ..self.sampling.clone() };
        let ends = self.ends.clone();
        Ok(generate_text(&self.engine, &mut self.sequence, prompt, &sampling, ends, on_text)?)
    }
}

/// What was said, oldest first, perhaps with a system message before it.
struct Conversation {
    messages: Vec<Message>,
    /// Messages at the beginning that stay: the system's.
    pinned: usize,
    /// Answers so far, forgotten ones too.
    answers: usize,
}

impl Conversation {
    fn new(system: Option<&str>) -> Self {
        let messages: Vec<_> =
            system.map(|content| Message::new(Role::System, content)).into_iter().collect();
        Self { pinned: messages.len(), messages, answers: 0 }
    }

    fn push(&mut self, role: Role, content: &str) {
        self.answers += usize::from(role == Role::Assistant);
        self.messages.push(Message::new(role, content));
    }

    /// Forgets the oldest turns, a message with its answer, until the conversation takes at most `room` tokens
    /// or only the last message is left. Gives its tokens, and how many messages were forgotten.
    fn fit(
        &mut self,
        room: usize,
        encode: impl Fn(&[Message]) -> Result<Vec<u32>>,
    ) -> Result<(Vec<u32>, usize)> {
        let before = self.messages.len();
        loop {
            let ids = encode(&self.messages)?;
            let turn = self.messages.len().min(self.pinned + 2);
            if ids.len() <= room || turn == self.messages.len() {
                return Ok((ids, before - self.messages.len()));
            }
            self.messages.drain(self.pinned..turn);
        }
    }
}

#[cfg(test)]
mod tests;
