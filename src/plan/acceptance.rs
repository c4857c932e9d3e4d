//! How often drafts were accepted: by their position in a chain, and by their place in the order of a tree. Learnt from passes, and
//! slowly forgotten.
//!
//! A pass says something of every draft that it reached, and nothing of those behind the first that was refused. Where few passes came so
//! far, a draft is taken to be as likely as the one before it, and what was seen there before is forgotten as fast as elsewhere: otherwise
//! the places behind one that is mostly refused would look as good as they once did, or as assumed, for ever.

use crate::error::{Error, Result};

/// Passes over which the acceptance of a position is remembered, about.
const MEMORY: f64 = 200.0;
/// Passes that the assumption at the start is worth.
const PRIOR: f64 = 4.0;
/// A draft, given that all before it were accepted, before anything is known.
const ASSUMED: f64 = 0.7;

/// How likely drafts are, position by position.
#[derive(Clone, Debug)]
pub(super) struct Acceptance {
    // Passes that reached a position, and those that accepted it, fading.
    reached: Vec<f64>,
    accepted: Vec<f64>,
}

impl Acceptance {
    /// For `positions` drafts per block.
    pub fn new(positions: usize) -> Self {
        Self {
            reached: vec![0.0; positions],
            accepted: vec![0.0; positions],
        }
    }

    /// Drafts per block.
    pub fn positions(&self) -> usize {
        self.reached.len()
    }

    /// For one draft that so many passes reached and accepted.
    #[cfg(test)]
    pub fn seen(reached: f64, accepted: f64) -> Self {
        Self {
            reached: vec![reached],
            accepted: vec![accepted],
        }
    }

    /// How many passes have told, of those that are remembered.
    pub fn passes(&self) -> f64 {
        self.reached.first().copied().unwrap_or_default()
    }

    /// Chance that the draft at `position` (0 is the first) is accepted when all before it were.
    pub fn at(&self, position: usize) -> f64 {
        self.chances().nth(position).expect("a position of the block")
    }

    /// The same of all positions.
    pub fn chances(&self) -> impl Iterator<Item = f64> + '_ {
        let seen = self.reached.iter().zip(&self.accepted);
        seen.scan(ASSUMED, |chance, (reached, accepted)| {
            *chance = (accepted + PRIOR * *chance) / (reached + PRIOR);
            Some(*chance)
        })
    }

    /// The same, where `assumed` is what is believed of a position that was never reached.
    pub fn assuming(&self, assumed: impl Iterator<Item = f64>) -> impl Iterator<Item = f64> {
        let seen = self.reached.iter().zip(&self.accepted).zip(assumed);
        seen.map(|((reached, accepted), assumed)| (accepted + PRIOR * assumed) / (reached + PRIOR))
    }

    /// Books one request's pass: `drafted` drafts verified, `accepted` of them kept.
    ///
    /// # Errors
    /// `AcceptedExceedsDrafted`.
    pub fn record(&mut self, drafted: usize, accepted: usize) -> Result<()> {
        if accepted > drafted {
            return Err(Error::AcceptedExceedsDrafted {
                accepted: accepted as u32,
                drafted: drafted as u32,
            });
        }
        let fade = 1.0 - 1.0 / MEMORY;
        for position in 0..drafted.min(self.reached.len()) {
            let (reached, kept) = (position <= accepted, position < accepted);
            self.reached[position] = self.reached[position] * fade + f64::from(u8::from(reached));
            self.accepted[position] = self.accepted[position] * fade + f64::from(u8::from(kept));
        }
        Ok(())
    }
}

/// How likely the i-th best draft of a tree is.
///
/// Drafts are taken best first, so what a smaller tree would have verified is always the front of what a larger one did. One pass
/// therefore says of every size up to its own what it would have gained.
#[derive(Clone, Debug)]
pub(super) struct NodeRates {
    // Fading: passes that verified it, and those that accepted it.
    reached: Vec<f64>,
    accepted: Vec<f64>,
}

impl NodeRates {
    /// For trees of up to `nodes` drafts.
    pub fn new(nodes: usize) -> Self {
        Self {
            reached: vec![0.0; nodes],
            accepted: vec![0.0; nodes],
        }
    }

    /// Most drafts of a tree.
    pub fn most(&self) -> usize {
        self.reached.len()
    }

    /// Chance that the draft at place `node` of the order (0 is the best) is accepted.
    pub fn at(&self, node: usize) -> f64 {
        let assumed = ASSUMED / (1.0 + node as f64 / 2.0);
        (self.accepted[node] + PRIOR * assumed) / (self.reached[node] + PRIOR)
    }

    /// Books one request's pass over the `verified` best drafts, of which those at `path` were accepted.
    pub fn record(&mut self, verified: usize, path: &[usize]) {
        let fade = 1.0 - 1.0 / MEMORY;
        let verified = verified.min(self.reached.len());
        for node in 0..verified {
            self.reached[node] = self.reached[node] * fade + 1.0;
            self.accepted[node] *= fade;
        }
        for &node in path.iter().filter(|&&node| node < verified) {
            self.accepted[node] += 1.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_learnt_from_the_passes_that_reached_it() {
        let mut acceptance = Acceptance::new(3);
        assert_eq!(acceptance.at(0), ASSUMED);
        for pass in 0..400 {
            acceptance.record(3, pass % 2).unwrap();
        }
        assert!((acceptance.at(0) - 0.5).abs() < 0.02 && acceptance.at(1) < 0.05);
        assert_eq!(acceptance.at(2), acceptance.at(1), "nothing came so far");
        let refused = Error::AcceptedExceedsDrafted {
            accepted: 3,
            drafted: 2,
        };
        assert_eq!(acceptance.record(2, 3), Err(refused));
        // Longer blocks than were asked for say nothing of what is not there.
        acceptance.record(9, 9).unwrap();
    }

    #[test]
    fn places_behind_one_that_is_mostly_refused_do_not_look_as_good_as_they_once_did() {
        let mut acceptance = Acceptance::new(7);
        (0..300).for_each(|_| acceptance.record(7, 7).unwrap());
        assert!(acceptance.chances().all(|chance| chance > 0.98));
        for pass in 0..1200 {
            acceptance.record(7, usize::from(pass % 5 == 0)).unwrap();
        }
        assert!(
            (acceptance.at(0) - 0.2).abs() < 0.03 && acceptance.at(1) < 0.05,
            "{acceptance:?}"
        );
        assert!((2..7).all(|position| acceptance.at(position) < 0.5), "{acceptance:?}");
        // What narrower blocks do not say is kept.
        let before = acceptance.reached[5];
        acceptance.record(3, 3).unwrap();
        assert_eq!(acceptance.reached[5], before);
    }

    #[test]
    fn a_node_is_learnt_from_every_pass_that_verified_it() {
        let mut rates = NodeRates::new(4);
        assert!(rates.at(0) == ASSUMED && rates.at(1) < ASSUMED && rates.at(3) < rates.at(2));
        for _ in 0..300 {
            rates.record(3, &[0, 2]);
        }
        assert!(rates.at(0) > 0.97 && rates.at(1) < 0.02 && rates.at(2) > 0.97);
        assert_eq!(rates.at(3), ASSUMED / 2.5);
        rates.record(9, &[0, 3, 8]);
        assert!(rates.at(3) > ASSUMED / 2.5 && rates.most() == 4);
        // What was not verified is not accepted, whoever says so; and what was long ago is forgotten.
        let before = rates.at(2);
        rates.record(2, &[2]);
        rates.record(9, &[4]);
        assert!(rates.at(2) <= before);
        (0..400).for_each(|_| rates.record(4, &[]));
        assert!(rates.at(0) < 0.15, "{}", rates.at(0));
    }
}
