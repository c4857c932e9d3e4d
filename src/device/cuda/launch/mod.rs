//! What every kernel takes, checked before anything reaches the driver: one module per stage of a step.
//!
//! ```text
//! PrepareBlock { .. }   what its caller has: tensors, sizes, numbers
//!      │ check()        refuses what the kernel cannot take, by name, with what was got and what is expected
//!      v
//! Checked<P>            the kernel's parameters, and which kernels run with them on what grid: a value, to look at or to launch
//!      │ launch()       refuses tensors of another device than the current one; then the driver, kernel by kernel
//!      v
//! the caller's stream
//! ```
//!
//! The sizes in the parameters are those of the tensors that were checked, never numbers that came beside them. A kernel with
//! nothing to do is not launched, and that is a success.

mod accept;
mod attention;
#[allow(unsafe_code, reason = "a launch passes addresses on its caller's word")]
mod checked;
mod compact;
mod delta;
mod inject;
mod prepare;
mod probe;
mod sample;
mod tree;

pub use accept::Accept;
pub use attention::{BlockAttention, runs_clusters};
pub use checked::Checked;
pub use compact::CompactKv;
pub use delta::DeltaRule;
pub use inject::KvInject;
pub use prepare::PrepareBlock;
pub use probe::Probe;
pub use sample::{SampleRows, scratch_bytes};
pub use tree::{TreeBuild, TreeTopK};

use super::params::{Address, Launch, PageTable};
use super::tensor::Access::{Read, Write};
use super::tensor::Extent::{Any, Is};
use super::tensor::{Access, Checks, Dtype, Extent, Tensor, VECTOR, bad, int32};
use super::{Driver, Kernel, Usage};
use crate::error::{Error, Result};

/// A kernel that [`load`] knows: itself, bytes of its parameters, most dynamic shared memory that a launch asks for.
type Entry = (&'static Kernel, usize, u32);

/// Loads every kernel into the current context, as launches that are to be captured in a graph need, and says what its code takes.
///
/// # Errors
/// Those of [`Driver::load`].
pub fn load(driver: &impl Driver) -> Result<Vec<(&'static str, Usage)>> {
    let families: [fn() -> Vec<Entry>; 9] = [
        probe::kernels,
        prepare::kernels,
        inject::kernels,
        attention::kernels,
        sample::kernels,
        accept::kernels,
        tree::kernels,
        compact::kernels,
        delta::kernels,
    ];
    let entries = families.into_iter().flat_map(|kernels| kernels());
    entries
        .map(|(kernel, bytes, shared)| Ok((kernel.name(), driver.load(kernel, bytes, shared)?)))
        .collect()
}

/// The checks of one call, tensor by tensor.
#[derive(Default)]
struct Call(Checks);

impl Call {
    fn read(&mut self, name: &'static str, tensor: &Tensor, dtype: Dtype, shape: &[Extent]) -> Result<Address> {
        self.0.dense(name, tensor, dtype, shape, Read)
    }

    fn write(&mut self, name: &'static str, tensor: &Tensor, dtype: Dtype, shape: &[Extent]) -> Result<Address> {
        self.0.dense(name, tensor, dtype, shape, Write)
    }

    /// 0 for a tensor that was left out.
    fn maybe_read(
        &mut self,
        name: &'static str,
        tensor: &Option<Tensor>,
        dtype: Dtype,
        shape: &[Extent],
    ) -> Result<Address> {
        self.0.dense_or_null(name, tensor.as_ref(), dtype, shape, Read)
    }

    fn maybe_write(
        &mut self,
        name: &'static str,
        tensor: &Option<Tensor>,
        dtype: Dtype,
        shape: &[Extent],
    ) -> Result<Address> {
        self.0.dense_or_null(name, tensor.as_ref(), dtype, shape, Write)
    }

    /// bfloat16 `[rows, heads, dim]`, read 16 bytes at a time, with its row and head strides.
    fn heads(
        &mut self,
        name: &'static str,
        tensor: &Tensor,
        shape: [Extent; 3],
        access: Access,
    ) -> Result<(Address, [i64; 2])> {
        let address = self.0.strided(name, tensor, Dtype::Bf16, &shape, VECTOR, access)?;
        Ok((address, [tensor.stride(0), tensor.stride(1)]))
    }

    /// float32 or bfloat16 rows of at least `columns` columns, any stride from row to row.
    fn rows(&mut self, name: &'static str, tensor: &Tensor, columns: usize) -> Result<Address> {
        let shape = [Any, Extent::AtLeast(columns)];
        self.0
            .strided(name, tensor, tensor.dtype, &shape, tensor.dtype.bytes(), Read)
    }

    fn table(&mut self, table: &Pages, requests: usize) -> Result<PageTable> {
        if table.page_size == 0 {
            return Err(bad("page_size", "0", "at least 1"));
        }
        Ok(PageTable {
            pages: self.read("page_table", &table.page_table, Dtype::I32, &[Any, Any])?,
            row_ids: self.read("row_ids", &table.row_ids, Dtype::I32, &[Is(requests)])?,
            width: int32("page_table", table.page_table.extent(1))?,
            page_size: int32("page_size", table.page_size)?,
        })
    }

    fn finish<P>(
        self,
        parameters: P,
        launches: impl IntoIterator<Item = (&'static Kernel, Launch)>,
    ) -> Result<Checked<P>> {
        Checked::new(self.0.finish()?, parameters, launches)
    }
}

/// Where requests keep their KV.
#[derive(Clone, Debug)]
pub struct Pages {
    /// int32 `[rows, width]`: page ids.
    pub page_table: Tensor,
    /// int32 `[R]`: each request's row.
    pub row_ids: Tensor,
    /// Slots per page, at least 1.
    pub page_size: usize,
}

/// Requests of a batch by its `query_starts`, `[R + 1]`.
fn requests(query_starts: &Tensor) -> Result<usize> {
    query_starts.extent(0).checked_sub(1).ok_or_else(|| {
        bad(
            "query_starts",
            format!("shape {:?}", query_starts.shape),
            "[R + 1]: the first token of every request, and their number",
        )
    })
}

/// Head widths that kernels are compiled for, in the order of their instances.
const HEAD_DIMS: [usize; 3] = [64, 128, 256];

/// Index of the instance for a head width.
fn instance(head_dim: usize) -> Result<usize> {
    HEAD_DIMS.iter().position(|&dim| dim == head_dim).ok_or_else(|| {
        bad(
            "head_dim",
            head_dim.to_string(),
            "64, 128 or 256: what the kernels are compiled for",
        )
    })
}

/// Index of the instance for a type of logits.
fn logit_type(name: &'static str, dtype: Dtype) -> Result<usize> {
    match dtype {
        Dtype::F32 => Ok(0),
        Dtype::Bf16 => Ok(1),
        other => Err(bad(name, other.name(), "float32 or bfloat16")),
    }
}

/// Node masks are words of 64 bits, whatever their sign is called.
fn mask_type(masks: &Option<Tensor>) -> Dtype {
    match masks {
        Some(tensor) if tensor.dtype == Dtype::I64 => Dtype::I64,
        _ => Dtype::U64,
    }
}

fn at_most(name: &'static str, value: usize, limit: usize) -> Result<i32> {
    if value > limit {
        return Err(bad(name, value.to_string(), format!("at most {limit}")));
    }
    int32(name, value)
}

fn aligned(name: &'static str, tensor: &Tensor, alignment: usize) -> Result<()> {
    if tensor.address.is_multiple_of(alignment) {
        return Ok(());
    }
    Err(Error::MisalignedPointer {
        name,
        address: tensor.address,
        alignment,
    })
}

/// Blocks of a grid; more than 32 bits hold are more than any device runs, which [`Checked`] refuses.
fn blocks(count: u128) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn geometry(grid: [u32; 3], block: u32, shared: u32) -> Launch {
    Launch {
        grid,
        block,
        shared,
        cluster: 1,
    }
}
