//! Draft proposals: chains and trees, one type for both.
//!
//! ```text
//!   anchor ─┬─ the ─┬─ cat ── sat          node 0 is the anchor; parents come before children
//!           │       └─ dog                 siblings by falling probability
//!           └─ a ──── cat                  mask row = the node itself and its ancestors, one bit per node
//! ```
//!
//! A chain is the tree in which every node has one child: the same code path, bit for bit. Who has no drafter looks up (`lookup`), and who samples
//! is drafted by the numbers that the target will draw with (`coupled`).

mod best_first;
mod build;
mod coupled;
mod lookup;
mod tree;

pub(crate) use best_first::{BestFirst, Place};
pub use build::{ChildSource, TopK, top_k};
pub use coupled::{Draw, couple, drafted_at};
pub use lookup::{Guess, Lookup, LookupRates};
pub use tree::{DraftTree, NO_NODE};
