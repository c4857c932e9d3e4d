//! `dflash_rs.PagePool`: the page pool alone, for other engines.

use std::sync::{Mutex, PoisonError};

use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;

use crate::error::Error;
use crate::kv::PagePool as Core;
use crate::py::arrays::{Count, Given};
use crate::py::errors::invalid;
use crate::types::PageId;

/// Reference-counted KV pages with a free list. All operations are O(1) per page.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct PagePool {
    pool: Mutex<Core>,
}

impl PagePool {
    // A statement of pure Rust: no Python object is made, no exception raised, while the lock is held.
    fn with<R>(&self, change: impl FnOnce(&mut Core) -> R) -> R {
        // Every operation leaves the pool whole, even when it fails.
        change(&mut self.pool.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn page_ids(pages: Given<Vec<i64>>) -> PyResult<Vec<PageId>> {
    pages
        .of("pages", "a list or array of nothing but page numbers")?
        .iter()
        .map(|&page| {
            u32::try_from(page)
                .map(PageId)
                .map_err(|_| invalid("pages", page.to_string(), "page numbers in 0..4294967295"))
        })
        .collect()
}

#[pymethods]
impl PagePool {
    #[new]
    fn new(num_pages: Count) -> PyResult<Self> {
        Ok(Self {
            pool: Mutex::new(Core::new(num_pages.count("num_pages")?)?),
        })
    }

    /// Takes `count` free pages, one owner each, or raises `OutOfPages` and takes none.
    #[pyo3(signature = (count = Count::ONE), text_signature = "($self, count=1)")]
    fn alloc<'py>(&self, py: Python<'py>, count: Count) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let count: usize = count.count("count")?;
        let pages = self.with(|pool| {
            let mut pages = Vec::with_capacity(count.min(pool.num_pages()));
            match pool.alloc_many(count, &mut pages) {
                true => Ok(pages),
                false => {
                    let (free, total) = (pool.num_free(), pool.num_pages());
                    Err(Error::PoolExhausted {
                        needed: count,
                        free,
                        total,
                    })
                }
            }
        })?;
        let pages: Vec<i32> = pages.into_iter().map(|page| page.0 as i32).collect();
        Ok(pages.into_pyarray(py))
    }

    /// Adds an owner to each page. All or nothing: a free or unknown page is an `InvalidArgument`.
    fn retain(&self, pages: Given<Vec<i64>>) -> PyResult<()> {
        let pages = page_ids(pages)?;
        Ok(self.with(|pool| {
            for (at, &page) in pages.iter().enumerate() {
                if let Err(error) = pool.retain(page) {
                    for &done in &pages[..at] {
                        pool.release(done)?;
                    }
                    return Err(error);
                }
            }
            Ok(())
        })?)
    }

    /// Removes an owner from each page; pages without owners are free. All or nothing: a free or unknown page (a
    /// second free) is an `InvalidArgument`.
    fn release(&self, pages: Given<Vec<i64>>) -> PyResult<()> {
        let mut pages = page_ids(pages)?;
        pages.sort_unstable();
        Ok(self.with(|pool| {
            for same in pages.chunk_by(|a, b| a == b) {
                if (pool.owners(same[0]) as usize) < same.len() {
                    return Err(Error::PageNotHeld {
                        page: same[0].0,
                        total: pool.num_pages(),
                    });
                }
            }
            // Descending, so that the lowest page is handed out first again.
            for &page in pages.iter().rev() {
                pool.release(page)?;
            }
            Ok(())
        })?)
    }

    /// Owners of a page, 0 when it is free.
    fn owners(&self, page: Count) -> PyResult<u32> {
        let page = PageId(page.count("page")?);
        Ok(self.with(|pool| pool.owners(page)))
    }

    /// Pages nobody holds.
    #[getter]
    fn num_free(&self) -> usize {
        self.with(|pool| pool.num_free())
    }

    /// Pages in all.
    #[getter]
    fn num_pages(&self) -> usize {
        self.with(|pool| pool.num_pages())
    }

    fn __repr__(&self) -> String {
        let (free, total) = self.with(|pool| (pool.num_free(), pool.num_pages()));
        format!("PagePool({free} of {total} pages free)")
    }
}
