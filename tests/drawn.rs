//! Rows that a device drew, and layouts of steps at the edges: trees of several words, drafts at both ends of the vocabulary.

use dflash_rs::device::cuda::params::SamplingRow;
use dflash_rs::draft::DraftTree;
use dflash_rs::error::Error;
use dflash_rs::schedule::{Config, Finish, Params};
use dflash_rs::step::{DrawnRows, Engine, StepPlan};
use dflash_rs::types::{RequestId, TokenId};
use dflash_rs::verify::{History, Sampler, Sampling};

const VOCAB: usize = 20;

fn engine(block_size: usize) -> Engine {
    let config = Config {
        num_pages: 100,
        max_running: 5,
        max_context: 400,
        block_size,
        max_batch_tokens: 1000,
        vocab_size: VOCAB,
        ..Config::default()
    };
    Engine::new(config, None).unwrap()
}

fn greedy(logprobs: Option<u32>) -> Params {
    Params {
        sampling: Sampling {
            temperature: 0.0,
            ..Sampling::default()
        },
        max_tokens: 300,
        logprobs,
        ..Params::default()
    }
}

/// Requests with these parameters, their prompts behind them: request `i` has `i + 2` tokens and its last known token is `i + 1`.
fn started(block_size: usize, params: Vec<Params>) -> Engine {
    let mut engine = engine(block_size);
    for (i, params) in params.into_iter().enumerate() {
        let prompt = (0..i as u32 + 2).map(|at| TokenId(at + i as u32)).collect();
        assert_eq!(engine.add(prompt, params), Ok(RequestId(i as u64)));
    }
    let mut plan = engine.plan(block_size).unwrap().unwrap();
    let sampled: Vec<i64> = (1..=plan.arrays().row_ids.len() as i64).collect();
    let accepted = engine.accept_sampled(&plan, &sampled, &[]).unwrap();
    engine.commit(&mut plan, &accepted, true).unwrap();
    engine
}

/// Different in every row and column; the largest of row `at` is `(7 * at + 3) % VOCAB`.
fn logits(rows: usize) -> Vec<f32> {
    (0..rows * VOCAB)
        .map(|i| {
            let (row, column) = (i / VOCAB, i % VOCAB);
            let behind = (column + 2 * VOCAB * rows - (7 * row + 3)) % VOCAB;
            -(behind as f32) * (1.0 + row as f32 / 8.0)
        })
        .collect()
}

fn name(error: Error) -> &'static str {
    match error {
        Error::InvalidArgument { name, .. } | Error::Length { name, .. } => name,
        other => panic!("{other}"),
    }
}

#[test]
fn what_a_device_drew_is_kept_with_its_scores_as_if_the_engine_had_drawn_it() {
    let asked = [Some(2), None, Some(0), Some(3), Some(1)];
    let mut engine = started(4, asked.map(greedy).to_vec());
    let mut plan = engine.plan(4).unwrap().unwrap();
    let rows = plan.arrays().logit_rows.len();
    assert_eq!(rows, 20, "five blocks of four");
    // Request i has i - 1 right drafts, the first and the last none and all.
    let says = |at: usize| ((7 * at + 3) % VOCAB) as i64;
    let drafts: Vec<i64> = (0..5)
        .flat_map(|row| {
            (0..3).map(move |i| {
                if i + 1 < row {
                    says(4 * row + i)
                } else {
                    19 - says(4 * row + i)
                }
            })
        })
        .collect();
    plan.set_drafts(&drafts, 3).unwrap();
    let logits = logits(rows);
    let own = engine.accept(&plan, &logits).unwrap();
    assert_eq!(own.arrays().accepted, [0, 0, 1, 2, 3]);

    // The same numbers, as a device gives them: every row, each with the three likeliest tokens.
    let log_softmax = |at: usize, token: i64| {
        let row = &logits[at * VOCAB..(at + 1) * VOCAB];
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        (f64::from(row[token as usize]) - sum.ln()) as f32
    };
    let tokens: Vec<i64> = (0..rows).map(says).collect();
    let logprobs: Vec<f32> = (0..rows)
        .map(|at| {
            if at / 4 == 1 {
                f32::NAN
            } else {
                log_softmax(at, says(at))
            }
        })
        .collect();
    let top_tokens: Vec<i64> = (0..rows)
        .flat_map(|at| (0..3).map(move |rank| (says(at) + rank) % VOCAB as i64))
        .collect();
    let top_logprobs: Vec<f32> = (0..3 * rows).map(|i| log_softmax(i / 3, top_tokens[i])).collect();
    let drawn = DrawnRows {
        tokens: &tokens,
        logprobs: &logprobs,
        status: &vec![0; rows],
        top_count: 3,
        top_tokens: &top_tokens,
        top_logprobs: &top_logprobs,
        ..DrawnRows::default()
    };
    let given = engine.accept_drawn(&plan, &drawn).unwrap();
    let (own, given) = (own.arrays(), given.arrays());
    assert_eq!(given.accepted, own.accepted);
    assert_eq!((&given.tokens, &given.token_starts), (&own.tokens, &own.token_starts));
    assert_eq!(
        (&given.commit_rows, &given.commit_starts, &given.commit_slots),
        (&own.commit_rows, &own.commit_starts, &own.commit_slots)
    );
    assert_eq!(
        (&given.top_tokens, &given.top_starts),
        (&own.top_tokens, &own.top_starts)
    );
    assert_eq!(given.top_starts, [0, 2, 2, 2, 2, 5, 8, 11, 12, 13, 14, 15]);
    for (given, own) in [
        (&given.logprobs, &own.logprobs),
        (&given.top_logprobs, &own.top_logprobs),
    ] {
        assert_eq!(given.len(), own.len());
        for (given, own) in given.iter().zip(own) {
            assert!(
                (given - own).abs() < 1e-5 || (given.is_nan() && own.is_nan()),
                "{given} {own}"
            );
        }
    }
    // Without scores: none are told.
    let bare = DrawnRows {
        tokens: &tokens,
        ..DrawnRows::default()
    };
    let bare = engine.accept_drawn(&plan, &bare).unwrap();
    assert_eq!(
        (&bare.arrays().tokens, &bare.arrays().accepted),
        (&own.tokens, &own.accepted)
    );
    assert!(bare.arrays().logprobs.iter().all(|logprob| logprob.is_nan()));
    assert!(bare.arrays().top_tokens.is_empty());
}

#[test]
fn rows_that_could_not_be_drawn_fail_their_request_with_the_reason() {
    let mut engine = started(1, vec![greedy(None); 5]);
    let mut plan = engine.plan(1).unwrap().unwrap();
    let drawn = DrawnRows {
        tokens: &[19, 5, 5, 5, 5],
        status: &[0, 1, 2, 3, 4],
        ..DrawnRows::default()
    };
    let accepted = engine.accept_drawn(&plan, &drawn).unwrap();
    let failed = |got| Error::RowFailed { got };
    assert_eq!(
        accepted.failed(),
        [
            (1, failed("NaN or +inf")),
            (2, Error::EmptyRow { columns: VOCAB }),
            (3, failed("an overflow of logit / temperature")),
            (4, failed("a row of unknown status")),
        ]
    );
    assert_eq!(
        (&accepted.arrays().tokens[..], &accepted.arrays().token_starts[..]),
        (&[19][..], &[0, 1, 1, 1, 1, 1][..])
    );
    let events = engine.commit(&mut plan, &accepted, true).unwrap();
    assert_eq!(
        events.arrays().finish,
        [0, 5, 5, 5, 5].map(|f| if f == 5 { Finish::Error as u8 } else { 0 })
    );
    let named: Vec<u64> = events.errors().iter().map(|&(id, _)| id).collect();
    assert_eq!(named, [1, 2, 3, 4]);
    assert_eq!(events.arrays().text_ends, [-1; 5]);
}

#[test]
fn tokens_that_a_device_cannot_have_drawn_fail_their_request() {
    let mut engine = started(1, vec![greedy(None); 4]);
    let plan = engine.plan(1).unwrap().unwrap();
    let accepted = engine.accept_sampled(&plan, &[-1, 0, 19, 20], &[]).unwrap();
    assert_eq!(accepted.arrays().tokens, [0, 19], "both ends of the vocabulary");
    let told: Vec<(usize, String)> = accepted
        .failed()
        .iter()
        .map(|(row, error)| (*row, error.to_string()))
        .collect();
    assert_eq!(
        told,
        [
            (0, "sampled: got token -1, expected tokens in 0..19".into()),
            (3, "sampled: got token 20, expected tokens in 0..19".into()),
        ]
    );
}

#[test]
fn what_a_device_drew_has_as_many_entries_as_the_plan_asks_for() {
    let mut engine = started(1, vec![greedy(Some(2)); 2]);
    let plan = engine.plan(1).unwrap().unwrap();
    let whole = DrawnRows {
        tokens: &[1, 2],
        logprobs: &[-1.0, -2.0],
        status: &[0, 0],
        top_count: 2,
        top_tokens: &[1, 3, 2, 3],
        top_logprobs: &[-1.0, -3.0, -2.0, -3.0],
        ..DrawnRows::default()
    };
    for (drawn, array, got, expected) in [
        (DrawnRows { tokens: &[1], ..whole }, "sampled", 1, 2),
        (DrawnRows { tokens: &[], ..whole }, "sampled", 0, 2),
        (
            DrawnRows {
                tokens: &[1, 2, 3],
                ..whole
            },
            "sampled",
            3,
            2,
        ),
        (
            DrawnRows {
                logprobs: &[-1.0],
                ..whole
            },
            "logprobs",
            1,
            2,
        ),
        (
            DrawnRows {
                logprobs: &[-1.0; 3],
                ..whole
            },
            "logprobs",
            3,
            2,
        ),
        (DrawnRows { status: &[0], ..whole }, "status", 1, 2),
        (
            DrawnRows {
                status: &[0; 3],
                ..whole
            },
            "status",
            3,
            2,
        ),
        (
            DrawnRows {
                top_tokens: &[1, 3, 2],
                ..whole
            },
            "top_tokens",
            3,
            4,
        ),
        (
            DrawnRows {
                top_tokens: &[],
                ..whole
            },
            "top_tokens",
            0,
            4,
        ),
        (
            DrawnRows {
                top_logprobs: &[-1.0; 3],
                ..whole
            },
            "top_logprobs",
            3,
            4,
        ),
        (
            DrawnRows {
                top_logprobs: &[],
                ..whole
            },
            "top_logprobs",
            0,
            4,
        ),
        (DrawnRows { top_count: 3, ..whole }, "top_tokens", 4, 6),
    ] {
        let refused = engine.accept_drawn(&plan, &drawn).unwrap_err();
        assert_eq!(
            refused,
            Error::Length {
                name: array,
                got,
                expected
            }
        );
    }
    for drawn in [
        whole,
        DrawnRows { logprobs: &[], ..whole },
        DrawnRows { status: &[], ..whole },
    ] {
        assert!(engine.accept_drawn(&plan, &drawn).unwrap().failed().is_empty());
    }
}

#[test]
fn a_tree_of_more_than_64_nodes_has_its_ancestors_in_several_words() {
    let mut engine = started(200, vec![greedy(None); 3]);
    let mut plan = engine.plan(200).unwrap().unwrap();
    let sizes = [70usize, 1, 200];
    let trees: Vec<DraftTree> = (0..3)
        .map(|i| {
            let tokens: Vec<TokenId> = (0..sizes[i])
                .map(|node| TokenId(if node == 0 { i as u32 + 1 } else { node as u32 % 20 }))
                .collect();
            // Long paths, so that a node has ancestors in every word before its own.
            let parents: Vec<u32> = (0..sizes[i] as u32)
                .map(|node| node.saturating_sub(1 + node % 3))
                .collect();
            DraftTree::from_parents(&tokens, &parents).unwrap()
        })
        .collect();
    plan.set_trees(&trees).unwrap();
    let arrays = plan.arrays();
    assert_eq!(arrays.query_starts, [0, 70, 71, 271]);
    assert_eq!(arrays.draft_rows, [0, 2]);
    let words = 4;
    assert_eq!(arrays.ancestors.len(), 271 * words);
    for (i, tree) in trees.iter().enumerate() {
        let first = arrays.query_starts[i] as usize;
        for (node, mask) in tree.masks().chunks(tree.mask_words()).enumerate() {
            let mut expected = mask.to_vec();
            expected.resize(words, 0);
            let at = (first + node) * words;
            assert_eq!(arrays.ancestors[at..at + words], expected, "request {i}, node {node}");
            assert_eq!(arrays.token_ids[first + node], i64::from(tree.tokens()[node].0));
            let depth = i64::from(tree.depths()[node]);
            assert_eq!(arrays.positions[first + node], i as i64 + 2 + depth);
        }
        assert_eq!(plan.drafted(i), tree.max_depth());
    }
}

#[test]
fn drafts_are_tokens_and_enough_of_them_or_none_is_set() {
    let mut engine = started(
        4,
        vec![
            greedy(None),
            Params {
                max_tokens: 4,
                ..greedy(None)
            },
        ],
    );
    let mut plan = engine.plan(4).unwrap().unwrap();
    assert_eq!(
        plan.arrays().block_len,
        [4, 3],
        "the second has room for three tokens more"
    );
    let whole = plan.arrays().clone();
    let mut refused = |drafts: &[i64], width: usize| {
        let refused = name(plan.set_drafts(drafts, width).unwrap_err());
        assert_eq!(plan.arrays(), &whole);
        refused
    };
    assert_eq!(refused(&[1; 5], 3), "drafts");
    assert_eq!(refused(&[1; 9], 3), "drafts");
    assert_eq!(refused(&[1; 4], 2), "drafts");
    assert_eq!(refused(&[1, 1, 1, 1, -1, 1], 3), "drafts");
    assert_eq!(refused(&[1, 1, 20, 1, 1, 1], 3), "drafts");
    // What lies beyond a row's block is not looked at.
    plan.set_drafts(&[0, 19, 5, 99, 6, 0, -7, 99], 4).unwrap();
    assert_eq!(plan.arrays().token_ids, [1, 0, 19, 5, 2, 6, 0]);
    let accepted = engine.accept_sampled(&plan, &[0, 19, 5, 8, 6, 0, 7], &[]).unwrap();
    assert_eq!(accepted.arrays().accepted, [3, 2]);
    assert_eq!(accepted.arrays().tokens, [0, 19, 5, 8, 6, 0, 7]);
}

#[test]
fn what_a_request_asks_for_is_checked_by_name() {
    let mut engine = engine(4);
    let mut add = |length: usize, params: Params| engine.add(vec![TokenId(1); length], params);
    let ok = || greedy(None);
    assert_eq!(name(add(0, ok()).unwrap_err()), "prompt");
    assert_eq!(name(add(400, ok()).unwrap_err()), "prompt");
    assert_eq!(
        name(add(3, Params { max_tokens: 0, ..ok() }).unwrap_err()),
        "max_tokens"
    );
    assert_eq!(name(add(3, greedy(Some(VOCAB as u32 + 1))).unwrap_err()), "logprobs");
    let stop = |stop: &[u8]| Params {
        stop_strings: vec![stop.to_vec()],
        ..ok()
    };
    assert_eq!(name(add(3, stop(b"")).unwrap_err()), "stop");
    assert_eq!(name(add(3, stop(b"x")).unwrap_err()), "stop", "without a vocabulary");
    assert_eq!(add(399, ok()), Ok(RequestId(0)));
    assert_eq!(add(1, Params { max_tokens: 1, ..ok() }), Ok(RequestId(1)));
    assert_eq!(add(3, greedy(Some(VOCAB as u32))), Ok(RequestId(2)), "every token");
    assert_eq!(engine.plan(0).map(|_| ()).map_err(name), Err("max_block"));
}

#[test]
fn results_and_events_give_their_buffers_back() {
    let mut engine = started(1, vec![greedy(None)]);
    let mut addresses = std::collections::HashSet::new();
    let mut step = |engine: &mut Engine| {
        let mut plan: StepPlan = engine.plan(1).unwrap().unwrap();
        let accepted = engine.accept_sampled(&plan, &[1], &[]).unwrap();
        let events = engine.commit(&mut plan, &accepted, true).unwrap();
        addresses.insert(events.arrays().request_ids.as_ptr());
        assert_eq!((accepted.step(), events.step()), (plan.step(), plan.step()));
        plan.step()
    };
    let steps: Vec<u64> = (0..10).map(|_| step(&mut engine)).collect();
    assert_eq!(steps, (1..11).collect::<Vec<_>>());
    assert_eq!(addresses.len(), 1, "one array of events serves every step");
    assert_eq!((engine.stats().passes(), engine.stats().committed()), (10, 10));
}

#[test]
fn the_history_of_a_penalised_row_is_its_distinct_tokens_in_order() {
    let penalised = Params {
        sampling: Sampling {
            presence_penalty: 0.5,
            temperature: 0.0,
            ..Sampling::default()
        },
        ..greedy(None)
    };
    let mut engine = started(1, vec![penalised.clone(), greedy(None), penalised]);
    // Prompts 0 1, 1 2 3 and 2 3 4 5; the first steps add 1, 2 and 3, the next 1, 19 and 0.
    let mut plan = engine.plan(1).unwrap().unwrap();
    let accepted = engine.accept_sampled(&plan, &[1, 19, 0], &[]).unwrap();
    engine.commit(&mut plan, &accepted, true).unwrap();
    assert!(matches!(
        engine.device_sampling(&plan),
        Err(Error::OutOfTurn { step: 1, .. })
    ));
    let plan = engine.plan(1).unwrap().unwrap();
    let sampling = engine.device_sampling(&plan).unwrap();
    let arrays = sampling.arrays();
    let spans = arrays.rows.iter().map(|row| (row.history_start, row.history_end));
    assert_eq!(spans.collect::<Vec<_>>(), [(0, 2), (2, 2), (2, 7)]);
    assert_eq!(arrays.history_tokens, [0, 1, 0, 2, 3, 4, 5]);
    assert_eq!(arrays.history_counts, [0, 2, 1, 0, 1, 0, 0]);
}

#[test]
fn drafts_of_a_row_are_drawn_with_its_numbers_and_nothing_else_that_it_asks_for() {
    let sampled = Params {
        sampling: Sampling {
            temperature: 2.6,
            seed: 1 << 63,
            top_k: 3,
            min_p: 0.1,
            presence_penalty: 0.5,
            logit_bias: vec![(TokenId(2), 1.0)],
            ..Sampling::default()
        },
        ..greedy(None)
    };
    let mut engine = started(1, vec![greedy(None), sampled]);
    let plan = engine.plan(1).unwrap().unwrap();
    let sampling = engine.device_sampling(&plan).unwrap();
    assert!(sampling.samples && sampling.filters);
    let plain = sampling.of_drafts(None);
    assert_eq!(
        (plain.temperature, plain.top_p, plain.repetition_penalty),
        (0.0, 1.0, 1.0)
    );
    assert_eq!(
        (sampling.of_drafts(Some(0)), sampling.of_drafts(Some(2))),
        (plain, plain)
    );
    let expected = SamplingRow {
        seed: 1 << 63,
        temperature: 2.0,
        ..plain
    };
    assert_eq!(sampling.of_drafts(Some(1)), expected);

    let mut engine = started(1, vec![greedy(None); 2]);
    let plan = engine.plan(1).unwrap().unwrap();
    assert!(!engine.device_sampling(&plan).unwrap().samples);
}

#[test]
fn drafts_of_a_wrong_number_are_refused_with_the_number_that_fits() {
    let mut engine = started(4, vec![greedy(None); 2]);
    let mut plan = engine.plan(4).unwrap().unwrap();
    let length = |got, expected| {
        Err(Error::Length {
            name: "drafts",
            got,
            expected,
        })
    };
    assert_eq!(plan.set_drafts(&[1; 5], 3), length(5, 6));
    assert_eq!(plan.set_drafts(&[1; 5], 7), length(5, 14));
}

#[test]
fn the_text_of_a_seed_is_that_of_a_plain_loop_over_the_sampler() {
    let sampling = Sampling {
        seed: 11,
        temperature: 0.9,
        presence_penalty: 0.2,
        ..Sampling::default()
    };
    // A target that looks at the position alone.
    let row = |position: usize| logits(position + 1)[position * VOCAB..].to_vec();
    let prompt = [TokenId(3), TokenId(4), TokenId(5)];
    let (mut history, mut text) = (History::new(&prompt), Vec::new());
    for position in 3..33 {
        let drawn = Sampler::new()
            .draw_row(&row(position - 1), &sampling, &history, &[], position as u64)
            .unwrap();
        history.push(drawn);
        text.push(i64::from(drawn.0));
    }
    for block in [1, 6] {
        let mut engine = engine(block);
        let params = Params {
            sampling: sampling.clone(),
            max_tokens: 30,
            ..Params::default()
        };
        engine.add(prompt.to_vec(), params).unwrap();
        let mut heard = Vec::new();
        while let Some(mut plan) = engine.plan(block).unwrap() {
            let arrays = plan.arrays();
            if !arrays.draft_rows.is_empty() {
                // Right, right, and a guess.
                let drafts: Vec<i64> = (0..5)
                    .map(|i| {
                        if i < 2 {
                            *text.get(heard.len() + i).unwrap_or(&1)
                        } else {
                            7
                        }
                    })
                    .collect();
                plan.set_drafts(&drafts, 5).unwrap();
            }
            let arrays = plan.arrays();
            let rows = arrays
                .logit_rows
                .iter()
                .flat_map(|&at| row(arrays.positions[at as usize] as usize));
            let accepted = engine.accept(&plan, &rows.collect::<Vec<f32>>()).unwrap();
            let events = engine.commit(&mut plan, &accepted, true).unwrap();
            heard.extend_from_slice(&events.arrays().tokens);
        }
        assert_eq!(heard, text, "blocks of {block}");
    }
}

#[test]
fn what_was_drafted_verified_and_accepted_is_booked_per_request_and_in_all() {
    let mut engine = started(5, vec![greedy(None); 2]);
    let mut plan = engine.plan(5).unwrap().unwrap();
    plan.narrow(&[4, 5]).unwrap();
    plan.set_drafts(&[5, 6, 7, 0, 5, 6, 7, 8], 4).unwrap();
    let accepted = engine.accept_sampled(&plan, &[5, 6, 9, 1, 5, 6, 7, 8, 3], &[]).unwrap();
    let events = engine.commit(&mut plan, &accepted, true).unwrap();
    let booked = events.arrays();
    assert_eq!(
        (&booked.drafted[..], &booked.verified[..], &booked.accepted[..]),
        (&[3, 4][..], &[3, 4][..], &[2, 4][..])
    );
    let stats = engine.stats();
    assert_eq!(
        (stats.drafted(), stats.verified(), stats.accepted(), stats.committed()),
        (7, 7, 6, 8)
    );
    // A tree of five nodes that is two deep.
    let mut plan = engine.plan(5).unwrap().unwrap();
    let tree = |anchor: u32| {
        let tokens: Vec<TokenId> = [anchor, 1, 2, 4, 5].map(TokenId).to_vec();
        DraftTree::from_parents(&tokens, &[0, 0, 0, 1, 1]).unwrap()
    };
    plan.set_trees(&[tree(9), tree(3)]).unwrap();
    let accepted = engine
        .accept_sampled(&plan, &[1, 5, 1, 1, 6, 2, 1, 8, 1, 1], &[])
        .unwrap();
    let events = engine.commit(&mut plan, &accepted, true).unwrap();
    let booked = events.arrays();
    assert_eq!(
        (&booked.drafted[..], &booked.verified[..], &booked.accepted[..]),
        (&[2, 2][..], &[4, 4][..], &[2, 1][..])
    );
    assert_eq!(booked.tokens, [1, 5, 6, 2, 8]);
}

#[test]
fn a_text_that_ends_inside_its_block_takes_its_scores_with_it_and_no_others() {
    let stopping = Params {
        stop_ids: vec![TokenId(7)],
        ..greedy(Some(2))
    };
    let mut engine = started(4, vec![stopping, greedy(Some(2)), greedy(None)]);
    let mut plan = engine.plan(4).unwrap().unwrap();
    plan.set_drafts(&[6, 7, 8, 5, 6, 9, 5, 6, 9], 3).unwrap();
    let tokens = [6, 7, 8, 9, 5, 6, 7, 8, 5, 1, 1, 1];
    let logprobs: Vec<f32> = (0..12).map(|i| -(i as f32)).collect();
    let top_tokens: Vec<i64> = (0..24).map(|i| i % 20).collect();
    let top_logprobs: Vec<f32> = (0..24).map(|i| -(i as f32) / 8.0).collect();
    let drawn = DrawnRows {
        tokens: &tokens,
        logprobs: &logprobs,
        top_count: 2,
        top_tokens: &top_tokens,
        top_logprobs: &top_logprobs,
        ..DrawnRows::default()
    };
    let accepted = engine.accept_drawn(&plan, &drawn).unwrap();
    assert_eq!(accepted.arrays().tokens, [6, 7, 8, 9, 5, 6, 7, 5, 1]);
    let events = engine.commit(&mut plan, &accepted, true).unwrap();
    let heard = events.arrays();
    assert_eq!(
        (&heard.tokens[..], &heard.token_starts[..]),
        (&[6, 7, 5, 6, 7, 5, 1][..], &[0, 2, 5, 7][..])
    );
    assert_eq!(heard.finish, [Finish::StopToken as u8, 0, 0]);
    assert_eq!(heard.logprobs[..5], [0.0, -1.0, -4.0, -5.0, -6.0]);
    assert_eq!(heard.top_starts, [0, 2, 4, 6, 8, 10, 10, 10]);
    assert_eq!(heard.top_tokens, [0, 1, 2, 3, 8, 9, 10, 11, 12, 13]);
    assert_eq!(heard.top_logprobs[4..6], [-1.0, -1.125]);
    assert_eq!(heard.text_ends, [-1; 3], "nobody watches for stop strings");
}

#[test]
fn rows_of_a_step_ahead_have_no_places_where_only_the_device_knows_them() {
    let config = Config {
        depth: 1,
        ..engine(4).config().clone()
    };
    assert_eq!((config.vocab_size, config.block_size), (VOCAB, 4));
    let mut engine = Engine::new(config, None).unwrap();
    engine.add(vec![TokenId(1); 3], greedy(None)).unwrap();
    let mut prompt = engine.plan(4).unwrap().unwrap();
    let accepted = engine.accept_sampled(&prompt, &[2], &[]).unwrap();
    engine.commit(&mut prompt, &accepted, true).unwrap();
    let mut first = engine.plan(4).unwrap().unwrap();
    let mut second = engine.plan(4).unwrap().unwrap();
    let ahead = second.arrays();
    assert_eq!(
        (&ahead.start_known[..], &ahead.context_lens[..]),
        (&[false][..], &[4][..]),
        "at least the anchor is kept"
    );
    assert_eq!(
        (&ahead.positions[..], &ahead.slots[..], &ahead.token_ids[..]),
        (&[-1; 4][..], &[-1; 4][..], &[-1; 4][..])
    );
    // Out of turn, and whose turn it is.
    second.set_drafts(&[1; 3], 3).unwrap();
    let early = engine.accept_sampled(&second, &[1; 4], &[]).unwrap_err();
    assert_eq!(early.to_string(), "step 2: step 1 comes first: commit or cancel it");
    // Called off, a step is closed, and those after it go on.
    assert!(first.is_open());
    assert_eq!(engine.cancel(&mut first), Ok(true));
    assert!(!first.is_open());
    assert_eq!(engine.cancel(&mut first), Ok(false));
    first.set_drafts(&[1; 3], 3).unwrap();
    let late = engine.accept_sampled(&first, &[1; 4], &[]).unwrap_err();
    assert_eq!(late.to_string(), "step 1: it is committed or called off already");
}

#[test]
fn after_all_steps_are_called_off_every_request_goes_on_from_its_last_token() {
    let config = Config {
        depth: 1,
        ..engine(4).config().clone()
    };
    let mut engine = Engine::new(config, None).unwrap();
    engine.add(vec![TokenId(1); 3], greedy(None)).unwrap();
    let first = engine.plan(4).unwrap().unwrap();
    let second = engine.plan(4).unwrap().unwrap();
    assert_eq!(engine.counts().unwrap().in_flight, 2);
    engine.cancel_all().unwrap();
    assert_eq!(engine.counts().unwrap().in_flight, 0);
    let mut again = engine.plan(4).unwrap().unwrap();
    assert_eq!(
        (again.step(), &again.arrays().token_ids),
        (2, &first.arrays().token_ids)
    );
    // Its plan is still there, but the step is not.
    let stale = engine.accept_sampled(&second, &[1; 4], &[]).unwrap_err();
    assert_eq!(stale.to_string(), "step 1: it is committed or called off already");
    drop((first, second));
    let accepted = engine.accept_sampled(&again, &[5], &[]).unwrap();
    let events = engine.commit(&mut again, &accepted, true).unwrap();
    assert_eq!(events.arrays().tokens, [5]);
    assert!(!again.is_open());
}
