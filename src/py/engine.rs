//! `dflash_rs._core.Engine` and the values of its stages.

use std::collections::HashMap;
use std::sync::atomic::AtomicI32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use numpy::ndarray::{Dimension, Ix1, Ix2};
use numpy::{Element, PyArray1, PyArray2, PyReadonlyArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::draft::DraftTree;
use crate::py::arrays::{Count, Flag, Given, array, shaped};
use crate::py::buffers::{table_view, view};
use crate::py::errors::{invalid, parent_ids, token_ids};
use crate::schedule::{Config, Params, Vocabulary};
use crate::step;
use crate::types::{RequestId, TokenId};
use crate::verify::Sampling;

const TOKENS: &str = "a list of nothing but token ids";

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

type MaybeArray<'py, T, D> = Option<PyReadonlyArray<'py, T, D>>;

fn maybe<'py, T: Element, D: Dimension>(
    name: &'static str,
    object: Option<&Bound<'py, PyAny>>,
    shape: &str,
) -> PyResult<MaybeArray<'py, T, D>> {
    object.map(|object| array(name, object, shape)).transpose()
}

/// The elements of an array that was checked to be contiguous; none where there is no array.
fn elements<'a, T: Element, D: Dimension>(array: Option<&'a PyReadonlyArray<'_, T, D>>) -> PyResult<&'a [T]> {
    Ok(array.map(|array| array.as_slice()).transpose()?.unwrap_or_default())
}

fn plan_given<'py>(plan: Given<Bound<'py, StepPlan>>) -> PyResult<Bound<'py, StepPlan>> {
    plan.of("plan", "a StepPlan")
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
        *, num_pages, vocab_size, page_size = Count::new(16), max_running = Count::new(16), max_context = Count::new(2048),
        block_size = Count::new(8), max_batch_tokens = Count::new(2048), eos_ids = Given::new(Vec::new()), prefix_cache = Flag::TRUE,
        state_checkpoints = None, depth = Count::ZERO, vocabulary = None,
    ), text_signature = "(*, num_pages, vocab_size, page_size=16, max_running=16, max_context=2048, block_size=8, \
        max_batch_tokens=2048, eos_ids=[], prefix_cache=True, state_checkpoints=None, depth=0, vocabulary=None)")]
    #[allow(clippy::too_many_arguments)]
    fn new(
        num_pages: Count,
        vocab_size: Count,
        page_size: Count,
        max_running: Count,
        max_context: Count,
        block_size: Count,
        max_batch_tokens: Count,
        eos_ids: Given<Vec<i64>>,
        prefix_cache: Flag,
        state_checkpoints: Option<Count>,
        depth: Count,
        vocabulary: Option<Given<Vec<Bound<'_, PyBytes>>>>,
    ) -> PyResult<Self> {
        let vocab_size = vocab_size.count("vocab_size")?;
        let config = Config {
            num_pages: num_pages.count("num_pages")?,
            page_size: page_size.count("page_size")?,
            max_running: max_running.count("max_running")?,
            max_context: max_context.count("max_context")?,
            block_size: block_size.count("block_size")?,
            max_batch_tokens: max_batch_tokens.count("max_batch_tokens")?,
            vocab_size,
            eos_ids: token_ids("eos_ids", &eos_ids.of("eos_ids", TOKENS)?)?,
            prefix_cache: prefix_cache.of("prefix_cache")?,
            state_checkpoints: state_checkpoints
                .map(|copies| copies.count("state_checkpoints"))
                .transpose()?,
            depth: depth.count("depth")?,
        };
        let vocabulary = vocabulary
            .map(|tokens| tokens.of("vocabulary", "a list of the bytes of each token, or None"))
            .transpose()?;
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
        prompt, *, max_tokens = Count::new(16), temperature = Given::new(1.0), top_k = Count::ZERO, top_p = Given::new(1.0),
        min_p = Given::new(0.0), repetition_penalty = Given::new(1.0), presence_penalty = Given::new(0.0),
        frequency_penalty = Given::new(0.0), logit_bias = None, seed = Count::ZERO, stop_token_ids = Given::new(Vec::new()),
        stop = Given::new(Vec::new()), ignore_eos = Flag::FALSE, logprobs = None, draft = Flag::TRUE,
    ), text_signature = "($self, prompt, *, max_tokens=16, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, \
        presence_penalty=0.0, frequency_penalty=0.0, logit_bias=None, seed=0, stop_token_ids=[], stop=[], ignore_eos=False, \
        logprobs=None, draft=True)")]
    #[allow(clippy::too_many_arguments)]
    fn add(
        &self,
        py: Python<'_>,
        prompt: Given<Vec<i64>>,
        max_tokens: Count,
        temperature: Given<f32>,
        top_k: Count,
        top_p: Given<f32>,
        min_p: Given<f32>,
        repetition_penalty: Given<f32>,
        presence_penalty: Given<f32>,
        frequency_penalty: Given<f32>,
        logit_bias: Option<Given<HashMap<i64, f32>>>,
        seed: Count,
        stop_token_ids: Given<Vec<i64>>,
        stop: Given<Vec<Vec<u8>>>,
        ignore_eos: Flag,
        logprobs: Option<Count>,
        draft: Flag,
    ) -> PyResult<u64> {
        const NUMBER: &str = "a number";
        let mut bias: Vec<(TokenId, f32)> = Vec::new();
        let biases = logit_bias
            .map(|biases| biases.of("logit_bias", "a dict from tokens to numbers, or None"))
            .transpose()?;
        for (id, value) in biases.unwrap_or_default() {
            bias.push((token_ids("logit_bias", &[id])?[0], value));
        }
        bias.sort_unstable_by_key(|&(token, _)| token);
        let params = Params {
            sampling: Sampling {
                temperature: temperature.of("temperature", NUMBER)?,
                top_k: top_k.count("top_k")?,
                top_p: top_p.of("top_p", NUMBER)?,
                min_p: min_p.of("min_p", NUMBER)?,
                repetition_penalty: repetition_penalty.of("repetition_penalty", NUMBER)?,
                presence_penalty: presence_penalty.of("presence_penalty", NUMBER)?,
                frequency_penalty: frequency_penalty.of("frequency_penalty", NUMBER)?,
                logit_bias: bias,
                seed: seed.count("seed")?,
            },
            max_tokens: max_tokens.count("max_tokens")?,
            stop_ids: token_ids("stop_token_ids", &stop_token_ids.of("stop_token_ids", TOKENS)?)?,
            stop_strings: stop.of("stop", "a list of bytes")?,
            ignore_eos: ignore_eos.of("ignore_eos")?,
            logprobs: logprobs.map(|logprobs| logprobs.count("logprobs")).transpose()?,
            draft: draft.of("draft")?,
        };
        let prompt = token_ids("prompt", &prompt.of("prompt", TOKENS)?)?;
        Ok(self.with(py, |engine| engine.add(prompt, params))?.0)
    }

    /// Ends a request wherever it is; there is no event for it. `False`: it had ended already.
    fn abort(&self, py: Python<'_>, request_id: Count) -> PyResult<bool> {
        let request_id = request_id.count("request_id")?;
        Ok(self.with(py, |engine| engine.abort(RequestId(request_id)))?)
    }

    /// Launches the next step with blocks of at most `max_block` tokens (default: `block_size`); `None` when nothing
    /// can run.
    #[pyo3(signature = (max_block = None))]
    fn plan(&self, py: Python<'_>, max_block: Option<Count>) -> PyResult<Option<StepPlan>> {
        let max_block = max_block.map(|most| most.count("max_block")).transpose()?;
        let plan = self.with(py, |engine| engine.plan(max_block.unwrap_or(usize::MAX)))?;
        Ok(plan.map(|plan| StepPlan { plan: Mutex::new(plan) }))
    }

    /// Draws the target's tokens from `logits` (f32 `[N, vocab_size]`, C-contiguous) and walks the drafts.
    fn accept<'py>(
        &self,
        py: Python<'py>,
        plan: Given<Bound<'py, StepPlan>>,
        logits: &Bound<'py, PyAny>,
    ) -> PyResult<Accepted> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        let logits = array::<f32, Ix2>("logits", logits, "[N, vocab_size]")?;
        let rows = locked(&plan.plan).arrays().logit_rows.len();
        shaped("logits", logits.shape(), &[rows, self.vocab_size], "[N, vocab_size]")?;
        let logits = logits.as_slice()?;
        let accepted = self.with(py, |engine| engine.accept(&locked(&plan.plan), logits))?;
        Ok(Accepted { accepted })
    }

    /// Walks the drafts with tokens drawn elsewhere: `sampled` i64 `[N]`; `logprobs` f32 and `status` i32 `[N]`, `top_tokens` i64 and
    /// `top_logprobs` f32 `[N, k]` or `None`.
    #[pyo3(signature = (plan, sampled, logprobs = None, *, status = None, top_tokens = None, top_logprobs = None))]
    #[allow(clippy::too_many_arguments, reason = "what a device returns, by keyword")]
    fn accept_sampled<'py>(
        &self,
        py: Python<'py>,
        plan: Given<Bound<'py, StepPlan>>,
        sampled: &Bound<'py, PyAny>,
        logprobs: Option<&Bound<'py, PyAny>>,
        status: Option<&Bound<'py, PyAny>>,
        top_tokens: Option<&Bound<'py, PyAny>>,
        top_logprobs: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Accepted> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        let sampled = array::<i64, Ix1>("sampled", sampled, "[N]")?;
        let logprobs = maybe::<f32, Ix1>("logprobs", logprobs, "[N]")?;
        let status = maybe::<i32, Ix1>("status", status, "[N]")?;
        let top_tokens = maybe::<i64, Ix2>("top_tokens", top_tokens, "[N, k]")?;
        let top_logprobs = maybe::<f32, Ix2>("top_logprobs", top_logprobs, "[N, k]")?;
        let top_count = top_tokens.as_ref().map_or(0, |array| array.shape()[1]);
        let drawn = step::DrawnRows {
            tokens: elements(Some(&sampled))?,
            logprobs: elements(logprobs.as_ref())?,
            status: elements(status.as_ref())?,
            top_count,
            top_tokens: elements(top_tokens.as_ref())?,
            top_logprobs: elements(top_logprobs.as_ref())?,
        };
        let accepted = self.with(py, |engine| engine.accept_drawn(&locked(&plan.plan), &drawn))?;
        Ok(Accepted { accepted })
    }

    /// What penalties count, of the rows that have any: starts i32 `[R + 1]`, tokens i32 (ascending within a row), occurrences in the
    /// output i32.
    fn histories<'py>(
        &self,
        py: Python<'py>,
        plan: Given<Bound<'py, StepPlan>>,
    ) -> PyResult<[Bound<'py, PyArray1<i32>>; 3]> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        let found = self.with(py, |engine| engine.histories(&locked(&plan.plan)))?;
        Ok([found.starts, found.tokens, found.counts].map(|values| PyArray1::from_vec(py, values)))
    }

    /// Resolves a step. `injected`: draft K/V were computed for `accepted.commit_rows`.
    #[pyo3(signature = (plan, accepted, injected = Flag::TRUE), text_signature = "($self, plan, accepted, injected=True)")]
    fn commit<'py>(
        &self,
        py: Python<'py>,
        plan: Given<Bound<'py, StepPlan>>,
        accepted: Given<Bound<'py, Accepted>>,
        injected: Flag,
    ) -> PyResult<Events> {
        let (plan, accepted) = (plan_given(plan)?, accepted.of("accepted", "an Accepted")?);
        let (plan, accepted, injected) = (plan.get(), accepted.get(), injected.of("injected")?);
        let events = self.with(py, |engine| {
            engine.commit(&mut locked(&plan.plan), &accepted.accepted, injected)
        })?;
        Ok(Events { events })
    }

    /// Launches the next step before the last one is resolved; `None` when its results have to come first.
    #[pyo3(signature = (max_block = None))]
    fn plan_ahead(&self, py: Python<'_>, max_block: Option<Count>) -> PyResult<Option<StepPlan>> {
        let max_block = max_block.map(|most| most.count("max_block")).transpose()?;
        let plan = self.with(py, |engine| engine.plan_ahead(max_block.unwrap_or(usize::MAX)))?;
        Ok(plan.map(|plan| StepPlan { plan: Mutex::new(plan) }))
    }

    /// Tells a step that was launched ahead what is known now that the one before it is resolved.
    fn settle<'py>(&self, py: Python<'py>, plan: Given<Bound<'py, StepPlan>>) -> PyResult<()> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        Ok(self.with(py, |engine| engine.settle(&mut locked(&plan.plan)))?)
    }

    /// Calls a step off: its requests go on from their last resolved token. `False`: it was closed already.
    fn cancel<'py>(&self, py: Python<'py>, plan: Given<Bound<'py, StepPlan>>) -> PyResult<bool> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        Ok(self.with(py, |engine| engine.cancel(&mut locked(&plan.plan)))?)
    }

    /// Calls every unresolved step off, as after Ctrl-C.
    fn cancel_all(&self, py: Python<'_>) -> PyResult<()> {
        Ok(self.with(py, step::Engine::cancel_all)?)
    }

    /// Frees up to `count` cached pages that no request holds (default: all); returns how many.
    #[pyo3(signature = (count = None))]
    fn evict(&self, py: Python<'_>, count: Option<Count>) -> PyResult<usize> {
        let count = count.map(|count| count.count("count")).transpose()?;
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
    /// retractions; of a target with state, state_checkpoints.
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
        if self.with(py, |engine| engine.config().state_checkpoints.is_some()) {
            dict.set_item("state_checkpoints", counts.state_checkpoints)?;
        }
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

            /// Verifies only the first `keep[i]` drafts of row `draft_rows[i]`, i32. Read the arrays again afterwards.
            fn narrow(&self, keep: &Bound<'_, PyAny>) -> PyResult<()> {
                let keep = array::<i32, Ix1>("keep", keep, "[len(draft_rows)]")?;
                let keep = keep.as_slice()?;
                let outcome = locked(&self.plan).narrow(keep);
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
