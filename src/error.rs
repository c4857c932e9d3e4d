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
    /// A logit that cannot be sampled from.
    #[error("logits: got {value} at column {column}, expected a finite number or -inf")]
    BadLogit {
        /// Vocabulary column of the first offender.
        column: usize,
        /// `"NaN"` or `"+inf"`.
        value: &'static str,
    },
    /// A row that forbids every token.
    #[error("logits: got {columns} columns that are all -inf, expected at least one finite number")]
    EmptyRow {
        /// Vocabulary size of the row.
        columns: usize,
    },
    /// An error of one row of a batch.
    #[error("row {row}: {source}")]
    AtRow {
        /// Index of the row in the arrays passed.
        row: usize,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// More drafts accepted than were drafted.
    #[error("accepted: got {accepted} accepted drafts of {drafted}, expected at most {drafted}")]
    AcceptedExceedsDrafted {
        /// Drafts accepted.
        accepted: u32,
        /// Drafts verified.
        drafted: u32,
    },
}

/// Result of the core.
pub type Result<T> = std::result::Result<T, Error>;
