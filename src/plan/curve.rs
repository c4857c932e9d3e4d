//! Step times as curves over rows: what a pass of so many tokens takes.
//!
//! In any one unit: flat as long as memory is what limits, a line where arithmetic does, stairs where a device runs in fixed sizes. A
//! curve never falls, and follows what steps are seen to take.

use crate::error::{Error, Result};

/// How far a curve goes towards a time that was seen, as a share of the way (of logarithms): up, and down. A busy moment only adds to a time, so a
/// short one is nearer the truth, and what is followed is about the lower quartile.
const UP: f64 = 0.1;
const DOWN: f64 = 0.3;
/// Which part of that is taken for the machine's pace, which is everybody's, and not for what those rows take beside others.
const PACE: f64 = 0.25;
/// The least and the most that a time counts for, as a multiple of the one expected.
const SHORTEST: f64 = 0.5;
const LONGEST: f64 = 1.5;

/// Time over rows: straight between the points, that of the first before it, and beyond the last as between the last two.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    // Rows rise, times do not fall.
    points: Vec<(f64, f64)>,
}

impl Curve {
    /// Through `points`, pairs of rows and time. One point alone is a time that depends on nothing.
    ///
    /// # Errors
    /// `InvalidArgument` naming `name` when there is none, rows do not rise, or a time is negative, falls, or is no number.
    pub fn new(name: &'static str, points: &[(f64, f64)]) -> Result<Self> {
        let refuse = |got: String, expected: &str| {
            Err(Error::InvalidArgument {
                name,
                got,
                expected: expected.into(),
            })
        };
        if points.is_empty() {
            return refuse("no points".into(), "at least one pair of rows and time");
        }
        let (mut rows, mut time) = (-1.0, 0.0);
        for &(r, t) in points {
            let point = format!("({r}, {t})");
            if !r.is_finite() || !t.is_finite() {
                return refuse(point, "finite numbers");
            }
            if r < 0.0 || r <= rows {
                return refuse(point, "rows of at least 0 that rise from point to point");
            }
            if t < time {
                return refuse(point, "times of at least 0 that never fall from point to point");
            }
            (rows, time) = (r, t);
        }
        Ok(Self { points: points.into() })
    }

    /// A time that depends on nothing.
    pub fn flat(time: f64) -> Self {
        Self {
            points: vec![(0.0, time)],
        }
    }

    /// Pairs of rows and time.
    pub fn points(&self) -> &[(f64, f64)] {
        &self.points
    }

    /// The time of `rows`.
    pub fn at(&self, rows: usize) -> f64 {
        let (points, rows) = (&self.points, (rows as f64).max(self.points[0].0));
        let Some(last) = points.len().checked_sub(2) else {
            return points[0].1;
        };
        let first = points.partition_point(|p| p.0 <= rows).saturating_sub(1).min(last);
        let ((r0, t0), (r1, t1)) = (points[first], points[first + 1]);
        t0 + (rows - r0) * (t1 - t0) / (r1 - r0)
    }

    /// All times become `factor` times as long.
    fn scale(&mut self, factor: f64) {
        self.points.iter_mut().for_each(|point| point.1 *= factor);
    }

    /// The time of `rows` becomes about `factor` times as long, by way of the two points that it lies between.
    fn bend(&mut self, rows: usize, factor: f64) {
        let Some(last) = self.points.len().checked_sub(2) else {
            return self.scale(factor);
        };
        let rows = rows as f64;
        let first = self.points.partition_point(|p| p.0 <= rows).saturating_sub(1).min(last);
        let (before, behind) = (self.points[first].0, self.points[first + 1].0);
        let share = ((rows - before) / (behind - before)).clamp(0.0, 1.0);
        let mut least = self.points[first].1 * factor.powf(1.0 - share);
        let mut most = self.points[first + 1].1 * factor.powf(share);
        // Fewer rows never take longer, and what was seen is nearer the truth than what was believed.
        if factor < 1.0 {
            least = least.min(most);
        } else {
            most = most.max(least);
        }
        for (index, point) in self.points.iter_mut().enumerate() {
            point.1 = if index <= first {
                point.1.min(least)
            } else {
                point.1.max(most)
            };
        }
        (self.points[first].1, self.points[first + 1].1) = (least, most);
    }
}

/// By how much a time is off the one `expected`, as a logarithm: 0 where it is what was to be expected. None where one of them is no time. A step
/// that took far longer was held up by something else: its excess counts as that of one that took half as long again.
fn off(expected: f64, time: f64) -> Option<f64> {
    (time > 0.0 && time.is_finite() && expected > 0.0).then(|| (time / expected).clamp(SHORTEST, LONGEST).ln())
}

/// Where a step's time goes, in one unit of the caller's choice.
#[derive(Clone, Debug, PartialEq)]
pub struct StepCost {
    /// A target pass, over the tokens in it.
    pub target: Curve,
    /// What a token of context adds to it: its keys and values are read once for a request, however many tokens of the request are verified.
    pub context: f64,
    /// A drafter pass and what follows from it, over the tokens of its blocks.
    pub draft: Curve,
}

impl StepCost {
    /// Only the number of passes counts: whole blocks are drafted and verified.
    pub fn passes() -> Self {
        Self {
            target: Curve::flat(1.0),
            context: 0.0,
            draft: Curve::flat(0.0),
        }
    }

    /// The time of a target pass over `rows` of requests with `context` tokens together.
    pub fn pass(&self, rows: usize, context: usize) -> f64 {
        self.target.at(rows) + self.context * context as f64
    }

    /// Follows what a step took: a target pass over `target.0` rows of requests with `context` tokens together, and, if it drafted, a drafter pass
    /// over `draft.0` rows with what follows from it. Curves that were measured on a busy machine come down, and what nobody has seen lately keeps
    /// its place among the others. What is off is off in its parts, the rows' and the context's, as much as each of them is of the whole.
    pub(super) fn follow(&mut self, target: (usize, f64), context: usize, draft: (usize, f64)) {
        let way = |off: f64| off * if off > 0.0 { UP } else { DOWN };
        let expected = self.pass(target.0, context);
        if let Some(off) = off(expected, target.1) {
            let (pace, rest) = ((way(off) * PACE).exp(), way(off) * (1.0 - PACE));
            let share = self.context * context as f64 / expected;
            self.target.bend(target.0, (rest * (1.0 - share)).exp());
            self.target.scale(pace);
            self.context *= pace * (rest * share).exp();
            self.draft.scale(pace);
        }
        if draft.0 > 0
            && let Some(off) = off(self.draft.at(draft.0), draft.1)
        {
            self.draft.bend(draft.0, way(off).exp());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Points of a curve from what is between them.
    fn rising(steps: &[(usize, f64)]) -> Vec<(f64, f64)> {
        let (mut rows, mut time) = (0, 0.5);
        let step = |&(more, slower): &(usize, f64)| {
            rows += more;
            time += slower;
            (rows as f64, time)
        };
        steps.iter().map(step).collect()
    }

    proptest! {
        #[test]
        fn costs_go_towards_what_was_seen_and_stay_curves(
            steps in prop::collection::vec((1usize..9, 0.0f64..2.0), 1..8),
            seen in prop::collection::vec((1usize..70, 0.01f64..9.0, 0usize..200, 0usize..70, 0.01f64..9.0), 1..20),
        ) {
            let points = rising(&steps);
            let mut cost = StepCost {
                target: Curve::new("target", &points).unwrap(),
                context: 0.01,
                draft: Curve::new("draft", &points).unwrap(),
            };
            let last = points[points.len() - 1].0 as usize;
            let nearer = |before: f64, after: f64, time: f64| {
                let way = (time / before).ln().clamp(SHORTEST.ln(), LONGEST.ln());
                let gone = (after / before).ln();
                // No further than there, in the same direction, and a good part of the way.
                gone * way >= 0.0 && gone.abs() <= way.abs() + 1e-9 && (gone.abs() >= 0.04 * way.abs() - 1e-9)
            };
            for &(rows, time, context, drafted, drafting) in &seen {
                let before = cost.clone();
                cost.follow((rows, time), context, (0, drafting));
                if rows <= last {
                    let (expected, now) = (before.pass(rows, context), cost.pass(rows, context));
                    prop_assert!(nearer(expected, now, time), "{before:?} {rows} {context} {time} {cost:?}");
                }
                let paced = cost.clone();
                cost.follow((0, f64::NAN), 0, (drafted, drafting));
                prop_assert_eq!(&paced.target, &cost.target);
                if drafted == 0 {
                    prop_assert_eq!(&paced, &cost);
                } else if drafted <= last {
                    prop_assert!(nearer(paced.draft.at(drafted), cost.draft.at(drafted), drafting), "{paced:?} {cost:?}");
                }
                for curve in [&cost.target, &cost.draft] {
                    prop_assert!(Curve::new("curve", &curve.points).is_ok(), "{curve:?}");
                }
            }
        }

        #[test]
        fn a_curve_passes_through_its_points_and_never_falls(
            steps in prop::collection::vec((1usize..9, 0.0f64..2.0), 2..8),
        ) {
            let points = rising(&steps);
            let curve = Curve::new("curve", &points).unwrap();
            for &(rows, time) in &points {
                prop_assert!((curve.at(rows as usize) - time).abs() < 1e-9);
            }
            for rows in 0..100 {
                prop_assert!(curve.at(rows + 1) >= curve.at(rows) - 1e-9);
            }
        }
    }

    fn costs() -> StepCost {
        StepCost {
            target: Curve::new("target", &[(1.0, 2.0), (5.0, 3.0), (9.0, 5.0)]).unwrap(),
            context: 0.0,
            draft: Curve::flat(1.0),
        }
    }

    #[test]
    fn a_curve_tells_its_points_and_a_time_that_is_none_changes_nothing() {
        let mut cost = costs();
        for time in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            cost.follow((2, time), 0, (2, time));
            assert_eq!(cost, costs());
        }
        // Costs of nothing stay at nothing.
        let mut passes = StepCost::passes();
        passes.follow((1, 1.0), 0, (1, 1.0));
        assert_eq!(passes, StepCost::passes());
    }

    #[test]
    fn a_time_that_was_seen_changes_those_near_it_and_a_quarter_of_it_all() {
        let mut cost = costs();
        // Twice as fast as it should be.
        cost.follow((5, 1.5), 0, (0, 0.0));
        let (all, here) = (0.5f64.powf(DOWN * PACE), 0.5f64.powf(DOWN));
        let close = |got: f64, expected: f64| (got - expected).abs() < 1e-9;
        let [first, second, third] = cost.target.points() else {
            panic!()
        };
        assert!(
            close(first.1, 2.0 * all) && close(second.1, 3.0 * here) && close(third.1, 5.0 * all),
            "{cost:?}"
        );
        assert!(close(cost.draft.at(7), all));
        // Half way between two points each has half of it; a rise is slower.
        let mut cost = costs();
        cost.follow((7, 4.0 * LONGEST), 0, (0, 0.0));
        let (all, half) = (LONGEST.powf(UP * PACE), LONGEST.powf(UP * (1.0 - PACE) / 2.0));
        let [first, second, third] = cost.target.points() else {
            panic!()
        };
        assert!(close(first.1, 2.0 * all) && close(second.1, 3.0 * all * half) && close(third.1, 5.0 * all * half));
        // What is the context's is the context's: half of what was expected here.
        let mut cost = StepCost {
            context: 0.01,
            ..costs()
        };
        cost.follow((5, 3.0), 300, (0, 0.0));
        let (all, half) = (0.5f64.powf(DOWN * PACE), 0.5f64.powf(DOWN * (1.0 - PACE) / 2.0));
        assert!(
            close(cost.target.points()[1].1, 3.0 * all * half) && close(cost.context, 0.01 * all * half),
            "{cost:?}"
        );
        // Before the first point and behind the last one it is that point's; what takes too long counts for no more than LONGEST, what takes no
        // time for no less than SHORTEST.
        for (rows, point, time) in [(0, 0, 100.0), (40, 2, 100.0), (0, 0, 1e-9), (9, 2, 1e-9)] {
            let (mut cost, before) = (costs(), costs());
            cost.follow((rows, time), 0, (0, 0.0));
            let way = if time > 1.0 {
                LONGEST.powf(UP)
            } else {
                SHORTEST.powf(DOWN)
            };
            assert!(
                close(cost.target.points()[point].1, before.target.points()[point].1 * way),
                "{rows} {cost:?}"
            );
        }
        // The drafter's times say nothing of the target's.
        let mut cost = costs();
        cost.follow((0, 0.0), 0, (3, 0.5));
        assert!(cost.target == costs().target && close(cost.draft.at(3), 0.5f64.powf(DOWN)));
    }

    #[test]
    fn what_contexts_take_is_not_taken_for_what_rows_take() {
        // A machine on which a token of context takes a hundredth of a row's time, believed to take half of that.
        let rows = |rows: usize| 2.0 + 0.5 * rows as f64;
        let believed = Curve::new("target", &[(1.0, rows(1)), (64.0, rows(64))]).unwrap();
        let mut cost = StepCost {
            target: believed,
            context: 0.0025,
            draft: Curve::flat(0.0),
        };
        let took = |n: usize, context: usize| rows(n) + 0.005 * context as f64;
        for step in 0..3000 {
            let (n, context) = [(1, 200), (8, 1600), (12, 1600), (2, 3000), (40, 100)][step % 5];
            cost.follow((n, took(n, context)), context, (0, 0.0));
        }
        for (n, context) in [(1, 200), (8, 1600), (12, 1600), (2, 3000), (40, 100), (20, 800)] {
            let off = cost.pass(n, context) / took(n, context);
            assert!((off - 1.0).abs() < 0.03, "{n} {context}: {off} {cost:?}");
        }
        // Rows of requests that are there already: their contexts are read in any case.
        let more = cost.pass(12, 1600) - cost.pass(8, 1600);
        assert!((more - 2.0).abs() < 0.3, "{more}");
    }

    #[test]
    fn fewer_rows_never_take_longer_than_more() {
        let mut cost = costs();
        (0..200).for_each(|_| cost.follow((1, 4.0), 0, (0, 0.0)));
        let [first, second, third] = cost.target.points() else {
            panic!()
        };
        assert!(
            (first.1 - 4.0).abs() < 0.01 && second.1 >= first.1 && third.1 >= second.1,
            "{cost:?}"
        );
        (0..200).for_each(|_| cost.follow((9, 1.0), 0, (0, 0.0)));
        let [first, second, third] = cost.target.points() else {
            panic!()
        };
        assert!(
            (third.1 - 1.0).abs() < 0.01 && first.1 <= second.1 && second.1 <= third.1,
            "{cost:?}"
        );
    }

    #[test]
    fn curves_that_are_no_times_are_refused_by_name() {
        let refused: [(&[(f64, f64)], &str); 6] = [
            (&[], "draft: got no points"),
            (&[(0.0, -1.0)], "draft: got (0, -1), expected times of at least 0"),
            (&[(0.0, 2.0), (1.0, 1.0)], "draft: got (1, 1), expected times"),
            (&[(1.0, 1.0), (1.0, 2.0)], "draft: got (1, 2), expected rows"),
            (&[(-1.0, 1.0)], "draft: got (-1, 1), expected rows"),
            (&[(0.0, f64::NAN)], "draft: got (0, NaN), expected finite"),
        ];
        for (points, message) in refused {
            let error = Curve::new("draft", points).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
