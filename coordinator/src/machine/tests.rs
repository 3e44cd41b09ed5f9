//! The core against the shipped device machine, in virtual time (`tests/world.rs`), and call by call
//! (`tests/calls.rs`). Under secure aggregation: `tests/secure.rs` and `tests/secure_calls.rs`; with
//! differential privacy: `tests/privacy.rs`; with all weights of a model trained: `tests/full.rs`.

mod calls;
mod full;
mod privacy;
mod secure;
mod secure_calls;
mod world;

use crate::{Core, CoreError, CoreEvent, RoundOutcome, ServerOptimizer, TaskProgress};
use fleetune_model::{
    adapter::{Adapter, AdapterLayout, LoraConfig},
    trained::TrainedConfig,
};
use fleetune_proto::{Purpose, ReleaseManifest, UnixMillis, device::Event};
use std::sync::Arc;
use world::{Actor, World, lora, made_up_delta, name, setup, spec, trust_root};

#[test]
fn a_task_runs_to_a_release_that_every_device_installs() {
    let mut world = World::with_task(4, spec(4));
    world.run_until(|world| {
        let active = |actor: &Actor| actor.events.contains(&Event::ReleaseActive(1));
        world.actors.iter().all(active)
    });
    let rounds: Vec<_> = world.commits.iter().filter_map(|commit| commit.record.clone()).collect();
    assert_eq!(
        rounds.iter().map(|r| (r.round, r.attempt, r.completed)).collect::<Vec<_>>(),
        [(0, 0, 4), (1, 0, 4), (2, 0, 4)]
    );
    assert!(rounds.iter().all(|r| r.outcome == RoundOutcome::Finished && r.update_norm.is_some()));
    let release = world.core.release().unwrap();
    let bytes = trust_root().open(Purpose::Release, &release.envelope).unwrap();
    let manifest = ReleaseManifest::parse(&bytes).unwrap();
    assert_eq!((manifest.version, manifest.base_model, manifest.rounds), (1, world.base_digest, 3));
    assert!(manifest.privacy_statement.contains("insecure_plaintext"));
    world.run_until(|world| {
        let reports = |event: &&CoreEvent| matches!(event, CoreEvent::ReleaseReported { version: 1, .. });
        world.events.iter().filter(reports).count() == 4
    });
    assert!(world.events.contains(&CoreEvent::TaskFinished { task: name("lora") }));
}

#[test]
fn the_final_adapter_is_the_sum_of_the_rounds_means() {
    let mut world = World::with_task(3, spec(3));
    world.run_to_end();
    let layout = Arc::new(AdapterLayout::new(&world.base.config, &lora()).unwrap());
    let mut expected: Vec<f64> = Adapter::init(layout.clone()).values.iter().map(|v| f64::from(*v)).collect();
    for (round, device) in (0..3).flat_map(|round| (0..3).map(move |device| (round, device))) {
        let delta = made_up_delta(device, round, layout.len());
        expected.iter_mut().zip(delta).for_each(|(sum, value)| *sum += f64::from(value) / 3.0);
    }
    for (actual, expected) in world.progress().adapter.iter().zip(expected) {
        assert!((f64::from(*actual) - expected).abs() < 1e-6, "{actual} {expected}");
    }
}

#[test]
fn one_seed_gives_one_history_and_another_seed_the_same_adapter() {
    let history = |seed| {
        let mut world = World::new(4);
        world.core = Core::new(setup(seed));
        world.add_task(spec(4), None);
        world.run_to_end();
        (world.commits.last().unwrap().checkpoint, format!("{:?}", world.events))
    };
    assert_eq!(history(1), history(1));
    assert_eq!(history(1).0, history(2).0);
}

#[test]
fn dropouts_cost_a_deadline_and_the_device_takes_part_again() {
    let mut world = World::with_task(4, crate::TaskSpec { rounds: 20, ..spec(4) });
    world.actors[3].training_ms = 25_000;
    world.run_until(|world| world.commits.len() == 2);
    let record = world.commits[1].record.clone().unwrap();
    assert_eq!((record.selected, record.completed, record.outcome), (4, 3, RoundOutcome::Finished));
    assert_eq!(record.finished_unix_ms - record.opened_unix_ms, 20_000);
    world.actors[3].training_ms = 500;
    world.run_to_end();
    assert!(world.actors[3].events.iter().any(|event| matches!(event, Event::Contributed { .. })));
}

#[test]
fn a_round_with_too_few_reports_fails_and_is_tried_again() {
    let mut world = World::with_task(4, spec(4));
    world.actors[1..].iter_mut().for_each(|actor| actor.training_ms = 30_000);
    world.run_until(|world| world.commits.len() == 2);
    let record = world.commits[1].record.clone().unwrap();
    assert_eq!(record.outcome, RoundOutcome::Failed("1 contributions arrived in time, 2 needed".into()));
    assert_eq!((world.commits[1].progress.round, world.commits[1].progress.attempt), (0, 1));
    assert_eq!(world.commits[1].progress.adapter, world.commits[0].progress.adapter);
    world.actors.iter_mut().for_each(|actor| actor.training_ms = 500);
    world.run_to_end();
    assert_eq!(world.progress().round, 3);
}

#[test]
fn a_full_disk_stops_the_task_and_loses_nothing() {
    let mut smooth = World::with_task(4, spec(4));
    smooth.run_to_end();
    let mut world = World::with_task(4, spec(4));
    world.run_until(|world| world.commits.len() == 1);
    world.disk_full = true;
    let failures = |world: &World| {
        world.events.iter().filter(|event| matches!(event, CoreEvent::CommitFailed { .. })).count()
    };
    world.run_until(|world| failures(world) == 5);
    assert_eq!(world.commits.len(), 1);
    assert_eq!(world.core.task_status(&name("lora")).unwrap().stage, "committing");
    world.disk_full = false;
    world.run_to_end();
    assert_eq!(world.progress().adapter, smooth.progress().adapter);
    assert_eq!(world.commits[1].record.as_ref().unwrap().completed, 4);
}

#[test]
fn a_resumed_task_ends_with_the_adapter_of_an_uninterrupted_one() {
    let optimizers = [
        ServerOptimizer::FedAvg { learning_rate: 1.0 },
        ServerOptimizer::FedAvgM { learning_rate: 0.7, momentum: 0.9 },
        ServerOptimizer::FedAdam { learning_rate: 0.01, beta1: 0.9, beta2: 0.99, tau: 1e-3 },
    ];
    for server_optimizer in optimizers {
        let spec = crate::TaskSpec { server_optimizer, ..spec(4) };
        let mut smooth = World::with_task(4, spec.clone());
        smooth.run_to_end();
        let mut first = World::with_task(4, spec.clone());
        first.run_until(|world| world.commits.len() == 3);
        let mut second = World::new(4);
        second.core = Core::new(setup(77));
        second.blobs.extend(first.blobs.clone());
        second.actors = first.actors;
        second.now = first.now;
        second.add_task(spec, Some(TaskProgress::clone(&first.commits[2].progress)));
        second.run_to_end();
        assert_eq!(second.progress().adapter, smooth.progress().adapter, "{server_optimizer:?}");
        let record = second.commits[1].record.clone().unwrap();
        assert_eq!((record.round, record.attempt), (2, 1), "the attempt under way is not taken up again");
    }
}

#[test]
fn a_restored_release_is_offered_and_the_next_one_is_newer() {
    let mut world = World::with_task(3, spec(3));
    world.run_to_end();
    let release = world.core.release().unwrap().clone();
    world.core = Core::new(setup(5));
    world.core.restore_release(release).unwrap();
    world.add_task(crate::TaskSpec { name: name("second"), ..spec(3) }, None);
    world.run_until(|world| world.actors.iter().all(|actor| actor.events.contains(&Event::ReleaseActive(2))));
    assert_eq!(world.core.release().unwrap().version(), 2);
}

#[test]
fn two_tasks_take_turns() {
    let mut world = World::with_task(6, spec(2));
    world.add_task(crate::TaskSpec { name: name("other"), ..spec(2) }, None);
    world.run_to_end();
    let finished = |task: &str| {
        let is_it = |commit: &&crate::Commit| commit.task == name(task) && commit.progress.round == 3;
        world.commits.iter().position(|commit| is_it(&commit)).unwrap()
    };
    assert!(finished("lora").abs_diff(finished("other")) <= 3);
    assert_eq!(world.core.release().unwrap().version(), 2);
}

#[test]
fn an_expired_plan_ends_the_task() {
    let mut world = World::with_task(4, crate::TaskSpec { expires: UnixMillis(1_001_200), ..spec(4) });
    world.run_until(|world| world.events.contains(&CoreEvent::TaskExpired { task: name("lora"), round: 1 }));
    assert!(world.core.is_finished() && world.core.release().is_none());
}

#[test]
fn senseless_specs_are_refused_and_change_nothing() {
    let mut world = World::new(0);
    let mut check = |expected: &str, spoil: &dyn Fn(&mut crate::TaskSpec)| {
        let mut spec = spec(4);
        spoil(&mut spec);
        let added = world.core.add_task(spec, world.base.clone(), world.base_digest, None, world.now);
        let error = added.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check("plan.rounds: 0", &|s| s.rounds = 0);
    check("plan.training.steps: 0", &|s| s.training.steps = 0);
    check("selected_max is below report_goal", &|s| s.round_policy.selected_max = 3);
    check("reports_min is below", &|s| s.round_policy.reports_min = 1);
    check("lora rank", &|s| s.trained = TrainedConfig::Lora(LoraConfig { rank: 0, ..lora() }));
    check("learning_rate", &|s| s.server_optimizer = ServerOptimizer::FedAvg { learning_rate: 0.0 });
    assert!(world.core.poll_commit().is_none() && world.core.is_finished());
    let short = TaskProgress { adapter: vec![0.0; 3], ..TaskProgress::default() };
    let resumed = world.core.add_task(spec(4), world.base.clone(), world.base_digest, Some(short), world.now);
    assert!(matches!(resumed, Err(CoreError::Adapter { .. })));
    let other = fleetune_proto::Digest::of(b"another model");
    let bound = world.core.add_task(spec(4), world.base.clone(), other, None, world.now);
    assert!(matches!(bound, Err(CoreError::Base { .. })));
    world.add_task(spec(4), None);
    let twice = world.core.add_task(spec(4), world.base.clone(), world.base_digest, None, world.now);
    assert!(matches!(twice, Err(CoreError::Duplicate(_))));
}
