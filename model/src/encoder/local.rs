//! The local training loop of a classifier: which texts make a batch, which rule makes a step, and when to stop.
//! The plan is that of `train/local.rs`; its `block_tokens` is the longest text in ids.

use super::trainer::{ClassifierTrainer, Example};
use crate::batch::InputError;
use crate::optim::clip_gradient_norm;
use crate::train::budget::Fit;
use crate::train::local::{BatchOrder, Losses, Optimizer};
use crate::train::{LocalTraining, TrainError, TrainSummary};

/// Trains `values` in place on the examples; `should_stop` is asked before every step. In the summary losses are
/// nats a text, and `tokens` are the ids read.
///
/// # Errors
/// Those of [`TrainError`]; after one that names a step, `values` are as after the last whole step.
pub fn fine_tune(
    trainer: &ClassifierTrainer,
    values: &mut [f32],
    examples: &[Example],
    plan: &LocalTraining,
    seed: u64,
    should_stop: &mut dyn FnMut() -> bool,
) -> Result<TrainSummary, TrainError> {
    plan.check_numbers()?;
    match examples.iter().map(|example| example.ids.len()).max() {
        None => return Err(TrainError::NoData),
        Some(found) if found > plan.block_tokens => {
            return Err(InputError::TooLong { found, limit: plan.block_tokens }.into());
        }
        Some(_) => {}
    }
    let mut order = BatchOrder::new(examples.len(), seed);
    let mut optimizer = Optimizer::new(plan.optimizer, values.len());
    let mut gradient = vec![0f32; values.len()];
    let mut losses = Losses::default();
    for step in 0..plan.steps {
        if should_stop() {
            return Err(TrainError::Cancelled { step });
        }
        let batch: Vec<&Example> = order.take(plan.batch_size).map(|index| &examples[index]).collect();
        let loss = trainer.loss_and_gradient(values, &batch, &mut gradient)?;
        let norm = clip_gradient_norm(&mut gradient, plan.gradient_clip.unwrap_or(f32::INFINITY));
        if !(loss.is_finite() && norm.is_finite()) {
            return Err(TrainError::NonFinite { step });
        }
        optimizer.step(values, &gradient, plan.learning_rate * plan.schedule.factor(step, plan.steps));
        losses.push(loss, batch.iter().map(|example| example.ids.len()).sum());
    }
    Ok(losses.summary(Fit::whole(plan)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::encoder::config::EncoderProjection;
    use crate::encoder::fixtures::{classifier_config, tiny_examples, tiny_model};
    use crate::encoder::layout::ClassifierLayout;
    use crate::kernels::bf16::Precision;
    use crate::train::{OptimizerConfig, Schedule};

    fn plan() -> LocalTraining {
        LocalTraining {
            steps: 60,
            batch_size: 8,
            block_tokens: 24,
            optimizer: OptimizerConfig::default(),
            learning_rate: 0.02,
            gradient_clip: Some(1.0),
            schedule: Schedule::WarmupCosine { warmup_steps: 3, final_fraction: 0.1 },
        }
    }

    fn trainer(freeze_a: bool) -> ClassifierTrainer {
        let model = Arc::new(tiny_model());
        let config = classifier_config(&[EncoderProjection::Query, EncoderProjection::Value], freeze_a);
        let layout = Arc::new(ClassifierLayout::new(model.config(), &config).unwrap());
        ClassifierTrainer::new(model, layout, Precision::F32).unwrap()
    }

    fn trained(seed: u64, freeze_a: bool) -> (Vec<f32>, TrainSummary) {
        let trainer = trainer(freeze_a);
        let mut values = trainer.layout().initial_values();
        let examples = tiny_examples();
        let summary = fine_tune(&trainer, &mut values, &examples, &plan(), seed, &mut || false).unwrap();
        (values, summary)
    }

    #[test]
    fn training_learns_and_counts() {
        for freeze_a in [false, true] {
            let (values, summary) = trained(1, freeze_a);
            assert!(summary.last_loss < 0.6 * summary.first_loss, "{summary:?}");
            assert_eq!(summary.steps, 60);
            let (trainer, examples) = (trainer(freeze_a), tiny_examples());
            let ids: Vec<&[u32]> = examples.iter().map(|example| example.ids.as_slice()).collect();
            let probabilities = trainer.predict(&values, &ids).unwrap();
            let right = examples.iter().zip(probabilities.chunks_exact(3));
            let right = right.filter(|(example, p)| p.iter().all(|x| *x <= p[example.class])).count();
            assert!(right * 10 >= examples.len() * 8, "{right} of {}", examples.len());
        }
    }

    #[test]
    fn the_seed_alone_decides_the_bytes() {
        let (expected, _) = trained(1, false);
        let others: Vec<Vec<f32>> = std::thread::scope(|scope| {
            let runs: Vec<_> = (0..3).map(|_| scope.spawn(|| trained(1, false).0)).collect();
            runs.into_iter().map(|run| run.join().unwrap()).collect()
        });
        assert!(others.iter().all(|values| *values == expected));
        assert_ne!(trained(2, false).0, expected);
    }

    #[test]
    fn a_stopped_training_keeps_whole_steps() {
        let trainer = trainer(false);
        let constant = |steps| LocalTraining { steps, schedule: Schedule::Constant, ..plan() };
        let mut stopped = trainer.layout().initial_values();
        let mut asked = 0;
        let mut stop = || {
            asked += 1;
            asked > 3
        };
        let error =
            fine_tune(&trainer, &mut stopped, &tiny_examples(), &constant(30), 1, &mut stop).unwrap_err();
        assert_eq!(error, TrainError::Cancelled { step: 3 });
        let mut expected = trainer.layout().initial_values();
        fine_tune(&trainer, &mut expected, &tiny_examples(), &constant(3), 1, &mut || false).unwrap();
        assert_eq!(stopped, expected);
    }

    #[test]
    fn what_cannot_be_trained_is_refused() {
        let trainer = trainer(false);
        let examples = tiny_examples();
        let check = |change: fn(&mut LocalTraining), examples: &[Example], value: f32| {
            let mut plan = plan();
            change(&mut plan);
            let mut values = vec![value; trainer.layout().len()];
            fine_tune(&trainer, &mut values, examples, &plan, 1, &mut || false).unwrap_err()
        };
        let example = |ids: &[u32], class: usize| [Example { ids: ids.to_vec(), class }];
        assert_eq!(check(|_| (), &[], 0.1), TrainError::NoData);
        assert!(matches!(check(|p| p.steps = 0, &examples, 0.1), TrainError::Plan { field: "steps", .. }));
        assert!(matches!(
            check(|p| p.block_tokens = 3, &examples, 0.1),
            TrainError::Input(InputError::TooLong { limit: 3, .. })
        ));
        assert_eq!(
            check(|_| (), &example(&[2, 3], 3), 0.1),
            InputError::UnknownClass { class: 3, classes: 3 }.into()
        );
        assert_eq!(check(|_| (), &example(&[], 0), 0.1), InputError::TooShort { found: 0, needed: 1 }.into());
        assert!(matches!(
            check(|_| (), &example(&[2, 9000], 0), 0.1),
            TrainError::Input(InputError::UnknownToken { id: 9000, .. })
        ));
        assert_eq!(check(|_| (), &examples, f32::NAN), TrainError::NonFinite { step: 0 });
    }
}
