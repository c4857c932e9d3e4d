//! `dflash_rs._core.Planner`.

use numpy::{PyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::host::not_contiguous;
use crate::plan;

/// Chooses how much to draft and to verify, from costs and from what was accepted so far.
#[pyclass(module = "dflash_rs._core")]
pub struct Planner(plan::Planner);

#[pymethods]
impl Planner {
    #[new]
    #[pyo3(signature = (block_size, *, fixed=1.0, row=0.0, draft_fixed=0.0, draft_row=0.0))]
    fn new(block_size: usize, fixed: f64, row: f64, draft_fixed: f64, draft_row: f64) -> PyResult<Self> {
        let cost = plan::StepCost {
            fixed,
            row,
            draft_fixed,
            draft_row,
        };
        Ok(Self(plan::Planner::new(block_size, cost)?))
    }

    /// Block length for a step in which `requests` could draft and `others` tokens run beside them; 1 is a plain step.
    #[pyo3(signature = (requests, others=0))]
    fn block(&mut self, requests: usize, others: usize) -> usize {
        self.0.block(requests, others)
    }

    /// How many of its drafts each request verifies, i32 `[n]`. `probabilities` f32 `[n, width]` are the drafter's own.
    #[pyo3(signature = (probabilities, others=0))]
    fn widths<'py>(
        &mut self,
        py: Python<'py>,
        probabilities: PyReadonlyArray2<'py, f32>,
        others: usize,
    ) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let width = probabilities.shape()[1];
        let values = probabilities.as_slice().map_err(|_| not_contiguous("probabilities"))?;
        Ok(PyArray1::from_vec(py, self.0.widths(values, width, others)?))
    }

    /// Books one request's pass: `drafted` drafts verified, `accepted` of them kept.
    fn record(&mut self, drafted: usize, accepted: usize) -> PyResult<()> {
        Ok(self.0.record(drafted, accepted)?)
    }

    /// Chance that the draft at each position is accepted when all before it were.
    #[getter]
    fn acceptance(&self) -> Vec<f64> {
        (0..self.0.block_size() - 1)
            .map(|position| self.0.acceptance(position))
            .collect()
    }
}
