//! A reservation holds fresh pages for one row's next step.
//!
//! ```text
//! reserve ──> Reservation ──launch──> Launched ──commit(keep)──> committed += keep
//!                 │ drop                  │ cancel
//!                 v                       v
//!           pages go back         the row keeps its pages for the next step
//! ```
//! Nothing is ever undone: a rejected tail was never committed, its slots are simply written again.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::kv::pool::Returns;
use crate::kv::table::{RequestTable, RowKey};
use crate::types::PageId;

/// Fresh pages set aside for a row. Dropping it gives them back.
#[derive(Debug)]
#[must_use = "dropping a reservation gives its pages back"]
pub struct Reservation {
    key: RowKey,
    width: u32,
    pages: Vec<PageId>,
    /// `None` when there is nothing to give back, which is most steps.
    returns: Option<Arc<Returns>>,
}

/// A launch that could not happen, with the reservation given back.
#[derive(Debug)]
pub struct LaunchError {
    /// The untouched reservation.
    pub reservation: Reservation,
    /// Why.
    pub error: Error,
}

/// One row of a step that is under way. Its pages belong to the row now.
#[derive(Debug)]
#[must_use = "a launched row must be committed or cancelled, or its table row is never free again"]
pub struct Launched {
    key: RowKey,
    width: u32,
}

impl Reservation {
    pub(super) fn new(key: RowKey, width: u32, pages: Vec<PageId>, returns: Option<Arc<Returns>>) -> Self {
        Self {
            key,
            width,
            pages,
            returns,
        }
    }

    /// Pages held.
    pub fn pages(&self) -> &[PageId] {
        &self.pages
    }

    /// Makes the pages part of the row.
    ///
    /// # Errors
    /// [`LaunchError`] with the reservation when the row's tenant has left meanwhile.
    // The error is large because it hands the resource back; it is never on a hot path.
    #[allow(clippy::result_large_err)]
    pub fn launch(mut self, table: &mut RequestTable) -> std::result::Result<Launched, LaunchError> {
        if let Err(error) = table
            .append(self.key, &self.pages)
            .and_then(|()| table.launched(self.key))
        {
            return Err(LaunchError {
                reservation: self,
                error,
            });
        }
        self.pages.clear();
        Ok(Launched {
            key: self.key,
            width: self.width,
        })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(returns) = &self.returns {
            returns.push(&mut self.pages);
        }
    }
}

impl Launched {
    /// The row meant.
    pub fn key(&self) -> RowKey {
        self.key
    }

    /// Resolves the step: the first `keep` of its slots are valid. `false`: the tenant had left, nothing changed.
    ///
    /// # Errors
    /// `AcceptedExceedsDrafted` when `keep` is more than the step wrote; the step then counts as cancelled.
    pub fn commit(self, table: &mut RequestTable, keep: u32) -> Result<bool> {
        table.landed(self.key);
        if keep > self.width {
            return Err(Error::AcceptedExceedsDrafted {
                accepted: keep,
                drafted: self.width,
            });
        }
        if !table.is_live(self.key) {
            return Ok(false);
        }
        table.advance(self.key, keep)?;
        Ok(true)
    }

    /// The step will have no result. The row keeps its pages; its next step writes them.
    pub fn cancel(self, table: &mut RequestTable) {
        table.landed(self.key);
    }
}
