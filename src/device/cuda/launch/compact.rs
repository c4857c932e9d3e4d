//! `compact_kv`: the KV of an accepted path moves to where a chain's would be, in all layers.

use super::{Call, Checked, Entry, Pages, blocks, geometry};
use crate::device::cuda::Kernel;
use crate::device::cuda::params::{CompactKvParams, Launch};
use crate::device::cuda::tensor::Access::Write;
use crate::device::cuda::tensor::Extent::{Any, Is};
use crate::device::cuda::tensor::{Dtype, Tensor, bad, int32};
use crate::error::Result;

static COMPACT_KV: Kernel = Kernel::new(c"compact_kv");

/// `R` requests, `L` layers.
#[derive(Clone, Debug)]
pub struct CompactKv {
    /// int32 `[R, any]`: nodes that were kept, -1 behind them.
    pub path: Tensor,
    /// int32 `[R]`: tokens with KV before the step.
    pub context_lens: Tensor,
    /// int64 `[L]`: addresses of the layers' key caches.
    pub k_caches: Tensor,
    /// int64 `[L]`: addresses of the layers' value caches.
    pub v_caches: Tensor,
    /// bfloat16 `[slots, heads, head_dim]`: one of them, which stands for all; `head_dim` is a multiple of 8.
    pub cache: Tensor,
    /// Where KV is.
    pub pages: Pages,
}

impl CompactKv {
    /// Checks the arguments.
    ///
    /// # Errors
    /// Names the argument, what it is and what it should be.
    pub fn check(&self) -> Result<Checked<CompactKvParams>> {
        let (r, layers) = (self.path.extent(0), self.k_caches.extent(0));
        let (heads, dim) = (self.cache.extent(1), self.cache.extent(2));
        if !dim.is_multiple_of(8) {
            return Err(bad("head_dim", dim.to_string(), "a multiple of 8"));
        }
        let mut call = Call::default();
        let (_, cache_strides) = call.heads("cache", &self.cache, [Any, Any, Any], Write)?;
        let parameters = CompactKvParams {
            path: call.read("path", &self.path, Dtype::I32, &[Any, Any])?,
            context_lens: call.read("context_lens", &self.context_lens, Dtype::I32, &[Is(r)])?,
            k_caches: call.read("k_caches", &self.k_caches, Dtype::I64, &[Any])?,
            v_caches: call.read("v_caches", &self.v_caches, Dtype::I64, &[Is(layers)])?,
            table: call.table(&self.pages, r)?,
            path_stride: self.path.extent(1) as i64,
            slot_stride: cache_strides[0],
            head_stride: cache_strides[1],
            num_requests: int32("path", r)?,
            num_layers: int32("k_caches", layers)?,
            num_heads: int32("cache", heads)?,
            head_dim: int32("cache", dim)?,
        };
        call.finish(parameters, [(&COMPACT_KV, parameters.launch())])
    }
}

impl CompactKvParams {
    /// Request, layer and K or V, 128 vectors of 8 elements.
    pub fn launch(&self) -> Launch {
        let vectors = self.num_heads as u128 * (self.head_dim as u128 / 8);
        let grid = [
            self.num_requests as u32,
            blocks(self.num_layers as u128 * 2),
            blocks(vectors.div_ceil(128)),
        ];
        geometry(grid, 128, 0)
    }
}

pub(super) fn kernels() -> Vec<Entry> {
    vec![(&COMPACT_KV, size_of::<CompactKvParams>(), 0)]
}
