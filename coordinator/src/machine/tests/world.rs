//! A world in virtual time: one core, some device machines, a disk that can be full. Training is made up,
//! everything else is what ships. What a device may suffer is in `world/actor.rs`.

mod actor;
mod made_up;

pub(super) use actor::{Actor, Fault, Step};
pub(super) use made_up::{lora, made_up_delta, name, secure_spec, setup, spec, trust_root, wide_lora};

use crate::{Commit, Core, CoreEvent, OpeningWork, RoundRecord, SumCharge, TaskProgress, TaskSpec};
use fleetune_model::{adapter_formats::from_gguf_lora, base::BaseModel};
use fleetune_proto::{
    CallFailure, Digest, FailureKind, UnixMillis,
    device::{Action, Request, Response, TrainingFailure},
    wire::{AdvertiseKeysResponse, advertise_keys_response::Outcome},
};
use made_up::tiny_base;
use std::{collections::BTreeMap, sync::Arc};

pub(super) struct World {
    pub(super) core: Core,
    pub(super) now: UnixMillis,
    pub(super) actors: Vec<Actor>,
    pub(super) blobs: BTreeMap<Digest, Arc<Vec<u8>>>,
    pub(super) commits: Vec<Commit>,
    pub(super) events: Vec<CoreEvent>,
    pub(super) disk_full: bool,
    /// Openings are taken and not brought back.
    pub(super) openings_stuck: bool,
    pub(super) stuck: Vec<OpeningWork>,
    /// The privacy ledger: charged before a sum is opened.
    pub(super) charges: Vec<SumCharge>,
    /// Calls that have reached the core, with the device that made them.
    pub(super) calls: Vec<(usize, Request)>,
    /// The root of the roster that each device was given last.
    pub(super) roots: BTreeMap<usize, Vec<u8>>,
    pub(super) base: Arc<BaseModel>,
    pub(super) base_digest: Digest,
}

impl World {
    pub(super) fn new(devices: u8) -> Self {
        let bytes = tiny_base();
        let base_digest = Digest::of(&bytes);
        let base = Arc::new(BaseModel::from_gguf_bytes(bytes.clone()).unwrap());
        Self {
            core: Core::new(setup(1)),
            now: UnixMillis(1_000_000),
            actors: (0..devices).map(|index| Actor::new(index, UnixMillis(1_000_000))).collect(),
            blobs: BTreeMap::from([(base_digest, Arc::new(bytes))]),
            commits: Vec::new(),
            events: Vec::new(),
            disk_full: false,
            openings_stuck: false,
            stuck: Vec::new(),
            charges: Vec::new(),
            calls: Vec::new(),
            roots: BTreeMap::new(),
            base,
            base_digest,
        }
    }

    pub(super) fn with_task(devices: u8, spec: TaskSpec) -> Self {
        let mut world = Self::new(devices);
        world.add_task(spec, None);
        world
    }

    pub(super) fn add_task(&mut self, spec: TaskSpec, resume: Option<TaskProgress>) {
        self.core.add_task(spec, self.base.clone(), self.base_digest, resume, self.now).unwrap();
    }

    /// The coordinator's process dies and comes back with what was committed.
    pub(super) fn restart_core(&mut self, spec: TaskSpec) {
        let progress = TaskProgress::clone(self.progress());
        self.core = Core::new(setup(77));
        self.stuck.clear();
        self.add_task(spec, Some(progress));
    }

    /// Comes back each time with the same random numbers, and so with the same session tokens.
    pub(super) fn restart_core_if_begun(&mut self, spec: &TaskSpec) {
        if self.commits.is_empty() {
            self.core = Core::new(setup(77));
            self.add_task(spec.clone(), None);
        } else {
            self.restart_core(spec.clone());
        }
    }

    /// Runs until `done`; a world in which nothing happens any more is a failed test.
    pub(super) fn run_until(&mut self, done: impl Fn(&Self) -> bool) {
        for _ in 0..100_000 {
            self.exhaust_now();
            if done(self) {
                return;
            }
            self.now = self.next_time().expect("something is still to happen");
            self.core.handle_timeout(self.now);
            self.open_sums();
        }
        let last = &self.events[self.events.len().saturating_sub(10)..];
        panic!("never done; the last events: {last:?}");
    }

    pub(super) fn run_to_end(&mut self) {
        self.run_until(|world| world.core.is_finished());
    }

    /// Runs until so many attempts have ended.
    pub(super) fn run_attempts(&mut self, attempts: usize) {
        self.run_until(|world| world.records().len() >= attempts);
    }

    pub(super) fn progress(&self) -> &TaskProgress {
        &self.commits.last().expect("something was committed").progress
    }

    /// The attempts that have ended.
    pub(super) fn records(&self) -> Vec<RoundRecord> {
        self.commits.iter().filter_map(|commit| commit.record.clone()).collect()
    }

    /// A call as it reaches the core.
    pub(super) fn call(&mut self, request: Request) -> Result<Response, CallFailure> {
        let answer = call(&mut self.core, request, self.now);
        self.open_sums();
        answer
    }

    /// Lets a message go that [`Fault::Hold`] stopped.
    pub(super) fn deliver_held(&mut self, index: usize) {
        let request = self.actors[index].held.take().expect("a message is held");
        self.deliver(index, request);
    }

    fn exhaust_now(&mut self) {
        loop {
            self.keep_commits();
            let mut moved = false;
            for index in 0..self.actors.len() {
                moved |= self.act(index);
            }
            self.events.extend(self.core.poll_events());
            if !moved {
                return;
            }
        }
    }

    fn keep_commits(&mut self) {
        while let Some(commit) = self.core.poll_commit() {
            if self.disk_full {
                self.core.handle_commit_failed(commit.id, self.now);
                continue;
            }
            self.blobs.extend(commit.blobs.iter().cloned());
            self.core.handle_committed(commit.id, self.now);
            self.commits.push(commit);
        }
        self.events.extend(self.core.poll_events());
    }

    fn open_sums(&mut self) {
        while let Some(work) = self.core.poll_opening() {
            if self.openings_stuck {
                self.stuck.push(work);
            } else {
                self.charges.extend(work.charge().cloned());
                self.core.handle_opened(work.run(2), self.now);
            }
        }
    }

    fn act(&mut self, index: usize) -> bool {
        let now = self.now;
        let actor = &mut self.actors[index];
        actor.restart_if_due(now);
        if !actor.alive {
            return false;
        }
        if let Some((_, delta)) = actor.training.take_if(|(at, _)| *at <= now) {
            actor.device.handle_trained(delta, now);
        }
        let action = actor.device.poll_action(now);
        let acted = action.is_some();
        match action {
            Some(Action::Call(request)) => self.send(index, request),
            Some(Action::Keep(record)) => {
                actor.record = Some(record);
                actor.device.handle_kept(now);
            }
            Some(Action::Choose(policy)) => {
                actor.device.handle_choice(policy.tasks.into_iter().map(|offer| offer.task).collect(), now);
            }
            Some(Action::Fetch(digest)) => {
                assert!(self.blobs.contains_key(&digest), "blob {digest} is durable before it is named");
                actor.device.handle_fetched(now);
            }
            Some(Action::Train(_)) if actor.fails_training => {
                let failure = TrainingFailure::Failed("the loss is no number".into());
                actor.device.handle_training_failed(&failure, now);
            }
            Some(Action::Train(order)) => {
                let delta = made_up_delta(index, order.round, order.plan.adapter.dimension);
                actor.training = Some((now.plus(actor.training_ms), delta));
            }
            Some(Action::Install(order)) => {
                match order.manifest.adapter {
                    Some(adapter) => _ = from_gguf_lora(&self.blobs[&adapter], &self.base).unwrap(),
                    None => {
                        let model = self.blobs[&order.manifest.base_model].to_vec();
                        BaseModel::from_gguf_bytes(model).unwrap();
                    }
                }
                actor.installed(order.manifest.version, now);
            }
            None => {}
        }
        let actor = &mut self.actors[index];
        actor.events.extend(actor.device.poll_events());
        acted
    }

    /// A device's message leaves, unless a fault has other plans.
    fn send(&mut self, index: usize, mut request: Request) {
        let now = self.now;
        let actor = &mut self.actors[index];
        let fault = Step::of(&request).and_then(|step| {
            actor.check_repetition(step, &request, now);
            actor.faults.remove(&step)
        });
        if let Some(tamper) = actor.tamper {
            tamper(&mut request);
        }
        match fault {
            None => self.deliver(index, request),
            Some(Fault::Vanish) => actor.alive = false,
            Some(Fault::Hold) => actor.held = Some(request),
            Some(Fault::CrashBefore(ms)) => actor.crash(now.plus(ms)),
            Some(Fault::CrashAfter(ms)) => {
                self.arrive(index, request).unwrap();
                self.actors[index].crash(now.plus(ms));
            }
            Some(Fault::LoseAnswer) => {
                self.arrive(index, request).unwrap();
                let failure = CallFailure::new(FailureKind::Unavailable, "the answer is lost");
                self.actors[index].device.handle_call_failed(&failure, now);
            }
        }
    }

    fn deliver(&mut self, index: usize, request: Request) {
        let answer = self.arrive(index, request);
        let (device, now) = (&mut self.actors[index].device, self.now);
        match answer {
            Ok(response) => device.handle_response(response, now),
            Err(failure) => device.handle_call_failed(&failure, now),
        }
    }

    fn arrive(&mut self, index: usize, request: Request) -> Result<Response, CallFailure> {
        self.calls.push((index, request.clone()));
        let answer = self.call(request);
        if let Ok(Response::AdvertiseKeys(AdvertiseKeysResponse { outcome: Some(Outcome::Roster(roster)) })) =
            &answer
        {
            self.roots.insert(index, roster.root.clone());
        }
        answer
    }

    fn next_time(&self) -> Option<UnixMillis> {
        let devices = self.actors.iter().filter_map(Actor::next_time);
        let next = devices.chain(self.core.poll_timeout()).min()?;
        Some(next.max(self.now.plus(1)))
    }
}

pub(super) fn call(core: &mut Core, request: Request, now: UnixMillis) -> Result<Response, CallFailure> {
    match request {
        Request::CheckIn(request) => core.handle_check_in(&request, now).map(Response::CheckIn),
        Request::ReportTaskResult(request) => {
            core.handle_report_task(&request, now).map(|_| Response::ReportTaskResult)
        }
        Request::WriteBlobChunk(request) => {
            core.handle_write_chunk(&request, now).map(Response::WriteBlobChunk)
        }
        Request::SubmitUpdate(request) => core.handle_submit(&request, now).map(Response::SubmitUpdate),
        Request::AdvertiseKeys(request) => {
            core.handle_advertise_keys(&request, now).map(Response::AdvertiseKeys)
        }
        Request::ShareKeys(request) => core.handle_share_keys(&request, now).map(Response::ShareKeys),
        Request::SubmitMaskedUpdate(request) => {
            core.handle_submit_masked(&request, now).map(Response::SubmitMaskedUpdate)
        }
        Request::ConfirmSurvivors(request) => {
            core.handle_confirm_survivors(&request, now).map(Response::ConfirmSurvivors)
        }
        Request::RevealShares(request) => {
            core.handle_reveal_shares(&request, now).map(Response::RevealShares)
        }
        Request::ReportRelease(request) => {
            core.handle_report_release(&request, now).map(|_| Response::ReportRelease)
        }
    }
}
