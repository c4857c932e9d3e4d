//! The tree itself: flat arrays, packed ancestor masks, child lookup.

use crate::error::{Error, Result, indices};
use crate::types::TokenId;

/// Marks the absence of a parent, child or sibling.
pub const NO_NODE: u32 = u32::MAX;

/// A prefix-closed tree of drafts below an anchor.
///
/// Node 0 is the anchor; nodes `1..len()` are drafts; a parent's index is below its children's. The position of a node is
/// the anchor's position plus its depth. All arrays have one entry per node, the anchor included.
#[derive(Clone, Debug, PartialEq)]
pub struct DraftTree {
    tokens: Vec<TokenId>,
    parents: Vec<u32>,
    depths: Vec<u32>,
    scores: Vec<f32>,
    first_child: Vec<u32>,
    next_sibling: Vec<u32>,
    // Last child so far: siblings are appended in O(1).
    last_child: Vec<u32>,
}

impl DraftTree {
    /// The anchor alone: verifying it is plain decoding.
    pub fn root(anchor: TokenId) -> Self {
        Self {
            tokens: vec![anchor],
            parents: vec![NO_NODE],
            depths: vec![0],
            scores: vec![0.0],
            first_child: vec![NO_NODE],
            next_sibling: vec![NO_NODE],
            last_child: vec![NO_NODE],
        }
    }

    /// A chain. `log_probs[i]` is the drafter's log-probability of `drafts[i]`, at most 0 (scores are their running sums).
    pub fn chain(anchor: TokenId, drafts: &[TokenId], log_probs: &[f32]) -> Result<Self> {
        if log_probs.len() != drafts.len() {
            return Err(Error::Length {
                name: "log_probs",
                got: log_probs.len(),
                expected: drafts.len(),
            });
        }
        let mut tree = Self::root(anchor);
        for (parent, (&token, &log_prob)) in drafts.iter().zip(log_probs).enumerate() {
            let score = tree.scores[parent] + check_log_prob(log_prob)?;
            tree.push(parent, token, score);
        }
        Ok(tree)
    }

    /// A tree built elsewhere (on a device). `tokens[0]` is the anchor and `parents[0]` is ignored; `parents[i] < i` for the rest.
    /// Siblings keep the order of their indices. Scores are zero.
    pub fn from_parents(tokens: &[TokenId], parents: &[u32]) -> Result<Self> {
        if tokens.is_empty() {
            return Err(Error::Length {
                name: "tokens",
                got: 0,
                expected: 1,
            });
        }
        if parents.len() != tokens.len() {
            return Err(Error::Length {
                name: "parents",
                got: parents.len(),
                expected: tokens.len(),
            });
        }
        let mut tree = Self::root(tokens[0]);
        for i in 1..tokens.len() {
            if parents[i] as usize >= i {
                return Err(Error::InvalidArgument {
                    name: "parents",
                    got: format!("{} at node {i}", parents[i]),
                    expected: format!("a node before it, {}", indices(i)),
                });
            }
            tree.push(parents[i] as usize, tokens[i], 0.0);
        }
        Ok(tree)
    }

    pub(super) fn push(&mut self, parent: usize, token: TokenId, score: f32) -> usize {
        let node = self.tokens.len();
        self.tokens.push(token);
        self.parents.push(parent as u32);
        self.depths.push(self.depths[parent] + 1);
        self.scores.push(score);
        self.first_child.push(NO_NODE);
        self.next_sibling.push(NO_NODE);
        self.last_child.push(NO_NODE);
        match self.last_child[parent] {
            NO_NODE => self.first_child[parent] = node as u32,
            last => self.next_sibling[last as usize] = node as u32,
        }
        self.last_child[parent] = node as u32;
        node
    }

    /// Nodes, the anchor included; at least 1.
    #[allow(clippy::len_without_is_empty)] // never empty: the anchor is always there
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens to verify, the anchor first.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Parent of each node; [`NO_NODE`] for the anchor.
    pub fn parents(&self) -> &[u32] {
        &self.parents
    }

    /// Depth of each node: 0 for the anchor, position = anchor position + depth.
    pub fn depths(&self) -> &[u32] {
        &self.depths
    }

    /// Sum of log-probabilities along the path, nats, summed from the root in f32.
    pub fn scores(&self) -> &[f32] {
        &self.scores
    }

    /// Likeliest child of each node, or [`NO_NODE`].
    pub fn first_child(&self) -> &[u32] {
        &self.first_child
    }

    /// Next sibling by falling probability, or [`NO_NODE`].
    pub fn next_sibling(&self) -> &[u32] {
        &self.next_sibling
    }

    /// Largest depth.
    pub fn max_depth(&self) -> u32 {
        self.depths.iter().copied().max().unwrap_or(0)
    }

    /// Children of a node by falling probability.
    pub fn children(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        let mut next = self.first_child[node];
        std::iter::from_fn(move || {
            let child = next;
            (child != NO_NODE).then(|| {
                next = self.next_sibling[child as usize];
                child as usize
            })
        })
    }

    /// The child of `node` that carries `token`.
    pub fn child_with(&self, node: usize, token: TokenId) -> Option<usize> {
        self.children(node).find(|&child| self.tokens[child] == token)
    }

    /// Drafts from depth 1 down to `node`, in order; empty for the anchor.
    pub fn path_tokens(&self, node: usize) -> Vec<TokenId> {
        let mut path = Vec::with_capacity(self.depths[node] as usize);
        let mut at = node;
        while at != 0 {
            path.push(self.tokens[at]);
            at = self.parents[at] as usize;
        }
        path.reverse();
        path
    }

    /// Words of one mask row: `ceil(len / 64)`.
    pub fn mask_words(&self) -> usize {
        self.len().div_ceil(64)
    }

    /// Ancestor masks, [len, mask_words] row-major: bit `j` of row `i` (bit `j % 64` of word `j / 64`) is set iff `j` is `i` or an
    /// ancestor of `i`. The anchor is bit 0, so every row has `depth + 1` bits set. The prefix is visible to all and has no bits.
    pub fn masks(&self) -> Vec<u64> {
        let words = self.mask_words();
        let mut masks = vec![0u64; self.len() * words];
        for node in 0..self.len() {
            let (above, row) = masks.split_at_mut(node * words);
            if node > 0 {
                let parent = self.parents[node] as usize;
                row[..words].copy_from_slice(&above[parent * words..(parent + 1) * words]);
            }
            row[node / 64] |= 1 << (node % 64);
        }
        masks
    }
}

pub(super) fn check_log_prob(log_prob: f32) -> Result<f32> {
    // NaN fails the comparison too.
    if log_prob <= 0.0 {
        return Ok(log_prob);
    }
    Err(Error::InvalidArgument {
        name: "log_probs",
        got: log_prob.to_string(),
        expected: "log-probabilities of at most 0".into(),
    })
}
