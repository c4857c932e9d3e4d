//! `dflash_rs._core.Planner` and `dflash_rs._core.WidthPlanner`.

use numpy::ndarray::{Ix1, Ix2, Ix3};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::arrays::{Count, Given, array, shaped};
use super::engine::{Accepted, StepPlan};
use super::errors::invalid;
use crate::{plan, width};

/// Tokens, parents, counts.
type Trees<'py> = (
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray2<i32>>,
    Bound<'py, PyArray1<i32>>,
);
/// Pairs of rows and time.
type Points = Vec<(f64, f64)>;

fn curve(name: &'static str, points: Given<Points>) -> PyResult<plan::Curve> {
    Ok(plan::Curve::new(
        name,
        &points.of(name, "a list of pairs of rows and time")?,
    )?)
}

// 32 bits, so that sums and products of rows cannot overflow.
fn rows(name: &'static str, count: Count) -> PyResult<usize> {
    Ok(count.count::<u32>(name)? as usize)
}

fn chances(name: &'static str, values: &[f32]) -> PyResult<()> {
    match values.iter().find(|chance| !(0.0..=1.0).contains(*chance)) {
        None => Ok(()),
        Some(chance) => Err(invalid(name, chance.to_string(), "numbers in [0, 1]")),
    }
}

fn time(name: &'static str, time: Given<f64>) -> PyResult<f64> {
    const EXPECTED: &str = "a finite time of at least 0";
    let time = time.of(name, EXPECTED)?;
    if time.is_finite() && time >= 0.0 {
        return Ok(time);
    }
    Err(invalid(name, time.to_string(), EXPECTED))
}

/// Chooses how much to draft and to verify, from costs and from what was accepted so far.
#[pyclass(module = "dflash_rs._core")]
pub struct Planner(plan::Planner);

#[pymethods]
impl Planner {
    #[new]
    #[pyo3(signature = (block_size, *, target=None, draft=None, tree_nodes=Count::ZERO),
           text_signature = "(block_size, *, target=None, draft=None, tree_nodes=0)")]
    fn new(
        block_size: Count,
        target: Option<Given<Points>>,
        draft: Option<Given<Points>>,
        tree_nodes: Count,
    ) -> PyResult<Self> {
        let mut cost = plan::StepCost::passes();
        if let Some(points) = target {
            cost.target = curve("target", points)?;
        }
        if let Some(points) = draft {
            cost.draft = curve("draft", points)?;
        }
        let planner = plan::Planner::new(block_size.count("block_size")?, cost)?;
        Ok(Self(planner.with_trees(tree_nodes.count("tree_nodes")?)?))
    }

    /// Block length for a step in which `requests` could draft and `others` tokens run beside them; 1 is a plain step.
    #[pyo3(signature = (requests, others=Count::ZERO), text_signature = "($self, requests, others=0)")]
    fn block(&mut self, requests: Count, others: Count) -> PyResult<usize> {
        Ok(self.0.block(rows("requests", requests)?, rows("others", others)?))
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
        let (width, others) = (probabilities.shape()[1], rows("others", others)?);
        chances("probabilities", probabilities.as_slice()?)?;
        Ok(PyArray1::from_vec(
            py,
            self.0.widths(probabilities.as_slice()?, width, others)?,
        ))
    }

    /// Drafts per request and block length for a step of trees; (0, 1) is a plain step. `tiers`: the numbers of drafts to choose among, rising;
    /// `shortest`: least block length.
    #[pyo3(signature = (requests, others=Count::ZERO, *, tiers=Given::new(Vec::new()), shortest=Count::new(2)),
           text_signature = "($self, requests, others=0, *, tiers=[], shortest=2)")]
    fn tree(
        &mut self,
        requests: Count,
        others: Count,
        tiers: Given<Vec<usize>>,
        shortest: Count,
    ) -> PyResult<(usize, usize)> {
        let (requests, others) = (rows("requests", requests)?, rows("others", others)?);
        let most = self.0.tree_nodes();
        let expected = || format!("integers in 1..{most} that rise");
        let tiers = tiers.of("tiers", &expected())?;
        if let Some(at) =
            (0..tiers.len()).find(|&at| tiers[at] <= if at == 0 { 0 } else { tiers[at - 1] } || tiers[at] > most)
        {
            return Err(invalid("tiers", tiers[at].to_string(), expected()));
        }
        let shortest: u32 = shortest.count("shortest")?;
        if shortest < 2 {
            return Err(invalid("shortest", shortest.to_string(), "an integer of at least 2"));
        }
        Ok(self.0.tree(requests, others, &tiers, shortest as usize))
    }

    /// The trees to verify, for `StepPlan.set_trees`. anchors i64 `[n]`; tokens i64 and chances f32 `[n, depth, k]`: candidates per
    /// position and the chance that each is accepted when its parent was, falling; limits i32 `[n]`: most drafts of each request.
    #[pyo3(signature = (anchors, tokens, chances, limits, others=Count::ZERO),
           text_signature = "($self, anchors, tokens, chances, limits, others=0)")]
    fn trees<'py>(
        &mut self,
        py: Python<'py>,
        anchors: &Bound<'py, PyAny>,
        tokens: &Bound<'py, PyAny>,
        chances: &Bound<'py, PyAny>,
        limits: &Bound<'py, PyAny>,
        others: Count,
    ) -> PyResult<Trees<'py>> {
        let anchors = array::<i64, Ix1>("anchors", anchors, "[n]")?;
        let tokens = array::<i64, Ix3>("tokens", tokens, "[n, depth, k]")?;
        let chances = array::<f32, Ix3>("chances", chances, "[n, depth, k]")?;
        let limits = array::<i32, Ix1>("limits", limits, "[n]")?;
        shaped(
            "chances",
            chances.shape(),
            tokens.shape(),
            "[n, depth, k], that of tokens",
        )?;
        shaped(
            "tokens",
            &tokens.shape()[..1],
            anchors.shape(),
            "[n], as many requests as anchors",
        )?;
        self::chances("chances", chances.as_slice()?)?;
        let offers = plan::Offers {
            anchors: anchors.as_slice()?,
            tokens: tokens.as_slice()?,
            chances: chances.as_slice()?,
            depth: tokens.shape()[1],
            k: tokens.shape()[2],
            limits: limits.as_slice()?,
        };
        let trees = self.0.trees(&offers, rows("others", others)?)?;
        let shape = [trees.counts.len(), trees.width];
        Ok((
            PyArray1::from_vec(py, trees.tokens).reshape(shape)?,
            PyArray1::from_vec(py, trees.parents).reshape(shape)?,
            PyArray1::from_vec(py, trees.counts),
        ))
    }

    /// Books a step of trees: what each request verified and which of it was accepted.
    fn record_trees(&mut self, plan: Given<Bound<'_, StepPlan>>, accepted: Given<Bound<'_, Accepted>>) -> PyResult<()> {
        let (plan, accepted) = (plan.of("plan", "a StepPlan")?, accepted.of("accepted", "an Accepted")?);
        let mut outcome = Ok(());
        accepted.get().each_pass(plan.get(), |verified, depth, path| {
            let booked = self
                .0
                .record_tree(verified, depth, path.iter().map(|&node| node as usize));
            outcome = outcome.clone().and(booked);
        });
        Ok(outcome?)
    }

    /// What a step took: rows and time of its target pass, and of its drafter pass with what follows from it (0 rows: none).
    #[pyo3(signature = (target_rows, target_time, draft_rows=Count::ZERO, draft_time=Given::new(0.0)),
           text_signature = "($self, target_rows, target_time, draft_rows=0, draft_time=0.0)")]
    fn observe(
        &mut self,
        target_rows: Count,
        target_time: Given<f64>,
        draft_rows: Count,
        draft_time: Given<f64>,
    ) -> PyResult<()> {
        let target = (rows("target_rows", target_rows)?, time("target_time", target_time)?);
        let draft = (rows("draft_rows", draft_rows)?, time("draft_time", draft_time)?);
        self.0.observe(target, draft);
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
        Ok(self.0.record(rows("drafted", drafted)?, rows("accepted", accepted)?)?)
    }

    /// Chance that the draft at each position is accepted when all before it were.
    #[getter]
    fn acceptance(&self) -> Vec<f64> {
        (0..self.0.block_size() - 1)
            .map(|position| self.0.acceptance(position))
            .collect()
    }
}

/// Chooses one block length for a whole batch, from what steps were seen to take and from what was accepted so far.
#[pyclass(module = "dflash_rs._core")]
pub struct WidthPlanner(width::WidthPlanner);

#[pymethods]
impl WidthPlanner {
    #[new]
    fn new(widths: Given<Vec<usize>>) -> PyResult<Self> {
        let widths = widths.of("widths", "a list of whole numbers")?;
        Ok(Self(width::WidthPlanner::new(&widths)?))
    }

    /// The width of the next step, of `requests` requests; 1 is a plain step.
    fn choose(&mut self, requests: Count) -> PyResult<usize> {
        Ok(self.0.choose(rows("requests", requests)?))
    }

    /// A step of `requests` requests and this width took `seconds`.
    fn observe(&mut self, requests: Count, width: Count, seconds: Given<f64>) -> PyResult<()> {
        let (requests, width) = (rows("requests", requests)?, rows("width", width)?);
        self.0.observe(requests, width, time("seconds", seconds)?);
        Ok(())
    }

    /// Books a step: drafts accepted by each request when `width` tokens of each were verified.
    fn record(&mut self, width: Count, accepted: Given<Vec<u32>>) -> PyResult<()> {
        let accepted = accepted.of("accepted", "a list of numbers of drafts")?;
        Ok(self.0.record(rows("width", width)?, &accepted)?)
    }

    /// What a step of `requests` requests takes, in seconds, with each of the widths; None where it is not known.
    fn times(&self, requests: Count) -> PyResult<Vec<Option<f64>>> {
        Ok(self.0.times(rows("requests", requests)?))
    }

    /// The widths to choose from.
    #[getter]
    fn widths(&self) -> Vec<usize> {
        self.0.widths().to_vec()
    }

    /// Chance that the draft at each position is accepted when all before it were.
    #[getter]
    fn acceptance(&self) -> Vec<f64> {
        let widest = self.0.widths().last().map_or(1, |&width| width);
        (0..widest - 1).map(|position| self.0.acceptance(position)).collect()
    }
}
