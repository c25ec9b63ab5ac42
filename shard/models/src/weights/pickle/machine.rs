//! The stack machine.

use std::collections::HashMap;

use super::globals::Global;
use super::opcodes as op;
use super::{
    Id, MAX_DIMENSIONS, MAX_PICKLE_BYTES, MAX_TENSORS, MAX_VALUES, Pickle, PickleError, Storage, Tensor,
    Value, quote,
};

/// The newest protocol there is.
const MAX_PROTOCOL: u8 = 5;

/// Runs the pickle at the start of `bytes`.
pub(super) fn run(bytes: &[u8]) -> Result<Pickle<'_>, PickleError> {
    let mut machine = Machine {
        bytes: &bytes[..bytes.len().min(MAX_PICKLE_BYTES)],
        at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        num_tensors: 0,
    };
    loop {
        let begin = machine.at;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(root)) => {
                return Ok(Pickle { values: machine.values, root, num_bytes: machine.at });
            }
            Err(error) => return Err(PickleError::new(format!("{error} (byte {begin} of its pickle)"))),
        }
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Lengths the stack had at each mark that is still open.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    num_tensors: usize,
}

impl<'a> Machine<'a> {
    /// One instruction; the result of the last one.
    fn step(&mut self) -> Result<Option<Id>, PickleError> {
        match self.u8()? {
            op::STOP => return self.pop().map(Some),
            op::PROTO => self.protocol()?,
            op::FRAME => drop(self.take(8)?),
            op::MARK => self.mark()?,
            op::NONE => self.push(Value::None)?,
            op::NEWTRUE | op::NEWFALSE => self.push(Value::Bool)?,
            op::BINFLOAT => {
                self.take(8)?;
                self.push(Value::Float)?;
            }
            opcode @ (op::BININT | op::BININT1 | op::BININT2 | op::LONG1) => self.integer(opcode)?,
            opcode @ (op::BINSTRING | op::SHORT_BINSTRING | op::BINUNICODE | op::SHORT_BINUNICODE) => {
                self.text(opcode)?;
            }
            op::GLOBAL => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            op::STACK_GLOBAL => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                self.global(module, name)?;
            }
            op::REDUCE => self.reduce()?,
            op::BUILD => self.build()?,
            op::BINPERSID => self.persistent_id()?,
            op::EMPTY_LIST => self.push(Value::List(Vec::new()))?,
            op::APPEND => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            op::APPENDS => {
                let items = self.pop_to_mark()?;
                self.append(&items)?;
            }
            op::EMPTY_TUPLE => self.push(Value::Tuple(Vec::new()))?,
            op::TUPLE => {
                let items = self.pop_to_mark()?;
                self.push(Value::Tuple(items))?;
            }
            opcode @ (op::TUPLE1 | op::TUPLE2 | op::TUPLE3) => {
                let items = self.pop_many(usize::from(opcode - op::TUPLE1) + 1)?;
                self.push(Value::Tuple(items))?;
            }
            op::EMPTY_DICT => self.push(Value::Dict(Vec::new()))?,
            op::SETITEM => {
                let items = self.pop_many(2)?;
                self.set_items(&items)?;
            }
            op::SETITEMS => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            opcode @ (op::BINPUT | op::LONG_BINPUT | op::MEMOIZE) => self.memoize(opcode)?,
            opcode @ (op::BINGET | op::LONG_BINGET) => self.recall(opcode)?,
            other => {
                return Err(PickleError::new(format!(
                    "instruction {} is not allowed: expected tensors and nothing else",
                    op::refused_name(other)
                )));
            }
        }
        Ok(None)
    }

    fn protocol(&mut self) -> Result<(), PickleError> {
        match self.u8()? {
            2..=MAX_PROTOCOL => Ok(()),
            other => Err(PickleError::new(format!("protocol {other}, expected 2 to {MAX_PROTOCOL}"))),
        }
    }

    fn mark(&mut self) -> Result<(), PickleError> {
        if self.marks.len() == MAX_VALUES {
            return Err(too_many());
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn integer(&mut self, opcode: u8) -> Result<(), PickleError> {
        let value = match opcode {
            op::BININT1 => i64::from(self.u8()?),
            op::BININT2 => i64::from(u16::from_le_bytes(self.array()?)),
            op::BININT => i64::from(i32::from_le_bytes(self.array()?)),
            _ => {
                let raw = self.u8().and_then(|len| self.take(usize::from(len)))?;
                let mut bytes = [if raw.last().is_some_and(|&last| last >= 0x80) { 0xff } else { 0 }; 8];
                let Some(low) = bytes.get_mut(..raw.len()) else {
                    return Err(PickleError::new(format!("an integer of {} bytes, expected 8", raw.len())));
                };
                low.copy_from_slice(raw);
                i64::from_le_bytes(bytes)
            }
        };
        self.push(Value::Int(value))
    }

    fn text(&mut self, opcode: u8) -> Result<(), PickleError> {
        let len = match opcode {
            op::SHORT_BINSTRING | op::SHORT_BINUNICODE => usize::from(self.u8()?),
            _ => u32::from_le_bytes(self.array()?) as usize,
        };
        let bytes = self.take(len)?;
        let text = std::str::from_utf8(bytes).map_err(|_| PickleError::new("a text is not UTF-8"))?;
        self.push(Value::Text(text))
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), PickleError> {
        match Global::find(module, name) {
            Some(global) => self.push(Value::Global(global)),
            None => Err(PickleError::new(format!(
                "it refers to {}, expected only tensors and dictionaries of them; nothing of it was executed",
                quote(&format!("{module}.{name}"))
            ))),
        }
    }

    /// A call, of which only the effect is known here.
    fn reduce(&mut self) -> Result<(), PickleError> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Value::Tuple(arguments), &Value::Global(function)) =
            (self.value(arguments), self.value(function))
        else {
            return Err(PickleError::new("a call without a function or arguments"));
        };
        let tensor = match function {
            Global::OrderedDict if arguments.is_empty() => return self.push(Value::Dict(Vec::new())),
            Global::RebuildFromType => match arguments.as_slice() {
                &[function, _, arguments, ..] => match (self.value(function), self.value(arguments)) {
                    (&Value::Global(function), Value::Tuple(arguments)) => {
                        self.rebuild(function, arguments)?
                    }
                    _ => return Err(PickleError::new("a tensor of a class that is not read")),
                },
                _ => return Err(PickleError::new("a tensor without its class")),
            },
            function => self.rebuild(function, arguments)?,
        };
        if self.num_tensors == MAX_TENSORS {
            return Err(PickleError::new(format!("it has more than {MAX_TENSORS} tensors")));
        }
        self.num_tensors += 1;
        self.push(Value::Tensor(Box::new(tensor)))
    }

    /// A tensor from the arguments of one of torch's two functions.
    fn rebuild(&self, function: Global, arguments: &[Id]) -> Result<Tensor<'a>, PickleError> {
        match (function, arguments) {
            (Global::RebuildTensor, &[storage, offset, shape, strides, ..]) => {
                let &Value::Storage(storage) = self.value(storage) else {
                    return Err(PickleError::new("a tensor without a storage"));
                };
                let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
                if shape.len() != strides.len() {
                    return Err(PickleError::new(format!(
                        "a tensor of {} dimensions has {} strides",
                        shape.len(),
                        strides.len()
                    )));
                }
                Ok(Tensor { storage, offset: self.size(offset)?, shape, strides })
            }
            (Global::RebuildParameter, &[tensor, ..]) => match self.value(tensor) {
                Value::Tensor(tensor) => Ok(tensor.as_ref().clone()),
                other => {
                    Err(PickleError::new(format!("a parameter of {}, expected a tensor", other.describe())))
                }
            },
            _ => Err(PickleError::new("a call that makes no tensor from these arguments")),
        }
    }

    /// What is attached to a dictionary, such as torch's version of each module, does not matter; tensors and calls have
    /// nothing attached.
    fn build(&mut self) -> Result<(), PickleError> {
        self.pop()?;
        match self.top()? {
            Value::Dict(_) => Ok(()),
            other => Err(PickleError::new(format!("attributes on {}, expected none", other.describe()))),
        }
    }

    /// `("storage", class, key, device, length)`, and in old files a view, which must be none.
    fn persistent_id(&mut self) -> Result<(), PickleError> {
        let id = self.pop()?;
        let wrong = || PickleError::new("a reference to something that is no storage");
        let Value::Tuple(parts) = self.value(id) else { return Err(wrong()) };
        let (&[kind, class, key, _, len], view) = parts.split_first_chunk::<5>().ok_or_else(wrong)?;
        let storage = match (self.value(kind), self.value(class), self.value(key)) {
            (Value::Text("storage"), &Value::Global(Global::Storage(element)), Value::Text(key)) => {
                Storage { key, element, len: self.size(len)? }
            }
            _ => return Err(wrong()),
        };
        match view {
            [] => {}
            &[view] if matches!(self.value(view), Value::None) => {}
            _ => {
                return Err(PickleError::new(
                    "a storage that is a part of another; save the file again with torch",
                ));
            }
        }
        self.push(Value::Storage(storage))
    }

    fn append(&mut self, items: &[Id]) -> Result<(), PickleError> {
        match self.top()? {
            Value::List(list) => list.extend_from_slice(items),
            other => {
                return Err(PickleError::new(format!("entries for {}, expected a list", other.describe())));
            }
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), PickleError> {
        let (pairs, rest) = items.as_chunks::<2>();
        match self.top()? {
            Value::Dict(dict) if rest.is_empty() => {
                dict.extend(pairs.iter().map(|&[key, value]| (key, value)))
            }
            Value::Dict(_) => return Err(PickleError::new("a key without a value")),
            other => {
                return Err(PickleError::new(format!(
                    "entries for {}, expected a dictionary",
                    other.describe()
                )));
            }
        }
        Ok(())
    }

    fn memoize(&mut self, opcode: u8) -> Result<(), PickleError> {
        let key = match opcode {
            op::BINPUT => u32::from(self.u8()?),
            op::LONG_BINPUT => u32::from_le_bytes(self.array()?),
            _ => self.memo.len() as u32,
        };
        let &id = self.stack.last().ok_or_else(empty)?;
        if self.memo.len() == MAX_VALUES {
            return Err(too_many());
        }
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, opcode: u8) -> Result<(), PickleError> {
        let key = match opcode {
            op::BINGET => u32::from(self.u8()?),
            _ => u32::from_le_bytes(self.array()?),
        };
        match self.memo.get(&key) {
            Some(&id) => self.push_id(id),
            None => Err(PickleError::new(format!("value {key} is used before it is made"))),
        }
    }

    fn push(&mut self, value: Value<'a>) -> Result<(), PickleError> {
        if self.values.len() == MAX_VALUES {
            return Err(too_many());
        }
        let id = Id(self.values.len() as u32);
        self.values.push(value);
        self.push_id(id)
    }

    fn push_id(&mut self, id: Id) -> Result<(), PickleError> {
        if self.stack.len() == MAX_VALUES {
            return Err(too_many());
        }
        self.stack.push(id);
        Ok(())
    }

    /// Values below an open mark are out of reach.
    fn pop(&mut self) -> Result<Id, PickleError> {
        let bottom = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= bottom {
            return Err(empty());
        }
        self.stack.pop().ok_or_else(empty)
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>, PickleError> {
        let bottom = self.marks.last().copied().unwrap_or(0);
        let start = self.stack.len().checked_sub(count).filter(|&start| start >= bottom).ok_or_else(empty)?;
        Ok(self.stack.split_off(start))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        let start = self.marks.pop().ok_or_else(|| PickleError::new("an end without a beginning"))?;
        Ok(self.stack.split_off(start))
    }

    fn pop_text(&mut self) -> Result<&'a str, PickleError> {
        let id = self.pop()?;
        match self.value(id) {
            Value::Text(text) => Ok(text),
            other => Err(PickleError::new(format!("a name is {}, expected a text", other.describe()))),
        }
    }

    fn top(&mut self) -> Result<&mut Value<'a>, PickleError> {
        let &id = self.stack.last().ok_or_else(empty)?;
        Ok(&mut self.values[id.0 as usize])
    }

    fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    fn size(&self, id: Id) -> Result<usize, PickleError> {
        match self.value(id) {
            &Value::Int(value) => usize::try_from(value)
                .map_err(|_| PickleError::new(format!("a size of {value}, expected a non-negative number"))),
            other => Err(PickleError::new(format!("a size is {}, expected an integer", other.describe()))),
        }
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>, PickleError> {
        match self.value(id) {
            Value::Tuple(items) if items.len() <= MAX_DIMENSIONS => {
                items.iter().map(|&item| self.size(item)).collect()
            }
            Value::Tuple(items) => Err(PickleError::new(format!(
                "a tensor of {} dimensions, expected at most {MAX_DIMENSIONS}",
                items.len()
            ))),
            other => Err(PickleError::new(format!("a shape is {}, expected a tuple", other.describe()))),
        }
    }

    fn u8(&mut self) -> Result<u8, PickleError> {
        self.array().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        let rest = &self.bytes[self.at..];
        let &array = rest.first_chunk::<N>().ok_or_else(|| self.ends())?;
        self.at += N;
        Ok(array)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], PickleError> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..count).ok_or_else(|| self.ends())?;
        self.at += count;
        Ok(taken)
    }

    /// Up to a line's end, without it.
    fn line(&mut self) -> Result<&'a str, PickleError> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|&byte| byte == b'\n').ok_or_else(|| self.ends())?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| PickleError::new("a name is not UTF-8"))
    }

    fn ends(&self) -> PickleError {
        match self.bytes.len() {
            MAX_PICKLE_BYTES => PickleError::new(format!("it is longer than {MAX_PICKLE_BYTES} bytes")),
            len => PickleError::new(format!("it ends at byte {len} in the middle of an instruction")),
        }
    }
}

fn too_many() -> PickleError {
    PickleError::new(format!("it has more than {MAX_VALUES} values"))
}

fn empty() -> PickleError {
    PickleError::new("an instruction finds too few values")
}
