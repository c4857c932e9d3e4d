//! Trees: which drafts of a step to verify when a position may have several.
//!
//! Drafts are taken best first, so what a smaller budget would have verified is always the front of what a larger one did. One
//! pass therefore says of every budget up to its own what it would have gained: each node of the order has a rate of its own.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::{ASSUMED, EXPLORE, MEMORY, PRIOR, Planner, StepCost};
use crate::error::{Error, Result};

/// Nodes of more than this many drafts are a mistake.
const MOST_NODES: usize = 1024;

/// What was accepted of the i-th best draft of a tree.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeRates {
    // Fading: passes that verified it, and those that accepted it.
    reached: Vec<f64>,
    accepted: Vec<f64>,
}

impl NodeRates {
    fn rate(&self, node: usize) -> f64 {
        let assumed = ASSUMED / (1.0 + node as f64 / 2.0);
        (self.accepted[node] + PRIOR * assumed) / (self.reached[node] + PRIOR)
    }

    fn record(&mut self, verified: usize, path: impl Iterator<Item = usize>) {
        let fade = 1.0 - 1.0 / MEMORY;
        let verified = verified.min(self.reached.len());
        for node in 0..verified {
            self.reached[node] = self.reached[node] * fade + 1.0;
            self.accepted[node] *= fade;
        }
        for node in path.filter(|&node| node < verified) {
            self.accepted[node] += 1.0;
        }
    }
}

/// Drafts on offer for `n` requests: `k` candidates for each of `depth` positions, the likeliest first.
#[derive(Clone, Copy, Debug)]
pub struct Offers<'a> {
    /// `[n]` the token that each request goes on from.
    pub anchors: &'a [i64],
    /// `[n, depth, k]` candidates.
    pub tokens: &'a [i64],
    /// `[n, depth, k]` chance that a candidate is accepted when its parent was; falls with the candidate.
    pub chances: &'a [f32],
    /// Positions.
    pub depth: usize,
    /// Candidates per position.
    pub k: usize,
    /// `[n]` most drafts of each request.
    pub limits: &'a [i32],
}

/// The trees of a step, padded to the largest: parents come before children.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PlannedTrees {
    /// Columns: nodes of the largest tree, its anchor included.
    pub width: usize,
    /// `[n, width]`, the anchor first.
    pub tokens: Vec<i64>,
    /// `[n, width]` parent of each node; -1 for the anchor and behind the last node.
    pub parents: Vec<i32>,
    /// `[n]` nodes, the anchor included.
    pub counts: Vec<i32>,
}

struct Candidate {
    chance: f32,
    request: u32,
    parent: u32,
    depth: u32,
    rank: u32,
}

// A total order: the likelier, then the shallower, the earlier request, the earlier parent, the better rank.
impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |c: &Self| (c.depth, c.request, c.parent, c.rank);
        self.chance
            .total_cmp(&other.chance)
            .then_with(|| key(other).cmp(&key(self)))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

impl Planner {
    /// Lets trees have up to `nodes` drafts.
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
        self.nodes = NodeRates {
            reached: vec![0.0; nodes],
            accepted: vec![0.0; nodes],
        };
        Ok(self)
    }

    /// Most drafts of a tree.
    pub fn tree_nodes(&self) -> usize {
        self.nodes.reached.len()
    }

    /// Chance that the `node`-th best draft (0 is the best) of a tree is accepted.
    pub fn node_rate(&self, node: usize) -> f64 {
        self.nodes.rate(node)
    }

    /// Books one request's pass over a tree: `path` are the accepted drafts by their place in the best-first order, 0 the best.
    ///
    /// # Errors
    /// `AcceptedExceedsDrafted`.
    pub fn record_tree(
        &mut self,
        verified: usize,
        depth: usize,
        path: impl ExactSizeIterator<Item = usize>,
    ) -> Result<()> {
        self.record(depth, path.len())?;
        self.nodes.record(verified, path);
        Ok(())
    }

    /// Drafts per request and block length for a step in which `requests` could draft and `others` tokens run beside them: the
    /// pair with the most expected tokens per second. `tiers` are the numbers of drafts to choose among, rising (every one up to the most
    /// when empty), `shortest` the least block length. `(0, 1)` is a plain step. Every so often about twice as many are drafted out of a whole
    /// block, to see what they would gain.
    pub fn tree(&mut self, requests: usize, others: usize, tiers: &[usize], shortest: usize) -> (usize, usize) {
        self.steps += 1;
        let most_nodes = self.tree_nodes();
        if requests == 0 || self.block == 1 || most_nodes == 0 {
            return (0, 1);
        }
        let StepCost { target, draft } = &self.cost;
        let mut alive = 1.0;
        // Drafts that a block of each length is expected to have accepted, against those of a whole block.
        let gained: Vec<f64> = (0..self.block - 1)
            .scan(0.0, |sum, position| {
                alive *= self.acceptance(position);
                *sum += alive;
                Some(*sum)
            })
            .collect();
        let whole = gained.last().copied().unwrap_or(1.0);
        let mut best = (0, 1);
        let mut most = requests as f64 / target.at(requests + others);
        let mut expected = 0.0;
        for nodes in 1..=most_nodes {
            expected += self.node_rate(nodes - 1);
            if !tiers.is_empty() && !tiers.contains(&nodes) {
                continue;
            }
            let verifying = target.at(requests * (nodes + 1) + others);
            for block in shortest.clamp(2, self.block)..=self.block {
                let tokens = 1.0 + expected * gained[block - 2] / whole;
                let goodput = requests as f64 * tokens / (verifying + draft.at(requests * block));
                if goodput >= most {
                    (best, most) = ((nodes, block), goodput);
                }
            }
        }
        if self.steps.is_multiple_of(EXPLORE) {
            let more = (2 * best.0).clamp(1, most_nodes);
            let tier = tiers.iter().copied().find(|&tier| tier >= more);
            return (tier.or(tiers.last().copied()).unwrap_or(more), self.block);
        }
        best
    }

    /// The trees to verify: drafts are admitted best first over all requests while expected tokens per second rise. `others` tokens run
    /// beside them. The drafter's part of the step is spent already.
    ///
    /// # Errors
    /// `Length` naming the array that does not fit `anchors`.
    pub fn trees(&mut self, offers: &Offers<'_>, others: usize) -> Result<PlannedTrees> {
        let Offers {
            anchors,
            tokens,
            chances,
            depth,
            k,
            limits,
        } = *offers;
        let requests = anchors.len();
        let all = requests * depth * k;
        for (name, got, expected) in [
            ("tokens", tokens.len(), all),
            ("chances", chances.len(), all),
            ("limits", limits.len(), requests),
        ] {
            if got != expected {
                return Err(Error::Length { name, got, expected });
            }
        }
        let chance = |request: usize, position: usize, rank: usize| {
            let chance = chances[(request * depth + position) * k + rank];
            // A chance that is no number is no reason to draft.
            if chance > 0.0 { chance.min(1.0) } else { 0.0 }
        };
        let mut heap = BinaryHeap::with_capacity(2 * requests);
        if depth > 0 && k > 0 {
            heap.extend((0..requests as u32).map(|request| Candidate {
                chance: chance(request as usize, 0, 0),
                request,
                parent: 0,
                depth: 1,
                rank: 0,
            }));
        }
        // (request, parent, token, chance of the path) in the order of admission; per request the same.
        let mut admitted: Vec<Candidate> = Vec::new();
        let mut paths: Vec<Vec<f32>> = vec![vec![1.0]; requests];
        let drafting = self.cost.draft.at(requests * (depth + 1));
        let goodput =
            |gained: f64, drafts: usize| gained / (self.cost.target.at(requests + others + drafts) + drafting);
        let mut expected = requests as f64;
        let (mut taken, mut most) = (0, goodput(expected, 0));
        while let Some(next) = heap.pop() {
            let request = next.request as usize;
            let node = paths[request].len();
            if next.chance <= 0.0 || node > limits[request].max(0) as usize {
                continue;
            }
            paths[request].push(next.chance);
            let (position, rank) = (next.depth as usize, next.rank as usize + 1);
            if rank < k {
                heap.push(Candidate {
                    chance: paths[request][next.parent as usize] * chance(request, position - 1, rank),
                    rank: rank as u32,
                    ..next
                });
            }
            if position < depth {
                heap.push(Candidate {
                    chance: next.chance * chance(request, position, 0),
                    parent: node as u32,
                    depth: next.depth + 1,
                    rank: 0,
                    ..next
                });
            }
            expected += f64::from(next.chance);
            admitted.push(next);
            let now = goodput(expected, admitted.len());
            if now >= most {
                (taken, most) = (admitted.len(), now);
            }
        }
        admitted.truncate(taken);
        let mut counts = vec![1; requests];
        for draft in &admitted {
            counts[draft.request as usize] += 1;
        }
        let width = counts.iter().max().map_or(0, |&count| count as usize);
        let mut trees = PlannedTrees {
            width,
            tokens: vec![0; requests * width],
            parents: vec![-1; requests * width],
            counts,
        };
        for (request, &anchor) in anchors.iter().enumerate() {
            trees.tokens[request * width] = anchor;
        }
        let mut filled = vec![1; requests];
        for draft in &admitted {
            let request = draft.request as usize;
            let at = request * width + filled[request];
            filled[request] += 1;
            trees.tokens[at] = tokens[(request * depth + draft.depth as usize - 1) * k + draft.rank as usize];
            trees.parents[at] = draft.parent as i32;
        }
        Ok(trees)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draft::{DraftTree, TopK};
    use crate::plan::Curve;
    use crate::types::TokenId;
    use proptest::prelude::*;

    fn planner(row: f64, nodes: usize) -> Planner {
        let line = |fixed: f64, row: f64| Curve::new("line", &[(0.0, fixed), (1.0, fixed + row)]).unwrap();
        let cost = StepCost {
            target: line(1.0, row),
            draft: line(0.1, row / 4.0),
        };
        Planner::new(5, cost).unwrap().with_trees(nodes).unwrap()
    }

    /// Chances of `n` requests, 4 positions, 3 candidates: falling, and not quite adding up to one.
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

    proptest! {
        #[test]
        fn one_request_gets_the_front_of_its_best_tree(chances in offered(1), row in 0.0..0.3f64, limit in 1..20i32) {
            let mut planner = planner(row, 20);
            let tokens = tokens(1);
            let offers = Offers { anchors: &[7], tokens: &tokens, chances: &chances, depth: 4, k: 3, limits: &[limit] };
            let trees = planner.trees(&offers, 0).unwrap();
            let drafts = trees.counts[0] as usize - 1;
            prop_assert!(drafts <= limit as usize);
            let ids: Vec<TokenId> = tokens.iter().map(|&t| TokenId(t as u32)).collect();
            let logs: Vec<f32> = chances.iter().map(|p| p.ln()).collect();
            let best = DraftTree::build(TokenId(7), drafts, 4, &mut TopK::new(&ids, &logs, 3).unwrap()).unwrap();
            // Products and sums of logarithms may order two paths of one chance differently: the sets weigh the same.
            let weight = |nodes: &[i64], parents: &[i32]| {
                let mut path = vec![1.0f64];
                for (&token, &parent) in nodes.iter().zip(parents).skip(1) {
                    path.push(path[parent as usize] * f64::from(chances[token as usize - 10]));
                }
                path.iter().sum::<f64>()
            };
            let theirs: Vec<i64> = best.tokens().iter().map(|t| i64::from(t.0)).collect();
            let parents: Vec<i32> = best.parents().iter().map(|&p| p as i32).collect();
            prop_assert_eq!(best.len(), drafts + 1);
            let (ours, theirs) = (weight(&trees.tokens, &trees.parents), weight(&theirs, &parents));
            prop_assert!((ours - theirs).abs() < 1e-4, "{} {}", ours, theirs);
        }

        #[test]
        fn what_is_admitted_has_the_best_goodput_of_all_budgets(chances in offered(3), row in 0.01..0.3f64, others in 0..9usize) {
            let mut planner = planner(row, 20);
            let (tokens, limits) = (tokens(3), [6, 2, 20]);
            let all = Offers { anchors: &[1, 2, 3], tokens: &tokens, chances: &chances, depth: 4, k: 3, limits: &limits };
            let goodput = |planner: &Planner, trees: &PlannedTrees| {
                let mut gained = 0.0;
                let mut nodes = 0;
                for request in 0..3 {
                    let mut path = vec![1.0f64];
                    for node in 1..trees.counts[request] as usize {
                        let at = request * trees.width + node;
                        path.push(path[trees.parents[at] as usize] * f64::from(chances[trees.tokens[at] as usize - 10]));
                    }
                    gained += path.iter().sum::<f64>();
                    nodes += path.len();
                }
                gained / (planner.cost().target.at(nodes + others) + planner.cost().draft.at(15))
            };
            let trees = planner.trees(&all, others).unwrap();
            let ours = goodput(&planner, &trees);
            // Every other way to share out the same kind of trees.
            for a in 0..=6 {
                for b in 0..=2 {
                    for c in 0..=20 {
                        let mut free = planner.clone();
                        free.cost.target = Curve::flat(1.0);
                        let limits = [a, b, c];
                        let other = free.trees(&Offers { limits: &limits, ..all }, others).unwrap();
                        let theirs = goodput(&planner, &other);
                        prop_assert!(theirs <= ours * (1.0 + 1e-5), "{} {} {:?}", theirs, ours, limits);
                    }
                }
            }
        }
    }

    #[test]
    fn rows_that_cost_nothing_are_all_verified_and_dear_ones_are_not() {
        let (tokens, chances) = (tokens(1), [0.5f32, 0.3, 0.1].repeat(4));
        let offers = Offers {
            anchors: &[7],
            tokens: &tokens,
            chances: &chances,
            depth: 4,
            k: 3,
            limits: &[17],
        };
        assert_eq!(planner(0.0, 17).trees(&offers, 0).unwrap().counts, [18]);
        let unlikely = [0.1f32, 0.05, 0.01].repeat(4);
        let offers = Offers {
            chances: &unlikely,
            ..offers
        };
        let none = planner(5.0, 17).trees(&offers, 0).unwrap();
        assert_eq!((none.width, none.tokens, none.parents), (1, vec![7], vec![-1]));
    }

    #[test]
    fn the_number_of_drafts_follows_what_trees_gained_and_what_rows_cost() {
        let mut cheap = planner(0.001, 12);
        let mut dear = planner(0.5, 12);
        for planner in [&mut cheap, &mut dear] {
            // The best draft is accepted every time, the fifth best as its child every other time, nothing else ever.
            for pass in 0..500 {
                let path = if pass % 2 == 0 { vec![0, 4] } else { vec![0] };
                planner.record_tree(12, 4, path.into_iter()).unwrap();
            }
            assert!(planner.node_rate(0) > 0.97 && (planner.node_rate(4) - 0.5).abs() < 0.1);
            assert!(planner.node_rate(1) < 0.02 && planner.node_rate(11) < 0.02);
        }
        let (nodes, block) = cheap.tree(1, 0, &[], 2);
        assert!(nodes >= 5 && block >= 3, "{nodes} {block}");
        assert_eq!(dear.tree(1, 0, &[], 2).0, 1);
        assert_eq!(dear.tree(0, 4, &[], 2), (0, 1));
        // Tiers are all there is to choose from, and a shortest block is kept.
        assert_eq!(dear.tree(1, 0, &[3, 8], 5), (0, 1));
        assert_eq!(cheap.tree(1, 0, &[3, 8], 5), (8, 5));
    }

    #[test]
    fn every_so_often_more_is_drafted_than_pays() {
        let mut dear = planner(50.0, 9);
        let looks = (0..64).filter(|_| dear.tree(2, 0, &[], 2) == (1, 5)).count();
        assert_eq!(looks, 2);
        for (tiers, expected) in [(&[][..], 4), (&[2, 7][..], 7), (&[2, 3][..], 3)] {
            let mut planner = planner(0.2, 9);
            for _ in 0..400 {
                planner.record_tree(9, 4, [0, 1].into_iter()).unwrap();
            }
            let sizes: Vec<_> = (0..32).map(|_| planner.tree(1, 0, tiers, 2).0).collect();
            assert_eq!((sizes[0], sizes[31]), (2, expected));
        }
    }

    #[test]
    fn arrays_that_do_not_fit_are_named() {
        let mut planner = planner(0.1, 4);
        let bad = Offers {
            anchors: &[1],
            tokens: &[1, 2],
            chances: &[0.5],
            depth: 1,
            k: 2,
            limits: &[4],
        };
        assert!(planner.trees(&bad, 0).unwrap_err().to_string().starts_with("chances"));
        assert!(planner.record_tree(2, 1, [0, 1].into_iter()).is_err());
        assert!(Planner::new(4, StepCost::passes()).unwrap().with_trees(5000).is_err());
    }
}
