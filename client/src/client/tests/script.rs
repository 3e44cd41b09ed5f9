//! A coordinator that answers check-ins from a script, takes every update, and reads out blobs with the
//! faults it was told to have; and a clock that only the test moves.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fleetune_proto::device::{Request, Response};
use fleetune_proto::{
    AggregationProtocol, CallFailure, Digest, FailureKind, PopulationPolicy, Purpose, ReleaseManifest,
    TaskOffer, TaskPlan, UnixMillis, seal, wire,
};
use wire::check_in_response::Outcome;

use crate::app::App;
use crate::blobs::{BlobStore, in_state};
use crate::client::{Client, ClientBuilder, Step};
use crate::clock::Clock;
use crate::fixture::{BASE, checkpoint, key, name, trust_root};
use crate::transport::Transport;

/// Small, so that tiny blobs have many.
const CHUNK: usize = 4096;
const WINDOW: wire::RetryWindow = wire::RetryWindow { delay_min_ms: 1000, delay_max_ms: 2000 };
/// Steps after which a script that does not get where it should is broken.
const STEPS_MAX: usize = 2000;

#[derive(Clone)]
pub(super) struct HandClock(Arc<AtomicU64>);

impl Clock for HandClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(self.0.load(Ordering::Relaxed))
    }

    fn sleep(&self, ms: u64) {
        self.0.fetch_add(ms, Ordering::Relaxed);
    }

    /// A second at each look, so that nobody finds it standing still.
    fn elapsed(&self) -> Duration {
        static LOOKS: AtomicU64 = AtomicU64::new(0);
        Duration::from_secs(LOOKS.fetch_add(1, Ordering::Relaxed))
    }
}

/// All that the client called, in order.
#[derive(Default, Clone)]
pub(super) struct Log(Vec<Request>);

impl Log {
    pub(super) fn check_ins(&self) -> Vec<wire::CheckInRequest> {
        self.each(|request| if let Request::CheckIn(r) = request { Some(r.clone()) } else { None })
    }

    pub(super) fn contributions(&self) -> usize {
        self.each(|request| matches!(request, Request::SubmitUpdate(_)).then_some(())).len()
    }

    pub(super) fn results(&self) -> Vec<wire::TaskResult> {
        self.each(|request| if let Request::ReportTaskResult(r) = request { Some(r.result()) } else { None })
    }

    pub(super) fn release_reports(&self) -> Vec<(u64, wire::ReleaseState)> {
        self.each(
            |request| {
                if let Request::ReportRelease(r) = request { Some((r.version, r.state())) } else { None }
            },
        )
    }

    fn each<T>(&self, pick: impl Fn(&Request) -> Option<T>) -> Vec<T> {
        self.0.iter().filter_map(pick).collect()
    }
}

#[derive(Default)]
struct Script {
    answers: VecDeque<wire::CheckInResponse>,
    failures: VecDeque<FailureKind>,
    blobs: BTreeMap<Digest, Vec<u8>>,
    chunks_a_read: Option<usize>,
    flip_once: bool,
    log: Log,
    reads: Vec<(Digest, u64)>,
}

pub(super) struct ScriptedTransport(Rc<RefCell<Script>>);

impl Transport for ScriptedTransport {
    fn call(&mut self, request: Request) -> Result<Response, CallFailure> {
        let mut script = self.0.borrow_mut();
        script.log.0.push(request.clone());
        if let Some(kind) = script.failures.pop_front() {
            return Err(CallFailure::new(kind, "scripted"));
        }
        Ok(match request {
            Request::CheckIn(_) => Response::CheckIn(script.answers.pop_front().unwrap_or_else(no_work)),
            Request::ReportTaskResult(_) => Response::ReportTaskResult,
            Request::WriteBlobChunk(r) => Response::WriteBlobChunk(wire::WriteBlobChunkResponse {
                committed_bytes: r.offset + r.data.len() as u64,
            }),
            Request::SubmitUpdate(_) => Response::SubmitUpdate(contributed()),
            Request::ReportRelease(_) => Response::ReportRelease,
            Request::AdvertiseKeys(_)
            | Request::ShareKeys(_)
            | Request::SubmitMaskedUpdate(_)
            | Request::ConfirmSurvivors(_)
            | Request::RevealShares(_) => {
                return Err(CallFailure::new(FailureKind::Unimplemented, "the script's tasks are plain"));
            }
        })
    }

    fn read_blob(
        &mut self,
        digest: Digest,
        offset: u64,
        sink: &mut dyn FnMut(wire::ReadBlobResponse) -> ControlFlow<()>,
    ) -> Result<(), CallFailure> {
        let mut script = self.0.borrow_mut();
        script.reads.push((digest, offset));
        let bytes = script.blobs.get(&digest).cloned();
        let bytes = bytes.ok_or_else(|| CallFailure::new(FailureKind::NotFound, "no such blob"))?;
        for (sent, data) in bytes[usize::try_from(offset).unwrap()..].chunks(CHUNK).enumerate() {
            if script.chunks_a_read.is_some_and(|most| sent == most) {
                return Err(CallFailure::new(FailureKind::Unavailable, "the connection broke"));
            }
            let (crc32c, mut data) = (crc32c::crc32c(data), data.to_vec());
            if std::mem::take(&mut script.flip_once) {
                data[0] ^= 1;
            }
            let chunk = wire::ReadBlobResponse { offset: offset + (sent * CHUNK) as u64, data, crc32c };
            if sink(chunk).is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// The coordinator's side of a test.
pub(super) struct Desk {
    script: Rc<RefCell<Script>>,
    clock: HandClock,
    dir: tempfile::TempDir,
}

impl Desk {
    pub(super) fn new() -> Self {
        let clock = HandClock(Arc::new(AtomicU64::new(1000)));
        let desk = Self { script: Rc::default(), clock, dir: tempfile::tempdir().unwrap() };
        desk.hold(&BASE);
        desk.hold(&checkpoint());
        desk
    }

    /// A client that allows plaintext.
    pub(super) fn client(&self, app: App) -> Client<ScriptedTransport> {
        self.builder().insecure_allow_plaintext_aggregation().build(self.transport(), app).unwrap()
    }

    pub(super) fn builder(&self) -> ClientBuilder {
        let state = self.dir.path();
        ClientBuilder::new(state, name("boats"), trust_root()).device_seed([3; 32]).clock(self.clock.clone())
    }

    pub(super) fn transport(&self) -> ScriptedTransport {
        ScriptedTransport(Rc::clone(&self.script))
    }

    /// Steps the client, in virtual time, until the log shows what was awaited.
    pub(super) fn drive(&self, client: &mut Client<ScriptedTransport>, awaited: impl Fn(&Log) -> bool) {
        for _ in 0..STEPS_MAX {
            if awaited(&self.script.borrow().log) && client.device.is_idle() {
                return;
            }
            match client.step() {
                Step::Did => {}
                Step::SleepUntil(until) => self.clock.0.store(until.0, Ordering::Relaxed),
            }
        }
        let (log, events) = (self.script.borrow().log.0.len(), client.poll_events());
        panic!("not there after {STEPS_MAX} steps and {log} calls: {events:?}");
    }

    pub(super) fn answer(&self, answer: wire::CheckInResponse) {
        self.script.borrow_mut().answers.push_back(answer);
    }

    pub(super) fn answers<const N: usize>(&self, answers: [wire::CheckInResponse; N]) {
        answers.into_iter().for_each(|answer| self.answer(answer));
    }

    pub(super) fn fail_next(&self, calls: usize, kind: FailureKind) {
        self.script.borrow_mut().failures.extend(vec![kind; calls]);
    }

    /// The coordinator has this blob.
    pub(super) fn hold(&self, bytes: &[u8]) {
        self.script.borrow_mut().blobs.insert(Digest::of(bytes), bytes.to_vec());
    }

    /// The device has this blob.
    pub(super) fn keep(&self, bytes: &[u8]) {
        self.blobs().insert(bytes).unwrap();
    }

    pub(super) fn lie_about(&self, bytes: &[u8]) {
        let mut other = bytes.to_vec();
        other[0] ^= 1;
        self.script.borrow_mut().blobs.insert(Digest::of(bytes), other);
    }

    pub(super) fn break_reads_after(&self, chunks: usize) {
        self.script.borrow_mut().chunks_a_read = Some(chunks);
    }

    pub(super) fn flip_a_bit_once(&self) {
        self.script.borrow_mut().flip_once = true;
    }

    pub(super) fn log(&self) -> Log {
        self.script.borrow().log.clone()
    }

    pub(super) fn now(&self) -> UnixMillis {
        self.clock.now()
    }

    pub(super) fn blobs(&self) -> BlobStore {
        BlobStore::open(in_state(self.dir.path())).unwrap()
    }

    pub(super) fn offsets_of(&self, bytes: &[u8]) -> Vec<u64> {
        let digest = Digest::of(bytes);
        self.script.borrow().reads.iter().filter(|read| read.0 == digest).map(|read| read.1).collect()
    }

    pub(super) fn reads_of(&self, bytes: &[u8]) -> usize {
        self.offsets_of(bytes).len()
    }

    /// The bytes of the one update that was submitted, inline.
    pub(super) fn submitted(&self) -> Vec<u8> {
        let log = self.log();
        let submitted = log.0.iter().find_map(|request| {
            if let Request::SubmitUpdate(r) = request { r.update.clone()?.source } else { None }
        });
        match submitted {
            Some(wire::resource::Source::Inline(bytes)) => bytes,
            other => panic!("no inline update but {other:?}"),
        }
    }
}

fn answer(outcome: Outcome) -> wire::CheckInResponse {
    wire::CheckInResponse { outcome: Some(outcome), retry_window: Some(WINDOW), release_manifest: None }
}

fn inlined(bytes: Vec<u8>) -> wire::Resource {
    wire::Resource { source: Some(wire::resource::Source::Inline(bytes)) }
}

fn contributed() -> wire::SubmitUpdateResponse {
    let reason = wire::EndReason::Contributed.into();
    let outcome = wire::submit_update_response::Outcome::Ended(wire::Ended { reason });
    wire::SubmitUpdateResponse { outcome: Some(outcome) }
}

pub(super) fn no_work() -> wire::CheckInResponse {
    answer(Outcome::NoAssignment(wire::NoAssignment {}))
}

pub(super) fn policy() -> wire::CheckInResponse {
    let offer =
        TaskOffer { task: name("lora"), examples_min: 2, protocol: AggregationProtocol::InsecurePlaintext };
    let policy = PopulationPolicy { population: name("boats"), tasks: vec![offer] };
    answer(Outcome::Policy(inlined(seal(Purpose::Policy, policy.to_bytes(), &[&key(1)]))))
}

pub(super) fn assignment(plan: &TaskPlan) -> wire::CheckInResponse {
    assignment_from(plan, &checkpoint())
}

pub(super) fn assignment_from(plan: &TaskPlan, checkpoint: &[u8]) -> wire::CheckInResponse {
    answer(Outcome::Assignment(wire::TaskAssignment {
        task: plan.task.as_str().into(),
        session_token: vec![7; 32],
        plan: Some(inlined(seal(Purpose::Plan, plan.to_bytes(), &[&key(1)]))),
        round: 2,
        attempt: 0,
        checkpoint: Some(Digest::of(checkpoint).to_wire()),
        deadline_ms: 600_000,
        aggregation_nonce: Vec::new(),
        clipping_norm: 0.0,
    }))
}

/// No work, and a release signed by the key of that seed.
pub(super) fn sealed_release(manifest: &ReleaseManifest, signer: u8) -> wire::CheckInResponse {
    release(seal(Purpose::Release, manifest.to_bytes(), &[&key(signer)]))
}

pub(super) fn release(envelope: Vec<u8>) -> wire::CheckInResponse {
    wire::CheckInResponse { release_manifest: Some(inlined(envelope)), ..no_work() }
}
