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
//! Step times are a line: `fixed + row * rows`, and for the drafter `draft_fixed + draft_row * rows`, in any one unit. The chance
//! of a draft is the product of the drafter's probabilities along its path; how the drafter errs is learnt per position.

use crate::error::{Error, Result};

/// Where a step's time goes, in one unit of the caller's choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepCost {
    /// A target pass, whatever it holds.
    pub fixed: f64,
    /// Each token in it.
    pub row: f64,
    /// A drafter pass.
    pub draft_fixed: f64,
    /// Each token of its blocks.
    pub draft_row: f64,
}

impl StepCost {
    /// Only the number of passes counts: whole blocks are drafted and verified.
    pub const PASSES: Self = Self {
        fixed: 1.0,
        row: 0.0,
        draft_fixed: 0.0,
        draft_row: 0.0,
    };

    fn check(&self) -> Result<()> {
        let fields = [
            ("fixed", self.fixed),
            ("row", self.row),
            ("draft_fixed", self.draft_fixed),
            ("draft_row", self.draft_row),
        ];
        for (name, value) in fields {
            if !value.is_finite() || value < 0.0 || (name == "fixed" && value == 0.0) {
                return Err(Error::InvalidArgument {
                    name,
                    got: value.to_string(),
                    expected: "a time: finite, not negative, and for fixed positive".into(),
                });
            }
        }
        Ok(())
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
const MOST_BLOCK: usize = 4096;

/// Chooses block lengths from costs and from what was accepted so far.
#[derive(Clone, Debug)]
pub struct Planner {
    cost: StepCost,
    block: usize,
    // Per draft position: passes that reached it, and those that accepted it, fading.
    reached: Vec<f64>,
    accepted: Vec<f64>,
    steps: u64,
    // Probabilities of the drafts in line, for `widths`.
    queue: Vec<(f32, u32)>,
}

impl Planner {
    /// For blocks of at most `block` tokens, the anchor counted.
    ///
    /// # Errors
    /// `InvalidArgument` for a block of none or a cost that is no time.
    pub fn new(block: usize, cost: StepCost) -> Result<Self> {
        cost.check()?;
        if !(1..=MOST_BLOCK).contains(&block) {
            return Err(Error::InvalidArgument {
                name: "block_size",
                got: block.to_string(),
                expected: format!("1 to {MOST_BLOCK}"),
            });
        }
        Ok(Self {
            cost,
            block,
            reached: vec![0.0; block - 1],
            accepted: vec![0.0; block - 1],
            steps: 0,
            queue: Vec::new(),
        })
    }

    /// The costs in use.
    pub fn cost(&self) -> StepCost {
        self.cost
    }

    /// Most tokens of a block, the anchor counted.
    pub fn block_size(&self) -> usize {
        self.block
    }

    /// Chance that the draft at `position` (0 is the first) is accepted when all before it were.
    pub fn acceptance(&self, position: usize) -> f64 {
        (self.accepted[position] + PRIOR * ASSUMED) / (self.reached[position] + PRIOR)
    }

    /// Books one request's pass: `drafted` drafts verified, `accepted` of them kept.
    ///
    /// # Errors
    /// `AcceptedExceedsDrafted`.
    pub fn record(&mut self, drafted: usize, accepted: usize) -> Result<()> {
        if accepted > drafted {
            return Err(Error::AcceptedExceedsDrafted {
                accepted: accepted as u32,
                drafted: drafted as u32,
            });
        }
        let fade = 1.0 - 1.0 / MEMORY;
        for position in 0..drafted.min(self.block - 1).min(accepted + 1) {
            self.reached[position] = self.reached[position] * fade + 1.0;
            self.accepted[position] = self.accepted[position] * fade + f64::from(u8::from(position < accepted));
        }
        Ok(())
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
        let StepCost {
            fixed,
            row,
            draft_fixed,
            draft_row,
        } = self.cost;
        let (requests, others) = (requests as f64, others as f64);
        let (mut best, mut most) = (1, requests / (fixed + row * (requests + others)));
        let (mut tokens, mut alive) = (1.0, 1.0);
        for block in 2..=self.block {
            alive *= self.acceptance(block - 2);
            tokens += alive;
            let rows = requests * block as f64;
            let time = fixed + row * (rows + others) + draft_fixed + draft_row * rows;
            let goodput = requests * tokens / time;
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
    /// `Length` when `probabilities` is not a whole number of rows.
    pub fn widths(&mut self, probabilities: &[f32], width: usize, others: usize) -> Result<Vec<i32>> {
        if width == 0 || !probabilities.len().is_multiple_of(width) {
            return Err(Error::Length {
                name: "probabilities",
                got: probabilities.len(),
                expected: probabilities.len().next_multiple_of(width.max(1)),
            });
        }
        let requests = probabilities.len() / width;
        let StepCost { fixed, row, .. } = self.cost;
        if row == 0.0 {
            return Ok(vec![width as i32; requests]);
        }
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
        let mut time = fixed + row * (requests + others) as f64 + self.drafting(requests, width);
        let mut tokens = requests as f64;
        let mut keep = vec![0; requests];
        for &(chance, request) in &self.queue {
            // The queue falls and the time rises in a straight line: once it does not pay it never does.
            if (tokens + f64::from(chance)) * time < tokens * (time + row) {
                break;
            }
            tokens += f64::from(chance);
            time += row;
            keep[request as usize] += 1;
        }
        Ok(keep)
    }

    fn drafting(&self, requests: usize, width: usize) -> f64 {
        self.cost.draft_fixed + self.cost.draft_row * (requests * (width + 1)) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn planner(row: f64) -> Planner {
        let cost = StepCost {
            fixed: 1.0,
            row,
            draft_fixed: 0.1,
            draft_row: row / 3.0,
        };
        Planner::new(8, cost).unwrap()
    }

    /// Every way to keep prefixes, by hand.
    fn best_by_trying(planner: &Planner, p: &[f32], width: usize, others: usize) -> f64 {
        let requests = p.len() / width;
        let mut best = f64::MIN;
        for choice in 0..(width + 1).pow(requests as u32) {
            let (mut rest, mut tokens, mut rows) = (choice, 0.0, others);
            for request in 0..requests {
                let keep = rest % (width + 1);
                rest /= width + 1;
                let mut chance = 1.0;
                tokens += 1.0;
                for &x in &p[request * width..request * width + keep] {
                    chance *= f64::from(x);
                    tokens += chance;
                }
                rows += 1 + keep;
            }
            let cost = planner.cost;
            let time = cost.fixed + cost.row * rows as f64 + planner.drafting(requests, width);
            best = best.max(tokens / time);
        }
        best
    }

    proptest! {
        #[test]
        fn the_widths_give_the_best_goodput_of_all_choices(
            p in prop::collection::vec(0.01f32..1.0, 9), row in 0.001f64..0.6, others in 0usize..5,
        ) {
            let mut planner = planner(row);
            let keep = planner.widths(&p, 3, others).unwrap();
            let (mut tokens, mut rows) = (0.0, others);
            for (request, &keep) in keep.iter().enumerate() {
                let mut chance = 1.0;
                tokens += 1.0;
                for &x in &p[request * 3..request * 3 + keep as usize] {
                    chance *= f64::from(x);
                    tokens += chance;
                }
                rows += 1 + keep as usize;
            }
            let time = planner.cost.fixed + row * rows as f64 + planner.drafting(3, 3);
            let best = best_by_trying(&planner, &p, 3, others);
            prop_assert!(tokens / time >= best * (1.0 - 1e-5), "{} against {best}", tokens / time);
        }
    }

    #[test]
    fn where_rows_are_free_everything_is_verified() {
        let mut planner = Planner::new(8, StepCost::PASSES).unwrap();
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
    fn a_probability_that_is_no_number_is_not_verified() {
        assert_eq!(planner(0.05).widths(&[f32::NAN, 1.0], 2, 0).unwrap(), [0]);
    }

    #[test]
    fn costs_that_are_no_times_are_refused_by_name() {
        let cost = StepCost {
            row: -1.0,
            ..StepCost::PASSES
        };
        assert!(
            Planner::new(4, cost)
                .unwrap_err()
                .to_string()
                .starts_with("row: got -1")
        );
        assert!(Planner::new(0, StepCost::PASSES).is_err());
    }
}
