//! What was admitted in a step, until it is known what became of it.

use super::Pass;
use super::chances::Exponent;

/// What was admitted in a step, until it is recorded.
#[derive(Clone, Debug)]
pub(super) struct Admitted {
    pub step: u64,
    pub requests: Vec<u64>,
    pub depth: usize,
    /// `[n, depth]` of the likeliest candidates; tokens only where they are known, and nothing is learnt of those from texts.
    pub probabilities: Vec<f32>,
    pub tokens: Vec<i64>,
    pub from_text: Vec<bool>,
    /// `[n]` drafts that were offered, and how many of those that are verified are expected to be accepted.
    pub offered: Vec<usize>,
    pub promised: Vec<f64>,
    /// `[n, width]`; empty for chains.
    pub parents: Vec<i32>,
    pub width: usize,
    /// Records come in the order of the requests: where the last one was found.
    pub at: usize,
}

impl Admitted {
    /// The row of a request. Every request is found once.
    pub fn find(&mut self, request: u64) -> Option<usize> {
        let further = self.requests[self.at..].iter().position(|&other| other == request)?;
        self.at += further + 1;
        Some(self.at - 1)
    }

    /// Of how many positions of a pass it is known whether the drafter was right, and at how many it was. Those that were verified; and of a chain
    /// the first that was not, where all before it were right: the target's next token tells.
    pub fn known(&self, row: usize, pass: &Pass<'_>) -> (usize, usize) {
        let (place, right) = (pass.verified, pass.path.len());
        let open = self.parents.is_empty() && right == place && place < self.offered[row];
        match (self.tokens.get(row * self.depth + place), pass.next) {
            (Some(&draft), Some(next)) if open => (place + 1, right + usize::from(draft == next)),
            _ => (pass.depth, right),
        }
    }

    /// Tells what became of the likeliest candidates that a pass reached.
    pub fn tell(&self, row: usize, pass: &Pass<'_>, exponent: &mut Exponent) {
        let probabilities = &self.probabilities[row * self.depth..][..self.depth];
        if self.parents.is_empty() {
            let (seen, right) = self.known(row, pass);
            return tell_chain(probabilities, seen, right, exponent);
        }
        let parents = &self.parents[row * self.width..][..self.width];
        let mut node = 0;
        for (depth, &probability) in probabilities.iter().enumerate().take(pass.path.len() + 1) {
            // The likeliest child is admitted before its rivals.
            if let Some(likeliest) = parents.iter().position(|&parent| parent == node) {
                exponent.record(probability, pass.path.get(depth) == Some(&(likeliest - 1)));
            }
            node = pass.path.get(depth).map_or(0, |&draft| draft as i32 + 1);
        }
    }
}

/// Tells what became of a chain's drafts that were reached.
pub(super) fn tell_chain(probabilities: &[f32], drafted: usize, accepted: usize, exponent: &mut Exponent) {
    for (at, &probability) in probabilities.iter().enumerate().take(drafted.min(accepted + 1)) {
        exponent.record(probability, at < accepted);
    }
}
