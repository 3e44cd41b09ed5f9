//! What training asks of the world around it while it runs: whether to stop, and what time it is. Nothing in
//! this crate reads a clock.

use std::time::Duration;

/// Asked and told while training runs. Any `FnMut() -> bool` is one without a clock: whether to stop.
pub trait Watch {
    /// Whether to give up. Asked before each layer, forward and backward, and within the head: every few
    /// milliseconds of a small model, so it should be cheap. Once true, it is not asked again.
    fn should_stop(&mut self) -> bool;

    /// Time since some moment in the past; `None` without a clock.
    fn now(&mut self) -> Option<Duration> {
        None
    }

    /// Told after each micro-batch which share of the step's work is done, above 0, at most 1.
    fn progressed(&mut self, share: f64) {
        let _ = share;
    }
}

impl<F: FnMut() -> bool> Watch for F {
    fn should_stop(&mut self) -> bool {
        self()
    }
}

/// A watch with a clock.
#[derive(Debug)]
pub struct Clocked<S, N> {
    /// Whether to give up.
    pub should_stop: S,
    /// Time since some moment in the past.
    pub now: N,
}

impl<S: FnMut() -> bool, N: FnMut() -> Duration> Watch for Clocked<S, N> {
    fn should_stop(&mut self) -> bool {
        (self.should_stop)()
    }

    fn now(&mut self) -> Option<Duration> {
        Some((self.now)())
    }
}
