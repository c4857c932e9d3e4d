//! A launched step: its layout, the drafts that are filled in, and the right to resolve it.

use std::sync::Arc;

use super::values::{PlanArrays, Shared};
use crate::draft::{DraftTree, NO_NODE};
use crate::error::{Error, Result, indices};
use crate::types::TokenId;

/// The right to resolve a step. Dropping it calls the step off, unless that has been resolved.
#[derive(Debug)]
pub(super) struct Ticket {
    step: u64,
    shared: Arc<Shared>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.shared.drop_step(self.step);
    }
}

/// Sizes of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outline {
    /// Rows.
    pub rows: usize,
    /// Tokens of all rows.
    pub tokens: usize,
    /// Tokens whose logits are needed.
    pub logits: usize,
    /// Rows with drafts.
    pub drafting: usize,
    /// Tokens of the longest row.
    pub longest: usize,
    /// Tokens of the longest row with drafts; 0 without.
    pub longest_drafting: usize,
    /// Whether any row is a chunk of prompt.
    pub prompts: bool,
}

/// A launched step. Dropping it before its commit calls the step off; its requests go on from where they were.
#[derive(Debug)]
pub struct StepPlan {
    step: u64,
    vocab_size: usize,
    arrays: PlanArrays,
    drafts: bool,
    ticket: Option<Ticket>,
    shared: Arc<Shared>,
}

impl StepPlan {
    pub(super) fn new(step: u64, vocab_size: usize, arrays: PlanArrays, drafts: bool, shared: &Arc<Shared>) -> Self {
        let ticket = Some(Ticket {
            step,
            shared: Arc::clone(shared),
        });
        Self {
            step,
            vocab_size,
            arrays,
            drafts,
            ticket,
            shared: Arc::clone(shared),
        }
    }

    /// Number of the step.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Its layout.
    pub fn arrays(&self) -> &PlanArrays {
        &self.arrays
    }

    /// Whether any of its requests drafts at all, now or in a later step: then what it keeps needs draft KV.
    pub fn drafts(&self) -> bool {
        self.drafts
    }

    /// Its sizes at a glance.
    pub fn outline(&self) -> Outline {
        let arrays = &self.arrays;
        let lens = || arrays.block_len.iter().map(|&len| len as usize);
        let drafting = arrays
            .draft_rows
            .iter()
            .map(|&row| arrays.block_len[row as usize] as usize);
        Outline {
            rows: arrays.row_ids.len(),
            tokens: arrays.token_ids.len(),
            logits: arrays.logit_rows.len(),
            drafting: arrays.draft_rows.len(),
            longest: lens().max().unwrap_or(0),
            longest_drafting: drafting.max().unwrap_or(0),
            prompts: arrays.is_prefill.contains(&true),
        }
    }

    pub(super) fn arrays_mut(&mut self) -> &mut PlanArrays {
        &mut self.arrays
    }

    /// Fills in the drafts. `drafts` is `[n, width]`, row-major, one row per entry of `draft_rows`; a row's first
    /// `block_len - 1` columns are verified.
    ///
    /// # Errors
    /// `Length` for a wrong number of rows, `InvalidArgument` when there are too few columns or a draft is not a token;
    /// no draft is set then.
    pub fn set_drafts(&mut self, drafts: &[i64], width: usize) -> Result<()> {
        let rows = self.arrays.draft_rows.len();
        if drafts.len() != rows * width {
            return Err(Error::Length {
                name: "drafts",
                got: drafts.len(),
                expected: rows * width,
            });
        }
        self.place_drafts(drafts, width, |at, _| at)
    }

    /// Fills in the drafts as a device has them: `drafts` is `[>= R, width]`, one row per row of the step.
    ///
    /// # Errors
    /// As [`Self::set_drafts`].
    pub(super) fn set_drafts_by_row(&mut self, drafts: &[i64], width: usize) -> Result<()> {
        let needed = self
            .arrays
            .draft_rows
            .last()
            .map_or(0, |&row| (row as usize + 1) * width);
        if drafts.len() < needed {
            return Err(Error::Length {
                name: "drafts",
                got: drafts.len(),
                expected: needed,
            });
        }
        self.place_drafts(drafts, width, |_, row| row)
    }

    /// `place(i, row)` is the row of `drafts` for row `row` of the step, the `i`-th that drafts.
    fn place_drafts(&mut self, drafts: &[i64], width: usize, place: impl Fn(usize, usize) -> usize) -> Result<()> {
        self.still_chains()?;
        let arrays = &mut self.arrays;
        let needed = |row: i32| arrays.block_len[row as usize] as usize - 1;
        let most = arrays.draft_rows.iter().map(|&row| needed(row)).max().unwrap_or(0);
        if width < most {
            let expected = format!("at least {most}, the longest block less its anchor");
            return Err(Error::InvalidArgument {
                name: "drafts",
                got: format!("{width} columns"),
                expected,
            });
        }
        let of = |at: usize, row: i32| {
            let first = place(at, row as usize) * width;
            &drafts[first..first + needed(row)]
        };
        for (at, &row) in arrays.draft_rows.iter().enumerate() {
            let bad = of(at, row)
                .iter()
                .find(|&&draft| draft < 0 || draft >= self.vocab_size as i64);
            if let Some(bad) = bad {
                return Err(Error::InvalidArgument {
                    name: "drafts",
                    got: format!("token {bad} for request {}", arrays.request_ids[row as usize]),
                    expected: format!("tokens in {}", indices(self.vocab_size)),
                });
            }
        }
        for (at, &row) in arrays.draft_rows.iter().enumerate() {
            let drafts = of(at, row);
            let first = arrays.query_starts[row as usize] as usize + 1;
            arrays.token_ids[first..first + drafts.len()].copy_from_slice(drafts);
        }
        Ok(())
    }

    /// Verifies fewer tokens: the first `widths[i]` of row `draft_rows[i]`, the anchor counted. The layout closes up; what the row reserved and
    /// does not use is given back at commit. May be called again, with less.
    ///
    /// # Errors
    /// `Length` for a wrong number of rows, `InvalidArgument` for less than the anchor or more than there is; nothing changes then.
    pub fn narrow(&mut self, widths: &[i32]) -> Result<()> {
        self.still_chains()?;
        let arrays = &mut self.arrays;
        if widths.len() != arrays.draft_rows.len() {
            return Err(Error::Length {
                name: "widths",
                got: widths.len(),
                expected: arrays.draft_rows.len(),
            });
        }
        for (&row, &width) in arrays.draft_rows.iter().zip(widths) {
            let most = arrays.block_len[row as usize];
            if !(1..=most).contains(&width) {
                return Err(Error::InvalidArgument {
                    name: "widths",
                    got: format!("{width} for request {}", arrays.request_ids[row as usize]),
                    expected: format!("1..{most}, the tokens of its row"),
                });
            }
        }
        // Everything moves forward or stays, so one pass in order suffices.
        let (mut at, mut logit, mut draft) = (0, 0, 0);
        for row in 0..arrays.row_ids.len() {
            let from = arrays.query_starts[row] as usize;
            let mut len = arrays.block_len[row] as usize;
            let logits = arrays.logit_starts[row] as usize..arrays.logit_starts[row + 1] as usize;
            let mut kept_logits = logits.len();
            if draft < widths.len() && arrays.draft_rows[draft] as usize == row {
                len = widths[draft] as usize;
                kept_logits = len;
                draft += 1;
            }
            for i in 0..kept_logits {
                let moved = arrays.logit_rows[logits.start + i] as usize - from + at;
                arrays.logit_rows[logit + i] = moved as i32;
            }
            arrays.token_ids.copy_within(from..from + len, at);
            arrays.positions.copy_within(from..from + len, at);
            arrays.slots.copy_within(from..from + len, at);
            arrays.block_len[row] = len as i32;
            arrays.query_starts[row] = at as i32;
            arrays.logit_starts[row] = logit as i32;
            at += len;
            logit += kept_logits;
        }
        let rows = arrays.row_ids.len();
        arrays.query_starts[rows] = at as i32;
        arrays.logit_starts[rows] = logit as i32;
        for tokens in [&mut arrays.token_ids, &mut arrays.positions, &mut arrays.slots] {
            tokens.truncate(at);
        }
        arrays.logit_rows.truncate(logit);
        let PlanArrays {
            draft_rows, block_len, ..
        } = arrays;
        draft_rows.retain(|&row| block_len[row as usize] > 1);
        Ok(())
    }

    fn still_chains(&self) -> Result<()> {
        if self.arrays.parents.is_empty() {
            return Ok(());
        }
        let problem = "its drafts are trees already".into();
        Err(Error::OutOfTurn {
            step: self.step,
            problem,
        })
    }

    /// Drafts trees: `trees[i]` for row `draft_rows[i]`, its anchor included, with at most as many nodes as the row has tokens. The layout
    /// closes up as in [`Self::narrow`]; a token's position is that of its depth, its KV is written to the slot of its index.
    ///
    /// # Errors
    /// `OutOfTurn` for drafts that are trees already, and in a step whose rows start where only the device knows; `Length` for a wrong
    /// number of trees; `InvalidArgument` for one that is too large, has another anchor or tokens outside the vocabulary. Nothing
    /// changes then.
    pub fn set_trees(&mut self, trees: &[DraftTree]) -> Result<()> {
        let arrays = &self.arrays;
        if trees.len() != arrays.draft_rows.len() {
            return Err(Error::Length {
                name: "trees",
                got: trees.len(),
                expected: arrays.draft_rows.len(),
            });
        }
        let rows: Vec<usize> = arrays.draft_rows.iter().map(|&row| row as usize).collect();
        for (tree, &row) in trees.iter().zip(&rows) {
            if !arrays.start_known[row] {
                let problem = "trees need a step that knows where its rows start".into();
                return Err(Error::OutOfTurn {
                    step: self.step,
                    problem,
                });
            }
            let request = arrays.request_ids[row];
            let bad = |name, got: String, expected: String| Err(Error::InvalidArgument { name, got, expected });
            let room = arrays.block_len[row] as usize;
            if tree.len() > room {
                let got = format!("{} nodes for request {request}", tree.len());
                return bad("trees", got, format!("at most {room}, its anchor included"));
            }
            let (anchor, expected) = (tree.tokens()[0], arrays.token_ids[arrays.query_starts[row] as usize]);
            if i64::from(anchor.0) != expected {
                let got = format!("anchor {} for request {request}", anchor.0);
                return bad("trees", got, format!("its last token {expected}"));
            }
            if let Some(token) = tree.tokens().iter().find(|token| token.0 as usize >= self.vocab_size) {
                let got = format!("token {} for request {request}", token.0);
                return bad("trees", got, format!("tokens in {}", indices(self.vocab_size)));
            }
        }
        let widths: Vec<i32> = trees.iter().map(|tree| tree.len() as i32).collect();
        self.narrow(&widths)?;
        let arrays = &mut self.arrays;
        // Whatever is not a tree is a chain: prompts, plain rows.
        let longest = arrays.block_len.iter().max().map_or(0, |&len| len as usize);
        let words = longest.div_ceil(64);
        arrays.ancestors.resize(arrays.token_ids.len() * words, 0);
        let mut drawn = rows.iter().zip(trees).peekable();
        for row in 0..arrays.row_ids.len() {
            let first = arrays.query_starts[row] as usize;
            let len = arrays.block_len[row] as usize;
            let tree = drawn.next_if(|(at, _)| **at == row).map(|(_, tree)| tree);
            for node in 0..len {
                let parent = tree.map_or(node as i32 - 1, |tree| match tree.parents()[node] {
                    NO_NODE => -1,
                    parent => parent as i32,
                });
                arrays.parents.push(parent);
                let at = (first + node) * words;
                if parent >= 0 {
                    let from = (first + parent as usize) * words;
                    arrays.ancestors.copy_within(from..from + words, at);
                }
                arrays.ancestors[at + node / 64] |= 1 << (node % 64);
                if let Some(tree) = tree {
                    arrays.token_ids[first + node] = i64::from(tree.tokens()[node].0);
                    arrays.positions[first + node] = arrays.positions[first] + i64::from(tree.depths()[node]);
                }
            }
        }
        Ok(())
    }

    /// The tree of a row; `None` while drafts are chains.
    pub(super) fn tree_of(&self, row: usize) -> Result<Option<DraftTree>> {
        let arrays = &self.arrays;
        if arrays.parents.is_empty() {
            return Ok(None);
        }
        let nodes = arrays.query_starts[row] as usize..arrays.query_starts[row + 1] as usize;
        let tokens: Vec<TokenId> = arrays.token_ids[nodes.clone()]
            .iter()
            .map(|&token| TokenId(token as u32))
            .collect();
        let parents: Vec<u32> = arrays.parents[nodes].iter().map(|&parent| parent as u32).collect();
        DraftTree::from_parents(&tokens, &parents).map(Some)
    }

    /// Positions that a row drafts: the length of its chain, the depth of its tree.
    pub fn drafted(&self, row: usize) -> u32 {
        let arrays = &self.arrays;
        let nodes = arrays.query_starts[row] as usize..arrays.query_starts[row + 1] as usize;
        if arrays.parents.is_empty() {
            return nodes.len() as u32 - 1;
        }
        let positions = &arrays.positions[nodes];
        positions.iter().max().map_or(0, |last| (last - positions[0]) as u32)
    }

    /// Whether the step has been neither committed nor called off.
    pub fn is_open(&self) -> bool {
        self.ticket.is_some()
    }

    pub(super) fn redeem(&mut self) -> Option<Ticket> {
        self.ticket.take()
    }

    /// The drafts of a row.
    pub(super) fn drafts_of(&self, row: usize, into: &mut Vec<TokenId>) -> Result<()> {
        into.clear();
        let first = self.arrays.query_starts[row] as usize;
        let end = self.arrays.query_starts[row + 1] as usize;
        for &draft in &self.arrays.token_ids[first + 1..end] {
            if draft < 0 || draft >= self.vocab_size as i64 {
                let problem = "drafts are missing: call set_drafts before accepting".into();
                return Err(Error::OutOfTurn {
                    step: self.step,
                    problem,
                });
            }
            into.push(TokenId(draft as u32));
        }
        Ok(())
    }
}

impl Drop for StepPlan {
    fn drop(&mut self) {
        self.shared.return_plan(std::mem::take(&mut self.arrays));
    }
}
