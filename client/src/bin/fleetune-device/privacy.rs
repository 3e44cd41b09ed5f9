//! `fleetune-device privacy`: the device's own ledger, its owner's bounds, and the statement of the release that
//! serves here.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use fleetune_client::privacy_ledger;
use fleetune_client::release::ReleaseSlots;
use fleetune_privacy::{Ledger, PrivacyPolicy, PrivacyStatement, Purpose, spent_epsilon};
use serde::Serialize;

use crate::settings::Settings;

/// Flags of `privacy`.
#[derive(Args)]
pub(crate) struct PrivacyArguments {
    /// The device's directory.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Account {
    required: bool,
    delta: f64,
    epsilon_spent: f64,
    epsilon_max: f64,
    epsilon_task_max: f64,
    /// Masked contributions to tasks without differential privacy: nothing bounds what they gave away.
    contributions_without_privacy: u64,
    purposes: Vec<PurposeAccount>,
    tasks: Vec<TaskAccount>,
    release_version: Option<u64>,
    /// As it was signed with the release; null for releases of earlier versions.
    release_statement: Option<PrivacyStatement>,
    release_statement_in_words: Option<String>,
}

#[derive(Serialize)]
struct PurposeAccount {
    purpose: Purpose,
    epsilon_spent: f64,
    epsilon_max: f64,
}

#[derive(Serialize)]
struct TaskAccount {
    purpose: Purpose,
    participations: u32,
    participations_max: u32,
    last_unix_ms: u64,
}

/// Prints the account; takes no hold of the directory, so it works while the device runs.
pub(crate) fn privacy(arguments: &PrivacyArguments) -> Result<()> {
    ensure!(arguments.state.is_dir(), "no state directory {}", arguments.state.display());
    let account = read(arguments)?;
    let mut out = io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string(&account)?)?;
    } else {
        print(&account, &mut out)?;
    }
    Ok(())
}

fn read(arguments: &PrivacyArguments) -> Result<Account> {
    let policy = Settings::load(&arguments.state)?.privacy.policy()?;
    let ledger = privacy_ledger(&arguments.state)?;
    let slots = ReleaseSlots::open(&arguments.state)?;
    let release_version = slots.versions().active;
    let manifest = release_version.map(|version| slots.manifest(version)).transpose()?;
    let statement = manifest.as_ref().map(|manifest| manifest.privacy_statement_json.as_str());
    let statement = statement.filter(|json| !json.is_empty()).map(PrivacyStatement::from_json).transpose();
    Ok(Account {
        release_version,
        release_statement: statement.context("the release's privacy statement")?,
        release_statement_in_words: manifest.map(|manifest| manifest.privacy_statement),
        ..account(&ledger, &policy)
    })
}

fn account(ledger: &Ledger, policy: &PrivacyPolicy) -> Account {
    let purposes = Purpose::ALL.iter().zip(policy.epsilon_purpose_max).map(|(purpose, epsilon_max)| {
        let epsilon_spent = spent_epsilon(ledger.spent(*purpose), policy.delta);
        PurposeAccount { purpose: *purpose, epsilon_spent, epsilon_max }
    });
    let tasks = ledger.lines().map(|line| TaskAccount {
        purpose: line.purpose,
        participations: line.participations,
        participations_max: line.participations_max,
        last_unix_ms: line.last_unix_ms,
    });
    Account {
        required: policy.required,
        delta: policy.delta.value(),
        epsilon_spent: spent_epsilon(&ledger.spent_in_all(), policy.delta),
        epsilon_max: policy.epsilon_max,
        epsilon_task_max: policy.epsilon_task_max,
        contributions_without_privacy: ledger.unprotected(),
        purposes: purposes.collect(),
        tasks: tasks.collect(),
        release_version: None,
        release_statement: None,
        release_statement_in_words: None,
    }
}

fn print(account: &Account, out: &mut impl Write) -> io::Result<()> {
    let Account { epsilon_spent, epsilon_max, epsilon_task_max, delta, .. } = account;
    writeln!(
        out,
        "given away  epsilon {epsilon_spent:.3} of {epsilon_max} at delta {delta:e}, over its life"
    )?;
    for PurposeAccount { purpose, epsilon_spent, epsilon_max } in &account.purposes {
        writeln!(out, "  {:<11}{epsilon_spent:.3} of {epsilon_max}", purpose.word())?;
    }
    for task in &account.tasks {
        let (taken, max) = (task.participations, task.participations_max);
        let at = task.last_unix_ms;
        writeln!(out, "  a task    {taken} of {max} contributions, the last {at} ms since 1970")?;
    }
    if account.contributions_without_privacy > 0 {
        let count = account.contributions_without_privacy;
        writeln!(
            out,
            "  and {count} masked contributions without differential privacy, which nothing bounds"
        )?;
    }
    let required = if account.required {
        "takes part only with differential privacy"
    } else {
        "takes part without it too"
    };
    writeln!(out, "allows      epsilon {epsilon_task_max} a task; {required}")?;
    match (account.release_version, &account.release_statement_in_words) {
        (Some(version), Some(words)) => writeln!(out, "release {version}   {words}"),
        _ => writeln!(out, "release     none"),
    }
}
