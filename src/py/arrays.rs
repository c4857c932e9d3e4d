//! NumPy arguments, checked: dtype, dimensions and contiguity, with messages that say got and expected.

use numpy::ndarray::Dimension;
use numpy::{
    Element, PyArray, PyArrayDescrMethods, PyArrayMethods, PyReadonlyArray, PyUntypedArray, PyUntypedArrayMethods,
    dtype,
};
use pyo3::conversion::FromPyObjectOwned;
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes};

use crate::py::errors::invalid;

/// An argument of whatever kind was passed; what is no `T` is refused by name, once the name is known. A truth value
/// is no number, and bytes are no list of numbers.
pub(super) struct Given<T>(Result<T, String>);

impl<'py, T: FromPyObjectOwned<'py>> FromPyObject<'_, 'py> for Given<T> {
    type Error = PyErr;
    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if object.is_instance_of::<PyBool>() || object.is_instance_of::<PyBytes>() {
            return Ok(Self(Err(shown(&object))));
        }
        match object.extract::<T>().map_err(Into::into) {
            Ok(value) => Ok(Self(Ok(value))),
            Err(error) => {
                let py = object.py();
                let unfit = error.is_instance_of::<PyTypeError>(py)
                    || error.is_instance_of::<PyOverflowError>(py)
                    || error.is_instance_of::<PyValueError>(py);
                // Anything else, an interruption for example, is not about the argument.
                if unfit {
                    Ok(Self(Err(shown(&object))))
                } else {
                    Err(error)
                }
            }
        }
    }
}

impl<T> Given<T> {
    /// A default.
    pub(super) const fn new(value: T) -> Self {
        Self(Ok(value))
    }

    /// The value.
    pub(super) fn of(self, name: &'static str, expected: &str) -> PyResult<T> {
        self.0.map_err(|got| invalid(name, got, expected))
    }
}

/// An integer argument of at least 0, whatever its size.
pub(super) type Count = Given<u64>;

impl Count {
    pub(super) const ZERO: Self = Self::new(0);
    pub(super) const ONE: Self = Self::new(1);

    /// The number.
    pub(super) fn count<T: TryFrom<u64> + Bounded>(self, name: &'static str) -> PyResult<T> {
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
        Err(_) if object.is_none() => "None".into(),
        Err(_) => object
            .get_type()
            .name()
            .map_or_else(|_| "an object".into(), |name| format!("a {name}")),
    }
}

/// What an argument is, as Python writes it where that is short.
fn shown(object: &Bound<'_, PyAny>) -> String {
    // Longer than this, what was passed tells less than what it is.
    const LONG: usize = 60;
    let short = |text: &String| text.chars().count() <= LONG;
    match object.repr() {
        Ok(text) if !object.is_instance_of::<PyUntypedArray>() => {
            Some(text.to_string()).filter(short).unwrap_or_else(|| describe(object))
        }
        _ => describe(object),
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
