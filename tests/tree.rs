//! Draft trees: the best N prefixes, their masks and their order.

use dflash_rs::draft::{ChildSource, DraftTree, NO_NODE, TopK};
use dflash_rs::error::Error;
use dflash_rs::types::TokenId;
use proptest::prelude::*;

const ANCHOR: TokenId = TokenId(1_000);

fn ids(n: &[u32]) -> Vec<TokenId> {
    n.iter().copied().map(TokenId).collect()
}

/// [depth][rank] of (token, log-probability), sorted.
fn table(rows: &[Vec<f32>]) -> (Vec<TokenId>, Vec<f32>, usize) {
    let k = rows[0].len();
    let mut tokens = Vec::new();
    let mut log_probs = Vec::new();
    for row in rows {
        let mut order: Vec<usize> = (0..k).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        tokens.extend(order.iter().map(|&t| TokenId(t as u32)));
        log_probs.extend(order.iter().map(|&t| row[t]));
    }
    (tokens, log_probs, k)
}

fn build(rows: &[Vec<f32>], nodes: usize) -> DraftTree {
    let (tokens, log_probs, k) = table(rows);
    DraftTree::build(
        ANCHOR,
        nodes,
        rows.len(),
        &mut TopK::new(&tokens, &log_probs, k).unwrap(),
    )
    .unwrap()
}

/// Scores of all prefixes, largest first, with the same f32 sums.
fn all_scores(rows: &[Vec<f32>]) -> Vec<f32> {
    let mut scores = Vec::new();
    let mut level = vec![0.0f32];
    for row in rows {
        level = level
            .iter()
            .flat_map(|s| row.iter().map(move |l| s + l))
            .filter(|s| *s > f32::NEG_INFINITY)
            .collect();
        scores.extend_from_slice(&level);
    }
    scores.sort_by(|a, b| b.total_cmp(a));
    scores
}

fn log_row() -> impl Strategy<Value = Vec<f32>> {
    // Few distinct values, so that ties are common; zero probability included.
    let entry = prop_oneof![
        Just(-0.5f32),
        Just(-1.0),
        Just(-1.5),
        Just(f32::NEG_INFINITY),
        -8.0f32..0.0,
    ];
    prop::collection::vec(entry, 4)
}

proptest! {
    #[test]
    fn the_tree_holds_the_n_likeliest_prefixes(
        rows in prop::collection::vec(log_row(), 1..=3), nodes in 0usize..90,
    ) {
        let tree = build(&rows, nodes);
        let mut best = all_scores(&rows);
        best.truncate(nodes);
        let mut got = tree.scores()[1..].to_vec();
        got.sort_by(|a, b| b.total_cmp(a));
        prop_assert_eq!(got, best);
    }

    #[test]
    fn every_tree_is_prefix_closed_and_its_arrays_agree(
        rows in prop::collection::vec(log_row(), 1..=3), nodes in 0usize..90,
    ) {
        let tree = build(&rows, nodes);
        let words = tree.mask_words();
        let masks = tree.masks();
        prop_assert_eq!(tree.tokens()[0], ANCHOR);
        prop_assert_eq!(tree.parents()[0], NO_NODE);
        for node in 0..tree.len() {
            let row = &masks[node * words..(node + 1) * words];
            let ones: u32 = row.iter().map(|w| w.count_ones()).sum();
            prop_assert_eq!(ones, tree.depths()[node] + 1);
            let mut at = node;
            loop {
                prop_assert_eq!(row[at / 64] >> (at % 64) & 1, 1);
                if at == 0 { break; }
                prop_assert!((tree.parents()[at] as usize) < at);
                prop_assert_eq!(tree.depths()[at], tree.depths()[tree.parents()[at] as usize] + 1);
                at = tree.parents()[at] as usize;
            }
            let children: Vec<usize> = tree.children(node).collect();
            let by_parent: Vec<usize> = (1..tree.len()).filter(|&c| tree.parents()[c] as usize == node).collect();
            prop_assert_eq!(&children, &by_parent);
            prop_assert!(children.windows(2).all(|w| tree.scores()[w[0]] >= tree.scores()[w[1]]));
            for &child in &children {
                prop_assert_eq!(tree.child_with(node, tree.tokens()[child]), Some(child));
                let mut path = tree.path_tokens(node);
                path.push(tree.tokens()[child]);
                prop_assert_eq!(tree.path_tokens(child), path);
            }
        }
    }

    #[test]
    fn nodes_are_numbered_in_the_documented_total_order(
        rows in prop::collection::vec(log_row(), 1..=3), nodes in 1usize..60,
    ) {
        let tree = build(&rows, nodes);
        for node in 2..tree.len() {
            let key = |n: usize| (tree.depths()[n], tree.parents()[n]);
            let (a, b) = (tree.scores()[node - 1], tree.scores()[node]);
            // A node may follow an equal one only by depth, parent, rank; ranks follow from the sibling order above. A child
            // that becomes known only when its parent is popped comes after it and is deeper.
            prop_assert!(a > b || (a == b && key(node - 1) <= key(node)));
        }
    }

    #[test]
    fn a_larger_tree_starts_with_the_smaller_one(
        rows in prop::collection::vec(log_row(), 1..=3), nodes in 0usize..40, more in 0usize..40,
    ) {
        let small = build(&rows, nodes);
        let large = build(&rows, nodes + more);
        prop_assert_eq!(&large.tokens()[..small.len()], small.tokens());
        prop_assert_eq!(&large.parents()[..small.len()], small.parents());
    }

    #[test]
    fn a_chain_is_the_tree_with_one_child_each(
        log_probs in prop::collection::vec(-5.0f32..0.0, 0..70),
    ) {
        let drafts: Vec<TokenId> = (0..log_probs.len()).map(|i| TokenId(i as u32)).collect();
        let chain = DraftTree::chain(ANCHOR, &drafts, &log_probs).unwrap();
        let tree = DraftTree::build(
            ANCHOR, drafts.len(), drafts.len(), &mut TopK::new(&drafts, &log_probs, 1).unwrap(),
        ).unwrap();
        prop_assert_eq!(&chain, &tree);
        let rebuilt = DraftTree::from_parents(chain.tokens(), chain.parents()).unwrap();
        prop_assert_eq!(rebuilt.masks(), chain.masks());
    }
}

#[test]
fn masks_grow_a_word_every_64_nodes() {
    for (drafts, words) in [(0, 1), (63, 1), (64, 2), (127, 2), (128, 3)] {
        let tree = DraftTree::chain(ANCHOR, &vec![TokenId(3); drafts], &vec![-0.1; drafts]).unwrap();
        assert_eq!(tree.mask_words(), words, "{drafts} drafts");
        assert_eq!(tree.masks().len(), (drafts + 1) * words);
        let last = &tree.masks()[drafts * words..];
        assert_eq!(last.iter().map(|w| w.count_ones()).sum::<u32>() as usize, drafts + 1);
    }
}

#[test]
fn a_path_conditioned_source_is_asked_about_the_path() {
    // After token 7 comes only 8, after token 9 only 10: the children follow the parent, not the depth.
    struct ByPath;
    impl ChildSource for ByPath {
        fn child(&mut self, tree: &DraftTree, parent: usize, rank: usize) -> Option<(TokenId, f32)> {
            let children: &[(u32, f32)] = match tree.path_tokens(parent).last().map(|t| t.0) {
                None => &[(7, -0.1), (9, -0.2)],
                Some(7) => &[(8, -0.3)],
                Some(9) => &[(10, -0.05)],
                _ => &[],
            };
            children.get(rank).map(|&(t, l)| (TokenId(t), l))
        }
    }
    let tree = DraftTree::build(ANCHOR, 10, 5, &mut ByPath).unwrap();
    assert_eq!(tree.tokens(), ids(&[1_000, 7, 9, 10, 8]));
    assert_eq!(tree.parents(), [NO_NODE, 0, 0, 2, 1]);
}

#[test]
fn sources_that_break_their_contract_are_refused_by_name() {
    let build = |log_probs: &[f32]| {
        let tokens = ids(&[1, 2]);
        DraftTree::build(ANCHOR, 4, 1, &mut TopK::new(&tokens, log_probs, 2).unwrap())
    };
    for (log_probs, got) in [
        ([-1.0, -0.5], "-0.5 at rank 1"),
        ([0.5, -1.0], "0.5"),
        ([-1.0, f32::NAN], "NaN"),
    ] {
        let error = build(&log_probs).unwrap_err();
        assert!(
            matches!(error, Error::InvalidArgument { name: "log_probs", .. }),
            "{error}"
        );
        assert!(error.to_string().contains(got), "{error}");
    }
    assert!(TopK::new(&ids(&[1, 2, 3]), &[-1.0; 3], 2).is_err());
    assert!(TopK::new(&ids(&[1, 2]), &[-1.0], 2).is_err());
    assert!(DraftTree::from_parents(&ids(&[1, 2]), &[NO_NODE, 1]).is_err());
    assert!(DraftTree::from_parents(&[], &[]).is_err());
    assert!(DraftTree::chain(ANCHOR, &ids(&[1]), &[]).is_err());
}
