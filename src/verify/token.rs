//! Token-level rejection sampling (Leviathan et al., arXiv 2211.17192, algorithm 1), for drafts that were *sampled*.
//!
//! Draft `x` of row `i` is accepted iff `q(x) > 0` and `u q(x) < p(x)`; the first rejection ends the round with a draw from
//! `norm(max(p - q, 0))`, and `g` accepts end it with a draw from the target's last row.

use crate::error::Result;
use crate::types::TokenId;
use crate::verify::ratio::{Coins, Rows, Verdict};

/// Verifies `drafts` (g of them). `p` is [g + 1, V], `q` is [g, V], row-major probabilities: row `i` of both is the law of the
/// token at draft `i`'s place, `p` after the whole target transform and `q` exactly as the draft was drawn from it.
///
/// The committed tokens have the target's law. Which positions are verified may depend on earlier drafts and on the
/// drafter's rows, never on the draft of that position or a later one.
///
/// Errors: lengths that do not fit, drafts outside the vocabulary, rows that are no distributions.
pub fn verify<T: Copy + Into<f64>>(
    p: &[T],
    q: &[T],
    vocab: usize,
    drafts: &[TokenId],
    coins: &mut impl Coins,
) -> Result<Verdict> {
    let rows = Rows::new(p, q, vocab, drafts)?;
    let accepted = (0..drafts.len())
        .find(|&i| {
            let (p, q) = (rows.p(i, drafts[i]), rows.q(i, drafts[i]));
            !(q > 0.0 && coins.accept(i, 1.0, &mut || (p, q)))
        })
        .unwrap_or(drafts.len());
    Ok(Verdict {
        accepted: accepted as u32,
        last: rows.last(accepted, 1.0, coins),
    })
}
