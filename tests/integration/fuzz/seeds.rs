//! The seeds of the corpora: messages of a real session of four devices, and real documents.

use ed25519_dalek::SigningKey;
use fleetune_privacy::{
    Charge, ChargeId, ClipAdaptation, ClippingNorm, Delta, GridVariance, Ledger, Mechanism, NoiseCohort,
    PrivacyParameters, PrivacyPolicy, PrivacyStatement, Purpose as BudgetPurpose, RdpCurve, Scope,
    StatementParts,
};
use fleetune_proto::{
    AdapterPlan, AggregationPlan, AggregationProtocol, Digest, LoraShape, Name, Optimizer, PopulationPolicy,
    Purpose, ReleaseManifest, SecurePlan, TaskOffer, TaskPlan, TrainedShape, TrainingPlan, UnixMillis, seal,
    secure, wire,
};
use fleetune_secagg::{
    Assumptions, Certificate, CohortPlan, Device, DevicePolicy, Floors, Gathering, Identity, MaskSuite,
    Registrars, RingBits, RingVector, SessionId, SessionParts, Terms,
};
use prost::Message;
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use sha2::{Digest as _, Sha256};
use std::{fs, path::PathBuf};

pub(super) fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name)
}

pub(super) fn signing_key() -> SigningKey {
    SigningKey::from_bytes(&[1; 32])
}

/// Writes the seeds, and beside each its first half and nothing at all.
pub(super) fn write() {
    for (name, bytes) in all() {
        let folder = folder(name);
        fs::create_dir_all(&folder).expect("a folder for the corpus");
        let files = [("real.bin", &bytes[..]), ("half.bin", &bytes[..bytes.len() / 2]), ("empty.bin", &[])];
        for (file, bytes) in files {
            fs::write(folder.join(file), bytes).expect("a corpus file");
        }
    }
}

/// One real value a target.
pub(super) fn all() -> Vec<(&'static str, Vec<u8>)> {
    let bits = RingBits::new(12).expect("a width");
    let packed = RingVector::from_signed(bits, &[1, -2, 300, -400, 5]).pack();
    let mut seeds = session();
    seeds.extend(super::models::seeds());
    seeds.extend(super::families::seeds());
    seeds.extend([
        ("ring_vector", [vec![12, 5], packed].concat()),
        ("survivor_set", vec![12, 0b1010_0101, 0b1011]),
        ("task_plan", plan().to_bytes()),
        ("policy", policy().to_bytes()),
        ("manifest", manifest().to_bytes()),
        ("private_plan", private_plan().to_bytes()),
        ("ledger", ledger()),
        ("device_record", device_record()),
        ("statement", statement().into_bytes()),
        ("envelope", seal(Purpose::Plan, plan().to_bytes(), &[&signing_key()])),
    ]);
    seeds
}

/// The messages of one device in a session of four.
fn session() -> Vec<(&'static str, Vec<u8>)> {
    let mut rng = ChaCha20Rng::seed_from_u64(5);
    let registrars = Registrars::Keys(vec![signing_key().verifying_key()]);
    let policy = DevicePolicy {
        population: "roles".into(),
        registrars: registrars.clone(),
        floors: Floors::default(),
    };
    let terms = terms();
    let mut gathering = Gathering::new(terms, "roles", registrars);
    let mut devices = Vec::new();
    for number in 0..4u8 {
        let key = SigningKey::from_bytes(&[10 + number; 32]);
        let public = key.verifying_key().to_bytes();
        let certificate = Certificate::issue(&signing_key(), "roles", public, 1_000);
        let identity = Identity::new(key, certificate).expect("its own certificate");
        let (device, advertisement) = Device::advertise(terms, &identity, &mut rng);
        gathering.admit(advertisement, 0).expect("honest keys");
        devices.push((identity, device));
    }
    let assumptions = Assumptions::new(100, 200, 40, 20).expect("sound assumptions");
    let plan = CohortPlan { members_max: 10, survivors_min: 3, assumptions, degrees: None };
    let (mut cohorts, seats) = gathering.into_cohorts(&plan).expect("parameters that fit");
    let mut cohort = cohorts.remove(0);
    let (view, advertisement) = (cohort.roster_view(seats[0].index), devices[0].1.advertisement().clone());
    let mut first_bundle = None;
    for ((_, device), seat) in devices.iter_mut().zip(&seats) {
        let view = cohort.roster_view(seat.index);
        let bundle = device.handle_roster(&view, &policy, 0, &mut rng).expect("an honest roster");
        first_bundle.get_or_insert_with(|| bundle.clone());
        cohort.handle_shares(seat.index, bundle).expect("honest shares");
    }
    cohort.close_step().expect("nobody is lost");
    for ((_, device), seat) in devices.iter_mut().zip(&seats) {
        let shares = cohort.forwarded(seat.index).expect("shares");
        let masked = device.handle_shares(&shares, RingVector::zeros(terms.bits, 3)).expect("a vector");
        cohort.handle_masked(seat.index, [0; 32], &masked.pack()).expect("its size");
    }
    cohort.close_step().expect("nobody is lost");
    let survivors = cohort.survivors().clone();
    for ((identity, device), seat) in devices.iter_mut().zip(&seats) {
        let signed = device.handle_survivors(&survivors, &policy, identity).expect("all survive");
        cohort.handle_confirmation(seat.index, signed).expect("its signature");
    }
    cohort.close_step().expect("nobody is lost");
    let record = devices[0].1.to_record().to_vec();
    let confirmations = cohort.confirmations(seats[0].index).expect("enough of them");
    let reveal = devices[0].1.handle_confirmations(&confirmations).expect("a reveal");
    let token = vec![7; 32];
    let bundle = first_bundle.expect("four devices shared");
    let share_keys = wire::ShareKeysRequest {
        session_token: token.clone(),
        commitment: bundle.commitment.to_vec(),
        shares: secure::shares_to_wire(&bundle.shares),
    };
    let keys = Some(secure::advertisement_to_wire(&advertisement));
    let advertise = wire::AdvertiseKeysRequest { session_token: token.clone(), keys };
    let shares = secure::reveal_to_wire(&reveal);
    vec![
        ("certificate", advertisement.certificate.to_bytes().to_vec()),
        ("session_record", record),
        ("advertise_keys", advertise.encode_to_vec()),
        ("roster", secure::roster_to_wire(&view).encode_to_vec()),
        ("share_keys", share_keys.encode_to_vec()),
        ("confirmations", secure::confirmations_to_wire(&confirmations).encode_to_vec()),
        ("reveal_shares", wire::RevealSharesRequest { session_token: token, shares }.encode_to_vec()),
    ]
}

fn terms() -> Terms {
    let session = SessionId::derive(&SessionParts {
        population: "roles",
        task: "lora",
        round: 1,
        attempt: 0,
        model_sha256: [2; 32],
        config_sha256: [3; 32],
        server_nonce: [4; 32],
    });
    let bits = RingBits::new(20).expect("a width");
    Terms { session, config_sha256: [3; 32], suite: MaskSuite::Aes128Ctr, bits, dimension: 3 }
}

fn name(text: &str) -> Name {
    Name::parse("name", text).expect("a name")
}

fn plan() -> TaskPlan {
    TaskPlan {
        population: name("roles"),
        task: name("lora"),
        base_model: Digest::of(b"base"),
        adapter: AdapterPlan {
            shape: TrainedShape::Lora(LoraShape {
                rank: 8,
                alpha: 16.0,
                targets: vec!["q".into(), "v".into()],
                freeze_a: false,
                init_seed: 7,
            }),
            layout_sha256: [3; 32],
            dimension: 4,
        },
        training: TrainingPlan {
            steps: 4,
            batch_size: 2,
            block_tokens: 64,
            learning_rate: 1e-3,
            learning_rate_final_fraction: 0.5,
            gradient_clip: Some(1.0),
            optimizer: Optimizer::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 },
            examples_min: 1,
        },
        aggregation: AggregationPlan {
            protocol: AggregationProtocol::SecaggPlus,
            clipping_norm: ClippingNorm::new(10.0).expect("a norm"),
            ring_bits: RingBits::new(32).expect("a width"),
            summands_max: 16,
            summands_min: 3,
            privacy: None,
            secure: Some(SecurePlan {
                mask_suite: MaskSuite::Aes128Ctr,
                cohort_max: 100,
                assumptions: Assumptions::new(100, 200, 80, 20).expect("sound assumptions"),
            }),
        },
        rounds: 3,
        expires: UnixMillis(1_000_000),
    }
}

fn private_plan() -> TaskPlan {
    let norm = |value| ClippingNorm::new(value).expect("a norm");
    let variance = |value| GridVariance::at_least(value).expect("a variance");
    let norms = (norm(0.1), norm(10.0));
    let mut plan = plan();
    plan.aggregation.summands_min = 14;
    plan.aggregation.privacy = Some(PrivacyParameters {
        mechanism: Mechanism::Skellam,
        clip_units: 64,
        variance: variance(4000.0),
        honest_survivors_min: 4,
        colluders_max: 10,
        participations_max: 3,
        separation_ms: 1000,
        separation_rounds: 1,
        delta: Delta::new(1e-6).expect("a probability"),
        adaptation: Some(ClipAdaptation::new(0.5, 0.2, norms, variance(40_000.0)).expect("sound")),
        noise_cohort: Some(NoiseCohort { cohort: 1000, population: 1_000_000 }),
    });
    plan
}

/// Without its checksum, which the target adds.
fn ledger() -> Vec<u8> {
    let charge = Charge {
        scope: Scope::of_task("roles", "lora"),
        purpose: BudgetPurpose::Training,
        id: ChargeId::Fresh([7; 32]),
        round: 2,
        curve: RdpCurve::from_fn(|order| 0.05 * f64::from(order)),
        participations_max: 3,
        separation_ms: 1000,
        separation_rounds: 1,
    };
    let mut ledger = Ledger::default();
    ledger.charge(&charge, &PrivacyPolicy::default(), 5000).expect("within budget");
    let bytes = ledger.to_bytes();
    bytes[..bytes.len() - 32].to_vec()
}

/// A record with nothing but a ledger: the one field of a device that has finished its session.
fn device_record() -> Vec<u8> {
    let body = ledger();
    let bytes = [body.as_slice(), Sha256::digest(&body).as_slice()].concat();
    let mut record = vec![3 << 3 | 2];
    prost::encode_length_delimiter(bytes.len(), &mut record).expect("room");
    [record, bytes].concat()
}

fn statement() -> String {
    let parts = StatementParts {
        population: "roles",
        task: "lora",
        rounds: 3,
        aggregation: "secagg+",
        survivors_min: 14,
        summands_max: 16,
    };
    PrivacyStatement::new(&parts, None).to_json()
}

fn policy() -> PopulationPolicy {
    let offer = TaskOffer { task: name("lora"), examples_min: 1, protocol: AggregationProtocol::SecaggPlus };
    PopulationPolicy { population: name("roles"), tasks: vec![offer] }
}

fn manifest() -> ReleaseManifest {
    ReleaseManifest {
        population: name("roles"),
        version: 3,
        task: name("lora"),
        base_model: Digest::of(b"base"),
        adapter: Some(Digest::of(b"adapter")),
        rounds: 3,
        created: UnixMillis(1),
        expires: UnixMillis(1_000_000),
        privacy_statement: "none".into(),
        privacy_statement_json: "{}".into(),
    }
}
