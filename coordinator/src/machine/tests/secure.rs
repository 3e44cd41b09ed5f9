//! Secure aggregation between the core and the shipped device machine, in virtual time: who is lost when, who
//! comes back, who lies, and what is left of the round.

use super::world::{Fault, Step, World, made_up_delta, name, secure_spec, spec, wide_lora};
use crate::{CohortRecord, CoreEvent, RoundOutcome, RoundRecord, TaskSpec};
use fleetune_proto::{
    device::{Event, Request},
    round::RoundPolicy,
};
use std::collections::BTreeSet;

const GIVEN_UP: &str = "the round is given up, since devices have revealed shares for it";

/// One round of `cohort` devices.
fn one_round(cohort: u32) -> TaskSpec {
    TaskSpec { rounds: 1, ..secure_spec(cohort) }
}

/// Rounds of `cohort` devices, of which none may be missing.
fn all_of(cohort: u32, rounds: u32) -> TaskSpec {
    let mut spec = TaskSpec { rounds, ..secure_spec(cohort) };
    spec.round_policy.reports_min = cohort;
    spec
}

/// The world's adapter is the start plus the mean of these devices' updates, round by round.
pub(super) fn check_adapter(world: &World, rounds: &[Vec<usize>]) {
    let layout = world.core.tasks[&name("lora")].layout.clone();
    let mut expected: Vec<f64> = layout.initial_values(&world.base).iter().map(|v| f64::from(*v)).collect();
    for (round, devices) in (0..).zip(rounds) {
        for device in devices {
            let delta = made_up_delta(*device, round, layout.len());
            let mean = |value: f32| f64::from(value) / devices.len() as f64;
            expected.iter_mut().zip(delta).for_each(|(sum, value)| *sum += mean(value));
        }
    }
    for (actual, expected) in world.progress().adapter.iter().zip(expected) {
        assert!((f64::from(*actual) - expected).abs() < 1e-6, "{actual} {expected}");
    }
}

fn failure(record: &RoundRecord) -> &str {
    match &record.outcome {
        RoundOutcome::Failed(reason) => reason,
        RoundOutcome::Finished => panic!("finished: {record:?}"),
    }
}

/// The device's messages of a step that have reached the core.
fn arrived(world: &World, device: usize, step: Step) -> usize {
    let is_it = |(index, request): &&(usize, Request)| *index == device && Step::of(request) == Some(step);
    world.calls.iter().filter(is_it).count()
}

fn fault(world: &mut World, devices: impl IntoIterator<Item = usize>, step: Step, fault: Fault) {
    for device in devices {
        world.actors[device].faults.insert(step, fault);
    }
}

fn contributions(world: &World) -> Vec<usize> {
    world.actors.iter().map(|actor| actor.contributed()).collect()
}

#[test]
fn a_secure_task_gives_the_bytes_of_the_plaintext_task() {
    let mut plain = World::with_task(5, spec(5));
    plain.run_to_end();
    let mut secure = World::with_task(5, secure_spec(5));
    secure
        .run_until(|world| world.actors.iter().all(|actor| actor.events.contains(&Event::ReleaseActive(1))));
    assert_eq!(secure.commits.last().unwrap().checkpoint, plain.commits.last().unwrap().checkpoint);
    let release = |world: &World| world.core.release().unwrap().manifest.adapter;
    assert_eq!(release(&secure), release(&plain));
    assert!(secure.core.release().unwrap().manifest.privacy_statement.contains("secagg+"));
    let records = secure.records();
    assert_eq!(records.iter().map(|r| (r.round, r.attempt)).collect::<Vec<_>>(), [(0, 0), (1, 0), (2, 0)]);
    let cohort =
        CohortRecord { members: 5, degree: 4, threshold: 3, survivors: Some(5), ..CohortRecord::default() };
    for record in &records {
        assert_eq!((record.selected, record.completed, record.withdrawn), (5, 5, 0));
        assert_eq!(record.aggregation.protocol, "secagg+");
        assert_eq!(record.aggregation.cohorts, std::slice::from_ref(&cohort));
        assert!(record.update_norm.is_some());
    }
    assert_eq!(plain.records()[0].aggregation.protocol, "insecure_plaintext");
    assert_eq!(contributions(&secure), [3; 5]);
}

#[test]
fn nothing_but_masked_vectors_is_uploaded() {
    let mut world = World::with_task(5, one_round(5));
    world.run_to_end();
    let masked: BTreeSet<Vec<u8>> = world.calls.iter().filter_map(|(_, call)| masked_bytes(call)).collect();
    assert_eq!(masked.len(), 5);
    // Uniform bytes: the high bytes of a plain update are 0 or 255, nearly all of them.
    for bytes in &masked {
        let plain = bytes.chunks(4).filter(|lane| lane[3] == 0 || lane[3] == 255).count();
        assert!(plain * 10 < bytes.len() / 4, "{plain} of {} values look plain", bytes.len() / 4);
    }
    assert!(!world.calls.iter().any(|(_, call)| matches!(call, Request::SubmitUpdate(_))));
}

fn masked_bytes(call: &Request) -> Option<Vec<u8>> {
    use fleetune_proto::wire::resource::Source;
    let Request::SubmitMaskedUpdate(request) = call else { return None };
    match request.masked_update.as_ref()?.source.as_ref()? {
        Source::Inline(bytes) => Some(bytes.clone()),
        Source::Blob(_) => None,
    }
}

#[test]
fn devices_that_vanish_at_any_step_cost_the_round_at_most_their_part() {
    let cases = [
        (Step::Keys, 6, 6, [0, 0, 0, 0]),
        (Step::Shares, 8, 6, [2, 0, 0, 0]),
        (Step::Masked, 8, 6, [0, 2, 0, 0]),
        (Step::Confirm, 8, 8, [0, 0, 2, 0]),
        (Step::Reveal, 8, 8, [0, 0, 0, 2]),
    ];
    for (step, members, survivors, dropouts) in cases {
        let mut world = World::with_task(8, one_round(8));
        fault(&mut world, [2, 5], step, Fault::Vanish);
        world.run_to_end();
        let record = world.records().remove(0);
        assert_eq!(
            (record.outcome, record.selected, record.completed),
            (RoundOutcome::Finished, 8, survivors)
        );
        let cohort = &record.aggregation.cohorts[0];
        assert_eq!((cohort.members, cohort.dropouts, cohort.survivors), (members, dropouts, Some(survivors)));
        let lost = |device: &usize| survivors == 6 && [2, 5].contains(device);
        check_adapter(&world, &[(0..8).filter(|device| !lost(device)).collect()]);
        let waited = record.finished_unix_ms - record.opened_unix_ms;
        let deadline = if step == Step::Keys { 20_000 } else { 5_000 };
        assert!((deadline..deadline + 6_000).contains(&waited), "{step:?}: {waited} ms");
    }
}

#[test]
fn devices_that_vanish_in_every_step_of_one_round_are_counted_where_they_were_lost() {
    let mut world = World::with_task(16, one_round(16));
    let steps = [Step::Shares, Step::Masked, Step::Confirm, Step::Reveal];
    for (device, step) in steps.into_iter().enumerate() {
        fault(&mut world, [device], step, Fault::Vanish);
    }
    world.run_to_end();
    let record = world.records().remove(0);
    assert_eq!(record.aggregation.cohorts[0].dropouts, [1; 4]);
    assert_eq!((record.outcome, record.completed), (RoundOutcome::Finished, 14));
    check_adapter(&world, &[(2..16).collect()]);
}

#[test]
fn a_device_that_comes_back_in_time_repeats_itself_and_counts_once() {
    for step in Step::ALL {
        for suffered in [Fault::CrashBefore(300), Fault::CrashAfter(300), Fault::LoseAnswer] {
            let mut world = World::with_task(5, one_round(5));
            fault(&mut world, [0, 3], step, suffered);
            world.run_to_end();
            let record = world.records().remove(0);
            assert_eq!(
                (record.outcome, record.completed),
                (RoundOutcome::Finished, 5),
                "{step:?} {suffered:?}"
            );
            assert_eq!(record.aggregation.cohorts[0].dropouts, [0; 4], "{step:?} {suffered:?}");
            check_adapter(&world, &[(0..5).collect()]);
            world.run_until(|world| contributions(world) == [1; 5]);
            let repeats = usize::from(!matches!(suffered, Fault::CrashBefore(_)));
            assert!(arrived(&world, 0, step) > repeats, "{step:?} {suffered:?}");
        }
    }
}

#[test]
fn a_device_that_dies_at_every_step_of_every_round_still_contributes_to_all() {
    let patient = all_of(5, 3);
    let mut calm = World::with_task(5, patient.clone());
    calm.run_to_end();
    let mut world = World::with_task(5, patient);
    for round in 1..=3 {
        for step in Step::ALL {
            fault(&mut world, [1], step, Fault::CrashAfter(100));
            fault(&mut world, [2], step, Fault::CrashBefore(100));
        }
        world.run_attempts(round);
    }
    let completed: Vec<_> = world.records().iter().map(|record| (record.attempt, record.completed)).collect();
    assert_eq!(completed, [(0, 5); 3], "{:?}", world.records());
    assert_eq!(world.commits.last().unwrap().checkpoint, calm.commits.last().unwrap().checkpoint);
}

#[test]
fn a_device_that_comes_back_too_late_is_told_so_and_takes_part_in_the_next_round() {
    let mut world = World::with_task(8, TaskSpec { rounds: 20, ..secure_spec(8) });
    fault(&mut world, [4], Step::Masked, Fault::CrashBefore(8_000));
    world.run_until(|world| world.actors[4].contributed() == 1);
    assert_eq!(world.records()[0].completed, 7);
    let told = |event: &Event| matches!(event, Event::Ended(reason) if reason.contains("too late"));
    assert!(world.actors[4].events.iter().any(told), "{:?}", world.actors[4].events);
}

#[test]
fn large_updates_go_up_in_chunks_and_survive_crashes_on_the_way() {
    let mut big = one_round(5);
    big.trained = wide_lora(20);
    let mut calm = World::with_task(5, big.clone());
    calm.run_to_end();
    let mut world = World::with_task(5, big);
    fault(&mut world, [0], Step::Chunk, Fault::CrashBefore(200));
    fault(&mut world, [1], Step::Chunk, Fault::CrashAfter(200));
    fault(&mut world, [2], Step::Masked, Fault::CrashAfter(200));
    fault(&mut world, [3], Step::Masked, Fault::CrashBefore(200));
    fault(&mut world, [4], Step::Masked, Fault::LoseAnswer);
    world.run_to_end();
    assert!((0..5).all(|device| arrived(&world, device, Step::Chunk) >= 1), "nothing went inline");
    assert_eq!(world.records()[0].completed, 5);
    assert_eq!(world.commits.last().unwrap().checkpoint, calm.commits.last().unwrap().checkpoint);
}

#[test]
fn a_large_round_is_split_into_cohorts_whose_sums_add_up() {
    let mut plain = World::with_task(10, spec(10));
    plain.run_to_end();
    let mut split = secure_spec(10);
    split.aggregation.secure.as_mut().unwrap().cohort_max = 4;
    let mut world = World::with_task(10, split);
    world.run_to_end();
    for record in world.records() {
        let mut members: Vec<u32> = record.aggregation.cohorts.iter().map(|cohort| cohort.members).collect();
        members.sort_unstable();
        assert_eq!((members, record.completed), (vec![3, 3, 4], 10));
    }
    assert_eq!(world.commits.last().unwrap().checkpoint, plain.commits.last().unwrap().checkpoint);
}

#[test]
fn a_cohort_that_is_lost_costs_its_members_only() {
    let mut split = one_round(10);
    split.aggregation.secure.as_mut().unwrap().cohort_max = 5;
    let mut world = World::with_task(10, split);
    for actor in &mut world.actors {
        actor.faults.insert(Step::Masked, Fault::Hold);
    }
    world.run_until(|world| world.actors.iter().all(|actor| actor.held.is_some()));
    // Who sits where shows in the rosters' roots; two devices of one cohort are lost, which is too many.
    let first = cohort_of(&world, 0).to_vec();
    let lost: Vec<usize> = (0..10).filter(|device| cohort_of(&world, *device) == first).take(2).collect();
    for device in 0..10 {
        if lost.contains(&device) {
            world.actors[device].alive = false;
        } else {
            world.deliver_held(device);
        }
    }
    world.run_to_end();
    let record = world.records().remove(0);
    assert_eq!((&record.outcome, record.completed), (&RoundOutcome::Finished, 5));
    let failed: Vec<_> = record.aggregation.cohorts.iter().filter_map(|c| c.failure.clone()).collect();
    assert_eq!(failed, ["3 of 5 devices delivered a masked vector; 4 needed"]);
    check_adapter(&world, &[(0..10).filter(|device| cohort_of(&world, *device) != first).collect()]);
}

/// Names the cohort that a device was put into.
fn cohort_of(world: &World, device: usize) -> &[u8] {
    &world.roots[&device]
}

#[test]
fn too_few_left_fails_the_attempt_and_the_next_has_fresh_keys() {
    for (step, deed) in [
        (Step::Shares, "shared their secrets"),
        (Step::Masked, "delivered a masked vector"),
        (Step::Confirm, "confirmed the survivors"),
    ] {
        let mut world = World::with_task(5, all_of(5, 1));
        fault(&mut world, [0, 1, 2], step, Fault::CrashBefore(30_000));
        world.run_to_end();
        let records = world.records();
        let lost = format!("2 of 5 devices {deed}; 4 needed");
        let expected = format!("secure aggregation gave a sum of 0 contributions, 5 needed; {lost}");
        assert_eq!(failure(&records[0]), expected);
        assert_eq!(records[0].aggregation.cohorts[0].failure, Some(lost));
        let last = records.last().unwrap();
        assert_eq!((last.round, last.completed, &last.outcome), (0, 5, &RoundOutcome::Finished));
        assert!(last.attempt >= 1);
        check_adapter(&world, &[(0..5).collect()]);
        check_keys_are_fresh(&world);
    }
}

/// No key, nonce or signature of an advertisement occurs in two sessions.
fn check_keys_are_fresh(world: &World) {
    let mut seen = BTreeSet::new();
    let mut sessions = BTreeSet::new();
    for (_, call) in &world.calls {
        let Request::AdvertiseKeys(request) = call else { continue };
        if !sessions.insert(request.session_token.clone()) {
            continue;
        }
        let keys = request.keys.as_ref().unwrap();
        for part in [&keys.share_key, &keys.mask_key, &keys.nonce, &keys.signature] {
            assert!(seen.insert(part.clone()), "a key of one attempt in another");
        }
    }
    assert!(sessions.len() > 5, "there were several attempts");
}

#[test]
fn a_round_that_fails_after_shares_were_revealed_is_given_up() {
    let mut world = World::with_task(5, all_of(5, 2));
    fault(&mut world, [0, 1, 2], Step::Reveal, Fault::CrashBefore(30_000));
    world.run_to_end();
    let records = world.records();
    assert!(failure(&records[0]).ends_with(GIVEN_UP), "{}", failure(&records[0]));
    assert_eq!(records[0].aggregation.cohorts[0].dropouts, [0, 0, 0, 3]);
    let commit = world.commits.iter().find(|commit| commit.record.is_some()).unwrap();
    assert_eq!((commit.progress.round, commit.progress.attempt), (1, 0));
    assert_eq!(commit.progress.adapter, world.commits[0].progress.adapter, "nothing was learned");
    assert!(records[1..].iter().all(|record| record.round == 1), "its number is burnt");
    assert_eq!(records.last().unwrap().completed, 5, "who vanished is not taken for a liar");
    check_adapter(&world, &[vec![], (0..5).collect()]);
}

#[test]
fn the_last_round_given_up_still_publishes_the_release() {
    let mut world = World::with_task(5, one_round(5));
    fault(&mut world, [0, 1, 2], Step::Reveal, Fault::Vanish);
    world.run_to_end();
    assert!(failure(&world.records()[0]).ends_with(GIVEN_UP));
    let release = world.core.release().unwrap();
    assert_eq!(release.version(), 1);
    assert!(world.blobs.contains_key(&release.manifest.trained()));
    assert!(world.events.contains(&CoreEvent::TaskFinished { task: name("lora") }));
    world.run_until(|world| {
        world.actors[3..].iter().all(|actor| actor.events.contains(&Event::ReleaseActive(1)))
    });
}

#[test]
fn an_opening_that_never_comes_back_gives_the_round_up() {
    let rounds = TaskSpec { rounds: 2, ..secure_spec(5) };
    let mut world = World::with_task(5, rounds);
    world.openings_stuck = true;
    world.run_attempts(1);
    let record = world.records().remove(0);
    assert!(failure(&record).contains("its sum was not opened in time"), "{}", failure(&record));
    assert!(failure(&record).ends_with(GIVEN_UP));
    assert!(record.finished_unix_ms - record.opened_unix_ms >= 10 * 60 * 1000);
    world.openings_stuck = false;
    let late = world.stuck.pop().unwrap().run(1);
    let now = world.now;
    world.core.handle_opened(late, now);
    world.run_to_end();
    let completed: Vec<_> = world.records().iter().map(|record| (record.round, record.completed)).collect();
    assert_eq!(completed, [(0, 0), (1, 5)], "what comes too late changes nothing");
    check_adapter(&world, &[vec![], (0..5).collect()]);
}

#[test]
fn a_coordinator_that_restarts_before_reveals_tries_again() {
    for step in [Step::Keys, Step::Shares, Step::Masked, Step::Confirm] {
        let mut world = World::with_task(5, one_round(5));
        fault(&mut world, 0..5, step, Fault::Hold);
        world.run_until(|world| world.actors.iter().all(|actor| actor.held.is_some()));
        world.restart_core(one_round(5));
        (0..5).for_each(|device| world.deliver_held(device));
        world.run_to_end();
        let records = world.records();
        assert_eq!((records[0].round, records[0].attempt, records[0].completed), (0, 1, 5), "{step:?}");
        check_adapter(&world, &[(0..5).collect()]);
        check_keys_are_fresh(&world);
    }
}

#[test]
fn a_coordinator_that_restarts_after_reveals_gives_the_round_up() {
    let rounds = TaskSpec { rounds: 2, ..secure_spec(5) };
    let mut world = World::with_task(5, rounds.clone());
    fault(&mut world, [3, 4], Step::Reveal, Fault::Hold);
    world.run_until(|world| (0..3).all(|device| arrived(world, device, Step::Reveal) == 1));
    world.run_until(|world| [3, 4].iter().all(|device| world.actors[*device].held.is_some()));
    world.restart_core(rounds);
    (3..5).for_each(|device| world.deliver_held(device));
    world.run_to_end();
    let records = world.records();
    assert_eq!((records[0].round, records[0].attempt, records[0].completed), (0, 1, 0));
    assert!(failure(&records[0]).ends_with(GIVEN_UP), "{}", failure(&records[0]));
    assert_eq!((records[1].round, records[1].attempt, records[1].completed), (1, 0, 5));
    let refused = |event: &Event| matches!(event, Event::Refused(why) if why.contains("has revealed shares"));
    assert!(world.actors.iter().all(|actor| actor.events.iter().any(refused)), "no device reveals twice");
    check_adapter(&world, &[vec![], (0..5).collect()]);
}

#[test]
fn after_a_restart_those_who_revealed_nothing_may_finish_the_round() {
    let mut spec = one_round(12);
    spec.round_policy = RoundPolicy { reports_min: 4, ..spec.round_policy };
    let mut world = World::with_task(12, spec.clone());
    fault(&mut world, 0..4, Step::Confirm, Fault::Hold);
    world.openings_stuck = true;
    world.run_until(|world| (4..12).all(|device| arrived(world, device, Step::Reveal) == 1));
    world.openings_stuck = false;
    world.restart_core(spec);
    (0..4).for_each(|device| world.deliver_held(device));
    world.run_to_end();
    let record = world.records().remove(0);
    assert_eq!((record.round, record.attempt, record.completed), (0, 1, 4));
    assert_eq!((record.outcome, record.withdrawn), (RoundOutcome::Finished, 8));
    check_adapter(&world, &[(0..4).collect()]);
}

#[test]
fn garbage_shares_break_one_round_and_their_sender_is_not_let_in_again() {
    let mut world = World::with_task(6, TaskSpec { rounds: 3, ..secure_spec(6) });
    world.actors[2].tamper = Some(|request| {
        if let Request::ShareKeys(request) = request {
            request.commitment[0] ^= 1;
        }
    });
    world.run_to_end();
    let records = world.records();
    assert!(failure(&records[0]).contains("the secrets of 1 devices cannot be rebuilt"));
    assert!(failure(&records[0]).ends_with(GIVEN_UP));
    assert!(records[1..].iter().all(|record| record.outcome == RoundOutcome::Finished), "{records:?}");
    assert!(records[1..].iter().all(|record| record.completed == 5));
    let rest: Vec<usize> = (0..6).filter(|device| *device != 2).collect();
    check_adapter(&world, &[vec![], rest.clone(), rest]);
}

/// Reveals other shares than it was sent.
fn lie_at_the_end(request: &mut Request) {
    use fleetune_proto::wire::revealed_share::Secret;
    let Request::RevealShares(request) = request else { return };
    for share in &mut request.shares {
        match share.secret.as_mut().unwrap() {
            Secret::SelfMask(bytes) | Secret::MaskKey(bytes) => bytes[7] ^= 0x55,
        }
    }
}

#[test]
fn wrong_shares_at_the_end_are_outvoted() {
    let mut world = World::with_task(8, one_round(8));
    world.actors[1].tamper = Some(lie_at_the_end);
    fault(&mut world, [6], Step::Masked, Fault::Vanish);
    world.run_to_end();
    let record = world.records().remove(0);
    assert_eq!((record.outcome, record.completed), (RoundOutcome::Finished, 7));
    check_adapter(&world, &[(0..8).filter(|device| *device != 6).collect()]);
}

#[test]
fn a_liar_among_too_few_breaks_a_round_but_gets_nobody_shut_out() {
    let mut world = World::with_task(5, all_of(5, 2));
    world.actors[1].tamper = Some(lie_at_the_end);
    fault(&mut world, [4], Step::Reveal, Fault::CrashBefore(30_000));
    world.run_to_end();
    let records = world.records();
    assert!(failure(&records[0]).contains("the secrets of 3 devices cannot be rebuilt"), "{records:?}");
    let last = records.last().unwrap();
    assert_eq!((last.round, last.completed), (1, 5), "all five are let in again");
    check_adapter(&world, &[vec![], (0..5).collect()]);
}

#[test]
fn a_device_below_whose_floors_the_cohort_is_withdraws_and_the_others_go_on() {
    let mut world = World::with_task(8, one_round(8));
    let now = world.now;
    world.actors[3].demand_cohort_of(9, now);
    world.run_to_end();
    let record = world.records().remove(0);
    assert_eq!((record.outcome, record.completed, record.withdrawn), (RoundOutcome::Finished, 7, 1));
    assert!(record.finished_unix_ms - record.opened_unix_ms < 5_000, "nobody waits for it");
    let refused =
        |event: &Event| matches!(event, Event::Refused(why) if why.contains("a cohort of 8 devices"));
    assert!(world.actors[3].events.iter().any(refused));
}

#[test]
fn one_seed_gives_one_history() {
    let history = || {
        let mut world = World::with_task(6, secure_spec(6));
        fault(&mut world, [1], Step::Masked, Fault::Vanish);
        world.run_to_end();
        (world.commits.last().unwrap().checkpoint, format!("{:?} {:?}", world.events, world.records()))
    };
    assert_eq!(history(), history());
}
