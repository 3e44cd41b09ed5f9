//! `fleetune-sim run`: a fleet fine-tunes a model, is held against its baselines, and the result is
//! written down. A shell: it reads the clock and prints.

#![allow(clippy::print_stdout, reason = "a program's result goes to standard output")]
#![allow(clippy::disallowed_methods, reason = "progress and the report show wall-clock time")]

use crate::{
    baselines::{BothGroups, central, evaluate_both, local_only},
    experiment::Experiment,
    fleet::{FinishedRound, Fleet, FleetOutcome},
    next_word::{self, NextWord},
    pool::{Pending, Pool},
    report::{
        CentralReport, DataReport, FinalReport, GainReport, LocalOnlyDevice, LocalOnlyReport, ModelReport,
        PrivacyReport, ReleaseReport, Report, RoundReport, Sample, Scores, SecureReport, html, table,
    },
    scenario::Scenario,
    tools::sequence,
};
use anyhow::{Context, Result, ensure};
use fleetune_model::{
    adapter::Adapter,
    adapter_formats::from_gguf_lora,
    base::BaseModel,
    eval::evaluate,
    generate::{Sampling, generate},
    gguf::Metadata,
    infer::Engine,
    trained::{TrainedLayout, TrainedModel},
};
use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Instant,
};

const PROMPTS: [&str; 2] = ["O, what a", "My lord,"];
const SAMPLE_TOKENS: usize = 32;

/// Trains a simulated fleet and reports how it did against central training and training alone.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    /// Scenario file; what it leaves out is as in the default scenario.
    pub scenario: Option<PathBuf>,
    /// Base model, a GGUF file; without it the small embedded one. With it and no scenario, the
    /// settings of the reference experiment.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Users' texts: a JSONL file or a folder; without it the embedded roles of Shakespeare.
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Seed of everything random: the same seed gives the same adapter, byte for byte.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Rounds, instead of the scenario's.
    #[arg(long)]
    pub rounds: Option<u32>,
    /// Contributions a round, instead of the scenario's.
    #[arg(long)]
    pub cohort: Option<u32>,
    /// Differential privacy: lays the reference's private setting over the scenario (FFA-LoRA, epsilon 2 with the
    /// noise of a cohort of 1,000 out of 1,000,000).
    #[arg(long)]
    pub privacy: bool,
    /// Epsilon of a private run.
    #[arg(long, value_name = "E")]
    pub epsilon: Option<f64>,
    /// Noise as in a deployment with that many devices a round; 0 for the noise of this fleet.
    #[arg(long, value_name = "N")]
    pub noise_cohort: Option<u32>,
    /// Devices of that deployment.
    #[arg(long, value_name = "N")]
    pub noise_population: Option<u64>,
    /// Worker threads; all cores if not given.
    #[arg(long)]
    pub threads: Option<usize>,
    /// Folder for report.json, report.html and the adapter.
    #[arg(long, default_value = "out")]
    pub out: PathBuf,
}

const SECURE: &str = "This run was not private: no noise was added. The coordinator learned sums of clipped \
                      updates and no single one (secagg+); what the sums say of one device is not bounded.";
const PLAINTEXT: &str = "This run was not private: no noise was added, and the coordinator saw each clipped \
                         update (insecure_plaintext).";

/// Runs and writes the report; its path is the last line printed.
pub fn run(args: &RunArgs) -> Result<Report> {
    let started = Instant::now();
    let scenario = scenario(args)?;
    fs::create_dir_all(&args.out).with_context(|| format!("folder {}", args.out.display()))?;
    let experiment = Experiment::open(&scenario, args.model.as_deref(), args.data.as_deref(), args.seed)?;
    introduce(&scenario, &experiment);
    let threads = args.threads.or_else(|| thread::available_parallelism().ok().map(Into::into)).unwrap_or(1);
    let pool = Pool::new(threads);
    let base = evaluate_both(&pool, &experiment, None);
    let mut log = RoundLog::new(&scenario, &experiment, &pool, started);
    let fleet = Fleet::new(&scenario, &experiment, &pool, args.seed)?;
    let outcome = fleet.run(&mut |round| log.note(round))?;
    let trained = log.finish()?;
    eprintln!(
        "comparing with central training on the same {} tokens, and with devices alone",
        trained.tokens
    );
    let central = central(&pool, &experiment, &scenario, trained.tokens, args.seed);
    let alone = local_only(&pool, &experiment, &scenario, &trained.adapter, args.seed)?;
    let release = release_report(&pool, &experiment, &outcome);
    let central = central.wait()?;
    let next_word = next_words(&pool, &experiment, &scenario, &trained.adapter, central.values)?;
    let base = base.wait()?;
    let devices = alone.into_iter().map(Pending::wait).collect::<Result<Vec<_>>>()?;
    let scores = trained.scores;
    let is_secure = scenario.aggregation_plan()?.secure.is_some();
    let privacy = PrivacyReport::of(&scenario, &outcome, experiment.layout.len())?;
    let secure_aggregation = is_secure.then(|| SecureReport::of(&trained.rounds));
    let report = Report {
        version: env!("CARGO_PKG_VERSION").into(),
        model: model_report(&experiment, &scenario),
        data: data_report(&experiment, &scenario),
        seed: args.seed,
        scenario: serde_json::to_value(&scenario)?,
        rounds: trained.rounds,
        base: scores_of(&base),
        gain: GainReport {
            seen: gain(base.seen.nll, scores.seen.nll, central.scores.seen.nll),
            heldout: gain(base.heldout.nll, scores.heldout.nll, central.scores.heldout.nll),
        },
        central: CentralReport {
            scores: scores_of(&central.scores),
            tokens: central.tokens,
            curve: central.curve,
        },
        local_only: local_only_report(devices, scenario.local_only.steps),
        r#final: FinalReport {
            scores: scores_of(&scores),
            adapter_sha256: hex::encode(experiment.layout.checkpoint_sha256(&trained.adapter)),
        },
        next_word,
        release: Some(release.wait()?),
        peak_rss_mib: peak_rss_mib(),
        seconds: started.elapsed().as_secs_f64(),
        threads,
        aggregation: if is_secure { "secagg+".into() } else { "insecure_plaintext".into() },
        secure_aggregation,
        privacy_in_words: match &privacy {
            Some(privacy) => privacy.in_words(),
            None if is_secure => SECURE.into(),
            None => PLAINTEXT.into(),
        },
        privacy,
    };
    write_out(&args.out, &report, &experiment, &trained.adapter, &outcome)?;
    print!("{}", table::table(&report));
    println!("report: {}", args.out.join("report.html").display());
    Ok(report)
}

fn scenario(args: &RunArgs) -> Result<Scenario> {
    let mut scenario = match (&args.scenario, &args.model) {
        (Some(path), _) => Scenario::load(path)?,
        (None, Some(_)) => Scenario::smollm2()?,
        (None, None) => Scenario::default_fleet()?,
    };
    if args.privacy {
        scenario = scenario.made_private()?;
    }
    let privacy = &mut scenario.privacy;
    let asked = args.epsilon.is_some() || args.noise_cohort.is_some() || args.noise_population.is_some();
    ensure!(!asked || privacy.enabled, "--epsilon and --noise-... need --privacy, or a private scenario");
    privacy.epsilon = args.epsilon.unwrap_or(privacy.epsilon);
    privacy.noise_cohort = args.noise_cohort.unwrap_or(privacy.noise_cohort);
    privacy.noise_population = args.noise_population.unwrap_or(privacy.noise_population);
    scenario.rounds = args.rounds.unwrap_or(scenario.rounds);
    if let Some(cohort) = args.cohort {
        scenario.fleet.cohort = cohort;
        scenario.fleet.reports_min = scenario.fleet.reports_min.min(cohort);
    }
    scenario.check().context("the command line and the scenario together")?;
    Ok(scenario)
}

fn introduce(scenario: &Scenario, experiment: &Experiment) {
    let config = &experiment.base.config;
    eprintln!(
        "{}: {} parameters, {} values are trained; {}: {} users train, {} are held out",
        config.name,
        experiment.base.parameter_count(),
        experiment.layout.len(),
        experiment.data_name,
        experiment.users.len(),
        experiment.heldout_users
    );
    if experiment.reference_blocks {
        eprintln!("evaluated on the fixed blocks of the reference figures");
    }
    let p = &scenario.privacy;
    let privacy = match (p.enabled, p.noise_cohort) {
        (false, _) => "no noise: this run is NOT private".to_owned(),
        (true, 0) => format!("epsilon {} at delta {:e} of each device", p.epsilon, p.delta),
        (true, cohort) => format!(
            "the noise of a cohort of {cohort} out of {} at epsilon {}: a SIMULATION that protects nobody",
            p.noise_population, p.epsilon
        ),
    };
    eprintln!(
        "{} rounds of {} contributions; aggregation {} and {privacy}",
        scenario.rounds, scenario.fleet.cohort, scenario.aggregation.protocol
    );
}

/// What training left behind.
struct Trained {
    rounds: Vec<RoundReport>,
    adapter: Vec<f32>,
    scores: BothGroups,
    tokens: u64,
}

/// Collects rounds as they finish, evaluates some of them on the side, and shows progress.
struct RoundLog<'a> {
    scenario: &'a Scenario,
    experiment: &'a Experiment,
    pool: &'a Pool,
    last: Instant,
    tokens: u64,
    rounds: Vec<RoundReport>,
    evaluations: Vec<(usize, Pending<BothGroups>)>,
    adapter: Vec<f32>,
}

impl<'a> RoundLog<'a> {
    fn new(scenario: &'a Scenario, experiment: &'a Experiment, pool: &'a Pool, started: Instant) -> Self {
        Self {
            scenario,
            experiment,
            pool,
            last: started,
            tokens: 0,
            rounds: Vec::new(),
            evaluations: Vec::new(),
            adapter: Vec::new(),
        }
    }

    fn note(&mut self, outcome: FinishedRound) {
        let record = &outcome.record;
        let round = record.round + 1;
        self.tokens += outcome.tokens;
        let seconds = self.last.elapsed().as_secs_f64();
        self.last = Instant::now();
        self.rounds.push(RoundReport {
            round,
            failed_attempts: outcome.failed_attempts,
            selected: record.selected,
            completed: record.completed,
            dropped: record.selected - record.completed,
            cohorts: record.aggregation.cohorts.clone(),
            privacy: record.aggregation.privacy,
            train_nll: outcome.train_nll,
            eval_nll: None,
            heldout_nll: None,
            update_norm: record.update_norm.unwrap_or(0.0),
            tokens: self.tokens,
            virtual_seconds: outcome.virtual_seconds,
            seconds,
        });
        eprintln!(
            "round {round:>3}/{}  {:>3} of {:>3} contributed  train NLL {:.3}  update norm {:.2}  {seconds:.1} s",
            self.scenario.rounds,
            record.completed,
            record.selected,
            outcome.train_nll,
            record.update_norm.unwrap_or(0.0)
        );
        if round.is_multiple_of(self.scenario.evaluation.every) || round == self.scenario.rounds {
            let job = evaluate_both(self.pool, self.experiment, Some(outcome.adapter.clone()));
            self.evaluations.push((self.rounds.len() - 1, job));
        }
        self.adapter = outcome.adapter;
    }

    fn finish(mut self) -> Result<Trained> {
        let mut scores = None;
        for (index, job) in self.evaluations.drain(..) {
            let both = job.wait()?;
            let round = &mut self.rounds[index];
            (round.eval_nll, round.heldout_nll) = (Some(both.seen.nll), Some(both.heldout.nll));
            eprintln!(
                "after round {:>3}: NLL {:.4} seen, {:.4} held-out",
                round.round, both.seen.nll, both.heldout.nll
            );
            scores = Some(both);
        }
        let scores = scores.context("no round finished")?;
        Ok(Trained { rounds: self.rounds, adapter: self.adapter, scores, tokens: self.tokens })
    }
}

/// What keyboards are judged by, of the base, counting, central training and the fleet; none if not asked for.
fn next_words(
    pool: &Pool,
    experiment: &Experiment,
    scenario: &Scenario,
    federated: &[f32],
    central: Vec<f32>,
) -> Result<Vec<NextWord>> {
    if !scenario.evaluation.recall {
        return Ok(Vec::new());
    }
    let of = |name: &str, values| next_word::of_values(pool, experiment, name, values);
    let mut jobs = next_word::of_counts(pool, experiment);
    jobs.push(of("base", None));
    jobs.push(of("central", Some(central)));
    jobs.push(of("federated", Some(federated.to_vec())));
    jobs.into_iter().map(Pending::wait).collect()
}

fn release_report(pool: &Pool, experiment: &Experiment, outcome: &FleetOutcome) -> Pending<ReleaseReport> {
    let (base, blocks) = (Arc::clone(&experiment.base), Arc::clone(&experiment.eval_blocks));
    let (file, manifest, devices_active) =
        (Arc::clone(&outcome.released), outcome.manifest.clone(), outcome.devices_active);
    let layout = experiment.layout.clone();
    pool.submit(move |_| {
        let released = open_released(&layout, &base, &file)?;
        let (before, after) = (Engine::new(base), Engine::new(Arc::clone(&released.base)));
        let sample = |prompt: &&str| -> Result<Sample> {
            let said = continuation(&after, released.adapter.as_ref(), prompt)?;
            Ok(Sample {
                prompt: (*prompt).into(),
                base: continuation(&before, None, prompt)?,
                released: said,
            })
        };
        Ok(ReleaseReport {
            version: manifest.version,
            base_bytes: manifest.base_model.size,
            adapter_bytes: manifest.adapter.map_or(0, |adapter| adapter.size),
            devices_active,
            eval_nll: evaluate(&released.base, released.adapter.as_ref(), &blocks)?.nll,
            samples: PROMPTS.iter().map(sample).collect::<Result<_>>()?,
        })
    })
}

/// The released file, opened as a device opens it.
fn open_released(layout: &TrainedLayout, base: &Arc<BaseModel>, file: &[u8]) -> Result<TrainedModel> {
    match layout {
        TrainedLayout::Lora(_) => {
            let adapter = from_gguf_lora(file, base).context("the released adapter")?;
            Ok(TrainedModel { base: Arc::clone(base), adapter: Some(adapter) })
        }
        TrainedLayout::Full(_) => {
            let model = BaseModel::from_gguf_bytes(file.to_vec()).context("the released model")?;
            Ok(TrainedModel { base: Arc::new(model), adapter: None })
        }
    }
}

fn continuation(engine: &Engine, adapter: Option<&Adapter>, prompt: &str) -> Result<String> {
    let base = engine.base();
    let ids = base.tokenizer.encode_ordinary(prompt);
    let sampling = Sampling { temperature: 0.0, max_tokens: SAMPLE_TOKENS, ..Sampling::default() };
    let mut sequence = sequence(engine, adapter)?;
    let answer = generate(engine, &mut sequence, &ids, &sampling, &mut |_| ControlFlow::Continue(()))?;
    Ok(base.tokenizer.decode(&answer))
}

fn model_report(experiment: &Experiment, scenario: &Scenario) -> ModelReport {
    ModelReport {
        name: experiment.base.config.name.clone(),
        sha256: experiment.base_digest.hex(),
        parameters: experiment.base.parameter_count(),
        trainable: experiment.layout.len() as u64,
        trains: scenario.model.trains.clone(),
    }
}

fn data_report(experiment: &Experiment, scenario: &Scenario) -> DataReport {
    DataReport {
        name: experiment.data_name.clone(),
        sha256: hex::encode(experiment.data_sha256),
        users: experiment.users.len(),
        heldout_users: experiment.heldout_users,
        eval_blocks: experiment.eval_blocks.len(),
        heldout_blocks: experiment.heldout_blocks.len(),
        block_tokens: scenario.training.block_tokens as usize,
    }
}

fn scores_of(both: &BothGroups) -> Scores {
    Scores {
        eval_nll: both.seen.nll,
        heldout_nll: both.heldout.nll,
        eval_accuracy: both.seen.accuracy,
        heldout_accuracy: both.heldout.accuracy,
    }
}

fn gain(base: f64, federated: f64, central: f64) -> f64 {
    (base - federated) / (base - central)
}

/// Means over the devices, each weighted by its tokens.
fn local_only_report(devices: Vec<LocalOnlyDevice>, steps: u32) -> LocalOnlyReport {
    let tokens = devices.iter().map(|device| device.tokens as f64).sum::<f64>();
    let mean = |nll: fn(&LocalOnlyDevice) -> f64| {
        devices.iter().map(|device| nll(device) * device.tokens as f64).sum::<f64>() / tokens
    };
    LocalOnlyReport {
        eval_nll: mean(|device| device.local_nll),
        base_eval_nll: mean(|device| device.base_nll),
        federated_eval_nll: mean(|device| device.federated_nll),
        steps,
        devices,
    }
}

fn write_out(
    out: &Path,
    report: &Report,
    experiment: &Experiment,
    values: &[f32],
    outcome: &FleetOutcome,
) -> Result<()> {
    let write = |name: &str, bytes: &[u8]| {
        let path = out.join(name);
        fs::write(&path, bytes).with_context(|| format!("file {}", path.display()))
    };
    let what = report.model.trains.as_str();
    write(&format!("{what}.safetensors"), &experiment.layout.to_checkpoint_bytes(values))?;
    write(&format!("{what}.gguf"), &outcome.released)?;
    if experiment.fresh {
        write("base.gguf", &experiment.base.to_gguf_bytes(&Metadata::default()))?;
    }
    write("release.manifest", &outcome.envelope)?;
    write("report.json", serde_json::to_string_pretty(report)?.as_bytes())?;
    write("report.html", html::render(report).as_bytes())
}

/// Peak resident memory, from the kernel's own count; 0 where there is none.
pub(crate) fn peak_rss_mib() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()).and_then(|kib| kib.parse::<f64>().ok());
    kib.map_or(0.0, |kib| kib / 1024.0)
}
