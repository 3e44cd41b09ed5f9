//! Noise through the real secure aggregation: what is opened is the sum, plus as much noise as the plan says for
//! every number of survivors, and with fewer it is not opened at all.

use ed25519_dalek::SigningKey;
use fleetune_privacy::{ClippingNorm, Delta, Mechanism, NoiseOrigin, PrivacyPlan, PrivacyTarget};
use fleetune_secagg::{
    Abort, Assumptions, Certificate, CohortFailure, CohortPlan, Degrees, Device, DevicePolicy, Floors,
    Gathering, Identity, MaskSuite, Registrars, RingBits, RingVector, SessionId, SessionParts, SurvivorSet,
    Terms,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

const POPULATION: &str = "test";
const DEVICES: usize = 10;
const SURVIVORS_MIN: u32 = 7;
const DIMENSION: usize = 16_000;

fn plan() -> PrivacyPlan {
    let target = PrivacyTarget {
        mechanism: Mechanism::Skellam,
        epsilon: 8.0,
        delta: Delta::new(1e-6).expect("a probability"),
        dimension: DIMENSION,
        honest_survivors_min: SURVIVORS_MIN,
        colluders_max: 0,
        participations_max: 2,
        separation_ms: 0,
        separation_rounds: 0,
        clip_units: None,
        adaptation: None,
    };
    target.plan().expect("a plan")
}

fn update(device: usize) -> Vec<f32> {
    (0..DIMENSION).map(|at| ((at * 7 + device * 13) % 29) as f32 * 1e-4 - 1.4e-3).collect()
}

/// What `survivors` of ten devices give: their mean without noise, and what the coordinator opened; or the
/// device's refusal.
fn session(plan: &PrivacyPlan, survivors: usize) -> Result<(Vec<f64>, Vec<f32>), Abort> {
    let mut rng = ChaCha20Rng::seed_from_u64(survivors as u64);
    let registrar = SigningKey::from_bytes(&rng.random());
    let registrars = Registrars::Keys(vec![registrar.verifying_key()]);
    let bits = plan.ring_bits_min(10).expect("a ring");
    let terms = terms(RingBits::new(bits).expect("a width"), plan.vector_len());
    let floors = Floors { cohort_min: 3, survivors_min: SURVIVORS_MIN, ..Floors::default() };
    let policy = DevicePolicy { population: POPULATION.into(), registrars: registrars.clone(), floors };
    let mut gathering = Gathering::new(terms, POPULATION, registrars);
    let mut devices = Vec::new();
    for _ in 0..DEVICES {
        let key = SigningKey::from_bytes(&rng.random());
        let public = key.verifying_key().to_bytes();
        let certificate = Certificate::issue(&registrar, POPULATION, public, u64::MAX);
        let identity = Identity::new(key, certificate).expect("its own certificate");
        let (device, advertisement) = Device::advertise(terms, &identity, &mut rng);
        let place = gathering.admit(advertisement, 0).expect("a place");
        devices.push((device, identity, place));
    }
    // The coordinator itself would open a smaller sum: it is the devices that do not let it.
    let assumptions = Assumptions::new(100, 300, 40, 20).expect("assumptions");
    let degrees = Some(Degrees { degree: 9, threshold: 6 });
    let cohort_plan = CohortPlan { members_max: 10, survivors_min: 2, assumptions, degrees };
    let (mut cohorts, seats) = gathering.into_cohorts(&cohort_plan).expect("degrees");
    let mut cohort = cohorts.pop().expect("one cohort");
    for (device, _, place) in &mut devices {
        *place = seats[*place as usize].index;
        let bundle = device.handle_roster(&cohort.roster_view(*place), &policy, 0, &mut rng)?;
        cohort.handle_shares(*place, bundle).expect("taken");
    }
    cohort.close_step().expect("all shared");
    let norm = ClippingNorm::new(1.0).expect("a norm");
    let mut exact = vec![0f64; DIMENSION];
    for (number, (device, _, place)) in devices.iter_mut().enumerate().take(survivors) {
        exact.iter_mut().zip(update(number)).for_each(|(e, u)| *e += f64::from(u) / survivors as f64);
        let noised = plan.encode(update(number), norm, b"round", &NoiseOrigin::operating_system(), b"");
        let vector = RingVector::from_signed(terms.bits, noised.expect("entropy").values());
        let shares = cohort.forwarded(*place).expect("shares");
        let masked = device.handle_shares(&shares, vector)?;
        cohort.handle_masked(*place, [number as u8; 32], &masked.pack()).expect("added");
    }
    let named = match cohort.close_step() {
        Ok(()) => cohort.survivors().clone(),
        // The shipped coordinator gives up. One that lies names the few survivors all the same.
        Err(CohortFailure::TooFew { .. }) => {
            let places: Vec<u32> = devices.iter().take(survivors).map(|(_, _, place)| *place).collect();
            let mut bitmap = [0u8; 2];
            places.iter().for_each(|place| bitmap[*place as usize / 8] |= 1 << (place % 8));
            SurvivorSet::from_bytes(DEVICES as u32, &bitmap).expect("ten bits")
        }
    };
    for (device, identity, place) in devices.iter_mut().take(survivors) {
        let confirmation = device.handle_survivors(&named, &policy, identity)?;
        cohort.handle_confirmation(*place, confirmation).expect("taken");
    }
    cohort.close_step().expect("all confirmed");
    for (device, _, place) in devices.iter_mut().take(survivors) {
        let reveal = device.handle_confirmations(&cohort.confirmations(*place).expect("confirmations"))?;
        cohort.handle_reveal(*place, reveal).expect("taken");
    }
    let opened = cohort.into_opening().run(2).expect("enough shares");
    let contributions = opened.survivors;
    Ok((exact, plan.decode_mean(&opened.sum.to_signed(), contributions, norm, b"round").mean))
}

fn terms(bits: RingBits, dimension: usize) -> Terms {
    let session = SessionId::derive(&SessionParts {
        population: POPULATION,
        task: "privacy",
        round: 0,
        attempt: 0,
        model_sha256: [0; 32],
        config_sha256: [0; 32],
        server_nonce: [0; 32],
    });
    Terms { session, config_sha256: [0; 32], suite: MaskSuite::Aes128Ctr, bits, dimension }
}

#[test]
fn an_opened_sum_carries_the_noise_of_its_survivors() {
    let plan = plan();
    let variance = plan.parameters().variance.value();
    for survivors in SURVIVORS_MIN as usize..=DEVICES {
        let (exact, opened) = session(&plan, survivors).expect("opened");
        let unit = 1.0 / f64::from(plan.bound().clip_units());
        let count = survivors as f64;
        // The mean's: a device's noise and at most a quarter of rounding, each over the count.
        let (least, most) = (variance / count * unit * unit, (variance + 0.25) / count * unit * unit);
        let errors = opened.iter().zip(&exact).map(|(o, e)| f64::from(*o) - e);
        let found = errors.clone().map(|error| error * error).sum::<f64>() / DIMENSION as f64;
        let spread = 5.0 * (2.0 / DIMENSION as f64).sqrt();
        assert!(found > least * (1.0 - spread) && found < most * (1.0 + spread), "{survivors}: {found:e}");
        let bias = errors.sum::<f64>() / DIMENSION as f64;
        assert!(bias.abs() < 5.0 * (most / DIMENSION as f64).sqrt(), "{survivors}: bias {bias:e}");
        let counted = plan.sum_curve(survivors as u32).expect("a sum").rho();
        assert!(counted <= plan.participation_rho() * (1.0 + 1e-12), "never below the guarantee");
    }
}

#[test]
fn fewer_survivors_than_the_noise_was_made_for_are_never_opened() {
    let plan = plan();
    // Six shares would be enough to rebuild every secret; the devices do not give them.
    let refusal = session(&plan, SURVIVORS_MIN as usize - 1).expect_err("no sum");
    assert!(matches!(refusal, Abort::TooFewSurvivors { .. }), "{refusal}");
}
