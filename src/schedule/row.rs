//! A running request, and its row in a step.

use super::Request;
use crate::kv::{Checkpoint, CheckpointId, Launched, RowKey};

/// A running request and what is known about where the device is.
#[derive(Debug)]
pub struct Running {
    /// Its row.
    pub key: RowKey,
    /// The request.
    pub request: Request,
    /// First position from which on draft K/V are valid.
    pub draft_valid_from: u32,
    /// The device has at least this many tokens committed once every launched step is through.
    pub(super) lo: u32,
    /// And at most this many.
    pub(super) hi: u32,
    /// Tokens to prefill on this residence: prompt, and output of an earlier one.
    pub(super) prefill_end: u32,
    /// Launched steps whose results still count.
    pub(super) unresolved: u32,
    /// The copy of the target's state that its first pass starts from.
    pub(super) restore: Option<CheckpointId>,
    /// Where its text leaves all that are cached, if the copy lies before that: worth a copy for those who come after.
    pub(super) branch: u32,
    /// Changes when launched steps are called off; results of an older epoch do not count.
    pub(super) epoch: u32,
}

impl Running {
    /// Whether its prompt is through and there is room for another token.
    pub(super) fn can_decode(&self) -> bool {
        self.lo >= self.prefill_end && self.lo + 1 < self.request.max_total
    }

    /// How many of the next `len` tokens of prompt to compute, so that they end where a copy of the target's state is worth its place: where
    /// the text leaves those that are cached, at the last whole page of the prompt, and else, when the step has no more room, at any page.
    pub(super) fn up_to_a_copy(&self, len: u32, page_size: u32) -> u32 {
        let last = (self.prefill_end - 1) / page_size * page_size;
        let cuts = [self.branch, last].into_iter().filter(|&cut| cut > self.lo);
        let wanted = cuts.min().map_or(len, |cut| cut - self.lo);
        if wanted <= len {
            return wanted;
        }
        let end = (self.lo + len) / page_size * page_size;
        if end > self.lo { end - self.lo } else { len }
    }

    /// The device's committed tokens after all launched steps, as far as the host knows: at least, at most.
    pub fn bounds(&self) -> (u32, u32) {
        (self.lo, self.hi)
    }
}

/// What a row does in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Tokens whose KV is missing; `last` when the final one asks for the next token.
    Prefill {
        /// Whether this chunk reaches the end.
        last: bool,
    },
    /// An anchor and drafts.
    Decode,
}

/// One row of a step: pages reserved, bounds moved, ready to be laid out.
#[derive(Debug)]
pub struct Scheduled {
    /// The row's part in the step, to be committed or cancelled.
    pub launched: Launched,
    /// What it does.
    pub work: Work,
    /// Lower bound of the first position; the position itself when `start_known`.
    pub first: u32,
    /// Tokens.
    pub len: u32,
    /// Whether the host knows where the row starts.
    pub start_known: bool,
    /// Whether the host knows the token it starts with.
    pub anchor_known: bool,
    /// The copy of the target's state that the row starts from, instead of where it left off.
    pub restore: Option<CheckpointId>,
    /// Where the target's state after this row's last token is to be copied.
    pub save: Option<Checkpoint>,
    pub(super) epoch: u32,
}

impl Scheduled {
    /// Tokens the step commits at least.
    pub(super) fn least(&self) -> u32 {
        match self.work {
            Work::Prefill { .. } => self.len,
            Work::Decode => 1,
        }
    }
}
