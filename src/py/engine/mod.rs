//! `dflash_rs._core.Engine` and the values of its stages. In one file because the methods of a class stand in one `#[pymethods]`.

mod record;
mod values;

use std::sync::atomic::AtomicI32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use numpy::ndarray::{Dimension, Ix1, Ix2};
use numpy::{
    Element, IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray, PyReadwriteArrayDyn,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::py::arrays::{Count, Flag, Given, Object, array, array_mut, shaped};
use crate::py::buffers::{bytes, table_view};
use crate::py::errors::{invalid, token_ids};
use crate::py::params::{self, DeviceSampling};
use crate::schedule::{Config, Vocabulary};
use crate::step;
use crate::types::RequestId;

pub use record::{Record, read_records};

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

/// Tokens, chances, how many there are.
type Looked<'py> = (
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray2<f32>>,
    Bound<'py, PyArray1<i32>>,
);

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

/// What is written of an array that was checked to be contiguous.
fn slice<'a, T: Element>(array: &'a mut PyReadwriteArrayDyn<'_, T>) -> PyResult<&'a mut [T]> {
    Ok(array.as_slice_mut()?)
}

/// Rows that were edited before they are drawn: which, raw logits, what to draw from, and for each why it has no token or `None`.
struct Edited<'py> {
    rows: PyReadonlyArray<'py, i64, Ix1>,
    raw: PyReadonlyArray<'py, f32, Ix2>,
    logits: PyReadonlyArray<'py, f32, Ix2>,
    refused: Vec<(usize, String)>,
}

impl<'py> Edited<'py> {
    fn read(edited: Option<&Bound<'py, PyAny>>) -> PyResult<Option<Self>> {
        const EXPECTED: &str = "rows [E], raw and edited logits [E, vocab_size], and a reason or None for each";
        type Parts<'py> = (
            Bound<'py, PyAny>,
            Bound<'py, PyAny>,
            Bound<'py, PyAny>,
            Given<Vec<Option<String>>>,
        );
        let Some(edited) = edited.filter(|edited| !edited.is_none()) else {
            return Ok(None);
        };
        let (rows, raw, logits, reasons) = edited.extract::<Given<Parts<'py>>>()?.of("edited", EXPECTED)?;
        let reasons = reasons.of("edited", EXPECTED)?;
        let rows = array::<i64, Ix1>("edited rows", &rows, "[E]")?;
        if reasons.len() != rows.shape()[0] {
            let expected = format!("{}, one for each row", rows.shape()[0]);
            return Err(invalid("edited", format!("{} reasons", reasons.len()), expected));
        }
        let reason = |(at, why): (usize, Option<String>)| why.map(|why| (at, why));
        Ok(Some(Self {
            rows,
            raw: array("edited raw", &raw, "[E, vocab_size]")?,
            logits: array("edited logits", &logits, "[E, vocab_size]")?,
            refused: reasons.into_iter().enumerate().filter_map(reason).collect(),
        }))
    }

    fn of(edited: Option<&Self>) -> PyResult<step::EditedRows<'_>> {
        Ok(match edited {
            None => step::EditedRows::default(),
            Some(edited) => step::EditedRows {
                rows: edited.rows.as_slice()?,
                raw: edited.raw.as_slice()?,
                logits: edited.logits.as_slice()?,
                refused: &edited.refused,
            },
        })
    }
}

fn plan_given<'py>(plan: Object<'py, StepPlan>) -> PyResult<Bound<'py, StepPlan>> {
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
        *, num_pages, vocab_size, page_size = Count::new(16), max_running = Count::new(32), max_context = Count::new(2048),
        block_size = Count::new(8), max_batch_tokens = Count::new(2048), eos_ids = Given::new(Vec::new()), prefix_cache = Flag::TRUE,
        state_checkpoints = None, depth = Count::ZERO, vocabulary = None, special_vocabulary = None,
    ), text_signature = "(*, num_pages, vocab_size, page_size=16, max_running=32, max_context=2048, block_size=8, \
        max_batch_tokens=2048, eos_ids=[], prefix_cache=True, state_checkpoints=None, depth=0, vocabulary=None, \
        special_vocabulary=None)")]
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
        special_vocabulary: Option<Given<Vec<Bound<'_, PyBytes>>>>,
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
        let table = |name, tokens: Option<Given<Vec<Bound<'_, PyBytes>>>>| -> PyResult<Option<Vocabulary>> {
            let Some(tokens) = tokens else { return Ok(None) };
            let tokens = tokens.of(name, "a list of the bytes of each token, or None")?;
            Ok(Some(Vocabulary::new(tokens.iter().map(|token| token.as_bytes()))?))
        };
        let mut engine = step::Engine::new(config, table("vocabulary", vocabulary)?)?;
        if let Some(special) = table("special_vocabulary", special_vocabulary)? {
            engine = engine.with_special_tokens(special)?;
        }
        let table = engine.scheduler().kv().table();
        let (table, width) = (Arc::clone(table.flat()), table.width());
        Ok(Self {
            engine: Mutex::new(engine),
            table,
            width,
            vocab_size,
        })
    }

    /// Queues a request and returns its number. `params`: a dict of options by name, as `SamplingParams` calls them, and `draft`; what
    /// it does not have is the default.
    #[pyo3(signature = (prompt, params = None))]
    fn add<'py>(
        &self,
        py: Python<'py>,
        prompt: Given<Vec<i64>>,
        params: Option<Given<Bound<'py, PyDict>>>,
    ) -> PyResult<u64> {
        let params = params::params(params)?;
        let prompt = token_ids("prompt", &prompt.of("prompt", TOKENS)?)?;
        Ok(self.with(py, |engine| engine.add(prompt, params))?.0)
    }

    /// What an unfinished request is given, to be looked at while it runs and afterwards; `None` when there is none of that number.
    fn record(&self, py: Python<'_>, request_id: Count) -> PyResult<Option<Record>> {
        let request_id = request_id.count("request_id")?;
        let record = self.with(py, |engine| engine.record(RequestId(request_id)));
        Ok(record.map(|record| Record { record }))
    }

    /// Of the `most` oldest requests: the temperatures of those that draft, f32 `[n]`, how many do not, and how many tokens they have together.
    fn drafting<'py>(&self, py: Python<'py>, most: Count) -> PyResult<(Bound<'py, PyArray1<f32>>, usize, usize)> {
        let most = most.count("most")?;
        let (temperatures, others, context) = self.with(py, |engine| engine.drafting(most));
        Ok((PyArray1::from_vec(py, temperatures), others, context))
    }

    /// While the drafter rests, steps owe it no K/V (`StepPlan.drafts` is false): its context begins anew where it is woken.
    fn let_drafter_rest(&self, py: Python<'_>, rests: Flag) -> PyResult<()> {
        let rests = rests.of("rests")?;
        self.with(py, |engine| engine.let_drafter_rest(rests));
        Ok(())
    }

    /// Whether any request that a launched step is for is still there.
    fn is_wanted<'py>(&self, py: Python<'py>, plan: Object<'py, StepPlan>) -> PyResult<bool> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        Ok(self.with(py, |engine| engine.is_wanted(&locked(&plan.plan))))
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

    /// Draws the target's tokens from `logits` (f32 `[N, vocab_size]`, C-contiguous) and walks the drafts. `edited`: rows that were edited before
    /// they are drawn, of requests that asked for that.
    #[pyo3(signature = (plan, logits, edited = None))]
    fn accept<'py>(
        &self,
        py: Python<'py>,
        plan: Object<'py, StepPlan>,
        logits: &Bound<'py, PyAny>,
        edited: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Accepted> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        let logits = array::<f32, Ix2>("logits", logits, "[N, vocab_size]")?;
        let rows = locked(&plan.plan).arrays().logit_rows.len();
        shaped("logits", logits.shape(), &[rows, self.vocab_size], "[N, vocab_size]")?;
        let logits = logits.as_slice()?;
        let edited = Edited::read(edited)?;
        let edited = Edited::of(edited.as_ref())?;
        let accepted = self.with(py, |engine| engine.accept_edited(&locked(&plan.plan), logits, &edited))?;
        Ok(Accepted { accepted })
    }

    /// Draws edited rows, as `accept` takes them, for a device that walks its drafts itself: i64 `[E]`, -1 for a row without a token.
    fn draw_edited<'py>(
        &self,
        py: Python<'py>,
        plan: Object<'py, StepPlan>,
        edited: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        let edited = Edited::read(Some(edited))?;
        let edited = Edited::of(edited.as_ref())?;
        let tokens = self.with(py, |engine| engine.draw_edited(&locked(&plan.plan), &edited))?;
        Ok(tokens.into_pyarray(py))
    }

    /// Walks the drafts with tokens drawn elsewhere: `sampled` i64 `[N]`; `logprobs` f32 and `status` i32 `[N]`, `top_tokens` i64 and
    /// `top_logprobs` f32 `[N, k]` or `None`; `edited` as in `accept`.
    #[pyo3(signature = (plan, sampled, logprobs = None, *, status = None, top_tokens = None, top_logprobs = None, edited = None))]
    #[allow(clippy::too_many_arguments, reason = "what a device returns, by keyword")]
    fn accept_sampled<'py>(
        &self,
        py: Python<'py>,
        plan: Object<'py, StepPlan>,
        sampled: &Bound<'py, PyAny>,
        logprobs: Option<&Bound<'py, PyAny>>,
        status: Option<&Bound<'py, PyAny>>,
        top_tokens: Option<&Bound<'py, PyAny>>,
        top_logprobs: Option<&Bound<'py, PyAny>>,
        edited: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Accepted> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        let edited = Edited::read(edited)?;
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
            edited: Edited::of(edited.as_ref())?,
        };
        let accepted = self.with(py, |engine| engine.accept_drawn(&locked(&plan.plan), &drawn))?;
        Ok(Accepted { accepted })
    }

    /// What the step's rows ask of their draws, for a device that draws them.
    fn device_sampling<'py>(&self, py: Python<'py>, plan: Object<'py, StepPlan>) -> PyResult<DeviceSampling> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        Ok(self
            .with(py, |engine| engine.device_sampling(&locked(&plan.plan)))?
            .into())
    }

    /// Writes a launched step, padded to `bucket` rows, into the arrays that go to a device. For `r` rows: query_starts, start_known,
    /// anchor_known, context_lens, valid_from i32 `[r + 1]`, table_rows, anchors i64 `[r + 1]`, draft_rows i32 and draft_rows64 i64 `[r]`,
    /// sampling u8 `[r, ROW_BYTES]`, pages i32 `[r + 1, width of page_table]`, and draft_sampling u8 `[r, ROW_BYTES]`: how the drafts of each of
    /// `draft_rows` are drawn, written where any row samples.
    /// Gives whether only the device knows where some row starts or with which token, and the most keys of a row, of which one whose start is
    /// unknown may have `uncertain` more than the host counts on.
    #[pyo3(signature = (plan, wanted, bucket, uncertain, *, query_starts, start_known, anchor_known, table_rows, context_lens, valid_from, draft_rows,
        draft_rows64, anchors, sampling, draft_sampling, pages))]
    #[allow(clippy::too_many_arguments, reason = "arrays by keyword, as the device has them")]
    fn fill_inputs<'py>(
        &self,
        py: Python<'py>,
        plan: Object<'py, StepPlan>,
        wanted: Object<'py, DeviceSampling>,
        bucket: Count,
        uncertain: Count,
        query_starts: &Bound<'py, PyAny>,
        start_known: &Bound<'py, PyAny>,
        anchor_known: &Bound<'py, PyAny>,
        table_rows: &Bound<'py, PyAny>,
        context_lens: &Bound<'py, PyAny>,
        valid_from: &Bound<'py, PyAny>,
        draft_rows: &Bound<'py, PyAny>,
        draft_rows64: &Bound<'py, PyAny>,
        anchors: &Bound<'py, PyAny>,
        sampling: &Bound<'py, PyAny>,
        draft_sampling: &Bound<'py, PyAny>,
        pages: &Bound<'py, PyAny>,
    ) -> PyResult<(bool, usize)> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        let wanted = wanted.of("wanted", "a DeviceSampling")?;
        let wanted = &wanted.get().sampling;
        let rows = bytes(&wanted.arrays().rows);
        let (bucket, uncertain) = (bucket.count("bucket")?, uncertain.count::<u32>("uncertain")? as usize);
        let mut sampling = array_mut::<u8>("sampling", sampling)?;
        let room = slice(&mut sampling)?;
        if rows.len() > room.len() {
            shaped("sampling", &[room.len()], &[rows.len()], "or more bytes")?;
        }
        room[..rows.len()].copy_from_slice(rows);
        room[rows.len()..].fill(0);
        let mut draft_sampling = array_mut::<u8>("draft_sampling", draft_sampling)?;
        let drafted = slice(&mut draft_sampling)?;
        shaped(
            "draft_sampling",
            &[drafted.len()],
            &[room.len()],
            "bytes, as many as sampling",
        )?;
        if wanted.samples {
            let plan = locked(&plan.plan);
            let mut drafting = plan.arrays().draft_rows.iter().map(|&row| row as usize);
            for place in drafted.chunks_exact_mut(DeviceSampling::ROW_BYTES) {
                place.copy_from_slice(bytes(&[wanted.of_drafts(drafting.next())]));
            }
        }
        let mut query_starts = array_mut::<i32>("query_starts", query_starts)?;
        let mut start_known = array_mut::<i32>("start_known", start_known)?;
        let mut anchor_known = array_mut::<i32>("anchor_known", anchor_known)?;
        let mut table_rows = array_mut::<i64>("table_rows", table_rows)?;
        let mut context_lens = array_mut::<i32>("context_lens", context_lens)?;
        let mut valid_from = array_mut::<i32>("valid_from", valid_from)?;
        let mut draft_rows = array_mut::<i32>("draft_rows", draft_rows)?;
        let mut draft_rows64 = array_mut::<i64>("draft_rows64", draft_rows64)?;
        let mut anchors = array_mut::<i64>("anchors", anchors)?;
        let mut pages = array_mut::<i32>("pages", pages)?;
        let mut inputs = step::DeviceInputs {
            query_starts: slice(&mut query_starts)?,
            start_known: slice(&mut start_known)?,
            anchor_known: slice(&mut anchor_known)?,
            table_rows: slice(&mut table_rows)?,
            context_lens: slice(&mut context_lens)?,
            valid_from: slice(&mut valid_from)?,
            draft_rows: slice(&mut draft_rows)?,
            draft_rows64: slice(&mut draft_rows64)?,
            anchors: slice(&mut anchors)?,
            pages: slice(&mut pages)?,
        };
        Ok(self.with(py, |engine| {
            engine.fill_inputs(&locked(&plan.plan), bucket, uncertain, &mut inputs)
        })?)
    }

    /// Walks the drafts of a step that a device has walked: `sampled` i64 and `status` i32 `[N]`, `accepted` i32 `[R]` the drafts that it kept,
    /// `drafts` i64 `[>= R, columns]` chains by row, None where there are none or where they are set; `logprobs` f32 `[N]`, `top_tokens` i64 and
    /// `top_logprobs` f32 `[N, k]`, or None; `edited` as in `accept`. Raises DflashError when the core keeps something else.
    #[pyo3(signature = (plan, sampled, status, accepted, *, drafts = None, logprobs = None, top_tokens = None, top_logprobs = None,
        edited = None))]
    #[allow(clippy::too_many_arguments, reason = "what a device returns, by keyword")]
    fn accept_outputs<'py>(
        &self,
        py: Python<'py>,
        plan: Object<'py, StepPlan>,
        sampled: &Bound<'py, PyAny>,
        status: &Bound<'py, PyAny>,
        accepted: &Bound<'py, PyAny>,
        drafts: Option<&Bound<'py, PyAny>>,
        logprobs: Option<&Bound<'py, PyAny>>,
        top_tokens: Option<&Bound<'py, PyAny>>,
        top_logprobs: Option<&Bound<'py, PyAny>>,
        edited: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Accepted> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        let edited = Edited::read(edited)?;
        let sampled = array::<i64, Ix1>("sampled", sampled, "[N]")?;
        let status = array::<i32, Ix1>("status", status, "[N]")?;
        let accepted = array::<i32, Ix1>("accepted", accepted, "[R]")?;
        let drafts = maybe::<i64, Ix2>("drafts", drafts, "[>= R, columns]")?;
        let logprobs = maybe::<f32, Ix1>("logprobs", logprobs, "[N]")?;
        let top_tokens = maybe::<i64, Ix2>("top_tokens", top_tokens, "[N, k]")?;
        let top_logprobs = maybe::<f32, Ix2>("top_logprobs", top_logprobs, "[N, k]")?;
        let outputs = step::DeviceOutputs {
            drafts: elements(drafts.as_ref())?,
            width: drafts.as_ref().map_or(0, |array| array.shape()[1]),
            drawn: step::DrawnRows {
                tokens: elements(Some(&sampled))?,
                logprobs: elements(logprobs.as_ref())?,
                status: elements(Some(&status))?,
                top_count: top_tokens.as_ref().map_or(0, |array| array.shape()[1]),
                top_tokens: elements(top_tokens.as_ref())?,
                top_logprobs: elements(top_logprobs.as_ref())?,
                edited: Edited::of(edited.as_ref())?,
            },
            accepted: elements(Some(&accepted))?,
        };
        let accepted = self.with(py, |engine| engine.accept_outputs(&mut locked(&plan.plan), &outputs))?;
        Ok(Accepted { accepted })
    }

    /// Drafts from the requests' own texts, for blocks of `block_size` tokens: tokens i64 and chances f32 `[len(draft_rows), block_size - 1]`,
    /// and how many were found, i32 `[len(draft_rows)]`.
    fn look_up<'py>(&self, py: Python<'py>, plan: Object<'py, StepPlan>, block_size: Count) -> PyResult<Looked<'py>> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        let block: usize = block_size.count("block_size")?;
        let most = self.with(py, |engine| engine.config().block_size);
        if !(1..=most).contains(&block) {
            return Err(invalid("block_size", block.to_string(), format!("1..{most}")));
        }
        let looked = self.with(py, |engine| engine.look_up(&locked(&plan.plan), block - 1))?;
        let shape = [looked.found.len(), looked.width];
        Ok((
            looked.tokens.into_pyarray(py).reshape(shape)?,
            looked.chances.into_pyarray(py).reshape(shape)?,
            looked.found.into_pyarray(py),
        ))
    }

    /// Resolves a step. `injected`: draft K/V were computed for `accepted.commit_rows`.
    #[pyo3(signature = (plan, accepted, injected = Flag::TRUE), text_signature = "($self, plan, accepted, injected=True)")]
    fn commit<'py>(
        &self,
        py: Python<'py>,
        plan: Object<'py, StepPlan>,
        accepted: Object<'py, Accepted>,
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
    fn settle<'py>(&self, py: Python<'py>, plan: Object<'py, StepPlan>) -> PyResult<()> {
        let plan = plan_given(plan)?;
        let plan = plan.get();
        Ok(self.with(py, |engine| engine.settle(&mut locked(&plan.plan)))?)
    }

    /// Calls a step off: its requests go on from their last resolved token. `False`: it was closed already.
    fn cancel<'py>(&self, py: Python<'py>, plan: Object<'py, StepPlan>) -> PyResult<bool> {
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
