//! Histograms over keys that nobody listed in advance: noised counts, of which only those above a
//! threshold are shown (Rogers 2023, "A Unifying Privacy Analysis Framework for Unknown Domain Algorithms").

use super::{Noised, ReleaseCost, ReleaseError, scalar::gaussian_deviation};
use crate::account::{AccountError, Delta, zcdp_epsilon};
use opendp::{
    core::Measurement,
    domains::{AtomDomain, MapDomain},
    error::Fallible,
    measurements::{make_gaussian_threshold, make_laplace_threshold},
    measures::{Approximate, MaxDivergence, ZeroConcentratedDivergence},
    metrics::{AbsoluteDistance, L01InfDistance, L02InfDistance},
};
use std::collections::{BTreeMap, HashMap};

/// About ten seconds of opendp's sampler.
const KEYS_MAX: usize = 1 << 20;

/// Thresholds that counts of 32 bits can pass.
const THRESHOLD_MAX: u32 = 1 << 31;

/// Noise from a tenth of a count to as much as leaves every sum exact.
const SCALE_RANGE: (f64, f64) = (0.1, 1e9);

type Histogram = HashMap<String, i64>;
type Keyed = MapDomain<AtomDomain<String>, AtomDomain<i64>>;
type Laplace =
    Measurement<Keyed, L01InfDistance<AbsoluteDistance<f64>>, Approximate<MaxDivergence>, Histogram>;
type Gaussian = Measurement<
    Keyed,
    L02InfDistance<AbsoluteDistance<f64>>,
    Approximate<ZeroConcentratedDivergence>,
    Histogram,
>;

/// How much of a histogram one device can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyBounds {
    keys: u32,
    count: u32,
}

impl KeyBounds {
    /// At most `keys` keys a device, each counted at most `count` times.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless both are from 1 to 65536.
    pub fn new(keys: u32, count: u32) -> Result<Self, AccountError> {
        for (name, value) in [("keys of a device", keys), ("count of a key", count)] {
            AccountError::check((1..=1 << 16).contains(&value), name, value.into(), "from 1 to 65536")?;
        }
        Ok(Self { keys, count })
    }
}

/// The noise on each count.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ThresholdNoise {
    /// Discrete Laplace: better for few keys a device.
    Laplace {
        /// Its parameter in counts; the standard deviation is about sqrt(2) of it.
        scale: f64,
    },
    /// Discrete Gaussian: better for many keys a device.
    Gaussian {
        /// Its parameter in counts, about the standard deviation.
        sigma: f64,
        /// The part of delta that goes into the conversion from rho to epsilon.
        conversion: Delta,
    },
}

/// A noise and a threshold, with what they cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ThresholdMechanism {
    bounds: KeyBounds,
    noise: ThresholdNoise,
    threshold: u32,
    cost: (f64, f64),
}

impl ThresholdMechanism {
    /// Shows keys whose noised count is above `threshold`, never those at it.
    ///
    /// # Errors
    /// [`ReleaseError`] unless the noise is from 0.1 to 1e9 and `threshold` is above what one device adds to a
    /// key and at most 2^31.
    pub fn new(bounds: KeyBounds, noise: ThresholdNoise, threshold: u32) -> Result<Self, ReleaseError> {
        let (name, scale) = match noise {
            ThresholdNoise::Laplace { scale } => ("scale", scale),
            ThresholdNoise::Gaussian { sigma, .. } => ("sigma", sigma),
        };
        let held = scale >= SCALE_RANGE.0 && scale <= SCALE_RANGE.1;
        AccountError::check(held, name, scale, "from 0.1 to 1e9")?;
        let held = threshold > bounds.count && threshold <= THRESHOLD_MAX;
        AccountError::check(held, "threshold", threshold.into(), "above a device's count and at most 2^31")?;
        let cost = match noise {
            ThresholdNoise::Laplace { scale } => laplace_cost(bounds, scale, threshold),
            ThresholdNoise::Gaussian { sigma, .. } => gaussian_cost(bounds, sigma, threshold),
        };
        let (loss, tail) = cost.map_err(ReleaseError::opendp("account for a threshold"))?;
        let cost = match noise {
            ThresholdNoise::Laplace { .. } => (loss, tail),
            ThresholdNoise::Gaussian { conversion, .. } => {
                (zcdp_epsilon(loss, conversion)?, (tail + conversion.value()).next_up())
            }
        };
        Ok(Self { bounds, noise, threshold, cost })
    }

    /// The lowest threshold whose whole delta is at most `delta`.
    ///
    /// # Errors
    /// [`ReleaseError`], as for [`Self::new`], and if no threshold up to 2^31 does: none has a delta below
    /// about 1e-16 a key, the precision that opendp adds up tails with.
    pub fn for_delta(bounds: KeyBounds, noise: ThresholdNoise, delta: Delta) -> Result<Self, ReleaseError> {
        let (mut below, mut found) = (bounds.count, Self::new(bounds, noise, THRESHOLD_MAX)?);
        if found.cost.1 > delta.value() {
            let text = format!("no threshold up to 2^31 has a delta of at most {}", delta.value());
            return Err(AccountError::Unreachable(text).into());
        }
        while found.threshold - below > 1 {
            let middle = Self::new(bounds, noise, below + (found.threshold - below) / 2)?;
            if middle.cost.1 <= delta.value() {
                found = middle;
            } else {
                below = middle.threshold;
            }
        }
        Ok(found)
    }

    /// Counts at or below it are not shown.
    #[must_use]
    pub fn threshold(&self) -> u32 {
        self.threshold
    }

    /// What one histogram costs each device in it.
    #[must_use]
    pub fn cost(&self) -> ReleaseCost {
        ReleaseCost::Approximate { epsilon: self.cost.0, delta: self.cost.1 }
    }

    /// Standard deviation of the noise on each count.
    #[must_use]
    pub fn standard_error(&self) -> f64 {
        match self.noise {
            ThresholdNoise::Laplace { scale } => {
                let ratio = (-1.0 / scale).exp();
                (2.0 * ratio).sqrt() / -(-1.0 / scale).exp_m1()
            }
            ThresholdNoise::Gaussian { sigma, .. } => gaussian_deviation(sigma),
        }
    }
}

/// The sum of all devices' counts, each device cut down to `bounds`: its most frequent keys, the first of
/// equals in their order.
#[must_use]
pub fn bounded_histogram<'a>(
    devices: impl IntoIterator<Item = &'a BTreeMap<String, u32>>,
    bounds: KeyBounds,
) -> BTreeMap<String, u32> {
    let mut sum: BTreeMap<String, u32> = BTreeMap::new();
    for device in devices {
        let mut entries: Vec<_> = device.iter().filter(|(_, count)| **count > 0).collect();
        entries.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (key, count) in entries.into_iter().take(bounds.keys as usize) {
            let total = sum.entry(key.clone()).or_default();
            *total = total.saturating_add((*count).min(bounds.count));
        }
    }
    sum
}

/// The keys whose noised count is above the threshold, with that count. `counts` must be the sum of
/// devices within the mechanism's [`KeyBounds`], as [`bounded_histogram`] makes it; the cost holds for
/// nothing else.
///
/// # Errors
/// [`ReleaseError`], for more than 2^20 keys, or if opendp fails.
pub fn threshold_histogram(
    counts: &BTreeMap<String, u32>,
    mechanism: &ThresholdMechanism,
) -> Result<Noised<BTreeMap<String, i64>>, ReleaseError> {
    AccountError::check(counts.len() <= KEYS_MAX, "number of keys", counts.len() as f64, "at most 2^20")?;
    let counts: Histogram = counts.iter().map(|(key, count)| (key.clone(), i64::from(*count))).collect();
    let noised = match mechanism.noise {
        ThresholdNoise::Laplace { scale } => {
            laplace(scale, mechanism.threshold).and_then(|with| with.invoke(&counts))
        }
        ThresholdNoise::Gaussian { sigma, .. } => {
            gaussian(sigma, mechanism.threshold).and_then(|with| with.invoke(&counts))
        }
    };
    let noised = noised.map_err(ReleaseError::opendp("noise a histogram"))?;
    // opendp 0.16 also shows counts at the threshold, while its delta is that of counts above it
    // (github.com/opendp/opendp/issues/2922). Dropping them makes its delta true.
    let above = |count: &i64| *count > i64::from(mechanism.threshold);
    let value = noised.into_iter().filter(|(_, count)| above(count)).collect();
    Ok(Noised { value, standard_error: mechanism.standard_error(), cost: mechanism.cost() })
}

/// (epsilon, delta) by opendp's own privacy map.
fn laplace_cost(bounds: KeyBounds, scale: f64, threshold: u32) -> Fallible<(f64, f64)> {
    let (keys, count) = (f64::from(bounds.keys), f64::from(bounds.count));
    laplace(scale, threshold)?.map(&(bounds.keys, keys * count, count))
}

/// (rho, delta) by opendp's own privacy map. The L2 bound is rounded up.
fn gaussian_cost(bounds: KeyBounds, sigma: f64, threshold: u32) -> Fallible<(f64, f64)> {
    let (keys, count) = (f64::from(bounds.keys), f64::from(bounds.count));
    gaussian(sigma, threshold)?.map(&(bounds.keys, (count * keys.sqrt().next_up()).next_up(), count))
}

fn laplace(scale: f64, threshold: u32) -> Fallible<Laplace> {
    make_laplace_threshold(Keyed::default(), L01InfDistance::default(), scale, threshold.into(), None)
}

fn gaussian(sigma: f64, threshold: u32) -> Fallible<Gaussian> {
    make_gaussian_threshold(Keyed::default(), L02InfDistance::default(), sigma, threshold.into(), None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        account::known::{close, number, rows},
        release::oracle::{T, check_distribution, check_moments},
    };

    fn one() -> KeyBounds {
        KeyBounds::new(1, 1).unwrap()
    }

    fn keys(count: usize, value: u32) -> BTreeMap<String, u32> {
        (0..count).map(|at| (format!("key {at}"), value)).collect()
    }

    /// P[X >= least] of the discrete Laplace distribution.
    fn laplace_tail(scale: f64, least: f64) -> f64 {
        (-least / scale).exp() / (1.0 + (-1.0 / scale).exp())
    }

    fn gaussian_tail(sigma: f64, least: i32) -> f64 {
        let weight = |x: i32| (-0.5 * (f64::from(x) / sigma).powi(2)).exp();
        (least..2000).map(weight).sum::<f64>() / (-2000..2000).map(weight).sum::<f64>()
    }

    fn delta_of(mechanism: &ThresholdMechanism) -> f64 {
        mechanism.cost.1
    }

    #[test]
    fn laplace_costs_what_is_known() {
        let row = rows("laplace_rr").into_iter().find(|row| row["mech"] == "laplace").unwrap();
        let noise = ThresholdNoise::Laplace { scale: number(&row, "scale") };
        let mechanism = ThresholdMechanism::new(one(), noise, 40).unwrap();
        close(mechanism.cost.0, number(&row, "eps"), 1e-12, &row);
        // A key of one device is shown if the noise passes 39. opendp rounds 1 - delta to 53 bits, upwards.
        close(delta_of(&mechanism), laplace_tail(2.0, 40.0), 1e-6, &row);
        assert!(delta_of(&mechanism) >= laplace_tail(2.0, 40.0));
        let bounds = KeyBounds::new(3, 5).unwrap();
        let many = ThresholdMechanism::new(bounds, ThresholdNoise::Laplace { scale: 30.0 }, 500).unwrap();
        close(many.cost.0, 0.5, 1e-12, &row);
        let single = laplace_tail(30.0, 496.0);
        close(delta_of(&many), 1.0 - (1.0 - single).powi(3), 1e-8, &row);
    }

    #[test]
    fn gaussian_costs_the_conversion_and_a_tail_that_is_not_below_the_exact_one() {
        let conversion = Delta::new(1e-9).unwrap();
        let bounds = KeyBounds::new(4, 3).unwrap();
        let noise = ThresholdNoise::Gaussian { sigma: 12.0, conversion };
        let mechanism = ThresholdMechanism::new(bounds, noise, 70).unwrap();
        // sensitivity 3 sqrt(4): rho is 36 / (2 * 144).
        let epsilon = zcdp_epsilon(0.125, conversion).unwrap();
        assert!((mechanism.cost.0 / epsilon - 1.0).abs() < 1e-12, "{} for {epsilon}", mechanism.cost.0);
        let tail = 1.0 - (1.0 - gaussian_tail(12.0, 68)).powi(4);
        let charged = delta_of(&mechanism) - 1e-9;
        assert!(charged >= tail && charged < 1.5 * tail, "{charged} for {tail}");
    }

    #[test]
    fn keys_of_one_device_pass_no_oftener_than_delta_says() {
        // opendp's own filter shows counts at the threshold too: 0.084 of these keys, where it says 0.051.
        let mechanism = ThresholdMechanism::new(one(), ThresholdNoise::Laplace { scale: 2.0 }, 5).unwrap();
        let shown = threshold_histogram(&keys(20_000, 1), &mechanism).unwrap().value;
        let (rate, slack) = (shown.len() as f64 / 20_000.0, (T / 40_000.0).sqrt());
        assert!((rate - delta_of(&mechanism)).abs() <= slack, "{rate} for {}", delta_of(&mechanism));
        assert!(laplace_tail(2.0, 4.0) > delta_of(&mechanism) + slack);
        assert!(shown.values().all(|count| *count > 5));
    }

    #[test]
    fn the_lowest_threshold_is_found() {
        let (delta, conversion) = (Delta::new(1e-9).unwrap(), Delta::new(5e-10).unwrap());
        for noise in [
            ThresholdNoise::Laplace { scale: 0.1 },
            ThresholdNoise::Laplace { scale: 4.0 },
            ThresholdNoise::Laplace { scale: 3e5 },
            ThresholdNoise::Gaussian { sigma: 0.1, conversion },
            ThresholdNoise::Gaussian { sigma: 9.0, conversion },
        ] {
            let bounds = KeyBounds::new(5, 2).unwrap();
            let found = ThresholdMechanism::for_delta(bounds, noise, delta).unwrap();
            assert!(delta_of(&found) <= 1e-9, "{found:?}");
            if let Ok(lower) = ThresholdMechanism::new(bounds, noise, found.threshold - 1) {
                assert!(delta_of(&lower) > 1e-9, "{lower:?}");
            }
        }
        let noise = ThresholdNoise::Gaussian { sigma: 9.0, conversion: delta };
        assert!(ThresholdMechanism::for_delta(one(), noise, conversion).is_err());
    }

    #[test]
    fn rare_keys_stay_hidden_and_frequent_ones_are_shown() {
        let delta = Delta::new(1e-13).unwrap();
        let mut counts = keys(500, 1);
        counts.insert("all".into(), 1000);
        let conversion = Delta::new(5e-14).unwrap();
        for noise in
            [ThresholdNoise::Laplace { scale: 2.0 }, ThresholdNoise::Gaussian { sigma: 4.0, conversion }]
        {
            let mechanism = ThresholdMechanism::for_delta(one(), noise, delta).unwrap();
            let histogram = threshold_histogram(&counts, &mechanism).unwrap();
            assert_eq!(histogram.value.keys().collect::<Vec<_>>(), ["all"]);
            assert!((histogram.value["all"] - 1000).abs() < 100);
            assert_eq!(histogram.cost, mechanism.cost());
        }
    }

    #[test]
    fn counts_have_the_noise_that_was_named() {
        let conversion = Delta::new(1e-9).unwrap();
        let counts = keys(20_000, 1_000_000);
        let noised = |noise| {
            let mechanism = ThresholdMechanism::new(one(), noise, 100).unwrap();
            let noised = threshold_histogram(&counts, &mechanism).unwrap();
            let noise: Vec<f64> = noised.value.values().map(|count| (*count - 1_000_000) as f64).collect();
            (noise, noised.standard_error)
        };
        let (noise, standard_error) = noised(ThresholdNoise::Gaussian { sigma: 6.0, conversion });
        assert_eq!(standard_error, 6.0);
        check_moments(noise.into_iter(), 6.0);
        let (noise, standard_error) = noised(ThresholdNoise::Laplace { scale: 3.0 });
        check_distribution(&noise, |x| {
            if x < 0.0 { laplace_tail(3.0, -x) } else { 1.0 - laplace_tail(3.0, x + 1.0) }
        });
        let law = (1..400).map(|x| {
            2.0 * f64::from(x * x) * (laplace_tail(3.0, x.into()) - laplace_tail(3.0, f64::from(x) + 1.0))
        });
        assert!((standard_error / law.sum::<f64>().sqrt() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_device_is_cut_down_to_its_bounds() {
        let device = |entries: &[(&str, u32)]| {
            entries.iter().map(|(key, count)| ((*key).to_owned(), *count)).collect()
        };
        let devices: [BTreeMap<String, u32>; 3] = [
            device(&[("a", 1), ("b", 9), ("c", 4), ("d", 4)]),
            device(&[("b", 2), ("z", 0)]),
            BTreeMap::new(),
        ];
        let sum = bounded_histogram(&devices, KeyBounds::new(2, 5).unwrap());
        assert_eq!(sum, device(&[("b", 7), ("c", 4)]));
    }

    #[test]
    fn refuses_what_it_cannot_bound() {
        assert!(
            KeyBounds::new(0, 1).is_err()
                && KeyBounds::new(1, 0).is_err()
                && KeyBounds::new(1 << 17, 1).is_err()
        );
        for scale in [0.0, -1.0, f64::NAN, f64::INFINITY, 0.01] {
            let error = ThresholdMechanism::new(one(), ThresholdNoise::Laplace { scale }, 40).unwrap_err();
            assert!(error.to_string().starts_with("scale is "), "{error}");
        }
        for threshold in [0, 1, u32::MAX] {
            let error = ThresholdMechanism::new(one(), ThresholdNoise::Laplace { scale: 2.0 }, threshold);
            assert!(error.unwrap_err().to_string().starts_with("threshold is "));
        }
    }
}
