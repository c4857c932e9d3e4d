//! Which block length pays, judged by what steps are seen to take.
//!
//! ```text
//!   goodput(w) = expected tokens / time of a step    for every width w that can be run; 1 is a plain step
//! ```
//! For an engine whose step cannot be timed in parts, or where the widths that can be run are few (`Planner` chooses from curves
//! instead). One width goes for the whole batch. Step times are kept for each width, size of the batch and length of its contexts, in seconds:
//!
//! * *A width that was never tried* is given the benefit of the doubt: a step takes at least what one with fewer requests or a
//!   narrower one took. It is tried if even so it might be the best.
//! * *A figure that has grown old* is renewed, the more rarely the more that costs: each width may cost one step in `FRESH`. A wider width than the one
//!   in use is looked at half as often each time it did not pay, once its drafts are known well, down to one in `LEAST` as often, until it turns out to be far cheaper than believed, or is used.
//!
//! The widest may be a *tree*: as many nodes, of which a path is accepted, no longer than the tree is deep. How deep paths get is learnt apart from
//! how far chains are accepted, which is what is believed of a tree until some have been verified.
//!
//! Both look at a width for a few steps in a row, because only the inner ones are timed cleanly.
//!
//! A width is timed at other times than the one it is compared with, and meanwhile contexts grow, or the machine is given to others. So
//! times are kept as shares of a *pace*, which follows the times of the width in use. Of those kept a low one counts: a moment in
//! which everything is slow makes a width look bad, and what looks bad would not be timed again for long, while a width that looks too good
//! is found out in a few steps.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::acceptance::Acceptance;
use super::chances::{BANDS, band};
use super::{CHEAP, MOST_BLOCK, chain, kept};
use crate::error::{Error, Result};

/// Steps in a row that a look at a width takes.
const LOOK: u8 = 4;
/// Times that are kept of a width and a size of the batch: those of some looks.
const KEPT: usize = 16;
/// How far one step moves the pace. Down three times as far as up, so that a quarter of the steps are faster, as of the times kept.
const PACE_UP: f64 = 1.002;
const PACE_DOWN: f64 = 0.994;
/// Steps after which a time is old, and of which looking at a width may cost one.
const FRESH: u64 = 256;
/// As rarely as this a width that never pays is looked at, in the time that `FRESH` makes of it.
const LEAST: u64 = 8;
/// Passes with drafts that have to have told what drafts are worth before one of their widths is looked at more rarely.
const TOLD: f64 = 64.0;
/// By how much a wider step, and a narrower one, have to be better before the width is changed: times and acceptance scatter. To have
/// drafted too much costs more than to have drafted too little.
const WIDER: f64 = 1.08;
const NARROWER: f64 = 1.02;
/// By how much a width that was never tried has to look better, at best, to be tried.
const HOPE: f64 = 1.05;

/// Requests that are taken to be one size of a batch: single ones up to 32, then sixteen sizes to each doubling. Of batches that differ
/// more, one width timed on the small ones and another on the large ones could not be compared.
fn size_of(requests: usize) -> usize {
    let below = requests.max(1) - 1;
    if below < 32 {
        return below;
    }
    let log = below.ilog2() as usize;
    32 + 16 * (log - 5) + ((below >> (log - 4)) & 15)
}

/// The most requests of a size.
fn most_of(size: usize) -> f64 {
    if size < 32 {
        return (size + 1) as f64;
    }
    let (log, part) = (5 + (size - 32) / 16, (size - 32) % 16);
    (((17 + part) as u64) << (log - 4)) as f64
}

/// Tokens of context per request that are taken to be one length, the shortest; then one length to each doubling. Rows of a wide step each look
/// at all of it, and so does the drafter, so what pays for a short text may not pay for a long one.
const SHORT: usize = 512;

/// The length of the contexts of `requests` requests that have `context` tokens together.
fn length_of(requests: usize, context: usize) -> usize {
    let each = context / requests.max(1);
    if each < SHORT {
        0
    } else {
        (each / SHORT).ilog2() as usize + 1
    }
}

/// Times of one width at one size, as shares of the pace.
#[derive(Clone, Debug, Default)]
struct Times {
    kept: Vec<f64>,
    next: usize,
    // The lower quartile of those kept.
    typical: Option<f64>,
    // Steps of this size so far when it was timed or looked at last.
    seen: u64,
    // The same when it was looked at without a time to judge by.
    tried: Option<u64>,
    // How many times as long as `FRESH` its figure may get old; 0 is 1.
    patience: u64,
}

impl Times {
    fn add(&mut self, time: f64, now: u64) {
        self.seen = now;
        if self.kept.len() < KEPT {
            self.kept.push(time);
        } else {
            self.kept[self.next] = time;
        }
        self.next = (self.next + 1) % KEPT;
        let mut sorted = self.kept.clone();
        sorted.sort_by(f64::total_cmp);
        self.typical = Some(sorted[(sorted.len() - 1) / 4]);
    }

    fn look(&mut self, now: u64) {
        match self.typical {
            None => self.tried = Some(now),
            // Should nothing be timed, the old figure holds for as long as a new one would.
            Some(_) => self.seen = now,
        }
    }

    /// Steps for which a figure holds whose renewal costs nothing.
    fn holds(&self) -> u64 {
        FRESH * self.patience.max(1)
    }
}

/// What is known of one size of the batch with contexts of one length.
#[derive(Clone, Debug, Default)]
struct Size {
    steps: u64,
    // By width.
    times: Vec<Times>,
}

/// Chooses one width for a whole batch, step by step.
#[derive(Clone, Debug)]
pub struct WidthPlanner {
    // Rising.
    widths: Vec<usize>,
    // By band of temperatures.
    acceptance: Vec<Acceptance>,
    // The same by depth where the widest is a tree, and how deep it is.
    tree: Option<(usize, Vec<Acceptance>)>,
    // By length of the contexts and size.
    sizes: BTreeMap<(usize, usize), Size>,
    // The width that is looked at, and for how many more steps.
    look: (usize, u8),
    current: usize,
    pace: f64,
}

impl WidthPlanner {
    /// To choose from `widths`, tokens per request with the anchor counted.
    ///
    /// # Errors
    /// `InvalidArgument` when there is none, or one of 0, of more than 4096, or not larger than the one before.
    pub fn new(widths: &[usize]) -> Result<Self> {
        let rising = widths.windows(2).all(|pair| pair[0] < pair[1]);
        let (Some(&first), Some(&last)) = (widths.first(), widths.last()) else {
            return Err(refused("no widths".into()));
        };
        if !rising || first == 0 || last > MOST_BLOCK {
            return Err(refused(format!("{widths:?}")));
        }
        Ok(Self {
            widths: widths.into(),
            acceptance: vec![Acceptance::new(last - 1); BANDS],
            tree: None,
            sizes: BTreeMap::new(),
            look: (0, 0),
            current: widths.len() - 1,
            pace: 1.0,
        })
    }

    /// The same where the widest is a tree: so many nodes with the anchor counted, of which at most `depth` are accepted.
    ///
    /// # Errors
    /// As `new`; `InvalidArgument` when the tree has fewer than `depth` nodes below its anchor, or `depth` is 0.
    pub fn with_tree(widths: &[usize], depth: usize) -> Result<Self> {
        let planner = Self::new(widths)?;
        let nodes = planner.acceptance[0].positions();
        if depth == 0 || depth > nodes {
            return Err(Error::InvalidArgument {
                name: "tree_depth",
                got: depth.to_string(),
                expected: format!("1..{nodes}, the nodes below the anchor"),
            });
        }
        Ok(Self {
            tree: Some((depth, vec![Acceptance::new(depth); BANDS])),
            ..planner
        })
    }

    /// The widths to choose from.
    pub fn widths(&self) -> &[usize] {
        &self.widths
    }

    /// Chance that the draft at `position` (0 is the first) of a request at this temperature is accepted when all before it were.
    pub fn acceptance(&self, temperature: f32, position: usize) -> f64 {
        self.acceptance[band(temperature)].at(position)
    }

    /// Books a step: drafts accepted by each request when `width` tokens were verified of each, in a tree where that is the tree's width, and the
    /// requests' `temperatures`; those that are not told are greedy.
    ///
    /// # Errors
    /// `AcceptedExceedsDrafted`, `InvalidArgument` for a width of 0; nothing is booked then.
    pub fn record(&mut self, width: usize, accepted: &[u32], temperatures: &[f32]) -> Result<()> {
        let Some(drafted) = width.checked_sub(1) else {
            return Err(Error::InvalidArgument {
                name: "width",
                got: "0".into(),
                expected: "at least 1".into(),
            });
        };
        let of_tree = self.widths.last() == Some(&width);
        let (drafted, acceptance) = match &mut self.tree {
            Some((depth, paths)) if of_tree => (*depth, paths),
            _ => (drafted, &mut self.acceptance),
        };
        if let Some(&most) = accepted.iter().max().filter(|&&most| most as usize > drafted) {
            return Err(Error::AcceptedExceedsDrafted {
                accepted: most,
                drafted: drafted as u32,
            });
        }
        let temperatures = temperatures.iter().chain(std::iter::repeat(&0.0));
        let mut passes = accepted.iter().zip(temperatures);
        passes.try_for_each(|(&n, &temperature)| acceptance[band(temperature)].record(drafted, n as usize))
    }

    /// A step of `requests` requests with `context` tokens together and this width took `time`. A width that is not among those to choose from is
    /// ignored.
    pub fn observe(&mut self, requests: usize, context: usize, width: usize, time: f64) {
        if let Ok(index) = self.widths.binary_search(&width)
            && time > 0.0
            && time.is_finite()
        {
            let (pace, current) = (self.pace, self.current);
            let size = self.size(requests, context);
            let (now, times) = (size.steps, &mut size.times[index]);
            if times.typical.is_some_and(|typical| time < CHEAP * typical * pace) {
                times.patience = 0;
            }
            let before = times.typical.filter(|_| index == current && times.kept.len() == KEPT);
            times.add(time / pace, now);
            if let Some(typical) = before {
                self.pace *= match (typical * pace).total_cmp(&time) {
                    Ordering::Less => PACE_UP,
                    Ordering::Equal => 1.0,
                    Ordering::Greater => PACE_DOWN,
                };
            }
        }
    }

    /// What a step of `requests` requests with `context` tokens together takes with each of the widths, as far as it is known.
    pub fn times(&self, requests: usize, context: usize) -> Vec<Option<f64>> {
        let size = self.sizes.get(&key_of(requests, context));
        (0..self.widths.len())
            .map(|index| Some(size?.times[index].typical? * self.pace))
            .collect()
    }

    /// The width of the next step, of `requests` requests with `context` tokens together, at these `temperatures`; none are greedy.
    pub fn choose(&mut self, requests: usize, context: usize, temperatures: &[f32]) -> usize {
        let greedy = [0.0];
        let temperatures = if temperatures.is_empty() { &greedy } else { temperatures };
        let index = self.index(requests, context, temperatures);
        self.widths[index]
    }

    fn index(&mut self, requests: usize, context: usize, temperatures: &[f32]) -> usize {
        if requests == 0 || self.widths.len() == 1 {
            return self.widths.len() - 1;
        }
        self.size(requests, context).steps += 1;
        if self.look.1 > 0 {
            self.look.1 -= 1;
            return self.look.0;
        }
        let size = &self.sizes[&key_of(requests, context)];
        let (tokens, times) = (self.tokens(temperatures), self.times(requests, context));
        let now = size.steps;
        // Times are per step of the whole batch, tokens per request: the number of requests is the same on all sides.
        let (mut best, mut most) = (None, 0.0);
        let (mut hopeful, mut hope) = (None, 0.0);
        for (index, &time) in times.iter().enumerate() {
            if let Some(time) = time {
                if tokens[index] / time >= most {
                    (best, most) = (Some(index), tokens[index] / time);
                }
            } else if size.times[index].tried.is_none_or(|then| now - then >= FRESH) {
                let at_best = tokens[index] / self.at_least(requests, context, index);
                if at_best >= hope {
                    (hopeful, hope) = (Some(index), at_best);
                }
            }
        }
        if let Some(index) = hopeful
            && (best.is_none() || hope > most * HOPE)
        {
            return self.look_at(requests, context, index);
        }
        // Tried, and never timed: whole blocks, as without a planner.
        let Some(best) = best else {
            return self.widths.len() - 1;
        };
        let margin = if best > self.current { WIDER } else { NARROWER };
        let stays = times[self.current].is_some_and(|time| tokens[self.current] / time * margin >= most);
        if !stays {
            self.current = best;
        }
        let current = self.current;
        let step = tokens[best] / most;
        let due = times.iter().enumerate().position(|(index, &time)| {
            let Some(time) = time else { return false };
            let lost = f64::from(LOOK) * (time - tokens[index] / most) / step;
            index != current
                && (now - size.times[index].seen) as f64 >= size.times[index].holds() as f64 * lost.max(1.0)
        });
        // What is narrower is what drafting is weighed against, and does not get old.
        let rarer = due.is_some_and(|due| due > current && self.is_told(due, temperatures));
        let times = &mut self.size(requests, context).times;
        times[current].patience = 0;
        let Some(due) = due else { return current };
        times[due].patience = if rarer {
            (2 * times[due].patience.max(1)).min(LEAST)
        } else {
            0
        };
        self.look_at(requests, context, due)
    }

    /// Whether it is known what the drafts of a width are worth at these temperatures.
    fn is_told(&self, index: usize, temperatures: &[f32]) -> bool {
        let told = match &self.tree {
            Some((_, paths)) if index + 1 == self.widths.len() => paths,
            _ => &self.acceptance,
        };
        temperatures
            .iter()
            .all(|&temperature| told[band(temperature)].passes() >= TOLD)
    }

    fn look_at(&mut self, requests: usize, context: usize, index: usize) -> usize {
        self.look = (index, LOOK - 1);
        let size = self.size(requests, context);
        size.times[index].look(size.steps);
        index
    }

    /// Expected tokens of a request's pass, by width.
    fn tokens(&self, temperatures: &[f32]) -> Vec<f64> {
        let drafts = chain(&self.acceptance, temperatures);
        let mut all: Vec<f64> = self.widths.iter().map(|&width| 1.0 + drafts[width - 1]).collect();
        if let (Some((depth, paths)), Some(of_tree)) = (&self.tree, all.last_mut()) {
            let bands = paths.iter().zip(&self.acceptance);
            let chances = bands.map(|(paths, chain)| paths.assuming(chain.chances())).collect();
            *of_tree = 1.0 + kept(chances, *depth, temperatures)[*depth];
        }
        all
    }

    /// What a step takes at least: as long as a step that is no wider, of its share of the requests, with contexts no longer.
    fn at_least(&self, requests: usize, context: usize, index: usize) -> f64 {
        let share = |size: usize| (requests as f64 / most_of(size)).min(1.0);
        let narrower = |size: &Size| {
            let times = size.times.iter().take(index + 1);
            times.filter_map(|times| times.typical).fold(0.0, f64::max)
        };
        let no_longer = self.sizes.range(..(length_of(requests, context) + 1, 0));
        no_longer
            .map(|(&(_, size), known)| narrower(known) * share(size))
            .fold(0.0, f64::max)
    }

    fn size(&mut self, requests: usize, context: usize) -> &mut Size {
        let widths = self.widths.len();
        self.sizes.entry(key_of(requests, context)).or_insert_with(|| Size {
            steps: 0,
            times: vec![Times::default(); widths],
        })
    }
}

fn key_of(requests: usize, context: usize) -> (usize, usize) {
    (length_of(requests, context), size_of(requests))
}

fn refused(got: String) -> Error {
    Error::InvalidArgument {
        name: "widths",
        got,
        expected: format!("integers in 1..{MOST_BLOCK} that rise"),
    }
}

#[cfg(test)]
mod tests;
