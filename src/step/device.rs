//! A step's numbers as a device wants them, written straight into its staging memory, and what it brings home, read from there.

use std::sync::atomic::Ordering;

use super::values::{Accepted, DrawnRows};
use super::{Engine, StepPlan, closed};
use crate::error::{Error, Result};

/// Arrays of `r` rows and one more: row `r` is an empty request, for the padding of batches that draft.
#[derive(Debug)]
pub struct DeviceInputs<'a> {
    /// `[r + 1]` where each row's tokens start; the padding has none.
    pub query_starts: &'a mut [i32],
    /// `[r + 1]` 0 where only the device knows where a row starts.
    pub start_known: &'a mut [i32],
    /// `[r + 1]` 0 where only the device knows a row's first token.
    pub anchor_known: &'a mut [i32],
    /// `[r + 1]` rows of the page table; the one behind its last for the padding.
    pub table_rows: &'a mut [i64],
    /// `[r + 1]` valid KV tokens before the step.
    pub context_lens: &'a mut [i32],
    /// `[r + 1]` first position with valid draft KV.
    pub valid_from: &'a mut [i32],
    /// `[r]` rows with drafts, then `r`.
    pub draft_rows: &'a mut [i32],
    /// `[r]` the same.
    pub draft_rows64: &'a mut [i64],
    /// `[r + 1]` first tokens.
    pub anchors: &'a mut [i64],
    /// `[r + 1, width]` each row's pages; entries behind those it has are not written.
    pub pages: &'a mut [i32],
}

/// What a device brought home.
#[derive(Clone, Copy, Debug)]
pub struct DeviceOutputs<'a> {
    /// `[>= R, width]` chains by row; empty where there are none, or where they are set already.
    pub drafts: &'a [i64],
    /// Columns of `drafts`.
    pub width: usize,
    /// What was drawn.
    pub drawn: DrawnRows<'a>,
    /// `[R]` drafts that the device accepted.
    pub accepted: &'a [i32],
}

impl Engine {
    /// Writes a launched step into the arrays of a device that pads it to `bucket` rows. Says whether only the device knows where some row
    /// starts or with which token, and the most keys of a row, of which one whose start is unknown may have `uncertain` more than the
    /// host counts on.
    ///
    /// # Errors
    /// `OutOfTurn` when the step is closed; `Length` for arrays that do not fit each other or the step.
    pub fn fill_inputs(
        &self,
        plan: &StepPlan,
        bucket: usize,
        uncertain: usize,
        inputs: &mut DeviceInputs<'_>,
    ) -> Result<(bool, usize)> {
        let flight = self.in_flight.iter().find(|flight| flight.step == plan.step());
        let Some(flight) = flight.filter(|_| plan.is_open()) else {
            return Err(closed(plan.step()));
        };
        let (arrays, table) = (plan.arrays(), self.scheduler.kv().table());
        let (rows, room, width) = (arrays.row_ids.len(), inputs.draft_rows.len(), table.width());
        for (name, got, expected) in [
            ("query_starts", inputs.query_starts.len(), room + 1),
            ("start_known", inputs.start_known.len(), room + 1),
            ("anchor_known", inputs.anchor_known.len(), room + 1),
            ("table_rows", inputs.table_rows.len(), room + 1),
            ("context_lens", inputs.context_lens.len(), room + 1),
            ("valid_from", inputs.valid_from.len(), room + 1),
            ("draft_rows64", inputs.draft_rows64.len(), room),
            ("anchors", inputs.anchors.len(), room + 1),
            ("pages", inputs.pages.len(), (room + 1) * width),
        ] {
            if got != expected {
                return Err(Error::Length { name, got, expected });
            }
        }
        if !(rows..=room).contains(&bucket) {
            return Err(Error::InvalidArgument {
                name: "bucket",
                got: bucket.to_string(),
                expected: format!("{rows}..{room}"),
            });
        }
        inputs.query_starts[..=rows].copy_from_slice(&arrays.query_starts);
        inputs.query_starts[rows + 1..=bucket].fill(arrays.query_starts[rows]);
        inputs.context_lens[..rows].copy_from_slice(&arrays.context_lens);
        inputs.context_lens[rows..bucket].fill(0);
        inputs.valid_from[..rows].copy_from_slice(&arrays.draft_valid_from);
        let drafting = arrays.draft_rows.len();
        inputs.draft_rows[..drafting].copy_from_slice(&arrays.draft_rows);
        inputs.draft_rows[drafting..].fill(room as i32);
        for (wide, &row) in inputs.draft_rows64.iter_mut().zip(inputs.draft_rows.iter()) {
            *wide = i64::from(row);
        }
        let (mut unknown, mut most) = (false, 0);
        for (row, scheduled) in flight.rows.iter().enumerate() {
            let anchor = arrays.token_ids[arrays.query_starts[row] as usize];
            let (start_known, anchor_known) = (arrays.start_known[row], anchor >= 0);
            unknown |= !(start_known && anchor_known);
            let keys = (arrays.context_lens[row] + arrays.block_len[row]) as usize;
            most = most.max(keys + if start_known { 0 } else { uncertain });
            inputs.anchors[row] = anchor;
            inputs.anchor_known[row] = i32::from(anchor_known);
            inputs.start_known[row] = i32::from(start_known);
            inputs.table_rows[row] = i64::from(arrays.row_ids[row]);
            // A row whose tenant has left keeps its entries until its steps are home.
            let held = table.pages(scheduled.launched.key()).map_or(width, <[_]>::len);
            let from = arrays.row_ids[row] as usize * width;
            let pages = inputs.pages[row * width..].iter_mut();
            for (page, entry) in pages.zip(&table.flat()[from..from + held]) {
                *page = entry.load(Ordering::Relaxed);
            }
        }
        inputs.anchor_known[rows..].fill(1);
        inputs.start_known[rows..].fill(1);
        inputs.table_rows[rows..].fill(table.max_rows() as i64);
        Ok((unknown, most))
    }

    /// Whether the caller edits the rows of a request of the step at hand.
    fn edits(&self, row: usize) -> bool {
        let scheduled = self.in_flight.front().and_then(|flight| flight.rows.get(row));
        let running = scheduled.and_then(|scheduled| self.scheduler.tenant(scheduled));
        running.is_some_and(|running| running.request.params.edited)
    }

    /// Walks the drafts of a step that a device has walked already.
    ///
    /// # Errors
    /// As [`StepPlan::set_drafts`] and [`Self::accept_drawn`]; `WalksDiffer` when the device kept something else: draft KV went elsewhere then.
    pub fn accept_outputs(&mut self, plan: &mut StepPlan, outputs: &DeviceOutputs<'_>) -> Result<Accepted> {
        if outputs.width > 0 {
            plan.set_drafts_by_row(outputs.drafts, outputs.width)?;
        }
        let accepted = self.accept_drawn(plan, &outputs.drawn)?;
        let (kept, layout) = (accepted.arrays(), plan.arrays());
        if outputs.accepted.len() != kept.accepted.len() {
            return Err(Error::Length {
                name: "accepted",
                got: outputs.accepted.len(),
                expected: kept.accepted.len(),
            });
        }
        for (row, (&there, &here)) in outputs.accepted.iter().zip(&kept.accepted).enumerate() {
            // A row without tokens failed, or its request had ended when the step was launched ahead: the device does not know.
            let gained = kept.token_starts[row + 1] > kept.token_starts[row];
            // An edited row without a token ends a walk one draft earlier; the device takes that draft for granted.
            let stopped = there == here + 1 && self.edits(row);
            if there != here && gained && !stopped && !layout.is_prefill[row] {
                return Err(Error::WalksDiffer { row, there, here });
            }
        }
        Ok(accepted)
    }
}
