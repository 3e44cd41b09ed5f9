//! Real processes over loopback gRPC: a coordinator and its devices, killed and started again.

mod fleet;
mod full;
mod full_disk;
mod hostile;
mod killed;
mod private;
mod scripted;
mod tls;

use crate::support::root;
use fleet::{Site, wait_until};
use fleetune_sim::{
    experiment::Experiment,
    fleet::{Fleet, training_seed},
    pool::Pool,
    scenario::Scenario,
};
use std::fs;

const SEED: u64 = 5;

/// The simulator's side of `fleet::TASK`.
const SCENARIO: &str = r#"
rounds = 3
[fleet]
cohort = 8
over_selection = 1.0
reports_min = 8
blocks_min = 1
[devices]
dropout = 0.0
[training]
steps = 2
batch_size = 2
block_tokens = 32
learning_rate = 5e-3
learning_rate_final_fraction = 0.15
[server]
optimizer = "fedavg"
learning_rate = 1.0
"#;

/// All of eight; a device that waits for the others' keys asks again within seconds.
const EIGHT: &str = "report_goal = 8\nselected_max = 8\nreports_min = 8\nreport_ms = 60000\nstep_ms = 30000";

/// All of four.
const FOUR: &str = "report_goal = 4\nselected_max = 4\nreports_min = 4\nreport_ms = 30000\nstep_ms = 30000";

#[test]
fn eight_devices_equal_the_simulator() {
    let site = Site::new(8, EIGHT, 3, 2);
    eight_devices_run(&site);
    let attempts = site.status()["tasks"][0]["attempts"].clone();
    for attempt in attempts.as_array().expect("attempts") {
        let aggregation = &attempt["aggregation"];
        assert_eq!(aggregation["protocol"], "secagg+", "{attempt}");
        let cohort = &aggregation["cohorts"][0];
        assert_eq!(
            (cohort["members"].as_u64(), cohort["survivors"].as_u64()),
            (Some(8), Some(8)),
            "{attempt}"
        );
    }
}

#[test]
fn eight_insecure_devices_equal_the_simulator() {
    eight_devices_run(&Site::insecure(8, EIGHT, 3, 2));
}

/// To the release, which answers, over the simulator's final checkpoint.
fn eight_devices_run(site: &Site) {
    let _coordinator = site.coordinator();
    let devices: Vec<_> =
        (0..8).map(|user| site.device(user, &hex::encode(training_seed(SEED, user)))).collect();
    wait_until("eight devices run the release", || {
        (0..8).all(|user| site.device_status(user)["releases"]["active"].as_u64() == Some(1))
    });
    assert_eq!(site.status()["tasks"][0]["checkpoint"].as_str(), Some(simulated(site).as_str()));
    drop(devices);
    let answer = site.generate(3, "My lord,");
    assert!(!answer.trim().is_empty(), "the released model answers");
}

/// SHA-256 of the final checkpoint in the simulator.
fn simulated(site: &Site) -> String {
    let scenario = Scenario::from_toml("test", SCENARIO).expect("a sound scenario");
    let experiment = Experiment::open(&scenario, None, Some(&site.dataset()), SEED).expect("an experiment");
    let pool = Pool::new(2);
    let mut adapter = Vec::new();
    let fleet = Fleet::new(&scenario, &experiment, &pool, SEED).expect("a fleet");
    fleet
        .run(&mut |round| {
            assert_eq!(round.record.completed, 8);
            adapter = round.adapter;
        })
        .expect("a finished fleet");
    hex::encode(experiment.layout.checkpoint_sha256(&adapter))
}

#[test]
fn a_killed_coordinator_goes_on_from_its_checkpoint() {
    let site = Site::new(4, FOUR, 4, 2);
    let coordinator = site.coordinator();
    let _devices: Vec<_> = (0..4).map(|user| site.device(user, &hex::encode([7; 32]))).collect();
    wait_until("a round has finished", || site.round() >= 1);
    drop(coordinator); // SIGKILL
    let (round, checkpoint) = (site.round(), site.status()["tasks"][0]["checkpoint"].clone());
    assert!(round >= 1 && checkpoint.is_string(), "the checkpoint is on disk");
    let _coordinator = site.coordinator();
    wait_until("all rounds have finished", || site.round() == 4);
    let status = site.status();
    let attempts = status["tasks"][0]["attempts"].as_array().expect("attempts");
    let finished =
        |round: u64| attempts.iter().filter(|a| a["round"] == round && a["outcome"] == "Finished").count();
    assert_eq!((0..4).map(finished).collect::<Vec<_>>(), [1; 4], "each round counts once: {attempts:?}");
    wait_until("the release serves", || site.device_status(0)["releases"]["active"].as_u64() == Some(1));
}

#[test]
fn a_killed_device_costs_nothing_and_comes_back() {
    let policy = "report_goal = 5\nselected_max = 5\nreports_min = 4\nreport_ms = 25000\nstep_ms = 10000";
    let site = Site::new(5, policy, 3, 60);
    let _coordinator = site.coordinator();
    let _others: Vec<_> = (1..5).map(|user| site.device(user, &hex::encode([8; 32]))).collect();
    let victim = site.device(0, &hex::encode([9; 32]));
    wait_until("the victim is selected", || site.device_log(0).contains("selected"));
    drop(victim); // SIGKILL while it trains
    wait_until("the round completes without it", || site.round() >= 1);
    assert_eq!(site.status()["tasks"][0]["attempts"][0]["completed"].as_u64(), Some(4));
    let _back = site.device(0, &hex::encode([9; 32]));
    wait_until("it takes part again", || site.device_log(0).contains("contributed"));
    wait_until("all rounds have finished", || site.round() == 3);
}

#[test]
fn a_broken_base_or_broken_data_is_named_and_nothing_starts() {
    let site = Site::new(1, FOUR, 1, 1);
    let bytes = fs::read(root().join("sim/base/fleetune-base.q8_0.gguf")).expect("the embedded base");
    fs::write(site.path("base.gguf"), &bytes[..bytes.len() / 2]).expect("a truncated model");
    let error = site.coordinator_error();
    assert!(error.contains("base.gguf") && error.contains("truncated"), "{error}");
    fs::write(site.path("user-0.jsonl"), "\"a first text\"\nno json\n").expect("broken data");
    let error = site.device_error(0);
    assert!(error.contains("user-0.jsonl:2: not JSON"), "{error}");
}
