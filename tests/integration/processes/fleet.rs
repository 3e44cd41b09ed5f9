//! A folder with a coordinator's configuration and devices' data, and the processes in it.

use crate::support::{program, root};
use ed25519_dalek::SigningKey;
use fleetune_client::data::{Dataset, Group, UserData};
use fleetune_secagg::{Certificate, Identity, Registrars};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(180);

/// A process that is killed (SIGKILL) when it is dropped.
pub(super) struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Polls until it holds; fails loudly when it does not in time.
#[expect(clippy::disallowed_methods, reason = "real processes take real time")]
pub(super) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "after {PATIENCE:?}, still not: {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// How the site's task adds updates up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Aggregation {
    Secure,
    /// With differential privacy; a device takes part twice at most.
    Private,
    InsecurePlaintext,
}

pub(super) struct Site {
    folder: TempDir,
    public_key: String,
    registrar_key: String,
    aggregation: Aggregation,
}

impl Site {
    /// Data for `users` devices, and a coordinator's configuration with one task on the embedded base.
    pub(super) fn new(users: usize, round: &str, rounds: u32, steps: u32) -> Self {
        Self::with(Aggregation::Secure, users, round, rounds, steps)
    }

    /// The same with differential privacy.
    pub(super) fn private(users: usize, round: &str, rounds: u32, steps: u32) -> Self {
        Self::with(Aggregation::Private, users, round, rounds, steps)
    }

    /// The same without secure aggregation.
    pub(super) fn insecure(users: usize, round: &str, rounds: u32, steps: u32) -> Self {
        Self::with(Aggregation::InsecurePlaintext, users, round, rounds, steps)
    }

    fn with(aggregation: Aggregation, users: usize, round: &str, rounds: u32, steps: u32) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        fs::copy(root().join("sim/base/fleetune-base.q8_0.gguf"), path("base.gguf"))
            .expect("the embedded base");
        let public_key = keygen(&path("key.pem"));
        let registrar_key = keygen(&path("registrar.pem"));
        let config = config(aggregation, &registrar_key, round, rounds, steps);
        fs::write(path("coordinator.toml"), config).expect("a configuration");
        write_data(&folder, users);
        Self { folder, public_key, registrar_key, aggregation }
    }

    /// The coordinator's signing key, which devices trust; hex.
    pub(super) fn public_key(&self) -> &str {
        &self.public_key
    }

    /// Who certifies the site's devices.
    pub(super) fn registrars(&self) -> Registrars {
        let key = hex::decode(&self.registrar_key).expect("hex").try_into().expect("32 bytes");
        Registrars::from_keys(&[key]).expect("a sound key")
    }

    /// A registered identity that no process of the site has.
    pub(super) fn identity(&self, number: u8) -> Identity {
        let key = SigningKey::from_bytes(&[number; 32]);
        let certificate = self.certify(&hex::encode(key.verifying_key().to_bytes()));
        let certificate = Certificate::from_bytes(&hex::decode(certificate).expect("hex"));
        Identity::new(key, certificate.expect("a certificate")).expect("its own certificate")
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The users as the simulator reads them.
    pub(super) fn dataset(&self) -> PathBuf {
        self.path("all.jsonl")
    }

    /// Starts the coordinator and waits until it listens; started again, on the address of before.
    pub(super) fn coordinator(&self) -> Running {
        let address = fs::read_to_string(self.path("address")).unwrap_or_else(|_| "127.0.0.1:0".to_owned());
        let _ = fs::remove_file(self.path("address"));
        let child = self.serve(address.trim()).spawn().expect("the coordinator starts");
        let running = Running(child);
        wait_until("the coordinator listens", || {
            fs::read_to_string(self.path("address")).is_ok_and(|a| a.contains(':'))
        });
        running
    }

    /// What a coordinator says that cannot start.
    pub(super) fn coordinator_error(&self) -> String {
        let output = self.serve("127.0.0.1:0").stderr(Stdio::piped()).output().expect("the coordinator runs");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    fn serve(&self, address: &str) -> Command {
        let mut command = Command::new(program("fleetune-coordinator"));
        command.arg("serve").arg("--config").arg(self.path("coordinator.toml"));
        command.args(["--listen", address, "--ready-file"]).arg(self.path("address"));
        command.stdout(Stdio::null()).stderr(self.log("coordinator"));
        command
    }

    /// Starts a device; its log begins anew.
    pub(super) fn device(&self, user: usize, seed: &str) -> Running {
        let mut command = self.device_command(user, seed);
        Running(command.stderr(self.log(&format!("device-{user}"))).spawn().expect("the device starts"))
    }

    /// What a device says that cannot start.
    pub(super) fn device_error(&self, user: usize) -> String {
        fs::write(self.path("address"), "127.0.0.1:9").expect("an address");
        let output =
            self.device_command(user, &"00".repeat(32)).stderr(Stdio::piped()).output().expect("runs");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    fn device_command(&self, user: usize, seed: &str) -> Command {
        let address = fs::read_to_string(self.path("address")).expect("the coordinator listens");
        let mut command = Command::new(program("fleetune-device"));
        command.args(["run", "--coordinator", &format!("http://{}", address.trim())]);
        command.arg("--data").arg(self.path(&format!("user-{user}.jsonl")));
        command.arg("--state").arg(self.path(&format!("state-{user}")));
        command.args(["--population", "test", "--trust-key", &self.public_key, "--device-seed", seed]);
        match self.aggregation {
            Aggregation::InsecurePlaintext => {
                command.arg("--insecure-allow-plaintext-aggregation");
            }
            Aggregation::Secure | Aggregation::Private => {
                let state = self.path(&format!("state-{user}"));
                let mut identity = Command::new(program("fleetune-device"));
                let public_key = printed(identity.args(["identity", "--state"]).arg(state));
                command.args(["--registrar", &self.registrar_key]);
                command.args(["--certificate", &self.certify(public_key.trim())]);
            }
        }
        command.stdout(Stdio::null());
        command
    }

    /// What the registrar writes for a device's public key; both in hex.
    fn certify(&self, public_key: &str) -> String {
        let mut command = Command::new(program("fleetune-device"));
        command.args(["certify", "--population", "test", "--public-key", public_key, "--registrar-key"]);
        printed(command.arg(self.path("registrar.pem"))).trim().to_owned()
    }

    fn log(&self, name: &str) -> File {
        File::create(self.path(&format!("{name}.log"))).expect("a log file")
    }

    pub(super) fn device_log(&self, user: usize) -> String {
        fs::read_to_string(self.path(&format!("device-{user}.log"))).unwrap_or_default()
    }

    pub(super) fn coordinator_log(&self) -> String {
        fs::read_to_string(self.path("coordinator.log")).unwrap_or_default()
    }

    /// `fleetune-coordinator status --json`.
    pub(super) fn status(&self) -> Value {
        let mut command = Command::new(program("fleetune-coordinator"));
        command.args(["status", "--json", "--config"]).arg(self.path("coordinator.toml"));
        json_of(&mut command)
    }

    /// The task's next round.
    pub(super) fn round(&self) -> u64 {
        self.status()["tasks"][0]["round"].as_u64().unwrap_or(0)
    }

    /// `fleetune-device privacy --json`.
    pub(super) fn device_privacy(&self, user: usize) -> Value {
        let mut command = Command::new(program("fleetune-device"));
        command.args(["privacy", "--json", "--state"]).arg(self.path(&format!("state-{user}")));
        json_of(&mut command)
    }

    /// `fleetune-device status --json`; null before the device has a state.
    pub(super) fn device_status(&self, user: usize) -> Value {
        let mut command = Command::new(program("fleetune-device"));
        command.args(["status", "--json", "--state"]).arg(self.path(&format!("state-{user}")));
        json_of(&mut command)
    }

    /// The step of secure aggregation whose message is on a device's disk, from 1; 0 for none.
    pub(super) fn kept_step(&self, user: usize) -> u64 {
        let record = fs::read(self.path(&format!("state-{user}/aggregation"))).unwrap_or_default();
        // The record begins with a checksum.
        let session =
            field(record.get(32..).unwrap_or_default(), SESSION).map_or(&[][..], |(_, bytes)| bytes);
        field(session, STEP).map_or(0, |(number, _)| number)
    }

    pub(super) fn generate(&self, user: usize, prompt: &str) -> String {
        let mut command = Command::new(program("fleetune-device"));
        command.args(["generate", "--prompt", prompt, "--max-tokens", "8", "--state"]);
        let output = command.arg(self.path(&format!("state-{user}"))).output().expect("generate");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    }
}

/// Fields of a device's record: the session, a message, and its step, a number.
const SESSION: u64 = 2;
const STEP: u64 = 8;

/// A field of a protocol buffers message: its number, or its length and bytes.
fn field(mut message: &[u8], wanted: u64) -> Option<(u64, &[u8])> {
    while !message.is_empty() {
        let (tag, value) = (varint(&mut message)?, varint(&mut message)?);
        let length = if tag & 7 == 2 { usize::try_from(value).ok()? } else { 0 };
        let (bytes, rest) = message.split_at_checked(length)?;
        if tag >> 3 == wanted {
            return Some((value, bytes));
        }
        message = rest;
    }
    None
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let length = message.iter().position(|byte| byte & 0x80 == 0)? + 1;
    let (bytes, rest) = message.split_at(length);
    *message = rest;
    Some(bytes.iter().rev().fold(0, |value, byte| value << 7 | u64::from(byte & 0x7f)))
}

fn json_of(command: &mut Command) -> Value {
    let output = command.output().expect("the program runs");
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

/// Makes a key and gives its public half in hex: the first word of 64 hexadecimal digits.
fn keygen(path: &Path) -> String {
    let mut command = Command::new(program("fleetune-coordinator"));
    let printed = printed(command.args(["keygen", "--out"]).arg(path));
    let is_key = |word: &&str| word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit());
    printed.split_whitespace().find(is_key).expect("a public key").to_owned()
}

fn printed(command: &mut Command) -> String {
    let output = command.output().expect("the program runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn config(aggregation: Aggregation, registrar: &str, round: &str, rounds: u32, steps: u32) -> String {
    let protocol = match aggregation {
        Aggregation::Secure => "",
        Aggregation::Private => "cohort_max = 8\n[task.privacy]\nenabled = true\nparticipations_max = 2",
        Aggregation::InsecurePlaintext => "protocol = \"insecure_plaintext\"\nsummands_min = 2",
    };
    format!(
        r#"
population = "test"
signing_key_file = "key.pem"
registrars = ["{registrar}"]
[pace]
soon_ms = 200
idle_ms_min = 500
idle_ms_max = 1000
[[task]]
name = "lora"
base_model = "base.gguf"
rounds = {rounds}
[task.adapter]
rank = 8
alpha = 16.0
targets = ["q", "k", "v", "o", "gate", "up", "down"]
init_seed = 5
[task.training]
steps = {steps}
batch_size = 2
block_tokens = 32
learning_rate = 5e-3
learning_rate_final_fraction = 0.15
[task.aggregation]
summands_max = 8
{protocol}
[task.round]
selection_ms = 4000
{round}
"#
    )
}

/// One file a device, one with all users for the simulator, and a held-out user.
fn write_data(folder: &TempDir, users: usize) {
    let roles = root().join("sim/data/shakespeare_roles_cap400.jsonl.gz");
    let roles = Dataset::load(&roles).expect("the roles");
    let mut chosen: Vec<UserData> = roles.group(Group::Train).take(users).cloned().collect();
    let mut all = String::new();
    for (index, user) in chosen.iter().enumerate() {
        let line = record(user, "train");
        fs::write(folder.path().join(format!("user-{index}.jsonl")), format!("{line}\n")).expect("data");
        all.push_str(&format!("{line}\n"));
    }
    chosen.extend(roles.group(Group::HeldOut).take(1).cloned());
    all.push_str(&format!("{}\n", record(chosen.last().expect("a held-out user"), "heldout")));
    fs::write(folder.path().join("all.jsonl"), all).expect("data");
}

fn record(user: &UserData, group: &str) -> String {
    json!({"user": user.user, "group": group, "train": user.train, "val": user.val, "test": user.test})
        .to_string()
}
