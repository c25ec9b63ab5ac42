//! Old and foreign tensor names: repositories that were saved without the name of the module around the layers
//! (`h.0.…` instead of `transformer.h.0.…`), or with one more around everything.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use backend::{Fp8Matrix, HostMatrix};

use super::{TensorMeta, WeightSource};
use crate::ModelError;
use crate::spec::DecoderSpec;

/// `source` under the names the spec expects, when one rule brings more of them about than are there as it is.
///
/// The rules are to leave out the leading component of the expected names, and to put another before them. Whatever is
/// still missing, or left over, is for the check of all tensors to say.
pub(crate) fn with_names_of(spec: &DecoderSpec, source: Box<dyn WeightSource>) -> Box<dyn WeightSource> {
    let expected: Vec<String> = spec.tensors().into_iter().map(|tensor| tensor.name).collect();
    let Some(in_file) = renaming(&expected, source.as_ref()) else { return source };
    Box::new(Renamed { source, in_file })
}

/// From expected names to those in the file, for those that differ.
fn renaming(expected: &[String], source: &dyn WeightSource) -> Option<HashMap<String, String>> {
    let names: HashSet<&str> = source.names().into_iter().collect();
    let missing: Vec<&str> =
        expected.iter().map(String::as_str).filter(|name| !names.contains(name)).collect();
    let first = missing.first()?;
    let stripped: HashMap<String, String> = missing
        .iter()
        .filter_map(|name| Some((*name, name.split_once('.')?.1)))
        .filter(|(_, in_file)| names.contains(in_file))
        .map(|(name, in_file)| (name.to_owned(), in_file.to_owned()))
        .collect();
    // One tensor that is missing tells all prefixes that could be meant.
    let prefixes = names.iter().filter_map(|name| name.strip_suffix(first)?.strip_suffix('.'));
    let prefixed = prefixes.filter(|prefix| !prefix.contains('.')).take(MAX_PREFIXES).map(|prefix| {
        let with_prefix = missing.iter().map(|name| (*name, format!("{prefix}.{name}")));
        let found = with_prefix.filter(|(_, in_file)| names.contains(in_file.as_str()));
        found.map(|(name, in_file)| (name.to_owned(), in_file)).collect()
    });
    let is_unique = |map: &HashMap<String, String>| {
        map.values().collect::<HashSet<_>>().len() == map.len() && !map.is_empty()
    };
    prefixed.chain([stripped]).filter(is_unique).max_by_key(HashMap::len)
}

/// Of a hostile file, which could have as many as tensors.
const MAX_PREFIXES: usize = 4;

struct Renamed {
    source: Box<dyn WeightSource>,
    in_file: HashMap<String, String>,
}

impl Renamed {
    fn in_file<'a>(&'a self, name: &'a str) -> &'a str {
        self.in_file.get(name).map_or(name, String::as_str)
    }
}

impl WeightSource for Renamed {
    fn names(&self) -> Vec<&str> {
        let taken: HashSet<&str> = self.in_file.values().map(String::as_str).collect();
        let rest = self.source.names().into_iter().filter(|name| !taken.contains(name));
        rest.chain(self.in_file.keys().map(String::as_str)).collect()
    }

    fn meta(&self, name: &str) -> Option<TensorMeta> {
        self.source.meta(self.in_file(name))
    }

    fn matrix(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<HostMatrix<'_>, ModelError> {
        self.source.matrix(self.in_file(name), rows, cols)
    }

    fn is_fp8(&self, name: &str) -> bool {
        self.source.is_fp8(self.in_file(name))
    }

    fn fp8(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Option<Result<Fp8Matrix<'_>, ModelError>> {
        self.source.fp8(self.in_file(name), rows, cols)
    }

    fn recycle(&self, matrix: HostMatrix<'_>) {
        self.source.recycle(matrix);
    }

    fn vector(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>, ModelError> {
        self.source.vector(self.in_file(name), range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tensors that have names only.
    struct Names(Vec<&'static str>);

    impl WeightSource for Names {
        fn names(&self) -> Vec<&str> {
            self.0.clone()
        }

        fn meta(&self, _: &str) -> Option<TensorMeta> {
            None
        }

        fn matrix(&self, name: &str, _: Range<usize>, _: Range<usize>) -> Result<HostMatrix<'_>, ModelError> {
            Err(super::super::unusable(name))
        }
    }

    fn expected() -> Vec<String> {
        ["transformer.wte.weight", "transformer.h.0.mlp.weight", "lm_head.weight"].map(str::to_owned).to_vec()
    }

    /// The names after renaming, sorted; none: nothing is renamed.
    fn renamed(names: &[&'static str]) -> Option<Vec<String>> {
        let source = Box::new(Names(names.to_vec()));
        let in_file = renaming(&expected(), source.as_ref())?;
        let renamed = Renamed { source, in_file };
        let mut names: Vec<String> = renamed.names().into_iter().map(str::to_owned).collect();
        names.sort();
        Some(names)
    }

    #[test]
    fn a_component_is_left_out_or_put_before() {
        let all = ["lm_head.weight", "transformer.h.0.mlp.weight", "transformer.wte.weight"];
        assert_eq!(
            renamed(&["transformer.wte.weight", "transformer.h.0.mlp.weight", "lm_head.weight"]),
            None
        );
        assert_eq!(renamed(&["wte.weight", "h.0.mlp.weight", "lm_head.weight"]).unwrap(), all);
        assert_eq!(
            renamed(&["m.transformer.wte.weight", "m.transformer.h.0.mlp.weight", "m.lm_head.weight"])
                .unwrap(),
            all
        );
        assert_eq!(
            renamed(&["m.transformer.wte.weight", "m.transformer.h.0.mlp.weight", "lm_head.weight"]).unwrap(),
            all
        );
    }

    #[test]
    fn what_does_not_fit_keeps_its_name() {
        assert_eq!(renamed(&["other.weight"]), None);
        // A second copy stays visible as surplus, and so does what belongs to nothing.
        let both = ["wte.weight", "h.0.mlp.weight", "transformer.h.0.mlp.weight", "extra"];
        assert_eq!(
            renamed(&both).unwrap(),
            ["extra", "h.0.mlp.weight", "transformer.h.0.mlp.weight", "transformer.wte.weight"]
        );
        // Two expected names that one tensor would have to be: neither.
        let two = ["a.x".to_owned(), "b.x".to_owned()];
        assert_eq!(renaming(&two, &Names(vec!["x"])), None);
    }

    #[test]
    fn tensors_are_asked_for_by_their_own_name() {
        let in_file = HashMap::from([("transformer.x".to_owned(), "x".to_owned())]);
        let renamed = Renamed { source: Box::new(Names(vec!["x", "y"])), in_file };
        let asked = |name: &str| renamed.vector(name, 0..1).unwrap_err().to_string();
        assert_eq!((asked("transformer.x").as_str(), asked("y").as_str()), ("x", "y"));
    }
}
