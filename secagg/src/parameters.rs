//! How many neighbours a device needs, and how many shares rebuild a secret (Bell et al. 2020, section 4.3
//! and theorem 4.10; section 5 for the malicious coordinator).
//!
//! Of n devices, A = floor(gamma n) are corrupted and D = floor(delta n) vanish. With k neighbours each:
//!
//! 1. the honest survivors stay connected: n (n-k-1) / 2 * P <= 2^-(sigma+1), where
//!    P = (A+D)! (n-k)! / (n! (A+D-k)!) is the chance that a given gap of k places on the ring falls silent;
//! 2. c, the corrupted neighbours of any device: the smallest c with n P[Hyp(n-1, A, k) > c] <= 2^-(sigma+1);
//! 3. t with 2t > k + c: two different sets of survivors cannot both be confirmed by t neighbours, and t - 1
//!    corrupted neighbours rebuild nothing;
//! 4. sessions succeed: n P[Hyp(n-1, n-1-D, k) < t] <= 2^-eta.

use crate::MEMBERS_MAX;
use thiserror::Error;

/// Below this size everybody is everybody's neighbour: the bounds are asymptotic, and it costs little.
pub const FULL_GRAPH_BELOW: u32 = 64;
/// Most neighbours: a share's place is one byte other than zero.
pub const DEGREE_MAX: u32 = 254;
/// Largest statistical security, bits.
const SIGMA_MAX: u32 = 128;

/// What is assumed of the devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assumptions {
    /// Share of the devices that may collude with the coordinator, thousandths.
    pub corrupted_permille: u32,
    /// Share of the devices that may vanish, thousandths.
    pub dropout_permille: u32,
    /// Privacy fails with probability below 2^-sigma.
    pub sigma: u32,
    /// A session fails for want of shares with probability below 2^-eta.
    pub eta: u32,
}

/// Neighbours of each device, and shares that rebuild a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Degrees {
    /// k.
    pub degree: u32,
    /// t.
    pub threshold: u32,
}

/// Why there is no degree and threshold, or why those named are refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParameterError {
    /// The assumptions leave no honest majority among the survivors.
    #[error(
        "{corrupted_permille} permille corrupted and {dropout_permille} permille dropouts: corrupted plus twice the dropouts must stay at or below 900"
    )]
    Assumptions {
        /// Corrupted, thousandths.
        corrupted_permille: u32,
        /// Dropouts, thousandths.
        dropout_permille: u32,
    },
    /// Security parameters out of range.
    #[error("sigma {sigma} or eta {eta} is not in 1..={SIGMA_MAX}")]
    Security {
        /// Privacy, bits.
        sigma: u32,
        /// Correctness, bits.
        eta: u32,
    },
    /// Fewer than two devices, or more than the protocol allows.
    #[error("{0} devices make no cohort: 2 to {MEMBERS_MAX} do")]
    Members(u32),
    /// No degree up to the largest is enough.
    #[error(
        "{members} devices: no degree up to {degree_max} satisfies all conditions; the last to fail was {condition}"
    )]
    Infeasible {
        /// Devices.
        members: u32,
        /// Largest degree tried.
        degree_max: u32,
        /// The condition.
        condition: &'static str,
    },
    /// A small cohort loses more than it can.
    #[error(
        "{members} devices, all neighbours: {threshold} shares must be there, {present} are left after {dropouts} dropouts"
    )]
    Threshold {
        /// Devices.
        members: u32,
        /// Shares that rebuild a secret.
        threshold: u32,
        /// Neighbours left.
        present: u32,
        /// Devices that may vanish.
        dropouts: u32,
    },
    /// A degree that the graph cannot have.
    #[error(
        "degree {degree} among {members} devices: even, below {members} and at most {DEGREE_MAX}, or all others"
    )]
    Degree {
        /// Devices.
        members: u32,
        /// The degree.
        degree: u32,
    },
    /// A threshold above the degree.
    #[error("threshold {threshold} with {degree} neighbours")]
    ThresholdAboveDegree {
        /// The threshold.
        threshold: u32,
        /// The degree.
        degree: u32,
    },
    /// The honest devices may fall apart into parts whose sums could be told from each other.
    #[error(
        "degree {degree} among {members} devices: the honest survivors may not be connected (2^-{sigma} demanded)"
    )]
    Disconnected {
        /// Devices.
        members: u32,
        /// The degree.
        degree: u32,
        /// Bits demanded.
        sigma: u32,
    },
    /// Two sets of survivors could both be confirmed.
    #[error("threshold {threshold} with {degree} neighbours of whom {corrupted} may be corrupted: twice the threshold must be above {}", degree + corrupted)]
    Equivocation {
        /// The threshold.
        threshold: u32,
        /// The degree.
        degree: u32,
        /// Corrupted neighbours.
        corrupted: u32,
    },
}

impl Assumptions {
    /// Checks that they can be met at all (condition gamma + 2 delta <= 0.9).
    ///
    /// # Errors
    /// [`ParameterError::Assumptions`] or [`ParameterError::Security`].
    pub fn new(
        corrupted_permille: u32,
        dropout_permille: u32,
        sigma: u32,
        eta: u32,
    ) -> Result<Self, ParameterError> {
        if u64::from(corrupted_permille) + 2 * u64::from(dropout_permille) > 900 {
            return Err(ParameterError::Assumptions { corrupted_permille, dropout_permille });
        }
        let range = 1..=SIGMA_MAX;
        if !range.contains(&sigma) || !range.contains(&eta) {
            return Err(ParameterError::Security { sigma, eta });
        }
        Ok(Self { corrupted_permille, dropout_permille, sigma, eta })
    }
}

/// Degree and threshold for `n` devices: all are neighbours below [`FULL_GRAPH_BELOW`], the smallest even
/// degree that satisfies the four conditions from there.
///
/// # Errors
/// [`ParameterError`] says what cannot be satisfied.
pub fn solve(n: u32, assumptions: &Assumptions) -> Result<Degrees, ParameterError> {
    if !is_cohort(n) {
        return Err(ParameterError::Members(n));
    }
    if n >= FULL_GRAPH_BELOW {
        // Just above the bound a sparse graph may not do yet; a full one does.
        let sparse = solve_sparse(n, assumptions, DEGREE_MAX);
        return if n - 1 <= DEGREE_MAX { sparse.or_else(|_| solve_full(n, assumptions)) } else { sparse };
    }
    solve_full(n, assumptions)
}

fn solve_full(n: u32, assumptions: &Assumptions) -> Result<Degrees, ParameterError> {
    let (corrupted, dropouts) =
        (part(n, assumptions.corrupted_permille), part(n, assumptions.dropout_permille));
    let degree = n - 1;
    let threshold = (degree + corrupted) / 2 + 1;
    let present = n - 1 - dropouts;
    if threshold > present {
        return Err(ParameterError::Threshold { members: n, threshold, present, dropouts });
    }
    Ok(Degrees { degree, threshold })
}

/// The same without the rule for small cohorts and with a bound of one's own on the degree.
///
/// # Errors
/// [`ParameterError::Infeasible`] names the condition that failed last.
pub fn solve_sparse(n: u32, assumptions: &Assumptions, degree_max: u32) -> Result<Degrees, ParameterError> {
    if !is_cohort(n) {
        return Err(ParameterError::Members(n));
    }
    let table = Factorials::new(n);
    let (corrupted, dropouts) =
        (part(n, assumptions.corrupted_permille), part(n, assumptions.dropout_permille));
    let mut condition = "none";
    for degree in (2..n).step_by(2).take_while(|degree| *degree <= degree_max) {
        if !table.is_connected(n, degree, corrupted + dropouts, assumptions.sigma) {
            condition = "connectivity";
            continue;
        }
        let threshold =
            (degree + table.corrupted_neighbours(n, degree, corrupted, assumptions.sigma)) / 2 + 1;
        if threshold <= degree && table.has_shares(n, degree, threshold, dropouts, assumptions.eta) {
            return Ok(Degrees { degree, threshold });
        }
        condition = "correctness";
    }
    Err(ParameterError::Infeasible { members: n, degree_max: degree_max.min(n - 1), condition })
}

/// What a device demands of a degree and threshold that the coordinator names, under its own assumption of
/// corrupted devices and with at most `dropouts` devices missing: conditions 1, 2 and 3.
///
/// # Errors
/// [`ParameterError`] names the condition that does not hold.
pub fn check(
    n: u32,
    degrees: Degrees,
    corrupted_permille: u32,
    dropouts: u32,
    sigma: u32,
) -> Result<(), ParameterError> {
    let Degrees { degree, threshold } = degrees;
    let is_full = degree.checked_add(1) == Some(n);
    if !is_cohort(n) {
        return Err(ParameterError::Members(n));
    }
    if degree == 0 || degree >= n || degree > DEGREE_MAX || (degree % 2 == 1 && !is_full) {
        return Err(ParameterError::Degree { members: n, degree });
    }
    if threshold > degree {
        return Err(ParameterError::ThresholdAboveDegree { threshold, degree });
    }
    let corrupted = part(n, corrupted_permille);
    let table = Factorials::new(n);
    if !table.is_connected(n, degree, corrupted.saturating_add(dropouts).min(n), sigma) {
        return Err(ParameterError::Disconnected { members: n, degree, sigma });
    }
    let corrupted = table.corrupted_neighbours(n, degree, corrupted, sigma);
    if 2 * threshold <= degree + corrupted {
        return Err(ParameterError::Equivocation { threshold, degree, corrupted });
    }
    Ok(())
}

fn is_cohort(n: u32) -> bool {
    (2..=MEMBERS_MAX).contains(&(n as usize))
}

/// floor(n * permille / 1000).
fn part(n: u32, permille: u32) -> u32 {
    u32::try_from(u64::from(n) * u64::from(permille.min(1000)) / 1000).expect("at most n")
}

/// log2 of the factorials 0! to n!.
struct Factorials(Vec<f64>);

impl Factorials {
    fn new(n: u32) -> Self {
        let mut sum = 0.0;
        let next = |i: u32| {
            sum += f64::from(i.max(1)).log2();
            sum
        };
        Self((0..=n).map(next).collect())
    }

    fn log2(&self, n: u32) -> f64 {
        self.0[n as usize]
    }

    fn log2_choose(&self, n: u32, k: u32) -> f64 {
        if k > n { f64::NEG_INFINITY } else { self.log2(n) - self.log2(k) - self.log2(n - k) }
    }

    /// Condition 1 with `silent` = A + D.
    fn is_connected(&self, n: u32, degree: u32, silent: u32, sigma: u32) -> bool {
        if degree > silent || degree + 1 >= n {
            return true;
        }
        let gaps = (f64::from(n) * f64::from(n - degree - 1) / 2.0).log2();
        let silence = self.log2(silent) + self.log2(n - degree) - self.log2(n) - self.log2(silent - degree);
        gaps + silence <= -f64::from(sigma + 1)
    }

    /// Condition 2: the tail is added up from its far end until it is too heavy.
    fn corrupted_neighbours(&self, n: u32, degree: u32, corrupted: u32, sigma: u32) -> u32 {
        let bound = (-f64::from(sigma + 1) - f64::from(n).log2()).exp2();
        let mut tail = 0.0;
        for x in (1..=corrupted.min(degree)).rev() {
            tail += self.hypergeometric(n - 1, corrupted, degree, x);
            if tail > bound {
                return x;
            }
        }
        0
    }

    /// Condition 4.
    fn has_shares(&self, n: u32, degree: u32, threshold: u32, dropouts: u32, eta: u32) -> bool {
        let bound = (-f64::from(eta) - f64::from(n).log2()).exp2();
        let present = n.saturating_sub(dropouts + 1);
        let short: f64 = (0..threshold).map(|x| self.hypergeometric(n - 1, present, degree, x)).sum();
        short <= bound
    }

    /// P[Hyp(population, marked, draws) = x].
    fn hypergeometric(&self, population: u32, marked: u32, draws: u32, x: u32) -> f64 {
        if x > draws || x > marked || draws - x > population - marked {
            return 0.0;
        }
        let ways = self.log2_choose(marked, x) + self.log2_choose(population - marked, draws - x);
        (ways - self.log2_choose(population, draws)).exp2()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [u32; 6] = [50, 100, 200, 500, 1000, 5000];

    /// (gamma, delta) in thousandths and (k, t) for each of [`SIZES`], sigma 40, eta 20.
    const GOLDEN: [(u32, u32, [(u32, u32); 6]); 6] = [
        (50, 50, [(8, 6), (16, 11), (30, 21), (44, 31), (52, 37), (58, 41)]),
        (50, 100, [(14, 9), (26, 16), (42, 27), (66, 44), (78, 52), (92, 61)]),
        (100, 100, [(16, 11), (32, 22), (56, 39), (82, 57), (96, 67), (116, 81)]),
        (100, 200, [(26, 16), (52, 32), (88, 55), (154, 98), (196, 125), (260, 166)]),
        (200, 200, [(32, 22), (62, 42), (118, 80), (220, 150), (302, 206), (442, 301)]),
        (330, 100, [(28, 23), (54, 44), (98, 78), (168, 132), (218, 171), (292, 228)]),
    ];

    #[test]
    fn golden_table() {
        for (gamma, delta, row) in GOLDEN {
            let assumptions = Assumptions::new(gamma, delta, 40, 20).unwrap();
            for (n, (degree, threshold)) in SIZES.into_iter().zip(row) {
                let found = solve_sparse(n, &assumptions, u32::MAX).unwrap();
                assert_eq!(found, Degrees { degree, threshold }, "{gamma} {delta} {n}");
                if degree <= DEGREE_MAX {
                    let dropouts = part(n, delta);
                    assert_eq!(check(n, found, gamma, dropouts, 40), Ok(()));
                    let lower = Degrees { threshold: threshold - 1, degree };
                    let error = check(n, lower, gamma, dropouts, 40).unwrap_err();
                    assert!(matches!(error, ParameterError::Equivocation { .. }), "{error}");
                }
            }
        }
    }

    #[test]
    fn small_cohorts_are_fully_connected() {
        let assumptions = Assumptions::new(100, 200, 40, 20).unwrap();
        for n in 4..FULL_GRAPH_BELOW {
            let degrees = solve(n, &assumptions).unwrap();
            assert_eq!(degrees.degree, n - 1);
            assert_eq!(check(n, degrees, 100, part(n, 200), 40), Ok(()));
        }
        assert_eq!(solve(16, &assumptions).unwrap(), Degrees { degree: 15, threshold: 9 });
        assert_eq!(solve(64, &assumptions).unwrap().degree % 2, 0);
    }

    #[test]
    fn refuses_what_cannot_be_and_says_why() {
        let says = |outcome: Result<Degrees, ParameterError>, expected: &str| {
            let error = outcome.unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        };
        assert!(Assumptions::new(100, 401, 40, 20).is_err());
        assert!(Assumptions::new(0, 0, 0, 20).is_err() && Assumptions::new(0, 0, 40, 129).is_err());
        let lossy = Assumptions::new(100, 400, 40, 20).unwrap();
        says(solve(10, &lossy), "10 devices, all neighbours: 6 shares must be there, 5 are left after 4");
        says(solve(1, &lossy), "1 devices make no cohort");
        let hard = Assumptions::new(200, 200, 40, 20).unwrap();
        says(solve(1000, &hard), "1000 devices: no degree up to 254 satisfies all conditions");
    }

    #[test]
    fn a_device_refuses_degrees_that_do_not_protect_it() {
        let refused = |n, degree, threshold, expected: &str| {
            let error = check(n, Degrees { degree, threshold }, 100, n / 5, 40).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        };
        refused(100, 51, 40, "degree 51 among 100 devices: even");
        refused(100, 100, 60, "degree 100 among 100 devices");
        refused(1000, 256, 200, "degree 256 among 1000 devices");
        refused(100, 0, 0, "degree 0");
        refused(100, 52, 53, "threshold 53 with 52 neighbours");
        refused(1000, 10, 10, "degree 10 among 1000 devices: the honest survivors may not be connected");
        refused(100, 52, 27, "threshold 27 with 52 neighbours");
        assert!(check(1, Degrees { degree: 0, threshold: 0 }, 0, 0, 40).is_err());
        assert!(check(u32::MAX, Degrees { degree: u32::MAX - 1, threshold: 1 }, 0, 0, 1).is_err());
    }
}
