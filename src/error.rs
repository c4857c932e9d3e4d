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
    /// Strides that let two heads of a view share elements.
    #[error(
        "{name}: strides {row_stride} (row) and {head_stride} (head) make heads of {dim} elements overlap"
    )]
    OverlappingRows {
        /// The array as its caller knows it.
        name: &'static str,
        /// Elements from one row to the next.
        row_stride: usize,
        /// Elements from one head to the next.
        head_stride: usize,
        /// Elements per head.
        dim: usize,
    },
}

/// Result of the core.
pub type Result<T> = std::result::Result<T, Error>;
