//! Look-up drafts against a search through the whole text, and what it learns of its own drafts.

use std::collections::HashMap;

use dflash_rs::draft::{Guess, Lookup, LookupRates};
use dflash_rs::error::Error;
use dflash_rs::schedule::{Config, Params};
use dflash_rs::step::{Engine, StepPlan};
use dflash_rs::types::TokenId;
use proptest::prelude::*;

fn ids(tokens: &[u32]) -> Vec<TokenId> {
    tokens.iter().copied().map(TokenId).collect()
}

/// Length of the longest ending that occurred before, and where its occurrences ended, by looking everywhere.
fn searched(text: &[TokenId]) -> (usize, Vec<usize>) {
    let n = text.len();
    let same = |end: usize| {
        (0..end)
            .take_while(|back| text[end - 1 - back] == text[n - 1 - back])
            .count()
    };
    let longest = (1..n).map(same).max().unwrap_or(0);
    let ends = (1..n).filter(|&end| longest > 0 && same(end) == longest);
    (longest, ends.collect())
}

/// What follows an occurrence that ended before `from`, going on through itself.
fn copied(text: &[TokenId], from: usize, count: usize) -> Vec<TokenId> {
    let mut all = text.to_vec();
    for at in 0..count {
        all.push(all[from + at]);
    }
    all.split_off(text.len())
}

fn followers(text: &[TokenId], ending: &[TokenId]) -> Vec<TokenId> {
    let mut found: Vec<TokenId> = text
        .windows(ending.len() + 1)
        .filter(|window| window[..ending.len()] == *ending)
        .map(|window| window[ending.len()])
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn check(text: &[TokenId], index: &Lookup, count: usize, latest: bool) {
    let (longest, ends) = searched(text);
    assert_eq!(index.matched(), longest, "{text:?}");
    let mut guesses = Vec::new();
    index.propose(text, count, &mut guesses);
    let tokens: Vec<TokenId> = guesses.iter().map(|guess| guess.token).collect();
    let Some(&last) = ends.last() else {
        assert!(guesses.is_empty());
        return;
    };
    if latest {
        assert_eq!(tokens, copied(text, last, count), "{text:?}");
    } else {
        assert!(ends.iter().any(|&end| tokens == copied(text, end, count)), "{text:?}");
    }
    for (at, guess) in guesses.iter().enumerate() {
        assert_eq!(guess.matched as usize, longest + at);
    }
    if let Some(first) = guesses.first() {
        let alone = followers(text, &text[text.len() - longest..]).len() == 1;
        assert_eq!(first.unanimous, alone, "{text:?}");
    }
}

proptest! {
    #[test]
    fn the_longest_ending_is_found_and_copied_from_its_latest_occurrence(
        tokens in prop::collection::vec(0u32..4, 0..90), count in 0usize..12
    ) {
        let (text, mut index) = (ids(&tokens), Lookup::new());
        for end in 0..=text.len() {
            index.extend(&text[..end]);
            prop_assert_eq!(index.len(), end);
            // Too few tokens for a place where so many endings recur that the shortest ones keep an older occurrence.
            check(&text[..end], &index, count, end <= 32);
            check(&text[..end], &index, count, false);
        }
    }

    #[test]
    fn repeated_passages_of_a_large_vocabulary_are_copied_from_the_latest(
        passages in prop::collection::vec(prop::collection::vec(0u32..50_000, 1..12), 1..6),
        order in prop::collection::vec(0usize..6, 1..14),
    ) {
        let text: Vec<TokenId> = order.iter().flat_map(|&at| ids(&passages[at % passages.len()])).collect();
        let mut index = Lookup::new();
        for end in 1..=text.len() {
            index.extend(&text[..end]);
            check(&text[..end], &index, 5, false);
        }
        // Passages of distinct tokens share few endings: nothing is left behind.
        check(&text, &index, 5, (1..=text.len()).all(|end| searched(&text[..end]).0 < 30));
    }

    #[test]
    fn reading_in_pieces_and_at_once_give_the_same(
        tokens in prop::collection::vec(0u32..3, 1..60), cuts in prop::collection::vec(0usize..60, 0..5)
    ) {
        let text = ids(&tokens);
        let (mut whole, mut pieces) = (Lookup::new(), Lookup::new());
        whole.extend(&text);
        let mut cuts = cuts;
        cuts.sort_unstable();
        for cut in cuts {
            pieces.extend(&text[..cut.min(text.len()).max(pieces.len())]);
        }
        pieces.extend(&text);
        let (mut left, mut right) = (Vec::new(), Vec::new());
        whole.propose(&text, 9, &mut left);
        pieces.propose(&text, 9, &mut right);
        prop_assert_eq!(left, right);
    }
}

#[test]
fn a_loop_is_drafted_beyond_the_end_of_the_text() {
    let text = ids(&[7, 8, 9, 8, 9]);
    let mut index = Lookup::new();
    index.extend(&text);
    let mut guesses = Vec::new();
    index.propose(&text, 6, &mut guesses);
    let tokens: Vec<u32> = guesses.iter().map(|guess| guess.token.0).collect();
    assert_eq!(tokens, [8, 9, 8, 9, 8, 9]);
}

#[test]
fn a_text_that_never_repeats_itself_is_not_drafted_and_one_that_was_not_read_neither() {
    let text = ids(&[5, 4, 3, 2, 1]);
    let mut index = Lookup::new();
    assert!(index.is_empty() && index.matched() == 0);
    let mut guesses = vec![Guess {
        token: TokenId(1),
        matched: 1,
        unanimous: true,
    }];
    index.extend(&text);
    index.propose(&text, 4, &mut guesses);
    assert!(guesses.is_empty());
    let longer = ids(&[5, 4, 3, 2, 1, 5]);
    index.propose(&longer, 4, &mut guesses);
    assert!(guesses.is_empty(), "the last token was not read");
}

#[test]
fn a_token_takes_at_most_192_bytes_whatever_the_text() {
    // The texts with most states and most edges a token, a random one, and a loop.
    let most_states: Vec<u32> = std::iter::once(0).chain(std::iter::repeat_n(1, 20_000)).collect();
    let most_edges: Vec<u32> = std::iter::once(0)
        .chain(std::iter::repeat_n(1, 20_000))
        .chain([2])
        .collect();
    let random: Vec<u32> = (0..40_000u32).map(|i| i.wrapping_mul(2_654_435_761) >> 20).collect();
    let few: Vec<u32> = (0..40_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 16) & 1)
        .collect();
    let round: Vec<u32> = (0..40_000u32).map(|i| i % 7).collect();
    for tokens in [most_states, most_edges, random, few, round] {
        let text = ids(&tokens);
        let mut index = Lookup::new();
        index.extend(&text);
        let most = 192 * text.len() + 256;
        assert!(
            index.bytes() <= most,
            "{} bytes for {} tokens",
            index.bytes(),
            text.len()
        );
    }
}

#[test]
fn longer_matches_promise_more_until_something_else_is_seen() {
    let guess = |matched, unanimous| Guess {
        token: TokenId(0),
        matched,
        unanimous,
    };
    let mut rates = LookupRates::new();
    for matched in 1..40 {
        let (sure, unsure) = (
            rates.chance(&guess(matched, true)),
            rates.chance(&guess(matched, false)),
        );
        assert!(unsure < sure && sure < 1.0 && unsure > 0.0);
        assert!(rates.chance(&guess(matched + 1, true)) >= sure);
    }
    let drafts = [guess(2, true), guess(3, true), guess(4, true)];
    let untouched = rates.chance(&drafts[2]);
    for _ in 0..300 {
        // The first was right, the second not, the third never reached.
        rates.record(&drafts, ids(&[0, 5, 0]).into_iter());
    }
    assert!(rates.chance(&drafts[0]) > 0.97 && rates.chance(&drafts[1]) < 0.03);
    assert_eq!(rates.chance(&drafts[2]), untouched);
    let before = rates.chance(&drafts[0]);
    rates.record(&drafts, std::iter::empty());
    assert_eq!(rates.chance(&drafts[0]), before, "the text has not gone on");
}

// ---- in an engine -----------------------------------------------------------------------------------------------------

const VOCAB: usize = 6;

/// What a target writes after a text: mostly by its last two tokens, so that texts repeat themselves, and now and then by where it is.
fn next(text: &[i64]) -> i64 {
    let [.., before, last] = text else { return 1 };
    let surprise = if text.len() % 7 == 3 { text.len() as i64 } else { 0 };
    (before * 5 + last * 3 + surprise + 1) % VOCAB as i64
}

/// The target's token after every row that asks for one, drafts before it taken as they are.
fn drawn(plan: &StepPlan, texts: &HashMap<u64, Vec<i64>>) -> Vec<i64> {
    let arrays = plan.arrays();
    let mut tokens = Vec::new();
    for row in 0..arrays.row_ids.len() {
        let first = arrays.query_starts[row] as usize;
        let known = &texts[&arrays.request_ids[row]][..arrays.context_lens[row] as usize];
        for at in arrays.logit_starts[row] as usize..arrays.logit_starts[row + 1] as usize {
            let own = &arrays.token_ids[first..=arrays.logit_rows[at] as usize];
            tokens.push(next(&[known, own].concat()));
        }
    }
    tokens
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Steps are cut short, called off after the look-up and taken again, requests give way and come back: texts are the target's, and
    /// every draft is what the text so far says.
    #[test]
    fn texts_are_the_targets_whatever_comes_between_a_look_up_and_its_commit(
        num_pages in 14usize..40, page_size in 1usize..5, choices in prop::collection::vec(0usize..12, 400)
    ) {
        let config = Config {
            num_pages: num_pages * 4 / page_size + 12, page_size, max_running: 3, max_context: 44, block_size: 5, max_batch_tokens: 13,
            vocab_size: VOCAB, ..Config::default()
        };
        let mut engine = Engine::new(config, None).unwrap();
        let mut texts: HashMap<u64, Vec<i64>> = HashMap::new();
        let mut expected: HashMap<u64, Vec<i64>> = HashMap::new();
        for n in 1..6usize {
            let prompt: Vec<i64> = (0..n * 3).map(|i| ((i * n) % VOCAB) as i64).collect();
            let params = Params { max_tokens: 24, ignore_eos: true, ..Params::default() };
            let id = engine.add(prompt.iter().map(|&t| TokenId(t as u32)).collect(), params).unwrap().0;
            let mut whole = prompt.clone();
            (0..24).for_each(|_| whole.push(next(&whole)));
            texts.insert(id, prompt);
            expected.insert(id, whole);
        }
        let (mut choices, mut drafted, mut accepted, mut called_off) = (choices.iter().cycle(), 0, 0, 0);
        while engine.has_work() {
            let mut choose = || *choices.next().unwrap();
            let mut plan = engine.plan(1 + choose() % 5).unwrap().unwrap();
            let rows = plan.arrays().draft_rows.clone();
            if !rows.is_empty() {
                let found = engine.look_up(&plan, 4).unwrap();
                for (at, &row) in rows.iter().enumerate() {
                    let text: Vec<TokenId> = texts[&plan.arrays().request_ids[row as usize]].iter().map(|&t| TokenId(t as u32)).collect();
                    let (mut index, mut guesses) = (Lookup::new(), Vec::new());
                    index.extend(&text);
                    index.propose(&text, (plan.arrays().block_len[row as usize] as usize - 1).min(4), &mut guesses);
                    prop_assert_eq!(found.found[at] as usize, guesses.len());
                    for (i, guess) in guesses.iter().enumerate() {
                        prop_assert_eq!(found.tokens[at * 4 + i], i64::from(guess.token.0));
                        prop_assert!(found.chances[at * 4 + i] > 0.0 && found.chances[at * 4 + i] < 1.0);
                    }
                }
                plan.set_drafts(&found.tokens, 4).unwrap();
                let widths: Vec<i32> = found
                    .found
                    .iter()
                    .map(|&most| 1 + most.min(choose() as i32))
                    .collect();
                plan.narrow(&widths).unwrap();
            }
            let tokens = drawn(&plan, &texts);
            let fate = choose();
            if fate < 2 && called_off < 40 {
                called_off += 1;
                if fate == 0 {
                    prop_assert!(engine.cancel(&mut plan).unwrap());
                }
                // Or it is dropped.
                continue;
            }
            let taken = engine.accept_sampled(&plan, &tokens, &[]).unwrap();
            let events = engine.commit(&mut plan, &taken, true).unwrap();
            let out = events.arrays();
            for (event, id) in out.request_ids.iter().enumerate() {
                let new = &out.tokens[out.token_starts[event] as usize..out.token_starts[event + 1] as usize];
                texts.get_mut(id).unwrap().extend(new);
                drafted += out.verified[event];
                accepted += out.accepted[event];
            }
            let closed = matches!(engine.look_up(&plan, 4), Err(Error::OutOfTurn { .. }));
            prop_assert!(closed, "a step that is committed has nothing to look up");
        }
        prop_assert_eq!(texts, expected);
        prop_assert!(drafted < 40 || accepted > 0, "{} of {}", accepted, drafted);
    }
}
