//! The families' files: GGUF and Hugging Face folders both ways, what is refused in them, adapters, tokenizers.

use std::collections::BTreeMap;
use std::fs;

use serde::Deserialize;
use serde_json::{Value, json};

use super::tests::{FAMILIES, adapter, assert_close, base, expected, folder};
use super::*;
use crate::adapter_formats::{from_gguf_lora, to_gguf_lora, to_peft};
use crate::base::{BaseModel, ModelParts};
use crate::config::Projection;
use crate::eval::token_nlls;
use crate::gguf::{Metadata, MetadataArray, MetadataValue};
use crate::rotary;
use crate::safetensors::{TensorBytes, decode, encode};
use crate::tokenizer::{Method, TokenRoles, Tokenizer, Vocabulary};
use crate::weights::{WeightFormat, WeightMatrix};

#[test]
fn what_is_written_is_what_was_read() {
    for family in FAMILIES {
        let (base, ids) = (base(family), expected(family).ids);
        let bytes = base.to_gguf_bytes(&Metadata::default());
        let back = BaseModel::from_gguf_bytes(bytes.clone()).unwrap();
        assert_eq!(back.config, base.config, "{family}");
        assert_eq!(back.to_gguf_bytes(&Metadata::default()), bytes, "{family}");
        for (found, expected) in back.layers.iter().zip(&base.layers) {
            assert_eq!(found.extras, expected.extras, "{family}");
        }
        assert_eq!(
            token_nlls(&back, None, &ids).unwrap(),
            token_nlls(&base, None, &ids).unwrap(),
            "{family}"
        );
    }
}

/// The model's tensors under the names, in the order of rows and with the norms that transformers has.
fn stored(base: &BaseModel) -> Vec<TensorBytes> {
    let config = &base.config;
    let vector = |name: &str, values: &[f32]| TensorBytes::f32(name, &[values.len()], values);
    let norm = |name: &str, values: &[f32]| {
        vector(name, &values.iter().map(|value| value - config.family.norm_offset()).collect::<Vec<_>>())
    };
    let matrix = |name: &str, matrix: &WeightMatrix, heads: Option<usize>| {
        let values = matrix.to_f32();
        let reordered = heads.map(|heads| rotary::to_hugging_face(&values, matrix.rows(), heads));
        TensorBytes::f32(name, &[matrix.rows(), matrix.cols()], &reordered.unwrap_or(values))
    };
    let mut tensors = vec![
        matrix("model.embed_tokens.weight", &base.token_embedding, None),
        norm("model.norm.weight", &base.output_norm),
    ];
    tensors.extend(base.output.iter().map(|output| matrix("lm_head.weight", output, None)));
    let ffn_norm = match config.family {
        Family::Gemma3(_) => "pre_feedforward_layernorm.weight",
        Family::Llama | Family::Qwen2 | Family::Qwen3 => "post_attention_layernorm.weight",
    };
    for (index, layer) in base.layers.iter().enumerate() {
        let at = |name: &str| format!("model.layers.{index}.{name}");
        tensors.push(norm(&at("input_layernorm.weight"), &layer.attn_norm));
        tensors.push(norm(&at(ffn_norm), &layer.ffn_norm));
        for extra in Extra::ALL {
            let Some(values) = layer.extras.get(extra) else { continue };
            let name = at(extra.hugging_face_name());
            tensors.push(if extra.is_norm() { norm(&name, values) } else { vector(&name, values) });
        }
        tensors.extend(Projection::ALL.map(|p| {
            let name = at(&format!("{}.weight", p.hugging_face_name()));
            matrix(&name, layer.projection(p), p.reordered_heads(config))
        }));
    }
    tensors
}

fn read_json(family: &str, name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder(family).join(name)).unwrap()).unwrap()
}

/// A folder as transformers would write the family's model; its settings changed by `spoil`.
fn hugging_face(family: &str, tensors: &[TensorBytes], spoil: impl Fn(&mut Value)) -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    let mut settings = read_json(family, "config.json");
    spoil(&mut settings);
    fs::write(home.path().join("config.json"), settings.to_string()).unwrap();
    fs::copy(folder(family).join("tokenizer.json"), home.path().join("tokenizer.json")).unwrap();
    fs::write(home.path().join("model.safetensors"), encode(&[("format", "pt")], tensors)).unwrap();
    home
}

#[test]
fn a_hugging_face_folder_is_the_same_model() {
    for family in FAMILIES {
        let (base, expected) = (base(family), expected(family));
        let tensors = stored(&base);
        let bytes = encode(&[], &tensors);
        let file = decode(&bytes).unwrap();
        let shape = |name: &str| (name.to_owned(), file.f32(name).unwrap().0);
        let names: BTreeMap<String, Vec<usize>> = file.names().into_iter().map(shape).collect();
        assert_eq!(names, expected.tensors, "{family}: transformers' names and shapes");
        let home = hugging_face(family, &tensors, |_| ());
        let found = BaseModel::open(home.path()).unwrap();
        let config = ModelConfig { name: found.config.name.clone(), ..base.config.clone() };
        assert_eq!(found.config, config, "{family}");
        assert_close(family, &token_nlls(&found, None, &expected.ids).unwrap(), &expected.nll, 1e-4);
        let text = "The fleet sails out: 1984 boats\n\n don't tune <|im_end|> </s>";
        assert_eq!(found.tokenizer.encode(text, false), base.tokenizer.encode(text, false), "{family}");
    }
}

#[test]
fn settings_that_change_the_computation_are_refused() {
    let check = |family: &str, key: &str, value: Value, expected: &str| {
        let change = |settings: &mut Value| settings[key] = value.clone();
        let home = hugging_face(family, &stored(&base(family)), change);
        let error = BaseModel::open(home.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{family}, {key}: {error}");
    };
    check("qwen2", "use_sliding_window", json!(true), "use_sliding_window = true");
    check("qwen2", "layer_types", json!(["full_attention", "sliding_attention"]), "layer_types");
    check("qwen2", "rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), "rope_scaling");
    check("qwen3", "attention_bias", json!(true), "bias");
    check("qwen3", "num_experts", json!(8), "num_experts = 8");
    check("qwen3", "hidden_act", json!("gelu"), "hidden_act = gelu");
    check("qwen3", "rope_parameters", json!({"rope_type": "linear", "factor": 2.0}), "rope_type = linear");
    check("gemma3", "hidden_activation", json!("gelu"), "hidden_activation = gelu");
    check("gemma3", "final_logit_softcapping", json!(30.0), "final_logit_softcapping = 30.0");
    check("gemma3", "attn_logit_softcapping", json!(50.0), "attn_logit_softcapping");
    check("gemma3", "use_bidirectional_attention", json!(true), "use_bidirectional_attention");
    let late = json!(["full_attention", "sliding_attention", "full_attention"]);
    check("gemma3", "layer_types", late, "layer_types");
    check("gemma3", "layer_types", json!(["sliding_attention"]), "layer_types");
    check("gemma3", "sliding_window", Value::Null, "sliding_window");
    check("gemma3", "sliding_window", json!(0), "window: 0");
    check("gemma3", "query_pre_attn_scalar", json!(-1.0), "attention_scale");
    let global = |settings: Value| json!({"full_attention": settings});
    check("gemma3", "rope_parameters", global(json!({"rope_type": "yarn", "factor": 2.0})), "= yarn");
    check("gemma3", "rope_parameters", global(json!({"beta_fast": 1.0})), "beta_fast");
    let local = json!({"sliding_attention": {"rope_type": "linear", "factor": 2.0}});
    check("gemma3", "rope_parameters", local, "only default is supported");
    check("gemma3", "model_type", json!("gemma2"), "unknown architecture \"gemma2\"");
    check("gemma3", "num_hidden_layers", json!(2), "layer_types");
}

/// transformers 4 names bases, the factor and the pattern of layers elsewhere.
#[test]
fn gemma_in_the_form_of_transformers_4_is_the_same_model() {
    let base = base("gemma3");
    let home = hugging_face("gemma3", &stored(&base), |settings| {
        for key in ["rope_parameters", "layer_types", "_sliding_window_pattern", "tie_word_embeddings"] {
            settings.as_object_mut().unwrap().remove(key);
        }
        settings["rope_theta"] = json!(1e6);
        settings["rope_local_base_freq"] = json!(10_000.0);
        settings["rope_scaling"] = json!({"rope_type": "linear", "factor": 8.0});
        settings["sliding_window_pattern"] = json!(3);
    });
    let found = BaseModel::open(home.path()).unwrap().config;
    assert_eq!((found.family, found.rope_base), (base.config.family, base.config.rope_base));
}

/// The family's file with metadata changed.
fn with_key(family: &str, key: &str, value: MetadataValue) -> Result<BaseModel, ModelError> {
    let mut extra = Metadata::default();
    extra.set(key, value);
    BaseModel::from_gguf_bytes(base(family).to_gguf_bytes(&extra))
}

#[test]
fn keys_that_change_the_computation_are_refused() {
    let check = |key: &str, value: MetadataValue, expected: &str| {
        let error = with_key(key.split_once('.').unwrap().0, key, value).unwrap_err().to_string();
        assert!(error.contains(expected), "{key}: {error}");
    };
    check("llama.rope.scaling.factor", 4f32.into(), "llama.rope.scaling.factor = 4");
    check("llama.attn_logit_softcapping", 50f32.into(), "llama.attn_logit_softcapping = 50");
    check("qwen2.rope.scaling.type", "yarn".into(), "qwen2.rope.scaling.type = yarn");
    check("qwen2.attention.sliding_window", 32u32.into(), "qwen2.attention.sliding_window = 32");
    check("qwen2.expert_count", 60u32.into(), "qwen2.expert_count = 60");
    check("qwen3.attention.causal", false.into(), "qwen3.attention.causal = false");
    check("qwen3.rope.some_new_way", 1u32.into(), "qwen3.rope.some_new_way = 1: the key is not known");
    check("qwen3.attention.key_length", 16u32.into(), "qwen3.attention.value_length = 24");
    check("gemma3.final_logit_softcapping", 30f32.into(), "gemma3.final_logit_softcapping = 30");
    check("gemma3.rope.scaling.type", "yarn".into(), "gemma3.rope.scaling.type = yarn");
    check("gemma3.rope.scaling.type", "none".into(), "gemma3.rope.scaling.factor = 8");
    check("gemma3.rope.scaling.factor", (-8f32).into(), "rope_factor: -8");
    check("gemma3.rope.freq_base_swa", f32::NAN.into(), "local_rope_base: NaN");
    check("gemma3.attention.sliding_window", 0u32.into(), "window: 0");
    check("gemma3.attention.sliding_window_pattern", 0u32.into(), "period: 0");
    let list = MetadataValue::Array(MetadataArray::Bool(vec![true; 3]));
    check("gemma3.attention.sliding_window_pattern", list, "expected unsigned");
    check("gemma3.attention.scale", (-1f32).into(), "attention_scale: -1");
}

#[test]
fn another_scale_is_written_and_read() {
    let read = with_key("gemma3", "gemma3.attention.scale", 0.125f32.into()).unwrap();
    assert_eq!(read.config.layer(0).scale, 0.125);
    let again = BaseModel::from_gguf_bytes(read.to_gguf_bytes(&Metadata::default())).unwrap();
    assert_eq!(again.config, read.config);
}

#[test]
fn vectors_that_do_not_fit_are_refused() {
    let check = |family: &str, extra: Extra, change: fn(&mut Vec<f32>), expected: &str| {
        let mut spoilt = base(family);
        change(&mut spoilt.layers[1].extras.0[extra as usize]);
        let bytes = spoilt.to_gguf_bytes(&Metadata::default());
        let error = BaseModel::from_gguf_bytes(bytes).unwrap_err().to_string();
        assert!(
            error.contains(expected) && error.contains(extra.gguf_name()),
            "{family}, {extra:?}: {error}"
        );
        let parts = ModelParts {
            config: spoilt.config,
            tokenizer: spoilt.tokenizer,
            token_embedding: spoilt.token_embedding,
            layers: spoilt.layers,
            output_norm: spoilt.output_norm,
            output: spoilt.output,
            chat_template: None,
        };
        assert!(BaseModel::from_parts(parts).is_err(), "{family}, {extra:?}");
    };
    for extra in Extra::ALL {
        let owner = FAMILIES.into_iter().find(|family| extra.len(&base(family).config).is_some()).unwrap();
        check(owner, extra, |values| _ = values.pop(), "wrong shape");
        check(owner, extra, |values| values[3] = f32::NAN, "value 3 is not finite");
        check(owner, extra, Vec::clear, "missing tensor");
        check("llama", extra, |values| *values = vec![0.0; 8], "unexpected tensor");
    }
}

/// B of a Llama's q is reordered for GGUF, that of the others is not; both formats lead back.
#[test]
fn adapters_have_the_rows_of_their_family() {
    for family in FAMILIES {
        let (base, own) = (base(family), adapter(family));
        let bytes = fs::read(folder(family).join("adapter_model.safetensors")).unwrap();
        let theirs = decode(&bytes).unwrap();
        let (_, rows) = theirs.f32("base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight").unwrap();
        assert_eq!(own.factor_b(1, Projection::K) == rows, family != "llama", "{family}");
        let files = to_peft(&own, &base.config, family);
        let ours = decode(&files.weights).unwrap();
        assert_eq!(ours.names().len(), theirs.names().len(), "{family}");
        for name in theirs.names() {
            assert_eq!(ours.f32(name).unwrap(), theirs.f32(name).unwrap(), "{family}, {name}");
        }
        let bytes = to_gguf_lora(&own, &base, WeightFormat::F32, &Metadata::default()).unwrap();
        assert_eq!(from_gguf_lora(&bytes, &base).unwrap().values, own.values, "{family}");
        let other = if family == "llama" { "qwen2" } else { "llama" };
        let error = from_gguf_lora(&bytes, &self::base(other)).unwrap_err().to_string();
        assert!(error.contains("general.architecture"), "{error}");
    }
}

/// Ids of one sample text: llama.cpp's with control tokens recognized, and what differs from them.
#[derive(Deserialize)]
struct Sample {
    text: String,
    ids: Vec<u32>,
    /// llama.cpp's, control tokens spelt out.
    ordinary: Option<Vec<u32>>,
    /// transformers'.
    hf: Option<Vec<u32>>,
    /// SentencePiece's own.
    spm: Option<Vec<u32>>,
}

fn check_samples(what: &str, tokenizer: &Tokenizer, samples: &[Sample]) {
    let is_pieces = matches!(tokenizer.vocabulary().method, Method::SentencePiece { .. });
    for Sample { text, ids, ordinary, hf, spm } in samples {
        assert_eq!(&tokenizer.encode(text, false), hf.as_ref().unwrap_or(ids), "{what}: {text:?}");
        let spelt = tokenizer.encode_ordinary(text);
        if is_pieces {
            assert_eq!(&spelt, spm.as_ref().unwrap_or(ids), "{what}, SentencePiece: {text:?}");
        }
        if hf.is_none() {
            assert_eq!(&spelt, ordinary.as_ref().unwrap_or(ids), "{what}: {text:?}");
            let written = if is_pieces { text.replace('\u{2581}', " ") } else { text.clone() };
            assert_eq!(tokenizer.decode(&spelt), written, "{what}");
        }
    }
}

#[test]
fn texts_have_the_ids_that_llama_cpp_and_transformers_give() {
    for family in ["llama", "qwen2", "gemma3"] {
        let samples: Vec<Sample> = serde_json::from_value(read_json(family, "tokens.json")).unwrap();
        assert_eq!(samples.len(), 277);
        let base = base(family);
        check_samples(&format!("{family} from GGUF"), &base.tokenizer, &samples);
        let home = hugging_face(family, &stored(&base), |_| ());
        let read = BaseModel::open(home.path()).unwrap();
        check_samples(&format!("{family} from tokenizer.json"), &read.tokenizer, &samples);
    }
}

#[test]
fn sentence_piece_vocabularies_that_do_not_agree_are_refused() {
    fn scores(vocabulary: &mut Vocabulary) -> &mut Vec<f32> {
        let Method::SentencePiece { scores, .. } = &mut vocabulary.method else { panic!("it has scores") };
        scores
    }
    let check = |expected: &str, spoil: fn(&mut Vocabulary)| {
        let mut vocabulary = base("gemma3").tokenizer.vocabulary().clone();
        spoil(&mut vocabulary);
        let error = Tokenizer::new(vocabulary).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check("scores", |vocabulary| _ = scores(vocabulary).pop());
    check("the score of token 5 is not finite", |vocabulary| scores(vocabulary)[5] = f32::NAN);
    check("no token <0x41>", |vocabulary| {
        let at = vocabulary.tokens.iter().position(|token| token == "<0x41>").unwrap();
        vocabulary.tokens[at] = "<0x__>".to_owned();
    });
    let refused = |key: &str, value: MetadataValue| with_key("gemma3", key, value).unwrap_err().to_string();
    assert!(refused("tokenizer.ggml.pre", "smollm".into()).contains("knows only default"));
    assert!(refused("tokenizer.ggml.remove_extra_whitespaces", true.into()).contains("not normalized"));
    assert!(refused("tokenizer.ggml.scores", 1f32.into()).contains("expected array of f32"));
}

#[test]
fn tokenizer_files_of_other_kinds_are_refused() {
    const FORMS: &str = "normalizer and pre_tokenizer";
    let check = |family: &str, pointer: &str, value: Value, expected: &str| {
        let mut file = read_json(family, "tokenizer.json");
        *file.pointer_mut(pointer).unwrap() = value;
        let bytes = file.to_string();
        let error = Tokenizer::from_json(bytes.as_bytes(), &TokenRoles::default()).unwrap_err().to_string();
        assert!(error.contains(expected), "{family}{pointer}: {error}");
    };
    check("qwen2", "/normalizer", Value::Null, FORMS);
    check("qwen2", "/pre_tokenizer/pretokenizers/0/pattern/Regex", json!("\\p{N}{1,3}"), FORMS);
    check("qwen2", "/model/byte_fallback", json!(true), "byte_fallback");
    check("gemma3", "/normalizer/content", json!("_"), FORMS);
    check("gemma3", "/model/byte_fallback", json!(false), "byte_fallback");
    check("gemma3", "/pre_tokenizer", json!({"type": "Metaspace"}), FORMS);
    check("gemma3", "/model/merges", json!([]), "ways to make");
    check("llama", "/normalizer/normalizers/0/prepend", json!("x"), FORMS);
}

/// A vocabulary smaller than the embedding, as Qwen's is, is filled with tokens that no text has.
#[test]
fn rows_of_the_embedding_without_a_token_are_filled() {
    for family in ["qwen2", "gemma3"] {
        let mut base = base(family);
        let (count, width) = (base.config.vocab_size, base.config.hidden);
        let mut values = base.token_embedding.to_f32();
        values.resize((count + 6) * width, 0.25);
        base.token_embedding = WeightMatrix::from_f32(&values, count + 6, width, WeightFormat::F32).unwrap();
        let wider = |settings: &mut Value| settings["vocab_size"] = json!(count + 6);
        let home = hugging_face(family, &stored(&base), wider);
        let read = BaseModel::open(home.path()).unwrap();
        assert_eq!(read.tokenizer.vocab_size(), count + 6);
        assert_eq!(read.tokenizer.decode(&[count as u32 + 2]), "");
        assert_eq!(read.tokenizer.encode("the [PAD", false), base.tokenizer.encode("the [PAD", false));
        let written = BaseModel::from_gguf_bytes(read.to_gguf_bytes(&Metadata::default())).unwrap();
        assert_eq!(written.tokenizer.vocabulary(), read.tokenizer.vocabulary());
    }
}
