//! A sequence: keys and values of the tokens seen so far, in half precision, and attention over them.

use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::LoadedAdapter;
use crate::kernels::attention::{Attention, Heads};
use crate::kernels::bf16::Precision;
use crate::kernels::scratch::buffer;
use crate::kernels::simd::{dot, exp, max, simd_fn, sum};

/// What an [`super::Engine`] remembers of one text.
#[derive(Debug)]
pub struct Sequence {
    pub(super) layers: Vec<LayerCache>,
    /// The tokens taken in.
    pub(super) ids: Vec<u32>,
    pub(super) adapter: Option<Arc<LoadedAdapter>>,
}

/// Rotated keys and values of one layer, rows of `kv_heads * head_dim`.
#[derive(Debug, Clone, Default)]
pub(super) struct LayerCache {
    keys: Vec<f16>,
    values: Vec<f16>,
}

impl Sequence {
    pub(super) fn new(layers: usize, adapter: Option<Arc<LoadedAdapter>>) -> Self {
        Self { layers: vec![LayerCache::default(); layers], ids: Vec::new(), adapter }
    }

    /// Tokens taken in.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// True before the first token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Forgets all tokens but the first `positions`.
    pub fn truncate(&mut self, positions: usize) {
        if positions >= self.ids.len() {
            return;
        }
        for layer in &mut self.layers {
            let kept = layer.keys.len() / self.ids.len() * positions;
            layer.keys.truncate(kept);
            layer.values.truncate(kept);
        }
        self.ids.truncate(positions);
    }

    /// Forgets what `prompt` does not begin with, and at least its last token; returns how many tokens are left.
    pub(crate) fn keep_beginning_of(&mut self, prompt: &[u32]) -> usize {
        let same = self.ids.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        self.truncate(same.min(prompt.len().saturating_sub(1)));
        self.ids.len()
    }
}

impl LayerCache {
    /// Takes in the rows that follow the first `past` values.
    pub(super) fn append(&mut self, keys: &[f32], values: &[f32], past: usize) {
        for (cache, new) in [(&mut self.keys, keys), (&mut self.values, values)] {
            cache.resize(past + new.len(), f16::ZERO);
            cache[past..].convert_from_f32_slice(new);
        }
    }

    /// The context of the queries that stand at the cache's last positions.
    pub(super) fn attend(&self, shape: Heads, q: &[f32], past: usize, context: &mut [f32]) {
        // What lies before the first query's window is seen by none.
        let skipped = shape.first_seen(past);
        let (past, seen) = (past - skipped, skipped * shape.kv_width()..);
        let (cached_keys, cached_values) = (&self.keys[seen.clone()], &self.values[seen]);
        let (mut keys, mut values) = (buffer(cached_keys.len()), buffer(cached_values.len()));
        cached_keys.convert_to_f32_slice(&mut keys);
        cached_values.convert_to_f32_slice(&mut values);
        let rows = q.len() / shape.q_width();
        if rows == 1 {
            let group = shape.heads / shape.kv_heads;
            let mut scores = buffer(past + 1);
            attend_one(q, &keys, &values, shape.head_dim, group, shape.scale, &mut scores, context);
            return;
        }
        let mut log_sum = buffer(rows * shape.heads);
        Attention { shape, q, k: &keys, v: &values, past, precision: Precision::F32 }
            .forward(context, &mut log_sum);
    }
}

simd_fn! {
    /// One query of each head against all keys; `group` heads share a head of keys and values.
    fn attend_one(
        q: &[f32], keys: &[f32], values: &[f32], head_dim: usize, group: usize, scale: f32,
        scores: &mut [f32], context: &mut [f32],
    ) {
        let width = keys.len() / scores.len();
        let heads = q.chunks_exact(head_dim).zip(context.chunks_exact_mut(head_dim));
        for (head, (q, context)) in heads.enumerate() {
            let at = head / group * head_dim;
            for (score, key) in scores.iter_mut().zip(keys.chunks_exact(width)) {
                *score = dot(q, &key[at..at + head_dim]) * scale;
            }
            let most = max(scores);
            for score in scores.iter_mut() {
                *score = exp(*score - most);
            }
            let inverse = 1.0 / sum(scores);
            context.fill(0.0);
            for (score, value) in scores.iter().zip(values.chunks_exact(width)) {
                let weight = score * inverse;
                for (c, v) in context.iter_mut().zip(&value[at..at + head_dim]) {
                    *c += weight * v;
                }
            }
        }
    }
}
