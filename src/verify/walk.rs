//! Sample-and-match: draw the target's token at a node, follow the draft that carries it, stop where none does.
//!
//! Lossless for every draft that is independent of the draws, optimal for a fixed draft, and with numbers keyed by position
//! the committed text is the one plain decoding gives. Rows are drawn lazily: none beyond the one that stops the walk.

use crate::draft::DraftTree;
use crate::error::Result;
use crate::types::TokenId;

/// Outcome for a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Drafts accepted, counted from the front.
    pub accepted: u32,
    /// The last token drawn: it matched no draft and becomes the next anchor.
    pub bonus: TokenId,
}

/// Outcome for a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeWalk {
    /// Accepted nodes from depth 1 down, as node indices of the tree (the root, 0, is not among them).
    pub path: Vec<u32>,
    /// The last token drawn: no child of the last node carries it.
    pub bonus: TokenId,
}

/// Walks a chain. `draw(i)` draws the target's token of row `i`: row 0 belongs to the anchor, row `i` to draft `i - 1`.
/// It is called for rows `0..=accepted`, once each and in order.
pub fn walk_chain(drafts: &[TokenId], mut draw: impl FnMut(usize) -> Result<TokenId>) -> Result<Walk> {
    for (i, &draft) in drafts.iter().enumerate() {
        let drawn = draw(i)?;
        if drawn != draft {
            return Ok(Walk {
                accepted: i as u32,
                bonus: drawn,
            });
        }
    }
    let bonus = draw(drafts.len())?;
    Ok(Walk {
        accepted: drafts.len() as u32,
        bonus,
    })
}

/// Walks a tree. `draw(node)` draws the target's token after `node` (node 0 is the anchor). It is called once for the anchor
/// and once for each accepted node, from the root down.
pub fn walk_tree(tree: &DraftTree, mut draw: impl FnMut(usize) -> Result<TokenId>) -> Result<TreeWalk> {
    let mut path = Vec::new();
    let mut node = 0;
    loop {
        let drawn = draw(node)?;
        match tree.child_with(node, drawn) {
            Some(child) => {
                path.push(child as u32);
                node = child;
            }
            None => return Ok(TreeWalk { path, bonus: drawn }),
        }
    }
}
