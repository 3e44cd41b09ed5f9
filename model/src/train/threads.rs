//! A step's micro-batches on several threads: as many at once as there are threads, their gradients summed in
//! the micro-batches' order. So the bits do not depend on the number of threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use super::Watch;
use super::budget::batch_operations;
use super::pass::Pass;
use crate::batch::Batch;
use crate::kernels::activation::add;
use crate::kernels::scratch::{self, Pool};

/// How often the caller is asked whether to stop once its own thread has nothing to do.
const ASK_EVERY: Duration = Duration::from_millis(10);

/// One step's input.
pub(super) struct Step<'a> {
    pub(super) values: &'a [f32],
    pub(super) parts: &'a [Batch],
    pub(super) denominator: f32,
}

/// One thread's gradient, and the memory that its successor in the next step inherits.
#[derive(Debug, Default)]
pub(super) struct Shard {
    gradient: Vec<f32>,
    pool: Pool,
    loss: Option<f64>,
}

/// Loss and gradient of the whole step; `None` if `watch` asked to stop.
pub(super) fn gradient(
    pass: &Pass,
    step: &Step<'_>,
    (threads, shards): (usize, &mut Vec<Shard>),
    gradient: &mut [f32],
    watch: &mut dyn Watch,
) -> Option<f64> {
    let at_once = threads.clamp(1, step.parts.len().max(1));
    shards.resize_with(at_once.max(shards.len()), Shard::default);
    let work: Vec<f64> = step.parts.iter().map(|part| batch_operations(&pass.base.config, part)).collect();
    let (all, mut done, mut loss) = (work.iter().sum::<f64>(), 0.0, 0.0);
    for (wave, parts) in step.parts.chunks(at_once).enumerate() {
        run_wave(pass, step, parts, shards, watch);
        for (i, shard) in shards.iter_mut().take(parts.len()).enumerate() {
            loss += shard.loss.take()?;
            done += work[wave * at_once + i];
            if wave == 0 && i == 0 {
                gradient.copy_from_slice(&shard.gradient);
            } else {
                add(gradient, &shard.gradient);
            }
        }
        watch.progressed(done / all);
    }
    Some(loss)
}

/// The first part on the calling thread, which alone can ask the watch; the others on threads of their own.
fn run_wave(pass: &Pass, step: &Step<'_>, parts: &[Batch], shards: &mut [Shard], watch: &mut dyn Watch) {
    let stop = AtomicBool::new(false);
    let mut ask = || {
        // Once it has said yes it is not asked again.
        if !stop.load(Ordering::Relaxed) && watch.should_stop() {
            stop.store(true, Ordering::Relaxed);
        }
        stop.load(Ordering::Relaxed)
    };
    let Some((own, others)) = shards.split_first_mut() else { return };
    let Some((first, rest)) = parts.split_first() else { return };
    std::thread::scope(|scope| {
        let (running, ended) = channel::<()>();
        for (shard, part) in others.iter_mut().zip(rest) {
            let (running, stop) = (running.clone(), &stop);
            scope.spawn(move || {
                scratch::exchange_pool(std::mem::take(&mut shard.pool));
                shard.run(pass, step, part, &mut || stop.load(Ordering::Relaxed));
                shard.pool = scratch::exchange_pool(Pool::default());
                drop(running);
            });
        }
        drop(running);
        own.run(pass, step, first, &mut ask);
        // Nobody sends: the channel closes when the last thread has ended.
        while !rest.is_empty() && ended.recv_timeout(ASK_EVERY) == Err(RecvTimeoutError::Timeout) {
            ask();
        }
    });
}

impl Shard {
    fn run(&mut self, pass: &Pass, step: &Step<'_>, part: &Batch, stop: &mut dyn FnMut() -> bool) {
        self.gradient.resize(step.values.len(), 0.0);
        self.loss = pass.gradient(step.values, part, step.denominator, &mut self.gradient, stop);
    }
}
