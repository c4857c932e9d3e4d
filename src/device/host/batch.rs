//! What one step attends to: a packed ragged batch over a paged cache, checked once and used by every layer.
//!
//! ```text
//! request r        page row r: [p0 p1 p2 ..]              packed tokens of r
//! keys 0 .. L-1    slot(j) = p[j / page] * page + j % page   keys L .. L+n-1
//! ```
//!
//! A value of this type is the proof that every index in it is in range, so the kernels do not look again.

use crate::error::{Error, Result, indices};

/// The arrays of a step as the engine holds them.
#[derive(Clone, Copy, Debug)]
pub struct BatchArrays<'a> {
    /// `[R + 1]`: request `r` owns packed tokens `query_starts[r]..query_starts[r + 1]`.
    pub query_starts: &'a [i32],
    /// `[R]`: tokens of each request that have KV in the cache; its first packed token is key `context_lens[r]`.
    pub context_lens: &'a [i32],
    /// `[rows, table_width]` page ids, row-major.
    pub page_table: &'a [i32],
    /// Pages per row of the table.
    pub table_width: usize,
    /// `[R]`: each request's row of the table.
    pub row_ids: &'a [i32],
    /// Slots per page.
    pub page_size: usize,
    /// Slots of the cache.
    pub num_slots: usize,
    /// `[T]`: where each token's K and V are written; `None` when they are scratch.
    pub slots: Option<&'a [i64]>,
    /// `[R]`: context keys before this position are not seen; `None` for 0.
    pub valid_from: Option<&'a [i32]>,
    /// `[T, words]`: bit `j` of token `i` is set when token `j` of the same request is `i` or an ancestor of `i`.
    pub ancestors: Option<(&'a [u64], usize)>,
}

/// A checked step.
#[derive(Clone, Debug)]
pub struct AttentionBatch {
    pub(crate) requests: Vec<Request>,
    pub(crate) pages: Vec<usize>,
    pub(crate) slots: Option<Vec<usize>>,
    pub(crate) ancestors: Option<Ancestors>,
    pub(crate) tokens: usize,
    pub(crate) page_size: usize,
    pub(crate) num_slots: usize,
}

/// One request of a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    /// First packed token.
    pub start: usize,
    /// Packed tokens.
    pub len: usize,
    /// Keys in the cache.
    pub context: usize,
    /// First context key that is seen.
    pub valid_from: usize,
    /// First entry of `pages`.
    pub page_start: usize,
}

/// Packed ancestor masks. Checked to be closed: an ancestor's ancestors are one's own.
#[derive(Clone, Debug)]
pub(crate) struct Ancestors {
    bits: Vec<u64>,
    words: usize,
}

impl Ancestors {
    /// Tokens of the request that packed token `token` sees, itself included, in path order.
    pub(crate) fn of(&self, token: usize) -> impl Iterator<Item = usize> + '_ {
        self.bits[token * self.words..(token + 1) * self.words]
            .iter()
            .enumerate()
            .flat_map(|(word, &bits)| {
                std::iter::successors(Some(bits), |&bits| Some(bits & (bits.wrapping_sub(1))))
                    .take_while(|&bits| bits != 0)
                    .map(move |bits| word * 64 + bits.trailing_zeros() as usize)
            })
    }

    /// Distance of packed token `token` from its root.
    pub(crate) fn depth(&self, token: usize) -> usize {
        self.of(token).count() - 1
    }
}

fn bad<T>(name: &'static str, got: String, expected: String) -> Result<T> {
    Err(Error::InvalidArgument { name, got, expected })
}

impl BatchArrays<'_> {
    /// How many rows the table has, once the arrays' lengths fit each other.
    fn check_lengths(&self) -> Result<usize> {
        if self.page_size == 0 {
            return bad("page_size", "0".into(), "at least 1".into());
        }
        if self.query_starts.first() != Some(&0) {
            return bad(
                "query_starts",
                format!("{:?} first", self.query_starts.first()),
                "0 first".into(),
            );
        }
        let expected = self.query_starts.len() - 1;
        let lengths = [
            ("context_lens", Some(self.context_lens.len())),
            ("row_ids", Some(self.row_ids.len())),
            ("valid_from", self.valid_from.map(<[i32]>::len)),
        ];
        for (name, got) in lengths {
            if let Some(got) = got.filter(|&got| got != expected) {
                return Err(Error::Length { name, got, expected });
            }
        }
        if self.table_width != 0 && !self.page_table.len().is_multiple_of(self.table_width) {
            return bad(
                "page_table",
                format!("{} entries", self.page_table.len()),
                format!("whole rows of {} pages", self.table_width),
            );
        }
        Ok(self.page_table.len().checked_div(self.table_width).unwrap_or(0))
    }

    /// Request `r`, whose pages come behind `page_start` others, and its row of the table's `table_rows`.
    fn request(&self, r: usize, page_start: usize, table_rows: usize) -> Result<(Request, usize)> {
        let (start, end) = (self.query_starts[r], self.query_starts[r + 1]);
        if end < start {
            return bad(
                "query_starts",
                format!("{start} then {end} at index {}", r + 1),
                "offsets that do not fall".into(),
            );
        }
        let Ok(context) = usize::try_from(self.context_lens[r]) else {
            return bad(
                "context_lens",
                format!("{} at index {r}", self.context_lens[r]),
                "at least 0".into(),
            );
        };
        let (width, page_size) = (self.table_width, self.page_size);
        let needed = context.div_ceil(page_size);
        if needed > width {
            return bad(
                "context_lens",
                format!("{context} at index {r}"),
                format!(
                    "at most {}, {width} pages of {page_size} slots in a row of page_table",
                    width * page_size
                ),
            );
        }
        let row = usize::try_from(self.row_ids[r])
            .ok()
            .filter(|&row| row < table_rows || needed == 0);
        let Some(row) = row else {
            return bad(
                "row_ids",
                format!("{} at index {r}", self.row_ids[r]),
                format!("a row of page_table, {}", indices(table_rows)),
            );
        };
        let valid_from = self.valid_from.map_or(0, |v| v[r]);
        let Some(valid_from) = usize::try_from(valid_from).ok().filter(|&v| v <= context) else {
            return bad(
                "valid_from",
                format!("{valid_from} at index {r}"),
                format!("0..{context} (the context length)"),
            );
        };
        let request = Request {
            start: start as usize,
            len: (end - start) as usize,
            context,
            valid_from,
            page_start,
        };
        Ok((request, row))
    }

    /// The pages of a context in a row of the table.
    fn add_pages(&self, row: usize, context: usize, pages: &mut Vec<usize>) -> Result<()> {
        let (page_size, num_slots) = (self.page_size, self.num_slots);
        for index in 0..context.div_ceil(page_size) {
            let page = self.page_table[row * self.table_width + index];
            let used = page_size.min(context - index * page_size);
            let first = usize::try_from(page).ok().and_then(|page| page.checked_mul(page_size));
            if first.is_none_or(|first| first + used > num_slots) {
                return bad(
                    "page_table",
                    format!("page {page} at [{row}, {index}]"),
                    format!("a page of {page_size} slots within num_slots {num_slots}"),
                );
            }
            pages.push(page as usize);
        }
        Ok(())
    }
}

impl AttentionBatch {
    /// Checks a step.
    ///
    /// # Errors
    /// Names the array, the first offending value and its index: offsets that do not start at 0 or fall, lengths that differ, a context
    /// longer than its row of the table, pages and slots outside the cache, `valid_from` beyond the context, masks that are not closed
    /// ancestor sets.
    pub fn new(arrays: BatchArrays<'_>) -> Result<Self> {
        let rows = arrays.check_lengths()?;
        let count = arrays.query_starts.len() - 1;
        let mut requests = Vec::with_capacity(count);
        let mut pages = Vec::new();
        for r in 0..count {
            let (request, row) = arrays.request(r, pages.len(), rows)?;
            arrays.add_pages(row, request.context, &mut pages)?;
            requests.push(request);
        }
        let tokens = arrays.query_starts[count] as usize;
        let slots = arrays
            .slots
            .map(|slots| checked_slots(slots, tokens, arrays.num_slots))
            .transpose()?;
        let ancestors = arrays
            .ancestors
            .map(|(bits, words)| checked_ancestors(bits, words, tokens, &requests))
            .transpose()?;
        Ok(Self {
            requests,
            pages,
            slots,
            ancestors,
            tokens,
            page_size: arrays.page_size,
            num_slots: arrays.num_slots,
        })
    }

    /// Packed tokens of the step.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Slots of the cache that this step was checked against.
    pub fn num_slots(&self) -> usize {
        self.num_slots
    }

    /// Query-key pairs of one head if nothing were masked: the size of the work.
    pub fn pairs(&self) -> usize {
        self.requests.iter().map(|r| r.len * (r.context + r.len)).sum()
    }
}

/// Slots as indices, each below `num_slots`.
pub(crate) fn checked_slots(slots: &[i64], tokens: usize, num_slots: usize) -> Result<Vec<usize>> {
    if slots.len() != tokens {
        return Err(Error::Length {
            name: "slots",
            got: slots.len(),
            expected: tokens,
        });
    }
    let check = |(index, &slot): (usize, &i64)| {
        usize::try_from(slot)
            .ok()
            .filter(|&slot| slot < num_slots)
            .ok_or_else(|| Error::InvalidArgument {
                name: "slots",
                got: format!("{slot} at index {index}"),
                expected: indices(num_slots),
            })
    };
    slots.iter().enumerate().map(check).collect()
}

fn checked_ancestors(bits: &[u64], words: usize, tokens: usize, requests: &[Request]) -> Result<Ancestors> {
    if bits.len() != tokens * words {
        return Err(Error::Length {
            name: "ancestors",
            got: bits.len(),
            expected: tokens * words,
        });
    }
    let bad = |got: String, expected: String| {
        Err(Error::InvalidArgument {
            name: "ancestors",
            got,
            expected,
        })
    };
    for request in requests {
        if request.len > words * 64 {
            return bad(
                format!("{words} words per token"),
                format!("{} for {} tokens", request.len.div_ceil(64), request.len),
            );
        }
        for i in 0..request.len {
            let row = |i: usize| &bits[(request.start + i) * words..(request.start + i + 1) * words];
            let mut before = row(i).to_vec();
            before[i / 64] &= !(1 << (i % 64));
            let parent = (0..words * 64).rev().find(|&j| before[j / 64] >> (j % 64) & 1 == 1);
            // One's ancestors are the parent's ancestors and the parent, which is the highest of them; by induction this closes the
            // set and puts parents before children.
            let expected = match parent {
                None => vec![0; words],
                Some(j) if j < i => row(j).to_vec(),
                Some(j) => {
                    return bad(
                        format!("bit {j} for token {i}"),
                        format!("bits in 0..{i}: parents come first"),
                    );
                }
            };
            if before != expected || row(i)[i / 64] >> (i % 64) & 1 == 0 {
                return bad(
                    format!("{:x?} for packed token {}", row(i), request.start + i),
                    format!("its own bit {i} and exactly the bits of its highest other token, its parent"),
                );
            }
        }
    }
    Ok(Ancestors {
        bits: bits.to_vec(),
        words,
    })
}
