//! State checkpoints: copies of recurrent state at places where cached text ends.
//!
//! A target with recurrent layers keeps a state per request that no page holds. A running request's state lives in the slot of its row,
//! [`SlotId`](crate::types::SlotId), for as long as it has the row: there is nothing to book. What a prefix hit needs is the state *at the
//! end of the hit*, so a cached page may own a checkpoint: a slot of its own, beside those of the rows, with the state after the page's
//! last token.
//!
//! ```text
//! take ──> Checkpoint ──attach──> owned by a cached page ──page evicted, or taken back when others run short──> free
//!              │ give_back             │ a hit ends here: copied into the row's slot before its first pass
//!              v                       v
//!            free                 stays while a request holds the page
//! ```
//! Promises: a checkpoint is in exactly one hand (the free list, a [`Checkpoint`], a cached page); none is taken from a page that a request
//! holds, so what a request was told to restore is there until it has left.

use std::collections::BTreeSet;

use crate::kv::prefix::NodeId;

/// Number of a checkpoint slot, counted from 0, apart from the rows' slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckpointId(pub u32);

/// The right to write a checkpoint slot, for a step that is under way.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a checkpoint must be attached to a page or given back, or its slot is never free again"]
pub struct Checkpoint(CheckpointId);

impl Checkpoint {
    /// Its slot.
    pub fn id(&self) -> CheckpointId {
        self.0
    }
}

/// Which checkpoints nobody needs.
#[derive(Debug, Default)]
pub(super) struct Checkpoints {
    total: usize,
    free: Vec<CheckpointId>,
    /// Pages with a checkpoint that only the cache owns, least recently used first.
    idle: BTreeSet<(u64, NodeId)>,
}

impl Checkpoints {
    pub(super) fn new(total: usize) -> Self {
        Self {
            total,
            free: (0..total as u32).rev().map(CheckpointId).collect(),
            idle: BTreeSet::new(),
        }
    }

    pub(super) fn total(&self) -> usize {
        self.total
    }

    pub(super) fn num_free(&self) -> usize {
        self.free.len()
    }

    /// A free one.
    pub(super) fn pop(&mut self) -> Option<Checkpoint> {
        self.free.pop().map(Checkpoint)
    }

    /// One that was written, or not, for a page that does not want it.
    pub(super) fn give_back(&mut self, checkpoint: Checkpoint) {
        self.free.push(checkpoint.0);
    }

    /// Its page was evicted.
    pub(super) fn released(&mut self, id: CheckpointId) {
        self.free.push(id);
    }

    /// The page that had its last request longest ago; the caller takes its checkpoint.
    pub(super) fn steal(&mut self) -> Option<NodeId> {
        self.idle.pop_first().map(|(_, node)| node)
    }

    /// A node with a checkpoint has no request any more, since `used`.
    pub(super) fn idles(&mut self, used: u64, node: NodeId) {
        self.idle.insert((used, node));
    }

    /// A node that idled since `used` has one again, or is gone.
    pub(super) fn busy(&mut self, used: u64, node: NodeId) {
        self.idle.remove(&(used, node));
    }

    /// Of a checkpoint that a stolen node gave up.
    pub(super) fn renewed(id: CheckpointId) -> Checkpoint {
        Checkpoint(id)
    }
}
