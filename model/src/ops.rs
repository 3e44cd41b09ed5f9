//! The decoder's burn operations: three backend extensions on Flex with hand-written backward passes.
//!
//! Autodiff sees a decoder layer as one node with two parents: the residual stream and one flat tensor `theta`
//! with the layer's trained values. What theta means is known to the [`LayerSource`] (LoRA factors in
//! `decoder.rs`, whole layers in `full.rs`); frozen weights are no tensors and get no gradient work. All of
//! burn's extension API that this crate uses is in this file, for it moves between versions.

use std::fmt::Debug;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Tensor, TensorData};

use crate::kernels::head::{Head, HeadGradients, Targets};
use crate::kernels::layer::{Layer, Saved};
use crate::kernels::layer_backward::{LayerGradients, LayerPass};

/// A decoder layer but for its trained values.
pub(crate) trait LayerSource: Debug + Send + Sync {
    /// The layer with `theta` as its trained values.
    fn layer<'a>(&'a self, theta: &'a [f32]) -> Layer<'a>;
    /// Where the gradient of each trained value lies in `dtheta`; together they cover all of it.
    fn gradients<'a>(&self, dtheta: &'a mut [f32]) -> LayerGradients<'a>;
    /// Whether the backward pass runs the layer again instead of keeping its activations.
    fn recompute(&self) -> bool;
}

/// The head but for its trained values.
pub(crate) trait HeadSource: Debug + Send + Sync {
    /// The head with `theta` as its trained values.
    fn head<'a>(&'a self, theta: &'a [f32]) -> Head<'a>;
    /// Where the gradient of each trained value lies in `dtheta`; together they cover all of it.
    fn gradients<'a>(&self, dtheta: &'a mut [f32]) -> HeadGradients<'a>;
}

/// The targets of a batch and what their summed loss is divided by.
#[derive(Debug)]
pub(crate) struct LossTargets {
    pub(crate) ids: Vec<i32>,
    pub(crate) denominator: f32,
}

/// The operations as methods of a burn backend; the functions below are the way to call them.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait FleetuneBackend: Backend {
    /// One decoder layer; x `[sequences, length, hidden]`.
    fn decoder_layer(
        x: FloatTensor<Self>,
        theta: FloatTensor<Self>,
        source: Arc<dyn LayerSource>,
    ) -> FloatTensor<Self>;
    /// Final norm, output projection and summed cross entropy over the denominator; a scalar.
    fn head_loss(
        x: FloatTensor<Self>,
        theta: FloatTensor<Self>,
        source: Arc<dyn HeadSource>,
        targets: Arc<LossTargets>,
    ) -> FloatTensor<Self>;
    /// A scalar of no value whose gradient by y is `dy`.
    fn upstream(y: FloatTensor<Self>, dy: Arc<Vec<f32>>) -> FloatTensor<Self>;
    /// Rows of a table that starts `theta` and is `hidden` wide; `[sequences, length, hidden]`.
    fn embedding(theta: FloatTensor<Self>, ids: Arc<Vec<u32>>, shape: [usize; 3]) -> FloatTensor<Self>;
}

/// One decoder layer; x `[sequences, length, hidden]`.
pub(crate) fn decoder_layer(x: Tensor<3>, theta: Tensor<1>, source: &Arc<dyn LayerSource>) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::decoder_layer(
        x.into_dispatch(),
        theta.into_dispatch(),
        Arc::clone(source),
    ))
}

/// Final norm, output projection and summed cross entropy over the denominator.
pub(crate) fn head_loss(
    x: Tensor<3>,
    theta: Tensor<1>,
    source: &Arc<dyn HeadSource>,
    targets: LossTargets,
) -> Tensor<1> {
    let (x, theta) = (x.into_dispatch(), theta.into_dispatch());
    Tensor::from_dispatch(Dispatch::head_loss(x, theta, Arc::clone(source), Arc::new(targets)))
}

/// A scalar whose `backward` starts at y with the gradient `dy`: the graph before y, without the one after it.
pub(crate) fn upstream(y: Tensor<3>, dy: Vec<f32>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::upstream(y.into_dispatch(), Arc::new(dy)))
}

/// Rows of a table that starts `theta`.
pub(crate) fn embedding(theta: Tensor<1>, ids: Vec<u32>, shape: [usize; 3]) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::embedding(theta.into_dispatch(), Arc::new(ids), shape))
}

impl FleetuneBackend for Flex {
    fn decoder_layer(x: FlexTensor, theta: FlexTensor, source: Arc<dyn LayerSource>) -> FlexTensor {
        run_layer(&x.to_contiguous(), &theta.to_contiguous(), source.as_ref()).0
    }

    fn head_loss(
        x: FlexTensor,
        theta: FlexTensor,
        source: Arc<dyn HeadSource>,
        targets: Arc<LossTargets>,
    ) -> FlexTensor {
        let (x, theta) = (x.to_contiguous(), theta.to_contiguous());
        let loss = source.head(theta.storage::<f32>()).loss(x.storage::<f32>(), targets.as_ref().into());
        tensor(vec![loss], vec![1])
    }

    fn upstream(_: FlexTensor, _: Arc<Vec<f32>>) -> FlexTensor {
        tensor(vec![0.0], vec![1])
    }

    fn embedding(theta: FlexTensor, ids: Arc<Vec<u32>>, shape: [usize; 3]) -> FlexTensor {
        let theta = theta.to_contiguous();
        let table = theta.storage::<f32>();
        let hidden = shape[2];
        let rows = ids.iter().flat_map(|id| &table[*id as usize * hidden..][..hidden]);
        tensor(rows.copied().collect(), shape.to_vec())
    }
}

impl<C: CheckpointStrategy> FleetuneBackend for Autodiff<Flex, C> {
    fn decoder_layer(
        x: FloatTensor<Self>,
        theta: FloatTensor<Self>,
        source: Arc<dyn LayerSource>,
    ) -> FloatTensor<Self> {
        let ((x, x_node), (theta, theta_node)) = (x.into_parts(), theta.into_parts());
        let (x, theta) = (x.to_contiguous(), theta.to_contiguous());
        let (y, saved) = run_layer(&x, &theta, source.as_ref());
        match LayerBackward.prepare::<C>([x_node, theta_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let saved = (!source.recompute()).then(|| Arc::new(saved));
                prep.finish(LayerState { x, theta, source, saved }, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn head_loss(
        x: FloatTensor<Self>,
        theta: FloatTensor<Self>,
        source: Arc<dyn HeadSource>,
        targets: Arc<LossTargets>,
    ) -> FloatTensor<Self> {
        let ((x, x_node), (theta, theta_node)) = (x.into_parts(), theta.into_parts());
        let (x, theta) = (x.to_contiguous(), theta.to_contiguous());
        match HeadBackward.prepare::<C>([x_node, theta_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (loss, state) = run_head(&x, &theta, source.as_ref(), &targets);
                prep.finish(state, loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(Flex::head_loss(x, theta, source, targets)),
        }
    }

    fn upstream(y: FloatTensor<Self>, dy: Arc<Vec<f32>>) -> FloatTensor<Self> {
        let (y, node) = y.into_parts();
        let shape = dims(&y);
        let scalar = Flex::upstream(y, Arc::clone(&dy));
        match UpstreamBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(UpstreamState { dy, shape }, scalar),
            OpsKind::UnTracked(prep) => prep.finish(scalar),
        }
    }

    fn embedding(theta: FloatTensor<Self>, ids: Arc<Vec<u32>>, shape: [usize; 3]) -> FloatTensor<Self> {
        let (theta, node) = theta.into_parts();
        let values = theta.shape().num_elements();
        let y = Flex::embedding(theta, Arc::clone(&ids), shape);
        match EmbeddingBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(EmbeddingState { ids, hidden: shape[2], values }, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

#[derive(Debug)]
struct LayerBackward;

#[derive(Debug, Clone)]
struct LayerState {
    x: FlexTensor,
    theta: FlexTensor,
    source: Arc<dyn LayerSource>,
    saved: Option<Arc<Saved>>,
}

impl Backward<Flex, 2> for LayerBackward {
    type State = LayerState;

    fn backward(self, ops: Ops<LayerState, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<Flex>(&ops.node).to_contiguous();
        let LayerState { x, theta, source, saved } = ops.state;
        let saved = saved.unwrap_or_else(|| {
            let layer = source.layer(theta.storage::<f32>());
            Arc::new(layer.forward(x.storage::<f32>(), length(&x), None))
        });
        let [x_parent, theta_parent] = ops.parents;
        let mut dtheta = vec![0f32; theta.shape().num_elements()];
        let mut gradients = match theta_parent {
            Some(_) => source.gradients(&mut dtheta),
            None => LayerGradients::default(),
        };
        let pass =
            LayerPass { x: x.storage::<f32>(), length: length(&x), saved: &saved, dy: dy.storage::<f32>() };
        let dx = source.layer(theta.storage::<f32>()).backward(pass, &mut gradients, x_parent.is_some());
        if let (Some(parent), Some(dx)) = (x_parent, dx) {
            grads.register::<Flex>(parent.id, tensor(dx, dims(&x)));
        }
        if let Some(parent) = theta_parent {
            grads.register::<Flex>(parent.id, tensor(dtheta, dims(&theta)));
        }
    }
}

/// The head's gradients, made in its forward pass while the logits exist.
#[derive(Debug)]
struct HeadBackward;

#[derive(Debug, Clone)]
struct HeadState {
    dx: FlexTensor,
    dtheta: FlexTensor,
}

impl Backward<Flex, 2> for HeadBackward {
    type State = HeadState;

    fn backward(self, ops: Ops<HeadState, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let upstream = grads.consume::<Flex>(&ops.node).to_contiguous().storage::<f32>()[0];
        for (parent, mut gradient) in ops.parents.into_iter().zip([ops.state.dx, ops.state.dtheta]) {
            let Some(parent) = parent else { continue };
            if upstream != 1.0 {
                gradient.storage_mut::<f32>().iter_mut().for_each(|g| *g *= upstream);
            }
            grads.register::<Flex>(parent.id, gradient);
        }
    }
}

#[derive(Debug)]
struct UpstreamBackward;

#[derive(Debug, Clone)]
struct UpstreamState {
    dy: Arc<Vec<f32>>,
    shape: Vec<usize>,
}

impl Backward<Flex, 1> for UpstreamBackward {
    type State = UpstreamState;

    fn backward(self, ops: Ops<UpstreamState, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([parent], UpstreamState { dy, shape }) = (ops.parents, ops.state);
        let Some(parent) = parent else { return };
        grads.register::<Flex>(parent.id, tensor(Arc::unwrap_or_clone(dy), shape));
    }
}

#[derive(Debug)]
struct EmbeddingBackward;

#[derive(Debug, Clone)]
struct EmbeddingState {
    ids: Arc<Vec<u32>>,
    hidden: usize,
    values: usize,
}

impl Backward<Flex, 1> for EmbeddingBackward {
    type State = EmbeddingState;

    fn backward(self, ops: Ops<EmbeddingState, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<Flex>(&ops.node).to_contiguous();
        let ([parent], EmbeddingState { ids, hidden, values }) = (ops.parents, ops.state);
        let Some(parent) = parent else { return };
        let mut dtheta = vec![0f32; values];
        for (id, dy) in ids.iter().zip(dy.storage::<f32>().chunks_exact(hidden)) {
            let row = &mut dtheta[*id as usize * hidden..][..hidden];
            row.iter_mut().zip(dy).for_each(|(a, b)| *a += b);
        }
        grads.register::<Flex>(parent.id, tensor(dtheta, vec![values]));
    }
}

impl<'a> From<&'a LossTargets> for Targets<'a> {
    fn from(targets: &'a LossTargets) -> Self {
        Self { ids: &targets.ids, denominator: targets.denominator }
    }
}

fn run_layer(x: &FlexTensor, theta: &FlexTensor, source: &dyn LayerSource) -> (FlexTensor, Saved) {
    let values = x.storage::<f32>();
    let mut y = vec![0f32; values.len()];
    let saved = source.layer(theta.storage::<f32>()).forward(values, length(x), Some(&mut y));
    (tensor(y, dims(x)), saved)
}

fn run_head(
    x: &FlexTensor,
    theta: &FlexTensor,
    source: &dyn HeadSource,
    targets: &LossTargets,
) -> (FlexTensor, HeadState) {
    let (x_values, theta_values) = (x.storage::<f32>(), theta.storage::<f32>());
    let (mut dx, mut dtheta) = (vec![0f32; x_values.len()], vec![0f32; theta_values.len()]);
    let mut gradients = source.gradients(&mut dtheta);
    gradients.dx = Some(&mut dx);
    let loss = source.head(theta_values).loss_and_gradient(x_values, targets.into(), &mut gradients);
    (tensor(vec![loss], vec![1]), HeadState { dx: tensor(dx, dims(x)), dtheta: tensor(dtheta, dims(theta)) })
}

fn tensor(values: Vec<f32>, shape: Vec<usize>) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

fn dims(tensor: &FlexTensor) -> Vec<usize> {
    tensor.shape().iter().copied().collect()
}

/// Tokens in each sequence of x `[sequences, length, hidden]`.
fn length(x: &FlexTensor) -> usize {
    dims(x)[1]
}
