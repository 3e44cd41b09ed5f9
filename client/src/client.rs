//! The embedded client: the protocol's device machine with a disk, a trainer and a road to the coordinator.
//!
//! It moves bytes and does what the machine asks, one action a step; what to do next is decided in
//! `fleetune_proto::device`. It blocks while it works: give it a thread.

mod builder;
mod work;

use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fleetune_model::base::BaseModel;
use fleetune_model::train::TrainerOptions;
use fleetune_proto::device::{Action, Device, DeviceFloors, Event, Request};
use fleetune_proto::{Digest, Name, UnixMillis};

use crate::app::App;
use crate::blobs::BlobStore;
use crate::clock::Clock;
use crate::files;
use crate::release::{ReleaseError, ReleaseSlots, ReleaseVersions, ReleasedModel};
use crate::state::StateLock;
use crate::transport::Transport;

pub use builder::{ClientBuilder, privacy_ledger};

/// Events kept for [`Client::poll_events`]; older ones are dropped.
const EVENTS_MAX: usize = 256;
/// Longest sleep of [`Client::run`] before it looks at its stop flag.
const SLEEP_MS_MAX: u64 = 200;

/// What a step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Something was done; there may be more.
    Did,
    /// There is nothing to do before that time.
    SleepUntil(UnixMillis),
}

/// One device's client. Made by [`ClientBuilder`].
pub struct Client<T: Transport> {
    device: Device,
    record_path: PathBuf,
    transport: T,
    app: App,
    clock: Box<dyn Clock>,
    blobs: BlobStore,
    slots: ReleaseSlots,
    floors: DeviceFloors,
    device_seed: [u8; 32],
    options: TrainerOptions,
    /// The last task's base: opened once, read from disk as it is used.
    base: Option<(Digest, Arc<BaseModel>)>,
    checkpoint: Option<Digest>,
    /// Bytes of text with which a task's plan found too few examples.
    too_little: BTreeMap<Name, usize>,
    /// Until when a task is not accepted whose training did not fit this device's budgets.
    over_budget: BTreeMap<Name, UnixMillis>,
    events: VecDeque<Event>,
    _lock: StateLock,
}

impl<T: Transport> Client<T> {
    /// Does one thing: a call, a download, a training or an installation.
    pub fn step(&mut self) -> Step {
        self.step_unless(&AtomicBool::new(false))
    }

    /// Works until `stop` is set. A training or a download under way ends within a layer or a chunk.
    pub fn run(&mut self, stop: &AtomicBool) {
        self.run_with(stop, &mut |_| ControlFlow::Continue(()));
    }

    /// [`Client::run`] that tells what happens; a break ends it as soon as nothing is under way.
    pub fn run_with(&mut self, stop: &AtomicBool, on_event: &mut dyn FnMut(&Event) -> ControlFlow<()>) {
        let mut leaving = false;
        while !stop.load(Ordering::Relaxed) {
            let step = self.step_unless(stop);
            for event in self.poll_events() {
                leaving |= on_event(&event).is_break();
            }
            if leaving && self.device.is_idle() {
                return;
            }
            match step {
                Step::SleepUntil(_) if leaving => return,
                Step::SleepUntil(until) => self.sleep_until(until, stop),
                Step::Did => {}
            }
        }
        self.say_goodbye();
    }

    /// What happened since the last call; of very much the last 256. Nothing in it comes from the user's data.
    pub fn poll_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    /// The releases here.
    pub fn release_versions(&self) -> ReleaseVersions {
        self.slots.versions()
    }

    /// Opens the model that serves; none before the first release.
    ///
    /// # Errors
    /// [`ReleaseError`] when neither the active nor the previous release opens.
    pub fn open_model(&self) -> Result<Option<ReleasedModel>, ReleaseError> {
        self.slots.open_model()
    }

    fn step_unless(&mut self, stop: &AtomicBool) -> Step {
        let step = match self.device.poll_action(self.clock.now()) {
            Some(action) => {
                self.act(action, stop);
                Step::Did
            }
            None => Step::SleepUntil(self.device.poll_timeout().unwrap_or_default()),
        };
        self.keep_events();
        step
    }

    fn act(&mut self, action: Action, stop: &AtomicBool) {
        match action {
            Action::Call(request) => self.call(request),
            Action::Choose(policy) => {
                let tasks = self.choose(&policy);
                self.device.handle_choice(tasks, self.clock.now());
            }
            Action::Keep(record) => match files::write_atomically(&self.record_path, record.as_bytes()) {
                Ok(()) => self.device.handle_kept(self.clock.now()),
                Err(error) => self.device.handle_keep_failed(&error.to_string(), self.clock.now()),
            },
            Action::Fetch(digest) => self.fetch(digest, stop),
            Action::Train(order) => match self.train(&order, stop) {
                Ok(delta) => self.device.handle_trained(delta, self.clock.now()),
                Err(failure) => self.device.handle_training_failed(&failure, self.clock.now()),
            },
            Action::Install(order) => match self.install(&order.manifest) {
                Ok(()) => self.device.handle_installed(self.clock.now()),
                Err(error) => self.device.handle_install_failed(&error.to_string(), self.clock.now()),
            },
        }
    }

    fn call(&mut self, request: Request) {
        match self.transport.call(request) {
            Ok(response) => self.device.handle_response(response, self.clock.now()),
            Err(failure) => self.device.handle_call_failed(&failure, self.clock.now()),
        }
    }

    /// A round need not wait for a device that leaves while it trains.
    fn say_goodbye(&mut self) {
        if let Some(Action::Call(request @ Request::ReportTaskResult(_))) =
            self.device.poll_action(self.clock.now())
        {
            self.call(request);
            self.keep_events();
        }
    }

    fn sleep_until(&self, until: UnixMillis, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            match until.since(self.clock.now()) {
                0 => return,
                left => self.clock.sleep(left.min(SLEEP_MS_MAX)),
            }
        }
    }

    fn keep_events(&mut self) {
        for event in self.device.poll_events() {
            log(&event);
            self.events.push_back(event);
        }
        let surplus = self.events.len().saturating_sub(EVENTS_MAX);
        self.events.drain(..surplus);
    }
}

fn log(event: &Event) {
    match event {
        Event::NoWork => tracing::debug!("no work"),
        Event::Selected { task, round } => tracing::info!(%task, round, "selected"),
        Event::Contributed { task, round } => tracing::info!(%task, round, "contributed"),
        Event::Ended(reason) => tracing::info!(reason, "session ended without a contribution"),
        Event::Refused(reason) => tracing::warn!(reason, "refused"),
        Event::Retrying(reason) => tracing::debug!(reason, "retrying"),
        Event::ReleaseActive(version) => tracing::info!(version, "release active"),
        Event::ReleaseRejected { version, reason } => tracing::warn!(version, reason, "release rejected"),
    }
}

#[cfg(test)]
mod tests;
