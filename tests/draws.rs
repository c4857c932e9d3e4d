//! Draws at the edges: ties, wins by a hair, rows far from zero, each penalty by itself, and the coins of the ratio verifiers.

use dflash_rs::rng::{Domain, Stream, gumbel, ln};
use dflash_rs::types::TokenId;
use dflash_rs::verify::{Coins, GivenCoins, History, KeyedCoins, Sampler, Sampling, top_logprobs};

fn ids(tokens: &[u32]) -> Vec<TokenId> {
    tokens.iter().copied().map(TokenId).collect()
}

fn draw(logits: &[f32], sampling: &Sampling, position: u64) -> usize {
    let history = History::default();
    let drawn = Sampler::new().draw_row(logits, sampling, &history, &[], position);
    drawn.unwrap().0 as usize
}

/// The documented draw over all columns at or above the floor, one by one.
fn plain(logits: &[f32], sampling: &Sampling, position: u64) -> usize {
    let scale = 1.0 / sampling.temperature;
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) * scale;
    let floor = if sampling.min_p > 0.0 {
        ln(sampling.min_p)
    } else {
        f32::MIN
    };
    let mut best = (f32::NEG_INFINITY, usize::MAX);
    for (id, &logit) in logits.iter().enumerate() {
        let t = logit * scale;
        let score = t + gumbel(sampling.seed, position, id as u32, Domain::Draw);
        if t - top >= floor && score > best.0 {
            best = (score, id);
        }
    }
    best.1
}

/// Rows of several blocks whose values are spread by `spread` around `middle`, in no order.
fn row(seed: u64, columns: usize, middle: f32, spread: f32) -> Vec<f32> {
    let stream = Stream::new(seed, 0, Domain::Draft);
    (0..columns)
        .map(|i| middle + spread * (stream.uniform(i as u32) as f32 - 0.5))
        .collect()
}

#[test]
fn rows_far_from_zero_and_other_temperatures_draw_what_a_plain_loop_draws() {
    for middle in [-500.0, -20.0, -0.8, 0.0, 0.3, 20.0, 500.0] {
        for (spread, columns) in [(0.5, 700), (3.0, 700), (12.0, 1500), (60.0, 300)] {
            for (temperature, min_p) in [(1.0, 0.0), (0.4, 0.0), (2.5, 0.0), (1.0, 0.2), (0.6, 0.9), (2.0, 0.01)] {
                for seed in 0..6 {
                    let logits = row(seed, columns, middle, spread);
                    let sampling = Sampling {
                        temperature,
                        min_p,
                        seed,
                        ..Sampling::default()
                    };
                    assert_eq!(
                        draw(&logits, &sampling, 3),
                        plain(&logits, &sampling, 3),
                        "{middle} +- {spread}, {sampling:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_whose_top_is_near_zero_keeps_every_column_that_min_p_keeps() {
    // Its quotient with the top is far below the floor, its distance from it is not.
    let mut logits = vec![-0.5f32; 320];
    logits[100] = 0.1;
    let sampling = |seed| Sampling {
        min_p: 0.2,
        seed,
        ..Sampling::default()
    };
    let elsewhere = (0..50)
        .filter(|&seed| draw(&logits, &sampling(seed), 0) / 64 != 1)
        .count();
    assert!(elsewhere > 25, "{elsewhere} of 50");
}

#[test]
fn equal_scores_go_to_the_lowest_id_in_a_block_and_across_blocks() {
    // So large that scores are whole numbers: many columns share the best one.
    let mut shared = 0;
    for seed in 0..200 {
        let mut logits: Vec<f32> = row(seed, 400, 0.0, 2.0)
            .iter()
            .map(|x| 10_000_000.0 + x.round())
            .collect();
        logits[seed as usize * 7 % 400] += 1.0;
        for top_k in [0, 400] {
            let sampling = Sampling {
                seed,
                top_k,
                ..Sampling::default()
            };
            let expected = plain(&logits, &sampling, 1);
            assert_eq!(draw(&logits, &sampling, 1), expected, "seed {seed}, top-k {top_k}");
            let score = |id: usize| logits[id] + gumbel(seed, 1, id as u32, Domain::Draw);
            shared += usize::from((expected + 1..400).any(|id| score(id) == score(expected)));
        }
    }
    assert!(shared > 100, "{shared} ties");
}

#[test]
fn a_win_by_a_hair_over_the_likeliest_block_is_a_win() {
    let mut tried = 0;
    for seed in 0..300u64 {
        let number = |id: u32| gumbel(seed, 5, id, Domain::Draw);
        let largest = (0..64).max_by(|&a, &b| number(a).total_cmp(&number(b))).unwrap();
        let rival = 64 + (seed % 64) as u32;
        // The rival's block is looked at first; the other column beats it by less than a block's bound has room for.
        let bar = 3.0 + number(rival);
        let logit = bar - number(largest) + 4e-6;
        let (own, lead) = (logit + number(largest), logit + number(largest) - bar);
        if logit >= 3.0 || own.abs() > 8.0 || !(1e-6..8e-6).contains(&lead) {
            continue;
        }
        let mut logits = vec![f32::NEG_INFINITY; 128];
        logits[largest as usize] = logit;
        logits[rival as usize] = 3.0;
        let sampling = Sampling {
            seed,
            ..Sampling::default()
        };
        assert_eq!(
            draw(&logits, &sampling, 5),
            largest as usize,
            "seed {seed}: ahead by {lead:e}"
        );
        tried += 1;
    }
    assert!(tried > 50, "{tried} rows");
}

#[test]
fn top_k_alone_and_top_p_alone_cut_the_tail() {
    let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
    let seen = |sampling: Sampling| {
        let mut seen = [false; 4];
        for seed in 0..500 {
            seen[draw(
                &logits,
                &Sampling {
                    seed,
                    ..sampling.clone()
                },
                0,
            )] = true;
        }
        seen.iter().filter(|&&seen| seen).count()
    };
    for (top_p, kept) in [(1.0, 4), (0.97, 4), (0.9, 3), (0.7, 2), (0.45, 1), (0.001, 1)] {
        assert_eq!(
            seen(Sampling {
                top_p,
                ..Sampling::default()
            }),
            kept,
            "top-p {top_p}"
        );
    }
    for (top_k, kept) in [(0, 4), (1, 1), (2, 2), (3, 3), (4, 4), (5, 4)] {
        assert_eq!(
            seen(Sampling {
                top_k,
                ..Sampling::default()
            }),
            kept,
            "top-k {top_k}"
        );
    }
}

#[test]
fn scores_are_the_log_softmax_wherever_the_row_lies() {
    for middle in [-500.0, -20.0, -0.5, 0.0, 20.0, 500.0] {
        for spread in [0.1, 1.0, 10.0, 100.0] {
            let logits = row(1, 400, middle, spread);
            let sum: f64 = logits.iter().map(|&x| f64::from(x - middle).exp()).sum();
            for (token, logprob) in top_logprobs(&logits, 400).unwrap() {
                let exact = f64::from(logits[token.0 as usize] - middle) - sum.ln();
                assert!(
                    (f64::from(logprob) - exact).abs() < 2e-4,
                    "{middle} +- {spread}: {logprob} {exact}"
                );
            }
        }
    }
    // A top near zero, and a whole block that is many times as far below.
    let mut logits = vec![-1.0f32; 128];
    logits[0] = 0.01;
    let exact = 0.01 - (0.01f64.exp() + 127.0 * (-1f64).exp()).ln();
    assert!((f64::from(Sampler::new().logprob(&logits, TokenId(0)).unwrap()) - exact).abs() < 1e-5);
}

/// Token 5 has `logit`; after `output` and the draft path it must weigh exactly `expected`.
fn weighs(sampling: &Sampling, prompt: &[u32], output: &[u32], path: &[u32], logit: f32, expected: f32) {
    let mut history = History::new(&ids(prompt));
    ids(output).into_iter().for_each(|token| history.push(token));
    let rival = |rival: f32| {
        let mut logits = [f32::NEG_INFINITY; 8];
        (logits[5], logits[6]) = (logit, rival);
        let drawn = Sampler::new().draw_row(&logits, sampling, &history, &ids(path), 9);
        drawn.unwrap().0
    };
    assert_eq!(rival(expected.next_down()), 5, "{sampling:?}: less than {expected}");
    assert_eq!(rival(expected.next_up()), 6, "{sampling:?}: more than {expected}");
}

fn greedy() -> Sampling {
    Sampling {
        temperature: 0.0,
        ..Sampling::default()
    }
}

#[test]
fn the_repetition_penalty_divides_what_is_positive_and_multiplies_the_rest() {
    let s = Sampling {
        repetition_penalty: 1.5,
        ..greedy()
    };
    for (prompt, output, path) in [
        (&[5][..], &[][..], &[][..]),
        (&[], &[5], &[]),
        (&[], &[], &[5]),
        (&[5, 5], &[5], &[5]),
    ] {
        weighs(&s, prompt, output, path, 3.0, 2.0);
        weighs(&s, prompt, output, path, -3.0, -4.5);
        weighs(&s, prompt, output, path, 0.0, 0.0);
    }
    weighs(&s, &[4], &[3], &[2], 3.0, 3.0);
}

#[test]
fn the_frequency_penalty_counts_the_output_and_the_presence_penalty_sees_it() {
    let frequency = Sampling {
        frequency_penalty: 0.25,
        ..greedy()
    };
    let presence = Sampling {
        presence_penalty: 0.5,
        ..greedy()
    };
    for (prompt, output, path, times) in [
        (&[5, 5][..], &[][..], &[][..], 0),
        (&[5], &[5, 1], &[], 1),
        (&[], &[5, 1, 5, 5], &[1], 3),
        (&[], &[], &[5, 5, 1], 2),
        (&[5], &[5, 5], &[1, 5], 3),
        (&[], &[5, 5], &[5, 5, 1, 5], 5),
    ] {
        weighs(&frequency, prompt, output, path, 1.0, 1.0 - 0.25 * times as f32);
        weighs(&presence, prompt, output, path, 1.0, if times > 0 { 0.5 } else { 1.0 });
    }
}

#[test]
fn penalties_and_bias_are_rounded_one_by_one_in_the_documented_order() {
    let s = Sampling {
        repetition_penalty: 1.1,
        frequency_penalty: 0.3,
        presence_penalty: 0.7,
        logit_bias: vec![(TokenId(5), 0.9)],
        ..greedy()
    };
    for logit in [0.1f32, 7.3, -2.9] {
        let l = if logit > 0.0 { logit / 1.1 } else { logit * 1.1 };
        weighs(&s, &[5], &[5, 5], &[5], logit, ((l - 0.3 * 3.0) - 0.7) + 0.9);
        weighs(&s, &[5], &[], &[], logit, l + 0.9);
        weighs(&s, &[], &[], &[], logit, logit + 0.9);
    }
}

#[test]
fn a_request_says_whether_it_edits_logits_and_needs_counts() {
    let off = Sampling::default;
    for (sampling, penalises, edits) in [
        (off(), false, false),
        (
            Sampling {
                repetition_penalty: 1.1,
                ..off()
            },
            true,
            true,
        ),
        (
            Sampling {
                presence_penalty: 0.1,
                ..off()
            },
            true,
            true,
        ),
        (
            Sampling {
                frequency_penalty: -0.1,
                ..off()
            },
            true,
            true,
        ),
        (
            Sampling {
                logit_bias: vec![(TokenId(1), 0.0)],
                ..off()
            },
            false,
            true,
        ),
    ] {
        assert_eq!(
            (sampling.needs_history(), sampling.edits_logits(0)),
            (penalises, edits),
            "{sampling:?}"
        );
    }
}

#[test]
fn a_history_counts_the_output_and_knows_the_prompt() {
    let mut history = History::new(&ids(&[3, 1, 3]));
    for token in [1, 4, 4, 4] {
        history.push(TokenId(token));
    }
    assert_eq!(history.counts(), [(TokenId(1), 1), (TokenId(3), 0), (TokenId(4), 3)]);
    for (token, count) in [(3, 0), (1, 1), (4, 3), (9, 0)] {
        assert_eq!(history.output_count(TokenId(token)), count);
    }
}

#[test]
fn a_coin_passes_below_its_bound_and_below_its_ratio() {
    let passes = |u: f64, bound: f64, ratio: (f64, f64)| {
        let coins = [u];
        GivenCoins::new(&coins, 0.0, 1).unwrap().accept(0, bound, &mut || ratio)
    };
    assert!(passes(0.5, 0.6, (3.0, 4.0)));
    assert!(!passes(0.5, 0.5, (3.0, 4.0)), "at the bound");
    assert!(!passes(0.75, 0.8, (3.0, 4.0)), "at the ratio");
    assert!(!passes(0.0, 0.8, (0.0, 4.0)));
}

#[test]
fn a_given_coin_inverts_the_cumulative_weights() {
    let weights = [0.0, 1.0, 0.0, 2.0, 1.0, 0.0];
    for (u, id) in [
        (0.0, 1),
        (0.249, 1),
        (0.25, 3),
        (0.5, 3),
        (0.749, 3),
        (0.75, 4),
        (1.0 - f64::EPSILON / 2.0, 4),
    ] {
        assert_eq!(GivenCoins::new(&[], u, 0).unwrap().pick(&weights), id, "u = {u}");
    }
}

#[test]
fn a_residual_of_rounding_errors_is_drawn_in_proportion_like_any_other() {
    // What max(p - q, 0) leaves of almost equal rows; its size must not matter.
    let weights = |scale: f64| [0.0, 3.0 * scale, 0.0, scale];
    let mut counts = [0; 4];
    for seed in 0..4000 {
        let drawn = KeyedCoins::new(seed, 2).pick(&weights(1e-17));
        assert_eq!(drawn, KeyedCoins::new(seed, 2).pick(&weights(1e-300)), "seed {seed}");
        counts[drawn] += 1;
    }
    assert_eq!((counts[0], counts[2]), (0, 0));
    assert!((2850..3150).contains(&counts[1]), "{counts:?}");
}

#[test]
fn equal_scores_of_the_last_token_go_to_the_lower_id() {
    let mut ties = 0;
    for seed in 0..40 {
        let number = |id: u32| gumbel(seed, 2, id, Domain::Residual);
        for (rare, sure) in [(0, 1), (1, 0)] {
            // A weight whose score is that of the certain one, bit for bit.
            let near = f64::from(number(sure) - number(rare)).exp() as f32;
            let weight = (near.to_bits().saturating_sub(500)..near.to_bits() + 500)
                .map(f32::from_bits)
                .find(|&weight| weight < 1.0 && ln(weight) + number(rare) == ln(1.0) + number(sure));
            if let Some(weight) = weight {
                let mut weights = [1.0; 2];
                weights[rare as usize] = f64::from(weight);
                assert_eq!(KeyedCoins::new(seed, 2).pick(&weights), 0, "seed {seed}");
                ties += 1;
            }
        }
    }
    assert!(ties > 10, "{ties} ties");
}
