//! Trees: how many drafts to verify when a place may have several, and which.
//!
//! Drafts are taken best first, so what a smaller tree would have verified is always the front of what a larger one did.

use super::chances::chances;
use super::{Batch, Decision, Expected, Judge, Merit, Offers, StepCost, worth};
use crate::draft::{BestFirst, Place};

/// The trees of a step, padded to the largest: parents come before children.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PlannedTrees {
    /// Columns: the width of the largest tree, its anchor counted.
    pub width: usize,
    /// `[n, width]`, the anchor first.
    pub tokens: Vec<i64>,
    /// `[n, width]` parent of each node; -1 for the anchor and behind the last node.
    pub parents: Vec<i32>,
    /// `[n]` nodes, the anchor counted.
    pub widths: Vec<i32>,
}

/// The number of drafts and the block length with which a step is best; a plain step where none pays. A step that explores drafts about twice
/// as many out of a whole block, to see what they would gain.
pub(super) fn decide(cost: &StepCost, expected: &Expected, batch: &Batch<'_>, exploring: bool) -> Decision {
    let (requests, whole, most_nodes) = (batch.temperatures.len(), expected.chain.len(), expected.tree.len() - 1);
    let unasked = !batch.widths.is_empty();
    let fits = |width: &usize| (2..=most_nodes + 1).contains(width) && requests * width + batch.others <= batch.room;
    let widths: Vec<usize> = if unasked {
        batch.widths.iter().copied().filter(fits).collect()
    } else {
        (2..=most_nodes + 1).collect()
    };
    // Where nobody is asked in between, the blocks are whole: one shape of the drafter's pass.
    let shortest = if unasked { whole } else { 2 };
    // What a block is expected to have accepted, against a whole one.
    let share = |block: usize| expected.chain[block - 1] / expected.chain[whole - 1];
    let merit = Merit::new(cost, requests, batch.others, batch.context);
    let plain = cost.pass(requests + batch.others, batch.context);
    let (mut best, mut most) = ((1, 1), merit.plain(requests as f64, plain));
    for &width in &widths {
        let verifying = cost.pass(requests * width + batch.others, batch.context);
        for block in shortest..=whole {
            let tokens = requests as f64 * (1.0 + expected.tree[width - 1] * share(block));
            let now = merit.of(tokens, verifying + cost.draft.at(requests * block));
            if now >= most {
                (best, most) = ((width, block), now);
            }
        }
    }
    let Some(&widest) = widths.last() else {
        return Decision::PLAIN;
    };
    let (mut width, mut block) = best;
    if exploring {
        let more = (2 * (width - 1)).clamp(1, most_nodes) + 1;
        width = widths.iter().copied().find(|&width| width >= more).unwrap_or(widest);
        block = whole;
    }
    if width == 1 {
        return Decision::PLAIN;
    }
    if !unasked {
        // How many of them pay is seen when the drafter has said how sure it is: some will want more, some fewer.
        width = (2 * (width - 1)).max(whole - 1).min(most_nodes) + 1;
    }
    Decision {
        width,
        block,
        trees: true,
    }
}

/// A draft that was taken: its place, its number in its tree, and how likely its path is.
struct Taken {
    place: Place,
    node: usize,
    chance: f32,
}

/// The trees to verify, and how many drafts of each are expected to be accepted.
pub(super) fn admit(
    cost: Option<&StepCost>,
    offers: &Offers<'_>,
    judges: &[Judge],
    exploring: bool,
    anchors: &[i64],
    tokens: &[i64],
) -> (PlannedTrees, Vec<f64>) {
    let taken = best_first(offers, judges);
    let chance = |draft: &Taken| draft.chance * judges[draft.place.tree as usize].kept;
    let worthy = worth(cost, offers, taken.iter().map(chance));
    // A step that explores verifies something of everyone: there is nothing to learn of drafts that are not verified.
    let kept = |(index, draft): &(usize, Taken)| *index < worthy || exploring && draft.node == 1;
    let admitted: Vec<Taken> = taken
        .into_iter()
        .enumerate()
        .filter(kept)
        .map(|(_, draft)| draft)
        .collect();

    let (mut widths, mut promised) = (vec![1; anchors.len()], vec![0.0; anchors.len()]);
    for draft in &admitted {
        widths[draft.place.tree as usize] += 1;
        promised[draft.place.tree as usize] += f64::from(draft.chance);
    }
    let width = widths.iter().max().map_or(0, |&width| width as usize);
    let mut trees = PlannedTrees {
        width,
        tokens: vec![0; anchors.len() * width],
        parents: vec![-1; anchors.len() * width],
        widths,
    };
    for (request, &anchor) in anchors.iter().enumerate() {
        trees.tokens[request * width] = anchor;
    }
    for Taken { place, node, .. } in admitted {
        let (request, position) = (place.tree as usize, place.depth as usize - 1);
        let at = request * width + node;
        trees.tokens[at] = tokens[(request * offers.depth + position) * offers.k + place.rank as usize];
        trees.parents[at] = place.parent as i32;
    }
    (trees, promised)
}

/// The drafts of everyone in one line, as far as each may go.
fn best_first(offers: &Offers<'_>, judges: &[Judge]) -> Vec<Taken> {
    let (depth, k) = (offers.depth, offers.k);
    let mut likely = vec![0.0; offers.probabilities.len()];
    for (place, row) in offers.probabilities.chunks_exact(k).enumerate() {
        chances(row, judges[place / depth].exponent, &mut likely[place * k..][..k]);
    }
    let chance =
        |place: Place| likely[(place.tree as usize * depth + place.depth as usize - 1) * k + place.rank as usize];

    let mut line = BestFirst::with_capacity(2 * offers.most.len());
    // How likely the path to each node is, by request; 1 that of the anchor.
    let mut paths = vec![vec![1.0f32]; offers.most.len()];
    for tree in 0..offers.most.len() as u32 {
        let first = Place::first(tree);
        line.offer(first, chance(first), ());
    }
    let mut taken = Vec::new();
    while let Some(next) = line.take() {
        let (place, path) = (next.place, &mut paths[next.place.tree as usize]);
        let node = path.len();
        if next.score <= 0.0 || node >= offers.most[place.tree as usize] as usize {
            continue;
        }
        path.push(next.score);
        taken.push(Taken {
            place,
            node,
            chance: next.score,
        });
        if (place.rank as usize) + 1 < k {
            let sibling = place.sibling();
            line.offer(sibling, path[place.parent as usize] * chance(sibling), ());
        }
        if (place.depth as usize) < depth {
            let child = place.child(node);
            line.offer(child, next.score * chance(child), ());
        }
    }
    taken
}
