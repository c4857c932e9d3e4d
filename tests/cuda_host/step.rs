use std::convert::Infallible;

use dflash_host_check as _;
use dflash_rs::device::cuda::params::{AcceptParams, PrepareBlockParams};
use dflash_rs::draft::DraftTree;
use dflash_rs::types::TokenId;
use dflash_rs::verify::{walk_chain, walk_tree};

use super::numbers::{Numbers, Pages, address, address_mut, share, starts};

unsafe extern "C" {
    fn dflash_host_prepare_block(p: *const PrepareBlockParams);
    fn dflash_host_accept(p: *const AcceptParams);
    fn dflash_emulated_prepare_block(p: *const PrepareBlockParams);
    fn dflash_emulated_accept(p: *const AcceptParams);
}

/// Random parents; a chain now and then.
fn parents(numbers: &mut Numbers, len: usize, chain: bool) -> Vec<u32> {
    (0..len)
        .map(|i| if i == 0 { 0 } else if chain { i - 1 } else { numbers.below(i) } as u32)
        .collect()
}

#[test]
fn tokens_positions_and_slots_of_a_step_are_those_of_the_table() {
    prepare(&mut Numbers(4), 200_000, dflash_host_prepare_block);
    prepare(&mut Numbers(104), 2_000, dflash_emulated_prepare_block);
}

fn prepare(numbers: &mut Numbers, most: usize, kernel: unsafe extern "C" fn(*const PrepareBlockParams)) {
    let mut tokens_seen = 0;
    while tokens_seen < share(most) {
        let requests = numbers.below(5);
        let lens: Vec<usize> = (0..requests).map(|_| numbers.below(40)).collect();
        let starts = starts(&lens);
        let total = starts[requests] as usize;
        let padded = total + numbers.below(4);
        // The table may end before a block does: no slot there.
        let context: Vec<i32> = (0..requests).map(|_| numbers.below(100) as i32).collect();
        let pages = Pages::new(numbers, requests, 120);
        let anchors: Vec<i64> = (0..requests).map(|_| numbers.below(1000) as i64).collect();
        let drafts: Vec<i64> = (0..requests * 40).map(|_| numbers.below(1000) as i64).collect();
        let depths: Vec<i32> = (0..total).map(|_| numbers.below(10) as i32).collect();
        let (verify, tree, store) = (numbers.chance(0.5), numbers.chance(0.5), numbers.chance(0.8));
        let (mut token_ids, mut positions, mut slots) = (vec![-9i64; padded], vec![-9i64; padded], vec![-9i64; padded]);
        let params = PrepareBlockParams {
            query_starts: address(&starts),
            context_lens: address(&context),
            anchors: address(&anchors),
            drafts: if verify { address(&drafts) } else { 0 },
            depths: if tree { address(&depths) } else { 0 },
            table: pages.params(),
            token_ids: address_mut(&mut token_ids),
            positions: address_mut(&mut positions),
            slots: if store { address_mut(&mut slots) } else { 0 },
            mask_token: 77,
            draft_stride: 40,
            num_requests: requests as i32,
            padded_tokens: padded as i32,
        };
        // SAFETY: the arrays outlive the call and have the lengths that params.h asks for.
        unsafe { kernel(&raw const params) };
        for r in 0..requests {
            for i in 0..lens[r] {
                let t = starts[r] as usize + i;
                let token = match i {
                    0 => anchors[r],
                    _ if verify => drafts[r * 40 + i - 1],
                    _ => 77,
                };
                let depth = if tree { depths[t] } else { i as i32 };
                assert_eq!((token_ids[t], positions[t]), (token, i64::from(context[r] + depth)));
                assert_eq!(
                    slots[t],
                    if store {
                        pages.slot(r, context[r] as usize + i)
                    } else {
                        -9
                    }
                );
            }
        }
        for t in total..padded {
            assert_eq!(
                (token_ids[t], positions[t], slots[t]),
                (0, 0, if store { -1 } else { -9 })
            );
        }
        tokens_seen += padded.max(1);
    }
}

#[test]
fn a_batch_accepts_what_the_walks_accept() {
    accept(&mut Numbers(5), 100_000, 0.0, dflash_host_accept);
    accept(&mut Numbers(105), 1_000, 0.0, dflash_emulated_accept);
}

#[test]
fn a_draft_whose_parent_is_not_before_it_is_never_accepted() {
    accept(&mut Numbers(6), 20_000, 0.3, dflash_host_accept);
    accept(&mut Numbers(106), 500, 0.3, dflash_emulated_accept);
}

/// A share `astray` of the drafts names a parent that is not before it.
fn accept(numbers: &mut Numbers, most_walks: usize, astray: f64, kernel: unsafe extern "C" fn(*const AcceptParams)) {
    let mut walks = 0;
    while walks < share(most_walks) {
        let requests = numbers.within(1, 6);
        let chain = numbers.chance(0.4);
        let partial = numbers.chance(0.5);
        let most = numbers.pick(&[1, 4, 16, 70]);
        // Drawn rows of each request; chunks of prompt have one or none, for their last token.
        let mut lens = Vec::new();
        let mut drawn = Vec::new();
        for _ in 0..requests {
            let n = numbers.within(1, most);
            let chunk = partial && numbers.chance(0.3);
            lens.push(n);
            drawn.push(if chunk { numbers.below(2) } else { n });
        }
        let query_starts = starts(&lens);
        let logit_starts = starts(&drawn);
        let total = query_starts[requests] as usize;
        let by_row = partial || numbers.chance(0.5);
        let rows = if by_row { logit_starts[requests] as usize } else { total };
        let context: Vec<i32> = (0..requests).map(|_| numbers.below(100) as i32).collect();
        let pages = Pages::new(numbers, requests, 180);
        let vocab = numbers.pick(&[2, 3, 10]);
        let token_ids: Vec<i64> = (0..total).map(|_| numbers.below(vocab) as i64).collect();
        let failing = numbers.chance(0.2);
        let sampled: Vec<i64> = (0..rows)
            .map(|_| {
                if failing && numbers.chance(0.2) {
                    -1
                } else {
                    numbers.below(vocab) as i64
                }
            })
            .collect();
        let parents: Vec<Vec<u32>> = lens.iter().map(|&n| parents(numbers, n, chain)).collect();
        let mut flat: Vec<i32> = parents.iter().flatten().map(|&p| p as i32).collect();
        let mut strays = vec![false; total];
        if astray > 0.0 {
            for r in 0..requests {
                for i in 1..drawn[r] {
                    let t = query_starts[r] as usize + lens[r] - drawn[r] + i;
                    strays[t] = numbers.chance(astray);
                    if strays[t] {
                        let later = numbers.within(i, drawn[r] - 1) as i32;
                        flat[t] = numbers.pick(&[-1, later]);
                    }
                }
            }
        }
        // An anchor of which nobody says that it takes part is drawn all the same.
        let live: Vec<i32> = drawn.iter().map(|&n| numbers.within(0, n.max(1)) as i32).collect();
        let cut = numbers.chance(0.3);
        // With less room than a request has nodes only the first of them take part.
        let room = if numbers.chance(0.2) {
            numbers.within(1, most)
        } else {
            most
        };

        let stride = most + numbers.below(2);
        let mut accepted = vec![-9i32; requests];
        let mut out = vec![-9i64; requests * stride];
        let mut out_lens = vec![-9i32; requests];
        let mut anchors = vec![-9i64; requests];
        let mut path = vec![-9i32; requests * stride];
        let mut new_context = context.clone(); // in place
        let (mut rows_out, mut positions, mut slots) = (vec![-9i64; total], vec![-9i64; total], vec![-9i64; total]);
        let params = AcceptParams {
            query_starts: address(&query_starts),
            logit_starts: if by_row { address(&logit_starts) } else { 0 },
            context_lens: address(&new_context),
            node_counts: if cut { address(&live) } else { 0 },
            token_ids: address(&token_ids),
            parents: if chain { 0 } else { address(&flat) },
            sampled: address(&sampled),
            table: pages.params(),
            accepted: address_mut(&mut accepted),
            out_tokens: address_mut(&mut out),
            out_lens: address_mut(&mut out_lens),
            new_context_lens: address_mut(&mut new_context),
            next_anchors: address_mut(&mut anchors),
            path: address_mut(&mut path),
            commit_rows: address_mut(&mut rows_out),
            commit_positions: address_mut(&mut positions),
            commit_slots: address_mut(&mut slots),
            out_stride: stride as i64,
            path_stride: stride as i64,
            num_requests: requests as i32,
            max_nodes: room as i32,
        };
        // SAFETY: the arrays outlive the call and have the lengths that params.h asks for.
        unsafe { kernel(&raw const params) };

        for r in 0..requests {
            walks += 1;
            let (n, before) = (drawn[r], lens[r] - drawn[r]);
            let first = query_starts[r] as usize + before;
            let row = if by_row { logit_starts[r] as usize } else { first };
            // A failed row draws a token that no draft carries.
            let draw = |node: usize| -> Result<TokenId, Infallible> { Ok(TokenId(sampled[row + node] as u32)) };
            let nodes = room.min(if cut { live[r].max(1) as usize } else { n });
            // Of the reference, a draft that went astray carries a token that is never drawn.
            let tokens: Vec<TokenId> = (first..first + nodes.min(n))
                .map(|t| {
                    TokenId(if strays[t] && !chain {
                        u32::MAX - 1
                    } else {
                        token_ids[t] as u32
                    })
                })
                .collect();
            let (nodes, bonus) = if n == 0 {
                (vec![], None)
            } else if chain {
                let walk = walk_chain(&tokens[1..], |i| Ok(draw(i).unwrap())).unwrap();
                ((0..=walk.accepted).collect(), Some(walk.bonus))
            } else {
                let tree = DraftTree::from_parents(&tokens, &parents[r][..tokens.len()]).unwrap();
                let walk = walk_tree(&tree, |i| Ok(draw(i).unwrap())).unwrap();
                ([&[0], walk.path.as_slice()].concat(), Some(walk.bonus))
            };
            let mut expected: Vec<i64> = nodes.iter().skip(1).map(|&i| token_ids[first + i as usize]).collect();
            assert_eq!(accepted[r] as usize, expected.len());
            let bonus = bonus.map_or(-1, |t| i64::from(t.0 as i32));
            if bonus >= 0 {
                expected.push(bonus);
            }
            assert_eq!((out_lens[r] as usize, anchors[r]), (expected.len(), bonus));
            expected.resize(stride, -1);
            assert_eq!(out[r * stride..(r + 1) * stride], expected);
            let kept = before + nodes.len();
            assert_eq!(new_context[r], context[r] + kept as i32);
            let mut expected: Vec<i32> = nodes.iter().map(|&i| i as i32).collect();
            expected.resize(stride, -1);
            assert_eq!(path[r * stride..(r + 1) * stride], expected);
            for i in 0..lens[r] {
                let t = query_starts[r] as usize + i;
                let expected = if i >= kept {
                    (-1, -1, -1)
                } else {
                    let from = if i < before {
                        t
                    } else {
                        first + nodes[i - before] as usize
                    };
                    let key = context[r] as usize + i;
                    (from as i64, key as i64, pages.slot(r, key))
                };
                assert_eq!((rows_out[t], positions[t], slots[t]), expected);
            }
        }
    }
}
