//! A place for what is opened once in a process.

use std::sync::{Mutex, OnceLock, PoisonError};

use crate::error::Result;

/// What was opened once, for good. What failed is tried again by whoever asks next: memory may have been short for a moment.
pub(super) struct Once<T> {
    opened: OnceLock<T>,
    turn: Mutex<()>,
}

impl<T> Once<T> {
    pub(super) const fn new() -> Self {
        Self {
            opened: OnceLock::new(),
            turn: Mutex::new(()),
        }
    }

    pub(super) fn get(&self, open: impl FnOnce() -> Result<T>) -> Result<&T> {
        if let Some(opened) = self.opened.get() {
            return Ok(opened);
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else's turn may have come first.
        if let Some(opened) = self.opened.get() {
            return Ok(opened);
        }
        let opened = open()?;
        Ok(self.opened.get_or_init(|| opened))
    }
}
