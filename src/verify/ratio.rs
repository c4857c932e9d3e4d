//! What the two ratio verifiers share: coins, checked probability rows, the draw of the last token.

use crate::error::{Error, Result, indices};
use crate::rng::{Domain, Stream, gumbel_of_word, ln};
use crate::types::TokenId;

/// Outcome of a ratio verifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Drafts accepted, counted from the front (tau).
    pub accepted: u32,
    /// The token after them: from the residual after a rejection, from the target's last row otherwise.
    pub last: TokenId,
}

/// Where a verifier's randomness comes from. Each column is asked for at most once and `pick` is called exactly once per round,
/// so an implementation may hand out keyed numbers, given numbers, or enumerate every outcome.
pub trait Coins {
    /// Whether the coin `u` of `column`, uniform in [0, 1), has `u < bound` and `u * whole < part`, where
    /// `(part, whole) = ratio()`. The ratio is costly and needed only for coins below the bound.
    fn accept(&mut self, column: usize, bound: f64, ratio: &mut dyn FnMut() -> (f64, f64)) -> bool;

    /// An index drawn in proportion to `weights`: finite, not negative, not all zero. Never an index of weight zero.
    fn pick(&mut self, weights: &[f64]) -> usize;
}

/// Fresh coins for every round, keyed by `(seed, sequence length at the start of the round, column, domain)`.
///
/// `round_start` must differ between the rounds of a request. Keying by the absolute position of each draft instead
/// would reuse the coins behind a rejection in the next round, which biases the text.
#[derive(Clone, Copy, Debug)]
pub struct KeyedCoins {
    accept: Stream,
    residual: Stream,
}

impl KeyedCoins {
    /// Coins of the round that starts with `round_start` tokens in the sequence.
    pub fn new(seed: u64, round_start: u64) -> Self {
        Self {
            accept: Stream::new(seed, round_start, Domain::Accept),
            residual: Stream::new(seed, round_start, Domain::Residual),
        }
    }
}

impl Coins for KeyedCoins {
    fn accept(&mut self, column: usize, bound: f64, ratio: &mut dyn FnMut() -> (f64, f64)) -> bool {
        passes(self.accept.uniform(column as u32), bound, ratio)
    }

    // Gumbel-max over ln(weight): no prefix sum, so a device that reduces in another order draws the same token.
    fn pick(&mut self, weights: &[f64]) -> usize {
        let heaviest = weights.iter().fold(0.0f64, |a, &b| if b > a { b } else { a });
        let mut words = [0u32; 64];
        let (mut best, mut best_id) = (f32::NEG_INFINITY, usize::MAX);
        for (b, block) in weights.chunks(64).enumerate() {
            if block.iter().all(|&w| w <= 0.0) {
                continue;
            }
            self.residual.fill_words((b * 64) as u32, &mut words);
            for (i, &w) in block.iter().enumerate() {
                // Relative to the heaviest: keeps `ln` in its domain. 2^-100 of it cannot win against a bounded Gumbel number.
                let relative = (w / heaviest) as f32;
                if relative >= f32::from_bits(27 << 23) {
                    let score = ln(relative) + gumbel_of_word(words[i]);
                    if score > best {
                        (best, best_id) = (score, b * 64 + i);
                    }
                }
            }
        }
        best_id
    }
}

/// Coins of the caller: `accept[i]` for column `i`, `last` for the final draw by inversion of the cumulative weights.
/// All in [0, 1), independent of each other, of the drafts and of every other round.
#[derive(Clone, Copy, Debug)]
pub struct GivenCoins<'a> {
    accept: &'a [f64],
    last: f64,
}

impl<'a> GivenCoins<'a> {
    /// Checks that there is one accept coin per draft and that all lie in [0, 1).
    pub fn new(accept: &'a [f64], last: f64, drafts: usize) -> Result<Self> {
        if accept.len() != drafts {
            return Err(Error::Length {
                name: "accept_coins",
                got: accept.len(),
                expected: drafts,
            });
        }
        for &u in accept.iter().chain([&last]) {
            if !(0.0..1.0).contains(&u) {
                return Err(Error::InvalidArgument {
                    name: "coins",
                    got: u.to_string(),
                    expected: "numbers in [0, 1)".into(),
                });
            }
        }
        Ok(Self { accept, last })
    }
}

impl Coins for GivenCoins<'_> {
    fn accept(&mut self, column: usize, bound: f64, ratio: &mut dyn FnMut() -> (f64, f64)) -> bool {
        passes(self.accept[column], bound, ratio)
    }

    fn pick(&mut self, weights: &[f64]) -> usize {
        let target = self.last * weights.iter().sum::<f64>();
        let (mut sum, mut chosen) = (0.0, 0);
        for (id, &w) in weights.iter().enumerate().filter(|&(_, &w)| w > 0.0) {
            chosen = id;
            sum += w;
            if target < sum {
                break;
            }
        }
        chosen
    }
}

fn passes(u: f64, bound: f64, ratio: &mut dyn FnMut() -> (f64, f64)) -> bool {
    u < bound && {
        let (part, whole) = ratio();
        // Strict, and a product instead of a quotient: a coin of exactly 0 must not accept a token of probability 0.
        u * whole < part
    }
}

/// Probability rows of one round, checked once: `p` is [g + 1, V] (target), `q` is [g, V] (draft).
pub(crate) struct Rows<'a, T> {
    p: &'a [T],
    q: &'a [T],
    vocab: usize,
}

impl<'a, T: Copy + Into<f64>> Rows<'a, T> {
    pub(crate) fn new(p: &'a [T], q: &'a [T], vocab: usize, drafts: &[TokenId]) -> Result<Self> {
        let g = drafts.len();
        if vocab == 0 {
            return Err(Error::InvalidArgument {
                name: "vocab",
                got: "0".into(),
                expected: "at least 1".into(),
            });
        }
        for (name, got, expected) in [("p", p.len(), (g + 1) * vocab), ("q", q.len(), g * vocab)] {
            if got != expected {
                return Err(Error::Length { name, got, expected });
            }
        }
        if let Some(x) = drafts.iter().find(|x| x.0 as usize >= vocab) {
            return Err(Error::InvalidArgument {
                name: "drafts",
                got: format!("token {}", x.0),
                expected: format!("tokens in {}", indices(vocab)),
            });
        }
        for (name, rows) in [("p", p), ("q", q)] {
            for (row, values) in rows.chunks(vocab).enumerate() {
                let mut sum = 0.0;
                let mut proper = true;
                for &v in values {
                    let v: f64 = v.into();
                    proper &= v >= 0.0; // false for NaN
                    sum += v;
                }
                if !proper || (sum - 1.0).abs() >= 1e-3 {
                    let got = if proper {
                        format!("a sum of {sum}")
                    } else {
                        "a negative or NaN entry".into()
                    };
                    let expected = "probabilities that sum to 1 (within 1e-3)".into();
                    let source = Box::new(Error::InvalidArgument { name, got, expected });
                    return Err(Error::AtRow { row, source });
                }
            }
        }
        Ok(Self { p, q, vocab })
    }

    pub(crate) fn p(&self, row: usize, x: TokenId) -> f64 {
        self.p[row * self.vocab + x.0 as usize].into()
    }

    pub(crate) fn q(&self, row: usize, x: TokenId) -> f64 {
        self.q[row * self.vocab + x.0 as usize].into()
    }

    /// `max(scale * p_row - q_row, 0)` over the vocabulary.
    pub(crate) fn excess(&self, row: usize, scale: f64) -> impl Iterator<Item = f64> {
        let at = row * self.vocab..(row + 1) * self.vocab;
        self.p[at.clone()]
            .iter()
            .zip(&self.q[at])
            .map(move |(&p, &q)| (scale * p.into() - q.into()).max(0.0))
    }

    /// The last token of a round that accepted `accepted` of `g` drafts, with the residual scaled by `scale`.
    pub(crate) fn last(&self, accepted: usize, scale: f64, coins: &mut impl Coins) -> TokenId {
        let mut weights: Vec<f64> = Vec::new();
        if accepted * self.vocab < self.q.len() {
            weights.extend(self.excess(accepted, scale));
        }
        // After g accepts there is no residual; and p = q up to rounding leaves none either. Both draw from p itself.
        if !weights.iter().any(|&w| w > 0.0) {
            weights.clear();
            weights.extend(
                self.p[accepted * self.vocab..(accepted + 1) * self.vocab]
                    .iter()
                    .map(|&p| p.into()),
            );
        }
        TokenId(coins.pick(&weights) as u32)
    }
}
