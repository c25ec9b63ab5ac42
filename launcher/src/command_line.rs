//! Reading the command line: what `-h` shows of the manual, and what a mistake is told beyond what clap says.

use std::ffi::OsString;
use std::path::Path;

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory, FromArgMatches};

use crate::args::Args;

/// Names under which upstream's launcher is started; its version line begins with it.
const UPSTREAM_NAME: &str = "text-generation-launcher";

/// The description of the command line. `-h` shows the first sentence about each option, `--help` and the manual all.
pub fn command() -> Command {
    with_short_help(Args::command())
}

fn with_short_help(command: Command) -> Command {
    command
        .mut_args(|arg| {
            let text = arg.get_help().map(ToString::to_string).unwrap_or_default();
            match text.split_once(". ") {
                Some((first, _)) => arg.help(first.to_owned()).long_help(text),
                None => arg,
            }
        })
        .mut_subcommands(with_short_help)
}

/// Reads the command line, the program's name included, and the environment.
///
/// # Errors
/// What clap says, and where the wrong value comes from when it was not typed.
pub fn parse(words: &[OsString]) -> Result<Args, clap::Error> {
    let mut command = command();
    let name = words.first().and_then(|name| Path::new(name).file_name());
    if name.is_some_and(|name| name == UPSTREAM_NAME) {
        command = command.display_name(UPSTREAM_NAME);
    }
    let matches = command.clone().try_get_matches_from(words);
    let args = matches.and_then(|mut matches| Args::from_arg_matches_mut(&mut matches));
    args.map(Args::without_empty_values).map_err(|error| with_tip(error, &command, words))
}

fn with_tip(mut error: clap::Error, command: &Command, words: &[OsString]) -> clap::Error {
    if let Some(tip) = tip(&error, command, words) {
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![StyledStr::from(tip)]));
    }
    error
}

fn tip(error: &clap::Error, command: &Command, words: &[OsString]) -> Option<String> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    match error.kind() {
        ErrorKind::InvalidValue | ErrorKind::ValueValidation => {
            let option = text(ContextKind::InvalidArg)?.split([' ', '=']).next()?;
            let name = option.strip_prefix("--")?;
            let arg = command.get_arguments().find(|arg| arg.get_long() == Some(name))?;
            let variable = arg.get_env()?.to_string_lossy();
            (!is_typed(arg, words))
                .then(|| format!("the value comes from the environment variable {variable}"))
        }
        ErrorKind::InvalidSubcommand | ErrorKind::UnknownArgument => {
            let word = text(ContextKind::InvalidSubcommand).or_else(|| text(ContextKind::InvalidArg))?;
            // What looks like a model was meant as one.
            word.contains(['/', '.']).then(|| format!("to serve that model, use `--model-id {word}`"))
        }
        _ => None,
    }
}

fn is_typed(arg: &clap::Arg, words: &[OsString]) -> bool {
    let long = arg.get_long().map(|name| format!("--{name}"));
    let short = arg.get_short().map(|letter| format!("-{letter}"));
    words.iter().map(|word| word.to_string_lossy()).any(|word| {
        long.as_deref().is_some_and(|long| word.split('=').next() == Some(long))
            || short.as_deref().is_some_and(|short| word.starts_with(short))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    fn mistake(arguments: &[&str]) -> String {
        let error = parse(&words(&[&["launcher"], arguments].concat())).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{arguments:?}");
        error.to_string()
    }

    #[test]
    fn short_help_is_the_first_sentence_and_long_help_is_all() {
        let (short, long) = (command().render_help().to_string(), command().render_long_help().to_string());
        assert!(short.contains("Longest prompt in tokens") && long.contains("Longest prompt in tokens"));
        assert!(!short.contains("one less than `--max-total-tokens`"), "{short}");
        assert!(long.contains("one less than `--max-total-tokens`"), "{long}");
        for text in [&short, &long] {
            for named in ["completions", "man", "MAX_INPUT_TOKENS", "--graceful-termination-timeout"] {
                assert!(text.contains(named), "no {named} in:\n{text}");
            }
        }
    }

    #[test]
    fn mistakes_teach() {
        for (arguments, lesson) in [
            (&["--model"][..], "a similar argument exists: '--model-id'"),
            (&["--max-input-token", "3"], "'--max-input-tokens'"),
            (&["--quantize", "gtpq"], "gptq"),
            (&["--port", "70000"], "70000 is not in 0..=65535"),
            (&["org/model"], "use `--model-id org/model`"),
            (&["./model.gguf"], "use `--model-id ./model.gguf`"),
            (&["--port", "1", "man"], "cannot be used with"),
        ] {
            let text = mistake(arguments);
            assert!(text.contains(lesson), "{arguments:?}: {text}");
        }
        // It was typed, so no variable is to blame.
        assert!(!mistake(&["--port=x"]).contains("environment"));
        assert!(!mistake(&["-px"]).contains("environment"));
    }

    #[test]
    fn the_version_line_carries_the_name_it_was_called_by() {
        let version = |name: &str| parse(&words(&[name, "--version"])).unwrap_err().to_string();
        let number = env!("CARGO_PKG_VERSION");
        assert_eq!(version("/usr/bin/launcher"), format!("launcher {number}\n"));
        assert_eq!(
            version("/usr/bin/text-generation-launcher"),
            format!("text-generation-launcher {number}\n")
        );
    }
}
