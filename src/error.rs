//! The one error type of the core. It carries numbers, not prose about Python.
//!
//! Integers are expected in `0..31`, both ends included; real numbers in an interval, `[0, 1)`. Whatever was passed, it is shown in a line.

use std::borrow::Cow;

/// The indices of `count` things, as messages write them.
pub(crate) fn indices(count: usize) -> String {
    match count.checked_sub(1) {
        Some(last) => format!("0..{last}"),
        None => "none, where there are none".into(),
    }
}

/// What was passed, cut to what fits into a message.
fn short(got: &str) -> Cow<'_, str> {
    const LONG: usize = 100;
    match got.char_indices().nth(LONG) {
        Some((end, _)) => format!("{}...", &got[..end]).into(),
        None => got.into(),
    }
}

/// Whatever the core refuses, with what it got and what it expected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A parameter outside its documented domain.
    #[error("{name}: got {}, expected {expected}", short(got))]
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
    /// A request that could not finish even if it had the whole pool to itself.
    #[error(
        "prompt: got {prompt} tokens with max_tokens {max_tokens}, {needed} pages of {page_size} slots, expected at most the pool's \
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
    /// More pages were asked for than are free.
    #[error("{needed} pages needed, {free} of {total} are free")]
    PoolExhausted {
        /// Pages asked for.
        needed: usize,
        /// Free pages.
        free: usize,
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
    /// A logit that cannot be sampled from.
    #[error("logits: got {value} at column {column}, expected a finite number or -inf")]
    BadLogit {
        /// Vocabulary column of the first offender.
        column: usize,
        /// `"NaN"` or `"+inf"`.
        value: &'static str,
    },
    /// A row that a device could not draw from; it does not say at which column.
    #[error("logits: got {got}, expected a finite number or -inf in every column")]
    RowFailed {
        /// What stood in its way.
        got: &'static str,
    },
    /// A row that forbids every token.
    #[error("logits: got {columns} columns that are all -inf, expected at least one finite number")]
    EmptyRow {
        /// Vocabulary size of the row.
        columns: usize,
    },
    /// A row that whoever edited it left no token in.
    #[error("{why}")]
    NoToken {
        /// In their own words.
        why: String,
    },
    /// An error of one row of a batch.
    #[error("row {row}: {source}")]
    AtRow {
        /// Index of the row in the arrays passed.
        row: usize,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// An error of one request of a batch.
    #[error("request {request}, {source}")]
    AtRequest {
        /// Index of the request in the arrays passed.
        request: usize,
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
    /// A device kept other drafts than the core.
    #[error("accepted[{row}]: the device kept {there} drafts, the core {here}; this is a defect")]
    WalksDiffer {
        /// The row of the step.
        row: usize,
        /// Drafts that the device kept.
        there: i32,
        /// Drafts that the core keeps.
        here: i32,
    },
    /// Strides that let two heads of a view share elements.
    #[error("{name}: strides {row_stride} (row) and {head_stride} (head) make heads of {dim} elements overlap")]
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
    /// The address of an array with elements is zero.
    #[error("{name}: null pointer, expected the address of {elements} elements")]
    NullPointer {
        /// The array as its caller knows it.
        name: &'static str,
        /// Elements that would be touched.
        elements: usize,
    },
    /// An address that no element of the type can have.
    #[error("{name}: address {address:#x} is not aligned to {alignment} bytes")]
    MisalignedPointer {
        /// The array as its caller knows it.
        name: &'static str,
        /// The address.
        address: usize,
        /// Bytes.
        alignment: usize,
    },
    /// An array that is written shares memory with another one.
    #[error("{name}: overlaps {other}, expected memory of its own")]
    AliasedPointer {
        /// The array that is written.
        name: &'static str,
        /// The array it shares memory with.
        other: &'static str,
    },
    /// The kernels were left out of this build.
    #[error(
        "CUDA kernels: got a build without any, expected them compiled in: install nvcc and build again (docs/guide.md, \
         CUDA kernels), or use device='cpu'"
    )]
    NoKernels,
    /// The driver library cannot be used.
    #[error(
        "CUDA driver: got {got}, expected libcuda.so.1 of CUDA {expected} or newer: install or update NVIDIA's driver"
    )]
    NoDriver {
        /// What was found instead, and where.
        got: String,
        /// Oldest version that runs these kernels.
        expected: String,
    },
    /// The driver library lacks a function.
    #[error(
        "CUDA driver: got one of CUDA {version} without {symbol}, expected CUDA {expected} or newer: update NVIDIA's driver"
    )]
    NoSymbol {
        /// The function.
        symbol: &'static str,
        /// The driver's own version.
        version: String,
        /// Oldest version that runs these kernels.
        expected: String,
    },
    /// Nothing in the fatbin runs on the current device.
    #[error(
        "CUDA device: got {device}, an sm_{major}{minor}, expected one that runs code for {built}: build again with \
         DFLASH_CUDA_ARCHS={major}{minor}, or use device='cpu'"
    )]
    UnsupportedDevice {
        /// The device's name.
        device: String,
        /// Compute capability.
        major: i32,
        /// Compute capability.
        minor: i32,
        /// What was compiled.
        built: &'static str,
    },
    /// A kernel whose parameters are not what this crate would pass.
    #[error(
        "kernel {kernel}: takes {got} bytes of parameters, expected {expected}: the build is inconsistent, clean and build again"
    )]
    KernelParameters {
        /// The kernel.
        kernel: String,
        /// Bytes it takes.
        got: usize,
        /// Bytes that would be passed.
        expected: usize,
    },
    /// A call that the driver refused.
    #[error("{call}: the CUDA driver answered {name} ({code}), {text}")]
    Driver {
        /// The function, and what for.
        call: String,
        /// CUresult.
        code: i32,
        /// Its name.
        name: String,
        /// The driver's explanation.
        text: String,
    },
}

/// Result of the core.
pub type Result<T> = std::result::Result<T, Error>;
