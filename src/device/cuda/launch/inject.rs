//! `kv_inject_{64,128,256}`: drafter K and V of committed tokens into the caches of all layers.

use super::{Call, Checked, Entry, aligned, blocks, geometry, instance};
use crate::device::cuda::Kernel;
use crate::device::cuda::params::{KvInjectParams, Launch};
use crate::device::cuda::tensor::Access::{Read, Write};
use crate::device::cuda::tensor::Extent::{Any, AtLeast, Is};
use crate::device::cuda::tensor::{Dtype, Tensor, VECTOR, bad, int32};
use crate::error::Result;

static KV_INJECT: [Kernel; 3] = [
    Kernel::new(c"kv_inject_64"),
    Kernel::new(c"kv_inject_128"),
    Kernel::new(c"kv_inject_256"),
];

/// `M` tokens, `L` layers, `H` key heads of `D` elements.
#[derive(Clone, Debug)]
pub struct KvInject {
    /// bfloat16 `[M or more, L, 2, H, D]`: keys and values as projected, heads next to each other.
    pub kv: Tensor,
    /// bfloat16 `[L, D]`: scale of every layer's key norm.
    pub k_norm: Tensor,
    /// float32 `[any, rotary]`: cos, then sin, of every position.
    pub cos_sin: Tensor,
    /// int64 `[M]`: row of `kv` of every token, negative to leave it out; without, row `m` for token `m`, and `M` rows.
    pub rows: Option<Tensor>,
    /// int64 `[M]`.
    pub positions: Tensor,
    /// int64 `[M]`; negative to leave a token out.
    pub slots: Tensor,
    /// int64 `[L]`: addresses of the layers' key caches.
    pub k_caches: Tensor,
    /// int64 `[L]`: addresses of the layers' value caches.
    pub v_caches: Tensor,
    /// bfloat16 `[slots, H, D]`: one of them. It stands for all: the kernel reads their addresses from device memory.
    pub cache: Tensor,
    /// Of the norm.
    pub eps: f32,
}

impl KvInject {
    /// Checks the arguments.
    ///
    /// # Errors
    /// Names the argument, what it is and what it should be.
    pub fn check(&self) -> Result<Checked<KvInjectParams>> {
        let kv = &self.kv;
        let (layers, heads, dim) = (kv.extent(1), kv.extent(3), kv.extent(4));
        let instance = instance(dim)?;
        let count = self.positions.extent(0);
        let rotary = self.cos_sin.extent(1);
        if rotary == 0 || !rotary.is_multiple_of(16) || rotary > dim {
            return Err(bad(
                "cos_sin",
                format!("rows of {rotary}"),
                format!("rows of a multiple of 16, at most head_dim {dim}"),
            ));
        }
        if !(self.eps.is_finite() && self.eps >= 0.0) {
            return Err(bad("eps", self.eps.to_string(), "a finite number of at least 0"));
        }
        let source_rows = if self.rows.is_some() { Any } else { Is(count) };
        let source = [source_rows, Any, Is(2), Any, Is(dim)];
        let mut call = Call::default();
        let address = call.0.strided("kv", kv, Dtype::Bf16, &source, VECTOR, Read)?;
        if heads > 1 && kv.stride(3) != dim as i64 {
            return Err(bad(
                "kv",
                format!("a stride of {} from head to head", kv.stride(3)),
                format!("{dim}, heads next to each other"),
            ));
        }
        let (_, cache_strides) = call.heads("cache", &self.cache, [Any, Is(heads), Is(dim)], Write)?;
        let parameters = KvInjectParams {
            kv: address,
            k_norm: call.read("k_norm", &self.k_norm, Dtype::Bf16, &[Is(layers), Is(dim)])?,
            cos_sin: call.read("cos_sin", &self.cos_sin, Dtype::F32, &[AtLeast(1), Is(rotary)])?,
            rows: call.maybe_read("rows", &self.rows, Dtype::I64, &[Is(count)])?,
            positions: call.read("positions", &self.positions, Dtype::I64, &[Any])?,
            slots: call.read("slots", &self.slots, Dtype::I64, &[Is(count)])?,
            k_caches: call.read("k_caches", &self.k_caches, Dtype::I64, &[Is(layers)])?,
            v_caches: call.read("v_caches", &self.v_caches, Dtype::I64, &[Is(layers)])?,
            row_stride: kv.stride(0),
            layer_stride: kv.stride(1),
            v_offset: kv.stride(2),
            slot_stride: cache_strides[0],
            head_stride: cache_strides[1],
            max_rows: int32("positions", count)?,
            num_layers: int32("kv", layers)?,
            num_heads: int32("kv", heads)?,
            rotary_dim: int32("cos_sin", rotary)?,
            eps: self.eps,
            reserved: 0,
        };
        aligned("k_norm", &self.k_norm, VECTOR)?;
        call.finish(parameters, [(&KV_INJECT[instance], parameters.launch(dim as u32))])
    }
}

impl KvInjectParams {
    /// `head_dim / 8` threads per head vector.
    pub fn launch(&self, head_dim: u32) -> Launch {
        let units = self.max_rows as u128 * self.num_layers as u128 * 2 * self.num_heads as u128;
        let blocks = blocks(units.div_ceil(u128::from(256 / (head_dim / 8))));
        geometry([blocks, 1, 1], 256, 0)
    }
}

pub(super) fn kernels() -> Vec<Entry> {
    KV_INJECT
        .iter()
        .map(|kernel| (kernel, size_of::<KvInjectParams>(), 0))
        .collect()
}
