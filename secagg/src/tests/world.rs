//! A cohort in one process: real devices, the real coordinator, and a script of who is lost when.

use crate::{
    Assumptions, Certificate, Cohort, CohortPlan, Degrees, Device, DevicePolicy, Floors, Gathering, Identity,
    MaskSuite, MaskedVector, Opened, Registrars, RingBits, RingVector, SessionId, SessionParts, Terms,
};
use ed25519_dalek::SigningKey;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

pub(super) const POPULATION: &str = "roles";
pub(super) const NOW: u64 = 1_000;

/// What happens in a session.
#[derive(Clone)]
pub(super) struct Script {
    pub(super) members: u32,
    pub(super) bits: u32,
    pub(super) dimension: usize,
    pub(super) degrees: Option<Degrees>,
    pub(super) suite: MaskSuite,
    /// Places lost at each of the steps 0 to 4.
    pub(super) dropouts: [Vec<u32>; 5],
    pub(super) threads: usize,
    pub(super) zeros: bool,
    /// Every device is saved and restored between any two steps.
    pub(super) through_records: bool,
    /// Attempt at the round; part of the session's id.
    pub(super) attempt: u32,
    pub(super) seed: u64,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            members: 8,
            bits: 20,
            dimension: 100,
            degrees: None,
            suite: MaskSuite::Aes128Ctr,
            dropouts: [const { Vec::new() }; 5],
            threads: 1,
            zeros: false,
            through_records: false,
            attempt: 0,
            seed: 1,
        }
    }
}

/// Devices in the order of their tickets, and everything around them.
pub(super) struct World {
    pub(super) script: Script,
    pub(super) terms: Terms,
    pub(super) policy: DevicePolicy,
    pub(super) plan: CohortPlan,
    pub(super) identities: Vec<Identity>,
    pub(super) devices: Vec<Device>,
    pub(super) vectors: Vec<RingVector>,
    pub(super) masked: Vec<Option<MaskedVector>>,
    pub(super) rng: ChaCha20Rng,
    pub(super) gathering: Option<Gathering>,
    /// Devices by place in the roster.
    pub(super) order: Vec<usize>,
}

pub(super) fn registrar() -> SigningKey {
    SigningKey::from_bytes(&[200; 32])
}

pub(super) fn terms(script: &Script, attempt: u32) -> Terms {
    let session = session(attempt, [6; 32]);
    let bits = RingBits::new(script.bits).unwrap();
    let Script { suite, dimension, .. } = *script;
    Terms { session, config_sha256: CONFIG, suite, bits, dimension }
}

/// The session of the same script with another model.
pub(super) fn other_model(script: &Script) -> SessionId {
    session(script.attempt, [66; 32])
}

const CONFIG: [u8; 32] = [5; 32];

fn session(attempt: u32, model_sha256: [u8; 32]) -> SessionId {
    SessionId::derive(&SessionParts {
        population: POPULATION,
        task: "lora",
        round: 3,
        attempt,
        model_sha256,
        config_sha256: CONFIG,
        server_nonce: [7; 32],
    })
}

pub(super) fn identity(number: u32) -> Identity {
    let mut seed = [9; 32];
    seed[..4].copy_from_slice(&number.to_le_bytes());
    let key = SigningKey::from_bytes(&seed);
    let certificate = Certificate::issue(&registrar(), POPULATION, key.verifying_key().to_bytes(), 10_000);
    Identity::new(key, certificate).unwrap()
}

impl World {
    /// All devices have advertised.
    pub(super) fn new(script: Script) -> Self {
        let terms = terms(&script, script.attempt);
        let mut rng = ChaCha20Rng::seed_from_u64(script.seed);
        let registrars = Registrars::Keys(vec![registrar().verifying_key()]);
        let floors = match script.degrees {
            // Degrees by hand are held to connectivity and 2t > k with nobody corrupted.
            Some(_) => Floors {
                corrupted_permille: 0,
                dropout_permille: 900,
                sparse_dropout_permille: 900,
                sigma: 1,
                full_graph_below: 0,
                ..Floors::default()
            },
            None => Floors::default(),
        };
        let policy = DevicePolicy { population: POPULATION.into(), registrars: registrars.clone(), floors };
        let plan = CohortPlan {
            members_max: 1000,
            survivors_min: 3,
            assumptions: Assumptions::new(100, 200, 40, 20).unwrap(),
            degrees: script.degrees,
        };
        let identities: Vec<Identity> = (0..script.members).map(identity).collect();
        let mut gathering = Gathering::new(terms, POPULATION, registrars);
        let advertise = |identity: &Identity| {
            let (device, advertisement) = Device::advertise(terms, identity, &mut rng);
            gathering.admit(advertisement, NOW).unwrap();
            device
        };
        let devices = identities.iter().map(advertise).collect();
        let vector = |_| {
            let value = |_| if script.zeros { 0 } else { rng.random() };
            RingVector::from_lanes(terms.bits, (0..script.dimension).map(value).collect())
        };
        let vectors = (0..script.members).map(vector).collect();
        let masked = (0..script.members).map(|_| None).collect();
        let gathering = Some(gathering);
        Self {
            script,
            terms,
            policy,
            plan,
            identities,
            devices,
            vectors,
            masked,
            rng,
            gathering,
            order: Vec::new(),
        }
    }

    /// Freezes the roster.
    pub(super) fn freeze(&mut self) -> Cohort {
        let gathering = self.gathering.take().expect("frozen once");
        let (mut cohorts, seats) = gathering.into_cohorts(&self.plan).expect("parameters fit");
        assert_eq!(cohorts.len(), 1);
        self.order = vec![0; seats.len()];
        for (ticket, seat) in seats.iter().enumerate() {
            self.order[seat.index as usize] = ticket;
        }
        cohorts.remove(0)
    }

    /// The device at a place of the roster.
    pub(super) fn device(&mut self, place: u32) -> &mut Device {
        &mut self.devices[self.order[place as usize]]
    }

    /// Places that are there at a step.
    pub(super) fn present(&self, step: usize) -> Vec<u32> {
        let lost = |place: &u32| self.script.dropouts[..=step].iter().any(|gone| gone.contains(place));
        (0..self.script.members).filter(|place| !lost(place)).collect()
    }

    /// The whole session; the error says where it ended.
    pub(super) fn run(&mut self) -> Result<Opened, String> {
        let mut cohort = self.freeze();
        self.share(&mut cohort)?;
        self.mask(&mut cohort)?;
        self.confirm(&mut cohort)?;
        self.reveal(&mut cohort)?;
        cohort.into_opening().run(self.script.threads).map_err(|error| error.to_string())
    }

    pub(super) fn share(&mut self, cohort: &mut Cohort) -> Result<(), String> {
        for place in self.present(0) {
            self.pass_through_record(place);
            let bundle = self.take_roster(cohort, place).map_err(|error| error.to_string())?;
            if self.present(1).contains(&place) {
                cohort.handle_shares(place, bundle).map_err(|error| error.to_string())?;
            }
        }
        cohort.close_step().map_err(|error| error.to_string())
    }

    pub(super) fn take_roster(
        &mut self,
        cohort: &Cohort,
        place: u32,
    ) -> Result<crate::ShareBundle, crate::Abort> {
        let (policy, view) = (self.policy.clone(), cohort.roster_view(place));
        let ticket = self.order[place as usize];
        self.devices[ticket].handle_roster(&view, &policy, NOW, &mut self.rng)
    }

    pub(super) fn mask(&mut self, cohort: &mut Cohort) -> Result<(), String> {
        for place in self.present(1) {
            self.pass_through_record(place);
            let forwarded = cohort.forwarded(place).ok_or("too late for the shares")?;
            let ticket = self.order[place as usize];
            let vector = self.vectors[ticket].clone();
            let masked = self.devices[ticket].handle_shares(&forwarded, vector).map_err(|e| e.to_string())?;
            if self.present(2).contains(&place) {
                let packed = masked.pack();
                cohort.handle_masked(place, [1; 32], &packed).map_err(|error| error.to_string())?;
                self.masked[ticket] = Some(masked);
            }
        }
        cohort.close_step().map_err(|error| error.to_string())
    }

    pub(super) fn confirm(&mut self, cohort: &mut Cohort) -> Result<(), String> {
        let (policy, survivors) = (self.policy.clone(), cohort.survivors().clone());
        for place in self.present(2) {
            self.pass_through_record(place);
            let ticket = self.order[place as usize];
            let device = &mut self.devices[ticket];
            let signed = device.handle_survivors(&survivors, &policy, &self.identities[ticket]);
            let signed = signed.map_err(|error| error.to_string())?;
            if self.present(3).contains(&place) {
                cohort.handle_confirmation(place, signed).map_err(|error| error.to_string())?;
            }
        }
        cohort.close_step().map_err(|error| error.to_string())
    }

    pub(super) fn reveal(&mut self, cohort: &mut Cohort) -> Result<(), String> {
        for place in self.present(3) {
            self.pass_through_record(place);
            let confirmations = cohort.confirmations(place).ok_or("too few confirmations")?;
            let reveal =
                self.device(place).handle_confirmations(&confirmations).map_err(|e| e.to_string())?;
            if self.present(4).contains(&place) {
                cohort.handle_reveal(place, reveal).map_err(|error| error.to_string())?;
            }
        }
        cohort.close_step().map_err(|error| error.to_string())
    }

    /// The sum of the survivors' vectors, and how many they are.
    pub(super) fn expected(&self) -> (RingVector, u32) {
        let mut sum = RingVector::zeros(self.terms.bits, self.terms.dimension);
        let survivors = self.present(2);
        for place in &survivors {
            sum.add_assign(&self.vectors[self.order[*place as usize]]).unwrap();
        }
        (sum, u32::try_from(survivors.len()).unwrap())
    }

    fn pass_through_record(&mut self, place: u32) {
        if self.script.through_records {
            let device = self.device(place);
            *device = Device::from_record(&device.to_record()).expect("its own record");
        }
    }
}
