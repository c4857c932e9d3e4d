//! Bookkeeping for a serving engine that keeps its own requests: one crossing per step, no Python loop over the batch.

use numpy::{PyArray1, PyArrayMethods, PyReadwriteArray1, PyUntypedArrayMethods, dtype};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::kv::room;
use crate::py::arrays::describe;
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

/// Reads each request's `kv.kv_committed_len` and `kv.kv_allocated_len`, and says what each must own before the next step.
#[pyfunction]
#[pyo3(signature = (requests, ahead, page_size, committed, allocated, next))]
pub fn plan_decode(
    requests: &Bound<'_, PyList>,
    ahead: usize,
    page_size: usize,
    committed: &Bound<'_, PyAny>,
    allocated: &Bound<'_, PyAny>,
    next: &Bound<'_, PyAny>,
) -> PyResult<(u64, u64, u64)> {
    if page_size == 0 {
        return Err(invalid("page_size", "0", "at least 1"));
    }
    let (py, rows) = (requests.py(), requests.len());
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
        let kv = request.getattr(intern!(py, "kv"))?;
        let known: u32 = kv.getattr(intern!(py, "kv_committed_len"))?.extract()?;
        let owned: u32 = kv.getattr(intern!(py, "kv_allocated_len"))?.extract()?;
        let wanted = room(known as usize, owned as usize, ahead, page_size);
        let slots =
            |n: usize| i32::try_from(n).map_err(|_| invalid("requests", n.to_string(), "at most 2^31 - 1 slots"));
        committed[row] = i64::from(known);
        allocated[row] = slots(owned as usize)?;
        next[row] = slots(wanted)?;
        missing += wanted as u64 - u64::from(owned);
        committed_sum += u64::from(known);
        next_sum += wanted as u64;
    }
    Ok((missing, committed_sum, next_sum))
}
