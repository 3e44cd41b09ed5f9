//! The short table that a run prints at its end. The page (`html.rs`) says the same and more.

use super::{Report, Scores, words};
use crate::next_word::Recall;

/// Width of the column that names a row.
const NAME: usize = 22;

/// The table, lines ended by line breaks; at most 100 columns unless a name is long.
pub(crate) fn table(report: &Report) -> String {
    let mut lines = vec![title(report), String::new(), columns()];
    lines.push(row("base", &report.base));
    lines.push(row("central training", &report.central.scores));
    lines.push(row("federated", &report.r#final.scores));
    lines.push(cells(
        "share of the gain",
        &words::percent(report.gain.seen),
        "",
        &words::percent(report.gain.heldout),
        "",
    ));
    lines.extend(next_word(report));
    lines.push(String::new());
    lines.push(local_only(report));
    lines.push(fleet(report));
    lines.extend(release(report));
    lines.push(cost(report));
    lines.push(format!(
        "{:<11} sha256 {}, seed {}",
        plain(&report.model.trains),
        report.r#final.adapter_sha256,
        report.seed
    ));
    lines.extend(
        report.secure_aggregation.as_ref().map(|s| format!("{:<11} {}", report.aggregation, s.in_words())),
    );
    lines.push(format!("privacy     {}", plain(&report.privacy_in_words)));
    lines.push(String::new());
    lines.push(format!("{}.", words::headline(report)));
    lines.push(format!("{}.", words::against_local_only(report)));
    lines.push(String::new());
    lines.join("\n").replace('\u{a0}', " ")
}

fn title(report: &Report) -> String {
    format!(
        "{}: {} parameters, {}; {}, {} held out",
        plain(&report.model.name),
        words::count(report.model.parameters),
        words::trained(report),
        words::plural(report.data.users as u64, "user"),
        words::count(report.data.heldout_users as u64)
    )
}

fn columns() -> String {
    cells("NLL, nats a token", "seen", "accuracy", "held-out", "accuracy")
}

fn row(name: &str, scores: &Scores) -> String {
    let Scores { eval_nll, heldout_nll, eval_accuracy, heldout_accuracy } = *scores;
    cells(
        name,
        &words::nll(eval_nll),
        &words::percent(eval_accuracy),
        &words::nll(heldout_nll),
        &words::percent(heldout_accuracy),
    )
}

fn cells(name: &str, seen: &str, seen_accuracy: &str, heldout: &str, heldout_accuracy: &str) -> String {
    let line = format!("{name:<NAME$}{seen:>10}{seen_accuracy:>10}{heldout:>12}{heldout_accuracy:>10}");
    line.trim_end().into()
}

/// The figures of keyboards; nothing if they were not asked for.
fn next_word(report: &Report) -> Vec<String> {
    if report.next_word.is_empty() {
        return Vec::new();
    }
    let recall = |at: &Recall| [at.token_top1, at.token_top3, at.word_top1, at.word_top3].map(words::percent);
    let line = |name: &str, [a, b, c, d]: [String; 4], [e, f, g, h]: [String; 4]| {
        format!("{name:<NAME$}{a:>9}{b:>9}{c:>9}{d:>9}  {e:>9}{f:>9}{g:>9}{h:>9}")
    };
    let columns = || ["token", "in 3", "word", "in 3"].map(str::to_owned);
    let mut lines = vec![String::new(), line("recall: seen, held-out", columns(), columns())];
    lines.extend(
        report.next_word.iter().map(|row| line(&plain(&row.model), recall(&row.seen), recall(&row.heldout))),
    );
    lines
}

fn local_only(report: &Report) -> String {
    let local = &report.local_only;
    format!(
        "own texts   of {}: base {}, alone after {} {}, federated {}",
        words::plural(local.devices.len() as u64, "device"),
        words::nll(local.base_eval_nll),
        words::plural(u64::from(local.steps), "step"),
        words::nll(local.eval_nll),
        words::nll(local.federated_eval_nll)
    )
}

fn fleet(report: &Report) -> String {
    let sum = |count: fn(&super::RoundReport) -> u32| -> u64 {
        report.rounds.iter().map(|round| u64::from(count(round))).sum()
    };
    format!(
        "fleet       {}, {} from {} selected, {} dropped, {} tokens",
        words::plural(report.rounds.len() as u64, "round"),
        words::plural(sum(|round| round.completed), "contribution"),
        words::count(sum(|round| round.selected)),
        words::count(sum(|round| round.dropped)),
        words::count(report.rounds.last().map_or(0, |round| round.tokens))
    )
}

fn release(report: &Report) -> Option<String> {
    let release = report.release.as_ref()?;
    let files = match release.adapter_bytes {
        0 => format!("model {}", words::bytes(release.base_bytes)),
        bytes => format!("base {}, adapter {}", words::bytes(release.base_bytes), words::bytes(bytes)),
    };
    Some(format!(
        "release     version {}: {files}; runs on {}, NLL {}",
        release.version,
        words::plural(u64::from(release.devices_active), "device"),
        words::nll(release.eval_nll)
    ))
}

fn cost(report: &Report) -> String {
    format!(
        "cost        {} on {}, peak memory {:.0} MiB",
        words::duration(report.seconds),
        words::plural(report.threads as u64, "thread"),
        report.peak_rss_mib
    )
}

/// Names come from files: a terminal must not take orders from them.
fn plain(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};
    use crate::next_word::NextWord;

    #[test]
    fn fits_a_terminal_and_holds_the_figures() {
        let table = table(&sample::report());
        let lines: Vec<&str> = table.lines().collect();
        assert!((12..=20).contains(&lines.len()), "{table}");
        assert_eq!(lines[5], "federated                  4.211    29.8 %       4.184    30.2 %");
        assert_eq!(lines[6], "share of the gain         94.7 %                95.7 %");
        assert!(table.contains("privacy     This run was not private"), "{table}");
    }

    #[test]
    fn the_figures_of_keyboards_stand_below_each_other() {
        let mut report = sample::report();
        let seen = Recall {
            token_top1: 0.25,
            token_top3: 0.4,
            word_top1: 0.125,
            word_top3: 0.25,
            ..Recall::default()
        };
        report.next_word = vec![NextWord { model: "bigrams".into(), seen, heldout: seen }];
        let table = table(&report);
        let line = table.lines().find(|line| line.starts_with("bigrams")).expect("a line");
        assert!(line.contains("25.0 %   40.0 %   12.5 %   25.0 %"), "{line}");
        let columns = table.lines().find(|line| line.starts_with("recall:")).expect("a line");
        assert!(columns.len() <= 100 && columns.len() == line.len(), "{columns}\n{line}");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let mut report = sample::report();
        report.model.name = "evil\u{1b}[2Jname".into();
        assert!(table(&report).starts_with("evil [2Jname: 2,012,544 parameters"));
    }
}
