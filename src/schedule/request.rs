//! A request's own state, and the rules that end it.

use std::sync::{Arc, Mutex};

use super::record::{Ledger, Record, RecordHandle};
use crate::draft::{Guess, Lookup};
use crate::error::{Error, Result};
use crate::types::{RequestId, TokenId};
use crate::verify::{History, Params};

/// Why a request ended. The numbers are part of the Python interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Finish {
    /// It has not.
    Running = 0,
    /// An end-of-text or stop token, which is the last token reported.
    StopToken = 1,
    /// A stop string; the token that completed it is the last one reported.
    StopString = 2,
    /// `max_tokens` or the engine's context limit.
    Length = 3,
    /// A stage failed for it; the message comes with the event.
    Error = 4,
    /// It was aborted; there is no event for that.
    Abort = 5,
}

/// The bytes of every token, for stop strings.
#[derive(Clone, Debug, Default)]
pub struct Vocabulary {
    ends: Vec<u32>,
    bytes: Vec<u8>,
}

impl Vocabulary {
    /// One entry per token id, in order.
    ///
    /// # Errors
    /// `InvalidArgument` when all entries together exceed 4 GiB.
    pub fn new<B: AsRef<[u8]>>(tokens: impl IntoIterator<Item = B>) -> Result<Self> {
        let mut table = Self::default();
        for token in tokens {
            table.bytes.extend_from_slice(token.as_ref());
            let end = u32::try_from(table.bytes.len()).map_err(|_| Error::InvalidArgument {
                name: "vocabulary",
                got: format!("{} bytes", table.bytes.len()),
                expected: "less than 4 GiB".into(),
            })?;
            table.ends.push(end);
        }
        Ok(table)
    }

    /// Tokens in the table.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether the table has no token.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub(super) fn of(&self, token: TokenId) -> &[u8] {
        let at = token.0 as usize;
        let start = if at == 0 { 0 } else { self.ends[at - 1] as usize };
        &self.bytes[start..self.ends[at] as usize]
    }
}

/// Looks for stop strings in a growing text. Keeps only as much of it as a match may reach back.
#[derive(Clone, Debug)]
struct Watch {
    vocabulary: Arc<Vocabulary>,
    longest: usize,
    tail: Vec<u8>,
    total: usize,
    /// Bytes of the text that are certainly part of the output.
    text_end: usize,
}

impl Watch {
    /// Appends a token's bytes; says which stop string they complete, unless it is too `early` for one. `text_end` is where it began
    /// then, otherwise everything but the longest ending that may still become a stop string.
    fn push(&mut self, token: TokenId, stops: &[Vec<u8>], early: bool) -> Option<usize> {
        let fresh = self.vocabulary.of(token);
        let keep = self.tail.len().min(self.longest - 1);
        self.tail.drain(..self.tail.len() - keep);
        self.tail.extend_from_slice(fresh);
        self.total += fresh.len();
        let base = self.total - self.tail.len();
        // Matches that end in the new bytes: those before came too early.
        let complete = |stop: &Vec<u8>| {
            let from = (keep + 1).saturating_sub(stop.len());
            let fresh = self.tail[from..].windows(stop.len());
            fresh.into_iter().position(|window| window == stop).map(|at| from + at)
        };
        let at = |(which, stop)| complete(stop).map(|at| (at, which));
        let first = stops.iter().enumerate().filter_map(at).min();
        if let Some((first, which)) = first.filter(|_| !early) {
            self.text_end = base + first;
            return Some(which);
        }
        let held = (1..self.longest.min(self.tail.len() + 1))
            .rev()
            .find(|&len| {
                stops
                    .iter()
                    .any(|stop| stop.len() > len && self.tail.ends_with(&stop[..len]))
            })
            .unwrap_or(0);
        self.text_end = self.total - held;
        None
    }
}

/// A request, queued or running.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its number.
    pub id: RequestId,
    /// What it asks for.
    pub params: Params,
    /// Prompt and resolved output.
    pub tokens: Vec<TokenId>,
    /// Prompt tokens.
    pub prompt_len: usize,
    /// Counts for the penalties; empty when there are none.
    pub history: History,
    /// Most tokens prompt and output may have together.
    pub max_total: u32,
    /// What it was given, shared with whoever looks.
    pub record: RecordHandle,
    /// Prompt tokens found in the prefix cache when it last entered.
    pub cached_tokens: u32,
    /// What looks up what its text may go on with; nothing is kept before it is first asked.
    pub(crate) lookup: Lookup,
    /// What was looked up for the step at hand.
    pub(crate) guesses: Vec<Guess>,
    /// Which stop string it ended with.
    pub(crate) stopped_by: Option<usize>,
    watch: Option<Watch>,
}

impl Request {
    pub(crate) fn new(
        id: RequestId,
        prompt: Vec<TokenId>,
        params: Params,
        max_total: u32,
        vocabulary: Option<&Arc<Vocabulary>>,
        ledger: &Arc<Mutex<Ledger>>,
    ) -> Self {
        let longest = params.stop_strings.iter().map(Vec::len).max().unwrap_or(0);
        let watch = vocabulary.filter(|_| longest > 0).map(|vocabulary| Watch {
            vocabulary: Arc::clone(vocabulary),
            longest,
            tail: Vec::new(),
            total: 0,
            text_end: 0,
        });
        let history = if params.sampling.needs_history() {
            History::new(&prompt)
        } else {
            History::default()
        };
        let include_stop = params.include_stop;
        Self {
            id,
            prompt_len: prompt.len(),
            tokens: prompt,
            params,
            history,
            max_total,
            record: RecordHandle::new(ledger, Record::new(vocabulary, include_stop)),
            cached_tokens: 0,
            lookup: Lookup::new(),
            guesses: Vec::new(),
            stopped_by: None,
            watch,
        }
    }

    /// Appends committed tokens up to the one that the request ends with; says how many those are, and whether it does.
    pub(crate) fn extend(&mut self, tokens: &[i64], eos: &[TokenId]) -> (usize, Finish) {
        let committed = |&token: &i64| TokenId(token as u32);
        // The usual request watches for nothing but single tokens, and none of these is one of them.
        let early = self.tokens.len() - self.prompt_len < self.params.min_tokens as usize;
        let fits = self.tokens.len() + tokens.len() < self.max_total as usize;
        if fits && !early && self.watch.is_none() && !self.params.sampling.needs_history() {
            let eos = if self.params.ignore_eos { &[] } else { eos };
            let stops = &self.params.stop_ids;
            let ends = |token: TokenId| eos.contains(&token) || stops.contains(&token);
            if !tokens.iter().map(committed).any(ends) {
                self.tokens.extend(tokens.iter().map(committed));
                return (tokens.len(), Finish::Running);
            }
        }
        for (at, token) in tokens.iter().map(committed).enumerate() {
            let finish = self.push(token, eos);
            if finish != Finish::Running {
                return (at + 1, finish);
            }
        }
        (tokens.len(), Finish::Running)
    }

    /// Appends a committed token; says whether the request ends with it.
    pub(crate) fn push(&mut self, token: TokenId, eos: &[TokenId]) -> Finish {
        let early = self.tokens.len() - self.prompt_len < self.params.min_tokens as usize;
        self.tokens.push(token);
        if self.params.sampling.needs_history() {
            self.history.push(token);
        }
        let ends_text = !self.params.ignore_eos && eos.contains(&token) || self.params.stop_ids.contains(&token);
        // Early ones are masked where tokens are drawn; one that comes all the same is a token like any other.
        if ends_text && !early {
            // The stop token's own text is left out unless it is asked for; what was held back for a stop string is text after all.
            if let Some(watch) = &mut self.watch {
                let own = if self.params.include_stop {
                    watch.vocabulary.of(token).len()
                } else {
                    0
                };
                watch.text_end = watch.total + own;
            }
            return Finish::StopToken;
        }
        if let Some(watch) = &mut self.watch
            && let Some(which) = watch.push(token, &self.params.stop_strings, early)
        {
            if self.params.include_stop {
                watch.text_end += self.params.stop_strings[which].len();
            }
            self.stopped_by = Some(which);
            return Finish::StopString;
        }
        if self.tokens.len() >= self.max_total as usize {
            if let Some(watch) = &mut self.watch {
                watch.text_end = watch.total;
            }
            return Finish::Length;
        }
        Finish::Running
    }

    /// Output bytes that are certain to be text, `None` for a request without stop strings (all of them are).
    pub fn text_end(&self) -> Option<usize> {
        self.watch.as_ref().map(|watch| watch.text_end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(stops: &[&str], max_tokens: u32) -> Request {
        let table = Arc::new(Vocabulary::new(["a", "b", "ab", "ba", "", "abc"]).unwrap());
        let params = Params {
            stop_strings: stops.iter().map(|stop| stop.as_bytes().to_vec()).collect(),
            max_tokens,
            ..Params::default()
        };
        Request::new(
            RequestId(0),
            vec![TokenId(0)],
            params,
            1 + max_tokens,
            Some(&table),
            &Arc::default(),
        )
    }

    #[test]
    fn a_stop_string_across_tokens_ends_the_text_before_itself() {
        let mut request = request(&["bb"], 9);
        assert_eq!(request.push(TokenId(2), &[]), Finish::Running);
        assert_eq!(request.text_end(), Some(1), "the b may be the start of bb");
        assert_eq!(request.push(TokenId(4), &[]), Finish::Running);
        assert_eq!(request.push(TokenId(3), &[]), Finish::StopString);
        assert_eq!(request.text_end(), Some(1));
    }

    #[test]
    fn of_two_stop_strings_the_one_that_begins_first_cuts() {
        let mut request = request(&["c", "bc"], 9);
        assert_eq!(request.push(TokenId(5), &[]), Finish::StopString);
        assert_eq!(request.text_end(), Some(1));
    }

    #[test]
    fn text_held_back_for_a_stop_string_is_given_out_at_the_length_limit() {
        let mut request = request(&["bb"], 1);
        assert_eq!(request.push(TokenId(2), &[]), Finish::Length);
        assert_eq!(request.text_end(), Some(2));
    }

    #[test]
    fn before_min_tokens_neither_stop_tokens_nor_stop_strings_end_the_text() {
        let mut request = request(&["bb", "a"], 9);
        request.params.min_tokens = 2;
        request.params.stop_ids = vec![TokenId(5)];
        assert_eq!(request.push(TokenId(5), &[]), Finish::Running, "a stop token");
        assert_eq!(request.push(TokenId(2), &[]), Finish::Running, "the stop string a");
        assert_eq!(
            request.text_end(),
            Some(4),
            "the last b may be the start of bb, the rest is text"
        );
        assert_eq!(
            request.push(TokenId(4), &[]),
            Finish::Running,
            "what came too early stays text"
        );
        assert_eq!(request.push(TokenId(1), &[]), Finish::StopString);
        assert_eq!(
            request.text_end(),
            Some(4),
            "a stop string may begin among the early tokens"
        );
    }

    #[test]
    fn only_what_may_still_become_a_stop_string_is_held_back() {
        let mut request = request(&["bb", "bac"], 9);
        for (token, text_end) in [(1, 0), (0, 0), (0, 3), (1, 3), (0, 3), (4, 3), (1, 5)] {
            assert_eq!(request.push(TokenId(token), &[]), Finish::Running);
            assert_eq!(request.text_end(), Some(text_end), "after {:?}", request.tokens);
        }
    }

    #[test]
    fn a_request_knows_which_stop_string_it_ended_with_and_may_keep_it() {
        for (include, end) in [(false, 1), (true, 3)] {
            let mut request = request(&["c", "bc"], 9);
            request.params.include_stop = include;
            assert_eq!(request.push(TokenId(5), &[]), Finish::StopString);
            assert_eq!((request.stopped_by, request.text_end()), (Some(1), Some(end)));
        }
        let mut request = request(&["xx"], 9);
        request.params.include_stop = true;
        assert_eq!(request.push(TokenId(0), &[]), Finish::Running);
        assert_eq!(request.push(TokenId(5), &[TokenId(5)]), Finish::StopToken);
        assert_eq!((request.stopped_by, request.text_end()), (None, Some(4)));
    }

    #[test]
    fn a_vocabulary_has_as_many_tokens_as_it_was_given() {
        let table = Vocabulary::new(["a", "", "b"]).unwrap();
        assert_eq!((table.len(), table.is_empty()), (3, false));
        assert!(Vocabulary::new([""; 0]).unwrap().is_empty());
    }

    #[test]
    fn a_stop_token_adds_no_text() {
        let mut request = request(&["xx"], 9);
        assert_eq!(request.push(TokenId(0), &[]), Finish::Running);
        assert_eq!(request.push(TokenId(5), &[TokenId(5)]), Finish::StopToken);
        assert_eq!(request.text_end(), Some(1));
    }
}
