//! Every bound of the coordinator, each with its reason. The protocol's own are in `fleetune_proto`.

/// An upload that sent nothing for this long gives its slot away.
pub const UPLOAD_IDLE_MS_MAX: u64 = 30_000;
/// Check-ins whose answers are remembered for repetition.
pub const ANSWERS_MAX: usize = 1 << 16;
/// How long an answer is remembered: longer than a device repeats one call.
pub const ANSWER_KEEP_MS: u64 = 10 * 60 * 1000;
/// How long a session is known after its round: a late device is told why it came too late.
pub const SESSION_KEEP_MS: u64 = 10 * 60 * 1000;
/// Sessions known at once; beyond it nobody is selected until old ones are forgotten.
pub const SESSIONS_MAX: usize = 1 << 18;
/// First delay before a failed round is tried again; doubles each attempt.
pub const ATTEMPT_DELAY_MS_MIN: u64 = 1_000;
/// Longest delay before a failed round is tried again.
pub const ATTEMPT_DELAY_MS_MAX: u64 = 60_000;
/// First delay before a failed commit is offered again; doubles each time.
pub const COMMIT_DELAY_MS_MIN: u64 = 1_000;
/// Longest delay before a failed commit is offered again: a full disk is noticed within a minute of its repair.
pub const COMMIT_DELAY_MS_MAX: u64 = 60_000;
/// Devices that a task shuts out for shares that broke an attempt; each broke one, so this is never near.
pub const EXCLUDED_MAX: usize = 1 << 16;
/// Span over which arrivals are counted for pace steering.
pub const PACE_SPAN_MS: u64 = 10_000;
/// Most that a retry window is stretched under load.
pub const PACE_STRETCH_MAX: u64 = 1_000;
/// Longest device class or client version, bytes: both are short and coarse.
pub const CAPABILITY_BYTES_MAX: usize = 64;
/// Largest message received: a chunk, or an inline update, and its frame.
pub const MESSAGE_BYTES_MAX: usize = fleetune_proto::CHUNK_BYTES_MAX + (64 << 10);
/// A download whose reader takes no chunk for this long is given up.
pub const DOWNLOAD_IDLE_MS_MAX: u64 = 30_000;
/// How long calls under way may take to end when the coordinator stops.
pub const SHUTDOWN_MS_MAX: u64 = 10_000;
/// Longest sleep of the task that keeps deadlines: the clock may be set meanwhile.
pub const TICK_MS_MAX: u64 = 10_000;

/// The delay before repetition number `failures` (from 0): doubles from `min` to `max`.
pub(crate) fn backoff_ms(min: u64, max: u64, failures: u32) -> u64 {
    min.saturating_mul(1 << failures.min(32)).min(max)
}
