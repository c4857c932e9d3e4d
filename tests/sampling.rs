//! The target transform and the row draw against a plain reference that sorts everything in f64.

mod common;

use common::{Numbers, chi_square_z};
use dflash_rs::error::Error;
use dflash_rs::rng::{Domain, gumbel};
use dflash_rs::types::TokenId;
use dflash_rs::verify::{History, Sampler, Sampling, top_logprobs};
use proptest::prelude::*;

/// Dense penalties and bias, straight from the definition.
fn edited(logits: &[f32], s: &Sampling, prompt: &[u32], output: &[u32], position: u64) -> Vec<f32> {
    let mut out = logits.to_vec();
    for (token, l) in out.iter_mut().enumerate() {
        if position < s.masked_before && s.masked.iter().any(|masked| masked.0 as usize == token) {
            *l = f32::NEG_INFINITY;
        }
        let count = |list: &[u32]| list.iter().filter(|&&t| t as usize == token).count();
        if count(prompt) + count(output) > 0 && s.repetition_penalty != 1.0 {
            *l = if *l > 0.0 {
                *l / s.repetition_penalty
            } else {
                *l * s.repetition_penalty
            };
        }
        if count(output) > 0 {
            *l -= s.frequency_penalty * count(output) as f32;
            *l -= s.presence_penalty;
        }
        for &(t, bias) in &s.logit_bias {
            if t.0 as usize == token {
                *l += bias;
            }
        }
    }
    out
}

/// Tokens kept by the filters, or None when a decision is closer than f32 can tell.
fn kept(l: &[f32], s: &Sampling) -> Option<Vec<usize>> {
    let scale = 1.0 / s.temperature;
    let t: Vec<f32> = l.iter().map(|x| x * scale).collect();
    let top = t.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let w: Vec<f64> = t.iter().map(|&x| f64::from(x - top).exp()).collect();
    let total: f64 = w.iter().sum();
    let mut order: Vec<usize> = (0..l.len()).collect();
    order.sort_by(|&a, &b| t[b].total_cmp(&t[a]).then(a.cmp(&b)));
    let mut before = 0.0;
    let mut keep = Vec::new();
    for (rank, &id) in order.iter().enumerate() {
        let share = before / total;
        before += w[id];
        if t[id] == f32::NEG_INFINITY {
            continue;
        }
        if s.top_p < 1.0 && (share - f64::from(s.top_p)).abs() < 1e-5 {
            return None;
        }
        if s.min_p > 0.0 && w[id] != 1.0 && (w[id] / f64::from(s.min_p) - 1.0).abs() < 1e-5 {
            return None;
        }
        let in_k = s.top_k == 0 || rank < s.top_k as usize;
        let in_p = s.top_p >= 1.0 || share < f64::from(s.top_p);
        if in_k && in_p && w[id] >= f64::from(s.min_p) {
            keep.push(id);
        }
    }
    Some(keep)
}

fn reference(logits: &[f32], s: &Sampling, prompt: &[u32], output: &[u32], position: u64) -> Option<u32> {
    let l = edited(logits, s, prompt, output, position);
    let best = |scores: &mut dyn Iterator<Item = (usize, f32)>| {
        scores.fold((usize::MAX, f32::NEG_INFINITY), |best, (id, x)| {
            if x > best.1 || (x == best.1 && id < best.0) {
                (id, x)
            } else {
                best
            }
        })
    };
    if s.temperature == 0.0 {
        return Some(best(&mut l.iter().copied().enumerate()).0 as u32);
    }
    let scale = 1.0 / s.temperature;
    let keep = kept(&l, s)?;
    let mut scores = keep.iter().map(|&id| {
        let t = l[id] * scale;
        (id, t + gumbel(s.seed, position, id as u32, Domain::Draw))
    });
    Some(best(&mut scores).0 as u32)
}

fn ids(tokens: &[u32]) -> Vec<TokenId> {
    tokens.iter().copied().map(TokenId).collect()
}

fn history(prompt: &[u32], output: &[u32]) -> History {
    let mut h = History::new(&ids(prompt));
    output.iter().for_each(|&t| h.push(TokenId(t)));
    h
}

fn plain(logits: &[f32], s: &Sampling, position: u64) -> u32 {
    Sampler::new()
        .draw_row(logits, s, &History::default(), &[], position)
        .unwrap()
        .0
}

fn any_sampling() -> impl Strategy<Value = Sampling> {
    (
        prop_oneof![Just(0.0f32), Just(1.0), 0.2f32..3.0],
        prop_oneof![Just(0u32), 1u32..40, Just(100_000)],
        prop_oneof![Just(1.0f32), 0.05f32..1.0],
        prop_oneof![Just(0.0f32), Just(1.0), 0.001f32..0.9],
        prop_oneof![Just(1.0f32), 0.5f32..2.0],
        prop_oneof![Just(0.0f32), -2.0f32..2.0],
        prop_oneof![Just(0.0f32), -2.0f32..2.0],
        prop_oneof![
            Just(None),
            (0usize..20, -5.0f32..5.0).prop_map(Some),
            (0usize..20, Just(f32::NEG_INFINITY)).prop_map(Some)
        ],
        any::<u64>(),
        // Every third token from somewhere on, before no position, the first ones or (almost) all of them.
        (0u32..40, prop_oneof![Just(0u64), 1u64..9, Just(u64::MAX)]),
    )
        .prop_map(
            |(temperature, top_k, top_p, min_p, rp, pp, fp, bias, seed, mask)| Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty: rp,
                presence_penalty: pp,
                frequency_penalty: fp,
                logit_bias: bias.map(|(t, b)| (TokenId(t as u32), b)).into_iter().collect(),
                seed,
                masked: (mask.0..20).step_by(3).map(TokenId).collect(),
                masked_before: mask.1,
            },
        )
}

fn any_logits() -> impl Strategy<Value = Vec<f32>> {
    // Rows of one value, of few values (ties), spread and peaked ones, with forbidden columns among them.
    let entry = prop_oneof![
        6 => -12.0f32..12.0,
        2 => prop_oneof![Just(0.0f32), Just(-0.0), Just(3.0), Just(-1.5)],
        1 => Just(f32::NEG_INFINITY),
        1 => -90.0f32..40.0,
    ];
    prop::collection::vec(entry, 20..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_draw_equals_the_plain_reference(
        logits in any_logits(),
        sampling in any_sampling(),
        prompt in prop::collection::vec(0u32..20, 0..12),
        output in prop::collection::vec(0u32..20, 0..12),
        split in 0usize..12,
        position in prop_oneof![0u64..12, any::<u64>()],
    ) {
        sampling.validate(logits.len()).unwrap();
        prop_assume!(edited(&logits, &sampling, &prompt, &output, position).iter().any(|x| x.is_finite()));
        let Some(expected) = reference(&logits, &sampling, &prompt, &output, position) else {
            return Err(TestCaseError::reject("a filter decision within rounding"));
        };
        // Tokens on the row's own path count as output, wherever the path begins.
        let split = split.min(output.len());
        let h = history(&prompt, &output[..split]);
        let got = Sampler::new().draw_row(&logits, &sampling, &h, &ids(&output[split..]), position).unwrap();
        prop_assert_eq!(got.0, expected);
    }

    #[test]
    fn a_used_sampler_draws_what_a_fresh_one_draws(
        rows in prop::collection::vec((any_logits(), any_sampling()), 1..6), position in 0u64..1000,
    ) {
        let mut used = Sampler::new();
        let h = history(&[1, 2], &[3]);
        for (logits, sampling) in &rows {
            let fresh = Sampler::new().sample_row(logits, sampling, &h, &[], position);
            prop_assert_eq!(used.sample_row(logits, sampling, &h, &[], position), fresh);
        }
    }

    #[test]
    fn log_probabilities_are_the_raw_log_softmax(logits in any_logits(), n in 0usize..500) {
        prop_assume!(logits.iter().any(|x| x.is_finite()));
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let norm = f64::from(top) + logits.iter().map(|&l| f64::from(l - top).exp()).sum::<f64>().ln();
        let best = top_logprobs(&logits, n).unwrap();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| (logits[b] + 0.0).total_cmp(&(logits[a] + 0.0)).then(a.cmp(&b)));
        prop_assert_eq!(best.len(), n.min(logits.len()));
        for (&(token, logprob), &id) in best.iter().zip(&order) {
            prop_assert_eq!(token.0 as usize, id);
            let exact = f64::from(logits[id]) - norm;
            prop_assert!(logprob as f64 == exact || (f64::from(logprob) - exact).abs() < 1e-5 * exact.abs().max(1.0));
            prop_assert_eq!(Sampler::new().logprob(&logits, token).unwrap(), logprob);
        }
    }
}

#[test]
fn wide_rows_with_skipped_blocks_draw_what_a_full_scan_draws() {
    for (v, spread) in [(4096, 3.0), (4096, 30.0), (8193, 8.0), (151_936, 5.0)] {
        let mut numbers = Numbers::new(v as u64);
        let mut logits: Vec<f32> = (0..v).map(|_| ((numbers.uniform() - 0.5) * spread) as f32).collect();
        logits[v / 3] += spread as f32;
        for seed in 0..4 {
            let s = Sampling {
                temperature: 0.8,
                min_p: [0.0, 0.02][seed as usize % 2],
                seed,
                ..Sampling::default()
            };
            assert_eq!(
                Some(plain(&logits, &s, 9)),
                reference(&logits, &s, &[], &[], 9),
                "V = {v}, seed {seed}"
            );
            let s = Sampling {
                top_p: 0.95,
                top_k: [0, 50][seed as usize % 2],
                ..s
            };
            if let Some(expected) = reference(&logits, &s, &[], &[], 9) {
                assert_eq!(plain(&logits, &s, 9), expected, "V = {v}, seed {seed}, filtered");
            }
        }
    }
}

#[test]
fn top_k_and_top_p_apply_jointly_and_the_draw_follows_the_renormalised_rest() {
    let p = [0.35f32, 0.25, 0.20, 0.05, 0.03, 0.03, 0.03, 0.03, 0.03];
    let logits: Vec<f32> = p.iter().map(|p| p.ln()).collect();
    let sampling = Sampling {
        top_k: 4,
        top_p: 0.82,
        ..Sampling::default()
    };
    let mut counts = [0u64; 9];
    for position in 0..40_000 {
        counts[plain(&logits, &sampling, position) as usize] += 1;
    }
    // Renormalising after top-k first would drop token 3; top-p alone would keep four of nine as well.
    let law: Vec<f64> = p
        .iter()
        .enumerate()
        .map(|(i, &p)| if i < 4 { f64::from(p) / 0.85 } else { 0.0 })
        .collect();
    assert!(counts[3] > 0);
    assert!(chi_square_z(&counts, &law).abs() < 4.0, "{counts:?}");
}

#[test]
fn draws_follow_the_tempered_distribution() {
    let logits = [1.0f32, 0.0, -1.0, 2.0, -3.0, 0.5, f32::NEG_INFINITY];
    for temperature in [0.5, 1.0, 2.0] {
        let w: Vec<f64> = logits.iter().map(|&l| f64::from(l / temperature).exp()).collect();
        let law: Vec<f64> = w.iter().map(|x| x / w.iter().sum::<f64>()).collect();
        let mut counts = [0u64; 7];
        for seed in 0..40_000 {
            counts[plain(
                &logits,
                &Sampling {
                    temperature,
                    seed,
                    ..Sampling::default()
                },
                5,
            ) as usize] += 1;
        }
        assert!(chi_square_z(&counts, &law).abs() < 4.0, "T = {temperature}: {counts:?}");
    }
}

#[test]
fn min_p_is_relative_to_the_largest_probability() {
    let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
    let seen = |min_p: f32| {
        let mut seen = [false; 4];
        for seed in 0..2_000 {
            seen[plain(
                &logits,
                &Sampling {
                    min_p,
                    seed,
                    ..Sampling::default()
                },
                0,
            ) as usize] = true;
        }
        seen
    };
    assert_eq!(seen(0.05), [true, true, true, true]);
    assert_eq!(seen(0.2), [true, true, true, false]);
    assert_eq!(seen(0.5), [true, true, false, false]);
    assert_eq!(seen(1.0), [true, false, false, false]);
}

#[test]
fn no_id_comes_from_a_last_tile_without_mass_nor_from_beyond_the_vocabulary() {
    let settings = [
        Sampling {
            temperature: 0.0,
            ..Sampling::default()
        },
        Sampling::default(),
        Sampling {
            top_p: 0.9,
            ..Sampling::default()
        },
        Sampling {
            top_k: 50,
            top_p: 0.999,
            min_p: 0.01,
            ..Sampling::default()
        },
        Sampling {
            top_k: 1_000_000,
            ..Sampling::default()
        },
        Sampling {
            min_p: 1e-6,
            temperature: 5.0,
            ..Sampling::default()
        },
    ];
    for v in [100usize, 8193, 10_000, 151_936] {
        // The last tile of 64 (the only column of 8193's), and flat mass before it: the hardest case for a boundary.
        let live = (v - 1) / 64 * 64;
        let mut flat = vec![0.0f32; v];
        flat[live..].fill(f32::NEG_INFINITY);
        let mut only_last = vec![f32::NEG_INFINITY; v];
        only_last[v - 1] = -3.0;
        for s in &settings {
            for seed in 0..2 {
                let s = Sampling { seed, ..s.clone() };
                let got = plain(&flat, &s, 4) as usize;
                assert!(got < live, "V = {v}: {got} has no mass ({s:?})");
                assert_eq!(plain(&only_last, &s, 4) as usize, v - 1, "V = {v} ({s:?})");
            }
        }
    }
}

#[test]
fn every_column_of_the_last_tile_can_be_drawn() {
    for v in [100usize, 8193] {
        let mut logits = vec![-30.0f32; v];
        let tail = v - v.min(5);
        logits[tail..].fill(1.0);
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..300 {
            seen.insert(plain(
                &logits,
                &Sampling {
                    seed,
                    ..Sampling::default()
                },
                0,
            ) as usize);
        }
        assert_eq!(seen, (tail..v).collect(), "V = {v}");
    }
}

#[test]
fn greedy_takes_the_lowest_id_among_equals_and_cold_sampling_agrees_with_it() {
    for at in [0usize, 1, 63, 64, 65, 200, 299] {
        let mut logits = vec![-1.0f32; 300];
        logits[at..].iter_mut().step_by(7).for_each(|x| *x = 2.5);
        let greedy = Sampling {
            temperature: 0.0,
            seed: 3,
            ..Sampling::default()
        };
        assert_eq!(plain(&logits, &greedy, 0) as usize, at);
        // The seed has no say, and top-k = 1 is greedy at any temperature.
        assert_eq!(
            plain(
                &logits,
                &Sampling {
                    seed: 4,
                    ..greedy.clone()
                },
                9
            ) as usize,
            at
        );
        assert_eq!(
            plain(
                &logits,
                &Sampling {
                    top_k: 1,
                    temperature: 2.0,
                    ..greedy.clone()
                },
                9
            ) as usize,
            at
        );
        logits[at] = 2.6;
        assert_eq!(
            plain(
                &logits,
                &Sampling {
                    temperature: 1e-5,
                    ..greedy
                },
                0
            ) as usize,
            at
        );
    }
}

#[test]
fn rows_that_cannot_be_sampled_are_errors_naming_the_column() {
    let mut sampler = Sampler::new();
    let h = History::default();
    for temperature in [0.0, 1.0] {
        let s = Sampling {
            temperature,
            top_k: 5,
            ..Sampling::default()
        };
        for (at, value, name) in [(0, f32::NAN, "NaN"), (70, f32::NAN, "NaN"), (99, f32::INFINITY, "+inf")] {
            let mut row = vec![0.5f32; 100];
            row[at] = value;
            assert_eq!(
                sampler.sample_row(&row, &s, &h, &[], 0),
                Err(Error::BadLogit {
                    column: at,
                    value: name
                })
            );
            assert!(top_logprobs(&row, 3).is_err());
        }
        let row = vec![f32::NEG_INFINITY; 100];
        assert_eq!(
            sampler.sample_row(&row, &s, &h, &[], 0),
            Err(Error::EmptyRow { columns: 100 })
        );
        assert_eq!(
            sampler.sample_row(&[], &s, &h, &[], 0),
            Err(Error::EmptyRow { columns: 0 })
        );
    }
    // A bias may forbid everything that was left.
    let s = Sampling {
        logit_bias: vec![(TokenId(1), f32::NEG_INFINITY)],
        ..Sampling::default()
    };
    let row = [f32::NEG_INFINITY, 2.0];
    assert_eq!(
        sampler.sample_row(&row, &s, &h, &[], 0),
        Err(Error::EmptyRow { columns: 2 })
    );
}

#[test]
fn tokens_that_are_no_columns_are_refused_wherever_they_come_from() {
    let mut sampler = Sampler::new();
    let s = Sampling {
        presence_penalty: 1.0,
        ..Sampling::default()
    };
    let name = |r: Result<TokenId, Error>| match r {
        Err(Error::InvalidArgument { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    let none = History::default();
    assert_eq!(
        name(sampler.draw_row(&[0.0; 4], &s, &history(&[4], &[]), &[], 0)),
        "history"
    );
    assert_eq!(name(sampler.draw_row(&[0.0; 4], &s, &none, &ids(&[4]), 0)), "path");
    let s = Sampling {
        logit_bias: vec![(TokenId(4), 1.0)],
        ..Sampling::default()
    };
    assert_eq!(name(sampler.draw_row(&[0.0; 4], &s, &none, &[], 0)), "logit_bias");
    assert_eq!(
        name(sampler.logprob(&[0.0; 4], TokenId(4)).map(|_| TokenId(0))),
        "token"
    );
}

#[test]
fn parameters_outside_their_domain_are_refused_by_name() {
    let ok = Sampling::default;
    let nan = f32::NAN;
    let cases: Vec<(&str, Sampling)> = vec![
        (
            "temperature",
            Sampling {
                temperature: -1.0,
                ..ok()
            },
        ),
        (
            "temperature",
            Sampling {
                temperature: nan,
                ..ok()
            },
        ),
        (
            "temperature",
            Sampling {
                temperature: 1e-6,
                ..ok()
            },
        ),
        (
            "temperature",
            Sampling {
                temperature: f32::INFINITY,
                ..ok()
            },
        ),
        ("top_p", Sampling { top_p: 0.0, ..ok() }),
        ("top_p", Sampling { top_p: 1.5, ..ok() }),
        ("top_p", Sampling { top_p: nan, ..ok() }),
        ("min_p", Sampling { min_p: -0.1, ..ok() }),
        ("min_p", Sampling { min_p: nan, ..ok() }),
        (
            "repetition_penalty",
            Sampling {
                repetition_penalty: 0.0,
                ..ok()
            },
        ),
        (
            "presence_penalty",
            Sampling {
                presence_penalty: nan,
                ..ok()
            },
        ),
        (
            "frequency_penalty",
            Sampling {
                frequency_penalty: f32::INFINITY,
                ..ok()
            },
        ),
        (
            "logit_bias",
            Sampling {
                logit_bias: vec![(TokenId(10), 0.0)],
                ..ok()
            },
        ),
        (
            "logit_bias",
            Sampling {
                logit_bias: vec![(TokenId(1), nan)],
                ..ok()
            },
        ),
        (
            "logit_bias",
            Sampling {
                logit_bias: vec![(TokenId(1), 0.0), (TokenId(1), 1.0)],
                ..ok()
            },
        ),
    ];
    assert_eq!(ok().validate(10), Ok(()));
    for (expected, sampling) in cases {
        match sampling.validate(10) {
            Err(Error::InvalidArgument { name, .. }) => assert_eq!(name, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}
