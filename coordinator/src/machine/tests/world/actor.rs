//! One device of a world: its machine, its disk, and the faults it is to suffer.

use super::made_up::device_setup;
use fleetune_proto::{
    UnixMillis,
    device::{Action, Device, DeviceRecord, DeviceSetup, Event, Request},
    wire::resource::Source,
};
use std::collections::BTreeMap;

/// The messages of secure aggregation in their order; a chunk of an upload belongs to step 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) enum Step {
    Keys,
    Shares,
    Chunk,
    Masked,
    Confirm,
    Reveal,
}

/// What happens as a device sends the message of a step, once.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum Fault {
    /// It is gone for ever, and the message with it.
    Vanish,
    /// The message waits until `World::deliver_held`.
    Hold,
    /// The process dies before the message leaves, and is back after so many milliseconds.
    CrashBefore(u64),
    /// The process dies before the answer is there.
    CrashAfter(u64),
    /// The connection breaks before the answer is there.
    LoseAnswer,
}

pub(in super::super) struct Actor {
    pub(in super::super) device: Device,
    pub(in super::super) events: Vec<Event>,
    pub(in super::super) alive: bool,
    pub(in super::super) training_ms: u64,
    pub(in super::super) faults: BTreeMap<Step, Fault>,
    /// Its training diverges.
    pub(in super::super) fails_training: bool,
    /// Falsifies what leaves.
    pub(in super::super) tamper: Option<fn(&mut Request)>,
    pub(in super::super) held: Option<Request>,
    /// What is on its disk.
    pub(in super::super) record: Option<DeviceRecord>,
    pub(super) training: Option<(UnixMillis, Vec<f32>)>,
    setup: DeviceSetup,
    restart_at: Option<UnixMillis>,
    seed: [u8; 32],
    restarts: u8,
    sent: BTreeMap<(Vec<u8>, Step), Request>,
}

impl Step {
    /// The five steps.
    pub(in super::super) const ALL: [Self; 5] =
        [Self::Keys, Self::Shares, Self::Masked, Self::Confirm, Self::Reveal];

    pub(in super::super) fn of(request: &Request) -> Option<Self> {
        match request {
            Request::AdvertiseKeys(_) => Some(Self::Keys),
            Request::ShareKeys(_) => Some(Self::Shares),
            Request::WriteBlobChunk(_) => Some(Self::Chunk),
            Request::SubmitMaskedUpdate(_) => Some(Self::Masked),
            Request::ConfirmSurvivors(_) => Some(Self::Confirm),
            Request::RevealShares(_) => Some(Self::Reveal),
            Request::CheckIn(_)
            | Request::ReportTaskResult(_)
            | Request::SubmitUpdate(_)
            | Request::ReportRelease(_) => None,
        }
    }
}

impl Actor {
    pub(super) fn new(index: u8, now: UnixMillis) -> Self {
        let setup = device_setup(index);
        Self {
            device: Device::new(setup.clone(), [index; 32], now),
            events: Vec::new(),
            alive: true,
            training_ms: 500,
            faults: BTreeMap::new(),
            fails_training: false,
            tamper: None,
            held: None,
            record: None,
            training: None,
            setup,
            restart_at: None,
            seed: [index; 32],
            restarts: 0,
            sent: BTreeMap::new(),
        }
    }

    pub(in super::super) fn contributed(&self) -> usize {
        self.events.iter().filter(|event| matches!(event, Event::Contributed { .. })).count()
    }

    /// Raises its floor; to be called before it has done anything.
    pub(in super::super) fn demand_cohort_of(&mut self, members: u32, now: UnixMillis) {
        self.setup.floors.secure.cohort_min = members;
        self.device = Device::new(self.setup.clone(), [99; 32], now);
    }

    /// Takes part only with differential privacy; to be called before it has done anything.
    pub(in super::super) fn demand_privacy(&mut self) {
        self.setup.floors.privacy.required = true;
        self.device = Device::new(self.setup.clone(), self.seed, UnixMillis(1_000_000));
    }

    /// Takes part in simulations; to be called before it has done anything.
    pub(in super::super) fn allow_noise_cohort(&mut self) {
        self.setup.floors.privacy.insecure_noise_cohort = true;
        self.device = Device::new(self.setup.clone(), self.seed, UnixMillis(1_000_000));
    }

    pub(super) fn installed(&mut self, version: u64, now: UnixMillis) {
        (self.setup.release_version, self.setup.release_version_max) = (version, version);
        self.device.handle_installed(now);
    }

    /// The process is gone; its disk is there.
    pub(super) fn crash(&mut self, until: UnixMillis) {
        (self.alive, self.training, self.restart_at) = (false, None, Some(until));
    }

    pub(super) fn restart_if_due(&mut self, now: UnixMillis) {
        if self.restart_at.take_if(|at| *at <= now).is_none() {
            return;
        }
        self.restarts += 1;
        self.alive = true;
        let mut seed = self.seed;
        seed[31] = 255 - self.restarts;
        self.device = match &self.record {
            Some(record) => Device::restore(self.setup.clone(), seed, record, now).unwrap(),
            None => Device::new(self.setup.clone(), seed, now),
        };
    }

    pub(super) fn next_time(&self) -> Option<UnixMillis> {
        if !self.alive {
            return self.restart_at;
        }
        match &self.training {
            Some((at, _)) => Some(*at),
            None => self.device.poll_timeout(),
        }
    }

    /// Sessions to come may have the tokens of sessions that were.
    pub(in super::super) fn forget_sent(&mut self) {
        self.sent.clear();
    }

    /// Two invariants of every message of secure aggregation: before it leaves, the disk holds what gives the
    /// same bytes again; and no step of a session ever sees other bytes.
    pub(super) fn check_repetition(&mut self, step: Step, request: &Request, now: UnixMillis) {
        let token = match request {
            Request::AdvertiseKeys(r) => r.session_token.clone(),
            Request::ShareKeys(r) => r.session_token.clone(),
            Request::SubmitMaskedUpdate(r) => r.session_token.clone(),
            Request::ConfirmSurvivors(r) => r.session_token.clone(),
            Request::RevealShares(r) => r.session_token.clone(),
            Request::WriteBlobChunk(_)
            | Request::CheckIn(_)
            | Request::ReportTaskResult(_)
            | Request::SubmitUpdate(_)
            | Request::ReportRelease(_) => return,
        };
        let before = self.sent.entry((token, step)).or_insert_with(|| request.clone());
        assert!(before == request, "{step:?} was sent with other bytes before");
        let record = self.record.as_ref().expect("a record is on disk before a message leaves");
        let mut again = Device::restore(self.setup.clone(), [99; 32], record, now).unwrap();
        let action = again.poll_action(now);
        assert!(
            is_uploaded(request) || action == Some(Action::Call(request.clone())),
            "{step:?}: {action:?}"
        );
    }
}

/// True if the bytes went up in chunks: a device that comes back sends those again first.
fn is_uploaded(request: &Request) -> bool {
    let Request::SubmitMaskedUpdate(request) = request else { return false };
    let source = request.masked_update.as_ref().and_then(|update| update.source.as_ref());
    matches!(source, Some(Source::Blob(_)))
}
