//! Private tasks between the core and the shipped device machine: what is charged where, and what it stops.

use super::world::{Actor, Fault, Step, World, made_up_delta, name, secure_spec};
use crate::{CoreError, NoiseSpec, PrivacySpec, RoundOutcome, TaskSpec};
use fleetune_privacy::{
    AdaptationTarget, ClippingNorm, Delta, Guarantee, Mechanism, NoiseCohort, PrivacyStatement, Purpose,
};
use fleetune_proto::device::{Event, Request};
use fleetune_secagg::Assumptions;
use std::collections::BTreeMap;

fn norm(value: f32) -> ClippingNorm {
    ClippingNorm::new(value).unwrap()
}

pub(super) fn privacy(participations_max: u32) -> PrivacySpec {
    PrivacySpec {
        mechanism: Mechanism::Skellam,
        noise: NoiseSpec::Epsilon(8.0),
        delta: Delta::new(1e-6).unwrap(),
        participations_max,
        separation_ms: 0,
        separation_rounds: 0,
        clip_units: None,
        adaptation: None,
        narrowest_ring: true,
    }
}

/// Rounds of eight devices, of which two may be lost; no colluder is assumed among so few.
pub(super) fn private(rounds: u32, privacy: PrivacySpec) -> TaskSpec {
    let mut spec = TaskSpec { rounds, privacy: Some(privacy), ..secure_spec(8) };
    spec.aggregation.secure.as_mut().unwrap().cohort_max = 8;
    spec.aggregation.summands_min = 6;
    spec.round_policy.reports_min = 6;
    spec
}

fn participations(actor: &Actor) -> u32 {
    actor.device.ledger().lines().map(|line| line.participations).sum()
}

#[test]
fn every_opened_sum_is_charged_with_what_was_there_and_the_release_says_so() {
    let mut world = World::with_task(8, private(2, privacy(2)));
    world.actors[3].faults.insert(Step::Shares, Fault::Vanish);
    world.run_to_end();
    let charged: Vec<_> = world.charges.iter().map(|c| (c.round, c.survivors, c.honest)).collect();
    assert_eq!(charged, [(0, 7, 7), (1, 7, 7)]);
    assert!(world.records().iter().all(|record| record.outcome == RoundOutcome::Finished));
    let plan = world.core.tasks[&name("lora")].plan.privacy_plan().unwrap();
    for charge in &world.charges {
        let expected = plan.sum_curve(7).unwrap();
        assert!((charge.rho - expected.rho()).abs() < 1e-12 && charge.rho < plan.participation_rho());
    }
    // Each device has charged itself the worst case, once a contribution.
    let delta = plan.parameters().delta;
    for (index, actor) in world.actors.iter().enumerate() {
        let taken = if index == 3 { 0 } else { 2 };
        assert_eq!(participations(actor), taken, "device {index}");
        let spent = fleetune_privacy::spent_epsilon(actor.device.ledger().spent(Purpose::Training), delta);
        let expected =
            if taken == 0 { 0.0 } else { plan.participation_curve().times(taken).epsilon(delta).0 };
        assert!((spent - expected).abs() < 1e-9 && spent <= 8.0);
    }
    let manifest = &world.core.release().unwrap().manifest;
    let statement = PrivacyStatement::from_json(&manifest.privacy_statement_json).unwrap();
    let Guarantee::DifferentialPrivacy(guarantee) = statement.guarantee else { panic!("{statement:?}") };
    assert!(guarantee.epsilon <= 8.0 && guarantee.epsilon > 7.99, "{}", guarantee.epsilon);
    assert_eq!((guarantee.survivors_min, guarantee.participations_max), (6, 2));
    assert!(manifest.privacy_statement.contains("epsilon"), "{}", manifest.privacy_statement);
}

#[test]
fn the_adapter_moves_by_the_mean_and_noise_of_the_stated_size() {
    let mut world = World::with_task(8, private(1, privacy(1)));
    world.run_to_end();
    let task = &world.core.tasks[&name("lora")];
    let start = task.layout.initial_values(&world.base);
    let record = world.records()[0].aggregation.privacy.unwrap();
    let deviation = record.noise_deviation.unwrap();
    let mut squares = 0.0;
    for (at, (now, before)) in world.progress().adapter.iter().zip(&start).enumerate() {
        let mean = (0..8).map(|d| f64::from(made_up_delta(d, 0, start.len())[at])).sum::<f64>() / 8.0;
        squares += (f64::from(*now) - f64::from(*before) - mean).powi(2);
    }
    let (found, count) = (squares / start.len() as f64, start.len() as f64);
    let ratio = found / (deviation * deviation);
    assert!((ratio - 1.0).abs() < 5.0 * (2.0 / count).sqrt() + 0.02, "{ratio} of the stated variance");
}

/// The coordinator asks for more than was agreed: the devices stop at their count and stay away.
#[test]
fn devices_stop_at_their_count_and_the_task_waits_without_them() {
    let mut world = World::with_task(8, private(5, privacy(2)));
    world.run_attempts(2);
    let until = world.now.plus(3_600_000);
    world.run_until(|world| world.now >= until);
    assert!(world.actors.iter().all(|actor| participations(actor) == 2));
    assert_eq!(world.charges.len(), 2);
    assert_eq!(world.progress().round, 2, "no third round");
}

/// A device killed between its charge and its send comes back, sends the same bytes, and pays once.
#[test]
fn a_device_that_dies_with_its_charge_on_disk_pays_once() {
    let mut world = World::with_task(8, private(1, privacy(3)));
    for device in 0..4 {
        let fault = [Fault::CrashBefore(100), Fault::CrashAfter(100), Fault::LoseAnswer][device % 3];
        world.actors[device].faults.insert(Step::Masked, fault);
    }
    world.run_to_end();
    assert_eq!(world.charges[0].survivors, 8);
    assert!(world.actors.iter().all(|actor| participations(actor) == 1));
}

/// A round that fails after masked vectors have come in was a participation; another attempt is one more.
#[test]
fn another_attempt_is_another_participation() {
    let mut world = World::with_task(8, private(1, privacy(2)));
    for device in 0..3 {
        world.actors[device].faults.insert(Step::Masked, Fault::CrashBefore(30_000));
    }
    world.run_to_end();
    let records = world.records();
    assert!(matches!(records[0].outcome, RoundOutcome::Failed(_)), "{records:?}");
    assert_eq!(world.charges.len(), 1, "only what was opened");
    assert!(world.actors[4..].iter().all(|actor| participations(actor) == 2));
}

#[test]
fn the_clipping_norm_follows_the_quantile_of_the_norms() {
    let target = AdaptationTarget { quantile: 0.5, learning_rate: 0.5, norms: (norm(1e-3), norm(10.0)) };
    let noise = NoiseSpec::InsecureNoiseCohort {
        imagined: NoiseCohort { cohort: 1000, population: 1_000_000 },
        noise_multiplier: 1.0,
        summands: 8,
    };
    let mut spec = private(60, PrivacySpec { noise, adaptation: Some(target), ..privacy(60) });
    spec.aggregation.clipping_norm = norm(10.0);
    let mut world = World::new(8);
    world.actors.iter_mut().for_each(Actor::allow_noise_cohort);
    world.add_task(spec, None);
    world.run_to_end();
    let layout = world.core.tasks[&name("lora")].layout.len();
    let length =
        |d: usize| made_up_delta(d, 0, layout).iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let mut lengths: Vec<f64> = (0..8).map(length).collect();
    lengths.sort_by(f64::total_cmp);
    let last = f64::from(world.progress().clipping_norm.unwrap());
    assert!(last > 0.6 * lengths[0] && last < 1.6 * lengths[7], "{last} for norms {lengths:?}");
    let first = world.records()[0].aggregation.privacy.unwrap();
    assert!((first.clipping_norm - 10.0).abs() < 1e-6 && first.unclipped.unwrap() > 0.9);
}

#[test]
fn devices_refuse_a_simulations_noise_and_a_plan_above_their_policy() {
    let imagined = NoiseCohort { cohort: 1000, population: 1_000_000 };
    let noise = NoiseSpec::InsecureNoiseCohort { imagined, noise_multiplier: 1.0, summands: 8 };
    let refused = |spec: PrivacySpec, expected: &str| {
        let mut world = World::with_task(8, private(1, spec));
        let until = world.now.plus(60_000);
        world.run_until(|world| world.now >= until);
        assert!(world.charges.is_empty());
        for actor in &world.actors {
            let told = |event: &Event| matches!(event, Event::Refused(reason) if reason.contains(expected));
            assert!(actor.events.iter().any(told), "{:?}", actor.events);
            assert_eq!(participations(actor), 0);
        }
    };
    refused(PrivacySpec { noise, ..privacy(1) }, "imagined cohort of 1000");
    refused(PrivacySpec { noise: NoiseSpec::Epsilon(30.0), ..privacy(1) }, "this device allows 10");
    refused(PrivacySpec { delta: Delta::new(1e-3).unwrap(), ..privacy(1) }, "delta 1e-3");
}

/// An operator who turns privacy on after ten rounds without, and would release a model that says it is private.
#[test]
fn a_task_does_not_change_its_protection_on_the_way() {
    let mut spec = private(3, privacy(3));
    let mut world = World::with_task(8, spec.clone());
    world.run_attempts(1);
    let held = world.progress().clone();
    let resume = |spec: &TaskSpec| {
        let mut other = World::new(0);
        other.core.add_task(
            spec.clone(),
            other.base.clone(),
            other.base_digest,
            Some(held.clone()),
            other.now,
        )
    };
    assert!(resume(&spec).is_ok());
    spec.rounds = 5;
    assert!(resume(&spec).is_ok(), "more rounds cost a device nothing");
    for change in [privacy(4), PrivacySpec { noise: NoiseSpec::Epsilon(1.0), ..privacy(3) }] {
        let changed = TaskSpec { privacy: Some(change), ..spec.clone() };
        let error = resume(&changed).unwrap_err().to_string();
        assert!(error.contains("1 rounds ran under other protection"), "{error}");
    }
    let bare = TaskSpec { privacy: None, ..spec };
    assert!(resume(&bare).unwrap_err().to_string().contains("other protection"));
}

/// A coordinator that hands out the same session tokens in each round, so that a charge named by one would look
/// like the charge before.
#[test]
fn a_session_token_used_again_makes_no_contribution_free() {
    let spec = private(4, privacy(4));
    let mut world = World::with_task(8, spec.clone());
    for attempts in 1..4 {
        world.restart_core_if_begun(&spec);
        world.actors.iter_mut().for_each(Actor::forget_sent);
        world.run_attempts(attempts);
    }
    let masked = |(device, call): &(usize, Request)| {
        let Request::SubmitMaskedUpdate(call) = call else { return None };
        Some((*device, call.session_token.clone()))
    };
    let mut tokens = BTreeMap::new();
    world.calls.iter().filter_map(masked).for_each(|token| *tokens.entry(token).or_insert(0) += 1);
    assert!(tokens.values().any(|count| *count > 1), "a device got a token that it had before");
    assert_eq!(world.charges.len(), 3);
    assert!(world.actors.iter().all(|actor| participations(actor) == 3));
}

/// A signer who drops privacy from a task that began with it.
#[test]
fn a_task_that_was_private_is_refused_without() {
    let mut world = World::with_task(8, private(1, privacy(2)));
    world.run_to_end();
    let mut bare = World::with_task(0, TaskSpec { privacy: None, ..private(1, privacy(2)) });
    (bare.actors, bare.now) = (world.actors, world.now);
    let until = bare.now.plus(600_000);
    bare.run_until(|world| world.now >= until);
    assert!(bare.records().iter().all(|record| record.outcome != RoundOutcome::Finished));
    let told = |event: &Event| matches!(event, Event::Refused(reason) if reason.contains("has none now"));
    assert!(bare.actors.iter().all(|actor| actor.events.iter().any(told)));
    assert!(bare.actors.iter().all(|actor| actor.device.ledger().unprotected() == 0));
}

/// A signer who writes that nobody colludes, and so has each device add less noise.
#[test]
fn devices_refuse_a_plan_that_counts_on_colluders_noise() {
    let mut spec = private(1, privacy(1));
    let secure = spec.aggregation.secure.as_mut().unwrap();
    (secure.assumptions, secure.cohort_max) = (Assumptions::new(0, 200, 40, 20).unwrap(), 20);
    let mut world = World::with_task(8, spec);
    let until = world.now.plus(60_000);
    world.run_until(|world| world.now >= until);
    let told = |event: &Event| matches!(event, Event::Refused(reason) if reason.contains("0 colluders a cohort; this device demands 2"));
    assert!(world.actors.iter().all(|actor| actor.events.iter().any(told)), "{:?}", world.actors[0].events);
}

/// The coordinator chooses the checkpoint, and so on which text training fails; whether it did is not told.
#[test]
fn a_device_whose_training_failed_takes_part_as_zero() {
    let mut world = World::with_task(8, private(1, privacy(1)));
    world.actors[2].fails_training = true;
    world.run_to_end();
    assert_eq!(world.charges[0].survivors, 8);
    assert_eq!(participations(&world.actors[2]), 1);
    let mut bare = World::with_task(5, secure_spec(5));
    bare.actors[2].fails_training = true;
    bare.run_attempts(1);
    assert_eq!(bare.records()[0].withdrawn, 1, "without a promise of privacy it is reported");
}

#[test]
fn devices_that_demand_privacy_take_no_part_without() {
    let mut world = World::new(5);
    world.actors.iter_mut().take(3).for_each(Actor::demand_privacy);
    world.add_task(secure_spec(5), None);
    let until = world.now.plus(60_000);
    world.run_until(|world| world.now >= until);
    let refused =
        |event: &Event| matches!(event, Event::Refused(reason) if reason.contains("no differential privacy"));
    assert!(world.actors.iter().take(3).all(|actor| actor.events.iter().any(refused)));
    assert!(!world.actors.iter().skip(3).any(|actor| actor.events.iter().any(refused)));
}

#[test]
fn privacy_that_cannot_be_had_is_named() {
    let error = |spec: TaskSpec| {
        let mut world = World::new(0);
        let added = world.core.add_task(spec, world.base.clone(), world.base_digest, None, world.now);
        let error = added.unwrap_err();
        assert!(matches!(error, CoreError::Privacy { .. } | CoreError::Plan { .. }), "{error}");
        error.to_string()
    };
    let mut plain = private(1, privacy(1));
    plain.aggregation.secure = None;
    assert!(error(plain).contains("needs protocol = \"secagg_plus\""));
    let mut few = private(1, privacy(1));
    few.aggregation.secure.as_mut().unwrap().cohort_max = 100;
    assert!(error(few).contains("summands_min 6 leaves no honest survivor: of a cohort of 100 up to 10"));
    let mut narrow = private(1, PrivacySpec { narrowest_ring: false, ..privacy(1) });
    narrow.aggregation.ring_bits = fleetune_secagg::RingBits::new(8).unwrap();
    assert!(error(narrow).contains("plan.aggregation.ring_bits: 8; sums of this noise wrap around below"));
    let tiny = PrivacySpec { noise: NoiseSpec::Epsilon(1e-9), ..privacy(1) };
    assert!(error(private(1, tiny)).contains("needs more noise"));
}
