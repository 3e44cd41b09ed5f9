//! Times training steps: `step_time product`, `step_time full HIDDEN LAYERS HEADS KV_HEADS FEED_FORWARD VOCAB
//! SEQUENCES LENGTH THREADS STEPS`, `step_time made` with the same numbers without THREADS (LoRA on a base of made-up
//! weights), or `step_time lora MODEL.gguf SEQUENCES LENGTH STEPS [--recompute] [--threads N]`; each with
//! `--precision f32|bf16` and `--simd portable|avx2|avx512|best`. Or `step_time cancel MODEL.gguf SEQUENCES LENGTH
//! MOMENTS` for the longest time from a request to stop to its end, or `step_time curve MODEL.gguf TEXT SEQUENCES
//! LENGTH STEPS` for the loss of each step on blocks of a text with f32 and with bf16 products (rank 8 on q, k, v, o;
//! AdamW). CPU seconds count all threads and compare better than wall time on a busy machine; `product` gives the rate
//! of the `gemm` crate's matrix product on the same machine.
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a measuring program"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use fleetune_model::adapter::{Adapter, AdapterLayout, LoraConfig};
use fleetune_model::base::BaseModel;
use fleetune_model::batch::Batch;
use fleetune_model::config::{ModelConfig, Projection};
use fleetune_model::family::Family;
use fleetune_model::full::FullTrainer;
use fleetune_model::optim::{AdamW, AdamWConfig};
use fleetune_model::tokenizer::{SpecialTokens, TokenKind, Tokenizer, train_bpe};
use fleetune_model::train::{LoraTrainer, Precision, Recompute, Trainer, TrainerOptions};
use fleetune_model::weights::WeightFormat;
use fleetune_model::{SimdLevel, limit_simd};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    limit(&arguments);
    let numbers =
        |from: usize| arguments[from..].iter().filter_map(|a| a.parse().ok()).collect::<Vec<usize>>();
    match arguments.first().map(String::as_str) {
        Some("product") => products(),
        Some("full") => full(&numbers(1), options(&arguments[1..]).precision),
        Some("made") => made(&numbers(1), options(&arguments[1..])),
        Some("lora") => lora(Path::new(&arguments[1]), &numbers(2), options(&arguments[2..])),
        Some("cancel") => cancel(Path::new(&arguments[1]), &numbers(2), options(&arguments[2..])),
        Some("curve") => curve(Path::new(&arguments[1]), Path::new(&arguments[2]), &numbers(3)),
        _ => println!("see the head of this file"),
    }
}

fn limit(arguments: &[String]) {
    match arguments.iter().skip_while(|a| *a != "--simd").nth(1).map(String::as_str) {
        None | Some("best") => {}
        Some("portable") => limit_simd(SimdLevel::Portable),
        Some("avx2") => limit_simd(SimdLevel::Avx2),
        Some("avx512") => limit_simd(SimdLevel::Avx512),
        Some(other) => panic!("--simd {other}: portable, avx2, avx512 or best"),
    }
}

fn options(arguments: &[String]) -> TrainerOptions {
    let precision = match arguments.iter().skip_while(|a| *a != "--precision").nth(1).map(String::as_str) {
        None | Some("f32") => Precision::F32,
        Some("bf16") => Precision::Bf16,
        Some(other) => panic!("--precision {other}: f32 or bf16"),
    };
    let number = |flag: &str| {
        arguments.iter().skip_while(|a| *a != flag).nth(1).map(|text| text.parse::<usize>().unwrap())
    };
    let again = arguments.iter().any(|a| a == "--recompute");
    let recompute = if again { Recompute::Always } else { Recompute::Auto };
    TrainerOptions {
        recompute,
        precision,
        threads: number("--threads").unwrap_or(1),
        ..TrainerOptions::default()
    }
}

fn products() {
    for (m, n, k) in [
        (512, 1536, 576),
        (512, 576, 1536),
        (512, 192, 576),
        (1024, 512, 192),
        (1024, 192, 512),
        (512, 4096, 192),
    ] {
        let (x, w, mut y) = (vec![0.5f32; m * k], vec![0.25f32; n * k], vec![0f32; m * n]);
        let (cpu, mut done) = (cpu_seconds(), 0u32);
        while cpu_seconds() - cpu < 1.0 {
            for _ in 0..16 {
                product(m, n, k, (&x, &w, &mut y));
            }
            done += 16;
        }
        let gigaflops = 2e-9 * (m * n * k) as f64 * f64::from(done) / (cpu_seconds() - cpu);
        println!("product {m} x {k} x {n}: {gigaflops:.0} GF per CPU second");
    }
}

#[allow(unsafe_code, reason = "the gemm crate takes raw pointers")]
fn product(m: usize, n: usize, k: usize, (x, w, y): (&[f32], &[f32], &mut [f32])) {
    let (ns, ks) = (n as isize, k as isize);
    // SAFETY: x is [m, k], w [n, k] and y [m, n], all row-major and dense.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            ns,
            false,
            x.as_ptr(),
            1,
            ks,
            w.as_ptr(),
            ks,
            1,
            0f32,
            1f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// HIDDEN LAYERS HEADS KV_HEADS FEED_FORWARD VOCAB SEQUENCES LENGTH.
fn config(n: &[usize]) -> ModelConfig {
    ModelConfig {
        name: "timed".to_owned(),
        family: Family::Llama,
        hidden: n[0],
        layers: n[1],
        heads: n[2],
        kv_heads: n[3],
        head_dim: n[0] / n[2],
        feed_forward: n[4],
        vocab_size: n[5],
        context_length: n[7],
        rope_base: 10_000.0,
        rms_eps: 1e-5,
    }
}

fn full(n: &[usize], precision: Precision) {
    let batch = batch(n[6], n[7], n[5]);
    let mut trainer = FullTrainer::with_precision(config(n), n[8], precision).unwrap();
    let mut values = trainer.initial_parameters(1);
    time_steps(n[9], &mut values, |values, gradient| {
        trainer.loss_and_gradient(values, &batch, gradient).unwrap()
    });
}

/// LoRA on a base of made-up weights in f32.
fn made(n: &[usize], options: TrainerOptions) {
    let trainer = FullTrainer::new(config(n), 1).unwrap();
    let values = trainer.initial_parameters(1);
    let base = trainer.to_base(&values, made_tokenizer(n[5]), WeightFormat::F32).unwrap();
    lora_steps(Arc::new(base), &n[6..], options);
}

/// The bytes, and tokens that no text has.
fn made_tokenizer(vocab: usize) -> Tokenizer {
    let bytes = train_bpe(std::iter::empty(), 259, &SpecialTokens::default()).unwrap();
    let mut vocabulary = bytes.vocabulary().clone();
    for id in vocabulary.tokens.len()..vocab {
        vocabulary.tokens.push(format!("<unused {id}>"));
        vocabulary.kinds.push(TokenKind::Unused);
    }
    Tokenizer::new(vocabulary).unwrap()
}

fn adapter_layout(base: &BaseModel) -> Arc<AdapterLayout> {
    let targets = Projection::ALL[..4].to_vec();
    let config = LoraConfig { rank: 8, alpha: 16.0, targets, freeze_a: false, init_seed: 1 };
    Arc::new(AdapterLayout::new(&base.config, &config).unwrap())
}

/// Asks a large step to stop at several moments; prints the longest time until it has.
fn cancel(model: &Path, n: &[usize], options: TrainerOptions) {
    let base = Arc::new(BaseModel::open(model).unwrap());
    let layout = adapter_layout(&base);
    let batch = batch(n[0], n[1], base.config.vocab_size);
    let values = Adapter::init(Arc::clone(&layout)).values;
    let mut gradient = vec![0f32; values.len()];
    let mut trainer = LoraTrainer::new(base, layout, options).unwrap();
    let mut longest = 0f64;
    for moment in 1..=n[2] {
        let start = Instant::now();
        let at = std::time::Duration::from_millis(97 * moment as u64);
        let found =
            trainer.watched_loss_and_gradient(&values, &batch, &mut gradient, &mut || start.elapsed() > at);
        if found.is_err() {
            longest = longest.max((start.elapsed() - at).as_secs_f64());
        }
    }
    println!("stopped at most {longest:.3} s after the request");
}

fn lora(model: &Path, n: &[usize], options: TrainerOptions) {
    lora_steps(Arc::new(BaseModel::open(model).unwrap()), n, options);
}

fn lora_steps(base: Arc<BaseModel>, n: &[usize], options: TrainerOptions) {
    let layout = adapter_layout(&base);
    let batch = batch(n[0], n[1], base.config.vocab_size);
    let mut values = Adapter::init(Arc::clone(&layout)).values;
    let mut trainer = LoraTrainer::new(base, layout, options).unwrap();
    time_steps(n[2], &mut values, |values, gradient| {
        trainer.loss_and_gradient(values, &batch, gradient).unwrap()
    });
}

/// The next blocks of the text at every step, both precisions from the same start.
fn curve(model: &Path, text: &Path, n: &[usize]) {
    let base = Arc::new(BaseModel::open(model).unwrap());
    let layout = adapter_layout(&base);
    let ids = base.tokenizer.encode(&std::fs::read_to_string(text).unwrap(), false);
    let blocks: Vec<&[u32]> = ids.chunks_exact(n[1] + 1).collect();
    let losses = [Precision::F32, Precision::Bf16].map(|precision| {
        let options = TrainerOptions { precision, ..TrainerOptions::default() };
        let mut trainer = LoraTrainer::new(Arc::clone(&base), Arc::clone(&layout), options).unwrap();
        let mut values = Adapter::init(Arc::clone(&layout)).values;
        let mut optimizer = AdamW::new(AdamWConfig::default(), values.len());
        let mut gradient = vec![0f32; values.len()];
        let batches = blocks.chunks_exact(n[0]).take(n[2]).map(|blocks| Batch::from_blocks(blocks).unwrap());
        let mut step = |batch| {
            let loss = trainer.loss_and_gradient(&values, &batch, &mut gradient).unwrap();
            optimizer.step(&mut values, &gradient, 1e-3);
            loss
        };
        batches.map(&mut step).collect::<Vec<f32>>()
    });
    println!("step      f32     bf16     gap");
    for (step, (a, b)) in losses[0].iter().zip(&losses[1]).enumerate() {
        println!("{step:4} {a:8.4} {b:8.4} {:7.4}", b - a);
    }
}

fn time_steps(
    steps: usize,
    values: &mut [f32],
    mut loss_and_gradient: impl FnMut(&[f32], &mut [f32]) -> f32,
) {
    let mut optimizer = AdamW::new(AdamWConfig::default(), values.len());
    let mut gradient = vec![0f32; values.len()];
    let mut losses = Vec::new();
    let mut walls = Vec::new();
    let mut cpu = 0.0;
    for step in 0..=steps {
        // The first step warms up.
        if step == 1 {
            cpu = cpu_seconds();
        }
        let start = Instant::now();
        losses.push(loss_and_gradient(values, &mut gradient));
        optimizer.step(values, &gradient, 1e-3);
        walls.push(start.elapsed().as_secs_f64());
    }
    let cpu = (cpu_seconds() - cpu) / steps as f64;
    walls.remove(0);
    walls.sort_by(f64::total_cmp);
    let (first, last) = (losses[0], losses[steps]);
    println!("{} values, loss {first:.4} -> {last:.4}", values.len());
    println!(
        "CPU {cpu:.4} s, wall median {:.4} s least {:.4} s a step, peak RSS {} MB",
        walls[steps / 2],
        walls[0],
        peak_mb()
    );
}

fn batch(sequences: usize, length: usize, vocab: usize) -> Batch {
    let mut state = 1u32;
    let mut id = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % vocab as u32
    };
    let blocks: Vec<Vec<u32>> = (0..sequences).map(|_| (0..=length).map(|_| id()).collect()).collect();
    Batch::from_blocks(&blocks.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap()
}

/// User and system time of this process (Linux, 100 ticks a second).
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<f64> =
        stat.rsplit(')').next().unwrap_or("").split_whitespace().map(|f| f.parse().unwrap_or(0.0)).collect();
    fields.get(11..13).map_or(0.0, |ticks| ticks.iter().sum::<f64>() / 100.0)
}

fn peak_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<u64>().ok()).unwrap_or(0) / 1024
}
