//! One tile: scores of its rows, their softmax, and the sum of values, stage after stage over its sixteen keys at a time.

use super::keys::{Source, widen};
use super::sums::{Cap, accumulate, add_scaled, sixteen, sixteen_mut, softmax};
use super::{Layer, Tile, Visible};
use crate::device::host::batch::{Ancestors, Request};
use crate::device::host::simd::Lanes;
use crate::device::host::view::{Element, LANES};
use std::f32::consts::LOG2_E;

/// Buffers of a thread, which grow to what its largest tile needed.
#[derive(Default)]
pub(super) struct Scratch {
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
pub(super) fn attend<L: Lanes, E: Element>(layer: &Layer<'_, E>, tile: &Tile, scratch: &mut Scratch) {
    let Scratch {
        q,
        scores,
        acc,
        chunk,
        visible,
    } = scratch;
    let request = &layer.batch.requests[tile.request];
    visible.clear();
    visible.extend(tile.queries.clone().map(|query| layer.view(request, query)));
    let stages = Stages::new(layer, tile, request, visible);
    let (rows, width, stride) = (stages.rows, stages.width, stages.stride);
    let q = sized(q, rows * width);
    let scores = sized(scores, rows * stride);
    let acc = sized(acc, rows * width);
    let chunk = sized(chunk, LANES * width);

    stages.load_queries::<L>(q);
    stages.score::<L>(q, scores, chunk);
    if let Some(ancestors) = stages.ancestors {
        stages.score_tree::<L>(ancestors, q, scores, chunk);
    }
    // The reciprocals of the rows' sums wait in their first query elements, which nobody needs any more.
    stages.weigh::<L>(scores, q);
    acc.fill(0.0);
    stages.add_values::<L>(scores, acc, chunk);
    if let Some(ancestors) = stages.ancestors {
        stages.add_tree_values::<L>(ancestors, scores, acc, chunk);
    }
    stages.write::<L>(acc, q);
}

/// The first `len` elements, whatever they held.
#[inline(always)]
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// What all stages of a tile need to know. Row `r` is query `r / group` of the tile and query head `r % group` of the group.
struct Stages<'a, E> {
    layer: &'a Layer<'a, E>,
    tile: &'a Tile,
    request: &'a Request,
    visible: &'a [Visible],
    keys: Source<'a, E>,
    values: Source<'a, E>,
    ancestors: Option<&'a Ancestors>,
    group: usize,
    rows: usize,
    /// Of a row of queries: elements, in whole vectors.
    vectors: usize,
    width: usize,
    /// The first key position that is looked at.
    start: usize,
    /// Positions up to here are keys of their own; a tree's tokens are not, two of them can share a position.
    linear_end: usize,
    /// Of a row of scores.
    stride: usize,
}

impl<'a, E: Element> Stages<'a, E> {
    #[inline(always)]
    fn new(layer: &'a Layer<'a, E>, tile: &'a Tile, request: &'a Request, visible: &'a [Visible]) -> Self {
        let source = |cache, new| Source {
            cache,
            new,
            pages: &layer.batch.pages[request.page_start..],
            page_size: layer.batch.page_size,
            request,
            head: tile.kv_head,
        };
        let ancestors = layer.ancestors();
        let group = layer.group();
        let vectors = layer.q.layout().dim.div_ceil(LANES);
        let starts = visible.iter().map(|v| v.chunks().start);
        let start = starts.min().expect("a tile has queries");
        let end = visible.iter().map(|v| v.end).max().expect("a tile has queries");
        Self {
            layer,
            tile,
            request,
            visible,
            keys: source(&layer.k_cache, &layer.k),
            values: source(&layer.v_cache, &layer.v),
            ancestors,
            group,
            rows: tile.queries.len() * group,
            vectors,
            width: vectors * LANES,
            start,
            linear_end: if ancestors.is_some() {
                end.min(request.context)
            } else {
                end
            },
            stride: end.next_multiple_of(LANES) - start,
        }
    }

    /// The packed token of a row, and its head.
    #[inline(always)]
    fn place(&self, row: usize) -> (usize, usize) {
        (
            self.request.start + self.tile.queries.start + row / self.group,
            self.tile.kv_head * self.group + row % self.group,
        )
    }

    #[inline(always)]
    fn seen(&self, row: usize) -> Visible {
        self.visible[row / self.group]
    }

    /// Queries, scaled. Exponentials are powers of two: log2(e) goes into the scale, and into what scores are compared with.
    #[inline(always)]
    fn load_queries<L: Lanes>(&self, q: &mut [f32]) {
        let scale = L::splat(self.layer.params.scale * LOG2_E);
        for (row, q) in q.chunks_exact_mut(self.width).enumerate() {
            let (token, head) = self.place(row);
            widen(self.layer.q.row(token, head), q);
            for d in (0..self.width).step_by(LANES) {
                L::load(sixteen(q, d)).mul(scale).store(sixteen_mut(q, d));
            }
        }
    }

    #[inline(always)]
    fn cap<L: Lanes>(&self) -> Option<Cap<L>> {
        self.layer.params.softcap.map(Cap::<L>::new)
    }

    /// Scores of the positions up to `linear_end`; -inf where a row does not see one of a chunk that it sees.
    #[inline(always)]
    fn score<L: Lanes>(&self, q: &[f32], scores: &mut [f32], chunk: &mut [f32]) {
        let (width, cap) = (self.width, self.cap::<L>());
        for first in (self.start..self.linear_end).step_by(LANES) {
            let keys = self.keys.chunk(first, self.linear_end, chunk, self.vectors);
            for row in 0..self.rows {
                let seen = self.seen(row).within(first);
                if seen.is_empty() {
                    continue;
                }
                let out = sixteen_mut(scores, row * self.stride + first - self.start);
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
    }

    /// Scores of the block's own tokens, each where its token would stand in a chain.
    #[inline(always)]
    fn score_tree<L: Lanes>(&self, ancestors: &'a Ancestors, q: &[f32], scores: &mut [f32], chunk: &mut [f32]) {
        let (width, cap) = (self.width, self.cap::<L>());
        for (row, scores) in scores.chunks_exact_mut(self.stride).enumerate() {
            let chunks = self.seen(row).chunks();
            // The chunk in which the context ends was filled to its end above, later ones not at all.
            let first = self.request.context.max(chunks.start);
            scores[first - self.start..chunks.end - self.start].fill(f32::NEG_INFINITY);
        }
        for first in (0..self.request.len).step_by(LANES) {
            let keys = self.keys.block_chunk(first, chunk, self.vectors);
            for row in 0..self.rows {
                let mut scored = L::dots(&q[row * width..(row + 1) * width], &keys);
                if let Some(cap) = &cap {
                    scored = cap.of(scored);
                }
                let mut dots = [0.0; LANES];
                scored.store(&mut dots);
                for (key, position) in self.path(ancestors, row, first) {
                    scores[row * self.stride + position - self.start] = dots[key];
                }
            }
        }
    }

    /// Scores become weights. The reciprocal of row `r`'s sum is left in `inverse[r * width]`.
    #[inline(always)]
    fn weigh<L: Lanes>(&self, scores: &mut [f32], inverse: &mut [f32]) {
        for (row, scores) in scores.chunks_exact_mut(self.stride).enumerate() {
            let chunks = self.seen(row).chunks();
            let sink = self.layer.sinks.map(|sinks| sinks[self.place(row).1] * LOG2_E);
            let sum = softmax::<L>(&mut scores[chunks.start - self.start..chunks.end - self.start], sink);
            inverse[row * self.width] = 1.0 / sum;
        }
    }

    /// Values of the positions up to `linear_end`, for up to four rows at a time that see the same of a chunk.
    #[inline(always)]
    fn add_values<L: Lanes>(&self, weights: &[f32], acc: &mut [f32], chunk: &mut [f32]) {
        for first in (self.start..self.linear_end).step_by(LANES) {
            let values = self.values.chunk(first, self.linear_end, chunk, self.vectors);
            let mut row = 0;
            while row < self.rows {
                let mut seen = self.seen(row).within(first);
                let same = (row + 1..self.rows.min(row + L::ROWS))
                    .take_while(|&r| self.seen(r).within(first) == seen)
                    .count()
                    + 1;
                seen.end = seen.end.min(self.linear_end - first);
                if !seen.is_empty() {
                    let weights = &weights[row * self.stride + first - self.start..];
                    let acc = &mut acc[row * self.width..];
                    match same {
                        1 => accumulate::<L, 1>(weights, self.stride, &values, seen, acc),
                        2 => accumulate::<L, 2>(weights, self.stride, &values, seen, acc),
                        3 => accumulate::<L, 3>(weights, self.stride, &values, seen, acc),
                        _ => accumulate::<L, 4>(weights, self.stride, &values, seen, acc),
                    }
                }
                row += same;
            }
        }
    }

    /// Values of the block's own tokens.
    #[inline(always)]
    fn add_tree_values<L: Lanes>(&self, ancestors: &'a Ancestors, weights: &[f32], acc: &mut [f32], chunk: &mut [f32]) {
        for first in (0..self.request.len).step_by(LANES) {
            let values = self.values.block_chunk(first, chunk, self.vectors);
            for row in 0..self.rows {
                for (key, position) in self.path(ancestors, row, first) {
                    let weight = weights[row * self.stride + position - self.start];
                    let acc = &mut acc[row * self.width..(row + 1) * self.width];
                    add_scaled::<L>(weight, &values, key, acc);
                }
            }
        }
    }

    /// Sums times the reciprocals that `weigh` left, to the output.
    #[inline(always)]
    fn write<L: Lanes>(&self, acc: &mut [f32], inverse: &[f32]) {
        for (row, acc) in acc.chunks_exact_mut(self.width).enumerate() {
            let inverse = L::splat(inverse[row * self.width]);
            for d in (0..self.width).step_by(LANES) {
                L::load(sixteen(acc, d)).mul(inverse).store(sixteen_mut(acc, d));
            }
            let (token, head) = self.place(row);
            // SAFETY: a token and head belong to one tile, and one thread runs a tile.
            let out = unsafe { self.layer.out.row(token, head) };
            E::narrow(&acc[..out.len()], out);
        }
    }

    /// Of the block's tokens `first..first + 16` those that a row sees, counted from `first`, each with its position.
    #[inline(always)]
    fn path(&self, ancestors: &'a Ancestors, row: usize, first: usize) -> impl Iterator<Item = (usize, usize)> {
        let (context, start) = (self.request.context, self.seen(row).start);
        ancestors
            .of(self.place(row).0)
            .enumerate()
            .filter(move |&(_, token)| (first..first + LANES).contains(&token))
            .map(move |(depth, token)| (token - first, context + depth))
            .filter(move |&(_, position)| position >= start)
    }
}
