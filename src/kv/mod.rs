//! KV bookkeeping: pages, who holds them, what may be written, what can be reused.
//!
//! A page is in exactly one of these hands at a time: the free list, a [`Reservation`], or one or more owners among
//! request rows and the prefix cache. Page arithmetic lives here once ([`pages_for`]); admission and allocation both
//! use it.
//!
//! A target may keep state that pages do not hold. A running request's is in the slot of its row, so there is nothing to book; what prefix
//! reuse needs are copies of it where cached text ends, see [`state`].
//!
//! Bounds, with `C` tokens committed as the host knows it, `D` steps unresolved, each committing at most `A` tokens, and
//! a step writing `W` slots: the device is at `C <= S <= C + D*A` and writes `[S, S + W)`, so a row that is launched
//! owns at least `C + D*A + W` slots. The scheduler passes `C + D*A` as tightly as it knows it.

mod pool;
mod prefix;
mod reservation;
pub mod state;
mod table;

pub use pool::PagePool;
pub use prefix::{Hit, NodeId, PrefixCache};
pub use reservation::{LaunchError, Launched, Reservation};
pub use state::{Checkpoint, CheckpointId};
pub use table::{RequestTable, RowKey};

use crate::error::{Error, Result};
use crate::types::{PageId, TokenId};
use prefix::Inserted;

/// Pages that hold `slots` KV slots.
pub const fn pages_for(slots: usize, page_size: usize) -> usize {
    slots.div_ceil(page_size)
}

/// Slots a row must own before a step is launched that may write `ahead` slots behind what the host knows to be committed:
/// whole pages, and never fewer than it owns already. `ahead` is `D*A + W` of the module documentation.
pub const fn room(committed: usize, owned: usize, ahead: usize, page_size: usize) -> usize {
    let needed = pages_for(committed + ahead, page_size) * page_size;
    if needed > owned { needed } else { owned }
}

/// A row that has just entered, with what it found in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// The row.
    pub key: RowKey,
    /// Tokens whose target KV was found, a multiple of the page size.
    pub cached_tokens: u32,
    /// First position from which on all cached tokens have draft K/V; `cached_tokens` when none has.
    pub draft_valid_from: u32,
    /// The copy of the target's state after the cached tokens; `None` without cached tokens, and for a target without state.
    pub restore: Option<CheckpointId>,
    /// Tokens whose text was found, whether or not anything may be reused of it: where this text leaves all others.
    pub known_tokens: u32,
}

/// Page tables beyond this are a mistake, not a plan: a gigabyte of entries.
const MOST_ENTRIES: usize = 1 << 28;

/// Pool, table and cache as one: every page movement goes through here.
#[derive(Debug)]
pub struct Kv {
    pool: PagePool,
    table: RequestTable,
    cache: PrefixCache,
    page_size: usize,
    reuse: bool,
    /// Whether the target keeps state that pages do not hold.
    stateful: bool,
    hits: Vec<Hit>,
    leaving: Vec<PageId>,
}

impl Kv {
    /// `num_pages` pages of `page_size` slots for `max_rows` requests of at most `row_slots` slots each; `reuse` turns
    /// the prefix cache on.
    ///
    /// # Errors
    /// `InvalidArgument` for sizes of 0, a cache whose slots would not fit an `i32`, or page tables of more than 2^28 entries.
    pub fn new(num_pages: usize, page_size: usize, max_rows: usize, row_slots: usize, reuse: bool) -> Result<Self> {
        for (name, got) in [
            ("page_size", page_size),
            ("max_running", max_rows),
            ("row_slots", row_slots),
        ] {
            if got == 0 || got > i32::MAX as usize {
                let expected = format!("1..{}", i32::MAX);
                return Err(Error::InvalidArgument {
                    name,
                    got: got.to_string(),
                    expected,
                });
            }
        }
        if num_pages.saturating_mul(page_size) > i32::MAX as usize {
            return Err(Error::InvalidArgument {
                name: "num_pages",
                got: format!("{num_pages} pages of {page_size} slots"),
                expected: format!("at most {} slots", i32::MAX),
            });
        }
        let width = pages_for(row_slots, page_size);
        if max_rows.saturating_mul(width) > MOST_ENTRIES {
            return Err(Error::InvalidArgument {
                name: "max_running",
                got: format!("{max_rows} requests of up to {width} pages"),
                expected: format!("page tables of at most {MOST_ENTRIES} entries together"),
            });
        }
        Ok(Self {
            pool: PagePool::new(num_pages)?,
            table: RequestTable::new(max_rows, width, page_size),
            cache: PrefixCache::new(page_size, num_pages),
            page_size,
            reuse,
            stateful: false,
            hits: Vec::new(),
            leaving: Vec::new(),
        })
    }

    /// For a target that keeps state which pages do not hold: a prefix hit ends at a page that has a copy of the state after its last
    /// token. At most `checkpoints` such copies are kept; without any nothing is reused.
    #[must_use]
    pub fn with_checkpoints(mut self, checkpoints: usize) -> Self {
        self.stateful = true;
        self.cache.keep_checkpoints(checkpoints);
        self
    }

    /// Whether a copy of a row's state at the end of a page could serve anybody.
    pub fn keeps_checkpoints(&self) -> bool {
        self.stateful && self.reuse && self.cache.checkpoints().0 > 0
    }

    /// A checkpoint to write in the next step: a free one, or that of the cached page nobody has used for longest. `None`: all of them
    /// belong to pages in use.
    pub fn take_checkpoint(&mut self) -> Option<Checkpoint> {
        if self.keeps_checkpoints() {
            self.cache.take_checkpoint()
        } else {
            None
        }
    }

    /// A checkpoint that was not written after all.
    pub fn give_back(&mut self, checkpoint: Checkpoint) {
        self.cache.give_back(checkpoint);
    }

    /// Gives the checkpoint with the state after the row's first `tokens` tokens, whole pages, to the page that ends there, after
    /// [`Self::share`]. `false`: the page is not cached, or has one; the checkpoint is free again.
    ///
    /// # Errors
    /// `StaleRow`, `SlotsNotOwned`; the checkpoint is free again.
    pub fn attach(&mut self, key: RowKey, tokens: u32, checkpoint: Checkpoint) -> Result<bool> {
        let page = self.table.row(key).and_then(|row| {
            let last = (tokens as usize / self.page_size).checked_sub(1);
            let ends = (tokens as usize).is_multiple_of(self.page_size) && tokens <= row.committed;
            let page = last.filter(|_| ends).and_then(|last| row.pages.get(last));
            page.copied().ok_or(Error::SlotsNotOwned {
                end: tokens,
                owned: row.committed,
            })
        });
        match page {
            Ok(page) => Ok(self.cache.attach(page, checkpoint)),
            Err(error) => {
                self.cache.give_back(checkpoint);
                Err(error)
            }
        }
    }

    /// Slots per page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// The pool, for counting.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// The request table.
    pub fn table(&self) -> &RequestTable {
        &self.table
    }

    /// The request table, for launching and committing.
    pub fn table_mut(&mut self) -> &mut RequestTable {
        &mut self.table
    }

    /// The prefix cache, for counting.
    pub fn cache(&self) -> &PrefixCache {
        &self.cache
    }

    /// Pages an allocation can have now: free ones and cached ones nobody else holds.
    pub fn available(&mut self) -> usize {
        self.pool.collect();
        self.pool.num_free() + self.cache.reclaimable()
    }

    /// Enters a request whose text so far is `tokens`, if a row and pages for all of it are to be had and `spare` pages
    /// are left over. Reuses cached full pages, but never the last token's: its logits are needed; of a target with state, up to the last one with
    /// a checkpoint. A request that `drafts`
    /// reuses only pages with draft K/V: computing the others again costs one prefill, drafting blindly costs every step. The
    /// pages for the rest are owned by the row at once, so a prompt that was let in always gets to its end.
    ///
    /// `None` leaves everything as it was.
    ///
    /// # Errors
    /// `SlotsNotOwned` when the text is longer than a row can be.
    pub fn admit(&mut self, tokens: &[TokenId], spare: usize, drafts: bool) -> Result<Option<Admitted>> {
        let total = pages_for(tokens.len(), self.page_size);
        if total > self.table.width() {
            return Err(Error::SlotsNotOwned {
                end: tokens.len() as u32,
                owned: (self.table.width() * self.page_size) as u32,
            });
        }
        let mut hits = std::mem::take(&mut self.hits);
        let reusable = if self.reuse {
            tokens.len().saturating_sub(1) / self.page_size
        } else {
            0
        };
        self.cache.find(tokens, reusable, &mut hits);
        if drafts {
            hits.truncate(hits.iter().take_while(|hit| hit.draft_injected).count());
        }
        let known = hits.len();
        if self.stateful {
            hits.truncate(
                hits.iter()
                    .rposition(|hit| hit.checkpoint.is_some())
                    .map_or(0, |at| at + 1),
            );
        }
        let idle_hits = hits.iter().filter(|hit| self.pool.owners(hit.page) == 1).count();
        let fits = self.available() - idle_hits >= total - hits.len() + spare;
        let admitted = if fits { self.table.claim() } else { None };
        let outcome = match admitted {
            Some(key) => self.enter(key, &hits, total, known).map(Some),
            None => Ok(None),
        };
        self.hits = hits;
        outcome
    }

    fn enter(&mut self, key: RowKey, hits: &[Hit], total: usize, known: usize) -> Result<Admitted> {
        for hit in hits {
            let owners = self.pool.retain(hit.page)?;
            self.cache.retained(hit.page, owners);
            self.table.append(key, &[hit.page])?;
        }
        let row = self.table.row_mut(key)?;
        row.cached = hits.len();
        row.tip = hits.last().map(|hit| hit.node);
        row.committed = (hits.len() * self.page_size) as u32;
        let mut fresh = Vec::new();
        let taken = self.take(total - hits.len(), &mut fresh)?;
        debug_assert!(taken, "the gate counted with the same arithmetic");
        self.table.append(key, &fresh)?;
        let undrafted = hits.iter().rposition(|hit| !hit.draft_injected).map_or(0, |at| at + 1);
        Ok(Admitted {
            key,
            cached_tokens: (hits.len() * self.page_size) as u32,
            draft_valid_from: (undrafted * self.page_size) as u32,
            restore: hits.last().and_then(|hit| hit.checkpoint),
            known_tokens: (known * self.page_size) as u32,
        })
    }

    /// Sets pages aside so that the row owns `end` slots, for a step that writes `width` of them. All or nothing:
    /// running short is `None` and changes nothing.
    ///
    /// # Errors
    /// `StaleRow`; `SlotsNotOwned` when `end` is more than a row can be.
    pub fn reserve(&mut self, key: RowKey, end: u32, width: u32) -> Result<Option<Reservation>> {
        let row = self.table.row(key)?;
        let need = pages_for(end as usize, self.page_size);
        if need > self.table.width() {
            return Err(Error::SlotsNotOwned {
                end,
                owned: (self.table.width() * self.page_size) as u32,
            });
        }
        let fresh = need.saturating_sub(row.pages.len());
        let mut pages = Vec::new();
        if !self.take(fresh, &mut pages)? {
            return Ok(None);
        }
        let returns = (!pages.is_empty()).then(|| self.pool.returns());
        Ok(Some(Reservation::new(key, width, pages, returns)))
    }

    fn take(&mut self, count: usize, into: &mut Vec<PageId>) -> Result<bool> {
        let available = self.available();
        if count > available {
            return Ok(false);
        }
        let short = count.saturating_sub(self.pool.num_free());
        let evicted = self.cache.evict(short, &mut self.pool)?;
        debug_assert_eq!(evicted, short, "reclaimable pages are exactly the evictable ones");
        Ok(self.pool.alloc_many(count, into))
    }

    /// Gives the cache the row's full pages below `valid` tokens of `tokens`; pages from `draft_valid_from` on count as
    /// having draft K/V.
    ///
    /// # Errors
    /// `StaleRow`.
    pub fn share(&mut self, key: RowKey, tokens: &[TokenId], valid: u32, draft_valid_from: u32) -> Result<()> {
        if !self.reuse {
            return Ok(());
        }
        let row = self.table.row_mut(key)?;
        let full = (valid.min(row.committed) as usize).min(tokens.len()) / self.page_size;
        while row.cached < full && !row.diverged {
            let first = row.cached * self.page_size;
            let text = &tokens[first..first + self.page_size];
            let page = row.pages[row.cached];
            let injected = draft_valid_from as usize <= first;
            match self
                .cache
                .insert(row.tip, text, page, injected, self.stateful, &mut self.pool)?
            {
                Inserted::Now(node) => {
                    row.tip = Some(node);
                    row.cached += 1;
                }
                Inserted::Elsewhere => row.diverged = true,
            }
        }
        Ok(())
    }

    /// Ends a row's tenancy: the one place where a request's pages are given up.
    ///
    /// # Errors
    /// `StaleRow` on a second release; nothing changes then.
    pub fn release(&mut self, key: RowKey) -> Result<()> {
        let mut leaving = std::mem::take(&mut self.leaving);
        let vacated = self.table.vacate(key, &mut leaving);
        // Deepest first, so that a chain's leaf is older than its root.
        let mut outcome = vacated;
        for page in leaving.drain(..).rev() {
            match self.pool.release(page) {
                Ok(owners) => self.cache.released(page, owners),
                Err(error) => outcome = Err(error),
            }
        }
        self.leaving = leaving;
        outcome
    }

    /// Frees up to `count` cached pages nobody holds; returns how many.
    ///
    /// # Errors
    /// None in a consistent state.
    pub fn evict(&mut self, count: usize) -> Result<usize> {
        self.cache.evict(count, &mut self.pool)
    }
}
