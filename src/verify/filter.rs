//! top-k and top-p, jointly, by selection: no sort of the vocabulary.
//!
//! The tokens kept are a prefix of the order (tempered logit descending, id ascending). Candidates are gathered above a
//! falling threshold until the prefix must lie inside them; the skip list of block maxima makes each pass cheap.

use crate::verify::math::{BLOCK, mass, order_key, weight};

/// One row, tempered: column `c` stands for `row[c] * scale`, and `top` is the largest of these.
#[derive(Clone, Copy)]
pub(crate) struct Tempered<'a> {
    pub row: &'a [f32],
    pub maxima: &'a [f32],
    pub scale: f32,
    pub top: f32,
}

/// Fills `kept` with the ids that pass top-k (0 = off), top-p (1 = off) and the floor `x - top >= floor`.
pub(crate) fn keep(row: Tempered, top_k: usize, top_p: f32, floor: f32, packed: &mut Vec<u64>, kept: &mut Vec<u32>) {
    // The nucleus ends where the mass before a token reaches the limit. Integer masses: the order of summation is free.
    let limit = if top_p < 1.0 {
        let total = mass(row.row, row.maxima, row.scale, row.top);
        (f64::from(top_p) * total as f64).ceil() as u64
    } else {
        u64::MAX
    };
    let mut depth = 3.0f32;
    loop {
        let exhausted = -depth <= floor || depth > 200.0;
        let threshold = if exhausted { floor.max(f32::MIN) } else { -depth };
        let gathered = gather(row, threshold, packed);
        if exhausted || (top_k > 0 && packed.len() >= top_k) || gathered >= limit {
            break;
        }
        depth *= 1.7;
    }
    if top_k > 0 && packed.len() > top_k {
        packed.select_nth_unstable_by(top_k - 1, |a, b| b.cmp(a));
        packed.truncate(top_k);
    }
    kept.clear();
    if limit == u64::MAX {
        kept.extend(packed.iter().map(|&p| id_of(p)));
        return;
    }
    // Sort only as far as the nucleus reaches, in runs of growing length.
    let (mut done, mut before, mut run) = (0, 0u64, 64);
    while done < packed.len() && before < limit {
        let rest = &mut packed[done..];
        let n = run.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, |a, b| b.cmp(a));
        }
        rest[..n].sort_unstable_by(|a, b| b.cmp(a));
        for &p in &rest[..n] {
            if before >= limit {
                break;
            }
            let id = id_of(p);
            kept.push(id);
            before += weight(row.row[id as usize] * row.scale - row.top);
        }
        done += n;
        run *= 4;
    }
}

fn id_of(packed: u64) -> u32 {
    !(packed as u32)
}

// Columns with x - top >= threshold as (order key, inverted id), and their mass.
fn gather(row: Tempered, threshold: f32, packed: &mut Vec<u64>) -> u64 {
    packed.clear();
    let mut gathered = 0;
    for (b, (block, &max)) in row.row.chunks(BLOCK).zip(row.maxima).enumerate() {
        if max * row.scale - row.top < threshold {
            continue;
        }
        for (i, &x) in block.iter().enumerate() {
            let t = x * row.scale;
            if t - row.top >= threshold {
                let id = (b * BLOCK + i) as u32;
                packed.push(u64::from(order_key(t)) << 32 | u64::from(!id));
                gathered += weight(t - row.top);
            }
        }
    }
    gathered
}
