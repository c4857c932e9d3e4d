//! Verification on whole-batch NumPy arrays; the GIL is released while the core works.

use numpy::ndarray::{Ix1, Ix2, Ix3};
use numpy::{Element, IntoPyArray, PyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::{Error, Result};
use crate::py::arrays::{Count, Given, array, describe, holds, shaped};
use crate::py::errors::{invalid, token_ids};
use crate::py::params;
use crate::rng::{Domain, Stream, gumbel_of_word};
use crate::types::TokenId;
use crate::verify::{self, GivenCoins, History, KeyedCoins, Sampler, Verdict, walk_chain};

type Accepted<'py> = (Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i64>>);
type Scored<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f32>>);

fn at_row<T>(row: usize, result: Result<T>) -> Result<T> {
    result.map_err(|source| match source {
        Error::AtRow { .. } => source,
        source => Error::AtRow {
            row,
            source: Box::new(source),
        },
    })
}

/// Walks `R` chains: `drafts` i64 `[R, g]`, `sampled` i64 `[R, g + 1]`, `lengths` i64 `[R]` or `None`.
#[pyfunction]
#[pyo3(signature = (drafts, sampled, lengths = None))]
pub fn walk<'py>(
    py: Python<'py>,
    drafts: &Bound<'py, PyAny>,
    sampled: &Bound<'py, PyAny>,
    lengths: Option<&Bound<'py, PyAny>>,
) -> PyResult<Accepted<'py>> {
    let drafts = array::<i64, Ix2>("drafts", drafts, "[R, g]")?;
    let sampled = array::<i64, Ix2>("sampled", sampled, "[R, g + 1]")?;
    let [rows, g] = [drafts.shape()[0], drafts.shape()[1]];
    shaped("sampled", sampled.shape(), &[rows, g + 1], "[R, g + 1]")?;
    let lengths = match lengths {
        Some(lengths) => {
            let lengths = array::<i64, Ix1>("lengths", lengths, "[R]")?;
            shaped("lengths", lengths.shape(), &[rows], "[R]")?;
            lengths.as_slice()?.to_vec()
        }
        None => vec![g as i64; rows],
    };
    if let Some(bad) = lengths.iter().find(|n| !(0..=g as i64).contains(n)) {
        return Err(invalid("lengths", bad.to_string(), format!("0..{g} (g)")));
    }
    let (drafts, sampled) = (drafts.as_slice()?, sampled.as_slice()?);
    let (accepted, bonus) = py.detach(|| -> PyResult<(Vec<i32>, Vec<i64>)> {
        let mut walks = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        for (row, &length) in lengths.iter().enumerate() {
            let length = length as usize;
            let drafts = token_ids("drafts", &drafts[row * g..row * g + length])?;
            let sampled = token_ids("sampled", &sampled[row * (g + 1)..row * (g + 1) + length + 1])?;
            let walk = walk_chain(&drafts, |i| Ok(sampled[i]))?;
            walks.0.push(walk.accepted as i32);
            walks.1.push(i64::from(walk.bonus.0));
        }
        Ok(walks)
    })?;
    Ok((accepted.into_pyarray(py), bonus.into_pyarray(py)))
}

#[derive(Clone, Copy)]
enum Level {
    Token,
    Block,
}

// Both verifiers take keyed coins (seeds + round_starts) or given ones (accept_coins + last_coins), never a mixture.
enum Coins {
    Keyed(Vec<u64>, Vec<u64>),
    Given(Vec<f64>, Vec<f64>),
}

struct CoinArguments<'a, 'py> {
    seeds: Option<&'a Bound<'py, PyAny>>,
    round_starts: Option<&'a Bound<'py, PyAny>>,
    accept_coins: Option<&'a Bound<'py, PyAny>>,
    last_coins: Option<&'a Bound<'py, PyAny>>,
}

impl CoinArguments<'_, '_> {
    fn check(&self, rows: usize, g: usize) -> PyResult<Coins> {
        match (self.seeds, self.round_starts, self.accept_coins, self.last_coins) {
            (Some(seeds), Some(starts), None, None) => {
                let seeds = array::<u64, Ix1>("seeds", seeds, "[R]")?;
                let starts = array::<u64, Ix1>("round_starts", starts, "[R]")?;
                shaped("seeds", seeds.shape(), &[rows], "[R]")?;
                shaped("round_starts", starts.shape(), &[rows], "[R]")?;
                Ok(Coins::Keyed(seeds.as_slice()?.to_vec(), starts.as_slice()?.to_vec()))
            }
            (None, None, Some(accept), Some(last)) => {
                let accept = array::<f64, Ix2>("accept_coins", accept, "[R, g]")?;
                let last = array::<f64, Ix1>("last_coins", last, "[R]")?;
                shaped("accept_coins", accept.shape(), &[rows, g], "[R, g]")?;
                shaped("last_coins", last.shape(), &[rows], "[R]")?;
                Ok(Coins::Given(accept.as_slice()?.to_vec(), last.as_slice()?.to_vec()))
            }
            (seeds, starts, accept, last) => {
                let names = ["seeds", "round_starts", "accept_coins", "last_coins"];
                let passed: Vec<&str> = names
                    .into_iter()
                    .zip([seeds, starts, accept, last])
                    .filter_map(|(name, value)| value.map(|_| name))
                    .collect();
                let got = if passed.is_empty() {
                    "none of them".into()
                } else {
                    passed.join(", ")
                };
                Err(invalid(
                    "coins",
                    got,
                    "seeds and round_starts, or accept_coins and last_coins",
                ))
            }
        }
    }
}

fn ratio<'py, T: Element + Copy + Into<f64> + Sync>(
    py: Python<'py>,
    level: Level,
    p: &Bound<'py, PyAny>,
    q: &Bound<'py, PyAny>,
    drafts: &Bound<'py, PyAny>,
    coins: CoinArguments,
) -> PyResult<Accepted<'py>> {
    let p = array::<T, Ix3>("p", p, "[R, g + 1, V]")?;
    let q = array::<T, Ix3>("q", q, "[R, g, V], the dtype of p")?;
    let drafts = array::<i64, Ix2>("drafts", drafts, "[R, g]")?;
    let [rows, g] = [drafts.shape()[0], drafts.shape()[1]];
    let vocab = p.shape()[2];
    shaped("p", p.shape(), &[rows, g + 1, vocab], "[R, g + 1, V] for drafts [R, g]")?;
    shaped(
        "q",
        q.shape(),
        &[rows, g, vocab],
        "[R, g, V] for drafts [R, g] and p [R, g + 1, V]",
    )?;
    let coins = coins.check(rows, g)?;
    let ids = token_ids("drafts", drafts.as_slice()?)?;
    let (p, q) = (p.as_slice()?, q.as_slice()?);
    let verdicts = py.detach(|| {
        (0..rows)
            .map(|row| {
                let p = &p[row * (g + 1) * vocab..(row + 1) * (g + 1) * vocab];
                let q = &q[row * g * vocab..(row + 1) * g * vocab];
                let x = &ids[row * g..(row + 1) * g];
                let verdict = match &coins {
                    Coins::Keyed(seeds, starts) => {
                        verdict(level, p, q, vocab, x, &mut KeyedCoins::new(seeds[row], starts[row]))
                    }
                    Coins::Given(accept, last) => GivenCoins::new(&accept[row * g..(row + 1) * g], last[row], g)
                        .and_then(|mut coins| verdict(level, p, q, vocab, x, &mut coins)),
                };
                // The core counts the rows of one request; here the request comes first.
                verdict.map_err(|source| Error::AtRequest {
                    request: row,
                    source: Box::new(source),
                })
            })
            .collect::<Result<Vec<Verdict>>>()
    })?;
    let accepted: Vec<i32> = verdicts.iter().map(|v| v.accepted as i32).collect();
    let last: Vec<i64> = verdicts.iter().map(|v| i64::from(v.last.0)).collect();
    Ok((accepted.into_pyarray(py), last.into_pyarray(py)))
}

fn verdict<T: Copy + Into<f64>>(
    level: Level,
    p: &[T],
    q: &[T],
    vocab: usize,
    drafts: &[TokenId],
    coins: &mut impl verify::Coins,
) -> Result<Verdict> {
    match level {
        Level::Token => verify::token::verify(p, q, vocab, drafts, coins),
        Level::Block => verify::block::verify(p, q, vocab, drafts, coins),
    }
}

macro_rules! ratio_function {
    ($(#[$doc:meta])* $name:ident, $level:expr) => {
        $(#[$doc])*
        #[pyfunction]
        #[pyo3(signature = (p, q, drafts, *, seeds = None, round_starts = None, accept_coins = None, last_coins = None))]
        #[allow(clippy::too_many_arguments)] // keyword arguments of Python
        pub fn $name<'py>(
            py: Python<'py>,
            p: &Bound<'py, PyAny>,
            q: &Bound<'py, PyAny>,
            drafts: &Bound<'py, PyAny>,
            seeds: Option<&Bound<'py, PyAny>>,
            round_starts: Option<&Bound<'py, PyAny>>,
            accept_coins: Option<&Bound<'py, PyAny>>,
            last_coins: Option<&Bound<'py, PyAny>>,
        ) -> PyResult<Accepted<'py>> {
            // First, because whether the others have a leading R follows from it.
            array::<i64, Ix2>("drafts", drafts, "[R, g]")?;
            let coins = CoinArguments { seeds, round_starts, accept_coins, last_coins };
            if holds::<f64>(p) {
                return ratio::<f64>(py, $level, p, q, drafts, coins);
            }
            if holds::<f32>(p) {
                return ratio::<f32>(py, $level, p, q, drafts, coins);
            }
            Err(invalid("p", describe(p), "a C-contiguous float32 or float64 array of shape [R, g + 1, V]"))
        }
    };
}

ratio_function!(
    /// Token-level verification of sampled drafts.
    verify_token,
    Level::Token
);
ratio_function!(
    /// Block verification of sampled drafts.
    verify_block,
    Level::Block
);

/// Draws the target's token for every row of `logits`, f32 `[N, V]`; `positions` u64 `[N]`, `seeds` u64 `[N]`; `transform` a dict of
/// options by name.
#[pyfunction]
#[pyo3(signature = (
    logits, positions, seeds, transform, *, prompt = Given::new(Vec::new()), output = Given::new(Vec::new()), paths = None,
), text_signature = "(logits, positions, seeds, transform, *, prompt=(), output=(), paths=None)")]
#[allow(clippy::too_many_arguments)] // arguments of Python
pub fn sample_rows<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    positions: &Bound<'py, PyAny>,
    seeds: &Bound<'py, PyAny>,
    transform: Given<Bound<'py, PyDict>>,
    prompt: Given<Vec<i64>>,
    output: Given<Vec<i64>>,
    paths: Option<Given<Vec<Vec<i64>>>>,
) -> PyResult<Scored<'py>> {
    const TOKENS: &str = "a list of nothing but token ids";
    let mut sampling = params::transform(transform)?;
    let (prompt, output) = (prompt.of("prompt", TOKENS)?, output.of("output", TOKENS)?);
    let paths = paths
        .map(|paths| paths.of("paths", "a list of nothing but token ids for every row"))
        .transpose()?;
    let logits = array::<f32, Ix2>("logits", logits, "[N, V]")?;
    let positions = array::<u64, Ix1>("positions", positions, "[N]")?;
    let seeds = array::<u64, Ix1>("seeds", seeds, "[N]")?;
    let [rows, vocab] = [logits.shape()[0], logits.shape()[1]];
    shaped("positions", positions.shape(), &[rows], "[N]")?;
    shaped("seeds", seeds.shape(), &[rows], "[N]")?;
    let paths = match paths {
        Some(paths) if paths.len() != rows => {
            return Err(Error::Length {
                name: "paths",
                got: paths.len(),
                expected: rows,
            }
            .into());
        }
        Some(paths) => paths
            .iter()
            .map(|path| token_ids("paths", path))
            .collect::<PyResult<Vec<_>>>()?,
        None => vec![Vec::new(); rows],
    };
    let mut history = History::new(&token_ids("prompt", &prompt)?);
    token_ids("output", &output)?
        .into_iter()
        .for_each(|token| history.push(token));
    sampling.validate(vocab)?;
    let (logits, positions, seeds) = (logits.as_slice()?, positions.as_slice()?, seeds.as_slice()?);
    let (tokens, scores) = py.detach(|| -> Result<(Vec<i64>, Vec<f32>)> {
        let mut sampler = Sampler::new();
        let mut out = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        for row in 0..rows {
            sampling.seed = seeds[row];
            let logits = &logits[row * vocab..(row + 1) * vocab];
            let drawn = at_row(
                row,
                sampler.sample_row(logits, &sampling, &history, &paths[row], positions[row]),
            )?;
            out.0.push(i64::from(drawn.token.0));
            out.1.push(drawn.logprob);
        }
        Ok(out)
    })?;
    Ok((tokens.into_pyarray(py), scores.into_pyarray(py)))
}

/// The `n` likeliest tokens of one raw row, f32 `[V]`, with their log-softmax.
#[pyfunction]
pub fn top_logprobs<'py>(py: Python<'py>, logits: &Bound<'py, PyAny>, n: Count) -> PyResult<Scored<'py>> {
    let n = n.count("n")?;
    let logits = array::<f32, Ix1>("logits", logits, "[V]")?;
    let best = verify::top_logprobs(logits.as_slice()?, n)?;
    let tokens: Vec<i64> = best.iter().map(|(token, _)| i64::from(token.0)).collect();
    let scores: Vec<f32> = best.iter().map(|&(_, score)| score).collect();
    Ok((tokens.into_pyarray(py), scores.into_pyarray(py)))
}

/// The Gumbel numbers of columns `0..columns`, f32.
#[pyfunction]
#[pyo3(signature = (seed, position, columns, domain = Given::new("draw".into())),
       text_signature = "(seed, position, columns, domain='draw')")]
pub fn gumbel<'py>(
    py: Python<'py>,
    seed: Count,
    position: Count,
    columns: Count,
    domain: Given<String>,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    // Far beyond every vocabulary.
    const MOST_COLUMNS: u32 = 1 << 24;
    const DOMAINS: &str = "draw, accept, residual or draft";
    let (seed, position, columns) = (
        seed.count("seed")?,
        position.count("position")?,
        columns.count::<u32>("columns")?,
    );
    if columns > MOST_COLUMNS {
        return Err(invalid(
            "columns",
            columns.to_string(),
            format!("an integer in 0..{MOST_COLUMNS}"),
        ));
    }
    let domain = match domain.of("domain", DOMAINS)?.as_str() {
        "draw" => Domain::Draw,
        "accept" => Domain::Accept,
        "residual" => Domain::Residual,
        "draft" => Domain::Draft,
        other => return Err(invalid("domain", other, DOMAINS)),
    };
    let numbers: Vec<f32> = py.detach(|| {
        let mut words = vec![0; columns as usize];
        Stream::new(seed, position, domain).fill_words(0, &mut words);
        words.into_iter().map(gumbel_of_word).collect()
    });
    Ok(numbers.into_pyarray(py))
}
