//! How often a width is looked at that is not in use.

use super::*;

#[test]
fn an_old_time_is_renewed_the_more_rarely_the_more_that_costs() {
    // The other width has 1.7 tokens in 6.8: as slow as 3.4 times its due, of which a look of four steps loses half of its time.
    let mut planner = knowing([1, 2], [Some(2.0), Some(6.8)]);
    let lost = 4.0 * (6.8 - 1.7 * 2.0) / 2.0;
    let due = 1000 + (FRESH as f64 * lost).ceil() as u64;
    planner.size(4, 0).steps = due - 2;
    assert_eq!((planner.choose(4, 0, &[]), planner.size(4, 0).steps), (1, due - 1));
    assert_eq!((planner.choose(4, 0, &[]), planner.look), (2, (1, LOOK - 1)));
    assert_eq!(planner.size(4, 0).times[1].seen, due);
    // What would lose nothing is renewed after so many steps all the same.
    let mut planner = knowing([1, 2], [Some(1.0), Some(1.7)]);
    planner.size(4, 0).steps = 1000 + FRESH - 2;
    assert_eq!((planner.choose(4, 0, &[]), planner.choose(4, 0, &[])), (1, 2));
}

/// The steps, of so many, at which a planner of plain steps looks at drafting, which takes `took` of a plain step's time and brings nothing.
fn looks(planner: &mut WidthPlanner, steps: usize, took: impl Fn(usize) -> f64) -> Vec<usize> {
    let mut last = 1;
    let widths = (0..steps).map(|step| {
        let width = planner.choose(4, 0, &[]);
        if last == width {
            planner.observe(4, 0, width, if width == 2 { took(step) } else { 1.0 });
        }
        planner.record(width, &[0; 4], &[]).unwrap();
        last = width;
        width
    });
    let widths: Vec<usize> = widths.collect();
    let begins = (0..steps).filter(|&step| widths[step] == 2 && (step == 0 || widths[step - 1] == 1));
    begins.collect()
}

#[test]
fn what_does_not_pay_is_looked_at_half_as_often_each_time() {
    // A look of four steps loses no more than one step, so nothing else makes it rarer.
    let mut planner = knowing([1, 2], [Some(1.0), Some(1.2)]);
    planner.acceptance[0] = Acceptance::seen(1e9, 1.0);
    let seen = looks(&mut planner, 8000, |_| 1.2);
    let between: Vec<usize> = seen.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let expected = [2, 4, 8, 8].map(|times| times * FRESH as usize);
    for (steps, expected) in between.iter().zip(expected) {
        // Counted from the last step of a look.
        assert!((expected..expected + 8).contains(steps), "{between:?}");
    }
    assert_eq!(seen.len(), 6, "{seen:?}");
    // What turns out to be far cheaper than believed is soon looked at again.
    let after = looks(&mut planner, 6000, |step| if step < 2000 { 1.2 } else { 0.9 });
    assert!(
        after.windows(2).any(|pair| pair[1] - pair[0] < 2 * FRESH as usize),
        "{after:?}"
    );
}

#[test]
fn what_drafting_is_weighed_against_does_not_get_old() {
    // Drafting pays: plain steps are looked at as often as ever.
    let mut planner = knowing([1, 2], [Some(1.0), Some(1.2)]);
    planner.current = 1;
    planner.acceptance[0] = Acceptance::seen(1e9, 0.9e9);
    let widths: Vec<usize> = (0..4000).map(|_| planner.choose(4, 0, &[])).collect();
    let plain = widths.iter().filter(|&&width| width == 1).count();
    assert!((4 * 10..=4 * 16).contains(&plain), "{plain}");
}
