//! Chains: how long a block to draft, and how many of its drafts each request verifies.

use super::chances::chances;
use super::{Batch, Decision, Expected, Merit, Offers, StepCost, worth};

/// The block with which a step is best, and one token more; a plain step where none pays.
pub(super) fn decide(cost: &StepCost, expected: &Expected, batch: &Batch<'_>, exploring: bool) -> Decision {
    let (requests, whole) = (batch.temperatures.len(), expected.chain.len());
    let merit = Merit::new(cost, requests, batch.others);
    let plain = cost.target.at(requests + batch.others);
    let (mut best, mut most) = (1, merit.plain(requests as f64, plain));
    for block in 2..=whole {
        let rows = requests * block;
        let tokens = requests as f64 * (1.0 + expected.chain[block - 1]);
        let now = merit.of(tokens, cost.target.at(rows + batch.others) + cost.draft.at(rows));
        if now >= most {
            (best, most) = (block, now);
        }
    }
    let width = match best {
        _ if exploring => whole,
        1 => return Decision::PLAIN,
        // What is drafted can still be cut when the drafter turns out unsure, and the tail of a block costs little to draft.
        _ => (best + 1).min(whole),
    };
    Decision {
        width,
        block: width,
        trees: false,
    }
}

/// Tokens that each request verifies, the anchor counted.
pub(super) fn admit(cost: Option<&StepCost>, offers: &Offers<'_>, exponents: &[f32], exploring: bool) -> Vec<i32> {
    struct Draft {
        chance: f32,
        request: usize,
        position: usize,
    }
    let mut line = Vec::with_capacity(offers.most.len() * offers.depth);
    let rows = offers.probabilities.chunks_exact(offers.depth * offers.k);
    for (request, (row, &exponent)) in rows.zip(exponents).enumerate() {
        let mut chance = 1.0;
        let most = offers.most[request] as usize - 1;
        for (position, place) in row.chunks_exact(offers.k).enumerate().take(most) {
            let mut likeliest = [0.0];
            chances(&place[..1], exponent, &mut likeliest);
            chance *= likeliest[0];
            line.push(Draft {
                chance,
                request,
                position,
            });
        }
    }
    // Stable: among equals a request's earlier drafts come first, so every front of the line is a set of fronts of chains.
    line.sort_by(|a, b| b.chance.total_cmp(&a.chance));
    let admitted = worth(cost, offers, line.iter().map(|draft| draft.chance));
    let mut widths = vec![1; offers.most.len()];
    for (index, draft) in line.iter().enumerate() {
        // A step that explores verifies something of everyone: there is nothing to learn of drafts that are not verified.
        if index < admitted || exploring && draft.position == 0 {
            widths[draft.request] += 1;
        }
    }
    widths
}
