//! `dflash_rs._core.Planner`.

use numpy::ndarray::Ix2;
use numpy::{PyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::arrays::{Count, array};
use crate::plan;

/// Pairs of rows and time.
type Points = Vec<(f64, f64)>;

/// Chooses how much to draft and to verify, from costs and from what was accepted so far.
#[pyclass(module = "dflash_rs._core")]
pub struct Planner(plan::Planner);

#[pymethods]
impl Planner {
    #[new]
    #[pyo3(signature = (block_size, *, target=None, draft=None))]
    fn new(block_size: Count, target: Option<Points>, draft: Option<Points>) -> PyResult<Self> {
        let mut cost = plan::StepCost::passes();
        if let Some(points) = target {
            cost.target = plan::Curve::new("target", &points)?;
        }
        if let Some(points) = draft {
            cost.draft = plan::Curve::new("draft", &points)?;
        }
        Ok(Self(plan::Planner::new(block_size.of("block_size")?, cost)?))
    }

    /// Block length for a step in which `requests` could draft and `others` tokens run beside them; 1 is a plain step.
    #[pyo3(signature = (requests, others=Count::ZERO), text_signature = "($self, requests, others=0)")]
    fn block(&mut self, requests: Count, others: Count) -> PyResult<usize> {
        Ok(self.0.block(requests.of("requests")?, others.of("others")?))
    }

    /// How many of its drafts each request verifies, i32 `[n]`. `probabilities` f32 `[n, width]` are the drafter's own.
    #[pyo3(signature = (probabilities, others=Count::ZERO), text_signature = "($self, probabilities, others=0)")]
    fn widths<'py>(
        &mut self,
        py: Python<'py>,
        probabilities: &Bound<'py, PyAny>,
        others: Count,
    ) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let probabilities = array::<f32, Ix2>("probabilities", probabilities, "[n, width]")?;
        let (width, others) = (probabilities.shape()[1], others.of("others")?);
        Ok(PyArray1::from_vec(
            py,
            self.0.widths(probabilities.as_slice()?, width, others)?,
        ))
    }

    /// What a step took: rows and time of its target pass, and of its drafter pass with what follows from it (0 rows: none).
    #[pyo3(signature = (target_rows, target_time, draft_rows=Count::ZERO, draft_time=0.0),
           text_signature = "($self, target_rows, target_time, draft_rows=0, draft_time=0.0)")]
    fn observe(&mut self, target_rows: Count, target_time: f64, draft_rows: Count, draft_time: f64) -> PyResult<()> {
        let (target_rows, draft_rows) = (target_rows.of("target_rows")?, draft_rows.of("draft_rows")?);
        self.0.observe((target_rows, target_time), (draft_rows, draft_time));
        Ok(())
    }

    /// Costs in use: the curves of target and drafter.
    #[getter]
    fn costs(&self) -> (Points, Points) {
        let cost = self.0.cost();
        (cost.target.points().to_vec(), cost.draft.points().to_vec())
    }

    /// Books one request's pass: `drafted` drafts verified, `accepted` of them kept.
    fn record(&mut self, drafted: Count, accepted: Count) -> PyResult<()> {
        Ok(self.0.record(drafted.of("drafted")?, accepted.of("accepted")?)?)
    }

    /// Chance that the draft at each position is accepted when all before it were.
    #[getter]
    fn acceptance(&self) -> Vec<f64> {
        (0..self.0.block_size() - 1)
            .map(|position| self.0.acceptance(position))
            .collect()
    }
}
