//! Processes that die in the middle of secure aggregation. A scripted device holds the round at a step, so
//! the moment is exact; nothing here waits for a time to pass.

use super::fleet::{Site, wait_until};
use super::scripted::{Scripted, Step};
use serde_json::Value;

/// Four real devices and the scripted one.
const ROUND: &str = "report_goal = 5\nselected_max = 5\nreports_min = 4\nreport_ms = 40000\nstep_ms = 30000";

fn attempts(site: &Site) -> Vec<Value> {
    site.status()["tasks"][0]["attempts"].as_array().cloned().unwrap_or_default()
}

/// SIGKILL for the coordinator while its round waits for the scripted device's message of `step`.
fn coordinator_killed_at(step: Step) {
    let site = Site::new(4, ROUND, 2, 1);
    let coordinator = site.coordinator();
    let _devices: Vec<_> = (0..4).map(|user| site.device(user, &hex::encode([7; 32]))).collect();
    let mut scripted = Scripted::new(&site);
    scripted.run_to(step);
    if step == Step::Reveal {
        wait_until("the others have revealed their shares", || {
            (0..4).all(|user| site.device_log(user).contains("contributed"))
        });
    }
    drop(coordinator); // SIGKILL
    drop(scripted);
    assert!(attempts(&site).is_empty(), "the attempt was under way");
    let _coordinator = site.coordinator();
    wait_until("all rounds are over", || site.round() == 2);
    let attempts = attempts(&site);
    let finished: Vec<_> = attempts.iter().filter(|attempt| attempt["outcome"] == "Finished").collect();
    let rounds: Vec<_> = finished.iter().filter_map(|attempt| attempt["round"].as_u64()).collect();
    assert!(finished.iter().all(|attempt| attempt["completed"] == 4), "each counts once: {attempts:?}");
    if step == Step::Reveal {
        assert_eq!(rounds, [1], "{attempts:?}");
        let given_up = attempts[0]["outcome"]["Failed"].as_str().expect("a reason");
        assert!(given_up.contains("the round is given up"), "{given_up}");
        assert_eq!((&attempts[0]["round"], &attempts[0]["completed"]), (&Value::from(0), &Value::from(0)));
    } else {
        assert_eq!(rounds, [0, 1], "{attempts:?}");
    }
    wait_until("the release serves", || site.device_status(0)["releases"]["active"].as_u64() == Some(1));
}

#[test]
fn a_coordinator_killed_while_it_gathers_keys_starts_the_round_anew() {
    coordinator_killed_at(Step::Keys);
}

#[test]
fn a_coordinator_killed_while_shares_are_sent_starts_the_round_anew() {
    coordinator_killed_at(Step::Shares);
}

#[test]
fn a_coordinator_killed_while_masked_vectors_come_in_starts_the_round_anew() {
    coordinator_killed_at(Step::Masked);
}

#[test]
fn a_coordinator_killed_while_survivors_are_confirmed_starts_the_round_anew() {
    coordinator_killed_at(Step::Confirm);
}

#[test]
fn a_coordinator_killed_while_shares_are_revealed_gives_the_round_up() {
    coordinator_killed_at(Step::Reveal);
}

#[test]
fn a_device_killed_at_any_step_goes_on_from_its_disk_and_contributes_once() {
    for step in [Step::Keys, Step::Shares, Step::Masked, Step::Confirm] {
        let site = Site::new(4, ROUND, 1, 1);
        let _coordinator = site.coordinator();
        let _others: Vec<_> = (1..4).map(|user| site.device(user, &hex::encode([8; 32]))).collect();
        let victim = site.device(0, &hex::encode([9; 32]));
        let mut scripted = Scripted::new(&site);
        scripted.run_to(step);
        wait_until("the victim's message is on its disk", || site.kept_step(0) == step as u64);
        drop(victim); // SIGKILL
        let _back = site.device(0, &hex::encode([9; 32]));
        scripted.contribute();
        wait_until("the round is over", || site.round() == 1);
        let attempts = attempts(&site);
        assert_eq!(
            (attempts.len(), &attempts[0]["completed"]),
            (1, &Value::from(5)),
            "{step:?}: {attempts:?}"
        );
        wait_until("it knows", || site.device_log(0).contains("contributed"));
        assert!(!site.device_log(0).contains("selected"), "{step:?}: it went on with its session");
    }
}
