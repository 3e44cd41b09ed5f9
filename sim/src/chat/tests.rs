//! Conversations with the embedded model under a template made for it.

use super::*;
use crate::experiment::EMBEDDED_BASE;
use fleetune_model::base::BaseModel;
use fleetune_model::gguf::Metadata;
use std::{fs, path::Path};

const TEMPLATE: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}<|endoftext|>\
                        {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

/// Flags for a model with that template, which is written into the folder.
fn args(folder: &Path, template: Option<&str>) -> ChatArgs {
    let mut base = BaseModel::from_gguf_bytes(EMBEDDED_BASE).expect("the embedded base");
    base.chat_template = template.map(str::to_owned);
    let path = folder.join("base.gguf");
    fs::write(&path, base.to_gguf_bytes(&Metadata::default())).expect("a model file");
    ChatArgs {
        model: ModelArgs { model: path, adapter: None },
        system: None,
        choice: ChoiceArgs { temperature: Some(0.8), top_k: 40, top_p: 0.95, min_p: 0.05, seed: 3 },
        max_tokens: 12,
        stop: Vec::new(),
        once: None,
    }
}

fn chat(change: impl Fn(&mut ChatArgs)) -> Chat {
    let folder = tempfile::tempdir().expect("a folder");
    let mut args = args(folder.path(), Some(TEMPLATE));
    change(&mut args);
    Chat::open(&args).expect("a model to talk to")
}

/// Standard output and standard error of a conversation.
fn converse(chat: &mut Chat, input: &str) -> (String, String) {
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    chat.converse(input.as_bytes(), &mut out, &mut notes, false).expect("a conversation");
    (String::from_utf8(out).expect("UTF-8"), String::from_utf8(notes).expect("UTF-8"))
}

#[test]
fn lines_are_answered_and_remembered() {
    let mut first = chat(|_| {});
    let (out, notes) = converse(&mut first, "My lord?\n\nWho is there?");
    let said: Vec<&str> =
        first.conversation.messages.iter().map(|message| message.content.as_str()).collect();
    assert_eq!((said.len(), said[0], said[2]), (4, "My lord?", "Who is there?"));
    assert_eq!(out, format!("{}\n{}\n", said[1], said[3]));
    assert!(notes.lines().all(|line| line == "cut after 12 tokens"), "{notes}");
    assert_eq!(converse(&mut chat(|_| {}), "My lord?\n\nWho is there?").0, out);
    assert_ne!(converse(&mut chat(|args| args.choice.seed = 4), "My lord?\n\nWho is there?").0, out);
    let mut once = Vec::new();
    chat(|_| {}).exchange("My lord?", &mut once, &mut Vec::new()).expect("an answer");
    assert_eq!(once, format!("{}\n", said[1]).into_bytes());
}

#[test]
fn a_stop_string_ends_an_answer_and_is_not_shown() {
    let (whole, _) = converse(&mut chat(|_| {}), "My lord?");
    let stop: String = whole.chars().skip(4).take(3).collect();
    let mut stopped = chat(|args| args.stop = vec![stop.clone()]);
    let (out, notes) = converse(&mut stopped, "My lord?");
    assert_eq!(out, format!("{}\n", whole.split(&stop).next().expect("a beginning")));
    assert_eq!(notes, "");
}

#[test]
fn a_full_context_forgets_the_oldest_turns_but_not_the_system() {
    let mut chat = chat(|args| args.system = Some("Speak as a king.".to_owned()));
    let (_, notes) = converse(&mut chat, &"What is the matter, my lord?\n".repeat(14));
    assert!(notes.contains("the context is full: the oldest 2 messages are forgotten"), "{notes}");
    assert_eq!(chat.conversation.answers, 14);
    let messages = &chat.conversation.messages;
    assert_eq!(messages[0], Message::new(Role::System, "Speak as a king."));
    assert_eq!(messages[1].role, Role::User);
    assert!(messages.len() < 29, "{}", messages.len());
}

#[test]
fn a_message_too_long_is_refused_and_the_conversation_goes_on() {
    let long = "and then ".repeat(400);
    let mut chat = chat(|_| {});
    let (out, notes) = converse(&mut chat, &format!("My lord?\n{long}\nWho is there?"));
    assert_eq!(out.lines().count(), 2, "{out}");
    let refused: Vec<&str> = notes.lines().filter(|line| line.starts_with("not answered: ")).collect();
    assert!(refused.len() == 1 && refused[0].contains("the model's context holds"), "{notes}");
    let said: Vec<&str> = chat.conversation.messages.iter().map(|message| message.content.as_str()).collect();
    assert_eq!((said.len(), said[0], said[2]), (4, "My lord?", "Who is there?"));
    let alone = chat.exchange(&long, &mut Vec::new(), &mut Vec::new()).expect("no broken pipe");
    assert!(matches!(alone, Turn::Refused(_)), "{alone:?}");
}

#[test]
fn turns_are_forgotten_until_the_rest_fits() {
    let count = |messages: &[Message]| -> Result<Vec<u32>> {
        Ok(vec![0; messages.iter().map(|message| message.content.len()).sum()])
    };
    let after = |system: Option<&str>, room: usize| {
        let mut conversation = Conversation::new(system);
        for (role, content) in [
            (Role::User, "aaa"),
            (Role::Assistant, "bb"),
            (Role::User, "c"),
            (Role::Assistant, "d"),
            (Role::User, "ee"),
        ] {
            conversation.push(role, content);
        }
        let (ids, dropped) = conversation.fit(room, count).expect("counted");
        (
            conversation.messages.iter().map(|m| m.content.clone()).collect::<Vec<_>>().concat(),
            ids.len(),
            dropped,
        )
    };
    assert_eq!(after(None, 9), ("aaabbcdee".to_owned(), 9, 0));
    assert_eq!(after(None, 8), ("cdee".to_owned(), 4, 2));
    assert_eq!(after(None, 3), ("ee".to_owned(), 2, 4));
    assert_eq!(after(None, 0), ("ee".to_owned(), 2, 4));
    assert_eq!(after(Some("sys"), 11), ("syscdee".to_owned(), 7, 2));
    assert_eq!(after(Some("sys"), 0), ("sysee".to_owned(), 5, 4));
}

#[test]
fn nobody_listening_ends_the_conversation() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let error = chat(|_| {}).converse(&b"My lord?\nWho?\n"[..], &mut Closed, &mut Vec::new(), false);
    assert_eq!(error.expect_err("a closed pipe").to_string(), "standard output");
}

#[test]
fn flags_that_make_no_sense_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let check = |expected: &str, template: Option<&str>, change: fn(&mut ChatArgs)| {
        let mut args = args(folder.path(), template);
        change(&mut args);
        let error = format!("{:#}", Chat::open(&args).err().expect("a refusal"));
        assert!(error.contains(expected), "{error}");
    };
    check("temperature", Some(TEMPLATE), |args| args.choice.temperature = Some(f32::NAN));
    check("top-p", Some(TEMPLATE), |args| args.choice.top_p = 0.0);
    check("min-p", Some(TEMPLATE), |args| args.choice.min_p = 1.0);
    check("--max-tokens", Some(TEMPLATE), |args| args.max_tokens = 0);
    check("--stop", Some(TEMPLATE), |args| args.stop = vec![String::new()]);
    check("no chat template", None, |_| {});
    check("syntax error", Some("{% for %}"), |_| {});
}
