//! The order of stages: add, plan, accept, commit. The only file that knows it.
//!
//! ```text
//!   add ──> plan ──────────> [draft] ──> [target] ──> accept ──> commit ──> events
//!           launch: pages,                            draw and   resolve: committed += kept,
//!           layout, bounds                            walk       stops, pages, statistics
//! ```
//! The invariant: *committed = anchor + accepted drafts; the bonus token becomes the next anchor and has no KV yet.*
//! A request with `L` known tokens that is past its prompt has `L - 1` of them committed.
//!
//! Steps are resolved in the order they were launched. With `depth` 1 the next step is planned before the last one is
//! resolved: the plan then holds bounds where only the device knows the truth, and a result for a request that has
//! ended, been retracted or called off meanwhile changes nothing.
//!
//! A failure belongs to one request: its rows give no token, it ends with an error that names it, the others go on.

mod accept;
mod device;
mod lookup;
mod sampling;
mod step_plan;
mod values;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

pub use device::{DeviceInputs, DeviceOutputs};
pub use lookup::LookedUp;
pub use sampling::DeviceSampling;
pub use step_plan::{Outline, StepPlan};
pub use values::{Accepted, AcceptedArrays, DrawnRows, EditedRows, EventArrays, Events, PlanArrays, SamplingArrays};

use crate::draft::LookupRates;
use crate::error::{Error, Result};
use crate::kv::{Checkpoint, CheckpointId};
use crate::schedule::{
    Config, Finish, Gain, Ledger, Params, RecordHandle, Request, Scheduled, Scheduler, Vocabulary, Work, check_tokens,
};
use crate::stats::Stats;
use crate::types::{RequestId, TokenId};
use crate::verify::Sampler;
use values::Shared;

/// A launched step that is not resolved.
#[derive(Debug)]
struct Flight {
    step: u64,
    rows: Vec<Scheduled>,
}

/// Continuous batching with speculative blocks over one KV pool.
#[derive(Debug)]
pub struct Engine {
    scheduler: Scheduler,
    in_flight: VecDeque<Flight>,
    spare_rows: Vec<Vec<Scheduled>>,
    shared: Arc<Shared>,
    sampler: Sampler,
    drafts: Vec<TokenId>,
    stats: Stats,
    lookups: LookupRates,
    vocabulary: Option<Arc<Vocabulary>>,
    /// With the names of tokens that are no text.
    special: Option<Arc<Vocabulary>>,
    ledger: Arc<Mutex<Ledger>>,
    eos: Vec<TokenId>,
    next_request: u64,
    next_step: u64,
}

/// How many requests and pages are where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests waiting.
    pub waiting: usize,
    /// Requests running.
    pub running: usize,
    /// Steps launched and not resolved.
    pub in_flight: usize,
    /// Pages nobody holds.
    pub free_pages: usize,
    /// Pages the prefix cache holds.
    pub cached_pages: usize,
    /// Cached pages no request holds.
    pub reclaimable_pages: usize,
    /// Pages in all.
    pub total_pages: usize,
    /// Copies of the target's state that cached pages keep, or a step under way is about to.
    pub state_checkpoints: usize,
    /// Times a running request had to give way.
    pub retractions: u64,
}

impl Engine {
    /// An idle engine. `vocabulary` is needed for stop strings only.
    ///
    /// # Errors
    /// `InvalidArgument` naming the size that is out of range; `Length` for a vocabulary of the wrong size.
    pub fn new(config: Config, vocabulary: Option<Vocabulary>) -> Result<Self> {
        if let Some(vocabulary) = vocabulary
            .as_ref()
            .filter(|vocabulary| vocabulary.len() != config.vocab_size)
        {
            return Err(Error::Length {
                name: "vocabulary",
                got: vocabulary.len(),
                expected: config.vocab_size,
            });
        }
        Ok(Self {
            eos: config.eos_ids.clone(),
            scheduler: Scheduler::new(config)?,
            in_flight: VecDeque::new(),
            spare_rows: Vec::new(),
            shared: Arc::default(),
            sampler: Sampler::default(),
            drafts: Vec::new(),
            stats: Stats::new(),
            lookups: LookupRates::new(),
            vocabulary: vocabulary.map(Arc::new),
            special: None,
            ledger: Arc::default(),
            next_request: 0,
            next_step: 0,
        })
    }

    /// The bytes of every token, those that are no text by their names: for requests that do not skip these.
    ///
    /// # Errors
    /// `Length` for a vocabulary of the wrong size.
    pub fn with_special_tokens(mut self, vocabulary: Vocabulary) -> Result<Self> {
        if vocabulary.len() != self.scheduler.config().vocab_size {
            return Err(Error::Length {
                name: "special_vocabulary",
                got: vocabulary.len(),
                expected: self.scheduler.config().vocab_size,
            });
        }
        self.special = Some(Arc::new(vocabulary));
        Ok(self)
    }

    /// The sizes.
    pub fn config(&self) -> &Config {
        self.scheduler.config()
    }

    /// Requests and pages, for looking at.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Acceptance over all requests.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Where requests and pages are.
    pub fn counts(&mut self) -> Result<Counts> {
        self.call_off_dropped()?;
        self.scheduler.kv_mut().available(); // collects what dropped reservations gave back
        let kv = self.scheduler.kv();
        Ok(Counts {
            waiting: self.scheduler.waiting().len(),
            running: self.scheduler.num_running(),
            in_flight: self.in_flight.len(),
            free_pages: kv.pool().num_free(),
            cached_pages: kv.cache().len(),
            reclaimable_pages: kv.cache().reclaimable(),
            total_pages: kv.pool().num_pages(),
            state_checkpoints: {
                let (total, free) = kv.cache().checkpoints();
                total - free
            },
            retractions: self.scheduler.retractions(),
        })
    }

    /// Whether any request waits or runs.
    pub fn has_work(&self) -> bool {
        self.scheduler.num_running() > 0 || self.scheduler.waiting().len() > 0
    }

    /// Queues a request.
    ///
    /// # Errors
    /// `InvalidArgument` naming what is wrong with the prompt or the parameters; `OutOfPages` when the pool could not
    /// hold its longest output even if it were empty.
    pub fn add(&mut self, prompt: Vec<TokenId>, mut params: Params) -> Result<RequestId> {
        let config = self.scheduler.config();
        let refuse = |name, got: String, expected: String| Err(Error::InvalidArgument { name, got, expected });
        if prompt.is_empty() || prompt.len() >= config.max_context {
            let expected = format!("1..{} (max_context less one)", config.max_context - 1);
            return refuse("prompt", format!("{} tokens", prompt.len()), expected);
        }
        check_tokens("prompt", &prompt, config.vocab_size)?;
        params.validate(config.vocab_size, self.vocabulary.is_some())?;
        if !params.skip_special_tokens && self.vocabulary.is_some() && self.special.is_none() {
            let expected = "True, or an engine that knows their names".into();
            return refuse("skip_special_tokens", "False".into(), expected);
        }
        params.settle(prompt.len(), &self.eos);
        let max_total = (prompt.len() + params.max_tokens as usize).min(config.max_context) as u32;
        let id = RequestId(self.next_request);
        let vocabulary = if params.skip_special_tokens {
            self.vocabulary.as_ref()
        } else {
            self.special.as_ref()
        };
        let request = Request::new(id, prompt, params, max_total, vocabulary, &self.ledger);
        self.scheduler.enqueue(request)?;
        self.next_request += 1;
        Ok(id)
    }

    /// What an unfinished request is given, to be looked at while it runs and afterwards; `None` when there is none of that number.
    pub fn record(&self, id: RequestId) -> Option<RecordHandle> {
        // The newest request is the likeliest to be asked for.
        let waiting = self.scheduler.waiting().rev();
        let running = self.scheduler.running().map(|running| &running.request);
        let mut all = waiting.chain(running);
        all.find(|request| request.id == id)
            .map(|request| request.record.clone())
    }

    /// Of the `most` oldest requests: the temperatures of those that draft, and how many do not.
    pub fn drafting(&self, most: usize) -> (Vec<f32>, usize) {
        let running = self.scheduler.running().map(|running| &running.request);
        let oldest = running.chain(self.scheduler.waiting()).take(most);
        let mut others = 0;
        let mut temperatures = Vec::with_capacity(self.scheduler.num_running());
        for request in oldest {
            if request.params.drafts() {
                temperatures.push(request.params.sampling.temperature);
            } else {
                others += 1;
            }
        }
        (temperatures, others)
    }

    /// Whether any request that a launched step is for is still there.
    pub fn is_wanted(&self, plan: &StepPlan) -> bool {
        let flight = self.in_flight.iter().find(|flight| flight.step == plan.step());
        flight.is_some_and(|flight| flight.rows.iter().any(|row| self.scheduler.tenant(row).is_some()))
    }

    /// Ends a request, waiting, running or in flight; there is no event for it. `false`: it had ended already.
    ///
    /// # Errors
    /// None in a consistent state.
    pub fn abort(&mut self, id: RequestId) -> Result<bool> {
        self.scheduler.remove(id)
    }

    /// Launches the next step, with blocks of at most `max_block` tokens. `None` when nothing can run: no request is
    /// left, or (overlapped) all of them wait for the result of a launched step.
    ///
    /// # Errors
    /// `OutOfTurn` when as many steps are unresolved as `depth` allows.
    pub fn plan(&mut self, max_block: usize) -> Result<Option<StepPlan>> {
        self.call_off_dropped()?;
        let depth = self.scheduler.config().depth;
        if self.in_flight.len() > depth {
            let step = self.in_flight[0].step;
            let problem = "it is not resolved: commit or cancel it before the next plan".into();
            return Err(Error::OutOfTurn { step, problem });
        }
        if max_block == 0 {
            let expected = "at least 1".into();
            return Err(Error::InvalidArgument {
                name: "max_block",
                got: "0".into(),
                expected,
            });
        }
        let block = max_block.min(self.scheduler.config().block_size);
        let mut rows = self.spare_rows.pop().unwrap_or_default();
        self.scheduler.schedule(block, &mut rows)?;
        if rows.is_empty() {
            self.spare_rows.push(rows);
            return Ok(None);
        }
        let mut arrays = self.shared.plan_arrays();
        for row in &rows {
            self.lay_out(row, &mut arrays)?;
        }
        arrays.query_starts.push(arrays.token_ids.len() as i32);
        arrays.logit_starts.push(arrays.logit_rows.len() as i32);
        let drafts = rows
            .iter()
            .filter_map(|row| self.scheduler.tenant(row))
            .any(|running| running.request.params.drafts());
        let step = self.next_step;
        self.next_step += 1;
        self.in_flight.push_back(Flight { step, rows });
        Ok(Some(StepPlan::new(
            step,
            self.scheduler.config().vocab_size,
            arrays,
            drafts,
            &self.shared,
        )))
    }

    /// Launches the next step before the last one is resolved (`depth` 1): decoding rows, of whose places and first tokens only the device
    /// knows the truth; see [`Self::settle`]. `None` when the results have to come first: nothing is in flight, prompts have work to do, or
    /// draws depend on counts of earlier tokens.
    ///
    /// # Errors
    /// As [`Self::plan`].
    pub fn plan_ahead(&mut self, max_block: usize) -> Result<Option<StepPlan>> {
        self.call_off_dropped()?;
        if self.in_flight.is_empty() || !self.scheduler.only_decodes() {
            return Ok(None);
        }
        self.plan(max_block)
    }

    /// Tells a step that was launched ahead what the host did not know then: where its rows start, their first tokens, positions and
    /// slots. To be called once the step before it is resolved; a step that knows it all stays as it is. Rows of requests that have
    /// ended meanwhile start where those ended, with token 0: nobody hears of what they do.
    ///
    /// # Errors
    /// `OutOfTurn` when an earlier step is unresolved or this one is closed.
    pub fn settle(&mut self, plan: &mut StepPlan) -> Result<()> {
        self.call_off_dropped()?;
        self.next_to_resolve(plan)?;
        let table = self.scheduler.kv().table();
        let arrays = plan.arrays_mut();
        for (row, scheduled) in self.in_flight[0].rows.iter().enumerate() {
            let (start, end) = (arrays.query_starts[row] as usize, arrays.query_starts[row + 1] as usize);
            if arrays.start_known[row] && arrays.token_ids[start] >= 0 {
                continue;
            }
            let tenant = self.scheduler.tenant(scheduled);
            let first = table.committed_in_flight(&scheduled.launched);
            let anchor = tenant.map_or(0, |running| running.request.tokens[first as usize].0);
            arrays.token_ids[start] = i64::from(anchor);
            arrays.context_lens[row] = first as i32;
            arrays.start_known[row] = true;
            if let Some(running) = tenant {
                arrays.draft_valid_from[row] = running.draft_valid_from as i32;
            }
            let last = first + (end - start) as u32;
            for (position, known) in (first..last).zip(&mut arrays.positions[start..end]) {
                *known = i64::from(position);
            }
            table.slots_in_flight(&scheduled.launched, first, last, &mut arrays.slots[start..end]);
        }
        Ok(())
    }

    fn lay_out(&self, row: &Scheduled, arrays: &mut PlanArrays) -> Result<()> {
        let key = row.launched.key();
        let Some(running) = self.scheduler.tenant(row) else {
            return Err(Error::StaleRow {
                row: key.slot.0,
                generation: key.generation,
            });
        };
        let start = arrays.token_ids.len();
        let end = start + row.len as usize;
        let index = arrays.row_ids.len() as i32;
        arrays.request_ids.push(running.request.id.0);
        arrays.row_ids.push(key.slot.0 as i32);
        arrays.query_starts.push(start as i32);
        arrays.context_lens.push(row.first as i32);
        arrays.block_len.push(row.len as i32);
        arrays.is_prefill.push(row.work != Work::Decode);
        arrays.draft_valid_from.push(running.draft_valid_from as i32);
        arrays.start_known.push(row.start_known);
        arrays.temperatures.push(running.request.params.sampling.temperature);
        arrays.logit_starts.push(arrays.logit_rows.len() as i32);
        match row.work {
            Work::Prefill { last } => {
                let text = &running.request.tokens[row.first as usize..(row.first + row.len) as usize];
                arrays.token_ids.extend(text.iter().map(|token| i64::from(token.0)));
                if last {
                    arrays.logit_rows.push(end as i32 - 1);
                }
            }
            Work::Decode => {
                let anchor = row.anchor_known.then(|| running.request.tokens[row.first as usize]);
                arrays.token_ids.push(anchor.map_or(-1, |token| i64::from(token.0)));
                arrays.token_ids.resize(end, -1);
                arrays.logit_rows.extend(start as i32..end as i32);
                if row.len > 1 {
                    arrays.draft_rows.push(index);
                }
            }
        }
        if self.scheduler.config().state_checkpoints.is_some() {
            let number = |id: Option<CheckpointId>| id.map_or(-1, |id| id.0 as i32);
            arrays.state_restore.push(number(row.restore));
            arrays.state_save.push(number(row.save.as_ref().map(Checkpoint::id)));
        }
        if row.start_known {
            let (first, last) = (i64::from(row.first), i64::from(row.first + row.len));
            arrays.positions.extend(first..last);
            self.scheduler
                .kv()
                .table()
                .slots(key, row.first, row.first + row.len, &mut arrays.slots)?;
        } else {
            arrays.positions.resize(end, -1);
            arrays.slots.resize(end, -1);
        }
        Ok(())
    }

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
            let error = failed.next_if(|(at, _)| *at == row).map(|(_, error)| error);
            // A narrowed plan verified fewer drafts than were scheduled.
            let verified = plan.arrays().block_len[row] as u32 - 1;
            let drafts = (plan.drafted(row), verified);
            let step = (accepted.arrays(), injected);
            left.extend(self.resolve_row(row, scheduled, drafts, step, error, &mut records, &mut events)?);
        }
        drop(records);
        let out = events.arrays_mut();
        out.token_starts.push(out.tokens.len() as i32);
        out.top_starts.resize(out.tokens.len() + 1, out.top_tokens.len() as i32);
        self.spare_rows.push(flight.rows);
        Ok(events)
    }

    #[allow(clippy::too_many_arguments, reason = "what one row of a step amounts to")]
    fn resolve_row(
        &mut self,
        row: usize,
        scheduled: Scheduled,
        (drafted, verified): (u32, u32),
        (accepted, injected): (&AcceptedArrays, bool),
        error: Option<&Error>,
        records: &mut Ledger,
        events: &mut Events,
    ) -> Result<Option<Request>> {
        let (work, len) = (scheduled.work, scheduled.len);
        let drafts_accepted = accepted.accepted[row];
        let keep = match work {
            _ if error.is_some() => return self.fail_row(scheduled, error, records, events),
            Work::Prefill { .. } => len,
            Work::Decode => drafts_accepted as u32 + 1,
        };
        let Some(running) = self.scheduler.resolve(scheduled, keep, injected)? else {
            return Ok(None);
        };
        if work == (Work::Prefill { last: false }) {
            return Ok(None);
        }
        let slot = running.key.slot;
        let request = &mut running.request;
        let out = events.arrays_mut();
        out.request_ids.push(request.id.0);
        out.token_starts.push(out.tokens.len() as i32);
        let (first, end) = (
            accepted.token_starts[row] as usize,
            accepted.token_starts[row + 1] as usize,
        );
        let (taken, finish) = request.extend(&accepted.tokens[first..end], &self.eos);
        let at = first + taken;
        out.tokens.extend_from_slice(&accepted.tokens[first..at]);
        out.logprobs.extend_from_slice(&accepted.logprobs[first..at]);
        if !accepted.top_tokens.is_empty() {
            let starts = &accepted.top_starts[first..=at];
            let shift = out.top_tokens.len() as i32 - starts[0];
            out.top_starts
                .extend(starts[..at - first].iter().map(|start| start + shift));
            let top = starts[0] as usize..starts[at - first] as usize;
            out.top_tokens.extend_from_slice(&accepted.top_tokens[top.clone()]);
            out.top_logprobs.extend_from_slice(&accepted.top_logprobs[top]);
        }
        let (drafted, verified) = if work == Work::Decode {
            (drafted, verified)
        } else {
            (0, 0)
        };
        out.drafted.push(drafted as i32);
        out.verified.push(verified as i32);
        out.accepted.push(drafts_accepted);
        out.finish.push(finish as u8);
        out.text_ends.push(request.text_end().map_or(-1, |end| end as i64));
        out.cached_tokens.push(request.cached_tokens as i32);
        if work == Work::Decode {
            self.lookups
                .record(&request.guesses, verified as usize, drafts_accepted as usize);
            request.guesses.clear();
            let committed = (at - first) as u32;
            self.stats
                .record_tree(verified, drafted, drafts_accepted as u32, committed)?;
        }
        let Some(record) = records.of(&request.record) else {
            return Ok(None);
        };
        if request.params.scores() {
            let starts = &accepted.top_starts[first..=at];
            record.score(
                &accepted.logprobs[first..at],
                starts,
                &accepted.top_tokens,
                &accepted.top_logprobs,
            );
        }
        record.push(
            &Gain {
                tokens: &accepted.tokens[first..at],
                drafted,
                verified,
                accepted: drafts_accepted as u32,
                text_end: request.text_end(),
                finish,
                stopped_by: request.stopped_by,
            },
            request.cached_tokens,
        );
        if finish == Finish::Running {
            return Ok(None);
        }
        self.scheduler.leave(slot)
    }

    fn fail_row(
        &mut self,
        scheduled: Scheduled,
        error: Option<&Error>,
        records: &mut Ledger,
        events: &mut Events,
    ) -> Result<Option<Request>> {
        let Some(running) = self.scheduler.tenant(&scheduled) else {
            return self.scheduler.call_off(scheduled).map(|()| None);
        };
        let (slot, id, cached) = (running.key.slot, running.request.id.0, running.request.cached_tokens);
        let text_end = running.request.text_end();
        if let (Some(error), Some(record)) = (error, records.of(&running.request.record)) {
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
        events.errors.extend(error.map(|error| (id, error.clone())));
        self.scheduler.call_off(scheduled)?;
        self.scheduler.leave(slot)
    }

    /// Calls a step off: its requests go on from their last resolved token. Steps launched after it lose the rows they
    /// share with it. `false`: it was committed or called off already, nothing changed; an interrupt cannot know.
    ///
    /// # Errors
    /// None in a consistent state.
    pub fn cancel(&mut self, plan: &mut StepPlan) -> Result<bool> {
        let ticket = plan.redeem();
        let open = ticket.is_some();
        drop(ticket);
        self.call_off_dropped()?;
        Ok(open)
    }

    /// Calls off every unresolved step, as after an interrupt.
    ///
    /// # Errors
    /// None in a consistent state.
    pub fn cancel_all(&mut self) -> Result<()> {
        self.call_off_dropped()?;
        while let Some(flight) = self.in_flight.pop_front() {
            self.call_off(flight)?;
        }
        Ok(())
    }

    /// Frees up to `count` cached pages that no request holds; returns how many.
    ///
    /// # Errors
    /// None in a consistent state.
    pub fn evict(&mut self, count: usize) -> Result<usize> {
        self.scheduler.kv_mut().evict(count)
    }

    fn next_to_resolve(&self, plan: &StepPlan) -> Result<()> {
        let Some(front) = self.in_flight.front().filter(|_| plan.is_open()) else {
            return Err(closed(plan.step()));
        };
        if front.step == plan.step() {
            return Ok(());
        }
        if self.in_flight.iter().all(|flight| flight.step != plan.step()) {
            return Err(closed(plan.step()));
        }
        let problem = format!("step {} comes first: commit or cancel it", front.step);
        Err(Error::OutOfTurn {
            step: plan.step(),
            problem,
        })
    }

    fn call_off_dropped(&mut self) -> Result<()> {
        for step in self.shared.dropped() {
            // Plans of steps that cancel_all has called off are dropped later; there is nothing left to do for them.
            if let Some(at) = self.in_flight.iter().position(|flight| flight.step == step)
                && let Some(flight) = self.in_flight.remove(at)
            {
                self.call_off(flight)?;
            }
        }
        Ok(())
    }

    fn call_off(&mut self, mut flight: Flight) -> Result<()> {
        for row in flight.rows.drain(..) {
            self.scheduler.call_off(row)?;
        }
        self.spare_rows.push(flight.rows);
        Ok(())
    }
}

fn closed(step: u64) -> Error {
    Error::OutOfTurn {
        step,
        problem: "it is committed or called off already".into(),
    }
}
