//! Budgets, participations and separations, through restarts and clocks that lie.

use super::*;
use crate::account::Skellam;
use proptest::prelude::*;

fn curve(rho: f64) -> RdpCurve {
    RdpCurve::from_fn(|alpha| rho * f64::from(alpha))
}

fn policy() -> PrivacyPolicy {
    PrivacyPolicy::default()
}

fn charge(task: &str, id: u8, round: u32) -> Charge {
    Charge {
        scope: Scope::of_task("p", task),
        purpose: Purpose::Training,
        id: ChargeId::Fresh([id; 32]),
        round,
        curve: curve(0.05),
        participations_max: 3,
        separation_ms: 1000,
        separation_rounds: 2,
    }
}

#[test]
fn a_charge_is_counted_once_and_survives_the_disk() {
    let mut ledger = Ledger::default();
    ledger.charge(&charge("a", 1, 0), &policy(), 5000).unwrap();
    let once = ledger.clone();
    // The process died between the charge and the send; it sends the same bytes again.
    let mut ledger = Ledger::from_bytes(&ledger.to_bytes()).unwrap();
    assert_eq!(ledger, once);
    ledger.charge(&charge("a", 1, 0), &policy(), 5001).unwrap();
    assert_eq!(ledger, once, "the same contribution again is free");
    assert_eq!(ledger.lines().next().unwrap().participations, 1);
    assert!(ledger.charge(&charge("a", 2, 0), &policy(), 9000).is_err(), "the same round, other noise");
}

#[test]
fn participations_and_separations_hold_across_restarts() {
    let mut ledger = Ledger::default();
    let mut now = 10_000;
    for (id, round) in [(1, 0), (2, 2), (3, 4)] {
        ledger.charge(&charge("a", id, round), &policy(), now).unwrap();
        ledger = Ledger::from_bytes(&ledger.to_bytes()).unwrap();
        let soon = ledger.check(&charge("a", 9, round + 2), &policy(), now + 999);
        let (too_soon, is_last) = (LedgerError::Separation { wait_ms: 1 }, round == 4);
        assert_eq!(
            soon.unwrap_err(),
            if is_last { LedgerError::Participations { taken: 3, max: 3 } } else { too_soon }
        );
        now += 1000;
        let near = ledger.check(&charge("a", 9, round + 1), &policy(), now);
        if !is_last {
            assert_eq!(near.unwrap_err(), LedgerError::Rounds { round: round + 1, next: round + 2 });
        }
    }
    assert!(ledger.is_closed(Scope::of_task("p", "a"), now + 1_000_000));
    assert!(!ledger.is_closed(Scope::of_task("p", "b"), now));
    // A plan signed anew for the same task does not bring participations back, unless it allows more.
    assert!(ledger.check(&charge("a", 9, 8), &policy(), now).is_err());
}

/// Whoever holds the device's clock: setting it back starts the separation over for as long as it stands there,
/// setting it forward gains time but neither rounds nor participations.
#[test]
fn a_clock_that_lies_gains_nothing_but_time() {
    let mut ledger = Ledger::default();
    ledger.charge(&charge("a", 1, 0), &policy(), 50_000).unwrap();
    ledger.observe_clock(20_000);
    assert!(ledger.is_closed(Scope::of_task("p", "a"), 20_999));
    let back = ledger.check(&charge("a", 2, 2), &policy(), 20_999);
    assert_eq!(back.unwrap_err(), LedgerError::Separation { wait_ms: 1 });
    assert!(ledger.check(&charge("a", 2, 2), &policy(), 21_000).is_ok());
    let forward = ledger.check(&charge("a", 2, 1), &policy(), u64::MAX);
    assert_eq!(forward.unwrap_err(), LedgerError::Rounds { round: 1, next: 2 });
    // Set right again, as a device does that starts in 1970: the separation counts from the charge.
    ledger.observe_clock(50_500);
    let again = ledger.check(&charge("a", 2, 2), &policy(), 50_500);
    assert_eq!(again.unwrap_err(), LedgerError::Separation { wait_ms: 500 });
    // Unobserved: before the last charge nothing has passed.
    let mut ledger = Ledger::default();
    ledger.charge(&charge("a", 1, 0), &policy(), 50_000).unwrap();
    assert!(ledger.check(&charge("a", 2, 2), &policy(), 10_000).is_err());
}

#[test]
fn a_request_over_budget_changes_nothing_and_spoils_nothing() {
    let mut ledger = Ledger::default();
    let mut large = charge("a", 1, 0);
    large.curve = curve(10.0);
    let before = ledger.clone();
    let error = ledger.charge(&large, &policy(), 0).unwrap_err();
    assert!(matches!(error, LedgerError::TaskBudget { .. }), "{error}");
    let short = PrivacyPolicy { epsilon_purpose_max: [1.0, 2.0, 2.0], ..policy() };
    let error = ledger.charge(&charge("a", 1, 0), &short, 0).unwrap_err();
    assert!(matches!(error, LedgerError::Budget { what: "training", .. }), "{error}");
    assert_eq!(ledger, before);
    ledger.charge(&charge("a", 2, 0), &policy(), 0).unwrap();
    // Purposes have budgets of their own within the whole.
    let telemetry = Charge { purpose: Purpose::Telemetry, curve: curve(0.06), ..charge("t", 3, 0) };
    assert!(ledger.check(&telemetry, &policy(), 0).is_ok());
    let telemetry = Charge { curve: curve(0.3), ..telemetry };
    let error = ledger.check(&telemetry, &policy(), 0).unwrap_err();
    assert!(matches!(error, LedgerError::Budget { what: "telemetry", .. }), "{error}");
    let tight = PrivacyPolicy { epsilon_max: 1.5, ..policy() };
    let error = ledger.check(&charge("b", 4, 0), &tight, 0).unwrap_err();
    assert!(matches!(error, LedgerError::Budget { what: "the device", .. }), "{error}");
}

#[test]
fn damage_is_never_an_empty_ledger() {
    let mut ledger = Ledger::default();
    ledger.charge(&charge("a", 1, 0), &policy(), 7).unwrap();
    let bytes = ledger.to_bytes();
    for length in 0..bytes.len() {
        assert!(Ledger::from_bytes(&bytes[..length]).is_none(), "cut at {length}");
    }
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x40;
        assert!(Ledger::from_bytes(&damaged).is_none(), "byte {at}");
    }
}

proptest! {
    /// However tasks, rounds, times and retries come: no task is charged more often than it allows, what is
    /// spent never falls, and it is exactly what was granted.
    #[test]
    fn what_is_spent_is_what_was_granted(
        steps in prop::collection::vec((0u8..3, any::<u8>(), 0u32..20, 0u64..30_000, any::<bool>()), 1..60),
    ) {
        let (mut ledger, mut granted, mut last) = (Ledger::default(), [0u32; 3], [None; 3]);
        for (task, id, round, now, again) in steps {
            let request = charge(&task.to_string(), id, round);
            let (index, name) = (usize::from(task), Some((id, round)));
            let repeated = last[index] == name;
            if ledger.charge(&request, &policy(), now).is_ok() {
                if !repeated {
                    granted[index] += 1;
                }
                last[index] = name;
                if again {
                    prop_assert!(ledger.charge(&request, &policy(), now).is_ok());
                }
            }
            let expected = curve(0.05).times(granted.iter().sum());
            for (spent, expected) in ledger.spent(Purpose::Training).values().iter().zip(expected.values()) {
                prop_assert!((spent - expected).abs() <= 1e-9 * expected);
            }
            prop_assert!(granted.iter().all(|taken| *taken <= 3));
            ledger = Ledger::from_bytes(&ledger.to_bytes()).unwrap();
        }
    }
}

#[test]
fn epsilon_of_what_is_spent_is_the_accountants() {
    let delta = Delta::new(1e-6).unwrap();
    let one = Skellam::new(500.0, 65_536, 4e5).unwrap().curve();
    let mut ledger = Ledger::default();
    for id in 0..3 {
        let request = Charge { curve: one.clone(), ..charge("a", id + 1, 2 * u32::from(id)) };
        ledger.charge(&request, &policy(), 2000 * u64::from(id)).unwrap();
    }
    let (spent, expected) = (spent_epsilon(&ledger.spent_in_all(), delta), one.times(3).epsilon(delta).0);
    assert!((spent - expected).abs() < 1e-9);
    assert_eq!(spent_epsilon(ledger.spent(Purpose::Evaluation), delta), 0.0);
}

/// A coordinator that could name charges would name them all alike.
#[test]
fn only_the_same_round_of_the_same_keys_is_the_same_charge() {
    let mut ledger = Ledger::default();
    ledger.charge(&charge("a", 1, 0), &policy(), 0).unwrap();
    assert!(ledger.check(&charge("a", 1, 2), &policy(), 0).is_err(), "another round waits its turn");
    ledger.charge(&charge("a", 1, 2), &policy(), 5000).unwrap();
    assert_eq!(ledger.lines().next().unwrap().participations, 2, "and is charged");
    let unnamed = Charge { id: ChargeId::Unnamed, ..charge("b", 0, 0) };
    ledger.charge(&unnamed, &policy(), 0).unwrap();
    assert!(ledger.check(&unnamed, &policy(), 0).is_err(), "what has no name is always new");
}

/// A coordinator that signs the same task again and again with more participations.
#[test]
fn a_task_signed_anew_stays_within_the_tasks_budget() {
    let tight = PrivacyPolicy { epsilon_task_max: 4.0, ..policy() };
    let mut ledger = Ledger::default();
    let mut last = Ok(());
    for round in 0..1000 {
        let request = Charge {
            participations_max: u32::MAX,
            separation_ms: 0,
            separation_rounds: 0,
            curve: curve(0.01),
            ..charge("a", (round % 250) as u8, round)
        };
        last = ledger.charge(&request, &tight, 0);
        if last.is_err() {
            break;
        }
    }
    assert!(matches!(last, Err(LedgerError::TaskBudget { .. })), "{last:?}");
    let spent = spent_epsilon(&ledger.spent_in_all(), tight.delta);
    assert!(spent <= 4.0 && spent > 3.5, "{spent}");
}

#[test]
fn contributions_without_protection_are_counted() {
    let mut ledger = Ledger::default();
    ledger.note_unprotected();
    let ledger = Ledger::from_bytes(&ledger.to_bytes()).unwrap();
    assert_eq!(ledger.unprotected(), 1);
    assert!(!ledger.knows(Scope::of_task("p", "a")));
}
