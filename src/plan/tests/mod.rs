//! The planner as a whole: both calls, chains and trees (`choices`), a drafter beside texts (`either`), what is learnt
//! between them (`learnt`), and looks at what does not pay (`looks`).

mod choices;
mod either;
mod learnt;
mod looks;

use super::*;
use crate::draft::{DraftTree, TopK};
use crate::types::TokenId;
use proptest::prelude::*;

fn line(fixed: f64, row: f64) -> Curve {
    Curve::new("line", &[(0.0, fixed), (1.0, fixed + row)]).unwrap()
}

fn chains(row: f64) -> Planner {
    let cost = StepCost {
        target: line(1.0, row),
        context: 0.0,
        draft: line(0.1, row / 3.0),
    };
    Planner::new(8, Some(cost)).unwrap()
}

fn trees(row: f64, nodes: usize) -> Planner {
    let cost = StepCost {
        target: line(1.0, row),
        context: 0.0,
        draft: line(0.1, row / 4.0),
    };
    Planner::new(5, Some(cost)).unwrap().with_trees(nodes).unwrap()
}

/// Requests that draft, at temperature 1, on a host.
fn drafting(temperatures: &[f32], others: usize) -> Batch<'_> {
    Batch {
        temperatures,
        others,
        context: 0,
        widths: &[],
        room: 0,
    }
}

fn block(planner: &mut Planner, requests: usize, others: usize) -> usize {
    let decision = planner.decide(&drafting(&vec![1.0; requests], others)).unwrap();
    assert!(decision.width == decision.block && !decision.trees);
    decision.block
}

/// Chains of `depth` places for requests at these temperatures, of so many tokens at most, and nothing else in their step.
fn chain_offers<'a>(probabilities: &'a [f32], depth: usize, temperatures: &'a [f32], most: &'a [i32]) -> Offers<'a> {
    Offers {
        probabilities,
        tokens: &[],
        from_text: &[],
        depth,
        k: 1,
        temperatures,
        most,
        others: 0,
        context: 0,
        drafted: None,
        step: None,
    }
}

/// Drafts that each request verifies of chains, and what it takes at temperature 1 with an exponent that is 1 still.
fn drafts(planner: &mut Planner, probabilities: &[f32], depth: usize, others: usize) -> Result<Vec<usize>> {
    let requests = probabilities.len() / depth.max(1);
    let widths = planner.admit(&Offers {
        others,
        ..chain_offers(probabilities, depth, &vec![1.0; requests], &vec![100; requests])
    })?;
    Ok(widths.iter().map(|&width| width as usize - 1).collect())
}

/// What a step is to be judged by, written out.
fn merit(cost: &StepCost, requests: usize, others: usize, tokens: f64, time: f64) -> f64 {
    if others == 0 {
        return tokens / time;
    }
    tokens - 1.03 * requests as f64 / cost.target.at(requests) * time
}

/// What a plain step counts for, beside what it is: drafting has to promise more.
fn bar(drafted: bool, others: usize) -> f64 {
    if drafted || others > 0 { 1.0 } else { 1.03 }
}

/// Whether something is as good as the best of all.
fn as_good(ours: f64, best: f64) -> bool {
    ours >= best - 1e-5 * (1.0 + best.abs())
}

/// How good a step is in which request `r` verifies `keep[r]` drafts.
fn goodput(planner: &Planner, p: &[f32], depth: usize, others: usize, keep: &[usize]) -> f64 {
    let (mut tokens, mut rows) = (0.0, others);
    for (p, &keep) in p.chunks_exact(depth).zip(keep) {
        let mut chance = 1.0;
        tokens += 1.0;
        for &x in &p[..keep] {
            chance *= f64::from(x);
            tokens += chance;
        }
        rows += 1 + keep;
    }
    let cost = planner.cost().unwrap();
    let time = cost.target.at(rows) + cost.draft.at(keep.len() * (depth + 1));
    let drafted = keep.iter().any(|&drafts| drafts > 0);
    bar(drafted, others) * merit(cost, keep.len(), others, tokens, time)
}

/// Every way to keep prefixes, by hand.
fn best_by_trying(planner: &Planner, p: &[f32], depth: usize, others: usize) -> f64 {
    let requests = p.len() / depth;
    (0..(depth + 1).pow(requests as u32))
        .map(|choice| {
            let keep: Vec<usize> = (0..requests as u32)
                .map(|r| choice / (depth + 1).pow(r) % (depth + 1))
                .collect();
            goodput(planner, p, depth, others, &keep)
        })
        .fold(f64::MIN, f64::max)
}

/// Probabilities of `n` requests, 4 places, 3 candidates: falling, and not quite adding up to one.
fn offered(n: usize) -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(prop::array::uniform3(0.01..1.0f32), n * 4).prop_map(|rows| {
        let falling = |mut row: [f32; 3]| {
            let sum: f32 = row.iter().sum::<f32>() * 1.1;
            row.sort_by(|a, b| b.total_cmp(a));
            row.map(|x| x / sum)
        };
        rows.into_iter().flat_map(falling).collect()
    })
}

fn tokens(n: usize) -> Vec<i64> {
    (0..n as i64 * 12).map(|i| 10 + i).collect()
}

/// What `offered` gives as trees, with so many tokens for each request at most.
fn grow(planner: &mut Planner, probabilities: &[f32], most: &[i32], others: usize) -> PlannedTrees {
    let temperatures = vec![1.0; most.len()];
    let offers = Offers {
        k: 3,
        others,
        ..chain_offers(probabilities, 4, &temperatures, most)
    };
    let anchors: Vec<i64> = (1..=most.len() as i64).collect();
    planner.admit_trees(&offers, &anchors, &tokens(most.len())).unwrap()
}

/// A request's tree as expected tokens, its anchor's aside.
fn gain(probabilities: &[f32], tokens: &[i64], parents: &[i32]) -> f64 {
    let mut path = vec![1.0f64];
    for (&token, &parent) in tokens.iter().zip(parents).skip(1) {
        path.push(path[parent as usize] * f64::from(probabilities[token as usize - 10]));
    }
    path[1..].iter().sum()
}

fn tree_pass(verified: usize, depth: usize, path: &[usize]) -> Pass<'_> {
    Pass {
        step: 0,
        request: 1,
        temperature: 1.0,
        tree: true,
        verified,
        depth,
        path,
        next: None,
    }
}
