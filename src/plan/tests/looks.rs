//! Looks at what does not pay: how often, what they cost, and when the drafter rests between them.

use super::*;

#[test]
fn a_drafter_that_is_never_right_is_left_alone_but_for_a_look_now_and_then() {
    let mut planner = chains(0.05);
    for _ in 0..100 {
        planner.record(1.0, 7, 0, &[]).unwrap();
    }
    // Ever more rarely: after 32 steps, 64 more, 128 more, and every 256 from then on.
    let blocks: Vec<usize> = (0..1000).map(|_| block(&mut planner, 1, 0)).collect();
    let looks: Vec<usize> = (0..1000).filter(|&step| blocks[step] == 8).collect();
    assert_eq!(looks, [31, 95, 223, 479, 735, 991]);
    assert_eq!(blocks.iter().filter(|&&b| b == 1).count(), 994);
    // As often as ever where drafting pays after all.
    for _ in 0..400 {
        planner.record(1.0, 7, 7, &[]).unwrap();
    }
    assert!((0..1000).all(|_| block(&mut planner, 1, 0) == 8));
    (0..1500).for_each(|_| planner.record(1.0, 7, 0, &[]).unwrap());
    let looks = (0..EXPLORE).filter(|_| block(&mut planner, 1, 0) == 8).count();
    assert_eq!(looks, 1);
}

#[test]
fn a_drafter_that_did_not_pay_twice_rests_until_its_context_has_to_grow_for_the_next_look() {
    let mut planner = chains(0.05);
    (0..400).for_each(|_| planner.record(1.0, 7, 0, &[]).unwrap());
    let rested: Vec<bool> = (0..500)
        .map(|_| {
            block(&mut planner, 1, 0);
            planner.rests()
        })
        .collect();
    // Looks are at 31, 95, 223 and 479: it rests after the second one, and is awake for the 32 steps before a look.
    let expected = |step: usize| (95..191).contains(&step) || (223..447).contains(&step) || step >= 479;
    for (step, &rests) in rested.iter().enumerate() {
        assert_eq!(rests, expected(step), "{step}");
    }
    // One whose drafts pay at the next look does not.
    (0..400).for_each(|_| planner.record(1.0, 7, 7, &[]).unwrap());
    (0..300).for_each(|_| assert_eq!(block(&mut planner, 1, 0), 8));
    assert!(!planner.rests());
    let mut whole = Planner::new(8, None).unwrap();
    (0..500).for_each(|_| assert_eq!(block(&mut whole, 1, 0), 8));
    assert!(!whole.rests(), "without costs there are no looks");
}

#[test]
fn a_drafter_that_is_far_cheaper_than_believed_is_soon_looked_at_again() {
    let looks = |verified: f64, took: f64| {
        let mut planner = chains(0.05);
        (0..400).for_each(|_| planner.record(1.0, 7, 0, &[]).unwrap());
        let mut looks = 0;
        for _ in 0..1000 {
            let block = block(&mut planner, 1, 0);
            let cost = planner.cost().unwrap().clone();
            let drafting = if block > 1 { cost.draft.at(8) * took } else { 0.0 };
            let verified = if block > 1 { verified } else { 1.0 };
            planner.observe(
                (block, cost.target.at(block) * verified),
                0,
                (if block > 1 { 8 } else { 0 }, drafting),
            );
            looks += usize::from(block > 1);
        }
        looks
    };
    assert_eq!((looks(1.0, 1.0), looks(1.0, 0.85), looks(1.0, 0.75)), (6, 6, 31));
    assert_eq!((looks(0.85, 1.0), looks(0.75, 1.0)), (6, 31));
}

#[test]
fn a_look_verifies_something_of_everyone_and_only_then() {
    let mut planner = chains(2.0);
    let unlikely = [0.1, 0.9, 0.2, 0.3];
    for step in 1..=3 * EXPLORE {
        block(&mut planner, 2, 0);
        let looks = step == EXPLORE || step == 3 * EXPLORE;
        let expected = if looks { [1, 1] } else { [0, 0] };
        assert_eq!(drafts(&mut planner, &unlikely, 2, 0).unwrap(), expected, "{step}");
        assert_eq!(
            drafts(&mut planner, &unlikely, 2, 0).unwrap(),
            [0, 0],
            "a look is one look"
        );
    }
    let mut planner = trees(5.0, 9);
    let unlikely = [0.1f32, 0.05, 0.01].repeat(8);
    for step in 1..=EXPLORE {
        planner.decide(&drafting(&[0.0, 1.0], 0)).unwrap();
        let expected = if step == EXPLORE { [2, 2] } else { [1, 1] };
        assert_eq!(grow(&mut planner, &unlikely, &[9, 9], 0).widths, expected);
    }
}

#[test]
fn every_so_often_more_is_drafted_than_pays() {
    let widths: Vec<usize> = (2..=10).collect();
    let device = |widths| Batch {
        temperatures: &[1.0; 2],
        others: 0,
        context: 0,
        widths,
        room: 1000,
    };
    let mut dear = trees(50.0, 9);
    let looks = (0..100)
        .filter(|_| dear.decide(&device(&widths)).unwrap().width == 2)
        .count();
    assert_eq!(looks, 2);
    for (some, expected) in [(&widths[..], 5), (&[3, 8], 8), (&[3, 4], 4)] {
        let mut planner = trees(0.2, 9);
        for _ in 0..400 {
            planner.record_pass(&tree_pass(9, 4, &[0, 1])).unwrap();
        }
        let sizes: Vec<_> = (0..32).map(|_| planner.decide(&device(some)).unwrap().width).collect();
        assert_eq!((sizes[0], sizes[31]), (3, expected));
    }
}

/// What a planner that drafts decides and admits over some steps on a machine of its own costs, in which a plain step comes to take `plain` times as
/// long: blocks, and drafts of the two requests.
fn on_a_machine(plain: f64, steps: u64, timed: bool) -> (Planner, Vec<usize>, Vec<usize>) {
    let machine = StepCost {
        target: Curve::new("target", &[(2.0, 1.1), (4.0, 1.2), (8.0, 1.4), (16.0, 1.8)]).unwrap(),
        context: 0.0,
        draft: line(0.1, 0.02),
    };
    let mut planner = Planner::new(8, Some(machine.clone())).unwrap();
    (0..400).for_each(|_| planner.record(1.0, 7, 3, &[]).unwrap());
    let (mut blocks, mut verified) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        let block = block(&mut planner, 2, 0);
        let widths = drafts(&mut planner, &[0.9, 0.8, 0.9, 0.8], 2, 0).unwrap();
        let rows = 2 + widths.iter().sum::<usize>();
        let time = if rows == 2 { plain } else { 1.0 } * machine.target.at(rows);
        let drafting = if block > 1 { 2 * block } else { 0 };
        if timed {
            planner.observe((rows, time), 0, (drafting, machine.draft.at(drafting)));
        }
        blocks.push(block);
        verified.push(rows - 2);
    }
    (planner, blocks, verified)
}

#[test]
fn now_and_then_a_step_that_would_have_drafts_is_a_plain_one() {
    // Every 64 steps, but for looks, which come every 32: neither the drafter nor what was offered has a part in it.
    let (_, blocks, verified) = on_a_machine(1.0, 400, true);
    let plain: Vec<usize> = (0..400).filter(|&step| verified[step] == 0).collect();
    assert!(plain.iter().all(|&step| blocks[step] == 1) && blocks.iter().filter(|&&b| b == 1).count() == plain.len());
    assert_eq!(plain.len(), 6, "{plain:?}");
    assert!(
        plain.windows(2).all(|pair| (64..=67).contains(&(pair[1] - pair[0]))),
        "{plain:?}"
    );
    // Where nobody tells what steps take there is nothing to learn from it.
    let (_, blocks, verified) = on_a_machine(1.0, 400, false);
    assert!(blocks.iter().all(|&block| block > 1) && verified.iter().all(|&drafts| drafts > 0));
}

#[test]
fn what_plain_steps_take_by_now_is_not_forgotten_over_drafting() {
    // They have become three times as fast, which only they can show: drafting no longer pays.
    let (planner, _, verified) = on_a_machine(1.0 / 3.0, 2500, true);
    let cost = planner.cost().unwrap();
    assert!(
        verified[2000..].iter().filter(|&&drafts| drafts > 0).count() < 20,
        "{:?}",
        cost.target
    );
}
