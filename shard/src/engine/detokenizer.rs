//! The text of a growing sequence, piece by piece.

use super::vocabulary::Vocabulary;

/// Tokens before the end of the prompt that are decoded together with the first generated ones: some tokenizers write a
/// token differently at the start of a text.
const CONTEXT_TOKENS: usize = 5;

/// What a decoder prints for bytes that are not, or not yet, a character.
const INCOMPLETE: char = '\u{fffd}';

/// Turns each new token into the text it adds. A token that ends in the middle of a character adds nothing; the one that
/// completes the character adds all of it.
#[derive(Debug)]
pub(super) struct Detokenizer {
    /// First token that is decoded.
    prefix_offset: usize,
    /// First token whose text has not been given out.
    read_offset: usize,
}

impl Detokenizer {
    /// For a prompt of `prompt_len` tokens.
    pub(super) fn new(prompt_len: usize) -> Self {
        Self { prefix_offset: prompt_len.saturating_sub(CONTEXT_TOKENS), read_offset: prompt_len }
    }

    /// The text that the tokens at the end of `ids` (prompt and answer so far) add to what was given out.
    ///
    /// # Errors
    /// The tokenizer's own words.
    pub(super) fn next_text(&mut self, ids: &[u32], vocabulary: &Vocabulary) -> Result<String, String> {
        let known = vocabulary.decode(&ids[self.prefix_offset..self.read_offset], false)?;
        let text = vocabulary.decode(&ids[self.prefix_offset..], false)?;
        if text.ends_with(INCOMPLETE) {
            return Ok(String::new());
        }
        let added = remainder(&text, &known);
        if !added.is_empty() {
            self.prefix_offset = self.read_offset;
            self.read_offset = ids.len();
        }
        Ok(added.to_string())
    }
}

/// The text of all tokens after the first `prompt_len`, without special tokens. Ends where the pieces of
/// [`Detokenizer::next_text`] end: half a character at the end is left out.
///
/// # Errors
/// The tokenizer's own words.
pub(super) fn generated_text(
    ids: &[u32],
    prompt_len: usize,
    vocabulary: &Vocabulary,
) -> Result<String, String> {
    let context = prompt_len.saturating_sub(1);
    let known = vocabulary.decode(&ids[context..prompt_len], true)?;
    let text = vocabulary.decode(&ids[context..], true)?;
    Ok(remainder(&text, &known).trim_end_matches(INCOMPLETE).to_string())
}

/// What `text` has after `known`; by count when a decoder has changed `known` itself in the longer text.
fn remainder<'a>(text: &'a str, known: &str) -> &'a str {
    if let Some(rest) = text.strip_prefix(known) {
        return rest;
    }
    let mut chars = text.chars();
    for _ in known.chars() {
        chars.next();
    }
    chars.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::byte_vocabulary;

    /// One token a byte: every character beyond ASCII comes in several tokens.
    fn pieces(prompt: &str, answer: &str) -> Vec<String> {
        let vocabulary = byte_vocabulary(&[]);
        let mut ids = vocabulary.encode(prompt, false).unwrap();
        let mut detokenizer = Detokenizer::new(ids.len());
        let answer = vocabulary.encode(answer, false).unwrap();
        answer
            .into_iter()
            .map(|id| {
                ids.push(id);
                detokenizer.next_text(&ids, &vocabulary).unwrap()
            })
            .collect()
    }

    #[test]
    fn characters_come_whole() {
        assert_eq!(pieces("ab", "c\u{e4}!"), ["c", "", "\u{e4}", "!"]);
        assert_eq!(pieces("", "\u{1f980}x"), ["", "", "", "\u{1f980}", "x"]);
        assert_eq!(pieces("\u{65e5}", "\u{672c}"), ["", "", "\u{672c}"]);
    }

    #[test]
    fn pieces_make_the_text() {
        let vocabulary = byte_vocabulary(&[]);
        for (prompt, answer) in [("h\u{e9}llo ", "w\u{f6}rld \u{1f980}\u{1f980}"), ("", "plain")] {
            let prompt_ids = vocabulary.encode(prompt, false).unwrap();
            let ids = [prompt_ids.clone(), vocabulary.encode(answer, false).unwrap()].concat();
            assert_eq!(pieces(prompt, answer).concat(), answer);
            assert_eq!(generated_text(&ids, prompt_ids.len(), &vocabulary).unwrap(), answer);
        }
    }

    #[test]
    fn ids_of_a_padded_embedding_have_no_text() {
        let vocabulary = byte_vocabulary(&[]);
        let ids = [vocabulary.encode("ab", false).unwrap(), vec![5000, u32::MAX]].concat();
        assert_eq!(Detokenizer::new(2).next_text(&ids, &vocabulary).unwrap(), "");
        let more = [ids, vocabulary.encode("c", false).unwrap()].concat();
        assert_eq!(Detokenizer::new(2).next_text(&more, &vocabulary).unwrap(), "c");
        assert_eq!(generated_text(&more, 2, &vocabulary).unwrap(), "c");
        assert!(!vocabulary.is_special(5000));
    }

    #[test]
    fn half_a_character_at_the_end_is_left_out() {
        let vocabulary = byte_vocabulary(&[]);
        let mut ids = vocabulary.encode("ab\u{1f980}", false).unwrap();
        ids.pop();
        assert_eq!(generated_text(&ids, 1, &vocabulary).unwrap(), "b");
    }

    #[test]
    fn special_tokens_have_text_in_pieces_but_not_in_the_whole() {
        let vocabulary = byte_vocabulary(&["<end>"]);
        let end = vocabulary.encode("<end>", false).unwrap();
        assert_eq!(end.len(), 1);
        assert!(vocabulary.is_special(end[0]));
        let ids = [vocabulary.encode("ab", false).unwrap(), end].concat();
        assert_eq!(Detokenizer::new(2).next_text(&ids, &vocabulary).unwrap(), "<end>");
        assert_eq!(generated_text(&ids, 1, &vocabulary).unwrap(), "b");
    }
}
