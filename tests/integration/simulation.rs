//! The simulator as a whole: what a run leaves behind, and that it depends on nothing but its seed.

use fleetune_privacy::Guarantee;
use fleetune_sim::{
    report::Report,
    run::{RunArgs, run},
};
use serde_json::Value;
use std::{fs, path::Path};

/// Small enough for a test, with dropouts, slow devices and rounds that lose some of their cohort.
const SCENARIO: &str = "
rounds = 3
[fleet]
cohort = 6
over_selection = 1.5
reports_min = 2
[devices]
dropout = 0.3
speed_sigma = 1.5
[training]
steps = 2
[evaluation]
blocks = 4
every = 2
[local_only]
devices = 2
steps = 2
";

fn run_with(folder: &Path, threads: usize, seed: u64) -> (Report, Value) {
    run_scenario(folder, SCENARIO, threads, seed)
}

fn run_scenario(folder: &Path, scenario_text: &str, threads: usize, seed: u64) -> (Report, Value) {
    let scenario = folder.join("scenario.toml");
    fs::write(&scenario, scenario_text).expect("a scenario file");
    let out = folder.join(format!("out-{threads}-{seed}"));
    let args = RunArgs {
        scenario: Some(scenario),
        model: None,
        data: None,
        seed,
        rounds: None,
        cohort: None,
        privacy: false,
        epsilon: None,
        noise_cohort: None,
        noise_population: None,
        threads: Some(threads),
        out: out.clone(),
    };
    let report = run(&args).expect("a finished run");
    let json = fs::read_to_string(out.join("report.json")).expect("report.json");
    assert!(
        fs::read_to_string(out.join("report.html"))
            .expect("report.html")
            .to_lowercase()
            .starts_with("<!doctype html>")
    );
    assert!(out.join("adapter.gguf").exists() && out.join("adapter.safetensors").exists());
    (report, serde_json::from_str(&json).expect("JSON"))
}

/// A report without what the clock and the machine say.
fn without_times(mut report: Report) -> Report {
    (report.seconds, report.peak_rss_mib, report.threads) = (0.0, 0.0, 0);
    report.rounds.iter_mut().for_each(|round| round.seconds = 0.0);
    report
}

#[test]
fn a_run_depends_on_its_seed_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let (one, json) = run_with(folder.path(), 1, 7);
    let (three, _) = run_with(folder.path(), 3, 7);
    let (other, _) = run_with(folder.path(), 3, 8);
    assert_ne!(one.r#final.adapter_sha256, other.r#final.adapter_sha256);
    holds_what_readers_expect(&json);
    assert!(one.rounds.iter().any(|round| round.dropped > 0), "the scenario loses devices");
    assert_eq!(without_times(one), without_times(three));
}

/// What `--privacy` lays over a scenario, at the size of a test.
const PRIVATE: &str = "
[adapter]
targets = [\"q\", \"v\"]
freeze_a = true
[privacy]
enabled = true
epsilon = 8.0
participations_max = 2
";

#[test]
fn a_private_run_says_what_it_claims_and_is_repeated_by_its_seed() {
    let folder = tempfile::tempdir().expect("a folder");
    let (one, json) = run_scenario(folder.path(), &format!("{SCENARIO}{PRIVATE}"), 2, 7);
    let (again, _) = run_scenario(folder.path(), &format!("{SCENARIO}{PRIVATE}"), 1, 7);
    assert_eq!(one.r#final.adapter_sha256, again.r#final.adapter_sha256);
    let privacy = one.privacy.expect("a private run");
    let Guarantee::DifferentialPrivacy(guarantee) = &privacy.statement.guarantee else { panic!("{json}") };
    assert!(guarantee.epsilon > 7.9 && guarantee.epsilon <= 8.0 && guarantee.participations_max == 2);
    assert!(privacy.participations_most <= 2 && privacy.sums_opened >= 1);
    assert!(privacy.survivors_least >= guarantee.survivors_min);
    assert!(privacy.epsilon_by_round.is_sorted() && privacy.epsilon_by_round.iter().all(|e| *e <= 8.0));
    assert!(one.privacy_in_words.contains("epsilon 8.000") || one.privacy_in_words.contains("epsilon 7.9"));

    let cohort = format!("{SCENARIO}{PRIVATE}noise_cohort = 1000\n");
    let (imagined, json) = run_scenario(folder.path(), &cohort, 2, 7);
    assert!(imagined.privacy_in_words.starts_with("SIMULATED NOISE COHORT: nobody"));
    assert_eq!(json.pointer("/privacy/statement/guarantee/kind"), Some(&Value::from("simulated")));
    let guarantee =
        imagined.privacy.and_then(|p| p.simulated_noise_cohort).expect("a deployment is imagined");
    assert!(guarantee.epsilon <= 8.0 && guarantee.epsilon > 7.9 && guarantee.deployment.cohort == 1000);
    let page = fs::read_to_string(folder.path().join("out-2-7/report.html")).expect("report.html");
    assert!(page.contains("Privacy: a simulated noise cohort") && page.contains("Epsilon by round"));
}

fn holds_what_readers_expect(json: &Value) {
    let number =
        |pointer: &str| json.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer}"));
    for pointer in [
        "/model/parameters",
        "/model/trainable",
        "/seed",
        "/rounds/0/round",
        "/rounds/0/selected",
        "/rounds/0/completed",
        "/rounds/0/dropped",
        "/rounds/0/train_nll",
        "/rounds/1/eval_nll",
        "/rounds/1/heldout_nll",
        "/rounds/0/update_norm",
        "/rounds/0/seconds",
        "/base/eval_nll",
        "/base/heldout_nll",
        "/central/eval_nll",
        "/central/heldout_nll",
        "/local_only/eval_nll",
        "/final/eval_nll",
        "/final/heldout_nll",
        "/peak_rss_mib",
    ] {
        assert!(number(pointer).is_finite(), "{pointer}");
    }
    assert_eq!(json.pointer("/privacy"), Some(&Value::Null), "no privacy is claimed");
    assert_eq!(json.pointer("/aggregation").and_then(Value::as_str), Some("secagg+"));
    assert_eq!(json.pointer("/final/adapter_sha256").and_then(Value::as_str).map(str::len), Some(64));
    assert!(number("/final/eval_nll") < number("/base/eval_nll"), "three rounds help");
}
