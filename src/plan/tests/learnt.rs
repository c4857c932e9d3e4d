//! What the drafter's probabilities turn out to be worth.

use super::*;

/// What an offer of this step is remembered as.
fn offer(step: u64, requests: &[u64]) -> Offers<'_> {
    Offers {
        probabilities: &[0.5, 0.3, 0.9, 0.05, 0.5, 0.2, 0.9, 0.02],
        tokens: &[],
        from_text: &[],
        depth: 2,
        k: 2,
        temperatures: &[0.0, 1.0],
        most: &[5, 5],
        others: 0,
        context: 0,
        drafted: None,
        step: Some((step, requests)),
    }
}

/// The exponents of a planner that was told of these drafts, at temperature 0 and 1.
fn told(greedy: &[(f32, bool)], drawn: &[(f32, bool)]) -> (f32, f32) {
    let mut exponents = [Exponent::default(), Exponent::default()];
    for (exponent, drafts) in exponents.iter_mut().zip([greedy, drawn]) {
        drafts
            .iter()
            .for_each(|&(probability, accepted)| exponent.record(probability, accepted));
    }
    let [mut greedy, mut drawn] = exponents;
    (greedy.get(), drawn.get())
}

fn exponents(planner: &mut Planner) -> (f32, f32) {
    (planner.exponent(0.0), planner.exponent(1.0))
}

#[test]
fn what_probabilities_are_worth_is_learnt_from_the_drafts_of_chains_that_were_reached() {
    let mut planner = Planner::new(8, None).unwrap();
    planner.admit(&offer(3, &[7, 8])).unwrap();
    let pass = |request, temperature, path| Pass {
        step: 3,
        request,
        temperature,
        tree: false,
        verified: 2,
        depth: 2,
        path,
        next: None,
    };
    planner.record_pass(&pass(7, 0.0, &[0])).unwrap();
    assert_eq!(exponents(&mut planner), told(&[(0.5, true), (0.9, false)], &[]));
    planner.record_pass(&pass(8, 1.0, &[])).unwrap();
    assert_eq!(
        exponents(&mut planner),
        told(&[(0.5, true), (0.9, false)], &[(0.5, false)])
    );
    // The same from outside.
    let mut other = Planner::new(8, None).unwrap();
    other.record(0.0, 2, 1, &[0.5, 0.9]).unwrap();
    other.record(1.0, 2, 0, &[0.5, 0.9]).unwrap();
    assert_eq!(exponents(&mut other), exponents(&mut planner));
    // One that was cut short says nothing of what was not verified.
    other.record(1.0, 1, 1, &[0.5, 0.9]).unwrap();
    assert_eq!(other.exponent(1.0), told(&[], &[(0.5, false), (0.5, true)]).1);
}

#[test]
fn of_trees_it_is_learnt_from_the_likeliest_child_of_every_node_that_was_reached() {
    let mut planner = Planner::new(8, None).unwrap().with_trees(4).unwrap();
    let grown = planner
        .admit_trees(&offer(3, &[7, 8]), &[1, 2], &[10, 11, 20, 21, 10, 11, 20, 21])
        .unwrap();
    // Best first: the likeliest, its child, the rival, its child.
    assert_eq!(grown.tokens[..5], [1, 10, 20, 11, 20]);
    assert_eq!(grown.parents[..5], [-1, 0, 1, 0, 3]);
    let pass = |request, temperature, path| Pass {
        step: 3,
        request,
        temperature,
        tree: true,
        verified: 4,
        depth: 2,
        path,
        next: None,
    };
    // The rival and its child; the likeliest and nothing more.
    planner.record_pass(&pass(7, 0.0, &[2, 3])).unwrap();
    planner.record_pass(&pass(8, 1.0, &[0])).unwrap();
    let expected = told(&[(0.5, false), (0.9, true)], &[(0.5, true), (0.9, false)]);
    assert_eq!(exponents(&mut planner), expected);
}

#[test]
fn every_request_of_a_step_is_told_of_its_own_drafts_once() {
    let three = |step| Offers {
        probabilities: &[0.5, 0.9, 0.25, 0.75, 0.125, 0.6],
        tokens: &[],
        from_text: &[],
        depth: 2,
        k: 1,
        temperatures: &[1.0; 3],
        most: &[5; 3],
        others: 0,
        context: 0,
        drafted: None,
        step: Some((step, &[7, 8, 9])),
    };
    let pass = |step, request, tree| Pass {
        step,
        request,
        temperature: 1.0,
        tree,
        verified: 2,
        depth: 2,
        path: &[0],
        next: None,
    };
    let drafts = [
        (0.5, true),
        (0.9, false),
        (0.25, true),
        (0.75, false),
        (0.125, true),
        (0.6, false),
    ];
    let mut chains = Planner::new(8, None).unwrap();
    let mut trees = Planner::new(8, None).unwrap().with_trees(4).unwrap();
    chains.admit(&three(1)).unwrap();
    trees
        .admit_trees(&three(1), &[1, 2, 3], &[10, 11, 20, 21, 30, 31])
        .unwrap();
    for (planner, tree) in [(&mut chains, false), (&mut trees, true)] {
        for (at, request) in [7, 8, 9].into_iter().enumerate() {
            // A record that comes twice says nothing the second time.
            for _ in 0..2 {
                planner.record_pass(&pass(1, request, tree)).unwrap();
                assert_eq!(planner.exponent(1.0), told(&[], &drafts[..2 * at + 2]).1, "{request}");
            }
        }
        // Those in between may have ended.
        planner.admit(&three(2)).unwrap();
        planner.record_pass(&pass(2, 8, false)).unwrap();
        planner.record_pass(&pass(2, 9, false)).unwrap();
        let all = [&drafts[..], &drafts[2..]].concat();
        assert_eq!(planner.exponent(1.0), told(&[], &all).1);
    }
}

#[test]
fn of_every_request_its_own_tree_says_what_was_reached() {
    let mut planner = Planner::new(8, None).unwrap().with_trees(4).unwrap();
    let offers = Offers {
        probabilities: &[0.9, 0.05, 0.9, 0.05, 0.5, 0.45, 0.2, 0.1],
        tokens: &[],
        from_text: &[],
        depth: 2,
        k: 2,
        temperatures: &[1.0; 2],
        most: &[5; 2],
        others: 0,
        context: 0,
        drafted: None,
        step: Some((1, &[7, 8])),
    };
    let grown = planner
        .admit_trees(&offers, &[1, 2], &[10, 11, 20, 21, 10, 11, 20, 21])
        .unwrap();
    assert_eq!((grown.parents[2], &grown.parents[5..]), (1, &[-1, 0, 0, 1, 2][..]));
    // The second request's rival was accepted, and its child was not.
    let pass = Pass {
        step: 1,
        request: 8,
        ..tree_pass(4, 2, &[1])
    };
    planner.record_pass(&pass).unwrap();
    assert_eq!(planner.exponent(1.0), told(&[], &[(0.5, false), (0.2, false)]).1);
}

#[test]
fn twice_as_many_drafts_are_asked_for_as_pay_out_of_a_block_that_reaches_them() {
    let planner = |drafter: f64| {
        let cost = StepCost {
            target: line(1.0, 0.05),
            context: 0.0,
            draft: line(0.1, drafter),
        };
        let mut planner = Planner::new(5, Some(cost)).unwrap().with_trees(12).unwrap();
        // The three best drafts are always accepted, no other is; chains are accepted at every place half of the time.
        for _ in 0..1000 {
            planner.record_pass(&tree_pass(12, 4, &[0, 1, 2])).unwrap();
        }
        for pass in 1..2000u32 {
            planner
                .record(1.0, 4, pass.trailing_zeros().min(4) as usize, &[])
                .unwrap();
        }
        planner.decide(&drafting(&[1.0], 0)).unwrap()
    };
    assert_eq!(
        planner(0.0),
        Decision {
            width: 7,
            block: 5,
            trees: true
        }
    );
    // A block of three reaches four fifths of what the whole one does, one of two half of it: rows of the drafter are dear here.
    let shorter = Decision {
        block: 3,
        ..planner(0.0)
    };
    assert_eq!(planner(0.3), shorter);
    assert!(planner(3.0).block < 5);
}

#[test]
fn records_of_steps_and_requests_that_were_not_admitted_say_nothing_of_probabilities() {
    let pass = |step, request| Pass {
        step,
        request,
        temperature: 1.0,
        tree: false,
        verified: 2,
        depth: 2,
        path: &[],
        next: None,
    };
    let mut planner = Planner::new(8, None).unwrap();
    planner
        .admit(&Offers {
            step: None,
            ..offer(1, &[7, 8])
        })
        .unwrap();
    planner.admit(&offer(2, &[7, 8])).unwrap();
    planner.admit(&offer(4, &[7, 8])).unwrap();
    for (step, request) in [(1, 7), (3, 7), (4, 9), (5, 7)] {
        planner.record_pass(&pass(step, request)).unwrap();
        assert_eq!(planner.exponent(1.0), 1.0, "{step} {request}");
    }
    assert!(planner.admitted.is_empty());
    // A step's own record may come when the next one is admitted already, and nothing piles up behind steps that were called off.
    for step in 10..30 {
        planner.admit(&offer(step, &[7, 8])).unwrap();
        assert!(planner.admitted.len() <= UNRECORDED);
    }
    planner.record_pass(&pass(28, 8)).unwrap();
    assert!(planner.exponent(1.0) > 1.0 && planner.admitted.len() == 2);
}

/// A drafter and a target in one: probabilities, and whether the target agrees.
struct World {
    state: u64,
    /// What its probabilities are worth.
    truth: fn(f64) -> f64,
}

impl World {
    fn random(&mut self) -> f64 {
        self.state = self
            .state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.state >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Mean tokens per time over `steps` steps of four requests with this temperature. `fixed`: an exponent that nothing is learnt of.
    fn run(&mut self, steps: u64, fixed: Option<f32>) -> f64 {
        let mut planner = chains(0.06);
        let (mut tokens, mut time) = (0.0, 0.0);
        let (requests, temperatures) = ([1, 2, 3, 4], [0.7; 4]);
        for step in 0..steps {
            let decision = planner.decide(&drafting(&temperatures, 0)).unwrap();
            let drafts = decision.block - 1;
            let cost = planner.cost().unwrap().clone();
            let mut rows = 4;
            tokens += 4.0;
            if drafts > 0 {
                let said: Vec<f32> = (0..4 * drafts).map(|_| self.random().sqrt() as f32).collect();
                let given: Vec<f32> = said.iter().map(|p| p.powf(fixed.unwrap_or(1.0))).collect();
                let right: Vec<bool> = said
                    .iter()
                    .map(|&p| self.random() < (self.truth)(f64::from(p)))
                    .collect();
                let names: Vec<i64> = (0..4 * drafts as i64).collect();
                let widths = planner
                    .admit(&Offers {
                        tokens: &names,
                        step: fixed.is_none().then_some((step, &requests)),
                        ..chain_offers(&given, drafts, &temperatures, &[8; 4])
                    })
                    .unwrap();
                for request in 0..4 {
                    let verified = widths[request] as usize - 1;
                    let (row, right) = (request * drafts, &right[request * drafts..][..drafts]);
                    let path: Vec<usize> = (0..verified).take_while(|&at| right[at]).collect();
                    let agrees = right.get(path.len()) == Some(&true);
                    rows += verified;
                    tokens += path.len() as f64;
                    let pass = Pass {
                        step,
                        request: requests[request],
                        temperature: 0.7,
                        tree: false,
                        verified,
                        depth: verified,
                        path: &path,
                        next: Some(if agrees { names[row + path.len()] } else { -1 }),
                    };
                    planner.record_pass(&pass).unwrap();
                }
                time += cost.draft.at(4 * decision.block);
            }
            time += cost.target.at(rows);
        }
        tokens / time
    }
}

#[test]
fn drafters_that_are_too_sure_or_not_sure_enough_are_seen_through() {
    type Truth = fn(f64) -> f64;
    let truths: [(&str, Truth); 6] = [
        ("far too modest", |p| p.powf(0.2)),
        ("modest", |p| p.powf(0.45)),
        ("right", |p| p),
        ("too sure", |p| p.powf(2.5)),
        ("never sure", |p| 0.5 + 0.4 * p),
        ("sure of what is not so", |p| 0.8 * p),
    ];
    for (drafter, truth) in truths {
        let mut world = World { state: 7, truth };
        let learnt = world.run(1500, None);
        let fixed = [0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5, 2.5, 4.0].map(|exponent| world.run(1500, Some(exponent)));
        let best = fixed.into_iter().fold(0.0, f64::max);
        // A wrong one would not pass.
        assert!(
            fixed.into_iter().fold(best, f64::min) < 0.97 * best,
            "{drafter}: {fixed:?}"
        );
        assert!(learnt > 0.97 * best, "{drafter}: {learnt} against {best}");
    }
}
