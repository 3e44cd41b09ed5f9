//! The whole road of one contribution, and what a sum of them is worth.

use super::*;
use crate::account::known::value;

fn parameters(units: u32, variance: f64) -> PrivacyParameters {
    PrivacyParameters {
        mechanism: Mechanism::Skellam,
        clip_units: units,
        variance: GridVariance::at_least(variance).unwrap(),
        honest_survivors_min: 4,
        colluders_max: 0,
        participations_max: 3,
        separation_ms: 0,
        separation_rounds: 1,
        delta: Delta::new(1e-6).unwrap(),
        adaptation: None,
        noise_cohort: None,
    }
}

fn adaptation() -> ClipAdaptation {
    let norm = |value| ClippingNorm::new(value).unwrap();
    let variance = GridVariance::at_least(100.0).unwrap();
    ClipAdaptation::new(0.5, 0.2, (norm(0.1), norm(10.0)), variance).unwrap()
}

fn origin(seed: u8) -> NoiseOrigin {
    NoiseOrigin::simulated([seed; 32])
}

fn add(sum: &mut [i32], vector: &NoisedVector) {
    sum.iter_mut().zip(vector.values()).for_each(|(s, v)| *s = s.wrapping_add(*v));
}

#[test]
fn the_mean_of_many_is_their_mean_and_noise_of_the_stated_size() {
    let norm = ClippingNorm::new(2.0).unwrap();
    let plan = PrivacyPlan::new(
        PrivacyParameters { adaptation: Some(adaptation()), ..parameters(1000, 900.0) },
        5000,
    )
    .unwrap();
    let (mut sum, mut exact, n) = (vec![0i32; plan.vector_len()], vec![0f64; 5000], 40u8);
    for device in 0..n {
        let delta: Vec<f32> =
            (0..5000).map(|i| ((i * 7 + usize::from(device) * 13) % 11) as f32 * 1e-3).collect();
        exact.iter_mut().zip(&delta).for_each(|(e, d)| *e += f64::from(*d) / f64::from(n));
        add(&mut sum, &plan.encode(delta, norm, b"round", &origin(device), b"").unwrap());
    }
    let decoded = plan.decode_mean(&sum, u32::from(n), norm, b"round");
    let error =
        decoded.mean.iter().zip(&exact).map(|(m, e)| (f64::from(*m) - e).powi(2)).sum::<f64>() / 5000.0;
    // A mean's variance: (v + rounding's at most 1/4) / n, in units of C / c.
    let unit = 2.0 / 1000.0;
    let (least, most) = (900.0 / f64::from(n) * unit * unit, 900.25 / f64::from(n) * unit * unit);
    assert!(error > 0.9 * least && error < 1.1 * most, "{error:e} for {least:e} to {most:e}");
    let unclipped = decoded.unclipped.unwrap();
    assert!(unclipped > 0.9, "{unclipped}: no update is as long as 2");
}

#[test]
fn an_update_that_is_no_number_takes_part_as_zero() {
    let norm = ClippingNorm::new(1.0).unwrap();
    let plan = PrivacyPlan::new(parameters(100, 4.0), 64).unwrap();
    let hostile = plan.encode(vec![f32::NAN; 64], norm, b"r", &origin(1), b"").unwrap();
    let zero = plan.encode(vec![0.0; 64], norm, b"r", &origin(1), b"").unwrap();
    assert!(hostile == zero && hostile.values().iter().any(|v| *v != 0));
}

/// What one device adds, less its noise, is never longer than the sensitivity, whatever its update. Here the
/// noise is known because its seed is.
#[test]
fn a_contribution_is_within_the_sensitivity() {
    let norm = ClippingNorm::new(1.0).unwrap();
    let plan = PrivacyPlan::new(parameters(300, 2.0), 1000).unwrap();
    for (seed, size) in (0..).zip([0.0, 1e-3, 1.0, 1e3, 1e30]) {
        let delta = (0..1000).map(|i| size * ((i % 17) as f32 - 8.0)).collect();
        let clipped = ClippedDelta::clip_or_zero(delta, norm);
        let mut source = origin(seed).source(b"").unwrap();
        let bounded = plan.bound.round(plan.rotate(&clipped, b"r").0, &mut source);
        let squared: i64 = bounded.values().iter().map(|v| i64::from(*v).pow(2)).sum();
        assert!(squared.unsigned_abs() <= plan.bound.squared());
    }
}

#[test]
fn curves_follow_the_noise_that_is_there() {
    let plan = PrivacyPlan::new(parameters(500, 400.0), 65_536).unwrap();
    let epsilon = |curve: &RdpCurve| curve.epsilon(plan.parameters.delta).0;
    let (worst, more) = (plan.participation_curve(), plan.sum_curve(8).unwrap());
    assert!(epsilon(&worst) > epsilon(&more), "more survivors, more noise");
    assert!(epsilon(&plan.local_curve()) > epsilon(&worst), "alone a device has only its own noise");
    assert!((plan.task_curve().values()[0] - 3.0 * worst.values()[0]).abs() < 1e-12 * worst.values()[0]);
    let rho = plan.participation_rho();
    let expected = plan.bound.l2().powi(2) / (2.0 * 1600.0);
    assert!(rho >= expected && rho < 1.01 * expected);
    let with_bit = PrivacyParameters { adaptation: Some(adaptation()), ..plan.parameters };
    let with_bit = PrivacyPlan::new(with_bit, 65_536).unwrap();
    assert!(epsilon(&with_bit.participation_curve()) > epsilon(&worst), "the bit is paid for");
    assert!(plan.sampler_delta(8.0, 1000) < 1e-20);
}

#[test]
fn parameters_that_protect_nobody_are_refused() {
    let bad = |change: fn(&mut PrivacyParameters)| {
        let mut p = parameters(100, 4.0);
        change(&mut p);
        PrivacyPlan::new(p, 64).err().expect("refused").to_string()
    };
    assert!(bad(|p| p.honest_survivors_min = 0).contains("honest survivors"));
    assert!(bad(|p| p.participations_max = 0).contains("participations"));
    assert!(bad(|p| p.clip_units = 0).contains("clipping norm"));
    assert!(bad(|p| p.mechanism = Mechanism::DiscreteGaussian).contains("local sigma is 2"));
}

#[test]
fn rings_are_as_narrow_as_the_bound_allows() {
    let plan = PrivacyPlan::new(parameters(2048, 250.0 * 250.0), 1 << 18).unwrap();
    let bits = plan.ring_bits_min(100).unwrap();
    assert!((14..=20).contains(&bits), "{bits}");
    assert!(plan.ln_wraparound(bits - 1, 100) > plan.ln_wraparound(bits, 100));
    assert_eq!(plan.ln_wraparound(32, 100), f64::NEG_INFINITY);
    let wide = PrivacyPlan::new(parameters(1 << 22, 250.0), 1 << 10).unwrap();
    assert!(wide.ring_bits_min(1_000_000).is_err());
}

/// The bound against sums that are made to wrap: everybody sends the same, worst, update.
#[test]
fn sums_wrap_no_more_often_than_the_bound_says() {
    let norm = ClippingNorm::new(1.0).unwrap();
    let (n, bits) = (16u8, 11);
    let plan = PrivacyPlan::new(parameters(700, 400.0), 4096).unwrap();
    let (bound, room) = (plan.ln_wraparound(bits, u32::from(n)).exp(), 1i64 << (bits - 1));
    assert!(bound < 0.5 && bound > 1e-12, "{bound}: a bound worth trying");
    let same: Vec<f32> = (0..4096).map(|i| ((i * i) % 31) as f32 - 15.0).collect();
    let mut wrapped = 0;
    for round in 0..40u8 {
        let mut sum = vec![0i32; plan.vector_len()];
        for device in 0..n {
            let vector = plan.encode(same.clone(), norm, &[round], &origin(device), &[round]).unwrap();
            add(&mut sum, &vector);
        }
        wrapped += u32::from(sum.iter().any(|v| !(-room..room).contains(&i64::from(*v))));
    }
    assert!(
        f64::from(wrapped) / 40.0 <= bound + 3.0 * (bound / 40.0).sqrt(),
        "{wrapped} of 40, bound {bound}"
    );
}

/// The published scale for a ring: our bound must not allow more than a third of a bit beyond it.
#[test]
fn the_published_heuristic_is_near() {
    for row in value("scale_factor_subgaussian").as_array().unwrap() {
        let of = |field: &str| row[field].as_f64().unwrap();
        let (n, d, k) = (of("num_clients"), of("dim"), of("k_stddevs"));
        let spread = (of("l2_clip").powi(2) * n * n / d + n * of("local_stddev").powi(2)).sqrt();
        let scale = (2f64.powf(2.0 * of("bits")) - n * k * k).sqrt() / (2.0 * k * spread);
        assert!((scale / of("scale_factor") - 1.0).abs() < 1e-9, "{row}");
    }
}
