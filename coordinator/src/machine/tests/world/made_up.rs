//! What the tests' worlds are made of: setups, specs, devices' identities, updates, and a tiny base model.

use crate::{CoreSetup, PacePolicy, ServerOptimizer, TaskSpec};
use ed25519_dalek::SigningKey;
use fleetune_model::{
    adapter::LoraConfig,
    base::{BaseModel, LayerExtras, LayerWeights, ModelParts},
    config::{ModelConfig, Projection},
    family::Family,
    gguf::Metadata,
    tokenizer::{SpecialTokens, train_bpe},
    trained::TrainedConfig,
    weights::{WeightFormat, WeightMatrix},
};
use fleetune_privacy::{ClippingNorm, NoiseOrigin};
use fleetune_proto::{
    AggregationPlan, AggregationProtocol, Name, Optimizer, SecurePlan, TrainingPlan, TrustRoot, UnixMillis,
    device::{DeviceFloors, DeviceSetup},
    round::RoundPolicy,
};
use fleetune_secagg::{Assumptions, Certificate, Floors, Identity, MaskSuite, Registrars, RingBits};
use std::sync::Arc;

pub(in super::super) fn name(text: &str) -> Name {
    Name::parse("test", text).unwrap()
}

pub(in super::super) fn setup(seed: u8) -> CoreSetup {
    let pace =
        PacePolicy { soon_ms: 200, idle_ms_min: 5_000, idle_ms_max: 10_000, check_ins_per_second_max: 1_000 };
    let signing_key = SigningKey::from_bytes(&[9; 32]);
    let registrars = registrars();
    CoreSetup { population: name("roles"), signing_key, pace, upload_slots: 2, seed: [seed; 32], registrars }
}

pub(in super::super) fn trust_root() -> TrustRoot {
    TrustRoot::new(&[SigningKey::from_bytes(&[9; 32]).verifying_key().to_bytes()], 1).unwrap()
}

pub(in super::super) fn lora() -> LoraConfig {
    LoraConfig {
        rank: 2,
        alpha: 4.0,
        targets: vec![Projection::Q, Projection::V],
        freeze_a: false,
        init_seed: 7,
    }
}

/// The same over every projection, at that rank.
pub(in super::super) fn wide_lora(rank: usize) -> TrainedConfig {
    TrainedConfig::Lora(LoraConfig { rank, targets: Projection::ALL.to_vec(), ..lora() })
}

/// Three rounds of `cohort` devices, all of which are awaited.
pub(in super::super) fn spec(cohort: u32) -> TaskSpec {
    TaskSpec {
        name: name("lora"),
        trained: TrainedConfig::Lora(lora()),
        release_format: WeightFormat::Q8_0,
        training: TrainingPlan {
            steps: 2,
            batch_size: 1,
            block_tokens: 16,
            learning_rate: 1e-3,
            learning_rate_final_fraction: 1.0,
            gradient_clip: Some(1.0),
            optimizer: Optimizer::Sgd { momentum: 0.0 },
            examples_min: 1,
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
        round_policy: RoundPolicy {
            report_goal: cohort,
            selected_max: cohort,
            reports_min: 2,
            selection_ms: 1_000,
            report_ms: 20_000,
            step_ms: 5_000,
        },
        server_optimizer: ServerOptimizer::FedAvg { learning_rate: 1.0 },
        expires: UnixMillis(1_000_000_000),
        release_valid_ms: 1_000_000_000,
        privacy: None,
    }
}

/// The same under secure aggregation, of at least four devices.
pub(in super::super) fn secure_spec(cohort: u32) -> TaskSpec {
    let mut spec = spec(cohort);
    let assumptions = Assumptions::new(100, 200, 40, 20).unwrap();
    let mask_suite = MaskSuite::Aes128Ctr;
    spec.aggregation.protocol = AggregationProtocol::SecaggPlus;
    spec.aggregation.secure = Some(SecurePlan { mask_suite, cohort_max: 100, assumptions });
    spec.aggregation.summands_min = 3;
    spec.round_policy.reports_min = 4;
    spec
}

/// Certifies the devices of a world.
fn registrar() -> SigningKey {
    SigningKey::from_bytes(&[200; 32])
}

fn registrars() -> Registrars {
    Registrars::Keys(vec![registrar().verifying_key()])
}

/// How device `index` is set up.
pub(super) fn device_setup(index: u8) -> DeviceSetup {
    let key = SigningKey::from_bytes(&[100 + index; 32]);
    let public_key = key.verifying_key().to_bytes();
    let certificate = Certificate::issue(&registrar(), "roles", public_key, 10_000_000_000);
    DeviceSetup {
        population: name("roles"),
        trust_root: trust_root(),
        device_class: "test".into(),
        floors: DeviceFloors {
            protocols: vec![AggregationProtocol::InsecurePlaintext, AggregationProtocol::SecaggPlus],
            secure: Floors { cohort_min: 3, ..Floors::default() },
            ..Default::default()
        },
        release_version: 0,
        release_version_max: 0,
        identity: Some(Arc::new(Identity::new(key, certificate).unwrap())),
        registrars: registrars(),
        noise: NoiseOrigin::operating_system(),
    }
}

/// What device `index` learns in a round, far inside the clipping norm.
pub(in super::super) fn made_up_delta(index: usize, round: u32, dimension: usize) -> Vec<f32> {
    let (index, round) = (index as u64, u64::from(round));
    let value = |i: u64| ((i * 31 + index * 17 + round * 7) % 101) as f32 / 10_100.0 - 0.004;
    (0..dimension as u64).map(value).collect()
}

/// A model of two layers with made-up weights, as a GGUF file.
pub(super) fn tiny_base() -> Vec<u8> {
    let tokenizer = train_bpe(std::iter::empty(), 259, &SpecialTokens::default()).unwrap();
    let config = ModelConfig {
        name: "tiny".to_owned(),
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
    let layer = LayerWeights {
        attn_norm: vec![1.0; config.hidden],
        ffn_norm: vec![1.0; config.hidden],
        extras: LayerExtras::default(),
        projections: Projection::ALL.map(|projection| {
            let (rows, cols) = projection.shape(&config);
            matrix(rows, cols)
        }),
    };
    let parts = ModelParts {
        token_embedding: matrix(config.vocab_size, config.hidden),
        layers: vec![layer; config.layers],
        output_norm: vec![1.0; config.hidden],
        output: None,
        chat_template: None,
        tokenizer,
        config,
    };
    BaseModel::from_parts(parts).unwrap().to_gguf_bytes(&Metadata::default())
}

fn matrix(rows: usize, cols: usize) -> WeightMatrix {
    let values: Vec<f32> = (0..rows * cols).map(|i| (i % 17) as f32 / 100.0 - 0.08).collect();
    WeightMatrix::from_f32(&values, rows, cols, WeightFormat::Q8_0).unwrap()
}
