//! A made-up report for the tests of the page and the table. Its names carry markup on purpose.

use super::*;
use fleetune_privacy::{NoiseCohort, PrivacyStatement, StatementParts};

pub(super) fn report() -> Report {
    let rounds: Vec<RoundReport> = (1..=16).map(round).collect();
    let devices =
        ["hamlet_Hamlet", "othello_Iago", "tempest_<b>Ariel</b>", "henryv_Fluellen", "lear_Fool & Kent"];
    let devices: Vec<LocalOnlyDevice> = devices.iter().enumerate().map(|(i, user)| device(i, user)).collect();
    Report {
        version: "0.1.0".into(),
        model: ModelReport {
            name: "fleetune-base <2M>".into(),
            sha256: "5a".repeat(32),
            parameters: 2_012_544,
            trainable: 92_160,
            trains: "adapter".into(),
        },
        data: DataReport {
            name: "shakespeare_roles_cap400.jsonl.gz".into(),
            sha256: "c3".repeat(32),
            users: 507,
            heldout_users: 50,
            eval_blocks: 48,
            heldout_blocks: 48,
            block_tokens: 64,
        },
        seed: 7,
        scenario: serde_json::json!({
            "name": "default", "rounds": 16,
            "cohort": {"report_goal": 8, "selected_max": 10, "reports_min": 4},
            "training": {"steps": 4, "batch_size": 2, "learning_rate": 0.001_f32, "gradient_clip": null},
            "fleet": {"slow_share": 0.1, "dropout": 0.05},
        }),
        base: scores(4.782, 4.723),
        central: CentralReport {
            scores: scores(4.179, 4.160),
            tokens: 65_536,
            curve: (1..=12).map(central_point).collect(),
        },
        local_only: LocalOnlyReport {
            eval_nll: 4.512,
            base_eval_nll: 4.744,
            federated_eval_nll: 4.201,
            steps: 32,
            devices,
        },
        r#final: FinalReport { scores: scores(4.211, 4.184), adapter_sha256: "1f".repeat(32) },
        gain: GainReport { seen: 0.947, heldout: 0.957 },
        next_word: Vec::new(),
        release: Some(ReleaseReport {
            version: 1,
            base_bytes: 2_345_678,
            adapter_bytes: 187_456,
            devices_active: 507,
            eval_nll: 4.212,
            samples: vec![Sample {
                prompt: "To be, or".into(),
                base: " the people of the States, and the <people>".into(),
                released: " not the king,\nMy lord, I will not be & the sea".into(),
            }],
        }),
        peak_rss_mib: 212.4,
        seconds: 71.3,
        threads: 2,
        aggregation: "secagg+".into(),
        secure_aggregation: Some(SecureReport::of(&rounds)),
        privacy: None,
        privacy_in_words: "This run was not private: no noise was added.".into(),
        rounds,
    }
}

fn round(round: u32) -> RoundReport {
    let fall = 1.0 - (-f64::from(round) / 4.0).exp();
    let dropped = [0, 1, 0, 2][round as usize % 4];
    RoundReport {
        round,
        failed_attempts: u32::from(round == 5),
        selected: 10,
        completed: 8,
        dropped,
        cohorts: vec![CohortRecord {
            members: 8,
            degree: 7,
            threshold: 4,
            dropouts: [0, u32::from(round == 2), 0, 0],
            survivors: Some(8 - u32::from(round == 2)),
            failure: None,
        }],
        privacy: None,
        train_nll: 4.75 - 0.55 * fall,
        eval_nll: (round == 1 || round.is_multiple_of(2)).then_some(4.782 - 0.582 * fall),
        heldout_nll: (round == 1 || round.is_multiple_of(2)).then_some(4.723 - 0.549 * fall),
        update_norm: 1.65 - 0.05 * f64::from(round) + 0.08 * f64::from(dropped),
        tokens: u64::from(round) * 4096,
        virtual_seconds: f64::from(round) * 431.0,
        seconds: 3.9,
    }
}

fn central_point(point: u32) -> CentralPoint {
    let fall = 1.0 - (-f64::from(point) / 2.5).exp();
    CentralPoint {
        tokens: u64::from(point) * 65_536 / 12,
        eval_nll: 4.782 - 0.608 * fall,
        heldout_nll: 4.723 - 0.568 * fall,
    }
}

fn device(index: usize, user: &str) -> LocalOnlyDevice {
    let base_nll = 4.4 + 0.17 * index as f64;
    let alone = [0.38, 0.21, -0.09, 0.30, 0.36][index];
    LocalOnlyDevice {
        user: user.into(),
        base_nll,
        local_nll: base_nll - alone,
        federated_nll: base_nll - 0.45 - 0.04 * index as f64,
        tokens: 512,
    }
}

fn scores(eval_nll: f64, heldout_nll: f64) -> Scores {
    Scores {
        eval_nll,
        heldout_nll,
        eval_accuracy: 0.9 - eval_nll / 7.0,
        heldout_accuracy: 0.9 - heldout_nll / 7.0,
    }
}

/// A private run with the noise of an imagined cohort.
pub(super) fn privacy() -> PrivacyReport {
    let parts = StatementParts {
        population: "simulated",
        task: "lora",
        rounds: 16,
        aggregation: "secagg+",
        survivors_min: 4,
        summands_max: 8,
    };
    PrivacyReport {
        statement: PrivacyStatement::new(&parts, None),
        simulated_noise_cohort: Some(privacy::SimulatedGuarantee {
            deployment: NoiseCohort { cohort: 1000, population: 1_000_000 },
            noise_multiplier: 0.6783,
            sampling_probability: 1e-3,
            epsilon: 2.0,
            delta: 1e-6,
            accountant: "RDP".into(),
        }),
        participations_most: 0,
        sums_opened: 16,
        survivors_least: 7,
        epsilon_by_round: (1..=16).map(|round| 1.0 + f64::from(round) / 16.0).collect(),
    }
}
