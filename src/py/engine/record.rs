//! `dflash_rs._core.Record`: what a request was given, for whoever looks.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::schedule;
use crate::types::TokenId;

/// A piece: its text or None, its tokens, how many of them were drafts, and why the request ended with it (0: it goes on).
type Piece = (Option<String>, Vec<u32>, u32, u8);
/// The same, behind its record's place.
type PlacedPiece = (usize, Option<String>, Vec<u32>, u32, u8);
/// A token, its log-probability, and the likeliest tokens with theirs.
type Score = (u32, f32, Vec<(i64, f32)>);

fn ids(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|token| token.0).collect()
}

/// What a request was given: by pieces, one for each step that gave it tokens or ended it, or as a whole.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct Record {
    pub(super) record: schedule::RecordHandle,
}

impl Record {
    fn pieces(&self) -> Vec<Piece> {
        let read = |record: &mut schedule::Record| std::iter::from_fn(|| record.read()).collect::<Vec<_>>();
        let shown = |piece: schedule::Reading| (piece.text, ids(&piece.tokens), piece.accepted, piece.finish as u8);
        self.record.with(read).into_iter().map(shown).collect()
    }
}

#[pymethods]
impl Record {
    /// The pieces that were not read: text (None for an engine without a vocabulary), tokens, how many of them were drafts, and why the request
    /// ended with it: 0 goes on, 1 stop token, 2 stop string, 3 length, 4 error, 5 abort.
    fn read(&self) -> Vec<Piece> {
        self.pieces()
    }

    /// The text of all pieces, which count as read then; None for an engine without a vocabulary.
    fn text(&self) -> Option<String> {
        self.record.with(|record| record.text().map(str::to_owned))
    }

    /// Output tokens.
    fn tokens(&self) -> Vec<u32> {
        self.record.with(|record| ids(record.tokens()))
    }

    /// Each token with its log-probability and the likeliest tokens; empty unless the request asked for them.
    fn scores(&self) -> Vec<Score> {
        let (tokens, scores) = self
            .record
            .with(|record| (record.tokens().to_vec(), record.scores().clone()));
        let mut begin = 0;
        let mut all = Vec::with_capacity(scores.logprobs.len());
        for ((&token, &logprob), &end) in tokens.iter().zip(&scores.logprobs).zip(&scores.top_ends) {
            let top = begin..end as usize;
            let likeliest = scores.top_tokens[top.clone()].iter().zip(&scores.top_logprobs[top]);
            all.push((
                token.0,
                logprob,
                likeliest.map(|(&token, &score)| (token, score)).collect(),
            ));
            begin = end as usize;
        }
        all
    }

    /// Why it ended, as in `read`; 0 while it has not.
    #[getter]
    fn finish(&self) -> u8 {
        self.record.with(|record| record.finish()) as u8
    }

    /// Which of its stop strings it ended with, None for none.
    #[getter]
    fn stopped_by(&self) -> Option<usize> {
        self.record.with(|record| record.stopped_by())
    }

    /// The message of the failure it ended with.
    #[getter]
    fn error(&self) -> Option<String> {
        self.record.with(|record| record.error().map(str::to_owned))
    }

    /// Numbers: cached_prompt_tokens, output_tokens, steps (target passes after the first token), drafted_steps, tau (0 before the first of them),
    /// accepted_per_position, accept_histogram, ttft_s and total_s since its arrival.
    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (cached, tokens, stats, times) = self.record.with(|record| {
            let tokens = record.tokens().len();
            (record.cached_tokens(), tokens, record.stats(), record.times())
        });
        let (stats, dict) = (stats?, PyDict::new(py));
        dict.set_item("cached_prompt_tokens", cached)?;
        dict.set_item("output_tokens", tokens)?;
        dict.set_item("steps", stats.passes())?;
        dict.set_item("drafted_steps", stats.drafting_passes())?;
        dict.set_item("tau", stats.tau().unwrap_or(0.0))?;
        dict.set_item("accepted_per_position", stats.acceptance_per_position())?;
        dict.set_item("accept_histogram", stats.histogram())?;
        dict.set_item("ttft_s", times.0.as_secs_f64())?;
        dict.set_item("total_s", times.1.as_secs_f64())?;
        Ok(dict)
    }

    fn __repr__(&self) -> String {
        self.record
            .with(|record| format!("Record({} tokens, {:?})", record.tokens().len(), record.finish()))
    }
}

/// The pieces of many requests that were not read, each with its request's place in `records`, in their order.
#[pyfunction]
pub fn read_records(records: Vec<PyRef<'_, Record>>) -> Vec<PlacedPiece> {
    let mut all = Vec::new();
    for (place, record) in records.iter().enumerate() {
        for (text, tokens, accepted, finish) in record.pieces() {
            all.push((place, text, tokens, accepted, finish));
        }
    }
    all
}
