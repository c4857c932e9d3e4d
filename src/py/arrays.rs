//! NumPy arguments, checked: dtype, dimensions and contiguity, with messages that say got and expected.

use numpy::ndarray::Dimension;
use numpy::{
    Element, PyArray, PyArrayDescrMethods, PyArrayMethods, PyReadonlyArray, PyUntypedArray, PyUntypedArrayMethods,
    dtype,
};
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

use crate::py::errors::invalid;

/// An integer argument, whatever its size; what does not fit is refused by name once the name is known.
pub(super) struct Count(Result<u64, String>);

impl<'py> FromPyObject<'_, 'py> for Count {
    type Error = PyErr;
    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match object.extract::<u64>() {
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => Ok(Self(Err(object.to_string()))),
            found => Ok(Self(Ok(found?))),
        }
    }
}

impl Count {
    pub(super) const ZERO: Self = Self(Ok(0));
    pub(super) const ONE: Self = Self(Ok(1));

    /// The number.
    pub(super) fn of<T: TryFrom<u64> + Bounded>(self, name: &'static str) -> PyResult<T> {
        let refuse = |got: String| invalid(name, got, format!("an integer in 0..{}", T::MOST));
        let number = self.0.map_err(refuse)?;
        T::try_from(number).map_err(|_| refuse(number.to_string()))
    }
}

/// An integer type and its largest number.
pub(super) trait Bounded {
    const MOST: u64;
}

impl Bounded for usize {
    const MOST: u64 = Self::MAX as u64;
}

impl Bounded for u64 {
    const MOST: u64 = Self::MAX;
}

impl Bounded for u32 {
    const MOST: u64 = Self::MAX as u64;
}

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
