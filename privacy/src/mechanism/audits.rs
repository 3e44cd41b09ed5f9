//! Attacks on the shipped mechanism, and on mechanisms that were broken on purpose. What an attack finds is a
//! lower bound on epsilon: for the true mechanism it must stay below the claim, for a broken one it must rise
//! above it, or the attack would prove nothing.

use super::*;
use crate::audit::{clopper_pearson, one_run};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

const DEVICES: u32 = 4;
const CONFIDENCE: f64 = 0.99;

/// A round of four devices whose claim is taken at face value.
#[derive(Clone, Copy)]
struct Audited {
    /// What the accountant is told.
    claimed: PrivacyParameters,
    /// What the devices do.
    done: PrivacyParameters,
    /// Devices that add their noise.
    noisy: u32,
}

fn honest(variance: f64) -> Audited {
    let claimed = PrivacyParameters {
        mechanism: Mechanism::Skellam,
        clip_units: 64,
        variance: GridVariance::at_least(variance).unwrap(),
        honest_survivors_min: DEVICES,
        colluders_max: 0,
        participations_max: 1,
        separation_ms: 0,
        separation_rounds: 0,
        delta: Delta::new(1e-5).unwrap(),
        adaptation: None,
        noise_cohort: None,
    };
    Audited { claimed, done: claimed, noisy: DEVICES }
}

impl Audited {
    fn claim(&self, dimension: usize) -> f64 {
        let plan = PrivacyPlan::new(self.claimed, dimension).unwrap();
        plan.task_curve().epsilon(self.claimed.delta).0
    }

    /// What the coordinator opens, in units of the claimed grid, if a target device sends `update` and the
    /// others zeros.
    fn opened(&self, update: Vec<f32>, rng: &mut ChaCha20Rng) -> Vec<f32> {
        let dimension = update.len();
        let plan = PrivacyPlan::new(self.done, dimension).unwrap();
        let norm = ClippingNorm::new(1.0).unwrap();
        let origin = NoiseOrigin::simulated(rng.random());
        let mut sum = vec![0i32; plan.vector_len()];
        for device in 0..self.noisy {
            let own = if device == 0 { update.clone() } else { vec![0.0; dimension] };
            let vector = plan.encode(own, norm, b"audit", &origin, &device.to_le_bytes()).unwrap();
            sum.iter_mut().zip(vector.values()).for_each(|(s, v)| *s = s.wrapping_add(*v));
        }
        plan.decode_mean(&sum, 1, norm, b"audit").mean
    }

    /// Independent runs with and without the target (Clopper-Pearson).
    fn by_trials(&self, trials: usize) -> f64 {
        let (dimension, mut rng) = (16, ChaCha20Rng::seed_from_u64(11));
        let mut canary = vec![0f32; dimension];
        canary[0] = 1.0;
        let mut scores = |update: &Vec<f32>| -> Vec<f64> {
            (0..trials).map(|_| f64::from(self.opened(update.clone(), &mut rng)[0])).collect()
        };
        let (with, without) = (scores(&canary), scores(&vec![0.0; dimension]));
        clopper_pearson(&with, &without, self.claimed.delta.value(), CONFIDENCE)
    }

    /// One run with many canaries, each in by a coin (Steinke, Nasr and Jagielski 2023): orthogonal directions,
    /// one a round, whose sums are looked at together.
    fn by_one_run(&self, canaries: usize) -> f64 {
        let (dimension, mut rng) = (16, ChaCha20Rng::seed_from_u64(12));
        let (mut inside, mut outside) = (Vec::new(), Vec::new());
        for at in 0..canaries {
            let mut update = vec![0f32; dimension];
            let taken: bool = rng.random();
            update[at % dimension] = f32::from(u8::from(taken));
            let score = f64::from(self.opened(update, &mut rng)[at % dimension]);
            // Integers tie; a tie is broken by chance.
            let score = score + 1e-9 * rng.random::<f64>();
            if taken { inside.push(score) } else { outside.push(score) }
        }
        one_run(&inside, &outside, self.claimed.delta.value(), CONFIDENCE)
    }
}

/// Four shares of it have twice the sensitivity for a standard deviation: epsilon about 2.
const VARIANCE: f64 = 64.0 * 64.0;

#[test]
fn the_mechanism_gives_away_no_more_than_it_claims() {
    let audited = honest(VARIANCE);
    let claim = audited.claim(16);
    assert!(claim > 1.9 && claim < 2.6, "{claim}");
    let trials = audited.by_trials(10_000);
    assert!(trials > 0.4 && trials < claim, "{trials} of {claim}");
    let one_run = audited.by_one_run(10_000);
    assert!(one_run > 0.3 && one_run < claim, "{one_run} of {claim}");
}

#[test]
fn broken_noise_is_found_out() {
    let mut weak = honest(VARIANCE);
    weak.done.variance = GridVariance::at_least(VARIANCE / 16.0).unwrap();
    assert!(weak.by_trials(10_000) > weak.claim(16), "a quarter of the noise");
    assert!(weak.by_one_run(10_000) > weak.claim(16), "a quarter of the noise, in one run");
    let mut lonely = honest(VARIANCE);
    (lonely.claimed.honest_survivors_min, lonely.claimed.variance) =
        (64, GridVariance::at_least(VARIANCE / 16.0).unwrap());
    (lonely.done, lonely.noisy) = (lonely.claimed, 4);
    assert!(lonely.by_trials(10_000) > lonely.claim(16), "shares of noise that never came");
}

#[test]
fn an_update_that_is_not_clipped_is_found_out() {
    let mut long = honest(VARIANCE);
    // Four times the units that the accountant was told of: the same as four times the norm.
    long.done.clip_units *= 4;
    assert!(long.by_trials(10_000) > long.claim(16));
}
