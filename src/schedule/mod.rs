//! Who runs this step: admission, chunked prefill, blocks, retraction.
//!
//! Promises:
//! - First come, first served: running requests are older than waiting ones, nobody overtakes.
//! - A request is let in when the allocator could serve it, by the same arithmetic; it then owns the pages of its whole
//!   prompt. Growth is paid per step: a block if pages allow, else a plain step, else the youngest request gives way.
//! - A request that could not finish alone in an empty pool is refused on arrival, so the oldest one always gets on.
//! - A target with state that pages do not hold (`Config::state_checkpoints`) is told which rows start from a copy of it and which leave
//!   one behind; a row at position 0 starts from nothing, any other goes on from where its last resolved step left it.
//! - A retracted request resumes with its resolved tokens and says the same as if it had never been retracted.

mod config;
mod record;
mod request;
mod row;

use std::collections::VecDeque;

pub use config::Config;
pub(crate) use config::check_tokens;
pub(crate) use record::Gain;
pub use record::{Ledger, Reading, Record, RecordHandle, Scores};
pub use request::{Finish, Request, Vocabulary};
pub use row::{Running, Scheduled, Work};

use crate::error::{Error, Result};
use crate::kv::{Kv, pages_for};
use crate::types::{RequestId, SlotId};
pub use crate::verify::Params;

/// Waiting and running requests with their pages.
#[derive(Debug)]
pub struct Scheduler {
    config: Config,
    kv: Kv,
    waiting: VecDeque<Request>,
    rows: Vec<Option<Running>>,
    /// Rows of running requests, oldest request first.
    order: Vec<SlotId>,
    retractions: u64,
    drafter_rests: bool,
}

impl Scheduler {
    /// Nothing waits, nothing runs.
    ///
    /// # Errors
    /// `InvalidArgument` naming the size that is out of range.
    pub fn new(config: Config) -> Result<Self> {
        config.validate()?;
        // A request that has left keeps its row until its launched steps are home; with spare rows nobody waits for that.
        let rows = config.max_running * (1 + config.depth);
        let kv = Kv::new(
            config.num_pages,
            config.page_size,
            rows,
            config.row_slots(),
            config.prefix_cache,
        )?;
        let kv = match config.state_checkpoints {
            Some(copies) => kv.with_checkpoints(copies),
            None => kv,
        };
        Ok(Self {
            kv,
            waiting: VecDeque::new(),
            rows: (0..rows).map(|_| None).collect(),
            order: Vec::with_capacity(config.max_running),
            retractions: 0,
            drafter_rests: false,
            config,
        })
    }

    /// Whether requests that draft are let in, and taken through steps, like those that do not: they owe the drafter no K/V, and what is in the cache
    /// is good for them without.
    pub fn let_drafter_rest(&mut self, rests: bool) {
        self.drafter_rests = rests;
    }

    /// Whether a request's tokens are owed to the drafter.
    pub fn owes_drafter(&self, request: &Request) -> bool {
        request.params.drafts() && !self.drafter_rests
    }

    /// The sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Pages and tables.
    pub fn kv(&self) -> &Kv {
        &self.kv
    }

    /// Pages and tables.
    pub fn kv_mut(&mut self) -> &mut Kv {
        &mut self.kv
    }

    /// Requests that wait, oldest first.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = &Request> + DoubleEndedIterator {
        self.waiting.iter()
    }

    /// Requests that run, oldest first.
    pub fn running(&self) -> impl Iterator<Item = &Running> {
        self.order.iter().filter_map(|slot| self.rows[slot.0 as usize].as_ref())
    }

    /// How many requests run.
    pub fn num_running(&self) -> usize {
        self.order.len()
    }

    /// Times a running request had to give way.
    pub fn retractions(&self) -> u64 {
        self.retractions
    }

    /// Queues a request.
    ///
    /// # Errors
    /// `OutOfPages` when its longest output would not fit an empty pool.
    pub fn enqueue(&mut self, request: Request) -> Result<()> {
        let needed = pages_for(request.max_total as usize - 1, self.config.page_size);
        if needed > self.config.num_pages {
            return Err(Error::OutOfPages {
                prompt: request.prompt_len,
                max_tokens: request.max_total as usize - request.prompt_len,
                needed,
                page_size: self.config.page_size,
                total: self.config.num_pages,
            });
        }
        self.waiting.push_back(request);
        Ok(())
    }

    /// Whether the next step can be launched before the results of the last one are there: nothing of a prompt is left to compute and
    /// nobody waits to be let in, so that a plan of decoding rows leaves nothing out; and no request's draws depend on what those results say.
    pub fn only_decodes(&self) -> bool {
        let someone_enters = !self.waiting.is_empty() && self.order.len() < self.config.max_running;
        !someone_enters
            && self
                .running()
                .all(|running| running.lo >= running.prefill_end && !running.request.params.needs_text())
    }

    /// Chooses rows for a step of blocks of at most `max_block` tokens, and launches them into `step`.
    ///
    /// # Errors
    /// None in a consistent state.
    pub fn schedule(&mut self, max_block: usize, step: &mut Vec<Scheduled>) -> Result<()> {
        let mut budget = self.config.max_batch_tokens;
        let waits = !self.waiting.is_empty() && self.order.len() < self.config.max_running;
        let (mut decoding, mut prefilling) = (0, waits);
        for running in self.running() {
            decoding += usize::from(running.can_decode());
            prefilling |= running.lo < running.prefill_end;
        }
        // Every decoding row has its one token for certain; drafts leave a quarter of the step to prompts that wait.
        let kept_for_prompts = if prefilling { budget / 4 } else { 0 };
        let mut drafts = budget.saturating_sub(decoding + kept_for_prompts);
        let mut retracted = false;
        let mut at = 0;
        while let Some(&slot) = self.order.get(at) {
            match self.decode(slot, max_block.min(drafts + 1), step)? {
                Decoded::Launched(len) => {
                    budget -= len;
                    drafts -= len - 1;
                    at += 1;
                }
                Decoded::NothingToDo => at += 1,
                Decoded::NoPages => {
                    let youngest = *self.order.last().unwrap_or(&slot);
                    self.retract(youngest)?;
                    retracted = true;
                }
            }
        }
        for at in 0..self.order.len() {
            budget -= self.prefill(self.order[at], budget, step)?;
        }
        // Whoever has just given way would otherwise be let in again at once.
        while !retracted && budget > 0 && self.order.len() < self.config.max_running {
            let Some(slot) = self.admit()? else { break };
            budget -= self.prefill(slot, budget, step)?;
        }
        Ok(())
    }

    fn decode(&mut self, slot: SlotId, max_block: usize, step: &mut Vec<Scheduled>) -> Result<Decoded> {
        let Some(running) = self.rows[slot.0 as usize]
            .as_mut()
            .filter(|running| running.can_decode())
        else {
            return Ok(Decoded::NothingToDo);
        };
        let block = running.request.params.row(max_block as u32);
        let wanted = block.min(running.request.max_total - running.lo - 1);
        let mut len = wanted;
        let mut reserved = self.kv.reserve(running.key, running.hi + len, len)?;
        if reserved.is_none() && len > 1 {
            len = 1;
            reserved = self.kv.reserve(running.key, running.hi + len, len)?;
        }
        let Some(reservation) = reserved else {
            // A result under way narrows the bounds, or ends the request: cheaper to wait than to throw work away.
            return Ok(if running.unresolved > 0 {
                Decoded::NothingToDo
            } else {
                Decoded::NoPages
            });
        };
        let launched = reservation.launch(self.kv.table_mut()).map_err(|failed| failed.error)?;
        step.push(Scheduled {
            launched,
            work: Work::Decode,
            first: running.lo,
            len,
            start_known: running.lo == running.hi,
            anchor_known: running.unresolved == 0,
            restore: None,
            save: None,
            epoch: running.epoch,
        });
        running.lo += 1;
        running.hi += len;
        running.unresolved += 1;
        Ok(Decoded::Launched(len as usize))
    }

    fn prefill(&mut self, slot: SlotId, budget: usize, step: &mut Vec<Scheduled>) -> Result<usize> {
        let Some(running) = self.rows[slot.0 as usize].as_mut() else {
            return Ok(0);
        };
        let len = running.prefill_end.saturating_sub(running.lo).min(budget as u32);
        if len == 0 {
            return Ok(0);
        }
        let len = if self.kv.keeps_checkpoints() {
            running.up_to_a_copy(len, self.config.page_size as u32)
        } else {
            len
        };
        // Owned since admission, so this cannot run short.
        let Some(reservation) = self.kv.reserve(running.key, running.lo + len, len)? else {
            return Ok(0);
        };
        let launched = reservation.launch(self.kv.table_mut()).map_err(|failed| failed.error)?;
        let ends_a_page = (running.lo + len).is_multiple_of(self.config.page_size as u32);
        let save = if ends_a_page { self.kv.take_checkpoint() } else { None };
        step.push(Scheduled {
            launched,
            work: Work::Prefill {
                last: running.lo + len == running.prefill_end,
            },
            first: running.lo,
            len,
            start_known: true,
            anchor_known: true,
            restore: running.restore.filter(|_| running.lo == running.request.cached_tokens),
            save,
            epoch: running.epoch,
        });
        running.lo += len;
        running.hi += len;
        running.unresolved += 1;
        Ok(len as usize)
    }

    fn admit(&mut self) -> Result<Option<SlotId>> {
        let Some(request) = self.waiting.front() else {
            return Ok(None);
        };
        // A page for each row that runs already, or the newcomer would have to give way at the next page boundary.
        let owes = self.owes_drafter(request);
        let Some(admitted) = self.kv.admit(&request.tokens, self.order.len(), owes)? else {
            return Ok(None);
        };
        let Some(mut request) = self.waiting.pop_front() else {
            return Ok(None);
        };
        request.cached_tokens = admitted.cached_tokens;
        let slot = admitted.key.slot;
        self.rows[slot.0 as usize] = Some(Running {
            key: admitted.key,
            prefill_end: request.tokens.len() as u32,
            request,
            draft_valid_from: admitted.draft_valid_from,
            lo: admitted.cached_tokens,
            hi: admitted.cached_tokens,
            unresolved: 0,
            restore: admitted.restore,
            branch: admitted.known_tokens,
            epoch: 0,
        });
        self.order.push(slot);
        Ok(Some(slot))
    }

    /// Sends a running request back to the head of the queue. Results of launched steps no longer count for it.
    fn retract(&mut self, slot: SlotId) -> Result<()> {
        if let Some(request) = self.leave(slot)? {
            self.waiting.push_front(request);
            self.retractions += 1;
        }
        Ok(())
    }

    /// Ends a running request's residence. The one place where a request gives up its row and pages.
    pub fn leave(&mut self, slot: SlotId) -> Result<Option<Request>> {
        let Some(running) = self.rows[slot.0 as usize].take() else {
            return Ok(None);
        };
        self.order.retain(|&other| other != slot);
        let valid = self.kv.table().committed(running.key)?;
        self.kv
            .share(running.key, &running.request.tokens, valid, running.draft_valid_from)?;
        self.kv.release(running.key)?;
        Ok(Some(running.request))
    }

    /// Aborts a request, waiting or running; `false` when there is none of that number.
    pub fn remove(&mut self, id: RequestId) -> Result<bool> {
        if let Some(at) = self.waiting.iter().position(|request| request.id == id) {
            if let Some(request) = self.waiting.remove(at) {
                request.record.with(Record::abort);
            }
            return Ok(true);
        }
        let slot = self
            .running()
            .find(|running| running.request.id == id)
            .map(|running| running.key.slot);
        let Some(slot) = slot else { return Ok(false) };
        let request = self.leave(slot)?;
        if let Some(request) = &request {
            request.record.with(Record::abort);
        }
        Ok(request.is_some())
    }

    /// The request a scheduled row was launched for, unless it has left or the launch was called off.
    pub fn tenant(&self, row: &Scheduled) -> Option<&Running> {
        let key = row.launched.key();
        let running = self.rows[key.slot.0 as usize].as_ref()?;
        (running.key == key && running.epoch == row.epoch).then_some(running)
    }

    /// The same, to be changed.
    pub fn tenant_mut(&mut self, row: &Scheduled) -> Option<&mut Running> {
        self.tenant(row)?;
        self.rows[row.launched.key().slot.0 as usize].as_mut()
    }

    /// Resolves a row: its first `keep` tokens have KV now, draft K/V too if `injected`. `None`: nobody is left to tell.
    ///
    /// # Errors
    /// `AcceptedExceedsDrafted` when `keep` is more than the row had.
    pub fn resolve(&mut self, row: Scheduled, keep: u32, injected: bool) -> Result<Option<&mut Running>> {
        if self.tenant(&row).is_none() {
            self.let_go(row);
            return Ok(None);
        }
        let (least, most, work) = (row.least(), row.len, row.work);
        let key = row.launched.key();
        if keep > most
            && let Some(save) = row.save
        {
            // The commit below refuses it.
            self.kv.give_back(save);
            return row.launched.commit(self.kv.table_mut(), keep).map(|_| None);
        }
        row.launched.commit(self.kv.table_mut(), keep)?;
        let committed = self.kv.table().committed(key)?;
        let Some(running) = self.rows[key.slot.0 as usize].as_mut() else {
            return Ok(None);
        };
        running.unresolved -= 1;
        running.lo = running.lo + keep - least;
        running.hi = running.hi + keep - most;
        if !injected {
            running.draft_valid_from = committed;
        }
        if let Work::Prefill { .. } = work {
            self.kv
                .share(key, &running.request.tokens, committed, running.draft_valid_from)?;
            if let Some(save) = row.save {
                self.kv.attach(key, committed, save)?;
            }
        }
        Ok(Some(running))
    }

    fn let_go(&mut self, row: Scheduled) {
        row.launched.cancel(self.kv.table_mut());
        if let Some(save) = row.save {
            self.kv.give_back(save);
        }
    }

    /// Calls a launched row off: its request goes on from its last resolved token.
    ///
    /// # Errors
    /// None in a consistent state.
    pub fn call_off(&mut self, row: Scheduled) -> Result<()> {
        let counts = self.tenant(&row).is_some();
        let key = row.launched.key();
        self.let_go(row);
        if counts && let Some(running) = self.rows[key.slot.0 as usize].as_mut() {
            let committed = self.kv.table().committed(key)?;
            running.lo = committed;
            running.hi = committed;
            running.unresolved = 0;
            running.epoch += 1;
        }
        Ok(())
    }
}

enum Decoded {
    Launched(usize),
    NothingToDo,
    NoPages,
}
