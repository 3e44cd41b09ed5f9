//! All weights of a small model, trained by processes: the same model as in the simulator, installed as one file.

use super::fleet::{Site, wait_until};
use super::{FOUR, SEED};
use crate::support::root;
use fleetune_client::{data::blocks, release::ReleaseSlots};
use fleetune_model::{
    base::BaseModel, config::ModelConfig, eval::evaluate, full::FullTrainer, gguf::Metadata,
    weights::WeightFormat,
};
use fleetune_sim::{
    experiment::Experiment,
    fleet::{Fleet, FleetOutcome, training_seed},
    pool::Pool,
    scenario::Scenario,
};
use std::fs;

const DEVICES: usize = 4;

/// The simulator's side of `fleet::TASK` with all weights trained.
const SCENARIO: &str = r#"
rounds = 2
[fleet]
cohort = 4
over_selection = 1.0
reports_min = 4
blocks_min = 1
[devices]
dropout = 0.0
step_dropout = 0.0
[model]
trains = "model"
[training]
steps = 2
batch_size = 2
block_tokens = 32
learning_rate = 5e-3
learning_rate_final_fraction = 0.15
[server]
optimizer = "fedavg"
learning_rate = 1.0
"#;

/// A model with random weights and the embedded base's tokenizer.
fn small_base() -> Vec<u8> {
    let embedded =
        BaseModel::open(&root().join("sim/base/fleetune-base.q8_0.gguf")).expect("the embedded base");
    let config = ModelConfig {
        family: fleetune_model::family::Family::Llama,
        name: "small".into(),
        vocab_size: embedded.tokenizer.vocab_size(),
        hidden: 32,
        layers: 1,
        feed_forward: 64,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        context_length: 64,
        rope_base: 10_000.0,
        rms_eps: 1e-5,
    };
    let trainer = FullTrainer::new(config, 1).expect("sound sizes");
    let model = trainer.to_base(&trainer.initial_parameters(3), embedded.tokenizer, WeightFormat::F16);
    model.expect("a model").to_gguf_bytes(&Metadata::default())
}

fn simulated(site: &Site) -> (Experiment, Vec<f32>, FleetOutcome) {
    let scenario = Scenario::from_toml("test", SCENARIO).expect("a sound scenario");
    let (base, data) = (site.path("base.gguf"), site.dataset());
    let experiment = Experiment::open(&scenario, Some(&base), Some(&data), SEED).expect("an experiment");
    let pool = Pool::new(2);
    let mut values = Vec::new();
    let fleet = Fleet::new(&scenario, &experiment, &pool, SEED).expect("a fleet");
    let outcome = fleet.run(&mut |round| values = round.adapter).expect("a finished fleet");
    (experiment, values, outcome)
}

#[test]
fn devices_that_train_all_weights_equal_the_simulator_and_run_the_model() {
    let site = Site::new(DEVICES, FOUR, 2, 2);
    fs::write(site.path("base.gguf"), small_base()).expect("a small base");
    let config = fs::read_to_string(site.path("coordinator.toml")).expect("a configuration");
    let config =
        config.replace("base_model = \"base.gguf\"", "base_model = \"base.gguf\"\ntrains = \"model\"");
    // The simulator's grid is that of its cohort.
    let config = config.replace("summands_max = 8", "summands_max = 4");
    fs::write(site.path("coordinator.toml"), config).expect("a configuration");
    let _coordinator = site.coordinator();
    let devices: Vec<_> =
        (0..DEVICES).map(|user| site.device(user, &hex::encode(training_seed(SEED, user)))).collect();
    wait_until("all devices run the release", || {
        (0..DEVICES).all(|user| site.device_status(user)["releases"]["active"].as_u64() == Some(1))
    });
    drop(devices);
    let (experiment, values, outcome) = simulated(&site);
    let expected = hex::encode(experiment.layout.checkpoint_sha256(&values));
    assert_eq!(site.status()["tasks"][0]["checkpoint"].as_str(), Some(expected.as_str()));

    let slots = ReleaseSlots::open(&site.path("state-1")).expect("a state directory");
    let installed = slots.open_model().expect("it opens").expect("a release");
    assert!(installed.adapter.is_none(), "the model is whole");
    assert_eq!(installed.manifest.base_model, outcome.manifest.base_model, "the same file");
    let texts = ["My lord, what news?", "I know not, sir; the king is in the field with all his men."];
    let blocks = blocks(&installed.base.tokenizer, &texts.map(str::to_owned), 16);
    let exact = experiment.layout.model(&experiment.base, values).expect("finite values");
    let nll = |model: &BaseModel| evaluate(model, None, &blocks).expect("blocks that fit").nll;
    let (released, trained, start) = (nll(&installed.base), nll(&exact.base), nll(&experiment.base));
    assert!((released - trained).abs() < 0.002, "eight bits cost little: {released} {trained}");
    assert!(trained < start - 0.001, "training moved it: {trained} {start}");
    assert!(!site.generate(2, "My lord,").is_empty());
}
