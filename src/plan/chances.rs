//! From the drafter's probability of a draft to the chance that it is accepted.
//!
//! ```text
//!   chance of the likeliest token = its probability ^ exponent        what it leaves, its rivals share as the drafter would have them
//! ```
//! A drafter is surer of itself than it should be, or less so. And it is trained on the target's law at temperature 1, while a
//! request at a lower one draws the likeliest token more often. So the exponent is learnt as the model runs, for a few bands of
//! temperatures, each for itself: the one with which the chances of the drafts that were reached add up to those that were accepted. That
//! sum falls with the exponent, so there is one answer, found by halving; a few drafts change little, and what was long ago is
//! forgotten.

/// Bands of temperatures within which requests are judged alike.
pub(super) const BANDS: usize = 4;

/// The band of a temperature: greedy, then around 0.4 or less, around 0.7, and around 1 and over.
pub(super) fn band(temperature: f32) -> usize {
    const ENDS: [f32; BANDS - 1] = [0.0, 0.55, 0.85];
    ENDS.iter().position(|&end| temperature <= end).unwrap_or(BANDS - 1)
}

/// Drafts over which the exponent is remembered, about.
const MEMORY: f64 = 1024.0;
/// Drafts that the assumption at the start is worth: that the drafter, giving a token even odds, is right.
const PRIOR: f64 = 8.0;
const EVEN: f64 = 0.5;
/// Nothing between these is unheard of.
const LEAST: f64 = 0.05;
const MOST: f64 = 10.0;
/// Halvings of that range: far finer than what is learnt.
const HALVINGS: usize = 16;
/// Bins of probabilities, each looked at through the mean of its logarithms.
const BINS: usize = 32;

/// The exponent of one band.
#[derive(Clone, Debug)]
pub(super) struct Exponent {
    // Fading, by bin: drafts that were reached, and the sum of their logarithms, negated.
    reached: [f64; BINS],
    logs: [f64; BINS],
    // Fading: those accepted.
    accepted: f64,
    // What was made of it; None when something came since.
    known: Option<f32>,
}

impl Default for Exponent {
    fn default() -> Self {
        Self {
            reached: [0.0; BINS],
            logs: [0.0; BINS],
            accepted: 0.0,
            known: Some(1.0),
        }
    }
}

impl Exponent {
    /// Books a draft that was reached, one that is the drafter's likeliest at its place: its probability, and whether it was accepted.
    pub fn record(&mut self, probability: f32, accepted: bool) {
        // One of none has no chance with any exponent, and one that is no number says nothing.
        if probability.is_nan() || probability <= 0.0 {
            return;
        }
        let probability = f64::from(probability.min(1.0));
        let fade = 1.0 - 1.0 / MEMORY;
        for bin in 0..BINS {
            self.reached[bin] *= fade;
            self.logs[bin] *= fade;
        }
        let bin = ((probability * BINS as f64) as usize).min(BINS - 1);
        self.reached[bin] += 1.0;
        self.logs[bin] -= probability.ln();
        self.accepted = self.accepted * fade + f64::from(u8::from(accepted));
        self.known = None;
    }

    /// The exponent, by what was booked so far.
    pub fn get(&mut self) -> f32 {
        if let Some(known) = self.known {
            return known;
        }
        let bins: Vec<(f64, f64)> = (0..BINS)
            .filter(|&bin| self.reached[bin] > 0.0)
            .map(|bin| (self.reached[bin], self.logs[bin] / self.reached[bin]))
            .chain([(PRIOR, -EVEN.ln())])
            .collect();
        let accepted = self.accepted + PRIOR * EVEN;
        let expected = |exponent: f64| -> f64 { bins.iter().map(|&(n, log)| n * (-exponent * log).exp()).sum() };
        let (mut low, mut high) = (LEAST, MOST);
        for _ in 0..HALVINGS {
            // Halves of the ratio: small exponents want finer steps.
            let middle = (low * high).sqrt();
            if expected(middle) > accepted {
                low = middle;
            } else {
                high = middle;
            }
        }
        *self.known.insert((low * high).sqrt() as f32)
    }
}

/// Chances of the candidates for one place, the likeliest first, from the drafter's `probabilities` of them; none is likelier than the
/// one before it. What is no number has no chance.
pub(super) fn chances(probabilities: &[f32], exponent: f32, chances: &mut [f32]) {
    let Some((&first, rivals)) = probabilities.split_first() else {
        return;
    };
    let sure = within(first.max(0.0).powf(exponent));
    chances[0] = sure;
    let left = (1.0 - sure) / (1.0 - first).max(1e-6);
    let mut before = sure;
    for (chance, rival) in chances[1..].iter_mut().zip(rivals) {
        before = within(left * rival).min(before);
        *chance = before;
    }
}

fn within(chance: f32) -> f32 {
    // Fails for NaN, too.
    if chance > 0.0 { chance.min(1.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn temperatures_fall_into_the_band_they_are_near_to() {
        let bands = [0.0, 0.001, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 7.0].map(band);
        assert_eq!(bands, [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]);
    }

    #[test]
    fn rivals_share_what_the_likeliest_leaves() {
        let mut got = [0.0; 3];
        chances(&[0.25, 0.5, 0.125], 0.5, &mut got);
        // Half is left of three quarters; none is likelier than the one before it.
        assert_eq!(got, [0.5, 0.5 / 0.75 * 0.5, 0.5 / 0.75 * 0.125]);
        chances(&[0.5, 0.5, 0.5], 2.0, &mut got);
        assert_eq!(got, [0.25; 3]);
        chances(&[1.0, 0.5, 0.0], 1.0, &mut got);
        assert_eq!(got, [1.0, 0.0, 0.0]);
        chances(&[0.5, f32::NAN, 0.1], 1.0, &mut got);
        assert_eq!(got, [0.5, 0.0, 0.0]);
        for none in [f32::NAN, -1.0, 0.0, f32::NEG_INFINITY] {
            chances(&[none, 0.5, f32::INFINITY], 0.7, &mut got);
            assert_eq!(got, [0.0; 3], "{none}");
        }
        chances(&[], 1.0, &mut []);
    }

    proptest! {
        #[test]
        fn chances_are_chances_that_fall(
            mut p in prop::collection::vec(0.0f32..1.0, 1..6), exponent in LEAST as f32..MOST as f32
        ) {
            let sum: f32 = p.iter().sum::<f32>().max(1.0);
            p.iter_mut().for_each(|p| *p /= sum);
            p.sort_by(|a, b| b.total_cmp(a));
            let mut got = vec![0.0; p.len()];
            chances(&p, exponent, &mut got);
            prop_assert!(got.windows(2).all(|pair| pair[0] >= pair[1]));
            prop_assert!(got.iter().all(|c| (0.0..=1.0).contains(c)) && got.iter().sum::<f32>() < 1.0 + 1e-4, "{:?}", got);
        }

        #[test]
        fn the_exponent_is_the_one_with_which_chances_add_up(
            seen in prop::collection::vec((0.001f32..1.0, any::<bool>()), 1..200)
        ) {
            let mut exponent = Exponent::default();
            for &(probability, accepted) in &seen {
                exponent.record(probability, accepted);
            }
            let learnt = f64::from(exponent.get());
            let fade = |at: usize| (1.0f64 - 1.0 / MEMORY).powi((seen.len() - 1 - at) as i32);
            let sum = |exponent: f64| -> f64 {
                let mut sum = PRIOR * EVEN.powf(exponent);
                for (at, &(probability, _)) in seen.iter().enumerate() {
                    sum += fade(at) * f64::from(probability).powf(exponent);
                }
                sum
            };
            let mut accepted = PRIOR * EVEN;
            for (at, _) in seen.iter().enumerate().filter(|(_, draft)| draft.1) {
                accepted += fade(at);
            }
            // Bins blur probabilities by up to a 32nd.
            let slack = seen.len() as f64 * 0.03;
            let bounded = !(LEAST * 1.01..MOST * 0.99).contains(&learnt);
            prop_assert!(bounded || (sum(learnt) - accepted).abs() < slack, "{} {} {}", learnt, sum(learnt), accepted);
        }
    }

    #[test]
    fn a_few_drafts_change_little_and_many_change_all_and_nothing_leaves_the_bounds() {
        let mut exponent = Exponent::default();
        assert_eq!(exponent.get(), 1.0);
        exponent.record(0.5, false);
        let little = exponent.get();
        assert!(little > 1.0 && little < 1.3, "{little}");
        for _ in 0..5000 {
            exponent.record(0.9, false);
        }
        assert!((exponent.get() - MOST as f32).abs() < 0.1);
        for _ in 0..10_000 {
            exponent.record(0.01, true);
        }
        assert!((exponent.get() - LEAST as f32).abs() < 0.01);
        let before = exponent.get();
        for nothing in [0.0, -1.0, f32::NAN] {
            exponent.record(nothing, false);
            assert_eq!(exponent.get(), before);
        }
        let mut exponent = Exponent::default();
        exponent.record(0.3, true);
        let before = exponent.get();
        for nothing in [0.0, -1.0, f32::NAN] {
            exponent.record(nothing, true);
            exponent.record(nothing, false);
            assert_eq!(exponent.get(), before, "{nothing}");
        }
        // One that is sure of everything has a chance of 1 with any exponent.
        let mut sure = Exponent::default();
        (0..500).for_each(|_| sure.record(2.0, true));
        assert!((sure.get() - 1.0).abs() < 0.01);
    }
}
