//! The device's own account: what it has given away, how often, and when. The device asks it before it takes
//! part and writes the charge to disk before the masked vector leaves; what it sends again is byte-identical
//! and free.
//!
//! Check, then charge: a request over a budget changes nothing, so it does not spoil the ledger for smaller
//! ones. The clock is the device's. Set forward, it can shorten a separation in time and nothing else: the
//! separation in rounds and the number of participations hold by counting. While it stands before the last
//! participation, a separation counts from the earliest time seen since.

mod policy;

pub use policy::{LedgerError, PrivacyPolicy, Purpose};

use crate::account::{Delta, ORDERS, RdpCurve};
use sha2::{Digest, Sha256};

/// Tasks that a device can have taken part in: forgetting one would forget its participations.
pub const SCOPES_MAX: usize = 512;
const MAGIC: &[u8; 8] = b"FLTLEDG1";
const SCOPE_BYTES: usize = 32 + 1 + 4 + 4 + 8 + 8 + 32 + 4 + 8 + 4 + ORDERS.len() * 8;

/// What one participation would cost, and what its plan allows.
#[derive(Debug, Clone, PartialEq)]
pub struct Charge {
    /// The task; plans of the same task share its participations.
    pub scope: Scope,
    /// What the contribution is for.
    pub purpose: Purpose,
    /// Names the contribution by something that the device drew itself: the same charge twice is one. A name
    /// that others choose would let them make every later contribution free.
    pub id: ChargeId,
    /// Round, from 0.
    pub round: u32,
    /// What it gives away at worst.
    pub curve: RdpCurve,
    /// Most participations in the task.
    pub participations_max: u32,
    /// Least time since the last one, milliseconds.
    pub separation_ms: u64,
    /// Least rounds since the last one.
    pub separation_rounds: u32,
}

/// Name of one contribution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChargeId {
    /// Nothing has been drawn yet: never the same as any other.
    Unnamed,
    /// Hash of the contribution's own fresh keys.
    Fresh([u8; 32]),
}

/// A task of a population, by hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Scope([u8; 32]);

impl Scope {
    /// The scope of a task.
    #[must_use]
    pub fn of_task(population: &str, task: &str) -> Self {
        let hash = Sha256::new().chain_update("fleetune ledger scope v1");
        let length = (population.len() as u64).to_le_bytes();
        Self(hash.chain_update(length).chain_update(population).chain_update(task).finalize().into())
    }
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    scope: Scope,
    purpose: Purpose,
    participations: u32,
    last_round: u32,
    last_unix_ms: u64,
    /// The earliest time seen since the clock went back behind the last charge; the greatest number for none.
    restart_unix_ms: u64,
    last_id: [u8; 32],
    participations_max: u32,
    separation_ms: u64,
    separation_rounds: u32,
    spent: RdpCurve,
}

/// Everything a device has been charged.
#[derive(Debug, Clone, PartialEq)]
pub struct Ledger {
    entries: Vec<Entry>,
    spent: [RdpCurve; Purpose::ALL.len()],
    /// Contributions to tasks without differential privacy.
    unprotected: u64,
}

/// One task's line, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LedgerLine {
    /// The task.
    pub scope: Scope,
    /// What its contributions were for.
    pub purpose: Purpose,
    /// Contributions charged.
    pub participations: u32,
    /// Most that the task's latest plan allows.
    pub participations_max: u32,
    /// When the last was charged, milliseconds since 1970.
    pub last_unix_ms: u64,
}

impl Default for Ledger {
    fn default() -> Self {
        Self { entries: Vec::new(), spent: std::array::from_fn(|_| RdpCurve::zero()), unprotected: 0 }
    }
}

impl Ledger {
    /// True if a plan that was seen before leaves no room now; a device then does not name its task.
    #[must_use]
    pub fn is_closed(&self, scope: Scope, now_unix_ms: u64) -> bool {
        let Some(entry) = self.entries.iter().find(|entry| entry.scope == scope) else { return false };
        entry.participations >= entry.participations_max
            || entry.wait_ms(entry.separation_ms, now_unix_ms) > 0
    }

    /// What one purpose has cost so far.
    #[must_use]
    pub fn spent(&self, purpose: Purpose) -> &RdpCurve {
        &self.spent[purpose.index()]
    }

    /// What all purposes together have cost so far.
    #[must_use]
    pub fn spent_in_all(&self) -> RdpCurve {
        self.spent.iter().fold(RdpCurve::zero(), |sum, curve| sum.plus(curve))
    }

    /// Masked contributions to tasks without differential privacy: nothing bounds what they gave away.
    #[must_use]
    pub fn unprotected(&self) -> u64 {
        self.unprotected
    }

    /// Counts one of them.
    pub fn note_unprotected(&mut self) {
        self.unprotected = self.unprotected.saturating_add(1);
    }

    /// True if the task was charged before: it must not go on without differential privacy then.
    #[must_use]
    pub fn knows(&self, scope: Scope) -> bool {
        self.entries.iter().any(|entry| entry.scope == scope)
    }

    /// A line for each task.
    pub fn lines(&self) -> impl Iterator<Item = LedgerLine> {
        self.entries.iter().map(|entry| LedgerLine {
            scope: entry.scope,
            purpose: entry.purpose,
            participations: entry.participations,
            participations_max: entry.participations_max,
            last_unix_ms: entry.last_unix_ms,
        })
    }

    /// Says whether the charge is within the plan, the device's policy and the budgets that are left.
    ///
    /// # Errors
    /// [`LedgerError`] names what stands against it; the ledger is as before.
    pub fn check(
        &self,
        charge: &Charge,
        policy: &PrivacyPolicy,
        now_unix_ms: u64,
    ) -> Result<(), LedgerError> {
        if self.is_charged(charge) {
            return Ok(());
        }
        let mut task = charge.curve.clone();
        if let Some(entry) = self.entries.iter().find(|entry| entry.scope == charge.scope) {
            entry.check(charge, now_unix_ms)?;
            task = task.plus(&entry.spent);
        } else if self.entries.len() >= SCOPES_MAX {
            return Err(LedgerError::Scopes { max: SCOPES_MAX });
        }
        policy.check_task(&task)?;
        let after = self.spent(charge.purpose).plus(&charge.curve);
        let all = self.spent_in_all().plus(&charge.curve);
        policy.check_budget(charge.purpose, &after, &all)
    }

    /// Charges a contribution, once however often it is asked. The caller makes the ledger durable before
    /// the contribution leaves.
    ///
    /// # Errors
    /// As for [`Ledger::check`].
    pub fn charge(
        &mut self,
        charge: &Charge,
        policy: &PrivacyPolicy,
        now_unix_ms: u64,
    ) -> Result<(), LedgerError> {
        self.check(charge, policy, now_unix_ms)?;
        if self.is_charged(charge) {
            return Ok(());
        }
        let index = charge.purpose.index();
        self.spent[index] = self.spent[index].plus(&charge.curve);
        let (participations, spent) = match self.entries.iter().position(|entry| entry.scope == charge.scope)
        {
            Some(at) => {
                let entry = self.entries.swap_remove(at);
                (entry.participations, entry.spent.plus(&charge.curve))
            }
            None => (0, charge.curve.clone()),
        };
        let last_id = match charge.id {
            ChargeId::Unnamed => [0; 32],
            ChargeId::Fresh(id) => id,
        };
        self.entries.push(Entry {
            scope: charge.scope,
            purpose: charge.purpose,
            participations: participations.saturating_add(1),
            last_round: charge.round,
            last_unix_ms: now_unix_ms,
            restart_unix_ms: u64::MAX,
            last_id,
            participations_max: charge.participations_max,
            separation_ms: charge.separation_ms,
            separation_rounds: charge.separation_rounds,
            spent,
        });
        Ok(())
    }

    /// Tells the ledger the time. While the clock stands before the last charge, a separation counts from the
    /// earliest time seen since: otherwise a clock that once stood in the future would lock a task for ever. Once
    /// it has passed the last charge again (a device that begins each start in 1970 and is then set right), the
    /// separation counts from the charge as before.
    pub fn observe_clock(&mut self, now_unix_ms: u64) {
        for entry in &mut self.entries {
            entry.restart_unix_ms = if now_unix_ms < entry.last_unix_ms {
                entry.restart_unix_ms.min(now_unix_ms)
            } else {
                u64::MAX
            };
        }
    }

    /// The bytes to keep; they end with a checksum.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend((ORDERS.len() as u32).to_le_bytes());
        for value in self.spent.iter().flat_map(|curve| curve.values()) {
            bytes.extend(value.to_bits().to_le_bytes());
        }
        bytes.extend(self.unprotected.to_le_bytes());
        bytes.extend(u32::try_from(self.entries.len()).expect("at most SCOPES_MAX").to_le_bytes());
        for entry in &self.entries {
            entry.write(&mut bytes);
        }
        let checksum = Sha256::digest(&bytes);
        bytes.extend(checksum);
        bytes
    }

    /// Reads [`Ledger::to_bytes`] back; none if the bytes are damaged. A damaged ledger must stop a device: an
    /// empty one in its place would spend every budget again.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (body, checksum) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
        if Sha256::digest(body).as_slice() != checksum {
            return None;
        }
        let mut reader = Reader(body);
        if reader.take::<8>()? != *MAGIC || usize::try_from(reader.u32()?).ok()? != ORDERS.len() {
            return None;
        }
        let mut ledger = Self::default();
        for spent in &mut ledger.spent {
            *spent = reader.curve()?;
        }
        ledger.unprotected = reader.u64()?;
        let count = usize::try_from(reader.u32()?).ok()?;
        if count > SCOPES_MAX || reader.0.len() != count * SCOPE_BYTES {
            return None;
        }
        ledger.entries = (0..count).map(|_| Entry::read(&mut reader)).collect::<Option<_>>()?;
        Some(ledger)
    }

    fn is_charged(&self, charge: &Charge) -> bool {
        let ChargeId::Fresh(id) = charge.id else { return false };
        let same = |entry: &Entry| {
            entry.scope == charge.scope && entry.last_id == id && entry.last_round == charge.round
        };
        self.entries.iter().any(same)
    }
}

impl Entry {
    /// Milliseconds until a separation has passed since the last charge.
    fn wait_ms(&self, separation_ms: u64, now_unix_ms: u64) -> u64 {
        let since = if now_unix_ms < self.last_unix_ms {
            // The clock went back; unless it was observed, nothing is known to have passed.
            self.restart_unix_ms.min(self.last_unix_ms)
        } else {
            self.last_unix_ms
        };
        let passed = now_unix_ms.saturating_sub(since);
        separation_ms.saturating_sub(passed)
    }

    fn check(&self, charge: &Charge, now_unix_ms: u64) -> Result<(), LedgerError> {
        if self.participations >= charge.participations_max {
            let (taken, max) = (self.participations, charge.participations_max);
            return Err(LedgerError::Participations { taken, max });
        }
        let next = self.last_round.saturating_add(charge.separation_rounds);
        if charge.round < next {
            return Err(LedgerError::Rounds { round: charge.round, next });
        }
        match self.wait_ms(charge.separation_ms, now_unix_ms) {
            0 => Ok(()),
            wait_ms => Err(LedgerError::Separation { wait_ms }),
        }
    }

    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.scope.0);
        bytes.push(self.purpose.number());
        bytes.extend(self.participations.to_le_bytes());
        bytes.extend(self.last_round.to_le_bytes());
        bytes.extend(self.last_unix_ms.to_le_bytes());
        bytes.extend(self.restart_unix_ms.to_le_bytes());
        bytes.extend(self.last_id);
        bytes.extend(self.participations_max.to_le_bytes());
        bytes.extend(self.separation_ms.to_le_bytes());
        bytes.extend(self.separation_rounds.to_le_bytes());
        self.spent.values().iter().for_each(|value| bytes.extend(value.to_bits().to_le_bytes()));
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            scope: Scope(reader.take()?),
            purpose: Purpose::from_number(reader.take::<1>()?[0])?,
            participations: reader.u32()?,
            last_round: reader.u32()?,
            last_unix_ms: reader.u64()?,
            restart_unix_ms: reader.u64()?,
            last_id: reader.take()?,
            participations_max: reader.u32()?,
            separation_ms: reader.u64()?,
            separation_rounds: reader.u32()?,
            spent: reader.curve()?,
        })
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn curve(&mut self) -> Option<RdpCurve> {
        let values = (0..ORDERS.len()).map(|_| self.u64().map(f64::from_bits));
        RdpCurve::from_values(values.collect::<Option<_>>()?)
    }
}

/// Epsilon of a curve, for people.
#[must_use]
pub fn spent_epsilon(curve: &RdpCurve, delta: Delta) -> f64 {
    if curve.values().iter().all(|v| *v == 0.0) { 0.0 } else { curve.epsilon(delta).0 }
}

#[cfg(test)]
mod tests;
