//! NumPy arguments, checked: dtype, dimensions and contiguity, with messages that say got and expected.

use numpy::ndarray::Dimension;
use numpy::{
    Element, PyArray, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyReadonlyArray, PyReadwriteArrayDyn,
    PyUntypedArray, PyUntypedArrayMethods, dtype,
};
use pyo3::PyClass;
use pyo3::conversion::FromPyObjectOwned;
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyFloat, PyInt, PyTuple};

use crate::py::errors::invalid;

/// An argument of whatever kind was passed; what is no `T` is refused by name, once the name is known. A truth value
/// is no number, and bytes are no list of numbers.
pub(super) struct Given<T>(Result<T, String>);

impl<'py, T: FromPyObjectOwned<'py>> FromPyObject<'_, 'py> for Given<T> {
    type Error = PyErr;
    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if object.is_instance_of::<PyBool>() || object.is_instance_of::<PyBytes>() || is_endless(&object) {
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

/// An argument that is one of this module's own objects: told by its class alone, since it stands in every call of a step.
pub(super) struct Object<'py, T>(Result<Bound<'py, T>, String>);

impl<'py, T: PyClass> FromPyObject<'_, 'py> for Object<'py, T> {
    type Error = PyErr;
    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        Ok(Self(match object.cast::<T>() {
            Ok(own) => Ok(own.to_owned()),
            Err(_) => Err(shown(&object)),
        }))
    }
}

impl<'py, T> Object<'py, T> {
    /// The object.
    pub(super) fn of(self, name: &'static str, expected: &str) -> PyResult<Bound<'py, T>> {
        self.0.map_err(|got| invalid(name, got, expected))
    }
}

/// Whether room for all entries of a list could not even be asked for: `range(2**60)` is a list of numbers, too.
fn is_endless(object: &Bound<'_, PyAny>) -> bool {
    const MOST: usize = 1 << 28;
    // What most arguments are: asking a number for its length raises and catches an exception.
    if object.is_instance_of::<PyInt>() || object.is_instance_of::<PyFloat>() {
        return false;
    }
    if let Ok(tuple) = object.cast::<PyTuple>() {
        return tuple.len() > MOST;
    }
    // A length beyond what Python can count is an error, and as bad. What has none is no list.
    object.hasattr(intern!(object.py(), "__len__")).unwrap_or(false) && object.len().map_or(true, |len| len > MOST)
}

/// A truth value, of Python's own kind.
pub(super) struct Flag(Result<bool, String>);

impl FromPyObject<'_, '_> for Flag {
    type Error = PyErr;
    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        Ok(Self(match object.cast::<PyBool>() {
            Ok(flag) => Ok(flag.is_true()),
            Err(_) => Err(shown(&object)),
        }))
    }
}

impl Flag {
    pub(super) const TRUE: Self = Self(Ok(true));
    pub(super) const FALSE: Self = Self(Ok(false));

    /// The value.
    pub(super) fn of(self, name: &'static str) -> PyResult<bool> {
        self.0.map_err(|got| invalid(name, got, "True or False"))
    }
}

/// What an argument may be, in the words of a refusal.
pub(super) trait Kind {
    fn expected() -> String;
}

impl Kind for usize {
    fn expected() -> String {
        format!("an integer in 0..{}", Self::MAX)
    }
}

impl Kind for i64 {
    fn expected() -> String {
        format!("an integer in {}..{}", Self::MIN, Self::MAX)
    }
}

impl Kind for f32 {
    fn expected() -> String {
        "a number".into()
    }
}

impl Kind for String {
    fn expected() -> String {
        "a name".into()
    }
}

/// What [`named`] takes.
pub(super) trait Argument {
    type Value;
    /// The value, or a refusal that begins with `name`.
    fn named(self, name: &'static str) -> PyResult<Self::Value>;
}

impl<T: Kind> Argument for Given<T> {
    type Value = T;
    fn named(self, name: &'static str) -> PyResult<T> {
        self.0.map_err(|got| invalid(name, got, T::expected()))
    }
}

impl<'py, T: Kind> Argument for Object<'py, T> {
    type Value = Bound<'py, T>;
    fn named(self, name: &'static str) -> PyResult<Self::Value> {
        self.of(name, &T::expected())
    }
}

impl Argument for Flag {
    type Value = bool;
    fn named(self, name: &'static str) -> PyResult<bool> {
        self.of(name)
    }
}

impl<A: Argument> Argument for Option<A> {
    type Value = Option<A::Value>;
    fn named(self, name: &'static str) -> PyResult<Self::Value> {
        self.map(|argument| argument.named(name)).transpose()
    }
}

/// Makes values of arguments, in place; what cannot be read is refused by the argument's name.
macro_rules! named {
    ($($name:ident),+ $(,)?) => {
        $(let $name = $crate::py::arrays::Argument::named($name, stringify!($name))?;)+
    };
}
pub(super) use named;

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

/// What an argument is, as the messages of `dflash_rs.arguments` write it.
pub(super) fn shown(object: &Bound<'_, PyAny>) -> String {
    let text = || -> PyResult<String> {
        let module = object.py().import(intern!(object.py(), "dflash_rs.arguments"))?;
        module.call_method1(intern!(object.py(), "shown"), (object,))?.extract()
    };
    text().unwrap_or_else(|_| describe(object))
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

/// A C-contiguous array of this dtype that is written, of any number of dimensions.
pub(super) fn array_mut<'py, T: Element>(
    name: &'static str,
    object: &Bound<'py, PyAny>,
) -> PyResult<PyReadwriteArrayDyn<'py, T>> {
    let refuse = || {
        let kind = dtype::<T>(object.py());
        let expected = format!("a C-contiguous {kind} array that can be written");
        invalid(name, describe(object), expected)
    };
    let array = object.cast::<PyArrayDyn<T>>().map_err(|_| refuse())?;
    if !array.is_c_contiguous() {
        return Err(refuse());
    }
    array.try_readwrite().map_err(|_| refuse())
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
