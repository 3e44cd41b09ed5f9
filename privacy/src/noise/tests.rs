//! The tables against an independent computation, the draws against the laws.

use super::*;
use crate::account::known::{number, rows};
use rand::{RngExt, SeedableRng};

fn source(seed: u8) -> NoiseSource {
    NoiseOrigin::simulated([seed; 32]).source(b"test").unwrap()
}

fn table(law: &str, variance: f64) -> NoiseTable {
    let variance = GridVariance::at_least(variance).unwrap();
    let law = match law {
        "discrete_gaussian" => Law::DiscreteGaussian(variance),
        "skellam_symmetric" => Law::Skellam(variance),
        other => panic!("law {other}"),
    };
    NoiseTable::new(law).unwrap()
}

/// Probabilities of the table's magnitudes, in f64.
#[expect(clippy::cast_precision_loss, reason = "f64 is enough for a test statistic")]
fn probabilities(table: &NoiseTable) -> Vec<f64> {
    let scale = 2f64.powi(-128);
    let mut before = 0;
    let each = table.cumulative().iter().map(|c| {
        let p = (c - before) as f64 * scale;
        before = *c;
        p
    });
    each.collect()
}

#[test]
fn tables_equal_the_reference_of_80_digits_bit_for_bit() {
    for row in rows("sampler_tables") {
        let variance = row.get("sigma2").or_else(|| row.get("variance")).unwrap().as_f64().unwrap();
        let table = table(row["law"].as_str().unwrap(), variance);
        for (m, expected) in row["abs_cdf_2pow128_hex"].as_array().unwrap().iter().enumerate() {
            let expected = u128::from_str_radix(expected.as_str().unwrap(), 16).unwrap();
            assert_eq!(table.cumulative()[m], expected, "entry {m} of {row}");
        }
        let p = probabilities(&table);
        let fourth: f64 = p.iter().enumerate().map(|(m, p)| (m as f64).powi(4) * p).sum();
        assert!((fourth / number(&row, "fourth_moment") - 1.0).abs() < 1e-9, "{row}");
    }
}

#[test]
fn a_tables_end_is_where_nothing_is_left() {
    for variance in [1.0 / 65536.0, 0.0625, 0.25, 1.0, 7.5, 1e3, 1e6] {
        let table = table("skellam_symmetric", variance);
        assert_eq!(table.cumulative().last(), Some(&u128::MAX));
        assert!(table.cumulative().is_sorted());
        assert!(f64::from(table.magnitude_max()) <= 14.0 * f64::sqrt(variance) + 60.0);
        assert!(table.ln_total_variation() < -110.0 * std::f64::consts::LN_2);
        let p = probabilities(&table);
        let second: f64 = p.iter().enumerate().map(|(m, p)| (m as f64).powi(2) * p).sum();
        assert!((second / variance - 1.0).abs() < 1e-9, "variance {second} for {variance}");
    }
}

/// Draws 2e6, and compares the counts of values with their probabilities: chi-square in units of its
/// standard deviation. Bins are merged until each expects 20.
fn chi_square(table: &NoiseTable, seed: u8) -> f64 {
    let mut values = vec![0i32; 2_000_000];
    table.add_to(&mut values, &mut source(seed));
    chi_square_of(table, &values)
}

fn chi_square_of(table: &NoiseTable, values: &[i32]) -> f64 {
    let p = probabilities(table);
    let limit = i32::try_from(table.magnitude_max()).unwrap();
    let mut counts = vec![0f64; p.len() * 2];
    for value in values {
        assert!(value.abs() <= limit);
        counts[usize::try_from(value + limit).unwrap()] += 1.0;
    }
    let of = |value: i32| {
        let p = p[usize::try_from(value.unsigned_abs()).unwrap()];
        if value == 0 { p } else { p / 2.0 }
    };
    let (mut statistic, mut bins, mut expected, mut seen) = (0.0, -1.0, 0.0, 0.0);
    for value in -limit..=limit {
        expected += of(value) * values.len() as f64;
        seen += counts[usize::try_from(value + limit).unwrap()];
        if expected >= 20.0 {
            statistic += (seen - expected) * (seen - expected) / expected;
            bins += 1.0;
            (expected, seen) = (0.0, 0.0);
        }
    }
    (statistic - bins) / f64::sqrt(2.0 * bins)
}

#[test]
fn draws_follow_their_law() {
    let cases = [("skellam_symmetric", 0.3), ("skellam_symmetric", 16.0), ("skellam_symmetric", 1e6)];
    let gaussian = [("discrete_gaussian", 1.0), ("discrete_gaussian", 1e4)];
    for (seed, (law, variance)) in (0..).zip(cases.into_iter().chain(gaussian)) {
        let z = chi_square(&table(law, variance), seed);
        assert!(z.abs() < 5.0, "{law} {variance}: {z} standard deviations");
    }
}

/// The test above has power: noise a hundredth too wide is seen.
#[test]
fn a_variance_that_is_one_hundredth_off_is_seen() {
    let mut values = vec![0i32; 2_000_000];
    table("skellam_symmetric", 16.16).add_to(&mut values, &mut source(9));
    let claimed = table("skellam_symmetric", 16.0);
    let limit = i32::try_from(claimed.magnitude_max()).unwrap();
    values.iter_mut().for_each(|v| *v = (*v).clamp(-limit, limit));
    assert!(chi_square_of(&claimed, &values) > 5.0);
}

#[test]
fn sums_of_skellam_are_skellam() {
    let one = table("skellam_symmetric", 2.5);
    let mut values = vec![0i32; 2_000_000];
    for seed in 0..8 {
        one.add_to(&mut values, &mut source(20 + seed));
    }
    let z = chi_square_of(&table("skellam_symmetric", 20.0), &values);
    assert!(z.abs() < 5.0, "{z} standard deviations");
}

#[test]
fn equal_upper_halves_are_decided_by_the_lower() {
    let table = table("skellam_symmetric", 16.0);
    let mut random = rand_chacha::ChaCha20Rng::seed_from_u64(1);
    for at in 0..20usize {
        let high = (table.cumulative()[at] >> 64) as u64;
        let below = (table.cumulative()[at] as u64) as f64 / 2f64.powi(64);
        let mut hits = 0f64;
        let mut stream = NoiseOrigin::simulated(random.random()).source(b"").unwrap();
        for _ in 0..4000 {
            let drawn = table.magnitude(high, &mut stream) as usize;
            assert!(drawn == at || drawn == at + 1);
            hits += f64::from(u8::from(drawn == at));
        }
        assert!((hits / 4000.0 - below).abs() < 0.05, "entry {at}");
    }
}

#[test]
fn sources_differ_and_simulated_ones_repeat() {
    let draw = |origin: &NoiseOrigin, context: &[u8]| origin.source(context).unwrap().word();
    let system = NoiseOrigin::operating_system();
    assert_ne!(draw(&system, b"a"), draw(&system, b"a"));
    let simulated = NoiseOrigin::simulated([1; 32]);
    assert_eq!(draw(&simulated, b"a"), draw(&simulated, b"a"));
    assert_ne!(draw(&simulated, b"a"), draw(&simulated, b"b"));
    assert!(simulated.is_simulated() && !system.is_simulated());
}

#[test]
fn variances_out_of_range_are_refused() {
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 4096.0 * 4096.0 + 1.0] {
        assert!(GridVariance::at_least(bad).is_err(), "{bad}");
    }
    let narrow = Law::DiscreteGaussian(GridVariance::at_least(0.4).unwrap());
    assert!(NoiseTable::new(narrow).is_err());
}

/// Somebody else's exact sampler against our tables.
#[cfg(feature = "opendp")]
#[test]
fn opendp_draws_follow_our_tables() {
    use opendp::traits::samplers::sample_discrete_gaussian;
    for sigma in [1.0, 12.5] {
        let table = table("discrete_gaussian", sigma * sigma);
        let limit = i32::try_from(table.magnitude_max()).unwrap();
        let draw = || -> i32 {
            let scale = sigma.try_into().expect("a rational");
            let drawn = sample_discrete_gaussian(scale).expect("entropy");
            i32::try_from(drawn).expect("small").clamp(-limit, limit)
        };
        let values: Vec<i32> = (0..150_000).map(|_| draw()).collect();
        let z = chi_square_of(&table, &values);
        assert!(z.abs() < 6.5, "sigma {sigma}: {z} standard deviations");
    }
}
