//! Why the launcher gives up, and the exit code that says so.

use process::ExitCode;

/// The ways to fail, by text-generation-inference's names: scripts match on their `Debug` form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LauncherError {
    /// The options contradict each other, ask for what this build cannot do, or do not fit this machine.
    #[error("{0}")]
    ArgumentValidation(String),
    /// `--sharded true` needs more devices than there are.
    #[error("{0}")]
    NotEnoughCUDADevices(String),
    /// The model's files could not be had.
    #[error("the model's files could not be had")]
    DownloadError,
    /// A shard ended before it was ready.
    #[error("a shard could not start")]
    ShardCannotStart,
    /// A shard ended after it was ready.
    #[error("a shard failed")]
    ShardFailed,
    /// The router ended.
    #[error("the router failed")]
    WebserverFailed,
    /// The router could not be started.
    #[error("the router could not start")]
    WebserverCannotStart,
}

/// An error together with its reason in one line; several mistakes in a line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The kind, for scripts.
    pub error: LauncherError,
    /// What was found, what was expected, what changes it; for people.
    pub reason: String,
    /// Restarts did not help: there were as many as the policy allows.
    has_spent_restarts: bool,
}

impl Failure {
    /// A failure whose kind does not carry its reason.
    pub fn new(error: LauncherError, reason: impl Into<String>) -> Self {
        Self { error, reason: reason.into(), has_spent_restarts: false }
    }

    /// The same failure, the last of several; `why` says why it is not answered by a restart.
    pub fn after_restarts(self, why: &str) -> Self {
        Self { reason: format!("{} ({why})", self.reason), has_spent_restarts: true, ..self }
    }

    /// A wrong option, or one that does not fit this machine.
    pub fn argument(reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Self::new(LauncherError::ArgumentValidation(reason.clone()), reason)
    }

    /// Several mistakes as one failure; a single one keeps its kind.
    pub fn all(mut mistakes: Vec<LauncherError>) -> Self {
        if mistakes.len() == 1 {
            let error = mistakes.remove(0);
            return Self::new(error.clone(), error.to_string());
        }
        let reasons: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
        Self::new(LauncherError::ArgumentValidation(reasons.join("; ")), reasons.join("\n"))
    }

    /// What standard error shows last, in upstream's shape.
    pub fn stderr_line(&self) -> String {
        format!("Error: {:?}", self.error)
    }

    /// A failure exits with 1, as upstream's, and with a code of its own when restarts were tried; a command line that does not
    /// parse exits with 2 before there is a failure.
    pub fn exit_code(&self) -> ExitCode {
        if self.has_spent_restarts { ExitCode::RestartsSpent } else { ExitCode::Failure }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_shape_on_standard_error() {
        assert_eq!(
            Failure::new(LauncherError::ShardFailed, "rank 0 died").stderr_line(),
            "Error: ShardFailed"
        );
        let mistakes = vec![LauncherError::ArgumentValidation("`validation_workers` must be > 0".to_owned())];
        assert_eq!(
            Failure::all(mistakes).stderr_line(),
            "Error: ArgumentValidation(\"`validation_workers` must be > 0\")"
        );
    }

    #[test]
    fn spent_restarts_have_a_code_of_their_own() {
        let failure = Failure::new(LauncherError::ShardFailed, "rank 0 died");
        assert_eq!(failure.exit_code(), ExitCode::Failure);
        let last = failure.after_restarts("it is failure 6");
        assert_eq!(
            (last.exit_code(), last.reason.as_str()),
            (ExitCode::RestartsSpent, "rank 0 died (it is failure 6)")
        );
    }

    #[test]
    fn several_mistakes_are_all_told() {
        let mistakes = vec![
            LauncherError::NotEnoughCUDADevices("no device".to_owned()),
            LauncherError::ArgumentValidation("bad".to_owned()),
        ];
        let failure = Failure::all(mistakes);
        assert_eq!(failure.reason, "no device\nbad");
        assert_eq!(failure.stderr_line(), "Error: ArgumentValidation(\"no device; bad\")");
    }
}
