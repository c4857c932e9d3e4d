//! The request table: which pages a running request holds, and how far its KV is valid.
//!
//! A row is reused after its request has left; its generation says which request is meant, so a result that comes home
//! late for an earlier tenant changes nothing. Two counters per row: `committed <= allocated`.
//!
//! The flat table is what a device reads. It never moves, a row in flight only ever gains entries behind those its
//! launched steps can reach, and a row is not given to another request before its launched steps have come home.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::error::{Error, Result};
use crate::kv::prefix::NodeId;
use crate::kv::reservation::Launched;
use crate::types::{PageId, SlotId};

/// A row and the tenant that is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowKey {
    /// Row of the table.
    pub slot: SlotId,
    /// Which of the row's successive tenants.
    pub generation: u32,
}

#[derive(Debug, Default)]
pub(super) struct Row {
    pub(super) generation: u32,
    pub(super) live: bool,
    /// Launched steps that still name this row, live or not.
    pub(super) in_flight: u32,
    pub(super) committed: u32,
    pub(super) pages: Vec<PageId>,
    /// Leading pages that belong to the prefix cache as well: never written.
    pub(super) cached: usize,
    /// Cache node of page `cached - 1`.
    pub(super) tip: Option<NodeId>,
    /// Another request cached the same text first; ours stays private from there on.
    pub(super) diverged: bool,
}

/// Rows of running requests and the flat page table `[max_rows, width]`.
#[derive(Debug)]
pub struct RequestTable {
    rows: Vec<Row>,
    free: Vec<SlotId>,
    flat: Arc<[AtomicI32]>,
    width: usize,
    page_size: usize,
}

impl RequestTable {
    pub(super) fn new(max_rows: usize, width: usize, page_size: usize) -> Self {
        Self {
            rows: (0..max_rows)
                .map(|_| Row {
                    pages: Vec::with_capacity(width),
                    ..Row::default()
                })
                .collect(),
            free: (0..max_rows as u32).rev().map(SlotId).collect(),
            flat: (0..max_rows * width).map(|_| AtomicI32::new(0)).collect(),
            width,
            page_size,
        }
    }

    /// Rows nobody uses and no launched step names.
    pub fn num_free_rows(&self) -> usize {
        self.free.len()
    }

    /// Rows in all.
    pub fn max_rows(&self) -> usize {
        self.rows.len()
    }

    /// Pages a row can name.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The flat table, row-major `[max_rows, width]`, entries behind a row's pages undefined. It never moves.
    pub fn flat(&self) -> &Arc<[AtomicI32]> {
        &self.flat
    }

    /// Whether `key` still names the row's tenant.
    pub fn is_live(&self, key: RowKey) -> bool {
        self.row(key).is_ok()
    }

    /// Tokens with valid KV.
    pub fn committed(&self, key: RowKey) -> Result<u32> {
        Ok(self.row(key)?.committed)
    }

    /// KV slots the row owns, a multiple of the page size.
    pub fn allocated(&self, key: RowKey) -> Result<u32> {
        Ok((self.row(key)?.pages.len() * self.page_size) as u32)
    }

    /// The row's pages, in text order.
    pub fn pages(&self, key: RowKey) -> Result<&[PageId]> {
        Ok(&self.row(key)?.pages)
    }

    /// Appends the KV slots of positions `first..end` to `slots`.
    ///
    /// # Errors
    /// `StaleRow`; `SlotsNotOwned` when `end` exceeds what the row owns.
    pub fn slots(&self, key: RowKey, first: u32, end: u32, slots: &mut Vec<i64>) -> Result<()> {
        let row = self.row(key)?;
        let owned = row.pages.len() * self.page_size;
        if end as usize > owned {
            return Err(Error::SlotsNotOwned {
                end,
                owned: owned as u32,
            });
        }
        let (mut position, end) = (first as usize, end as usize);
        while position < end {
            let (page, offset) = (position / self.page_size, position % self.page_size);
            let base = row.pages[page].0 as i64 * self.page_size as i64;
            let until = (self.page_size - offset).min(end - position);
            slots.extend(base + offset as i64..base + (offset + until) as i64);
            position += until;
        }
        Ok(())
    }

    /// Tokens with valid KV of the row that a launched step names, whether its tenant is still there or not.
    pub fn committed_in_flight(&self, launched: &Launched) -> u32 {
        self.rows[launched.key().slot.0 as usize].committed
    }

    /// Appends the KV slots of positions `first..end` of the row that a launched step names, as a device finds them: a row whose tenant
    /// has left keeps its entries until its launched steps are home. Its pages may belong to others by then, whose own steps come later.
    pub fn slots_in_flight(&self, launched: &Launched, first: u32, end: u32, slots: &mut [i64]) {
        let row = launched.key().slot.0 as usize * self.width;
        for (slot, position) in slots.iter_mut().zip(first as usize..end as usize) {
            let page = self.flat[row + position / self.page_size].load(Ordering::Relaxed);
            *slot = i64::from(page) * self.page_size as i64 + (position % self.page_size) as i64;
        }
    }

    pub(super) fn claim(&mut self) -> Option<RowKey> {
        let slot = self.free.pop()?;
        let row = &mut self.rows[slot.0 as usize];
        debug_assert!(!row.live && row.in_flight == 0 && row.pages.is_empty());
        row.live = true;
        row.committed = 0;
        row.cached = 0;
        row.tip = None;
        row.diverged = false;
        Some(RowKey {
            slot,
            generation: row.generation,
        })
    }

    pub(super) fn append(&mut self, key: RowKey, pages: &[PageId]) -> Result<()> {
        let width = self.width;
        let row = Self::live(&mut self.rows, key)?;
        let held = row.pages.len();
        if held + pages.len() > width {
            return Err(Error::SlotsNotOwned {
                end: ((held + pages.len()) * self.page_size) as u32,
                owned: (width * self.page_size) as u32,
            });
        }
        let at = key.slot.0 as usize * width + held;
        for (entry, page) in self.flat[at..].iter().zip(pages) {
            entry.store(page.0 as i32, Ordering::Relaxed);
        }
        row.pages.extend_from_slice(pages);
        Ok(())
    }

    pub(super) fn launched(&mut self, key: RowKey) -> Result<()> {
        Self::live(&mut self.rows, key)?.in_flight += 1;
        Ok(())
    }

    /// A launched step came home (or was cancelled): the row may be reused once none is left.
    pub(super) fn landed(&mut self, key: RowKey) {
        let row = &mut self.rows[key.slot.0 as usize];
        row.in_flight -= 1;
        if row.in_flight == 0 && !row.live {
            self.free.push(key.slot);
        }
    }

    pub(super) fn advance(&mut self, key: RowKey, keep: u32) -> Result<()> {
        let page_size = self.page_size;
        let row = Self::live(&mut self.rows, key)?;
        let owned = (row.pages.len() * page_size) as u32;
        if row.committed + keep > owned {
            return Err(Error::SlotsNotOwned {
                end: row.committed + keep,
                owned,
            });
        }
        row.committed += keep;
        Ok(())
    }

    /// Ends the tenancy; moves its pages to `into`. The row itself is reusable when its launched steps are home.
    pub(super) fn vacate(&mut self, key: RowKey, into: &mut Vec<PageId>) -> Result<()> {
        let row = Self::live(&mut self.rows, key)?;
        row.live = false;
        row.generation = row.generation.wrapping_add(1);
        into.append(&mut row.pages);
        if row.in_flight == 0 {
            self.free.push(key.slot);
        }
        Ok(())
    }

    pub(super) fn row(&self, key: RowKey) -> Result<&Row> {
        match self.rows.get(key.slot.0 as usize) {
            Some(row) if row.live && row.generation == key.generation => Ok(row),
            _ => Err(Error::StaleRow {
                row: key.slot.0,
                generation: key.generation,
            }),
        }
    }

    pub(super) fn row_mut(&mut self, key: RowKey) -> Result<&mut Row> {
        Self::live(&mut self.rows, key)
    }

    fn live(rows: &mut [Row], key: RowKey) -> Result<&mut Row> {
        match rows.get_mut(key.slot.0 as usize) {
            Some(row) if row.live && row.generation == key.generation => Ok(row),
            _ => Err(Error::StaleRow {
                row: key.slot.0,
                generation: key.generation,
            }),
        }
    }
}
