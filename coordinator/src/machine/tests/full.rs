//! Tasks that train all weights of a small model: the core sums, noises and keeps a vector as any other, and releases a
//! whole model.

use super::privacy::{privacy, private};
use super::secure::check_adapter;
use super::world::{Actor, World, name, secure_spec, spec};
use crate::{CoreError, TaskSpec};
use fleetune_model::{
    base::BaseModel,
    trained::{TrainedConfig, TrainedLayout},
    weights::WeightFormat,
};
use fleetune_proto::{TrainedShape, device::Event};

/// The same task over all weights.
fn full(spec: TaskSpec) -> TaskSpec {
    TaskSpec { trained: TrainedConfig::Full, ..spec }
}

fn run_to_release(world: &mut World) {
    world.run_until(|world| {
        let active = |actor: &Actor| actor.events.contains(&Event::ReleaseActive(1));
        world.actors.iter().all(active)
    });
}

/// The released model, opened from the blobs that the core had made durable.
fn released(world: &World) -> BaseModel {
    let manifest = &world.core.release().unwrap().manifest;
    assert_eq!(manifest.adapter, None);
    assert_ne!(manifest.base_model, world.base_digest);
    let model = BaseModel::from_gguf_bytes(world.blobs[&manifest.base_model].to_vec()).unwrap();
    assert_eq!(model.sha256, manifest.base_model.sha256);
    model
}

#[test]
fn all_weights_move_by_the_mean_in_plain_and_in_secure_sums() {
    for spec in [spec(4), secure_spec(4)] {
        let mut world = World::with_task(4, TaskSpec { release_format: WeightFormat::F32, ..full(spec) });
        let task = &world.core.tasks[&name("lora")];
        assert_eq!(task.plan.adapter.shape, TrainedShape::Full);
        assert_eq!(task.plan.adapter.dimension as u64, world.base.parameter_count());
        run_to_release(&mut world);
        check_adapter(&world, &[vec![0, 1, 2, 3], vec![0, 1, 2, 3], vec![0, 1, 2, 3]]);
        let TrainedLayout::Full(layout) = world.core.tasks[&name("lora")].layout.clone() else { panic!() };
        assert_eq!(layout.values_of(&released(&world)), world.progress().adapter, "the release is the model");
    }
}

#[test]
fn the_release_is_stored_as_asked() {
    let mut world = World::with_task(3, full(spec(3)));
    run_to_release(&mut world);
    let model = released(&world);
    assert_eq!(model.token_embedding.format(), WeightFormat::Q8_0);
    assert_eq!(model.tokenizer.vocab_size(), world.base.tokenizer.vocab_size());
}

#[test]
fn all_weights_are_trained_with_privacy_too() {
    let mut world = World::with_task(8, full(private(2, privacy(2))));
    run_to_release(&mut world);
    let plan = &world.core.tasks[&name("lora")].plan;
    let (dimension, vector) = (plan.adapter.dimension, plan.vector_len());
    assert!(vector >= dimension && plan.privacy_plan().is_some());
    let manifest = &world.core.release().unwrap().manifest;
    assert!(manifest.privacy_statement.contains("epsilon"), "{}", manifest.privacy_statement);
    let moved = world
        .progress()
        .adapter
        .iter()
        .zip(world.core.tasks[&name("lora")].layout.initial_values(&world.base));
    assert!(moved.filter(|(now, before)| **now != *before).count() > dimension / 2);
}

#[test]
fn a_full_task_goes_on_from_its_progress_and_not_from_an_adapters() {
    let mut world = World::with_task(3, full(spec(3)));
    world.run_attempts(1);
    let progress = world.progress().clone();
    let mut second = World::with_task(3, TaskSpec { name: name("other"), ..spec(3) });
    second.add_task(full(spec(3)), Some(progress.clone()));
    assert_eq!(second.core.task_status(&name("lora")).unwrap().round, 1);
    let other = TaskSpec { name: name("third"), ..spec(3) };
    let refused =
        second.core.add_task(other, second.base.clone(), second.base_digest, Some(progress), second.now);
    assert!(matches!(refused, Err(CoreError::Adapter { .. })));
}

#[test]
fn a_format_that_does_not_fit_is_refused_before_the_first_round() {
    let mut world = World::with_task(3, TaskSpec { name: name("other"), ..spec(3) });
    let spec = TaskSpec { release_format: WeightFormat::Q6_K, ..full(spec(3)) };
    let refused = world.core.add_task(spec, world.base.clone(), world.base_digest, None, world.now);
    assert!(matches!(refused, Err(CoreError::Adapter { .. })), "rows of 32 are no blocks of 256");
}
