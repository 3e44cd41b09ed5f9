//! Memory of a packed model: one region of cache lines, on large pages where the system gives them. A token reads
//! all of it once, and 4 KiB pages would cost a table walk each.
#![allow(unsafe_code, reason = "bytes seen as lines; see the SAFETY comments")]

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

/// A cache line and a vector register.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

// SAFETY: 64 bytes without padding, for which every bit pattern is a value, zeros included.
unsafe impl Zeroable for Line {}
// SAFETY: as above; it holds no references.
unsafe impl Pod for Line {}

/// Zeroed lines, to be filled and then shared.
pub(super) enum Lines {
    /// Anonymous memory of the system's.
    Mapped(MmapMut),
    Owned(Vec<Line>),
}

impl Lines {
    pub(super) fn new(count: usize) -> Self {
        let bytes = count * size_of::<Line>();
        match MmapMut::map_anon(bytes.max(1)) {
            Ok(map) => {
                // A wish: without large pages the same memory comes in small ones.
                #[cfg(target_os = "linux")]
                drop(map.advise(memmap2::Advice::HugePage));
                Self::Mapped(map)
            }
            Err(_) => Self::Owned(vec![Line::zeroed(); count]),
        }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [Line] {
        match self {
            // A map begins with a page and ends with the asked-for byte (one, if none was asked for).
            Self::Mapped(map) => {
                let whole = map.len() / size_of::<Line>() * size_of::<Line>();
                bytemuck::cast_slice_mut(&mut map[..whole])
            }
            Self::Owned(lines) => lines,
        }
    }

    fn as_slice(&self) -> &[Line] {
        match self {
            Self::Mapped(map) => {
                bytemuck::cast_slice(&map[..map.len() / size_of::<Line>() * size_of::<Line>()])
            }
            Self::Owned(lines) => lines,
        }
    }
}

/// Some of the lines.
#[derive(Clone)]
pub(super) struct Shared {
    lines: Arc<Lines>,
    range: Range<usize>,
}

impl Shared {
    pub(super) fn new(lines: Arc<Lines>, range: Range<usize>) -> Self {
        assert!(range.end <= lines.as_slice().len(), "lines that are there");
        Self { lines, range }
    }

    pub(super) fn as_slice(&self) -> &[Line] {
        &self.lines.as_slice()[self.range.clone()]
    }
}
