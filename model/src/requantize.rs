//! A model in another weight format: what is a choice there, and the model that comes of it.

use crate::base::{BaseModel, LayerWeights, ModelParts};
use crate::config::Projection;
use crate::error::ModelError;
use crate::gguf::model::layer_tensor;
use crate::infer::InputSquares;
use crate::weights::{QuantizeMethod, WeightFormat, WeightMatrix};

/// How scales are chosen in a whole model.
#[derive(Debug, Clone, Copy, Default)]
pub enum ModelQuantizeMethod<'a> {
    /// As ggml's plain quantizers, bit for bit.
    #[default]
    Ggml,
    /// By search for the least squared error, all columns alike.
    Search,
    /// The same, each column weighted with the mean square of its input on a text.
    SearchFor(&'a InputSquares),
}

/// The error that quantization made, relative: the root of its squares' sum over that of the values'.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct QuantizeError {
    error: f64,
    values: f64,
}

impl QuantizeError {
    /// 0 for weights that were kept to the bit.
    #[must_use]
    pub fn relative(&self) -> f64 {
        if self.values > 0.0 { (self.error / self.values).sqrt() } else { 0.0 }
    }

    fn add(&mut self, before: &[f32], after: &[f32]) {
        for (x, y) in before.iter().zip(after) {
            self.error += f64::from(x - y).powi(2);
            self.values += f64::from(*x).powi(2);
        }
    }
}

/// The model with all projections in the format. Embedding and head stay as they are where they are in blocks, and
/// become Q8_0 where not: that is what llama.cpp's quantizer makes of a shared one, and they matter most.
///
/// # Errors
/// [`ModelError::Weights`] where a matrix does not fit the format.
pub fn requantize(
    base: &BaseModel,
    format: WeightFormat,
    method: ModelQuantizeMethod<'_>,
) -> Result<(BaseModel, QuantizeError), ModelError> {
    let mut error = QuantizeError::default();
    let mut quantize = |name: String, matrix: &WeightMatrix, format, importance: Option<&[f32]>| {
        let values = matrix.to_f32();
        matrix.release();
        let method = match method {
            ModelQuantizeMethod::Ggml => QuantizeMethod::Ggml,
            ModelQuantizeMethod::Search | ModelQuantizeMethod::SearchFor(_) => {
                QuantizeMethod::Search { importance }
            }
        };
        let made = WeightMatrix::quantize(&values, matrix.rows(), matrix.cols(), format, method)
            .map_err(|source| ModelError::Weights { tensor: name, source })?;
        error.add(&values, &made.to_f32());
        Ok(made)
    };
    let mut layers = Vec::with_capacity(base.layers.len());
    for (index, layer) in base.layers.iter().enumerate() {
        let mut projection = |projection: Projection| {
            let importance = match method {
                ModelQuantizeMethod::Ggml | ModelQuantizeMethod::Search => None,
                ModelQuantizeMethod::SearchFor(squares) => Some(squares.of(index, projection)),
            };
            let name = layer_tensor(index, projection.gguf_name());
            quantize(name, layer.projection(projection), format, importance)
        };
        let [q, k, v, o, gate, up, down] = Projection::ALL.map(&mut projection);
        layers.push(LayerWeights { projections: [q?, k?, v?, o?, gate?, up?, down?], ..layer.clone() });
    }
    let mut vocabulary = |name: &str, matrix: &WeightMatrix| {
        if matrix.format().block().0 > 1 {
            return Ok(matrix.clone());
        }
        quantize(name.to_owned(), matrix, WeightFormat::Q8_0, None)
    };
    let parts = ModelParts {
        config: base.config.clone(),
        tokenizer: base.tokenizer.clone(),
        token_embedding: vocabulary("token_embd.weight", &base.token_embedding)?,
        output: base.output.as_ref().map(|output| vocabulary("output.weight", output)).transpose()?,
        layers,
        output_norm: base.output_norm.clone(),
        chat_template: base.chat_template.clone(),
    };
    Ok((BaseModel::from_parts(parts)?, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{base_of, blocks, config};
    use crate::infer::Engine;

    #[test]
    fn the_method_decides_about_the_error_and_nothing_else() {
        let base = base_of(&config(4, 2, 16), WeightFormat::F32);
        let engine = Engine::new(base.clone());
        let squares = engine.input_squares(&blocks(&base.config, 1, 40)).unwrap();
        let made = |method| requantize(&base, WeightFormat::Q4_0, method).unwrap();
        let (plain, plain_error) = made(ModelQuantizeMethod::Ggml);
        let (searched, error) = made(ModelQuantizeMethod::Search);
        let (weighted, weighted_error) = made(ModelQuantizeMethod::SearchFor(&squares));
        assert!(error.relative() < 0.97 * plain_error.relative(), "{error:?}, {plain_error:?}");
        assert!(error.relative() <= weighted_error.relative());
        for model in [&searched, &weighted] {
            assert_eq!(model.config, plain.config);
            assert_eq!(model.token_embedding.format(), WeightFormat::Q8_0);
            assert_eq!(model.layers[0].attn_norm, plain.layers[0].attn_norm);
            let sizes =
                |model: &BaseModel| model.layers[1].projections.each_ref().map(|p| p.as_bytes().len());
            assert_eq!(sizes(model), sizes(&plain));
        }
        assert_ne!(searched.sha256, weighted.sha256);
        assert_ne!(searched.sha256, plain.sha256);
    }

    #[test]
    fn what_is_in_the_format_already_stays_as_it_is() {
        let base = base_of(&config(4, 2, 16), WeightFormat::Q4_1);
        let (again, error) = requantize(&base, WeightFormat::Q4_1, ModelQuantizeMethod::Ggml).unwrap();
        assert_eq!(again.sha256, base.sha256);
        assert!(error.relative() < 1e-7);
        let searched = requantize(&base, WeightFormat::Q4_1, ModelQuantizeMethod::Search).unwrap();
        assert!(searched.1.relative() <= error.relative());
    }

    #[test]
    fn a_format_that_does_not_fit_is_refused_by_the_tensors_name() {
        let base = base_of(&config(4, 2, 16), WeightFormat::F32);
        let error = requantize(&base, WeightFormat::Q4_K, ModelQuantizeMethod::Ggml).unwrap_err().to_string();
        assert!(error.contains("blk.0.attn_q.weight"), "{error}");
    }
}
