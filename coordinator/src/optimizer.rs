//! Server optimizers: from the mean update of a round to the next adapter.
//!
//! The mean is a pseudo-gradient (Reddi et al. 2021, "Adaptive Federated Optimization", algorithms 1 and
//! 2). Every coordinate is computed in f64 and rounded once, so the result does not depend on the machine.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// How the server applies the mean update.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum ServerOptimizer {
    /// `x += learning_rate * mean`; with 1.0 the plain mean (McMahan et al. 2017).
    FedAvg {
        /// Server learning rate.
        learning_rate: f64,
    },
    /// `m = momentum * m + mean; x += learning_rate * m` (Hsu et al. 2019).
    FedAvgM {
        /// Server learning rate.
        learning_rate: f64,
        /// Decay of the momentum.
        momentum: f64,
    },
    /// Reddi et al. 2021, algorithm 2, FedAdam: no bias correction, `v` starts at `tau^2`.
    FedAdam {
        /// Server learning rate.
        learning_rate: f64,
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Degree of adaptivity, added to the denominator.
        tau: f64,
    },
}

/// Settings or state that cannot be used.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum OptimizerError {
    /// A constant is out of range.
    #[error("server optimizer {field}: {value} is not in {range}")]
    Setting {
        /// The constant.
        field: &'static str,
        /// Its value.
        value: f64,
        /// What is allowed.
        range: &'static str,
    },
    /// The kept state is not as long as the optimizer's.
    #[error("server optimizer state of {found} values; this optimizer keeps {expected}")]
    State {
        /// Values it keeps for the adapter.
        expected: usize,
        /// Values found.
        found: usize,
    },
}

impl ServerOptimizer {
    /// Checks the constants.
    ///
    /// # Errors
    /// [`OptimizerError::Setting`] names the constant at fault.
    pub fn check(&self) -> Result<(), OptimizerError> {
        match *self {
            Self::FedAvg { learning_rate } => positive("learning_rate", learning_rate),
            Self::FedAvgM { learning_rate, momentum } => {
                positive("learning_rate", learning_rate)?;
                decay("momentum", momentum)
            }
            Self::FedAdam { learning_rate, beta1, beta2, tau } => {
                positive("learning_rate", learning_rate)?;
                decay("beta1", beta1)?;
                decay("beta2", beta2)?;
                positive("tau", tau)
            }
        }
    }

    /// The state before the first round, for an adapter of `dimension` values.
    #[must_use]
    pub fn initial_state(&self, dimension: usize) -> Vec<f32> {
        match *self {
            Self::FedAvg { .. } => Vec::new(),
            Self::FedAvgM { .. } => vec![0.0; dimension],
            Self::FedAdam { tau, .. } => {
                let mut state = vec![0.0; 2 * dimension];
                state[dimension..].fill(narrow(tau * tau));
                state
            }
        }
    }

    /// Checks that `state` is one of this optimizer for `dimension` values.
    ///
    /// # Errors
    /// [`OptimizerError::State`].
    pub fn check_state(&self, state: &[f32], dimension: usize) -> Result<(), OptimizerError> {
        let (expected, found) = (self.initial_state(dimension).len(), state.len());
        if expected == found { Ok(()) } else { Err(OptimizerError::State { expected, found }) }
    }

    /// Applies the mean update to `adapter` in place. `state` comes from [`ServerOptimizer::initial_state`]
    /// or an earlier step; all lengths agree.
    pub fn step(&self, adapter: &mut [f32], state: &mut [f32], mean: &[f32]) {
        let dimension = adapter.len();
        assert!(mean.len() == dimension, "the mean has the adapter's length");
        assert!(self.check_state(state, dimension).is_ok(), "the state is this optimizer's");
        match *self {
            Self::FedAvg { learning_rate } => {
                adapter.iter_mut().zip(mean).for_each(|(x, delta)| add(x, learning_rate * f64::from(*delta)));
            }
            Self::FedAvgM { learning_rate, momentum } => {
                for ((x, m), delta) in adapter.iter_mut().zip(state).zip(mean) {
                    *m = narrow(momentum * f64::from(*m) + f64::from(*delta));
                    add(x, learning_rate * f64::from(*m));
                }
            }
            Self::FedAdam { learning_rate, beta1, beta2, tau } => {
                let (first, second) = state.split_at_mut(dimension);
                for (((x, m), v), delta) in adapter.iter_mut().zip(first).zip(second).zip(mean) {
                    let delta = f64::from(*delta);
                    *m = narrow(beta1 * f64::from(*m) + (1.0 - beta1) * delta);
                    *v = narrow(beta2 * f64::from(*v) + (1.0 - beta2) * delta * delta);
                    add(x, learning_rate * f64::from(*m) / (f64::from(*v).sqrt() + tau));
                }
            }
        }
    }
}

fn add(x: &mut f32, step: f64) {
    *x = narrow(f64::from(*x) + step);
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
fn narrow(value: f64) -> f32 {
    value as f32
}

fn positive(field: &'static str, value: f64) -> Result<(), OptimizerError> {
    let good = value.is_finite() && value > 0.0 && value <= 1e6;
    if good { Ok(()) } else { Err(OptimizerError::Setting { field, value, range: "(0, 1e6]" }) }
}

fn decay(field: &'static str, value: f64) -> Result<(), OptimizerError> {
    if (0.0..1.0).contains(&value) {
        Ok(())
    } else {
        Err(OptimizerError::Setting { field, value, range: "[0, 1)" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(optimizer: ServerOptimizer, means: &[[f32; 2]]) -> Vec<f32> {
        let mut adapter = vec![1.0, -1.0];
        let mut state = optimizer.initial_state(2);
        for mean in means {
            optimizer.step(&mut adapter, &mut state, mean);
        }
        adapter
    }

    #[test]
    fn fedavg_adds_the_mean() {
        assert_eq!(run(ServerOptimizer::FedAvg { learning_rate: 1.0 }, &[[0.5, 0.25]]), [1.5, -0.75]);
        assert_eq!(run(ServerOptimizer::FedAvg { learning_rate: 0.5 }, &[[0.5, 0.25]]), [1.25, -0.875]);
    }

    /// By hand: m1 = 1, x = 1 + 0.5; m2 = 0.5 * 1 + 1 = 1.5, x = 1.5 + 0.75 (and negated).
    #[test]
    fn fedavgm_agrees_with_hsu_et_al_2019_by_hand() {
        let optimizer = ServerOptimizer::FedAvgM { learning_rate: 0.5, momentum: 0.5 };
        assert_eq!(run(optimizer, &[[1.0, -1.0], [1.0, -1.0]]), [2.25, -2.25]);
    }

    /// By hand, with beta1 = 0.9, beta2 = 0.99, tau = 0.1, learning rate 0.1 and means 1 then 0.5:
    /// v0 = 0.01; m1 = 0.1, v1 = 0.0099 + 0.01 = 0.0199, x1 = 1 + 0.01 / (0.141067 + 0.1) = 1.0414822;
    /// m2 = 0.09 + 0.05 = 0.14, v2 = 0.019701 + 0.0025 = 0.022201,
    /// x2 = x1 + 0.014 / (0.149000 + 0.1) = 1.0977071.
    #[test]
    fn fedadam_agrees_with_reddi_et_al_2021_algorithm_2_by_hand() {
        let optimizer = ServerOptimizer::FedAdam { learning_rate: 0.1, beta1: 0.9, beta2: 0.99, tau: 0.1 };
        let adapter = run(optimizer, &[[1.0, -1.0], [0.5, -0.5]]);
        assert!((adapter[0] - 1.097_707).abs() < 2e-6, "{adapter:?}");
        assert!((adapter[1] + 1.097_707).abs() < 2e-6, "{adapter:?}");
    }

    #[test]
    fn refuses_senseless_constants_and_foreign_state() {
        let adam =
            |beta2, tau| ServerOptimizer::FedAdam { learning_rate: 0.1, beta1: 0.9, beta2, tau }.check();
        assert!(adam(0.99, 1e-3).is_ok() && adam(1.0, 1e-3).is_err() && adam(0.99, 0.0).is_err());
        assert!(ServerOptimizer::FedAvg { learning_rate: f64::NAN }.check().is_err());
        let error = ServerOptimizer::FedAvg { learning_rate: 1.0 }.check_state(&[0.0], 1).unwrap_err();
        assert_eq!(error, OptimizerError::State { expected: 0, found: 1 });
    }
}
