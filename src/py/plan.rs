//! `dflash_rs._core.Planner` and `dflash_rs._core.WidthPlanner`.

use numpy::ndarray::{Ix1, Ix2, Ix3};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::arrays::{Count, Given, Object, array, shaped};
use super::engine::{Accepted, StepPlan};
use super::errors::invalid;
use crate::plan;
use crate::step::{self, PlanArrays};

/// Tokens, parents, widths.
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

fn temperature(given: Given<f32>) -> PyResult<f32> {
    const EXPECTED: &str = "a finite number of at least 0";
    let temperature = given.of("temperature", EXPECTED)?;
    if temperature.is_finite() && temperature >= 0.0 {
        return Ok(temperature);
    }
    Err(invalid("temperature", temperature.to_string(), EXPECTED))
}

/// A step: its number, and the requests that draft in it.
type StepRequests = (u64, Vec<u64>);

/// Number and drafting requests of the step that an offer is for, and the tokens of context of all its requests.
fn step_of(plan: Option<Object<'_, StepPlan>>) -> PyResult<(Option<StepRequests>, usize)> {
    let Some(plan) = plan else { return Ok((None, 0)) };
    let plan = plan.of("plan", "a StepPlan, or None")?;
    let plan = plan.get().locked();
    let arrays = plan.arrays();
    Ok((Some((plan.step(), drafting(arrays).collect())), context_of(arrays)))
}

fn drafting(arrays: &PlanArrays) -> impl Iterator<Item = u64> {
    arrays.draft_rows.iter().map(|&row| arrays.request_ids[row as usize])
}

fn context_of(arrays: &PlanArrays) -> usize {
    arrays.context_lens.iter().map(|&tokens| tokens as usize).sum()
}

fn time(name: &'static str, time: Given<f64>) -> PyResult<f64> {
    const EXPECTED: &str = "a finite time of at least 0";
    let time = time.of(name, EXPECTED)?;
    if time.is_finite() && time >= 0.0 {
        return Ok(time);
    }
    Err(invalid(name, time.to_string(), EXPECTED))
}

/// The rows of a step that draft, as a planner wants to know them.
struct Drafting {
    step: u64,
    requests: Vec<u64>,
    temperatures: Vec<f32>,
    most: Vec<i32>,
    others: usize,
    context: usize,
}

impl Drafting {
    fn of(plan: &step::StepPlan) -> Self {
        let arrays = plan.arrays();
        let rows = || arrays.draft_rows.iter().map(|&row| row as usize);
        let most: Vec<i32> = rows().map(|row| arrays.block_len[row]).collect();
        Self {
            step: plan.step(),
            requests: drafting(arrays).collect(),
            temperatures: rows().map(|row| arrays.temperatures[row]).collect(),
            others: arrays.token_ids.len() - most.iter().map(|&most| most as usize).sum::<usize>(),
            context: context_of(arrays),
            most,
        }
    }

    /// Offers of a chain of `width` places for each.
    fn offers<'a>(&'a self, probabilities: &'a [f32], tokens: &'a [i64], width: usize) -> plan::Offers<'a> {
        plan::Offers {
            probabilities,
            tokens,
            from_text: &[],
            depth: width,
            k: 1,
            temperatures: &self.temperatures,
            most: &self.most,
            others: self.others,
            context: self.context,
            drafted: None,
            step: Some((self.step, &self.requests)),
        }
    }

    /// Where rows of the step stand among those that draft.
    fn requests_at(&self, plan: &step::StepPlan, rows: &[i32]) -> PyResult<Vec<usize>> {
        let drafting = &plan.arrays().draft_rows;
        let at = |row: &i32| {
            drafting
                .iter()
                .position(|other| other == row)
                .ok_or_else(|| invalid("own", format!("row {row}"), "rows of the step that draft"))
        };
        rows.iter().map(at).collect()
    }
}

/// Chooses how much to draft and to verify, from costs and from what was accepted so far.
#[pyclass(module = "dflash_rs._core")]
pub struct Planner(plan::Planner);

#[pymethods]
impl Planner {
    #[new]
    #[pyo3(signature = (block_size, *, target=None, draft=None, context=None, tree_nodes=Count::ZERO),
           text_signature = "(block_size, *, target=None, draft=None, context=None, tree_nodes=0)")]
    fn new(
        block_size: Count,
        target: Option<Given<Points>>,
        draft: Option<Given<Points>>,
        context: Option<Given<f64>>,
        tree_nodes: Count,
    ) -> PyResult<Self> {
        let cost = match (target, draft, context) {
            (None, None, None) => None,
            (target, draft, context) => {
                let mut cost = plan::StepCost::passes();
                if let Some(seconds) = context {
                    cost.context = time("context", seconds)?;
                }
                if let Some(points) = target {
                    cost.target = curve("target", points)?;
                }
                if let Some(points) = draft {
                    cost.draft = curve("draft", points)?;
                }
                Some(cost)
            }
        };
        let planner = plan::Planner::new(block_size.count("block_size")?, cost)?;
        Ok(Self(planner.with_trees(tree_nodes.count("tree_nodes")?)?))
    }

    /// How much to draft: most tokens of a request, tokens of the drafter's block, whether trees. temperatures f32 `[n]` of those who could
    /// draft; `others` tokens run beside them; `context` tokens of context they have together; `widths`: those of trees that a device can verify which is not asked between drafting and
    /// verifying, and `room` tokens of such a step at most.
    #[pyo3(signature = (temperatures, others=Count::ZERO, *, context=Count::ZERO, widths=Given::new(Vec::new()), room=Count::ZERO),
           text_signature = "($self, temperatures, others=0, *, context=0, widths=[], room=0)")]
    fn decide(
        &mut self,
        temperatures: &Bound<'_, PyAny>,
        others: Count,
        context: Count,
        widths: Given<Vec<usize>>,
        room: Count,
    ) -> PyResult<(usize, usize, bool)> {
        let temperatures = array::<f32, Ix1>("temperatures", temperatures, "[n]")?;
        let most = self.0.tree_nodes() + 1;
        let expected = || format!("integers in 2..{most} that rise");
        let widths = widths.of("widths", &expected())?;
        let fits = |at: usize| widths[at] > if at == 0 { 1 } else { widths[at - 1] } && widths[at] <= most;
        if let Some(at) = (0..widths.len()).find(|&at| !fits(at)) {
            return Err(invalid("widths", widths[at].to_string(), expected()));
        }
        let plan::Decision { width, block, trees } = self.0.decide(&plan::Batch {
            temperatures: temperatures.as_slice()?,
            others: rows("others", others)?,
            context: rows("context", context)?,
            widths: &widths,
            room: rows("room", room)?,
        })?;
        Ok((width, block, trees))
    }

    /// Tokens of each request to verify, the anchor counted, i32 `[n]`. probabilities f32 `[n, depth]`: the drafter's own; temperatures f32
    /// `[n]`; most i32 `[n]`: tokens of each request at most. With the `plan` of the step it is learnt what the probabilities are worth, with the
    /// drafts' `tokens` i64 `[n, depth]` also of the first that is not verified.
    #[pyo3(signature = (probabilities, temperatures, most, others=Count::ZERO, *, plan=None, tokens=None),
           text_signature = "($self, probabilities, temperatures, most, others=0, *, plan=None, tokens=None)")]
    #[allow(clippy::too_many_arguments)] // arrays, one each
    fn admit<'py>(
        &mut self,
        py: Python<'py>,
        probabilities: &Bound<'py, PyAny>,
        temperatures: &Bound<'py, PyAny>,
        most: &Bound<'py, PyAny>,
        others: Count,
        plan: Option<Object<'py, StepPlan>>,
        tokens: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let probabilities = array::<f32, Ix2>("probabilities", probabilities, "[n, depth]")?;
        let temperatures = array::<f32, Ix1>("temperatures", temperatures, "[n]")?;
        let most = array::<i32, Ix1>("most", most, "[n]")?;
        same_rows(probabilities.shape()[0], temperatures.shape(), most.shape())?;
        let tokens = tokens
            .map(|given| array::<i64, Ix2>("tokens", given, "[n, depth]"))
            .transpose()?;
        if let Some(tokens) = &tokens {
            shaped(
                "tokens",
                tokens.shape(),
                probabilities.shape(),
                "[n, depth], that of probabilities",
            )?;
        }
        let (step, context) = step_of(plan)?;
        let widths = self.0.admit(&plan::Offers {
            probabilities: probabilities.as_slice()?,
            tokens: tokens.as_ref().map_or(Ok(&[][..]), |tokens| tokens.as_slice())?,
            from_text: &[],
            depth: probabilities.shape()[1],
            k: 1,
            temperatures: temperatures.as_slice()?,
            most: most.as_slice()?,
            others: rows("others", others)?,
            context,
            drafted: None,
            step: step.as_ref().map(|(step, requests)| (*step, &requests[..])),
        })?;
        Ok(PyArray1::from_vec(py, widths))
    }

    /// Which rows of a step the drafter is asked for, i32 `[m]` out of `plan.draft_rows`, for blocks of `block` tokens: those whose own texts promise
    /// less, by `chances` f32 `[n, width]` of what was found there (`Engine.look_up`).
    fn ask<'py>(
        &mut self,
        py: Python<'py>,
        plan: Object<'py, StepPlan>,
        chances: &Bound<'py, PyAny>,
        block: Count,
    ) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let plan = plan.of("plan", "a StepPlan")?;
        let chances = array::<f32, Ix2>("chances", chances, "[n, width]")?;
        let block: usize = block.count("block")?;
        if block == 0 {
            return Err(invalid("block", block.to_string(), "at least 1, the anchor"));
        }
        let plan = plan.get().locked();
        let step = Drafting::of(&plan);
        shaped(
            "chances",
            &chances.shape()[..1],
            &[step.most.len()],
            "[n, width], one row per row that drafts",
        )?;
        let asked = self
            .0
            .ask(&step.offers(chances.as_slice()?, &[], chances.shape()[1]), block)?;
        let rows = &plan.arrays().draft_rows;
        Ok(PyArray1::from_iter(py, asked.iter().map(|&request| rows[request])))
    }

    /// Fills a step in with the drafts that pay, of each request those that promise more: `looked_up`, what `Engine.look_up` found, or its `own`
    /// drafter's chains: the rows that were asked for, i32 `[m]`, their tokens i64 and probabilities f32 `[m, depth]`.
    #[pyo3(signature = (plan, looked_up, own=None), text_signature = "($self, plan, looked_up, own=None)")]
    fn admit_either<'py>(
        &mut self,
        plan: Object<'py, StepPlan>,
        looked_up: (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>),
        own: Option<(Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>)>,
    ) -> PyResult<()> {
        let plan = plan.of("plan", "a StepPlan")?;
        let texts = array::<i64, Ix2>("looked_up", &looked_up.0, "tokens [n, width]")?;
        let chances = array::<f32, Ix2>("looked_up", &looked_up.1, "chances [n, width]")?;
        let found = array::<i32, Ix1>("looked_up", &looked_up.2, "drafts found [n]")?;
        let mut plan = plan.get().locked();
        let step = Drafting::of(&plan);
        let (n, width) = (step.most.len(), texts.shape()[1]);
        for (shape, expected) in [
            (texts.shape(), &[n, width][..]),
            (chances.shape(), &[n, width]),
            (found.shape(), &[n]),
        ] {
            shaped("looked_up", shape, expected, "what was found for this step")?;
        }
        let mut offers = step.offers(chances.as_slice()?, texts.as_slice()?, width);
        offers.drafted = Some(0);
        let admitted = match own {
            None => self.0.admit_either(&offers, found.as_slice()?, &plan::Own::default())?,
            Some((rows, tokens, probabilities)) => {
                let rows = array::<i32, Ix1>("own", &rows, "rows [m]")?;
                let tokens = array::<i64, Ix2>("own", &tokens, "tokens [m, depth]")?;
                let probabilities = array::<f32, Ix2>("own", &probabilities, "probabilities [m, depth]")?;
                let (rows, depth) = (rows.as_slice()?, tokens.shape()[1]);
                for shape in [tokens.shape(), probabilities.shape()] {
                    shaped("own", shape, &[rows.len(), depth], "[m, depth], a chain for each row")?;
                }
                offers.drafted = Some(rows.len() * (depth + 1));
                let own = plan::Own {
                    requests: &step.requests_at(&plan, rows)?,
                    tokens: tokens.as_slice()?,
                    probabilities: probabilities.as_slice()?,
                    depth,
                };
                self.0.admit_either(&offers, found.as_slice()?, &own)?
            }
        };
        plan.set_drafts(&admitted.tokens, width)?;
        Ok(plan.narrow(&admitted.widths)?)
    }

    /// The trees to verify, for `StepPlan.set_trees`: tokens, parents, widths. anchors i64 `[n]`; tokens i64 and probabilities f32
    /// `[n, depth, k]`: candidates per place, the likeliest first; the rest as for `admit`.
    #[pyo3(signature = (anchors, tokens, probabilities, temperatures, most, others=Count::ZERO, *, plan=None),
           text_signature = "($self, anchors, tokens, probabilities, temperatures, most, others=0, *, plan=None)")]
    #[allow(clippy::too_many_arguments)] // arrays, one each
    fn admit_trees<'py>(
        &mut self,
        py: Python<'py>,
        anchors: &Bound<'py, PyAny>,
        tokens: &Bound<'py, PyAny>,
        probabilities: &Bound<'py, PyAny>,
        temperatures: &Bound<'py, PyAny>,
        most: &Bound<'py, PyAny>,
        others: Count,
        plan: Option<Object<'py, StepPlan>>,
    ) -> PyResult<Trees<'py>> {
        let anchors = array::<i64, Ix1>("anchors", anchors, "[n]")?;
        let tokens = array::<i64, Ix3>("tokens", tokens, "[n, depth, k]")?;
        let probabilities = array::<f32, Ix3>("probabilities", probabilities, "[n, depth, k]")?;
        let temperatures = array::<f32, Ix1>("temperatures", temperatures, "[n]")?;
        let most = array::<i32, Ix1>("most", most, "[n]")?;
        shaped(
            "probabilities",
            probabilities.shape(),
            tokens.shape(),
            "[n, depth, k], that of tokens",
        )?;
        shaped(
            "tokens",
            &tokens.shape()[..1],
            anchors.shape(),
            "[n], as many requests as anchors",
        )?;
        same_rows(tokens.shape()[0], temperatures.shape(), most.shape())?;
        let (step, context) = step_of(plan)?;
        let offers = plan::Offers {
            probabilities: probabilities.as_slice()?,
            tokens: &[],
            from_text: &[],
            depth: tokens.shape()[1],
            k: tokens.shape()[2],
            temperatures: temperatures.as_slice()?,
            most: most.as_slice()?,
            others: rows("others", others)?,
            context,
            drafted: None,
            step: step.as_ref().map(|(step, requests)| (*step, &requests[..])),
        };
        let trees = self.0.admit_trees(&offers, anchors.as_slice()?, tokens.as_slice()?)?;
        let shape = [trees.widths.len(), trees.width];
        Ok((
            PyArray1::from_vec(py, trees.tokens).reshape(shape)?,
            PyArray1::from_vec(py, trees.parents).reshape(shape)?,
            PyArray1::from_vec(py, trees.widths),
        ))
    }

    /// Books a step: what each request verified and which of it was accepted.
    fn record_step(&mut self, plan: Object<'_, StepPlan>, accepted: Object<'_, Accepted>) -> PyResult<()> {
        let (plan, accepted) = (plan.of("plan", "a StepPlan")?, accepted.of("accepted", "an Accepted")?);
        let plan = plan.get().locked();
        let mut outcome = Ok(());
        accepted.get().each_pass(&plan, |pass| {
            let booked = self.0.record_pass(pass);
            outcome = outcome.clone().and(booked);
        });
        drop(plan);
        Ok(outcome?)
    }

    /// What a step took: rows and time of its target pass, whose requests had `context` tokens together, and of its drafter pass with what follows
    /// from it (0 rows: none).
    #[pyo3(signature = (target_rows, target_time, draft_rows=Count::ZERO, draft_time=Given::new(0.0), *, context=Count::ZERO),
           text_signature = "($self, target_rows, target_time, draft_rows=0, draft_time=0.0, *, context=0)")]
    fn observe(
        &mut self,
        target_rows: Count,
        target_time: Given<f64>,
        draft_rows: Count,
        draft_time: Given<f64>,
        context: Count,
    ) -> PyResult<()> {
        let target = (rows("target_rows", target_rows)?, time("target_time", target_time)?);
        let draft = (rows("draft_rows", draft_rows)?, time("draft_time", draft_time)?);
        self.0.observe(target, rows("context", context)?, draft);
        Ok(())
    }

    /// The same of a step of the engine, `target_time` being that of its pass and of what is drawn from it. A step with tokens of prompts, of which no
    /// logits are wanted, says nothing.
    #[pyo3(signature = (plan, target_time, draft_rows=Count::ZERO, draft_time=Given::new(0.0)),
           text_signature = "($self, plan, target_time, draft_rows=0, draft_time=0.0)")]
    fn observe_step(
        &mut self,
        plan: Object<'_, StepPlan>,
        target_time: Given<f64>,
        draft_rows: Count,
        draft_time: Given<f64>,
    ) -> PyResult<()> {
        let plan = plan.of("plan", "a StepPlan")?;
        let target_time = time("target_time", target_time)?;
        let draft = (rows("draft_rows", draft_rows)?, time("draft_time", draft_time)?);
        let plan = plan.get().locked();
        let arrays = plan.arrays();
        let rows = arrays.token_ids.len();
        if arrays.logit_rows.len() == rows {
            self.0.observe((rows, target_time), context_of(arrays), draft);
        }
        Ok(())
    }

    /// Whether the drafter will not be asked for a while.
    #[getter]
    fn rests(&self) -> bool {
        self.0.rests()
    }

    /// Costs in use: the curves of target and drafter, and what a token of context adds; None where whole blocks are drafted.
    #[getter]
    fn costs(&self) -> Option<(Points, Points, f64)> {
        let cost = self.0.cost()?;
        Some((
            cost.target.points().to_vec(),
            cost.draft.points().to_vec(),
            cost.context,
        ))
    }

    /// Books one request's chain: `drafted` drafts verified, `accepted` of them kept, and f32 `[>= drafted]` the drafter's probabilities of
    /// them, if they are to be learnt from.
    #[pyo3(signature = (drafted, accepted, temperature=Given::new(1.0), probabilities=None),
           text_signature = "($self, drafted, accepted, temperature=1.0, probabilities=None)")]
    fn record(
        &mut self,
        drafted: Count,
        accepted: Count,
        temperature: Given<f32>,
        probabilities: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (drafted, accepted) = (rows("drafted", drafted)?, rows("accepted", accepted)?);
        let temperature = self::temperature(temperature)?;
        let probabilities = probabilities
            .map(|given| array::<f32, Ix1>("probabilities", given, "[>= drafted]"))
            .transpose()?;
        let known = probabilities.as_ref().map_or(Ok(&[][..]), |known| known.as_slice())?;
        if probabilities.is_some() && known.len() < drafted {
            let expected = format!("at least {drafted}, one for each draft");
            return Err(invalid("probabilities", format!("{} elements", known.len()), expected));
        }
        Ok(self.0.record(temperature, drafted, accepted, known)?)
    }

    /// Chance that the draft at each position is accepted when all before it were, for requests at this temperature.
    #[pyo3(signature = (temperature=Given::new(1.0)), text_signature = "($self, temperature=1.0)")]
    fn acceptance(&self, temperature: Given<f32>) -> PyResult<Vec<f64>> {
        let temperature = self::temperature(temperature)?;
        let positions = 0..self.0.block_size() - 1;
        Ok(positions
            .map(|position| self.0.acceptance(temperature, position))
            .collect())
    }

    /// The exponent that makes a chance of acceptance of the drafter's probability, for requests at this temperature.
    #[pyo3(signature = (temperature=Given::new(1.0)), text_signature = "($self, temperature=1.0)")]
    fn exponent(&mut self, temperature: Given<f32>) -> PyResult<f32> {
        Ok(self.0.exponent(self::temperature(temperature)?))
    }
}

fn temperatures(given: Given<Vec<f32>>) -> PyResult<Vec<f32>> {
    const EXPECTED: &str = "a list of finite numbers of at least 0";
    let temperatures = given.of("temperatures", EXPECTED)?;
    match temperatures.iter().find(|t| !(t.is_finite() && **t >= 0.0)) {
        None => Ok(temperatures),
        Some(temperature) => Err(invalid("temperatures", temperature.to_string(), EXPECTED)),
    }
}

fn same_rows(rows: usize, temperatures: &[usize], most: &[usize]) -> PyResult<()> {
    shaped("temperatures", temperatures, &[rows], "[n], one per request")?;
    shaped("most", most, &[rows], "[n], one per request")
}

/// Chooses one block length for a whole batch, from what steps were seen to take and from what was accepted so far.
#[pyclass(module = "dflash_rs._core")]
pub struct WidthPlanner(plan::WidthPlanner);

#[pymethods]
impl WidthPlanner {
    #[new]
    #[pyo3(signature = (widths, *, tree_depth = None))]
    fn new(widths: Given<Vec<usize>>, tree_depth: Option<Count>) -> PyResult<Self> {
        let widths = widths.of("widths", "a list of whole numbers")?;
        Ok(Self(match tree_depth {
            None => plan::WidthPlanner::new(&widths)?,
            Some(depth) => plan::WidthPlanner::with_tree(&widths, rows("tree_depth", depth)?)?,
        }))
    }

    /// The width of the next step, of `requests` requests with `context` tokens together; 1 is a plain step.
    #[pyo3(signature = (requests, context=Count::ZERO, temperatures=Given::new(Vec::new())), text_signature = "($self, requests, context=0, temperatures=())")]
    fn choose(&mut self, requests: Count, context: Count, temperatures: Given<Vec<f32>>) -> PyResult<usize> {
        let (requests, context) = (rows("requests", requests)?, rows("context", context)?);
        Ok(self.0.choose(requests, context, &self::temperatures(temperatures)?))
    }

    /// A step of `requests` requests with `context` tokens together and this width took `seconds`.
    #[pyo3(signature = (requests, width, seconds, context=Count::ZERO), text_signature = "($self, requests, width, seconds, context=0)")]
    fn observe(&mut self, requests: Count, width: Count, seconds: Given<f64>, context: Count) -> PyResult<()> {
        let (requests, width) = (rows("requests", requests)?, rows("width", width)?);
        let context = rows("context", context)?;
        self.0.observe(requests, context, width, time("seconds", seconds)?);
        Ok(())
    }

    /// Books a step: drafts accepted by each request when `width` tokens of each were verified, and the requests' temperatures.
    #[pyo3(signature = (width, accepted, temperatures=Given::new(Vec::new())), text_signature = "($self, width, accepted, temperatures=())")]
    fn record(&mut self, width: Count, accepted: Given<Vec<u32>>, temperatures: Given<Vec<f32>>) -> PyResult<()> {
        let accepted = accepted.of("accepted", "a list of numbers of drafts")?;
        let temperatures = self::temperatures(temperatures)?;
        Ok(self.0.record(rows("width", width)?, &accepted, &temperatures)?)
    }

    /// What a step of `requests` requests with `context` tokens together takes, in seconds, with each of the widths; None where it is not known.
    #[pyo3(signature = (requests, context=Count::ZERO), text_signature = "($self, requests, context=0)")]
    fn times(&self, requests: Count, context: Count) -> PyResult<Vec<Option<f64>>> {
        Ok(self.0.times(rows("requests", requests)?, rows("context", context)?))
    }

    /// The widths to choose from.
    #[getter]
    fn widths(&self) -> Vec<usize> {
        self.0.widths().to_vec()
    }

    /// Chance that the draft at each position of a request at this temperature is accepted when all before it were.
    #[pyo3(signature = (temperature=Given::new(0.0)), text_signature = "($self, temperature=0.0)")]
    fn acceptance(&self, temperature: Given<f32>) -> PyResult<Vec<f64>> {
        let temperature = self::temperature(temperature)?;
        let widest = self.0.widths().last().map_or(1, |&width| width);
        Ok((0..widest - 1)
            .map(|position| self.0.acceptance(temperature, position))
            .collect())
    }
}
