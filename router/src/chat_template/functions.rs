//! What templates call besides Jinja's own.

use std::fmt::Write;

use chrono::Local;
use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Spaces a level; Python's users write 2 or 4.
const MAX_INDENT: usize = 16;

/// Lets a template refuse its messages.
pub(super) fn raise_exception(text: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::SyntaxError, text))
}

/// The local time in strftime's spelling.
pub(super) fn strftime_now(format: String) -> Result<String, Error> {
    let mut text = String::new();
    match write!(text, "{}", Local::now().format(&format)) {
        Ok(()) => Ok(text),
        Err(std::fmt::Error) => {
            Err(Error::new(ErrorKind::InvalidOperation, format!("`{format}` is no strftime format")))
        }
    }
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it: a space after `:` and `,`, nothing escaped
/// for HTML. Models were trained on this spelling.
pub(super) fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    if let Some(given) = indent.filter(|&indent| indent > MAX_INDENT) {
        let text = format!("indent of tojson is {given}, expected at most {MAX_INDENT}");
        return Err(Error::new(ErrorKind::InvalidOperation, text));
    }
    // Python knows more; what does not change the spelling of what we write is let through.
    let _: Option<Value> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent);
            value.serialize(&mut Serializer::with_formatter(
                &mut bytes,
                PrettyFormatter::with_indent(spaces.as_bytes()),
            ))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, PythonFormatter)),
    };
    let failed = |text: String| Error::new(ErrorKind::InvalidOperation, text);
    written.map_err(|error| failed(format!("cannot write as JSON: {error}")))?;
    let text = String::from_utf8(bytes).map_err(|error| failed(error.to_string()))?;
    Ok(Value::from_safe_string(text))
}

/// `json.dumps`' separators.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
