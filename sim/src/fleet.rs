//! A fleet in virtual time: one coordinator core and one protocol machine a user, run side by side
//! from one queue of events. Training runs on the worker threads; its results enter at the virtual
//! time at which the device would have been done, so they do not depend on how fast this machine
//! is or how many threads it has.

mod calls;

use crate::{experiment::Experiment, pool::Pending, pool::Pool, scenario::Scenario};
use anyhow::{Context, Result, bail, ensure};
use ed25519_dalek::SigningKey;
use fleetune_client::training::{LocalTrainer, LocalUpdate};
use fleetune_coordinator::{
    Commit, Core, CoreSetup, PacePolicy, RoundOutcome as Ending, RoundRecord, SumCharge, TaskSpec,
};
use fleetune_privacy::{Delta, NoiseOrigin, PrivacyPolicy};
use fleetune_proto::{
    Digest, Name, ReleaseManifest, TrustRoot, UnixMillis,
    device::{Action, Device, DeviceFloors, DeviceRecord, DeviceSetup, Event, Request, TrainOrder},
    wire,
};
use fleetune_secagg::{Certificate, Floors, Identity, Registrars};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest as _, Sha256};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    sync::Arc,
};

/// Virtual time begins on 2026-01-01.
const EPOCH: UnixMillis = UnixMillis(1_767_225_600_000);
/// Attempts at one round that may fail before the run is given up.
const FAILED_ATTEMPTS_MAX: u32 = 20;
/// Virtual time after which the run is given up: ten years.
const VIRTUAL_MS_MAX: u64 = 10 * 365 * 24 * 3600 * 1000;

/// One finished round, as the run sees it.
pub struct FinishedRound {
    /// The coordinator's record.
    pub record: RoundRecord,
    /// Attempts that failed before it.
    pub failed_attempts: u32,
    /// Mean training NLL of the contributors.
    pub train_nll: f64,
    /// Tokens that the contributors trained on.
    pub tokens: u64,
    /// Virtual seconds since the start.
    pub virtual_seconds: f64,
    /// The trained values after the round.
    pub adapter: Vec<f32>,
}

/// How the fleet ended.
pub struct FleetOutcome {
    /// The release and its signed manifest.
    pub manifest: ReleaseManifest,
    /// The released file: an adapter or a model.
    pub released: Arc<Vec<u8>>,
    /// The manifest as the devices got it.
    pub envelope: Vec<u8>,
    /// Key that a device must trust to install it.
    pub trust_key: [u8; 32],
    /// Devices that fetched it and run it.
    pub devices_active: u32,
    /// What each sum that was opened gave away; empty without differential privacy.
    pub charges: Vec<SumCharge>,
    /// Most contributions that any device's own ledger holds.
    pub participations_most: u32,
}

/// 32 bytes that follow from the run's seed and a purpose.
pub fn derive_seed(seed: u64, purpose: &str, index: u64) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"fleetune simulation\0");
    hash.update(seed.to_le_bytes());
    hash.update(index.to_le_bytes());
    hash.update(purpose.as_bytes());
    hash.finalize().into()
}

/// What a device is busy with until its next event.
enum Doing {
    Nothing,
    Calling(Request),
    Fetching(Digest),
    Training(Pending<LocalUpdate>),
    Vanishing,
    Installing,
}

struct VirtualDevice {
    user: usize,
    machine: Device,
    rng: ChaCha8Rng,
    slowness: f64,
    incarnations: u64,
    doing: Doing,
    trained: Option<(f32, u64)>,
    holds_base: bool,
    release_version: u64,
    /// Its disk: what it keeps of a session of secure aggregation.
    record: Option<DeviceRecord>,
    /// The last step of secure aggregation that it went into.
    secure_step: u32,
}

/// The fleet.
pub struct Fleet<'a> {
    scenario: &'a Scenario,
    experiment: &'a Experiment,
    pool: &'a Pool,
    seed: u64,
    core: Core,
    trust_root: TrustRoot,
    trust_key: [u8; 32],
    registrar: SigningKey,
    now: UnixMillis,
    queue: BinaryHeap<Reverse<(UnixMillis, u64, usize)>>,
    queued: u64,
    devices: Vec<VirtualDevice>,
    blobs: BTreeMap<[u8; 32], Arc<Vec<u8>>>,
    contributions: Vec<(f32, u64)>,
    failed_attempts: u32,
    release: Option<(ReleaseManifest, Vec<u8>)>,
    /// The coordinator's privacy ledger.
    charges: Vec<SumCharge>,
}

impl<'a> Fleet<'a> {
    /// A coordinator with one task, and one device a user.
    pub fn new(
        scenario: &'a Scenario,
        experiment: &'a Experiment,
        pool: &'a Pool,
        seed: u64,
    ) -> Result<Self> {
        let key = SigningKey::from_bytes(&derive_seed(seed, "signing key", 0));
        let trust_key = key.verifying_key().to_bytes();
        let registrar = SigningKey::from_bytes(&derive_seed(seed, "registrar", 0));
        let mut core = Core::new(CoreSetup {
            population: population()?,
            signing_key: key,
            pace: pace(scenario),
            upload_slots: 16,
            seed: derive_seed(seed, "coordinator", 0),
            registrars: Registrars::Keys(vec![registrar.verifying_key()]),
        });
        let base = Arc::clone(&experiment.base);
        core.add_task(task(scenario, seed)?, base, experiment.base_digest, None, EPOCH)
            .context("the task")?;
        let trust_root = TrustRoot::new(&[trust_key], 1).context("the simulation's trust root")?;
        let mut fleet = Self {
            scenario,
            experiment,
            pool,
            seed,
            core,
            trust_root,
            trust_key,
            registrar,
            now: EPOCH,
            queue: BinaryHeap::new(),
            queued: 0,
            devices: Vec::new(),
            blobs: BTreeMap::new(),
            contributions: Vec::new(),
            failed_attempts: 0,
            release: None,
            charges: Vec::new(),
        };
        for user in 0..experiment.users.len() {
            fleet.add_device(user)?;
        }
        Ok(fleet)
    }

    /// Runs to the end of the task and until every device runs its release. `on_round` sees each
    /// finished round.
    pub fn run(mut self, on_round: &mut dyn FnMut(FinishedRound)) -> Result<FleetOutcome> {
        self.commit(on_round)?;
        while let Some(Reverse((at, _, device))) = self.queue.pop() {
            self.advance(at, on_round)?;
            self.step(device)?;
            self.commit(on_round)?;
            if self.is_done() {
                break;
            }
        }
        let devices_active = self.devices_active();
        let participations_most = self.participations_most();
        let (manifest, envelope) = self.release.context("the task ended without a release")?;
        let released = self.blobs.get(&manifest.trained().sha256).context("the released file is missing")?;
        let released = Arc::clone(released);
        let (trust_key, charges) = (self.trust_key, self.charges);
        Ok(FleetOutcome {
            manifest,
            released,
            envelope,
            trust_key,
            devices_active,
            charges,
            participations_most,
        })
    }

    fn add_device(&mut self, user: usize) -> Result<()> {
        let mut rng = ChaCha8Rng::from_seed(derive_seed(self.seed, "device", user as u64));
        let slowness = (self.scenario.devices.speed_sigma * standard_normal(&mut rng)).exp();
        let first = self.now.plus(rng.random_range(0..=self.scenario.fleet.check_in_s[1] * 1000));
        let machine = self.machine(user, 0, 0, None, first)?;
        self.devices.push(VirtualDevice {
            user,
            machine,
            rng,
            slowness,
            incarnations: 1,
            doing: Doing::Nothing,
            trained: None,
            holds_base: false,
            release_version: 0,
            record: None,
            secure_step: 0,
        });
        self.schedule(first, user);
        Ok(())
    }

    fn machine(
        &self,
        user: usize,
        incarnation: u64,
        release_version: u64,
        record: Option<&DeviceRecord>,
        now: UnixMillis,
    ) -> Result<Device> {
        let setup = DeviceSetup {
            population: population()?,
            trust_root: self.trust_root.clone(),
            device_class: "simulated".into(),
            floors: DeviceFloors {
                protocols: vec![
                    wire::AggregationProtocol::SecaggPlus,
                    wire::AggregationProtocol::InsecurePlaintext,
                ],
                summands_min: 1,
                clipping_norm_max: f32::MAX,
                base_model_bytes_max: u64::MAX,
                steps_max: u32::MAX,
                secure: Floors { cohort_min: 2, survivors_min: 2, ..Floors::default() },
                privacy: PrivacyPolicy {
                    delta: Delta::new(0.5).context("a probability")?,
                    epsilon_task_max: f64::INFINITY,
                    epsilon_purpose_max: [f64::INFINITY; 3],
                    epsilon_max: f64::INFINITY,
                    insecure_noise_cohort: true,
                    ..PrivacyPolicy::default()
                },
            },
            release_version,
            release_version_max: release_version,
            identity: Some(Arc::new(self.identity(user)?)),
            registrars: Registrars::Keys(vec![self.registrar.verifying_key()]),
            noise: NoiseOrigin::simulated(derive_seed(self.seed, "noise", (user as u64) << 32 | incarnation)),
        };
        let seed = derive_seed(self.seed, "machine", (user as u64) << 32 | incarnation);
        match record {
            Some(record) => Device::restore(setup, seed, record, now).context("a device's record"),
            None => Ok(Device::new(setup, seed, now)),
        }
    }

    /// A user's key, and the registrar's word for it.
    fn identity(&self, user: usize) -> Result<Identity> {
        let key = SigningKey::from_bytes(&derive_seed(self.seed, "identity", user as u64));
        let (public, expires) = (key.verifying_key().to_bytes(), EPOCH.plus(VIRTUAL_MS_MAX).0);
        let certificate = Certificate::issue(&self.registrar, population()?.as_str(), public, expires);
        Identity::new(key, certificate).context("a device's identity")
    }

    /// Lets virtual time reach `at`, the coordinator's deadlines on the way included.
    fn advance(&mut self, at: UnixMillis, on_round: &mut dyn FnMut(FinishedRound)) -> Result<()> {
        ensure!(at.since(EPOCH) < VIRTUAL_MS_MAX, "the fleet made no progress in ten virtual years");
        while let Some(deadline) = self.core.poll_timeout().filter(|deadline| *deadline <= at) {
            self.now = self.now.max(deadline);
            self.core.handle_timeout(self.now);
            self.commit(on_round)?;
        }
        self.now = self.now.max(at);
        Ok(())
    }

    /// Ends what the device was busy with, and begins what it does next.
    fn step(&mut self, index: usize) -> Result<()> {
        let now = self.now;
        let doing = std::mem::replace(&mut self.devices[index].doing, Doing::Nothing);
        if let Doing::Calling(request) = doing {
            self.call(index, request);
        } else {
            self.finish(index, doing)?;
        }
        self.note_events(index);
        let Some(action) = self.next_action(index) else {
            let wake = self.devices[index].machine.poll_timeout().unwrap_or_else(|| now.plus(1000));
            self.schedule(wake.max(now.plus(1)), index);
            return Ok(());
        };
        let (doing, ms) = self.begin(index, action)?;
        self.devices[index].doing = doing;
        self.schedule(now.plus(ms), index);
        Ok(())
    }

    /// The device's next action that takes time.
    fn next_action(&mut self, index: usize) -> Option<Action> {
        loop {
            let machine = &mut self.devices[index].machine;
            match machine.poll_action(self.now)? {
                Action::Choose(policy) => {
                    let tasks = policy.tasks.into_iter().map(|offer| offer.task).collect();
                    machine.handle_choice(tasks, self.now);
                }
                Action::Keep(record) => {
                    machine.handle_kept(self.now);
                    self.devices[index].record = Some(record);
                }
                action @ (Action::Call(_) | Action::Fetch(_) | Action::Train(_) | Action::Install(_)) => {
                    return Some(action);
                }
            }
        }
    }

    fn begin(&mut self, index: usize, action: Action) -> Result<(Doing, u64)> {
        let latency = self.scenario.devices.latency_ms;
        Ok(match action {
            Action::Call(request) if self.loses_step(index, &request) => (Doing::Vanishing, latency),
            Action::Call(request) => {
                let ms = latency + self.transfer_ms(calls::sent_bytes(&request));
                (Doing::Calling(request), ms)
            }
            Action::Fetch(digest) => {
                let bytes = if self.devices[index].holds_base && digest == self.experiment.base_digest {
                    0
                } else {
                    digest.size
                };
                (Doing::Fetching(digest), latency + self.transfer_ms(bytes))
            }
            Action::Train(order) => self.begin_training(index, *order)?,
            Action::Install(_) => (Doing::Installing, 1),
            Action::Choose(_) | Action::Keep(_) => unreachable!("answered before"),
        })
    }

    /// True if the device vanishes instead of taking a new step of secure aggregation.
    fn loses_step(&mut self, index: usize, request: &Request) -> bool {
        let (step, device) = (calls::secure_step(request), &mut self.devices[index]);
        let entered = step > 0 && step != device.secure_step;
        device.secure_step = step;
        entered && step > 1 && device.rng.random_bool(self.scenario.devices.step_dropout)
    }

    fn begin_training(&mut self, index: usize, order: TrainOrder) -> Result<(Doing, u64)> {
        let device = &mut self.devices[index];
        let seconds = f64::from(order.plan.training.steps) * self.scenario.devices.step_s * device.slowness;
        let ms = milliseconds(seconds);
        if device.rng.random_bool(self.scenario.devices.dropout) {
            return Ok((Doing::Vanishing, ms / 2));
        }
        let checkpoint = self.blobs.get(&order.checkpoint.sha256).context("the checkpoint is missing")?;
        let (checkpoint, base) = (Arc::clone(checkpoint), Arc::clone(&self.experiment.base));
        let blocks = Arc::clone(&self.experiment.users[device.user].train);
        let seed = training_seed(self.seed, device.user);
        let options = self.scenario.engine.options()?;
        let job = self.pool.submit(move |workspace| {
            if workspace.trainer.is_none() {
                workspace.trainer = Some(LocalTrainer::with_options(base, &order.plan, options)?);
            }
            let trainer = workspace.trainer.as_mut().expect("set above");
            Ok(trainer.run(&order, &checkpoint, &blocks, &seed, &mut || false)?)
        });
        Ok((Doing::Training(job), ms))
    }

    fn finish(&mut self, index: usize, doing: Doing) -> Result<()> {
        let now = self.now;
        let device = &mut self.devices[index];
        match doing {
            Doing::Nothing | Doing::Calling(_) => {}
            Doing::Fetching(digest) => {
                device.holds_base |= digest == self.experiment.base_digest;
                device.machine.handle_fetched(now);
            }
            Doing::Training(job) => {
                let update = job.wait().context("local training")?;
                device.trained = Some((update.summary.mean_loss, update.summary.tokens));
                device.machine.handle_trained(update.delta, now);
            }
            Doing::Installing => device.machine.handle_installed(now),
            Doing::Vanishing => self.vanish(index)?,
        }
        Ok(())
    }

    /// The device loses its process; it comes back later with nothing but its disk.
    fn vanish(&mut self, index: usize) -> Result<()> {
        let back = self.now.plus(self.scenario.devices.offline_s * 1000);
        let device = &self.devices[index];
        let (version, record) = (device.release_version, device.record.as_ref());
        let machine = self.machine(device.user, device.incarnations, version, record, back)?;
        let device = &mut self.devices[index];
        device.incarnations += 1;
        device.machine = machine;
        Ok(())
    }

    fn note_events(&mut self, index: usize) {
        let device = &mut self.devices[index];
        for event in device.machine.poll_events() {
            match event {
                Event::ReleaseActive(version) => device.release_version = version,
                Event::Refused(reason) | Event::ReleaseRejected { reason, .. } => {
                    tracing::warn!(device = index, reason, "a device refused the coordinator's word");
                }
                Event::Ended(reason) | Event::Retrying(reason) => tracing::debug!(device = index, reason),
                Event::NoWork | Event::Selected { .. } | Event::Contributed { .. } => {}
            }
        }
    }

    /// Opens sums, and takes what the coordinator wants durable; memory is as durable as a simulation gets.
    fn commit(&mut self, on_round: &mut dyn FnMut(FinishedRound)) -> Result<()> {
        while let Some(work) = self.core.poll_opening() {
            self.charges.extend(work.charge().cloned());
            self.core.handle_opened(work.run(self.pool.threads()), self.now);
        }
        while let Some(commit) = self.core.poll_commit() {
            let id = commit.id;
            for (digest, bytes) in &commit.blobs {
                self.blobs.insert(digest.sha256, Arc::clone(bytes));
            }
            self.note_release(&commit)?;
            self.note_round(commit, on_round)?;
            self.core.handle_committed(id, self.now);
        }
        Ok(())
    }

    fn note_release(&mut self, commit: &Commit) -> Result<()> {
        if let Some(release) = &commit.release {
            let bytes = self.trust_root.open(fleetune_proto::Purpose::Release, &release.envelope)?;
            self.release = Some((ReleaseManifest::parse(&bytes)?, release.envelope.clone()));
        }
        Ok(())
    }

    fn note_round(&mut self, commit: Commit, on_round: &mut dyn FnMut(FinishedRound)) -> Result<()> {
        let Some(record) = commit.record else { return Ok(()) };
        let contributions = std::mem::take(&mut self.contributions);
        if let Ending::Failed(reason) = &record.outcome {
            self.failed_attempts += 1;
            tracing::info!(round = record.round, attempt = record.attempt, reason, "the round failed");
            if self.failed_attempts > FAILED_ATTEMPTS_MAX {
                bail!(
                    "round {} failed {} times, at last because {reason}",
                    record.round,
                    self.failed_attempts
                );
            }
            return Ok(());
        }
        let tokens = contributions.iter().map(|(_, tokens)| tokens).sum();
        let train_nll = contributions.iter().map(|(loss, _)| f64::from(*loss)).sum::<f64>();
        let failed_attempts = std::mem::take(&mut self.failed_attempts);
        on_round(FinishedRound {
            record,
            failed_attempts,
            train_nll: train_nll / contributions.len().max(1) as f64,
            tokens,
            virtual_seconds: self.now.since(EPOCH) as f64 / 1000.0,
            adapter: commit.progress.adapter.clone(),
        });
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.release.is_some() && self.devices_active() as usize == self.devices.len()
    }

    fn devices_active(&self) -> u32 {
        let Some((manifest, _)) = &self.release else { return 0 };
        let active = self.devices.iter().filter(|device| device.release_version == manifest.version).count();
        u32::try_from(active).unwrap_or(u32::MAX)
    }

    fn participations_most(&self) -> u32 {
        let lines = self.devices.iter().flat_map(|device| device.machine.ledger().lines());
        lines.map(|line| line.participations).max().unwrap_or(0)
    }

    fn transfer_ms(&self, bytes: u64) -> u64 {
        bytes * 1000 / (self.scenario.devices.bandwidth_kib_s * 1024)
    }

    fn schedule(&mut self, at: UnixMillis, device: usize) {
        self.queued += 1;
        self.queue.push(Reverse((at, self.queued, device)));
    }
}

/// Seed of a user's batch order. A real device draws its own at random.
pub fn training_seed(seed: u64, user: usize) -> [u8; 32] {
    derive_seed(seed, "training", user as u64)
}

/// The task of a run, as a coordinator's configuration would hold it.
pub fn task(scenario: &Scenario, seed: u64) -> Result<TaskSpec> {
    Ok(TaskSpec {
        name: Name::parse("task", "lora")?,
        trained: scenario.trained(seed)?,
        release_format: scenario.model.release_format()?,
        training: scenario.training_plan()?,
        aggregation: scenario.aggregation_plan()?,
        rounds: scenario.rounds,
        round_policy: scenario.round_policy(),
        server_optimizer: scenario.server_optimizer()?,
        expires: EPOCH.plus(VIRTUAL_MS_MAX),
        release_valid_ms: VIRTUAL_MS_MAX,
        privacy: scenario.privacy_spec()?,
    })
}

fn population() -> Result<Name> {
    Ok(Name::parse("population", "simulated")?)
}

fn pace(scenario: &Scenario) -> PacePolicy {
    let [min, max] = scenario.fleet.check_in_s;
    PacePolicy {
        soon_ms: min * 1000,
        idle_ms_min: min * 1000,
        idle_ms_max: max * 1000,
        check_ins_per_second_max: u32::MAX,
    }
}

/// Box and Muller's normal variate.
fn standard_normal(rng: &mut ChaCha8Rng) -> f64 {
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a positive duration far below 2^64"
)]
fn milliseconds(seconds: f64) -> u64 {
    (seconds.max(0.0) * 1000.0).min(1e15) as u64
}
