//! What the machine asks for, done: choose, fetch, train, install.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fleetune_model::base::BaseModel;
use fleetune_model::train::{Clocked, TrainSummary};
use fleetune_proto::device::{TrainOrder, TrainingFailure};
use fleetune_proto::{Digest, Name, PopulationPolicy, ReleaseManifest, TaskOffer};

use super::Client;
use crate::app::Conditions;
use crate::data;
use crate::fetch::{self, FetchFailure};
use crate::files::StoreError;
use crate::release::ReleaseError;
use crate::training::LocalTrainer;
use crate::transport::Transport;

/// How often the app's conditions are asked for while a training runs: a battery is not a layer's matter.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// How long a task is not accepted whose training did not fit.
const OVER_BUDGET_MS: u64 = 6 * 3_600_000;

const CLOSING: &str = "the app is closing";

impl<T: Transport> Client<T> {
    /// The tasks this device takes part in now.
    pub(super) fn choose(&mut self, policy: &PopulationPolicy) -> Vec<Name> {
        if let Err(reason) = self.app.conditions.hold() {
            tracing::info!(reason, "conditions do not hold");
            return Vec::new();
        }
        let held = match self.app.examples.texts() {
            Ok(texts) => bytes_of(&texts),
            Err(error) => {
                tracing::warn!(%error, "no examples");
                return Vec::new();
            }
        };
        let accepted = policy.tasks.iter().filter(|offer| self.accepts(offer, held));
        accepted.map(|offer| offer.task.clone()).collect()
    }

    fn accepts(&self, offer: &TaskOffer, held: usize) -> bool {
        let enough = self.too_little.get(&offer.task).map_or(held > 0, |short| held > *short);
        let too_large = self.over_budget.get(&offer.task).is_some_and(|until| self.clock.now() < *until);
        enough
            && !too_large
            && self.floors.protocols.contains(&offer.protocol)
            && self.app.consent.allows(offer)
    }

    pub(super) fn fetch(&mut self, digest: Digest, stop: &AtomicBool) {
        let conditions = self.app.conditions.as_ref();
        let fetched = fetch::fetch(&self.blobs, &mut self.transport, digest, &mut || lapse(conditions, stop));
        let now = self.clock.now();
        match fetched {
            Ok(()) => self.device.handle_fetched(now),
            Err(FetchFailure::Call(failure)) => self.device.handle_call_failed(&failure, now),
            Err(FetchFailure::Interrupted(reason)) => {
                self.device.handle_training_failed(&TrainingFailure::Interrupted(reason), now);
            }
        }
    }

    /// The raw update; the machine clips and encodes it.
    pub(super) fn train(
        &mut self,
        order: &TrainOrder,
        stop: &AtomicBool,
    ) -> Result<Vec<f32>, TrainingFailure> {
        if let Some(reason) = lapse(self.app.conditions.as_ref(), stop) {
            return Err(TrainingFailure::Interrupted(reason));
        }
        let base = self.open_base(order.plan.base_model)?;
        let checkpoint = self.read_checkpoint(order.checkpoint)?;
        let texts =
            self.app.examples.texts().map_err(|e| TrainingFailure::Failed(format!("examples: {e}")))?;
        let blocks = data::blocks(&base.tokenizer, &texts, order.plan.training.block_tokens as usize);
        let mut trainer = LocalTrainer::with_options(base, &order.plan, self.options)?;
        let (conditions, clock) = (self.app.conditions.as_ref(), self.clock.as_ref());
        let (mut lapsed, mut asked) = (None, None);
        let should_stop = || {
            let now = clock.elapsed();
            if lapsed.is_none() && asked.is_none_or(|then| now.saturating_sub(then) >= ASK_EVERY) {
                asked = Some(now);
                lapsed = conditions.hold().err();
            }
            if stop.load(Ordering::Relaxed) {
                lapsed = Some(CLOSING.to_owned());
            }
            lapsed.is_some()
        };
        let mut watch = Clocked { should_stop, now: || clock.elapsed() };
        let trained = trainer.run(order, &checkpoint, &blocks, &self.device_seed, &mut watch);
        match (trained, lapsed) {
            (Ok(update), _) => {
                let (first, last) = (update.summary.first_loss, update.summary.last_loss);
                let (steps, memory_bytes) = (update.summary.steps, update.summary.fit.memory_bytes);
                tracing::debug!(blocks = blocks.len(), first, last, steps, memory_bytes, "trained");
                self.tell_of_cuts(order, &update.summary);
                self.too_little.remove(&order.plan.task);
                Ok(update.delta)
            }
            (Err(TrainingFailure::Interrupted(_)), Some(reason)) => Err(TrainingFailure::Interrupted(reason)),
            (Err(failure), _) => {
                self.remember(&failure, order, &texts);
                Err(failure)
            }
        }
    }

    /// Opens, checks and switches; the release before serves on if anything fails.
    pub(super) fn install(&mut self, manifest: &ReleaseManifest) -> Result<(), ReleaseError> {
        if let Err(error) = self.slots.install(manifest) {
            if error.is_final() {
                self.slots.reject(manifest.version)?;
            }
            return Err(error);
        }
        let needed: Vec<Digest> =
            self.base.iter().map(|(digest, _)| *digest).chain(self.checkpoint).collect();
        if let Err(error) = self.slots.prune(&needed) {
            tracing::warn!(%error, "old releases are still here");
        }
        Ok(())
    }

    fn open_base(&mut self, digest: Digest) -> Result<Arc<BaseModel>, TrainingFailure> {
        if let Some((held, base)) = &self.base
            && *held == digest
        {
            return Ok(Arc::clone(base));
        }
        let opened = BaseModel::open(&self.blobs.path(digest));
        let base = Arc::new(opened.map_err(|e| TrainingFailure::PlanRejected(format!("base model: {e}")))?);
        if base.sha256 != digest.sha256 {
            return Err(self.forget_damaged(digest, "the stored base model has changed"));
        }
        self.base = Some((digest, Arc::clone(&base)));
        Ok(base)
    }

    /// Each round has its own checkpoint; the one before is not needed again.
    fn read_checkpoint(&mut self, digest: Digest) -> Result<Vec<u8>, TrainingFailure> {
        if let Some(old) = self.checkpoint.replace(digest).filter(|old| *old != digest)
            && let Err(error) = self.blobs.remove(old)
        {
            tracing::warn!(%error, "an old checkpoint is still here");
        }
        self.blobs.read(digest).map_err(|error| match error {
            StoreError::Damaged { .. } => self.forget_damaged(digest, "the stored checkpoint has changed"),
            StoreError::Full { .. } | StoreError::Io { .. } | StoreError::InUse { .. } => {
                TrainingFailure::Failed(error.to_string())
            }
        })
    }

    fn forget_damaged(&self, digest: Digest, what: &str) -> TrainingFailure {
        if let Err(error) = self.blobs.remove(digest) {
            tracing::warn!(%error, "a damaged blob is still here");
        }
        TrainingFailure::Failed(format!("{what}; it will be read again"))
    }

    /// A task that cannot be trained here is not tried over and over: with too little text not before there is
    /// more, beyond the budgets not for some hours. Only the clock can change the latter, for a busy device.
    fn remember(&mut self, failure: &TrainingFailure, order: &TrainOrder, texts: &[String]) {
        match failure {
            TrainingFailure::InsufficientData { .. } => {
                self.too_little.insert(order.plan.task.clone(), bytes_of(texts));
            }
            TrainingFailure::OverBudget(reason) => {
                tracing::warn!(task = %order.plan.task, reason, "training does not fit this device's budgets");
                let until = self.clock.now().plus(OVER_BUDGET_MS);
                self.over_budget.insert(order.plan.task.clone(), until);
            }
            TrainingFailure::Interrupted(_)
            | TrainingFailure::PlanRejected(_)
            | TrainingFailure::Failed(_) => {}
        }
    }

    /// A contribution of less than the plan asks for is legitimate, and its owner is told.
    fn tell_of_cuts(&self, order: &TrainOrder, summary: &TrainSummary) {
        let plan = &order.plan.training;
        let block_tokens = summary.fit.block_tokens;
        if summary.steps < plan.steps || block_tokens < plan.block_tokens as usize {
            let (steps, planned) = (summary.steps, plan.steps);
            tracing::warn!(
                steps,
                planned,
                block_tokens,
                "trained less than planned, to stay within the budgets"
            );
        }
    }
}

/// The reason to stop now, if there is one.
fn lapse(conditions: &dyn Conditions, stop: &AtomicBool) -> Option<String> {
    if stop.load(Ordering::Relaxed) {
        return Some(CLOSING.to_owned());
    }
    conditions.hold().err()
}

fn bytes_of(texts: &[String]) -> usize {
    texts.iter().map(String::len).sum()
}
