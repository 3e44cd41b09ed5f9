//! Predicted and real peak memory of training sessions, each in a process of its own: `memory_need MODEL.gguf`
//! prints a table (rank 8 on q, k, v, o; AdamW; Linux).
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a measuring program")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use fleetune_model::adapter::{Adapter, AdapterLayout, LoraConfig};
use fleetune_model::base::BaseModel;
use fleetune_model::config::Projection;
use fleetune_model::train::{
    LocalTraining, LoraTrainer, OptimizerConfig, Precision, Recompute, Schedule, TrainerOptions, fine_tune,
};

/// Sequences, tokens of each, bf16 products, recompute, threads.
const CASES: [(usize, usize, bool, bool, usize); 8] = [
    (4, 128, false, false, 1),
    (4, 128, false, false, 2),
    (4, 128, true, false, 1),
    (4, 128, true, false, 2),
    (4, 128, true, true, 1),
    (2, 64, true, true, 1),
    (1, 512, false, false, 1),
    (1, 512, true, true, 1),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let model = arguments.first().expect("the first argument names a GGUF file");
    if let Some(case) = arguments.get(1) {
        return session(Path::new(model), case.parse().unwrap());
    }
    println!("sequences x tokens | precision | recompute | threads | predicted MB | peak MB | over");
    for case in 0..CASES.len() {
        let program = std::env::current_exe().unwrap();
        let output = Command::new(program).args([model, &case.to_string()]).output().unwrap();
        print!("{}", String::from_utf8(output.stdout).unwrap());
    }
}

fn session(model: &Path, case: usize) {
    let (sequences, tokens, bf16, recompute, threads) = CASES[case];
    let base = Arc::new(BaseModel::open(model).unwrap());
    let targets = Projection::ALL[..4].to_vec();
    let lora = LoraConfig { rank: 8, alpha: 16.0, targets, freeze_a: false, init_seed: 1 };
    let layout = Arc::new(AdapterLayout::new(&base.config, &lora).unwrap());
    let options = TrainerOptions {
        recompute: if recompute { Recompute::Always } else { Recompute::Never },
        precision: if bf16 { Precision::Bf16 } else { Precision::F32 },
        threads,
        ..TrainerOptions::default()
    };
    let vocab = base.config.vocab_size;
    let blocks: Vec<Vec<u32>> = (0..sequences)
        .map(|block| (0..=tokens).map(|i| ((block * 7919 + i * 104_729) % vocab) as u32).collect())
        .collect();
    let plan = LocalTraining {
        steps: 2,
        batch_size: sequences,
        block_tokens: tokens,
        optimizer: OptimizerConfig::default(),
        learning_rate: 1e-3,
        gradient_clip: None,
        schedule: Schedule::Constant,
    };
    // What a device holds beside the trainer's own.
    let start = Adapter::init(Arc::clone(&layout));
    let checkpoint = start.to_checkpoint_bytes();
    let mut values = start.values.clone();
    let mut trainer = LoraTrainer::new(base, layout, options).unwrap();
    let summary = fine_tune(&mut trainer, &mut values, &blocks, &plan, 1, &mut || false).unwrap();
    drop(checkpoint);
    let (predicted, peak) = (summary.fit.memory_bytes.unwrap_or(0) as f64 / 1e6, peak_mb());
    let (precision, over) = (if bf16 { "bf16" } else { "f32" }, 100.0 * (predicted / peak - 1.0));
    println!(
        "{sequences} x {tokens} | {precision} | {recompute} | {threads} | {predicted:.0} | {peak:.0} | {over:.0} %"
    );
}

/// Most resident memory of this process so far.
fn peak_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<f64>().ok()).unwrap_or(0.0) * 1024.0 / 1e6
}
