//! The arrows of `docs/architecture.md`, held against the manifests, the dependency trees and the
//! sources.

use super::support::{cargo, files, output, read};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Every package of ours, and those of ours that it may use, in tests too.
const ARROWS: [(&str, &[&str]); 8] = [
    ("fleetune-secagg", &[]),
    ("fleetune-privacy", &[]),
    ("fleetune-model", &[]),
    ("fleetune-proto", &["fleetune-secagg", "fleetune-privacy"]),
    ("fleetune-client", &["fleetune-proto", "fleetune-secagg", "fleetune-privacy", "fleetune-model"]),
    ("fleetune-coordinator", &["fleetune-proto", "fleetune-secagg", "fleetune-privacy", "fleetune-model"]),
    (
        "fleetune-sim",
        &[
            "fleetune-proto",
            "fleetune-secagg",
            "fleetune-privacy",
            "fleetune-model",
            "fleetune-client",
            "fleetune-coordinator",
        ],
    ),
    (
        "fleetune-tests",
        &[
            "fleetune-proto",
            "fleetune-secagg",
            "fleetune-privacy",
            "fleetune-model",
            "fleetune-client",
            "fleetune-coordinator",
            "fleetune-sim",
        ],
    ),
];

/// Families of crates that enter through few packages of ours: the family's name, and the packages.
const DOORS: [(&str, &[&str]); 5] = [
    ("minijinja", &["fleetune-model"]),
    ("burn", &["fleetune-model"]),
    ("sqlx", &["fleetune-coordinator"]),
    ("opendp", &["fleetune-privacy"]),
    ("tonic", &["fleetune-proto", "fleetune-client", "fleetune-coordinator", "fleetune-tests"]),
];

/// Packages of ours that must build without these families, whatever features are on.
const CLOSED: [(&str, &[&str]); 3] = [
    ("fleetune-secagg", &["tonic", "tokio", "hyper", "sqlx", "burn", "opendp"]),
    ("fleetune-privacy", &["tonic", "tokio", "hyper", "sqlx", "burn"]),
    ("fleetune-model", &["tonic", "tokio", "hyper", "sqlx", "opendp"]),
];

#[test]
fn packages_of_ours_use_only_what_the_arrows_allow() {
    let direct = direct_dependencies();
    let known: BTreeSet<&str> = ARROWS.iter().map(|(package, _)| *package).collect();
    let ours: BTreeSet<&str> = direct.keys().map(String::as_str).collect();
    assert_eq!(ours, known, "a package is not in the table of arrows");
    for (package, allowed) in ARROWS {
        for dependency in &direct[package] {
            let refused = known.contains(dependency.as_str()) && !allowed.contains(&dependency.as_str());
            assert!(!refused, "{package} must not depend on {dependency}");
        }
    }
}

#[test]
fn families_enter_only_through_their_doors() {
    for (package, dependencies) in direct_dependencies() {
        for dependency in dependencies {
            for (family, doors) in DOORS {
                let open = doors.contains(&package.as_str());
                assert!(
                    open || !is_of(&dependency, family),
                    "{dependency} enters through {package}; only {doors:?}"
                );
            }
        }
    }
}

#[test]
fn pure_packages_build_without_network_database_and_runtime() {
    for (package, families) in CLOSED {
        let tree = tree(&["-p", package, "--all-features", "--edges", "normal,build"]);
        check_absent(package, &tree, families);
    }
}

#[test]
fn the_protocol_without_its_features_knows_no_transport() {
    let tree = tree(&["-p", "fleetune-proto", "--edges", "normal"]);
    check_absent("fleetune-proto", &tree, &["tonic", "tokio", "hyper", "sqlx", "burn", "opendp"]);
}

#[test]
fn the_protocol_with_all_features_knows_no_database_and_no_engine() {
    let tree = tree(&["-p", "fleetune-proto", "--all-features", "--edges", "normal"]);
    check_absent("fleetune-proto", &tree, &["sqlx", "burn", "opendp"]);
}

#[test]
fn the_coordinator_core_and_the_embedded_client_build_without_tonic() {
    for package in ["fleetune-coordinator", "fleetune-client"] {
        let tree = tree(&["-p", package, "--no-default-features", "--edges", "normal"]);
        check_absent(package, &tree, &["tonic", "tokio", "hyper", "sqlx"]);
    }
}

/// Noise that a seed repeats protects nobody: a device's program is built without the feature that has it.
#[test]
fn a_device_cannot_be_built_with_seeded_noise_and_a_simulator_is() {
    let features = |package: &str| {
        let arguments =
            ["tree", "--prefix", "none", "--format", "{p} {f}", "--edges", "normal", "-p", package];
        let shown = output(&mut cargo(&arguments));
        let line = shown.lines().find(|line| line.starts_with("fleetune-privacy")).expect("it is there");
        line.to_owned()
    };
    for package in ["fleetune-client", "fleetune-coordinator", "fleetune-proto"] {
        assert!(!features(package).contains("simulation"), "{}", features(package));
    }
    assert!(features("fleetune-sim").contains("simulation"));
    for path in files("client", "rs").into_iter().chain(files("proto", "rs")) {
        let path = path.display().to_string();
        let seeded = read(&path).lines().any(|line| code(line).contains("NoiseOrigin::simulated"));
        assert!(!seeded, "{path} asks for seeded noise");
    }
}

#[test]
fn sources_name_a_family_only_behind_its_door() {
    let places = [("burn", "model/src/"), ("sqlx", "coordinator/src/store"), ("opendp", "privacy/src/")];
    for path in files(".", "rs") {
        let path = path.display().to_string();
        for (family, place) in places {
            let named = read(&path).lines().any(|line| code(line).contains(&format!("{family}::")));
            assert!(!named || path.starts_with(place), "{path} names {family}; its place is {place}");
        }
    }
}

/// The part of a line before a comment.
fn code(line: &str) -> &str {
    line.split_once("//").map_or(line, |(code, _)| code)
}

/// `burn` and `burn-flex` are of the family `burn`; `burner` is not.
fn is_of(name: &str, family: &str) -> bool {
    name.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

fn check_absent(package: &str, tree: &BTreeSet<String>, families: &[&str]) {
    assert!(tree.contains(package), "cargo tree did not show {package}");
    for family in families {
        let found = tree.iter().find(|name| is_of(name, family));
        assert!(found.is_none(), "{package} depends on {}", found.expect("just looked"));
    }
}

/// Every package of the workspace with the names of what its manifest asks for, of any kind.
fn direct_dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = output(&mut cargo(&["metadata", "--format-version", "1", "--no-deps"]));
    let metadata: Value = serde_json::from_str(&metadata).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    packages
        .iter()
        .map(|package| (name(package), list(package, "dependencies").map(name).collect()))
        .collect()
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().expect("a list").iter()
}

fn name(value: &Value) -> String {
    value["name"].as_str().expect("a name").into()
}

/// Names of all packages that a `cargo tree` shows.
fn tree(arguments: &[&str]) -> BTreeSet<String> {
    let shown = output(cargo(&["tree", "--prefix", "none", "--format", "{p}"]).args(arguments));
    shown.lines().filter_map(|line| line.split_whitespace().next()).map(Into::into).collect()
}
