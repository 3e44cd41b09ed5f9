//! The client's clock. This is the one file of the crate that reads the system's; tests bring their own.

#![allow(clippy::disallowed_methods, reason = "the shell's clock is read here and nowhere else")]

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fleetune_proto::UnixMillis;

/// Tells the time and waits.
pub trait Clock: Send {
    /// Milliseconds since 1970.
    fn now(&self) -> UnixMillis;

    /// Waits that long.
    fn sleep(&self, ms: u64);

    /// Time since some moment in the past, which nobody sets; for measuring how long something takes.
    fn elapsed(&self) -> Duration {
        Duration::from_millis(self.now().0)
    }
}

/// The system's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> UnixMillis {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    fn sleep(&self, ms: u64) {
        std::thread::sleep(Duration::from_millis(ms));
    }

    fn elapsed(&self) -> Duration {
        static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);
        FIRST.elapsed()
    }
}
