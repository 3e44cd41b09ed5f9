//! Audits: lower bounds on epsilon from how well membership can be guessed, to hold against what is claimed.
//!
//! An attacker gives each canary, or each run, a score; higher means "it took part". A bound above the claim
//! proves the claim wrong, up to the confidence. A bound below it proves nothing: the attack may be weak. So a
//! test that relies on an audit must also show that the same audit catches a mechanism that is broken.
//!
//! [`one_run`] needs one run with many canaries, [`clopper_pearson`] many runs with one.

mod binomial;
mod one_run;
mod trials;

pub use one_run::{Guesses, SHARES, epsilon_one_run, one_run, one_run_p_value};
pub use trials::{Trials, clopper_pearson, epsilon_clopper_pearson};

fn assert_delta(delta: f64) {
    assert!((0.0..1.0).contains(&delta), "delta is {delta}; it must be at least 0 and below 1");
}

fn assert_chance(name: &str, value: f64) {
    assert!(value > 0.0 && value < 1.0, "{name} is {value}; it must be above 0 and below 1");
}

fn assert_scores(scores: &[f64]) {
    assert!(scores.iter().all(|score| score.is_finite()), "scores must be finite");
}

#[cfg(test)]
mod simulated {
    use rand_chacha::{
        ChaCha8Rng,
        rand_core::{Rng, SeedableRng},
    };

    /// Scores from a seed.
    pub(super) struct Scores(ChaCha8Rng);

    impl Scores {
        pub(super) fn new(seed: u64) -> Self {
            Self(ChaCha8Rng::seed_from_u64(seed))
        }

        /// Above 0, at most 1.
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
        pub(super) fn uniform(&mut self) -> f64 {
            ((self.0.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
        }

        /// `count` sums of `shift` and Gaussian noise.
        pub(super) fn gaussian(&mut self, count: usize, shift: f64, sigma: f64) -> Vec<f64> {
            let each = |_| {
                let radius = (-2.0 * self.uniform().ln()).sqrt();
                shift + sigma * radius * (std::f64::consts::TAU * self.uniform()).cos()
            };
            (0..count).map(each).collect()
        }

        /// How many of `count` fair coins show heads.
        pub(super) fn heads(&mut self, count: usize) -> usize {
            (0..count).filter(|_| self.uniform() <= 0.5).count()
        }
    }
}
