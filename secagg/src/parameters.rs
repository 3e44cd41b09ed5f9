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
        "{members} devices: no degree up to {degree_max} satisfies all conditions; the last to fail was {condition}, by {bits_missing} bits"
    )]
    Infeasible {
        /// Devices.
        members: u32,
        /// Largest degree tried.
        degree_max: u32,
        /// The condition.
        condition: &'static str,
        /// How far the probability of its failure is above what is allowed, as a power of two.
        bits_missing: u32,
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

    /// A and D among `n` devices. The fields are public, so they are checked here again.
    fn parts(&self, n: u32) -> Result<(u32, u32), ParameterError> {
        let Self { corrupted_permille, dropout_permille, sigma, eta } = *self;
        Self::new(corrupted_permille, dropout_permille, sigma, eta)?;
        Ok((part(n, corrupted_permille), part(n, dropout_permille)))
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
    let (corrupted, dropouts) = assumptions.parts(n)?;
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
    search(n, assumptions, degree_max, |degree, corrupted| (degree + corrupted) / 2 + 1)
}

/// The smallest even degree that satisfies the conditions with the threshold that `threshold_of` gives for a
/// degree and a number of corrupted neighbours.
fn search(
    n: u32,
    assumptions: &Assumptions,
    degree_max: u32,
    threshold_of: impl Fn(u32, u32) -> u32,
) -> Result<Degrees, ParameterError> {
    if !is_cohort(n) {
        return Err(ParameterError::Members(n));
    }
    let (corrupted, dropouts) = assumptions.parts(n)?;
    let (sigma, eta) = (assumptions.sigma, assumptions.eta);
    let table = Factorials::new(n);
    let mut failed = ("the graph, which needs an even degree", 0.0);
    for degree in (2..n).step_by(2).take_while(|degree| *degree <= degree_max) {
        let excess = table.log2_disconnected(n, degree, corrupted + dropouts) + f64::from(sigma + 1);
        if excess > 0.0 {
            failed = ("connectivity", excess);
            continue;
        }
        let threshold = threshold_of(degree, table.corrupted_neighbours(n, degree, corrupted, sigma));
        // A threshold above the degree is never met: the probability is 1.
        let excess = table.log2_short_of_shares(n, degree, threshold, dropouts) + f64::from(eta);
        if excess <= 0.0 {
            return Ok(Degrees { degree, threshold });
        }
        failed = ("correctness", excess);
    }
    let (condition, excess) = failed;
    let bits_missing = excess.ceil() as u32;
    Err(ParameterError::Infeasible { members: n, degree_max: degree_max.min(n - 1), condition, bits_missing })
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
    // A device that asks does not count itself among the corrupted.
    let corrupted = part(n, corrupted_permille).min(n - 1);
    let table = Factorials::new(n);
    let silent = corrupted.saturating_add(dropouts).min(n);
    if table.log2_disconnected(n, degree, silent) > -f64::from(sigma.saturating_add(1)) {
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

    /// Condition 1: the bound on the chance that the honest survivors are not connected, with `silent` = A + D.
    fn log2_disconnected(&self, n: u32, degree: u32, silent: u32) -> f64 {
        if degree > silent || degree + 1 >= n {
            return f64::NEG_INFINITY;
        }
        let gaps = (f64::from(n) * f64::from(n - degree - 1) / 2.0).log2();
        gaps + self.log2(silent) + self.log2(n - degree) - self.log2(n) - self.log2(silent - degree)
    }

    /// Condition 2: the tail is added up from its far end until it is too heavy.
    fn corrupted_neighbours(&self, n: u32, degree: u32, corrupted: u32, sigma: u32) -> u32 {
        let bound = (-f64::from(sigma.saturating_add(1)) - f64::from(n).log2()).exp2();
        let mut tail = 0.0;
        for x in (1..=corrupted.min(degree)).rev() {
            tail += self.hypergeometric(n - 1, corrupted, degree, x);
            if tail > bound {
                return x;
            }
        }
        0
    }

    /// Condition 4: the bound on the chance that some device has fewer than `threshold` neighbours left.
    fn log2_short_of_shares(&self, n: u32, degree: u32, threshold: u32, dropouts: u32) -> f64 {
        let present = n - 1 - dropouts;
        let short: f64 = (0..threshold).map(|x| self.hypergeometric(n - 1, present, degree, x)).sum();
        f64::from(n).log2() + short.log2()
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
mod tests;
