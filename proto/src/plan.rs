//! A task's plan as typed values: everything a device does for a task, checked once.

mod adapter;
mod privacy;

use crate::{
    digest::Digest,
    error::{self, WireError, required, within},
    limits::*,
    name::Name,
    time::UnixMillis,
    wire::{self, AggregationProtocol},
};
use fleetune_privacy::{ClippingNorm, FixedPoint, PrivacyParameters, PrivacyPlan};
use fleetune_secagg::{Assumptions, MEMBERS_MAX, MaskSuite, RingBits};
use prost::Message;

/// Everything a device does for a task, the same for every device and round.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskPlan {
    /// Population the plan is for.
    pub population: Name,
    /// The task.
    pub task: Name,
    /// Base model that the adapter sits on, or that training all weights starts from.
    pub base_model: Digest,
    /// What is trained.
    pub adapter: AdapterPlan,
    /// Local training.
    pub training: TrainingPlan,
    /// From the update to the aggregate.
    pub aggregation: AggregationPlan,
    /// Rounds the task runs.
    pub rounds: u32,
    /// The plan is void after this time.
    pub expires: UnixMillis,
}

/// What is trained, and the flat vector of it.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterPlan {
    /// The kind.
    pub shape: TrainedShape,
    /// SHA-256 of the flat layout.
    pub layout_sha256: [u8; 32],
    /// Values in the flat vector.
    pub dimension: usize,
}

/// An adapter or all weights.
#[derive(Debug, Clone, PartialEq)]
pub enum TrainedShape {
    /// A LoRA adapter; the base stays as it is.
    Lora(LoraShape),
    /// Every weight of a small model; the base says where they start.
    Full,
}

/// Shape of a LoRA adapter (Hu et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct LoraShape {
    /// Rank of both factors.
    pub rank: u32,
    /// Scale numerator: the adapter adds `alpha / rank * B A`.
    pub alpha: f32,
    /// Adapted projections: of q, k, v, o, gate, up, down; none twice.
    pub targets: Vec<String>,
    /// FFA-LoRA: A stays at its seeded start.
    pub freeze_a: bool,
    /// Seed of the initial A.
    pub init_seed: u64,
}

/// Local training of one round.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingPlan {
    /// Optimizer steps.
    pub steps: u32,
    /// Sequences a step.
    pub batch_size: u32,
    /// Predicted tokens a sequence.
    pub block_tokens: u32,
    /// Learning rate of the first round.
    pub learning_rate: f32,
    /// The last round's learning rate over the first's; 1 keeps it constant.
    pub learning_rate_final_fraction: f32,
    /// Bound on the gradient's L2 norm a step.
    pub gradient_clip: Option<f32>,
    /// The optimizer, fresh every round.
    pub optimizer: Optimizer,
    /// Fewest local training examples.
    pub examples_min: u32,
}

/// A local optimizer and its constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Optimizer {
    /// Loshchilov and Hutter 2019.
    AdamW {
        /// Decay of the first moment.
        beta1: f32,
        /// Decay of the second moment.
        beta2: f32,
        /// Added to the denominator.
        epsilon: f32,
        /// Decoupled weight decay.
        weight_decay: f32,
    },
    /// Plain or momentum.
    Sgd {
        /// Momentum; zero for none.
        momentum: f32,
    },
}

/// How updates become one sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AggregationPlan {
    /// Protocol that carries the update.
    pub protocol: AggregationProtocol,
    /// L2 bound of an update.
    pub clipping_norm: ClippingNorm,
    /// Width of the ring.
    pub ring_bits: RingBits,
    /// Most contributions in a sum.
    pub summands_max: u32,
    /// Fewest contributions in any sum that the coordinator uses.
    pub summands_min: u32,
    /// Of the `SecaggPlus` protocol; absent under `InsecurePlaintext`.
    pub secure: Option<SecurePlan>,
    /// Differential privacy; only under the `SecaggPlus` protocol.
    pub privacy: Option<PrivacyParameters>,
}

/// What degree, threshold and masks of secure aggregation follow from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SecurePlan {
    /// Cipher that expands masks.
    pub mask_suite: MaskSuite,
    /// Most devices of a cohort; larger rounds are split.
    pub cohort_max: u32,
    /// What is assumed of the devices.
    pub assumptions: Assumptions,
}

impl TrainingPlan {
    /// The learning rate of a round (from 0) of `rounds`: half a cosine from the first to the last
    /// (Loshchilov and Hutter 2017, "SGDR", equation 5, without restarts). A round's local steps
    /// share one rate; lowering it over the rounds takes the drift of the clients back at the end.
    pub fn learning_rate_at(&self, round: u32, rounds: u32) -> f32 {
        let done = f64::from(round) / f64::from(rounds.saturating_sub(1).max(1));
        let last = f64::from(self.learning_rate_final_fraction);
        let factor = last + (1.0 - last) * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
        #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
        let rate = (f64::from(self.learning_rate) * factor) as f32;
        rate
    }
}

impl AggregationPlan {
    /// What a statement about those who took part rests on, in one word: equal words, equal statements.
    #[must_use]
    pub fn protection(&self) -> String {
        let protocol = self.protocol.as_str_name();
        match &self.privacy {
            None => protocol.to_owned(),
            Some(privacy) => {
                let mut bytes = privacy::to_wire(privacy).encode_to_vec();
                bytes.extend(self.summands_min.to_le_bytes());
                format!("{protocol} {}", Digest::of(&bytes).hex())
            }
        }
    }

    /// The integer grid of the updates; [`TaskPlan::parse`] has checked that it exists.
    pub fn fixed_point(&self) -> FixedPoint {
        FixedPoint::new(self.clipping_norm, self.ring_bits.bits(), self.summands_max)
            .expect("checked when the plan was parsed")
    }
}

/// Names the public rotation of a round's updates.
#[must_use]
pub fn rotation_context(plan_sha256: &[u8; 32], round: u32) -> Vec<u8> {
    [plan_sha256.as_slice(), &round.to_le_bytes()].concat()
}

impl TaskPlan {
    /// Differential privacy and all that follows from it; none without it.
    #[must_use]
    pub fn privacy_plan(&self) -> Option<PrivacyPlan> {
        let parameters = self.aggregation.privacy?;
        Some(PrivacyPlan::new(parameters, self.adapter.dimension).expect("checked when the plan was parsed"))
    }

    /// Values of a contribution: those that are trained, or those of its rotated and padded form.
    #[must_use]
    pub fn vector_len(&self) -> usize {
        self.privacy_plan().map_or(self.adapter.dimension, |plan| plan.vector_len())
    }

    /// Parses bytes whose signature has been verified.
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let wire: wire::TaskPlan = error::decode("TaskPlan", bytes)?;
        let plan = Self {
            population: Name::parse("plan.population", &wire.population)?,
            task: Name::parse("plan.task", &wire.task)?,
            base_model: Digest::parse("plan.base_model", wire.base_model)?,
            adapter: adapter::parse(required("plan.adapter", wire.adapter)?)?,
            training: parse_training(&required("plan.training", wire.training)?)?,
            aggregation: parse_aggregation(&required("plan.aggregation", wire.aggregation)?)?,
            rounds: within("plan.rounds", wire.rounds, 1..=ROUNDS_MAX)?,
            expires: UnixMillis(wire.expires_unix_ms),
        };
        privacy::check(&plan)?;
        Ok(plan)
    }

    /// The bytes to sign.
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::TaskPlan {
            population: self.population.as_str().into(),
            task: self.task.as_str().into(),
            base_model: Some(self.base_model.to_wire()),
            adapter: Some(adapter::to_wire(&self.adapter)),
            training: Some(self.training.to_wire()),
            aggregation: Some(self.aggregation.to_wire()),
            rounds: self.rounds,
            expires_unix_ms: self.expires.0,
        }
        .encode_to_vec()
    }
}

impl TrainingPlan {
    fn to_wire(&self) -> wire::TrainingPlan {
        use wire::training_plan::Optimizer as W;
        let optimizer = match self.optimizer {
            Optimizer::AdamW { beta1, beta2, epsilon, weight_decay } => {
                W::Adamw(wire::AdamW { beta1, beta2, epsilon, weight_decay })
            }
            Optimizer::Sgd { momentum } => W::Sgd(wire::Sgd { momentum }),
        };
        wire::TrainingPlan {
            steps: self.steps,
            batch_size: self.batch_size,
            block_tokens: self.block_tokens,
            learning_rate: self.learning_rate,
            learning_rate_final_fraction: self.learning_rate_final_fraction,
            gradient_clip: self.gradient_clip.unwrap_or(0.0),
            optimizer: Some(optimizer),
            examples_min: self.examples_min,
        }
    }
}

impl AggregationPlan {
    fn to_wire(self) -> wire::AggregationPlan {
        wire::AggregationPlan {
            protocol: self.protocol.into(),
            clipping_norm: self.clipping_norm.value(),
            ring_bits: self.ring_bits.bits(),
            summands_max: self.summands_max,
            summands_min: self.summands_min,
            secure: self.secure.map(SecurePlan::to_wire),
            privacy: self.privacy.map(|privacy| privacy::to_wire(&privacy)),
        }
    }
}

impl SecurePlan {
    fn to_wire(self) -> wire::SecureAggregationPlan {
        let suite = match self.mask_suite {
            MaskSuite::Aes128Ctr => wire::MaskSuite::Aes128Ctr,
            MaskSuite::ChaCha20 => wire::MaskSuite::Chacha20,
        };
        wire::SecureAggregationPlan {
            mask_suite: suite.into(),
            cohort_max: self.cohort_max,
            corrupted_permille: self.assumptions.corrupted_permille,
            dropout_permille: self.assumptions.dropout_permille,
            sigma: self.assumptions.sigma,
            eta: self.assumptions.eta,
        }
    }
}

fn parse_training(wire: &wire::TrainingPlan) -> Result<TrainingPlan, WireError> {
    let clip = finite("plan.training.gradient_clip", wire.gradient_clip, 0.0, 1e6)?;
    Ok(TrainingPlan {
        steps: within("plan.training.steps", wire.steps, 1..=STEPS_MAX)?,
        batch_size: within("plan.training.batch_size", wire.batch_size, 1..=BATCH_SIZE_MAX)?,
        block_tokens: within("plan.training.block_tokens", wire.block_tokens, 1..=BLOCK_TOKENS_MAX)?,
        learning_rate: finite("plan.training.learning_rate", wire.learning_rate, 1e-12, 1e3)?,
        learning_rate_final_fraction: finite(
            "plan.training.learning_rate_final_fraction",
            wire.learning_rate_final_fraction,
            1e-6,
            1.0,
        )?,
        gradient_clip: (clip > 0.0).then_some(clip),
        optimizer: parse_optimizer(required("plan.training.optimizer", wire.optimizer)?)?,
        examples_min: wire.examples_min,
    })
}

fn parse_optimizer(wire: wire::training_plan::Optimizer) -> Result<Optimizer, WireError> {
    use wire::training_plan::Optimizer as W;
    match wire {
        W::Adamw(w) => Ok(Optimizer::AdamW {
            beta1: finite("plan.training.adamw.beta1", w.beta1, 0.0, 0.999_999)?,
            beta2: finite("plan.training.adamw.beta2", w.beta2, 0.0, 0.999_999)?,
            epsilon: finite("plan.training.adamw.epsilon", w.epsilon, 1e-20, 1.0)?,
            weight_decay: finite("plan.training.adamw.weight_decay", w.weight_decay, 0.0, 100.0)?,
        }),
        W::Sgd(w) => {
            Ok(Optimizer::Sgd { momentum: finite("plan.training.sgd.momentum", w.momentum, 0.0, 0.999_999)? })
        }
    }
}

fn parse_aggregation(wire: &wire::AggregationPlan) -> Result<AggregationPlan, WireError> {
    let invalid = |field, error: &dyn std::fmt::Display| WireError::invalid(field, error.to_string());
    let summands_max = within("plan.aggregation.summands_max", wire.summands_max, 1..=COHORT_MAX)?;
    let protocol = parse_protocol("plan.aggregation.protocol", wire.protocol)?;
    let plan = AggregationPlan {
        protocol,
        clipping_norm: ClippingNorm::new(wire.clipping_norm)
            .map_err(|e| invalid("plan.aggregation.clipping_norm", &e))?,
        ring_bits: RingBits::new(wire.ring_bits).map_err(|e| invalid("plan.aggregation.ring_bits", &e))?,
        summands_max,
        summands_min: within("plan.aggregation.summands_min", wire.summands_min, 1..=summands_max)?,
        secure: match protocol {
            AggregationProtocol::SecaggPlus => {
                Some(parse_secure(&required("plan.aggregation.secure", wire.secure)?)?)
            }
            AggregationProtocol::InsecurePlaintext | AggregationProtocol::Unspecified => None,
        },
        privacy: wire.privacy.map(|privacy| privacy::parse(&privacy, wire.summands_min)).transpose()?,
    };
    if plan.privacy.is_some() {
        return Ok(plan);
    }
    FixedPoint::new(plan.clipping_norm, plan.ring_bits.bits(), summands_max)
        .map_err(|e| invalid("plan.aggregation.ring_bits", &e))?;
    Ok(plan)
}

fn parse_secure(wire: &wire::SecureAggregationPlan) -> Result<SecurePlan, WireError> {
    let mask_suite = match wire::MaskSuite::try_from(wire.mask_suite) {
        Ok(wire::MaskSuite::Aes128Ctr) => MaskSuite::Aes128Ctr,
        Ok(wire::MaskSuite::Chacha20) => MaskSuite::ChaCha20,
        Ok(wire::MaskSuite::Unspecified) | Err(_) => {
            let problem = format!("unknown suite {}", wire.mask_suite);
            return Err(WireError::invalid("plan.aggregation.secure.mask_suite", problem));
        }
    };
    let members_max = u32::try_from(MEMBERS_MAX).unwrap_or(u32::MAX);
    let assumptions = Assumptions::new(wire.corrupted_permille, wire.dropout_permille, wire.sigma, wire.eta)
        .map_err(|e| WireError::invalid("plan.aggregation.secure", e.to_string()))?;
    let cohort_max = within("plan.aggregation.secure.cohort_max", wire.cohort_max, 2..=members_max)?;
    Ok(SecurePlan { mask_suite, cohort_max, assumptions })
}

pub(crate) fn parse_protocol(field: &'static str, value: i32) -> Result<AggregationProtocol, WireError> {
    match AggregationProtocol::try_from(value) {
        Ok(protocol @ (AggregationProtocol::InsecurePlaintext | AggregationProtocol::SecaggPlus)) => {
            Ok(protocol)
        }
        Ok(AggregationProtocol::Unspecified) | Err(_) => {
            Err(WireError::invalid(field, format!("unknown aggregation protocol {value}")))
        }
    }
}

fn finite(field: &'static str, value: f32, min: f32, max: f32) -> Result<f32, WireError> {
    if value.is_finite() {
        within(field, value, min..=max)
    } else {
        Err(WireError::invalid(field, value.to_string()))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn plan() -> TaskPlan {
        TaskPlan {
            population: Name::parse("p", "roles").unwrap(),
            task: Name::parse("t", "lora").unwrap(),
            base_model: Digest::of(b"base"),
            adapter: AdapterPlan {
                shape: TrainedShape::Lora(LoraShape {
                    rank: 8,
                    alpha: 16.0,
                    targets: vec!["q".into(), "v".into()],
                    freeze_a: false,
                    init_seed: 7,
                }),
                layout_sha256: [3; 32],
                dimension: 4,
            },
            training: TrainingPlan {
                steps: 4,
                batch_size: 2,
                block_tokens: 64,
                learning_rate: 1e-3,
                learning_rate_final_fraction: 0.5,
                gradient_clip: Some(1.0),
                optimizer: Optimizer::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 },
                examples_min: 1,
            },
            aggregation: AggregationPlan {
                protocol: AggregationProtocol::InsecurePlaintext,
                clipping_norm: ClippingNorm::new(10.0).unwrap(),
                ring_bits: RingBits::new(32).unwrap(),
                summands_max: 16,
                summands_min: 2,
                secure: None,
                privacy: None,
            },
            rounds: 3,
            expires: UnixMillis(1_000_000),
        }
    }

    /// The same plan under secure aggregation.
    pub(crate) fn secure_plan() -> TaskPlan {
        let assumptions = Assumptions::new(100, 200, 40, 20).unwrap();
        let secure = SecurePlan { mask_suite: MaskSuite::Aes128Ctr, cohort_max: 100, assumptions };
        let mut plan = plan();
        plan.aggregation.protocol = AggregationProtocol::SecaggPlus;
        plan.aggregation.secure = Some(secure);
        plan
    }

    /// The same plan with differential privacy and adaptive clipping.
    pub(crate) fn private_plan() -> TaskPlan {
        use fleetune_privacy::{ClipAdaptation, Delta, GridVariance, Mechanism};
        let norm = |value| ClippingNorm::new(value).unwrap();
        let variance = |value| GridVariance::at_least(value).unwrap();
        let mut plan = secure_plan();
        plan.aggregation.summands_min = 14;
        plan.aggregation.privacy = Some(PrivacyParameters {
            mechanism: Mechanism::Skellam,
            clip_units: 64,
            variance: variance(4000.0),
            honest_survivors_min: 4,
            colluders_max: 10,
            participations_max: 3,
            separation_ms: 1000,
            separation_rounds: 0,
            delta: Delta::new(1e-6).unwrap(),
            adaptation: Some(
                ClipAdaptation::new(0.5, 0.2, (norm(0.1), norm(10.0)), variance(40_000.0)).unwrap(),
            ),
            noise_cohort: None,
        });
        plan
    }

    #[test]
    fn a_private_plan_is_refused_where_it_would_not_protect() {
        let check = |spoil: &dyn Fn(&mut wire::TaskPlan), expected: &str| {
            let mut wire: wire::TaskPlan = Message::decode(&*private_plan().to_bytes()).unwrap();
            spoil(&mut wire);
            let error = TaskPlan::parse(&wire.encode_to_vec()).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        };
        let of = |plan: &mut wire::TaskPlan, spoil: &dyn Fn(&mut wire::PrivacyPlan)| {
            spoil(plan.aggregation.as_mut().unwrap().privacy.as_mut().unwrap());
        };
        check(&|p| of(p, &|p| p.mechanism = 0), "plan.aggregation.privacy.mechanism: unknown mechanism 0");
        check(&|p| of(p, &|p| p.variance_steps = 0), "plan.aggregation.privacy.variance_steps");
        check(&|p| of(p, &|p| p.delta = 1.0), "plan.aggregation.privacy.delta");
        // Epsilon is over 50 there, and e^50 times the tables' error is more than a delta of 1e-6.
        let much = |p: &mut wire::PrivacyPlan| p.participations_max = 1000;
        check(&|p| of(p, &much), "plan.aggregation.privacy.delta: 1e-6; at epsilon");
        check(&|p| of(p, &|p| p.participations_max = 0), "plan.aggregation.privacy: participations");
        check(&|p| of(p, &|p| p.clip_units = 0), "plan.aggregation.privacy: clipping norm");
        // Ten in a hundred may collude; whoever counts on the noise of nine of them counts on nobody's.
        check(&|p| of(p, &|p| p.colluders_max = 9), "plan.aggregation.privacy.colluders_max: 9");
        check(&|p| of(p, &|p| p.colluders_max = 14), "plan.aggregation.privacy.colluders_max: 14");
        check(&|p| p.aggregation.as_mut().unwrap().ring_bits = 9, "plan.aggregation.ring_bits: 9");
        let plain = i32::from(AggregationProtocol::InsecurePlaintext);
        check(&|p| p.aggregation.as_mut().unwrap().protocol = plain, "plan.aggregation.privacy: needs");
        let adapt = |p: &mut wire::PrivacyPlan| p.adaptation.as_mut().unwrap().norm_max = 0.01;
        check(&|p| of(p, &adapt), "plan.aggregation.privacy.adaptation");
        let outside = |p: &mut wire::TaskPlan| p.aggregation.as_mut().unwrap().clipping_norm = 11.0;
        check(&outside, "plan.aggregation.clipping_norm: 11; adaptive clipping keeps it from 0.1 to 10");
    }

    #[test]
    fn parse_inverts_to_bytes() {
        for plan in [plan(), secure_plan(), private_plan()] {
            assert_eq!(TaskPlan::parse(&plan.to_bytes()).unwrap(), plan);
        }
    }

    #[test]
    fn a_secure_plan_needs_its_assumptions() {
        let check = |spoil: &dyn Fn(&mut wire::SecureAggregationPlan), expected: &str| {
            let mut wire: wire::TaskPlan = Message::decode(&*secure_plan().to_bytes()).unwrap();
            spoil(wire.aggregation.as_mut().unwrap().secure.as_mut().unwrap());
            let error = TaskPlan::parse(&wire.encode_to_vec()).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        };
        check(&|p| p.mask_suite = 0, "plan.aggregation.secure.mask_suite: unknown suite 0");
        check(&|p| p.cohort_max = 1, "plan.aggregation.secure.cohort_max: 1");
        check(&|p| p.corrupted_permille = 700, "plan.aggregation.secure: ");
        let mut bare = secure_plan();
        bare.aggregation.secure = None;
        let error = TaskPlan::parse(&bare.to_bytes()).unwrap_err().to_string();
        assert_eq!(error, "plan.aggregation.secure: missing");
    }

    #[test]
    fn the_learning_rate_falls_over_the_rounds() {
        let rates = |fraction| {
            let training = TrainingPlan { learning_rate_final_fraction: fraction, ..plan().training };
            [0, 5, 10].map(|round| training.learning_rate_at(round, 11))
        };
        assert_eq!(rates(1.0), [1e-3; 3]);
        let expected = [1e-3, 5.5e-4, 1e-4];
        assert!(rates(0.1).iter().zip(expected).all(|(rate, wanted)| (rate - wanted).abs() < 1e-9));
        assert_eq!(plan().training.learning_rate_at(0, 1), 1e-3);
    }

    #[test]
    fn names_the_field_that_is_wrong() {
        let check = |spoil: &dyn Fn(&mut TaskPlan), expected: &str| {
            let mut bad = plan();
            spoil(&mut bad);
            let error = TaskPlan::parse(&bad.to_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        };
        check(&|p| p.training.steps = 0, "plan.training.steps: 0");
        check(&|p| p.training.learning_rate = 0.0, "plan.training.learning_rate: 0");
        check(
            &|p| p.training.learning_rate_final_fraction = 0.0,
            "plan.training.learning_rate_final_fraction: 0",
        );
        check(&|p| p.training.learning_rate = f32::NAN, "plan.training.learning_rate: NaN");
        check(&|p| p.adapter.dimension = 0, "plan.adapter.dimension: 0");
        check(&|p| p.aggregation.summands_min = 17, "plan.aggregation.summands_min: 17");
        check(&|p| p.aggregation.ring_bits = RingBits::new(9).unwrap(), "plan.aggregation.ring_bits");
        check(&|p| p.aggregation.protocol = AggregationProtocol::Unspecified, "plan.aggregation.protocol");
        check(&|p| p.rounds = 0, "plan.rounds: 0");
    }

    #[test]
    fn truncated_bytes_never_panic() {
        let bytes = plan().to_bytes();
        for end in 0..bytes.len() {
            let _ = TaskPlan::parse(&bytes[..end]);
        }
    }
}
