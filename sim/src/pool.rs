//! Worker threads for the heavy work of a simulation: local training and evaluation.
//!
//! One job runs on one thread from its start to its end, so its result does not depend on the
//! number of threads; the simulator asks for results in the order of virtual time.

use anyhow::{Context, Result};
use fleetune_client::training::LocalTrainer;
use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, PoisonError, mpsc},
    thread::{self, JoinHandle},
};

/// What a worker keeps between jobs: buffers that are costly to set up.
#[derive(Default)]
pub struct Workspace {
    /// The trainer of the running task.
    pub trainer: Option<LocalTrainer>,
}

type Job = Box<dyn FnOnce(&mut Workspace) + Send>;

#[derive(Default)]
struct Queue {
    jobs: Mutex<(VecDeque<Job>, bool)>,
    changed: Condvar,
}

/// A fixed number of worker threads over one queue.
pub struct Pool {
    queue: Arc<Queue>,
    workers: Vec<JoinHandle<()>>,
}

/// The result of a job that may still be running.
pub struct Pending<T>(mpsc::Receiver<Result<T>>);

impl<T> Pending<T> {
    /// Waits for the result.
    pub fn wait(self) -> Result<T> {
        self.0.recv().context("a worker thread ended while it worked; its message stands above")?
    }
}

impl Pool {
    /// Starts `threads` workers.
    pub fn new(threads: usize) -> Self {
        let queue = Arc::new(Queue::default());
        let start = |_| {
            let queue = Arc::clone(&queue);
            thread::spawn(move || work(&queue))
        };
        Self { workers: (0..threads.max(1)).map(start).collect(), queue }
    }

    /// Number of workers.
    pub fn threads(&self) -> usize {
        self.workers.len()
    }

    /// Queues a job.
    pub fn submit<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Workspace) -> Result<T> + Send + 'static,
    ) -> Pending<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let run: Job = Box::new(move |workspace| {
            // The asker may have lost interest: a device that vanished.
            let _ = sender.send(job(workspace));
        });
        let mut jobs = self.queue.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.0.push_back(run);
        drop(jobs);
        self.queue.changed.notify_one();
        Pending(receiver)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut jobs = self.queue.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.0.clear();
        jobs.1 = true;
        drop(jobs);
        self.queue.changed.notify_all();
        for worker in self.workers.drain(..) {
            // A panic of a worker has been reported to whoever waited for its result.
            let _ = worker.join();
        }
    }
}

fn work(queue: &Queue) {
    let mut workspace = Workspace::default();
    while let Some(job) = next_job(queue) {
        job(&mut workspace);
    }
}

fn next_job(queue: &Queue) -> Option<Job> {
    let mut jobs = queue.jobs.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(job) = jobs.0.pop_front() {
            return Some(job);
        }
        if jobs.1 {
            return None;
        }
        jobs = queue.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
    }
}
