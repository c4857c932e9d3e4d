//! What became of what drafts had promised.
//!
//! Chances are right in the mean over all drafts. Those that are verified are not all drafts: they were chosen because they promised most, and what
//! promises most is, more often than not, what was judged too well. So it is counted how many of them were expected to be accepted, and how many
//! were, and promises of the same kind count for that share from then on.

/// Promised drafts over which it is remembered, about.
const MEMORY: f64 = 256.0;
/// Promised drafts that the assumption at the start is worth: that promises are kept.
const PRIOR: f64 = 16.0;
/// The least and the most that is believed.
const LEAST: f64 = 0.25;
const MOST: f64 = 1.25;

/// Promises of one kind.
#[derive(Clone, Debug, Default)]
pub(super) struct Kept {
    // Fading.
    promised: f64,
    accepted: f64,
}

impl Kept {
    /// Books drafts of which so many were expected to be accepted, and so many were.
    pub fn record(&mut self, promised: f64, accepted: usize) {
        let fade = (1.0 - promised / MEMORY).max(0.0);
        self.promised = self.promised * fade + promised;
        self.accepted = self.accepted * fade + accepted as f64;
    }

    /// Which share of what is promised will be.
    pub fn share(&self) -> f32 {
        ((self.accepted + PRIOR) / (self.promised + PRIOR)).clamp(LEAST, MOST) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_are_believed_as_far_as_they_were_kept() {
        let mut kept = Kept::default();
        assert_eq!(kept.share(), 1.0);
        // Nothing was promised: nothing is said.
        kept.record(0.0, 0);
        assert_eq!(kept.share(), 1.0);
        kept.record(2.0, 1);
        assert_eq!(kept.share(), 17.0 / 18.0, "a few drafts change little");
        (0..1000).for_each(|_| kept.record(1.0, 1));
        assert!((kept.share() - 1.0).abs() < 0.01);
        (0..1000).for_each(|pass| kept.record(1.5, usize::from(pass % 4 != 0)));
        let half = kept.share();
        assert!((half - 0.53).abs() < 0.02, "{half}");
        // What was long ago is forgotten, and nothing leaves the bounds.
        (0..1000).for_each(|_| kept.record(0.8, 0));
        assert_eq!(kept.share(), LEAST as f32);
        (0..2000).for_each(|_| kept.record(0.5, 3));
        assert_eq!(kept.share(), MOST as f32);
        kept.record(1e9, 0);
        assert_eq!(kept.share(), LEAST as f32);
    }
}
