//! How much to draft and how much of it to verify, so that speculation pays.
//!
//! ```text
//!   before drafting   goodput(b) = expected tokens / step time   for every block length b; b = 1 is a plain step
//!   after drafting    admit drafts, the likeliest first, while expected tokens / step time rises
//! ```
//! A verified token costs time even when it is rejected. On a device that is limited by memory it costs next to nothing and
//! everything is verified; with many requests, or on a processor that computes more slowly than it reads, the least likely drafts
//! are not worth their row. What is verified never changes the text: every token is the target's own draw.
//!
//! Step times are curves over the number of rows, in any one unit: flat as long as memory is what limits, a line where arithmetic
//! does, stairs where a device runs in fixed sizes. The chance of a draft is the product of the drafter's probabilities along its
//! path; how the drafter errs is learnt per position.

mod trees;

pub use trees::{Offers, PlannedTrees};

use crate::error::{Error, Result};
use trees::NodeRates;

/// Time over rows: straight between the points, that of the first before it, and beyond the last as between the last two.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    // Rows rise, times do not fall.
    points: Vec<(f64, f64)>,
}

impl Curve {
    /// Through `points`, pairs of rows and time. One point alone is a time that depends on nothing.
    ///
    /// # Errors
    /// `InvalidArgument` naming `name` when there is none, rows do not rise, or a time is negative, falls, or is no number.
    pub fn new(name: &'static str, points: &[(f64, f64)]) -> Result<Self> {
        let refuse = |got: String, expected: &str| {
            Err(Error::InvalidArgument {
                name,
                got,
                expected: expected.into(),
            })
        };
        if points.is_empty() {
            return refuse("no points".into(), "at least one pair of rows and time");
        }
        let (mut rows, mut time) = (-1.0, 0.0);
        for &(r, t) in points {
            let point = format!("({r}, {t})");
            if !r.is_finite() || !t.is_finite() {
                return refuse(point, "finite numbers");
            }
            if r < 0.0 || r <= rows {
                return refuse(point, "rows of at least 0 that rise from point to point");
            }
            if t < time {
                return refuse(point, "times of at least 0 that never fall from point to point");
            }
            (rows, time) = (r, t);
        }
        Ok(Self { points: points.into() })
    }

    /// A time that depends on nothing.
    pub fn flat(time: f64) -> Self {
        Self {
            points: vec![(0.0, time)],
        }
    }

    /// Pairs of rows and time.
    pub fn points(&self) -> &[(f64, f64)] {
        &self.points
    }

    /// The time of `rows`.
    pub fn at(&self, rows: usize) -> f64 {
        let (points, rows) = (&self.points, (rows as f64).max(self.points[0].0));
        let Some(last) = points.len().checked_sub(2) else {
            return points[0].1;
        };
        let first = points.partition_point(|p| p.0 <= rows).saturating_sub(1).min(last);
        let ((r0, t0), (r1, t1)) = (points[first], points[first + 1]);
        t0 + (rows - r0) * (t1 - t0) / (r1 - r0)
    }

    /// `rows` took no more than `time`: a curve that says more was measured when the machine was busy. It only ever falls.
    fn lower(&mut self, rows: usize, time: f64) {
        let now = self.at(rows);
        if !(time > 0.0 && time < now) {
            return;
        }
        let scale = time / now;
        let first = self.points.partition_point(|p| p.0 <= rows as f64).saturating_sub(1);
        let first = first.min(self.points.len().saturating_sub(2));
        // The two points it lies between; one alone where it lies on that, or before all.
        let alone = rows as f64 <= self.points[first].0;
        for point in self.points.iter_mut().skip(first).take(if alone { 1 } else { 2 }) {
            point.1 *= scale;
        }
        let most = self.points[first].1;
        for point in &mut self.points[..first] {
            point.1 = point.1.min(most);
        }
    }
}

/// Where a step's time goes, in one unit of the caller's choice.
#[derive(Clone, Debug, PartialEq)]
pub struct StepCost {
    /// A target pass, over the tokens in it.
    pub target: Curve,
    /// A drafter pass and what follows from it, over the tokens of its blocks.
    pub draft: Curve,
}

impl StepCost {
    /// Only the number of passes counts: whole blocks are drafted and verified.
    pub fn passes() -> Self {
        Self {
            target: Curve::flat(1.0),
            draft: Curve::flat(0.0),
        }
    }
}

/// Passes over which the acceptance of a position is remembered, about.
const MEMORY: f64 = 200.0;
/// Passes that the assumption at the start is worth.
const PRIOR: f64 = 4.0;
/// A draft, given that all before it were accepted, before anything is known.
const ASSUMED: f64 = 0.7;
/// Every so many steps a whole block is drafted although a shorter one or none looked best.
const EXPLORE: u64 = 32;

/// Longer blocks than this are a mistake.
pub(crate) const MOST_BLOCK: usize = 4096;

/// How likely drafts are, position by position: learnt from passes, and slowly forgotten.
#[derive(Clone, Debug)]
pub(crate) struct Acceptance {
    // Passes that reached a position, and those that accepted it, fading.
    reached: Vec<f64>,
    accepted: Vec<f64>,
}

impl Acceptance {
    /// For `positions` drafts per block.
    pub(crate) fn new(positions: usize) -> Self {
        Self {
            reached: vec![0.0; positions],
            accepted: vec![0.0; positions],
        }
    }

    /// Chance that the draft at `position` (0 is the first) is accepted when all before it were.
    pub(crate) fn at(&self, position: usize) -> f64 {
        (self.accepted[position] + PRIOR * ASSUMED) / (self.reached[position] + PRIOR)
    }

    /// Books one request's pass: `drafted` drafts verified, `accepted` of them kept. What was not reached says nothing.
    ///
    /// # Errors
    /// `AcceptedExceedsDrafted`.
    pub(crate) fn record(&mut self, drafted: usize, accepted: usize) -> Result<()> {
        if accepted > drafted {
            return Err(Error::AcceptedExceedsDrafted {
                accepted: accepted as u32,
                drafted: drafted as u32,
            });
        }
        let fade = 1.0 - 1.0 / MEMORY;
        for position in 0..drafted.min(self.reached.len()).min(accepted + 1) {
            self.reached[position] = self.reached[position] * fade + 1.0;
            self.accepted[position] = self.accepted[position] * fade + f64::from(u8::from(position < accepted));
        }
        Ok(())
    }
}

/// Chooses block lengths from costs and from what was accepted so far.
#[derive(Clone, Debug)]
pub struct Planner {
    cost: StepCost,
    block: usize,
    acceptance: Acceptance,
    nodes: NodeRates,
    steps: u64,
    // Probabilities of the drafts in line, for `widths`.
    queue: Vec<(f32, u32)>,
}

impl Planner {
    /// For blocks of at most `block` tokens, the anchor counted.
    ///
    /// # Errors
    /// `InvalidArgument` for a block of none, or target passes that take no time.
    pub fn new(block: usize, cost: StepCost) -> Result<Self> {
        if cost.target.at(1) <= 0.0 {
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
            acceptance: Acceptance::new(block - 1),
            nodes: NodeRates::default(),
            steps: 0,
            queue: Vec::new(),
        })
    }

    /// The costs in use.
    pub fn cost(&self) -> &StepCost {
        &self.cost
    }

    /// Most tokens of a block, the anchor counted.
    pub fn block_size(&self) -> usize {
        self.block
    }

    /// Chance that the draft at `position` (0 is the first) is accepted when all before it were.
    pub fn acceptance(&self, position: usize) -> f64 {
        self.acceptance.at(position)
    }

    /// Books one request's pass: `drafted` drafts verified, `accepted` of them kept.
    ///
    /// # Errors
    /// `AcceptedExceedsDrafted`.
    pub fn record(&mut self, drafted: usize, accepted: usize) -> Result<()> {
        self.acceptance.record(drafted, accepted)
    }

    /// What a step took: a target pass over `target.0` rows, and, if it drafted, a drafter pass over `draft.0` rows with what
    /// follows from it. Costs that were measured on a busy machine come down to what is seen later; they never rise.
    pub fn observe(&mut self, target: (usize, f64), draft: (usize, f64)) {
        self.cost.target.lower(target.0, target.1);
        if draft.0 > 0 {
            self.cost.draft.lower(draft.0, draft.1);
        }
    }

    /// Block length for a step in which `requests` could draft and `others` tokens run beside them; 1 is a plain step.
    pub fn block(&mut self, requests: usize, others: usize) -> usize {
        self.steps += 1;
        if requests == 0 || self.block == 1 {
            return 1;
        }
        if self.steps.is_multiple_of(EXPLORE) {
            return self.block;
        }
        let StepCost { target, draft } = &self.cost;
        let (mut best, mut most) = (1, requests as f64 / target.at(requests + others));
        let (mut tokens, mut alive) = (1.0, 1.0);
        for block in 2..=self.block {
            alive *= self.acceptance(block - 2);
            tokens += alive;
            let rows = requests * block;
            let goodput = requests as f64 * tokens / (target.at(rows + others) + draft.at(rows));
            if goodput >= most {
                (best, most) = (block, goodput);
            }
        }
        // What is drafted can still be cut when the drafter turns out unsure, and the tail of a block costs little to draft.
        if best > 1 { (best + 1).min(self.block) } else { 1 }
    }

    /// How many of its drafts each request verifies. `probabilities` is `[n, width]`: the drafter's own, of the token it proposes;
    /// `others` tokens run beside them. The drafter's part of the step is spent already.
    ///
    /// # Errors
    /// `Length` when `probabilities` is not a whole number of rows, `InvalidArgument` for rows of none.
    pub fn widths(&mut self, probabilities: &[f32], width: usize, others: usize) -> Result<Vec<i32>> {
        if width == 0 {
            return Err(Error::InvalidArgument {
                name: "probabilities",
                got: "rows of no drafts".into(),
                expected: "at least one draft per request".into(),
            });
        }
        if !probabilities.len().is_multiple_of(width) {
            return Err(Error::Length {
                name: "probabilities",
                got: probabilities.len(),
                expected: probabilities.len().next_multiple_of(width),
            });
        }
        let requests = probabilities.len() / width;
        self.queue.clear();
        for (request, row) in probabilities.chunks_exact(width).enumerate() {
            let mut chance = 1.0;
            for &probability in row {
                // A probability that is no number is no reason to draft.
                chance *= if probability > 0.0 { probability.min(1.0) } else { 0.0 };
                self.queue.push((chance, request as u32));
            }
        }
        // Stable: among equals a request's earlier drafts come first, so every prefix of the queue is a set of prefixes.
        self.queue.sort_by(|a, b| b.0.total_cmp(&a.0));
        // Every prefix of the queue is looked at: where time rises in stairs, what does not pay now may pay further on.
        let drafting = self.cost.draft.at(requests * (width + 1));
        let goodput =
            |tokens: f64, drafts: usize| tokens / (self.cost.target.at(requests + others + drafts) + drafting);
        let mut tokens = requests as f64;
        let (mut admitted, mut most) = (0, goodput(tokens, 0));
        for (index, &(chance, _)) in self.queue.iter().enumerate() {
            tokens += f64::from(chance);
            let now = goodput(tokens, index + 1);
            if now >= most {
                (admitted, most) = (index + 1, now);
            }
        }
        let mut keep = vec![0; requests];
        for &(_, request) in &self.queue[..admitted] {
            keep[request as usize] += 1;
        }
        Ok(keep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(fixed: f64, row: f64) -> Curve {
        Curve::new("line", &[(0.0, fixed), (1.0, fixed + row)]).unwrap()
    }

    fn planner(row: f64) -> Planner {
        let cost = StepCost {
            target: line(1.0, row),
            draft: line(0.1, row / 3.0),
        };
        Planner::new(8, cost).unwrap()
    }

    /// Points of a curve from what is between them.
    fn rising(steps: &[(usize, f64)]) -> Vec<(f64, f64)> {
        let (mut rows, mut time) = (0, 0.5);
        let step = |&(more, slower): &(usize, f64)| {
            rows += more;
            time += slower;
            (rows as f64, time)
        };
        steps.iter().map(step).collect()
    }

    /// Expected tokens over time when request `r` verifies `keep[r]` drafts.
    fn goodput(planner: &Planner, p: &[f32], width: usize, others: usize, keep: &[usize]) -> f64 {
        let (mut tokens, mut rows) = (0.0, others);
        for (p, &keep) in p.chunks_exact(width).zip(keep) {
            let mut chance = 1.0;
            tokens += 1.0;
            for &x in &p[..keep] {
                chance *= f64::from(x);
                tokens += chance;
            }
            rows += 1 + keep;
        }
        let cost = planner.cost();
        tokens / (cost.target.at(rows) + cost.draft.at(keep.len() * (width + 1)))
    }

    /// Every way to keep prefixes, by hand.
    fn best_by_trying(planner: &Planner, p: &[f32], width: usize, others: usize) -> f64 {
        let requests = p.len() / width;
        (0..(width + 1).pow(requests as u32))
            .map(|choice| {
                let keep: Vec<usize> = (0..requests as u32)
                    .map(|r| choice / (width + 1).pow(r) % (width + 1))
                    .collect();
                goodput(planner, p, width, others, &keep)
            })
            .fold(f64::MIN, f64::max)
    }

    proptest! {
        #[test]
        fn the_widths_give_the_best_goodput_of_all_choices(
            p in prop::collection::vec(0.01f32..1.0, 9),
            steps in prop::collection::vec((1usize..5, 0.0f64..2.0), 1..6),
            others in 0usize..5,
        ) {
            // Any curve that does not fall: flat, lines, stairs.
            let (mut rows, mut time) = (0, 1.0);
            let points: Vec<(f64, f64)> = steps
                .iter()
                .map(|&(more, slower)| {
                    rows += more;
                    time += if slower < 0.7 { 0.0 } else { slower };
                    (rows as f64, time)
                })
                .collect();
            let target = Curve::new("target", &points).unwrap();
            let mut planner = Planner::new(8, StepCost { target, draft: line(0.1, 0.5) }).unwrap();
            let keep: Vec<usize> = planner.widths(&p, 3, others).unwrap().iter().map(|&k| k as usize).collect();
            let (got, best) = (goodput(&planner, &p, 3, others, &keep), best_by_trying(&planner, &p, 3, others));
            prop_assert!(got >= best * (1.0 - 1e-5), "{} against {}", got, best);
        }

        #[test]
        fn a_block_is_one_longer_than_the_one_with_the_best_goodput(
            steps in prop::collection::vec((1usize..9, 0.0f64..0.5), 1..6),
            (drafting, seen) in (0.0f64..0.4, prop::collection::vec(0usize..8, 0..40)),
            (requests, others) in (1usize..5, 0usize..9),
        ) {
            let cost = StepCost { target: Curve::new("target", &rising(&steps)).unwrap(), draft: line(0.1, drafting) };
            let mut planner = Planner::new(8, cost.clone()).unwrap();
            for accepted in seen {
                planner.record(7, accepted).unwrap();
            }
            let goodput = |block: usize| {
                let chance = |drafts: usize| (0..drafts).map(|at| planner.acceptance(at)).product::<f64>();
                let tokens = (0..block).map(chance).sum::<f64>() * requests as f64;
                let drafter = if block > 1 { cost.draft.at(requests * block) } else { 0.0 };
                tokens / (cost.target.at(requests * block + others) + drafter)
            };
            let most = (1..=8).map(goodput).fold(0.0, f64::max);
            let near = |block: usize| goodput(block) >= most * (1.0 - 1e-9);
            let block = planner.clone().block(requests, others);
            prop_assert!(if block == 1 { near(1) } else { near(block - 1) && block > 2 || block == 8 && near(8) }, "{}", block);
        }

        #[test]
        fn what_was_seen_lowers_a_curve_to_it_and_leaves_it_a_curve(
            steps in prop::collection::vec((1usize..9, 0.0f64..2.0), 1..8),
            seen in prop::collection::vec((0usize..70, 0.01f64..9.0), 1..20),
        ) {
            let points = rising(&steps);
            let mut curve = Curve::new("curve", &points).unwrap();
            let last = points[points.len() - 1].0 as usize;
            for &(rows, time) in &seen {
                let before: Vec<f64> = (0..80).map(|r| curve.at(r)).collect();
                curve.lower(rows, time);
                prop_assert!((curve.at(rows) - time.min(before[rows])).abs() < 1e-9);
                // Beyond the last point a curve goes on as before it, which may now be steeper.
                prop_assert!((0..=last).all(|r| curve.at(r) <= before[r] + 1e-9));
                // It would still be taken as a curve.
                prop_assert!(Curve::new("curve", &curve.points).is_ok(), "{:?}", curve);
            }
        }

        #[test]
        fn a_curve_passes_through_its_points_and_never_falls(
            steps in prop::collection::vec((1usize..9, 0.0f64..2.0), 2..8),
        ) {
            let points = rising(&steps);
            let curve = Curve::new("curve", &points).unwrap();
            for &(rows, time) in &points {
                prop_assert!((curve.at(rows as usize) - time).abs() < 1e-9);
            }
            for rows in 0..100 {
                prop_assert!(curve.at(rows + 1) >= curve.at(rows) - 1e-9);
            }
        }
    }

    #[test]
    fn where_rows_are_free_everything_is_verified() {
        let mut planner = Planner::new(8, StepCost::passes()).unwrap();
        assert_eq!(planner.block(5, 100), 8);
        assert_eq!(planner.widths(&[0.0; 14], 7, 3).unwrap(), [7, 7]);
    }

    #[test]
    fn where_rows_are_dear_nothing_is_drafted() {
        let mut planner = planner(2.0);
        assert_eq!(planner.block(16, 0), 1);
        assert_eq!(planner.widths(&[0.3, 0.9, 0.2, 0.9], 2, 0).unwrap(), [0, 0]);
    }

    #[test]
    fn a_drafter_that_is_never_right_is_left_alone_but_for_a_look_now_and_then() {
        let mut planner = planner(0.05);
        for _ in 0..100 {
            planner.record(7, 0).unwrap();
        }
        let blocks: Vec<usize> = (0..2 * EXPLORE).map(|_| planner.block(1, 0)).collect();
        assert_eq!(blocks.iter().filter(|&&b| b == 8).count(), 2);
        assert_eq!(blocks.iter().filter(|&&b| b == 1).count(), blocks.len() - 2);
    }

    #[test]
    fn a_drafter_that_is_always_right_drafts_whole_blocks() {
        let mut planner = planner(0.05);
        for _ in 0..100 {
            planner.record(7, 7).unwrap();
        }
        assert_eq!(planner.block(1, 0), 8);
    }

    #[test]
    fn a_curve_tells_its_points_and_a_time_of_nothing_does_not_lower_it() {
        let points = [(1.0, 2.0), (4.0, 3.0)];
        let mut curve = Curve::new("curve", &points).unwrap();
        for time in [0.0, -1.0, f64::NAN, 9.0] {
            curve.lower(2, time);
            assert_eq!(curve.points(), points);
        }
    }

    #[test]
    fn times_that_were_seen_lower_the_costs_and_a_step_without_drafts_only_the_targets() {
        let mut planner = planner(0.5);
        assert_eq!(planner.block_size(), 8);
        let before = planner.cost().clone();
        planner.observe((4, 0.5), (0, 0.01));
        assert!((planner.cost().target.at(4) - 0.5).abs() < 1e-9 && before.target.at(4) > 1.0);
        assert_eq!(planner.cost().draft, before.draft);
        planner.observe((4, 0.5), (1, 0.02));
        assert!((planner.cost().draft.at(1) - 0.02).abs() < 1e-9 && before.draft.at(1) > 0.1);
    }

    #[test]
    fn a_step_in_which_nobody_can_draft_is_a_plain_one() {
        let mut planner = Planner::new(8, StepCost::passes()).unwrap();
        for _ in 0..2 * EXPLORE {
            assert_eq!(planner.block(0, 3), 1);
        }
    }

    #[test]
    fn probabilities_that_are_no_rows_are_refused_with_the_length_that_fits() {
        let mut planner = planner(0.5);
        let name = "probabilities";
        let (got, expected) = (3, 4);
        let refused = planner.widths(&[0.5; 3], 2, 0).unwrap_err();
        assert_eq!(refused, Error::Length { name, got, expected });
        for rows in [&[] as &[f32], &[0.5; 2]] {
            let refused = planner.widths(rows, 0, 0).unwrap_err();
            assert!(matches!(
                refused,
                Error::InvalidArgument {
                    name: "probabilities",
                    ..
                }
            ));
        }
    }

    #[test]
    fn a_probability_that_is_no_number_is_not_verified() {
        assert_eq!(planner(0.05).widths(&[f32::NAN, 1.0], 2, 0).unwrap(), [0]);
    }

    #[test]
    fn what_costs_nothing_until_a_step_is_filled_up() {
        let target = Curve::new("target", &[(4.0, 1.0), (5.0, 10.0), (6.0, 10.0)]).unwrap();
        let cost = StepCost {
            target,
            draft: Curve::flat(0.0),
        };
        // Four rows cost what one does, the fifth ten times as much.
        assert_eq!(Planner::new(8, cost).unwrap().widths(&[0.1; 7], 7, 0).unwrap(), [3]);
    }

    #[test]
    fn curves_that_are_no_times_are_refused_by_name() {
        let refused: [(&[(f64, f64)], &str); 6] = [
            (&[], "draft: got no points"),
            (&[(0.0, -1.0)], "draft: got (0, -1), expected times of at least 0"),
            (&[(0.0, 2.0), (1.0, 1.0)], "draft: got (1, 1), expected times"),
            (&[(1.0, 1.0), (1.0, 2.0)], "draft: got (1, 2), expected rows"),
            (&[(-1.0, 1.0)], "draft: got (-1, 1), expected rows"),
            (&[(0.0, f64::NAN)], "draft: got (0, NaN), expected finite"),
        ];
        for (points, message) in refused {
            let error = Curve::new("draft", points).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        let free = StepCost {
            target: Curve::flat(0.0),
            draft: Curve::flat(0.0),
        };
        assert!(
            Planner::new(4, free)
                .unwrap_err()
                .to_string()
                .starts_with("target: got")
        );
        assert!(Planner::new(0, StepCost::passes()).is_err());
    }
}
