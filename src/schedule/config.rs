//! Sizes of an engine, and what they have to be.

use crate::error::{Error, Result, indices};
use crate::types::TokenId;

/// Sizes of an engine. All are at least 1 unless said otherwise.
#[derive(Clone, Debug)]
pub struct Config {
    /// Pages of the KV pool.
    pub num_pages: usize,
    /// KV slots per page.
    pub page_size: usize,
    /// Most requests that run at a time.
    pub max_running: usize,
    /// Most tokens a request may have, prompt and output together.
    pub max_context: usize,
    /// Tokens of a block, the anchor counted; 1 never drafts.
    pub block_size: usize,
    /// Most tokens of a step, prefill and blocks together; at least `max_running`.
    pub max_batch_tokens: usize,
    /// Columns of the target's logits; token ids are below.
    pub vocab_size: usize,
    /// Tokens that end a text.
    pub eos_ids: Vec<TokenId>,
    /// Reuse the KV of equal prefixes.
    pub prefix_cache: bool,
    /// `None` for a target all of whose memory of a text is in pages. `Some(n)`: it keeps state per request, of which `n` copies may be
    /// kept at the ends of cached pages; prefix hits end at these, so with 0 nothing is reused. Needs `depth` 0.
    pub state_checkpoints: Option<usize>,
    /// Steps that may be launched and unresolved while the next is planned: 0, or 1 for the overlapped pipeline.
    pub depth: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            num_pages: 1024,
            page_size: 16,
            max_running: 32,
            max_context: 2048,
            block_size: 8,
            max_batch_tokens: 2048,
            vocab_size: 32_000,
            eos_ids: Vec::new(),
            prefix_cache: true,
            state_checkpoints: None,
            depth: 0,
        }
    }
}

impl Config {
    pub(super) fn validate(&self) -> Result<()> {
        let most = i32::MAX as usize / 4;
        for (name, got) in [
            ("num_pages", self.num_pages),
            ("page_size", self.page_size),
            ("max_running", self.max_running),
            ("max_context", self.max_context),
            ("block_size", self.block_size),
            ("max_batch_tokens", self.max_batch_tokens),
            ("vocab_size", self.vocab_size),
        ] {
            if !(1..=most).contains(&got) {
                let expected = format!("1..{most}");
                return Err(Error::InvalidArgument {
                    name,
                    got: got.to_string(),
                    expected,
                });
            }
        }
        if self.max_batch_tokens < self.max_running {
            return Err(Error::InvalidArgument {
                name: "max_batch_tokens",
                got: self.max_batch_tokens.to_string(),
                expected: format!("at least max_running = {}", self.max_running),
            });
        }
        if let Some(copies) = self.state_checkpoints.filter(|&copies| copies > most) {
            return Err(Error::InvalidArgument {
                name: "state_checkpoints",
                got: copies.to_string(),
                expected: format!("0..{most}"),
            });
        }
        if self.depth > 1 {
            let got = self.depth.to_string();
            return Err(Error::InvalidArgument {
                name: "depth",
                got,
                expected: "0 or 1".into(),
            });
        }
        if self.depth > 0 && self.state_checkpoints.is_some() {
            // A step that is called off would have moved the states of the one launched after it.
            return Err(Error::InvalidArgument {
                name: "depth",
                got: self.depth.to_string(),
                expected: "0 with state_checkpoints".into(),
            });
        }
        check_tokens("eos_ids", &self.eos_ids, self.vocab_size)
    }

    /// Slots a row may need: the whole context, what an unresolved step may have added, a block, and page rounding.
    pub(super) fn row_slots(&self) -> usize {
        self.max_context + (self.depth + 1) * self.block_size + self.page_size - 1
    }
}

/// Refuses token ids outside the vocabulary.
pub(crate) fn check_tokens(name: &'static str, tokens: &[TokenId], vocab_size: usize) -> Result<()> {
    match tokens.iter().find(|token| token.0 as usize >= vocab_size) {
        None => Ok(()),
        Some(token) => Err(Error::InvalidArgument {
            name,
            got: format!("token {}", token.0),
            expected: format!("tokens in {}", indices(vocab_size)),
        }),
    }
}
