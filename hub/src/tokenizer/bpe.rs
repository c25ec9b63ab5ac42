//! Byte pair encoding over a vocabulary without a text of its own for each token: read in a third of the time that the
//! library's takes, with the same tokens.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use ahash::RandomState;
use tokenizers::Token;

use super::token_table::TokenTable;

/// Neither side of a symbol.
const NONE: u32 = u32::MAX;

/// How texts are cut.
#[derive(Default)]
pub(crate) struct BpeOptions {
    /// Stands for characters that are not in the vocabulary; without one they vanish.
    pub(crate) unk_token: Option<String>,
    /// One unknown token for several unknown characters in a row.
    pub(crate) fuse_unk: bool,
    /// Unknown characters become their bytes, `<0x0A>`, where the vocabulary has them.
    pub(crate) byte_fallback: bool,
    /// A word of the vocabulary is its token, whatever the merges say.
    pub(crate) ignore_merges: bool,
}

/// A byte pair encoding.
pub(crate) struct Bpe {
    tokens: TokenTable,
    merges: Merges,
    unk_id: Option<u32>,
    fuse_unk: bool,
    /// By byte, where unknown characters become their bytes.
    byte_ids: Option<Box<[Option<u32>; 256]>>,
    ignore_merges: bool,
}

/// By two neighbouring tokens: the rank of their merge, the lowest first, and what they become.
type Merges = HashMap<(u32, u32), (u32, u32), RandomState>;

impl Bpe {
    /// The encoding that merges the tokens of each of `merges`, the first one first.
    ///
    /// # Errors
    /// A merge or an option names a token that is not there.
    pub(crate) fn new<'a>(
        tokens: TokenTable,
        merges: impl ExactSizeIterator<Item = (&'a str, &'a str)>,
        options: &BpeOptions,
    ) -> Result<Self, String> {
        let id = |text: &str| tokens.id(text).ok_or_else(|| format!("{text:?} is not in the vocabulary"));
        let mut ranks = Merges::with_capacity_and_hasher(merges.len(), RandomState::new());
        let mut merged = String::with_capacity(tokens.longest());
        let mut last = 0;
        for (rank, (left, right)) in (0..).zip(merges) {
            merged.clear();
            merged.push_str(left);
            merged.push_str(right);
            let pair = (id(left)?, id(right)?);
            // Vocabularies are usually in the order of their merges: the token is the last one, or the next.
            let near = [last, last + 1].into_iter().find(|&id| tokens.text(id) == Some(&merged));
            let whole = near.or_else(|| tokens.id(&merged));
            let whole = whole.ok_or_else(|| format!("merge {:?} makes no token", [left, right]))?;
            last = whole;
            ranks.insert(pair, (rank, whole));
        }
        let unk_id = options.unk_token.as_deref().map(id).transpose()?;
        let byte_id = |byte: usize| tokens.id(&format!("<{byte:#04X}>"));
        let byte_ids = options.byte_fallback.then(|| Box::new(std::array::from_fn(byte_id)));
        Ok(Self {
            merges: ranks,
            unk_id,
            fuse_unk: options.fuse_unk,
            byte_ids,
            ignore_merges: options.ignore_merges,
            tokens,
        })
    }

    /// The vocabulary.
    pub(super) fn tokens(&self) -> &TokenTable {
        &self.tokens
    }

    /// The tokens of a word, with the bytes they come from.
    pub(super) fn tokenize(&self, word: &str) -> Vec<Token> {
        if self.ignore_merges
            && let Some(id) = self.tokens.id(word)
        {
            return vec![Token::new(id, word.to_owned(), (0, word.len()))];
        }
        let mut symbols = self.symbols(word);
        self.merge(&mut symbols);
        let mut start = 0;
        let token = |symbol: &Symbol| {
            let end = start + symbol.len as usize;
            let token = Token::new(
                symbol.id,
                self.tokens.text(symbol.id).unwrap_or_default().to_owned(),
                (start, end),
            );
            start = end;
            token
        };
        symbols.iter().filter(|symbol| symbol.len > 0).map(token).collect()
    }

    /// One symbol for each character, or for each byte of an unknown one.
    fn symbols(&self, word: &str) -> Vec<Symbol> {
        let mut symbols = Symbols(Vec::with_capacity(word.len()));
        let mut unknown: Option<u32> = None;
        for (start, character) in word.char_indices() {
            let len = character.len_utf8();
            let text = &word[start..start + len];
            if let Some(id) = self.tokens.id(text) {
                if let Some((unk_id, len)) = self.unk_id.zip(unknown.take()) {
                    symbols.push(unk_id, len);
                }
                symbols.push(id, len as u32);
                continue;
            }
            if let Some(bytes) = self.bytes_of(text) {
                bytes.into_iter().for_each(|id| symbols.push(id, 1));
                continue;
            }
            if let Some(unk_id) = self.unk_id {
                match &mut unknown {
                    Some(before) if self.fuse_unk => *before += len as u32,
                    _ => {
                        if let Some(before) = unknown.replace(len as u32) {
                            symbols.push(unk_id, before);
                        }
                    }
                }
            }
        }
        if let Some((unk_id, len)) = self.unk_id.zip(unknown) {
            symbols.push(unk_id, len);
        }
        symbols.0
    }

    /// The tokens of a character's bytes, where there is one for each.
    fn bytes_of(&self, text: &str) -> Option<Vec<u32>> {
        let ids = self.byte_ids.as_ref()?;
        text.bytes().map(|byte| ids[usize::from(byte)]).collect()
    }

    /// Merges neighbours, the lowest rank first and of one rank the leftmost; what was merged away has no length any more.
    fn merge(&self, symbols: &mut [Symbol]) {
        let candidate = |symbols: &[Symbol], left: u32, right: u32| {
            let pair = (symbols[left as usize].id, symbols[right as usize].id);
            self.merges.get(&pair).map(|&(rank, id)| Reverse((rank, left, id)))
        };
        let pairs = (1..symbols.len() as u32).filter_map(|right| candidate(symbols, right - 1, right));
        let mut queue: BinaryHeap<Reverse<(u32, u32, u32)>> = pairs.collect();
        while let Some(Reverse((_, left, id))) = queue.pop() {
            let Symbol { len, next, .. } = symbols[left as usize];
            // Either side may have been merged with another neighbour since.
            if len == 0
                || next == NONE
                || candidate(symbols, left, next).is_none_or(|Reverse(now)| now.2 != id)
            {
                continue;
            }
            let right = symbols[next as usize];
            symbols[next as usize].len = 0;
            let symbol = &mut symbols[left as usize];
            (symbol.id, symbol.len, symbol.next) = (id, symbol.len + right.len, right.next);
            let previous = symbol.previous;
            if right.next != NONE {
                symbols[right.next as usize].previous = left;
                queue.extend(candidate(symbols, left, right.next));
            }
            if previous != NONE {
                queue.extend(candidate(symbols, previous, left));
            }
        }
    }
}

/// A part of a word.
#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    /// Bytes of the word.
    len: u32,
    previous: u32,
    next: u32,
}

/// A word's parts while they are put one after the other.
struct Symbols(Vec<Symbol>);

impl Symbols {
    fn push(&mut self, id: u32, len: u32) {
        let index = self.0.len() as u32;
        let previous = match self.0.last_mut() {
            Some(last) => {
                last.next = index;
                index - 1
            }
            None => NONE,
        };
        self.0.push(Symbol { id, len, previous, next: NONE });
    }
}
