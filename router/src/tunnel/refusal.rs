//! What ngrok's errors mean, told without the token: ngrok repeats it in its answers.

use std::error::Error;
use std::fmt::Display;

use ngrok::Error as _;
use ngrok::session::{ConnectError, RpcError};

/// What a token is replaced with.
const HIDDEN: &str = "***";

/// Codes of answers that the same token will always get: malformed, of another version, revoked, or of no account.
const FINAL_CODES: [&str; 5] =
    ["ERR_NGROK_105", "ERR_NGROK_106", "ERR_NGROK_107", "ERR_NGROK_300", "ERR_NGROK_4018"];

/// ngrok will not open this tunnel, however often it is asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(String);

impl Refused {
    /// `None`: it may be another time, because nobody answered or because the answer does not say that the token is wrong.
    pub(super) fn from_connect(error: &ConnectError, token: &str) -> Option<Self> {
        let ConnectError::Auth(RpcError::Response(answer)) = error else { return None };
        let is_final = answer.error_code().is_none_or(|code| FINAL_CODES.contains(&code));
        is_final.then(|| {
            let text = told(error, token);
            Self(format!("ngrok does not take the token of --ngrok-authtoken (NGROK_AUTHTOKEN): {text}"))
        })
    }

    /// A bug of ours ended the keeper.
    pub(super) fn failed(panic: &impl Display) -> Self {
        Self(format!("internal error: the ngrok tunnel is kept no longer: {panic}"))
    }
}

/// An error of the session as one line, its causes included, without the token.
pub(super) fn told(error: &(impl Error + 'static), token: &str) -> String {
    let mut line = String::new();
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        let text = match error.downcast_ref::<RpcError>() {
            // Its own text is a template of several lines with a link.
            Some(RpcError::Response(answer)) => {
                let code = answer.error_code().map(|code| format!(" ({code})"));
                format!("{}{}", answer.msg, code.unwrap_or_default())
            }
            _ => error.to_string(),
        };
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
        next = error.source();
    }
    let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
    if token.is_empty() { line } else { line.replace(token, HIDDEN) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(answer: &str) -> ConnectError {
        ConnectError::Auth(serde_json::from_str(answer).map(RpcError::Response).unwrap())
    }

    #[test]
    fn only_answers_about_the_token_are_final_and_none_shows_it() {
        let wrong = refusal(
            r#"{"msg": "The authtoken you specified is properly formed, but it is invalid.\nYour authtoken: 2secret\n", "error_code": "ERR_NGROK_107"}"#,
        );
        let text = Refused::from_connect(&wrong, "2secret").unwrap().to_string();
        assert_eq!(
            text,
            "ngrok does not take the token of --ngrok-authtoken (NGROK_AUTHTOKEN): authentication failure: The \
             authtoken you specified is properly formed, but it is invalid. Your authtoken: *** (ERR_NGROK_107)"
        );
        assert!(Refused::from_connect(&refusal(r#"{"msg": "no"}"#), "t").is_some());
        let crowded = refusal(r#"{"msg": "limited to 1 session", "error_code": "ERR_NGROK_108"}"#);
        assert_eq!(Refused::from_connect(&crowded, "t"), None);
        let away = ConnectError::Tcp(std::io::ErrorKind::ConnectionRefused.into());
        assert_eq!(Refused::from_connect(&away, "t"), None);
        assert_eq!(told(&away, "no such text"), "failed to establish tcp connection: connection refused");
    }
}
