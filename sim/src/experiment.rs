//! What a run works on: the base model, the users' blocks, and the fixed blocks that every model
//! of the run is evaluated on.

use crate::scenario::Scenario;
use anyhow::{Context, Result, ensure};
use fleetune_client::data::{self, Dataset, Group, UserData};
use fleetune_model::{base::BaseModel, trained::TrainedLayout};
use fleetune_proto::Digest;
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use std::{path::Path, sync::Arc};

/// The embedded base model: Q8_0, trained by `fleetune-sim pretrain`; see `sim/base/README.md`.
pub const EMBEDDED_BASE: &[u8] = include_bytes!("../base/fleetune-base.q8_0.gguf");
/// The embedded data: the roles of Shakespeare; see `sim/data/README.md`.
pub const EMBEDDED_DATA: &[u8] = include_bytes!("../data/shakespeare_roles_cap400.jsonl.gz");
const EMBEDDED_DATA_NAME: &str = "shakespeare_roles_cap400.jsonl.gz";
/// Fixed blocks of the roles under SmolLM2's tokenizer, on which the reference figures were taken.
const REFERENCE_BLOCKS: &[u8] = include_bytes!("../data/smollm2_eval_blocks.json");
/// SHA-256 of the model file that those blocks are for.
const REFERENCE_MODEL: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// One device's user.
#[derive(Debug, Clone)]
pub struct User {
    /// As the data names it.
    pub name: String,
    /// Blocks to train on.
    pub train: Arc<Vec<Vec<u32>>>,
    /// Blocks of its own test text.
    pub test: Vec<Vec<u32>>,
}

/// What a run works on.
pub struct Experiment {
    /// The base model.
    pub base: Arc<BaseModel>,
    /// Its file's address.
    pub base_digest: Digest,
    /// True if the base was made for this run, with random weights.
    pub fresh: bool,
    /// The layout of what is trained.
    pub layout: TrainedLayout,
    /// File name of the data.
    pub data_name: String,
    /// Content address of the data.
    pub data_sha256: [u8; 32],
    /// Users with enough text to train.
    pub users: Vec<User>,
    /// Number of users never trained on.
    pub heldout_users: usize,
    /// Evaluation blocks of seen users.
    pub eval_blocks: Arc<Vec<Vec<u32>>>,
    /// Evaluation blocks of held-out users.
    pub heldout_blocks: Arc<Vec<Vec<u32>>>,
    /// True if the blocks are the fixed ones of the reference figures.
    pub reference_blocks: bool,
}

impl Experiment {
    /// Opens model and data and cuts the blocks.
    pub fn open(scenario: &Scenario, model: Option<&Path>, data: Option<&Path>, seed: u64) -> Result<Self> {
        let (mut base, mut base_digest) = open_base(model)?;
        if scenario.model.fresh {
            (base, base_digest) = scenario.model.fresh(&base, seed)?;
        }
        let (data_name, dataset) = open_data(data)?;
        let layout =
            TrainedLayout::new(&base, &scenario.trained(seed)?).context("what the scenario trains")?;
        let block_tokens = scenario.training.block_tokens as usize;
        ensure!(
            block_tokens < base.config.context_length,
            "training.block_tokens: {block_tokens}; the model's context has {}",
            base.config.context_length
        );
        let cut = |user: &UserData| cut_user(&base, user, block_tokens);
        let users: Vec<User> = dataset
            .group(Group::Train)
            .map(cut)
            .filter(|user| user.train.len() >= scenario.fleet.blocks_min)
            .collect();
        ensure!(
            users.len() >= scenario.fleet.cohort as usize,
            "{data_name}: {} users have {} blocks of {block_tokens} tokens or more; a cohort takes {}",
            users.len(),
            scenario.fleet.blocks_min,
            scenario.fleet.cohort
        );
        let fixed = reference_blocks(&base_digest, model.is_some() && data.is_none(), block_tokens)?;
        let reference_blocks = fixed.is_some();
        let (eval, heldout) = fixed.map_or_else(|| choose_blocks(&base, &dataset, scenario, seed), Ok)?;
        Ok(Self {
            base,
            base_digest,
            fresh: scenario.model.fresh,
            layout,
            data_name,
            data_sha256: dataset.sha256,
            users,
            heldout_users: dataset.group(Group::HeldOut).count(),
            eval_blocks: Arc::new(eval),
            heldout_blocks: Arc::new(heldout),
            reference_blocks,
        })
    }
}

fn open_base(path: Option<&Path>) -> Result<(Arc<BaseModel>, Digest)> {
    let Some(path) = path else {
        let base = BaseModel::from_gguf_bytes(EMBEDDED_BASE).context("the embedded base model")?;
        return Ok((Arc::new(base), Digest::of(EMBEDDED_BASE)));
    };
    let base = BaseModel::open(path).with_context(|| format!("model {}", path.display()))?;
    let size = std::fs::metadata(path).with_context(|| format!("model {}", path.display()))?.len();
    let digest = Digest { sha256: base.sha256, size };
    Ok((Arc::new(base), digest))
}

fn open_data(path: Option<&Path>) -> Result<(String, Dataset)> {
    let Some(path) = path else {
        return Ok((
            EMBEDDED_DATA_NAME.into(),
            Dataset::from_jsonl_bytes(EMBEDDED_DATA_NAME, EMBEDDED_DATA)?,
        ));
    };
    let name =
        path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into());
    let mut dataset = Dataset::load(path)?;
    hold_out(&mut dataset);
    Ok((name, dataset))
}

/// Holds a tenth of the users out, by the hash of their names, where the data marks none.
fn hold_out(dataset: &mut Dataset) {
    if dataset.group(Group::HeldOut).next().is_some() {
        return;
    }
    for user in &mut dataset.users {
        if Digest::of(user.user.as_bytes())
            .sha256
            .iter()
            .fold(0, |rest, byte| (rest * 256 + u32::from(*byte)) % 10)
            == 0
        {
            user.group = Group::HeldOut;
        }
    }
}

fn cut_user(base: &BaseModel, user: &UserData, block_tokens: usize) -> User {
    User {
        name: user.user.clone(),
        train: Arc::new(data::blocks(&base.tokenizer, &user.train, block_tokens)),
        test: data::blocks(&base.tokenizer, &user.test, block_tokens),
    }
}

type TwoGroups = (Vec<Vec<u32>>, Vec<Vec<u32>>);

#[derive(Deserialize)]
struct ReferenceBlocks {
    seen: Vec<ReferenceBlock>,
    heldout: Vec<ReferenceBlock>,
}

#[derive(Deserialize)]
struct ReferenceBlock {
    ids: Vec<u32>,
}

/// The fixed blocks, if this run is one that the reference figures speak of.
fn reference_blocks(base: &Digest, roles: bool, block_tokens: usize) -> Result<Option<TwoGroups>> {
    if !roles || base.hex() != REFERENCE_MODEL || block_tokens != 64 {
        return Ok(None);
    }
    let blocks: ReferenceBlocks = serde_json::from_slice(REFERENCE_BLOCKS).context("the reference blocks")?;
    let ids = |blocks: Vec<ReferenceBlock>| blocks.into_iter().map(|block| block.ids).collect();
    Ok(Some((ids(blocks.seen), ids(blocks.heldout))))
}

/// Evaluation blocks of both groups: one block of each user in a seeded order, then a second of
/// each, until there are enough.
fn choose_blocks(base: &BaseModel, dataset: &Dataset, scenario: &Scenario, seed: u64) -> Result<TwoGroups> {
    let (count, tokens) = (scenario.evaluation.blocks, scenario.training.block_tokens as usize);
    let of = |user: &UserData| data::blocks(&base.tokenizer, &user.evaluation_texts(), tokens);
    let group = |group| spread(dataset.group(group).map(of).collect(), count, seed);
    let (seen, heldout) = (group(Group::Train), group(Group::HeldOut));
    ensure!(!seen.is_empty(), "no user that may train has test text to evaluate on");
    ensure!(
        !heldout.is_empty(),
        "no held-out user has text to evaluate on: mark some users \"group\": \"heldout\""
    );
    Ok((seen, heldout))
}

fn spread(mut users: Vec<Vec<Vec<u32>>>, count: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x6576_616c);
    users.shuffle(&mut rng);
    users.iter_mut().for_each(|blocks| blocks.shuffle(&mut rng));
    let deepest = users.iter().map(Vec::len).max().unwrap_or(0);
    let in_turn = (0..deepest).flat_map(|i| users.iter().filter_map(move |blocks| blocks.get(i)));
    in_turn.take(count).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evaluation_blocks_come_from_as_many_users_as_possible() {
        let users: Vec<Vec<Vec<u32>>> = (0..5).map(|u| (0..=u).map(|b| vec![u, b]).collect()).collect();
        let chosen = spread(users.clone(), 5, 1);
        let mut who: Vec<u32> = chosen.iter().map(|block| block[0]).collect();
        who.sort_unstable();
        assert_eq!(who, [0, 1, 2, 3, 4]);
        assert_eq!(spread(users.clone(), 100, 1).len(), 15);
        assert_eq!(spread(users, 5, 1), chosen);
    }
}
