//! Rows that their caller edits before they are drawn: by their own path, so that drafts change nothing; rows without a token; what does not fit.

use dflash_rs::draft::DraftTree;
use dflash_rs::error::Error;
use dflash_rs::schedule::{Config, Finish, Params};
use dflash_rs::step::{EditedRows, Engine, StepPlan};
use dflash_rs::types::TokenId;
use dflash_rs::verify::Sampling;

const VOCAB: usize = 40;

fn mix(hash: u64, value: u64) -> u64 {
    let hash = (hash ^ value).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    hash ^ (hash >> 31)
}

fn logits_after(text: &[i64]) -> Vec<f32> {
    let hash = text.iter().fold(5, |hash, &token| mix(hash, token as u64 + 1));
    let logit = |column| (mix(hash, column) >> 40) as f32 / (1 << 21) as f32 - 4.0;
    let mut row: Vec<f32> = (0..VOCAB as u64).map(logit).collect();
    // Two that stand out, so that drafts are often right; not both of them are forbidden.
    let at = (hash >> 20) as usize % (VOCAB - 1);
    row[at] += 8.0;
    row[at + 1] += 7.0;
    row
}

/// What the caller allows after `text`: tokens whose sum with the last one is no multiple of three.
fn allowed(text: &[i64]) -> Vec<f32> {
    let mut row = logits_after(text);
    let last = text[text.len() - 1];
    for (column, logit) in row.iter_mut().enumerate() {
        if (last + column as i64) % 3 == 0 {
            *logit = f32::NEG_INFINITY;
        }
    }
    row
}

/// The tokens of each node's path, from the row's first token on.
fn paths(plan: &StepPlan, row: usize) -> Vec<Vec<i64>> {
    let arrays = plan.arrays();
    let first = arrays.query_starts[row] as usize;
    let mut all: Vec<Vec<i64>> = Vec::new();
    for node in 0..arrays.block_len[row] as usize {
        let parent = if arrays.parents.is_empty() {
            node as i32 - 1
        } else {
            arrays.parents[first + node]
        };
        let mut path = if parent < 0 {
            Vec::new()
        } else {
            all[parent as usize].clone()
        };
        path.push(arrays.token_ids[first + node]);
        all.push(path);
    }
    all
}

struct Heard {
    text: Vec<i64>,
    logprobs: Vec<f32>,
    finish: u8,
    errors: Vec<(u64, Error)>,
}

/// A request of two tokens and a bystander, with blocks or trees of `block` tokens. Rows after `dead` output tokens have none. With `there` the
/// rows are drawn first, as for a device.
fn run(block: usize, trees: bool, dead: usize, max_tokens: u32, stop: &[TokenId], there: bool) -> Vec<Heard> {
    let config = Config {
        num_pages: 40,
        page_size: 4,
        max_context: 80,
        block_size: block,
        vocab_size: VOCAB,
        ..Config::default()
    };
    let mut engine = Engine::new(config, None).unwrap();
    let params = |edited| Params {
        sampling: Sampling {
            temperature: 0.9,
            seed: 3,
            repetition_penalty: 1.1,
            ..Sampling::default()
        },
        max_tokens,
        logprobs: Some(0),
        stop_ids: stop.to_vec(),
        edited,
        ..Params::default()
    };
    let mut heard: Vec<Heard> = Vec::new();
    for edited in [true, false] {
        engine.add(vec![TokenId(1), TokenId(2)], params(edited)).unwrap();
        heard.push(Heard {
            text: vec![1, 2],
            logprobs: Vec::new(),
            finish: 0,
            errors: Vec::new(),
        });
    }
    while engine.has_work() {
        let mut plan = engine.plan(block).unwrap().unwrap();
        // Drafts that are often right: what the plain row is likeliest to say, and beside it another token.
        let rows: Vec<usize> = plan.arrays().draft_rows.iter().map(|&row| row as usize).collect();
        let grown: Vec<Vec<i64>> = rows
            .iter()
            .map(|&row| {
                let arrays = plan.arrays();
                let mut text = heard[arrays.request_ids[row] as usize].text.clone();
                let mut drafts = Vec::new();
                for _ in 1..arrays.block_len[row] {
                    let logits = if arrays.request_ids[row] == 0 {
                        allowed(&text)
                    } else {
                        logits_after(&text)
                    };
                    let best = (0..VOCAB).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as i64;
                    text.push(best);
                    drafts.push(best);
                }
                drafts
            })
            .collect();
        if trees && !rows.is_empty() && !plan.arrays().is_prefill.contains(&true) {
            let made: Vec<DraftTree> = rows
                .iter()
                .zip(&grown)
                .map(|(&row, drafts)| {
                    let arrays = plan.arrays();
                    let anchor = arrays.token_ids[arrays.query_starts[row] as usize];
                    let (mut tokens, mut parents) = (vec![TokenId(anchor as u32)], vec![u32::MAX]);
                    let mut parent = 0;
                    for &draft in drafts {
                        if tokens.len() + 2 > arrays.block_len[row] as usize {
                            break;
                        }
                        tokens.extend([TokenId((draft as u32 + 1) % VOCAB as u32), TokenId(draft as u32)]);
                        parents.extend([parent, parent]);
                        parent = tokens.len() as u32 - 1;
                    }
                    DraftTree::from_parents(&tokens, &parents).unwrap()
                })
                .collect();
            plan.set_trees(&made).unwrap();
        } else if !rows.is_empty() {
            let width = grown.iter().map(Vec::len).max().unwrap();
            let drafts: Vec<i64> = grown
                .iter()
                .flat_map(|one| (0..width).map(|i| one.get(i).copied().unwrap_or(0)))
                .collect();
            plan.set_drafts(&drafts, width).unwrap();
        }
        let (mut logits, mut which, mut raw, mut edited, mut refused) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for row in 0..plan.arrays().row_ids.len() {
            let request = plan.arrays().request_ids[row] as usize;
            let text = &heard[request].text;
            let texts: Vec<Vec<i64>> = if plan.arrays().is_prefill[row] {
                vec![text.clone()]
            } else {
                paths(&plan, row)
                    .into_iter()
                    .map(|path| [&text[..text.len() - 1], &path].concat())
                    .collect()
            };
            for text in texts {
                let plain = logits_after(&text);
                if request == 0 {
                    if text.len() - 2 >= dead {
                        refused.push((which.len(), format!("nothing after {} tokens", text.len() - 2)));
                    }
                    which.push((logits.len() / VOCAB) as i64);
                    raw.extend_from_slice(&plain);
                    edited.extend(allowed(&text));
                }
                logits.extend(plain);
            }
        }
        let rows = EditedRows {
            rows: &which,
            raw: &raw,
            logits: &edited,
            refused: &refused,
        };
        let accepted = if there {
            let drawn = engine.draw_edited(&plan, &rows).unwrap();
            assert_eq!(drawn.len(), which.len());
            let accepted = engine.accept_edited(&plan, &logits, &rows).unwrap();
            let arrays = accepted.arrays();
            for row in 0..plan.arrays().row_ids.len() {
                if plan.arrays().request_ids[row] != 0 {
                    continue;
                }
                // The first token of the walk is that of the first row.
                if let Some(&first) =
                    arrays.tokens[arrays.token_starts[row] as usize..arrays.token_starts[row + 1] as usize].first()
                {
                    let at = which
                        .iter()
                        .position(|&at| at == i64::from(plan.arrays().logit_starts[row]))
                        .unwrap();
                    assert_eq!(drawn[at], first);
                }
            }
            for &(at, _) in &refused {
                assert_eq!(drawn[at], -1);
            }
            accepted
        } else {
            engine.accept_edited(&plan, &logits, &rows).unwrap()
        };
        let events = engine.commit(&mut plan, &accepted, true).unwrap();
        let out = events.arrays();
        for (at, &request) in out.request_ids.iter().enumerate() {
            let new = out.token_starts[at] as usize..out.token_starts[at + 1] as usize;
            heard[request as usize].text.extend_from_slice(&out.tokens[new.clone()]);
            heard[request as usize].logprobs.extend_from_slice(&out.logprobs[new]);
            heard[request as usize].finish = out.finish[at];
        }
        for (request, error) in events.errors() {
            heard[*request as usize].errors.push((*request, error.clone()));
        }
    }
    let stats = engine.stats();
    assert!(block == 1 || stats.accepted() > 0, "no draft was accepted");
    heard
}

#[test]
fn drafts_do_not_change_an_edited_text_nor_that_of_a_bystander() {
    let plain = run(1, false, usize::MAX, 30, &[], false);
    assert!(
        plain[0]
            .text
            .windows(2)
            .skip(1)
            .all(|pair| (pair[0] + pair[1]) % 3 != 0)
    );
    assert!(
        plain[1]
            .text
            .windows(2)
            .skip(1)
            .any(|pair| (pair[0] + pair[1]) % 3 == 0)
    );
    for (place, &logprob) in plain[0].logprobs.iter().enumerate() {
        let row = logits_after(&plain[0].text[..place + 2]);
        let total: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        let own = f64::from(row[plain[0].text[place + 2] as usize]) - total.ln();
        assert!(
            (own - f64::from(logprob)).abs() < 1e-4,
            "scored by what the target gave"
        );
    }
    for (block, trees, there) in [(4, false, false), (7, false, true), (7, true, false), (9, true, true)] {
        for (drafted, plain) in run(block, trees, usize::MAX, 30, &[], there).iter().zip(&plain) {
            assert_eq!(drafted.text, plain.text);
            assert_eq!(drafted.logprobs, plain.logprobs);
        }
    }
}

#[test]
fn a_row_without_a_token_ends_the_request_where_plain_decoding_ends_it() {
    for dead in [0, 1, 5, 11] {
        let plain = run(1, false, dead, 30, &[], false);
        assert_eq!(plain[0].text.len(), dead + 2);
        for (block, trees) in [(4, false), (7, true)] {
            let drafted = run(block, trees, dead, 30, &[], true);
            assert_eq!(drafted[0].text, plain[0].text);
            assert_eq!(drafted[0].finish, Finish::Error as u8);
            let why = format!("nothing after {dead} tokens");
            assert_eq!(drafted[0].errors, [(0, Error::NoToken { why })]);
            assert_eq!(
                (&drafted[1].text, drafted[1].finish),
                (&plain[1].text, Finish::Length as u8)
            );
        }
    }
}

#[test]
fn a_row_without_a_token_behind_the_end_of_a_text_is_nobodys() {
    let free = run(1, false, usize::MAX, 30, &[], false);
    let stop = TokenId(free[0].text[2 + 8] as u32);
    let first = free[0].text[2..]
        .iter()
        .position(|&token| token == i64::from(stop.0))
        .unwrap();
    for (block, trees) in [(1, false), (6, false), (9, true)] {
        let heard = run(block, trees, first + 1, 30, &[stop], false);
        assert_eq!(heard[0].finish, Finish::StopToken as u8);
        assert_eq!(heard[0].text, free[0].text[..first + 3]);
        let heard = run(block, trees, 9, 9, &[], false);
        assert_eq!((heard[0].finish, heard[0].text.len()), (Finish::Length as u8, 11));
    }
}

#[test]
fn edited_rows_that_do_not_fit_the_step_are_refused_by_name() {
    let mut engine = Engine::new(
        Config {
            num_pages: 9,
            vocab_size: VOCAB,
            ..Config::default()
        },
        None,
    )
    .unwrap();
    engine
        .add(
            vec![TokenId(1)],
            Params {
                edited: true,
                ..Params::default()
            },
        )
        .unwrap();
    let plan = engine.plan(1).unwrap().unwrap();
    let row = vec![0.0; VOCAB];
    for (rows, raw, logits, name) in [
        (vec![1], &row[..], &row[..], "edited rows"),
        (vec![-1], &row[..], &row[..], "edited rows"),
        (
            vec![0, 0],
            &[&row[..], &row].concat()[..],
            &[&row[..], &row].concat()[..],
            "edited rows",
        ),
        (vec![0], &row[1..], &row[..], "edited raw"),
        (vec![0], &row[..], &row[1..], "edited logits"),
    ] {
        let edited = EditedRows {
            rows: &rows,
            raw,
            logits,
            refused: &[],
        };
        for error in [
            engine.accept_edited(&plan, &row, &edited).unwrap_err(),
            engine.draw_edited(&plan, &edited).unwrap_err(),
        ] {
            assert!(error.to_string().starts_with(name), "{error}");
        }
    }
}

#[test]
fn no_step_is_launched_ahead_of_the_results_of_a_request_whose_rows_are_edited() {
    for edited in [false, true] {
        let config = Config {
            num_pages: 9,
            vocab_size: VOCAB,
            depth: 1,
            ..Config::default()
        };
        let mut engine = Engine::new(config, None).unwrap();
        engine
            .add(
                vec![TokenId(1)],
                Params {
                    edited,
                    ..Params::default()
                },
            )
            .unwrap();
        let plan = engine.plan(1).unwrap().unwrap();
        assert_eq!(engine.plan_ahead(1).unwrap().is_none(), edited);
        drop(plan);
    }
}
