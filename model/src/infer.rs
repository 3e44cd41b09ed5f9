//! Inference: a base model packed for integer products, sequences with cached keys and values, adapters that
//! are applied beside the base and never merged into it.
//!
//! One [`Engine`] serves many [`Sequence`]s, each with an adapter of its own or none. [`Engine::read`] takes
//! new tokens of several sequences at once: the products with the base are done for all of them together.
//! Quantized weights are multiplied in 8 bits ([`crate::kernels`]'s `int8`); others in f32.

mod adapter;
mod cache;
mod matrix;
mod observe;

use std::ops::Range;
use std::sync::Arc;

pub use adapter::LoadedAdapter;
pub use cache::Sequence;
pub use observe::InputSquares;

use crate::adapter::Adapter;
use crate::base::BaseModel;
use crate::batch::{InputError, check_ids};
use crate::config::Projection;
use crate::decoder::{embed, extras, heads, rope_tables};
use crate::kernels::activation::{add, scale};
use crate::kernels::cross_entropy::nll_and_hits;
use crate::kernels::extras::Half;
use crate::kernels::int8::Packed;
use crate::kernels::norm::Norm;
use crate::kernels::rope::{RopeTable, Turn};
use crate::kernels::scratch::{Buffer, buffer};
use matrix::{Input, Matrix};

/// Tokens that run through the layers together.
const PASS_TOKENS: usize = 256;
/// Rows of embeddings read at once after which their file's pages are given back.
const RELEASE_ROWS: usize = 16;
/// Rows whose logits exist together when text is scored.
const SCORED_ROWS: usize = 32;

/// A base model ready to read and write text.
#[derive(Debug)]
pub struct Engine {
    base: Arc<BaseModel>,
    /// By layer, then by `Projection as usize`.
    layers: Vec<[Matrix; 7]>,
    head: Matrix,
}

/// New tokens of one sequence.
#[derive(Debug)]
pub struct Span<'a> {
    /// What came before; it takes the tokens in.
    pub sequence: &'a mut Sequence,
    /// At least one.
    pub ids: &'a [u32],
}

/// Part of a span that goes through the layers in one pass.
#[derive(Debug)]
struct Piece {
    span: usize,
    ids: Range<usize>,
    /// Where its rows stand in the pass.
    rows: Range<usize>,
    /// Positions of the sequence before it.
    past: usize,
    /// By layer, from `past` on.
    ropes: Vec<Arc<RopeTable>>,
}

impl Engine {
    /// Packs the quantized weights, on a few threads for a moment: that takes about half a millisecond of CPU time
    /// for each megabyte of them, and as much memory again, beside which those of a mapped file are given back.
    #[must_use]
    pub fn new(base: Arc<BaseModel>) -> Self {
        let projections = base.layers.iter().flat_map(|layer| &layer.projections);
        let weights: Vec<_> = projections.chain([base.head()]).collect();
        let mut matrices = Packed::all(&weights).into_iter().map(Matrix::new);
        let mut next = || matrices.next().unwrap_or(Matrix::Stored);
        let layers = base.layers.iter().map(|_| std::array::from_fn(|_| next())).collect();
        let head = next();
        Self { base, layers, head }
    }

    /// The model that is run.
    #[must_use]
    pub fn base(&self) -> &Arc<BaseModel> {
        &self.base
    }

    /// Makes an adapter ready for this model.
    ///
    /// # Errors
    /// [`InputError::AdapterShape`] if it is for a model of another shape.
    pub fn load_adapter(&self, adapter: &Adapter) -> Result<Arc<LoadedAdapter>, InputError> {
        LoadedAdapter::new(adapter, &self.base.config).map(Arc::new)
    }

    /// An empty sequence, under an adapter or the base alone.
    #[must_use]
    pub fn sequence(&self, adapter: Option<Arc<LoadedAdapter>>) -> Sequence {
        Sequence::new(self.base.config.layers, adapter)
    }

    /// Takes in the tokens of all spans; returns the logits after the last token of each, `[spans, vocabulary]`.
    ///
    /// # Errors
    /// [`InputError`], before anything was taken in, if a span is empty, holds an unknown id or does not fit the
    /// context.
    pub fn read(&self, spans: &mut [Span<'_>]) -> Result<Vec<f32>, InputError> {
        let width = self.base.config.hidden;
        let mut last = buffer(spans.len() * width);
        self.read_hidden(spans, &mut Input::default(), &mut |span, is_last, rows| {
            if is_last {
                last[span * width..(span + 1) * width].copy_from_slice(&rows[rows.len() - width..]);
            }
        })?;
        Ok(self.logits(&last))
    }

    /// Negative log-likelihood of `ids[1..]` in nats, each from those before it and what the sequence holds; the
    /// sequence takes in all but the last id.
    ///
    /// # Errors
    /// As [`Engine::read`]; [`InputError::TooShort`] below two ids.
    pub fn token_nlls(&self, sequence: &mut Sequence, ids: &[u32]) -> Result<Vec<f32>, InputError> {
        let Some((last, inputs)) = ids.split_last().filter(|(_, inputs)| !inputs.is_empty()) else {
            return Err(InputError::TooShort { found: ids.len(), needed: 2 });
        };
        check_ids(&[*last], self.base.config.vocab_size)?;
        let (width, mut nlls) = (self.base.config.hidden, Vec::with_capacity(inputs.len()));
        self.read_hidden(&mut [Span { sequence, ids: inputs }], &mut Input::default(), &mut |_, _, rows| {
            for rows in rows.chunks(SCORED_ROWS * width) {
                let count = rows.len() / width;
                let targets: Vec<i32> = ids[nlls.len() + 1..][..count].iter().map(|id| *id as i32).collect();
                let mut nll = vec![0.0; count];
                nll_and_hits(&mut self.logits(rows), &targets, &mut nll);
                nlls.extend(nll);
            }
        })?;
        Ok(nlls)
    }

    /// Runs all spans; hands over the residual stream of each piece: its span, whether it ends it, its rows.
    fn read_hidden(
        &self,
        spans: &mut [Span<'_>],
        input: &mut Input,
        take: &mut dyn FnMut(usize, bool, &[f32]),
    ) -> Result<(), InputError> {
        for span in &*spans {
            self.check(span)?;
        }
        let mut pieces = Vec::new();
        for index in 0..spans.len() {
            let mut first = 0;
            while first < spans[index].ids.len() {
                let before = pieces.last().map_or(0, |piece: &Piece| piece.rows.end);
                let count = (spans[index].ids.len() - first).min(PASS_TOKENS - before);
                let past = spans[index].sequence.len();
                let ropes = rope_tables(&self.base.config, past, count);
                let (ids, rows) = (first..first + count, before..before + count);
                pieces.push(Piece { span: index, ids, rows, past, ropes });
                first += count;
                if before + count == PASS_TOKENS {
                    self.pass(spans, &std::mem::take(&mut pieces), input, take);
                }
            }
        }
        if !pieces.is_empty() {
            self.pass(spans, &pieces, input, take);
        }
        Ok(())
    }

    fn check(&self, span: &Span<'_>) -> Result<(), InputError> {
        let config = &self.base.config;
        if span.ids.is_empty() {
            return Err(InputError::TooShort { found: 0, needed: 1 });
        }
        let found = span.sequence.len() + span.ids.len();
        if found > config.context_length {
            return Err(InputError::TooLong { found, limit: config.context_length });
        }
        if span.sequence.layers.len() != config.layers {
            let (expected, found) = (config.layers, span.sequence.layers.len());
            return Err(InputError::WrongLength { what: "layers of the sequence", expected, found });
        }
        check_ids(span.ids, config.vocab_size)
    }

    fn pass(
        &self,
        spans: &mut [Span<'_>],
        pieces: &[Piece],
        input: &mut Input,
        take: &mut dyn FnMut(usize, bool, &[f32]),
    ) {
        let width = self.base.config.hidden;
        let rows = pieces.last().map_or(0, |piece| piece.rows.end);
        let mut x = buffer(rows * width);
        for piece in pieces {
            let out = &mut x[piece.rows.start * width..piece.rows.end * width];
            self.embed(&spans[piece.span].ids[piece.ids.clone()], out);
        }
        for layer in 0..self.layers.len() {
            self.attention(layer, spans, pieces, &mut x, input);
            self.feed_forward(layer, spans, pieces, &mut x, input);
        }
        for piece in pieces {
            let span = &mut spans[piece.span];
            span.sequence.ids.extend(&span.ids[piece.ids.clone()]);
            let rows = &x[piece.rows.start * width..piece.rows.end * width];
            take(piece.span, piece.ids.end == span.ids.len(), rows);
        }
    }

    /// Embeddings of ids. Rows of a packed head are taken from there: reading them from the file would bring its
    /// pages back into memory.
    fn embed(&self, ids: &[u32], out: &mut [f32]) {
        let Some(packed) = self.head.packed().filter(|_| self.base.output.is_none()) else {
            embed(&self.base, ids, out);
            // A token a time costs little memory, and giving it back too much time.
            if ids.len() > RELEASE_ROWS {
                self.base.token_embedding.release();
            }
            return;
        };
        for (id, row) in ids.iter().zip(out.chunks_exact_mut(self.base.config.hidden)) {
            packed.row(*id as usize, row);
        }
        if self.base.config.embedding_scale() != 1.0 {
            scale(out, self.base.config.embedding_scale());
        }
    }

    fn attention(
        &self,
        layer: usize,
        spans: &mut [Span<'_>],
        pieces: &[Piece],
        x: &mut [f32],
        input: &mut Input,
    ) {
        let (config, shape) = (&self.base.config, heads(&self.base.config, layer));
        let own = extras(&self.base, layer);
        let norm = Norm { gain: &self.base.layers[layer].attn_norm, eps: config.rms_eps };
        input.set(norm.forward(x).0, config.hidden);
        let apply = |projection, input: &mut Input, spans: &[Span<'_>]| {
            self.project(layer, projection, input, spans, pieces)
        };
        let mut q = apply(Projection::Q, input, spans);
        let mut k = apply(Projection::K, input, spans);
        let mut v = apply(Projection::V, input, spans);
        own.finish_heads(&mut q, &mut k, &mut v);
        let mut context = buffer(q.len());
        for piece in pieces {
            let at = |width: usize| piece.rows.start * width..piece.rows.end * width;
            let (q_rows, kv_rows, count) = (at(shape.q_width()), at(shape.kv_width()), piece.rows.len());
            piece.ropes[layer].rotate(&mut q[q_rows.clone()], shape.heads, 0, count, Turn::Forward);
            piece.ropes[layer].rotate(&mut k[kv_rows.clone()], shape.kv_heads, 0, count, Turn::Forward);
            let cache = &mut spans[piece.span].sequence.layers[layer];
            cache.append(&k[kv_rows.clone()], &v[kv_rows], piece.past * shape.kv_width());
            cache.attend(shape, &q[q_rows.clone()], piece.past, &mut context[q_rows]);
        }
        input.set(context, shape.q_width());
        let mut output = apply(Projection::O, input, spans);
        own.finish_half(Half::Attention, &mut output);
        add(x, &output);
    }

    fn feed_forward(
        &self,
        layer: usize,
        spans: &[Span<'_>],
        pieces: &[Piece],
        x: &mut [f32],
        input: &mut Input,
    ) {
        let config = &self.base.config;
        let norm = Norm { gain: &self.base.layers[layer].ffn_norm, eps: config.rms_eps };
        input.set(norm.forward(x).0, config.hidden);
        let gate = self.project(layer, Projection::Gate, input, spans, pieces);
        let up = self.project(layer, Projection::Up, input, spans, pieces);
        let mut activated = buffer(gate.len());
        let own = extras(&self.base, layer);
        own.activation.gated(&gate, &up, &mut activated);
        input.set(activated, config.feed_forward);
        let mut output = self.project(layer, Projection::Down, input, spans, pieces);
        own.finish_half(Half::FeedForward, &mut output);
        add(x, &output);
    }

    /// One projection of all rows, with each sequence's own adapter.
    fn project(
        &self,
        layer: usize,
        projection: Projection,
        input: &mut Input,
        spans: &[Span<'_>],
        pieces: &[Piece],
    ) -> Buffer {
        let weight = &self.base.layers[layer].projections[projection as usize];
        let mut y = self.layers[layer][projection as usize].forward(weight, input);
        for piece in pieces {
            if let Some(adapter) = &spans[piece.span].sequence.adapter {
                let rows = |width: usize| piece.rows.start * width..piece.rows.end * width;
                adapter.add(
                    layer,
                    projection,
                    &input.values()[rows(weight.cols())],
                    &mut y[rows(weight.rows())],
                );
            }
        }
        y
    }

    /// Logits of rows of the residual stream.
    fn logits(&self, x: &[f32]) -> Vec<f32> {
        let norm = Norm { gain: &self.base.output_norm, eps: self.base.config.rms_eps };
        let mut input = Input::default();
        input.set(norm.forward(x).0, self.base.config.hidden);
        self.head.forward(self.base.head(), &mut input).to_vec()
    }
}

#[cfg(test)]
mod tests;
