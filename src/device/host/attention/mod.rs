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

use self::keys::{Source, widen};
use self::sums::{Cap, accumulate, add_scaled, sixteen, sixteen_mut, softmax};
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
const MAX_HEAD_DIM: usize = 256;

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

#[derive(Default)]
struct Scratch {
    /// `[rows, width]`, scaled, zero-padded to whole vectors.
    q: Vec<f32>,
    /// `[rows, keys]`, first scores in units of log2, then weights.
    scores: Vec<f32>,
    /// `[rows, width]`.
    acc: Vec<f32>,
    /// `[16, width]`: keys or values that cannot be used in place.
    chunk: Vec<f32>,
    /// Per query of the tile.
    visible: Vec<Visible>,
}

#[inline(always)]
fn attend<L: Lanes, E: Element>(layer: &Layer<'_, E>, tile: &Tile, scratch: &mut Scratch) {
    let request = &layer.batch.requests[tile.request];
    let source = |cache, new| Source {
        cache,
        new,
        pages: &layer.batch.pages[request.page_start..],
        page_size: layer.batch.page_size,
        request,
        head: tile.kv_head,
    };
    let keys = source(&layer.k_cache, &layer.k);
    let values = source(&layer.v_cache, &layer.v);
    let ancestors = layer.ancestors();

    let group = layer.group();
    let rows = tile.queries.len() * group;
    let vectors = layer.q.layout().dim.div_ceil(LANES);
    let width = vectors * LANES;
    let Scratch {
        q,
        scores,
        acc,
        chunk,
        visible,
    } = scratch;
    visible.clear();
    visible.extend(tile.queries.clone().map(|query| layer.view(request, query)));
    let start = visible
        .iter()
        .map(|v| v.chunks().start)
        .min()
        .expect("a tile has queries");
    let end = visible.iter().map(|v| v.end).max().expect("a tile has queries");
    // Positions up to here are keys of their own; a tree's tokens are not, two of them can share a position.
    let linear_end = if ancestors.is_some() {
        end.min(request.context)
    } else {
        end
    };
    let stride = end.next_multiple_of(LANES) - start;
    grow(q, rows * width);
    grow(scores, rows * stride);
    grow(acc, rows * width);
    grow(chunk, LANES * width);
    let (q, scores, acc, chunk) = (
        &mut q[..rows * width],
        &mut scores[..rows * stride],
        &mut acc[..rows * width],
        &mut chunk[..LANES * width],
    );

    // Exponentials are powers of two: log2(e) goes into the scale, and into what scores are compared with.
    let cap = layer.params.softcap.map(Cap::<L>::new);
    let scale = L::splat(layer.params.scale * std::f32::consts::LOG2_E);
    for (row, q) in q.chunks_exact_mut(width).enumerate() {
        let token = request.start + tile.queries.start + row / group;
        widen(layer.q.row(token, tile.kv_head * group + row % group), q);
        for d in (0..width).step_by(LANES) {
            L::load(sixteen(q, d)).mul(scale).store(sixteen_mut(q, d));
        }
    }

    for first in (start..linear_end).step_by(LANES) {
        let keys = keys.chunk(first, linear_end, chunk, vectors);
        for row in 0..rows {
            let seen = visible[row / group].within(first);
            if seen.is_empty() {
                continue;
            }
            let out = sixteen_mut(scores, row * stride + first - start);
            let mut dots = L::dots(&q[row * width..(row + 1) * width], &keys);
            if let Some(cap) = &cap {
                dots = cap.of(dots);
            }
            dots.store(out);
            if seen.len() < LANES {
                out[..seen.start].fill(f32::NEG_INFINITY);
                out[seen.end..].fill(f32::NEG_INFINITY);
            }
        }
    }
    if let Some(ancestors) = ancestors {
        for (row, scores) in scores.chunks_exact_mut(stride).enumerate() {
            let chunks = visible[row / group].chunks();
            // The chunk in which the context ends was filled to its end above, later ones not at all.
            let first = request.context.max(chunks.start);
            scores[first - start..chunks.end - start].fill(f32::NEG_INFINITY);
        }
        for first in (0..request.len).step_by(LANES) {
            let keys = keys.block_chunk(first, chunk, vectors);
            for row in 0..rows {
                let mut scored = L::dots(&q[row * width..(row + 1) * width], &keys);
                if let Some(cap) = &cap {
                    scored = cap.of(scored);
                }
                let mut dots = [0.0; LANES];
                scored.store(&mut dots);
                for (key, position) in path(ancestors, request, tile.queries.start + row / group, first) {
                    if position >= visible[row / group].start {
                        scores[row * stride + position - start] = dots[key];
                    }
                }
            }
        }
    }

    for (row, scores) in scores.chunks_exact_mut(stride).enumerate() {
        let chunks = visible[row / group].chunks();
        let sink = layer
            .sinks
            .map(|s| s[tile.kv_head * group + row % group] * std::f32::consts::LOG2_E);
        let sum = softmax::<L>(&mut scores[chunks.start - start..chunks.end - start], sink);
        // The reciprocal waits in the row's first query element, which nobody needs any more.
        q[row * width] = 1.0 / sum;
    }

    acc.fill(0.0);
    for first in (start..linear_end).step_by(LANES) {
        let values = values.chunk(first, linear_end, chunk, vectors);
        let mut row = 0;
        while row < rows {
            let mut seen = visible[row / group].within(first);
            let same = (row + 1..rows.min(row + L::ROWS))
                .take_while(|&r| visible[r / group].within(first) == seen)
                .count()
                + 1;
            seen.end = seen.end.min(linear_end - first);
            if !seen.is_empty() {
                let weights = &scores[row * stride + first - start..];
                let acc = &mut acc[row * width..];
                match same {
                    1 => accumulate::<L, 1>(weights, stride, &values, seen, acc),
                    2 => accumulate::<L, 2>(weights, stride, &values, seen, acc),
                    3 => accumulate::<L, 3>(weights, stride, &values, seen, acc),
                    _ => accumulate::<L, 4>(weights, stride, &values, seen, acc),
                }
            }
            row += same;
        }
    }
    if let Some(ancestors) = ancestors {
        for first in (0..request.len).step_by(LANES) {
            let values = values.block_chunk(first, chunk, vectors);
            for row in 0..rows {
                for (key, position) in path(ancestors, request, tile.queries.start + row / group, first) {
                    if position >= visible[row / group].start {
                        let weight = scores[row * stride + position - start];
                        let acc = &mut acc[row * width..(row + 1) * width];
                        add_scaled::<L>(weight, &values, key, acc);
                    }
                }
            }
        }
    }

    for (row, acc) in acc.chunks_exact_mut(width).enumerate() {
        let inverse = L::splat(q[row * width]);
        for d in (0..width).step_by(LANES) {
            L::load(sixteen(acc, d)).mul(inverse).store(sixteen_mut(acc, d));
        }
        let token = request.start + tile.queries.start + row / group;
        // SAFETY: a token and head belong to one tile, and one thread runs a tile.
        let out = unsafe { layer.out.row(token, tile.kv_head * group + row % group) };
        E::narrow(&acc[..out.len()], out);
    }
}

#[inline(always)]
fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

/// The tokens `first..first + 16` that `query` descends from, counted from `first`, each with its position.
#[inline(always)]
fn path<'a>(
    ancestors: &'a Ancestors,
    request: &'a Request,
    query: usize,
    first: usize,
) -> impl Iterator<Item = (usize, usize)> + 'a {
    ancestors
        .of(request.start + query)
        .enumerate()
        .filter(move |&(_, token)| (first..first + LANES).contains(&token))
        .map(move |(depth, token)| (token - first, request.context + depth))
}
