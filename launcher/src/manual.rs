//! Shell completions and the manual page, made from the description of the command line.

use std::io::Write as _;

use clap_complete::Shell;

use crate::command_line;

/// The script that completes `launcher` in `shell`.
pub fn completions(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command_line::command(), "launcher", &mut script);
    script
}

/// The manual page in roff.
///
/// # Errors
/// None that a buffer in memory can give.
pub fn page() -> std::io::Result<Vec<u8>> {
    let mut page = Vec::new();
    let command = command_line::command();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    // The library names the variables of options with a value only.
    writeln!(page, ".SH ENVIRONMENT")?;
    for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
        if let (Some(variable), Some(long)) = (arg.get_env(), arg.get_long()) {
            let long = long.replace('-', "\\-");
            writeln!(page, ".TP\n\\fB{}\\fR\nsets \\fB\\-\\-{long}\\fR", variable.to_string_lossy())?;
        }
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_know_options_values_and_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = String::from_utf8(completions(shell)).unwrap();
            for word in ["max-batch-prefill-tokens", "compressed-tensors", "completions", "fish"] {
                assert!(script.contains(word), "no {word} for {shell}");
            }
        }
    }

    #[test]
    fn the_manual_page_has_every_shown_option_its_variable_and_its_default() {
        let page = String::from_utf8(page().unwrap()).unwrap().replace('\\', "");
        assert!(page.contains(".TH launcher 1"), "{page}");
        for arg in command_line::command().get_arguments().filter(|arg| !arg.is_hide_set()) {
            let long = arg.get_long().unwrap_or_default();
            assert!(page.contains(&format!("--{long}")), "no --{long}");
            if let Some(variable) = arg.get_env() {
                assert!(page.contains(&*variable.to_string_lossy()), "no {variable:?}");
            }
        }
        assert!(page.contains("[default: 29500]"), "{page}");
    }
}
