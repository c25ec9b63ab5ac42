//! Quartet's launcher: plans, starts and supervises the shards and the router.
//!
//! In the order of a start:
//! - [`args`] and [`values`]: what was typed. [`command_line`]: reading it. [`manual`]: what is printed about it.
//! - [`machine`], [`nvml`] and [`visible`]: what there is. [`devices`], [`plan`] and
//!   [`budget`]: what that means together.
//! - [`preflight`] and [`memory`]: what can be known to fail. [`programs`]: where the other programs are.
//! - [`weights`]: the model's files. [`runtime_dir`]: where the sockets live. [`command`]: the children's command lines.
//! - [`supervisor`]: the state machine and the event loop, with [`child`], [`log_relay`], [`readiness`] and [`liveness`] as its
//!   hands.
//! - [`orphans`]: what a sub-reaper has to do. [`router_http`]: what is asked of the router.
//! - [`plan_report`] and [`footprint`]: `launcher plan`. [`status`] and [`status_socket`]: `launcher status`.
//! - [`startup_ledger`]: where the time went. [`error`]: why it ended. [`env_report`]: `--env`.

pub mod args;
pub mod budget;
pub mod child;
pub mod command;
pub mod command_line;
pub mod devices;
pub mod env_report;
pub mod error;
pub mod footprint;
pub mod liveness;
pub mod log_relay;
pub mod machine;
pub mod manual;
pub mod memory;
pub mod nvml;
pub mod orphans;
pub mod plan;
pub mod plan_report;
pub mod preflight;
pub mod programs;
pub mod readiness;
pub mod router_http;
pub mod runtime_dir;
pub mod startup_ledger;
pub mod status;
pub mod status_socket;
pub mod supervisor;
pub mod values;
pub mod visible;
pub mod weights;
