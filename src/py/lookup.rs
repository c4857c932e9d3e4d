//! `dflash_rs._core.Lookup`.

use numpy::PyArray1;
use pyo3::prelude::*;

use super::arrays::{Count, Given};
use super::errors::{invalid, token_ids};
use crate::draft::{Guess, Lookup as Core};
use crate::types::TokenId;

// As long as a block may be.
const MOST_DRAFTS: usize = 4096;

/// A text that grows, and drafts of what it may go on with, looked up in it.
#[pyclass(module = "dflash_rs._core")]
#[derive(Default)]
pub struct Lookup {
    text: Vec<TokenId>,
    index: Core,
    guesses: Vec<Guess>,
}

#[pymethods]
impl Lookup {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Appends tokens.
    fn extend(&mut self, tokens: Given<Vec<i64>>) -> PyResult<()> {
        let tokens = tokens.of("tokens", "a list of nothing but token ids")?;
        self.text.extend(token_ids("tokens", &tokens)?);
        self.index.extend(&self.text);
        Ok(())
    }

    /// Up to `count` tokens that followed the latest earlier occurrence of the longest ending of the text, i64; none without one.
    fn propose<'py>(&mut self, py: Python<'py>, count: Count) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let count: usize = count.count("count")?;
        if count > MOST_DRAFTS {
            return Err(invalid("count", count.to_string(), format!("0..{MOST_DRAFTS}")));
        }
        self.index.propose(&self.text, count, &mut self.guesses);
        let tokens = self.guesses.iter().map(|guess| i64::from(guess.token.0));
        Ok(PyArray1::from_iter(py, tokens))
    }

    /// Tokens of the longest ending of the text that occurred before.
    #[getter]
    fn matched(&self) -> usize {
        self.index.matched()
    }

    fn __len__(&self) -> usize {
        self.text.len()
    }
}
