//! How much to draft and how much of it to verify, so that speculation pays.
//!
//! ```text
//!   before drafting   decide(batch)  ──> width, block, trees      goodput of every block length and tree; 1 is a plain step
//!   after drafting    admit(offers)  ──> widths, or trees         the likeliest drafts first, while goodput rises
//!   after verifying   record(passes), observe(times)              what was accepted, what it took
//!
//!   goodput = expected tokens / step time             width = tokens of a request that a step verifies, the anchor counted
//! ```
//! A verified token costs time even when it is rejected. On a device that is limited by memory it costs next to nothing and
//! everything is verified; with many requests, or on a processor that computes more slowly than it reads, the least likely drafts
//! are not worth their row. Beside a prompt, whose time has to be spent anyway, a draft is weighed by what plain steps would gain in
//! the time that it adds. What is verified never changes the text: every token is the target's own draw.
//!
//! Nothing here is fitted to a pair of models. Step times are curves that come from measuring (`curve`). How often drafts are accepted is
//! learnt by position and by place in a tree (`acceptance`), what the drafter's own probabilities are worth by what became of
//! them (`chances`), and what of the promises was kept on which drafts were verified (`promises`): for a few bands of temperatures, because a
//! drafter guesses greedy choices better than draws. Without costs there is nothing to weigh: whole blocks and whole trees, by the same calls.
//! Where a request's own text has drafts, too, it takes those that promise more (`either`).
//!
//! An engine whose steps cannot be timed in parts chooses one width for a whole batch instead (`whole_steps`).

mod acceptance;
mod admitted;
mod chains;
mod chances;
mod curve;
mod either;
mod merit;
mod promises;
mod trees;
mod whole_steps;

use std::collections::VecDeque;

use crate::error::{Error, Result};
use acceptance::{Acceptance, NodeRates};
use admitted::{Admitted, tell_chain};
use chances::{BANDS, Exponent, band};
use merit::{Merit, worth};
use promises::Kept;

pub use curve::{Curve, StepCost};
pub use either::Own;
pub use trees::PlannedTrees;
pub use whole_steps::WidthPlanner;

/// Every so many steps more is drafted than looked best.
const EXPLORE: u64 = 32;
/// As long as drafting does not pay then either, twice as many pass until the next time, up to so many.
const EXPLORE_LEAST: u64 = 256;
/// Pauses of so many steps and more are long enough to let the drafter rest, until so many steps before the next look, which its context grows over.
const REST: u64 = 4 * EXPLORE;
const WAKE: u64 = 32;
/// As often as this a step that would have drafts is a plain one where steps are timed: what drafting is weighed against must not be what plain steps
/// took long ago.
const PLAINLY: u64 = 64;
/// A time below this share of what was expected is a surprise.
const CHEAP: f64 = 0.8;
/// Longer blocks than this are a mistake.
const MOST_BLOCK: usize = 4096;
/// Trees of more drafts than this are a mistake.
const MOST_NODES: usize = 1024;
/// Steps that were admitted and are not recorded yet. Those of which no records come, because they were called off, make room.
const UNRECORDED: usize = 4;

/// What a step could run.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The sampling temperature of each request that could draft.
    pub temperatures: &'a [f32],
    /// Tokens that run beside them.
    pub others: usize,
    /// Tokens of context that the step's requests have together.
    pub context: usize,
    /// The widths of trees that a device can verify which is not asked between drafting and verifying, rising. Empty where it is: what is
    /// drafted can then still be cut by [`Planner::admit`].
    pub widths: &'a [usize],
    /// Most tokens of the step, where `widths` are given.
    pub room: usize,
}

/// What to run of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Most tokens of a request that drafts, the anchor counted; 1 is a plain step.
    pub width: usize,
    /// Tokens of the drafter's block, the anchor counted.
    pub block: usize,
    /// Whether to draft trees out of the block.
    pub trees: bool,
}

impl Decision {
    const PLAIN: Self = Self {
        width: 1,
        block: 1,
        trees: false,
    };
}

/// What the drafter offers for `n` requests: `k` candidates for each of `depth` places, the likeliest first.
#[derive(Clone, Copy, Debug)]
pub struct Offers<'a> {
    /// `[n, depth, k]` the drafter's own probabilities, or of drafts from a text their chances; one that is no number counts as none.
    pub probabilities: &'a [f32],
    /// `[n, depth, k]` the drafts. Without, nothing is learnt of the first that is not verified.
    pub tokens: &'a [i64],
    /// `[n]` whose drafts are from its own text; empty: all are the drafter's.
    pub from_text: &'a [bool],
    /// Places.
    pub depth: usize,
    /// Candidates per place.
    pub k: usize,
    /// `[n]` sampling temperatures.
    pub temperatures: &'a [f32],
    /// `[n]` most tokens of each request, the anchor counted.
    pub most: &'a [i32],
    /// Tokens that run beside them.
    pub others: usize,
    /// Tokens of context that the step's requests have together.
    pub context: usize,
    /// Rows of the drafter's pass, which is spent already; `None`: a block of all places for every request.
    pub drafted: Option<usize>,
    /// Number of the step and its requests `[n]`, by which [`Planner::record_pass`] names them again. Without, nothing is learnt of what
    /// the probabilities are worth.
    pub step: Option<(u64, &'a [u64])>,
}

/// What a step verifies, of chains out of two sources.
#[derive(Clone, Debug, PartialEq)]
pub struct Admission {
    /// `[n, depth]` drafts.
    pub tokens: Vec<i64>,
    /// `[n]` tokens of each request, the anchor counted.
    pub widths: Vec<i32>,
}

/// What became of the drafts of one request in one step.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Number of the step.
    pub step: u64,
    /// The request.
    pub request: u64,
    /// Its sampling temperature.
    pub temperature: f32,
    /// Whether the drafts were a tree.
    pub tree: bool,
    /// Drafts verified.
    pub verified: usize,
    /// Positions that were drafted.
    pub depth: usize,
    /// The accepted drafts, by their place behind the anchor: 0 is the first of a chain, the best of a tree.
    pub path: &'a [usize],
    /// The target's token behind them; None where the text ended before it.
    pub next: Option<i64>,
}

/// How the chances of one request's drafts are told from what was offered.
#[derive(Clone, Copy, Debug)]
struct Judge {
    /// Makes a chance of a probability.
    exponent: f32,
    /// What of such promises was kept lately.
    kept: f32,
}

/// Decides how much to draft, and how much of it to verify, from costs and from what was accepted so far.
#[derive(Clone, Debug)]
pub struct Planner {
    // None: whole blocks, whole trees.
    cost: Option<StepCost>,
    block: usize,
    // By band of temperatures.
    acceptance: Vec<Acceptance>,
    nodes: Vec<NodeRates>,
    exponents: Vec<Exponent>,
    // Of drafts of the drafter, and of those from texts.
    kept: [Vec<Kept>; 2],
    admitted: VecDeque<Admitted>,
    steps: u64,
    // Whether the step at hand is one of those that look further, when the next one is, and how many are from one to the next.
    exploring: bool,
    next_look: u64,
    pause: u64,
    // Requests of the step at hand, and whether it is to be plain; steps since one was, None as long as none was timed.
    running: usize,
    plainly: bool,
    since_plain: Option<u64>,
}

impl Planner {
    /// For blocks of at most `block` tokens, the anchor counted. Without a `cost` they are always whole.
    ///
    /// # Errors
    /// `InvalidArgument` for a block of none, or target passes that take no time.
    pub fn new(block: usize, cost: Option<StepCost>) -> Result<Self> {
        if cost.as_ref().is_some_and(|cost| cost.target.at(1) <= 0.0) {
            return Err(Error::InvalidArgument {
                name: "target",
                got: "no time for one row".into(),
                expected: "a positive time".into(),
            });
        }
        if !(1..=MOST_BLOCK).contains(&block) {
            return Err(Error::InvalidArgument {
                name: "block_size",
                got: block.to_string(),
                expected: format!("1..{MOST_BLOCK}"),
            });
        }
        Ok(Self {
            cost,
            block,
            acceptance: vec![Acceptance::new(block - 1); BANDS],
            nodes: vec![NodeRates::new(0); BANDS],
            exponents: vec![Exponent::default(); BANDS],
            kept: [vec![Kept::default(); BANDS], vec![Kept::default(); BANDS]],
            admitted: VecDeque::new(),
            steps: 0,
            exploring: false,
            next_look: EXPLORE,
            pause: EXPLORE,
            running: 0,
            plainly: false,
            since_plain: None,
        })
    }

    /// Lets it draft trees of up to `nodes` drafts; 0 are chains.
    ///
    /// # Errors
    /// `InvalidArgument` for more than 1024.
    pub fn with_trees(mut self, nodes: usize) -> Result<Self> {
        if nodes > MOST_NODES {
            return Err(Error::InvalidArgument {
                name: "tree_nodes",
                got: nodes.to_string(),
                expected: format!("0..{MOST_NODES}"),
            });
        }
        self.nodes = vec![NodeRates::new(nodes); BANDS];
        Ok(self)
    }

    /// The costs in use; None where there is nothing to weigh.
    pub fn cost(&self) -> Option<&StepCost> {
        self.cost.as_ref()
    }

    /// Most tokens of a block, the anchor counted.
    pub fn block_size(&self) -> usize {
        self.block
    }

    /// Most drafts of a tree.
    pub fn tree_nodes(&self) -> usize {
        self.nodes[0].most()
    }

    /// Chance that a draft of a request at this temperature is accepted at `position` (0 is the first) when all before it were.
    pub fn acceptance(&self, temperature: f32, position: usize) -> f64 {
        self.acceptance[band(temperature)].at(position)
    }

    /// Chance that the draft at place `node` of the best-first order of a tree (0 is the best) is accepted at this temperature.
    pub fn node_rate(&self, temperature: f32, node: usize) -> f64 {
        self.nodes[band(temperature)].at(node)
    }

    /// The exponent that makes a chance of acceptance of the drafter's probability, for requests at this temperature.
    pub fn exponent(&mut self, temperature: f32) -> f32 {
        self.exponents[band(temperature)].get()
    }

    /// Whether the drafter will not be asked for a while, unless other requests come: the last looks at what it drafts did not pay. What it would need to
    /// go on from need not be kept meanwhile.
    pub fn rests(&self) -> bool {
        self.pause >= REST && self.next_look > self.steps + WAKE
    }

    /// How much to draft in the next step.
    ///
    /// # Errors
    /// `InvalidArgument` for temperatures that are none.
    pub fn decide(&mut self, batch: &Batch<'_>) -> Result<Decision> {
        check_temperatures(batch.temperatures)?;
        let nodes = self.tree_nodes();
        let Some(cost) = &self.cost else {
            return Ok(Decision {
                width: if nodes > 0 { nodes + 1 } else { self.block },
                block: self.block,
                trees: nodes > 0,
            });
        };
        self.steps += 1;
        self.exploring = self.steps >= self.next_look;
        self.running = batch.temperatures.len() + batch.others;
        self.plainly = self.since_plain.is_some_and(|steps| steps >= PLAINLY) && !self.exploring;
        if self.plainly {
            self.since_plain = Some(0);
            return Ok(Decision::PLAIN);
        }
        if batch.temperatures.is_empty() || self.block == 1 {
            return Ok(Decision::PLAIN);
        }
        let expected = Expected::of(self, batch.temperatures);
        let decide = if nodes > 0 { trees::decide } else { chains::decide };
        let best = decide(cost, &expected, batch, false);
        if !self.exploring {
            return Ok(best);
        }
        self.pause = match best {
            Decision::PLAIN => (2 * self.pause).min(EXPLORE_LEAST),
            _ => EXPLORE,
        };
        self.next_look = self.steps + self.pause;
        Ok(decide(cost, &expected, batch, true))
    }

    /// How many tokens of each request to verify when all of it are chains of the likeliest candidates: `[n]`, the anchor counted. The
    /// drafter's part of the step is spent already.
    ///
    /// # Errors
    /// `Length` naming what does not fit `most`, `InvalidArgument` for places of no drafts, temperatures that are none, or requests of no
    /// tokens.
    pub fn admit(&mut self, offers: &Offers<'_>) -> Result<Vec<i32>> {
        let judges = self.begin(offers)?;
        let exploring = std::mem::take(&mut self.exploring);
        let ones = vec![1; offers.most.len()];
        let now = self.for_now(offers, &ones);
        let (widths, promised) = chains::admit(self.cost.as_ref(), &now, &judges, exploring);
        self.remember(offers, promised, Vec::new(), 0);
        Ok(widths)
    }

    /// The trees to verify, below `anchors` `[n]` and of the candidates `tokens` `[n, depth, k]`: drafts are admitted best first over all
    /// requests. The drafter's part of the step is spent already.
    ///
    /// # Errors
    /// As [`Self::admit`].
    pub fn admit_trees(&mut self, offers: &Offers<'_>, anchors: &[i64], tokens: &[i64]) -> Result<PlannedTrees> {
        check_length("anchors", anchors.len(), offers.most.len())?;
        check_length("tokens", tokens.len(), offers.probabilities.len())?;
        let judges = self.begin(offers)?;
        let exploring = std::mem::take(&mut self.exploring);
        let ones = vec![1; offers.most.len()];
        let now = self.for_now(offers, &ones);
        let (trees, promised) = trees::admit(self.cost.as_ref(), &now, &judges, exploring, anchors, tokens);
        self.remember(offers, promised, trees.parents.clone(), trees.width);
        Ok(trees)
    }

    /// Checks an offer, and tells how each of its requests is judged.
    fn begin(&mut self, offers: &Offers<'_>) -> Result<Vec<Judge>> {
        let requests = offers.most.len();
        if offers.depth == 0 || offers.k == 0 {
            return Err(Error::InvalidArgument {
                name: "probabilities",
                got: "places of no drafts".into(),
                expected: "at least one draft per request".into(),
            });
        }
        let all = requests * offers.depth * offers.k;
        check_length("probabilities", offers.probabilities.len(), all)?;
        check_length("temperatures", offers.temperatures.len(), requests)?;
        if !offers.tokens.is_empty() {
            check_length("tokens", offers.tokens.len(), all)?;
        }
        if !offers.from_text.is_empty() {
            check_length("from_text", offers.from_text.len(), requests)?;
        }
        if let Some((_, ids)) = offers.step {
            check_length("requests", ids.len(), requests)?;
        }
        check_temperatures(offers.temperatures)?;
        if let Some(most) = offers.most.iter().find(|&&most| most < 1) {
            return Err(Error::InvalidArgument {
                name: "most",
                got: most.to_string(),
                expected: "at least 1, the anchor".into(),
            });
        }
        let judge = |(request, &temperature): (usize, &f32)| {
            let (band, text) = (band(temperature), offers.is_text(request));
            Judge {
                // What is a chance already stays what it is.
                exponent: if text { 1.0 } else { self.exponents[band].get() },
                kept: self.kept[usize::from(text)][band].share(),
            }
        };
        Ok(offers.temperatures.iter().enumerate().map(judge).collect())
    }

    /// What of an offer may be taken: in a step that is to be plain the anchors alone, `ones`.
    fn for_now<'a>(&self, offers: &Offers<'a>, ones: &'a [i32]) -> Offers<'a> {
        let most = if self.plainly { ones } else { offers.most };
        Offers { most, ..*offers }
    }

    fn remember(&mut self, offers: &Offers<'_>, promised: Vec<f64>, parents: Vec<i32>, width: usize) {
        let Some((step, requests)) = offers.step else { return };
        if self.admitted.len() == UNRECORDED {
            self.admitted.pop_front();
        }
        self.admitted.push_back(Admitted {
            step,
            requests: requests.into(),
            depth: offers.depth,
            probabilities: offers.probabilities.iter().step_by(offers.k).copied().collect(),
            tokens: offers.tokens.iter().step_by(offers.k).copied().collect(),
            from_text: offers.from_text.into(),
            offered: (0..requests.len()).map(|request| offers.places(request)).collect(),
            promised,
            parents,
            width,
            at: 0,
        });
    }

    /// Books a pass of a step whose drafts were admitted here, or drafted unasked.
    ///
    /// # Errors
    /// `AcceptedExceedsDrafted`; nothing is booked then.
    pub fn record_pass(&mut self, pass: &Pass<'_>) -> Result<()> {
        let band = band(pass.temperature);
        if pass.path.len() > pass.depth {
            return Err(Error::AcceptedExceedsDrafted {
                accepted: pass.path.len() as u32,
                drafted: pass.depth as u32,
            });
        }
        // Steps are recorded in their order: of those before this one nothing will come.
        while self.admitted.front().is_some_and(|admitted| admitted.step < pass.step) {
            self.admitted.pop_front();
        }
        let admitted = self.admitted.front_mut().filter(|first| first.step == pass.step);
        let found = admitted.and_then(|admitted| Some((admitted.find(pass.request)?, &*admitted)));
        let text = found.is_some_and(|(row, admitted)| admitted.from_text.get(row) == Some(&true));
        if let Some((row, admitted)) = found {
            self.kept[usize::from(text)][band].record(admitted.promised[row], pass.path.len());
        }
        // How often the drafter is right is not learnt from what others drafted.
        if text {
            return Ok(());
        }
        let (depth, right) = match found {
            Some((row, admitted)) => admitted.known(row, pass),
            None => (pass.depth, pass.path.len()),
        };
        self.acceptance[band].record(depth, right)?;
        if pass.tree {
            self.nodes[band].record(pass.verified, pass.path);
        }
        if let Some((row, admitted)) = found {
            admitted.tell(row, pass, &mut self.exponents[band]);
        }
        Ok(())
    }

    /// Books the chain of one request: `drafted` drafts verified, `accepted` of them kept, and the drafter's `probabilities` of them,
    /// if they are to be learnt from.
    ///
    /// # Errors
    /// `AcceptedExceedsDrafted`; nothing is booked then.
    pub fn record(&mut self, temperature: f32, drafted: usize, accepted: usize, probabilities: &[f32]) -> Result<()> {
        let band = band(temperature);
        self.acceptance[band].record(drafted, accepted)?;
        tell_chain(probabilities, drafted, accepted, &mut self.exponents[band]);
        Ok(())
    }

    /// What a step took: a target pass over `target.0` rows of requests with `context` tokens together, and, if it drafted, a drafter pass over
    /// `draft.0` rows with what follows from it. The costs follow.
    pub fn observe(&mut self, target: (usize, f64), context: usize, draft: (usize, f64)) {
        let Some(cost) = &mut self.cost else { return };
        self.since_plain = if target.0 <= self.running {
            Some(0)
        } else {
            Some(self.since_plain.map_or(0, |steps| steps + 1))
        };
        // What turns out to be far cheaper than believed is soon looked at again.
        let (drafting, believed) = (draft.1, cost.draft.at(draft.0));
        let verifying = target.1 < CHEAP * cost.pass(target.0, context);
        if draft.0 > 0 && (verifying || drafting < CHEAP * believed) {
            self.pause = EXPLORE;
            self.next_look = self.next_look.min(self.steps + EXPLORE);
        }
        cost.follow(target, context, draft);
    }
}

impl Offers<'_> {
    /// Whether a request's drafts are from its own text.
    fn is_text(&self, request: usize) -> bool {
        self.from_text.get(request) == Some(&true)
    }

    /// Places that a request has drafts for.
    fn places(&self, request: usize) -> usize {
        self.depth.min(self.most[request] as usize - 1)
    }
}

/// What a batch can expect, as the mean over its requests.
struct Expected {
    /// Accepted drafts, by length of the block: 0 of a plain step, then those of 2, 3 and more tokens.
    chain: Vec<f64>,
    /// Accepted drafts, by number of drafts of the tree, from 0.
    tree: Vec<f64>,
}

impl Expected {
    fn of(planner: &Planner, temperatures: &[f32]) -> Self {
        let shares = shares(temperatures);
        let tree = (0..planner.tree_nodes()).map(|node| {
            let rates = shares.iter().zip(&planner.nodes);
            rates.map(|(share, rates)| share * rates.at(node)).sum::<f64>()
        });
        Self {
            chain: chain(&planner.acceptance, temperatures),
            tree: sums(tree),
        }
    }
}

/// Which share of the requests is in each band.
fn shares(temperatures: &[f32]) -> [f64; BANDS] {
    let mut shares = [0.0; BANDS];
    for &temperature in temperatures {
        shares[band(temperature)] += 1.0 / temperatures.len() as f64;
    }
    shares
}

/// Drafts of a request that are accepted in the mean, by length of the block: 0 of a plain step, then those of 2, 3 and more tokens.
/// `acceptance`: by band of temperatures.
fn chain(acceptance: &[Acceptance], temperatures: &[f32]) -> Vec<f64> {
    let positions = acceptance.first().map_or(0, Acceptance::positions);
    kept(
        acceptance.iter().map(Acceptance::chances).collect(),
        positions,
        temperatures,
    )
}

/// The same of so many positions, `bands` having the chances of each by band of temperatures.
fn kept<I: Iterator<Item = f64>>(mut bands: Vec<I>, positions: usize, temperatures: &[f32]) -> Vec<f64> {
    let mut alive = shares(temperatures);
    let reached = (0..positions).map(|_| {
        let still = |(alive, chances): (&mut f64, &mut I)| {
            *alive *= Iterator::next(chances).unwrap_or(0.0);
            *alive
        };
        alive.iter_mut().zip(&mut bands).map(still).sum::<f64>()
    });
    sums(reached)
}

fn sums(terms: impl Iterator<Item = f64>) -> Vec<f64> {
    let added = terms.scan(0.0, |sum, term| {
        *sum += term;
        Some(*sum)
    });
    std::iter::once(0.0).chain(added).collect()
}

fn check_length(name: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Length { name, got, expected })
}

fn check_temperatures(temperatures: &[f32]) -> Result<()> {
    match temperatures.iter().find(|t| !(t.is_finite() && **t >= 0.0)) {
        None => Ok(()),
        Some(temperature) => Err(Error::InvalidArgument {
            name: "temperatures",
            got: temperature.to_string(),
            expected: "finite numbers of at least 0".into(),
        }),
    }
}

#[cfg(test)]
mod tests;
