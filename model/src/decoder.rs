//! A base model and, if any, an adapter's values, seen as kernel layers.
//!
//! [`LoraPlan`] knows where each factor lies in the flat vector; [`Decoder`] runs the layers for scoring; [`AdaptedLayer`] and [`FrozenHead`] are the same layers as sources of burn operations.

use std::ops::Range;
use std::sync::Arc;

use crate::adapter::{Adapter, AdapterLayout, Factor};
use crate::base::BaseModel;
use crate::batch::InputError;
use crate::config::{ModelConfig, Projection};
use crate::family::{Extra, Rope};
use crate::kernels::activation::scale;
use crate::kernels::attention::Heads;
use crate::kernels::bf16::Precision;
use crate::kernels::extras::Extras;
use crate::kernels::head::{Head, HeadGradients};
use crate::kernels::layer::Layer;
use crate::kernels::layer_backward::LayerGradients;
use crate::kernels::linear::{Linear, LinearGradients, LowRank, Weight};
use crate::kernels::norm::Norm;
use crate::kernels::rope::RopeTable;
use crate::kernels::scratch::{Buffer, buffer};
use crate::ops::{HeadSource, LayerSource};

/// Where every factor of an adapter lies, checked against the model it is for.
#[derive(Debug)]
pub(crate) struct LoraPlan {
    rank: usize,
    scale: f32,
    layers: Vec<LayerPlan>,
}

/// One layer's slice of the flat vector, and its factors relative to that slice.
#[derive(Debug)]
struct LayerPlan {
    values: Range<usize>,
    factors: [Option<Factors>; 7],
}

#[derive(Debug)]
struct Factors {
    a: FactorA,
    b: Range<usize>,
}

#[derive(Debug)]
enum FactorA {
    Trained(Range<usize>),
    Frozen(Vec<f32>),
}

impl LoraPlan {
    /// # Errors
    /// [`InputError::AdapterShape`] if the layout is for a model of another shape.
    pub(crate) fn new(layout: &AdapterLayout, model: &ModelConfig) -> Result<Self, InputError> {
        check_shapes(layout, model)?;
        let layers = (0..model.layers).map(|layer| LayerPlan::new(layout, layer)).collect();
        Ok(Self { rank: layout.config().rank, scale: layout.config().scale(), layers })
    }

    /// The layer's slice of the flat vector.
    pub(crate) fn values(&self, layer: usize) -> Range<usize> {
        self.layers[layer].values.clone()
    }

    pub(crate) fn low_rank<'a>(
        &'a self,
        layer: usize,
        projection: Projection,
        theta: &'a [f32],
    ) -> Option<LowRank<'a>> {
        let factors = self.layers[layer].factors[projection as usize].as_ref()?;
        let a = match &factors.a {
            FactorA::Trained(range) => &theta[range.clone()],
            FactorA::Frozen(values) => values,
        };
        Some(LowRank { a, b: &theta[factors.b.clone()], rank: self.rank, scale: self.scale })
    }
}

impl LayerPlan {
    fn new(layout: &AdapterLayout, layer: usize) -> Self {
        let mut entries = layout.entries().iter().filter(|e| e.layer == layer);
        let start = entries.next().map_or(0, |e| e.offset);
        let len: usize = layout.entries().iter().filter(|e| e.layer == layer).map(|e| e.rows * e.cols).sum();
        let relative = |r: Range<usize>| r.start - start..r.end - start;
        let factors = Projection::ALL.map(|projection| {
            let b = relative(layout.find(layer, projection, Factor::B)?);
            let a = match layout.find(layer, projection, Factor::A) {
                Some(range) => FactorA::Trained(relative(range)),
                None => FactorA::Frozen(layout.frozen_a(layer, projection)),
            };
            Some(Factors { a, b })
        });
        Self { values: start..start + len, factors }
    }

    /// Cuts the layer's gradient slice into its factors.
    fn gradients<'a>(&self, dtheta: &'a mut [f32]) -> LayerGradients<'a> {
        let mut rest = Rest { values: dtheta, taken: 0 };
        let mut gradients = LayerGradients::default();
        for (factors, out) in self.factors.iter().zip(&mut gradients.projections) {
            let Some(factors) = factors else { continue };
            if let FactorA::Trained(range) = &factors.a {
                out.a = Some(rest.take(range));
            }
            out.b = Some(rest.take(&factors.b));
        }
        gradients
    }
}

/// What is left of a slice that is cut from its start.
pub(crate) struct Rest<'a> {
    pub(crate) values: &'a mut [f32],
    pub(crate) taken: usize,
}

impl<'a> Rest<'a> {
    /// The part at `range` of the original slice, which must begin where the last one ended.
    pub(crate) fn take(&mut self, range: &Range<usize>) -> &'a mut [f32] {
        assert!(range.start == self.taken, "parts of a gradient follow each other");
        self.taken = range.end;
        self.values.split_off_mut(..range.len()).unwrap_or_default()
    }
}

/// Refuses a layout for a model of another shape.
pub(crate) fn check_shapes(layout: &AdapterLayout, model: &ModelConfig) -> Result<(), InputError> {
    let rank = layout.config().rank;
    let fits = |layer: usize, projection: Projection, factor, rows, cols| {
        let (out, inputs) = projection.shape(model);
        let shape = match factor {
            Factor::A => (rank, inputs),
            Factor::B => (out, rank),
        };
        layer < model.layers && (rows, cols) == shape
    };
    let wrong = layout.entries().iter().find(|e| !fits(e.layer, e.projection, e.factor, e.rows, e.cols));
    let (layer, projection) = match wrong {
        Some(entry) => (entry.layer, entry.projection.name()),
        None if layout.layers() == model.layers => return Ok(()),
        None => (layout.layers(), "adapted"),
    };
    Err(InputError::AdapterShape { layer, projection, model: model.name.clone() })
}

/// How attention is laid out in the layer of that index.
pub(crate) fn heads(config: &ModelConfig, index: usize) -> Heads {
    let layer = config.layer(index);
    Heads {
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        scale: layer.scale,
        window: layer.window,
    }
}

/// Each layer's rope table for `positions` positions from `first` on; layers that rotate alike share one.
pub(crate) fn rope_tables(config: &ModelConfig, first: usize, positions: usize) -> Vec<Arc<RopeTable>> {
    let mut made: Vec<(Rope, Arc<RopeTable>)> = Vec::new();
    let table = |index| {
        let rope = config.layer(index).rope;
        if let Some((_, table)) = made.iter().find(|(known, _)| *known == rope) {
            return Arc::clone(table);
        }
        let table = Arc::new(RopeTable::new(first, positions, &rope));
        made.push((rope, Arc::clone(&table)));
        table
    };
    (0..config.layers).map(table).collect()
}

/// What the family adds to the layer of that index.
pub(crate) fn extras(base: &BaseModel, index: usize) -> Extras<'_> {
    let (own, eps) = (&base.layers[index].extras, base.config.rms_eps);
    let norms = |pair| own.all(pair).map(|gains| gains.map(|gain| Norm { gain, eps }));
    Extras {
        biases: own.all([Extra::QBias, Extra::KBias, Extra::VBias]),
        head_norms: norms([Extra::QNorm, Extra::KNorm]),
        post_norms: norms([Extra::PostAttnNorm, Extra::PostFfnNorm]),
        activation: base.config.layer(index).activation,
    }
}

fn layer<'a>(
    base: &'a BaseModel,
    index: usize,
    rope: &'a RopeTable,
    lora: Option<(&'a LoraPlan, &'a [f32])>,
    precision: Precision,
) -> Layer<'a> {
    let weights = &base.layers[index];
    let eps = base.config.rms_eps;
    Layer {
        heads: heads(&base.config, index),
        rope,
        attn_norm: Norm { gain: &weights.attn_norm, eps },
        ffn_norm: Norm { gain: &weights.ffn_norm, eps },
        extras: extras(base, index),
        projections: Projection::ALL.map(|p| Linear {
            weight: Weight::Stored(&weights.projections[p as usize]),
            lora: lora.and_then(|(plan, theta)| plan.low_rank(index, p, theta)),
            precision,
        }),
    }
}

fn head(base: &BaseModel, precision: Precision) -> Head<'_> {
    let norm = Norm { gain: &base.output_norm, eps: base.config.rms_eps };
    Head { norm, output: Weight::Stored(base.head()), precision }
}

/// Embeddings of ids that were checked, `[ids, hidden]`.
pub(crate) fn embed(base: &BaseModel, ids: &[u32], out: &mut [f32]) {
    for (id, row) in ids.iter().zip(out.chunks_exact_mut(base.config.hidden)) {
        base.token_embedding.dequantize_rows(*id as usize, 1, row);
    }
    if base.config.embedding_scale() != 1.0 {
        scale(out, base.config.embedding_scale());
    }
}

/// A model that only runs forward.
pub(crate) struct Decoder<'a> {
    base: &'a BaseModel,
    lora: Option<(LoraPlan, &'a [f32])>,
    ropes: Vec<Arc<RopeTable>>,
}

impl<'a> Decoder<'a> {
    /// Ready for sequences of up to `positions` tokens.
    ///
    /// # Errors
    /// [`InputError::TooLong`] beyond the context, [`InputError::AdapterShape`] for another model's adapter.
    pub(crate) fn new(
        base: &'a BaseModel,
        adapter: Option<&'a Adapter>,
        positions: usize,
    ) -> Result<Self, InputError> {
        if positions > base.config.context_length {
            return Err(InputError::TooLong { found: positions, limit: base.config.context_length });
        }
        let lora = match adapter {
            Some(adapter) => Some((LoraPlan::new(&adapter.layout, &base.config)?, adapter.values.as_slice())),
            None => None,
        };
        Ok(Self { base, lora, ropes: rope_tables(&base.config, 0, positions.max(1)) })
    }

    pub(crate) fn head(&self) -> Head<'_> {
        head(self.base, Precision::F32)
    }

    /// The residual stream after the last layer for whole sequences of `length` ids.
    pub(crate) fn hidden(&self, ids: &[u32], length: usize) -> Buffer {
        self.run(ids, |layer, x, y| drop(layer.forward(x, length, Some(y))))
    }

    fn run(&self, ids: &[u32], apply: impl Fn(&Layer<'_>, &[f32], &mut [f32])) -> Buffer {
        let mut x = buffer(ids.len() * self.base.config.hidden);
        let mut y = buffer(x.len());
        embed(self.base, ids, &mut x);
        for index in 0..self.base.config.layers {
            let lora = self.lora.as_ref().map(|(plan, values)| (plan, &values[plan.values(index)]));
            apply(&layer(self.base, index, &self.ropes[index], lora, Precision::F32), &x, &mut y);
            std::mem::swap(&mut x, &mut y);
        }
        x
    }
}

/// A frozen layer with trained LoRA factors, as a burn operation sees it.
#[derive(Debug)]
pub(crate) struct AdaptedLayer {
    pub(crate) base: Arc<BaseModel>,
    pub(crate) plan: Arc<LoraPlan>,
    pub(crate) rope: Arc<RopeTable>,
    pub(crate) index: usize,
    pub(crate) recompute: bool,
    pub(crate) precision: Precision,
}

impl LayerSource for AdaptedLayer {
    fn layer<'a>(&'a self, theta: &'a [f32]) -> Layer<'a> {
        layer(&self.base, self.index, &self.rope, Some((&self.plan, theta)), self.precision)
    }

    fn gradients<'a>(&self, dtheta: &'a mut [f32]) -> LayerGradients<'a> {
        self.plan.layers[self.index].gradients(dtheta)
    }

    fn recompute(&self) -> bool {
        self.recompute
    }
}

/// A head in which nothing is trained.
#[derive(Debug)]
pub(crate) struct FrozenHead {
    pub(crate) base: Arc<BaseModel>,
    pub(crate) precision: Precision,
}

impl HeadSource for FrozenHead {
    fn head<'a>(&'a self, _: &'a [f32]) -> Head<'a> {
        head(&self.base, self.precision)
    }

    fn gradients<'a>(&self, _: &'a mut [f32]) -> HeadGradients<'a> {
        HeadGradients::default()
    }
}

/// Gradients of a trained weight alone.
pub(crate) fn weight_gradient(weight: &mut [f32]) -> LinearGradients<'_> {
    LinearGradients { weight: Some(weight), ..LinearGradients::default() }
}
