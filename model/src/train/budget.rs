//! What a training session needs, predicted from shapes before it starts: bytes of memory and operations; and
//! the cut of a batch that fits a memory budget.
//!
//! The memory is counted buffer by buffer as `kernels/layer.rs`, `kernels/layer_backward.rs` and
//! `kernels/head.rs` hold them; `tests` below and `examples/memory_need.rs` hold the count against what sessions
//! really take.

use super::{LocalTraining, OptimizerConfig, Precision, Recompute, TrainError, TrainerOptions};
use crate::adapter::AdapterLayout;
use crate::base::BaseModel;
use crate::batch::Batch;
use crate::config::{ModelConfig, Projection};
use crate::family::Family;
use crate::kernels::head::chunk_rows;
use crate::weights::WeightMatrix;

/// Tokens of a micro-batch. From here on a larger one saves little time (measured on SmolLM2-135M from 256 to 512: 2 %
/// with bf16 products, nothing with f32; from 128 to 256 with bf16: 10 %), and takes more memory.
const MICRO_TOKENS: usize = 256;

/// Tokens times the model's width up to which a micro-batch may be larger: a small model's takes little memory.
const MICRO_VALUES: usize = 1 << 17;

/// Blocks are not cut into shorter ones than this to fit a budget.
const BLOCK_TOKENS_MIN: usize = 16;

/// What another micro-batch costs, in tokens; running a layer again costs a third of its time.
const PASS_TOKENS: usize = 8;

/// What a session's memory follows from.
#[derive(Debug, Clone, Copy)]
pub struct SessionShape<'a> {
    /// The model's sizes.
    pub model: &'a ModelConfig,
    /// The memory of its weights, [`weight_memory`].
    pub weights: WeightMemory,
    /// The adapter that is trained.
    pub layout: &'a AdapterLayout,
    /// The update rule.
    pub optimizer: OptimizerConfig,
    /// Of the products.
    pub precision: Precision,
}

/// Bytes of a model's weights that are in memory while it is trained upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightMemory {
    /// All the time: embedding, output, and layers that lie in the program's own memory.
    pub kept: u64,
    /// For each thread: the largest layer in a mapped file, whose pages are given back after each pass.
    pub passing: u64,
}

/// How a batch is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Sequences of a micro-batch.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
    /// Whether layers run again in the backward pass.
    pub recompute: bool,
    /// Micro-batches computed at once.
    pub threads: usize,
}

/// Bytes that a session takes, by what they are for. All of them are an upper bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// The frozen weights; of a mapped file's layers those that are being computed.
    pub weights: u64,
    /// The tokenizer.
    pub tokenizer: u64,
    /// The adapter's values, gradients and optimizer state.
    pub values: u64,
    /// What the forward pass keeps for the backward pass.
    pub activations: u64,
    /// What both passes work in.
    pub working: u64,
}

impl MemoryNeed {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights + self.tokenizer + self.values + self.activations + self.working
    }
}

/// How a session is computed: the outcome of [`Fit::new`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fit {
    /// Most tokens of a micro-batch.
    pub micro_tokens: usize,
    /// Predictions in a block; below the plan's, blocks are cut into shorter ones.
    pub block_tokens: usize,
    /// Whether layers run again in the backward pass.
    pub recompute: bool,
    /// Micro-batches computed at once.
    pub threads: usize,
    /// The session's predicted memory, where it was predicted.
    pub memory_bytes: Option<u64>,
}

impl Fit {
    /// The fastest cut that fits the options' memory budget; without a budget the same cut for any number of
    /// threads. A step's blocks stay those of the plan.
    ///
    /// # Errors
    /// [`TrainError::OverMemory`] when one sequence of 16 tokens does not fit.
    pub fn new(
        shape: &SessionShape<'_>,
        plan: &LocalTraining,
        options: &TrainerOptions,
    ) -> Result<Self, TrainError> {
        let length = plan.block_tokens.min(shape.model.context_length).max(1);
        let batch = plan.batch_size.max(1);
        let widest = Cut {
            sequences: (micro_tokens(shape.model) / length).clamp(1, batch),
            length,
            recompute: options.recompute == Recompute::Always,
            threads: options.threads.max(1),
        };
        let widest = Cut { threads: widest.threads.min(batch.div_ceil(widest.sequences)), ..widest };
        let Some(budget) = options.memory_bytes else { return Ok(Self::of(shape, widest)) };
        let fits = |cut: &Cut| memory_need(shape, cut).total() <= budget;
        let all = cuts(widest, options, batch);
        if let Some(best) = all.iter().filter(|cut| fits(cut)).min_by_key(|cut| cost(cut, batch)) {
            return Ok(Self::of(shape, *best));
        }
        let least =
            Cut { sequences: 1, threads: 1, recompute: options.recompute != Recompute::Never, ..widest };
        let shorter = |pieces: usize| Cut { length: length.div_ceil(pieces), ..least };
        let pieces_max = (length / BLOCK_TOKENS_MIN).max(1);
        match (2..=pieces_max).map(shorter).find(fits) {
            Some(cut) => Ok(Self::of(shape, cut)),
            None => Err(TrainError::OverMemory {
                needed_bytes: memory_need(shape, &shorter(pieces_max)).total(),
                budget_bytes: budget,
            }),
        }
    }

    /// Without budgets, before a plan is known.
    pub(super) fn unbounded(model: &ModelConfig, options: &TrainerOptions) -> Self {
        Self {
            micro_tokens: micro_tokens(model),
            block_tokens: usize::MAX,
            recompute: options.recompute == Recompute::Always,
            threads: options.threads.max(1),
            memory_bytes: None,
        }
    }

    /// Every batch at once on one thread.
    pub(crate) fn whole(plan: &LocalTraining) -> Self {
        Self {
            micro_tokens: plan.batch_size.saturating_mul(plan.block_tokens),
            block_tokens: plan.block_tokens,
            recompute: false,
            threads: 1,
            memory_bytes: None,
        }
    }

    fn of(shape: &SessionShape<'_>, cut: Cut) -> Self {
        Self {
            micro_tokens: cut.sequences * cut.length,
            block_tokens: cut.length,
            recompute: cut.recompute,
            threads: cut.threads,
            memory_bytes: Some(memory_need(shape, &cut).total()),
        }
    }
}

/// What of a model's weights is in memory while it is trained upon.
#[must_use]
pub fn weight_memory(base: &BaseModel) -> WeightMemory {
    let bytes = |matrix: &WeightMatrix| matrix.as_bytes().len() as u64;
    let mut memory = WeightMemory {
        kept: bytes(&base.token_embedding) + base.output.as_ref().map_or(0, bytes),
        passing: 0,
    };
    for layer in &base.layers {
        let (mapped, owned): (Vec<_>, Vec<_>) =
            layer.projections.iter().partition(|matrix| matrix.is_mapped());
        memory.kept += owned.into_iter().map(bytes).sum::<u64>();
        memory.passing = memory.passing.max(mapped.into_iter().map(bytes).sum());
    }
    memory
}

fn micro_tokens(model: &ModelConfig) -> usize {
    MICRO_TOKENS.max(MICRO_VALUES / model.hidden)
}

fn cuts(widest: Cut, options: &TrainerOptions, batch: usize) -> Vec<Cut> {
    let recomputes: &[bool] = match options.recompute {
        Recompute::Auto => &[false, true],
        Recompute::Always => &[true],
        Recompute::Never => &[false],
    };
    let mut all = Vec::new();
    for sequences in (1..=widest.sequences).rev() {
        for threads in 1..=options.threads.clamp(1, batch.div_ceil(sequences)) {
            all.extend(recomputes.iter().map(|recompute| Cut {
                sequences,
                threads,
                recompute: *recompute,
                ..widest
            }));
        }
    }
    all
}

/// Time of a step in thirds of a token's.
fn cost(cut: &Cut, batch: usize) -> usize {
    let waves = batch.div_ceil(cut.sequences).div_ceil(cut.threads);
    waves * (cut.sequences * cut.length + PASS_TOKENS) * if cut.recompute { 4 } else { 3 }
}

/// The most memory that a session cut like that takes, from the opened model on.
#[must_use]
pub fn memory_need(shape: &SessionShape<'_>, cut: &Cut) -> MemoryNeed {
    let widths = Widths::of(shape);
    let (threads, values) = (cut.threads as u64, shape.layout.len() as u64);
    let tokens = (cut.sequences * cut.length) as u64;
    let layers = shape.model.layers as u64;
    let kept = if cut.recompute { widths.hidden } else { widths.hidden + widths.saved };
    let activations = (layers * kept + widths.hidden) * tokens + values;
    let again = if cut.recompute { widths.saved } else { 0 };
    let chunk = (chunk_rows(shape.model.vocab_size) as u64).min(tokens);
    let head = chunk * (shape.model.vocab_size as u64 + HEAD_ROWS * widths.hidden);
    let attention = (2 * ATTENTION_ROWS.min(cut.length) * cut.length) as u64;
    let working = (again + widths.working) * tokens + head + attention;
    let rope = (cut.length * shape.model.head_dim) as u64;
    let kept_values = VECTORS + optimizer_vectors(shape.optimizer) + threads;
    MemoryNeed {
        weights: shape.weights.kept + threads * shape.weights.passing,
        tokenizer: TOKENIZER_BYTES + TOKEN_BYTES * shape.model.vocab_size as u64,
        values: FLOAT * (kept_values * values + frozen_values(shape.layout) + rope),
        activations: threads * FLOAT * activations,
        working: threads * (FLOAT * working + product_bytes(shape.precision)) + PROCESS_BYTES,
    }
}

const FLOAT: u64 = 4;

/// Copies of the values beside the optimizer's and the threads': the first ones and their checkpoint's bytes, the
/// ones under training, and the gradient.
const VECTORS: u64 = 4;

/// Vectors as wide as the model, for each row of a slice of the head.
const HEAD_ROWS: u64 = 6;

/// Queries whose scores are held at once (`kernels/attention.rs`).
const ATTENTION_ROWS: usize = 128;

/// Packed factors of the products of one thread: the f32 product packs more of them at once.
const PRODUCT_BYTES_F32: u64 = 14 << 20;
const PRODUCT_BYTES_BF16: u64 = 6 << 20;

/// The tokenizer, and what each token of it takes.
const TOKENIZER_BYTES: u64 = 1 << 20;
const TOKEN_BYTES: u64 = 600;

/// Code, stacks and what the allocator holds back.
const PROCESS_BYTES: u64 = 12 << 20;

/// Values for each token, in one layer.
struct Widths {
    hidden: u64,
    /// Kept from the forward for the backward pass beside the layer's input.
    saved: u64,
    /// Of both passes at their largest.
    working: u64,
}

impl Widths {
    fn of(shape: &SessionShape<'_>) -> Self {
        let model = shape.model;
        let [hidden, feed_forward] = [model.hidden, model.feed_forward].map(|width| width as u64);
        let [queries, keys, heads] =
            [model.query_width(), model.kv_width(), model.heads].map(|width| width as u64);
        // What the norms of a family keep: their inputs, and a number for each head or token.
        let normed_heads = queries + keys + heads + model.kv_heads as u64;
        let normed = match model.family {
            Family::Llama | Family::Qwen2 => 0,
            Family::Qwen3 => normed_heads,
            Family::Gemma3(_) => normed_heads + 2 * (hidden + 1),
        };
        let lora = shape.layout.config();
        let low = (lora.rank * lora.targets.len()) as u64;
        // Gate and up are kept in halves with bf16 products, and expanded to work on.
        let (gate_and_up, feed_forward_working) = match shape.precision {
            Precision::F32 => (2 * feed_forward, 2 * feed_forward),
            Precision::Bf16 => (feed_forward, 4 * feed_forward),
        };
        Self {
            hidden,
            saved: 2 + hidden + 2 * queries + 2 * keys + heads + gate_and_up + low + normed,
            working: feed_forward_working
                + 3 * hidden.max(queries)
                + 2 * keys
                + 4 * hidden
                + lora.rank as u64,
        }
    }
}

fn product_bytes(precision: Precision) -> u64 {
    match precision {
        Precision::F32 => PRODUCT_BYTES_F32,
        Precision::Bf16 => PRODUCT_BYTES_BF16,
    }
}

fn optimizer_vectors(optimizer: OptimizerConfig) -> u64 {
    match optimizer {
        OptimizerConfig::AdamW(_) => 2,
        OptimizerConfig::Sgd { .. } => 1,
    }
}

/// FFA-LoRA's first factors, which are made once.
fn frozen_values(layout: &AdapterLayout) -> u64 {
    let lora = layout.config();
    let targets = || lora.targets.iter().filter(|_| lora.freeze_a);
    (layout.layers() * lora.rank * targets().map(|p| layout.inputs(*p)).sum::<usize>()) as u64
}

/// Multiplications and additions of one layer for a sequence of that length, forward and backward; LoRA's own,
/// which are few, left out.
#[must_use]
pub fn layer_operations(model: &ModelConfig, length: usize, recompute: bool) -> f64 {
    let weights = |p: Projection| {
        let (rows, cols) = p.shape(model);
        (rows * cols) as f64
    };
    let all: f64 = Projection::ALL.into_iter().map(weights).sum();
    let again = if recompute { all - weights(Projection::Down) } else { 0.0 };
    // Two products forward and five backward, half of them beyond the diagonal.
    let attention = if recompute { 9.0 } else { 7.0 } * (length * model.query_width()) as f64;
    length as f64 * (2.0 * (2.0 * all + again) + attention)
}

/// The same for the whole model, with a target at every token.
#[must_use]
pub fn sequence_operations(model: &ModelConfig, length: usize, recompute: bool) -> f64 {
    let layers = model.layers as f64 * layer_operations(model, length, recompute);
    layers + head_operations(model, length)
}

/// The same for a batch, without recomputing.
pub(super) fn batch_operations(model: &ModelConfig, batch: &Batch) -> f64 {
    let layers = (batch.sequences * model.layers) as f64 * layer_operations(model, batch.length, false);
    layers + head_operations(model, batch.predicted())
}

/// The output projection and its input's gradient.
fn head_operations(model: &ModelConfig, rows: usize) -> f64 {
    4.0 * (model.vocab_size * model.hidden) as f64 * rows as f64
}

#[cfg(test)]
mod tests;
