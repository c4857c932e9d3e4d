//! Drafts that share the target's random numbers.
//!
//! A token is drawn as the one with the largest `ln p / T + gumbel(seed, position, token)` (see [`crate::rng`]), and the numbers are there before `p`
//! is. So a request that samples is drafted the candidate that has the largest sum of those numbers and what the *drafter* takes it for: where the
//! two distributions are the same, so are the tokens. The likeliest candidate, without the numbers, would be right only as often as it is drawn.
//!
//! ```text
//!   candidates of a place    the   a   one          ln q / T       -0.4  -1.6  -2.3
//!                                                   gumbel          0.1   2.0   0.3     of the target's draw at this position
//!                            drafted: a             sum            -0.3   0.4  -2.0
//! ```
//! It changes no text: what is emitted is the target's own draw at its position, which is the same whatever was drafted. Two distributions of total
//! variation distance d agree with a chance of at least (1 - d) / (1 + d) (Daliri, Musco and Suresh, *Coupling without communication and
//! drafter-invariant speculative decoding*, 2024).

use crate::rng::{Domain, Stream, ln};

/// How much more a drafter's preferences count than they say. A drafter knows less than its target, so its distribution is flatter: of 0.7, 1, 1.3 and
/// 1.7 this had the most drafts accepted with the bundled pair and with SmolLM2, at temperatures 0.7 and 1.
const SHARPER: f32 = 1.3;

/// The temperature at which a drafter's logits are drawn to give what [`couple`] has first of all candidates, for a draw at `temperature`.
pub fn drafted_at(temperature: f32) -> f32 {
    temperature / SHARPER
}

/// The target's numbers for one place.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// Of the request.
    pub seed: u64,
    /// Of the token in its text.
    pub position: u64,
    /// Above 0.
    pub temperature: f32,
}

/// Reorders the candidates of a place, pairs of a token and its probability, by what they come to with the target's numbers, the best first, and
/// makes of the probabilities the share of each in the sums (softmax). The first `k` are in order, which is all that is looked at.
pub fn couple(draw: &Draw, candidates: &mut [(i64, f32)], k: usize) {
    let numbers = Stream::new(draw.seed, draw.position, Domain::Draw);
    let weight = SHARPER / draw.temperature;
    let mut most = f32::NEG_INFINITY;
    for (token, chance) in candidates.iter_mut() {
        // Neither a number nor above 0: nobody's choice.
        *chance = if *chance > 0.0 && *token >= 0 {
            weight * ln(*chance) + numbers.gumbel(*token as u32)
        } else {
            f32::NEG_INFINITY
        };
        most = most.max(*chance);
    }
    let mut sum = 0.0;
    for (_, chance) in candidates.iter_mut() {
        *chance = if most.is_finite() { (*chance - most).exp() } else { 0.0 };
        sum += *chance;
    }
    for (_, chance) in candidates.iter_mut() {
        *chance /= if sum > 0.0 { sum } else { 1.0 };
    }
    let falling = |a: &(i64, f32), b: &(i64, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let ordered = k.min(candidates.len());
    if (1..candidates.len()).contains(&ordered) {
        candidates.select_nth_unstable_by(ordered - 1, falling);
    }
    candidates[..ordered].sort_unstable_by(falling);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a target with this distribution draws.
    fn drawn(draw: &Draw, p: &[f32]) -> i64 {
        let numbers = Stream::new(draw.seed, draw.position, Domain::Draw);
        let score = |token: usize| p[token].ln() / draw.temperature + numbers.gumbel(token as u32);
        (0..p.len()).max_by(|&a, &b| score(a).total_cmp(&score(b))).unwrap() as i64
    }

    fn distribution(weights: &[f32]) -> Vec<f32> {
        let sum: f32 = weights.iter().sum();
        weights.iter().map(|w| w / sum).collect()
    }

    fn candidates(q: &[f32]) -> Vec<(i64, f32)> {
        q.iter().enumerate().map(|(token, &q)| (token as i64, q)).collect()
    }

    /// How often the first draft and the likeliest candidate are what is drawn, of 2,000 positions.
    fn agreement(p: &[f32], q: &[f32], temperature: f32) -> (f64, f64) {
        let likeliest = (0..q.len()).max_by(|&a, &b| q[a].total_cmp(&q[b])).unwrap() as i64;
        let (mut coupled, mut alone) = (0, 0);
        for position in 0..2000 {
            let draw = Draw {
                seed: 11,
                position,
                temperature,
            };
            let mut drafts = candidates(q);
            couple(&draw, &mut drafts, 1);
            let token = drawn(&draw, p);
            coupled += usize::from(drafts[0].0 == token);
            alone += usize::from(likeliest == token);
        }
        (coupled as f64 / 2000.0, alone as f64 / 2000.0)
    }

    #[test]
    fn a_flat_distribution_is_guessed_far_more_often_than_its_likeliest_token_is_drawn() {
        let p = distribution(&[1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.0]);
        // The drafter is off by a quarter of most of them.
        let q = distribution(&[1.2, 1.0, 1.1, 0.8, 1.0, 1.1, 0.9, 1.0]);
        let (coupled, alone) = agreement(&p, &q, 1.0);
        assert!(coupled > 0.75 && alone < 0.2, "{coupled} {alone}");
        let (coupled, alone) = agreement(&p, &p, 0.7);
        assert!(coupled > 0.9 && alone < 0.2, "{coupled} {alone}");
    }

    proptest! {
        #[test]
        fn who_draws_from_all_of_a_drafters_distribution_drafts_the_same(
            weights in prop::collection::vec(0.01f32..4.0, 1..80), seed: u64, position in 0u64..1 << 40, temperature in 0.05f32..3.0,
        ) {
            let (q, draw) = (distribution(&weights), Draw { seed, position, temperature });
            let mut drafts = candidates(&q);
            couple(&draw, &mut drafts, 2);
            // The sums are rounded in another order: what is all but tied may come either way.
            let tied = drafts.len() > 1 && drafts[1].1 > 0.999 * drafts[0].1;
            let token = drawn(&Draw { temperature: drafted_at(temperature), ..draw }, &q);
            prop_assert!(tied || token == drafts[0].0);
        }

        #[test]
        fn the_best_come_first_with_their_shares_and_no_candidate_is_lost(
            weights in prop::collection::vec(0.0f32..4.0, 1..80), k in 0usize..90, seed: u64, position in 0u64..1 << 40,
            temperature in 0.05f32..3.0,
        ) {
            let q = distribution(&weights);
            let mut drafts = candidates(&q);
            couple(&Draw { seed, position, temperature }, &mut drafts, k);
            let ordered = k.min(drafts.len());
            let best = drafts[..ordered].iter().map(|d| d.1);
            prop_assert!(best.clone().is_sorted_by(|a, b| a >= b));
            let least = best.fold(f32::INFINITY, f32::min);
            prop_assert!(ordered == 0 || drafts[ordered..].iter().all(|d| d.1 <= least));
            if weights.iter().any(|&w| w > 0.0) {
                prop_assert!((drafts.iter().map(|d| f64::from(d.1)).sum::<f64>() - 1.0).abs() < 1e-4);
            }
            let mut tokens: Vec<_> = drafts.iter().map(|d| d.0).collect();
            tokens.sort_unstable();
            prop_assert_eq!(tokens, (0..weights.len() as i64).collect::<Vec<_>>());
        }

        #[test]
        fn a_cold_draw_is_guessed_by_the_likeliest(
            weights in prop::collection::vec(1usize..9, 2..20), seed: u64, position: u64,
        ) {
            // Tokens whose weights differ by more than any two numbers of the generator can.
            let q: Vec<f32> = weights.iter().enumerate().map(|(at, &w)| (w * 20 + at) as f32).collect();
            let likeliest = (0..q.len()).max_by(|&a, &b| q[a].total_cmp(&q[b])).unwrap();
            let mut drafts = candidates(&distribution(&q));
            couple(&Draw { seed, position, temperature: 1e-4 }, &mut drafts, 1);
            prop_assert_eq!(drafts[0].0, likeliest as i64);
        }
    }

    #[test]
    fn what_is_no_probability_is_nobodys_choice() {
        let draw = Draw {
            seed: 3,
            position: 9,
            temperature: 1.0,
        };
        let mut drafts = vec![(4, f32::NAN), (5, 0.0), (6, -1.0), (7, 0.1), (-1, 0.9)];
        couple(&draw, &mut drafts, 2);
        assert_eq!(drafts[0], (7, 1.0));
        assert!(drafts[1..].iter().all(|d| d.1 == 0.0));
        let mut none = vec![(5, 0.0), (4, f32::NAN)];
        couple(&draw, &mut none, 1);
        assert!(none.iter().all(|d| d.1 == 0.0));
    }
}
