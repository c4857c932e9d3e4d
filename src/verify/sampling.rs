//! What a request asks of its target distribution, and the counts that penalties need.

use std::collections::HashMap;

use crate::error::{Error, Result, indices};
use crate::types::TokenId;

/// The target transform of one request. It is the same for speculative and for plain decoding.
///
/// Order of operations on a row of logits: repetition penalty, frequency penalty, presence penalty, logit bias,
/// temperature, then top-k and top-p *jointly* on the tempered distribution (a token stays iff it is among the `top_k`
/// likeliest **and** in the smallest nucleus of mass `top_p` of the unfiltered distribution), then min-p.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 means argmax (lowest id wins ties), otherwise 1e-5 or more.
    pub temperature: f32,
    /// Keep the `top_k` likeliest tokens; 0 is off.
    pub top_k: u32,
    /// Keep the smallest set of likeliest tokens whose mass is at least `top_p`, in (0, 1]; 1 is off.
    pub top_p: f32,
    /// Keep tokens with probability of at least `min_p` times the largest one, in [0, 1]; 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in the prompt **or** the output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token seen in the **output**; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the **output**; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of the named tokens; finite, or -inf to forbid a token. Each token at most once.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Seed of every random number of the request.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

fn refuse<T>(name: &'static str, got: impl ToString, expected: impl Into<String>) -> Result<T> {
    Err(Error::InvalidArgument {
        name,
        got: got.to_string(),
        expected: expected.into(),
    })
}

impl Sampling {
    /// Checks every field against its documented domain; `vocab` is the width of the target's logits.
    pub fn validate(&self, vocab: usize) -> Result<()> {
        let t = self.temperature;
        if !(t == 0.0 || (t >= 1e-5 && t.is_finite())) {
            return refuse("temperature", t, "0 (greedy) or a finite number of at least 1e-5");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", self.top_p, "a number in (0, 1]");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return refuse("min_p", self.min_p, "a number in [0, 1]");
        }
        let r = self.repetition_penalty;
        if !(r > 0.0 && r.is_finite()) {
            return refuse("repetition_penalty", r, "a finite number above 0 (1 is off)");
        }
        if !self.presence_penalty.is_finite() {
            return refuse("presence_penalty", self.presence_penalty, "a finite number (0 is off)");
        }
        if !self.frequency_penalty.is_finite() {
            return refuse(
                "frequency_penalty",
                self.frequency_penalty,
                "a finite number (0 is off)",
            );
        }
        let mut ids: Vec<TokenId> = Vec::with_capacity(self.logit_bias.len());
        for &(token, bias) in &self.logit_bias {
            if token.0 as usize >= vocab {
                return refuse(
                    "logit_bias",
                    format!("token {}", token.0),
                    format!("tokens in {}", indices(vocab)),
                );
            }
            if bias.is_nan() || bias == f32::INFINITY {
                return refuse(
                    "logit_bias",
                    format!("{bias} for token {}", token.0),
                    "a finite number or -inf",
                );
            }
            ids.push(token);
        }
        ids.sort_unstable();
        if let Some(twice) = ids.windows(2).find(|w| w[0] == w[1]) {
            return refuse(
                "logit_bias",
                format!("token {} twice", twice[0].0),
                "each token at most once",
            );
        }
        Ok(())
    }

    /// Whether any logit is edited before the temperature.
    pub fn edits_logits(&self) -> bool {
        self.penalises() || !self.logit_bias.is_empty()
    }

    /// Whether the counts of [`History`] matter.
    pub fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// The penalised logit of a token that was seen `output` times in the output and, if that is zero, in the prompt.
    /// Each operation is rounded to f32 on its own, in this order.
    #[inline]
    pub(crate) fn penalise(&self, logit: f32, output: u32) -> f32 {
        let r = self.repetition_penalty;
        let mut l = logit;
        // Not `l / 1.0`: a row that asks for nothing must come out with the bits it came in with, -0.0 included.
        if r != 1.0 {
            l = if l > 0.0 { l / r } else { l * r };
        }
        if output > 0 {
            l -= self.frequency_penalty * output as f32;
            l -= self.presence_penalty;
        }
        l
    }
}

/// Counts of the tokens of one request, for penalties: the repetition penalty looks at prompt and output, the presence and
/// frequency penalties at the output alone. O(1) per token, O(distinct tokens) per penalised row.
#[derive(Clone, Debug, Default)]
pub struct History {
    index: HashMap<TokenId, usize>,
    // (token, occurrences in the output); a token of the prompt alone has zero.
    counts: Vec<(TokenId, u32)>,
}

impl History {
    /// Starts from the prompt, with an empty output.
    pub fn new(prompt: &[TokenId]) -> Self {
        let mut history = Self::default();
        for &token in prompt {
            history.slot(token);
        }
        history
    }

    /// Appends one token to the output.
    pub fn push(&mut self, token: TokenId) {
        let at = self.slot(token);
        self.counts[at].1 += 1;
    }

    /// Distinct tokens of prompt and output with their number of occurrences in the output.
    pub fn counts(&self) -> &[(TokenId, u32)] {
        &self.counts
    }

    /// Occurrences in the output.
    pub fn output_count(&self, token: TokenId) -> u32 {
        self.index.get(&token).map_or(0, |&at| self.counts[at].1)
    }

    fn slot(&mut self, token: TokenId) -> usize {
        let next = self.counts.len();
        let at = *self.index.entry(token).or_insert(next);
        if at == next {
            self.counts.push((token, 0));
        }
        at
    }
}
