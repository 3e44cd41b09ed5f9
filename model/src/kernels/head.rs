//! Final norm, output projection and cross entropy, a chunk of tokens at a time: the logits of a whole batch
//! (`[tokens, vocabulary]`) never exist together.

use super::bf16::Precision;
use super::cross_entropy::{nll_and_gradient, nll_and_hits};
use super::linear::Weight;
use super::matrix::{Into, View, ViewMut, product};
use super::norm::Norm;
use super::scratch::{Buffer, buffer};

/// Logits held at once, and the bounds of the rows that makes.
const CHUNK_LOGITS: usize = 1 << 21;
const CHUNK_ROWS_MIN: usize = 128;
const CHUNK_ROWS_MAX: usize = 512;

/// The end of the decoder; `output` is `[vocabulary, hidden]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head<'a> {
    pub(crate) norm: Norm<'a>,
    pub(crate) output: Weight<'a>,
    pub(crate) precision: Precision,
}

/// What the loss is taken over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Targets<'a> {
    /// One target a row; negative is ignored.
    pub(crate) ids: &'a [i32],
    /// The summed loss is divided by this.
    pub(crate) denominator: f32,
}

/// Where the head's gradients go; `None` is not computed.
#[derive(Debug, Default)]
pub(crate) struct HeadGradients<'a> {
    pub(crate) dx: Option<&'a mut [f32]>,
    pub(crate) output: Option<&'a mut [f32]>,
    pub(crate) gain: Option<&'a mut [f32]>,
}

impl Head<'_> {
    /// Summed negative log-likelihood over the denominator, without gradients.
    pub(crate) fn loss(&self, x: &[f32], targets: Targets<'_>) -> f32 {
        let mut nll = buffer(targets.ids.len());
        self.score(x, targets.ids, &mut nll);
        total(&nll, targets.denominator)
    }

    /// The same, and its gradients.
    pub(crate) fn loss_and_gradient(
        &self,
        x: &[f32],
        targets: Targets<'_>,
        gradients: &mut HeadGradients<'_>,
    ) -> f32 {
        let (h, v) = (self.output.cols(), self.output.rows());
        let (normalized, inverse_rms) = self.norm.forward(x);
        let mut dnormalized = buffer(x.len());
        let mut nll = buffer(targets.ids.len());
        for_each_chunk(targets.ids.len(), v, |first, rows, logits| {
            let (from, to) = (first * h, (first + rows) * h);
            self.output.forward(&normalized[from..to], logits, self.precision);
            let chunk = first..first + rows;
            nll_and_gradient(logits, &targets.ids[chunk.clone()], 1.0 / targets.denominator, &mut nll[chunk]);
            self.output.backward_input(logits, &mut dnormalized[from..to], Into::Overwrite, self.precision);
            if let Some(dw) = gradients.output.as_deref_mut() {
                let into = if first == 0 { Into::Overwrite } else { Into::Add };
                let input = View::new(&normalized[from..to], rows, h);
                product(ViewMut::new(dw, v, h), into, View::new(logits, rows, v).t(), input, 1.0);
            }
        });
        if let Some(dx) = gradients.dx.as_deref_mut() {
            dx.fill(0.0);
            self.norm.backward_input(x, &inverse_rms, &dnormalized, dx);
        }
        if let Some(gain) = gradients.gain.as_deref_mut() {
            self.norm.backward_gain(x, &inverse_rms, &dnormalized, gain);
        }
        total(&nll, targets.denominator)
    }

    /// Writes each row's negative log-likelihood (0 if ignored); returns the rows whose target is the argmax.
    pub(crate) fn score(&self, x: &[f32], targets: &[i32], nll: &mut [f32]) -> u64 {
        let h = self.output.cols();
        let (normalized, _) = self.norm.forward(x);
        let mut hits = 0;
        for_each_chunk(targets.len(), self.output.rows(), |first, rows, logits| {
            self.output.forward(&normalized[first * h..(first + rows) * h], logits, self.precision);
            hits += nll_and_hits(logits, &targets[first..first + rows], &mut nll[first..first + rows]);
        });
        hits
    }

    /// Logits `[rows, vocabulary]` of a few rows.
    pub(crate) fn logits(&self, x: &[f32]) -> Vec<f32> {
        let (normalized, _) = self.norm.forward(x);
        let mut logits = vec![0.0; x.len() / self.output.cols() * self.output.rows()];
        self.output.forward(&normalized, &mut logits, self.precision);
        logits
    }
}

/// Most rows whose logits are held at once.
pub(crate) fn chunk_rows(vocab: usize) -> usize {
    (CHUNK_LOGITS / vocab).clamp(CHUNK_ROWS_MIN, CHUNK_ROWS_MAX)
}

fn for_each_chunk(tokens: usize, vocab: usize, mut f: impl FnMut(usize, usize, &mut [f32])) {
    let rows_max = chunk_rows(vocab).min(tokens);
    let mut logits: Buffer = buffer(rows_max * vocab);
    for first in (0..tokens).step_by(rows_max.max(1)) {
        let rows = rows_max.min(tokens - first);
        f(first, rows, &mut logits[..rows * vocab]);
    }
}

fn total(nll: &[f32], denominator: f32) -> f32 {
    (nll.iter().map(|x| f64::from(*x)).sum::<f64>() / f64::from(denominator)) as f32
}
