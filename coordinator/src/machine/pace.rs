//! Pace steering: when devices are asked to come back (Bonawitz et al. 2019, "Towards Federated Learning
//! at Scale", section 2.3). Windows stretch when more devices arrive than the coordinator wants.

use crate::limits::{PACE_SPAN_MS, PACE_STRETCH_MAX};
use fleetune_proto::{RETRY_DELAY_MS_MAX, UnixMillis, wire::RetryWindow};

/// When devices come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PacePolicy {
    /// Delay while a task waits for devices or the next round is near; the window ends at twice this.
    pub soon_ms: u64,
    /// Start of the window while there is nothing to do for the device.
    pub idle_ms_min: u64,
    /// End of that window.
    pub idle_ms_max: u64,
    /// Check-ins a second beyond which every window stretches in proportion.
    pub check_ins_per_second_max: u32,
}

/// Counts arrivals and draws up windows.
pub(super) struct Pace {
    policy: PacePolicy,
    span_start: UnixMillis,
    arrivals: u64,
    arrivals_before: u64,
}

impl Pace {
    pub(super) fn new(policy: PacePolicy) -> Self {
        Self { policy, span_start: UnixMillis(0), arrivals: 0, arrivals_before: 0 }
    }

    pub(super) fn arrival(&mut self, now: UnixMillis) {
        let passed = now.since(self.span_start);
        if passed >= PACE_SPAN_MS {
            self.arrivals_before = if passed < 2 * PACE_SPAN_MS { self.arrivals } else { 0 };
            (self.span_start, self.arrivals) = (now, 0);
        }
        self.arrivals += 1;
    }

    /// `after_ms` is time in which the device cannot be of use anyway.
    pub(super) fn soon(&self, after_ms: u64) -> RetryWindow {
        let soon = self.policy.soon_ms.max(1);
        self.window(after_ms.saturating_add(soon), after_ms.saturating_add(soon.saturating_mul(2)))
    }

    pub(super) fn idle(&self) -> RetryWindow {
        self.window(self.policy.idle_ms_min, self.policy.idle_ms_max.max(self.policy.idle_ms_min))
    }

    fn window(&self, min: u64, max: u64) -> RetryWindow {
        let stretch = |ms: u64| ms.saturating_mul(self.stretch()).min(RETRY_DELAY_MS_MAX);
        RetryWindow { delay_min_ms: min.min(RETRY_DELAY_MS_MAX), delay_max_ms: stretch(max) }
    }

    /// The early edge stays: devices spread over a longer window, none is put off without need.
    fn stretch(&self) -> u64 {
        let wanted = u64::from(self.policy.check_ins_per_second_max.max(1)) * (PACE_SPAN_MS / 1000);
        self.arrivals.max(self.arrivals_before).div_ceil(wanted).clamp(1, PACE_STRETCH_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_stretch_under_load_and_shrink_again() {
        let policy =
            PacePolicy { soon_ms: 100, idle_ms_min: 1_000, idle_ms_max: 2_000, check_ins_per_second_max: 1 };
        let mut pace = Pace::new(policy);
        pace.arrival(UnixMillis(1_000_000));
        assert_eq!(pace.soon(50), RetryWindow { delay_min_ms: 150, delay_max_ms: 250 });
        for _ in 0..39 {
            pace.arrival(UnixMillis(1_000_001));
        }
        assert_eq!(pace.idle(), RetryWindow { delay_min_ms: 1_000, delay_max_ms: 8_000 });
        pace.arrival(UnixMillis(1_030_000));
        assert_eq!(pace.idle(), RetryWindow { delay_min_ms: 1_000, delay_max_ms: 2_000 });
    }
}
