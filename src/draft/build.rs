//! Best-first building: the N likeliest prefixes (DDTree, arXiv 2604.12989, section on tree construction).
//!
//! The expected accepted length of a tree is the sum over its nodes of the path's probability, so the best tree of N nodes
//! is that of the N likeliest prefixes. A heap yields them in order (`best_first.rs`). O(N log N) after the drafter's top-k.

use crate::draft::best_first::{BestFirst, Place, Waiting};
use crate::draft::tree::{DraftTree, check_log_prob};
use crate::error::{Error, Result};
use crate::types::TokenId;

/// Where the children of a node come from: a factorised drafter looks at the depth alone, a path-conditioned one at the path.
pub trait ChildSource {
    /// The child of `parent` with the `rank`-th largest log-probability (rank 0 first), or `None` when there are no more.
    /// For one parent ranks are asked in order. Log-probabilities fall with the rank and are at most 0.
    fn child(&mut self, tree: &DraftTree, parent: usize, rank: usize) -> Option<(TokenId, f32)>;
}

/// Children of a factorised drafter: row `d` holds the top-K of depth `d + 1`, whatever the path.
#[derive(Clone, Copy, Debug)]
pub struct TopK<'a> {
    tokens: &'a [TokenId],
    log_probs: &'a [f32],
    k: usize,
}

impl<'a> TopK<'a> {
    /// `tokens` and `log_probs` are [L, K] row-major, each row by falling log-probability (nats).
    pub fn new(tokens: &'a [TokenId], log_probs: &'a [f32], k: usize) -> Result<Self> {
        if k == 0 || !tokens.len().is_multiple_of(k) {
            return Err(Error::InvalidArgument {
                name: "k",
                got: format!("{k} for {} tokens", tokens.len()),
                expected: "a positive divisor of their number".into(),
            });
        }
        if log_probs.len() != tokens.len() {
            return Err(Error::Length {
                name: "log_probs",
                got: log_probs.len(),
                expected: tokens.len(),
            });
        }
        Ok(Self { tokens, log_probs, k })
    }
}

impl ChildSource for TopK<'_> {
    fn child(&mut self, tree: &DraftTree, parent: usize, rank: usize) -> Option<(TokenId, f32)> {
        let at = tree.depths()[parent] as usize * self.k + rank;
        (rank < self.k && at < self.tokens.len()).then(|| (self.tokens[at], self.log_probs[at]))
    }
}

/// The top `k` of each row of `log_probs`, [L, `vocab`] row-major, as [L, k] tokens and log-probabilities for [`TopK`]: by
/// falling log-probability, lowest id first among equals. No row is sorted as a whole.
pub fn top_k(log_probs: &[f32], vocab: usize, k: usize) -> Result<(Vec<TokenId>, Vec<f32>)> {
    if vocab == 0 || !log_probs.len().is_multiple_of(vocab) {
        let expected = format!("a multiple of vocab = {vocab} elements, vocab at least 1");
        return Err(Error::InvalidArgument {
            name: "log_probs",
            got: log_probs.len().to_string(),
            expected,
        });
    }
    if k == 0 || k > vocab {
        let expected = format!("1..{vocab} (vocab)");
        return Err(Error::InvalidArgument {
            name: "k",
            got: k.to_string(),
            expected,
        });
    }
    let mut tokens = Vec::with_capacity(log_probs.len() / vocab * k);
    let mut best = Vec::with_capacity(tokens.capacity());
    let mut order: Vec<u32> = Vec::with_capacity(vocab);
    for row in log_probs.chunks(vocab) {
        for &log_prob in row {
            check_log_prob(log_prob)?;
        }
        // `+ 0.0`: both zeros are one value.
        let falling = |&a: &u32, &b: &u32| {
            (row[b as usize] + 0.0)
                .total_cmp(&(row[a as usize] + 0.0))
                .then(a.cmp(&b))
        };
        order.clear();
        order.extend(0..vocab as u32);
        if k < vocab {
            order.select_nth_unstable_by(k - 1, falling);
        }
        order[..k].sort_unstable_by(falling);
        tokens.extend(order[..k].iter().map(|&id| TokenId(id)));
        best.extend(order[..k].iter().map(|&id| row[id as usize]));
    }
    Ok((tokens, best))
}

// What the line keeps of a draft beside its score.
#[derive(Debug)]
struct Draft {
    token: TokenId,
    log_prob: f32,
}

impl DraftTree {
    /// The tree of the `nodes` likeliest prefixes no deeper than `max_depth`; fewer if the source has fewer of positive
    /// probability. The anchor does not count as one of the `nodes`.
    ///
    /// Ties: the shallower, then the earlier parent, then the better rank. Scores are f32 sums from the root down.
    /// Errors: a log-probability above 0, NaN, or larger than that of the sibling before it.
    pub fn build(anchor: TokenId, nodes: usize, max_depth: usize, source: &mut impl ChildSource) -> Result<Self> {
        let mut tree = Self::root(anchor);
        let mut line = BestFirst::with_capacity(0);
        if max_depth > 0 {
            offer(&mut line, &tree, Place::first(0), 0.0, source)?;
        }
        while tree.len() <= nodes {
            let Some(Waiting { score, place, draft }) = line.take() else {
                break;
            };
            let node = tree.push(place.parent as usize, draft.token, score);
            offer(&mut line, &tree, place.sibling(), draft.log_prob, source)?;
            if (place.depth as usize) < max_depth {
                offer(&mut line, &tree, place.child(node), 0.0, source)?;
            }
        }
        Ok(tree)
    }
}

fn offer(
    line: &mut BestFirst<Draft>,
    tree: &DraftTree,
    place: Place,
    ceiling: f32,
    source: &mut impl ChildSource,
) -> Result<()> {
    let (parent, rank) = (place.parent as usize, place.rank as usize);
    let Some((token, log_prob)) = source.child(tree, parent, rank) else {
        return Ok(());
    };
    check_log_prob(log_prob)?;
    if log_prob > ceiling {
        return Err(Error::InvalidArgument {
            name: "log_probs",
            got: format!("{log_prob} at rank {rank} after {ceiling}"),
            expected: "siblings by falling log-probability".into(),
        });
    }
    if log_prob > f32::NEG_INFINITY {
        line.offer(place, tree.scores()[parent] + log_prob, Draft { token, log_prob });
    }
    Ok(())
}
