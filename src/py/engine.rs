//! `dflash_rs._core.Engine` and the values of its stages.

use std::collections::HashMap;
use std::sync::atomic::AtomicI32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use numpy::ndarray::Dimension;
use numpy::{Element, PyArray1, PyArray2, PyReadonlyArray, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::draft::DraftTree;
use crate::py::buffers::{table_view, view};
use crate::py::errors::{invalid, token_ids};
use crate::schedule::{Config, Params, Vocabulary};
use crate::step;
use crate::types::{RequestId, TokenId};
use crate::verify::Sampling;

/// Continuous batching with speculative blocks over one KV pool.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct Engine {
    engine: Mutex<step::Engine>,
    table: Arc<[AtomicI32]>,
    width: usize,
    vocab_size: usize,
}

/// A launched step.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct StepPlan {
    plan: Mutex<step::StepPlan>,
}

/// What a step keeps.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct Accepted {
    accepted: step::Accepted,
}

/// What a step meant for its requests.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct Events {
    events: step::Events,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic inside the core is a bug; going on with what it left beats a second, unrelated exception.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn contiguous<'a, T: Element, D: Dimension>(
    name: &'static str,
    array: Option<&'a PyReadonlyArray<'_, T, D>>,
) -> PyResult<&'a [T]> {
    let Some(array) = array else {
        return Ok(&[]);
    };
    array
        .as_slice()
        .map_err(|_| invalid(name, "a strided array", "a C-contiguous array"))
}

// Locks and the GIL, the one rule: whoever holds a lock never waits for the GIL, which anything that makes a Python object
// or an exception may do. So a lock is held for a statement of pure Rust, and the engine's, which may be held for long,
// is waited for without the GIL. The engine's lock comes before a plan's.
impl Engine {
    // The lock is taken without the GIL, so that a thread that waits for it cannot hold up the one that has it.
    fn with<R: Send>(&self, py: Python<'_>, stage: impl FnOnce(&mut step::Engine) -> R + Send) -> R {
        py.detach(|| stage(&mut locked(&self.engine)))
    }
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (
        *, num_pages, vocab_size, page_size = 16, max_running = 16, max_context = 2048, block_size = 8,
        max_batch_tokens = 2048, eos_ids = Vec::new(), prefix_cache = true, depth = 0, vocabulary = None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        num_pages: usize,
        vocab_size: usize,
        page_size: usize,
        max_running: usize,
        max_context: usize,
        block_size: usize,
        max_batch_tokens: usize,
        eos_ids: Vec<i64>,
        prefix_cache: bool,
        depth: usize,
        vocabulary: Option<Vec<Bound<'_, PyBytes>>>,
    ) -> PyResult<Self> {
        let config = Config {
            num_pages,
            page_size,
            max_running,
            max_context,
            block_size,
            max_batch_tokens,
            vocab_size,
            eos_ids: token_ids("eos_ids", &eos_ids)?,
            prefix_cache,
            depth,
        };
        let vocabulary = vocabulary.map(|tokens| Vocabulary::new(tokens.iter().map(|token| token.as_bytes())));
        let engine = step::Engine::new(config, vocabulary.transpose()?)?;
        let table = engine.scheduler().kv().table();
        let (table, width) = (Arc::clone(table.flat()), table.width());
        Ok(Self {
            engine: Mutex::new(engine),
            table,
            width,
            vocab_size,
        })
    }

    /// Queues a request and returns its number.
    #[pyo3(signature = (
        prompt, *, max_tokens = 16, temperature = 1.0, top_k = 0, top_p = 1.0, min_p = 0.0, repetition_penalty = 1.0,
        presence_penalty = 0.0, frequency_penalty = 0.0, logit_bias = None, seed = 0, stop_token_ids = Vec::new(),
        stop = Vec::new(), ignore_eos = false, logprobs = None, draft = true,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn add(
        &self,
        py: Python<'_>,
        prompt: Vec<i64>,
        max_tokens: u32,
        temperature: f32,
        top_k: u32,
        top_p: f32,
        min_p: f32,
        repetition_penalty: f32,
        presence_penalty: f32,
        frequency_penalty: f32,
        logit_bias: Option<HashMap<i64, f32>>,
        seed: u64,
        stop_token_ids: Vec<i64>,
        stop: Vec<Vec<u8>>,
        ignore_eos: bool,
        logprobs: Option<u32>,
        draft: bool,
    ) -> PyResult<u64> {
        let mut bias: Vec<(TokenId, f32)> = Vec::new();
        for (id, value) in logit_bias.unwrap_or_default() {
            bias.push((token_ids("logit_bias", &[id])?[0], value));
        }
        bias.sort_unstable_by_key(|&(token, _)| token);
        let params = Params {
            sampling: Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                logit_bias: bias,
                seed,
            },
            max_tokens,
            stop_ids: token_ids("stop_token_ids", &stop_token_ids)?,
            stop_strings: stop,
            ignore_eos,
            logprobs,
            draft,
        };
        let prompt = token_ids("prompt", &prompt)?;
        Ok(self.with(py, |engine| engine.add(prompt, params))?.0)
    }

    /// Ends a request wherever it is; there is no event for it. `False`: it had ended already.
    fn abort(&self, py: Python<'_>, request_id: u64) -> PyResult<bool> {
        Ok(self.with(py, |engine| engine.abort(RequestId(request_id)))?)
    }

    /// Launches the next step with blocks of at most `max_block` tokens (default: `block_size`); `None` when nothing
    /// can run.
    #[pyo3(signature = (max_block = None))]
    fn plan(&self, py: Python<'_>, max_block: Option<usize>) -> PyResult<Option<StepPlan>> {
        let plan = self.with(py, |engine| engine.plan(max_block.unwrap_or(usize::MAX)))?;
        Ok(plan.map(|plan| StepPlan { plan: Mutex::new(plan) }))
    }

    /// Draws the target's tokens from `logits` (f32 `[N, vocab_size]`, C-contiguous) and walks the drafts.
    fn accept(&self, py: Python<'_>, plan: &StepPlan, logits: PyReadonlyArray2<'_, f32>) -> PyResult<Accepted> {
        let got = format!("shape {:?}", logits.shape());
        let rows = locked(&plan.plan).arrays().logit_rows.len();
        let expected = [rows, self.vocab_size];
        if logits.shape() != expected || !logits.is_c_contiguous() {
            let got = if logits.is_c_contiguous() {
                got
            } else {
                got + ", not C-contiguous"
            };
            return Err(invalid(
                "logits",
                got,
                format!("a C-contiguous f32 array of shape {expected:?} [N, vocab_size]"),
            ));
        }
        let logits = logits
            .as_slice()
            .map_err(|_| invalid("logits", "a strided array", "a C-contiguous array"))?;
        let accepted = self.with(py, |engine| engine.accept(&locked(&plan.plan), logits))?;
        Ok(Accepted { accepted })
    }

    /// Walks the drafts with tokens drawn elsewhere: `sampled` i64 `[N]`; `logprobs` f32 and `status` i32 `[N]`, `top_tokens` i64 and
    /// `top_logprobs` f32 `[N, k]` or `None`.
    #[pyo3(signature = (plan, sampled, logprobs = None, *, status = None, top_tokens = None, top_logprobs = None))]
    #[allow(clippy::too_many_arguments, reason = "what a device returns, by keyword")]
    fn accept_sampled(
        &self,
        py: Python<'_>,
        plan: &StepPlan,
        sampled: PyReadonlyArray1<'_, i64>,
        logprobs: Option<PyReadonlyArray1<'_, f32>>,
        status: Option<PyReadonlyArray1<'_, i32>>,
        top_tokens: Option<PyReadonlyArray2<'_, i64>>,
        top_logprobs: Option<PyReadonlyArray2<'_, f32>>,
    ) -> PyResult<Accepted> {
        let top_count = top_tokens.as_ref().map_or(0, |array| array.shape()[1]);
        let drawn = step::DrawnRows {
            tokens: contiguous("sampled", Some(&sampled))?,
            logprobs: contiguous("logprobs", logprobs.as_ref())?,
            status: contiguous("status", status.as_ref())?,
            top_count,
            top_tokens: contiguous("top_tokens", top_tokens.as_ref())?,
            top_logprobs: contiguous("top_logprobs", top_logprobs.as_ref())?,
        };
        let accepted = self.with(py, |engine| engine.accept_drawn(&locked(&plan.plan), &drawn))?;
        Ok(Accepted { accepted })
    }

    /// What penalties count, of the rows that have any: starts i32 `[R + 1]`, tokens i32 (ascending within a row), occurrences in the
    /// output i32.
    fn histories<'py>(&self, py: Python<'py>, plan: &StepPlan) -> PyResult<[Bound<'py, PyArray1<i32>>; 3]> {
        let found = self.with(py, |engine| engine.histories(&locked(&plan.plan)))?;
        Ok([found.starts, found.tokens, found.counts].map(|values| PyArray1::from_vec(py, values)))
    }

    /// Resolves a step. `injected`: draft K/V were computed for `accepted.commit_rows`.
    #[pyo3(signature = (plan, accepted, injected = true))]
    fn commit(&self, py: Python<'_>, plan: &StepPlan, accepted: &Accepted, injected: bool) -> PyResult<Events> {
        let events = self.with(py, |engine| {
            engine.commit(&mut locked(&plan.plan), &accepted.accepted, injected)
        })?;
        Ok(Events { events })
    }

    /// Calls a step off: its requests go on from their last resolved token. `False`: it was closed already.
    fn cancel(&self, py: Python<'_>, plan: &StepPlan) -> PyResult<bool> {
        Ok(self.with(py, |engine| engine.cancel(&mut locked(&plan.plan)))?)
    }

    /// Calls every unresolved step off, as after Ctrl-C.
    fn cancel_all(&self, py: Python<'_>) -> PyResult<()> {
        Ok(self.with(py, step::Engine::cancel_all)?)
    }

    /// Frees up to `count` cached pages that no request holds (default: all); returns how many.
    #[pyo3(signature = (count = None))]
    fn evict(&self, py: Python<'_>, count: Option<usize>) -> PyResult<usize> {
        Ok(self.with(py, |engine| engine.evict(count.unwrap_or(usize::MAX)))?)
    }

    /// Whether any request waits or runs.
    #[getter]
    fn has_work(&self, py: Python<'_>) -> bool {
        self.with(py, |engine| engine.has_work())
    }

    /// Columns of the logits.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Tokens of a block, the anchor counted.
    #[getter]
    fn block_size(&self, py: Python<'_>) -> usize {
        self.with(py, |engine| engine.config().block_size)
    }

    /// KV slots per page.
    #[getter]
    fn page_size(&self, py: Python<'_>) -> usize {
        self.with(py, |engine| engine.config().page_size)
    }

    /// Pages of the pool; the KV cache has `num_pages * page_size` slots.
    #[getter]
    fn num_pages(&self, py: Python<'_>) -> usize {
        self.with(py, |engine| engine.config().num_pages)
    }

    /// The persistent page table, i32 `[rows, max_pages_per_request]`, read-only, indexed by `StepPlan.row_ids`.
    #[getter]
    fn page_table<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyArray2<i32>>> {
        let Self { table, width, .. } = slf.get();
        // SAFETY: `slf` is an owner of the shared slice (see the module of `table_view`).
        unsafe { table_view(table, table.len() / width, *width, slf.clone().into_any()) }
    }

    /// Requests and pages: waiting, running, in_flight, free_pages, cached_pages, reclaimable_pages, total_pages,
    /// retractions.
    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counts = self.with(py, step::Engine::counts)?;
        let dict = PyDict::new(py);
        dict.set_item("waiting", counts.waiting)?;
        dict.set_item("running", counts.running)?;
        dict.set_item("in_flight", counts.in_flight)?;
        dict.set_item("free_pages", counts.free_pages)?;
        dict.set_item("cached_pages", counts.cached_pages)?;
        dict.set_item("reclaimable_pages", counts.reclaimable_pages)?;
        dict.set_item("total_pages", counts.total_pages)?;
        dict.set_item("retractions", counts.retractions)?;
        Ok(dict)
    }

    /// Acceptance over all requests: passes, committed, drafted (positions), verified (drafts, more in trees), accepted, tau (`None`
    /// before the first pass), histogram, per_position.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.with(py, |engine| engine.stats().clone());
        let dict = PyDict::new(py);
        dict.set_item("passes", stats.passes())?;
        dict.set_item("committed", stats.committed())?;
        dict.set_item("drafted", stats.drafted())?;
        dict.set_item("verified", stats.verified())?;
        dict.set_item("accepted", stats.accepted())?;
        dict.set_item("tau", stats.tau())?;
        dict.set_item("histogram", stats.histogram())?;
        dict.set_item("per_position", stats.acceptance_per_position())?;
        Ok(dict)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        self.with(py, |engine| {
            let scheduler = engine.scheduler();
            format!(
                "Engine({} running, {} waiting)",
                scheduler.num_running(),
                scheduler.waiting().len()
            )
        })
    }
}

impl Accepted {
    /// Of every row that followed drafts: drafts verified, positions drafted, and the accepted ones by their place behind the anchor.
    pub(super) fn each_pass(&self, plan: &StepPlan, mut each: impl FnMut(usize, usize, &[i64])) {
        let plan = locked(&plan.plan);
        let (layout, kept) = (plan.arrays(), self.accepted.arrays());
        let mut path = Vec::new();
        for row in 0..layout.row_ids.len().min(kept.accepted.len()) {
            let verified = layout.block_len[row] as usize - 1;
            if layout.is_prefill[row] || verified == 0 || kept.token_starts[row] == kept.token_starts[row + 1] {
                continue;
            }
            let rows = &kept.commit_rows[kept.commit_starts[row] as usize..kept.commit_starts[row + 1] as usize];
            path.clear();
            path.extend(
                rows.iter()
                    .skip(1)
                    .map(|at| at - i64::from(layout.query_starts[row]) - 1),
            );
            each(verified, plan.drafted(row) as usize, &path);
        }
    }
}

/// Trees from rows of padded arrays; the parent of a first node is not looked at.
fn trees(
    tokens: &PyReadonlyArray2<'_, i64>,
    parents: &PyReadonlyArray2<'_, i32>,
    counts: &PyReadonlyArray1<'_, i32>,
) -> PyResult<Vec<DraftTree>> {
    let [rows, width] = [tokens.shape()[0], tokens.shape()[1]];
    if parents.shape() != tokens.shape() {
        let expected = format!("[{rows}, {width}], that of tokens");
        return Err(invalid("parents", format!("shape {:?}", parents.shape()), expected));
    }
    let all_tokens = contiguous("tokens", Some(tokens))?;
    let all_parents = contiguous("parents", Some(parents))?;
    let counts = contiguous("counts", Some(counts))?;
    if counts.len() != rows {
        let expected = format!("{rows}, one per row of tokens");
        return Err(invalid("counts", counts.len().to_string(), expected));
    }
    let tree = |(row, &count): (usize, &i32)| {
        let nodes = usize::try_from(count).ok().filter(|nodes| (1..=width).contains(nodes));
        let Some(nodes) = nodes else {
            return Err(invalid("counts", count.to_string(), format!("1 to {width}")));
        };
        let (first, end) = (row * width, row * width + nodes);
        let parents: Vec<u32> = all_parents[first..end].iter().map(|&parent| parent as u32).collect();
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

            /// Fills in the drafts, i64 `[len(draft_rows), >= longest block - 1]`.
            fn set_drafts(&self, drafts: PyReadonlyArray2<'_, i64>) -> PyResult<()> {
                let [rows, width] = [drafts.shape()[0], drafts.shape()[1]];
                let expected = locked(&self.plan).arrays().draft_rows.len();
                if rows != expected {
                    let expected = format!("{expected} rows, one per entry of draft_rows");
                    return Err(invalid("drafts", format!("shape {:?}", drafts.shape()), expected));
                }
                let drafts =
                    drafts.as_slice().map_err(|_| invalid("drafts", "a strided array", "a C-contiguous i64 array"))?;
                let outcome = locked(&self.plan).set_drafts(drafts, width);
                Ok(outcome?)
            }

            /// Verifies only the first `keep[i]` drafts of row `draft_rows[i]`, i32. Read the arrays again afterwards.
            fn narrow(&self, keep: PyReadonlyArray1<'_, i32>) -> PyResult<()> {
                let keep = keep.as_slice().map_err(|_| invalid("keep", "a strided array", "a C-contiguous i32 array"))?;
                let outcome = locked(&self.plan).narrow(keep);
                Ok(outcome?)
            }

            /// Drafts trees: tokens i64 and parents i32 `[len(draft_rows), w]`, counts i32 `[len(draft_rows)]` of nodes, each row's anchor
            /// first, parents before children. Read the arrays again afterwards.
            fn set_trees(
                &self,
                tokens: PyReadonlyArray2<'_, i64>,
                parents: PyReadonlyArray2<'_, i32>,
                counts: PyReadonlyArray1<'_, i32>,
            ) -> PyResult<()> {
                let trees = trees(&tokens, &parents, &counts)?;
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
