//! Bookkeeping for a serving engine that keeps its own requests: one crossing per step, no Python loop over the batch.

use numpy::{PyArray1, PyArrayMethods, PyReadwriteArray1, PyUntypedArrayMethods, dtype};
use pyo3::exceptions::PyAttributeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyString};

use crate::kv::room;
use crate::py::arrays::{Given, describe, shown};
use crate::py::errors::invalid;

fn writable<'py, T: numpy::Element>(
    name: &'static str,
    object: &Bound<'py, PyAny>,
    rows: usize,
) -> PyResult<PyReadwriteArray1<'py, T>> {
    let refuse = || {
        let kind = dtype::<T>(object.py());
        let expected = format!("a writable, contiguous {kind} array of at least {rows} elements");
        invalid(name, describe(object), expected)
    };
    let array = object.cast::<PyArray1<T>>().map_err(|_| refuse())?;
    if !array.is_contiguous() || array.len() < rows {
        return Err(refuse());
    }
    array.try_readwrite().map_err(|_| refuse())
}

/// `object.<name>` of a request; what has none is no request.
fn attribute<'py>(row: usize, object: &Bound<'py, PyAny>, name: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
    object.getattr(name).map_err(|error| {
        if !error.is_instance_of::<PyAttributeError>(object.py()) {
            return error;
        }
        let got = format!("{} without {name} for request {row}", describe(object));
        invalid(
            "requests",
            got,
            "objects with kv.kv_committed_len and kv.kv_allocated_len",
        )
    })
}

/// `requests[row].kv.<name>`, a number of slots.
fn length(row: usize, kv: &Bound<'_, PyAny>, name: &Bound<'_, PyString>) -> PyResult<i32> {
    let value = attribute(row, kv, name)?;
    value.extract().ok().filter(|n| *n >= 0).ok_or_else(|| {
        invalid(
            "requests",
            format!("{} for kv.{name} of request {row}", shown(&value)),
            "slots in 0..2147483647",
        )
    })
}

/// Reads each request's `kv.kv_committed_len` and `kv.kv_allocated_len`, and says what each must own before the next step.
#[pyfunction]
#[pyo3(signature = (requests, ahead, page_size, committed, allocated, next))]
pub fn plan_decode(
    requests: &Bound<'_, PyAny>,
    ahead: Given<i64>,
    page_size: Given<i64>,
    committed: &Bound<'_, PyAny>,
    allocated: &Bound<'_, PyAny>,
    next: &Bound<'_, PyAny>,
) -> PyResult<(u64, u64, u64)> {
    let py = requests.py();
    let requests = requests
        .cast::<PyList>()
        .map_err(|_| invalid("requests", describe(requests), "a list"))?;
    let within = |name, value: Given<i64>, least: i64| {
        let expected = format!("an integer in {least}..2147483647");
        let value = value.of(name, &expected)?;
        i32::try_from(value)
            .ok()
            .filter(|n| i64::from(*n) >= least)
            .map(|n| n as usize)
            .ok_or_else(|| invalid(name, value.to_string(), expected))
    };
    let (ahead, page_size) = (within("ahead", ahead, 0)?, within("page_size", page_size, 1)?);
    let rows = requests.len();
    let mut committed = writable::<i64>("committed", committed, rows)?;
    let mut allocated = writable::<i32>("allocated", allocated, rows)?;
    let mut next = writable::<i32>("next", next, rows)?;
    let (committed, allocated, next) = (
        committed.as_slice_mut()?,
        allocated.as_slice_mut()?,
        next.as_slice_mut()?,
    );
    let (mut missing, mut committed_sum, mut next_sum) = (0, 0, 0);
    for (row, request) in requests.iter().enumerate() {
        let kv = attribute(row, &request, intern!(py, "kv"))?;
        let known = length(row, &kv, intern!(py, "kv_committed_len"))?;
        let owned = length(row, &kv, intern!(py, "kv_allocated_len"))?;
        let wanted = room(known as usize, owned as usize, ahead, page_size);
        committed[row] = i64::from(known);
        allocated[row] = owned;
        next[row] = i32::try_from(wanted)
            .map_err(|_| invalid("requests", format!("{wanted} for request {row}"), "at most 2147483647"))?;
        missing += wanted as u64 - owned as u64;
        committed_sum += known as u64;
        next_sum += wanted as u64;
    }
    Ok((missing, committed_sum, next_sum))
}
