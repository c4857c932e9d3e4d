//! The engine with real draws: what a request hears must not depend on how it was scheduled.

use dflash_rs::draft::DraftTree;
use dflash_rs::error::Error;
use dflash_rs::schedule::{Config, Finish, Params};
use dflash_rs::step::{Engine, Events, StepPlan};
use dflash_rs::types::{RequestId, TokenId};
use dflash_rs::verify::Sampling;

const VOCAB: usize = 50;

fn mix(hash: u64, value: u64) -> u64 {
    let hash = (hash ^ value).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    hash ^ (hash >> 31)
}

/// Logits after `text`: a hash of all of it, between -4 and 4, and one token that stands out.
fn logits_after(text: &[i64], row: &mut [f32]) {
    let hash = text.iter().fold(3, |hash, &token| mix(hash, token as u64 + 1));
    for (column, logit) in row.iter_mut().enumerate() {
        *logit = (mix(hash, column as u64) >> 40) as f32 / (1 << 21) as f32 - 4.0;
    }
    row[(hash >> 20) as usize % VOCAB] += 6.0;
}

fn config(block_size: usize, page_size: usize, num_pages: usize) -> Config {
    Config {
        num_pages,
        page_size,
        max_running: 5,
        max_context: 120,
        block_size,
        max_batch_tokens: 24,
        vocab_size: VOCAB,
        ..Config::default()
    }
}

fn asks() -> Vec<(Vec<TokenId>, Params)> {
    let sampling = |seed, temperature| Sampling {
        seed,
        temperature,
        ..Sampling::default()
    };
    let settings = [
        sampling(1, 0.0),
        sampling(2, 0.8),
        Sampling {
            top_k: 5,
            top_p: 0.9,
            min_p: 0.05,
            ..sampling(3, 0.8)
        },
        Sampling {
            repetition_penalty: 1.5,
            presence_penalty: 0.4,
            frequency_penalty: 0.3,
            ..sampling(4, 0.7)
        },
        Sampling {
            logit_bias: vec![(TokenId(7), 3.0), (TokenId(8), f32::NEG_INFINITY)],
            ..sampling(5, 1.0)
        },
        Sampling {
            repetition_penalty: 0.7,
            ..sampling(6, 0.0)
        },
        sampling(7, 1.2),
    ];
    let ask = |(at, sampling): (usize, Sampling)| {
        let prompt = (0..10 + 6 * at as u32).map(|token| TokenId(token * 3 % 40)).collect();
        (
            prompt,
            Params {
                sampling,
                max_tokens: 40,
                logprobs: Some(2),
                ..Params::default()
            },
        )
    };
    settings.into_iter().enumerate().map(ask).collect()
}

#[derive(Default, Debug, PartialEq)]
struct Heard {
    tokens: Vec<i64>,
    logprobs: Vec<f32>,
    top: Vec<(i64, f32)>,
    finish: u8,
}

/// Drafts: the likeliest token with a hash's luck, so that blocks are cut everywhere.
fn draft(plan: &mut StepPlan, texts: &[Vec<i64>], block: usize) {
    let arrays = plan.arrays();
    let mut drafts = Vec::new();
    let mut row_logits = vec![0.0; VOCAB];
    for &row in &arrays.draft_rows {
        let mut text = texts[arrays.request_ids[row as usize] as usize].clone();
        for _ in 1..block {
            logits_after(&text, &mut row_logits);
            let best = (0..VOCAB)
                .max_by(|&a, &b| row_logits[a].total_cmp(&row_logits[b]))
                .unwrap() as i64;
            let lucky = text.iter().fold(9, |hash, &token| mix(hash, token as u64)) % 5 > 0;
            text.push(if lucky { best } else { 1 });
        }
        drafts.extend_from_slice(&text[text.len() - (block - 1)..]);
    }
    if !drafts.is_empty() {
        plan.set_drafts(&drafts, block - 1).unwrap();
    }
}

/// Verifies fewer drafts, as many as a hash says: all, some, none.
fn narrow(plan: &mut StepPlan) {
    let arrays = plan.arrays();
    let width = |&row: &i32| {
        let hash = mix(plan.step(), row as u64);
        1 + (hash % arrays.block_len[row as usize] as u64) as i32
    };
    let widths: Vec<i32> = arrays.draft_rows.iter().map(width).collect();
    plan.narrow(&widths).unwrap();
}

/// Makes a tree of every chain: a wrong turn beside each draft, which comes first where a hash says so, and goes on by itself.
fn plant(plan: &mut StepPlan) {
    let arrays = plan.arrays();
    let tree = |&row: &i32| {
        let first = arrays.query_starts[row as usize] as usize;
        let room = arrays.block_len[row as usize] as usize;
        let chain: Vec<TokenId> = (0..room)
            .map(|at| TokenId(arrays.token_ids[first + at] as u32))
            .collect();
        let (mut tokens, mut parents, mut end) = (vec![chain[0]], vec![0], 0);
        for (at, &draft) in chain.iter().enumerate().skip(1) {
            let hash = mix(plan.step(), at as u64);
            let wrong = TokenId((hash % VOCAB as u64) as u32);
            let mut here = vec![draft, wrong];
            if hash & 1 << 40 > 0 {
                here.swap(0, 1);
            }
            let next = tokens.len() as u32 + u32::from(here[0] != draft);
            tokens.extend(here);
            parents.extend([end, end]);
            end = next;
        }
        DraftTree::from_parents(&tokens[..room], &parents[..room]).unwrap()
    };
    let trees: Vec<DraftTree> = arrays.draft_rows.iter().map(tree).collect();
    plan.set_trees(&trees).unwrap();
}

fn target(plan: &StepPlan, texts: &[Vec<i64>]) -> Vec<f32> {
    let arrays = plan.arrays();
    let mut logits = vec![0.0; arrays.logit_rows.len() * VOCAB];
    for row in 0..arrays.row_ids.len() {
        let first = arrays.logit_starts[row] as usize;
        let end = arrays.logit_starts[row + 1] as usize;
        let context = arrays.context_lens[row] as usize;
        for at in first..end {
            let start = arrays.query_starts[row] as usize;
            let mut text = texts[arrays.request_ids[row] as usize][..context].to_vec();
            let last = arrays.logit_rows[at] as usize;
            if arrays.parents.is_empty() {
                text.extend_from_slice(&arrays.token_ids[start..=last]);
            } else {
                let parent = |&node: &usize| usize::try_from(arrays.parents[node]).ok().map(|parent| start + parent);
                let path: Vec<usize> = std::iter::successors(Some(last), parent).collect();
                text.extend(path.iter().rev().map(|&node| arrays.token_ids[node]));
            }
            logits_after(&text, &mut logits[at * VOCAB..(at + 1) * VOCAB]);
        }
    }
    logits
}

fn hear(events: &Events, texts: &mut [Vec<i64>], heard: &mut [Heard]) {
    let arrays = events.arrays();
    for (at, &id) in arrays.request_ids.iter().enumerate() {
        let tokens = arrays.token_starts[at] as usize..arrays.token_starts[at + 1] as usize;
        texts[id as usize].extend_from_slice(&arrays.tokens[tokens.clone()]);
        let own = &mut heard[id as usize];
        own.tokens.extend_from_slice(&arrays.tokens[tokens.clone()]);
        own.logprobs.extend_from_slice(&arrays.logprobs[tokens.clone()]);
        let top = arrays.top_starts[tokens.start] as usize..arrays.top_starts[tokens.end] as usize;
        own.top
            .extend(top.map(|top| (arrays.top_tokens[top], arrays.top_logprobs[top])));
        own.finish = arrays.finish[at];
    }
}

fn run(config: Config, asks: Vec<(Vec<TokenId>, Params)>) -> (Vec<Heard>, Engine) {
    run_with(config, asks, |_| ())
}

fn run_with(config: Config, asks: Vec<(Vec<TokenId>, Params)>, change: impl Fn(&mut StepPlan)) -> (Vec<Heard>, Engine) {
    let block = config.block_size;
    let mut engine = Engine::new(config, None).unwrap();
    let mut texts: Vec<Vec<i64>> = Vec::new();
    let mut heard: Vec<Heard> = Vec::new();
    for (prompt, params) in asks {
        texts.push(prompt.iter().map(|token| i64::from(token.0)).collect());
        heard.push(Heard::default());
        engine.add(prompt, params).unwrap();
    }
    while engine.has_work() {
        let mut plan = engine.plan(block).unwrap().unwrap();
        draft(&mut plan, &texts, block);
        change(&mut plan);
        let logits = target(&plan, &texts);
        let accepted = engine.accept(&plan, &logits).unwrap();
        let events = engine.commit(&mut plan, &accepted, true).unwrap();
        hear(&events, &mut texts, &mut heard);
    }
    (heard, engine)
}

#[test]
fn verifying_fewer_drafts_does_not_change_the_text() {
    let (plain, _) = run(config(1, 16, 60), asks());
    for (page_size, num_pages) in [(1, 900), (16, 7)] {
        let (heard, engine) = run_with(config(8, page_size, num_pages), asks(), narrow);
        assert_eq!(heard, plain);
        let (tau, drafted) = (engine.stats().tau().unwrap(), engine.stats().drafted());
        let (_, whole) = run(config(8, page_size, num_pages), asks());
        assert!(tau > 1.05 && tau < whole.stats().tau().unwrap());
        assert!(
            drafted < whole.stats().drafted(),
            "only what was verified counts as drafted"
        );
    }
}

#[test]
fn trees_do_not_change_the_text_and_accept_what_is_in_them() {
    let (plain, _) = run(config(1, 16, 60), asks());
    for (page_size, num_pages) in [(1, 900), (16, 7), (64, 10)] {
        let (heard, engine) = run_with(config(12, page_size, num_pages), asks(), plant);
        assert_eq!(heard, plain);
        let stats = engine.stats();
        assert!(stats.tau().unwrap() > 1.2, "drafts were meant to be of use");
        assert!(
            stats.verified() > stats.drafted(),
            "a tree has more drafts than positions"
        );
    }
}

#[test]
fn trees_that_do_not_fit_are_refused_and_change_nothing() {
    let mut engine = Engine::new(config(4, 16, 60), None).unwrap();
    let prompt = vec![TokenId(1); 4];
    engine
        .add(
            prompt,
            Params {
                max_tokens: 30,
                ..Params::default()
            },
        )
        .unwrap();
    let mut plan = engine.plan(4).unwrap().unwrap();
    let accepted = engine.accept_sampled(&plan, &[9], &[]).unwrap();
    engine.commit(&mut plan, &accepted, true).unwrap();
    let mut plan = engine.plan(4).unwrap().unwrap();
    let whole = plan.arrays().clone();
    let tree = |tokens: &[u32], parents: &[u32]| {
        let tokens: Vec<TokenId> = tokens.iter().copied().map(TokenId).collect();
        DraftTree::from_parents(&tokens, parents).unwrap()
    };
    for (trees, message) in [
        (vec![], "trees: got 0 elements, expected 1"),
        (
            vec![tree(&[9, 1, 2, 3, 4], &[0; 5])],
            "trees: got 5 nodes for request 0, expected at most 4, its anchor included",
        ),
        (
            vec![tree(&[8, 1], &[0, 0])],
            "trees: got anchor 8 for request 0, expected its last token 9",
        ),
        (
            vec![tree(&[9, 50], &[0, 0])],
            "trees: got token 50 for request 0, expected tokens in 0..49",
        ),
    ] {
        assert_eq!(plan.set_trees(&trees).unwrap_err().to_string(), message);
        assert_eq!(plan.arrays(), &whole);
    }
    plan.set_trees(&[tree(&[9, 1, 2, 3], &[0, 0, 0, 2])]).unwrap();
    let arrays = plan.arrays();
    assert_eq!(arrays.positions, [4, 5, 5, 6]);
    assert_eq!(arrays.slots, whole.slots);
    assert_eq!(arrays.ancestors, [0b1, 0b11, 0b101, 0b1101]);
    assert!(plan.set_drafts(&[1, 2, 3], 3).is_err());
    let accepted = engine.accept_sampled(&plan, &[2, 7, 3, 6], &[]).unwrap();
    let kept = accepted.arrays();
    assert_eq!(
        (kept.accepted[0], &kept.tokens[..], &kept.commit_rows[..]),
        (2, &[2, 3, 6][..], &[0, 2, 3][..])
    );
    assert_eq!(kept.commit_slots, whole.slots[..3]);
    assert_eq!(
        (&kept.move_from[..], &kept.move_to[..]),
        (&whole.slots[2..], &whole.slots[1..3])
    );
}

#[test]
fn a_narrowed_plan_closes_up_and_refuses_what_it_does_not_have() {
    let mut engine = Engine::new(config(4, 16, 60), None).unwrap();
    let mut texts: Vec<Vec<i64>> = Vec::new();
    for (prompt, params) in asks().into_iter().take(2) {
        texts.push(prompt.iter().map(|token| i64::from(token.0)).collect());
        engine.add(prompt, params).unwrap();
    }
    let mut heard = vec![Heard::default(), Heard::default()];
    let mut plan = loop {
        let mut plan = engine.plan(4).unwrap().unwrap();
        if plan.arrays().draft_rows.len() == 2 {
            break plan;
        }
        draft(&mut plan, &texts, 4);
        let accepted = engine.accept(&plan, &target(&plan, &texts)).unwrap();
        let events = engine.commit(&mut plan, &accepted, true).unwrap();
        hear(&events, &mut texts, &mut heard);
    };
    let whole = plan.arrays().clone();
    for (widths, message) in [
        (&[2][..], "widths: got 1 elements, expected 2"),
        (
            &[2, 5][..],
            "widths: got 5 for request 1, expected 1..4, the tokens of its row",
        ),
        (
            &[0, 1][..],
            "widths: got 0 for request 0, expected 1..4, the tokens of its row",
        ),
    ] {
        assert_eq!(plan.narrow(widths).unwrap_err().to_string(), message);
        assert_eq!(plan.arrays(), &whole);
    }
    plan.narrow(&[1, 3]).unwrap();
    let arrays = plan.arrays();
    assert_eq!(arrays.query_starts, [0, 1, 4]);
    assert_eq!(arrays.block_len, [1, 3]);
    assert_eq!(arrays.draft_rows, [1]);
    assert_eq!(arrays.logit_rows, [0, 1, 2, 3]);
    assert_eq!(arrays.logit_starts, [0, 1, 4]);
    let moved = [0, 4, 5, 6];
    assert_eq!(arrays.slots, moved.map(|at| whole.slots[at]));
    assert_eq!(arrays.positions, moved.map(|at| whole.positions[at]));
    assert_eq!(arrays.token_ids, moved.map(|at| whole.token_ids[at]));
}

#[test]
fn seeded_text_and_scores_are_the_same_for_every_block_page_size_and_amount_of_memory() {
    let (plain, _) = run(config(1, 16, 60), asks());
    for heard in &plain {
        assert_eq!(
            (heard.tokens.len(), heard.logprobs.len(), heard.top.len()),
            (40, 40, 80)
        );
        assert_eq!(heard.finish, Finish::Length as u8);
    }
    for block in [1, 2, 8, 16] {
        for (page_size, num_pages) in [(1, 900), (1, 100), (16, 60), (16, 7), (64, 10), (64, 2)] {
            let (heard, mut engine) = run(config(block, page_size, num_pages), asks());
            assert_eq!(heard, plain, "block {block}, {num_pages} pages of {page_size}");
            let counts = engine.counts().unwrap();
            assert_eq!(counts.free_pages + counts.reclaimable_pages, num_pages);
            if num_pages == 100 || num_pages == 7 {
                assert!(counts.retractions > 0, "memory was meant to be short");
            }
            if block > 2 && num_pages > 50 {
                assert!(engine.stats().tau().unwrap() > 1.2, "drafts were meant to be of use");
            }
        }
    }
}

#[test]
fn a_row_that_cannot_be_drawn_from_ends_its_own_request_and_nobody_elses() {
    let (plain, _) = run(config(4, 16, 60), asks());
    for poison in [f32::NAN, f32::INFINITY] {
        let mut engine = Engine::new(config(4, 16, 60), None).unwrap();
        let mut texts: Vec<Vec<i64>> = Vec::new();
        let mut heard: Vec<Heard> = Vec::new();
        for (prompt, params) in asks() {
            texts.push(prompt.iter().map(|token| i64::from(token.0)).collect());
            heard.push(Heard::default());
            engine.add(prompt, params).unwrap();
        }
        let mut errors = Vec::new();
        while engine.has_work() {
            let mut plan = engine.plan(4).unwrap().unwrap();
            draft(&mut plan, &texts, 4);
            let mut logits = target(&plan, &texts);
            if let Some(row) = plan.arrays().request_ids.iter().position(|&id| id == 2)
                && plan.arrays().block_len[row] == 4
                && !plan.arrays().is_prefill[row]
            {
                logits[plan.arrays().logit_starts[row] as usize * VOCAB + 13] = poison;
            }
            let accepted = engine.accept(&plan, &logits).unwrap();
            let events = engine.commit(&mut plan, &accepted, true).unwrap();
            errors.extend(events.errors().to_vec());
            hear(&events, &mut texts, &mut heard);
        }
        assert!(
            matches!(errors[..], [(2, Error::BadLogit { column: 13, .. })]),
            "{errors:?}"
        );
        assert_eq!(heard[2].finish, Finish::Error as u8);
        assert!(plain[2].tokens.starts_with(&heard[2].tokens));
        for (id, (heard, plain)) in heard.iter().zip(&plain).enumerate().filter(|(id, _)| *id != 2) {
            assert_eq!(heard, plain, "request {id}");
        }
        let counts = engine.counts().unwrap();
        assert_eq!(counts.free_pages + counts.reclaimable_pages, 60, "its pages came back");
    }
}

#[test]
fn a_request_that_could_never_finish_is_refused_with_numbers() {
    let mut engine = Engine::new(config(4, 16, 2), None).unwrap();
    let prompt = vec![TokenId(1); 30];
    let fits = Params {
        max_tokens: 3,
        ..Params::default()
    };
    assert_eq!(
        engine.add(prompt.clone(), fits),
        Ok(RequestId(0)),
        "its last token needs no KV"
    );
    let refused = engine.add(
        prompt,
        Params {
            max_tokens: 4,
            ..Params::default()
        },
    );
    let error = Error::OutOfPages {
        prompt: 30,
        max_tokens: 4,
        needed: 3,
        page_size: 16,
        total: 2,
    };
    assert_eq!(refused, Err(error));
}

#[test]
fn steps_are_resolved_once_in_order_and_with_their_own_results() {
    let mut engine = Engine::new(
        Config {
            depth: 1,
            ..config(4, 16, 60)
        },
        None,
    )
    .unwrap();
    engine
        .add(
            vec![TokenId(1); 20],
            Params {
                max_tokens: 30,
                ..Params::default()
            },
        )
        .unwrap();
    let mut first = engine.plan(4).unwrap().unwrap();
    let mut second = engine.plan(4).unwrap().unwrap();
    assert!(matches!(engine.plan(4), Err(Error::OutOfTurn { step: 0, .. })));
    assert_eq!(
        second.arrays().token_ids,
        [-1, -1, -1, -1],
        "only the device knows the anchor"
    );
    assert_eq!(second.arrays().positions, [20, 21, 22, 23], "but where it is, is known");
    assert!(matches!(
        engine.accept_sampled(&second, &[1; 4], &[]),
        Err(Error::OutOfTurn { step: 1, .. })
    ));
    let accepted = engine.accept_sampled(&first, &[1], &[]).unwrap();
    assert!(matches!(
        engine.commit(&mut second, &accepted, true),
        Err(Error::OutOfTurn { step: 1, .. })
    ));
    engine.commit(&mut first, &accepted, true).unwrap();
    assert!(
        matches!(
            engine.accept_sampled(&second, &[1; 4], &[]),
            Err(Error::OutOfTurn { step: 1, .. })
        ),
        "no drafts"
    );
    second.set_drafts(&[1, 1, 5], 3).unwrap();
    assert!(engine.accept_sampled(&second, &[1; 3], &[]).is_err());
    let walked = engine.accept_sampled(&second, &[1, 1, 1, 1], &[]).unwrap();
    assert_eq!(
        (walked.arrays().accepted[0], &walked.arrays().tokens[..]),
        (2, &[1, 1, 1][..])
    );
    assert!(matches!(
        engine.commit(&mut second, &accepted, true),
        Err(Error::OutOfTurn { step: 1, .. })
    ));
    engine.commit(&mut second, &walked, true).unwrap();
    assert_eq!(engine.cancel(&mut second), Ok(false), "it is committed");
}

#[test]
fn an_engine_in_a_steady_state_gives_its_buffers_round() {
    let mut engine = Engine::new(config(4, 16, 60), None).unwrap();
    engine
        .add(
            vec![TokenId(1); 4],
            Params {
                max_tokens: 100,
                ..Params::default()
            },
        )
        .unwrap();
    let mut addresses = std::collections::HashSet::new();
    for _ in 0..20 {
        let mut plan = engine.plan(1).unwrap().unwrap();
        addresses.insert(plan.arrays().row_ids.as_ptr());
        let accepted = engine.accept_sampled(&plan, &[1], &[]).unwrap();
        addresses.insert(accepted.arrays().accepted.as_ptr());
        engine.commit(&mut plan, &accepted, true).unwrap();
    }
    assert_eq!(addresses.len(), 2, "one plan and one result serve every step");
}

#[test]
fn a_step_without_draft_context_says_so_to_the_next() {
    let mut engine = Engine::new(config(4, 4, 60), None).unwrap();
    engine
        .add(
            (0..9).map(TokenId).collect(),
            Params {
                max_tokens: 3,
                ..Params::default()
            },
        )
        .unwrap();
    for (injected, valid_from) in [(false, 0), (true, 9), (true, 9)] {
        let mut plan = engine.plan(1).unwrap().unwrap();
        assert_eq!(plan.arrays().draft_valid_from, [valid_from]);
        let accepted = engine.accept_sampled(&plan, &[1], &[]).unwrap();
        engine.commit(&mut plan, &accepted, injected).unwrap();
    }
    assert!(!engine.has_work());
    // A plain request takes the pages as they are, a drafting one computes them again.
    for (draft, start) in [(false, 8), (true, 0)] {
        let params = Params {
            draft,
            ..Params::default()
        };
        let prompt = (0..10).map(TokenId).collect();
        assert_eq!(where_it_starts(&mut engine, prompt, params), (start, start));
    }
}

/// The context that a request is let in with, and where that of its drafter begins.
fn where_it_starts(engine: &mut Engine, prompt: Vec<TokenId>, params: Params) -> (i32, i32) {
    let id = engine.add(prompt, params).unwrap();
    let plan = engine.plan(4).unwrap().unwrap();
    let found = (plan.arrays().context_lens[0], plan.arrays().draft_valid_from[0]);
    drop(plan);
    engine.abort(id).unwrap();
    found
}

#[test]
fn while_the_drafter_rests_steps_owe_it_nothing_and_prompts_take_what_the_cache_has() {
    let mut engine = Engine::new(config(4, 4, 60), None).unwrap();
    let prompt: Vec<TokenId> = (0..9).map(TokenId).collect();
    let params = Params {
        max_tokens: 4,
        ..Params::default()
    };
    engine.let_drafter_rest(true);
    engine.add(prompt.clone(), params.clone()).unwrap();
    // Its context begins anew with what comes after it is woken.
    for (rests, owed, valid_from) in [(true, false, 0), (true, false, 9), (false, true, 10), (false, true, 10)] {
        engine.let_drafter_rest(rests);
        let mut plan = engine.plan(1).unwrap().unwrap();
        assert_eq!((plan.drafts(), plan.arrays().draft_valid_from[0]), (owed, valid_from));
        let accepted = engine.accept_sampled(&plan, &[1], &[]).unwrap();
        engine.commit(&mut plan, &accepted, owed).unwrap();
    }
    assert!(!engine.has_work());
    // The cache has two pages of the prompt without draft K/V: nothing is computed again for a drafter that rests.
    for (rests, start) in [(true, 8), (false, 0)] {
        engine.let_drafter_rest(rests);
        assert_eq!(
            where_it_starts(&mut engine, prompt.clone(), params.clone()),
            (start, start)
        );
    }
}

#[test]
fn prompts_are_taken_in_pieces_beside_decoding_rows() {
    let mut engine = Engine::new(
        Config {
            max_batch_tokens: 12,
            ..config(4, 16, 60)
        },
        None,
    )
    .unwrap();
    engine
        .add(
            vec![TokenId(1); 4],
            Params {
                max_tokens: 50,
                ..Params::default()
            },
        )
        .unwrap();
    let mut pieces = Vec::new();
    for step in 0..6 {
        if step == 1 {
            engine
                .add(
                    vec![TokenId(2); 30],
                    Params {
                        max_tokens: 2,
                        ..Params::default()
                    },
                )
                .unwrap();
        }
        let mut plan = engine.plan(4).unwrap().unwrap();
        let arrays = plan.arrays();
        assert!(arrays.token_ids.len() <= 12);
        let prefill = arrays.is_prefill.iter().position(|&prefill| prefill);
        pieces.push((arrays.block_len[0], prefill.map(|row| arrays.block_len[row])));
        if !arrays.draft_rows.is_empty() {
            let drafts = vec![9; arrays.draft_rows.len() * 3];
            plan.set_drafts(&drafts, 3).unwrap();
        }
        let sampled = vec![1; plan.arrays().logit_rows.len()];
        let accepted = engine.accept_sampled(&plan, &sampled, &[]).unwrap();
        engine.commit(&mut plan, &accepted, true).unwrap();
    }
    assert_eq!(
        pieces[..5],
        [(4, Some(4)), (4, Some(8)), (4, Some(8)), (4, Some(8)), (4, Some(6))]
    );
    assert_eq!(pieces[5].1, None);
}

/// A request of `prompt` tokens that are all `token`, for `max_tokens` more.
fn ask(engine: &mut Engine, token: u32, prompt: usize, max_tokens: u32, draft: bool) -> RequestId {
    let params = Params {
        max_tokens,
        draft,
        ..Params::default()
    };
    engine.add(vec![TokenId(token); prompt], params).unwrap()
}

/// Takes a step in which no draft is right, and tells `(request, tokens of its block, whether it is prompt)` of each row.
fn step(engine: &mut Engine, max_block: usize) -> Vec<(u64, i32, bool)> {
    let mut plan = engine.plan(max_block).unwrap().unwrap();
    let arrays = plan.arrays();
    let rows = (0..arrays.row_ids.len())
        .map(|row| (arrays.request_ids[row], arrays.block_len[row], arrays.is_prefill[row]))
        .collect();
    let width = arrays.block_len.iter().max().map_or(0, |&len| len as usize - 1);
    let drafts = vec![9; arrays.draft_rows.len() * width];
    if !drafts.is_empty() {
        plan.set_drafts(&drafts, width).unwrap();
    }
    let sampled = vec![1; plan.arrays().logit_rows.len()];
    let accepted = engine.accept_sampled(&plan, &sampled, &[]).unwrap();
    engine.commit(&mut plan, &accepted, true).unwrap();
    rows
}

fn small(page_size: usize, num_pages: usize) -> Config {
    Config {
        max_running: 2,
        max_batch_tokens: 16,
        ..config(8, page_size, num_pages)
    }
}

#[test]
fn sizes_that_cannot_be_are_refused_by_name() {
    let most = i32::MAX as usize / 4;
    let set = |name: &str, size: usize| {
        let mut config = small(16, 60);
        let field = match name {
            "num_pages" => &mut config.num_pages,
            "page_size" => &mut config.page_size,
            "max_running" => &mut config.max_running,
            "max_context" => &mut config.max_context,
            "block_size" => &mut config.block_size,
            "max_batch_tokens" => &mut config.max_batch_tokens,
            _ => &mut config.vocab_size,
        };
        *field = size;
        config
    };
    let refusal = |config: Config| match Engine::new(config, None).unwrap_err() {
        Error::InvalidArgument { name, got, .. } => (name, got),
        other => panic!("{other}"),
    };
    for name in [
        "num_pages",
        "page_size",
        "max_running",
        "max_context",
        "block_size",
        "max_batch_tokens",
        "vocab_size",
    ] {
        for size in [0, most + 1] {
            assert_eq!(refusal(set(name, size)), (name, size.to_string()));
        }
    }
    for (name, size) in [
        ("vocab_size", most),
        ("max_batch_tokens", most),
        ("max_batch_tokens", 2),
    ] {
        assert!(Engine::new(set(name, size), None).is_ok(), "{name} of {size}");
    }
    assert_eq!(refusal(set("max_batch_tokens", 1)), ("max_batch_tokens", "1".into()));
    let deep = Config {
        depth: 2,
        ..small(16, 60)
    };
    assert_eq!(refusal(deep), ("depth", "2".into()));
    let late = Config {
        depth: 1,
        state_checkpoints: Some(0),
        ..small(16, 60)
    };
    assert_eq!(refusal(late), ("depth", "1".into()));
    let eos_ids = vec![TokenId(49), TokenId(50)];
    let outside = Config {
        eos_ids,
        ..small(16, 60)
    };
    assert_eq!(refusal(outside), ("eos_ids", "token 50".into()));
}

#[test]
fn a_row_has_room_for_the_whole_context_a_block_and_what_a_step_under_way_may_have_added() {
    for (page_size, max_context, block_size, depth, slots) in [
        (1, 10, 3, 0, 13),
        (1, 10, 3, 1, 16),
        (4, 10, 3, 1, 20),
        (4, 9, 8, 0, 20),
    ] {
        let config = Config {
            max_context,
            block_size,
            depth,
            ..small(page_size, 60)
        };
        let engine = Engine::new(config, None).unwrap();
        let width = engine.scheduler().kv().table().width();
        assert_eq!(width * page_size, slots, "{max_context} {block_size} {depth}");
    }
}

#[test]
fn tokens_outside_the_vocabulary_are_refused_in_prompts_and_stops() {
    let mut engine = Engine::new(small(16, 60), None).unwrap();
    for (name, prompt, stop) in [("prompt", 50, 1), ("stop_token_ids", 1, 50)] {
        let params = Params {
            stop_ids: vec![TokenId(stop)],
            ..Params::default()
        };
        let refused = engine.add(vec![TokenId(prompt)], params).unwrap_err();
        assert!(
            matches!(&refused, Error::InvalidArgument { name: of, got, .. } if *of == name && got == "token 50"),
            "{refused}"
        );
    }
    assert!(!engine.has_work());
}

#[test]
fn drafts_leave_a_quarter_of_a_step_to_prompts_that_can_use_it_and_to_no_others() {
    let mut engine = Engine::new(
        Config {
            max_running: 3,
            ..small(16, 60)
        },
        None,
    )
    .unwrap();
    ask(&mut engine, 1, 4, 90, true);
    ask(&mut engine, 2, 4, 90, true);
    assert_eq!(step(&mut engine, 8), [(0, 4, true), (1, 4, true)]);
    assert_eq!(step(&mut engine, 8), [(0, 8, false), (1, 8, false)], "no prompt waits");
    ask(&mut engine, 3, 9, 90, true);
    for piece in [4, 4] {
        let shared = [(0, 8, false), (1, 4, false), (2, piece, true)];
        assert_eq!(
            step(&mut engine, 8),
            shared,
            "while it waits, and while it is on its way"
        );
    }
    assert_eq!(step(&mut engine, 8), [(0, 8, false), (1, 4, false), (2, 1, true)]);
    assert_eq!(step(&mut engine, 8), [(0, 8, false), (1, 7, false), (2, 1, false)]);
    ask(&mut engine, 4, 9, 90, true);
    let full = [(0, 8, false), (1, 7, false), (2, 1, false)];
    assert_eq!(step(&mut engine, 8), full, "it has no row to run in");
    assert_eq!(engine.counts().unwrap().retractions, 0);
}

#[test]
fn nobody_is_let_in_while_a_step_is_full() {
    let mut engine = Engine::new(
        Config {
            max_batch_tokens: 4,
            ..small(16, 60)
        },
        None,
    )
    .unwrap();
    ask(&mut engine, 1, 10, 9, true);
    ask(&mut engine, 2, 10, 9, true);
    for rows in [[(0, 4, true)], [(0, 4, true)]] {
        assert_eq!(step(&mut engine, 8), rows);
        let counts = engine.counts().unwrap();
        assert_eq!((counts.running, counts.waiting), (1, 1));
    }
    assert_eq!(step(&mut engine, 8), [(0, 2, true), (1, 2, true)]);
}

#[test]
fn a_block_has_no_more_tokens_than_the_request_may_still_get() {
    let mut engine = Engine::new(small(16, 60), None).unwrap();
    ask(&mut engine, 1, 4, 5, true);
    step(&mut engine, 8);
    for left in [4, 3, 2, 1] {
        assert_eq!(step(&mut engine, 8), [(0, left, false)]);
    }
    assert!(!engine.has_work());
}

#[test]
fn a_block_that_finds_no_pages_becomes_a_plain_step() {
    let mut engine = Engine::new(small(1, 23), None).unwrap();
    ask(&mut engine, 1, 4, 20, true);
    ask(&mut engine, 2, 12, 8, false);
    assert_eq!(step(&mut engine, 8), [(0, 4, true), (1, 12, true)]);
    assert_eq!(
        step(&mut engine, 8),
        [(0, 1, false), (1, 1, false)],
        "seven pages are left"
    );
    assert_eq!(engine.counts().unwrap().retractions, 0);
    assert_eq!(step(&mut engine, 3), [(0, 3, false), (1, 1, false)], "five are");
}

#[test]
fn the_youngest_gives_way_and_is_not_let_in_again_at_once() {
    let mut engine = Engine::new(small(1, 23), None).unwrap();
    ask(&mut engine, 1, 4, 20, false);
    for _ in 0..8 {
        step(&mut engine, 1);
    }
    ask(&mut engine, 2, 4, 20, true);
    assert_eq!(step(&mut engine, 8), [(0, 1, false), (1, 4, true)]);
    assert_eq!(step(&mut engine, 6), [(0, 1, false), (1, 6, false)]);
    assert_eq!(engine.counts().unwrap().free_pages, 0);
    // Its block is rejected, so it holds more pages than it needs to come back.
    assert_eq!(step(&mut engine, 1), [(0, 1, false)]);
    let counts = engine.counts().unwrap();
    assert_eq!((counts.running, counts.waiting, counts.retractions), (1, 1, 1));
}

#[test]
fn a_row_whose_result_is_under_way_waits_for_it_when_pages_run_out() {
    let config = Config {
        depth: 1,
        ..small(1, 7)
    };
    let mut engine = Engine::new(config, None).unwrap();
    ask(&mut engine, 1, 4, 4, true);
    step(&mut engine, 8);
    let plan = engine.plan(8).unwrap().unwrap();
    assert_eq!(plan.arrays().block_len, [3]);
    assert!(engine.plan(8).unwrap().is_none());
    let counts = engine.counts().unwrap();
    assert_eq!((counts.running, counts.in_flight, counts.retractions), (1, 1, 0));
}

#[test]
fn prompts_of_a_target_with_state_end_their_chunks_where_copies_are_worth_it_and_later_ones_start_there() {
    let stateful = Config {
        state_checkpoints: Some(4),
        max_batch_tokens: 20,
        ..config(1, 4, 64)
    };
    let mut engine = Engine::new(stateful, None).unwrap();
    // One request at a time, its prompt alone: (first position, tokens, restored, saved) of every chunk.
    let mut chunks = |prompt: Vec<u32>| {
        let prompt = prompt.into_iter().map(TokenId).collect();
        let params = Params {
            max_tokens: 1,
            ..Params::default()
        };
        engine.add(prompt, params).unwrap();
        let mut seen = Vec::new();
        while let Some(mut plan) = engine.plan(1).unwrap() {
            let arrays = plan.arrays();
            assert_eq!(arrays.row_ids.len(), 1);
            seen.push((
                arrays.context_lens[0],
                arrays.block_len[0],
                arrays.state_restore[0],
                arrays.state_save[0] >= 0,
            ));
            let drawn = vec![1; arrays.logit_rows.len()];
            let accepted = engine.accept_sampled(&plan, &drawn, &[]).unwrap();
            engine.commit(&mut plan, &accepted, true).unwrap();
        }
        seen
    };
    // A full step's worth, the last whole page, the rest.
    let long: Vec<u32> = (0..31).collect();
    let first = chunks(long.clone());
    assert_eq!(first, [(0, 20, -1, true), (20, 8, -1, true), (28, 3, -1, false)]);
    // The same text again starts from the last copy.
    let again = chunks(long.clone());
    assert_eq!((again.len(), again[0].0, again[0].1), (1, 28, 3));
    assert!(again[0].2 >= 0);
    // Another that leaves it at 24 starts from the copy before that, and leaves one where they part.
    let parting: Vec<u32> = (0..26).chain(40..46).collect();
    let other = chunks(parting);
    assert!(other[0].2 >= 0);
    assert_eq!(
        other
            .iter()
            .map(|&(first, len, _, saved)| (first, len, saved))
            .collect::<Vec<_>>(),
        [(20, 4, true), (24, 4, true), (28, 4, true)]
    );
    assert!(other[1..].iter().all(|chunk| chunk.2 == -1));
    // A third of the kind starts there.
    let third = chunks((0..26).chain(46..49).collect());
    assert_eq!(third[0].0, 24);
}
