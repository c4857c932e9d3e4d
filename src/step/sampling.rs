//! What the rows of a step ask of their draws, packed for a device that draws them.

use std::sync::Arc;

use super::values::{SamplingArrays, Shared};
use super::{Engine, StepPlan, closed};
use crate::device::cuda::params::SamplingRow;
use crate::draft::drafted_at;
use crate::error::Result;
use crate::schedule::Work;
use crate::verify::{History, Params, Sampling};

impl SamplingArrays {
    /// Appends a row of valid options, biases and masks ascending as [`Params::settle`] leaves them.
    pub fn push(&mut self, sampling: &Sampling, history: &History) {
        let mut row = SamplingRow::from(sampling);
        row.history_start = self.history_tokens.len() as i32;
        if sampling.needs_history() {
            let counts = history.counts();
            self.history_tokens
                .extend(counts.iter().map(|&(token, _)| token.0 as i32));
            self.history_counts
                .extend(counts.iter().map(|&(_, count)| count as i32));
        }
        row.history_end = self.history_tokens.len() as i32;
        row.bias_start = self.bias_tokens.len() as i32;
        for &(token, bias) in &sampling.logit_bias {
            self.bias_tokens.push(token.0 as i32);
            self.bias_values.push(bias);
        }
        row.bias_end = self.bias_tokens.len() as i32;
        self.bias_tokens
            .extend(sampling.masked.iter().map(|token| token.0 as i32));
        self.bias_values.resize(self.bias_tokens.len(), f32::NEG_INFINITY);
        row.mask_end = self.bias_tokens.len() as i32;
        self.rows.push(row);
    }
}

/// What the rows of a step ask of their draws, and what a device has to do for them. Its buffers are lent, like a plan's.
#[derive(Debug, Default)]
pub struct DeviceSampling {
    arrays: SamplingArrays,
    /// Whether any row leaves part of its vocabulary out.
    pub filters: bool,
    /// Whether any row draws at random: its drafts are then drawn with the same numbers.
    pub samples: bool,
    /// Whether any row's tokens are scored.
    pub scores: bool,
    /// How many of the likeliest tokens are named, of the row that wants most.
    pub alternatives: u32,
    /// Whether a row's history lacks what an unresolved step before this one may add: wait for it, and pack again.
    pub unresolved: bool,
    shared: Arc<Shared>,
}

impl DeviceSampling {
    fn lent(shared: &Arc<Shared>) -> Self {
        Self {
            arrays: shared.sampling_arrays(),
            filters: false,
            samples: false,
            scores: false,
            alternatives: 0,
            unresolved: false,
            shared: Arc::clone(shared),
        }
    }

    /// The rows.
    pub fn arrays(&self) -> &SamplingArrays {
        &self.arrays
    }

    /// How drafts for row `row` are drawn from a drafter's logits: with the random numbers of the row's own draws, see [`crate::draft::couple`], and
    /// nothing else that it asks for. The likeliest for a row that is greedy, and for None.
    pub fn of_drafts(&self, row: Option<usize>) -> SamplingRow {
        let asked = row.and_then(|row| self.arrays.rows.get(row));
        SamplingRow::from(&Sampling {
            seed: asked.map_or(0, |row| row.seed),
            temperature: asked.map_or(0.0, |row| drafted_at(row.temperature)),
            ..Sampling::default()
        })
    }

    /// Appends a row, as [`SamplingArrays::push`] does.
    pub fn push(&mut self, params: &Params, history: &History) {
        self.arrays.push(&params.sampling, history);
        self.filters |= params.sampling.filters();
        self.samples |= params.sampling.temperature > 0.0;
        self.scores |= params.scores();
        self.alternatives = self.alternatives.max(params.alternatives());
    }
}

impl Drop for DeviceSampling {
    fn drop(&mut self) {
        self.shared.return_sampling(std::mem::take(&mut self.arrays));
    }
}

impl Engine {
    /// What the rows of a launched step ask of their draws.
    ///
    /// # Errors
    /// `OutOfTurn` when the step is closed.
    pub fn device_sampling(&self, plan: &StepPlan) -> Result<DeviceSampling> {
        let at = self.in_flight.iter().position(|flight| flight.step == plan.step());
        let Some(at) = at.filter(|_| plan.is_open()) else {
            return Err(closed(plan.step()));
        };
        let mut all = DeviceSampling::lent(&self.shared);
        for row in &self.in_flight[at].rows {
            // Whoever has left gains nothing; a row in its place keeps the others where they are.
            let Some(running) = self.scheduler.tenant(row) else {
                all.arrays.push(&Sampling::default(), &History::default());
                continue;
            };
            let request = &running.request;
            all.push(&request.params, &request.history);
            if let (Work::Prefill { .. }, Some(packed)) = (row.work, all.arrays.rows.last_mut()) {
                packed.anchor = row.len as i32 - 1;
            }
            all.unresolved |= at > 0 && !row.anchor_known && request.params.needs_text();
        }
        Ok(all)
    }
}
