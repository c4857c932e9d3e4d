//! What a request has been given, kept for whoever looks: piece by piece while it runs, or once when it has ended.
//!
//! ```text
//!   commit ──> push(tokens)   a piece per step: numbers only, no text
//!   reader ──> read()         the pieces that nobody has read: their text is made now, from the bytes of their tokens
//! ```
//! A record is shared by the engine, which writes it, and readers, who may outlive the request. One lock is for all records of an engine: a
//! step writes all of them, and to lock each by itself would take longer than to write it. Text never shows half a character: bytes
//! that may still become one wait for the next piece, and so do bytes that may still become a stop string. Bytes that are no UTF-8 become
//! U+FFFD, one for each longest front of a character, as the decoders of Python and of the web do it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::request::{Finish, Vocabulary};
use crate::error::Result;
use crate::stats::Stats;
use crate::types::TokenId;

/// What one step added to an output. Small, because every step writes one for everybody.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Output tokens up to its end.
    end: u32,
    /// Output bytes that are certain to be text; `ALL_TEXT`: all.
    text_end: u32,
    /// Drafts accepted, positions drafted, drafts verified.
    accepted: u16,
    drafted: u16,
    verified: u16,
    finish: Finish,
}

const ALL_TEXT: u32 = u32::MAX;

impl Piece {
    fn new(end: usize, text_end: Option<usize>, finish: Finish) -> Self {
        Self {
            end: end as u32,
            text_end: text_end.map_or(ALL_TEXT, |end| end as u32),
            accepted: 0,
            drafted: 0,
            verified: 0,
            finish,
        }
    }

    fn text_end(&self) -> usize {
        if self.text_end == ALL_TEXT {
            return usize::MAX;
        }
        self.text_end as usize
    }
}

/// Blocks are far shorter than this.
fn small(count: u32) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}

/// A piece as its reader gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The text that became certain; `None` where tokens have no bytes.
    pub text: Option<String>,
    /// The new tokens.
    pub tokens: Vec<TokenId>,
    /// How many of them, the first ones, were drafts.
    pub accepted: u32,
    /// Why the request ended with this piece.
    pub finish: Finish,
}

/// What a committed step means for one request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gain<'a> {
    /// New tokens, nothing behind a stop.
    pub tokens: &'a [i64],
    /// Positions drafted, drafts verified, drafts accepted.
    pub drafted: u32,
    pub verified: u32,
    pub accepted: u32,
    pub text_end: Option<usize>,
    pub finish: Finish,
    /// Which stop string it ended with.
    pub stopped_by: Option<usize>,
}

/// Log-probabilities of an output's tokens, of a request that asked for them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// `[tokens]` log-softmax of the raw logits, nats.
    pub logprobs: Vec<f32>,
    /// `[tokens]` where each token's alternatives end.
    pub top_ends: Vec<u32>,
    /// The likeliest tokens beside each token, falling.
    pub top_tokens: Vec<i64>,
    /// Their log-probabilities.
    pub top_logprobs: Vec<f32>,
}

/// The output of a request so far.
#[derive(Clone, Debug)]
pub struct Record {
    tokens: Vec<TokenId>,
    pieces: Vec<Piece>,
    scores: Scores,
    cached_tokens: u32,
    begun: Instant,
    first: Option<Instant>,
    ended: Option<Instant>,
    finish: Finish,
    stopped_by: Option<usize>,
    error: Option<String>,
    /// Pieces that were read, and what has become of their text.
    read: usize,
    text: Option<Text>,
}

/// The records of an engine's requests.
#[derive(Debug, Default)]
pub struct Ledger {
    entries: Vec<Option<Entry>>,
    free: Vec<usize>,
}

#[derive(Debug)]
struct Entry {
    record: Record,
    handles: usize,
}

impl Ledger {
    /// Locks it. Nobody drops or clones a handle while they have the lock.
    pub(crate) fn lock(ledger: &Mutex<Self>) -> MutexGuard<'_, Self> {
        // Whole at every moment: a reader that fell has not changed what is written.
        ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn of(&mut self, handle: &RecordHandle) -> Option<&mut Record> {
        self.entry(handle.at).map(|entry| &mut entry.record)
    }

    fn entry(&mut self, at: usize) -> Option<&mut Entry> {
        self.entries.get_mut(at)?.as_mut()
    }
}

/// A record, for as long as anybody has one of these.
#[derive(Debug)]
pub struct RecordHandle {
    ledger: Arc<Mutex<Ledger>>,
    at: usize,
}

impl RecordHandle {
    pub(super) fn new(ledger: &Arc<Mutex<Ledger>>, record: Record) -> Self {
        let mut locked = Ledger::lock(ledger);
        let entry = Some(Entry { record, handles: 1 });
        let at = match locked.free.pop() {
            Some(at) => at,
            None => {
                locked.entries.push(None);
                locked.entries.len() - 1
            }
        };
        locked.entries[at] = entry;
        drop(locked);
        Self {
            ledger: Arc::clone(ledger),
            at,
        }
    }

    /// Looks at the record, or changes it.
    ///
    /// # Panics
    /// Never: a handle keeps its record.
    pub fn with<R>(&self, look: impl FnOnce(&mut Record) -> R) -> R {
        let mut ledger = Ledger::lock(&self.ledger);
        look(ledger.of(self).expect("a handle keeps its record"))
    }
}

impl Clone for RecordHandle {
    fn clone(&self) -> Self {
        if let Some(entry) = Ledger::lock(&self.ledger).entry(self.at) {
            entry.handles += 1;
        }
        Self {
            ledger: Arc::clone(&self.ledger),
            at: self.at,
        }
    }
}

impl Drop for RecordHandle {
    fn drop(&mut self) {
        let mut ledger = Ledger::lock(&self.ledger);
        let Some(entry) = ledger.entry(self.at) else { return };
        entry.handles -= 1;
        if entry.handles == 0 {
            ledger.entries[self.at] = None;
            ledger.free.push(self.at);
        }
    }
}

impl Record {
    /// `shows_stop`: the token that ends the output may have text.
    pub(super) fn new(vocabulary: Option<&Arc<Vocabulary>>, shows_stop: bool) -> Self {
        Self {
            tokens: Vec::new(),
            pieces: Vec::new(),
            scores: Scores::default(),
            cached_tokens: 0,
            begun: Instant::now(),
            first: None,
            ended: None,
            finish: Finish::Running,
            stopped_by: None,
            error: None,
            read: 0,
            text: vocabulary.map(|vocabulary| Text::new(Arc::clone(vocabulary), shows_stop)),
        }
    }

    /// Books a committed step.
    pub(crate) fn push(&mut self, gain: &Gain<'_>, cached_tokens: u32) {
        self.cached_tokens = cached_tokens;
        if self.tokens.is_empty() && !gain.tokens.is_empty() {
            self.first = Some(Instant::now());
        }
        self.tokens
            .extend(gain.tokens.iter().map(|&token| TokenId(token as u32)));
        if !gain.tokens.is_empty() || gain.finish != Finish::Running {
            self.pieces.push(Piece {
                accepted: small(gain.accepted),
                drafted: small(gain.drafted),
                verified: small(gain.verified),
                ..Piece::new(self.tokens.len(), gain.text_end, gain.finish)
            });
        }
        if gain.finish != Finish::Running {
            self.stopped_by = gain.stopped_by;
            self.end(gain.finish);
        }
    }

    /// Books the scores of the tokens that are pushed next. `top_starts` has one entry more than there are tokens.
    pub(crate) fn score(&mut self, logprobs: &[f32], top_starts: &[i32], top_tokens: &[i64], top_logprobs: &[f32]) {
        let scores = &mut self.scores;
        scores.logprobs.extend_from_slice(logprobs);
        for span in top_starts.windows(2) {
            let top = span[0] as usize..span[1] as usize;
            scores.top_tokens.extend_from_slice(&top_tokens[top.clone()]);
            scores.top_logprobs.extend_from_slice(&top_logprobs[top]);
            scores.top_ends.push(scores.top_tokens.len() as u32);
        }
    }

    /// Ends it with an error, of which this is the message.
    pub(crate) fn fail(&mut self, error: String, text_end: Option<usize>, cached_tokens: u32) {
        self.error = Some(error);
        self.cached_tokens = cached_tokens;
        self.pieces.push(Piece::new(self.tokens.len(), text_end, Finish::Error));
        self.end(Finish::Error);
    }

    /// Ends it where it is. What was held back is not shown.
    pub(crate) fn abort(&mut self) {
        self.pieces.push(Piece::new(self.tokens.len(), Some(0), Finish::Abort));
        self.end(Finish::Abort);
    }

    fn end(&mut self, finish: Finish) {
        self.finish = finish;
        self.ended = Some(Instant::now());
    }

    /// The oldest piece that was not read.
    pub fn read(&mut self) -> Option<Reading> {
        let piece = *self.pieces.get(self.read)?;
        let begin = self
            .read
            .checked_sub(1)
            .map_or(0, |last| self.pieces[last].end as usize);
        self.read += 1;
        let tokens = &self.tokens[begin..piece.end as usize];
        Some(Reading {
            text: self
                .text
                .as_mut()
                .map(|text| text.push(tokens, piece.text_end(), piece.finish)),
            tokens: tokens.to_vec(),
            // The accepted drafts come first; a stop may have cut the block short.
            accepted: u32::from(piece.accepted).min(tokens.len() as u32),
            finish: piece.finish,
        })
    }

    /// Output tokens.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// The text of all pieces, those that were not read among them, which count as read now; `None` where tokens have no bytes.
    pub fn text(&mut self) -> Option<&str> {
        let text = self.text.as_mut()?;
        let mut begin = self
            .read
            .checked_sub(1)
            .map_or(0, |last| self.pieces[last].end as usize);
        for piece in &self.pieces[self.read..] {
            text.push(&self.tokens[begin..piece.end as usize], piece.text_end(), piece.finish);
            begin = piece.end as usize;
        }
        self.read = self.pieces.len();
        Some(&text.shown)
    }

    /// Log-probabilities; empty unless the request asked for them.
    pub fn scores(&self) -> &Scores {
        &self.scores
    }

    /// Acceptance over the passes after the first token: the pass over the prompt is none of those that drafting could save.
    ///
    /// # Errors
    /// None for a record that a step has written.
    pub fn stats(&self) -> Result<Stats> {
        let mut stats = Stats::new();
        for pair in self.pieces.windows(2) {
            let (before, piece) = (pair[0].end, pair[1]);
            if before > 0 && piece.end > before {
                let (verified, drafted) = (u32::from(piece.verified), u32::from(piece.drafted));
                stats.record_tree(verified, drafted, u32::from(piece.accepted), piece.end - before)?;
            }
        }
        Ok(stats)
    }

    /// Prompt tokens found in the prefix cache when it last entered.
    pub fn cached_tokens(&self) -> u32 {
        self.cached_tokens
    }

    /// Why it ended; `Running` while it has not.
    pub fn finish(&self) -> Finish {
        self.finish
    }

    /// Which of its stop strings it ended with.
    pub fn stopped_by(&self) -> Option<usize> {
        self.stopped_by
    }

    /// The message of the failure it ended with.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Time from its arrival to its first token, and to its end; to now where these are to come.
    pub fn times(&self) -> (Duration, Duration) {
        let until = |then: Option<Instant>| then.unwrap_or_else(Instant::now).duration_since(self.begun);
        let total = until(self.ended);
        (self.first.map_or(total, |first| until(Some(first))), total)
    }
}

/// Text of growing bytes.
#[derive(Clone, Debug)]
struct Text {
    vocabulary: Arc<Vocabulary>,
    /// Bytes of the tokens pushed that are not shown, behind those that are.
    rest: Vec<u8>,
    /// Bytes up to the beginning of `rest`, and up to the end of what was certain.
    at: usize,
    certain: usize,
    shown: String,
    shows_stop: bool,
}

impl Text {
    fn new(vocabulary: Arc<Vocabulary>, shows_stop: bool) -> Self {
        Self {
            vocabulary,
            rest: Vec::new(),
            at: 0,
            certain: 0,
            shown: String::new(),
            shows_stop,
        }
    }

    /// Takes tokens; `text_end` bytes of the output are known to be text. Returns what that makes visible.
    fn push(&mut self, tokens: &[TokenId], text_end: usize, finish: Finish) -> String {
        let ended = finish == Finish::StopToken && !self.shows_stop;
        let tokens = &tokens[..tokens.len() - usize::from(ended)];
        for &token in tokens {
            self.rest.extend_from_slice(self.vocabulary.of(token));
        }
        if finish == Finish::Abort {
            return String::new();
        }
        let end = text_end.min(self.at + self.rest.len());
        self.certain = self.certain.max(end);
        let begun = self.shown.len();
        let taken = decode(
            &self.rest[..self.certain - self.at],
            finish != Finish::Running,
            &mut self.shown,
        );
        self.rest.drain(..taken);
        self.at += taken;
        self.shown[begun..].to_owned()
    }
}

/// Appends the text of `bytes`, up to a character that may still be completed unless this is the `last` of them; says how many bytes that
/// were.
fn decode(bytes: &[u8], last: bool, text: &mut String) -> usize {
    let mut at = 0;
    while at < bytes.len() {
        let error = match std::str::from_utf8(&bytes[at..]) {
            Ok(rest) => {
                text.push_str(rest);
                return bytes.len();
            }
            Err(error) => error,
        };
        let valid = at + error.valid_up_to();
        text.push_str(std::str::from_utf8(&bytes[at..valid]).unwrap_or_default());
        let Some(broken) = error.error_len().or(last.then_some(bytes.len() - valid)) else {
            return valid;
        };
        text.push(char::REPLACEMENT_CHARACTER);
        at = valid + broken;
    }
    at
}
