//! What the tests share: the repository's files and the programs built from it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").into()
}

/// A text file of the repository.
pub(crate) fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Files below a folder of the repository with this extension, as paths from the root, in order.
/// Build folders and hidden folders are passed over.
pub(crate) fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    collect(&root().join(folder), extension, &mut found);
    found.sort();
    found.iter().map(|path| path.strip_prefix(root()).expect("below the root").into()).collect()
}

/// A program of the workspace. `cargo test` builds no programs of other packages, so they must be
/// there already: `cargo build --bins`.
pub(crate) fn program(name: &str) -> PathBuf {
    let test = env::current_exe().expect("the test's own path");
    let built = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST").join(name);
    assert!(
        built.exists(),
        "{} is not built: run `cargo build --bins` first, as tests/run does",
        built.display()
    );
    built
}

/// Standard output of a command that must succeed, run in the repository.
pub(crate) fn output(command: &mut Command) -> String {
    let output = command.current_dir(root()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{errors}", output.status);
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The cargo that runs these tests, kept off the network.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).arg("--offline");
    command
}

/// Holds `actual` against a golden file; `FLEETUNE_UPDATE_GOLDEN=1` writes it instead.
pub(crate) fn check_golden(name: &str, actual: &str) {
    let path = Path::new("tests/golden").join(name);
    if env::var_os("FLEETUNE_UPDATE_GOLDEN").is_some() {
        fs::write(root().join(&path), actual).expect("the golden file can be written");
    }
    assert!(
        read(&path) == actual,
        "{} differs; look at the change and write it with FLEETUNE_UPDATE_GOLDEN=1:\n{actual}",
        path.display()
    );
}

fn collect(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for entry in entries {
        let path = entry.expect("a readable folder").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && !name.starts_with('.') && name != "target" {
            collect(&path, extension, found);
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
}
