//! Verification: keeping exactly what the target would have said.
//!
//! ```text
//!   target logits ──> sample (transform + keyed draw) ──> walk (follow the drafts while they match) ──> accepted + bonus
//!   target p, draft q of *sampled* drafts ──> token | block (ratio verifiers) ────────────────────────> accepted + last
//! ```
//!
//! Promises:
//! - Every function is pure: what it returns depends on its arguments and on keyed random numbers ([`crate::rng`]).
//! - [`walk_chain`] and [`walk_tree`] are lossless for every draft that does not depend on the numbers of the draw: each
//!   committed token is a fresh draw of the target. They also ask for no row beyond the one that stops them.
//! - [`token`] and [`block`] are lossless when the drafts were drawn from exactly the `q` passed in, and when *whether* a
//!   position is verified never depended on that position's draft or a later one.
//! - Nothing falls back: a row with NaN, +inf or nothing but -inf is an error that names its column, never a token.

pub mod block;
mod filter;
mod math;
mod ratio;
mod sample;
mod sampling;
pub mod token;
mod walk;
#[allow(
    unsafe_code,
    reason = "a routine compiled for AVX2 runs once the processor said that it has it"
)]
mod wide;

pub use ratio::{Coins, GivenCoins, KeyedCoins, Verdict};
pub use sample::{Sampled, Sampler, top_logprobs};
pub use sampling::{History, Sampling};
pub use walk::{TreeWalk, Walk, walk_chain, walk_tree};
