//! CPU time of reading a prompt and of writing after it: `infer_time MODEL.gguf [prompt] [tokens]`.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a measuring program")]
#![allow(clippy::disallowed_methods, reason = "time is what it measures")]

use fleetune_model::base::BaseModel;
use fleetune_model::infer::{Engine, Span};
use std::{env, fs, path::Path, sync::Arc, time::Instant};

/// Seconds that this thread has run, from Linux; wall time elsewhere is for the reader to judge.
fn cpu_s(start: Instant) -> f64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let ns = text.split_whitespace().next().and_then(|ns| ns.parse::<f64>().ok());
    ns.map_or_else(|| start.elapsed().as_secs_f64(), |ns| ns / 1e9)
}

fn main() {
    let arguments: Vec<String> = env::args().collect();
    let number = |i: usize, or: usize| arguments.get(i).map_or(or, |text| text.parse().unwrap());
    let (prompt, tokens) = (number(2, 512), number(3, 128));
    let start = Instant::now();
    let base = Arc::new(BaseModel::open(Path::new(&arguments[1])).unwrap());
    let opened = start.elapsed();
    let engine = Engine::new(Arc::clone(&base));
    println!("opened {opened:?}, packed {:?}", start.elapsed());
    let vocab = base.config.vocab_size;
    let ids: Vec<u32> = (0..prompt).map(|i| ((7919 * i) % (vocab - 100) + 50) as u32).collect();
    for _ in 0..4 {
        let mut sequence = engine.sequence(None);
        let before = cpu_s(start);
        engine.read(&mut [Span { sequence: &mut sequence, ids: &ids }]).unwrap();
        println!("prefill {:.0} tokens a CPU second", prompt as f64 / (cpu_s(start) - before));
    }
    for _ in 0..3 {
        let mut sequence = engine.sequence(None);
        engine.read(&mut [Span { sequence: &mut sequence, ids: &ids[..16] }]).unwrap();
        let mut token = ids[16];
        let before = cpu_s(start);
        for _ in 0..tokens {
            let logits = engine.read(&mut [Span { sequence: &mut sequence, ids: &[token] }]).unwrap();
            token = (0..vocab).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32;
        }
        println!("decode {:.1} tokens a CPU second", tokens as f64 / (cpu_s(start) - before));
    }
}
