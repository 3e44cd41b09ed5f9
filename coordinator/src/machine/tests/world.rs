//! A world in virtual time: one core, some device machines, a disk that can be full. Training is made up,
//! everything else is what ships.

use crate::{Commit, Core, CoreEvent, CoreSetup, PacePolicy, ServerOptimizer, TaskProgress, TaskSpec};
use ed25519_dalek::SigningKey;
use fleetune_model::{
    adapter::LoraConfig,
    adapter_formats::from_gguf_lora,
    base::{BaseModel, LayerWeights, ModelParts},
    config::{ModelConfig, Projection},
    gguf::Metadata,
    tokenizer::{SpecialTokens, train_bpe},
    weights::{WeightFormat, WeightMatrix},
};
use fleetune_privacy::ClippingNorm;
use fleetune_proto::{
    AggregationPlan, AggregationProtocol, CallFailure, Digest, Name, Optimizer, TrainingPlan, TrustRoot,
    UnixMillis,
    device::{Action, Device, DeviceFloors, DeviceSetup, Event, Request, Response},
    round::RoundPolicy,
};
use fleetune_secagg::RingBits;
use std::{collections::BTreeMap, sync::Arc};

pub(super) struct World {
    pub(super) core: Core,
    pub(super) now: UnixMillis,
    pub(super) actors: Vec<Actor>,
    pub(super) blobs: BTreeMap<Digest, Arc<Vec<u8>>>,
    pub(super) commits: Vec<Commit>,
    pub(super) events: Vec<CoreEvent>,
    pub(super) disk_full: bool,
    pub(super) base: Arc<BaseModel>,
    pub(super) base_digest: Digest,
}

pub(super) struct Actor {
    pub(super) device: Device,
    pub(super) events: Vec<Event>,
    pub(super) alive: bool,
    pub(super) training_ms: u64,
    training: Option<(UnixMillis, Vec<f32>)>,
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

    /// Runs until `done`; a world in which nothing happens any more is a failed test.
    pub(super) fn run_until(&mut self, done: impl Fn(&Self) -> bool) {
        for _ in 0..100_000 {
            self.exhaust_now();
            if done(self) {
                return;
            }
            self.now = self.next_time().expect("something is still to happen");
            self.core.handle_timeout(self.now);
        }
        panic!("never done; events: {:?}", self.events);
    }

    pub(super) fn run_to_end(&mut self) {
        self.run_until(|world| world.core.is_finished());
    }

    pub(super) fn progress(&self) -> &TaskProgress {
        &self.commits.last().expect("something was committed").progress
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

    fn act(&mut self, index: usize) -> bool {
        let now = self.now;
        let actor = &mut self.actors[index];
        if !actor.alive {
            return false;
        }
        if let Some((_, delta)) = actor.training.take_if(|(at, _)| *at <= now) {
            actor.device.handle_trained(delta, now);
        }
        let action = actor.device.poll_action(now);
        let acted = action.is_some();
        match action {
            Some(Action::Call(request)) => {
                let answer = call(&mut self.core, request, now);
                let device = &mut self.actors[index].device;
                match answer {
                    Ok(response) => device.handle_response(response, now),
                    Err(failure) => device.handle_call_failed(&failure, now),
                }
            }
            Some(Action::Choose(policy)) => {
                actor.device.handle_choice(policy.tasks.into_iter().map(|offer| offer.task).collect(), now);
            }
            Some(Action::Fetch(digest)) => {
                assert!(self.blobs.contains_key(&digest), "blob {digest} is durable before it is named");
                actor.device.handle_fetched(now);
            }
            Some(Action::Train(order)) => {
                let delta = made_up_delta(index, order.round, order.plan.adapter.dimension);
                actor.training = Some((now.plus(actor.training_ms), delta));
            }
            Some(Action::Install(order)) => {
                from_gguf_lora(&self.blobs[&order.manifest.adapter], &self.base).unwrap();
                actor.device.handle_installed(now);
            }
            None => {}
        }
        let actor = &mut self.actors[index];
        actor.events.extend(actor.device.poll_events());
        acted
    }

    fn next_time(&self) -> Option<UnixMillis> {
        let actors = self.actors.iter().filter(|actor| actor.alive);
        let devices = actors.filter_map(|actor| match &actor.training {
            Some((at, _)) => Some(*at),
            None => actor.device.poll_timeout(),
        });
        let next = devices.chain(self.core.poll_timeout()).min()?;
        Some(next.max(self.now.plus(1)))
    }
}

impl Actor {
    pub(super) fn new(index: u8, now: UnixMillis) -> Self {
        let setup = DeviceSetup {
            population: name("roles"),
            trust_root: trust_root(),
            device_class: "test".into(),
            floors: DeviceFloors {
                protocols: vec![AggregationProtocol::InsecurePlaintext],
                ..Default::default()
            },
            release_version: 0,
            release_version_max: 0,
        };
        let device = Device::new(setup, [index; 32], now);
        Self { device, events: Vec::new(), alive: true, training_ms: 500, training: None }
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
        Request::ReportRelease(request) => {
            core.handle_report_release(&request, now).map(|_| Response::ReportRelease)
        }
    }
}

pub(super) fn name(text: &str) -> Name {
    Name::parse("test", text).unwrap()
}

pub(super) fn setup(seed: u8) -> CoreSetup {
    let pace =
        PacePolicy { soon_ms: 200, idle_ms_min: 5_000, idle_ms_max: 10_000, check_ins_per_second_max: 1_000 };
    let signing_key = SigningKey::from_bytes(&[9; 32]);
    CoreSetup { population: name("roles"), signing_key, pace, upload_slots: 2, seed: [seed; 32] }
}

pub(super) fn trust_root() -> TrustRoot {
    TrustRoot::new(&[SigningKey::from_bytes(&[9; 32]).verifying_key().to_bytes()], 1).unwrap()
}

/// Three rounds of `cohort` devices, all of which are awaited.
pub(super) fn spec(cohort: u32) -> TaskSpec {
    TaskSpec {
        name: name("lora"),
        lora: LoraConfig {
            rank: 2,
            alpha: 4.0,
            targets: vec![Projection::Q, Projection::V],
            freeze_a: false,
            init_seed: 7,
        },
        training: TrainingPlan {
            steps: 2,
            batch_size: 1,
            block_tokens: 16,
            learning_rate: 1e-3,
            learning_rate_final_fraction: 1.0,
            gradient_clip: Some(1.0),
            optimizer: Optimizer::Sgd { momentum: 0.0 },
            examples_min: 1,
        },
        aggregation: AggregationPlan {
            protocol: AggregationProtocol::InsecurePlaintext,
            clipping_norm: ClippingNorm::new(10.0).unwrap(),
            ring_bits: RingBits::new(32).unwrap(),
            summands_max: 16,
            summands_min: 2,
        },
        rounds: 3,
        round_policy: RoundPolicy {
            report_goal: cohort,
            selected_max: cohort,
            reports_min: 2,
            selection_ms: 1_000,
            report_ms: 20_000,
        },
        server_optimizer: ServerOptimizer::FedAvg { learning_rate: 1.0 },
        expires: UnixMillis(1_000_000_000),
        release_valid_ms: 1_000_000_000,
    }
}

/// What device `index` learns in a round, far inside the clipping norm.
pub(super) fn made_up_delta(index: usize, round: u32, dimension: usize) -> Vec<f32> {
    let (index, round) = (index as u64, u64::from(round));
    let value = |i: u64| ((i * 31 + index * 17 + round * 7) % 101) as f32 / 10_100.0 - 0.004;
    (0..dimension as u64).map(value).collect()
}

/// A model of two layers with made-up weights, as a GGUF file.
fn tiny_base() -> Vec<u8> {
    let tokenizer = train_bpe(std::iter::empty(), 259, &SpecialTokens::default()).unwrap();
    let config = ModelConfig {
        name: "tiny".to_owned(),
        vocab_size: tokenizer.vocab_size(),
        hidden: 32,
        layers: 2,
        feed_forward: 64,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        context_length: 64,
        rope_base: 10_000.0,
        rms_eps: 1e-5,
    };
    let layer = LayerWeights {
        attn_norm: vec![1.0; config.hidden],
        ffn_norm: vec![1.0; config.hidden],
        projections: Projection::ALL.map(|projection| {
            let (rows, cols) = projection.shape(&config);
            matrix(rows, cols)
        }),
    };
    let parts = ModelParts {
        token_embedding: matrix(config.vocab_size, config.hidden),
        layers: vec![layer; config.layers],
        output_norm: vec![1.0; config.hidden],
        output: None,
        chat_template: None,
        tokenizer,
        config,
    };
    BaseModel::from_parts(parts).unwrap().to_gguf_bytes(&Metadata::default())
}

fn matrix(rows: usize, cols: usize) -> WeightMatrix {
    let values: Vec<f32> = (0..rows * cols).map(|i| (i % 17) as f32 / 100.0 - 0.08).collect();
    WeightMatrix::from_f32(&values, rows, cols, WeightFormat::Q8_0).unwrap()
}
