//! Equal training, the parts that memory asks for, and refusals. Equal gradients on flex: `stock/tests.rs`.

use super::*;
use crate::adapter::Adapter;
use crate::base::ModelParts;
use crate::fixtures::{adapter, base, base_of, blocks, config, layout, noise};
use crate::stock::tests::{batch, relative_error};
use crate::train::{LocalTraining, LoraTrainer, OptimizerConfig, Schedule, TrainerOptions, fine_tune};
use crate::weights::{WeightFormat, WeightMatrix};

/// Q, a shared key head's K, and one of the feed-forward part.
const TARGETS: [Projection; 3] = [Projection::Q, Projection::K, Projection::Down];

fn trainer(base: &Arc<BaseModel>, layout: &Arc<AdapterLayout>, device: &Device) -> GenericTrainer {
    let options = GenericOptions::default();
    GenericTrainer::new(Arc::clone(base), Arc::clone(layout), device, options).unwrap()
}

/// Values and last loss after ten AdamW steps.
fn trained(trainer: &mut dyn Trainer, config: &ModelConfig, start: &Adapter) -> (Vec<f32>, f32) {
    let plan = LocalTraining {
        steps: 10,
        batch_size: 2,
        block_tokens: 24,
        optimizer: OptimizerConfig::default(),
        learning_rate: 0.01,
        gradient_clip: Some(1.0),
        schedule: Schedule::WarmupCosine { warmup_steps: 2, final_fraction: 0.1 },
    };
    let mut blocks = blocks(config, 5, 24);
    blocks[1].truncate(11);
    let mut values = start.values.clone();
    let summary = fine_tune(trainer, &mut values, &blocks, &plan, 3, &mut || false).unwrap();
    assert!(summary.last_loss < summary.first_loss - 0.3, "{summary:?}");
    (values, summary.last_loss)
}

fn check_equal_training(device: &Device, tolerance: f32) {
    let base = base();
    for targets in [&TARGETS[..], &Projection::ALL] {
        let layout = layout(&base.config, targets, false);
        let start = Adapter::init(Arc::clone(&layout));
        let mut native =
            LoraTrainer::new(Arc::clone(&base), Arc::clone(&layout), TrainerOptions::default()).unwrap();
        let (expected, expected_loss) = trained(&mut native, &base.config, &start);
        let (found, loss) = trained(&mut trainer(&base, &layout, device), &base.config, &start);
        let farthest = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(farthest < tolerance, "{farthest:e}");
        assert!((loss - expected_loss).abs() < tolerance, "{loss} {expected_loss}");
    }
}

#[test]
fn ten_steps_end_where_the_hand_written_operations_end() {
    check_equal_training(&flex(), 1e-4);
}

#[test]
fn parts_of_the_head_add_up_to_the_whole() {
    let base = untied();
    let layout = layout(&base.config, &TARGETS, true);
    let values = adapter(&layout).values;
    let batch = batch(&base.config, 3, 7);
    let run = |logits_rows: usize, output_rows: usize, recompute: bool| {
        let mut trainer = trainer(&base, &layout, &flex());
        trainer.options = GenericOptions { recompute };
        trainer.logits_max = logits_rows * base.config.vocab_size;
        trainer.model = StockModel::with_output_block(&base, &flex(), output_rows);
        let mut gradient = vec![f32::NAN; layout.len()];
        let loss = trainer.loss_and_gradient(&values, &batch, &mut gradient).unwrap();
        assert!((trainer.loss(&values, &batch).unwrap() / loss - 1.0).abs() < 1e-6);
        (loss, gradient)
    };
    let (expected_loss, expected) = run(21, base.config.vocab_size, false);
    for (logits_rows, output_rows, recompute) in
        [(1, 1000, false), (4, 100, true), (20, 7, false), (0, 64, true)]
    {
        let (loss, gradient) = run(logits_rows, output_rows, recompute);
        assert!((loss / expected_loss - 1.0).abs() < 1e-6, "{loss} {expected_loss}");
        let error = relative_error(&gradient, &expected);
        assert!(error < 1e-6, "{logits_rows} {output_rows}: {error:e}");
    }
}

/// A small model whose output is not its embedding.
fn untied() -> Arc<BaseModel> {
    let BaseModel { config, tokenizer, token_embedding, layers, output_norm, .. } =
        Arc::unwrap_or_clone(base_of(&config(4, 2, 16), WeightFormat::F32));
    let (rows, cols) = (config.vocab_size, config.hidden);
    let output = WeightMatrix::from_f32(&noise(rows * cols, 0.2, 8), rows, cols, WeightFormat::F32).unwrap();
    let parts = ModelParts {
        config,
        tokenizer,
        token_embedding,
        layers,
        output_norm,
        output: Some(output),
        chat_template: None,
    };
    Arc::new(BaseModel::from_parts(parts).unwrap())
}

#[test]
fn what_it_cannot_compute_is_refused() {
    let mut huge = config(4, 2, 16);
    (huge.vocab_size, huge.hidden) = (1 << 18, 1 << 14);
    let error = check_supported(&huge).unwrap_err().to_string();
    assert_eq!(error, "model tiny: a matrix of more than 2^31 values is not supported by the generic engine");

    let (base, other) = (base(), config(4, 4, 16));
    let layout = layout(&other, &TARGETS, false);
    let options = GenericOptions::default();
    let error = GenericTrainer::new(base, layout, &flex(), options).unwrap_err();
    assert!(
        matches!(error, GenericError::Input(InputError::AdapterShape { projection: "k", .. })),
        "{error}"
    );
}

#[test]
fn what_does_not_fit_the_model_is_refused() {
    let base = base();
    let layout = layout(&base.config, &TARGETS, false);
    let mut trainer = trainer(&base, &layout, &flex());
    let (values, mut gradient) = (adapter(&layout).values, vec![0.0; layout.len()]);
    let mut batch = batch(&base.config, 1, 4);
    assert!(trainer.loss_and_gradient(&values[1..], &batch, &mut gradient).is_err());
    assert!(trainer.loss_and_gradient(&values, &batch, &mut gradient[1..]).is_err());
    batch.inputs[2] = u32::MAX;
    let error = trainer.loss_and_gradient(&values, &batch, &mut gradient).unwrap_err();
    assert!(matches!(error, TrainError::Input(InputError::UnknownToken { position: 2, .. })), "{error}");
}
