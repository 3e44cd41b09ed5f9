//! CPU time of reading a prompt and of writing after it, and the memory after each step:
//! `infer_time MODEL.gguf [prompt] [tokens]`.

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

/// Resident memory, of this process's own and of mapped files, now and at most, from Linux.
fn memory() -> String {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok())
            .map_or(0.0, |kib| kib / 1024.0)
    };
    let [own, files, peak] = ["RssAnon", "RssFile", "VmHWM"].map(mib);
    format!("own {own:.1}, of files {files:.1}, at most {peak:.1} MiB")
}

fn main() {
    let arguments: Vec<String> = env::args().collect();
    let number = |i: usize, or: usize| arguments.get(i).map_or(or, |text| text.parse().unwrap());
    let (prompt, tokens) = (number(2, 512), number(3, 128));
    let start = Instant::now();
    let base = Arc::new(BaseModel::open(Path::new(&arguments[1])).unwrap());
    println!(
        "opened after {:.3} s, {:.3} of this thread; {}",
        start.elapsed().as_secs_f64(),
        cpu_s(start),
        memory()
    );
    let engine = Engine::new(Arc::clone(&base));
    println!(
        "packed after {:.3} s, {:.3} of this thread; {}",
        start.elapsed().as_secs_f64(),
        cpu_s(start),
        memory()
    );
    let vocab = base.config.vocab_size;
    let ids: Vec<u32> = (0..prompt).map(|i| ((7919 * i) % (vocab - 100) + 50) as u32).collect();
    for _ in 0..4 {
        let mut sequence = engine.sequence(None);
        let before = cpu_s(start);
        engine.read(&mut [Span { sequence: &mut sequence, ids: &ids }]).unwrap();
        let rate = prompt as f64 / (cpu_s(start) - before);
        println!("prefill {rate:.0} tokens a CPU second; {}", memory());
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
        let rate = tokens as f64 / (cpu_s(start) - before);
        println!("decode {rate:.1} tokens a CPU second; {}", memory());
    }
}
