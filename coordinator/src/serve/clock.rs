//! The one place of the coordinator that reads the system's clock.
#![expect(clippy::disallowed_methods, reason = "the shell gives the core its time")]

use fleetune_proto::UnixMillis;
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
