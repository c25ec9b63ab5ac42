//! The texts of a vocabulary, in one piece of memory, found by id and by text.

use ahash::RandomState;
use hashbrown::HashTable;

/// Ids of a vocabulary are consecutive but for a few; far larger ones are left to the library.
const MAX_HOLES: usize = 1 << 20;

/// Where no token is: no text is so long.
const NO_TOKEN: (u32, u32) = (u32::MAX, u32::MAX);

/// Tokens by id and by text.
pub(crate) struct TokenTable {
    /// All texts, one after the other.
    texts: String,
    /// By id: start and end in `texts`.
    spans: Vec<(u32, u32)>,
    /// Ids by their texts, each with its span: a look into `spans` would be one more that misses the processor's caches.
    ids: HashTable<((u32, u32), u32)>,
    hasher: RandomState,
    longest: usize,
}

impl TokenTable {
    /// The table of `entries`, whose texts lie one after the other in `texts`: each an id and the end of its text. None where
    /// an id or a text appears twice, or ids are far apart.
    pub(crate) fn new(texts: String, entries: &[(u32, u32)]) -> Option<Self> {
        let num_ids = entries.iter().map(|&(id, _)| id as usize + 1).max().unwrap_or(0);
        if num_ids > entries.len() + MAX_HOLES || texts.len() >= u32::MAX as usize {
            return None;
        }
        let mut spans = vec![NO_TOKEN; num_ids];
        let mut start = 0;
        for &(id, end) in entries {
            let span = &mut spans[id as usize];
            if *span != NO_TOKEN {
                return None;
            }
            *span = (start, end);
            start = end;
        }
        let longest = spans.iter().filter(|&&span| span != NO_TOKEN).map(|(start, end)| end - start).max();
        let mut table = Self {
            texts,
            spans,
            ids: HashTable::with_capacity(entries.len()),
            hasher: RandomState::new(),
            longest: longest.unwrap_or(0) as usize,
        };
        // In the order of the texts in memory.
        for &(id, _) in entries {
            let text = table.text(id)?;
            let hash = table.hasher.hash_one(text);
            if table.find(hash, text).is_some() {
                return None;
            }
            let span = table.spans[id as usize];
            let Self { texts, ids, hasher, .. } = &mut table;
            ids.insert_unique(hash, (span, id), |&(span, _)| hasher.hash_one(text_of(texts, span)));
        }
        Some(table)
    }

    /// Number of tokens.
    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    /// The largest id.
    pub(crate) fn largest_id(&self) -> Option<u32> {
        self.spans.len().checked_sub(1).and_then(|id| u32::try_from(id).ok())
    }

    /// Bytes of the longest text.
    pub(crate) fn longest(&self) -> usize {
        self.longest
    }

    /// The text of a token.
    pub(crate) fn text(&self, id: u32) -> Option<&str> {
        let span = *self.spans.get(id as usize)?;
        (span != NO_TOKEN).then(|| text_of(&self.texts, span))
    }

    /// The token of a text.
    pub(crate) fn id(&self, text: &str) -> Option<u32> {
        if text.len() > self.longest {
            return None;
        }
        self.find(self.hasher.hash_one(text), text)
    }

    /// All tokens, by id.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        (0..self.spans.len() as u32).filter_map(|id| self.text(id).map(|text| (text, id)))
    }

    fn find(&self, hash: u64, text: &str) -> Option<u32> {
        self.ids.find(hash, |&(span, _)| text_of(&self.texts, span) == text).map(|&(_, id)| id)
    }
}

/// The text of a token that is there.
fn text_of(texts: &str, (start, end): (u32, u32)) -> &str {
    &texts[start as usize..end as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(tokens: &[(&str, u32)]) -> Option<TokenTable> {
        let mut texts = String::new();
        let mut entries = Vec::new();
        for &(text, id) in tokens {
            texts.push_str(text);
            entries.push((id, texts.len() as u32));
        }
        TokenTable::new(texts, &entries)
    }

    #[test]
    fn tokens_are_found_by_id_and_by_text() {
        let table = table(&[("ab", 3), ("", 0), ("\u{e9}", 1)]).unwrap();
        assert_eq!(
            (table.id("ab"), table.id(""), table.id("\u{e9}"), table.id("b")),
            (Some(3), Some(0), Some(1), None)
        );
        assert_eq!(
            (table.text(3), table.text(0), table.text(2), table.text(4)),
            (Some("ab"), Some(""), None, None)
        );
        assert_eq!((table.len(), table.largest_id(), table.longest()), (3, Some(3), 2));
        assert_eq!(table.iter().collect::<Vec<_>>(), [("", 0), ("\u{e9}", 1), ("ab", 3)]);
    }

    #[test]
    fn what_is_not_one_to_one_is_refused() {
        assert!(table(&[("a", 0), ("a", 1)]).is_none());
        assert!(table(&[("a", 0), ("b", 0)]).is_none());
        assert!(table(&[("a", u32::MAX)]).is_none());
        assert_eq!(table(&[]).unwrap().largest_id(), None);
    }
}
