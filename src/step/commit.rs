//! The end of a step: what was kept is booked, told and recorded, and whoever is finished gives up row and pages.

use std::ops::Range;
use std::sync::Arc;

use super::values::{Accepted, AcceptedArrays, EventArrays, Events};
use super::{Engine, StepPlan, closed};
use crate::error::{Error, Result};
use crate::schedule::{Finish, Gain, Ledger, Record, Request, Scheduled, Work};
use crate::types::TokenId;

/// What a step found out about one of its rows.
struct Outcome<'a> {
    row: usize,
    /// Positions drafted, and drafts verified; a narrowed plan verified fewer than were scheduled.
    drafted: u32,
    verified: u32,
    accepted: &'a AcceptedArrays,
    /// Whether draft K/V were computed for what was kept.
    injected: bool,
}

/// What its request is given of that: `tokens` of the step's, nothing behind a stop.
struct Given<'a> {
    step: &'a AcceptedArrays,
    tokens: Range<usize>,
    drafted: u32,
    verified: u32,
    accepted: u32,
    finish: Finish,
    text_end: Option<usize>,
    stopped_by: Option<usize>,
    cached_tokens: u32,
}

impl Engine {
    /// Resolves a step: books what was kept, appends tokens up to each request's stop, lets go of who is finished.
    /// `injected` says whether draft K/V were computed for the rows in `commit_rows`.
    ///
    /// # Errors
    /// `OutOfTurn` when an earlier step is unresolved, this one is closed, or `accepted` belongs to another step.
    pub fn commit(&mut self, plan: &mut StepPlan, accepted: &Accepted, injected: bool) -> Result<Events> {
        self.call_off_dropped()?;
        self.next_to_resolve(plan)?;
        if accepted.step() != plan.step() {
            let problem = format!("it was given what step {} accepted", accepted.step());
            return Err(Error::OutOfTurn {
                step: plan.step(),
                problem,
            });
        }
        let (Some(ticket), Some(mut flight)) = (plan.redeem(), self.in_flight.pop_front()) else {
            return Err(closed(plan.step()));
        };
        // The flight is no longer there to be called off.
        drop(ticket);
        let mut events = self.shared.events(plan.step());
        let ledger = Arc::clone(&self.ledger);
        let mut records = Ledger::lock(&ledger);
        // Dropped when the records are no longer locked.
        let mut left = Vec::new();
        let mut failed = accepted.failed().iter().peekable();
        for (row, scheduled) in flight.rows.drain(..).enumerate() {
            left.extend(match failed.next_if(|(at, _)| *at == row) {
                Some((_, error)) => self.fail_row(scheduled, error, &mut records, &mut events)?,
                None => {
                    let outcome = Outcome {
                        row,
                        drafted: plan.drafted(row),
                        verified: plan.arrays().block_len[row] as u32 - 1,
                        accepted: accepted.arrays(),
                        injected,
                    };
                    self.resolve_row(scheduled, &outcome, &mut records, &mut events)?
                }
            });
        }
        drop(records);
        let out = events.arrays_mut();
        out.token_starts.push(out.tokens.len() as i32);
        out.top_starts.resize(out.tokens.len() + 1, out.top_tokens.len() as i32);
        self.spare_rows.push(flight.rows);
        Ok(events)
    }

    /// Books what one row kept. Returns its request if that has ended with it.
    fn resolve_row(
        &mut self,
        scheduled: Scheduled,
        outcome: &Outcome<'_>,
        records: &mut Ledger,
        events: &mut Events,
    ) -> Result<Option<Request>> {
        let (work, step, row) = (scheduled.work, outcome.accepted, outcome.row);
        let accepted = step.accepted[row] as u32;
        let keep = match work {
            Work::Prefill { .. } => scheduled.len,
            Work::Decode => accepted + 1,
        };
        let Some(running) = self.scheduler.resolve(scheduled, keep, outcome.injected)? else {
            return Ok(None);
        };
        if work == (Work::Prefill { last: false }) {
            return Ok(None);
        }
        let slot = running.key.slot;
        let request = &mut running.request;
        let (first, end) = (step.token_starts[row] as usize, step.token_starts[row + 1] as usize);
        let (taken, finish) = request.extend(&step.tokens[first..end], &self.eos);
        let decodes = work == Work::Decode;
        let given = Given {
            step,
            tokens: first..first + taken,
            drafted: if decodes { outcome.drafted } else { 0 },
            verified: if decodes { outcome.verified } else { 0 },
            accepted,
            finish,
            text_end: request.text_end(),
            stopped_by: request.stopped_by,
            cached_tokens: request.cached_tokens,
        };
        given.tell(request.id.0, events.arrays_mut());
        if decodes {
            let said = step.tokens[first..end].iter().map(|&token| TokenId(token as u32));
            self.lookups.record(&request.guesses, said);
            request.guesses.clear();
            self.stats
                .record_tree(given.verified, given.drafted, accepted, taken as u32)?;
        }
        let Some(record) = records.of(&request.record) else {
            return Ok(None);
        };
        given.write(record, request.params.scores());
        if finish == Finish::Running {
            return Ok(None);
        }
        self.scheduler.leave(slot)
    }

    /// Ends the request of a row that could not be drawn. Returns it, unless nobody is left to tell.
    fn fail_row(
        &mut self,
        scheduled: Scheduled,
        error: &Error,
        records: &mut Ledger,
        events: &mut Events,
    ) -> Result<Option<Request>> {
        let Some(running) = self.scheduler.tenant(&scheduled) else {
            return self.scheduler.call_off(scheduled).map(|()| None);
        };
        let (slot, id, cached) = (running.key.slot, running.request.id.0, running.request.cached_tokens);
        let text_end = running.request.text_end();
        if let Some(record) = records.of(&running.request.record) {
            record.fail(format!("request {id}: {error}"), text_end, cached);
        }
        let out = events.arrays_mut();
        out.request_ids.push(id);
        out.token_starts.push(out.tokens.len() as i32);
        out.drafted.push(0);
        out.verified.push(0);
        out.accepted.push(0);
        out.finish.push(Finish::Error as u8);
        out.text_ends.push(text_end.map_or(-1, |end| end as i64));
        out.cached_tokens.push(cached as i32);
        events.errors.push((id, error.clone()));
        self.scheduler.call_off(scheduled)?;
        self.scheduler.leave(slot)
    }
}

impl Given<'_> {
    /// Adds it to the step's events.
    fn tell(&self, id: u64, out: &mut EventArrays) {
        let (step, tokens) = (self.step, self.tokens.clone());
        out.request_ids.push(id);
        out.token_starts.push(out.tokens.len() as i32);
        out.tokens.extend_from_slice(&step.tokens[tokens.clone()]);
        out.logprobs.extend_from_slice(&step.logprobs[tokens.clone()]);
        if !step.top_tokens.is_empty() {
            let starts = self.top_starts();
            let shift = out.top_tokens.len() as i32 - starts[0];
            out.top_starts
                .extend(starts[..tokens.len()].iter().map(|start| start + shift));
            let top = starts[0] as usize..starts[tokens.len()] as usize;
            out.top_tokens.extend_from_slice(&step.top_tokens[top.clone()]);
            out.top_logprobs.extend_from_slice(&step.top_logprobs[top]);
        }
        out.drafted.push(self.drafted as i32);
        out.verified.push(self.verified as i32);
        out.accepted.push(self.accepted as i32);
        out.finish.push(self.finish as u8);
        out.text_ends.push(self.text_end.map_or(-1, |end| end as i64));
        out.cached_tokens.push(self.cached_tokens as i32);
    }

    /// Adds it to the request's record, with the tokens' scores if they were asked for.
    fn write(&self, record: &mut Record, scores: bool) {
        let step = self.step;
        if scores {
            let logprobs = &step.logprobs[self.tokens.clone()];
            record.score(logprobs, self.top_starts(), &step.top_tokens, &step.top_logprobs);
        }
        let gain = Gain {
            tokens: &step.tokens[self.tokens.clone()],
            drafted: self.drafted,
            verified: self.verified,
            accepted: self.accepted,
            text_end: self.text_end,
            finish: self.finish,
            stopped_by: self.stopped_by,
        };
        record.push(&gain, self.cached_tokens);
    }

    /// Where the alternatives of its tokens start, and where those of the last one end.
    fn top_starts(&self) -> &[i32] {
        &self.step.top_starts[self.tokens.start..=self.tokens.end]
    }
}
