//! Reading the command line: what `-h` shows of the manual, and what a mistake is told beyond what clap says.

use std::ffi::OsString;
use std::fmt;
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

/// Why there are no options: mistakes in what was typed or in the environment, or that only a text was asked for.
#[derive(Debug)]
pub struct Refusal {
    /// What clap says, with where a wrong value comes from when it was not typed; at least one.
    errors: Vec<clap::Error>,
}

impl Refusal {
    /// Writes everything and ends the process: with 0 after `--help` or `--version`, with 2 after mistakes.
    pub fn exit(self) -> ! {
        match self.errors.as_slice() {
            // In colours on a terminal, and to standard output what was asked for.
            [only] => only.exit(),
            _ => {
                eprint!("{self}");
                std::process::exit(2)
            }
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [earlier @ .., last] = self.errors.as_slice() else { return Ok(()) };
        for error in earlier {
            // How to use it and where to find help are said once.
            let text = error.to_string();
            let end = ["\n\nUsage:", "\n\nFor more"].iter().filter_map(|end| text.find(end)).min();
            writeln!(f, "{}\n", &text[..end.unwrap_or(text.trim_end().len())])?;
        }
        write!(f, "{last}")
    }
}

/// Reads the command line, the program's name included, and the environment.
///
/// # Errors
/// Every mistake that clap finds, also those behind the first one.
pub fn parse(words: &[OsString]) -> Result<Args, Refusal> {
    let mut command = named_as_called(command(), words);
    let mut words = words.to_vec();
    let mut errors = Vec::new();
    loop {
        let error = match read(&command, &words) {
            Ok(args) if errors.is_empty() => return Ok(args),
            Ok(_) => return Err(Refusal { errors }),
            // Help is for those who make no mistake.
            Err(error) if !error.use_stderr() && !errors.is_empty() => return Err(Refusal { errors }),
            Err(error) => error,
        };
        let rest = without(&error, &command, &words);
        errors.push(with_tip(error, &command, &words));
        match rest {
            Some(rest) => (command, words) = rest,
            None => return Err(Refusal { errors }),
        }
    }
}

fn named_as_called(command: Command, words: &[OsString]) -> Command {
    let name = words.first().and_then(|name| Path::new(name).file_name());
    let is_upstreams = name.is_some_and(|name| name == UPSTREAM_NAME);
    if is_upstreams { command.display_name(UPSTREAM_NAME) } else { command }
}

fn read(command: &Command, words: &[OsString]) -> Result<Args, clap::Error> {
    let matches = command.clone().try_get_matches_from(words);
    let args = matches.and_then(|mut matches| Args::from_arg_matches_mut(&mut matches));
    args.map(Args::without_empty_values)
}

/// The same without what `error` is about, to see whether there is more; `None` where that cannot be told.
fn without(error: &clap::Error, command: &Command, words: &[OsString]) -> Option<(Command, Vec<OsString>)> {
    let kinds = [ErrorKind::UnknownArgument, ErrorKind::InvalidValue, ErrorKind::ValueValidation];
    if !kinds.contains(&error.kind()) {
        return None;
    }
    let option = text(error, ContextKind::InvalidArg)?.split([' ', '=']).next()?;
    let arg = option_named(command, option);
    if let Some(arg) = arg.filter(|arg| !is_typed(arg, words)) {
        // Without a variable the value is nobody's, and nothing would change.
        arg.get_env()?;
        return Some((without_variable(command.clone(), arg.get_id()), words.to_vec()));
    }
    let short = arg.and_then(|arg| arg.get_short()).map(|letter| format!("-{letter}"));
    let at = words.iter().skip(1).position(|word| {
        let word = word.to_string_lossy();
        word.split('=').next() == Some(option)
            || short.as_deref().is_some_and(|short| word.starts_with(short))
    })? + 1;
    let word = words[at].to_string_lossy();
    let is_alone = word == option || short.is_some_and(|short| word == short);
    // What stands behind it is its value, unless it is an option itself.
    let has_value = is_alone
        && option.starts_with('-')
        && words.get(at + 1).is_some_and(|next| !next.to_string_lossy().starts_with('-'));
    let mut rest = words.to_vec();
    rest.drain(at..=at + usize::from(has_value));
    Some((command.clone(), rest))
}

/// The same, but blind to the variable of one option, in its subcommands as well.
fn without_variable(command: Command, id: &clap::Id) -> Command {
    let has_it = command.get_arguments().any(|arg| arg.get_id() == id);
    let blind = |arg: clap::Arg| arg.env(None::<&'static str>);
    let command = if has_it { command.mut_arg(id.clone(), blind) } else { command };
    command.mut_subcommands(|subcommand| without_variable(subcommand, id))
}

fn text(error: &clap::Error, kind: ContextKind) -> Option<&str> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text),
        _ => None,
    }
}

fn option_named<'a>(command: &'a Command, option: &str) -> Option<&'a clap::Arg> {
    let name = option.strip_prefix("--")?;
    command.get_arguments().find(|arg| arg.get_long() == Some(name))
}

fn with_tip(mut error: clap::Error, command: &Command, words: &[OsString]) -> clap::Error {
    if let Some(tip) = tip(&error, command, words) {
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![StyledStr::from(tip)]));
    }
    error
}

fn tip(error: &clap::Error, command: &Command, words: &[OsString]) -> Option<String> {
    match error.kind() {
        ErrorKind::InvalidValue | ErrorKind::ValueValidation => {
            let option = text(error, ContextKind::InvalidArg)?.split([' ', '=']).next()?;
            let arg = option_named(command, option)?;
            let variable = arg.get_env()?.to_string_lossy();
            (!is_typed(arg, words))
                .then(|| format!("the value comes from the environment variable {variable}"))
        }
        ErrorKind::InvalidSubcommand | ErrorKind::UnknownArgument => {
            let word = text(error, ContextKind::InvalidSubcommand)
                .or_else(|| text(error, ContextKind::InvalidArg))?;
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
        let refusal = parse(&words(&[&["launcher"], arguments].concat())).unwrap_err();
        assert!(refusal.errors.iter().all(|error| error.exit_code() == 2), "{arguments:?}");
        refusal.to_string()
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
    fn all_mistakes_are_told_with_one_usage() {
        let text = mistake(&[
            "--portt",
            "3",
            "--num-shard=two",
            "--no-such-switch",
            "-pX",
            "--dtype",
            "int3",
            "--api-key",
            "k",
        ]);
        let found = [
            "unexpected argument '--portt' found",
            "'two' for '--num-shard",
            "unexpected argument '--no-such-switch'",
            "'X' for '--port",
            "'int3' for '--dtype",
        ];
        for part in found {
            assert!(text.contains(part), "no {part}:\n{text}");
        }
        let times = |part: &str| text.matches(part).count();
        assert_eq!((times("error: "), times("try '--help'")), (found.len(), 1), "{text}");
        assert!(text.contains("a similar argument exists: '--port'"), "{text}");
        let text = mistake(&["--num-shard", "two", "--help"]);
        assert!(text.starts_with("error: invalid value 'two'") && !text.contains("Options"), "{text}");
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
