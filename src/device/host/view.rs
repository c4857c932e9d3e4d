//! Strided rows over somebody else's memory: torch tensors, or slices in tests.
//!
//! # Safety, stated once
//! A view is `rows x heads` vectors of `dim` elements, element `(row, head, d)` at `row * row_stride + head * head_stride + d`.
//! - *In bounds.* [`Rows::from_slice`] and [`RowsMut::from_slice`] check the last element against the slice. `from_raw` takes the
//!   extent on the caller's word: that is its contract, and the bindings pass sizes they read from the tensor itself.
//!   Every access afterwards asserts `row < rows` and `head < heads`, and hands out exactly `dim` elements.
//! - *Aliasing.* Inputs are read through shared references that live for one row. What is written is borrowed exclusively, whole or cut
//!   into parts, or by [`RowsMut::row`], which is `unsafe`: its caller promises that nobody else holds that row. Distinct rows are
//!   disjoint because the constructors refuse strides that make them overlap.
//! - *Threads.* A view holds plain numbers; sending it is sound because of the two points above.
//! - *Values.* `f32` and `u16` have no invalid bit patterns; memory that nobody wrote is read only where the caller's context
//!   length says that it was written.

use crate::error::{Error, Result};
use std::marker::PhantomData;

/// Keys of a chunk, and lanes of a vector.
pub(super) const LANES: usize = 16;

/// How a value is stored. Arithmetic is f32 in every case.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Exact conversion to f32.
    fn widen(from: &[Self], to: &mut [f32]);
    /// Conversion from f32, to nearest even.
    fn narrow(from: &[f32], to: &mut [Self]);
    /// The view itself as rows of f32, where no conversion is needed.
    fn as_f32<'a>(rows: &Rows<'a, Self>) -> Option<Rows<'a, f32>>;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
    #[inline(always)]
    fn as_f32<'a>(rows: &Rows<'a, Self>) -> Option<Rows<'a, f32>> {
        Some(*rows)
    }
}

/// bfloat16: the upper half of an f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl From<Bf16> for f32 {
    #[inline(always)]
    fn from(x: Bf16) -> Self {
        Self::from_bits(u32::from(x.0) << 16)
    }
}

impl From<f32> for Bf16 {
    #[inline(always)]
    fn from(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        // Rounding could carry a NaN's payload into infinity.
        Self(if x.is_nan() {
            (bits >> 16) as u16 | 0x40
        } else {
            rounded
        })
    }
}

impl Element for Bf16 {
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        assert_eq!(from.len(), to.len());
        for (to, &from) in to.iter_mut().zip(from) {
            *to = from.into();
        }
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        assert_eq!(from.len(), to.len());
        for (to, &from) in to.iter_mut().zip(from) {
            *to = from.into();
        }
    }
    #[inline(always)]
    fn as_f32<'a>(_: &Rows<'a, Self>) -> Option<Rows<'a, f32>> {
        None
    }
}

/// Extent and strides of a view, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Rows: tokens of a packed batch, or slots of a cache.
    pub rows: usize,
    /// Heads per row.
    pub heads: usize,
    /// Elements per head, contiguous.
    pub dim: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
}

impl Layout {
    /// Rows, heads and elements all next to each other.
    pub fn contiguous(rows: usize, heads: usize, dim: usize) -> Self {
        Self {
            rows,
            heads,
            dim,
            row_stride: heads * dim,
            head_stride: dim,
        }
    }

    /// Elements from the first to one past the last, 0 for an empty view.
    ///
    /// # Errors
    /// Strides that make two heads overlap, or an extent that no address space holds.
    pub fn span(&self, name: &'static str) -> Result<usize> {
        let Self {
            rows,
            heads,
            dim,
            row_stride,
            head_stride,
        } = *self;
        if rows == 0 || heads == 0 || dim == 0 {
            return Ok(0);
        }
        // Two nestings are possible, [row][head][d] and [head][row][d]; the outer stride must clear the inner extent.
        let inside = |inner: usize, count: usize| inner.checked_mul(count - 1)?.checked_add(dim);
        let apart = |inner: usize, count: usize, outer: usize, outer_count: usize| {
            (count == 1 || inner >= dim)
                && (outer_count == 1 || inside(inner, count).is_some_and(|extent| outer >= extent))
        };
        if !apart(head_stride, heads, row_stride, rows) && !apart(row_stride, rows, head_stride, heads) {
            return Err(Error::OverlappingRows {
                name,
                row_stride,
                head_stride,
                dim,
            });
        }
        let last = inside(row_stride, rows).and_then(|rows| head_stride.checked_mul(heads - 1)?.checked_add(rows));
        last.filter(|&elements| elements <= isize::MAX as usize / 8)
            .ok_or_else(|| Error::InvalidArgument {
                name,
                got: format!("{self:?}"),
                expected: "an extent below the size of the address space".into(),
            })
    }
}

/// Read-only rows.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, E> {
    data: *const E,
    layout: Layout,
    lifetime: PhantomData<&'a [E]>,
}

// SAFETY: see the module, "Threads".
unsafe impl<E: Element> Send for Rows<'_, E> {}
// SAFETY: see the module, "Threads".
unsafe impl<E: Element> Sync for Rows<'_, E> {}

impl<'a, E: Element> Rows<'a, E> {
    /// A view of `data`.
    ///
    /// # Errors
    /// A layout that overlaps itself or reaches beyond `data`.
    pub fn from_slice(name: &'static str, data: &'a [E], layout: Layout) -> Result<Self> {
        fits(name, data.len(), &layout)?;
        Ok(Self {
            data: data.as_ptr(),
            layout,
            lifetime: PhantomData,
        })
    }

    /// A view of raw memory.
    ///
    /// # Safety
    /// `data` is aligned, and `layout.span()` elements from it are readable and not written while the view is used, except through
    /// rows that the reader does not read.
    pub unsafe fn from_raw(data: *const E, layout: Layout) -> Self {
        Self {
            data,
            layout,
            lifetime: PhantomData,
        }
    }

    /// Extent and strides.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The elements of one head of one row.
    #[inline(always)]
    pub(super) fn row(&self, row: usize, head: usize) -> &'a [E] {
        let Layout {
            rows,
            heads,
            dim,
            row_stride,
            head_stride,
        } = self.layout;
        assert!(row < rows && head < heads);
        // SAFETY: see the module, "In bounds".
        unsafe { std::slice::from_raw_parts(self.data.add(row * row_stride + head * head_stride), dim) }
    }
}

/// Rows to write, and to read back.
#[derive(Debug)]
pub struct RowsMut<'a, E> {
    data: *mut E,
    layout: Layout,
    lifetime: PhantomData<&'a mut [E]>,
}

// SAFETY: see the module, "Threads".
unsafe impl<E: Element> Send for RowsMut<'_, E> {}
// SAFETY: see the module, "Threads".
unsafe impl<E: Element> Sync for RowsMut<'_, E> {}

impl<'a, E: Element> RowsMut<'a, E> {
    /// A view of `data`.
    ///
    /// # Errors
    /// A layout that overlaps itself or reaches beyond `data`.
    pub fn from_slice(name: &'static str, data: &'a mut [E], layout: Layout) -> Result<Self> {
        fits(name, data.len(), &layout)?;
        Ok(Self {
            data: data.as_mut_ptr(),
            layout,
            lifetime: PhantomData,
        })
    }

    /// A view of raw memory.
    ///
    /// # Safety
    /// `data` is aligned, and `layout.span()` elements from it are readable and writable and nobody else touches them while the
    /// view is used.
    pub unsafe fn from_raw(data: *mut E, layout: Layout) -> Self {
        Self {
            data,
            layout,
            lifetime: PhantomData,
        }
    }

    /// Extent and strides.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The same rows for reading, while nobody writes.
    pub fn as_rows(&self) -> Rows<'_, E> {
        Rows {
            data: self.data,
            layout: self.layout,
            lifetime: PhantomData,
        }
    }

    /// The elements of one head of one row.
    ///
    /// # Safety
    /// No other reference to this head of this row exists, on this thread or another.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "rows are written from several threads, each its own")]
    pub(super) unsafe fn row(&self, row: usize, head: usize) -> &mut [E] {
        let Layout {
            rows,
            heads,
            dim,
            row_stride,
            head_stride,
        } = self.layout;
        assert!(row < rows && head < heads);
        // SAFETY: see the module, "In bounds" and "Aliasing".
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * row_stride + head * head_stride), dim) }
    }

    /// The view cut into views of `rows` rows each, the last one shorter.
    pub(super) fn split_rows(self, rows: usize) -> Vec<Self> {
        let Self { data, layout, lifetime } = self;
        let part = |first: usize| Self {
            data: data.wrapping_add(first * layout.row_stride),
            layout: Layout {
                rows: rows.min(layout.rows - first),
                ..layout
            },
            lifetime,
        };
        (0..layout.rows).step_by(rows.max(1)).map(part).collect()
    }

    /// The view cut into views of `columns` elements of every head each, the last one narrower.
    pub(super) fn split_columns(self, columns: usize) -> Vec<Self> {
        let Self { data, layout, lifetime } = self;
        let part = |first: usize| Self {
            data: data.wrapping_add(first),
            layout: Layout {
                dim: columns.min(layout.dim - first),
                ..layout
            },
            lifetime,
        };
        (0..layout.dim).step_by(columns.max(1)).map(part).collect()
    }

    /// The elements of one head of one row, where the caller has the whole view to itself.
    #[inline(always)]
    pub(super) fn row_mut(&mut self, row: usize, head: usize) -> &mut [E] {
        // SAFETY: the exclusive borrow.
        unsafe { self.row(row, head) }
    }
}

fn fits(name: &'static str, got: usize, layout: &Layout) -> Result<()> {
    let expected = layout.span(name)?;
    if got < expected {
        return Err(Error::Length { name, got, expected });
    }
    Ok(())
}

/// Sixteen keys (or values) of one head as whole f32 vectors, a constant stride apart.
pub(super) struct KeyChunk<'a> {
    data: *const f32,
    stride: usize,
    vectors: usize,
    lifetime: PhantomData<&'a [f32]>,
}

impl<'a> KeyChunk<'a> {
    /// Rows `first..first + 16` of one head, in place. `dim` must be a multiple of sixteen.
    #[inline(always)]
    pub(super) fn in_place(rows: &Rows<'a, f32>, first: usize, head: usize) -> Self {
        let layout = &rows.layout;
        assert!(first + LANES <= layout.rows && head < layout.heads && layout.dim.is_multiple_of(LANES));
        Self {
            data: rows.row(first, head).as_ptr(),
            stride: layout.row_stride,
            vectors: layout.dim / LANES,
            lifetime: PhantomData,
        }
    }

    /// Sixteen packed rows of `vectors` vectors.
    #[inline(always)]
    pub(super) fn packed(data: &'a [f32], vectors: usize) -> Self {
        assert!(data.len() >= LANES * vectors * LANES);
        Self {
            data: data.as_ptr(),
            stride: vectors * LANES,
            vectors,
            lifetime: PhantomData,
        }
    }

    /// Vectors per key.
    #[inline(always)]
    pub(super) fn vectors(&self) -> usize {
        self.vectors
    }

    /// Vector `d` of key `key`.
    #[inline(always)]
    pub(super) fn vector(&self, key: usize, d: usize) -> &'a [f32; LANES] {
        debug_assert!(key < LANES && d < self.vectors);
        // SAFETY: both constructors checked that sixteen rows of `vectors` vectors lie within a view or a slice; the callers' loops
        // run over `0..LANES` and `0..vectors()`.
        unsafe { &*self.data.add(key * self.stride + d * LANES).cast() }
    }
}
