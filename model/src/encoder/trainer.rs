//! Losses, gradients and probabilities of a classifier. One trainer uses one thread; equal input gives equal bits.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::config::EncoderProjection;
use super::layer::add_bias;
use super::layout::ClassifierLayout;
use super::model::EncoderModel;
use super::pass::{Forward, LayerFactors, Pass, pooled, pooled_backward};
use crate::adapter::Factor;
use crate::batch::InputError;
use crate::kernels::bf16::Precision;
use crate::kernels::cross_entropy::nll_and_gradient;
use crate::kernels::linear::{LowRank, Weight};
use crate::kernels::matrix::{Into, View, ViewMut, product};
use crate::kernels::scratch::{self, Buffer, buffer};
use crate::train::{TrainError, check_len};

/// Rows that run through the layers together where no gradient is asked for.
const PASS_ROWS: usize = 2048;

/// A text as ids, and its class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// As [`super::WordPieceTokenizer::encode`] makes them.
    pub ids: Vec<u32>,
    /// The place of its label in [`super::ClassifierConfig::labels`].
    pub class: usize,
}

/// Computes with a frozen encoder and the values of one layout.
#[derive(Debug)]
pub struct ClassifierTrainer {
    model: Arc<EncoderModel>,
    layout: Arc<ClassifierLayout>,
    precision: Precision,
    /// By layer and projection, if the layout freezes A.
    frozen_a: BTreeMap<(usize, EncoderProjection), Vec<f32>>,
}

impl ClassifierTrainer {
    /// A trainer for values of that layout; `precision` is that of the products with the frozen weights.
    ///
    /// # Errors
    /// [`InputError::ClassifierShape`] if the layout is for a model of other sizes, [`InputError::NoPooler`] if it
    /// asks for one that the model lacks.
    pub fn new(
        model: Arc<EncoderModel>,
        layout: Arc<ClassifierLayout>,
        precision: Precision,
    ) -> Result<Self, TrainError> {
        if !layout.fits(model.config()) {
            return Err(InputError::ClassifierShape { model: model.config().name.clone() }.into());
        }
        model.check_pooling(layout.config().pooling)?;
        let mut frozen_a = BTreeMap::new();
        for lora in layout.config().lora.iter().filter(|lora| lora.freeze_a) {
            for layer in 0..model.config().layers {
                let drawn = |&projection: &EncoderProjection| {
                    ((layer, projection), layout.initial_a(layer, projection))
                };
                frozen_a.extend(lora.targets.iter().map(drawn));
            }
        }
        Ok(Self { model, layout, precision, frozen_a })
    }

    /// The layout of the values this trainer takes.
    #[must_use]
    pub fn layout(&self) -> &Arc<ClassifierLayout> {
        &self.layout
    }

    /// The frozen encoder.
    #[must_use]
    pub fn model(&self) -> &Arc<EncoderModel> {
        &self.model
    }

    /// Mean cross entropy (nats) of the examples' classes; overwrites `gradient` with its gradient.
    ///
    /// # Errors
    /// [`TrainError::Input`] if an example or a slice does not fit the model or the layout, [`TrainError::NoData`]
    /// if there is no example.
    pub fn loss_and_gradient(
        &self,
        values: &[f32],
        examples: &[&Example],
        gradient: &mut [f32],
    ) -> Result<f32, TrainError> {
        let ids = self.check(values, examples)?;
        check_len("gradient", self.layout.len(), gradient.len())?;
        let lora = |layer, projection| self.low_rank(values, layer, projection);
        let (model, pooling) = (self.model.parts(), self.layout.config().pooling);
        let pass = Pass { model, lora: &lora, precision: self.precision };
        let adapted = self.layout.config().lora.is_some();
        let forward = pass.forward(&ids, adapted);
        let features = self.features(&forward);
        let (losses, dlogits) = self.losses(values, &features, examples);
        let (dhead, dbias) = self.layout.head_ranges(gradient);
        self.head_backward(&features, &dlogits, dhead, dbias);
        if adapted {
            let mut dfeatures = buffer(features.len());
            self.head(values).backward_input(&dlogits, &mut dfeatures, Into::Overwrite, Precision::F32);
            let dhidden = pooled_backward(model, pooling, &forward.sequences, &features, &mut dfeatures);
            pass.backward(forward, dhidden, |layer| self.factors(layer), gradient);
        }
        Ok(mean(&losses))
    }

    /// Mean cross entropy (nats) of the examples' classes.
    ///
    /// # Errors
    /// As [`ClassifierTrainer::loss_and_gradient`].
    pub fn loss(&self, values: &[f32], examples: &[&Example]) -> Result<f32, TrainError> {
        let ids = self.check(values, examples)?;
        let mut losses = Vec::with_capacity(examples.len());
        self.for_each_pass(values, &ids, |range, features| {
            losses.extend_from_slice(&self.losses(values, features, &examples[range]).0);
        });
        Ok(mean(&losses))
    }

    /// Logits of each sequence, `[sequences, classes]`.
    ///
    /// # Errors
    /// [`TrainError::Input`] if a sequence or the values do not fit the model or the layout.
    pub fn logits(&self, values: &[f32], sequences: &[&[u32]]) -> Result<Vec<f32>, TrainError> {
        check_len("classifier values", self.layout.len(), values.len())?;
        self.model.check(sequences)?;
        let mut logits = Vec::with_capacity(sequences.len() * self.layout.classes());
        self.for_each_pass(values, sequences, |_, features| {
            logits.extend_from_slice(&self.head_logits(values, features));
        });
        Ok(logits)
    }

    /// The probability of each class for each sequence, `[sequences, classes]`.
    ///
    /// # Errors
    /// As [`ClassifierTrainer::logits`]; [`TrainError::NonFinite`] if weights of the model are not finite.
    pub fn predict(&self, values: &[f32], sequences: &[&[u32]]) -> Result<Vec<f32>, TrainError> {
        let mut logits = self.logits(values, sequences)?;
        for row in logits.chunks_exact_mut(self.layout.classes()) {
            let most = row.iter().copied().fold(f32::MIN, f32::max);
            row.iter_mut().for_each(|x| *x = (*x - most).exp());
            let total: f32 = row.iter().sum();
            row.iter_mut().for_each(|x| *x /= total);
        }
        if logits.iter().all(|x| x.is_finite()) { Ok(logits) } else { Err(TrainError::NonFinite { step: 0 }) }
    }

    fn check<'a>(&self, values: &[f32], examples: &[&'a Example]) -> Result<Vec<&'a [u32]>, TrainError> {
        check_len("classifier values", self.layout.len(), values.len())?;
        if examples.is_empty() {
            return Err(TrainError::NoData);
        }
        let ids: Vec<&[u32]> = examples.iter().map(|example| example.ids.as_slice()).collect();
        self.model.check(&ids)?;
        let classes = self.layout.classes();
        match examples.iter().find(|example| example.class >= classes) {
            Some(Example { class, .. }) => Err(InputError::UnknownClass { class: *class, classes }.into()),
            None => Ok(ids),
        }
    }

    fn for_each_pass(&self, values: &[f32], ids: &[&[u32]], mut take: impl FnMut(Range<usize>, &[f32])) {
        let lora = |layer, projection| self.low_rank(values, layer, projection);
        let pass = Pass { model: self.model.parts(), lora: &lora, precision: self.precision };
        let mut first = 0;
        while first < ids.len() {
            let mut rows = 0;
            let fits = |ids: &&&[u32]| {
                rows += ids.len();
                rows <= PASS_ROWS
            };
            let count = ids[first..].iter().take_while(fits).count().max(1);
            let range = first..first + count;
            take(range.clone(), &self.features(&pass.forward(&ids[range], false)));
            first += count;
        }
    }

    fn features(&self, forward: &Forward) -> Buffer {
        pooled(self.model.parts(), self.layout.config().pooling, &forward.hidden, &forward.sequences)
    }

    fn low_rank<'a>(
        &'a self,
        values: &'a [f32],
        layer: usize,
        projection: EncoderProjection,
    ) -> Option<LowRank<'a>> {
        let lora = self.layout.config().lora.as_ref()?;
        let b = self.layout.find(layer, projection, Factor::B)?;
        let a = match self.layout.find(layer, projection, Factor::A) {
            Some(range) => &values[range],
            None => self.frozen_a.get(&(layer, projection))?,
        };
        Some(LowRank { a, b: &values[b], rank: lora.rank, scale: lora.scale() })
    }

    fn factors(&self, layer: usize) -> [Option<LayerFactors>; 6] {
        EncoderProjection::ALL.map(|projection| {
            let find = |factor| self.layout.find(layer, projection, factor);
            Some(LayerFactors { a: find(Factor::A), b: find(Factor::B) })
        })
    }

    fn head<'a>(&self, values: &'a [f32]) -> Weight<'a> {
        let (rows, cols) = (self.layout.classes(), self.model.config().hidden);
        Weight::Trained { values: &values[self.layout.head_weight()], rows, cols }
    }

    fn head_logits(&self, values: &[f32], features: &[f32]) -> Buffer {
        let sequences = features.len() / self.model.config().hidden;
        let mut logits = buffer(sequences * self.layout.classes());
        self.head(values).forward(features, &mut logits, Precision::F32);
        add_bias(&mut logits, &values[self.layout.head_bias()]);
        logits
    }

    /// Each example's cross entropy, and the gradient of their mean by the logits.
    fn losses(&self, values: &[f32], features: &[f32], examples: &[&Example]) -> (Buffer, Buffer) {
        let mut logits = self.head_logits(values, features);
        let targets: Vec<i32> = examples.iter().map(|example| example.class as i32).collect();
        let mut losses = buffer(targets.len());
        nll_and_gradient(&mut logits, &targets, 1.0 / targets.len() as f32, &mut losses);
        (losses, logits)
    }

    fn head_backward(&self, features: &[f32], dlogits: &[f32], dweight: &mut [f32], dbias: &mut [f32]) {
        let (classes, width) = (self.layout.classes(), self.model.config().hidden);
        let rows = features.len() / width;
        let (left, right) = (View::new(dlogits, rows, classes).t(), View::new(features, rows, width));
        product(ViewMut::new(dweight, classes, width), Into::Overwrite, left, right, 1.0);
        dbias.fill(0.0);
        for row in dlogits.chunks_exact(classes) {
            dbias.iter_mut().zip(row).for_each(|(sum, d)| *sum += d);
        }
    }
}

impl ClassifierLayout {
    /// The head's weight and bias in a vector of this layout.
    fn head_ranges<'a>(&self, values: &'a mut [f32]) -> (&'a mut [f32], &'a mut [f32]) {
        let (weight, bias) = (self.head_weight(), self.head_bias());
        let (before, after) = values.split_at_mut(bias.start);
        (&mut before[weight], &mut after[..bias.len()])
    }
}

impl Drop for ClassifierTrainer {
    /// A phone wants its memory back when training ends.
    fn drop(&mut self) {
        scratch::release_pool();
    }
}

fn mean(losses: &[f32]) -> f32 {
    (losses.iter().map(|x| f64::from(*x)).sum::<f64>() / losses.len() as f64) as f32
}
