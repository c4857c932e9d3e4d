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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::math::scan;

    /// By sorting everything: among the first `top_k`, and the weight before it below the limit, and not below the floor.
    fn sorted(row: &[f32], scale: f32, top_k: usize, top_p: f32, floor: f32) -> Vec<u32> {
        let tempered: Vec<f32> = row.iter().map(|x| x * scale).collect();
        let top = tempered.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| tempered[b].total_cmp(&tempered[a]).then(a.cmp(&b)));
        let weights: Vec<u64> = tempered.iter().map(|t| weight(t - top)).collect();
        let limit = (f64::from(top_p) * weights.iter().sum::<u64>() as f64).ceil() as u64;
        let mut before = 0;
        let mut kept = Vec::new();
        for (rank, &id) in order.iter().enumerate() {
            let within = (top_k == 0 || rank < top_k) && (top_p >= 1.0 || before < limit);
            if within && tempered[id] > f32::NEG_INFINITY && tempered[id] - top >= floor {
                kept.push(id as u32);
            }
            before += weights[id];
        }
        kept.sort_unstable();
        kept
    }

    fn selected(row: &[f32], scale: f32, top_k: usize, top_p: f32, floor: f32) -> Vec<u32> {
        let mut maxima = Vec::new();
        let top = scan(row, &mut maxima).unwrap() * scale;
        let tempered = Tempered {
            row,
            maxima: &maxima,
            scale,
            top,
        };
        let (mut packed, mut kept) = (Vec::new(), vec![7; 3]);
        keep(tempered, top_k, top_p, floor, &mut packed, &mut kept);
        kept.sort_unstable();
        kept
    }

    /// As much weight around 4, 6 and 8 nats below the top as at it, the columns mixed and the last block not full.
    fn deep() -> Vec<f32> {
        let count = 1 + 55 + 403 + 2981;
        (0..count)
            .map(|at| {
                let at = at * 1009 % count;
                let spread = (at % 97) as f32 / 200.0;
                match at {
                    0 => 0.0,
                    1..56 => -4.0 - spread,
                    56..459 => -6.0 - spread,
                    _ => -8.0 - spread,
                }
            })
            .collect()
    }

    #[test]
    fn what_is_kept_without_sorting_is_what_is_kept_by_sorting() {
        let shifted = |by: f32| deep().iter().map(|x| x + by).collect::<Vec<f32>>();
        let ties: Vec<f32> = deep().iter().map(|x| (x / 2.0).round() * 2.0).collect();
        let holes: Vec<f32> = (deep().iter().enumerate())
            .map(|(i, &x)| if i % 3 == 1 { f32::NEG_INFINITY } else { x })
            .collect();
        for row in [deep(), shifted(20.0), shifted(-500.0), ties, holes] {
            for scale in [1.0, 0.4] {
                for top_k in [0, 1, 40, 63, 64, 65, 300, 1000, row.len(), row.len() + 1] {
                    for top_p in [1.0, 0.01, 0.3, 0.45, 0.6, 0.9, 0.999] {
                        let floor = if top_k % 2 == 0 { f32::NEG_INFINITY } else { -6.25 };
                        assert_eq!(
                            selected(&row, scale, top_k, top_p, floor),
                            sorted(&row, scale, top_k, top_p, floor),
                            "scale {scale}, top-k {top_k}, top-p {top_p}, from {}",
                            row[0]
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_are_looked_into_by_their_distance_from_the_top() {
        // A small top and blocks below zero: their quotient says nothing.
        let mut row = vec![-2.0f32; 5 * BLOCK + 3];
        row[70] = 0.5;
        assert_eq!(selected(&row, 1.0, row.len(), 1.0, -2.75).len(), row.len());
        assert_eq!(
            selected(&row, 1.0, 0, 0.99, f32::NEG_INFINITY),
            sorted(&row, 1.0, 0, 0.99, f32::NEG_INFINITY)
        );
        assert_eq!(selected(&row, 1.0, row.len(), 1.0, -2.25), [70]);
    }
}
