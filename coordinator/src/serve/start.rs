//! From configuration and store to a core that goes on where the last one stopped.

use super::{ServeError, clock, shell::Shell};
use crate::{
    Core, CoreSetup, TaskProgress,
    config::{Config, ConfigError, TaskConfig},
    store::{Store, StoredProgress},
};
use fleetune_model::{base::BaseModel, error::AdapterError, trained::TrainedLayout};
use fleetune_proto::Digest;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

type Bases = BTreeMap<PathBuf, (Arc<BaseModel>, Digest)>;

pub(super) async fn shell(config: &Config) -> Result<Shell, ServeError> {
    let store = Store::open(&config.storage, &config.population).await?;
    config.check_registrars()?;
    let mut core = Core::new(setup(config)?);
    for release in store.releases().await? {
        core.restore_release(release)?;
    }
    let mut bases = Bases::new();
    for task in &config.tasks {
        let (base, digest) = match bases.get(&task.base_model) {
            Some(opened) => opened.clone(),
            None => bases.entry(task.base_model.clone()).or_insert(open_base(&task.base_model)?).clone(),
        };
        add_task(&mut core, &store, task, base, digest).await?;
    }
    let files = bases.into_iter().map(|(path, (_, digest))| (digest, path)).collect();
    Ok(Shell::new(core, store, files, &config.listen))
}

async fn add_task(
    core: &mut Core,
    store: &Store,
    task: &TaskConfig,
    base: Arc<BaseModel>,
    digest: Digest,
) -> Result<(), ServeError> {
    let now = clock::now();
    let stored = store.task(task.name()).await?;
    let created = stored.as_ref().map_or(now, |stored| stored.created);
    let spec = task.spec(created);
    let (rounds, name) = (spec.rounds, spec.name.clone());
    let resume = match stored.and_then(|stored| stored.progress) {
        Some(progress) => {
            let layout = TrainedLayout::new(&base, &spec.trained)
                .map_err(|source| ServeError::Resume { task: name.clone(), source })?;
            tracing::info!(task = %name, round = progress.round, checkpoint = %progress.checkpoint, "task resumes");
            let adapter = read_checkpoint(store, &progress, &layout)?;
            let adapter = adapter.map_err(|source| ServeError::Resume { task: name.clone(), source })?;
            Some(read_progress(store, &progress, adapter)?)
        }
        None => None,
    };
    core.add_task(spec, base, digest, resume, now)?;
    store.begin_task(&name, rounds, created).await?;
    Ok(())
}

fn read_checkpoint(
    store: &Store,
    progress: &StoredProgress,
    layout: &TrainedLayout,
) -> Result<Result<Vec<f32>, AdapterError>, ServeError> {
    let bytes = store.blobs().read(&progress.checkpoint)?;
    Ok(layout.values_from_checkpoint(&bytes))
}

fn read_progress(
    store: &Store,
    progress: &StoredProgress,
    adapter: Vec<f32>,
) -> Result<TaskProgress, ServeError> {
    let optimizer = store.blobs().read(&progress.optimizer)?;
    let values = optimizer.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    let (round, attempt) = (progress.round, progress.attempt);
    #[expect(clippy::cast_possible_truncation, reason = "it was an f32")]
    let clipping_norm = progress.clipping_norm.map(|norm| norm as f32);
    let optimizer_state = values.collect();
    let protection = progress.protection.clone();
    Ok(TaskProgress { round, attempt, adapter, optimizer_state, clipping_norm, protection })
}

fn open_base(path: &Path) -> Result<(Arc<BaseModel>, Digest), ServeError> {
    let metadata =
        std::fs::metadata(path).map_err(|source| ServeError::Read { path: path.to_owned(), source })?;
    if metadata.is_dir() {
        let source =
            std::io::Error::new(std::io::ErrorKind::IsADirectory, "devices read one GGUF file, not a folder");
        return Err(ServeError::Read { path: path.to_owned(), source });
    }
    let base = BaseModel::open(path).map_err(|source| ServeError::Base { path: path.to_owned(), source })?;
    let digest = Digest { sha256: base.sha256, size: metadata.len() };
    Ok((Arc::new(base), digest))
}

fn setup(config: &Config) -> Result<CoreSetup, ConfigError> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| ConfigError::Setting {
        path: PathBuf::new(),
        setting: "system".into(),
        problem: format!("no randomness: {error}"),
    })?;
    Ok(CoreSetup {
        population: config.population.clone(),
        signing_key: config.signing_key()?,
        pace: config.pace,
        upload_slots: config.upload_slots,
        seed,
        registrars: config.registrars.clone(),
    })
}
