//! Differential privacy between real processes: what is on the devices' disks, in the coordinator's database and
//! in the signed release afterwards.

use super::fleet::{Site, wait_until};

const DEVICES: usize = 4;
const ROUND: &str = "report_goal = 4\nselected_max = 4\nreports_min = 3";

#[test]
fn a_private_task_is_accounted_for_on_every_side() {
    let site = Site::private(DEVICES, ROUND, 2, 1);
    let _coordinator = site.coordinator();
    let devices: Vec<_> = (0..DEVICES).map(|user| site.device(user, &"07".repeat(32))).collect();
    wait_until("every device runs the release", || {
        (0..DEVICES).all(|user| site.device_status(user)["releases"]["active"] == 1)
    });
    drop(devices);
    let status = site.status();
    let ledger = status["tasks"][0]["privacy_ledger"].as_array().expect("a ledger").clone();
    let finished = status["tasks"][0]["attempts"].as_array().expect("attempts").iter();
    let finished = finished.filter(|attempt| attempt["outcome"] == "Finished").count();
    assert!(ledger.len() >= finished && finished == 2, "{status}");
    for sum in &ledger {
        assert!(sum["survivors"].as_u64() >= Some(3) && sum["purpose"] == "training", "{sum}");
    }
    for user in 0..DEVICES {
        let account = site.device_privacy(user);
        let taken = account["tasks"][0]["participations"].as_u64().expect("a task");
        let spent = account["epsilon_spent"].as_f64().expect("a number");
        assert!((1..=2).contains(&taken) && spent > 0.0 && spent <= 8.0, "{account}");
        let guarantee = &account["release_statement"]["guarantee"];
        assert_eq!(guarantee["kind"], "differential_privacy", "{account}");
        let (epsilon, most) = (guarantee["epsilon"].as_f64(), &guarantee["participations_max"]);
        assert!(epsilon.is_some_and(|e| e > 7.9 && e <= 8.0) && *most == 2, "{guarantee}");
        assert!(account["release_statement_in_words"].as_str().is_some_and(|w| w.contains("epsilon")));
    }
}
