//! Step times as curves over rows: what a pass of so many tokens takes.
//!
//! In any one unit: flat as long as memory is what limits, a line where arithmetic does, stairs where a device runs in fixed sizes. A
//! curve never falls, and steps that were seen to take less only ever lower it.

use crate::error::{Error, Result};

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

    /// `rows` took no more than `time`: a curve that says more was measured when the machine was busy. It only ever falls.
    pub(super) fn lower(&mut self, rows: usize, time: f64) {
        let now = self.at(rows);
        if !(time > 0.0 && time < now) {
            return;
        }
        let scale = time / now;
        let first = self.points.partition_point(|p| p.0 <= rows as f64).saturating_sub(1);
        let first = first.min(self.points.len().saturating_sub(2));
        // The two points it lies between; one alone where it lies on that, or before all.
        let alone = rows as f64 <= self.points[first].0;
        for point in self.points.iter_mut().skip(first).take(if alone { 1 } else { 2 }) {
            point.1 *= scale;
        }
        let most = self.points[first].1;
        for point in &mut self.points[..first] {
            point.1 = point.1.min(most);
        }
    }
}

/// Where a step's time goes, in one unit of the caller's choice.
#[derive(Clone, Debug, PartialEq)]
pub struct StepCost {
    /// A target pass, over the tokens in it.
    pub target: Curve,
    /// A drafter pass and what follows from it, over the tokens of its blocks.
    pub draft: Curve,
}

impl StepCost {
    /// Only the number of passes counts: whole blocks are drafted and verified.
    pub fn passes() -> Self {
        Self {
            target: Curve::flat(1.0),
            draft: Curve::flat(0.0),
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
        fn what_was_seen_lowers_a_curve_to_it_and_leaves_it_a_curve(
            steps in prop::collection::vec((1usize..9, 0.0f64..2.0), 1..8),
            seen in prop::collection::vec((0usize..70, 0.01f64..9.0), 1..20),
        ) {
            let points = rising(&steps);
            let mut curve = Curve::new("curve", &points).unwrap();
            let last = points[points.len() - 1].0 as usize;
            for &(rows, time) in &seen {
                let before: Vec<f64> = (0..80).map(|r| curve.at(r)).collect();
                curve.lower(rows, time);
                prop_assert!((curve.at(rows) - time.min(before[rows])).abs() < 1e-9);
                // Beyond the last point a curve goes on as before it, which may now be steeper.
                prop_assert!((0..=last).all(|r| curve.at(r) <= before[r] + 1e-9));
                // It would still be taken as a curve.
                prop_assert!(Curve::new("curve", &curve.points).is_ok(), "{:?}", curve);
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

    #[test]
    fn a_curve_tells_its_points_and_a_time_of_nothing_does_not_lower_it() {
        let points = [(1.0, 2.0), (4.0, 3.0)];
        let mut curve = Curve::new("curve", &points).unwrap();
        for time in [0.0, -1.0, f64::NAN, 9.0] {
            curve.lower(2, time);
            assert_eq!(curve.points(), points);
        }
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
