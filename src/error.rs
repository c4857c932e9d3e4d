//! The one error type of the core. It carries numbers, not prose about Python.

/// Whatever the core refuses, with what it got and what it expected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A parameter outside its documented domain.
    #[error("{name}: got {got}, expected {expected}")]
    InvalidArgument {
        /// The argument as its caller knows it.
        name: &'static str,
        /// What was passed.
        got: String,
        /// What is accepted.
        expected: String,
    },
    /// An array of the wrong length.
    #[error("{name}: got {got} elements, expected {expected}")]
    Length {
        /// The array as its caller knows it.
        name: &'static str,
        /// Elements passed.
        got: usize,
        /// Elements needed.
        expected: usize,
    },
    /// A page that nobody holds was released or shared: a double free.
    #[error("page {page}: not held by anyone (the pool has {total} pages)")]
    PageNotHeld {
        /// The page.
        page: u32,
        /// Pages in the pool.
        total: usize,
    },
    /// A row whose tenant has left.
    #[error("row {row}: generation {generation} has left")]
    StaleRow {
        /// The row.
        row: u32,
        /// The generation asked for.
        generation: u32,
    },
    /// A step would reach beyond what its row owns or can own.
    #[error("KV slots up to {end} needed, the row has {owned}")]
    SlotsNotOwned {
        /// First slot beyond the step.
        end: u32,
        /// Slots of the row.
        owned: u32,
    },
    /// More tokens were kept than the step verified.
    #[error("{accepted} tokens accepted where the step wrote {drafted}")]
    AcceptedExceedsDrafted {
        /// Tokens kept.
        accepted: u32,
        /// Tokens written.
        drafted: u32,
    },
    /// A request that could not finish even if it had the whole pool to itself.
    #[error(
        "prompt of {prompt} tokens with max_tokens {max_tokens} needs {needed} pages of {page_size} slots, the pool has \
         {total}: shorten the prompt, lower max_tokens or raise num_pages"
    )]
    OutOfPages {
        /// Prompt tokens.
        prompt: usize,
        /// Output tokens allowed.
        max_tokens: usize,
        /// Pages its longest output needs.
        needed: usize,
        /// Slots per page.
        page_size: usize,
        /// Pages in the pool.
        total: usize,
    },
    /// A stage was called out of turn.
    #[error("step {step}: {problem}")]
    OutOfTurn {
        /// The step named by the call.
        step: u64,
        /// What was wrong, and what to do.
        problem: String,
    },
}

/// Result of the core.
pub type Result<T> = std::result::Result<T, Error>;
