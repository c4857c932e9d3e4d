//! What a request may ask for, described once: every option with its meaning, default and range, what it needs, and what it does to a
//! row of logits. Whoever reads options ([`Source`]), draws ([`super::Sampler`]), ends texts (`schedule`) or packs rows for a device
//! (`step`) asks here.

use crate::error::{Error, Result, indices};
use crate::types::TokenId;
use crate::verify::History;

/// The target transform of one request. It is the same for speculative and for plain decoding. The default is the model's own
/// distribution, nothing changed.
///
/// Order of operations on a row of logits: masks, repetition penalty, frequency penalty, presence penalty, logit bias,
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
    /// Tokens that cannot be drawn for positions below `masked_before`, distinct: their logits are -inf there. Not an option of its own:
    /// [`Params::settle`] makes it of `min_tokens` and of what ends the text.
    pub masked: Vec<TokenId>,
    /// First position in the text, the prompt counted, for which `masked` tokens may be drawn.
    pub masked_before: u64,
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
            masked: Vec::new(),
            masked_before: 0,
        }
    }
}

/// Everything a request asks for. The default is that of `SamplingParams` in Python: greedy, 128 tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// The target transform.
    pub sampling: Sampling,
    /// Most tokens it may produce, at least 1.
    pub max_tokens: u32,
    /// Tokens it produces before anything but `max_tokens` and the context limit may end it, at most `max_tokens`: until then no
    /// end-of-text token and none of `stop_ids` can be drawn, and stop strings are text like any other.
    pub min_tokens: u32,
    /// Tokens that end it, beside the engine's end-of-text tokens.
    pub stop_ids: Vec<TokenId>,
    /// Byte strings that end it; needs the engine's vocabulary.
    pub stop_strings: Vec<Vec<u8>>,
    /// Treat end-of-text tokens like any other.
    pub ignore_eos: bool,
    /// `Some(n)`: score every token, and name the `n` likeliest ones beside it.
    pub logprobs: Option<u32>,
    /// Whether drafts may be verified for it. The text is the same either way.
    pub draft: bool,
    /// `Some(n)`: at most `n` drafts are verified for it in a step.
    pub max_drafts: Option<u32>,
    /// Whether tokens that are no text (end of text, padding, roles) are left out of its text.
    pub skip_special_tokens: bool,
    /// Whether what it ended with, a stop string or a stop token, is part of its text.
    pub include_stop: bool,
    /// Whether the caller edits its rows before they are drawn: no step is launched ahead of its results then.
    pub edited: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            sampling: Sampling {
                temperature: 0.0,
                ..Sampling::default()
            },
            max_tokens: 128,
            min_tokens: 0,
            stop_ids: Vec::new(),
            stop_strings: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            draft: true,
            max_drafts: None,
            skip_special_tokens: true,
            include_stop: false,
            edited: false,
        }
    }
}

// ---- where options come from ------------------------------------------------------------------------------------------

/// Where options are read from, by name and one by one. What the source does not have stays as it is; what is of another kind is
/// the source's to refuse, by the name of the option.
pub trait Source {
    /// Its refusals.
    type Error;
    /// A real number.
    fn number(&mut self, name: &'static str, into: &mut f32) -> std::result::Result<(), Self::Error>;
    /// An integer of at least 0.
    fn count(&mut self, name: &'static str, into: &mut u32) -> std::result::Result<(), Self::Error>;
    /// An integer of 64 bits.
    fn seed(&mut self, name: &'static str, into: &mut u64) -> std::result::Result<(), Self::Error>;
    /// A truth value.
    fn flag(&mut self, name: &'static str, into: &mut bool) -> std::result::Result<(), Self::Error>;
    /// An integer of at least 0, or nothing.
    fn maybe_count(&mut self, name: &'static str, into: &mut Option<u32>) -> std::result::Result<(), Self::Error>;
    /// Token ids.
    fn tokens(&mut self, name: &'static str, into: &mut Vec<TokenId>) -> std::result::Result<(), Self::Error>;
    /// Numbers by token id.
    fn biases(&mut self, name: &'static str, into: &mut Vec<(TokenId, f32)>) -> std::result::Result<(), Self::Error>;
    /// Texts, as bytes.
    fn texts(&mut self, name: &'static str, into: &mut Vec<Vec<u8>>) -> std::result::Result<(), Self::Error>;
}

impl Sampling {
    /// Reads what the source has; ranges are [`Self::validate`]'s to check.
    ///
    /// # Errors
    /// The source's.
    pub fn read<S: Source>(&mut self, source: &mut S) -> std::result::Result<(), S::Error> {
        source.number("temperature", &mut self.temperature)?;
        source.count("top_k", &mut self.top_k)?;
        source.number("top_p", &mut self.top_p)?;
        source.number("min_p", &mut self.min_p)?;
        source.number("repetition_penalty", &mut self.repetition_penalty)?;
        source.number("presence_penalty", &mut self.presence_penalty)?;
        source.number("frequency_penalty", &mut self.frequency_penalty)?;
        source.biases("logit_bias", &mut self.logit_bias)?;
        source.seed("seed", &mut self.seed)
    }
}

impl Params {
    /// Reads what the source has; ranges are [`Self::validate`]'s to check.
    ///
    /// # Errors
    /// The source's.
    pub fn read<S: Source>(&mut self, source: &mut S) -> std::result::Result<(), S::Error> {
        self.sampling.read(source)?;
        source.count("max_tokens", &mut self.max_tokens)?;
        source.count("min_tokens", &mut self.min_tokens)?;
        source.tokens("stop_token_ids", &mut self.stop_ids)?;
        source.texts("stop", &mut self.stop_strings)?;
        source.flag("ignore_eos", &mut self.ignore_eos)?;
        source.maybe_count("logprobs", &mut self.logprobs)?;
        source.flag("draft", &mut self.draft)?;
        source.maybe_count("max_drafts", &mut self.max_drafts)?;
        source.flag("skip_special_tokens", &mut self.skip_special_tokens)?;
        source.flag("include_stop_str_in_output", &mut self.include_stop)?;
        source.flag("edited", &mut self.edited)
    }
}

// ---- ranges -----------------------------------------------------------------------------------------------------------

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
        for (name, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            if !penalty.is_finite() {
                return refuse(name, penalty, "a finite number (0 is off)");
            }
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
}

impl Params {
    /// Checks every field against its documented domain; `vocab` is the width of the target's logits, `spelled` whether the bytes of
    /// its tokens are known.
    ///
    /// # Errors
    /// `InvalidArgument` naming the option.
    pub fn validate(&self, vocab: usize, spelled: bool) -> Result<()> {
        if let Some(bad) = self.stop_ids.iter().find(|token| token.0 as usize >= vocab) {
            let expected = format!("tokens in {}", indices(vocab));
            return refuse("stop_token_ids", format!("token {}", bad.0), expected);
        }
        self.sampling.validate(vocab)?;
        if self.max_tokens == 0 {
            return refuse("max_tokens", 0, "at least 1");
        }
        if self.min_tokens > self.max_tokens {
            let expected = format!("0..{} (max_tokens)", self.max_tokens);
            return refuse("min_tokens", self.min_tokens, expected);
        }
        if self.stop_strings.iter().any(Vec::is_empty) {
            return refuse("stop", "an empty string", "strings of at least one byte");
        }
        if !self.stop_strings.is_empty() && !spelled {
            let expected = "none, or an engine with a vocabulary";
            return refuse("stop", "strings for an engine without a vocabulary", expected);
        }
        if let Some(top) = self.logprobs.filter(|&top| top as usize > vocab) {
            return refuse("logprobs", top, format!("0..{vocab} (vocab_size)"));
        }
        Ok(())
    }

    /// Makes of valid options what drawing needs: biases in order, and the mask of a request with a prompt of so many tokens on an
    /// engine with these end-of-text tokens.
    pub fn settle(&mut self, prompt: usize, eos: &[TokenId]) {
        let sampling = &mut self.sampling;
        sampling.logit_bias.sort_unstable_by_key(|&(token, _)| token);
        if self.min_tokens > 0 {
            sampling.masked = [eos, &self.stop_ids].concat();
            sampling.masked.sort_unstable();
            sampling.masked.dedup();
            sampling.masked_before = prompt as u64 + u64::from(self.min_tokens);
        }
    }
}

// ---- needs ------------------------------------------------------------------------------------------------------------

impl Sampling {
    /// Whether the counts of [`History`] matter: something penalises.
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Whether any logit of the row for `position` is edited before the temperature.
    pub fn edits_logits(&self, position: u64) -> bool {
        self.needs_history() || !self.logit_bias.is_empty() || self.masks(position)
    }

    /// Whether part of the vocabulary is left out of the tempered distribution.
    pub fn filters(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }

    fn masks(&self, position: u64) -> bool {
        position < self.masked_before && !self.masked.is_empty()
    }
}

impl Params {
    /// Whether a draw needs every token before it: they are counted, or looked at by the caller.
    pub fn needs_text(&self) -> bool {
        self.edited || self.sampling.needs_history()
    }

    /// Whether drafts are verified for it at all.
    pub fn drafts(&self) -> bool {
        self.draft && self.max_drafts != Some(0)
    }

    /// Most tokens of its row in a step of rows of `block` tokens, the anchor counted.
    pub fn row(&self, block: u32) -> u32 {
        if !self.drafts() {
            return 1;
        }
        self.max_drafts.map_or(block, |most| block.min(most.saturating_add(1)))
    }

    /// Whether tokens are scored.
    pub fn scores(&self) -> bool {
        self.logprobs.is_some()
    }

    /// How many of the likeliest tokens are named beside each token.
    pub fn alternatives(&self) -> u32 {
        self.logprobs.unwrap_or(0)
    }
}

// ---- what they do to a row --------------------------------------------------------------------------------------------

impl Sampling {
    /// The penalised logit of a token that was seen `output` times in the output and, if that is zero, in the prompt.
    /// Each operation is rounded to f32 on its own, in this order.
    #[inline]
    fn penalise(&self, logit: f32, output: u32) -> f32 {
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

    /// Copies a row and edits it: masks, penalties, bias. Sparse: penalties read the raw logit, so their order does not matter, and a
    /// path token simply overwrites what the history wrote.
    pub(super) fn edit(
        &self,
        logits: &[f32],
        history: &History,
        path: &[TokenId],
        position: u64,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        out.clear();
        out.extend_from_slice(logits);
        if self.needs_history() {
            for &(token, output) in history.counts() {
                let Some(&logit) = logits.get(token.0 as usize) else {
                    return Err(not_a_column("history", token, logits.len()));
                };
                out[token.0 as usize] = self.penalise(logit, output);
            }
            for &token in path {
                let Some(&logit) = logits.get(token.0 as usize) else {
                    return Err(not_a_column("path", token, logits.len()));
                };
                let here = path.iter().filter(|&&t| t == token).count() as u32;
                out[token.0 as usize] = self.penalise(logit, history.output_count(token) + here);
            }
        }
        // Of -inf penalties and finite biases make -inf again: it is the same whether masks come first or last. What is no number in
        // a masked column stays none, and fails the row as it does anywhere else.
        let masked = if self.masks(position) {
            self.masked.as_slice()
        } else {
            &[]
        };
        let masked = masked.iter().map(|&token| ("stop_token_ids", token, f32::NEG_INFINITY));
        let biases = self.logit_bias.iter().map(|&(token, bias)| ("logit_bias", token, bias));
        for (name, token, added) in biases.chain(masked) {
            let Some(logit) = out.get_mut(token.0 as usize) else {
                return Err(not_a_column(name, token, logits.len()));
            };
            *logit += added;
        }
        Ok(())
    }
}

pub(super) fn not_a_column(name: &'static str, token: TokenId, columns: usize) -> Error {
    Error::InvalidArgument {
        name,
        got: format!("token {}", token.0),
        expected: format!("tokens in {}", indices(columns)),
    }
}
