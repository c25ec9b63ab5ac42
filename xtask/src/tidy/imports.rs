//! Who may import whom: between crates by cargo's metadata, inside crates by the paths that the source names.

use anyhow::Context;
use serde::Deserialize;

use super::Violation;
use super::text::word_positions;

/// Which of our crates each crate may depend on. `launcher`, `shard`, `router` and `benchmark` never import one
/// another: they meet through argv, environment, gRPC and HTTP.
const ALLOWED_IMPORTS: [(&str, &[&str]); 13] = [
    ("proto", &[]),
    ("hub", &[]),
    ("process", &[]),
    ("kernels", &[]),
    ("backend", &["kernels"]),
    ("models", &["backend", "hub"]),
    ("shard", &["models", "backend", "proto", "hub", "process"]),
    ("router", &["proto", "hub", "process"]),
    ("launcher", &["proto", "hub", "process"]),
    ("benchmark", &["proto", "hub", "process"]),
    ("integration-tests", &["proto"]),
    // Hostile inputs go to whatever reads them.
    ("fuzz", &["backend", "hub", "models", "proto", "router", "shard"]),
    ("xtask", &[]),
];

/// Crates whose tests may use any of our crates: they drive the real programs.
const FREE_DEV_DEPENDENCIES: [&str; 2] = ["integration-tests", "launcher"];

/// A path that may be named only in some places of a part of the tree.
struct Confinement {
    /// First segments of the paths meant.
    names: &'static [&'static str],
    /// Where the rule holds: prefixes of file paths; the empty prefix is the whole tree.
    within: &'static [&'static str],
    /// Where the names may stand nevertheless: prefixes or ends of file paths.
    allowed: &'static [&'static str],
    /// Printed with the violation.
    reason: &'static str,
}

/// The layers inside the crates. An exemption is one more entry in `allowed`, with its reason in a comment beside it.
const CONFINEMENTS: [Confinement; 7] = [
    Confinement {
        names: &["tokio", "tokio_stream", "tonic", "tonic_reflection", "prost", "proto"],
        within: &["shard/"],
        allowed: &["shard/src/server/", "shard/src/main.rs", "shard/tests/"],
        reason: "the engine is one plain thread that knows no wire type; asynchronous code and messages stay in \
                 shard/src/server/ and main.rs",
    },
    Confinement {
        names: &["axum", "tower_http", "hyper"],
        within: &["router/"],
        allowed: &["router/src/server/", "router/src/main.rs", "router/tests/"],
        reason: "HTTP stays in router/src/server/ and main.rs",
    },
    Confinement {
        names: &[
            "axum",
            "hub::Tokenizer",
            "tokenizers",
            "minijinja",
            "crate::server",
            "crate::tokenization",
            "crate::chat_template",
        ],
        within: &["router/src/scheduler"],
        allowed: &[],
        reason: "the scheduler sees no HTTP, no tokenizer and no template",
    },
    Confinement {
        names: &["crate::server"],
        within: &["shard/src/engine", "shard/src/sampling"],
        allowed: &[],
        reason: "in the shard, imports point downwards: server, engine, models, backend",
    },
    Confinement {
        names: &["crate::cpu", "crate::cuda"],
        within: &["shard/backend/src/backend.rs"],
        allowed: &[],
        reason: "the Backend trait names no device",
    },
    Confinement {
        names: &["cudarc"],
        within: &[""],
        allowed: &["shard/backend/src/cuda/", "shard/kernels/"],
        reason: "CUDA stays in backend/src/cuda and the kernels crate",
    },
    Confinement {
        names: &["env::var", "env::var_os", "env::vars", "env::vars_os", "env::set_var", "env::remove_var"],
        within: &[""],
        allowed: &["/args.rs", "/build.rs", "xtask/"],
        reason: "the environment is read by clap in args.rs files only",
    },
];

/// What cargo says about one workspace member.
#[derive(Debug, Deserialize)]
pub(super) struct Package {
    name: String,
    /// Absolute path of its Cargo.toml.
    pub(super) manifest_path: String,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    /// `null` for a normal dependency, else `dev` or `build`.
    kind: Option<String>,
}

/// Reads the output of `cargo metadata --no-deps --format-version 1`.
pub(super) fn parse_metadata(json: &str) -> anyhow::Result<Vec<Package>> {
    #[derive(Deserialize)]
    struct Metadata {
        packages: Vec<Package>,
    }
    Ok(serde_json::from_str::<Metadata>(json).context("cannot read the output of `cargo metadata`")?.packages)
}

/// Dependencies of `package` on workspace members that the table does not allow.
pub(super) fn directions(
    package: &Package,
    members: &[Package],
    path: &str,
    manifest: &str,
) -> Vec<Violation> {
    let Some((_, allowed)) = ALLOWED_IMPORTS.iter().find(|(name, _)| *name == package.name) else {
        let message =
            format!("crate `{}` is in no layer; expected an entry in ALLOWED_IMPORTS", package.name);
        return vec![Violation::new(path, 1, message)];
    };
    let is_free_in_tests = FREE_DEV_DEPENDENCIES.contains(&package.name.as_str());
    package
        .dependencies
        .iter()
        .filter(|dependency| members.iter().any(|member| member.name == dependency.name))
        .filter(|dependency| !allowed.contains(&dependency.name.as_str()))
        .filter(|dependency| !(is_free_in_tests && dependency.kind.as_deref() == Some("dev")))
        .map(|dependency| {
            let expected = if allowed.is_empty() { "none of ours".to_string() } else { allowed.join(", ") };
            let message =
                format!("`{}` depends on `{}`; expected only: {expected}", package.name, dependency.name);
            Violation::new(path, line_of(manifest, &dependency.name), message)
        })
        .collect()
}

fn line_of(manifest: &str, dependency: &str) -> usize {
    manifest
        .lines()
        .position(|line| line.trim_start().split(['.', '=', ' ']).next() == Some(dependency))
        .map_or(1, |index| index + 1)
}

/// Paths that the layer of this file may not name. `code` is source without comments and strings.
pub(super) fn confinements(path: &str, code: &str) -> Vec<Violation> {
    let mut violations = Vec::new();
    for rule in &CONFINEMENTS {
        let is_meant = rule.within.iter().any(|prefix| path.starts_with(prefix));
        let is_allowed = rule.allowed.iter().any(|place| path.starts_with(place) || path.ends_with(place));
        if !is_meant || is_allowed {
            continue;
        }
        for (index, line) in code.lines().enumerate() {
            if let Some(name) = rule.names.iter().find(|name| names_path(line, name)) {
                violations.push(Violation::new(
                    path,
                    index + 1,
                    format!("names `{name}`; expected: {}", rule.reason),
                ));
            }
        }
    }
    violations
}

/// Whether `line` uses the path `name`: a crate as the first segment, a path with `::` as it stands.
fn names_path(line: &str, name: &str) -> bool {
    word_positions(line, name).any(|position| {
        if name.contains("::") {
            return true;
        }
        let before = line[..position].trim_end();
        let after = line[position + name.len()..].trim_start();
        let is_first_segment = match before.strip_suffix("::") {
            // `::tokio` is the crate, `crate::tokio` is a module of ours.
            Some(qualifier) => !qualifier.ends_with(|last: char| last.is_alphanumeric() || last == '_'),
            None => true,
        };
        let begins_path = after.starts_with("::");
        let is_imported =
            (before.ends_with("use") || before.ends_with("use {") || before.ends_with("extern crate"))
                && (after.starts_with(';') || after.starts_with("as ") || after.starts_with(','));
        is_first_segment && (begins_path || is_imported)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(dependencies: &[(&str, &str, &str)]) -> Vec<Package> {
        let mut packages: Vec<serde_json::Value> = ALLOWED_IMPORTS
            .iter()
            .map(|(name, _)| serde_json::json!({"name": name, "manifest_path": "", "dependencies": []}))
            .collect();
        for (package, dependency, kind) in dependencies {
            let kind = if kind.is_empty() { None } else { Some(kind) };
            let index = ALLOWED_IMPORTS.iter().position(|(name, _)| name == package).unwrap();
            packages[index]["dependencies"]
                .as_array_mut()
                .unwrap()
                .push(serde_json::json!({"name": dependency, "kind": kind}));
        }
        parse_metadata(&serde_json::json!({ "packages": packages }).to_string()).unwrap()
    }

    fn broken(dependencies: &[(&str, &str, &str)]) -> Vec<String> {
        let members = metadata(dependencies);
        members
            .iter()
            .flat_map(|package| {
                directions(package, &members, "x/Cargo.toml", "[dependencies]\nhub.workspace = true\n")
            })
            .map(|violation| violation.to_string())
            .collect()
    }

    #[test]
    fn crates_import_downwards_only() {
        assert_eq!(
            broken(&[("router", "proto", ""), ("shard", "models", ""), ("router", "axum", "")]),
            [""; 0]
        );
        assert_eq!(
            broken(&[("proto", "hub", "")]),
            ["x/Cargo.toml:2: `proto` depends on `hub`; expected only: none of ours"]
        );
        assert_eq!(broken(&[("launcher", "router", "")]).len(), 1);
        assert_eq!(broken(&[("models", "proto", "")]).len(), 1);
        assert_eq!(broken(&[("router", "shard", "build")]).len(), 1);
    }

    #[test]
    fn only_tests_that_drive_programs_have_freer_dev_dependencies() {
        assert_eq!(broken(&[("integration-tests", "router", "dev"), ("launcher", "shard", "dev")]), [""; 0]);
        assert_eq!(broken(&[("integration-tests", "router", "")]).len(), 1);
        assert_eq!(broken(&[("router", "shard", "dev")]).len(), 1);
    }

    #[test]
    fn an_unknown_crate_must_be_put_into_a_layer() {
        let json = r#"{"packages": [{"name": "extra", "manifest_path": "", "dependencies": []}]}"#;
        let members = parse_metadata(json).unwrap();
        let violations = directions(&members[0], &members, "extra/Cargo.toml", "");
        assert!(violations[0].to_string().contains("is in no layer"), "{violations:?}");
        assert!(parse_metadata("{}").is_err());
    }

    #[test]
    fn layers_inside_the_crates_hold() {
        let count = |path: &str, code: &str| confinements(path, code).len();
        assert_eq!(count("shard/src/engine/mod.rs", "use tokio::sync::mpsc;"), 1);
        assert_eq!(count("shard/models/src/lib.rs", "#[tokio::test]"), 1);
        assert_eq!(count("shard/src/engine/batch.rs", "let x: proto::v3::Batch = y;"), 1);
        assert_eq!(count("shard/src/engine/mod.rs", "use crate::server::Service;"), 1);
        assert_eq!(count("shard/src/server/service.rs", "use tokio::sync::mpsc; use proto::v3;"), 0);
        assert_eq!(count("router/src/validation/mod.rs", "use axum::Json;"), 1);
        assert_eq!(count("router/src/server/generate.rs", "use axum::Json;"), 0);
        assert_eq!(count("router/src/scheduler/queue.rs", "use hub::Tokenizer;"), 1);
        assert_eq!(count("router/src/tokenization/mod.rs", "use hub::Tokenizer;"), 0);
        assert_eq!(count("router/src/scheduler/queue.rs", "use crate::chat_template::Template;"), 1);
        assert_eq!(count("launcher/src/gpus.rs", "use cudarc::driver;"), 1);
        assert_eq!(count("shard/backend/src/cuda/device.rs", "use cudarc::driver;"), 0);
        assert_eq!(count("shard/backend/src/cuda/nccl.rs", "use cudarc::driver;"), 0);
        assert_eq!(count("router/src/config.rs", "let x = std::env::var(NAME);"), 1);
        assert_eq!(count("router/src/config.rs", "use std::env; env::set_var(NAME, x);"), 1);
        assert_eq!(count("router/src/args.rs", "let x = std::env::var(NAME);"), 0);
        assert_eq!(count("router/src/main.rs", "let x = std::env::args();"), 0);
    }

    #[test]
    fn a_crate_is_known_by_its_place_in_the_path() {
        assert!(names_path("use tokio;", "tokio"));
        assert!(names_path("use tokio as t;", "tokio"));
        assert!(names_path("let x = ::tokio::spawn(y);", "tokio"));
        assert!(names_path("use {tokio::spawn};", "tokio"));
        assert!(!names_path("use crate::tokio::spawn;", "tokio"));
        assert!(!names_path("let tokio = 1;", "tokio"));
        assert!(!names_path("use my_tokio::x;", "tokio"));
    }
}
