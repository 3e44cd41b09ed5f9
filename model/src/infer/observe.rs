//! How large the inputs of each projection are on a text: what a quantizer needs to know which columns matter.

use super::matrix::Input;
use super::{Engine, Span};
use crate::batch::InputError;
use crate::config::Projection;
use crate::kernels::norm::Norm;

/// Inputs that projections of one layer differ in: of q, k and v; of o; of gate and up; of down.
const INPUTS: usize = 4;

/// Mean squares of the inputs of every projection and of the head, by column.
#[derive(Debug, Clone, PartialEq)]
pub struct InputSquares {
    /// By layer and input, one value a column.
    layers: Vec<[Vec<f32>; INPUTS]>,
    head: Vec<f32>,
}

impl InputSquares {
    /// Of one projection's input.
    #[must_use]
    pub fn of(&self, layer: usize, projection: Projection) -> &[f32] {
        let input = match projection {
            Projection::Q | Projection::K | Projection::V => 0,
            Projection::O => 1,
            Projection::Gate | Projection::Up => 2,
            Projection::Down => 3,
        };
        &self.layers[layer][input]
    }

    /// Of the head's input.
    #[must_use]
    pub fn head(&self) -> &[f32] {
        &self.head
    }
}

/// Sums of squares, filled as the layers run.
#[derive(Debug)]
pub(super) struct Observed {
    /// Of each input in the order in which a pass makes them; the first begins the next pass.
    sums: Vec<Vec<f64>>,
    next: usize,
}

impl Observed {
    pub(super) fn add(&mut self, values: &[f32], width: usize) {
        let sums = &mut self.sums[self.next];
        sums.resize(width, 0.0);
        add_squares(values, sums);
        self.next = (self.next + 1) % self.sums.len();
    }
}

impl Engine {
    /// Runs the base model over texts, each by itself, and measures the inputs of its projections.
    ///
    /// # Errors
    /// As [`Engine::read`]; [`InputError::TooShort`] without texts.
    pub fn input_squares(&self, texts: &[Vec<u32>]) -> Result<InputSquares, InputError> {
        let (config, layers) = (&self.base().config, self.layers.len());
        let mut input = Input::observed(Observed { sums: vec![Vec::new(); layers * INPUTS], next: 0 });
        let mut head = vec![0.0; config.hidden];
        let norm = Norm { gain: &self.base().output_norm, eps: config.rms_eps };
        for text in texts {
            let span = Span { sequence: &mut self.sequence(None), ids: text };
            self.read_hidden(&mut [span], &mut input, &mut |_, _, rows| {
                add_squares(&norm.forward(rows).0, &mut head);
            })?;
        }
        let tokens: usize = texts.iter().map(Vec::len).sum();
        if tokens == 0 {
            return Err(InputError::TooShort { found: 0, needed: 1 });
        }
        let mean = |sums: Vec<f64>| sums.into_iter().map(|sum| (sum / tokens as f64) as f32).collect();
        let mut sums = input.into_observed().map(|observed| observed.sums).unwrap_or_default().into_iter();
        let mut next = || sums.next().map(mean).unwrap_or_default();
        let layers = (0..layers).map(|_| std::array::from_fn(|_| next())).collect();
        Ok(InputSquares { layers, head: mean(head) })
    }
}

fn add_squares(values: &[f32], sums: &mut [f64]) {
    for row in values.chunks_exact(sums.len()) {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += f64::from(value * value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::embed;
    use crate::fixtures::{base_of, blocks, config};
    use crate::weights::WeightFormat;

    /// The first layer's inputs can be had without the engine.
    #[test]
    fn squares_are_those_of_the_inputs() {
        let base = base_of(&config(4, 2, 16), WeightFormat::F32);
        let engine = Engine::new(base.clone());
        let texts = blocks(&base.config, 2, 280);
        let found = engine.input_squares(&texts).unwrap();
        let width = base.config.hidden;
        let mut sums = vec![0.0; width];
        for text in &texts {
            let mut x = vec![0.0; text.len() * width];
            embed(&base, text, &mut x);
            let norm = Norm { gain: &base.layers[0].attn_norm, eps: base.config.rms_eps };
            add_squares(&norm.forward(&x).0, &mut sums);
        }
        for (found, sum) in found.of(0, Projection::K).iter().zip(sums) {
            let expected = sum / (2.0 * 281.0);
            assert!((f64::from(*found) / expected - 1.0).abs() < 1e-4, "{found}, expected {expected}");
        }
        for layer in 0..base.config.layers {
            for projection in Projection::ALL {
                let (_, columns) = projection.shape(&base.config);
                assert_eq!(found.of(layer, projection).len(), columns);
                assert!(found.of(layer, projection).iter().all(|square| *square > 0.0));
            }
        }
        assert_eq!(found.head().len(), width);
        assert!(engine.input_squares(&[]).is_err());
    }
}
