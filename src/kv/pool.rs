//! The page pool: which pages exist, and how many owners each has.
//!
//! Promises: alloc, retain and release are O(1) and allocate no memory; a page is free exactly when nobody holds it;
//! releasing a page nobody holds is an error and changes nothing.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::types::PageId;

/// Where dropped reservations leave their pages until the pool collects them.
///
/// A `Drop` has no access to the pool, and may run on any thread (a Python garbage collection, say).
#[derive(Debug, Default)]
pub struct Returns {
    waiting: AtomicUsize,
    pages: Mutex<Vec<PageId>>,
}

impl Returns {
    pub(super) fn push(&self, pages: &mut Vec<PageId>) {
        if pages.is_empty() {
            return;
        }
        // A panic cannot leave a Vec of page numbers half written, so a poisoned lock is still good.
        let mut held = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        held.append(pages);
        self.waiting.store(held.len(), Ordering::Release);
    }
}

/// Pages beyond this are a mistake, not a plan: the lists of them would take more than a gigabyte.
const MOST_PAGES: usize = 1 << 26;

/// Reference-counted pages with a free list.
#[derive(Debug)]
pub struct PagePool {
    owners: Vec<u32>,
    free: Vec<PageId>,
    returns: Arc<Returns>,
}

impl PagePool {
    /// A pool of `num_pages` free pages, numbered from 0.
    ///
    /// # Errors
    /// `InvalidArgument` when `num_pages` is 0 or more than 2^26.
    pub fn new(num_pages: usize) -> Result<Self> {
        if num_pages == 0 || num_pages > MOST_PAGES {
            return Err(Error::InvalidArgument {
                name: "num_pages",
                got: num_pages.to_string(),
                expected: format!("1..{MOST_PAGES}"),
            });
        }
        Ok(Self {
            owners: vec![0; num_pages],
            // Lowest number first: a lightly used pool touches the start of the cache only.
            free: (0..num_pages as u32).rev().map(PageId).collect(),
            returns: Arc::default(),
        })
    }

    /// Pages in all.
    pub fn num_pages(&self) -> usize {
        self.owners.len()
    }

    /// Pages nobody holds. Call [`Self::collect`] first to count what dropped reservations gave back.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Owners of `page`; 0 means free (or no such page).
    pub fn owners(&self, page: PageId) -> u32 {
        self.owners.get(page.0 as usize).copied().unwrap_or(0)
    }

    /// Takes a free page with one owner, or `None` when all are held.
    pub fn alloc(&mut self) -> Option<PageId> {
        let page = self.free.pop()?;
        self.owners[page.0 as usize] = 1;
        Some(page)
    }

    /// Takes `count` pages at once into `into`, or none at all and `false`.
    pub fn alloc_many(&mut self, count: usize, into: &mut Vec<PageId>) -> bool {
        let Some(rest) = self.free.len().checked_sub(count) else {
            return false;
        };
        for page in self.free.drain(rest..).rev() {
            self.owners[page.0 as usize] = 1;
            into.push(page);
        }
        true
    }

    /// Adds an owner to a held page; returns how many it has now.
    ///
    /// # Errors
    /// `PageNotHeld` for a free or unknown page.
    pub fn retain(&mut self, page: PageId) -> Result<u32> {
        let owners = self.held(page)?;
        *owners += 1;
        Ok(*owners)
    }

    /// Removes an owner; returns how many are left. The page is free at 0.
    ///
    /// # Errors
    /// `PageNotHeld` for a free or unknown page: a double free. Nothing changes then.
    pub fn release(&mut self, page: PageId) -> Result<u32> {
        let owners = self.held(page)?;
        *owners -= 1;
        let left = *owners;
        if left == 0 {
            self.free.push(page);
        }
        Ok(left)
    }

    /// Frees what dropped reservations left behind.
    pub fn collect(&mut self) {
        if self.returns.waiting.load(Ordering::Acquire) == 0 {
            return;
        }
        let returns = Arc::clone(&self.returns);
        let mut held = returns.pages.lock().unwrap_or_else(PoisonError::into_inner);
        for page in held.drain(..) {
            let freed = self.release(page);
            debug_assert_eq!(freed, Ok(0), "a reserved page has exactly one owner");
        }
        returns.waiting.store(0, Ordering::Release);
    }

    pub(super) fn returns(&self) -> Arc<Returns> {
        Arc::clone(&self.returns)
    }

    fn held(&mut self, page: PageId) -> Result<&mut u32> {
        let total = self.owners.len();
        match self.owners.get_mut(page.0 as usize) {
            Some(owners) if *owners > 0 => Ok(owners),
            _ => Err(Error::PageNotHeld { page: page.0, total }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_free_is_an_error_and_changes_nothing() {
        let mut pool = PagePool::new(2).unwrap();
        let page = pool.alloc().unwrap();
        assert_eq!(pool.release(page), Ok(0));
        assert_eq!(pool.release(page), Err(Error::PageNotHeld { page: page.0, total: 2 }));
        assert_eq!(pool.num_free(), 2);
    }

    #[test]
    fn a_shared_page_is_free_only_after_its_last_owner_left() {
        let mut pool = PagePool::new(1).unwrap();
        let page = pool.alloc().unwrap();
        assert_eq!(pool.retain(page), Ok(2));
        assert_eq!(pool.release(page), Ok(1));
        assert_eq!(pool.alloc(), None);
        assert_eq!(pool.release(page), Ok(0));
        assert_eq!(pool.alloc(), Some(page));
    }

    #[test]
    fn taking_many_is_all_or_nothing() {
        let mut pool = PagePool::new(3).unwrap();
        let mut got = Vec::new();
        assert!(!pool.alloc_many(4, &mut got));
        assert!(got.is_empty() && pool.num_free() == 3);
        assert!(pool.alloc_many(3, &mut got));
        assert_eq!(got, [PageId(0), PageId(1), PageId(2)]);
    }
}
