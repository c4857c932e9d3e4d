//! Keys and values of one request by position, wherever they lie: pages of the cache, or the step's own rows.

use super::super::batch::Request;
use super::super::view::{Element, KeyChunk, LANES, Rows};

/// Keys or values of one request and head, by position.
pub(super) struct Source<'a, E> {
    pub cache: &'a Rows<'a, E>,
    pub new: &'a Rows<'a, E>,
    pub pages: &'a [usize],
    pub page_size: usize,
    pub request: &'a Request,
    pub head: usize,
}

impl<E: Element> Source<'_, E> {
    #[inline(always)]
    fn slot(&self, position: usize) -> usize {
        self.pages[position / self.page_size] * self.page_size + position % self.page_size
    }

    /// Positions `first..first + 16`, of which those below `end` exist. `first` is a multiple of sixteen.
    #[inline(always)]
    pub(super) fn chunk<'b>(&'b self, first: usize, end: usize, buffer: &'b mut [f32], vectors: usize) -> KeyChunk<'b> {
        let context = self.request.context;
        if self.cache.layout().dim.is_multiple_of(LANES) {
            if first + LANES <= context
                && self.page_size.is_multiple_of(LANES)
                && let Some(cache) = E::as_f32(self.cache)
            {
                return KeyChunk::in_place(&cache, self.slot(first), self.head);
            }
            if first >= context
                && first + LANES <= end
                && let Some(new) = E::as_f32(self.new)
            {
                return KeyChunk::in_place(&new, self.request.start + first - context, self.head);
            }
        }
        for (key, row) in buffer.chunks_exact_mut(vectors * LANES).enumerate() {
            let position = first + key;
            if position >= end {
                row.fill(0.0);
            } else if position < context {
                widen(self.cache.row(self.slot(position), self.head), row);
            } else {
                widen(self.new.row(self.request.start + position - context, self.head), row);
            }
        }
        KeyChunk::packed(buffer, vectors)
    }

    /// Tokens `first..first + 16` of the block.
    #[inline(always)]
    pub(super) fn block_chunk<'b>(&'b self, first: usize, buffer: &'b mut [f32], vectors: usize) -> KeyChunk<'b> {
        for (token, row) in (first..).zip(buffer.chunks_exact_mut(vectors * LANES)) {
            if token < self.request.len {
                widen(self.new.row(self.request.start + token, self.head), row);
            } else {
                row.fill(0.0);
            }
        }
        KeyChunk::packed(buffer, vectors)
    }
}

#[inline(always)]
pub(super) fn widen<E: Element>(from: &[E], to: &mut [f32]) {
    let (values, padding) = to.split_at_mut(from.len());
    E::widen(from, values);
    padding.fill(0.0);
}
