//! `fleetune-sim classify`: train a text classifier on an encoder, evaluate it, use it, carry it elsewhere.
//! Lines of data are read in `classify/lines.rs`.

#![allow(clippy::print_stdout, reason = "a program's result goes to standard output")]

mod lines;
#[cfg(test)]
mod tests;

use anyhow::{Context, Result, bail, ensure};
use fleetune_model::{
    encoder::{
        Classifier, ClassifierConfig, ClassifierLayout, ClassifierTrainer, EncoderLora, EncoderModel,
        EncoderProjection, Example, Pooling, fine_tune, from_peft, read_peft_dir, to_peft, write_peft_dir,
    },
    gguf::Metadata,
    train::{LocalTraining, OptimizerConfig, Precision, Schedule},
    weights::WeightFormat,
};
use lines::{Line, labelled, read_lines};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

/// Classify texts with an encoder of the BERT family.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Command {
    /// Train a head, with LoRA or without, and write the classifier.
    Train(TrainArgs),
    /// Print a classifier's accuracy on lines with labels.
    Eval(EvalArgs),
    /// Print the label of every line.
    Predict(PredictArgs),
    /// Write a classifier as a folder that peft loads.
    Export(ExportArgs),
    /// Write an encoder as a GGUF file, its weights in another format.
    Quantize(QuantizeArgs),
}

/// Trains a classifier.
#[derive(Clone, Debug, clap::Args)]
pub struct TrainArgs {
    /// Encoder: a Hugging Face folder, or a GGUF file of architecture bert.
    #[arg(long)]
    model: PathBuf,
    /// Lines of JSON, {"text": "..", "label": ".."}.
    #[arg(long)]
    data: PathBuf,
    /// More such lines, to evaluate on after training.
    #[arg(long)]
    eval: Option<PathBuf>,
    /// The classifier to write; a file that is there already is refused.
    #[arg(long)]
    out: PathBuf,
    /// Adapted projections: of query, key, value, attention_output, intermediate, output; "none" trains the head alone.
    #[arg(long, value_delimiter = ',', default_value = "query,value")]
    targets: Vec<String>,
    /// LoRA's rank.
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// LoRA's branch is multiplied by this over the rank.
    #[arg(long, default_value_t = 16.0)]
    alpha: f32,
    /// Train LoRA's B alone.
    #[arg(long)]
    freeze_a: bool,
    /// mean, cls or pooler; as the model's files say if not given.
    #[arg(long)]
    pooling: Option<String>,
    /// Longest text in tokens; the rest is cut off.
    #[arg(long, default_value_t = 128)]
    length_max: usize,
    /// Times that every line is seen.
    #[arg(long, default_value_t = 3)]
    epochs: u32,
    /// Lines in a step.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Highest learning rate of AdamW; it rises over a tenth of the steps and falls to 0.
    #[arg(long, default_value_t = 2e-3)]
    learning_rate: f32,
    /// Seed of first values and of the order of lines.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// f32, or bf16 for the products with the frozen weights.
    #[arg(long, default_value = "f32")]
    precision: String,
    /// Prints JSON instead of sentences.
    #[arg(long)]
    json: bool,
}

/// An encoder and a classifier for it.
#[derive(Clone, Debug, clap::Args)]
pub struct ClassifierArgs {
    /// Encoder: a Hugging Face folder, or a GGUF file of architecture bert.
    #[arg(long)]
    model: PathBuf,
    /// Classifier: a file that `classify train` wrote, or a PEFT folder.
    #[arg(long)]
    classifier: PathBuf,
}

/// Evaluates a classifier.
#[derive(Clone, Debug, clap::Args)]
pub struct EvalArgs {
    #[command(flatten)]
    with: ClassifierArgs,
    /// Lines of JSON, {"text": "..", "label": ".."}.
    #[arg(long)]
    data: PathBuf,
    /// Prints JSON instead of a sentence.
    #[arg(long)]
    json: bool,
}

/// Labels lines.
#[derive(Clone, Debug, clap::Args)]
pub struct PredictArgs {
    #[command(flatten)]
    with: ClassifierArgs,
    /// Lines of JSON, {"text": ".."}; standard input if not given.
    #[arg(long)]
    data: Option<PathBuf>,
}

/// Writes a classifier as peft does.
#[derive(Clone, Debug, clap::Args)]
pub struct ExportArgs {
    #[command(flatten)]
    with: ClassifierArgs,
    /// The folder to write; one that is there already is refused.
    #[arg(long)]
    out: PathBuf,
}

/// Writes an encoder as a GGUF file.
#[derive(Clone, Debug, clap::Args)]
pub struct QuantizeArgs {
    /// Encoder: a Hugging Face folder, or a GGUF file of architecture bert.
    #[arg(long)]
    model: PathBuf,
    /// F32, F16, BF16, Q8_0, Q4_0 or Q4_1.
    #[arg(long, default_value = "Q8_0")]
    format: String,
    /// The file to write; one that is there already is refused.
    #[arg(long)]
    out: PathBuf,
}

/// How good a classifier is on some lines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Score {
    /// Lines.
    lines: usize,
    /// Share of lines whose likeliest label is theirs.
    accuracy: f64,
    /// Mean cross entropy, nats a line.
    nll: f64,
    /// Share of the commonest label among the lines: what guessing it would give.
    majority: f64,
}

#[derive(Serialize)]
struct Trained {
    labels: Vec<String>,
    parameters: usize,
    steps: u32,
    first_loss: f32,
    mean_loss: f32,
    cpu_s_per_step: f64,
    eval: Option<Score>,
}

/// Runs the command.
///
/// # Errors
/// When a file cannot be read or written, a line is none, or the settings do not fit the encoder.
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Train(args) => train(args),
        Command::Eval(args) => eval(args),
        Command::Predict(args) => predict(args),
        Command::Export(args) => export(args),
        Command::Quantize(args) => quantize(args),
    }
}

fn train(args: &TrainArgs) -> Result<()> {
    refuse_existing(&args.out)?;
    let model = Arc::new(open_model(&args.model)?);
    let found = read_lines(&args.data)?;
    let labels: BTreeSet<&str> = found.iter().filter_map(Line::label).collect();
    let labels: Vec<String> = labels.into_iter().map(str::to_owned).collect();
    let examples = examples(&model, &found, &args.data, &labels, args.length_max)?;
    let eval_lines =
        args.eval.as_ref().map(|path| Ok::<_, anyhow::Error>((path, read_lines(path)?))).transpose()?;
    let eval_examples = eval_lines
        .map(|(path, found)| self::examples(&model, &found, path, &labels, args.length_max))
        .transpose()?;
    let layout = ClassifierLayout::new(model.config(), &args.classifier_config(labels, &model)?)?;
    let trainer = ClassifierTrainer::new(Arc::clone(&model), Arc::new(layout), args.precision()?)?;
    let plan = args.plan(examples.len())?;
    let mut values = trainer.layout().initial_values();
    let before = cpu_seconds();
    let summary = fine_tune(&trainer, &mut values, &examples, &plan, args.seed, &mut || false)?;
    let cpu_s_per_step = (cpu_seconds() - before) / f64::from(summary.steps);
    let layout = Arc::clone(trainer.layout());
    let classifier = Classifier::new(&model, Arc::clone(&layout), values, args.length_max)?;
    let eval = eval_examples.map(|examples| score(&trainer, &classifier.values, &examples)).transpose()?;
    fs::write(&args.out, classifier.to_checkpoint_bytes())
        .with_context(|| format!("--out: {}", args.out.display()))?;
    let trained = Trained {
        labels: layout.config().labels.clone(),
        parameters: layout.len(),
        steps: summary.steps,
        first_loss: summary.first_loss,
        mean_loss: summary.mean_loss,
        cpu_s_per_step,
        eval,
    };
    if args.json {
        println!("{}", serde_json::to_string(&trained)?);
        return Ok(());
    }
    println!(
        "{} labels, {} trained values, {} steps of {:.3} CPU s; loss at first {:.3}, on the way {:.3}",
        trained.labels.len(),
        trained.parameters,
        trained.steps,
        trained.cpu_s_per_step,
        trained.first_loss,
        trained.mean_loss
    );
    trained.eval.iter().for_each(Score::print);
    println!("{}", args.out.display());
    Ok(())
}

impl TrainArgs {
    fn classifier_config(&self, labels: Vec<String>, model: &EncoderModel) -> Result<ClassifierConfig> {
        let target = |name: &String| {
            EncoderProjection::from_name(name)
                .with_context(|| format!("--targets: {name:?} is no projection"))
        };
        let head_only = self.targets == ["none"];
        let targets =
            if head_only { Vec::new() } else { self.targets.iter().map(target).collect::<Result<_>>()? };
        let lora = EncoderLora { rank: self.rank, alpha: self.alpha, targets, freeze_a: self.freeze_a };
        let pooling = match &self.pooling {
            None => model.config().pooling,
            Some(name) => Pooling::from_name(name)
                .with_context(|| format!("--pooling: {name:?}; mean, cls or pooler"))?,
        };
        Ok(ClassifierConfig { labels, pooling, lora: (!head_only).then_some(lora), init_seed: self.seed })
    }

    fn plan(&self, examples: usize) -> Result<LocalTraining> {
        ensure!(self.batch > 0, "--batch: at least 1");
        let steps = u64::from(self.epochs) * examples.div_ceil(self.batch) as u64;
        let steps = u32::try_from(steps).context("--epochs: too many steps")?;
        Ok(LocalTraining {
            steps,
            batch_size: self.batch,
            block_tokens: self.length_max,
            optimizer: OptimizerConfig::default(),
            learning_rate: self.learning_rate,
            gradient_clip: Some(1.0),
            schedule: Schedule::WarmupCosine { warmup_steps: steps.div_ceil(10), final_fraction: 0.0 },
        })
    }

    fn precision(&self) -> Result<Precision> {
        match self.precision.as_str() {
            "f32" => Ok(Precision::F32),
            "bf16" => Ok(Precision::Bf16),
            other => bail!("--precision: {other:?}; f32 or bf16"),
        }
    }
}

fn eval(args: &EvalArgs) -> Result<()> {
    let (model, classifier) = open(&args.with)?;
    let labels = &classifier.layout.config().labels;
    let examples = examples(&model, &read_lines(&args.data)?, &args.data, labels, classifier.length_max)?;
    let trainer = ClassifierTrainer::new(model, Arc::clone(&classifier.layout), Precision::F32)?;
    let score = score(&trainer, &classifier.values, &examples)?;
    if args.json {
        println!("{}", serde_json::to_string(&score)?);
    } else {
        score.print();
    }
    Ok(())
}

impl Score {
    fn print(&self) {
        println!(
            "accuracy {:.1} % of {} lines ({:.1} % by the commonest label), {:.3} nats a line",
            100.0 * self.accuracy,
            self.lines,
            100.0 * self.majority,
            self.nll
        );
    }
}

fn score(trainer: &ClassifierTrainer, values: &[f32], examples: &[Example]) -> Result<Score> {
    let ids: Vec<&[u32]> = examples.iter().map(|example| example.ids.as_slice()).collect();
    let probabilities = trainer.predict(values, &ids)?;
    let classes = trainer.layout().classes();
    let (mut hits, mut nll, mut counts) = (0usize, 0.0, vec![0usize; classes]);
    for (example, row) in examples.iter().zip(probabilities.chunks_exact(classes)) {
        hits += usize::from(likeliest(row) == example.class);
        nll -= f64::from(row[example.class].max(f32::MIN_POSITIVE)).ln();
        counts[example.class] += 1;
    }
    let share = |count: usize| count as f64 / examples.len() as f64;
    let most = counts.into_iter().max().unwrap_or_default();
    Ok(Score {
        lines: examples.len(),
        accuracy: share(hits),
        nll: nll / examples.len() as f64,
        majority: share(most),
    })
}

fn likeliest(row: &[f32]) -> usize {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap_or_default()
}

#[derive(Serialize)]
struct Predicted<'a> {
    label: &'a str,
    probabilities: BTreeMap<&'a str, f32>,
}

/// Lines that are predicted and printed together.
const PREDICTED_TOGETHER: usize = 64;

fn predict(args: &PredictArgs) -> Result<()> {
    let (model, classifier) = open(&args.with)?;
    let labels = &classifier.layout.config().labels;
    let lines = match &args.data {
        Some(path) => read_lines(path)?,
        None => lines::parse(&mut io::stdin().lock(), "standard input")?,
    };
    let trainer = ClassifierTrainer::new(Arc::clone(&model), Arc::clone(&classifier.layout), Precision::F32)?;
    let mut out = io::stdout().lock();
    for chunk in lines.chunks(PREDICTED_TOGETHER) {
        let encode = |line: &Line| model.tokenizer().encode(&line.text, classifier.length_max);
        let ids: Vec<Vec<u32>> = chunk.iter().map(encode).collect();
        let ids: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
        for row in trainer.predict(&classifier.values, &ids)?.chunks_exact(labels.len()) {
            let probabilities = labels.iter().map(String::as_str).zip(row.iter().copied()).collect();
            let predicted = Predicted { label: &labels[likeliest(row)], probabilities };
            writeln!(out, "{}", serde_json::to_string(&predicted)?)?;
        }
    }
    Ok(())
}

fn export(args: &ExportArgs) -> Result<()> {
    refuse_existing(&args.out)?;
    let (model, classifier) = open(&args.with)?;
    let files = to_peft(&classifier, &model.config().name)?;
    write_peft_dir(&files, &args.out).with_context(|| format!("--out: {}", args.out.display()))?;
    println!("{}", args.out.display());
    Ok(())
}

fn quantize(args: &QuantizeArgs) -> Result<()> {
    refuse_existing(&args.out)?;
    let format = WeightFormat::from_name(&args.format)
        .with_context(|| format!("--format: {:?} is no format of weights", args.format))?;
    let model = open_model(&args.model)?.in_format(format)?;
    let context = || format!("--out: {}", args.out.display());
    let mut file = io::BufWriter::new(fs::File::create(&args.out).with_context(context)?);
    model.write_gguf(&Metadata::default(), &mut file).with_context(context)?;
    file.flush().with_context(context)?;
    println!("{}", args.out.display());
    Ok(())
}

fn refuse_existing(path: &Path) -> Result<()> {
    ensure!(!path.exists(), "--out: {} is there already", path.display());
    Ok(())
}

fn open_model(path: &Path) -> Result<EncoderModel> {
    EncoderModel::open(path).with_context(|| format!("model {}", path.display()))
}

fn open(args: &ClassifierArgs) -> Result<(Arc<EncoderModel>, Classifier)> {
    let model = open_model(&args.model)?;
    let context = || format!("classifier {}", args.classifier.display());
    let classifier = if args.classifier.is_dir() {
        from_peft(&read_peft_dir(&args.classifier).with_context(context)?, &model)
    } else {
        Classifier::from_checkpoint_bytes(&model, &fs::read(&args.classifier).with_context(context)?)
    };
    Ok((Arc::new(model), classifier.with_context(context)?))
}

/// Each line as ids and class; a line without one of the labels is refused by its number.
fn examples(
    model: &EncoderModel,
    lines: &[Line],
    path: &Path,
    labels: &[String],
    length_max: usize,
) -> Result<Vec<Example>> {
    let most = model.config().positions;
    ensure!((2..=most).contains(&length_max), "--length-max: {length_max} is not in 2..={most}");
    let example = |line: &Line| -> Result<Example> {
        let class = labelled(line, path, labels)?;
        Ok(Example { ids: model.tokenizer().encode(&line.text, length_max), class })
    };
    lines.iter().map(example).collect()
}

fn cpu_seconds() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}
