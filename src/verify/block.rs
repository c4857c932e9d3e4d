//! Block verification (Sun et al., arXiv 2403.10444, algorithm 2): in expectation never fewer accepted drafts than [`super::token`].
//!
//! ```text
//! P[0] = 1;  P[i] = min(1, P[i-1] * p_{i-1}(x_i) / q_{i-1}(x_i))              (q = 0: P = 0 from there on)
//! h[g] = P[g];  for 1 <= i < g:  Z_i = sum_v max(P[i] * p_i(v) - q_i(v), 0);  h[i] = Z_i / (Z_i + 1 - P[i])
//! tau = max { i : eta_i < h[i] } or 0, with independent coins eta_i
//! y ~ p_g if tau = g, else norm(max(P[tau] * p_tau - q_tau, 0))
//! ```
//!
//! A failed position does not end the search: a later one may still pass and carries all before it. Equal to the token
//! level when g = 1 or q is one-hot, so it pays for sampled drafts only.

use crate::error::Result;
use crate::types::TokenId;
use crate::verify::ratio::{Coins, Rows, Verdict};

/// Verifies `drafts` as one block; arguments, promises and errors are those of [`super::token::verify`].
/// Coin `i - 1` is `eta_i`.
pub fn verify<T: Copy + Into<f64>>(
    p: &[T],
    q: &[T],
    vocab: usize,
    drafts: &[TokenId],
    coins: &mut impl Coins,
) -> Result<Verdict> {
    let rows = Rows::new(p, q, vocab, drafts)?;
    let g = drafts.len();
    let mut reach = Vec::with_capacity(g + 1);
    reach.push(1.0f64);
    for (i, &x) in drafts.iter().enumerate() {
        let (p, q) = (rows.p(i, x), rows.q(i, x));
        reach.push(if q > 0.0 { (reach[i] * (p / q)).min(1.0) } else { 0.0 });
    }
    // From the back, so that the costly Z is computed only until the first success; h <= P spares most failures.
    let accepted = (1..=g)
        .rev()
        .find(|&i| {
            let whole = reach[i];
            coins.accept(i - 1, whole, &mut || {
                if i == g || whole >= 1.0 {
                    // At P = 1 the quotient is Z / Z, also in the limit Z = 0 (p = q at that row).
                    return (whole, 1.0);
                }
                let z: f64 = rows.excess(i, whole).sum();
                (z, z + (1.0 - whole))
            })
        })
        .unwrap_or(0);
    Ok(Verdict {
        accepted: accepted as u32,
        last: rows.last(accepted, reach[accepted], coins),
    })
}
