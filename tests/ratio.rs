//! Ratio verifiers with keyed and given coins: edges, boundaries and refusals.

mod common;

use common::Numbers;
use dflash_rs::error::Error;
use dflash_rs::types::TokenId;
use dflash_rs::verify::{GivenCoins, KeyedCoins, Verdict, block, token};
use proptest::prelude::*;

fn both(p: &[f64], q: &[f64], vocab: usize, drafts: &[u32], accept: &[f64], last: f64) -> [Verdict; 2] {
    let x: Vec<TokenId> = drafts.iter().copied().map(TokenId).collect();
    let coins = || GivenCoins::new(accept, last, x.len()).unwrap();
    [
        token::verify(p, q, vocab, &x, &mut coins()).unwrap(),
        block::verify(p, q, vocab, &x, &mut coins()).unwrap(),
    ]
}

#[test]
fn a_coin_of_zero_does_not_accept_a_token_the_target_forbids() {
    let p = [0.0, 1.0, 0.5, 0.5];
    for verdict in both(&p, &[1.0, 0.0], 2, &[0], &[0.0], 0.0) {
        assert_eq!(
            verdict,
            Verdict {
                accepted: 0,
                last: TokenId(1)
            }
        );
    }
}

#[test]
fn a_draft_of_zero_draft_probability_is_rejected() {
    let p = [0.5, 0.5, 0.5, 0.5];
    for verdict in both(&p, &[1.0, 0.0], 2, &[1], &[0.0], 0.9) {
        assert_eq!(
            verdict,
            Verdict {
                accepted: 0,
                last: TokenId(1)
            }
        );
    }
}

#[test]
fn equal_rows_accept_at_every_coin_and_end_with_the_targets_last_row() {
    let row = [0.2, 0.3, 0.5];
    let p = [row, row, [0.0, 1.0, 0.0]].concat();
    let q = [row, row].concat();
    let almost_one = 1.0 - f64::EPSILON / 2.0;
    for verdict in both(&p, &q, 3, &[2, 0], &[almost_one, almost_one], 0.5) {
        assert_eq!(
            verdict,
            Verdict {
                accepted: 2,
                last: TokenId(1)
            }
        );
    }
}

#[test]
fn a_residual_without_mass_draws_from_the_target_not_a_fixed_id() {
    // q exceeds p everywhere by a rounding error: nothing is left of max(p - q, 0).
    let p = [0.0, 0.4999, 0.4999, 0.0, 0.5, 0.5];
    let q = [0.0, 0.5, 0.5];
    let [low, _] = both(&p, &q, 3, &[1], &[0.9999], 0.2);
    let [high, _] = both(&p, &q, 3, &[1], &[0.9999], 0.8);
    assert_eq!((low.accepted, low.last), (0, TokenId(1)));
    assert_eq!((high.accepted, high.last), (0, TokenId(2)));
}

#[test]
fn block_takes_the_last_success_not_the_first_failure() {
    // p/q = 1/2 then 2: draft 1 fails its coin, draft 2 passes, and both are kept.
    let p = [0.25, 0.75, 0.8, 0.2, 0.5, 0.5];
    let q = [0.5, 0.5, 0.4, 0.6];
    let [by_token, by_block] = both(&p, &q, 2, &[0, 0], &[0.9, 0.9], 0.0);
    assert_eq!(by_token.accepted, 0);
    assert_eq!(by_block.accepted, 2);
}

#[test]
fn the_last_token_has_mass_at_every_vocabulary_boundary() {
    for v in [100usize, 8193, 10_000, 151_936] {
        let live = (v - 1) / 64 * 64;
        let mut p = vec![0.0f32; 2 * v];
        for row in p.chunks_mut(v) {
            row[..live].fill(1.0 / live as f32);
        }
        // The drafter sits on the tail: rejected always, and the residual is p.
        let mut q = vec![0.0f32; v];
        q[live..].fill(1.0 / (v - live) as f32);
        for seed in 0..4 {
            let mut coins = KeyedCoins::new(seed, 17);
            for draft in [live, v - 1] {
                let x = [TokenId(draft as u32)];
                for verdict in [
                    token::verify(&p, &q, v, &x, &mut coins).unwrap(),
                    block::verify(&p, &q, v, &x, &mut coins).unwrap(),
                ] {
                    assert_eq!(verdict.accepted, 0);
                    assert!((verdict.last.0 as usize) < live, "V = {v}: {}", verdict.last.0);
                }
            }
        }
        // All mass on the last column.
        let mut p = vec![0.0f32; v];
        p[v - 1] = 1.0;
        let verdict = token::verify(&p, &[], v, &[], &mut KeyedCoins::new(1, 1)).unwrap();
        assert_eq!(verdict.last.0 as usize, v - 1);
    }
}

#[test]
fn arguments_that_do_not_fit_are_refused_by_name() {
    let mut coins = KeyedCoins::new(0, 0);
    let x = [TokenId(1)];
    let (p, q) = ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5]);
    let mut check = |p: &[f64], q: &[f64], v: usize, x: &[TokenId]| {
        let t = token::verify(p, q, v, x, &mut coins).unwrap_err();
        assert_eq!(t, block::verify(p, q, v, x, &mut coins).unwrap_err());
        t
    };
    assert_eq!(
        check(&p[..2], &q, 2, &x),
        Error::Length {
            name: "p",
            got: 2,
            expected: 4
        }
    );
    assert_eq!(
        check(&p, &p, 2, &x),
        Error::Length {
            name: "q",
            got: 4,
            expected: 2
        }
    );
    let name = |e: Error| match e {
        Error::InvalidArgument { name, .. } => (name, 0),
        Error::AtRow { row, source } => match *source {
            Error::InvalidArgument { name, .. } => (name, row),
            other => panic!("{other}"),
        },
        other => panic!("{other}"),
    };
    assert_eq!(name(check(&[], &[], 0, &[])), ("vocab", 0));
    assert_eq!(name(check(&p, &q, 2, &[TokenId(2)])), ("drafts", 0));
    assert_eq!(name(check(&[0.5, 0.5, 0.9, 0.5], &q, 2, &x)), ("p", 1));
    assert_eq!(name(check(&[0.5, 0.5, f64::NAN, 0.5], &q, 2, &x)), ("p", 1));
    assert_eq!(name(check(&p, &[1.5, -0.5], 2, &x)), ("q", 0));
    assert_eq!(name(check(&p, &[f64::INFINITY, 0.0], 2, &x)), ("q", 0));
    assert!(GivenCoins::new(&[0.5], 0.5, 2).is_err());
    assert!(GivenCoins::new(&[1.0], 0.5, 1).is_err());
    assert!(GivenCoins::new(&[f64::NAN], 0.5, 1).is_err());
}

proptest! {
    #[test]
    fn what_comes_out_is_always_possible_under_the_target(
        seed: u64, vocab in 1usize..40, g in 0usize..8, round in 0u64..1000,
    ) {
        let mut numbers = Numbers::new(seed);
        let mut rows = |n| -> Vec<f64> { (0..n).flat_map(|_| numbers.distribution(vocab)).collect() };
        let (p, q) = (rows(g + 1), rows(g));
        let x: Vec<TokenId> = (0..g)
            .map(|i| TokenId(Numbers::new(seed ^ i as u64).pick(&q[i * vocab..(i + 1) * vocab]) as u32))
            .collect();
        for verdict in [
            token::verify(&p, &q, vocab, &x, &mut KeyedCoins::new(seed, round)).unwrap(),
            block::verify(&p, &q, vocab, &x, &mut KeyedCoins::new(seed, round)).unwrap(),
        ] {
            let a = verdict.accepted as usize;
            prop_assert!(a <= g);
            for i in 0..a {
                prop_assert!(p[i * vocab + x[i].0 as usize] > 0.0);
            }
            prop_assert!(p[a * vocab + verdict.last.0 as usize] > 0.0);
        }
    }

    #[test]
    fn an_f32_row_gives_the_verdict_of_the_same_row_in_f64(seed: u64, vocab in 2usize..20) {
        let mut numbers = Numbers::new(seed);
        let p32: Vec<f32> = (0..4).flat_map(|_| numbers.distribution(vocab)).map(|x| x as f32).collect();
        let q32: Vec<f32> = (0..3).flat_map(|_| numbers.distribution(vocab)).map(|x| x as f32).collect();
        let (p, q): (Vec<f64>, Vec<f64>) =
            (p32.iter().map(|&x| x.into()).collect(), q32.iter().map(|&x| x.into()).collect());
        let x: Vec<TokenId> = (0..3).map(|_| TokenId(numbers.below(vocab) as u32)).collect();
        prop_assert_eq!(
            block::verify(&p32, &q32, vocab, &x, &mut KeyedCoins::new(seed, 1)).unwrap(),
            block::verify(&p, &q, vocab, &x, &mut KeyedCoins::new(seed, 1)).unwrap()
        );
    }
}
