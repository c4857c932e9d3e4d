//! Block attention over a paged cache.
//!
//! A tile is one request, one key head, and a few queries with all the query heads of the group, so that every key and value is
//! loaded once for all of them:
//!
//! ```text
//! scores[row][key] = q . k      sixteen keys at a time, in place in the cache where sixteen of them lie evenly spaced
//! softmax                       max, exponentials, sum over the row
//! acc[row] += w * v             key after key
//! ```
//!
//! Scores of a whole row are kept (4 bytes per key and row) instead of a running softmax: no rescaling, and the order of every
//! sum is a function of the key's position alone. That order is the promise of `HostKernels::block_attention`: a dot product runs along
//! the head, the sum of weights runs over key positions in sixteen lanes (`position mod 16`), values are added in key order. A tree
//! token's ancestors take the positions they would have in a chain.

mod keys;
mod sums;
mod tile;

use self::tile::{Scratch, attend};
use super::AttentionTensors;
use super::batch::{Ancestors, AttentionBatch, Request};
use super::simd::{Isa, Lanes, Routine, dispatch};
use super::view::{Element, LANES, Rows, RowsMut};
use crate::device::{AttentionParams, Mask};
use crate::error::{Error, Result};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Rows of a tile: enough to amortise loads, few enough that queries and accumulators stay in the first-level cache.
const TILE_ROWS: usize = 32;
/// Scores of a tile, in floats: a quarter of a megabyte, so that they stay in the second-level cache.
const TILE_SCORES: usize = 1 << 16;
/// Multiply-adds that are worth another thread; starting one costs some 20 microseconds.
const WORK_PER_THREAD: usize = 1 << 22;
/// Largest supported head.
const MAX_HEAD_DIM: usize = 512;

pub(super) fn run<E: Element>(
    isa: Isa,
    threads: usize,
    batch: &AttentionBatch,
    params: &AttentionParams,
    tensors: AttentionTensors<'_, E>,
) -> Result<()> {
    check(batch, params, &tensors)?;
    let AttentionTensors {
        q,
        k,
        v,
        mut k_cache,
        mut v_cache,
        out,
        sinks,
    } = tensors;
    if let Some(slots) = &batch.slots {
        store(&k, slots, &mut k_cache);
        store(&v, slots, &mut v_cache);
    }
    let layer = Layer {
        batch,
        params,
        q,
        k,
        v,
        k_cache: k_cache.as_rows(),
        v_cache: v_cache.as_rows(),
        out,
        sinks,
    };
    let tiles = layer.tiles();
    let work = batch.pairs() * layer.q.layout().heads * layer.q.layout().dim * 2;
    let threads = threads.min(work / WORK_PER_THREAD + 1).min(tiles.len());
    if threads <= 1 {
        dispatch(
            isa,
            Share {
                layer: &layer,
                tiles: &tiles,
                next: None,
            },
        );
        return Ok(());
    }
    let next = AtomicUsize::new(0);
    let share = || {
        dispatch(
            isa,
            Share {
                layer: &layer,
                tiles: &tiles,
                next: Some(&next),
            },
        )
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(share);
        }
        share();
    });
    Ok(())
}

fn check<E: Element>(
    batch: &AttentionBatch,
    params: &AttentionParams,
    tensors: &AttentionTensors<'_, E>,
) -> Result<()> {
    let invalid = |name, got: String, expected: String| Err(Error::InvalidArgument { name, got, expected });
    let q = tensors.q.layout();
    let (kv_heads, dim) = (tensors.k.layout().heads, q.dim);
    if dim == 0 || dim > MAX_HEAD_DIM {
        return invalid("head_dim", dim.to_string(), format!("1..{MAX_HEAD_DIM}"));
    }
    if kv_heads == 0 || !q.heads.is_multiple_of(kv_heads) {
        return invalid(
            "num_q_heads",
            q.heads.to_string(),
            format!("a multiple of the {kv_heads} key heads"),
        );
    }
    let shapes = [
        ("q", q, batch.tokens, q.heads),
        ("k", tensors.k.layout(), batch.tokens, kv_heads),
        ("v", tensors.v.layout(), batch.tokens, kv_heads),
        ("k_cache", tensors.k_cache.layout(), batch.num_slots, kv_heads),
        ("v_cache", tensors.v_cache.layout(), batch.num_slots, kv_heads),
        ("out", tensors.out.layout(), batch.tokens, q.heads),
    ];
    for (name, layout, rows, heads) in shapes {
        if (layout.rows, layout.heads, layout.dim) != (rows, heads, dim) {
            let got = format!("[{}, {}, {}]", layout.rows, layout.heads, layout.dim);
            return invalid(name, got, format!("[{rows}, {heads}, {dim}]"));
        }
    }
    if params.window == Some(0) {
        return invalid("window", "0".into(), "at least 1, or none".into());
    }
    if !params.scale.is_finite() {
        return invalid("scale", params.scale.to_string(), "a finite number".into());
    }
    if let Some(softcap) = params.softcap
        && !(softcap.is_finite() && softcap > 0.0)
    {
        return invalid("softcap", softcap.to_string(), "a positive number, or none".into());
    }
    if let Some(sinks) = tensors.sinks
        && sinks.len() != q.heads
    {
        return Err(Error::Length {
            name: "sinks",
            got: sinks.len(),
            expected: q.heads,
        });
    }
    if params.mask == Mask::Ancestors && batch.ancestors.is_none() {
        return invalid("mask", "Ancestors".into(), "a batch made with ancestors".into());
    }
    Ok(())
}

fn store<E: Element>(new: &Rows<'_, E>, slots: &[usize], cache: &mut RowsMut<'_, E>) {
    for (token, &slot) in slots.iter().enumerate() {
        for head in 0..new.layout().heads {
            cache.row_mut(slot, head).copy_from_slice(new.row(token, head));
        }
    }
}

struct Layer<'a, E> {
    batch: &'a AttentionBatch,
    params: &'a AttentionParams,
    q: Rows<'a, E>,
    k: Rows<'a, E>,
    v: Rows<'a, E>,
    k_cache: Rows<'a, E>,
    v_cache: Rows<'a, E>,
    out: RowsMut<'a, E>,
    sinks: Option<&'a [f32]>,
}

struct Tile {
    request: usize,
    kv_head: usize,
    /// Queries, counted from the request's first token.
    queries: Range<usize>,
}

impl<E: Element> Layer<'_, E> {
    fn group(&self) -> usize {
        self.q.layout().heads / self.k.layout().heads
    }

    fn tiles(&self) -> Vec<Tile> {
        let group = self.group();
        let mut tiles = Vec::new();
        for (index, request) in self.batch.requests.iter().enumerate() {
            let width = (request.context + request.len).next_multiple_of(LANES);
            let queries = (TILE_SCORES / (group * width).max(1)).min(TILE_ROWS / group).max(1);
            for kv_head in 0..self.k.layout().heads {
                for first in (0..request.len).step_by(queries) {
                    tiles.push(Tile {
                        request: index,
                        kv_head,
                        queries: first..request.len.min(first + queries),
                    });
                }
            }
        }
        tiles
    }

    /// Where key positions and queries of `request` meet.
    fn view(&self, request: &Request, query: usize) -> Visible {
        let ancestors = self.ancestors();
        let depth = ancestors.map_or(query, |a| a.depth(request.start + query));
        let position = request.context + depth;
        let window = self.params.window.unwrap_or(usize::MAX);
        let end = match self.params.mask {
            Mask::Causal | Mask::Ancestors => position + 1,
            Mask::Block => (request.context + request.len).min(position.saturating_add(window)),
        };
        Visible {
            start: request.valid_from.max((position + 1).saturating_sub(window)),
            end,
        }
    }

    fn ancestors(&self) -> Option<&Ancestors> {
        self.batch
            .ancestors
            .as_ref()
            .filter(|_| self.params.mask != Mask::Block)
    }
}

/// Key positions that a query sees: a range, because a tree token's ancestors count as positions after the context.
#[derive(Clone, Copy, PartialEq)]
struct Visible {
    start: usize,
    end: usize,
}

impl Visible {
    /// The part within the chunk that starts at `first`, counted from there.
    #[inline(always)]
    fn within(&self, first: usize) -> Range<usize> {
        let clip = |x: usize| x.saturating_sub(first).min(LANES);
        clip(self.start)..clip(self.end)
    }

    /// The whole chunks that hold the range.
    #[inline(always)]
    fn chunks(&self) -> Range<usize> {
        self.start / LANES * LANES..self.end.next_multiple_of(LANES)
    }
}

/// Tiles for one thread: all of them, or the next one that nobody took.
struct Share<'a, E> {
    layer: &'a Layer<'a, E>,
    tiles: &'a [Tile],
    next: Option<&'a AtomicUsize>,
}

impl<E: Element> Routine for Share<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        thread_local! {
            // Kept between calls: a fresh quarter of a megabyte would be page faults in every layer.
            static SCRATCH: RefCell<Scratch> = RefCell::default();
        }
        let mut scratch = SCRATCH.take();
        match self.next {
            None => {
                for tile in self.tiles {
                    attend::<L, E>(self.layer, tile, &mut scratch);
                }
            }
            Some(next) => {
                while let Some(tile) = self.tiles.get(next.fetch_add(1, Ordering::Relaxed)) {
                    attend::<L, E>(self.layer, tile, &mut scratch);
                }
            }
        }
        SCRATCH.set(scratch);
    }
}
