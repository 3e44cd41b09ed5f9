//! Every bound of the protocol, each with its reason. What reaches a bound fails with its name.

/// Largest chunk of a blob: well below tonic's default receive limit of 4 MiB.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;
/// Largest inline resource: keeps a check-in answer in a few packets.
pub const INLINE_BYTES_MAX: usize = 64 << 10;
/// Longest population or task name.
pub const NAME_BYTES_MAX: usize = 64;
/// Tasks in one policy: a policy is inline.
pub const TASKS_MAX: usize = 64;
/// Signatures on one envelope, and keys in a trust root.
pub const SIGNATURES_MAX: usize = 16;
/// Values of an adapter: 256 Mi values are 1 GiB, past any device's adapter.
pub const DIMENSION_MAX: u64 = 1 << 28;
/// Values of a fully trained model: 32 Mi. Training keeps some five vectors of that length, 640 MiB; beyond it an adapter
/// is the better choice. The same number as `fleetune_model::full::FULL_VALUES_MAX`.
pub const FULL_DIMENSION_MAX: u64 = 1 << 25;
/// Largest adapter rank.
pub const RANK_MAX: u32 = 256;
/// Optimizer steps of one local training.
pub const STEPS_MAX: u32 = 100_000;
/// Sequences in one step.
pub const BATCH_SIZE_MAX: u32 = 1024;
/// Tokens in one sequence.
pub const BLOCK_TOKENS_MAX: u32 = 8192;
/// Rounds of one task.
pub const ROUNDS_MAX: u32 = 1_000_000;
/// Devices in one round: with 32-bit lanes 23 bits stay for a value at 2^8 times fewer.
pub const COHORT_MAX: u32 = 1 << 16;
/// Longest time a device waits before it calls again, whatever the coordinator says: a day.
pub const RETRY_DELAY_MS_MAX: u64 = 24 * 3600 * 1000;
/// Shortest time between two check-ins: an answer without a window must not make a device spin.
pub const RETRY_DELAY_MS_MIN: u64 = 100;
/// Policies a device reads before it goes to rest: a coordinator that keeps changing its mind, or
/// replicas that disagree, must not keep it awake.
pub const POLICIES_IN_A_ROW_MAX: u32 = 4;
/// What a checkpoint file may hold beside its values.
pub const CHECKPOINT_HEADER_BYTES_MAX: u64 = 64 << 10;
/// Calls of one step that may fail before the device gives the session up.
pub const CALL_ATTEMPTS_MAX: u32 = 8;
/// First delay after a failed call; doubles each time.
pub const BACKOFF_MS_MIN: u64 = 200;
/// Longest delay after a failed call.
pub const BACKOFF_MS_MAX: u64 = 60_000;
