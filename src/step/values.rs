//! The values that move from stage to stage, as flat arrays that a caller can look at without copying.
//!
//! Their buffers are lent: a value that is dropped gives them back to the engine, so a steady loop allocates nothing.

use std::sync::{Arc, Mutex, PoisonError};

use crate::draft::{DraftTree, NO_NODE};
use crate::error::{Error, Result, indices};
use crate::types::TokenId;

/// Where dropped values leave their buffers, and dropped plans their step number.
#[derive(Debug, Default)]
pub(super) struct Shared {
    plans: Mutex<Vec<PlanArrays>>,
    accepted: Mutex<Vec<AcceptedArrays>>,
    events: Mutex<Vec<EventArrays>>,
    dropped: Mutex<Vec<u64>>,
}

fn with<T, R>(pool: &Mutex<T>, change: impl FnOnce(&mut T) -> R) -> R {
    // Spare buffers and numbers are complete at every moment, so a poisoned lock is still good.
    change(&mut pool.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Shared {
    pub(super) fn plan_arrays(&self) -> PlanArrays {
        let mut arrays = with(&self.plans, Vec::pop).unwrap_or_default();
        arrays.clear();
        arrays
    }

    pub(super) fn accepted(self: &Arc<Self>, step: u64) -> Accepted {
        let mut arrays = with(&self.accepted, Vec::pop).unwrap_or_default();
        arrays.clear();
        Accepted {
            step,
            arrays,
            failed: Vec::new(),
            shared: Arc::clone(self),
        }
    }

    pub(super) fn events(self: &Arc<Self>, step: u64) -> Events {
        let mut arrays = with(&self.events, Vec::pop).unwrap_or_default();
        arrays.clear();
        Events {
            step,
            arrays,
            errors: Vec::new(),
            shared: Arc::clone(self),
        }
    }

    pub(super) fn dropped(&self) -> Vec<u64> {
        with(&self.dropped, std::mem::take)
    }
}

/// The right to resolve a step. Dropping it calls the step off.
#[derive(Debug)]
pub(super) struct Ticket {
    step: u64,
    shared: Option<Arc<Shared>>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            with(&shared.dropped, |dropped| dropped.push(self.step));
        }
    }
}

macro_rules! arrays {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct $name { $($(#[$field_doc])* pub $field: Vec<$kind>,)* }

        impl $name {
            fn clear(&mut self) { $(self.$field.clear();)* }
        }
    };
}

arrays! {
    /// Layout of a step: `R` rows packed to `T` tokens, `N` of which need logits. Decoding rows come first.
    PlanArrays {
        /// `[R]` which request.
        request_ids: u64,
        /// `[R]` row of the page table.
        row_ids: i32,
        /// `[R + 1]` where each row's tokens start among the `T`.
        query_starts: i32,
        /// `[R]` valid KV tokens before this step, the position of the row's first token; a lower bound where
        /// `start_known` is false.
        context_lens: i32,
        /// `[T]` tokens; -1 for drafts not set yet, and for an anchor only the device knows.
        token_ids: i64,
        /// `[T]` positions; -1 where only the device knows.
        positions: i64,
        /// `[T]` KV slots the tokens are written to; -1 where only the device knows.
        slots: i64,
        /// `[N]` indices among the `T` whose logits are needed.
        logit_rows: i32,
        /// `[R + 1]` where each row's part of `logit_rows` starts.
        logit_starts: i32,
        /// `[n]` rows with drafts, `block_len > 1`.
        draft_rows: i32,
        /// `[R]` tokens of the row: 1 for a plain step, the anchor and its drafts, or a chunk of prompt.
        block_len: i32,
        /// `[R]` whether the row is a chunk of prompt.
        is_prefill: bool,
        /// `[R]` first position from which on the row's draft K/V are valid.
        draft_valid_from: i32,
        /// `[R]` whether the host knows where the row starts; always true without overlap.
        start_known: bool,
        /// `[R]` the checkpoint whose state the row starts from, to be copied before the pass; -1: its own state, or nothing at position 0.
        /// Empty for a target without state.
        state_restore: i32,
        /// `[R]` the checkpoint that gets the state after the row's last token, before the commit; -1: none. Empty for a target without state.
        state_save: i32,
        /// `[T]` the token that each one follows, as an index within its row, -1 for the first; empty while drafts are chains.
        parents: i32,
        /// `[T, words]` for attention: bit `j` of a token is set when token `j` of its row is itself or before it on its path;
        /// empty while drafts are chains.
        ancestors: u64,
    }
}

arrays! {
    /// What each row of a step keeps.
    AcceptedArrays {
        /// `[R]` drafts accepted.
        accepted: i32,
        /// Tokens gained: accepted drafts and the bonus token.
        tokens: i64,
        /// `[R + 1]` where each row's part of `tokens` starts.
        token_starts: i32,
        /// `[M]` indices among the plan's `T` whose KV and features are valid now.
        commit_rows: i64,
        /// `[R + 1]` where each row's part of `commit_rows` starts.
        commit_starts: i32,
        /// `[M]` the slot each of them keeps: that of its position. -1 where only the device knows.
        commit_slots: i64,
        /// Slots of accepted drafts whose KV was written elsewhere in their row's tree; to be moved before the commit.
        move_from: i64,
        /// Where it has to go, one for each. All of `move_from` is to be read before any of these is written.
        move_to: i64,
        /// Log-probability (natural, raw logits) of each token; NaN where it was not asked for.
        logprobs: f32,
        /// `[tokens + 1]` where each token's alternatives start.
        top_starts: i32,
        /// The likeliest tokens beside each token of a request that asked, falling.
        top_tokens: i64,
        /// Their log-probabilities.
        top_logprobs: f32,
    }
}

arrays! {
    /// What a step meant for its requests: one entry per request that gained tokens or ended.
    EventArrays {
        /// `[E]` which request.
        request_ids: u64,
        /// New output tokens, nothing after a stop.
        tokens: i64,
        /// `[E + 1]` where each request's part of `tokens` starts.
        token_starts: i32,
        /// `[E]` [`crate::schedule::Finish`] as a number, 0 while the request goes on.
        finish: u8,
        /// `[E]` positions drafted: the length of the chain, the depth of the tree.
        drafted: i32,
        /// `[E]` drafts verified.
        verified: i32,
        /// `[E]` drafts accepted.
        accepted: i32,
        /// `[E]` output bytes that are certain to be text, counted from the first output token; -1: all.
        text_ends: i64,
        /// `[E]` prompt tokens found in the prefix cache.
        cached_tokens: i32,
        /// Log-probability of each token; NaN where it was not asked for.
        logprobs: f32,
        /// `[tokens + 1]` where each token's alternatives start.
        top_starts: i32,
        /// The likeliest tokens beside each token, falling.
        top_tokens: i64,
        /// Their log-probabilities.
        top_logprobs: f32,
    }
}

/// A launched step. Dropping it before its commit calls the step off; its requests go on from where they were.
#[derive(Debug)]
pub struct StepPlan {
    step: u64,
    vocab_size: usize,
    arrays: PlanArrays,
    ticket: Option<Ticket>,
    shared: Arc<Shared>,
}

impl StepPlan {
    pub(super) fn new(step: u64, vocab_size: usize, arrays: PlanArrays, shared: &Arc<Shared>) -> Self {
        let ticket = Some(Ticket {
            step,
            shared: Some(Arc::clone(shared)),
        });
        Self {
            step,
            vocab_size,
            arrays,
            ticket,
            shared: Arc::clone(shared),
        }
    }

    /// Number of the step.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Its layout.
    pub fn arrays(&self) -> &PlanArrays {
        &self.arrays
    }

    pub(super) fn arrays_mut(&mut self) -> &mut PlanArrays {
        &mut self.arrays
    }

    /// Fills in the drafts. `drafts` is `[n, width]`, row-major, one row per entry of `draft_rows`; a row's first
    /// `block_len - 1` columns are verified.
    ///
    /// # Errors
    /// `Length` for a wrong number of rows, `InvalidArgument` when there are too few columns or a draft is not a token;
    /// no draft is set then.
    pub fn set_drafts(&mut self, drafts: &[i64], width: usize) -> Result<()> {
        self.still_chains()?;
        let rows = self.arrays.draft_rows.len();
        if drafts.len() != rows * width {
            return Err(Error::Length {
                name: "drafts",
                got: drafts.len(),
                expected: rows * width,
            });
        }
        let arrays = &mut self.arrays;
        let needed = |row: i32| arrays.block_len[row as usize] as usize - 1;
        let most = arrays.draft_rows.iter().map(|&row| needed(row)).max().unwrap_or(0);
        if width < most {
            let expected = format!("at least {most}, the longest block less its anchor");
            return Err(Error::InvalidArgument {
                name: "drafts",
                got: format!("{width} columns"),
                expected,
            });
        }
        for (at, &row) in arrays.draft_rows.iter().enumerate() {
            let used = &drafts[at * width..at * width + needed(row)];
            if let Some(bad) = used.iter().find(|&&draft| draft < 0 || draft >= self.vocab_size as i64) {
                return Err(Error::InvalidArgument {
                    name: "drafts",
                    got: format!("token {bad} for request {}", arrays.request_ids[row as usize]),
                    expected: format!("tokens in {}", indices(self.vocab_size)),
                });
            }
        }
        for (at, &row) in arrays.draft_rows.iter().enumerate() {
            let first = arrays.query_starts[row as usize] as usize + 1;
            let len = arrays.block_len[row as usize] as usize - 1;
            arrays.token_ids[first..first + len].copy_from_slice(&drafts[at * width..at * width + len]);
        }
        Ok(())
    }

    /// Verifies fewer drafts: the first `keep[i]` of row `draft_rows[i]`. The layout closes up; what the row reserved and does
    /// not use is given back at commit. May be called again, with less.
    ///
    /// # Errors
    /// `Length` for a wrong number of rows, `InvalidArgument` for fewer than none or more than there are; nothing changes then.
    pub fn narrow(&mut self, keep: &[i32]) -> Result<()> {
        self.still_chains()?;
        let arrays = &mut self.arrays;
        if keep.len() != arrays.draft_rows.len() {
            return Err(Error::Length {
                name: "keep",
                got: keep.len(),
                expected: arrays.draft_rows.len(),
            });
        }
        for (&row, &keep) in arrays.draft_rows.iter().zip(keep) {
            let drafts = arrays.block_len[row as usize] - 1;
            if !(0..=drafts).contains(&keep) {
                return Err(Error::InvalidArgument {
                    name: "keep",
                    got: format!("{keep} for request {}", arrays.request_ids[row as usize]),
                    expected: format!("0..{drafts}, its drafts"),
                });
            }
        }
        // Everything moves forward or stays, so one pass in order suffices.
        let (mut at, mut logit, mut draft) = (0, 0, 0);
        for row in 0..arrays.row_ids.len() {
            let from = arrays.query_starts[row] as usize;
            let mut len = arrays.block_len[row] as usize;
            let logits = arrays.logit_starts[row] as usize..arrays.logit_starts[row + 1] as usize;
            let mut kept_logits = logits.len();
            if draft < keep.len() && arrays.draft_rows[draft] as usize == row {
                len = 1 + keep[draft] as usize;
                kept_logits = len;
                draft += 1;
            }
            for i in 0..kept_logits {
                let moved = arrays.logit_rows[logits.start + i] as usize - from + at;
                arrays.logit_rows[logit + i] = moved as i32;
            }
            arrays.token_ids.copy_within(from..from + len, at);
            arrays.positions.copy_within(from..from + len, at);
            arrays.slots.copy_within(from..from + len, at);
            arrays.block_len[row] = len as i32;
            arrays.query_starts[row] = at as i32;
            arrays.logit_starts[row] = logit as i32;
            at += len;
            logit += kept_logits;
        }
        let rows = arrays.row_ids.len();
        arrays.query_starts[rows] = at as i32;
        arrays.logit_starts[rows] = logit as i32;
        for tokens in [&mut arrays.token_ids, &mut arrays.positions, &mut arrays.slots] {
            tokens.truncate(at);
        }
        arrays.logit_rows.truncate(logit);
        let PlanArrays {
            draft_rows, block_len, ..
        } = arrays;
        draft_rows.retain(|&row| block_len[row as usize] > 1);
        Ok(())
    }

    fn still_chains(&self) -> Result<()> {
        if self.arrays.parents.is_empty() {
            return Ok(());
        }
        let problem = "its drafts are trees already".into();
        Err(Error::OutOfTurn {
            step: self.step,
            problem,
        })
    }

    /// Drafts trees: `trees[i]` for row `draft_rows[i]`, its anchor included, with at most as many nodes as the row has tokens. The layout
    /// closes up as in [`Self::narrow`]; a token's position is that of its depth, its KV is written to the slot of its index.
    ///
    /// # Errors
    /// `OutOfTurn` for drafts that are trees already, and in a step whose rows start where only the device knows; `Length` for a wrong
    /// number of trees; `InvalidArgument` for one that is too large, has another anchor or tokens outside the vocabulary. Nothing
    /// changes then.
    pub fn set_trees(&mut self, trees: &[DraftTree]) -> Result<()> {
        let arrays = &self.arrays;
        if trees.len() != arrays.draft_rows.len() {
            return Err(Error::Length {
                name: "trees",
                got: trees.len(),
                expected: arrays.draft_rows.len(),
            });
        }
        let rows: Vec<usize> = arrays.draft_rows.iter().map(|&row| row as usize).collect();
        for (tree, &row) in trees.iter().zip(&rows) {
            if !arrays.start_known[row] {
                let problem = "trees need a step that knows where its rows start".into();
                return Err(Error::OutOfTurn {
                    step: self.step,
                    problem,
                });
            }
            let request = arrays.request_ids[row];
            let bad = |name, got: String, expected: String| Err(Error::InvalidArgument { name, got, expected });
            let room = arrays.block_len[row] as usize;
            if tree.len() > room {
                let got = format!("{} nodes for request {request}", tree.len());
                return bad("trees", got, format!("at most {room}, its anchor included"));
            }
            let (anchor, expected) = (tree.tokens()[0], arrays.token_ids[arrays.query_starts[row] as usize]);
            if i64::from(anchor.0) != expected {
                let got = format!("anchor {} for request {request}", anchor.0);
                return bad("trees", got, format!("its last token {expected}"));
            }
            if let Some(token) = tree.tokens().iter().find(|token| token.0 as usize >= self.vocab_size) {
                let got = format!("token {} for request {request}", token.0);
                return bad("trees", got, format!("tokens in {}", indices(self.vocab_size)));
            }
        }
        let keep: Vec<i32> = trees.iter().map(|tree| tree.len() as i32 - 1).collect();
        self.narrow(&keep)?;
        let arrays = &mut self.arrays;
        // Whatever is not a tree is a chain: prompts, plain rows.
        let longest = arrays.block_len.iter().max().map_or(0, |&len| len as usize);
        let words = longest.div_ceil(64);
        arrays.ancestors.resize(arrays.token_ids.len() * words, 0);
        let mut drawn = rows.iter().zip(trees).peekable();
        for row in 0..arrays.row_ids.len() {
            let first = arrays.query_starts[row] as usize;
            let len = arrays.block_len[row] as usize;
            let tree = drawn.next_if(|(at, _)| **at == row).map(|(_, tree)| tree);
            for node in 0..len {
                let parent = tree.map_or(node as i32 - 1, |tree| match tree.parents()[node] {
                    NO_NODE => -1,
                    parent => parent as i32,
                });
                arrays.parents.push(parent);
                let at = (first + node) * words;
                if parent >= 0 {
                    let from = (first + parent as usize) * words;
                    arrays.ancestors.copy_within(from..from + words, at);
                }
                arrays.ancestors[at + node / 64] |= 1 << (node % 64);
                if let Some(tree) = tree {
                    arrays.token_ids[first + node] = i64::from(tree.tokens()[node].0);
                    arrays.positions[first + node] = arrays.positions[first] + i64::from(tree.depths()[node]);
                }
            }
        }
        Ok(())
    }

    /// The tree of a row; `None` while drafts are chains.
    pub(super) fn tree_of(&self, row: usize) -> Result<Option<DraftTree>> {
        let arrays = &self.arrays;
        if arrays.parents.is_empty() {
            return Ok(None);
        }
        let nodes = arrays.query_starts[row] as usize..arrays.query_starts[row + 1] as usize;
        let tokens: Vec<TokenId> = arrays.token_ids[nodes.clone()]
            .iter()
            .map(|&token| TokenId(token as u32))
            .collect();
        let parents: Vec<u32> = arrays.parents[nodes].iter().map(|&parent| parent as u32).collect();
        DraftTree::from_parents(&tokens, &parents).map(Some)
    }

    /// Positions that a row drafts: the length of its chain, the depth of its tree.
    pub fn drafted(&self, row: usize) -> u32 {
        let arrays = &self.arrays;
        let nodes = arrays.query_starts[row] as usize..arrays.query_starts[row + 1] as usize;
        if arrays.parents.is_empty() {
            return nodes.len() as u32 - 1;
        }
        let positions = &arrays.positions[nodes];
        positions.iter().max().map_or(0, |last| (last - positions[0]) as u32)
    }

    /// Whether the step has been neither committed nor called off.
    pub fn is_open(&self) -> bool {
        self.ticket.is_some()
    }

    pub(super) fn redeem(&mut self) -> Option<Ticket> {
        self.ticket.take()
    }

    /// The drafts of a row.
    pub(super) fn drafts_of(&self, row: usize, into: &mut Vec<TokenId>) -> Result<()> {
        into.clear();
        let first = self.arrays.query_starts[row] as usize;
        let end = self.arrays.query_starts[row + 1] as usize;
        for &draft in &self.arrays.token_ids[first + 1..end] {
            if draft < 0 || draft >= self.vocab_size as i64 {
                let problem = "drafts are missing: call set_drafts before accepting".into();
                return Err(Error::OutOfTurn {
                    step: self.step,
                    problem,
                });
            }
            into.push(TokenId(draft as u32));
        }
        Ok(())
    }
}

impl Ticket {
    /// Ends the right without calling the step off.
    pub(super) fn spend(mut self) {
        self.shared = None;
    }
}

/// What a step keeps, row by row.
#[derive(Debug)]
pub struct Accepted {
    step: u64,
    arrays: AcceptedArrays,
    pub(super) failed: Vec<(usize, Error)>,
    shared: Arc<Shared>,
}

impl Accepted {
    /// Number of the step.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The numbers.
    pub fn arrays(&self) -> &AcceptedArrays {
        &self.arrays
    }

    pub(super) fn arrays_mut(&mut self) -> &mut AcceptedArrays {
        &mut self.arrays
    }

    /// Rows whose tokens could not be drawn, with the reason. Their requests end at commit, nobody else's.
    pub fn failed(&self) -> &[(usize, Error)] {
        &self.failed
    }
}

/// What a step meant for its requests.
#[derive(Debug)]
pub struct Events {
    step: u64,
    arrays: EventArrays,
    pub(super) errors: Vec<(u64, Error)>,
    shared: Arc<Shared>,
}

impl Events {
    /// Number of the step.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The numbers.
    pub fn arrays(&self) -> &EventArrays {
        &self.arrays
    }

    pub(super) fn arrays_mut(&mut self) -> &mut EventArrays {
        &mut self.arrays
    }

    /// Requests that ended with an error, and which.
    pub fn errors(&self) -> &[(u64, Error)] {
        &self.errors
    }
}

impl Drop for StepPlan {
    fn drop(&mut self) {
        let arrays = std::mem::take(&mut self.arrays);
        with(&self.shared.plans, |pool| pool.push(arrays));
    }
}

impl Drop for Accepted {
    fn drop(&mut self) {
        let arrays = std::mem::take(&mut self.arrays);
        with(&self.shared.accepted, |pool| pool.push(arrays));
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let arrays = std::mem::take(&mut self.arrays);
        with(&self.shared.events, |pool| pool.push(arrays));
    }
}

/// What a device drew for the `N` rows of a plan's `logit_rows`. Everything but the tokens may be left empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct DrawnRows<'a> {
    /// `[N]` tokens.
    pub tokens: &'a [i64],
    /// `[N]` their log-softmax of the raw logits, nats.
    pub logprobs: &'a [f32],
    /// `[N]` 0 where a token was drawn, otherwise why there is none (`RowStatus` of `cuda/params.h`).
    pub status: &'a [i32],
    /// The likeliest tokens per row.
    pub top_count: usize,
    /// `[N, top_count]` the likeliest tokens of the raw row, falling.
    pub top_tokens: &'a [i64],
    /// `[N, top_count]` their log-softmax, nats.
    pub top_logprobs: &'a [f32],
}

/// Distinct tokens of prompt and output with their number of occurrences in the output, of the rows that are penalised.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histories {
    /// `[R + 1]` where each row's entries start; a row without penalties has none.
    pub starts: Vec<i32>,
    /// Tokens, ascending within a row.
    pub tokens: Vec<i32>,
    /// Occurrences in the output; 0: in the prompt alone.
    pub counts: Vec<i32>,
}
