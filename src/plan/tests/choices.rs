//! What is drafted and verified, against the goodput of every other choice.

use super::*;

proptest! {
    #[test]
    fn the_widths_give_the_best_goodput_of_all_choices(
        p in prop::collection::vec(0.01f32..1.0, 9),
        steps in prop::collection::vec((1usize..5, 0.0f64..2.0), 1..6),
        others in 0usize..5,
    ) {
        // Any curve that does not fall: flat, lines, stairs.
        let (mut rows, mut time) = (0, 1.0);
        let points: Vec<(f64, f64)> = steps
            .iter()
            .map(|&(more, slower)| {
                rows += more;
                time += if slower < 0.7 { 0.0 } else { slower };
                (rows as f64, time)
            })
            .collect();
        let target = Curve::new("target", &points).unwrap();
        let mut planner = Planner::new(8, Some(StepCost { target, context: 0.0, draft: line(0.1, 0.5) })).unwrap();
        let keep = drafts(&mut planner, &p, 3, others).unwrap();
        let (got, best) = (goodput(&planner, &p, 3, others, &keep), best_by_trying(&planner, &p, 3, others));
        prop_assert!(as_good(got, best), "{} against {}", got, best);
    }

    #[test]
    fn a_block_is_one_longer_than_the_one_with_the_best_goodput(
        steps in prop::collection::vec((1usize..9, 0.0f64..0.5), 1..6),
        (drafter, seen) in (0.0f64..0.4, prop::collection::vec((0usize..8, 0usize..3), 0..40)),
        (temperatures, others) in (prop::collection::vec(prop::sample::select(vec![0.0f32, 0.7, 1.0]), 1..5), 0usize..9),
    ) {
        let (mut rows, mut time) = (0, 0.5);
        let points: Vec<(f64, f64)> = steps
            .iter()
            .map(|&(more, slower)| {
                rows += more;
                time += slower;
                (rows as f64, time)
            })
            .collect();
        let cost = StepCost { target: Curve::new("target", &points).unwrap(), context: 0.0, draft: line(0.1, drafter) };
        let mut planner = Planner::new(8, Some(cost.clone())).unwrap();
        for (accepted, at) in seen {
            planner.record([0.0, 0.7, 1.0][at], 7, accepted, &[]).unwrap();
        }
        let requests = temperatures.len();
        let goodput = |block: usize| {
            let of = |&temperature: &f32| -> f64 {
                let chance = |drafts: usize| (0..drafts).map(|at| planner.acceptance(temperature, at)).product::<f64>();
                (0..block).map(chance).sum()
            };
            let tokens: f64 = temperatures.iter().map(of).sum();
            let drafter = if block > 1 { cost.draft.at(requests * block) } else { 0.0 };
            let goodput = merit(&cost, requests, others, tokens, cost.target.at(requests * block + others) + drafter);
            bar(block > 1, others) * goodput
        };
        let most = (1..=8).map(goodput).fold(f64::MIN, f64::max);
        let near = |block: usize| as_good(goodput(block), most);
        let block = planner.clone().decide(&drafting(&temperatures, others)).unwrap().block;
        prop_assert!(if block == 1 { near(1) } else { near(block - 1) && block > 2 || block == 8 && near(8) }, "{}", block);
    }

    #[test]
    fn a_tree_and_a_block_are_chosen_from_all_pairs_that_fit(
        (costs, drafter, nodes) in (prop::collection::vec((1usize..12, 0.0f64..0.4), 1..6), 0.0f64..0.3, 1usize..12),
        seen in prop::collection::vec((prop::collection::vec(0usize..12, 0..5), 1usize..5, 0usize..3), 0..30),
        (temperatures, others) in (prop::collection::vec(prop::sample::select(vec![0.0f32, 0.7, 1.0]), 1..4), 0usize..9),
        (widths, room) in (prop::collection::btree_set(2usize..15, 0..5), 1usize..50),
    ) {
        let (mut rows, mut time) = (0, 0.5);
        let points: Vec<(f64, f64)> = costs
            .iter()
            .map(|&(more, slower)| {
                rows += more;
                time += slower;
                (rows as f64, time)
            })
            .collect();
        let cost = StepCost { target: Curve::new("target", &points).unwrap(), context: 0.0, draft: line(0.1, drafter) };
        let mut planner = Planner::new(5, Some(cost.clone())).unwrap().with_trees(nodes).unwrap();
        for (path, depth, at) in &seen {
            let path: Vec<usize> = path.iter().copied().take(*depth).collect();
            let temperature = [0.0, 0.7, 1.0][*at];
            planner.record_pass(&Pass { temperature, ..tree_pass(12, *depth, &path) }).unwrap();
        }
        let requests = temperatures.len();
        let mean = |of: &dyn Fn(f32) -> f64| temperatures.iter().map(|&t| of(t)).sum::<f64>() / requests as f64;
        let chain = |block: usize| {
            mean(&|t| (1..block).map(|drafts| (0..drafts).map(|at| planner.acceptance(t, at)).product::<f64>()).sum())
        };
        let goodput = |width: usize, block: usize| {
            if width == 1 {
                let plain = merit(&cost, requests, others, requests as f64, cost.target.at(requests + others));
                return bar(false, others) * plain;
            }
            let gained = mean(&|t| (0..width - 1).map(|node| planner.node_rate(t, node)).sum());
            let tokens = requests as f64 * (1.0 + gained * chain(block) / chain(5));
            let time = cost.target.at(requests * width + others) + cost.draft.at(requests * block);
            merit(&cost, requests, others, tokens, time)
        };
        let widths: Vec<usize> = widths.into_iter().collect();
        let batch = Batch { temperatures: &temperatures, others, context: 0, widths: &widths, room };
        let Decision { width, block, trees } = planner.clone().decide(&batch).unwrap();
        prop_assert_eq!(trees, width > 1);
        let pairs: Vec<(usize, usize)> = if widths.is_empty() {
            (2..nodes + 2).flat_map(|width| (2..6).map(move |block| (width, block))).collect()
        } else {
            // On a device blocks are whole, and a tree that does not fit is none.
            let fit = widths.iter().filter(|&&width| width < nodes + 2 && requests * width + others <= room);
            fit.map(|&width| (width, 5)).collect()
        };
        let most = pairs.iter().map(|&(width, block)| goodput(width, block)).fold(goodput(1, 1), f64::max);
        let near = |width: usize, block: usize| as_good(goodput(width, block), most);
        if width == 1 {
            prop_assert!(near(1, 1) && block == 1);
        } else if widths.is_empty() {
            // The drafter is asked for twice as many as pay, and for a chain at least.
            let asked = |paying: usize| (2 * (paying - 1)).max(4).min(nodes) + 1;
            prop_assert!((2..nodes + 2).any(|paying| asked(paying) == width && near(paying, block)), "{} {}", width, block);
        } else {
            prop_assert!(pairs.contains(&(width, block)) && near(width, block), "{} {}", width, block);
        }
    }

    #[test]
    fn one_request_gets_the_front_of_its_best_tree(p in offered(1), row in 0.0..0.3f64, most in 2..21i32) {
        let grown = grow(&mut trees(row, 20), &p, &[most], 0);
        prop_assert!(grown.widths[0] <= most);
        let drafts = grown.widths[0] as usize - 1;
        let ids: Vec<TokenId> = tokens(1).iter().map(|&t| TokenId(t as u32)).collect();
        let mut falling = [0.0; 12];
        for place in 0..4 {
            // What the likeliest leaves is shared among the others: a little more than their own.
            chances::chances(&p[place * 3..][..3], 1.0, &mut falling[place * 3..][..3]);
        }
        let logs: Vec<f32> = falling.iter().map(|p| p.ln()).collect();
        let best = DraftTree::build(TokenId(1), drafts, 4, &mut TopK::new(&ids, &logs, 3).unwrap()).unwrap();
        prop_assert_eq!(best.len(), drafts + 1);
        // Products and sums of logarithms may order two paths of one chance differently: the sets weigh the same.
        let theirs: Vec<i64> = best.tokens().iter().map(|t| i64::from(t.0)).collect();
        let parents: Vec<i32> = best.parents().iter().map(|&p| p as i32).collect();
        let (ours, theirs) = (gain(&falling, &grown.tokens, &grown.parents), gain(&falling, &theirs, &parents));
        prop_assert!((ours - theirs).abs() < 1e-4, "{} {}", ours, theirs);
    }

    #[test]
    fn the_trees_have_the_best_goodput_of_all_budgets(p in offered(3), row in 0.01..0.3f64, others in 0..9usize) {
        let mut planner = trees(row, 20);
        let goodput = |planner: &Planner, grown: &PlannedTrees| {
            let (mut gained, mut rows) = (3.0, others);
            for request in 0..3 {
                let nodes = request * grown.width..request * grown.width + grown.widths[request] as usize;
                gained += gain(&p, &grown.tokens[nodes.clone()], &grown.parents[nodes.clone()]);
                rows += nodes.len();
            }
            let cost = planner.cost().unwrap();
            bar(grown.width > 1, others) * merit(cost, 3, others, gained, cost.target.at(rows) + cost.draft.at(15))
        };
        let grown = grow(&mut planner, &p, &[7, 3, 21], others);
        let ours = goodput(&planner, &grown);
        // Every other way to share out the same kind of trees.
        let mut free = Planner::new(5, None).unwrap().with_trees(20).unwrap();
        for a in 1..=7 {
            for b in 1..=3 {
                for c in 1..=21 {
                    let theirs = goodput(&planner, &grow(&mut free, &p, &[a, b, c], others));
                    prop_assert!(as_good(ours, theirs), "{} {} {:?}", theirs, ours, [a, b, c]);
                }
            }
        }
    }
}

#[test]
fn where_rows_are_free_everything_is_verified() {
    let mut planner = Planner::new(8, Some(StepCost::passes())).unwrap();
    assert_eq!(block(&mut planner, 5, 100), 8);
    assert_eq!(drafts(&mut planner, &[0.0; 14], 7, 3).unwrap(), [7, 7]);
}

#[test]
fn without_costs_blocks_and_trees_are_whole_whatever_happened() {
    let mut planner = Planner::new(8, None).unwrap();
    let mut wooded = Planner::new(8, None).unwrap().with_trees(11).unwrap();
    for _ in 0..100 {
        planner.record(0.0, 7, 0, &[0.9; 7]).unwrap();
        planner.observe((8, 1.0), 0, (8, 1.0));
    }
    assert_eq!(planner.cost(), None);
    for requests in [0, 1, 64] {
        assert_eq!(block(&mut planner, requests, 3), 8);
        let batch = Batch {
            temperatures: &vec![0.0; requests],
            others: 2,
            context: 0,
            widths: &[2, 3],
            room: 5,
        };
        let whole = Decision {
            width: 12,
            block: 8,
            trees: true,
        };
        assert_eq!(wooded.decide(&batch).unwrap(), whole);
    }
    assert_eq!(drafts(&mut planner, &[f32::NAN; 14], 7, 0).unwrap(), [7, 7]);
    let whole = grow(&mut wooded, &[0.4, 0.3, 0.1].repeat(8), &[12, 3], 9);
    assert_eq!(whole.widths, [12, 3]);
}

#[test]
fn where_rows_are_dear_nothing_is_drafted() {
    let mut planner = chains(2.0);
    assert_eq!(block(&mut planner, 16, 0), 1);
    assert_eq!(drafts(&mut planner, &[0.3, 0.9, 0.2, 0.9], 2, 0).unwrap(), [0, 0]);
    let none = grow(&mut trees(5.0, 17), &[0.1, 0.05, 0.01].repeat(4), &[18], 0);
    assert_eq!((none.width, none.tokens, none.parents), (1, vec![1], vec![-1]));
}

#[test]
fn no_request_verifies_more_than_it_may() {
    let mut planner = Planner::new(8, Some(StepCost::passes())).unwrap();
    let mut offers = Offers {
        probabilities: &[0.9; 9],
        tokens: &[],
        from_text: &[],
        depth: 3,
        k: 1,
        temperatures: &[0.0; 3],
        most: &[1, 3, 9],
        others: 0,
        context: 0,
        drafted: None,
        step: None,
    };
    assert_eq!(planner.admit(&offers).unwrap(), [1, 3, 4]);
    // Chains are of the likeliest candidates.
    offers.probabilities = &[0.9; 27];
    offers.k = 3;
    assert_eq!(planner.admit(&offers).unwrap(), [1, 3, 4]);
    let grown = grow(&mut trees(0.0, 17), &[0.5, 0.3, 0.1].repeat(12), &[1, 3, 18], 0);
    assert_eq!((grown.width, grown.widths), (18, vec![1, 3, 18]));
}

#[test]
fn a_drafter_that_is_always_right_drafts_whole_blocks() {
    let mut planner = chains(0.05);
    for _ in 0..100 {
        planner.record(1.0, 7, 7, &[]).unwrap();
    }
    assert_eq!(block(&mut planner, 1, 0), 8);
}

#[test]
fn greedy_requests_do_not_make_others_draft_more() {
    let mut planner = chains(0.08);
    for _ in 0..200 {
        planner.record(0.0, 7, 7, &[]).unwrap();
        planner.record(1.0, 7, 0, &[]).unwrap();
    }
    let mut block = |temperatures: &[f32]| planner.decide(&drafting(temperatures, 0)).unwrap().block;
    assert_eq!((block(&[0.0]), block(&[1.0])), (8, 1));
    assert!((2..=8).contains(&block(&[0.0, 1.0])));
}

/// Shares of the last steps that drafted when a planner that believed `believed` of them has run on a machine of `target` and `draft`, where
/// drafts are accepted `kept` times of ten.
fn drafted(believed: StepCost, machine: &StepCost, kept: usize) -> f64 {
    let mut planner = Planner::new(2, Some(believed)).unwrap();
    assert_eq!(planner.block_size(), 2);
    let (mut drafted, steps) = (0, 2000);
    for step in 0..steps {
        let rows = 2 * block(&mut planner, 2, 0);
        let slow = if step % 7 == 0 { 1.3 } else { 1.0 };
        let drafting = if rows > 2 {
            (rows, machine.draft.at(rows) * slow)
        } else {
            (0, 0.0)
        };
        planner.observe((rows, machine.target.at(rows) * slow), 0, drafting);
        if rows > 2 {
            (0..2).for_each(|_| planner.record(1.0, 1, usize::from(step * 7 % 10 < kept), &[]).unwrap());
        }
        drafted += usize::from(rows > 2 && step >= steps - 320);
    }
    drafted as f64 / 320.0
}

fn machine(plain: f64, wide: f64, draft: f64) -> StepCost {
    StepCost {
        target: Curve::new("target", &[(2.0, plain), (4.0, wide)]).unwrap(),
        context: 0.0,
        draft: Curve::flat(draft),
    }
}

#[test]
fn costs_follow_what_steps_take_whatever_was_believed_of_them() {
    // Three of ten drafts, 1.3 tokens a step: they pay up to 1.3 times the time of a plain one.
    let (pays, loses) = (machine(10.0, 10.5, 1.0), machine(10.0, 12.5, 2.0));
    let looks = 1.0 / EXPLORE as f64 + 0.01;
    for (narrow, wide) in [(1.0, 1.0), (0.3, 1.0f64), (1.0, 3.0)] {
        let as_if = |cost: &StepCost| {
            let plain = cost.target.at(2) * narrow;
            machine(plain, (cost.target.at(4) * wide).max(plain), cost.draft.at(4) * wide)
        };
        assert!(drafted(as_if(&pays), &pays, 3) > 0.9, "{narrow} {wide}");
        assert!(drafted(as_if(&loses), &loses, 3) <= looks, "{narrow} {wide}");
    }
    assert!(
        drafted(machine(10.0, 10.1, 0.1), &loses, 3) <= looks,
        "believed to cost nothing"
    );
    assert!(drafted(machine(10.0, 40.0, 9.0), &pays, 3) > 0.9, "believed to be dear");
}

#[test]
fn a_step_without_drafts_says_nothing_of_the_drafter_and_without_costs_nothing_is_followed() {
    let mut planner = chains(0.5);
    assert_eq!(planner.block_size(), 8);
    let before = planner.cost().unwrap().clone();
    planner.observe((4, 0.5), 0, (0, 0.01));
    let after = planner.cost().unwrap().clone();
    assert!(after.target.at(4) < before.target.at(4) && after.target.at(4) > 0.5);
    let paced = after.draft.at(1) / before.draft.at(1);
    assert!(paced < 1.0 && (after.draft.at(9) / before.draft.at(9) - paced).abs() < 1e-9);
    planner.observe((0, 0.0), 0, (1, 0.02));
    assert!(planner.cost().unwrap().draft.at(1) < after.draft.at(1) && planner.cost().unwrap().target == after.target);
    let mut free = Planner::new(8, None).unwrap();
    free.observe((4, 0.5), 0, (4, 0.5));
    assert_eq!(free.cost(), None);
}

#[test]
fn a_step_in_which_nobody_can_draft_is_a_plain_one() {
    let mut planner = Planner::new(8, Some(StepCost::passes())).unwrap();
    let mut wooded = trees(0.1, 4);
    for _ in 0..2 * EXPLORE {
        assert_eq!(block(&mut planner, 0, 3), 1);
        assert_eq!(wooded.decide(&drafting(&[], 4)).unwrap(), Decision::PLAIN);
    }
}

#[test]
fn a_probability_that_is_no_number_is_not_verified() {
    assert_eq!(drafts(&mut chains(0.05), &[f32::NAN, 1.0], 2, 0).unwrap(), [0]);
}

#[test]
fn beside_a_prompt_a_draft_is_weighed_by_what_plain_steps_would_gain() {
    // A row takes half a plain step: one that is as good as certain is worth it alone. Beside a prompt that takes a hundred times as long, a draft
    // of any chance would be cheap against the whole.
    let mut planner = chains(0.5);
    for others in [0, 300] {
        assert_eq!(drafts(&mut planner, &[0.05; 7], 7, others).unwrap(), [0], "{others}");
        assert_eq!(drafts(&mut planner, &[0.99, 0.01], 2, others).unwrap(), [1], "{others}");
    }
    for _ in 0..200 {
        planner.record(1.0, 7, 0, &[]).unwrap();
    }
    assert_eq!(block(&mut planner, 2, 300), 1);
    let mut wooded = trees(0.5, 12);
    for _ in 0..200 {
        wooded.record_pass(&tree_pass(12, 4, &[])).unwrap();
    }
    assert_eq!(wooded.decide(&drafting(&[1.0], 300)).unwrap(), Decision::PLAIN);
}

#[test]
fn what_costs_nothing_until_a_step_is_filled_up() {
    let target = Curve::new("target", &[(4.0, 1.0), (5.0, 10.0), (6.0, 10.0)]).unwrap();
    let cost = StepCost {
        target,
        context: 0.0,
        draft: Curve::flat(0.0),
    };
    // Four rows cost what one does, the fifth ten times as much.
    let mut planner = Planner::new(8, Some(cost)).unwrap();
    assert_eq!(drafts(&mut planner, &[0.1; 7], 7, 0).unwrap(), [3]);
}

#[test]
fn the_number_of_drafts_follows_what_trees_gained_and_what_rows_cost() {
    let mut cheap = trees(0.001, 12);
    let mut dear = trees(0.5, 12);
    for planner in [&mut cheap, &mut dear] {
        // The best draft is accepted every time, the fifth best as its child every other time, nothing else ever.
        for pass in 0..500 {
            let path: &[usize] = if pass % 2 == 0 { &[0, 4] } else { &[0] };
            planner.record_pass(&tree_pass(12, 4, path)).unwrap();
        }
        assert!(planner.node_rate(1.0, 0) > 0.97 && (planner.node_rate(1.0, 4) - 0.5).abs() < 0.1);
        assert!(planner.node_rate(1.0, 1) < 0.02 && planner.node_rate(1.0, 11) < 0.02);
        assert!(
            planner.node_rate(0.0, 1) > 0.3,
            "other temperatures are learnt for themselves"
        );
    }
    let wide = cheap.decide(&drafting(&[1.0], 0)).unwrap();
    assert!(wide.width >= 11 && wide.block >= 3 && wide.trees, "{wide:?}");
    // The drafter is asked for some more than pays, and says how sure it is.
    assert_eq!(dear.decide(&drafting(&[1.0], 0)).unwrap().width, 5);
    let on_device = |planner: &mut Planner, widths, room| {
        let decision = planner.decide(&Batch {
            temperatures: &[1.0],
            others: 0,
            context: 0,
            widths,
            room,
        });
        let Decision { width, block, trees } = decision.unwrap();
        assert_eq!(trees, width > 1);
        (width, block)
    };
    // Without anybody to ask, the widths are all there is to choose from, and blocks are whole.
    assert_eq!(on_device(&mut dear, &[4, 9], 100), (1, 1));
    assert_eq!(on_device(&mut cheap, &[4, 9], 100), (9, 5));
    assert_eq!(on_device(&mut cheap, &[4, 9], 9), (9, 5));
    assert_eq!(on_device(&mut cheap, &[4, 9], 8), (4, 5));
    assert_eq!(on_device(&mut cheap, &[4, 9], 3), (1, 1));
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let mut planner = chains(0.5);
    let good = Offers {
        probabilities: &[0.5; 4],
        tokens: &[],
        from_text: &[],
        depth: 2,
        k: 1,
        temperatures: &[0.0; 2],
        most: &[3; 2],
        others: 0,
        context: 0,
        drafted: None,
        step: Some((1, &[7, 8])),
    };
    let refused = [
        (
            Offers {
                probabilities: &[0.5; 3],
                tokens: &[],
                from_text: &[],
                ..good
            },
            "probabilities: got 3 elements, expected 4",
        ),
        (Offers { depth: 0, ..good }, "probabilities: got places of no drafts"),
        (Offers { k: 0, ..good }, "probabilities: got places of no drafts"),
        (
            Offers {
                temperatures: &[1.0],
                ..good
            },
            "temperatures: got 1 elements, expected 2",
        ),
        (
            Offers {
                temperatures: &[1.0, -0.5],
                ..good
            },
            "temperatures: got -0.5, expected finite",
        ),
        (
            Offers {
                temperatures: &[f32::NAN, 0.5],
                ..good
            },
            "temperatures: got NaN, expected finite",
        ),
        (Offers { most: &[0, 3], ..good }, "most: got 0, expected at least 1"),
        (
            Offers {
                step: Some((1, &[7])),
                ..good
            },
            "requests: got 1 elements, expected 2",
        ),
    ];
    for (offers, message) in refused {
        let error = planner.admit(&offers).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
        let error = planner
            .admit_trees(&offers, &[1, 2], &vec![0; offers.probabilities.len()])
            .unwrap_err();
        assert!(error.to_string().starts_with(message), "{error}");
    }
    let error = planner.admit_trees(&good, &[1], &[0; 4]).unwrap_err().to_string();
    assert_eq!(error, "anchors: got 1 elements, expected 2");
    let error = planner.admit_trees(&good, &[1, 2], &[0; 3]).unwrap_err().to_string();
    assert_eq!(error, "tokens: got 3 elements, expected 4");
    assert!(planner.decide(&drafting(&[f32::INFINITY], 0)).is_err());
    assert!(planner.record(1.0, 3, 5, &[]).is_err() && planner.record_pass(&tree_pass(2, 1, &[0, 1])).is_err());

    let free = StepCost {
        target: Curve::flat(0.0),
        context: 0.0,
        draft: Curve::flat(0.0),
    };
    let error = Planner::new(4, Some(free)).unwrap_err().to_string();
    assert!(error.starts_with("target: got no time"), "{error}");
    assert!(Planner::new(0, None).is_err() && Planner::new(5000, None).is_err());
    assert!(Planner::new(4, None).unwrap().with_trees(MOST_NODES + 1).is_err());
    let largest = Planner::new(MOST_BLOCK, None).unwrap().with_trees(MOST_NODES).unwrap();
    assert_eq!((largest.block_size(), largest.tree_nodes()), (MOST_BLOCK, MOST_NODES));
}
