//! Device tensors as their owner describes them, checked before a kernel gets their addresses.
//!
//! What can be known without reading device memory is checked: element type, device, rank, every extent, strides, alignment, null, that
//! the extent fits the address space, and that what is written overlaps nothing else of the same launch. Indices that live in
//! device memory (lengths, slots, page ids) are their producer's promise.

use std::ops::Range;

use super::params::Address;
use crate::error::{Error, Result};

/// Alignment in bytes, and with it the granularity of strides, of tensors that are read 16 bytes at a time.
pub const VECTOR: usize = 16;

/// Element types that kernels take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Dtype {
    F32,
    Bf16,
    I32,
    I64,
    U64,
    U8,
}

impl Dtype {
    const ALL: [(Self, &'static str, usize); 6] = [
        (Self::F32, "float32", 4),
        (Self::Bf16, "bfloat16", 2),
        (Self::I32, "int32", 4),
        (Self::I64, "int64", 8),
        (Self::U64, "uint64", 8),
        (Self::U8, "uint8", 1),
    ];

    fn entry(self) -> (Self, &'static str, usize) {
        Self::ALL[self as usize]
    }

    /// The name that torch and NumPy use.
    pub fn name(self) -> &'static str {
        self.entry().1
    }

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        self.entry().2
    }
}

impl std::str::FromStr for Dtype {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|(_, known, _)| *known == name);
        found.map(|entry| entry.0).ok_or_else(|| {
            bad(
                "dtype",
                name,
                Self::ALL.map(|(_, known, _)| known).join(", ") + ": what kernels take",
            )
        })
    }
}

/// A tensor on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Of the first element.
    pub address: usize,
    /// Element type.
    pub dtype: Dtype,
    /// Ordinal of the GPU; negative for the CPU.
    pub device: i32,
    /// Extents.
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<i64>,
}

impl Tensor {
    /// Extent of a dimension; 0 for one that the tensor lacks, which the check of its shape refuses.
    pub(super) fn extent(&self, dimension: usize) -> usize {
        self.shape.get(dimension).copied().unwrap_or(0)
    }

    /// Stride of a dimension, in elements.
    pub(super) fn stride(&self, dimension: usize) -> i64 {
        self.strides.get(dimension).copied().unwrap_or(0)
    }
}

/// What an extent has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// This.
    Is(usize),
    /// This or more.
    AtLeast(usize),
    /// Whatever it is.
    Any,
}

impl From<usize> for Extent {
    fn from(extent: usize) -> Self {
        Self::Is(extent)
    }
}

impl Extent {
    fn allows(self, extent: usize) -> bool {
        match self {
            Self::Is(wanted) => extent == wanted,
            Self::AtLeast(least) => extent >= least,
            Self::Any => true,
        }
    }
}

/// Whether a kernel writes a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only reads it.
    Read,
    /// Writes it, and may read it.
    Write,
}

pub(crate) fn bad(name: &'static str, got: impl Into<String>, expected: impl Into<String>) -> Error {
    Error::InvalidArgument {
        name,
        got: got.into(),
        expected: expected.into(),
    }
}

/// A size as the kernels hold it.
///
/// # Errors
/// It does not fit 32 bits.
pub fn int32(name: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| bad(name, value.to_string(), "at most 2^31 - 1"))
}

/// The checks of one launch.
#[derive(Debug, Default)]
pub struct Checks {
    device: Option<(&'static str, i32)>,
    extents: Vec<(&'static str, Access, Range<usize>)>,
}

impl Checks {
    /// No tensor seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A tensor whose elements lie next to each other, in the order of its indices.
    ///
    /// # Errors
    /// Names the tensor, what it is and what it should be.
    pub fn dense(
        &mut self,
        name: &'static str,
        tensor: &Tensor,
        dtype: Dtype,
        shape: &[Extent],
        access: Access,
    ) -> Result<Address> {
        let mut next = 1i64;
        let expected: Vec<i64> = tensor
            .shape
            .iter()
            .rev()
            .map(|&extent| {
                let stride = next;
                next = next.saturating_mul(i64::try_from(extent).unwrap_or(i64::MAX));
                stride
            })
            .collect();
        let address = self.strided(name, tensor, dtype, shape, dtype.bytes(), access)?;
        let gaps = |((&extent, stride), expected): ((&usize, &i64), &i64)| extent > 1 && stride != expected;
        let mut indices = tensor.shape.iter().zip(&tensor.strides).zip(expected.iter().rev());
        if !tensor.shape.contains(&0) && indices.any(gaps) {
            return Err(bad(
                name,
                format!("strides {:?} for shape {:?}", tensor.strides, tensor.shape),
                "a contiguous tensor (tensor.contiguous() makes one)",
            ));
        }
        Ok(address)
    }

    /// The same for an argument that may be left out; 0 then.
    ///
    /// # Errors
    /// As [`Self::dense`].
    pub fn dense_or_null(
        &mut self,
        name: &'static str,
        tensor: Option<&Tensor>,
        dtype: Dtype,
        shape: &[Extent],
        access: Access,
    ) -> Result<Address> {
        tensor.map_or(Ok(0), |tensor| self.dense(name, tensor, dtype, shape, access))
    }

    /// A tensor whose last index is dense and whose other strides are whatever they are: multiples of `granularity` bytes, not
    /// negative, and for a written tensor such that no two elements share an address.
    ///
    /// # Errors
    /// As [`Self::dense`].
    pub fn strided(
        &mut self,
        name: &'static str,
        tensor: &Tensor,
        dtype: Dtype,
        shape: &[Extent],
        granularity: usize,
        access: Access,
    ) -> Result<Address> {
        self.same_device(name, tensor.device)?;
        check_kind(name, tensor, dtype, shape)?;
        let elements = tensor
            .shape
            .iter()
            .fold(1usize, |product, &extent| product.saturating_mul(extent));
        if elements == 0 {
            return Ok(tensor.address as Address);
        }
        let span = span_of(name, tensor, (granularity / dtype.bytes()).max(1), granularity)?;
        if access == Access::Write {
            check_no_overlap(name, tensor)?;
        }
        if tensor.address == 0 {
            return Err(Error::NullPointer { name, elements });
        }
        let alignment = granularity.max(dtype.bytes());
        if !tensor.address.is_multiple_of(alignment) {
            return Err(Error::MisalignedPointer {
                name,
                address: tensor.address,
                alignment,
            });
        }
        let end = span
            .checked_mul(dtype.bytes())
            .and_then(|bytes| tensor.address.checked_add(bytes))
            .ok_or_else(|| too_far(name, tensor))?;
        self.extents.push((name, access, tensor.address..end));
        Ok(tensor.address as Address)
    }

    fn same_device(&mut self, name: &'static str, device: i32) -> Result<()> {
        if device < 0 {
            return Err(bad(name, "a tensor on the CPU", "one on a CUDA device"));
        }
        let (first, expected) = *self.device.get_or_insert((name, device));
        if device != expected {
            return Err(bad(
                name,
                format!("a tensor on cuda:{device}"),
                format!("one on cuda:{expected}, where {first} is"),
            ));
        }
        Ok(())
    }

    /// The device of all tensors, after refusing written memory that is shared.
    ///
    /// # Errors
    /// [`Error::AliasedPointer`].
    pub fn finish(self) -> Result<Option<i32>> {
        for (index, (name, access, own)) in self.extents.iter().enumerate() {
            for (other, other_access, theirs) in &self.extents[..index] {
                let writes = [(*access, name, other), (*other_access, other, name)];
                let written = writes.into_iter().find(|(access, ..)| *access == Access::Write);
                if let Some((_, name, other)) = written
                    && own.start < theirs.end
                    && theirs.start < own.end
                {
                    return Err(Error::AliasedPointer { name, other });
                }
            }
        }
        Ok(self.device.map(|(_, device)| device))
    }
}

/// Refuses another element type, another shape, or strides that are not one per dimension.
fn check_kind(name: &'static str, tensor: &Tensor, dtype: Dtype, shape: &[Extent]) -> Result<()> {
    if tensor.dtype != dtype {
        return Err(bad(name, tensor.dtype.name(), dtype.name()));
    }
    let (got, strides) = (&tensor.shape, &tensor.strides);
    if got.len() != shape.len() || !shape.iter().zip(got).all(|(wanted, &extent)| wanted.allows(extent)) {
        return Err(bad(
            name,
            format!("shape {got:?}"),
            format!("shape {}", describe(shape)),
        ));
    }
    if strides.len() != got.len() {
        return Err(bad(
            name,
            format!("{} strides", strides.len()),
            format!("{}, one per dimension", got.len()),
        ));
    }
    Ok(())
}

/// Elements from the first to the last one. Refuses strides that are negative, no multiples of `step`, or other than 1 at the end.
fn span_of(name: &'static str, tensor: &Tensor, step: usize, granularity: usize) -> Result<usize> {
    let (shape, strides) = (&tensor.shape, &tensor.strides);
    if let (Some(&extent), Some(&stride)) = (shape.last(), strides.last())
        && extent > 1
        && stride != 1
    {
        return Err(bad(name, format!("strides {strides:?}"), "1 as the last one"));
    }
    let mut span = 1usize;
    for (index, (&extent, &stride)) in shape.iter().zip(strides).enumerate() {
        if extent <= 1 {
            continue;
        }
        let last = index + 1 == shape.len();
        if stride < 0 || (!last && stride % step as i64 != 0) {
            return Err(bad(
                name,
                format!("strides {strides:?}"),
                format!("multiples of {step} elements ({granularity} bytes), not negative"),
            ));
        }
        span = (extent - 1)
            .checked_mul(stride as usize)
            .and_then(|reach| span.checked_add(reach))
            .ok_or_else(|| too_far(name, tensor))?;
    }
    Ok(span)
}

/// Refuses strides by which two elements share an address. They are not negative.
fn check_no_overlap(name: &'static str, tensor: &Tensor) -> Result<()> {
    let (shape, strides) = (&tensor.shape, &tensor.strides);
    let mut by_stride: Vec<_> = strides
        .iter()
        .zip(shape)
        .filter(|&(_, &extent)| extent > 1)
        .map(|(&stride, &extent)| (stride, extent))
        .collect();
    by_stride.sort_unstable();
    let mut reach = 1i64;
    for (stride, extent) in by_stride {
        if stride < reach {
            return Err(bad(
                name,
                format!("strides {strides:?} for shape {shape:?}, which make elements overlap"),
                "an address of its own for every element that is written",
            ));
        }
        reach = reach.saturating_add(stride.saturating_mul(extent as i64 - 1));
    }
    Ok(())
}

fn too_far(name: &'static str, tensor: &Tensor) -> Error {
    bad(
        name,
        format!(
            "shape {:?} with strides {:?} at {:#x}",
            tensor.shape, tensor.strides, tensor.address
        ),
        "an extent within the address space",
    )
}

fn describe(shape: &[Extent]) -> String {
    let parts: Vec<String> = shape
        .iter()
        .map(|extent| match extent {
            Extent::Is(extent) => extent.to_string(),
            Extent::AtLeast(least) => format!(">= {least}"),
            Extent::Any => "any".into(),
        })
        .collect();
    format!("[{}]", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: Dtype, shape: &[usize], strides: &[i64]) -> Tensor {
        Tensor {
            address: 0x1000,
            dtype,
            device: 0,
            shape: shape.into(),
            strides: strides.into(),
        }
    }

    fn refusal(tensor: &Tensor, shape: &[Extent], access: Access) -> String {
        let checked = Checks::new().dense("x", tensor, Dtype::F32, shape, access);
        checked.unwrap_err().to_string()
    }

    #[test]
    fn a_tensor_is_what_the_kernel_expects_or_refused_with_numbers() {
        let two_by_three = [Extent::Is(2), Extent::Is(3)];
        let good = tensor(Dtype::F32, &[2, 3], &[3, 1]);
        let checked = Checks::new().dense("x", &good, Dtype::F32, &two_by_three, Access::Read);
        assert_eq!(checked, Ok(0x1000));
        let cases = [
            (
                Tensor {
                    device: -1,
                    ..good.clone()
                },
                "a tensor on the CPU",
            ),
            (tensor(Dtype::Bf16, &[2, 3], &[3, 1]), "got bfloat16, expected float32"),
            (
                tensor(Dtype::F32, &[2, 4], &[4, 1]),
                "got shape [2, 4], expected shape [2, 3]",
            ),
            (tensor(Dtype::F32, &[2, 3], &[4, 1]), "contiguous"),
            (tensor(Dtype::F32, &[2, 3], &[1, 2]), "1 as the last one"),
            (tensor(Dtype::F32, &[2, 3], &[-3, 1]), "not negative"),
            (
                Tensor {
                    address: 0,
                    ..good.clone()
                },
                "null pointer",
            ),
            (
                Tensor {
                    address: 0x1002,
                    ..good.clone()
                },
                "not aligned to 4 bytes",
            ),
            (
                Tensor {
                    address: usize::MAX - 3,
                    ..good.clone()
                },
                "address space",
            ),
        ];
        for (tensor, expected) in cases {
            let message = refusal(&tensor, &two_by_three, Access::Read);
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn an_empty_tensor_may_be_null_and_a_single_row_may_have_any_stride() {
        let empty = Tensor {
            address: 0,
            ..tensor(Dtype::F32, &[0, 3], &[3, 1])
        };
        let shape = [Extent::Any, Extent::Is(3)];
        assert_eq!(
            Checks::new().dense("x", &empty, Dtype::F32, &shape, Access::Write),
            Ok(0)
        );
        let single = tensor(Dtype::F32, &[1, 3], &[77, 1]);
        assert!(
            Checks::new()
                .dense("x", &single, Dtype::F32, &shape, Access::Write)
                .is_ok()
        );
    }

    #[test]
    fn vector_loads_need_aligned_addresses_and_strides() {
        let check = |tensor: &Tensor, access| {
            let shape = [Extent::Any, Extent::Any, Extent::Is(64)];
            Checks::new().strided("q", tensor, Dtype::Bf16, &shape, VECTOR, access)
        };
        let good = tensor(Dtype::Bf16, &[5, 2, 64], &[384, 64, 1]);
        assert!(check(&good, Access::Read).is_ok());
        assert!(check(&tensor(Dtype::Bf16, &[5, 2, 64], &[388, 64, 1]), Access::Read).is_err());
        assert!(
            check(
                &Tensor {
                    address: 0x1008,
                    ..good.clone()
                },
                Access::Read
            )
            .is_err()
        );
        let overlapping = tensor(Dtype::Bf16, &[5, 2, 64], &[64, 64, 1]);
        assert!(check(&overlapping, Access::Read).is_ok());
        assert!(check(&overlapping, Access::Write).is_err());
    }

    #[test]
    fn written_memory_is_shared_with_nothing_and_all_tensors_are_on_one_device() {
        let a = tensor(Dtype::F32, &[8], &[1]);
        let shape = [Extent::Is(8)];
        let mut checks = Checks::new();
        checks.dense("a", &a, Dtype::F32, &shape, Access::Read).unwrap();
        checks.dense("b", &a, Dtype::F32, &shape, Access::Read).unwrap();
        let behind = Tensor {
            address: 0x1020,
            ..a.clone()
        };
        checks.dense("c", &behind, Dtype::F32, &shape, Access::Write).unwrap();
        let elsewhere = Tensor { device: 1, ..a.clone() };
        let error = checks
            .dense("d", &elsewhere, Dtype::F32, &shape, Access::Read)
            .unwrap_err();
        assert!(error.to_string().contains("cuda:0, where a is"), "{error}");
        checks
            .dense("e", &Tensor { address: 0x103c, ..a }, Dtype::F32, &shape, Access::Read)
            .unwrap();
        assert_eq!(checks.finish(), Err(Error::AliasedPointer { name: "c", other: "e" }));
    }
}
