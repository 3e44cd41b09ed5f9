//! A made-up fleet for tests: a tiny base model, a plan over it, a release, and who signed them.

use std::sync::{Arc, LazyLock};

use ed25519_dalek::SigningKey;
use fleetune_model::adapter::{Adapter, AdapterLayout};
use fleetune_model::adapter_formats::to_gguf_lora;
use fleetune_model::base::BaseModel;
use fleetune_model::config::ModelConfig;
use fleetune_model::family::Family;
use fleetune_model::full::FullTrainer;
use fleetune_model::gguf::Metadata;
use fleetune_model::tokenizer::{SpecialTokens, train_bpe};
use fleetune_model::trained::{TrainedConfig, TrainedLayout};
use fleetune_model::weights::WeightFormat;
use fleetune_privacy::ClippingNorm;
use fleetune_proto::{
    AdapterPlan, AggregationPlan, AggregationProtocol, Digest, LoraShape, Name, Optimizer, ReleaseManifest,
    TaskPlan, TrainedShape, TrainingPlan, TrustRoot, UnixMillis,
};
use fleetune_secagg::RingBits;

use crate::training::trained_config;

pub(crate) const BLOCK_TOKENS: u32 = 16;

/// The base as a GGUF file.
pub(crate) static BASE: LazyLock<Vec<u8>> = LazyLock::new(|| base_bytes(1));

pub(crate) fn base_bytes(seed: u64) -> Vec<u8> {
    let tokenizer = train_bpe(texts().into_iter(), 270, &SpecialTokens::default()).unwrap();
    let config = ModelConfig {
        name: "tiny".into(),
        family: Family::Llama,
        vocab_size: tokenizer.vocab_size(),
        hidden: 32,
        layers: 2,
        feed_forward: 64,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        context_length: 64,
        rope_base: 10_000.0,
        rms_eps: 1e-5,
    };
    let trainer = FullTrainer::new(config, 1).unwrap();
    let parameters = trainer.initial_parameters(seed);
    trainer.to_base(&parameters, tokenizer, WeightFormat::Q8_0).unwrap().to_gguf_bytes(&Metadata::default())
}

pub(crate) fn base() -> Arc<BaseModel> {
    Arc::new(BaseModel::from_gguf_bytes(BASE.clone()).unwrap())
}

pub(crate) fn texts() -> Vec<String> {
    (0..40).map(|i| format!("the {i} th boat of the fleet sails out and tunes its sails")).collect()
}

pub(crate) fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

pub(crate) fn trust_root() -> TrustRoot {
    TrustRoot::new(&[key(1).verifying_key().to_bytes()], 1).unwrap()
}

pub(crate) fn name(text: &str) -> Name {
    Name::parse("name", text).unwrap()
}

pub(crate) fn layout(base: &BaseModel) -> Arc<AdapterLayout> {
    match TrainedLayout::new(base, &trained_config(&adapter_plan()).unwrap()).unwrap() {
        TrainedLayout::Lora(layout) => layout,
        TrainedLayout::Full(_) => unreachable!("the plan is an adapter's"),
    }
}

/// All weights of that base.
pub(crate) fn full_plan(base: &BaseModel) -> AdapterPlan {
    let layout = TrainedLayout::new(base, &TrainedConfig::Full).unwrap();
    AdapterPlan { shape: TrainedShape::Full, layout_sha256: layout.sha256(), dimension: layout.len() }
}

fn adapter_plan() -> AdapterPlan {
    AdapterPlan {
        shape: TrainedShape::Lora(LoraShape {
            rank: 2,
            alpha: 4.0,
            targets: vec!["q".into(), "v".into()],
            freeze_a: false,
            init_seed: 5,
        }),
        layout_sha256: [0; 32],
        dimension: 1,
    }
}

pub(crate) fn plan() -> TaskPlan {
    let layout = layout(&base());
    TaskPlan {
        population: name("boats"),
        task: name("lora"),
        base_model: Digest::of(&BASE),
        adapter: AdapterPlan { layout_sha256: layout.sha256(), dimension: layout.len(), ..adapter_plan() },
        training: TrainingPlan {
            steps: 4,
            batch_size: 2,
            block_tokens: BLOCK_TOKENS,
            learning_rate: 1e-2,
            learning_rate_final_fraction: 1.0,
            gradient_clip: Some(1.0),
            optimizer: Optimizer::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 },
            examples_min: 2,
        },
        aggregation: AggregationPlan {
            protocol: AggregationProtocol::InsecurePlaintext,
            clipping_norm: ClippingNorm::new(10.0).unwrap(),
            ring_bits: RingBits::new(32).unwrap(),
            summands_max: 16,
            summands_min: 2,
            privacy: None,
            secure: None,
        },
        rounds: 3,
        expires: UnixMillis(u64::MAX),
    }
}

/// The adapter that the first round starts from.
pub(crate) fn checkpoint() -> Vec<u8> {
    Adapter::init(layout(&base())).to_checkpoint_bytes()
}

/// A release's adapter, made for that base.
pub(crate) fn release_adapter(base: &BaseModel) -> Vec<u8> {
    to_gguf_lora(&Adapter::init(layout(base)), base, WeightFormat::F16, &Metadata::default()).unwrap()
}

pub(crate) fn manifest(version: u64, adapter: &[u8]) -> ReleaseManifest {
    ReleaseManifest {
        population: name("boats"),
        version,
        task: name("lora"),
        base_model: Digest::of(&BASE),
        adapter: Some(Digest::of(adapter)),
        rounds: 3,
        created: UnixMillis(version),
        expires: UnixMillis(u64::MAX),
        privacy_statement: "none: a test".into(),
        privacy_statement_json: String::new(),
    }
}
