//! Quartet: what every one of its processes does alike: logs, signals, exit codes.
