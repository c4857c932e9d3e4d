//! Drafts of a drafter beside those of texts.

use super::*;

const STEP: u64 = 3;

/// What was found in the texts of two requests: 2 drafts and 1, of 3 places.
fn texts<'a>(chances: &'a [f32], most: &'a [i32]) -> Offers<'a> {
    Offers {
        tokens: &[10, 11, 0, 20, 0, 0],
        drafted: Some(0),
        step: Some((STEP, &[7, 8])),
        ..chain_offers(chances, 3, &[0.0, 1.0], most)
    }
}

const CHANCES: [f32; 6] = [0.9, 0.8, 0.0, 0.1, 0.0, 0.0];

fn own<'a>(requests: &'a [usize], tokens: &'a [i64], probabilities: &'a [f32]) -> Own<'a> {
    Own {
        requests,
        tokens,
        probabilities,
        depth: 2,
    }
}

fn pass(request: u64, temperature: f32, verified: usize, path: &[usize], next: i64) -> Pass<'_> {
    Pass {
        step: STEP,
        request,
        temperature,
        tree: false,
        verified,
        depth: verified,
        path,
        next: Some(next),
    }
}

#[test]
fn the_drafter_is_asked_for_those_whose_texts_promise_less() {
    let mut planner = chains(0.01);
    // Nothing is known of the drafter: 0.7, then 0.49 more of a block of three.
    assert_eq!(planner.ask(&texts(&CHANCES, &[16, 16]), 3).unwrap(), [1]);
    // In a longer block it promises more, where there is room for one.
    assert_eq!(planner.ask(&texts(&CHANCES, &[16, 16]), 8).unwrap(), [0, 1]);
    assert_eq!(planner.ask(&texts(&CHANCES, &[3, 1]), 8).unwrap(), []);
    // A block of the anchor alone drafts nothing.
    assert_eq!(planner.ask(&texts(&[0.0; 6], &[16, 16]), 1).unwrap(), []);
    // At each temperature it is asked as often as it was right.
    (0..300).for_each(|_| planner.record(1.0, 7, 0, &[]).unwrap());
    assert_eq!(planner.ask(&texts(&[0.1; 6], &[16, 16]), 8).unwrap(), [0]);
    let error = planner.ask(&texts(&[0.1; 5], &[16, 16]), 8).unwrap_err().to_string();
    assert!(error.starts_with("probabilities: got 5"), "{error}");
}

#[test]
fn every_request_gets_the_drafts_that_promise_more() {
    // The drafter is surer of the second request than its text is, and less sure of the first.
    let chosen = own(&[0, 1], &[50, 51, 60, 61], &[0.9, 0.3, 0.5, 0.4]);
    let admitted = chains(0.0)
        .admit_either(&texts(&CHANCES, &[16, 16]), &[2, 1], &chosen)
        .unwrap();
    assert_eq!(admitted.tokens, [10, 11, 0, 60, 61, 0]);
    assert_eq!(admitted.widths, [3, 3]);
    // The other way round; and of two that promise the same the drafter's are taken.
    let chosen = own(&[0, 1], &[50, 51, 60, 61], &[0.9, 0.95, 0.05, 0.04]);
    let admitted = chains(0.0)
        .admit_either(&texts(&CHANCES, &[16, 16]), &[2, 1], &chosen)
        .unwrap();
    assert_eq!(admitted.tokens, [50, 51, 0, 20, 0, 0]);
    let chosen = own(&[0, 1], &[50, 51, 60, 61], &[0.5, 0.0, 0.4, 0.0]);
    let admitted = chains(0.0)
        .admit_either(&texts(&[0.5, 0.0, 0.0, 0.5, 0.0, 0.0], &[16, 16]), &[1, 1], &chosen)
        .unwrap();
    assert_eq!(admitted.tokens, [50, 51, 0, 20, 0, 0]);
    // Those that were not asked keep what was found; nobody verifies what is not there, or more than there is room for.
    let admitted = chains(0.0)
        .admit_either(&texts(&CHANCES, &[2, 16]), &[2, 1], &Own::default())
        .unwrap();
    assert_eq!(admitted.tokens, [10, 11, 0, 20, 0, 0]);
    assert_eq!(admitted.widths, [2, 2]);
    let nothing = chains(0.0)
        .admit_either(&texts(&[0.0; 6], &[16, 16]), &[0, 0], &Own::default())
        .unwrap();
    assert_eq!(nothing.widths, [1, 1]);
    // Longer chains than there are places for are cut.
    let long = Own {
        requests: &[1],
        tokens: &[60, 61, 62, 63],
        probabilities: &[0.9; 4],
        depth: 4,
    };
    let admitted = chains(0.0)
        .admit_either(&texts(&CHANCES, &[16, 16]), &[2, 1], &long)
        .unwrap();
    assert_eq!((&admitted.tokens[3..], admitted.widths[1]), (&[60, 61, 62][..], 4));
}

#[test]
fn what_drafts_cost_is_weighed_whoever_they_are_from() {
    let mut dear = chains(0.9);
    let own = own(&[1], &[60, 61], &[0.99, 0.1]);
    let admitted = dear.admit_either(&texts(&CHANCES, &[16, 16]), &[2, 1], &own).unwrap();
    // A row costs nearly as much as a whole step: only what is as good as certain is worth it.
    assert_eq!(admitted.widths, [2, 2]);
}

#[test]
fn what_texts_drafted_says_nothing_of_the_drafter_but_of_what_texts_promise() {
    let mut planner = chains(0.01);
    let (rates, before) = (planner.acceptance(0.0, 0), planner.exponent(0.0));
    for step in 0..200 {
        let own = own(&[1], &[60, 61], &[0.9, 0.9]);
        let texts = Offers {
            step: Some((step, &[7, 8])),
            ..texts(&CHANCES, &[16, 16])
        };
        planner.admit_either(&texts, &[2, 1], &own).unwrap();
        // The text was wrong, the drafter right.
        for pass in [pass(7, 0.0, 2, &[], 99), pass(8, 1.0, 2, &[0, 1], 99)] {
            planner.record_pass(&Pass { step, ..pass }).unwrap();
        }
    }
    assert_eq!((planner.acceptance(0.0, 0), planner.exponent(0.0)), (rates, before));
    assert!(planner.acceptance(1.0, 1) > 0.97 && planner.exponent(1.0) < 0.3);
    assert_eq!(
        planner.kept[1].iter().map(Kept::share).collect::<Vec<_>>()[1..],
        [1.0; 3]
    );
    assert!(planner.kept[1][0].share() < 0.3 && planner.kept[0][0].share() == 1.0 && planner.kept[0][3].share() > 1.0);
    // So it is asked for them from now on, although they promise as much as ever.
    assert_eq!(planner.ask(&texts(&CHANCES, &[16, 16]), 3).unwrap(), [0, 1]);
    // And of two that promise the same its own drafts are taken.
    let own = own(&[0], &[50, 51], &[0.5, 0.5]);
    let admitted = planner
        .admit_either(&texts(&CHANCES, &[16, 16]), &[2, 1], &own)
        .unwrap();
    assert_eq!(admitted.tokens[..2], [50, 51]);
}

/// A planner for which a row costs a third of a plain step, after 200 steps in which a quarter of what was admitted of offers like this was right:
/// what was admitted first, and what is at the end.
fn after_broken_promises(planner: &mut Planner, offers: &Offers<'_>) -> [Vec<i32>; 2] {
    let tree = planner.tree_nodes() > 0;
    let admit = |planner: &mut Planner, step| {
        let offers = Offers {
            step: Some((step, &[7, 8])),
            drafted: Some(0),
            ..*offers
        };
        if tree {
            planner.admit_trees(&offers, &[1, 2], &[10, 20]).unwrap().widths
        } else {
            planner.admit(&offers).unwrap()
        }
    };
    let first = admit(planner, 0);
    for step in 1..200 {
        let widths = admit(planner, step);
        for (row, request) in [7, 8].into_iter().enumerate() {
            let verified = widths[row] as usize - 1;
            let right = verified > 0 && (step + row as u64).is_multiple_of(4);
            let path: &[usize] = if right { &[0] } else { &[] };
            // Nobody says what would have become of drafts that were not verified.
            let pass = Pass {
                next: None,
                step,
                tree,
                ..pass(request, 1.0, verified, path, 0)
            };
            planner.record_pass(&pass).unwrap();
        }
    }
    [first, admit(planner, 200)]
}

#[test]
fn promises_that_were_not_kept_count_for_less() {
    // A draft that is right half of the time pays, one that is right a quarter of it does not. Of drafts from texts nothing else is learnt.
    let offers = Offers {
        from_text: &[true, true],
        ..chain_offers(&[0.6, 0.6], 1, &[1.0; 2], &[2; 2])
    };
    let mut planner = chains(0.34);
    assert_eq!(after_broken_promises(&mut planner, &offers), [[2, 2], [1, 1]]);
    let share = planner.kept[1][3].share();
    assert!(
        (0.4..0.9).contains(&share) && planner.kept[0][3].share() == 1.0,
        "{share}"
    );
    assert_eq!(planner.exponent(1.0), 1.0);
    // What is believed of the drafter is nothing to them, nor of those at other temperatures.
    (0..200).for_each(|_| planner.record(0.0, 1, 0, &[0.6]).unwrap());
    assert!(planner.exponent(0.0) > 5.0);
    let other = Offers {
        temperatures: &[0.0; 2],
        drafted: Some(0),
        ..offers
    };
    assert_eq!(planner.admit(&other).unwrap(), [2, 2]);
}

#[test]
fn promises_of_trees_are_counted_as_those_of_chains() {
    let cost = StepCost {
        target: line(1.0, 0.34),
        context: 0.0,
        draft: Curve::flat(0.0),
    };
    let mut planner = Planner::new(5, Some(cost)).unwrap().with_trees(4).unwrap();
    let offers = Offers {
        from_text: &[true, true],
        ..chain_offers(&[0.6, 0.6], 1, &[1.0; 2], &[2; 2])
    };
    assert_eq!(after_broken_promises(&mut planner, &offers), [[2, 2], [1, 1]]);
    let share = planner.kept[1][3].share();
    assert!((0.4..0.9).contains(&share), "{share}");
}

#[test]
fn a_drafter_that_does_not_keep_its_promises_is_passed_over_for_a_text() {
    let mut planner = chains(0.0);
    for _ in 0..200 {
        planner.kept[0][0].record(1.0, 0);
    }
    assert_eq!(planner.kept[0][0].share(), 0.25);
    let own = own(&[0], &[50, 51], &[0.9, 0.9]);
    let texts = texts(&[0.6, 0.0, 0.0, 0.1, 0.0, 0.0], &[16, 16]);
    assert_eq!(
        planner.admit_either(&texts, &[1, 1], &own).unwrap().tokens[..2],
        [10, 11]
    );
    planner.kept[0][0] = Kept::default();
    assert_eq!(
        planner.admit_either(&texts, &[1, 1], &own).unwrap().tokens[..2],
        [50, 51]
    );
}

#[test]
fn the_next_token_tells_whether_the_first_draft_that_was_not_verified_was_right() {
    let said = [0.5f32, 0.9, 0.5, 0.9];
    let offers = Offers {
        tokens: &[10, 11, 20, 21],
        step: Some((STEP, &[7, 8])),
        ..chain_offers(&said, 2, &[1.0; 2], &[2, 5])
    };
    let told = |drafts: &[(f32, bool)]| {
        let mut exponent = Exponent::default();
        drafts.iter().for_each(|&(p, right)| exponent.record(p, right));
        exponent.get()
    };
    let rates = |seen: &[(usize, usize)]| {
        let mut rates = Acceptance::new(7);
        seen.iter()
            .for_each(|&(drafted, accepted)| rates.record(drafted, accepted).unwrap());
        [rates.at(0), rates.at(1)]
    };
    type Case<'a> = (Pass<'a>, &'a [(f32, bool)], &'a [(usize, usize)]);
    let cases: [Case<'_>; 6] = [
        // Nothing was verified, and the target's token is the draft; another one; nobody knows.
        (pass(8, 1.0, 0, &[], 20), &[(0.5, true)], &[(1, 1)]),
        (pass(8, 1.0, 0, &[], 10), &[(0.5, false)], &[(1, 0)]),
        (
            Pass {
                next: None,
                ..pass(8, 1.0, 0, &[], 0)
            },
            &[],
            &[],
        ),
        // The first was right and the second not verified; the first was wrong; both were verified.
        (pass(8, 1.0, 1, &[0], 21), &[(0.5, true), (0.9, true)], &[(2, 2)]),
        (pass(8, 1.0, 1, &[], 21), &[(0.5, false)], &[(1, 0)]),
        (pass(8, 1.0, 2, &[0, 1], 5), &[(0.5, true), (0.9, true)], &[(2, 2)]),
    ];
    for (pass, drafts, seen) in cases {
        let mut planner = Planner::new(8, None).unwrap();
        planner.admit(&offers).unwrap();
        planner.record_pass(&pass).unwrap();
        assert_eq!(planner.exponent(1.0), told(drafts), "{pass:?}");
        assert_eq!(
            [planner.acceptance(1.0, 0), planner.acceptance(1.0, 1)],
            rates(seen),
            "{pass:?}"
        );
    }
    // A request that had room for one draft was offered no second.
    let mut planner = Planner::new(8, None).unwrap();
    planner.admit(&offers).unwrap();
    planner.record_pass(&pass(7, 1.0, 1, &[0], 11)).unwrap();
    assert_eq!(planner.exponent(1.0), told(&[(0.5, true)]));
    // Without the drafts' names nothing is said of them.
    let mut planner = Planner::new(8, None).unwrap();
    planner.admit(&Offers { tokens: &[], ..offers }).unwrap();
    planner.record_pass(&pass(8, 1.0, 0, &[], 20)).unwrap();
    assert_eq!(planner.exponent(1.0), 1.0);
}

#[test]
fn more_context_makes_rows_cheaper_beside_it() {
    let cost = StepCost {
        context: 0.01,
        ..chains(0.34).cost().unwrap().clone()
    };
    let mut planner = Planner::new(8, Some(cost)).unwrap();
    let mut widths = |context, others| {
        let offers = Offers {
            context,
            others,
            drafted: Some(0),
            ..chain_offers(&[0.3, 0.3], 1, &[1.0; 2], &[2; 2])
        };
        planner.admit(&offers).unwrap()
    };
    assert_eq!(
        (widths(0, 0), widths(1000, 0), widths(1000, 40)),
        (vec![1, 1], vec![2, 2], vec![2, 2])
    );
    let cost = StepCost {
        context: 0.01,
        ..chains(0.34).cost().unwrap().clone()
    };
    let mut planner = Planner::new(8, Some(cost)).unwrap();
    (0..200).for_each(|_| planner.record(1.0, 1, 0, &[]).unwrap());
    (0..100).for_each(|_| planner.record(1.0, 1, 1, &[]).unwrap());
    let mut block = |context| {
        let batch = Batch {
            context,
            ..drafting(&[1.0; 2], 0)
        };
        planner.decide(&batch).unwrap().block
    };
    assert_eq!(block(0), 1);
    assert!(block(3000) > 1);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let mut planner = chains(0.1);
    let good = texts(&CHANCES, &[16, 16]);
    let fine = own(&[1], &[60, 61], &[0.9, 0.9]);
    let mut refused = |texts: &Offers<'_>, found: &[i32], own: &Own<'_>| {
        let error = planner.admit_either(texts, found, own).unwrap_err().to_string();
        assert!(planner.admitted.is_empty(), "{error}");
        error
    };
    assert_eq!(refused(&good, &[1], &fine), "found: got 1 elements, expected 2");
    let short = own(&[1], &[60], &[0.9, 0.9]);
    assert_eq!(refused(&good, &[2, 1], &short), "own: got 1 elements, expected 2");
    let short = own(&[1], &[60, 61], &[0.9]);
    assert_eq!(refused(&good, &[2, 1], &short), "own: got 1 elements, expected 2");
    let stranger = own(&[2], &[60, 61], &[0.9, 0.9]);
    assert_eq!(
        refused(&good, &[2, 1], &stranger),
        "own: got request 2, expected below 2"
    );
    let nameless = Offers { tokens: &[], ..good };
    assert_eq!(refused(&nameless, &[2, 1], &fine), "tokens: got 0 elements, expected 6");
    let error = planner.admit(&Offers { tokens: &[1], ..good }).unwrap_err().to_string();
    assert_eq!(error, "tokens: got 1 elements, expected 6");
    let error = planner
        .admit(&Offers {
            from_text: &[true],
            ..good
        })
        .unwrap_err()
        .to_string();
    assert_eq!(error, "from_text: got 1 elements, expected 2");
}
