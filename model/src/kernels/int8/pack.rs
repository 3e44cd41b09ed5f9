//! Weights in panels of 16 rows, made once from their stored blocks: the same bits in another order, which
//! `form.rs` tells.

use std::num::NonZero;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::Panel;
pub(super) use super::form::Form;
use super::lines::{Line, Lines, Shared};
use super::portable::{factors, integers};
use crate::weights::{BLOCK, WeightMatrix};

/// Rows of a panel.
pub(super) const PANEL: usize = 16;

/// Bytes of a mapped file that are packed before they are given back.
const RELEASED_BYTES: usize = 1 << 20;

/// Threads that pack, and the lines from which a second one pays.
const THREADS_MAX: usize = 4;
const THREAD_LINES_MIN: usize = 1 << 17;

/// A quantized weight `[rows, cols]` for the integer kernels: panel after panel, each its integers and then its
/// scales.
pub(crate) struct Packed {
    shape: Shape,
    lines: Shared,
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    form: Form,
    rows: usize,
    cols: usize,
}

/// A weight, and the lines it is packed into.
struct Job<'a> {
    weight: &'a WeightMatrix,
    shape: Shape,
    lines: &'a mut [Line],
}

impl Shape {
    /// None for formats that have no packed form.
    fn of(weight: &WeightMatrix) -> Option<Self> {
        let form = Form::of(weight.format())?;
        Some(Self { form, rows: weight.rows(), cols: weight.cols() })
    }

    fn blocks(self) -> usize {
        self.cols / BLOCK
    }

    fn panel_lines(self) -> usize {
        self.form.panel_lines(self.blocks())
    }

    fn lines(self) -> usize {
        self.rows.div_ceil(PANEL) * self.panel_lines()
    }
}

impl Packed {
    /// Packs weights into one region of memory; none for those whose format has no packed form. Of a mapped file,
    /// what is packed is let go at once.
    pub(crate) fn all(weights: &[&WeightMatrix]) -> Vec<Option<Self>> {
        let shapes: Vec<Option<Shape>> = weights.iter().map(|weight| Shape::of(weight)).collect();
        let total = shapes.iter().flatten().map(|shape| shape.lines()).sum();
        let mut lines = Lines::new(total);
        let mut rest = lines.as_mut_slice();
        let mut jobs = Vec::new();
        for (weight, shape) in weights.iter().zip(&shapes) {
            let Some(shape) = *shape else { continue };
            let own = rest.split_off_mut(..shape.lines()).unwrap_or_default();
            jobs.push(Job { weight, shape, lines: own });
        }
        run(jobs, total);
        // Reading the beginning of one weight maps pages of the one before it again.
        weights.iter().for_each(|weight| weight.release());
        let lines = Arc::new(lines);
        let mut first = 0;
        let mut packed = |shape: Shape| {
            let range: Range<usize> = first..first + shape.lines();
            first = range.end;
            Self { shape, lines: Shared::new(Arc::clone(&lines), range) }
        };
        shapes.into_iter().map(|shape| shape.map(&mut packed)).collect()
    }

    pub(crate) fn rows(&self) -> usize {
        self.shape.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.shape.cols
    }

    /// Expands one row to `cols` values, as from the weight itself.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let panel = self.panels().nth(row / PANEL).filter(|panel| row % PANEL < panel.rows);
        let panel = panel.expect("the caller asks for a row that is there");
        for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let (integers, factors) =
                (integers(panel, block, row % PANEL), factors(panel, block, row % PANEL));
            for (column, (out, integer)) in out.iter_mut().zip(integers).enumerate() {
                *out = factors.scales[column / (BLOCK / 2)] * f32::from(integer) + factors.minimum;
            }
        }
    }

    pub(super) fn panels(&self) -> impl Iterator<Item = Panel<'_>> {
        let shape = self.shape;
        let panels = self.lines.as_slice().chunks_exact(shape.panel_lines());
        panels.enumerate().map(move |(index, lines)| {
            let rows = PANEL.min(shape.rows - index * PANEL);
            Panel { form: shape.form, lines, blocks: shape.blocks(), rows }
        })
    }
}

/// Packs on a few threads, if there is much: the largest weights first, each to the thread that is free.
fn run(mut jobs: Vec<Job<'_>>, total: usize) {
    jobs.sort_by_key(|job| std::cmp::Reverse(job.lines.len()));
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = threads.min(THREADS_MAX).min(total / THREAD_LINES_MIN);
    let jobs = Mutex::new(jobs.into_iter());
    let next = || jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
    let pack = || {
        while let Some(job) = next() {
            job.pack();
        }
    };
    thread::scope(|scope| {
        // Where no thread is to be had, this one packs all.
        (1..threads).for_each(|_| drop(thread::Builder::new().spawn_scoped(scope, pack)));
        pack();
    });
}

impl Job<'_> {
    fn pack(self) {
        let Self { weight, shape, lines } = self;
        let row_bytes = weight.as_bytes().len() / shape.rows;
        let released = (RELEASED_BYTES / (PANEL * row_bytes)).max(1);
        for (part, lines) in lines.chunks_mut(released * shape.panel_lines()).enumerate() {
            let first = part * released * PANEL;
            let rows = first..shape.rows.min(first + released * PANEL);
            let bytes = &weight.as_bytes()[rows.start * row_bytes..rows.end * row_bytes];
            let panels = bytes.chunks(PANEL * row_bytes).zip(lines.chunks_exact_mut(shape.panel_lines()));
            for (stored, lines) in panels {
                let rows: Vec<&[u8]> = stored.chunks_exact(row_bytes).collect();
                shape.form.pack_panel(&rows, shape.blocks(), bytemuck::cast_slice_mut(lines));
            }
            weight.release();
        }
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packed({:?})", self.shape)
    }
}
