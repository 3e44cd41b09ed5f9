//! Local training on the made-up fleet.

use fleetune_model::train::Recompute;

use super::*;
use crate::data::blocks;
use crate::fixture::{BLOCK_TOKENS, base, base_bytes, checkpoint, full_plan, plan, texts};

fn order(plan: &TaskPlan) -> TrainOrder {
    TrainOrder {
        plan: plan.clone(),
        round: 0,
        attempt: 0,
        checkpoint: fleetune_proto::Digest::of(&checkpoint()),
    }
}

fn own_blocks() -> Vec<Vec<u32>> {
    blocks(&base().tokenizer, &texts(), BLOCK_TOKENS as usize)
}

fn run(order: &TrainOrder, seed: u8) -> Result<LocalUpdate, TrainingFailure> {
    LocalTrainer::new(base(), &order.plan)?
        .run(order, &checkpoint(), &own_blocks(), &[seed; 32], &mut || false)
}

#[test]
fn the_update_follows_from_order_device_and_data_alone() {
    let order = order(&plan());
    let update = run(&order, 1).unwrap();
    assert_eq!(update.delta.len(), order.plan.adapter.dimension);
    assert!(update.delta.iter().any(|v| *v != 0.0) && update.delta.iter().all(|v| v.is_finite()));
    assert_eq!((update.summary.steps, update.summary.tokens), (4, 4 * 2 * 16));
    assert_eq!(update, run(&order, 1).unwrap());
    assert_eq!(update, run(&TrainOrder { attempt: 3, ..order.clone() }, 1).unwrap(), "an attempt repeats");
    assert_ne!(update, run(&order, 2).unwrap(), "devices draw their own batches");
    assert_ne!(update, run(&TrainOrder { round: 1, ..order }, 1).unwrap(), "rounds do too");
}

#[test]
fn less_memory_gives_the_same_bits() {
    let order = order(&plan());
    let mut frugal = LocalTrainer::with_options(
        base(),
        &order.plan,
        TrainerOptions { recompute: Recompute::Always, threads: 2, ..TrainerOptions::default() },
    )
    .unwrap();
    let update = frugal.run(&order, &checkpoint(), &own_blocks(), &[1; 32], &mut || false).unwrap();
    assert_eq!(update.delta, run(&order, 1).unwrap().delta);
}

#[test]
fn a_budget_that_is_too_small_is_told_with_its_figures() {
    let order = order(&plan());
    let options = TrainerOptions { memory_bytes: Some(1_000_000), ..TrainerOptions::default() };
    let mut trainer = LocalTrainer::with_options(base(), &order.plan, options).unwrap();
    let error = trainer.run(&order, &checkpoint(), &own_blocks(), &[1; 32], &mut || false).unwrap_err();
    let TrainingFailure::OverBudget(reason) = error else { panic!("{error}") };
    assert!(reason.contains("the budget is 1 MB"), "{reason}");
}

fn lora(plan: &mut TaskPlan) -> &mut LoraShape {
    match &mut plan.adapter.shape {
        TrainedShape::Lora(lora) => lora,
        TrainedShape::Full => panic!("the plan of an adapter"),
    }
}

#[test]
fn all_weights_are_trained_when_the_plan_says_so() {
    let base = base();
    let layout = TrainedLayout::new(&base, &TrainedConfig::Full).unwrap();
    let mut plan = plan();
    plan.adapter = full_plan(&base);
    let (order, start) = (order(&plan), layout.initial_values(&base));
    let mut trainer = LocalTrainer::new(Arc::clone(&base), &plan).unwrap();
    let mut train = |seed| {
        let checkpoint = layout.to_checkpoint_bytes(&start);
        trainer.run(&order, &checkpoint, &own_blocks(), &[seed; 32], &mut || false).unwrap()
    };
    let update = train(1);
    assert_eq!(update.delta.len() as u64, base.parameter_count());
    assert_eq!(update, train(1), "the same from the same");
    assert_ne!(update, train(2));
    let moved = update.delta.iter().filter(|value| **value != 0.0).count();
    assert!(moved > update.delta.len() / 2, "{moved} of {} weights moved", update.delta.len());
    assert!(update.summary.last_loss < update.summary.first_loss);
    let of_adapter = trainer.run(&order, &checkpoint(), &own_blocks(), &[1; 32], &mut || false);
    assert!(matches!(of_adapter, Err(TrainingFailure::PlanRejected(_))), "{of_adapter:?}");
    plan.adapter.layout_sha256 = [1; 32];
    assert!(LocalTrainer::new(base, &plan).is_err());
}

#[test]
fn plans_that_do_not_fit_are_rejected() {
    let check = |expected: &str, spoil: fn(&mut TaskPlan)| {
        let mut bad = plan();
        spoil(&mut bad);
        let error = LocalTrainer::new(base(), &bad).unwrap_err();
        assert!(
            matches!(&error, TrainingFailure::PlanRejected(reason) if reason.contains(expected)),
            "{error}"
        );
    };
    check("for base", |p| p.base_model.sha256 = [1; 32]);
    check("a vector of 7 values", |p| p.adapter.dimension = 7);
    check("another hash", |p| p.adapter.layout_sha256 = [1; 32]);
    check("a vector of", |p| lora(p).rank = 3);
    check("unknown projection \"head\"", |p| lora(p).targets = vec!["head".into()]);
    check("a vector of", |p| p.adapter.shape = TrainedShape::Full);
    check("blocks of 65 tokens", |p| p.training.block_tokens = 65);
    let other = BaseModel::from_gguf_bytes(base_bytes(2)).unwrap();
    assert!(matches!(LocalTrainer::new(Arc::new(other), &plan()), Err(TrainingFailure::PlanRejected(_))));
}

#[test]
fn what_cannot_be_trained_says_why() {
    let order = order(&plan());
    let mut trainer = LocalTrainer::new(base(), &order.plan).unwrap();
    let blocks = own_blocks();
    let mut steps = 0;
    let mut third = || {
        steps += 1;
        steps > 5
    };
    let stopped = trainer.run(&order, &checkpoint(), &blocks, &[1; 32], &mut third).unwrap_err();
    assert!(matches!(stopped, TrainingFailure::Interrupted(_)), "{stopped}");
    let few = trainer.run(&order, &checkpoint(), &blocks[..1], &[1; 32], &mut || false).unwrap_err();
    assert_eq!(few, TrainingFailure::InsufficientData { held: 1, needed: 2 });
    let broken = trainer.run(&order, b"no checkpoint", &blocks, &[1; 32], &mut || false).unwrap_err();
    assert!(matches!(broken, TrainingFailure::PlanRejected(_)), "{broken}");
    let huge = trainer.layout().to_checkpoint_bytes(&vec![1e38; trainer.layout().len()]);
    let diverged = trainer.run(&order, &huge, &blocks, &[1; 32], &mut || false);
    assert!(matches!(diverged, Err(TrainingFailure::Failed(_))), "{diverged:?}");
}
