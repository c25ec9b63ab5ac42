//! When a text ends.

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The last allowed token, whatever it is.
    Length,
    /// The model's end-of-text token.
    EosToken,
    /// One of the request's stop sequences; it stays in the text.
    StopSequence,
}

/// What ends one request's text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoppingParams {
    /// At most this many tokens.
    pub max_new_tokens: u32,
    /// The text ends where one of these ends; literal text, no patterns.
    pub stop_sequences: Vec<String>,
    /// Go on after an end-of-text token.
    pub ignore_eos: bool,
}

/// [`StoppingParams`] and what they need to remember.
#[derive(Debug)]
pub(super) struct Stopping {
    params: StoppingParams,
    generated: u32,
    /// The end of the text, as much of it as the longest stop sequence can match.
    tail: String,
    tail_bytes: usize,
}

impl Stopping {
    /// Nothing generated yet.
    pub(super) fn new(params: StoppingParams) -> Self {
        // One more than the longest stop sequence for the newline that may follow it.
        let tail_bytes = params.stop_sequences.iter().map(|stop| stop.len() + 1).max().unwrap_or(0);
        Self { params, generated: 0, tail: String::new(), tail_bytes }
    }

    /// Tokens generated so far.
    pub(super) fn generated(&self) -> u32 {
        self.generated
    }

    /// Whether the text of the tokens decides anything.
    pub(super) fn needs_text(&self) -> bool {
        !self.params.stop_sequences.is_empty()
    }

    /// Whether the next token, should it be `id`, is the last whatever its text.
    pub(super) fn ends_with(&self, id: u32, eos_token_ids: &[u32]) -> bool {
        self.generated + 1 >= self.params.max_new_tokens
            || (!self.params.ignore_eos && eos_token_ids.contains(&id))
    }

    /// Takes the next token and the text it completed; says whether and why the request ends with it.
    pub(super) fn push(&mut self, id: u32, text: &str, eos_token_ids: &[u32]) -> Option<FinishReason> {
        let is_end = self.ends_with(id, eos_token_ids);
        self.generated += 1;
        if is_end {
            let is_full = self.generated >= self.params.max_new_tokens;
            return Some(if is_full { FinishReason::Length } else { FinishReason::EosToken });
        }
        if !self.needs_text() {
            return None;
        }
        self.tail.push_str(text);
        let is_hit = self.params.stop_sequences.iter().any(|stop| ends_with(&self.tail, stop));
        let surplus = self.tail.len().saturating_sub(self.tail_bytes);
        let cut = (0..=surplus).rev().find(|&index| self.tail.is_char_boundary(index)).unwrap_or(0);
        self.tail.drain(..cut);
        is_hit.then_some(FinishReason::StopSequence)
    }
}

/// TGI matches `stop$` as a pattern of Python's, whose `$` also stands before a newline that ends the text.
fn ends_with(text: &str, stop: &str) -> bool {
    text.ends_with(stop) || text.strip_suffix('\n').is_some_and(|text| text.ends_with(stop))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopping(max_new_tokens: u32, stop_sequences: &[&str], ignore_eos: bool) -> Stopping {
        let stop_sequences = stop_sequences.iter().map(|stop| stop.to_string()).collect();
        Stopping::new(StoppingParams { max_new_tokens, stop_sequences, ignore_eos })
    }

    fn push_all(stopping: &mut Stopping, texts: &[&str]) -> Vec<Option<FinishReason>> {
        texts.iter().map(|text| stopping.push(1, text, &[0])).collect()
    }

    #[test]
    fn a_stop_sequence_must_end_the_text() {
        let hit = Some(FinishReason::StopSequence);
        assert_eq!(push_all(&mut stopping(99, &["/test;"], false), &["/test", ";"]), [None, hit]);
        assert_eq!(push_all(&mut stopping(99, &["/test;"], false), &["/test; "]), [None]);
        assert_eq!(push_all(&mut stopping(99, &["/test;"], false), &["/te", "", "st;\n"]), [None, None, hit]);
    }

    #[test]
    fn special_characters_are_literal() {
        let mut dots = stopping(99, &["a.b*", "[x]"], false);
        assert_eq!(push_all(&mut dots, &["acb", "x", "a.b"]), [None; 3]);
        assert_eq!(push_all(&mut dots, &["*"]), [Some(FinishReason::StopSequence)]);
        assert_eq!(push_all(&mut dots, &["y", "[x]"])[1], Some(FinishReason::StopSequence));
    }

    #[test]
    fn long_texts_are_matched_in_bounded_memory() {
        let mut long = stopping(u32::MAX, &["\u{e4}nd\u{e9}"], false);
        for _ in 0..1000 {
            assert_eq!(long.push(1, "\u{65e5}\u{672c}\u{e4}", &[0]), None);
        }
        assert!(long.tail.len() < 16, "{}", long.tail.len());
        assert_eq!(push_all(&mut long, &["nd", "\u{e9}"])[1], Some(FinishReason::StopSequence));
    }

    #[test]
    fn the_last_allowed_token_reports_length_even_if_it_is_eos() {
        let mut five = stopping(5, &["x"], false);
        assert_eq!(push_all(&mut five, &["a"; 4]), [None; 4]);
        assert_eq!(five.push(0, "x", &[0]), Some(FinishReason::Length));
        assert_eq!(five.generated(), 5);
    }

    #[test]
    fn eos_can_be_ignored() {
        assert_eq!(stopping(5, &[], false).push(7, "", &[3, 7]), Some(FinishReason::EosToken));
        assert_eq!(stopping(5, &[], true).push(7, "", &[3, 7]), None);
    }
}
