//! The line in which drafts wait to be taken into trees, the likeliest first: the one heap for whoever grows trees.
//!
//! ```text
//!   take a draft ──> offer its next sibling and its first child
//! ```
//! So the line never holds more than a draft for each that was taken and one for each tree. The order is total: what is taken depends
//! neither on the heap's insides nor on when a draft was offered, and a device that merges level by level takes the same ones.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Where a draft hangs. Among equally likely ones the lesser place goes first: the shallower, then that of the earlier tree, of the
/// earlier parent, of the better rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// 1 for the children of an anchor.
    pub depth: u32,
    pub tree: u32,
    /// The node it hangs from; 0 is the anchor.
    pub parent: u32,
    /// Among the children of its parent, 0 the likeliest.
    pub rank: u32,
}

impl Place {
    /// The likeliest child of a tree's anchor.
    pub fn first(tree: u32) -> Self {
        Self {
            depth: 1,
            tree,
            parent: 0,
            rank: 0,
        }
    }

    /// The next likely child of the same parent.
    pub fn sibling(self) -> Self {
        Self {
            rank: self.rank + 1,
            ..self
        }
    }

    /// The likeliest child of the draft here, once that has become `node`.
    pub fn child(self, node: usize) -> Self {
        Self {
            depth: self.depth + 1,
            parent: node as u32,
            rank: 0,
            ..self
        }
    }
}

/// A draft in line, with whatever its tree's builder wants to know of it again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting<D> {
    /// How likely its whole path is: a chance or its logarithm, no NaN.
    pub score: f32,
    pub place: Place,
    pub draft: D,
}

impl<D> Ord for Waiting<D> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .total_cmp(&other.score)
            .then_with(|| other.place.cmp(&self.place))
    }
}

impl<D> PartialOrd for Waiting<D> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<D> PartialEq for Waiting<D> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<D> Eq for Waiting<D> {}

/// The line.
#[derive(Debug)]
pub(crate) struct BestFirst<D>(BinaryHeap<Waiting<D>>);

impl<D> BestFirst<D> {
    /// With room for so many drafts at a time.
    pub fn with_capacity(drafts: usize) -> Self {
        Self(BinaryHeap::with_capacity(drafts))
    }

    /// Puts a draft in line. `score` is at most that of the parent and of the sibling before it, and no negative zero: sums that begin with a
    /// positive one and products of chances are none.
    pub fn offer(&mut self, place: Place, score: f32, draft: D) {
        self.0.push(Waiting { score, place, draft });
    }

    /// Takes the likeliest draft out of it.
    pub fn take(&mut self) -> Option<Waiting<D>> {
        self.0.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_goes_first_and_among_equals_the_shallower_the_earlier_and_the_better() {
        let first = Place::first(1);
        let order = [
            (0.9, first.child(7)),
            (0.5, Place::first(0)),
            (0.5, first),
            (0.5, first.sibling()),
            (0.5, Place::first(0).child(1)),
            (0.5, first.child(1)),
            (0.5, first.child(1).sibling()),
            (0.5, first.child(2)),
            (0.0, first),
            (0.0, first.sibling()),
        ];
        for turn in 0..order.len() {
            let mut line = BestFirst::with_capacity(0);
            for at in 0..order.len() {
                let (score, place) = order[(at + turn) % order.len()];
                line.offer(place, score, ());
            }
            let taken: Vec<_> = std::iter::from_fn(|| line.take().map(|w| (w.score, w.place))).collect();
            assert_eq!(taken, order);
        }
    }
}
