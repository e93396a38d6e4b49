//! The layers of ARCHITECTURE.md, held against what cargo says: dependencies point downward only,
//! and each package uses no more of the workspace than its row allows.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Package, and what of the workspace it may use; lowest layer first. Every package of the
/// workspace must have a row, and a row may name only packages above it in this list.
const LAYERS: &[(&str, &[&str])] = &[
    ("abi", &[]),
    ("programs", &["abi"]),
    ("guest", &["abi", "programs"]),
    // Its build script compiles the sources of `programs` and `guest` for guests: a dependency
    // that cargo does not see, and downward too.
    ("images", &[]),
    ("engine-core", &["abi"]),
    ("bt", &["engine-core"]),
    ("kvm", &["engine-core"]),
    // Its build script compiles monitor and stub with the source of the ABI.
    ("pv", &["abi", "engine-core"]),
    // The binary `trapline` embeds the images, and knows workloads for `--workload`.
    (
        "engines",
        &[
            "abi",
            "programs",
            "images",
            "engine-core",
            "bt",
            "kvm",
            "pv",
        ],
    ),
    ("reports-data", &[]),
    ("reports", &["reports-data"]),
    // Of `engines` it reads the registry of modes; it runs them as processes.
    (
        "benches",
        &["abi", "programs", "images", "engines", "reports-data"],
    ),
    // Spawns everything else.
    ("xtask", &["reports", "reports-data"]),
];

/// Packages that may use more in their tests, which are programs of their own.
const TESTS_MAY_ALSO_USE: &[(&str, &[&str])] = &[
    ("images", &["abi", "programs"]),
    ("bt", &["images", "programs"]),
    // Times a translator by itself, through the registry.
    ("benches", &["engine-core"]),
    // Itself, with the feature that lets tests remove defences.
    ("pv", &["images", "programs", "pv"]),
];

/// Packages of other people that only one crate may use: the measuring crate's clock and bars,
/// the reader of csv, the way into the host's kernel.
const CONFINED: &[(&str, &[&str])] = &[
    ("criterion", &["benches"]),
    ("csv", &["reports-data"]),
    ("kvm-ioctls", &["kvm"]),
    ("kvm-bindings", &["kvm"]),
    ("dynasmrt", &["bt"]),
    ("plotters", &["reports"]),
    ("maud", &["reports"]),
];

/// Normal and build dependencies of every package of the workspace, and those of its tests alone.
struct Workspace {
    uses: BTreeMap<String, BTreeSet<String>>,
    tests_use: BTreeMap<String, BTreeSet<String>>,
}

fn workspace() -> Workspace {
    let metadata = MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata");
    let mut uses = BTreeMap::new();
    let mut tests_use = BTreeMap::new();
    for package in &metadata.packages {
        let names = |tests: bool| -> BTreeSet<String> {
            package
                .dependencies
                .iter()
                .filter(|dependency| (dependency.kind == DependencyKind::Development) == tests)
                .map(|dependency| dependency.name.clone())
                .collect()
        };
        uses.insert(package.name.to_string(), names(false));
        tests_use.insert(package.name.to_string(), names(true));
    }
    Workspace { uses, tests_use }
}

fn allowed(rows: &[(&str, &[&str])], package: &str) -> BTreeSet<String> {
    rows.iter()
        .filter(|(name, _)| *name == package)
        .flat_map(|(_, allowed)| allowed.iter().map(|name| (*name).to_owned()))
        .collect()
}

#[test]
fn rows_point_downward_and_cover_the_workspace() {
    let mut below = BTreeSet::new();
    for (package, allowed) in LAYERS {
        for name in *allowed {
            assert!(below.contains(name), "{package} -> {name} is not downward");
        }
        assert!(below.insert(*package), "{package} has two rows");
    }
    let packages: BTreeSet<String> = workspace().uses.into_keys().collect();
    let rows: BTreeSet<String> = below.into_iter().map(str::to_owned).collect();
    assert_eq!(packages, rows, "packages of the workspace and rows differ");
}

#[test]
fn packages_use_only_what_their_layer_allows() {
    let workspace = workspace();
    for (package, uses) in &workspace.uses {
        let ours: BTreeSet<String> = uses
            .iter()
            .filter(|name| workspace.uses.contains_key(*name))
            .cloned()
            .collect();
        let allowed = allowed(LAYERS, package);
        let beyond: Vec<&String> = ours.difference(&allowed).collect();
        assert!(beyond.is_empty(), "{package} may not use {beyond:?}");
    }
}

#[test]
fn tests_use_only_what_their_layer_allows() {
    let workspace = workspace();
    for (package, uses) in &workspace.tests_use {
        let mut allowed_here = allowed(LAYERS, package);
        allowed_here.extend(allowed(TESTS_MAY_ALSO_USE, package));
        // A crate's tests may name the crate itself.
        allowed_here.insert(package.clone());
        let beyond: Vec<&String> = uses
            .iter()
            .filter(|name| workspace.uses.contains_key(*name))
            .filter(|name| !allowed_here.contains(*name))
            .collect();
        assert!(
            beyond.is_empty(),
            "tests of {package} may not use {beyond:?}"
        );
    }
}

#[test]
fn confined_packages_stay_where_they_belong() {
    let workspace = workspace();
    for (package, uses) in workspace.uses.iter().chain(&workspace.tests_use) {
        for (confined, owners) in CONFINED {
            assert!(
                !uses.contains(*confined) || owners.contains(&package.as_str()),
                "{package} may not use {confined}"
            );
        }
    }
}
