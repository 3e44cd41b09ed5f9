//! Step 0 at the coordinator: who has advertised, and how they are split into cohorts.

use super::Cohort;
use crate::{
    MEMBERS_MAX,
    identity::Registrars,
    messages::{Advertisement, AdvertisementError},
    parameters::{Assumptions, Degrees, ParameterError, solve},
    session_id::{Labelled, Terms},
};
use std::collections::BTreeSet;
use thiserror::Error;

/// How cohorts are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CohortPlan {
    /// Most members of a cohort.
    pub members_max: u32,
    /// Fewest vectors of which a cohort's sum may open.
    pub survivors_min: u32,
    /// What degree and threshold are computed from.
    pub assumptions: Assumptions,
    /// Degree and threshold by hand, for benchmarks; devices hold them to their floors all the same.
    pub degrees: Option<Degrees>,
}

/// A device's place: which cohort, and where in its roster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seat {
    /// The cohort, from 0.
    pub cohort: u32,
    /// Place in the cohort's roster.
    pub index: u32,
}

/// Why a device's keys are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum AdmitError {
    /// Certificate or signature.
    #[error("advertisement: {0}")]
    Advertisement(#[from] AdvertisementError),
    /// The identity or one of the keys is there already.
    #[error("advertisement: the identity or a key of it has advertised before")]
    Duplicate,
    /// No more room.
    #[error("advertisement: the session is full")]
    Full,
}

/// The devices that have advertised, in the order of arrival.
pub struct Gathering {
    terms: Terms,
    population: String,
    registrars: Registrars,
    advertisements: Vec<Advertisement>,
    keys: BTreeSet<[u8; 32]>,
}

impl Gathering {
    /// Nobody yet.
    #[must_use]
    pub fn new(terms: Terms, population: &str, registrars: Registrars) -> Self {
        let population = population.to_owned();
        Self { terms, population, registrars, advertisements: Vec::new(), keys: BTreeSet::new() }
    }

    /// Takes a device in; its ticket is the number of those before it. Whoever is let in with keys that
    /// peers refuse would end their sessions, so everything that they check is checked here first.
    ///
    /// # Errors
    /// [`AdmitError`]; nothing has changed.
    pub fn admit(&mut self, advertisement: Advertisement, now_unix_ms: u64) -> Result<u32, AdmitError> {
        if self.advertisements.len() >= MEMBERS_MAX {
            return Err(AdmitError::Full);
        }
        let keys = [advertisement.certificate.public_key, advertisement.share_key, advertisement.mask_key];
        let repeated = keys[0] == keys[1] || keys[0] == keys[2] || keys[1] == keys[2];
        if repeated || keys.iter().any(|key| self.keys.contains(key)) {
            return Err(AdmitError::Duplicate);
        }
        let (session, population) = (&self.terms.session, &self.population);
        // One by one: a batch may hold with a signature that fails alone, and in the devices' batches.
        advertisement.verify(session, &self.registrars, population, now_unix_ms)?;
        self.keys.extend(keys);
        self.advertisements.push(advertisement);
        Ok(u32::try_from(self.advertisements.len() - 1).expect("bounded by MEMBERS_MAX"))
    }

    /// Devices taken in.
    #[must_use]
    pub fn count(&self) -> u32 {
        u32::try_from(self.advertisements.len()).expect("bounded by MEMBERS_MAX")
    }

    /// What the session is about.
    #[must_use]
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Freezes the rosters: as few cohorts of nearly equal size as the bound allows. Gives each ticket its
    /// seat. Who sits with whom follows a hash of the identities, not the order of arrival.
    ///
    /// # Errors
    /// [`ParameterError`] when no degree and threshold fit the size.
    pub fn into_cohorts(self, plan: &CohortPlan) -> Result<(Vec<Cohort>, Vec<Seat>), ParameterError> {
        let terms = self.terms;
        let mut order: Vec<usize> = (0..self.advertisements.len()).collect();
        order.sort_by_cached_key(|ticket| shuffle_key(&terms, &self.advertisements[*ticket]));
        let (mut cohorts, mut seats) = (Vec::new(), vec![Seat { cohort: 0, index: 0 }; order.len()]);
        for (cohort, tickets) in balanced(&order, plan.members_max.max(2) as usize).into_iter().enumerate() {
            let mut tickets = tickets.to_vec();
            tickets.sort_by_cached_key(|ticket| self.advertisements[*ticket].id());
            let cohort = u32::try_from(cohort).expect("fewer cohorts than members");
            for (index, ticket) in (0..).zip(&tickets) {
                seats[*ticket] = Seat { cohort, index };
            }
            let roster = tickets.iter().map(|ticket| self.advertisements[*ticket].clone()).collect();
            let members = u32::try_from(tickets.len()).expect("bounded by MEMBERS_MAX");
            let degrees = plan.degrees.map_or_else(|| solve(members, &plan.assumptions), Ok)?;
            cohorts.push(Cohort::new(terms, roster, degrees, plan.survivors_min));
        }
        Ok((cohorts, seats))
    }
}

fn shuffle_key(terms: &Terms, advertisement: &Advertisement) -> [u8; 32] {
    let mut hash = Labelled::new("cohort");
    hash.bytes(terms.session.as_bytes());
    hash.bytes(&advertisement.id().0);
    hash.finish()
}

/// Cuts into as few parts of at most `max` as possible, whose sizes differ by at most one.
fn balanced(order: &[usize], max: usize) -> Vec<&[usize]> {
    let parts = order.len().div_ceil(max);
    let mut rest = order;
    let mut cut = Vec::with_capacity(parts);
    for left in (1..=parts).rev() {
        let (part, after) = rest.split_at(rest.len().div_ceil(left));
        cut.push(part);
        rest = after;
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cohorts_are_few_and_of_nearly_equal_size() {
        let order: Vec<usize> = (0..101).collect();
        let sizes = |max| balanced(&order, max).iter().map(|part| part.len()).collect::<Vec<_>>();
        assert_eq!(sizes(101), [101]);
        assert_eq!(sizes(100), [51, 50]);
        assert_eq!(sizes(30), [26, 25, 25, 25]);
        assert_eq!(balanced(&order, 30).concat(), order);
        assert!(balanced(&[], 30).is_empty());
    }
}
