//! NumPy arguments, checked: dtype, dimensions and contiguity, with messages that say got and expected.

use numpy::ndarray::Dimension;
use numpy::{
    Element, PyArray, PyArrayDescrMethods, PyArrayMethods, PyReadonlyArray, PyUntypedArray, PyUntypedArrayMethods,
    dtype,
};
use pyo3::prelude::*;

use crate::py::errors::invalid;

/// What an argument is, in words: `a float64 array of shape (2, 3)`, or the name of its type.
pub(super) fn describe(object: &Bound<'_, PyAny>) -> String {
    match object.cast::<PyUntypedArray>() {
        Ok(array) => {
            let strided = if array.is_c_contiguous() {
                ""
            } else {
                ", not C-contiguous"
            };
            format!("a {} array of shape {:?}{strided}", array.dtype(), array.shape())
        }
        Err(_) => object
            .get_type()
            .name()
            .map_or_else(|_| "an object".into(), |name| format!("a {name}")),
    }
}

/// A C-contiguous array of this dtype and number of dimensions; `shape` names the dimensions in the message, as in `[R, g]`.
pub(super) fn array<'py, T: Element, D: Dimension>(
    name: &'static str,
    object: &Bound<'py, PyAny>,
    shape: &str,
) -> PyResult<PyReadonlyArray<'py, T, D>> {
    let refuse = || {
        let kind = dtype::<T>(object.py());
        invalid(
            name,
            describe(object),
            format!("a C-contiguous {kind} array of shape {shape}"),
        )
    };
    let array = object.cast::<PyArray<T, D>>().map_err(|_| refuse())?;
    if !array.is_c_contiguous() {
        return Err(refuse());
    }
    array.try_readonly().map_err(|_| refuse())
}

/// Whether the object is an array of this dtype, whatever its shape.
pub(super) fn holds<T: Element>(object: &Bound<'_, PyAny>) -> bool {
    object
        .cast::<PyUntypedArray>()
        .is_ok_and(|array| array.dtype().is_equiv_to(&dtype::<T>(object.py())))
}

/// Refuses an array of another shape; `meaning` says what the sizes stand for.
pub(super) fn shaped(name: &'static str, got: &[usize], expected: &[usize], meaning: &str) -> PyResult<()> {
    if got == expected {
        return Ok(());
    }
    Err(invalid(
        name,
        format!("shape {got:?}"),
        format!("shape {expected:?} {meaning}"),
    ))
}
