//! Python's pickles, as far as they describe tensors, and not one step further.
//!
//! A pickle is a program for a stack machine that may import and call anything. This machine knows the instructions that
//! `torch.save` writes for a dictionary of tensors and the few names those refer to, and gives each a meaning of its
//! own: there is nothing here that could be called. Whatever else appears is refused by its name.
//!
//! A hostile pickle costs at most a small multiple of its own size: values lie in one arena of bounded length, so nothing
//! recurses, texts are borrowed from the pickle, and every instruction takes at least one of its bytes.

mod globals;
mod machine;
mod opcodes;

use std::collections::HashSet;

pub(super) use globals::ElementType;
use globals::Global;

/// The longest pickle that is read. Those of the largest published files have 2 MiB.
pub(super) const MAX_PICKLE_BYTES: usize = 16 << 20;
/// Tensors in a pickle; the largest published models have 40 thousand in all their files.
const MAX_TENSORS: usize = 1 << 16;
/// Values in a pickle: a tensor takes about twenty.
const MAX_VALUES: usize = 20 * MAX_TENSORS;
/// Dimensions of a tensor; models have four at most.
const MAX_DIMENSIONS: usize = 8;

/// Why bytes are not a pickle of tensors: what was found and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct PickleError(String);

impl PickleError {
    fn new(problem: impl Into<String>) -> Self {
        Self(problem.into())
    }
}

/// Memory that tensors lie in, by the name the file's container knows it under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Storage<'a> {
    /// Such as `0`.
    pub(super) key: &'a str,
    /// What it holds.
    pub(super) element: ElementType,
    /// How many of them.
    pub(super) len: usize,
}

/// A view of a storage. Nothing is checked against the storage yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tensor<'a> {
    /// Where its elements are.
    pub(super) storage: Storage<'a>,
    /// Its first element.
    pub(super) offset: usize,
    /// Outermost dimension first.
    pub(super) shape: Vec<usize>,
    /// Elements from one index to the next, for each dimension.
    pub(super) strides: Vec<usize>,
}

/// A place in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Id(u32);

/// A value as the machine knows it.
#[derive(Debug)]
enum Value<'a> {
    None,
    Bool,
    Int(i64),
    Float,
    Text(&'a str),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Storage<'a>),
    Tensor(Box<Tensor<'a>>),
}

impl Value<'_> {
    /// For messages.
    fn describe(&self) -> &'static str {
        match self {
            Value::None => "None",
            Value::Bool => "a boolean",
            Value::Int(_) => "an integer",
            Value::Float => "a number",
            Value::Text(_) => "a text",
            Value::List(_) => "a list",
            Value::Tuple(_) => "a tuple",
            Value::Dict(_) => "a dictionary",
            Value::Global(_) => "a name",
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
        }
    }
}

/// What a pickle holds.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: Id,
    /// Bytes it takes; more may follow it.
    pub(super) num_bytes: usize,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle that `bytes` begin with.
    ///
    /// # Errors
    /// It ends early, is too large, or has an instruction or a name that tensors do not need.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, PickleError> {
        machine::run(bytes)
    }

    /// The entries of a dictionary of tensors, in the file's order.
    ///
    /// # Errors
    /// It is something else, or a name is there twice.
    pub(super) fn tensors(&self) -> Result<Vec<(&'a str, &Tensor<'a>)>, PickleError> {
        let Value::Dict(entries) = self.value(self.root) else {
            let found = self.value(self.root).describe();
            return Err(PickleError::new(format!("it holds {found}, expected a dictionary of tensors")));
        };
        let mut names = HashSet::with_capacity(entries.len());
        let tensor = |&(name, tensor): &(Id, Id)| match (self.value(name), self.value(tensor)) {
            (Value::Text(name), Value::Tensor(tensor)) => match names.insert(*name) {
                true => Ok((*name, tensor.as_ref())),
                false => Err(PickleError::new(format!("tensor {} is there twice", quote(name)))),
            },
            (Value::Text(name), other) => Err(PickleError::new(format!(
                "entry {} is {}, expected a tensor; save the model's state dictionary alone",
                quote(name),
                other.describe()
            ))),
            (other, _) => Err(PickleError::new(format!("a name is {}, expected a text", other.describe()))),
        };
        entries.iter().map(tensor).collect()
    }

    /// The entries of a list of texts.
    ///
    /// # Errors
    /// It is something else.
    pub(super) fn texts(&self) -> Result<Vec<&'a str>, PickleError> {
        let wrong = |found: &Value<'_>| {
            PickleError::new(format!("found {}, expected a list of texts", found.describe()))
        };
        let Value::List(items) = self.value(self.root) else { return Err(wrong(self.value(self.root))) };
        let text = |&item: &Id| match self.value(item) {
            Value::Text(text) => Ok(*text),
            other => Err(wrong(other)),
        };
        items.iter().map(text).collect()
    }

    fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }
}

/// A name from the file for a message: escaped, and not arbitrarily long.
pub(super) fn quote(name: &str) -> String {
    let short: String = name.chars().take(64).collect();
    let dots = if short.len() < name.len() { "…" } else { "" };
    format!("{short:?}{dots}")
}

#[cfg(test)]
mod tests;
