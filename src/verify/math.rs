//! Row primitives that vectorise and give the same bits on every device: maxima, exponentials, order-free sums.

use crate::error::{Error, Result};
use crate::verify::wide::{Routine, widest};

/// Columns per block of the skip list: the largest logit of each block lets later passes step over it.
pub(crate) const BLOCK: usize = 64;

/// Below this, `exp(x) * 2^40` rounds to zero, so skipping a column changes no sum.
pub(crate) const NEGLIGIBLE: f32 = -29.0;

/// Fills `maxima` with the largest logit of each block and returns the row's largest.
/// NaN and +inf are errors naming the column; so is a row of nothing but -inf.
pub(crate) fn scan(row: &[f32], maxima: &mut Vec<f32>) -> Result<f32> {
    maxima.clear();
    maxima.resize(row.len().div_ceil(BLOCK), f32::NEG_INFINITY);
    let (top, bad) = widest(Scan { row, maxima });
    if bad {
        let (column, x) = row
            .iter()
            .enumerate()
            .find(|(_, x)| is_bad(**x))
            .unwrap_or((0, &f32::NAN));
        return Err(Error::BadLogit {
            column,
            value: if x.is_nan() { "NaN" } else { "+inf" },
        });
    }
    if top == f32::NEG_INFINITY {
        return Err(Error::EmptyRow { columns: row.len() });
    }
    Ok(top)
}

struct Scan<'a> {
    row: &'a [f32],
    maxima: &'a mut [f32],
}

impl Routine for Scan<'_> {
    type Output = (f32, bool);

    #[inline(always)]
    fn run(self) -> (f32, bool) {
        let (mut top, mut any_bad) = (f32::NEG_INFINITY, false);
        for (block, out) in self.row.chunks(BLOCK).zip(self.maxima) {
            let (max, bad) = block_max(block);
            *out = max;
            top = if max > top { max } else { top };
            any_bad |= bad;
        }
        (top, any_bad)
    }
}

#[inline(always)]
fn is_bad(x: f32) -> bool {
    x.is_nan() || x == f32::INFINITY
}

/// Largest value, and whether any is NaN or +inf.
#[inline(always)]
pub(crate) fn block_max(block: &[f32]) -> (f32, bool) {
    const LANES: usize = 16;
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut bad = [0u32; LANES];
    let chunks = block.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            let x = chunk[i];
            max[i] = if x > max[i] { x } else { max[i] };
            bad[i] |= u32::from(is_bad(x));
        }
    }
    for &x in rest {
        max[0] = if x > max[0] { x } else { max[0] };
        bad[0] |= u32::from(is_bad(x));
    }
    let top = max.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    (top, bad.iter().any(|&b| b != 0))
}

/// Lowest column that holds `top`.
pub(crate) fn first_of(row: &[f32], maxima: &[f32], top: f32) -> usize {
    for (b, &max) in maxima.iter().enumerate() {
        if max == top
            && let Some(at) = row[b * BLOCK..].iter().position(|&x| x == top)
        {
            return b * BLOCK + at;
        }
    }
    unreachable!("the maximum of a row is one of its columns")
}

const LOG2_E: f32 = std::f32::consts::LOG2_E;
// ln 2 in two parts: n * LN2_HIGH is exact for |n| < 2^9.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;
const EXP: [f32; 5] = [0.5, 0.166_665_18, 0.041_666_206, 0.008_368_896, 0.001_395_05];

/// `exp(x)` for `x <= 0` with IEEE f32 additions and multiplications only, relative error below 2e-7; arguments below -40
/// give exp(-40).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = if x > -40.0 { x } else { -40.0 };
    let n = (x * LOG2_E + ROUND) - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = EXP[4];
    for c in EXP[..4].iter().rev() {
        p = p * r + c;
    }
    let y = (r * r) * p + r + 1.0;
    // 2^n through the exponent bits; the magic sum holds n in its low bits, so no float-to-int conversion is needed.
    let shift = (n + ROUND).to_bits().wrapping_sub(ROUND.to_bits());
    f32::from_bits(y.to_bits().wrapping_add(shift << 23))
}

/// `round(exp(x) * 2^40)`, ties to even: weights as integers, so that a sum is the same in every order.
#[inline(always)]
pub(crate) fn weight(x: f32) -> u64 {
    // Adding 2^52 leaves the rounded integer in the low mantissa bits; an f64 product by 2^40 is exact.
    let magic = f64::from_bits(0x4330_0000_0000_0000);
    (f64::from(exp(x)) * (1u64 << 40) as f64 + magic).to_bits() & 0x000f_ffff_ffff_ffff
}

/// Sum of [`weight`] of `x * scale - top` over the row, in units of 2^-40 of the likeliest token.
pub(crate) fn mass(row: &[f32], maxima: &[f32], scale: f32, top: f32) -> u64 {
    widest(Mass {
        row,
        maxima,
        scale,
        top,
    })
}

struct Mass<'a> {
    row: &'a [f32],
    maxima: &'a [f32],
    scale: f32,
    top: f32,
}

impl Routine for Mass<'_> {
    type Output = u64;

    #[inline(always)]
    fn run(self) -> u64 {
        let Self {
            row,
            maxima,
            scale,
            top,
        } = self;
        let mut total = 0u64;
        for (block, &max) in row.chunks(BLOCK).zip(maxima) {
            if max * scale - top < NEGLIGIBLE {
                continue;
            }
            let mut sums = [0u64; 8];
            let chunks = block.chunks_exact(8);
            let rest = chunks.remainder();
            for chunk in chunks {
                for i in 0..8 {
                    sums[i] += weight(chunk[i] * scale - top);
                }
            }
            total += sums.iter().sum::<u64>() + rest.iter().map(|&x| weight(x * scale - top)).sum::<u64>();
        }
        total
    }
}

/// log-sum-exp of a row, nats.
pub(crate) fn log_sum_exp(row: &[f32], maxima: &[f32], top: f32) -> f64 {
    f64::from(top) + (mass(row, maxima, 1.0, top) as f64 / (1u64 << 40) as f64).ln()
}

/// Maps a float (not NaN) to an integer of the same order; both zeros map to one value.
#[inline(always)]
pub(crate) fn order_key(x: f32) -> u32 {
    let bits = (x + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 }
}
