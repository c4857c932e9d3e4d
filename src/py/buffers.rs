//! NumPy views of memory that Rust owns.
//!
//! The safety argument, once: every view's base object is the Python object that owns the memory, so the memory lives as
//! long as any view. The memory is a buffer that is neither moved nor resized while its owner lives: step values are
//! filled before they are handed out, and the page table is one boxed slice. A caller who writes through a writable view
//! changes numbers, never memory safety: the core re-checks what it reads back. Page-table entries are atomics, written
//! with relaxed stores; a view shows them as plain `i32` and is read-only.

use std::sync::atomic::AtomicI32;

use numpy::ndarray::{ArrayView1, ArrayView2};
use numpy::{Element, PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;

/// A one-dimensional view of `data`, kept alive by `owner`.
///
/// # Safety
/// `data` must live, unmoved, as long as `owner` does (module documentation).
pub(super) unsafe fn view<'py, T: Element>(data: &[T], owner: Bound<'py, PyAny>) -> Bound<'py, PyArray1<T>> {
    // SAFETY: passed on to the caller.
    unsafe { PyArray1::borrow_from_array(&ArrayView1::from(data), owner) }
}

/// A read-only view `[rows, width]` of the page table, kept alive by `owner`.
///
/// # Safety
/// `table` must live, unmoved, as long as `owner` does (module documentation).
pub(super) unsafe fn table_view<'py>(
    table: &[AtomicI32],
    rows: usize,
    width: usize,
    owner: Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyArray2<i32>>> {
    assert_eq!(table.len(), rows * width);
    // SAFETY: AtomicI32 has the size, alignment and bit validity of i32; the length was checked just above.
    let view = unsafe { ArrayView2::from_shape_ptr((rows, width), table.as_ptr().cast::<i32>()) };
    // SAFETY: passed on to the caller.
    let array = unsafe { PyArray2::borrow_from_array(&view, owner) };
    array.getattr("flags")?.setattr("writeable", false)?;
    debug_assert!(array.try_readwrite().is_err());
    Ok(array)
}
