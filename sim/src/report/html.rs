//! The report as one self-contained page: no script, no font and no picture from elsewhere. Plots
//! are SVG made in `html/lines.rs` and `html/bars.rs`; every text of the run is escaped in
//! `html/text.rs`. What the run found out is `report.rs`; the sentences are `words.rs`.

mod bars;
mod lines;
mod plot;
mod text;

use super::{LocalOnlyReport, PrivacyReport, ReleaseReport, Report, Sample, words};
use crate::next_word::{NextWord, Recall};
use lines::Scope;
use text::{escape, folded, table};

const STYLE: &str = include_str!("html/page.css");
/// Longer tables of rounds are folded at first.
const ROUNDS_OPEN_MAX: usize = 24;

/// The page, a whole HTML document.
pub(crate) fn render(report: &Report) -> String {
    let body = [
        header(report),
        privacy(report),
        learning(report),
        local_only(&report.local_only),
        fleet(report),
        next_word(report),
        rounds(report),
        report.release.as_ref().map_or_else(no_release, release),
        reproduce(report),
    ]
    .concat();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>fleetune: {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escape(&report.model.name)
    )
}

fn header(report: &Report) -> String {
    let tiles = [
        tile("Seen users: base \u{2192} federated", report.base.eval_nll, report.r#final.scores.eval_nll),
        tile(
            "Held-out users: base \u{2192} federated",
            report.base.heldout_nll,
            report.r#final.scores.heldout_nll,
        ),
        tile(
            "Own texts: alone \u{2192} federated",
            report.local_only.eval_nll,
            report.local_only.federated_eval_nll,
        ),
    ];
    format!(
        "<header>\n<p class=\"eyebrow\">fleetune {} · simulated fleet</p>\n<h1>{}.</h1>\n<p class=\"lead\">{}.</p>\n\
         <p>{}</p>\n<div class=\"tiles\">{}</div>\n</header>\n",
        escape(&report.version),
        escape(&words::headline(report)),
        escape(&words::against_local_only(report)),
        escape(&setting(report)),
        tiles.concat()
    )
}

/// What was run, in two sentences.
fn setting(report: &Report) -> String {
    let contributions: u64 = report.rounds.iter().map(|round| u64::from(round.completed)).sum();
    format!(
        "A fleet of {} trained {} ({} parameters, {}): {} and {}, {} tokens. It took {} on {}.",
        words::plural(report.data.users as u64, "user"),
        report.model.name,
        words::count(report.model.parameters),
        words::trained(report),
        words::plural(report.rounds.len() as u64, "round"),
        words::plural(contributions, "contribution"),
        words::count(report.rounds.last().map_or(0, |round| round.tokens)),
        words::duration(report.seconds),
        words::plural(report.threads as u64, "thread"),
    )
}

fn tile(name: &str, before: f64, after: f64) -> String {
    let change = words::signed(after - before);
    let perplexities = format!("{} \u{2192} {}", perplexity(before), perplexity(after));
    format!(
        "<div class=\"tile\"><h2>{}</h2><p class=\"figure\">{} \u{2192} <b>{}</b></p>\
         <p>{change} nats a token<br>perplexity {perplexities}</p></div>",
        escape(name),
        words::nll(before),
        words::nll(after)
    )
}

fn perplexity(nll: f64) -> String {
    if nll.is_finite() { format!("{:.1}", nll.exp()) } else { words::nll(f64::NAN) }
}

/// A drawing of epsilon by round as a file of its own.
pub(crate) fn epsilon_svg(epsilons: &[f64], label: &str) -> String {
    lines::epsilon_drawing(epsilons, label, STYLE)
}

/// A private run: what is claimed for whom, the curve, and the whole statement.
fn private(privacy: &PrivacyReport) -> (&'static str, &'static str, String) {
    let simulated = privacy.simulated_noise_cohort.is_some();
    let label =
        if simulated { "of the deployment that is imagined" } else { "of a device in every round it may" };
    let plot = lines::epsilon_plot(&privacy.epsilon_by_round, label);
    let json = serde_json::to_value(privacy).unwrap_or_default();
    let title = if simulated { "Privacy: a simulated noise cohort" } else { "Privacy" };
    let ledger = format!(
        "<p>The coordinator's ledger: {} opened, of at least {}.</p>",
        words::plural(u64::from(privacy.sums_opened), "sum"),
        words::plural(u64::from(privacy.survivors_least), "contribution"),
    );
    let body = format!(
        "{ledger}<div class=\"plots\"><figure><figcaption>Epsilon by round</figcaption>{plot}</figure></div>\n\
         <details><summary>The statement, as signed with the release</summary><p>{}</p><pre>{}</pre></details>",
        escape(&privacy.statement.words()),
        escape(&pretty(&json))
    );
    (if simulated { "warning" } else { "" }, title, body)
}

fn privacy(report: &Report) -> String {
    let (class, title, statement) = match &report.privacy {
        None => (
            "warning",
            "Privacy: none",
            "<p>In <code>report.json</code> this stands as <code>\"privacy\": null</code>: no claim of privacy is \
             made for the people whose texts were trained on.</p>"
                .into(),
        ),
        Some(privacy) => private(privacy),
    };
    format!(
        "<section class=\"privacy {class}\">\n<h2>{title}</h2>\n<p>{}</p>\n{statement}\n\
         <p>Aggregation: <code>{}</code>{}.</p>\n</section>\n",
        escape(&report.privacy_in_words),
        escape(&report.aggregation),
        report
            .secure_aggregation
            .as_ref()
            .map_or_else(String::new, |s| format!(": {}", escape(&s.in_words())))
    )
}

fn learning(report: &Report) -> String {
    format!(
        "<section>\n<h2>Learning</h2>\n\
         <p>Mean negative log-likelihood of the next token (NLL, natural logarithm; lower is better) on texts that \
         nobody trained on: the last texts of users who train, and texts of {} who never do. Federated and central \
         training start from the same base and use as many tokens. The scale does not start at zero.</p>\n\
         <div class=\"plots\">\n{}{}</div>\n{}{}</section>\n",
        words::plural(report.data.heldout_users as u64, "user"),
        figure("Seen users", &lines::nll_plot(report, Scope::Seen)),
        figure("Held-out users", &lines::nll_plot(report, Scope::HeldOut)),
        scores(report),
        folded("Values of central training on the way", &central_curve(report)),
    )
}

fn figure(caption: &str, drawing: &str) -> String {
    format!("<figure><figcaption>{}</figcaption>{drawing}</figure>\n", escape(caption))
}

fn scores(report: &Report) -> String {
    let row = |name: &str, scores: &super::Scores, gain: [String; 2]| {
        let [seen, heldout] = gain;
        vec![
            name.into(),
            words::nll(scores.eval_nll),
            words::percent(scores.eval_accuracy),
            seen,
            words::nll(scores.heldout_nll),
            words::percent(scores.heldout_accuracy),
            heldout,
        ]
    };
    let none = || words::nll(f64::NAN);
    let gain = [words::percent(report.gain.seen), words::percent(report.gain.heldout)];
    table(
        "At the end",
        &["model", "seen NLL", "accuracy", "share of gain", "held-out NLL", "accuracy", "share of gain"],
        &[
            row("base", &report.base, [none(), none()]),
            row("central", &report.central.scores, [words::percent(1.0), words::percent(1.0)]),
            row("federated", &report.r#final.scores, gain),
        ],
    )
}

fn central_curve(report: &Report) -> String {
    let rows: Vec<Vec<String>> = report
        .central
        .curve
        .iter()
        .map(|at| vec![words::count(at.tokens), words::nll(at.eval_nll), words::nll(at.heldout_nll)])
        .collect();
    table("Central training", &["tokens", "seen NLL", "held-out NLL"], &rows)
}

fn local_only(local: &LocalOnlyReport) -> String {
    let row = |device: &super::LocalOnlyDevice| {
        vec![
            device.user.clone(),
            words::nll(device.base_nll),
            words::nll(device.local_nll),
            words::nll(device.federated_nll),
            words::count(device.tokens),
        ]
    };
    let mean = [local.base_eval_nll, local.eval_nll, local.federated_eval_nll].map(words::nll);
    let mut rows: Vec<Vec<String>> = local.devices.iter().map(row).collect();
    rows.push([vec!["mean".into()], mean.to_vec(), vec![String::new()]].concat());
    format!(
        "<section>\n<h2>Together or alone</h2>\n\
         <p>Each of these devices also trained alone, {} on its own text. Bars show the gain over the base model on \
         the device's own test text, in nats a token; a bar to the left is a loss.</p>\n\
         <div class=\"plots\">\n{}<div>{}</div></div>\n</section>\n",
        words::plural(u64::from(local.steps), "step"),
        figure("Gain over the base model", &bars::local_only_plot(local)),
        table("NLL on own test text", &["device", "base", "alone", "federated", "tokens"], &rows),
    )
}

fn fleet(report: &Report) -> String {
    format!(
        "<section>\n<h2>Rounds of the fleet</h2>\n<div class=\"plots\">\n{}{}</div>\n</section>\n",
        figure("What became of selected devices", &bars::participation_plot(&report.rounds)),
        figure("Size of the step", &lines::update_norm_plot(&report.rounds)),
    )
}

/// What keyboards are judged by; nothing if it was not asked for.
fn next_word(report: &Report) -> String {
    if report.next_word.is_empty() {
        return String::new();
    }
    let columns = ["model", "NLL", "token", "in three", "word", "in three"];
    let group = |caption: &str, of: fn(&NextWord) -> &Recall| {
        let row = |at: &NextWord| {
            let found = of(at);
            let shares = [found.token_top1, found.token_top3, found.word_top1, found.word_top3];
            [vec![at.model.clone(), words::nll(found.nll)], shares.map(words::percent).to_vec()].concat()
        };
        table(caption, &columns, &report.next_word.iter().map(row).collect::<Vec<_>>())
    };
    format!(
        "<section>\n<h2>Next token, next word</h2>\n\
         <p>How often the right one was the first guess, and among the first three. A word is offered when one of the \
         three most likely first parts, completed greedily, gives it whole. Unigrams and bigrams are counted on the \
         training texts of all users.</p>\n{}{}</section>\n",
        group("Seen users", |row| &row.seen),
        group("Held-out users", |row| &row.heldout),
    )
}

fn rounds(report: &Report) -> String {
    let columns = [
        "round",
        "tokens",
        "selected",
        "completed",
        "dropped",
        "failed attempts",
        "train NLL",
        "seen NLL",
        "held-out NLL",
        "update norm",
        "fleet time",
        "simulated in",
    ];
    let row = |round: &super::RoundReport| {
        vec![
            round.round.to_string(),
            words::count(round.tokens),
            round.selected.to_string(),
            round.completed.to_string(),
            round.dropped.to_string(),
            round.failed_attempts.to_string(),
            words::nll(round.train_nll),
            words::nll_or_nothing(round.eval_nll),
            words::nll_or_nothing(round.heldout_nll),
            words::nll(round.update_norm),
            words::duration(round.virtual_seconds),
            words::duration(round.seconds),
        ]
    };
    let table = table("Every round", &columns, &report.rounds.iter().map(row).collect::<Vec<_>>());
    let table =
        if report.rounds.len() > ROUNDS_OPEN_MAX { folded("Every round as a table", &table) } else { table };
    format!("<section>\n{table}</section>\n")
}

fn release(release: &ReleaseReport) -> String {
    let samples: String = release.samples.iter().map(sample).collect();
    format!(
        "<section>\n<h2>Release {}</h2>\n\
         <p>{} fetched, verified and opened it: the quantized base ({}) and the adapter beside it ({}). Opened as a \
         device opens them, the files score NLL {} on seen users' test text.</p>\n{samples}</section>\n",
        release.version,
        words::plural(u64::from(release.devices_active), "device"),
        words::bytes(release.base_bytes),
        words::bytes(release.adapter_bytes),
        words::nll(release.eval_nll),
    )
}

fn no_release() -> String {
    "<section>\n<h2>Release</h2>\n<p>Nothing was released.</p>\n</section>\n".into()
}

fn sample(sample: &Sample) -> String {
    let answer = |name: &str, text: &str| {
        format!(
            "<div><h3>{name}</h3><blockquote><b>{}</b>{}</blockquote></div>",
            escape(&sample.prompt),
            escape(text)
        )
    };
    format!(
        "<div class=\"samples\">{}{}</div>\n",
        answer("base", &sample.base),
        answer("released", &sample.released)
    )
}

fn reproduce(report: &Report) -> String {
    let row = |name: &str, value: &str| format!("<dt>{name}</dt><dd><code>{}</code></dd>", escape(value));
    let rows = [
        row("seed", &report.seed.to_string()),
        row("base model", &format!("{} sha256 {}", report.model.name, report.model.sha256)),
        row("data", &format!("{} sha256 {}", report.data.name, report.data.sha256)),
        row("final adapter", &format!("sha256 {}", report.r#final.adapter_sha256)),
        row("version", &report.version),
        row("threads", &report.threads.to_string()),
        row("peak memory", &format!("{:.0} MiB", report.peak_rss_mib)),
    ];
    format!(
        "<section>\n<h2>To run it again</h2>\n\
         <p>The same version, scenario, seed, base model and data give the same adapter, byte for byte, at any number \
         of threads.</p>\n<dl>{}</dl>\n<details><summary>Scenario, defaults filled in</summary>\n<pre>{}</pre></details>\n\
         </section>\n",
        rows.concat(),
        escape(&scenario(&report.scenario))
    )
}

/// The scenario as the TOML that a run reads, or as JSON where TOML cannot say it.
fn scenario(value: &serde_json::Value) -> String {
    toml::to_string_pretty(&tidy(value)).unwrap_or_else(|_| pretty(value))
}

/// Leaves out what JSON calls null and TOML cannot say, and writes numbers that came from an f32
/// with the digits that an f32 has: 0.001, not 0.0010000000474974513.
fn tidy(value: &serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::Object(map) => {
            let kept = map.iter().filter(|(_, value)| !value.is_null());
            Value::Object(kept.map(|(key, value)| (key.clone(), tidy(value))).collect())
        }
        Value::Array(list) => Value::Array(list.iter().map(tidy).collect()),
        Value::Number(number) if number.is_f64() => {
            number.as_f64().map_or_else(|| value.clone(), short_float)
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "compared with the original right after")]
fn short_float(value: f64) -> serde_json::Value {
    let short = value as f32;
    let digits = if f64::from(short) == value { short.to_string().parse().unwrap_or(value) } else { value };
    digits.into()
}

fn pretty(value: &serde_json::Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_else(|_| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};

    /// Every tag is closed, in order; the void elements are those that the page uses.
    fn check_tags(page: &str) {
        let mut open: Vec<&str> = Vec::new();
        let style = page.find("</style>").unwrap();
        for piece in page[style + 8..].split('<').skip(1) {
            let (tag, _) = piece.split_once('>').unwrap_or_else(|| panic!("unclosed tag: <{piece}"));
            let name = tag.trim_start_matches('/').split_ascii_whitespace().next().unwrap();
            match (tag.starts_with('/'), tag.ends_with('/') || name == "br") {
                (true, _) if name == "head" => {}
                (true, _) if name == "html" => assert!(open.is_empty(), "left open: {open:?}"),
                (true, _) => assert_eq!(open.pop(), Some(name), "</{name}>"),
                (false, true) => {}
                (false, false) => open.push(name),
            }
        }
    }

    #[test]
    fn the_page_is_whole_and_self_contained() {
        let page = render(&sample::report());
        check_tags(&page);
        for outside in ["http:", "https:", "//", "src=", "href=", "url(", "@import", "<script", "<link"] {
            assert!(!page.contains(outside), "{outside} in the page");
        }
        if let Some(path) = std::env::var_os("FLEETUNE_WRITE_SAMPLE_PAGE") {
            std::fs::write(path, page).unwrap();
        }
    }

    #[test]
    fn texts_of_the_run_cannot_become_markup() {
        let page = render(&sample::report());
        for escaped in
            ["fleetune-base &lt;2M&gt;", "&lt;b&gt;Ariel&lt;/b&gt;", "Fool &amp; Kent", "&lt;people&gt;"]
        {
            assert!(page.contains(escaped), "{escaped}");
        }
    }

    #[test]
    fn a_run_without_privacy_says_so_in_words() {
        let mut report = sample::report();
        assert!(render(&report).contains("Privacy: none"));
        report.privacy = Some(sample::privacy());
        let page = render(&report);
        check_tags(&page);
        assert!(
            !page.contains("Privacy: none") && page.contains("Privacy: a simulated noise cohort"),
            "{page}"
        );
        assert!(page.contains("Epsilon by round") && page.contains("round 16: epsilon 2.000"), "{page}");
    }

    #[test]
    fn an_empty_report_renders() {
        let mut report = sample::report();
        report.rounds.clear();
        report.central.curve.clear();
        report.local_only.devices.clear();
        report.release = None;
        report.r#final.scores.eval_nll = f64::NAN;
        let page = render(&report);
        check_tags(&page);
        assert!(page.contains("Nothing was released") && !page.contains("NaN"), "{page}");
    }

    #[test]
    fn the_scenario_can_be_run_again() {
        let scenario = scenario(&sample::report().scenario);
        let read: toml::Table = scenario.parse().unwrap();
        assert_eq!(read["cohort"]["report_goal"].as_integer(), Some(8));
        assert!(!scenario.contains("gradient_clip"), "{scenario}");
        assert!(scenario.contains("learning_rate = 0.001\n"), "{scenario}");
    }
}
