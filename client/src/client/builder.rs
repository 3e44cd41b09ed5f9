//! Setting a client up.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fleetune_model::train::{Precision, Recompute, TimeBudget, TrainerOptions, WhenShort};
use fleetune_privacy::{Ledger, NoiseOrigin};
use fleetune_proto::device::{Device, DeviceFloors, DeviceRecord, DeviceSetup};
use fleetune_proto::{AggregationProtocol, Name, TrustRoot};
use fleetune_secagg::{Certificate, Registrars};

use super::Client;
use crate::app::App;
use crate::blobs::{self, BlobStore};
use crate::clock::{Clock, SystemClock};
use crate::files::{self, StoreError};
use crate::identity;
use crate::release::ReleaseSlots;
use crate::state::{self, StateLock};
use crate::transport::Transport;

/// What a [`Client`] needs to know once.
pub struct ClientBuilder {
    state: PathBuf,
    population: Name,
    trust_root: TrustRoot,
    device_class: String,
    floors: DeviceFloors,
    device_seed: Option<[u8; 32]>,
    options: TrainerOptions,
    clock: Box<dyn Clock>,
    registrars: Registrars,
    certificate: Option<Certificate>,
}

/// Largest record of a device: a masked update and what is around it.
const RECORD_BYTES_MAX: u64 = 2 << 30;

/// What a device has given away so far, from its state directory; also while it runs.
///
/// # Errors
/// [`StoreError`] when the record is damaged: an empty ledger in its place would be a lie.
pub fn privacy_ledger(state: &Path) -> Result<Ledger, StoreError> {
    let path = state.join("aggregation");
    match files::read_if_there(&path, RECORD_BYTES_MAX)? {
        Some(bytes) => DeviceRecord::from_bytes(bytes)
            .ledger()
            .map_err(|error| StoreError::damaged(&path, error.to_string())),
        None => Ok(Ledger::default()),
    }
}

impl ClientBuilder {
    /// A device of that population, with its files in `state`, that obeys only what `trust_root` signed.
    pub fn new(state: impl Into<PathBuf>, population: Name, trust_root: TrustRoot) -> Self {
        Self {
            state: state.into(),
            population,
            trust_root,
            device_class: String::new(),
            floors: DeviceFloors::default(),
            device_seed: None,
            options: TrainerOptions::default(),
            clock: Box::new(SystemClock),
            registrars: Registrars::Keys(Vec::new()),
            certificate: None,
        }
    }

    /// Who certifies the devices that this one aggregates with. Without a registrar it takes no part in
    /// secure aggregation.
    #[must_use]
    pub fn registrars(mut self, registrars: Registrars) -> Self {
        self.registrars = registrars;
        self
    }

    /// A registrar's certificate for this device's [`crate::identity::public_key`], kept from now on.
    #[must_use]
    pub fn certificate(mut self, certificate: Certificate) -> Self {
        self.certificate = Some(certificate);
        self
    }

    /// Takes anybody for a peer: a coordinator that makes peers up learns this device's update. Tests and
    /// closed laboratories only.
    #[must_use]
    pub fn insecure_allow_unregistered_peers(mut self) -> Self {
        self.registrars = Registrars::InsecureAnyone;
        self
    }

    /// The vendor's class for devices like this one; many must share it.
    #[must_use]
    pub fn device_class(mut self, class: impl Into<String>) -> Self {
        self.device_class = class.into();
        self
    }

    /// Bounds that no plan may pass, whoever signed it.
    #[must_use]
    pub fn floors(mut self, floors: DeviceFloors) -> Self {
        self.floors = floors;
        self
    }

    /// Lets the coordinator see this device's clipped update by itself. For tests and trusted silos only.
    #[must_use]
    pub fn insecure_allow_plaintext_aggregation(mut self) -> Self {
        self.floors.protocols.push(AggregationProtocol::InsecurePlaintext);
        self
    }

    /// The seed of this device's batches, kept from now on; without it one is drawn once. For tests that
    /// compare devices with a simulation.
    #[must_use]
    pub fn device_seed(mut self, seed: [u8; 32]) -> Self {
        self.device_seed = Some(seed);
        self
    }

    /// Trains in less than half the memory and a third more time. The update is the same.
    #[must_use]
    pub fn low_memory(self) -> Self {
        self.recompute(Recompute::Always)
    }

    /// Whether layers run again in the backward pass. By default where the memory budget asks for it.
    #[must_use]
    pub fn recompute(mut self, recompute: Recompute) -> Self {
        self.options.recompute = recompute;
        self
    }

    /// Bytes that a training may take, the base model included, as predicted before it starts. Batches are cut,
    /// layers run again and, at the worst, blocks are shortened to fit; a task that does not fit however it is
    /// cut is reported as rejected and not accepted again until the client is built anew.
    #[must_use]
    pub fn memory_budget(mut self, bytes: u64) -> Self {
        self.options.memory_bytes = Some(bytes);
        self
    }

    /// Time that a training may take by the client's clock. A task that does not fit is reported as rejected and
    /// not accepted again for some hours.
    #[must_use]
    pub fn time_budget(mut self, limit: Duration, when_short: WhenShort) -> Self {
        self.options.time = Some(TimeBudget { limit, when_short });
        self
    }

    /// Number format of the large products' factors; f32 by default.
    #[must_use]
    pub fn precision(mut self, precision: Precision) -> Self {
        self.options.precision = precision;
        self
    }

    /// Threads that train; one by default. The update is the same for any number.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.options.threads = threads;
        self
    }

    /// Another clock than the system's.
    #[must_use]
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Box::new(clock);
        self
    }

    /// Opens the state directory and takes hold of it.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be used, is damaged, or another process has it.
    pub fn build<T: Transport>(self, transport: T, app: App) -> Result<Client<T>, StoreError> {
        let lock = StateLock::take(&self.state)?;
        let slots = ReleaseSlots::open(&self.state)?;
        let device_seed = state::device_seed(&self.state, self.device_seed)?;
        let versions = slots.versions();
        let now = self.clock.now();
        let (population, given) = (self.population.as_str(), self.certificate.as_ref());
        let identity = identity::identity(&self.state, population, given, &self.registrars, now.0)?;
        if identity.is_none() {
            tracing::warn!("no registrar has certified this device: it takes no part in secure aggregation");
        }
        let record_path = self.state.join("aggregation");
        let setup = DeviceSetup {
            population: self.population,
            trust_root: self.trust_root,
            device_class: self.device_class,
            floors: self.floors.clone(),
            release_version: versions.active.unwrap_or(0),
            release_version_max: versions.version_max,
            identity: identity.map(Arc::new),
            registrars: self.registrars,
            noise: NoiseOrigin::operating_system(),
        };
        let seed = state::fresh_seed();
        let device = match files::read_if_there(&record_path, RECORD_BYTES_MAX)? {
            Some(bytes) => Device::restore(setup, seed, &DeviceRecord::from_bytes(bytes), now)
                .map_err(|error| StoreError::damaged(&record_path, error.to_string()))?,
            None => Device::new(setup, seed, now),
        };
        Ok(Client {
            device,
            record_path,
            transport,
            app,
            clock: self.clock,
            blobs: BlobStore::open(blobs::in_state(&self.state))?,
            slots,
            floors: self.floors,
            device_seed,
            options: self.options,
            base: None,
            checkpoint: None,
            too_little: BTreeMap::new(),
            over_budget: BTreeMap::new(),
            events: VecDeque::new(),
            _lock: lock,
        })
    }
}
