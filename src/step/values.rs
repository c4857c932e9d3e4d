//! The values that move from stage to stage, as flat arrays that a caller can look at without copying.
//!
//! Their buffers are lent: a value that is dropped gives them back to the engine, so a steady loop allocates nothing.

use std::sync::{Arc, Mutex, PoisonError};

use crate::device::cuda::params::SamplingRow;
use crate::error::{Error, Result, indices};

/// Where dropped values leave their buffers, and dropped plans their step number.
#[derive(Debug, Default)]
pub(super) struct Shared {
    plans: Mutex<Vec<PlanArrays>>,
    accepted: Mutex<Vec<AcceptedArrays>>,
    events: Mutex<Vec<EventArrays>>,
    sampling: Mutex<Vec<SamplingArrays>>,
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

    pub(super) fn sampling_arrays(&self) -> SamplingArrays {
        let mut arrays = with(&self.sampling, Vec::pop).unwrap_or_default();
        arrays.clear();
        arrays
    }

    pub(super) fn return_sampling(&self, arrays: SamplingArrays) {
        with(&self.sampling, |pool| pool.push(arrays));
    }

    pub(super) fn return_plan(&self, arrays: PlanArrays) {
        with(&self.plans, |pool| pool.push(arrays));
    }

    pub(super) fn drop_step(&self, step: u64) {
        with(&self.dropped, |dropped| dropped.push(step));
    }

    pub(super) fn dropped(&self) -> Vec<u64> {
        with(&self.dropped, std::mem::take)
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
        /// `[R]` sampling temperatures.
        temperatures: f32,
        /// `[R]` seeds of the requests' draws.
        seeds: u64,
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

arrays! {
    /// What the `R` rows of a step ask of their draws, as `sample_rows` of `cuda/params.h` reads it.
    SamplingArrays {
        /// `[R]` one per row; neutral for a row whose request has left.
        rows: SamplingRow,
        /// Distinct tokens of prompt and output, ascending within a row, of rows that are penalised.
        history_tokens: i32,
        /// Their occurrences in the output; 0: in the prompt alone.
        history_counts: i32,
        /// Tokens with a bias, then tokens that are masked, either ascending within a row.
        bias_tokens: i32,
        /// Their biases; -inf beside a mask.
        bias_values: f32,
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
    /// Rows that are drawn here instead.
    pub edited: EditedRows<'a>,
}

/// Rows that were edited before they are drawn, as their requests asked for (`Params::edited`).
#[derive(Clone, Copy, Debug, Default)]
pub struct EditedRows<'a> {
    /// `[E]` which of the plan's `logit_rows`, rising.
    pub rows: &'a [i64],
    /// `[E, vocab_size]` the logits as the target gave them: tokens are scored by these.
    pub raw: &'a [f32],
    /// `[E, vocab_size]` the logits to draw from.
    pub logits: &'a [f32],
    /// Of the rows that have no token: their index among the `E`, rising, and why.
    pub refused: &'a [(usize, String)],
}

impl EditedRows<'_> {
    /// Refuses what does not fit `rows` rows of logits over a vocabulary of `vocab` tokens.
    pub(super) fn check(&self, rows: usize, vocab: usize) -> Result<()> {
        for (name, got) in [("edited raw", self.raw.len()), ("edited logits", self.logits.len())] {
            let expected = self.rows.len() * vocab;
            if got != expected {
                return Err(Error::Length { name, got, expected });
            }
        }
        let rising = self.rows.windows(2).all(|pair| pair[0] < pair[1]);
        let within = |&row: &i64| usize::try_from(row).is_ok_and(|row| row < rows);
        if !rising || !self.rows.iter().all(within) {
            return Err(Error::InvalidArgument {
                name: "edited rows",
                got: format!("{:?}", self.rows),
                expected: format!("rising numbers in {}", indices(rows)),
            });
        }
        Ok(())
    }

    /// The index among the edited rows of row `at` of the logits.
    pub(super) fn find(&self, at: usize) -> Option<usize> {
        self.rows.binary_search(&(at as i64)).ok()
    }

    /// What row `index` of these is drawn from.
    pub(super) fn row(&self, index: usize, vocab: usize) -> Result<&[f32]> {
        match self.refused.iter().find(|(refused, _)| *refused == index) {
            Some((_, why)) => Err(Error::NoToken { why: why.clone() }),
            None => Ok(&self.logits[index * vocab..(index + 1) * vocab]),
        }
    }
}
