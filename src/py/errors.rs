//! Core errors as the exceptions of `dflash_rs.errors`.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use crate::draft::NO_NODE;
use crate::error::{Error, indices};

struct Classes {
    base: Py<PyType>,
    invalid_argument: Py<PyType>,
    out_of_pages: Py<PyType>,
}

// The classes are written in Python, where they can have two bases; they are looked up when the first error is raised.
static CLASSES: PyOnceLock<Classes> = PyOnceLock::new();

fn classes(py: Python<'_>) -> PyResult<&Classes> {
    CLASSES.get_or_try_init(py, || {
        let module = py.import("dflash_rs.errors")?;
        let class = |name: &str| -> PyResult<Py<PyType>> { Ok(module.getattr(name)?.cast_into::<PyType>()?.unbind()) };
        Ok(Classes {
            base: class("DflashError")?,
            invalid_argument: class("InvalidArgument")?,
            out_of_pages: class("OutOfPages")?,
        })
    })
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Python::attach(|py| match classes(py) {
            Ok(classes) => {
                let class = match error {
                    Error::OutOfPages { .. } | Error::PoolExhausted { .. } => &classes.out_of_pages,
                    Error::OutOfTurn { .. } | Error::StaleRow { .. } | Error::SlotsNotOwned { .. } => &classes.base,
                    Error::WalksDiffer { .. } => &classes.base,
                    Error::NoKernels
                    | Error::NoDriver { .. }
                    | Error::NoSymbol { .. }
                    | Error::UnsupportedDevice { .. }
                    | Error::KernelParameters { .. }
                    | Error::Driver { .. } => &classes.base,
                    _ => &classes.invalid_argument,
                };
                PyErr::from_type(class.bind(py).clone(), error.to_string())
            }
            Err(missing) => missing,
        })
    }
}

/// `InvalidArgument` for what the bindings themselves find wrong.
pub(super) fn invalid(name: &'static str, got: impl Into<String>, expected: impl Into<String>) -> PyErr {
    Error::InvalidArgument {
        name,
        got: got.into(),
        expected: expected.into(),
    }
    .into()
}

/// Parents of a tree's nodes; that of the first one, the anchor, is not looked at.
pub(super) fn parent_ids(parents: &[i32]) -> PyResult<Vec<u32>> {
    let parent = |(node, &parent): (usize, &i32)| match u32::try_from(parent) {
        Ok(parent) => Ok(parent),
        Err(_) if node == 0 => Ok(NO_NODE),
        Err(_) => {
            let expected = format!("a node before it, {}", indices(node));
            Err(invalid("parents", format!("{parent} at node {node}"), expected))
        }
    };
    parents.iter().enumerate().map(parent).collect()
}

/// A small vector of token ids, checked to fit the core's type (the core checks the vocabulary).
pub(super) fn token_ids(name: &'static str, ids: &[i64]) -> PyResult<Vec<crate::types::TokenId>> {
    ids.iter()
        .map(|&id| {
            u32::try_from(id)
                .map(crate::types::TokenId)
                .map_err(|_| invalid(name, format!("token {id}"), "tokens in 0..4294967295"))
        })
        .collect()
}
