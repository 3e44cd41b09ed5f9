//! What a device demands of a session, whatever the coordinator says.

use super::Abort;
use crate::{
    MEMBERS_MAX,
    identity::Registrars,
    messages::{RosterView, SurvivorSet},
    parameters::{self, FULL_GRAPH_BELOW},
};

/// The device's own bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Floors {
    /// Fewest members of a cohort.
    pub cohort_min: u32,
    /// Most members of a cohort: what is assumed of colluders counts on it.
    pub members_max: u32,
    /// Fewest survivors of whom a sum may open, this device included.
    pub survivors_min: u32,
    /// Share of the members that the device believes may collude with the coordinator, in thousandths.
    pub corrupted_permille: u32,
    /// Share of the members that may be missing from the sum where all are neighbours, in thousandths.
    pub dropout_permille: u32,
    /// The same in a sparse graph, which silent devices may cut in two.
    pub sparse_dropout_permille: u32,
    /// Statistical security: the graph fails to protect with probability below 2^-sigma. Part of it pays for
    /// a coordinator that draws the roster again and again: see `docs/protocol.md`.
    pub sigma: u32,
    /// Below this size every member must be a neighbour of every other.
    pub full_graph_below: u32,
}

/// Everything that a device brings into a session of its own.
#[derive(Debug, Clone)]
pub struct DevicePolicy {
    /// Population that its peers must be certified for.
    pub population: String,
    /// Who may certify them.
    pub registrars: Registrars,
    /// Bounds.
    pub floors: Floors,
}

impl Default for Floors {
    fn default() -> Self {
        Self {
            cohort_min: 4,
            members_max: u32::MAX,
            survivors_min: 3,
            corrupted_permille: 100,
            dropout_permille: 400,
            sparse_dropout_permille: 200,
            sigma: 40,
            full_graph_below: FULL_GRAPH_BELOW,
        }
    }
}

impl Floors {
    /// Most members that may be missing of `members` with `degree` neighbours each.
    #[must_use]
    pub fn missing_max(&self, members: u32, degree: u32) -> u32 {
        let full = degree.checked_add(1) == Some(members);
        let permille = if full { self.dropout_permille } else { self.sparse_dropout_permille };
        u32::try_from(u64::from(members) * u64::from(permille) / 1000).unwrap_or(u32::MAX)
    }

    /// Fewest survivors of `members` with `degree` neighbours each.
    #[must_use]
    pub fn survivors_of(&self, members: u32, degree: u32) -> u32 {
        self.survivors_min.max(members.saturating_sub(self.missing_max(members, degree)))
    }

    /// Stops cohorts of one or two, and thresholds so low that colluding peers, or two halves of the
    /// neighbours told of different survivors, could open what they must not.
    pub(super) fn check_roster(&self, view: &RosterView) -> Result<(), Abort> {
        let (members, degree) = (view.members, view.degrees.degree);
        if members < self.cohort_min.max(2) {
            return Err(Abort::CohortTooSmall { members, floor: self.cohort_min.max(2) });
        }
        let max = u32::try_from(MEMBERS_MAX).unwrap_or(u32::MAX).min(self.members_max);
        if members > max {
            return Err(Abort::CohortTooLarge { members, max });
        }
        if members < self.full_graph_below && degree != members - 1 {
            return Err(Abort::SparseGraph { degree, members, below: self.full_graph_below });
        }
        let missing = self.missing_max(members, degree);
        Ok(parameters::check(members, view.degrees, self.corrupted_permille, missing, self.sigma)?)
    }

    pub(super) fn check_survivors(&self, survivors: &SurvivorSet, degree: u32) -> Result<(), Abort> {
        let (count, floor) = (survivors.count(), self.survivors_of(survivors.members(), degree));
        if count < floor { Err(Abort::TooFewSurvivors { survivors: count, floor }) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameters::{Assumptions, solve};

    /// What a coordinator computes under its defaults, a device accepts under its own.
    #[test]
    fn the_defaults_of_both_sides_fit_each_other() {
        for (sigma, dropout_permille) in [(40, 50), (40, 100), (40, 200), (80, 50), (80, 200)] {
            let assumptions = Assumptions::new(100, dropout_permille, sigma, 20).unwrap();
            // What the signed plan says binds the device, where it is stricter.
            let own = Floors::default();
            let floors = Floors {
                sigma: own.sigma.max(sigma),
                sparse_dropout_permille: own.sparse_dropout_permille.min(dropout_permille),
                ..own
            };
            for n in (4..400).chain((400..1400).step_by(97)) {
                let Ok(degrees) = solve(n, &assumptions) else { panic!("{n} devices") };
                let missing = floors.missing_max(n, degrees.degree);
                let checked = parameters::check(n, degrees, floors.corrupted_permille, missing, floors.sigma);
                assert_eq!(checked, Ok(()), "{n} devices, {degrees:?}");
            }
        }
    }

    #[test]
    fn survivors_are_counted_against_both_floors() {
        let floors = Floors::default();
        assert_eq!([4, 5, 10, 63].map(|n| floors.survivors_of(n, n - 1)), [3, 3, 6, 38]);
        assert_eq!(floors.survivors_of(100, 52), 80);
        assert_eq!(Floors { survivors_min: 50, ..floors }.survivors_of(60, 59), 50);
    }
}
