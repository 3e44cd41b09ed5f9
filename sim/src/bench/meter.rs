//! CPU time of one thread, and memory by the allocator's own count.

use peak_alloc::PeakAlloc;
use rustix::time::{ClockId, clock_gettime};

/// Counts every allocation of the program.
#[global_allocator]
static ALLOCATIONS: PeakAlloc = PeakAlloc;

/// What one side of a protocol has cost so far. Everything it does must run on the calling thread.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Meter {
    /// CPU seconds.
    pub(super) cpu_s: f64,
    /// Bytes allocated within the metered calls and not freed since.
    held: i64,
    /// Highest number of them, also within a call.
    pub(super) peak_bytes: i64,
}

impl Meter {
    /// Runs a piece of work and charges it.
    pub(super) fn charge<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let before = bytes(ALLOCATIONS.current_usage());
        ALLOCATIONS.reset_peak_usage();
        let started = thread_cpu_s();
        let done = work();
        self.cpu_s += thread_cpu_s() - started;
        self.peak_bytes = self.peak_bytes.max(self.held + bytes(ALLOCATIONS.peak_usage()) - before);
        self.held += bytes(ALLOCATIONS.current_usage()) - before;
        done
    }
}

/// CPU seconds of the calling thread.
fn thread_cpu_s() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn bytes(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
