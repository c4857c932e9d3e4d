//! Drafts of two sources, the drafter and what a request's own text said before: each request takes those that promise more.
//!
//! ```text
//!   looked up        ask(texts)  ──> whose drafter is asked       those whose text promises less than their drafter does in the mean
//!   drafted          admit_either(texts, own)  ──> tokens, widths by what this drafter says of these drafts
//! ```

use super::chances::{band, chances};
use super::{Admission, Offers, Planner, check_length};
use crate::error::{Error, Result};

/// A drafter's chains for some of a step's requests, of `depth` places each; none for nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Own<'a> {
    /// `[m]` for which of them, rising.
    pub requests: &'a [usize],
    /// `[m, depth]` the likeliest tokens.
    pub tokens: &'a [i64],
    /// `[m, depth]` the drafter's probabilities of them.
    pub probabilities: &'a [f32],
    /// Places.
    pub depth: usize,
}

impl Planner {
    /// For which of the requests the drafter is asked for a block of `block` tokens, the anchor counted. `texts`: what was found in their own texts,
    /// chains of chances that are 0 behind the last draft.
    ///
    /// # Errors
    /// As [`Self::admit`].
    pub fn ask(&mut self, texts: &Offers<'_>, block: usize) -> Result<Vec<usize>> {
        self.begin(texts)?;
        let asked = |&request: &usize| {
            let band = band(texts.temperatures[request]);
            let places = (texts.most[request] as usize).min(block) - 1;
            self.text_promises(texts, request) < promised(self.acceptance[band].chances().take(places))
        };
        Ok((0..texts.most.len()).filter(asked).collect())
    }

    /// What each request verifies: of `texts`, as for [`Self::ask`], of which `found` places have a draft, or of its `own` drafter's chain, if that
    /// was asked for.
    ///
    /// # Errors
    /// As [`Self::admit`]; `Length` naming what of `own` or `found` does not fit, `InvalidArgument` for requests of `own` that are none.
    pub fn admit_either(&mut self, texts: &Offers<'_>, found: &[i32], own: &Own<'_>) -> Result<Admission> {
        let requests = texts.most.len();
        check_length("found", found.len(), requests)?;
        check_length("own", own.tokens.len(), own.requests.len() * own.depth)?;
        check_length("own", own.probabilities.len(), own.tokens.len())?;
        if let Some(none) = own.requests.iter().find(|&&request| request >= requests) {
            return Err(Error::InvalidArgument {
                name: "own",
                got: format!("request {none}"),
                expected: format!("below {requests}"),
            });
        }
        let mut tokens = texts.tokens.to_vec();
        check_length("tokens", tokens.len(), texts.probabilities.len())?;
        let judges = self.begin(&Offers {
            from_text: &[],
            ..*texts
        })?;
        let (mut offered, mut from_text) = (texts.probabilities.to_vec(), vec![true; requests]);
        let room = |request: usize| (texts.most[request] as usize - 1).min(texts.depth);
        let mut places: Vec<usize> = found.iter().map(|&found| found.max(0) as usize).collect();
        let depth = own.depth.min(texts.depth);
        for (at, &request) in own.requests.iter().enumerate() {
            let probabilities = &own.probabilities[at * own.depth..][..depth];
            let judge = judges[request];
            let own_chance = |probability: &f32| {
                let mut chance = [0.0];
                chances(&[*probability], judge.exponent, &mut chance);
                f64::from(chance[0])
            };
            let drafter = promised(probabilities.iter().take(room(request)).map(own_chance)) * f64::from(judge.kept);
            if drafter < self.text_promises(texts, request) {
                continue;
            }
            let row = request * texts.depth;
            tokens[row..][..depth].copy_from_slice(&own.tokens[at * own.depth..][..depth]);
            offered[row..][..texts.depth].fill(0.0);
            offered[row..][..depth].copy_from_slice(probabilities);
            (places[request], from_text[request]) = (depth, false);
        }
        let most: Vec<i32> = (0..requests)
            .map(|request| (room(request).min(places[request]) + 1) as i32)
            .collect();
        let widths = self.admit(&Offers {
            probabilities: &offered,
            tokens: &tokens,
            from_text: &from_text,
            most: &most,
            ..*texts
        })?;
        Ok(Admission { tokens, widths })
    }

    /// How many drafts of a request's text will be accepted in the mean, by their chances and by what of such promises was kept.
    fn text_promises(&self, texts: &Offers<'_>, request: usize) -> f64 {
        let chances = &texts.probabilities[request * texts.depth..][..texts.depth];
        let kept = self.kept[1][band(texts.temperatures[request])].share();
        promised(chances.iter().map(|&chance| f64::from(chance))) * f64::from(kept)
    }
}

/// Drafts of a chain that will be accepted in the mean.
fn promised(chances: impl Iterator<Item = f64>) -> f64 {
    let mut reached = 1.0;
    chances
        .map(|chance| {
            reached *= chance;
            reached
        })
        .sum()
}
