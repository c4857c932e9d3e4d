use dflash_host_check as _;
use dflash_rs::device::cuda::params::{TreeBuildParams, TreeTopKParams};
use dflash_rs::draft::{DraftTree, TopK, top_k};
use dflash_rs::types::TokenId;
use dflash_rs::verify::Sampler;

use super::numbers::{Numbers, address, address_mut, share};

unsafe extern "C" {
    fn dflash_host_tree_top_k_f32(p: *const TreeTopKParams);
    fn dflash_host_tree_top_k_bf16(p: *const TreeTopKParams);
    fn dflash_host_tree_build(p: *const TreeBuildParams);
    fn dflash_emulated_tree_top_k_f32(p: *const TreeTopKParams);
    fn dflash_emulated_tree_top_k_bf16(p: *const TreeTopKParams);
    fn dflash_emulated_tree_build(p: *const TreeBuildParams);
}

/// Log-probabilities: spread, in steps (ties), or with few finite ones; a rising row has its best columns side by side, a
/// striped one has them in the hands of few threads (more than their list holds).
fn row(numbers: &mut Numbers, vocab: usize) -> Vec<f32> {
    let step = numbers.pick(&[0.0, 0.0, 0.25, 5.0, 100.0]);
    let (absent, rising) = (numbers.pick(&[0.0, 0.0, 0.9]), numbers.chance(0.2));
    let stripe = if numbers.chance(0.2) {
        numbers.within(1, 256)
    } else {
        512
    };
    (0..vocab)
        .map(|i| {
            if i / 4 % 512 >= stripe {
                return -30.0;
            }
            let x = if rising {
                i as f64 / vocab as f64 - 1.0
            } else {
                -numbers.unit()
            } * 20.0;
            let x = if step > 0.0 { (x / step).trunc() * step } else { x };
            if numbers.chance(absent) {
                f32::NEG_INFINITY
            } else {
                x as f32
            }
        })
        .collect()
}

fn best_columns(numbers: &mut Numbers, vocab: usize, most: usize, emulated: bool) -> usize {
    let (rows, k) = (numbers.within(1, 3), numbers.within(1, most.min(vocab)));
    let rows: Vec<Vec<f32>> = (0..rows).map(|_| row(numbers, vocab)).collect();
    best_columns_of(numbers, &rows, k, emulated);
    rows.len()
}

fn best_columns_of(numbers: &mut Numbers, given: &[Vec<f32>], k: usize, emulated: bool) {
    let (rows, vocab) = (given.len(), given[0].len());
    let stride = vocab + numbers.below(5);
    let bf16 = numbers.chance(0.3);
    let normalise = numbers.chance(0.3);
    let mut values = vec![f32::NAN; rows * stride];
    for (out, row) in values.chunks_mut(stride).zip(given) {
        out[..vocab].copy_from_slice(row);
    }
    let halves: Vec<u16> = values.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    if bf16 {
        for (x, half) in values.iter_mut().zip(&halves) {
            *x = f32::from_bits(u32::from(*half) << 16);
        }
    }
    let (mut tokens, mut log_probs) = (vec![-9i64; rows * k], vec![f32::NAN; rows * k]);
    let params = TreeTopKParams {
        values: if bf16 { address(&halves) } else { address(&values) },
        tokens: address_mut(&mut tokens),
        log_probs: address_mut(&mut log_probs),
        row_stride: stride as i64,
        num_rows: rows as i32,
        vocab: vocab as i32,
        k: k as i32,
        normalise: i32::from(normalise),
    };
    // SAFETY: the arrays outlive the call and have the lengths that params.h asks for.
    unsafe {
        match (bf16, emulated) {
            (false, false) => dflash_host_tree_top_k_f32(&raw const params),
            (true, false) => dflash_host_tree_top_k_bf16(&raw const params),
            (false, true) => dflash_emulated_tree_top_k_f32(&raw const params),
            (true, true) => dflash_emulated_tree_top_k_bf16(&raw const params),
        }
    }
    for r in 0..rows {
        let values = &values[r * stride..r * stride + vocab];
        let (ids, best) = top_k(values, vocab, k).unwrap();
        let got: Vec<TokenId> = tokens[r * k..(r + 1) * k].iter().map(|&t| TokenId(t as u32)).collect();
        assert_eq!(got, ids, "{k} of {vocab}");
        for i in 0..k {
            let finite = best[i] > f32::NEG_INFINITY;
            let expected = if normalise && finite {
                Sampler::new().logprob(values, ids[i]).unwrap().min(0.0)
            } else {
                best[i]
            };
            assert_eq!(log_probs[r * k + i], expected);
        }
    }
}

#[test]
fn of_more_columns_than_a_list_holds_the_best_are_found_digit_by_digit() {
    let mut numbers = Numbers(16);
    let (k, vocab, listed) = (256, 9001, 2048);
    // A thread has four neighbouring columns in every 2048. With the best columns in fewer hands than k, all of those are listed,
    // and of the others, which are alike, those up to the last thread whose best one counts.
    for threads in [130, 200, 255] {
        let others = 4 * (k - 1 - threads) + 1;
        for (more, step) in [(0, 0.0), (1, 0.0), (1, 5.0), (300, 0.0), (9000, 0.25), (9000, 20.0)] {
            let mut left = listed + more - others;
            let row: Vec<f32> = (0..vocab)
                .map(|i| {
                    if i / 4 % 512 >= threads {
                        return -30.0;
                    }
                    if left == 0 {
                        return -31.0;
                    }
                    left -= 1;
                    let x = numbers.unit() * -20.0;
                    if step > 0.0 {
                        ((x / step).round() * step) as f32
                    } else {
                        x as f32
                    }
                })
                .collect();
            for k in [k, k - 1] {
                best_columns_of(&mut numbers, &[row.clone(), row.clone()], k, false);
            }
        }
        // Exactly k of one value, and below it more of another than the list holds.
        for (best, good, others) in [(-1.0, -2.0, -30.0), (-1e38, -1e38, f32::NEG_INFINITY)] {
            let mut left = k;
            let row: Vec<f32> = (0..vocab)
                .map(|i| {
                    if i / 4 % 512 >= threads {
                        return others;
                    }
                    left = left.saturating_sub(1);
                    if left > 0 { best } else { good }
                })
                .collect();
            for k in [k - 1, k] {
                best_columns_of(&mut numbers, &[row.clone(), row.clone()], k, false);
            }
        }
    }
}

#[test]
fn the_best_columns_are_those_of_the_reference() {
    let mut numbers = Numbers(13);
    let mut compare = |most: usize, vocabs: &[usize], k: usize, emulated: bool| {
        let mut rows = 0;
        while rows < share(most) {
            let vocab = numbers.pick(vocabs);
            rows += best_columns(&mut numbers, vocab, k, emulated);
        }
    };
    compare(20_000, &[1, 7, 33, 100], 64, false);
    compare(500, &[600, 1023, 1024, 2048, 2049, 5000, 9001], 256, false);
    compare(12, &[3, 1024, 5000, 9001], 256, true);
}

#[test]
fn columns_that_are_no_numbers_count_as_impossible() {
    let mut numbers = Numbers(15);
    let kernels = [
        dflash_host_tree_top_k_f32 as unsafe extern "C" fn(*const TreeTopKParams),
        dflash_emulated_tree_top_k_f32,
    ];
    for (kernel, cases) in kernels.into_iter().zip([60, 4]) {
        for case in 0..cases {
            let (vocab, k, normalise) = (numbers.within(2, 2600), numbers.within(1, 40), case % 2 == 1);
            let k = k.min(vocab);
            let share = if case < 2 { 1.0 } else { 0.3 };
            let mut clean = row(&mut numbers, vocab);
            let mut values = clean.clone();
            for (value, clean) in values.iter_mut().zip(&mut clean) {
                if numbers.chance(share) {
                    *value = numbers.pick(&[f32::NAN, -f32::NAN, f32::INFINITY]);
                    *clean = f32::NEG_INFINITY;
                }
            }
            let (mut tokens, mut log_probs) = (vec![-9i64; k], vec![f32::NAN; k]);
            let params = TreeTopKParams {
                values: address(&values),
                tokens: address_mut(&mut tokens),
                log_probs: address_mut(&mut log_probs),
                row_stride: vocab as i64,
                num_rows: 1,
                vocab: vocab as i32,
                k: k as i32,
                normalise: i32::from(normalise),
            };
            // SAFETY: the arrays outlive the call and have the lengths that params.h asks for.
            unsafe { kernel(&raw const params) };
            let (ids, best) = top_k(&clean, vocab, k).unwrap();
            for i in 0..k {
                let expected = if normalise && best[i] > f32::NEG_INFINITY {
                    Sampler::new().logprob(&clean, ids[i]).unwrap().min(0.0)
                } else {
                    best[i]
                };
                assert_eq!(
                    (tokens[i] as u32, log_probs[i]),
                    (ids[i].0, expected),
                    "column {i} of {k}, {vocab}"
                );
            }
        }
    }
}

#[test]
fn trees_are_those_of_the_reference() {
    build(&mut Numbers(14), 1_000_000, dflash_host_tree_build);
    build(&mut Numbers(114), 3_000, dflash_emulated_tree_build);
}

fn build(numbers: &mut Numbers, most_nodes: usize, kernel: unsafe extern "C" fn(*const TreeBuildParams)) {
    let mut nodes_seen = 0;
    while nodes_seen < share(most_nodes) {
        let requests = numbers.within(1, 3);
        let most = numbers.pick(&[0usize, 1, 7, 31, 63, 64, 130, 1023]);
        let (depth, k) = (numbers.within(1, 16), numbers.pick(&[1usize, 2, 5, 16, 64]));
        let step = numbers.pick(&[0.0, 0.5, 1.0]);
        let (mut tokens, mut log_probs) = (vec![], vec![]);
        for _ in 0..requests * depth {
            let mut row: Vec<f32> = (0..k)
                .map(|_| {
                    let x = -numbers.unit() * 4.0;
                    let x = if step > 0.0 { (x / step).ceil() * step } else { x };
                    if numbers.chance(0.05) {
                        f32::NEG_INFINITY
                    } else {
                        x as f32
                    }
                })
                .collect();
            row.sort_by(|a, b| b.total_cmp(a));
            log_probs.extend(row);
            tokens.extend((0..k).map(|_| numbers.below(1000) as i64));
        }
        let limited = numbers.chance(0.5);
        let budgets: Vec<i32> = (0..requests).map(|_| numbers.below(most + 1) as i32).collect();
        let anchors: Vec<i64> = (0..requests).map(|_| numbers.below(1000) as i64).collect();
        let (nodes, words) = (most + 1, (most + 1).div_ceil(64));
        let mut out_tokens = vec![-9i64; requests * nodes];
        let mut ints = vec![vec![-9i32; requests * nodes]; 4];
        let mut scores = vec![f32::NAN; requests * nodes];
        let mut masks = vec![0xdeu64; requests * nodes * words];
        let mut counts = vec![-9i32; requests];
        let bare = numbers.chance(0.1);
        let [parents, depths, first_child, next_sibling] = &mut ints[..] else {
            unreachable!()
        };
        let params = TreeBuildParams {
            anchors: address(&anchors),
            top_tokens: address(&tokens),
            top_log_probs: address(&log_probs),
            budgets: if limited { address(&budgets) } else { 0 },
            tokens: address_mut(&mut out_tokens),
            parents: address_mut(parents),
            depths: address_mut(depths),
            scores: if bare { 0 } else { address_mut(&mut scores) },
            first_child: if bare { 0 } else { address_mut(first_child) },
            next_sibling: if bare { 0 } else { address_mut(next_sibling) },
            masks: if bare { 0 } else { address_mut(&mut masks) },
            counts: address_mut(&mut counts),
            num_requests: requests as i32,
            max_depth: depth as i32,
            k: k as i32,
            max_nodes: most as i32,
        };
        // SAFETY: the arrays outlive the call and have the lengths that params.h asks for.
        unsafe { kernel(&raw const params) };
        for r in 0..requests {
            let part = r * depth * k..(r + 1) * depth * k;
            let ids: Vec<TokenId> = tokens[part.clone()].iter().map(|&t| TokenId(t as u32)).collect();
            let mut source = TopK::new(&ids, &log_probs[part], k).unwrap();
            let budget = if limited { budgets[r] as usize } else { most };
            let tree = DraftTree::build(TokenId(anchors[r] as u32), budget, depth, &mut source).unwrap();
            let count = tree.len();
            nodes_seen += count;
            assert_eq!(counts[r] as usize, count);
            let at = r * nodes;
            let got: Vec<u32> = out_tokens[at..at + count].iter().map(|&t| t as u32).collect();
            assert_eq!(got, tree.tokens().iter().map(|t| t.0).collect::<Vec<_>>());
            let unsigned = |x: &[i32]| -> Vec<u32> { x[at..at + count].iter().map(|&x| x as u32).collect() };
            assert_eq!(unsigned(parents), tree.parents());
            assert_eq!(unsigned(depths), tree.depths());
            for i in count..nodes {
                assert_eq!(
                    (out_tokens[at + i], parents[at + i], depths[at + i]),
                    (anchors[r], 0, 1)
                );
            }
            if bare {
                let untouched = |x: &[i32]| x[at..at + nodes].iter().all(|&x| x == -9);
                assert!(untouched(first_child) && untouched(next_sibling) && scores[at].is_nan() && masks[0] == 0xde);
                continue;
            }
            assert_eq!(unsigned(first_child), tree.first_child());
            assert_eq!(unsigned(next_sibling), tree.next_sibling());
            let bits = |x: &[f32]| -> Vec<u32> { x.iter().map(|x| x.to_bits()).collect() };
            assert_eq!(bits(&scores[at..at + count]), bits(tree.scores()));
            for (i, row) in tree.masks().chunks(tree.mask_words()).enumerate() {
                let mut row = row.to_vec();
                row.resize(words, 0);
                assert_eq!(masks[(at + i) * words..(at + i + 1) * words], row);
            }
            for i in count..nodes {
                assert_eq!(
                    (scores[at + i], first_child[at + i], next_sibling[at + i]),
                    (f32::NEG_INFINITY, -1, -1)
                );
                let set: u32 = masks[(at + i) * words..(at + i + 1) * words]
                    .iter()
                    .map(|w| w.count_ones())
                    .sum();
                assert_eq!(set, 2, "the anchor and itself");
            }
        }
    }
}
