//! Typed reading of a configuration that collects every mistake before it gives up.

use hub::{HubError, ModelConfig};

use crate::ModelError;

/// Far above any model there is, far below what would overflow a product of three sizes or fill memory with layers.
const MAX_SIZE: usize = 1 << 24;
/// The widest heads in use have 576 elements.
const MAX_HEAD_DIM: usize = 4096;
/// The deepest models have some 130 layers.
const MAX_LAYERS: usize = 4096;

/// Reads values; a missing or impossible one becomes a placeholder and a line in the final error.
pub(super) struct ConfigReader<'a> {
    config: &'a ModelConfig,
    mistakes: Vec<String>,
}

impl<'a> ConfigReader<'a> {
    pub(super) fn new(config: &'a ModelConfig) -> Self {
        Self { config, mistakes: Vec::new() }
    }

    pub(super) fn config(&self) -> &'a ModelConfig {
        self.config
    }

    /// Whether sizes may be placeholders.
    pub(super) fn has_mistakes(&self) -> bool {
        !self.mistakes.is_empty()
    }

    /// Notes a mistake, in one line whatever values it quotes.
    pub(super) fn wrong(&mut self, mistake: impl AsRef<str>) {
        let visible = |c: char| if c.is_control() { ' ' } else { c };
        let line: String = mistake.as_ref().chars().map(visible).collect();
        self.mistakes.push(format!("config.json: {line}"));
    }

    /// The value of a getter whose error already names the key.
    pub(super) fn read<T>(&mut self, value: Result<Option<T>, HubError>) -> Option<T> {
        value.unwrap_or_else(|error| {
            let mistake = error.to_string();
            // A key that two read is one mistake.
            if !self.mistakes.contains(&mistake) {
                self.mistakes.push(mistake);
            }
            None
        })
    }

    /// A size that must be there, at least 1.
    pub(super) fn size(&mut self, key: &str) -> usize {
        match self.read(self.config.usize(key)) {
            Some(value) => self.checked(key, value, MAX_SIZE),
            None => self.missing(key),
        }
    }

    /// A size that may be absent.
    pub(super) fn size_or(&mut self, key: &str, default: usize) -> usize {
        let value = self.read(self.config.usize(key)).unwrap_or(default);
        self.checked(key, value, MAX_SIZE)
    }

    /// The size of a head whose elements a rotation pairs, `default` when absent.
    pub(super) fn head_dim(&mut self, default: usize) -> usize {
        let head_dim = match self.read(self.config.usize("head_dim")) {
            Some(head_dim) => head_dim,
            // What follows from a mistake is no second one.
            None if !self.mistakes.is_empty() => return 2,
            None => default,
        };
        if head_dim % 2 == 0 && (2..=MAX_HEAD_DIM).contains(&head_dim) {
            return head_dim;
        }
        self.wrong(format!("head_dim: found {head_dim}, expected an even number up to {MAX_HEAD_DIM}"));
        2
    }

    /// The number of layers.
    pub(super) fn num_layers(&mut self, key: &str) -> usize {
        match self.read(self.config.usize(key)) {
            Some(value) => self.checked(key, value, MAX_LAYERS),
            None => self.missing(key),
        }
    }

    /// A positive, finite number.
    pub(super) fn number_or(&mut self, key: &str, default: f64) -> f64 {
        let value = self.read(self.config.f64(key)).unwrap_or(default);
        if value.is_finite() && value > 0.0 {
            return value;
        }
        self.wrong(format!("{key}: found {value}, expected a positive number"));
        default
    }

    /// A positive number, where null says that there is none; `default` when absent.
    pub(super) fn nullable_number(&mut self, key: &str, default: Option<f64>) -> Option<f64> {
        match self.config.raw.get(key) {
            None => default,
            Some(value) if value.is_null() => None,
            Some(_) => Some(self.number_or(key, 1.0)),
        }
    }

    /// A switch.
    pub(super) fn flag_or(&mut self, key: &str, default: bool) -> bool {
        self.read(self.config.bool(key)).unwrap_or(default)
    }

    /// `spec`, unless there were mistakes.
    pub(super) fn finish<T>(self, spec: T) -> Result<T, ModelError> {
        if self.mistakes.is_empty() { Ok(spec) } else { Err(ModelError::Unusable(self.mistakes)) }
    }

    fn checked(&mut self, key: &str, value: usize, max: usize) -> usize {
        if (1..=max).contains(&value) {
            return value;
        }
        self.wrong(format!("{key}: found {value}, expected 1 to {max}"));
        1
    }

    fn missing(&mut self, key: &str) -> usize {
        if !self.mistakes.iter().any(|mistake| mistake.contains(&format!(" {key}:"))) {
            self.wrong(format!("{key}: missing, expected a positive integer"));
        }
        1
    }
}
