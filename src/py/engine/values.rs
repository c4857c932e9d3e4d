//! What the values of an engine's stages show: arrays without copies, and how drafts are filled in.

use std::sync::MutexGuard;

use numpy::ndarray::{Ix1, Ix2};
use numpy::{PyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::{Accepted, Events, StepPlan, locked};
use crate::draft::DraftTree;
use crate::plan::Pass;
use crate::py::arrays::{array, shaped};
use crate::py::buffers::view;
use crate::py::errors::{invalid, parent_ids, token_ids};
use crate::step;

impl Accepted {
    /// What became of every row that decodes, with drafts or without.
    pub(in crate::py) fn each_pass(&self, plan: &step::StepPlan, mut each: impl FnMut(&Pass<'_>)) {
        let (layout, kept) = (plan.arrays(), self.accepted.arrays());
        let mut path = Vec::new();
        for (row, &temperature) in layout.temperatures.iter().enumerate().take(kept.accepted.len()) {
            let verified = layout.block_len[row] as usize - 1;
            if layout.is_prefill[row] || kept.token_starts[row] == kept.token_starts[row + 1] {
                continue;
            }
            let rows = &kept.commit_rows[kept.commit_starts[row] as usize..kept.commit_starts[row + 1] as usize];
            let anchor = i64::from(layout.query_starts[row]);
            path.clear();
            path.extend(rows.iter().skip(1).map(|at| (at - anchor - 1) as usize));
            let tokens = &kept.tokens[kept.token_starts[row] as usize..kept.token_starts[row + 1] as usize];
            let pass = Pass {
                step: plan.step(),
                request: layout.request_ids[row],
                temperature,
                tree: !layout.parents.is_empty(),
                verified,
                depth: plan.drafted(row) as usize,
                path: &path,
                next: tokens.get(path.len()).copied(),
            };
            each(&pass);
        }
    }
}

impl StepPlan {
    /// The plan itself.
    pub(in crate::py) fn locked(&self) -> MutexGuard<'_, step::StepPlan> {
        locked(&self.plan)
    }
}

/// Trees from rows of padded arrays; the parent of a first node is not looked at.
fn trees(tokens: &Bound<'_, PyAny>, parents: &Bound<'_, PyAny>, counts: &Bound<'_, PyAny>) -> PyResult<Vec<DraftTree>> {
    let tokens = array::<i64, Ix2>("tokens", tokens, "[R, n]")?;
    let parents = array::<i32, Ix2>("parents", parents, "[R, n]")?;
    let counts = array::<i32, Ix1>("counts", counts, "[R]")?;
    let [rows, width] = [tokens.shape()[0], tokens.shape()[1]];
    shaped("parents", parents.shape(), tokens.shape(), "[R, n], that of tokens")?;
    shaped("counts", counts.shape(), &[rows], "[R], one per row of tokens")?;
    let (all_tokens, all_parents, counts) = (tokens.as_slice()?, parents.as_slice()?, counts.as_slice()?);
    let tree = |(row, &count): (usize, &i32)| {
        let nodes = usize::try_from(count).ok().filter(|nodes| (1..=width).contains(nodes));
        let Some(nodes) = nodes else {
            return Err(invalid("counts", count.to_string(), format!("1..{width}")));
        };
        let (first, end) = (row * width, row * width + nodes);
        let parents = parent_ids(&all_parents[first..end])?;
        Ok(DraftTree::from_parents(
            &token_ids("tokens", &all_tokens[first..end])?,
            &parents,
        )?)
    };
    counts.iter().enumerate().map(tree).collect()
}

/// Getters that show a plan's arrays without copying.
macro_rules! plan_arrays {
    ($($(#[$doc:meta])* $field:ident: $kind:ty),* $(,)?) => {
        #[pymethods]
        impl StepPlan {
            /// Number of the step.
            #[getter]
            fn step_id(&self) -> u64 {
                locked(&self.plan).step()
            }

            /// Whether any of its requests drafts at all: then what it keeps needs draft KV.
            #[getter]
            fn drafts(&self) -> bool {
                locked(&self.plan).drafts()
            }

            /// Sizes at a glance: rows, tokens, tokens whose logits are needed, rows with drafts, tokens of the longest row and of the longest one
            /// with drafts, whether any row is a chunk of prompt.
            #[getter]
            fn outline(&self) -> (usize, usize, usize, usize, usize, usize, bool) {
                let step::Outline { rows, tokens, logits, drafting, longest, longest_drafting, prompts } = locked(&self.plan).outline();
                (rows, tokens, logits, drafting, longest, longest_drafting, prompts)
            }

            /// Fills in the drafts, i64 `[len(draft_rows), >= longest block - 1]`.
            fn set_drafts(&self, drafts: &Bound<'_, PyAny>) -> PyResult<()> {
                let drafts = array::<i64, Ix2>("drafts", drafts, "[len(draft_rows), columns]")?;
                let [rows, width] = [drafts.shape()[0], drafts.shape()[1]];
                let expected = locked(&self.plan).arrays().draft_rows.len();
                if rows != expected {
                    let expected = format!("{expected} rows, one per entry of draft_rows");
                    return Err(invalid("drafts", format!("shape {:?}", drafts.shape()), expected));
                }
                let drafts = drafts.as_slice()?;
                let outcome = locked(&self.plan).set_drafts(drafts, width);
                Ok(outcome?)
            }

            /// Verifies only the first `widths[i]` tokens of row `draft_rows[i]`, i32, the anchor counted. Read the arrays again afterwards.
            fn narrow(&self, widths: &Bound<'_, PyAny>) -> PyResult<()> {
                let widths = array::<i32, Ix1>("widths", widths, "[len(draft_rows)]")?;
                let widths = widths.as_slice()?;
                let outcome = locked(&self.plan).narrow(widths);
                Ok(outcome?)
            }

            /// Drafts trees: tokens i64 and parents i32 `[len(draft_rows), w]`, counts i32 `[len(draft_rows)]` of nodes, each row's anchor
            /// first, parents before children. Read the arrays again afterwards.
            fn set_trees(
                &self,
                tokens: &Bound<'_, PyAny>,
                parents: &Bound<'_, PyAny>,
                counts: &Bound<'_, PyAny>,
            ) -> PyResult<()> {
                let trees = trees(tokens, parents, counts)?;
                let outcome = locked(&self.plan).set_trees(&trees);
                Ok(outcome?)
            }

            /// Whether the step has been neither committed nor called off.
            #[getter]
            fn is_open(&self) -> bool {
                locked(&self.plan).is_open()
            }

            fn __repr__(&self) -> String {
                let plan = locked(&self.plan);
                let arrays = plan.arrays();
                format!("StepPlan({}, {} rows, {} tokens)", plan.step(), arrays.row_ids.len(), arrays.token_ids.len())
            }

            $($(#[$doc])*
            #[getter]
            fn $field<'py>(slf: &Bound<'py, Self>) -> Bound<'py, PyArray1<$kind>> {
                let data: *const [$kind] = locked(&slf.get().plan).arrays().$field.as_slice();
                // SAFETY: the buffer belongs to the plan that `slf` owns; it is refilled or cut short in place, never moved. Those of trees are
                // filled once, from empty: a view from before has no elements.
                unsafe { view(&*data, slf.clone().into_any()) }
            })*
        }
    };
}

plan_arrays! {
    /// u64 `[R]`: which request.
    request_ids: u64,
    /// i32 `[R]`: row of the page table.
    row_ids: i32,
    /// i32 `[R + 1]`: where each row's tokens start among the T.
    query_starts: i32,
    /// i32 `[R]`: valid KV tokens before this step.
    context_lens: i32,
    /// i64 `[T]`: tokens, -1 for drafts not set yet.
    token_ids: i64,
    /// i64 `[T]`: positions.
    positions: i64,
    /// i64 `[T]`: KV slots the tokens are written to.
    slots: i64,
    /// i32 `[N]`: packed indices whose logits are needed.
    logit_rows: i32,
    /// i32 `[R + 1]`: where each row's part of `logit_rows` starts.
    logit_starts: i32,
    /// i32 `[n]`: rows with drafts.
    draft_rows: i32,
    /// i32 `[R]`: tokens of the row.
    block_len: i32,
    /// bool `[R]`: whether the row is a chunk of prompt.
    is_prefill: bool,
    /// i32 `[R]`: first position from which on draft K/V are valid.
    draft_valid_from: i32,
    /// bool `[R]`: whether the host knows where the row starts.
    start_known: bool,
    /// f32 `[R]`: sampling temperatures.
    temperatures: f32,
    /// u64 `[R]`: seeds of the requests' draws.
    seeds: u64,
    /// i32 `[R]`: the checkpoint whose state the row starts from, to be copied before the pass; -1: its own, or nothing at position 0; empty for
    /// a target without state.
    state_restore: i32,
    /// i32 `[R]`: the checkpoint that gets the state after the row's last token, before the commit; -1: none; empty for a target without state.
    state_save: i32,
    /// i32 `[T]`: the token each one follows, as an index within its row, -1 for the first; empty while drafts are chains.
    parents: i32,
    /// u64 `[T * words]`: bit j of a token is set when token j of its row is itself or before it; empty while drafts are chains.
    ancestors: u64,
}

macro_rules! value_arrays {
    ($class:ident.$inner:ident { $($(#[$doc:meta])* $field:ident: $kind:ty),* $(,)? } $($rest:tt)*) => {
        #[pymethods]
        impl $class {
            /// Number of the step.
            #[getter]
            fn step_id(&self) -> u64 {
                self.$inner.step()
            }

            $($(#[$doc])*
            #[getter]
            fn $field<'py>(slf: &Bound<'py, Self>) -> Bound<'py, PyArray1<$kind>> {
                // SAFETY: the buffer belongs to the value that `slf` owns and is never touched again.
                unsafe { view(&slf.get().$inner.arrays().$field, slf.clone().into_any()) }
            })*

            $($rest)*
        }
    };
}

value_arrays! {
    Accepted.accepted {
        /// i32 `[R]`: drafts accepted.
        accepted: i32,
        /// i64: tokens gained, the bonus token included.
        tokens: i64,
        /// i32 `[R + 1]`: where each row's tokens start.
        token_starts: i32,
        /// i64 `[M]`: packed indices whose KV and features are valid now.
        commit_rows: i64,
        /// i32 `[R + 1]`: where each row's part of `commit_rows` starts.
        commit_starts: i32,
        /// i64 `[M]`: the slot each of them keeps.
        commit_slots: i64,
        /// i64: slots whose KV has to be moved before the commit, all of them read first.
        move_from: i64,
        /// i64: where to.
        move_to: i64,
        /// f32 `[len(tokens)]`: log-probabilities, NaN where not asked for.
        logprobs: f32,
        /// i32 `[len(tokens) + 1]`: where each token's alternatives start.
        top_starts: i32,
        /// i64: the likeliest tokens beside each token.
        top_tokens: i64,
        /// f32: their log-probabilities.
        top_logprobs: f32,
    }

    /// `(row, message)` of each row whose tokens could not be drawn.
    #[getter]
    fn failed(&self) -> Vec<(usize, String)> {
        self.accepted.failed().iter().map(|(row, error)| (*row, error.to_string())).collect()
    }

    fn __repr__(&self) -> String {
        let arrays = self.accepted.arrays();
        format!("Accepted(step {}, {} tokens for {} rows)", self.accepted.step(), arrays.tokens.len(), arrays.accepted.len())
    }
}

value_arrays! {
    Events.events {
        /// u64 `[E]`: requests that gained tokens or ended.
        request_ids: u64,
        /// i64: new output tokens.
        tokens: i64,
        /// i32 `[E + 1]`: where each request's tokens start.
        token_starts: i32,
        /// u8 `[E]`: 0 goes on, 1 stop token, 2 stop string, 3 length, 4 error.
        finish: u8,
        /// i32 `[E]`: positions drafted.
        drafted: i32,
        /// i32 `[E]`: drafts verified, more of them where they were trees.
        verified: i32,
        /// i32 `[E]`: drafts accepted.
        accepted: i32,
        /// i64 `[E]`: output bytes that are certain to be text, -1 for all.
        text_ends: i64,
        /// i32 `[E]`: prompt tokens found in the prefix cache.
        cached_tokens: i32,
        /// f32 `[len(tokens)]`: log-probabilities, NaN where not asked for.
        logprobs: f32,
        /// i32 `[len(tokens) + 1]`: where each token's alternatives start.
        top_starts: i32,
        /// i64: the likeliest tokens beside each token.
        top_tokens: i64,
        /// f32: their log-probabilities.
        top_logprobs: f32,
    }

    /// Requests that ended.
    #[getter]
    fn ended(&self) -> Vec<u64> {
        let arrays = self.events.arrays();
        let ends = arrays.request_ids.iter().zip(&arrays.finish).filter(|(_, finish)| **finish != 0);
        ends.map(|(&request, _)| request).collect()
    }

    /// `(request_id, message)` of each request that ended with an error.
    #[getter]
    fn errors(&self) -> Vec<(u64, String)> {
        self.events.errors().iter().map(|(id, error)| (*id, format!("request {id}: {error}"))).collect()
    }

    fn __repr__(&self) -> String {
        let arrays = self.events.arrays();
        format!("Events(step {}, {} tokens for {} requests)", self.events.step(), arrays.tokens.len(), arrays.finish.len())
    }
}
