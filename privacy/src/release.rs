//! Private scalars, histograms and answers by opendp's mechanisms: what is said about a population
//! beside the model.
//!
//! Whoever calls these functions sees the values before the noise, but for the answers of [`response`],
//! which are noised on the device. Vectors take another road: see `docs/privacy.md`.
//!
//! Adjacency is zero-out, as for updates: a device's values count as zero (an absent key), while the
//! number of devices stays. One call is one release: to call twice costs twice.
//!
//! opendp's objects are not `Send` and live within one call; everything public here is `Send`. Its
//! random numbers come from `thread_rng` of rand 0.7 (ChaCha20 seeded by the system), which cannot be
//! seeded and is repeated by a process that forks.

mod histogram;
mod response;
mod scalar;

#[cfg(test)]
mod oracle;

pub use histogram::{KeyBounds, ThresholdMechanism, ThresholdNoise, bounded_histogram, threshold_histogram};
pub use response::{Answer, BooleanResponse, CategoricalResponse, Estimate};
pub use scalar::{ScalarBounds, private_count, private_mean, private_sum};

use crate::account::AccountError;
use opendp::error::Error as OpendpError;
use thiserror::Error;

/// What one release adds to the privacy loss of each device in it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ReleaseCost {
    /// Zero-concentrated differential privacy (Bun and Steinke 2016).
    Zcdp {
        /// The bound of the Rényi divergence of order alpha, divided by alpha.
        rho: f64,
    },
    /// Approximate differential privacy; pure where delta is 0.
    Approximate {
        /// Privacy loss in nats.
        epsilon: f64,
        /// Probability that the bound does not hold.
        delta: f64,
    },
}

/// A noised value with what it cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Noised<T> {
    /// The value, or values, after the noise.
    pub value: T,
    /// Standard deviation of the noise in each number of `value`, in its units. What clamping took is
    /// not in it.
    pub standard_error: f64,
    /// To be charged to every device whose data went in, before the value is used.
    pub cost: ReleaseCost,
}

/// Why nothing was released.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ReleaseError {
    /// A parameter is out of its range.
    #[error(transparent)]
    Parameter(#[from] AccountError),
    /// opendp refused, or had no randomness.
    #[error("opendp cannot {action}: {reason}")]
    Opendp {
        /// What was asked of it.
        action: &'static str,
        /// Its own words.
        reason: String,
    },
}

impl ReleaseError {
    /// For `map_err`: keeps opendp's words without its backtrace.
    fn opendp(action: &'static str) -> impl Fn(OpendpError) -> Self {
        move |error| {
            let reason = match error.message {
                Some(message) => format!("{}: {message}", error.variant),
                None => error.variant.to_string(),
            };
            Self::Opendp { action, reason }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_public_crosses_threads() {
        fn crosses<T: Send + Sync + 'static>() {}
        crosses::<ReleaseCost>();
        crosses::<ReleaseError>();
        crosses::<Noised<f64>>();
        crosses::<ScalarBounds>();
        crosses::<KeyBounds>();
        crosses::<ThresholdNoise>();
        crosses::<ThresholdMechanism>();
        crosses::<BooleanResponse>();
        crosses::<CategoricalResponse>();
        crosses::<Answer<bool>>();
        crosses::<Estimate>();
    }

    #[test]
    fn errors_carry_opendp_s_words() {
        let refused = opendp::measurements::make_randomized_response_bool(0.3, true);
        let error = refused.map_err(ReleaseError::opendp("answer")).err().unwrap().to_string();
        assert_eq!(error, "opendp cannot answer: MakeMeasurement: probability must be within [0.5, 1]");
    }
}
