//! One round, enumerated exactly: whatever the drafts, the text has the target's law.

mod common;

use common::*;
use dflash_rs::draft::{DraftTree, TopK};
use dflash_rs::types::TokenId;
use dflash_rs::verify::{Verdict, block, token, walk_chain, walk_tree};

fn by_token(p: &[f64], q: &[f64], v: usize, x: &[TokenId], c: &mut Branches) -> Verdict {
    token::verify(p, q, v, x, c).unwrap()
}

fn by_block(p: &[f64], q: &[f64], v: usize, x: &[TokenId], c: &mut Branches) -> Verdict {
    block::verify(p, q, v, x, c).unwrap()
}

const EXACT: f64 = 1e-12;

fn shapes() -> impl Iterator<Item = (usize, usize, u64)> {
    (2..=4).flat_map(|vocab| (1..=3).flat_map(move |g| (0..6).map(move |seed| (vocab, g, seed))))
}

#[test]
fn token_and_block_verification_keep_the_target_law_exactly() {
    for (vocab, g, seed) in shapes() {
        let mut numbers = Numbers::new(seed);
        let target = Model::random(vocab, g + 1, &mut numbers);
        let drafter = Model::random(vocab, g, &mut numbers);
        let truth = target.law(g + 1);
        for verify in [by_token as Verifier, by_block] {
            let (law, _) = law_of_round(&target, &drafter, g, |_| g, verify);
            let off = distance(&law, &truth);
            assert!(off < EXACT, "V={vocab} g={g} seed={seed}: off by {off:e}");
        }
    }
}

#[test]
fn block_accepts_at_least_as_many_as_token_in_expectation_and_sometimes_more() {
    let mut gain = 0.0f64;
    for (vocab, g, seed) in shapes() {
        let mut numbers = Numbers::new(100 + seed);
        let target = Model::random(vocab, g + 1, &mut numbers);
        let drafter = Model::random(vocab, g, &mut numbers);
        let (_, t) = law_of_round(&target, &drafter, g, |_| g, by_token);
        let (_, b) = law_of_round(&target, &drafter, g, |_| g, by_block);
        assert!(b >= t - EXACT, "V={vocab} g={g} seed={seed}: block {b} < token {t}");
        if g == 1 {
            assert!((b - t).abs() < EXACT, "one draft: block {b}, token {t}");
        }
        gain = gain.max(b - t);
    }
    assert!(gain > 0.01, "block never won: {gain}");
}

#[test]
fn block_equals_token_on_one_hot_drafts_in_law_and_in_length() {
    for (vocab, g, seed) in shapes() {
        let mut numbers = Numbers::new(200 + seed);
        let target = Model::random(vocab, g + 1, &mut numbers);
        let drafter = Model::one_hot(vocab, g, &mut numbers);
        let (law_t, t) = law_of_round(&target, &drafter, g, |_| g, by_token);
        let (law_b, b) = law_of_round(&target, &drafter, g, |_| g, by_block);
        assert!((t - b).abs() < EXACT, "token {t}, block {b}");
        assert!(distance(&law_t, &law_b) < EXACT);
        assert!(distance(&law_t, &target.law(g + 1)) < EXACT);
    }
}

#[test]
fn equal_distributions_accept_everything() {
    for (vocab, g, seed) in shapes() {
        let model = Model::random(vocab, g + 1, &mut Numbers::new(300 + seed));
        for verify in [by_token as Verifier, by_block] {
            let (law, expected) = law_of_round(&model, &model, g, |_| g, verify);
            assert!((expected - g as f64).abs() < EXACT, "accepted {expected} of {g}");
            assert!(distance(&law, &model.law(g + 1)) < EXACT);
        }
    }
}

#[test]
fn disjoint_supports_accept_nothing_and_the_text_is_the_targets() {
    let g = 3;
    let target = Model::constant(&[0.0, 0.3, 0.0, 0.7], g + 1);
    let drafter = Model::constant(&[0.6, 0.0, 0.4, 0.0], g);
    for verify in [by_token as Verifier, by_block] {
        let (law, expected) = law_of_round(&target, &drafter, g, |_| g, verify);
        assert_eq!(expected, 0.0);
        assert!(distance(&law, &target.law(g + 1)) < EXACT);
    }
}

#[test]
fn a_greedy_target_is_followed_exactly() {
    for (vocab, g, seed) in shapes() {
        let mut numbers = Numbers::new(400 + seed);
        let target = Model::one_hot(vocab, g + 1, &mut numbers);
        let drafter = Model::random(vocab, g, &mut numbers);
        let truth = target.law(g + 1);
        let (law_t, t) = law_of_round(&target, &drafter, g, |_| g, by_token);
        let (law_b, b) = law_of_round(&target, &drafter, g, |_| g, by_block);
        assert!(distance(&law_t, &truth) < EXACT && distance(&law_b, &truth) < EXACT);
        assert!((t - b).abs() < EXACT);
    }
}

#[test]
fn the_verified_length_may_follow_earlier_drafts() {
    // Stop after the first draft if it is token 0: the decision about draft 2 looks at draft 1 only.
    for seed in 0..5 {
        let mut numbers = Numbers::new(500 + seed);
        let target = Model::random(3, 4, &mut numbers);
        let drafter = Model::random(3, 3, &mut numbers);
        let policy = |x: &[usize]| if x[0] == 0 { 1 } else { 3 };
        for verify in [by_token as Verifier, by_block] {
            let (law, _) = law_of_round(&target, &drafter, 3, policy, verify);
            assert!(distance(&law, &target.law(4)) < EXACT);
        }
    }
}

#[test]
fn a_policy_that_peeks_at_the_draft_it_drops_is_caught() {
    // p = q = uniform {a, b}, "drop the draft if it is b": a comes out in three of four cases.
    let model = Model::constant(&[0.5, 0.5], 2);
    for verify in [by_token as Verifier, by_block] {
        let (law, _) = law_of_round(&model, &model, 1, |x| usize::from(x[0] == 0), verify);
        let first_is_a = law[0] + law[1];
        assert!((first_is_a - 0.75).abs() < EXACT, "Pr(a) = {first_is_a}");
        assert!(distance(&law, &model.law(2)) > 0.1, "the oracle must see it");
    }
}

#[test]
fn the_oracle_catches_verifiers_that_are_wrong_in_the_known_ways() {
    // The residual without the scale P[tau].
    fn unscaled_residual(p: &[f64], q: &[f64], v: usize, x: &[TokenId], c: &mut Branches) -> Verdict {
        let mut verdict = by_block(p, q, v, x, c);
        let t = verdict.accepted as usize;
        if t < x.len() {
            let w: Vec<f64> = (0..v).map(|i| (p[t * v + i] - q[t * v + i]).max(0.0)).collect();
            if w.iter().any(|&w| w > 0.0) {
                verdict.last = TokenId(dflash_rs::verify::Coins::pick(c, &w) as u32);
            }
        }
        verdict
    }
    // The last token from p instead of the residual.
    fn no_residual(p: &[f64], q: &[f64], v: usize, x: &[TokenId], c: &mut Branches) -> Verdict {
        let mut verdict = by_token(p, q, v, x, c);
        let t = verdict.accepted as usize;
        verdict.last = TokenId(dflash_rs::verify::Coins::pick(c, &p[t * v..(t + 1) * v]) as u32);
        verdict
    }
    // A q that is not the one the drafts came from.
    fn wrong_q(p: &[f64], q: &[f64], v: usize, x: &[TokenId], c: &mut Branches) -> Verdict {
        let q: Vec<f64> = q.iter().map(|q| 0.5 * q + 0.5 / v as f64).collect();
        by_token(p, &q, v, x, c)
    }
    for (name, verify) in [
        ("unscaled residual", unscaled_residual as Verifier),
        ("no residual", no_residual),
        ("wrong q", wrong_q),
    ] {
        let off = (600..610)
            .map(|seed| {
                let mut numbers = Numbers::new(seed);
                let target = Model::random(3, 4, &mut numbers);
                let drafter = Model::random(3, 3, &mut numbers);
                let (law, _) = law_of_round(&target, &drafter, 3, |_| 3, verify);
                distance(&law, &target.law(4))
            })
            .fold(0.0, f64::max);
        assert!(off > 1e-4, "{name} passed: off by {off:e}");
    }
}

#[test]
fn the_chain_walk_keeps_the_target_law_for_every_fixed_draft() {
    for (vocab, g, seed) in shapes() {
        let mut numbers = Numbers::new(700 + seed);
        let target = Model::random(vocab, g + 1, &mut numbers);
        let all = sequences(vocab, g + 1);
        let truth = target.law(g + 1);
        for drafts in sequences(vocab, g) {
            let ids = tokens(&drafts);
            let mut law = vec![0.0; all.len()];
            let mut reach = vec![0.0; g + 1];
            Branches::explore(
                |branches| {
                    walk_chain(&ids, |row| {
                        Ok(TokenId(branches.choose(target.row(&drafts[..row])) as u32))
                    })
                    .unwrap()
                },
                |walk, probability| {
                    let mut out = drafts[..walk.accepted as usize].to_vec();
                    out.push(walk.bonus.0 as usize);
                    spread(&mut law, &all, &target, &out, probability);
                    reach[..=walk.accepted as usize]
                        .iter_mut()
                        .for_each(|r| *r += probability);
                },
            );
            assert!(distance(&law, &truth) < EXACT);
            // Optimal: accepted >= d exactly as often as the target says the first d drafts.
            for (d, r) in reach.iter().enumerate() {
                assert!((r - target.probability(&drafts[..d], 0)).abs() < EXACT);
            }
        }
    }
}

#[test]
fn the_tree_walk_keeps_the_target_law_and_is_optimal_at_every_depth() {
    for seed in 0..20 {
        let mut numbers = Numbers::new(800 + seed);
        let (vocab, depth, k) = (4, 3, 3);
        let target = Model::random(vocab, depth + 1, &mut numbers);
        let mut ids = Vec::new();
        let mut log_probs = Vec::new();
        for _ in 0..depth {
            let row = numbers.distribution(vocab);
            let mut order: Vec<usize> = (0..vocab).collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
            ids.extend(tokens(&order[..k]));
            log_probs.extend(order[..k].iter().map(|&t| row[t].ln() as f32));
        }
        let nodes = 1 + numbers.below(14);
        let mut source = TopK::new(&ids, &log_probs, k).unwrap();
        let tree = DraftTree::build(TokenId(0), nodes, depth, &mut source).unwrap();
        let plain = |path: &[TokenId]| path.iter().map(|t| t.0 as usize).collect::<Vec<_>>();
        let all = sequences(vocab, depth + 1);
        let mut law = vec![0.0; all.len()];
        let mut reach = vec![0.0; depth + 1];
        Branches::explore(
            |branches| {
                walk_tree(&tree, |node| {
                    let row = target.row(&plain(&tree.path_tokens(node)));
                    Ok(TokenId(branches.choose(row) as u32))
                })
                .unwrap()
            },
            |walk, probability| {
                let node = walk.path.last().map_or(0, |&n| n as usize);
                let mut out = plain(&tree.path_tokens(node));
                assert_eq!(out.len(), walk.path.len());
                reach[..=out.len()].iter_mut().for_each(|r| *r += probability);
                out.push(walk.bonus.0 as usize);
                spread(&mut law, &all, &target, &out, probability);
            },
        );
        assert!(distance(&law, &target.law(depth + 1)) < EXACT, "seed {seed}");
        for (d, r) in reach.iter().enumerate() {
            let inside: f64 = (0..tree.len())
                .filter(|&n| tree.depths()[n] as usize == d)
                .map(|n| target.probability(&plain(&tree.path_tokens(n)), 0))
                .sum();
            assert!((r - inside).abs() < EXACT, "seed {seed}, depth {d}: {r} of {inside}");
        }
    }
}

#[test]
fn a_walk_draws_only_the_rows_it_reaches_each_once() {
    let drafts = tokens(&[5, 6, 7]);
    let mut drawn = Vec::new();
    let says = [5, 9, 7, 8];
    let walk = walk_chain(&drafts, |row| {
        drawn.push(row);
        Ok(TokenId(says[row]))
    })
    .unwrap();
    assert_eq!((walk.accepted, walk.bonus), (1, TokenId(9)));
    assert_eq!(drawn, [0, 1]);
    let none = walk_chain(&[], |_| Ok(TokenId(3))).unwrap();
    assert_eq!((none.accepted, none.bonus), (0, TokenId(3)));
}

#[test]
fn the_walk_of_a_chain_as_a_tree_is_the_walk_of_the_chain() {
    for seed in 0..200 {
        let mut numbers = Numbers::new(900 + seed);
        let g = numbers.below(6);
        let drafts: Vec<TokenId> = (0..g).map(|_| TokenId(numbers.below(2) as u32)).collect();
        let says: Vec<TokenId> = (0..=g).map(|_| TokenId(numbers.below(2) as u32)).collect();
        let tree = DraftTree::chain(TokenId(9), &drafts, &vec![-0.5; g]).unwrap();
        let chain = walk_chain(&drafts, |row| Ok(says[row])).unwrap();
        let walk = walk_tree(&tree, |node| Ok(says[node])).unwrap();
        assert_eq!(walk.bonus, chain.bonus);
        assert_eq!(walk.path, (1..=chain.accepted).collect::<Vec<_>>());
    }
}
