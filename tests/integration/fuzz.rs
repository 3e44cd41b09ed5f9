//! Every decoder of secure aggregation, of the signed documents and of model and adapter files, fed what nobody
//! should send. Each target replays its corpus (`tests/fuzz/corpus/<target>/`) and then mutants of it; none may
//! panic, and what decodes must decode to the same again once it is encoded.
//!
//! `FLEETUNE_FUZZ_EXECUTIONS` sets the mutants a target (2,000 if not given) and `FLEETUNE_FUZZ_TARGET` the one
//! target to run (all if not given); `FLEETUNE_UPDATE_GOLDEN=1` writes the corpus anew. A failure names the target
//! and the input.

mod families;
mod models;
mod seeds;

use fleetune_privacy::{Ledger, PrivacyPolicy, PrivacyStatement, spent_epsilon};
use fleetune_proto::device::DeviceRecord;
use fleetune_proto::{PopulationPolicy, Purpose, ReleaseManifest, TaskPlan, TrustRoot, secure, wire};
use fleetune_secagg::{Certificate, Device, RingBits, RingVector, SurvivorSet};
use prost::Message;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};
use std::{fs, panic, path::PathBuf};

type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 17] = [
    ("ring_vector", ring_vector),
    ("certificate", certificate),
    ("survivor_set", survivor_set),
    ("session_record", session_record),
    ("advertise_keys", advertise_keys),
    ("roster", roster),
    ("share_keys", share_keys),
    ("confirmations", confirmations),
    ("reveal_shares", reveal_shares),
    ("task_plan", task_plan),
    ("policy", policy),
    ("manifest", manifest),
    ("envelope", envelope),
    ("private_plan", private_plan),
    ("ledger", ledger),
    ("device_record", device_record),
    ("statement", statement),
];

#[test]
fn no_bytes_make_a_decoder_panic() {
    let executions: u64 = std::env::var("FLEETUNE_FUZZ_EXECUTIONS")
        .ok()
        .map_or(2_000, |count| count.parse().expect("FLEETUNE_FUZZ_EXECUTIONS is a number"));
    if std::env::var_os("FLEETUNE_UPDATE_GOLDEN").is_some() {
        seeds::write();
    }
    let only = std::env::var("FLEETUNE_FUZZ_TARGET").ok();
    let targets = TARGETS.into_iter().chain(models::TARGETS).chain(families::TARGETS);
    let chosen: Vec<Target> =
        targets.filter(|(name, _)| only.as_ref().is_none_or(|only| only == name)).collect();
    assert!(!chosen.is_empty(), "FLEETUNE_FUZZ_TARGET is {only:?}");
    for (name, target) in chosen {
        let corpus = corpus(name);
        assert!(!corpus.is_empty(), "{name} has a corpus");
        corpus.iter().for_each(|input| run(name, target, input));
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..executions {
            run(name, target, &mutant(&corpus, &mut rng));
        }
    }
}

/// The seeds are real messages: each decodes to something.
#[test]
fn the_corpus_is_of_this_version() {
    for (name, bytes) in seeds::all() {
        let file = seeds::folder(name).join("real.bin");
        assert_eq!(
            fs::read(&file).ok(),
            Some(bytes),
            "{}: run with FLEETUNE_UPDATE_GOLDEN=1",
            file.display()
        );
    }
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> = fs::read_dir(seeds::folder(name))
        .map(|entries| entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect())
        .unwrap_or_default();
    files.sort();
    files.iter().map(|file| fs::read(file).expect("a readable corpus")).collect()
}

fn run(name: &str, target: fn(&[u8]), input: &[u8]) {
    if panic::catch_unwind(|| target(input)).is_err() {
        panic!("target {name} panicked on {}", hex::encode(input));
    }
}

/// A corpus entry with a few of: a flipped bit, a changed, lost or added stretch, another entry's end.
fn mutant(corpus: &[Vec<u8>], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = corpus[rng.random_range(0..corpus.len())].clone();
    for _ in 0..rng.random_range(1..=4) {
        let at = rng.random_range(0..=bytes.len());
        match rng.random_range(0..6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][rng.random_range(0..5)],
            2 => bytes.truncate(at),
            3 => {
                let added: Vec<u8> = (0..rng.random_range(1..40)).map(|_| rng.random()).collect();
                bytes.splice(at..at, added);
            }
            4 => {
                let end = bytes.len().min(at + rng.random_range(0..40));
                bytes.drain(at..end);
            }
            _ => {
                let other = &corpus[rng.random_range(0..corpus.len())];
                bytes.truncate(at);
                bytes.extend_from_slice(&other[at.min(other.len())..]);
            }
        }
    }
    bytes
}

fn ring_vector(input: &[u8]) {
    let [bits, dimension, packed @ ..] = input else { return };
    let Ok(bits) = RingBits::new(u32::from(*bits)) else { return };
    let dimension = usize::from(*dimension);
    let Ok(vector) = RingVector::unpack(bits, dimension, packed) else {
        assert!(RingVector::zeros(bits, dimension).add_packed(packed).is_err());
        return;
    };
    assert_eq!(vector.pack(), packed, "a vector has one encoding");
    let mut sum = RingVector::zeros(bits, dimension);
    sum.add_packed(packed).expect("what unpacks can be added");
    assert_eq!(sum, vector);
}

fn certificate(input: &[u8]) {
    if let Some(certificate) = Certificate::from_bytes(input) {
        assert_eq!(certificate.to_bytes(), input);
    }
}

fn survivor_set(input: &[u8]) {
    let [members, bitmap @ ..] = input else { return };
    if let Ok(set) = SurvivorSet::from_bytes(u32::from(*members), bitmap) {
        assert_eq!(set.as_bytes(), bitmap);
        assert!(set.count() <= u32::from(*members));
    }
}

fn session_record(input: &[u8]) {
    if let Ok(device) = Device::from_record(input) {
        assert_eq!(device.to_record().as_slice(), input);
    }
}

fn advertise_keys(input: &[u8]) {
    let Ok(request) = wire::AdvertiseKeysRequest::decode(input) else { return };
    if let Ok(advertisement) = secure::parse_advertisement(request.keys) {
        let again = secure::parse_advertisement(Some(secure::advertisement_to_wire(&advertisement)));
        assert_eq!(again.ok(), Some(advertisement));
    }
}

fn roster(input: &[u8]) {
    let Ok(roster) = wire::Roster::decode(input) else { return };
    if let Ok(view) = secure::parse_roster(roster) {
        assert_eq!(secure::parse_roster(secure::roster_to_wire(&view)).ok(), Some(view));
    }
}

fn share_keys(input: &[u8]) {
    let Ok(request) = wire::ShareKeysRequest::decode(input) else { return };
    if let Ok(bundle) = secure::parse_bundle(&request) {
        assert_eq!(secure::parse_shares(&secure::shares_to_wire(&bundle.shares)).ok(), Some(bundle.shares));
    }
}

fn confirmations(input: &[u8]) {
    let Ok(confirmations) = wire::Confirmations::decode(input) else { return };
    if let Ok(parsed) = secure::parse_confirmations(&confirmations) {
        assert_eq!(secure::parse_confirmations(&secure::confirmations_to_wire(&parsed)).ok(), Some(parsed));
    }
}

fn reveal_shares(input: &[u8]) {
    let Ok(request) = wire::RevealSharesRequest::decode(input) else { return };
    if let Ok(reveal) = secure::parse_reveal(&request.shares) {
        let again = secure::parse_reveal(&secure::reveal_to_wire(&reveal));
        assert!(again.is_ok_and(|again| again == reveal));
    }
}

fn task_plan(input: &[u8]) {
    if let Ok(plan) = TaskPlan::parse(input) {
        assert_eq!(TaskPlan::parse(&plan.to_bytes()).ok(), Some(plan));
    }
}

/// A plan that a device accepts must not stop it later: all that follows from it is worked out.
fn private_plan(input: &[u8]) {
    let Ok(plan) = TaskPlan::parse(input) else { return };
    let Some(privacy) = plan.privacy_plan() else { return };
    let (epsilon, _) = privacy.task_curve().epsilon(privacy.parameters().delta);
    assert!(!epsilon.is_nan() && !privacy.participation_rho().is_nan());
    assert!(privacy.bound().squared() > 0 && plan.vector_len() >= plan.adapter.dimension);
    let _ = (PrivacyPolicy::default().check_plan(Some(&privacy)), privacy.local_curve());
}

/// Bodies with a checksum that fits: what an attacker on the disk would write.
fn ledger(input: &[u8]) {
    let bytes = [input, Sha256::digest(input).as_slice()].concat();
    let Some(ledger) = Ledger::from_bytes(&bytes) else { return };
    assert_eq!(ledger.to_bytes(), bytes);
    assert!(!spent_epsilon(&ledger.spent_in_all(), PrivacyPolicy::default().delta).is_nan());
}

/// The checksum is what an attacker on the disk would write.
fn device_record(input: &[u8]) {
    let bytes = [Sha256::digest(input).as_slice(), input].concat();
    let _ = DeviceRecord::from_bytes(bytes).ledger();
}

fn statement(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(statement) = PrivacyStatement::from_json(text) {
        assert!(!statement.words().is_empty());
    }
}

fn policy(input: &[u8]) {
    if let Ok(policy) = PopulationPolicy::parse(input) {
        assert_eq!(PopulationPolicy::parse(&policy.to_bytes()).ok(), Some(policy));
    }
}

fn manifest(input: &[u8]) {
    if let Ok(manifest) = ReleaseManifest::parse(input) {
        assert_eq!(ReleaseManifest::parse(&manifest.to_bytes()).ok(), Some(manifest));
    }
}

fn envelope(input: &[u8]) {
    let root = TrustRoot::new(&[seeds::signing_key().verifying_key().to_bytes()], 1).expect("a sound key");
    let _ = root.open(Purpose::Plan, input);
}
