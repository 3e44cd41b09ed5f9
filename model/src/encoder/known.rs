//! The tiny BERT and MiniLM against figures computed by transformers, peft and torch in f32 (`data/reference/`,
//! made by `tests/peers/encoder.py`). MiniLM is not in the repository: without it its tests say that they were
//! skipped.

use std::collections::BTreeMap;
use std::env;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use super::checkpoint::Classifier;
use super::config::{Activation, Pooling};
use super::fixtures::{tiny_model, tiny_tokenizer};
use super::layout::{ClassifierConfig, ClassifierLayout, Part};
use super::model::{EncoderModel, EncoderParts};
use super::peft::{ClassifierPeft, from_peft};
use super::tokenizer::WordPieceTokenizer;
use super::trainer::{ClassifierTrainer, Example};
use crate::adapter::Factor;
use crate::kernels::bf16::Precision;
use crate::weights::WeightFormat;

const TOLERANCE: f32 = 1e-4;

#[derive(Deserialize)]
struct Known {
    strings: Vec<Tokenized>,
    texts: Vec<String>,
    classes: Vec<usize>,
    ids: Vec<Vec<u32>>,
    hidden: Vec<Vec<Vec<f32>>>,
    hidden_tanh_1: Vec<Vec<f32>>,
    pooled: Vec<Vec<f32>>,
    adapted: BTreeMap<String, Adapted>,
    minilm: Vec<Sentence>,
}

#[derive(Deserialize)]
struct Tokenized {
    text: String,
    tiny: Vec<u32>,
    minilm: Vec<u32>,
}

#[derive(Deserialize)]
struct Adapted {
    logits: Vec<Vec<f32>>,
    loss: f32,
    gradients: BTreeMap<String, Vec<f32>>,
}

#[derive(Deserialize)]
struct Sentence {
    text: String,
    ids: Vec<u32>,
    embedding: Vec<f32>,
}

fn known() -> Known {
    serde_json::from_str(include_str!("../../data/reference/encoder.json")).unwrap()
}

/// The folder named by `FLEETUNE_MINILM` or in the user's cache folder, if it is there.
fn minilm() -> Option<EncoderModel> {
    let cache = || {
        let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cache"));
        env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)
    };
    let named = env::var_os("FLEETUNE_MINILM").map(PathBuf::from);
    let path = named.or_else(|| Some(cache()?.join("fleetune").join("all-MiniLM-L6-v2")))?;
    if !path.exists() {
        eprintln!("skipped: {} is not there (set FLEETUNE_MINILM)", path.display());
        return None;
    }
    Some(EncoderModel::open(&path).unwrap())
}

fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() < TOLERANCE, "{what} {index}: {found}, expected {expected}");
    }
}

/// Peft's adapter with another way of pooling.
fn adapted(model: &Arc<EncoderModel>, pooling: Pooling) -> (ClassifierTrainer, Vec<f32>) {
    let files = ClassifierPeft {
        config: include_bytes!("../../data/reference/tiny_bert_peft/adapter_config.json").to_vec(),
        weights: include_bytes!("../../data/reference/tiny_bert_peft/adapter_model.safetensors").to_vec(),
        own: None,
    };
    let Classifier { layout, values, .. } = from_peft(&files, model).unwrap();
    let config = ClassifierConfig { pooling, ..layout.config().clone() };
    let layout = Arc::new(ClassifierLayout::new(model.config(), &config).unwrap());
    (ClassifierTrainer::new(Arc::clone(model), layout, Precision::F32).unwrap(), values)
}

fn examples(known: &Known) -> Vec<Example> {
    let both = known.ids.iter().zip(&known.classes);
    both.map(|(ids, class)| Example { ids: ids.clone(), class: *class }).collect()
}

fn tokens_agree(tokenizer: &WordPieceTokenizer, expected: impl Fn(&Tokenized) -> &Vec<u32>) {
    let strings = known().strings;
    assert!(strings.len() > 300);
    for string in &strings {
        assert_eq!(&tokenizer.encode(&string.text, 4096), expected(string), "{:?}", string.text);
    }
}

#[test]
fn strings_have_the_ids_of_transformers() {
    tokens_agree(&tiny_tokenizer(), |string| &string.tiny);
    let known = known();
    for (text, ids) in known.texts.iter().zip(&known.ids) {
        assert_eq!(&tiny_tokenizer().encode(text, 64), ids);
    }
}

#[test]
fn hidden_states_and_poolings_are_those_of_transformers() {
    let (known, model) = (known(), tiny_model());
    let ids: Vec<&[u32]> = known.ids.iter().map(Vec::as_slice).collect();
    // All at once, and each by itself.
    assert_close("hidden", &model.hidden_states(&ids).unwrap(), &known.hidden.concat().concat());
    for (index, expected) in known.hidden.iter().enumerate() {
        assert_close("alone", &model.hidden_states(&ids[index..=index]).unwrap(), &expected.concat());
    }
    assert_close("pooled", &model.embed(&ids, Pooling::Pooler).unwrap(), &known.pooled.concat());
    let first: Vec<f32> = known.hidden.iter().flat_map(|rows| rows[0].clone()).collect();
    assert_close("cls", &model.embed(&ids, Pooling::Cls).unwrap(), &first);
    let mut parts: EncoderParts = model.parts().clone();
    parts.config.activation = Activation::GeluTanh;
    let other = EncoderModel::from_parts(parts).unwrap();
    assert_close("tanh", &other.hidden_states(&ids[1..2]).unwrap(), &known.hidden_tanh_1.concat());
}

#[test]
fn logits_losses_and_gradients_are_those_of_torch() {
    let (known, model) = (known(), Arc::new(tiny_model()));
    let examples = examples(&known);
    let (all, ids): (Vec<&Example>, Vec<&[u32]>) = examples.iter().map(|e| (e, e.ids.as_slice())).unzip();
    for (name, expected) in &known.adapted {
        let (trainer, values) = adapted(&model, Pooling::from_name(name).unwrap());
        assert_close(name, &trainer.logits(&values, &ids).unwrap(), &expected.logits.concat());
        let mut gradient = vec![9.0; values.len()];
        let loss = trainer.loss_and_gradient(&values, &all, &mut gradient).unwrap();
        assert_close(name, &[loss, trainer.loss(&values, &all).unwrap()], &[expected.loss; 2]);
        assert_eq!(expected.gradients.len(), trainer.layout().entries().len());
        for entry in trainer.layout().entries() {
            let name = match entry.part {
                Part::Low { layer, projection, factor } => {
                    let factor = if factor == Factor::A { "A" } else { "B" };
                    let module = projection.hugging_face_name();
                    format!("base_model.model.bert.encoder.layer.{layer}.{module}.lora_{factor}.weight")
                }
                Part::HeadWeight => "base_model.model.classifier.weight".to_owned(),
                Part::HeadBias => "base_model.model.classifier.bias".to_owned(),
            };
            assert_close(&name, &gradient[entry.range()], &expected.gradients[&name]);
        }
    }
}

#[test]
fn a_batch_is_as_good_as_its_texts_alone() {
    let (known, model) = (known(), Arc::new(tiny_model()));
    let examples = examples(&known);
    let (trainer, values) = adapted(&model, Pooling::Mean);
    let count = examples.len() as f32;
    let mut expected = vec![0.0; values.len()];
    let mut loss = 0.0;
    for example in &examples {
        let mut gradient = vec![0.0; values.len()];
        loss += trainer.loss_and_gradient(&values, &[example], &mut gradient).unwrap() / count;
        expected.iter_mut().zip(&gradient).for_each(|(sum, g)| *sum += g / count);
    }
    let mut found = vec![0.0; values.len()];
    let together =
        trainer.loss_and_gradient(&values, &examples.iter().collect::<Vec<_>>(), &mut found).unwrap();
    assert!((together - loss).abs() < 1e-5);
    let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "{worst}");
    let ids: Vec<&[u32]> = examples.iter().map(|e| e.ids.as_slice()).collect();
    let probabilities = trainer.predict(&values, &ids).unwrap();
    for row in probabilities.chunks_exact(3) {
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }
}

#[test]
fn quantized_weights_are_used_where_they_lie() {
    let (known, model) = (known(), tiny_model());
    let ids: Vec<&[u32]> = known.ids.iter().map(Vec::as_slice).collect();
    let quantized = model.in_format(WeightFormat::Q8_0).unwrap();
    let expanded = quantized.in_format(WeightFormat::F32).unwrap();
    let found = quantized.hidden_states(&ids).unwrap();
    assert_close("expanded", &found, &expanded.hidden_states(&ids).unwrap());
    let apart =
        found.iter().zip(known.hidden.concat().concat()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!((0.001..0.2).contains(&apart), "{apart}");
}

#[test]
fn bf16_products_come_close() {
    let (known, model) = (known(), Arc::new(tiny_model()));
    let examples = examples(&known);
    let all: Vec<&Example> = examples.iter().collect();
    let (trainer, values) = adapted(&model, Pooling::Mean);
    let layout = Arc::clone(trainer.layout());
    let rough = ClassifierTrainer::new(model, layout, Precision::Bf16).unwrap();
    let (exact, found) = (trainer.loss(&values, &all).unwrap(), rough.loss(&values, &all).unwrap());
    assert!((exact - found).abs() < 0.02, "{exact} {found}");
    assert_eq!(exact != found, Precision::Bf16.kernel().is_some());
}

#[test]
fn minilm_embeds_sentences_as_transformers_does() {
    let Some(model) = minilm() else { return };
    assert_eq!(model.config().pooling, Pooling::Mean);
    let known = known();
    for Sentence { text, ids, embedding } in &known.minilm {
        assert_eq!(&model.tokenizer().encode(text, 256), ids, "{text}");
        assert_close(text, &model.embed(&[ids], Pooling::Mean).unwrap(), embedding);
    }
    let all: Vec<&[u32]> = known.minilm.iter().map(|sentence| sentence.ids.as_slice()).collect();
    let expected: Vec<f32> = known.minilm.iter().flat_map(|sentence| sentence.embedding.clone()).collect();
    assert_close("together", &model.embed(&all, Pooling::Mean).unwrap(), &expected);
    tokens_agree(model.tokenizer(), |string| &string.minilm);
}

#[test]
fn minilm_comes_back_from_gguf() {
    let Some(model) = minilm() else { return };
    let sentence = &known().minilm[0];
    let expected = model.embed(&[&sentence.ids], Pooling::Mean).unwrap();
    let mut bytes = Vec::new();
    model.in_format(WeightFormat::Q8_0).unwrap().write_gguf(&Default::default(), &mut bytes).unwrap();
    let back = EncoderModel::from_gguf_bytes(bytes).unwrap();
    let found = back.embed(&[&sentence.ids], Pooling::Mean).unwrap();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let cosine = dot(&found, &expected) / (dot(&found, &found) * dot(&expected, &expected)).sqrt();
    assert!(cosine > 0.999, "{cosine}");
    assert_eq!(back.tokenizer().encode(&sentence.text, 256), sentence.ids);
}
