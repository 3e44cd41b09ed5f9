//! opendp as a second opinion on our accounting, and checks of noise that cannot be seeded.
//!
//! All checks of noise together fail a right implementation with a probability below 1e-9: every bound used
//! here holds for all sample sizes, none is a normal approximation.

use crate::account::{Delta, zcdp_delta, zcdp_epsilon};
use opendp::{
    combinators::{ConcentratedMeasure, make_fix_delta, make_zCDP_to_approxDP},
    domains::AtomDomain,
    measurements::make_gaussian,
    measures::ZeroConcentratedDivergence,
    metrics::AbsoluteDistance,
};

/// A tail has a probability of exp(-25) at most, 1.4e-11; there are fewer than 60.
pub(super) const T: f64 = 25.0;

/// Fails unless the noise has mean 0 and standard deviation `sigma`, by the tails of the chi-square
/// distribution (Laurent and Massart 2000, lemma 1) and of the normal one. The discrete Gaussian's moments
/// are those of the continuous one to exp(-2 pi^2 sigma^2), where sigma is in steps of its grid.
#[track_caller]
pub(super) fn check_moments(noise: impl Iterator<Item = f64>, sigma: f64) {
    let noise: Vec<f64> = noise.map(|x| x / sigma).collect();
    let count = noise.len() as f64;
    let square: f64 = noise.iter().map(|x| x * x).sum();
    assert!(square - count <= 2.0 * (count * T).sqrt() + 2.0 * T, "{square} for {count}: too much noise");
    assert!(square - count >= -2.0 * (count * T).sqrt(), "{square} for {count}: too little noise");
    let sum: f64 = noise.iter().sum();
    assert!(sum.abs() <= (2.0 * T * count).sqrt(), "a sum of {sum} over {count}");
}

/// Fails unless the noise follows the distribution function, by the inequality of Dvoretzky, Kiefer and
/// Wolfowitz with Massart's constant (1990).
#[track_caller]
pub(super) fn check_distribution(noise: &[f64], at_most: impl Fn(f64) -> f64) {
    let mut sorted = noise.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len() as f64;
    let slack = (T / (2.0 * count)).sqrt();
    for (at, pair) in sorted.windows(2).enumerate() {
        let share = (at + 1) as f64 / count;
        let (expected, last) = (at_most(pair[0]), pair[0] < pair[1]);
        assert!(!last || (share - expected).abs() <= slack, "{share} for {expected} at {}", pair[0]);
    }
}

#[test]
fn zcdp_converts_as_opendp_does() {
    let mut compared = 0;
    for rho in (0..=53).map(|at| 1e-4 * 10f64.powf(f64::from(at) / 10.0)) {
        for power in 3..=12 {
            let delta = Delta::new(10f64.powi(-power)).unwrap();
            let ours = zcdp_epsilon(rho, delta).unwrap();
            let profile = ZeroConcentratedDivergence::convert(rho).unwrap();
            let theirs = profile.epsilon(delta.value()).unwrap();
            assert!((ours / theirs - 1.0).abs() <= 1e-12, "{ours} for {theirs} at {rho}, {delta:?}");
            let ours = zcdp_delta(rho, theirs).unwrap();
            let theirs = profile.delta(theirs).unwrap();
            assert!((ours / theirs - 1.0).abs() <= 1e-9, "{ours} for {theirs} at {rho}, {delta:?}");
            compared += 1;
        }
    }
    assert_eq!(compared, 540);
}

#[test]
fn a_gaussian_converts_as_opendp_s_combinators_do() {
    for (scale, delta) in [(0.7, 1e-6), (3.0, 1e-8), (25.0, 1e-10)] {
        let gaussian = make_gaussian::<_, _, ZeroConcentratedDivergence>(
            AtomDomain::<i64>::default(),
            AbsoluteDistance::<f64>::default(),
            scale,
            None,
        );
        let approximate = make_zCDP_to_approxDP(gaussian.unwrap()).unwrap();
        let (theirs, at) = make_fix_delta(&approximate, delta).unwrap().map(&1.0).unwrap();
        assert_eq!(at, delta);
        let ours = zcdp_epsilon(0.5 / (scale * scale), Delta::new(delta).unwrap()).unwrap();
        assert!((ours / theirs - 1.0).abs() <= 1e-12, "{ours} for {theirs} at {scale}");
    }
}

#[test]
fn the_checks_of_noise_can_fail() {
    let gaussian = |scale: f64| {
        let mechanism = make_gaussian::<_, _, ZeroConcentratedDivergence>(
            AtomDomain::<i64>::default(),
            AbsoluteDistance::<f64>::default(),
            scale,
            None,
        );
        let mechanism = mechanism.unwrap();
        (0..20_000).map(|_| mechanism.invoke(&0).unwrap() as f64).collect::<Vec<f64>>()
    };
    let fails = |noise: &[f64], shift: f64| {
        let noise = noise.iter().map(|x| x + shift).collect::<Vec<f64>>();
        std::panic::catch_unwind(move || check_moments(noise.into_iter(), 20.0)).is_err()
    };
    assert!(!fails(&gaussian(20.0), 0.0));
    assert!(fails(&gaussian(22.0), 0.0) && fails(&gaussian(18.0), 0.0) && fails(&gaussian(20.0), 3.0));
    let uniform: Vec<f64> = (0..20_000).map(|at| f64::from(at % 100)).collect();
    let of = |steps: f64| move |x: f64| ((x + 1.0) / steps).min(1.0);
    check_distribution(&uniform, of(100.0));
    let wrong = std::panic::catch_unwind(move || check_distribution(&uniform, of(110.0)));
    assert!(wrong.is_err());
}
