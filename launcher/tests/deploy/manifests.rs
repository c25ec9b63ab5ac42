//! The Kubernetes manifests, by the types of its API.

use std::collections::{BTreeMap, BTreeSet};

use clap::{CommandFactory, Parser};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Container, PersistentVolumeClaim, Pod, PodSpec, Probe, Service};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use launcher::args::Args;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::read;

/// What the shards get to end, after the router: `IDLE_GRACE` of the supervisor.
const TEARDOWN_SECONDS: i64 = 5;

/// The documents of a file by their kind.
fn documents(path: &str) -> BTreeMap<String, Value> {
    serde_yaml_ng::Deserializer::from_str(&read(path))
        .map(|document| Value::deserialize(document).unwrap_or_else(|error| panic!("{path}: {error}")))
        .map(|document| (document["kind"].as_str().unwrap().to_owned(), document))
        .collect()
}

/// A document as its type; a field that the type does not have is a mistake, which reading alone would pass over.
fn typed<T: DeserializeOwned + Serialize>(document: &Value) -> T {
    let value: T =
        serde_json::from_value(document.clone()).unwrap_or_else(|error| panic!("{error}: {document}"));
    assert_contains("", &serde_json::to_value(&value).unwrap(), document);
    value
}

#[track_caller]
fn assert_contains(path: &str, known: &Value, written: &Value) {
    match (known, written) {
        (Value::Object(known), Value::Object(written)) => {
            for (key, value) in written {
                let known = known.get(key).unwrap_or_else(|| panic!("{path}.{key} is no field"));
                assert_contains(&format!("{path}.{key}"), known, value);
            }
        }
        (Value::Array(known), Value::Array(written)) => {
            assert_eq!(known.len(), written.len(), "{path}");
            known.iter().zip(written).for_each(|(known, written)| assert_contains(path, known, written));
        }
        _ => assert_eq!(known, written, "{path}"),
    }
}

fn pod() -> PodSpec {
    typed::<Pod>(&documents("deploy/kubernetes/pod.yaml")["Pod"]).spec.unwrap()
}

fn deployment() -> Deployment {
    typed(&documents("deploy/kubernetes/deployment.yaml")["Deployment"])
}

/// The pods that are deployed.
fn specs() -> [PodSpec; 2] {
    [pod(), deployment().spec.unwrap().template.spec.unwrap()]
}

fn arguments(container: &Container) -> Args {
    let words = container.args.clone().unwrap_or_default();
    Args::try_parse_from([vec!["launcher".to_owned()], words].concat())
        .unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn arguments_and_variables_are_the_launchers() {
    let command = Args::command();
    let variables: BTreeSet<String> =
        command.get_arguments().filter_map(|arg| Some(arg.get_env()?.to_str()?.to_owned())).collect();
    for spec in specs() {
        for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
            assert_eq!(container.command, None, "the image's entry point is the launcher");
            let is_download = arguments(container).command.is_some();
            assert_eq!(is_download, container.name == "download");
            for variable in container.env.iter().flatten() {
                assert!(variables.contains(&variable.name), "{} is not read", variable.name);
            }
        }
        let (serving, init) = (&spec.containers[0], &spec.init_containers.as_ref().unwrap()[0]);
        assert_eq!(serving.image, init.image);
        let model = |container: &Container| {
            let words = container.args.clone().unwrap();
            words[words.iter().position(|word| word == "--model-id").unwrap() + 1].clone()
        };
        assert_eq!(model(serving), model(init), "what is downloaded is what is served");
    }
}

#[test]
fn probes_are_routes_of_the_router_on_its_port() {
    let routes = read("router/src/server/mod.rs");
    for spec in specs() {
        let container = &spec.containers[0];
        let args = arguments(container);
        let port = &container.ports.as_ref().unwrap()[0];
        assert_eq!(port.container_port, i32::from(args.serving.port));
        let path = |probe: &Option<Probe>| {
            let get = probe.as_ref().unwrap().http_get.clone().unwrap();
            assert_eq!(get.port, IntOrString::String(port.name.clone().unwrap()));
            get.path.unwrap()
        };
        for path in [&container.startup_probe, &container.readiness_probe].map(path) {
            assert!(routes.contains(&format!(".route(\"{path}\", get(")), "{path} is no route");
        }
        // A restart of the container would not help while the launcher replaces shards.
        let live = container.liveness_probe.as_ref().unwrap();
        assert!(live.http_get.is_none());
        assert_eq!(live.tcp_socket.as_ref().unwrap().port, IntOrString::String(port.name.clone().unwrap()));
        // One missed answer takes a pod off the Service; it takes more to restart it.
        let failures = |probe: &Option<Probe>| probe.as_ref().unwrap().failure_threshold.unwrap();
        assert!(failures(&container.liveness_probe) > failures(&container.readiness_probe));
    }
}

#[test]
fn a_pod_has_the_time_to_drain() {
    for spec in specs() {
        let container = &spec.containers[0];
        let pre_stop = container.lifecycle.as_ref().unwrap().pre_stop.as_ref().unwrap();
        let pause = pre_stop.sleep.as_ref().unwrap().seconds;
        let drain = i64::try_from(arguments(container).serving.graceful_termination_timeout).unwrap();
        let grace = spec.termination_grace_period_seconds.unwrap();
        assert!(
            grace > pause + drain + TEARDOWN_SECONDS,
            "{grace} s for {pause} + {drain} + {TEARDOWN_SECONDS}"
        );
        // Every readiness probe that fails must come before the pause is over.
        let ready = container.readiness_probe.as_ref().unwrap();
        assert!(pause > i64::from(ready.period_seconds.unwrap() + ready.timeout_seconds.unwrap()));
    }
}

#[test]
fn nothing_runs_as_root_or_writes_to_the_image() {
    let dockerfile = read("Dockerfile");
    for spec in specs() {
        let security = spec.security_context.clone().unwrap();
        let user = security.run_as_user.unwrap();
        assert!(user != 0 && security.run_as_non_root == Some(true));
        assert!(dockerfile.contains(&format!("\nUSER {user}:{}\n", security.run_as_group.unwrap())));
        assert_eq!(security.fs_group, security.run_as_group, "the volumes are its own");
        assert_eq!(spec.automount_service_account_token, Some(false));
        // Variables made of Services' names must not be taken for options.
        assert_eq!(spec.enable_service_links, Some(false));
        for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
            let security = container.security_context.clone().unwrap();
            assert_eq!(security.allow_privilege_escalation, Some(false));
            assert_eq!(security.read_only_root_filesystem, Some(true));
            assert_eq!(security.capabilities.unwrap().drop.unwrap(), ["ALL"]);
        }
    }
}

#[test]
fn volumes_are_where_the_programs_look_for_them() {
    for spec in specs() {
        let volumes: BTreeMap<_, _> =
            spec.volumes.iter().flatten().map(|volume| (volume.name.as_str(), volume)).collect();
        let mut mounted = BTreeSet::new();
        for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
            for mount in container.volume_mounts.iter().flatten() {
                assert!(volumes.contains_key(mount.name.as_str()), "{} is no volume", mount.name);
                mounted.insert(mount.name.as_str());
            }
        }
        assert_eq!(mounted, volumes.keys().copied().collect(), "a volume that nothing mounts");
        let serving = &spec.containers[0];
        let at = |path: &str| {
            let mounts = serving.volume_mounts.as_ref().unwrap();
            mounts
                .iter()
                .find(|mount| mount.mount_path == path)
                .unwrap_or_else(|| panic!("nothing at {path}"))
        };
        let shm = volumes[at("/dev/shm").name.as_str()].empty_dir.as_ref().unwrap();
        assert_eq!(shm.medium.as_deref(), Some("Memory"));
        assert!(volumes[at("/tmp").name.as_str()].empty_dir.is_some(), "sockets need a place");
        let home = serving.env.iter().flatten().find(|variable| variable.name == "HF_HOME").unwrap();
        assert_eq!(at("/data").mount_path, *home.value.as_ref().unwrap());
        // Served read-only, hence offline; the download writes.
        assert_eq!(at("/data").read_only, Some(true));
        assert!(serving.env.iter().flatten().any(|variable| variable.name == "HF_HUB_OFFLINE"));
        let init = &spec.init_containers.as_ref().unwrap()[0];
        assert!(
            init.volume_mounts
                .iter()
                .flatten()
                .any(|mount| mount.mount_path == "/data" && mount.read_only != Some(true))
        );
        let limits = serving.resources.as_ref().unwrap().limits.as_ref().unwrap();
        let shards = arguments(serving).devices.num_shard.unwrap_or(1);
        assert_eq!(limits["nvidia.com/gpu"].0, shards.to_string());
    }
}

#[test]
fn the_service_finds_the_pods_and_their_port() {
    let documents = documents("deploy/kubernetes/deployment.yaml");
    let service: Service = typed(&documents["Service"]);
    let claim: PersistentVolumeClaim = typed(&documents["PersistentVolumeClaim"]);
    let deployment = deployment().spec.unwrap();
    let labels = deployment.template.metadata.unwrap().labels.unwrap();
    let selector = service.spec.as_ref().unwrap().selector.clone().unwrap();
    for wanted in [&selector, &deployment.selector.match_labels.unwrap()] {
        assert!(wanted.iter().all(|(key, value)| labels.get(key) == Some(value)), "{wanted:?}");
    }
    let spec = deployment.template.spec.unwrap();
    let names = spec.containers[0].ports.as_ref().unwrap().iter().map(|port| port.name.clone().unwrap());
    let target = service.spec.unwrap().ports.unwrap()[0].target_port.clone().unwrap();
    assert!(names.map(IntOrString::String).any(|name| name == target));
    let claims: Vec<_> =
        spec.volumes.iter().flatten().filter_map(|volume| volume.persistent_volume_claim.clone()).collect();
    assert_eq!(claims[0].claim_name, claim.metadata.name.unwrap());
}

#[test]
fn pod_and_deployment_differ_in_the_model_volume_only() {
    let without_model = |mut spec: PodSpec| {
        spec.volumes.as_mut().unwrap().retain(|volume| volume.name != "model");
        spec
    };
    let [pod, deployed] = specs().map(without_model);
    assert_eq!(pod, deployed);
}

#[test]
#[should_panic(expected = ".spec.containerz is no field")]
fn a_field_that_does_not_exist_is_found() {
    let mut document = documents("deploy/kubernetes/pod.yaml").remove("Pod").unwrap();
    document["spec"]["containerz"] = Value::from(1);
    typed::<Pod>(&document);
}
