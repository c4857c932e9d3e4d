//! Drafts at the edges: the best columns of a row, depths, and log-probabilities of zero.

use dflash_rs::draft::{DraftTree, NO_NODE, TopK, top_k};
use dflash_rs::error::Error;
use dflash_rs::types::TokenId;

const ANCHOR: TokenId = TokenId(9);

fn ids(tokens: &[u32]) -> Vec<TokenId> {
    tokens.iter().copied().map(TokenId).collect()
}

/// The argument that was refused.
fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> &'static str {
    match result.unwrap_err() {
        Error::InvalidArgument { name, .. } | Error::Length { name, .. } => name,
        other => panic!("{other}"),
    }
}

#[test]
fn the_best_columns_of_each_row_come_falling_and_by_id_among_equals() {
    let rows = [
        [-3.0, -1.0, -2.0, -1.0, -9.0],
        [f32::NEG_INFINITY, -4.0, f32::NEG_INFINITY, 0.0, -5.0],
    ]
    .concat();
    for (k, tokens) in [
        (1, &[1, 3][..]),
        (3, &[1, 3, 2, 3, 1, 4]),
        (4, &[1, 3, 2, 0, 3, 1, 4, 0]),
        (5, &[1, 3, 2, 0, 4, 3, 1, 4, 0, 2]),
    ] {
        let (got, log_probs) = top_k(&rows, 5, k).unwrap();
        assert_eq!(got, ids(tokens), "k = {k}");
        let at = |(i, &token): (usize, &u32)| rows[i / k * 5 + token as usize];
        assert_eq!(log_probs, tokens.iter().enumerate().map(at).collect::<Vec<_>>());
    }
    assert_eq!(top_k(&[], 5, 2), Ok((vec![], vec![])), "no rows");
}

#[test]
fn both_zeros_are_one_value_when_columns_are_ordered() {
    for period in 2..9 {
        let row: Vec<f32> = (0..300).map(|i| if i % period == 0 { 0.0 } else { -0.0 }).collect();
        for k in [2, 50, 300] {
            let (got, _) = top_k(&row, 300, k).unwrap();
            assert_eq!(got, (0..k as u32).map(TokenId).collect::<Vec<_>>(), "k = {k}");
        }
    }
}

#[test]
fn the_best_columns_of_long_rows_are_those_of_a_sort() {
    let row: Vec<f32> = (0..2000u32)
        .map(|i| -((i.wrapping_mul(2_654_435_761) >> 20) as f32) / 64.0)
        .collect();
    let mut order: Vec<u32> = (0..2000).collect();
    order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
    for k in [1, 2, 7, 64, 1999, 2000] {
        assert_eq!(top_k(&row, 2000, k).unwrap().0, ids(&order[..k]), "k = {k}");
    }
}

#[test]
fn rows_whose_best_columns_cannot_be_told_are_refused_by_name() {
    assert_eq!(refused(top_k(&[], 0, 1)), "log_probs");
    assert_eq!(refused(top_k(&[-1.0; 3], 2, 1)), "log_probs");
    assert_eq!(refused(top_k(&[-1.0, 0.5], 2, 1)), "log_probs");
    assert_eq!(refused(top_k(&[-1.0, f32::NAN], 2, 2)), "log_probs");
    assert_eq!(refused(top_k(&[-1.0; 4], 2, 0)), "k");
    assert_eq!(refused(top_k(&[-1.0; 4], 2, 3)), "k");
    assert_eq!(refused(TopK::new(&ids(&[1, 2, 3]), &[-1.0; 3], 2)), "k");
    assert_eq!(refused(TopK::new(&ids(&[1, 2]), &[-1.0; 2], 0)), "k");
    assert_eq!(refused(TopK::new(&ids(&[1, 2]), &[-1.0; 3], 2)), "log_probs");
    assert_eq!(
        refused(DraftTree::chain(ANCHOR, &ids(&[1, 2]), &[-1.0; 3])),
        "log_probs"
    );
    assert_eq!(refused(DraftTree::from_parents(&[], &[])), "tokens");
    assert_eq!(refused(DraftTree::from_parents(&ids(&[1, 2]), &[0; 3])), "parents");
    assert_eq!(
        refused(DraftTree::from_parents(&ids(&[1, 2, 3]), &[0, 0, 2])),
        "parents"
    );
}

#[test]
fn no_draft_is_deeper_than_asked_however_many_rows_there_are() {
    let tokens = ids(&[1, 2, 3, 4, 5, 6, 7, 8]);
    let log_probs = [-0.1, -0.2, -0.1, -0.2, -0.1, -0.2, -0.1, -0.2];
    for (depth, nodes) in [(0, 1), (1, 3), (2, 7), (3, 15), (4, 31), (9, 31)] {
        let mut source = TopK::new(&tokens, &log_probs, 2).unwrap();
        let tree = DraftTree::build(ANCHOR, 100, depth, &mut source).unwrap();
        assert_eq!(tree.len(), nodes, "depth {depth}");
        assert_eq!(tree.max_depth() as usize, depth.min(4));
    }
}

#[test]
fn certain_drafts_have_a_log_probability_of_zero() {
    let tokens = ids(&[1, 2]);
    for zero in [0.0, -0.0] {
        let log_probs = [zero; 2];
        let chain = DraftTree::chain(ANCHOR, &tokens, &log_probs).unwrap();
        assert_eq!((chain.scores(), chain.max_depth()), (&[0.0; 3][..], 2));
        let mut source = TopK::new(&tokens, &log_probs, 1).unwrap();
        assert_eq!(DraftTree::build(ANCHOR, 2, 2, &mut source).unwrap(), chain);
    }
}

#[test]
fn children_are_linked_from_the_first_to_the_last() {
    let tree = DraftTree::from_parents(&ids(&[9, 1, 2, 3, 4, 5]), &[0, 0, 0, 1, 0, 1]).unwrap();
    assert_eq!(tree.parents(), [NO_NODE, 0, 0, 1, 0, 1]);
    assert_eq!(tree.first_child(), [1, 3, NO_NODE, NO_NODE, NO_NODE, NO_NODE]);
    assert_eq!(tree.next_sibling(), [NO_NODE, 2, 4, 5, NO_NODE, NO_NODE]);
}
