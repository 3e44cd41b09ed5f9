//! Keeps a session within its time: what the caller's clock says after each micro-batch, and what follows for
//! the steps that are left.

use std::time::Duration;

use super::{TimeBudget, TrainError, Watch, WhenShort};

/// A trial is refused on its own only when it foresees more than this many times the budget: it times one layer
/// of one sequence and knows nothing of the head's speed or the caches'.
const TRIAL_MARGIN: f64 = 2.0;

/// The caller's watch with the session's budget.
pub(super) struct Pace<'a> {
    watch: &'a mut dyn Watch,
    budget: Option<TimeBudget>,
    /// Of the plan.
    steps: u32,
    done: u32,
    start: Duration,
    verdict: Verdict,
}

/// Why a step must end.
#[derive(Clone, Copy)]
enum Verdict {
    GoOn,
    /// The caller asked for it.
    Asked,
    /// The time is over.
    Over,
    /// It will be over too early: what must be done takes that long.
    Hopeless(Duration),
}

impl<'a> Pace<'a> {
    /// Time counts from now.
    ///
    /// # Errors
    /// [`TrainError::NoClock`].
    pub(super) fn new(
        watch: &'a mut dyn Watch,
        budget: Option<TimeBudget>,
        steps: u32,
    ) -> Result<Self, TrainError> {
        let start = match (watch.now(), budget) {
            (Some(now), _) => now,
            (None, None) => Duration::ZERO,
            (None, Some(_)) => return Err(TrainError::NoClock),
        };
        Ok(Self { watch, budget, steps, done: 0, start, verdict: Verdict::GoOn })
    }

    /// Takes a first guess of a step's seconds.
    ///
    /// # Errors
    /// [`TrainError::OverTime`] when it leaves no hope.
    pub(super) fn foresee(&self, step_seconds: Option<f64>) -> Result<(), TrainError> {
        let (Some(budget), Some(step_seconds)) = (self.budget, step_seconds) else { return Ok(()) };
        let needed = seconds(step_seconds * f64::from(self.needed_steps(budget)));
        if needed > budget.limit.mul_f64(TRIAL_MARGIN) { Err(self.too_long(budget, needed)) } else { Ok(()) }
    }

    /// Whether to begin another step.
    ///
    /// # Errors
    /// [`TrainError::Cancelled`] if the caller asks to stop, [`TrainError::OverTime`] if the plan's steps do not
    /// fit and all of them must.
    pub(super) fn may_step(&mut self) -> Result<bool, TrainError> {
        if self.watch.should_stop() {
            return Err(TrainError::Cancelled { step: self.done });
        }
        let Some(budget) = self.budget.filter(|_| self.done > 0) else { return Ok(true) };
        let (elapsed, mean) = (self.elapsed(), self.elapsed() / self.done);
        match budget.when_short {
            WhenShort::FewerSteps => Ok(elapsed + mean <= budget.limit),
            WhenShort::Refuse if self.done == 1 && mean * self.steps > budget.limit => {
                Err(self.too_long(budget, mean * self.steps))
            }
            WhenShort::Refuse => Ok(true),
        }
    }

    /// A step is done.
    pub(super) fn stepped(&mut self) {
        self.done += 1;
    }

    /// What it means that a step was given up: an error, or that the steps done so far are all.
    ///
    /// # Errors
    /// [`TrainError::Cancelled`] or [`TrainError::OverTime`].
    pub(super) fn given_up(&mut self) -> Result<(), TrainError> {
        match (self.verdict, self.budget) {
            (Verdict::Hopeless(needed), Some(budget)) => Err(self.too_long(budget, needed)),
            (Verdict::Over, Some(budget)) if self.done < self.needed_steps(budget) => {
                let elapsed = self.elapsed();
                let needed = elapsed / (self.done + 1) * self.needed_steps(budget);
                Err(self.too_long(budget, needed.max(elapsed)))
            }
            (Verdict::Over, Some(_)) => Ok(()),
            (Verdict::GoOn | Verdict::Asked, _) | (_, None) => Err(TrainError::Cancelled { step: self.done }),
        }
    }

    fn needed_steps(&self, budget: TimeBudget) -> u32 {
        match budget.when_short {
            WhenShort::FewerSteps => 1,
            WhenShort::Refuse => self.steps,
        }
    }

    fn too_long(&self, budget: TimeBudget, needed: Duration) -> TrainError {
        TrainError::OverTime { steps: self.needed_steps(budget), needed, budget: budget.limit }
    }

    fn elapsed(&mut self) -> Duration {
        self.watch.now().unwrap_or_default().saturating_sub(self.start)
    }
}

impl Watch for Pace<'_> {
    fn should_stop(&mut self) -> bool {
        if self.watch.should_stop() {
            self.verdict = Verdict::Asked;
        } else if self.budget.is_some_and(|budget| self.elapsed() > budget.limit) {
            self.verdict = Verdict::Over;
        }
        !matches!(self.verdict, Verdict::GoOn)
    }

    fn now(&mut self) -> Option<Duration> {
        self.watch.now()
    }

    /// The first step's first micro-batches say how long all of it will take.
    fn progressed(&mut self, share: f64) {
        self.watch.progressed(share);
        let Some(budget) = self.budget.filter(|_| self.done == 0 && share < 1.0) else { return };
        let needed = self.elapsed().div_f64(share) * self.needed_steps(budget);
        if needed > budget.limit {
            self.verdict = Verdict::Hopeless(needed);
        }
    }
}

/// A number of seconds that arithmetic gave; what no clock can show counts as a day.
fn seconds(count: f64) -> Duration {
    Duration::try_from_secs_f64(count).unwrap_or(Duration::from_secs(86_400))
}
