//! The exit codes of all four programs, in one table.

/// How a program ended. The launcher reads a child's code to tell what to do next.
///
/// | code | name | meaning | a restart helps |
/// |---|---|---|---|
/// | 0 | `Ok` | asked to stop, or done | – |
/// | 1 | `Failure` | anything without a code of its own | maybe |
/// | 2 | `Usage` | the command line or the environment is wrong | no |
/// | 10 | `ModelUnusable` | the model is missing, damaged or not supported | no |
/// | 11 | `OutOfMemory` | device or host memory does not suffice | no, until a flag changes |
/// | 12 | `SocketUnusable` | the Unix socket cannot be bound or is in use | no |
/// | 13 | `EngineFailed` | the engine met an error while it served | yes |
/// | 14 | `PeerLost` | another rank of the same model went away | yes, with its peers |
/// | 15 | `ParentGone` | the launcher died; nobody is left to serve | – |
/// | 16 | `RestartsSpent` | the launcher's children failed more often than `--max-restarts` allows | maybe, later |
/// | 20 | `DeviceLost` | the GPU failed, or a step on it does not end | yes, unless the hardware is broken |
///
/// Upstream's programs know 0, 1, 2 and 101 (a panic) only, so every other code is free for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Asked to stop, or done.
    Ok = 0,
    /// Anything without a code of its own.
    Failure = 1,
    /// The command line or the environment is wrong.
    Usage = 2,
    /// The model is missing, damaged or not supported.
    ModelUnusable = 10,
    /// Device or host memory does not suffice.
    OutOfMemory = 11,
    /// The Unix socket cannot be bound or is in use.
    SocketUnusable = 12,
    /// The engine met an error while it served.
    EngineFailed = 13,
    /// Another rank of the same model went away.
    PeerLost = 14,
    /// The launcher died.
    ParentGone = 15,
    /// Children failed more often than `--max-restarts` allows.
    RestartsSpent = 16,
    /// The GPU failed, or a step on it does not end.
    DeviceLost = 20,
}

impl ExitCode {
    /// Every code, in ascending order.
    pub const ALL: [ExitCode; 11] = [
        ExitCode::Ok,
        ExitCode::Failure,
        ExitCode::Usage,
        ExitCode::ModelUnusable,
        ExitCode::OutOfMemory,
        ExitCode::SocketUnusable,
        ExitCode::EngineFailed,
        ExitCode::PeerLost,
        ExitCode::ParentGone,
        ExitCode::RestartsSpent,
        ExitCode::DeviceLost,
    ];

    /// The number the process exits with.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The meaning of a child's exit status; `None` for codes that are not ours, such as a panic's 101.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|known| i32::from(known.code()) == code)
    }

    /// Whether starting the same command again may succeed.
    pub fn is_restartable(self) -> bool {
        matches!(self, ExitCode::Failure | ExitCode::EngineFailed | ExitCode::PeerLost | ExitCode::DeviceLost)
    }

    /// One clause for a log line, such as "the model is missing, damaged or not supported".
    pub fn meaning(self) -> &'static str {
        match self {
            ExitCode::Ok => "it was asked to stop, or was done",
            ExitCode::Failure => "it failed",
            ExitCode::Usage => "its command line or environment is wrong",
            ExitCode::ModelUnusable => "the model is missing, damaged or not supported",
            ExitCode::OutOfMemory => "memory does not suffice",
            ExitCode::SocketUnusable => "its Unix socket cannot be bound or is in use",
            ExitCode::EngineFailed => "its engine met an error while it served",
            ExitCode::PeerLost => "another rank of the same model went away",
            ExitCode::ParentGone => "the launcher died",
            ExitCode::RestartsSpent => "its children failed more often than --max-restarts allows",
            ExitCode::DeviceLost => "its GPU failed, or a step on it does not end",
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        std::process::ExitCode::from(code.code())
    }
}

impl From<ExitCode> for i32 {
    fn from(code: ExitCode) -> Self {
        i32::from(code.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_the_round_trip() {
        for code in ExitCode::ALL {
            assert_eq!(ExitCode::from_code(i32::from(code)), Some(code));
            assert!(!code.meaning().is_empty());
        }
        assert_eq!(ExitCode::from_code(101), None);
    }
}
