//! One attempt, call by call: in the clear here, under secure aggregation in `tests/secure.rs`.

mod secure;

use super::*;
use crate::plan::tests::plan;
use fleetune_secagg::RingBits;

const POLICY: RoundPolicy = RoundPolicy {
    report_goal: 3,
    selected_max: 4,
    reports_min: 2,
    selection_ms: 100,
    report_ms: 1000,
    step_ms: 50,
};

fn round() -> Round {
    let id = RoundId { task: Name::parse("t", "lora").unwrap(), round: 0, attempt: 0 };
    Round::open(id, POLICY, &plan().aggregation, 2, None, UnixMillis(0))
}

fn vector(value: i32) -> RingVector {
    RingVector::from_signed(RingBits::new(32).unwrap(), &[value, -value])
}

fn contribute(round: &mut Round, who: Participant, value: i32, now: u64) -> Contribution {
    let digest = Digest::of(&value.to_le_bytes());
    round.handle_contribution(who, digest, &vector(value), UnixMillis(now)).unwrap()
}

#[test]
fn finishes_at_its_goal_and_turns_the_rest_away() {
    let mut round = round();
    let who: Vec<_> = (0..4).map(|i| round.handle_join(UnixMillis(i)).unwrap()).collect();
    assert_eq!((round.phase(), round.handle_join(UnixMillis(5))), (Phase::Collecting, None));
    for (i, who) in who[..3].iter().enumerate() {
        assert_eq!(contribute(&mut round, *who, i32::try_from(i).unwrap() + 1, 10), Contribution::Added);
    }
    assert_eq!(round.phase(), Phase::Finished);
    assert_eq!(round.sum().unwrap().sum().to_signed(), [6, -6]);
    assert_eq!(contribute(&mut round, who[3], 9, 20), Contribution::TooLate);
    assert_eq!(round.counts(), RoundCounts { selected: 4, completed: 3, withdrawn: 0 });
}

#[test]
fn nobody_counts_twice() {
    let mut round = round();
    let who = round.handle_join(UnixMillis(0)).unwrap();
    assert_eq!(contribute(&mut round, who, 5, 1), Contribution::Added);
    assert_eq!(contribute(&mut round, who, 5, 2), Contribution::Repeated);
    let other = round.handle_contribution(who, Digest::of(b"other"), &vector(7), UnixMillis(3));
    assert_eq!(other, Err(ContributionError::OtherBytes));
    assert_eq!(round.counts().completed, 1);
}

#[test]
fn a_wrong_vector_leaves_the_sum_and_the_place_alone() {
    let mut round = round();
    let who = round.handle_join(UnixMillis(0)).unwrap();
    let long = RingVector::zeros(RingBits::new(32).unwrap(), 3);
    let error = round.handle_contribution(who, Digest::of(b"long"), &long, UnixMillis(1)).unwrap_err();
    assert_eq!(error.to_string(), "contribution: vector of 3 values where 2 were expected");
    assert_eq!(contribute(&mut round, who, 5, 2), Contribution::Added);
}

#[test]
fn dropouts_cost_a_round_its_deadline_but_not_its_sum() {
    let mut round = round();
    let who: Vec<_> = (0..4).map(|_| round.handle_join(UnixMillis(50)).unwrap()).collect();
    contribute(&mut round, who[0], 1, 60);
    contribute(&mut round, who[1], 2, 60);
    assert_eq!(round.poll_timeout(), Some((UnixMillis(1050), "report deadline")));
    round.handle_timeout(UnixMillis(1050));
    assert_eq!((round.phase(), round.counts().completed), (Phase::Finished, 2));
}

#[test]
fn withdrawals_end_the_wait_early() {
    let mut round = round();
    let who: Vec<_> = (0..4).map(|_| round.handle_join(UnixMillis(0)).unwrap()).collect();
    contribute(&mut round, who[0], 1, 10);
    contribute(&mut round, who[1], 2, 10);
    round.handle_withdrawal(who[2], UnixMillis(20));
    assert_eq!(round.phase(), Phase::Collecting);
    round.handle_withdrawal(who[3], UnixMillis(20));
    assert_eq!(round.phase(), Phase::Finished);
}

#[test]
fn too_few_never_open() {
    let mut alone = round();
    alone.handle_join(UnixMillis(0)).unwrap();
    alone.handle_timeout(UnixMillis(100));
    assert_eq!(alone.phase(), Phase::Failed(RoundFailure::Selection { joined: 1, needed: 2 }));
    let mut silent = round();
    let who: Vec<_> = (0..4).map(|_| silent.handle_join(UnixMillis(0)).unwrap()).collect();
    contribute(&mut silent, who[0], 1, 10);
    silent.handle_timeout(UnixMillis(1000));
    assert_eq!(silent.phase(), Phase::Failed(RoundFailure::Reports { contributed: 1, needed: 2 }));
    assert!(silent.sum().is_none());
}
