//! The beginning of a step: rows chosen, pages reserved, places and first tokens laid out in arrays, or left open for the device to find.

use super::values::PlanArrays;
use super::{Engine, Flight, StepPlan};
use crate::error::{Error, Result};
use crate::kv::{Checkpoint, CheckpointId};
use crate::schedule::{Scheduled, Work};

impl Engine {
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
            .any(|running| self.scheduler.owes_drafter(&running.request));
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
        arrays.seeds.push(running.request.params.sampling.seed);
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
}
