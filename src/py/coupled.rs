//! `dflash_rs._core.couple`.

use numpy::ndarray::{Ix1, Ix3};
use numpy::{PyArray1, PyArray3, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::arrays::{Count, array};
use super::errors::invalid;
use crate::draft::{Draw, couple as reorder};
use crate::error::Error;

type Candidates<'py> = (Bound<'py, PyArray3<i64>>, Bound<'py, PyArray3<f32>>);

/// The `k` candidates of every place that the target's own random numbers favour, i64 and f32 `[n, depth, k]`, of tokens i64 and probabilities
/// f32 `[n, depth, K]`, falling; positions i64 `[n]` are those of the first places.
#[pyfunction]
#[pyo3(text_signature = "(tokens, probabilities, seeds, positions, temperatures, k)")]
pub fn couple<'py>(
    py: Python<'py>,
    tokens: &Bound<'py, PyAny>,
    probabilities: &Bound<'py, PyAny>,
    seeds: &Bound<'py, PyAny>,
    positions: &Bound<'py, PyAny>,
    temperatures: &Bound<'py, PyAny>,
    k: Count,
) -> PyResult<Candidates<'py>> {
    let tokens = array::<i64, Ix3>("tokens", tokens, "[n, depth, K]")?;
    let probabilities = array::<f32, Ix3>("probabilities", probabilities, "[n, depth, K]")?;
    let seeds = array::<u64, Ix1>("seeds", seeds, "[n]")?;
    let positions = array::<i64, Ix1>("positions", positions, "[n]")?;
    let temperatures = array::<f32, Ix1>("temperatures", temperatures, "[n]")?;
    let (rows, depth, from) = (tokens.shape()[0], tokens.shape()[1], tokens.shape()[2]);
    let length = |name, got, expected| {
        (got == expected)
            .then_some(())
            .ok_or(Error::Length { name, got, expected })
    };
    length("probabilities", probabilities.len(), tokens.len())?;
    length("seeds", seeds.len(), rows)?;
    length("positions", positions.len(), rows)?;
    length("temperatures", temperatures.len(), rows)?;
    let k: usize = k.count("k")?;
    if !(1..=from).contains(&k) {
        return Err(invalid(
            "k",
            k.to_string(),
            format!("1..{from}, the candidates of a place"),
        ));
    }
    let (tokens, probabilities) = (tokens.as_slice()?, probabilities.as_slice()?);
    let (seeds, positions, temperatures) = (seeds.as_slice()?, positions.as_slice()?, temperatures.as_slice()?);
    let mut picked = Vec::with_capacity(rows * depth * k);
    let mut chances = Vec::with_capacity(rows * depth * k);
    let mut place = Vec::with_capacity(from);
    for (at, (tokens, probabilities)) in tokens
        .chunks_exact(from)
        .zip(probabilities.chunks_exact(from))
        .enumerate()
    {
        let (row, depth) = (at / depth, at % depth);
        place.clear();
        place.extend(tokens.iter().copied().zip(probabilities.iter().copied()));
        // Greedy choices have no numbers.
        if temperatures[row] > 0.0 {
            let draw = Draw {
                seed: seeds[row],
                position: positions[row] as u64 + depth as u64,
                temperature: temperatures[row],
            };
            reorder(&draw, &mut place, k);
        }
        picked.extend(place[..k].iter().map(|candidate| candidate.0));
        chances.extend(place[..k].iter().map(|candidate| candidate.1));
    }
    let shape = [rows, depth, k];
    let picked = PyArray1::from_vec(py, picked).reshape(shape)?;
    Ok((picked, PyArray1::from_vec(py, chances).reshape(shape)?))
}
