//! How good a step is, and how many drafts of a line are worth their rows.

use super::{Offers, StepCost};

/// By how much drafting has to promise more than a plain step. Chances and times scatter, what shares a batch does not end sooner for the tokens
/// that others gain, and to have drafted too much costs more than to have drafted too little.
pub(super) const GAIN: f64 = 1.03;

/// How good a step is that gains so many tokens in so much time: tokens per time. Beside others, the tokens of prompts above all, theirs is time that
/// has to be spent in any case, and any draft would look cheap against it: there a step is as good as the tokens are more than what plain steps
/// would gain in its time.
pub(super) struct Merit {
    rate: Option<f64>,
}

impl Merit {
    /// For so many `requests` with `context` tokens together, and `others` rows beside them.
    pub fn new(cost: &StepCost, requests: usize, others: usize, context: usize) -> Self {
        let rate = (others > 0).then(|| GAIN * requests as f64 / cost.pass(requests, context));
        Self { rate }
    }

    pub fn of(&self, tokens: f64, time: f64) -> f64 {
        match self.rate {
            None => tokens / time,
            Some(rate) => tokens - rate * time,
        }
    }

    /// Of a plain step, which drafting has to be better than.
    pub fn plain(&self, tokens: f64, time: f64) -> f64 {
        match self.rate {
            None => GAIN * tokens / time,
            Some(_) => self.of(tokens, time),
        }
    }
}

/// How many drafts of a line, the likeliest first, to verify: those with which the step is best. Every front of the line is looked at:
/// where time rises in stairs, what does not pay now may pay further on.
pub(super) fn worth(cost: Option<&StepCost>, offers: &Offers<'_>, line: impl ExactSizeIterator<Item = f32>) -> usize {
    let Some(cost) = cost else { return line.len() };
    let requests = offers.most.len();
    let drafting = match offers.drafted.unwrap_or(requests * (offers.depth + 1)) {
        0 => 0.0,
        rows => cost.draft.at(rows),
    };
    let merit = Merit::new(cost, requests, offers.others, offers.context);
    let time = |drafts: usize| cost.pass(requests + offers.others + drafts, offers.context) + drafting;
    let mut tokens = requests as f64;
    let (mut admitted, mut most) = (0, merit.plain(tokens, time(0)));
    for (index, chance) in line.enumerate() {
        tokens += f64::from(chance);
        let now = merit.of(tokens, time(index + 1));
        if now >= most {
            (admitted, most) = (index + 1, now);
        }
    }
    admitted
}
