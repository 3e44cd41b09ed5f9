//! The documents say what is there: their commands run, their links lead somewhere.

use super::support::{files, output, program, read, root};
use std::{path::Path, process::Command};

/// Programs of the workspace, and the packages that `cargo run` names.
const PROGRAMS: [(&str, &str); 3] = [
    ("fleetune-sim", "fleetune-sim"),
    ("fleetune-coordinator", "fleetune-coordinator"),
    ("fleetune-device", "fleetune-client"),
];

#[test]
fn the_readme_shows_its_two_commands() {
    let readme = read("README.md");
    for command in ["cargo run --release -p fleetune-sim -- run", "tests/run"] {
        assert!(
            commands(&readme).iter().any(|shown| shown == command),
            "README.md does not show `{command}`"
        );
    }
}

#[test]
fn every_command_shown_exists() {
    for document in documents() {
        for command in commands(&read(&document)) {
            check_command(&document, &command);
        }
    }
}

#[test]
fn every_link_leads_somewhere() {
    for document in documents() {
        let folder = root().join(&document).parent().expect("a file lies in a folder").to_path_buf();
        for target in links(&read(&document)) {
            let path = target.split('#').next().unwrap_or_default();
            let outside = target.contains("://") || path.is_empty();
            assert!(outside || folder.join(path).exists(), "{document}: {target} is not there");
        }
    }
}

fn documents() -> Vec<String> {
    let docs = files("docs", "md").into_iter().map(|path| path.display().to_string());
    docs.chain(["README.md".into()]).collect()
}

/// Lines of the fenced `sh` blocks, continued lines joined, comments cut.
fn commands(text: &str) -> Vec<String> {
    let blocks = text.split("\n```").collect::<Vec<_>>();
    let shell = blocks.iter().filter_map(|block| block.strip_prefix("sh\n"));
    let lines = shell.flat_map(|block| {
        let joined = block.replace("\\\n", " ");
        joined
            .lines()
            .map(|line| line.split(" #").next().unwrap_or_default().trim().to_owned())
            .collect::<Vec<_>>()
    });
    let words = |line: String| line.split_whitespace().collect::<Vec<_>>().join(" ");
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(words).collect()
}

/// A program of ours must know the subcommand and every flag; a file of ours must be there.
fn check_command(document: &str, command: &str) {
    let words: Vec<&str> = command.split_whitespace().skip_while(|word| word.contains('=')).collect();
    match words.as_slice() {
        ["cargo", "run", rest @ ..] => check_cargo_run(document, rest),
        [program, rest @ ..] if PROGRAMS.iter().any(|(known, _)| known == program) => {
            check_call(document, program, rest);
        }
        [path, ..] if path.contains('/') => {
            assert!(root().join(path).exists(), "{document}: `{command}`: {path} is not there");
        }
        _ => {}
    }
}

fn check_cargo_run(document: &str, words: &[&str]) {
    let after = |flag: &str| words.iter().position(|word| *word == flag).and_then(|at| words.get(at + 1));
    let package =
        after("-p").unwrap_or_else(|| panic!("{document}: `cargo run {}` names no package", words.join(" ")));
    let own = words.iter().position(|word| *word == "--").map_or(&[][..], |at| &words[at + 1..]);
    if let Some(example) = after("--example") {
        let folder = package.trim_start_matches("fleetune-");
        let path = format!("{folder}/examples/{example}.rs");
        assert!(root().join(&path).exists(), "{document}: {path} is not there");
        return;
    }
    let known = PROGRAMS.iter().find(|(_, from)| from == package);
    let (program, _) = known.unwrap_or_else(|| panic!("{document}: package {package} has no program"));
    check_call(document, program, own);
}

/// Asks the program itself: the help of the subcommand, and of the one beneath it, names every flag.
fn check_call(document: &str, name: &str, words: &[&str]) {
    let mut path: Vec<&str> = Vec::new();
    let mut help = output(Command::new(program(name)).arg("--help"));
    for word in words {
        if !is_subcommand(&help, word) {
            break;
        }
        path.push(word);
        help = output(Command::new(program(name)).args(&path).arg("--help"));
    }
    let nameless = words.first().is_some_and(|word| !word.starts_with('-')) && path.is_empty();
    assert!(!nameless, "{document}: `{name}` has no command {}", words[0]);
    for flag in words.iter().filter(|word| word.starts_with("--")) {
        let flag = flag.split('=').next().unwrap_or_default();
        assert!(help.contains(flag), "{document}: `{name} {}` has no flag {flag}", path.join(" "));
    }
}

/// True if a program's help lists the word under its commands.
fn is_subcommand(help: &str, word: &str) -> bool {
    let listed = help.split("Commands:").nth(1).unwrap_or_default();
    let listed = listed.lines().skip(1).take_while(|line| line.starts_with("  "));
    listed.into_iter().any(|line| line.split_whitespace().next() == Some(word))
}

/// Targets of Markdown links and pictures.
fn links(text: &str) -> Vec<String> {
    let after = text.split("](").skip(1);
    after.filter_map(|rest| rest.split_once(')')).map(|(target, _)| target.to_owned()).collect()
}

#[test]
fn commands_and_links_are_found() {
    let text = "a [b](c.md#d)\n\n```sh\nX=1 tests/run   # all of it\nfleetune-sim run \\\n  --seed 7\n\n# word\n```\n";
    assert_eq!(commands(text), ["X=1 tests/run", "fleetune-sim run --seed 7"]);
    assert_eq!(links(text), ["c.md#d"]);
    assert!(Path::new("c.md").is_relative());
}
