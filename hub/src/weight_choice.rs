//! Which of a repository's files are the weights, by their names alone: the same on disk and on the Hub.

use std::path::Path;

use crate::error::HubError;
use crate::snapshot::ModelRef;

/// For messages.
pub(crate) const EXPECTED_WEIGHTS: &str = "*.safetensors, pytorch_model*.bin or *.gguf";
/// The file that lists which safetensors file holds which tensor.
pub(crate) const SAFETENSORS_INDEX: &str = "model.safetensors.index.json";
/// The same for PyTorch's files.
pub(crate) const PYTORCH_INDEX: &str = "pytorch_model.bin.index.json";
/// Upstream skips weight files whose name has one of these: they are trainer state, not weights.
const NOT_WEIGHTS: [&str; 3] = ["arguments", "args", "training"];

/// How weights are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WeightFormat {
    Safetensors,
    Pytorch,
    Gguf,
}

/// Where the names of the weight files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum WeightNames {
    /// In the index of this name.
    Indexed(&'static str),
    /// Here; at least one.
    Files(Vec<String>),
}

/// What was chosen among a repository's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WeightChoice {
    pub(crate) format: WeightFormat,
    pub(crate) names: WeightNames,
}

/// The weights among the names at a repository's root; `None` when there are none. Safetensors come before PyTorch's
/// files, which hold the same and take longer to check; both before GGUF, which has lost precision. `place` is what the
/// name of a GGUF file is appended to, to choose it.
///
/// # Errors
/// There are several GGUF files and nothing else.
pub(crate) fn choose_weights(
    model: &ModelRef,
    names: &[String],
    place: &str,
) -> Result<Option<WeightChoice>, HubError> {
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    let choice = |format, names| Ok(Some(WeightChoice { format, names }));
    let files = |format, files| choice(format, WeightNames::Files(files));
    if has(SAFETENSORS_INDEX) {
        return choice(WeightFormat::Safetensors, WeightNames::Indexed(SAFETENSORS_INDEX));
    }
    let safetensors = safetensors_among(names);
    if !safetensors.is_empty() {
        return files(WeightFormat::Safetensors, safetensors);
    }
    if has(PYTORCH_INDEX) {
        return choice(WeightFormat::Pytorch, WeightNames::Indexed(PYTORCH_INDEX));
    }
    let pytorch = weights_ending(names, ".bin");
    let usual: Vec<String> =
        pytorch.iter().filter(|name| name.starts_with("pytorch_model")).cloned().collect();
    if !usual.is_empty() {
        return files(WeightFormat::Pytorch, usual);
    }
    if let Some(file) = only_gguf(model, names, place)? {
        return files(WeightFormat::Gguf, vec![file]);
    }
    // Under any other name it may be PyTorch's as well; upstream tries these too.
    if pytorch.is_empty() { Ok(None) } else { files(WeightFormat::Pytorch, pytorch) }
}

/// The names at the root that end in `suffix` and may be weights.
fn weights_ending(names: &[String], suffix: &str) -> Vec<String> {
    let is_weights = |name: &&String| {
        name.ends_with(suffix) && !name.contains('/') && NOT_WEIGHTS.iter().all(|word| !name.contains(word))
    };
    names.iter().filter(is_weights).cloned().collect()
}

fn safetensors_among(names: &[String]) -> Vec<String> {
    let found = weights_ending(names, ".safetensors");
    // Some repositories hold everything twice: once in their own format under this name.
    let usual: Vec<String> = found.iter().filter(|name| !name.starts_with("consolidated")).cloned().collect();
    if usual.is_empty() { found } else { usual }
}

/// The files that a numbered series lacks, such as `model-00002-of-00003.safetensors` where the other two are; sorted. `files`
/// are sorted names without an index that would tell.
pub(crate) fn missing_of_series(files: &[String]) -> Vec<String> {
    let series = files.iter().filter_map(|name| {
        let (start, end) = name.split_once("-of-")?;
        let (stem, number) = start.rsplit_once('-')?;
        let (total, suffix) = end.split_once('.')?;
        let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        let count: usize = total.parse().ok().filter(|_| is_number(number) && is_number(total))?;
        Some((stem, total, suffix, count))
    });
    let name = |(stem, total, suffix, count): (&str, &str, &str, usize)| {
        let (stem, total, suffix) = (stem.to_owned(), total.to_owned(), suffix.to_owned());
        (1..=count).map(move |number| format!("{stem}-{number:05}-of-{total}.{suffix}"))
    };
    // One member stands for its series; of a hostile name's 99,999 files the first few are told.
    let mut missing: Vec<String> =
        series.take(1).flat_map(name).filter(|name| files.binary_search(name).is_err()).collect();
    missing.sort();
    missing
}

fn only_gguf(model: &ModelRef, names: &[String], place: &str) -> Result<Option<String>, HubError> {
    let found: Vec<&String> = names.iter().filter(|name| is_gguf(name) && !name.contains('/')).collect();
    match found.as_slice() {
        [] => Ok(None),
        [file] => Ok(Some((*file).clone())),
        [first, ..] => Err(HubError::AmbiguousGguf {
            model_id: model.model_id.clone(),
            choice: format!("{place}/{first}"),
            names: found.into_iter().cloned().collect(),
        }),
    }
}

/// The refusal for weights in a format that is not read; `None` when there are none of those either.
pub(crate) fn no_weights(model: &ModelRef, names: &[String]) -> Option<HubError> {
    let other = [".pt", ".pth", ".h5", ".msgpack", ".onnx"].map(|suffix| weights_ending(names, suffix));
    let found = other.iter().flatten().next()?;
    Some(HubError::UnsupportedWeights {
        model_id: model.model_id.clone(),
        found: found.clone(),
        remedy: "use a revision or a conversion with safetensors".to_owned(),
    })
}

pub(crate) fn is_gguf(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_knows_its_members() {
        let missing = |names: &[&str]| {
            missing_of_series(&names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())
        };
        let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
        assert_eq!(missing(&[second]), [first]);
        assert_eq!(missing(&[first, second]), [""; 0]);
        for other in
            ["model.safetensors", "a-of-b.bin", "model-1-of-2.bin", "one-of-00002.bin", "x-00001-of-2.bin"]
        {
            assert_eq!(missing(&[other]), [""; 0], "{other}");
        }
    }
}
