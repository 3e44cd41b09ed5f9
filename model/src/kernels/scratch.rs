//! Reused working memory.
//!
//! A training step needs the same dozens of activations each time. Fresh pages for each of them cost more than
//! the loops that fill them, so every thread keeps the buffers it no longer uses and hands them out again.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers one thread keeps: at the end of a forward pass every layer of a large model holds about a dozen, and
/// what is not kept comes back from the kernel as fresh pages at each step (a tenth of a step's time).
const KEPT_BUFFERS_MAX: usize = 1024;

/// Unused buffers of one thread.
#[derive(Debug, Default)]
pub(crate) struct Pool(Vec<Vec<f32>>);

thread_local! {
    static POOL: RefCell<Pool> = RefCell::new(Pool::default());
}

/// An f32 buffer that returns to its thread's pool when dropped. Its first contents are unspecified numbers.
#[derive(Debug)]
pub(crate) struct Buffer(Vec<f32>);

/// A buffer of `len` values; the caller overwrites all of them before reading.
pub(crate) fn buffer(len: usize) -> Buffer {
    let mut values = POOL.with_borrow_mut(|pool| pool.take(len));
    values.resize(len, 0.0);
    Buffer(values)
}

/// Drops what this thread keeps.
pub(crate) fn release_pool() {
    drop(exchange_pool(Pool::default()));
}

/// Replaces this thread's pool and returns the old one; lets short-lived threads inherit memory.
pub(crate) fn exchange_pool(pool: Pool) -> Pool {
    POOL.replace(pool)
}

impl Pool {
    /// The smallest kept buffer that fits without wasting more than a third of itself: halves of a layer's largest
    /// activations must not lie in whole ones.
    fn take(&mut self, len: usize) -> Vec<f32> {
        let fits = |v: &Vec<f32>| v.capacity() >= len && v.capacity() <= len + len / 2 + 1024;
        let best = (0..self.0.len()).filter(|i| fits(&self.0[*i])).min_by_key(|i| self.0[*i].capacity());
        best.map_or_else(|| Vec::with_capacity(len), |i| self.0.swap_remove(i))
    }

    fn give(&mut self, values: Vec<f32>) {
        if self.0.len() == KEPT_BUFFERS_MAX {
            self.0.remove(0);
        }
        self.0.push(values);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.0);
        if values.capacity() == 0 {
            return;
        }
        // A buffer that outlives its thread's locals is simply freed.
        let _ = POOL.try_with(|pool| pool.borrow_mut().give(values));
    }
}

impl Buffer {
    /// Gives the memory back to the system in place of the thread's pool.
    pub(crate) fn free(mut self) {
        drop(std::mem::take(&mut self.0));
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_buffer_is_not_kept() {
        release_pool();
        buffer(3000).free();
        assert!(POOL.with_borrow(|pool| pool.0.is_empty()));
    }

    #[test]
    fn a_dropped_buffer_is_handed_out_again() {
        release_pool();
        let first = buffer(5000);
        let address = first.as_ptr();
        drop(first);
        assert_eq!(buffer(4000).as_ptr(), address);
        assert_ne!(buffer(10).len(), 5000);
    }
}
