//! Acceptance counters: per request, and in total by merging.

use crate::error::{Error, Result};

/// What speculation achieved over some target passes. Merging is commutative and associative.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    passes: u64,
    committed: u64,
    // [a]: passes that accepted exactly a drafts, plain passes among them at a = 0.
    accepted_histogram: Vec<u64>,
    // [d]: passes that drafted exactly d positions.
    drafted_histogram: Vec<u64>,
    verified: u64,
}

impl Stats {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Books one target pass over one decode row: `drafted` drafts verified (0 for a plain step), `accepted` of them kept,
    /// `committed` tokens given to the request (accepted + 1, fewer when a stop cut the block).
    pub fn record(&mut self, drafted: u32, accepted: u32, committed: u32) -> Result<()> {
        self.record_tree(drafted, drafted, accepted, committed)
    }

    /// The same for a tree of `verified` drafts that is `drafted` positions deep; in a chain the two are one number.
    pub fn record_tree(&mut self, verified: u32, drafted: u32, accepted: u32, committed: u32) -> Result<()> {
        if accepted > drafted {
            return Err(Error::AcceptedExceedsDrafted { accepted, drafted });
        }
        if drafted > verified {
            return Err(Error::InvalidArgument {
                name: "drafted",
                got: drafted.to_string(),
                expected: format!("at most the {verified} drafts verified"),
            });
        }
        if committed > accepted + 1 {
            return Err(Error::InvalidArgument {
                name: "committed",
                got: committed.to_string(),
                expected: format!("at most the {accepted} accepted drafts and the bonus token"),
            });
        }
        self.passes += 1;
        self.committed += u64::from(committed);
        bump(&mut self.accepted_histogram, accepted as usize, 1);
        bump(&mut self.drafted_histogram, drafted as usize, 1);
        self.verified += u64::from(verified);
        Ok(())
    }

    /// Adds another request's counters.
    pub fn merge(&mut self, other: &Self) {
        self.passes += other.passes;
        self.committed += other.committed;
        self.verified += other.verified;
        for (a, &n) in other.accepted_histogram.iter().enumerate() {
            bump(&mut self.accepted_histogram, a, n);
        }
        for (d, &n) in other.drafted_histogram.iter().enumerate() {
            bump(&mut self.drafted_histogram, d, n);
        }
    }

    /// Target passes.
    pub fn passes(&self) -> u64 {
        self.passes
    }

    /// Target passes that had drafts to verify.
    pub fn drafting_passes(&self) -> u64 {
        above(&self.drafted_histogram, 0)
    }

    /// Tokens committed.
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Positions drafted: every draft of a chain, the depth of a tree.
    pub fn drafted(&self) -> u64 {
        weighted(&self.drafted_histogram)
    }

    /// Drafts verified.
    pub fn verified(&self) -> u64 {
        self.verified
    }

    /// Drafts accepted.
    pub fn accepted(&self) -> u64 {
        weighted(&self.accepted_histogram)
    }

    /// Tokens committed per target pass, bonus included; `None` before the first pass.
    pub fn tau(&self) -> Option<f64> {
        (self.passes > 0).then(|| self.committed as f64 / self.passes as f64)
    }

    /// Accepted drafts of those verified; `None` before the first draft.
    pub fn acceptance_rate(&self) -> Option<f64> {
        (self.verified > 0).then(|| self.accepted() as f64 / self.verified as f64)
    }

    /// `[a]` = passes that accepted exactly `a` drafts.
    pub fn histogram(&self) -> &[u64] {
        &self.accepted_histogram
    }

    /// `[i]` = share of the passes that drafted position `i` in which a draft for it was accepted, all before it included.
    /// Falls with `i` when every pass drafts the same number of positions.
    pub fn acceptance_per_position(&self) -> Vec<f64> {
        let positions = self.drafted_histogram.len().saturating_sub(1);
        (0..positions)
            .map(|i| above(&self.accepted_histogram, i) as f64 / above(&self.drafted_histogram, i) as f64)
            .collect()
    }
}

fn bump(histogram: &mut Vec<u64>, at: usize, by: u64) {
    if histogram.len() <= at {
        histogram.resize(at + 1, 0);
    }
    histogram[at] += by;
}

fn weighted(histogram: &[u64]) -> u64 {
    histogram.iter().enumerate().map(|(value, &n)| value as u64 * n).sum()
}

// Passes whose value exceeds `i`.
fn above(histogram: &[u64], i: usize) -> u64 {
    histogram.iter().skip(i + 1).sum()
}
