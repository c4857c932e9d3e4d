//! `block_attention_{64,128,256}` or `block_attention_wide_128` and, where keys are split, `block_attention_combine_{64,128,256}`: attention of one layer.

use super::{Call, Checked, Entry, HEAD_DIMS, Pages, aligned, blocks, geometry, instance, mask_type, requests};
use crate::device::cuda::params::{BlockAttentionParams, Launch};
use crate::device::cuda::tensor::Access::{Read, Write};
use crate::device::cuda::tensor::Extent::{Any, AtLeast, Is};
use crate::device::cuda::tensor::{Dtype, Tensor, bad, int32};
use crate::device::cuda::{Driver, Kernel};
use crate::device::{AttentionParams, Mask};
use crate::error::Result;

static BLOCK_ATTENTION: [Kernel; 3] = [
    Kernel::new(c"block_attention_64"),
    Kernel::new(c"block_attention_128"),
    Kernel::new(c"block_attention_256"),
];
static WIDE: Kernel = Kernel::new(c"block_attention_wide_128");
static COMBINE: [Kernel; 3] = [
    Kernel::new(c"block_attention_combine_64"),
    Kernel::new(c"block_attention_combine_128"),
    Kernel::new(c"block_attention_combine_256"),
];

/// Rows of queries, times heads of a group, that a block takes, and that a wide one does.
const ROWS: u32 = 64;
const WIDE_ROWS: u32 = 128;
/// Blocks from which on they are wide.
const WIDE_BLOCKS: u128 = 1024;
/// Splits of a group, merged before others: the blocks of a cluster, where a device runs them.
const MERGED: usize = 8;
/// Tiles of queries: the most that a grid's second extent holds.
const MOST: usize = 65535;
/// Splits of the keys: the most that a grid's third extent holds in whole groups.
const MOST_SPLITS: usize = MOST / MERGED * MERGED;

/// `T` packed tokens, `Hq` query heads in groups over `Hkv` key heads, `D` elements per head.
#[derive(Clone, Debug)]
pub struct BlockAttention {
    /// bfloat16 `[T, Hq, D]`, positions already rotated in.
    pub q: Tensor,
    /// bfloat16 `[T, Hkv, D]`.
    pub k: Tensor,
    /// bfloat16 `[T, Hkv, D]`.
    pub v: Tensor,
    /// bfloat16 `[slots, Hkv, D]`; written where `slots` says.
    pub k_cache: Tensor,
    /// bfloat16 `[slots, Hkv, D]`; written where `slots` says.
    pub v_cache: Tensor,
    /// bfloat16 `[T, Hq, D]`, written.
    pub out: Tensor,
    /// int32 `[R + 1]`: first token of every request.
    pub query_starts: Tensor,
    /// int32 `[R]`: tokens with KV.
    pub context_lens: Tensor,
    /// Where KV is.
    pub pages: Pages,
    /// Tokens of the longest request of the step; at most `T`.
    pub max_block_len: usize,
    /// Keys of the longest request, its context and its own.
    pub max_keys: usize,
    /// Scale, mask, window and soft cap.
    pub params: AttentionParams,
    /// int32 `[R]`: first context key that is seen; 0 without.
    pub valid_from: Option<Tensor>,
    /// int64 `[T]`: where K and V of the tokens are stored, negative to leave one out; nowhere without.
    pub slots: Option<Tensor>,
    /// int64 or uint64 `[T, words]`, for [`Mask::Ancestors`]: bit `j` of a token is set for itself and whom it descends from.
    pub ancestors: Option<Tensor>,
    /// float32 `[parts or more, T, Hq, D]`, aligned to 16 bytes, written; for several parts.
    pub partial_out: Option<Tensor>,
    /// float32 `[parts or more, T, Hq, 2]`, aligned to 8 bytes, written; for several parts.
    pub partial_stats: Option<Tensor>,
    /// Parts that the keys are cut into; they cover `max_keys`.
    pub num_splits: usize,
    /// Keys of a split, a multiple of 64.
    pub split_keys: usize,
    /// Whether groups of 8 splits are merged on the chip, which takes a device that [`runs_clusters`]. A part in memory is then a
    /// group, and a split otherwise; results are the same.
    pub clusters: bool,
    /// float32 `[Hq]`: scores of one more key per head.
    pub sinks: Option<Tensor>,
}

impl BlockAttention {
    /// Checks the arguments.
    ///
    /// # Errors
    /// Names the argument, what it is and what it should be.
    pub fn check(&self) -> Result<Checked<BlockAttentionParams>> {
        let instance = instance(self.q.extent(2))?;
        self.check_numbers()?;
        self.check_splits()?;
        self.check_ancestors()?;
        let mut call = Call::default();
        let parameters = self.check_tensors(&mut call)?;
        let attend = parameters.launch(self.q.extent(2) as u32);
        if attend.grid[1] as usize > MOST {
            return Err(bad(
                "max_block_len",
                format!("{}, {} tiles of queries", self.max_block_len, attend.grid[1]),
                format!("at most {MOST} tiles"),
            ));
        }
        let kernel = if parameters.rows(self.q.extent(2) as u32) == WIDE_ROWS {
            &WIDE
        } else {
            &BLOCK_ATTENTION[instance]
        };
        call.finish(
            parameters,
            [(kernel, attend), (&COMBINE[instance], parameters.combine_launch())],
        )
    }

    fn check_numbers(&self) -> Result<()> {
        let (tokens, heads, kv_heads) = (self.q.extent(0), self.q.extent(1), self.k.extent(1));
        let AttentionParams {
            scale, window, softcap, ..
        } = self.params;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || heads / kv_heads > 64 {
            return Err(bad(
                "q",
                format!("{heads} heads over {kv_heads} key heads"),
                "1..64 query heads for every key head",
            ));
        }
        if !scale.is_finite() {
            return Err(bad("scale", scale.to_string(), "a finite number"));
        }
        if window == Some(0) {
            return Err(bad("window", "0", "at least 1, or None"));
        }
        if let Some(softcap) = softcap
            && !(softcap.is_finite() && softcap > 0.0)
        {
            return Err(bad("softcap", softcap.to_string(), "a positive number, or None"));
        }
        if self.max_block_len > tokens {
            return Err(bad(
                "max_block_len",
                self.max_block_len.to_string(),
                format!("at most {tokens}, the rows of q"),
            ));
        }
        Ok(())
    }

    fn check_splits(&self) -> Result<()> {
        let Self {
            max_keys,
            num_splits,
            split_keys,
            ..
        } = *self;
        if split_keys == 0 || !split_keys.is_multiple_of(64) {
            return Err(bad("split_keys", split_keys.to_string(), "a multiple of 64"));
        }
        let needed = max_keys.div_ceil(split_keys).max(1);
        if num_splits < needed || num_splits > MOST_SPLITS {
            return Err(bad(
                "num_splits",
                num_splits.to_string(),
                format!("{needed}..{MOST_SPLITS}: {split_keys} keys each for requests of up to {max_keys} keys"),
            ));
        }
        Ok(())
    }

    fn check_ancestors(&self) -> Result<()> {
        if (self.params.mask == Mask::Ancestors) != self.ancestors.is_some() {
            let got = if self.ancestors.is_some() { "a tensor" } else { "None" };
            let expected = "a tensor with mask='ancestors', None otherwise";
            return Err(bad("ancestors", got, expected));
        }
        let (words, longest) = (self.words(), self.max_block_len);
        if self.ancestors.is_some() && longest > words.saturating_mul(64) {
            return Err(bad(
                "ancestors",
                format!("{words} words per token"),
                format!("{} for requests of up to {longest} tokens", longest.div_ceil(64)),
            ));
        }
        let parts = self.parts();
        if parts > 1 && (self.partial_out.is_none() || self.partial_stats.is_none()) {
            return Err(bad(
                "partial_out, partial_stats",
                "None",
                format!("workspaces for {parts} parts"),
            ));
        }
        Ok(())
    }

    /// Partial results of a row in memory.
    fn parts(&self) -> usize {
        if self.clusters {
            self.num_splits.div_ceil(MERGED)
        } else {
            self.num_splits
        }
    }

    fn words(&self) -> usize {
        self.ancestors.as_ref().map_or(0, |ancestors| ancestors.extent(1))
    }

    fn check_tensors(&self, call: &mut Call) -> Result<BlockAttentionParams> {
        let r = requests(&self.query_starts)?;
        let (tokens, heads, dim) = (self.q.extent(0), self.q.extent(1), self.q.extent(2));
        let kv_heads = self.k.extent(1);
        let (q, q_stride) = call.heads("q", &self.q, [Any, Any, Any], Read)?;
        let own = [Is(tokens), Is(kv_heads), Is(dim)];
        let (k, k_stride) = call.heads("k", &self.k, own, Read)?;
        let (v, v_stride) = call.heads("v", &self.v, own, Read)?;
        let access = if self.slots.is_some() { Write } else { Read };
        let (k_cache, k_cache_stride) = call.heads("k_cache", &self.k_cache, [Any, Is(kv_heads), Is(dim)], access)?;
        let cache = [Is(self.k_cache.extent(0)), Is(kv_heads), Is(dim)];
        let (v_cache, v_cache_stride) = call.heads("v_cache", &self.v_cache, cache, access)?;
        let (out, out_stride) = call.heads("out", &self.out, [Is(tokens), Is(heads), Is(dim)], Write)?;
        let words = self.words();
        let partial = |width| [AtLeast(self.parts()), Is(tokens), Is(heads), Is(width)];
        for (name, partial, alignment) in [
            ("partial_out", &self.partial_out, 16),
            ("partial_stats", &self.partial_stats, 8),
        ] {
            partial
                .as_ref()
                .map_or(Ok(()), |partial| aligned(name, partial, alignment))?;
        }
        let parameters = BlockAttentionParams {
            q,
            k,
            v,
            k_cache,
            v_cache,
            out,
            query_starts: call.read("query_starts", &self.query_starts, Dtype::I32, &[Is(r + 1)])?,
            context_lens: call.read("context_lens", &self.context_lens, Dtype::I32, &[Is(r)])?,
            valid_from: call.maybe_read("valid_from", &self.valid_from, Dtype::I32, &[Is(r)])?,
            slots: call.maybe_read("slots", &self.slots, Dtype::I64, &[Is(tokens)])?,
            ancestors: call.maybe_read(
                "ancestors",
                &self.ancestors,
                mask_type(&self.ancestors),
                &[Is(tokens), Is(words)],
            )?,
            partial_out: call.maybe_write("partial_out", &self.partial_out, Dtype::F32, &partial(dim))?,
            partial_stats: call.maybe_write("partial_stats", &self.partial_stats, Dtype::F32, &partial(2))?,
            sinks: call.maybe_read("sinks", &self.sinks, Dtype::F32, &[Is(heads)])?,
            table: call.table(&self.pages, r)?,
            q_stride,
            k_stride,
            v_stride,
            out_stride,
            k_cache_stride,
            v_cache_stride,
            num_requests: int32("query_starts", r)?,
            q_heads: int32("q", heads)?,
            kv_heads: int32("k", kv_heads)?,
            max_tokens: int32("q", tokens)?,
            max_block_len: int32("max_block_len", self.max_block_len)?,
            num_splits: int32("num_splits", self.num_splits)?,
            split_keys: int32("split_keys", self.split_keys)?,
            mask: self.params.mask as i32,
            mask_words: int32("ancestors", words)?,
            window: int32("window", self.params.window.unwrap_or(0))?,
            scale: self.params.scale,
            softcap: self.params.softcap.unwrap_or(0.0),
            clusters: i32::from(self.clusters),
            reserved: 0,
        };
        // A grid's first extent.
        int32("query_starts", r.saturating_mul(kv_heads))?;
        Ok(parameters)
    }
}

impl BlockAttentionParams {
    /// Tiles of so many rows that the longest request has.
    fn tiles(&self, rows: u32) -> u32 {
        let group = (self.q_heads / self.kv_heads) as u32;
        (self.max_block_len as u32).div_ceil((rows / group).max(1))
    }

    /// Rows of a block: wide where a request has more than others hold, and there are blocks enough.
    fn rows(&self, head_dim: u32) -> u32 {
        let rows = i64::from(self.max_block_len) * i64::from(self.q_heads / self.kv_heads);
        let heads = self.num_requests as u128 * self.kv_heads as u128;
        let many = heads * u128::from(self.tiles(WIDE_ROWS)) * self.num_splits as u128 >= WIDE_BLOCKS;
        if head_dim == 128 && rows > i64::from(ROWS) && many {
            WIDE_ROWS
        } else {
            ROWS
        }
    }

    /// Request and KV head, tile of queries, split of the keys: whole clusters.
    pub fn launch(&self, head_dim: u32) -> Launch {
        self.launch_of(head_dim, self.rows(head_dim))
    }

    fn launch_of(&self, head_dim: u32, rows: u32) -> Launch {
        let keys = if head_dim > 128 { 32 } else { 64 };
        let shared = 2 * head_dim * (rows + 4 * keys) + 2 * keys * 16;
        let splits = self.num_splits as u32;
        let cluster = if self.clusters == 0 {
            1
        } else {
            splits.next_power_of_two().min(MERGED as u32)
        };
        let grid = [
            (self.num_requests * self.kv_heads) as u32,
            self.tiles(rows),
            splits.next_multiple_of(cluster),
        ];
        Launch {
            cluster,
            ..geometry(grid, 2 * rows, shared)
        }
    }

    /// A warp per token and head; nothing to do with one part.
    pub fn combine_launch(&self) -> Launch {
        let rows = self.max_tokens as u128 * self.q_heads as u128;
        let most = if self.clusters == 0 { 1 } else { MERGED as i32 };
        let needed = if self.num_splits > most {
            blocks(rows.div_ceil(4))
        } else {
            0
        };
        geometry([needed, 1, 1], 128, 0)
    }
}

/// Whether `device`, the current one, runs the attention in clusters of blocks: [`BlockAttention::clusters`].
///
/// # Errors
/// Another device that is current; those of [`Driver::runs_cluster`].
pub fn runs_clusters(driver: &impl Driver, device: i32) -> Result<bool> {
    let current = driver.current_device(device)?;
    if current != device {
        return Err(bad(
            "device",
            device.to_string(),
            format!("{current}, which is current"),
        ));
    }
    let bytes = size_of::<BlockAttentionParams>();
    let largest = BlockAttentionParams {
        num_requests: 1,
        q_heads: 1,
        kv_heads: 1,
        max_block_len: 1,
        num_splits: MERGED as i32,
        clusters: 1,
        ..Default::default()
    };
    for (kernel, launch) in attending(&largest) {
        if !driver.runs_cluster(kernel, bytes, launch)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The kernels that attend, each as it launches one block or cluster of `one`.
fn attending(one: &BlockAttentionParams) -> impl Iterator<Item = (&'static Kernel, Launch)> + '_ {
    let usual = BLOCK_ATTENTION.iter().zip(HEAD_DIMS);
    let usual = usual.map(|(kernel, head_dim)| (kernel, one.launch_of(head_dim as u32, ROWS)));
    usual.chain([(&WIDE, one.launch_of(128, WIDE_ROWS))])
}

pub(super) fn kernels() -> Vec<Entry> {
    let bytes = size_of::<BlockAttentionParams>();
    let one = BlockAttentionParams {
        q_heads: 1,
        kv_heads: 1,
        ..Default::default()
    };
    attending(&one)
        .map(|(kernel, launch)| (kernel, bytes, launch.shared))
        .chain(COMBINE.iter().map(|kernel| (kernel, bytes, 0)))
        .collect()
}
