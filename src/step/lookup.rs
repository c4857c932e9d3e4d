//! Drafts without a drafter: what each request's own text said after the words it ends with now.
//!
//! Texts are read on when they are asked for drafts, so requests that never are cost nothing. A step that is planned before the results of the
//! last one are there has no text to look anything up in: whoever drafts this way plans after them.

use super::{Engine, StepPlan};
use crate::error::{Error, Result};

/// Chains for the `n` rows of a plan's `draft_rows`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LookedUp {
    /// `[n, width]` tokens, 0 behind those that were found.
    pub tokens: Vec<i64>,
    /// `[n, width]` how likely each is when all before it are right, by what became of earlier ones; 0 where there is none.
    pub chances: Vec<f32>,
    /// `[n]` drafts found.
    pub found: Vec<i32>,
    /// Columns.
    pub width: usize,
}

impl Engine {
    /// Looks up to `width` drafts for every row that may draft, at most one less than the row has tokens.
    ///
    /// # Errors
    /// `OutOfTurn` when an earlier step is unresolved or this one is closed.
    pub fn look_up(&mut self, plan: &StepPlan, width: usize) -> Result<LookedUp> {
        self.call_off_dropped()?;
        self.next_to_resolve(plan)?;
        let Some(flight) = self.in_flight.front() else {
            let problem = "it is not in flight".into();
            return Err(Error::OutOfTurn {
                step: plan.step(),
                problem,
            });
        };
        let arrays = plan.arrays();
        let rows = arrays.draft_rows.len();
        let mut found = LookedUp {
            tokens: vec![0; rows * width],
            chances: vec![0.0; rows * width],
            found: vec![0; rows],
            width,
        };
        for (at, &row) in arrays.draft_rows.iter().enumerate() {
            let row = row as usize;
            let Some(running) = self.scheduler.tenant_mut(&flight.rows[row]) else {
                continue;
            };
            let request = &mut running.request;
            let most = width.min(arrays.block_len[row] as usize - 1);
            request.lookup.extend(&request.tokens);
            request.lookup.propose(&request.tokens, most, &mut request.guesses);
            for (guess, place) in request.guesses.iter().zip(at * width..) {
                found.tokens[place] = i64::from(guess.token.0);
                found.chances[place] = self.lookups.chance(guess);
            }
            found.found[at] = request.guesses.len() as i32;
        }
        Ok(found)
    }
}
