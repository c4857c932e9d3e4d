//! What a decoder layer does to one row at a time: norms, rotary embedding, SwiGLU; and what a drafter reads off a row of logits.
//!
//! Promise: the same bits for every instruction set. Sums run in sixteen lanes and end in a tree; everything else is the same IEEE
//! operations element by element.

use super::simd::{Isa, Lanes, Routine, dispatch};
use super::view::LANES;

/// What a drafter says about one position: its likeliest token (the lowest id among equals) and that token's probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guess {
    /// The token.
    pub token: usize,
    /// Its share of the softmax.
    pub probability: f32,
}

/// The likeliest token of a row of logits other than `never`. NaN logits are passed over.
fn guess(isa: Isa, logits: &mut [f32], never: Option<usize>) -> Guess {
    if let Some(never) = never.filter(|&never| never < logits.len()) {
        logits[never] = f32::NEG_INFINITY;
    }
    let mut found = Guess {
        token: 0,
        probability: 0.0,
    };
    dispatch(
        isa,
        Likeliest {
            logits,
            found: &mut found,
        },
    );
    found
}

/// The `k` likeliest tokens of a row of logits other than `never`, falling, the lowest id first among equals; the first is its [`Guess`].
/// Fewer where there are no more numbers above -inf.
pub fn candidates(isa: Isa, logits: &mut [f32], never: Option<usize>, k: usize, into: &mut Vec<Guess>) {
    let first = guess(isa, logits, never);
    into.push(first);
    if k < 2 {
        return;
    }
    let top = logits.get(first.token).copied().unwrap_or(f32::NEG_INFINITY);
    let mut best: Vec<(f32, usize)> = Vec::with_capacity(k + 1);
    let mut worst = f32::NEG_INFINITY;
    for (chunk, values) in logits.chunks(LANES).enumerate() {
        // Nearly all of a vocabulary is passed over here, sixteen at a time.
        if !values.iter().fold(false, |any, &x| any | (x > worst)) {
            continue;
        }
        for (lane, &x) in values.iter().enumerate() {
            if x > worst {
                let place = best.partition_point(|&(other, _)| other >= x);
                best.insert(place, (x, chunk * LANES + lane));
                best.truncate(k);
                if best.len() == k {
                    worst = best[k - 1].0;
                }
            }
        }
    }
    into.extend(best.iter().skip(1).map(|&(x, token)| Guess {
        token,
        probability: (x - top).exp() * first.probability,
    }));
}

/// `out[row] = weight * x[row] / sqrt(mean(x[row]^2) + eps)`.
pub(super) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    dispatch(isa, RmsNorm { x, weight, eps, out });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Routine for RmsNorm<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let width = self.weight.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let inverse = inverse_rms::<L>(x, self.eps);
            for i in 0..width {
                out[i] = x[i] * inverse * self.weight[i];
            }
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`: sixteen sums side by side, then a tree.
#[inline(always)]
fn inverse_rms<L: Lanes>(x: &[f32], eps: f32) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut sums = L::splat(0.0);
    for chunk in chunks {
        let x = L::load(chunk);
        sums = x.mul_add(x, sums);
    }
    if !tail.is_empty() {
        let mut chunk = [0.0; LANES];
        chunk[..tail.len()].copy_from_slice(tail);
        let x = L::load(&chunk);
        sums = x.mul_add(x, sums);
    }
    1.0 / (sums.sum() / x.len() as f32 + eps).sqrt()
}

/// One head, normalised if it has a norm, and rotated.
pub(super) struct RotateHead<'a> {
    pub head: &'a mut [f32],
    pub norm: Option<&'a [f32]>,
    pub eps: f32,
    pub cos: &'a [f32],
    pub sin: &'a [f32],
}

impl Routine for RotateHead<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        rotate_head::<L>(self.head, self.norm, self.eps, self.cos, self.sin);
    }
}

/// Normalises a head, if it has a norm, and rotates it: `x * cos + swap_halves(x) * sin`.
#[inline(always)]
pub(super) fn rotate_head<L: Lanes>(head: &mut [f32], norm: Option<&[f32]>, eps: f32, cos: &[f32], sin: &[f32]) {
    if let Some(norm) = norm {
        let inverse = inverse_rms::<L>(head, eps);
        for (x, scale) in head.iter_mut().zip(norm) {
            *x = *x * inverse * scale;
        }
    }
    let half = head.len() / 2;
    let (low, high) = head.split_at_mut(half);
    for i in 0..half {
        let (a, b) = (low[i], high[i]);
        low[i] = a * cos[i] + b * sin[i];
        high[i] = b * cos[half + i] + a * sin[half + i];
    }
}

/// `inner = silu(gate) * up`, rows of `gate_up` being gate, then up, `width` each.
pub(super) struct SwiGlu<'a> {
    pub gate_up: &'a [f32],
    pub width: usize,
    pub inner: &'a mut [f32],
}

impl Routine for SwiGlu<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let width = self.width;
        for (both, inner) in self
            .gate_up
            .chunks_exact(2 * width)
            .zip(self.inner.chunks_exact_mut(width))
        {
            let (gate, up) = both.split_at(width);
            let mut at = 0;
            while at + LANES <= width {
                let mut y = [0.0; LANES];
                silu(load::<L>(gate, at)).mul(load::<L>(up, at)).store(&mut y);
                inner[at..at + LANES].copy_from_slice(&y);
                at += LANES;
            }
            if at < width {
                let (mut g, mut u, mut y) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
                g[..width - at].copy_from_slice(&gate[at..]);
                u[..width - at].copy_from_slice(&up[at..]);
                silu(L::load(&g)).mul(L::load(&u)).store(&mut y);
                inner[at..].copy_from_slice(&y[..width - at]);
            }
        }
    }
}

#[inline(always)]
fn load<L: Lanes>(x: &[f32], at: usize) -> L {
    L::load(x[at..at + LANES].try_into().expect("sixteen elements"))
}

/// `x / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn silu<L: Lanes>(x: L) -> L {
    logistic(x, x)
}

/// `x / (1 + exp(-z))`. The exponential is taken of `-|z|` and so never overflows.
#[inline(always)]
pub(super) fn logistic<L: Lanes>(x: L, z: L) -> L {
    let zero = L::splat(0.0);
    let one = L::splat(1.0);
    let negative = zero.sub(z.max(zero.sub(z)));
    let e = negative.mul(L::splat(std::f32::consts::LOG2_E)).exp2();
    // 1 where z >= 0, e elsewhere.
    let top = e.add(one.sub(e).zero_where_below(z, 0.0));
    x.mul(top).div(one.add(e))
}

struct Likeliest<'a> {
    logits: &'a [f32],
    found: &'a mut Guess,
}

impl Routine for Likeliest<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (chunks, tail) = self.logits.as_chunks::<LANES>();
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..tail.len()].copy_from_slice(tail);
        let mut most = L::splat(f32::NEG_INFINITY).max(L::load(&last));
        for chunk in chunks {
            // `max` keeps the second operand where the two do not compare: a NaN never stays.
            most = L::load(chunk).max(most);
        }
        let most = most.max_lane();
        let token = self.logits.iter().position(|&x| x == most).unwrap_or(0);
        let (top, scale) = (L::splat(most), L::splat(std::f32::consts::LOG2_E));
        let mut sum = L::load(&last).sub(top).mul(scale).exp2();
        for chunk in chunks {
            sum = sum.add(L::load(chunk).sub(top).mul(scale).exp2());
        }
        *self.found = Guess {
            token,
            probability: 1.0 / sum.sum(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(count: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-8.0f32..8.0, count)
    }

    fn close(got: f32, expected: f64, scale: f64) -> bool {
        (f64::from(got) - expected).abs() <= 1e-5 * scale.max(1.0)
    }

    fn inverse(x: &[f32], eps: f64) -> f64 {
        let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        1.0 / (squares / x.len() as f64 + eps).sqrt()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn a_norm_is_the_plain_formula_and_the_same_bits_everywhere(
            (x, weight) in (1usize..70).prop_flat_map(|n| (numbers(3 * n), numbers(n))),
        ) {
            let width = weight.len();
            let run = |isa| {
                let mut out = vec![f32::NAN; x.len()];
                rms_norm(isa, &x, &weight, 1e-6, &mut out);
                out
            };
            let first = run(Isa::Portable);
            for (at, &got) in first.iter().enumerate() {
                let row = &x[at / width * width..][..width];
                let expected = f64::from(x[at]) * inverse(row, 1e-6) * f64::from(weight[at % width]);
                prop_assert!(close(got, expected, expected.abs()), "{got} for {expected}");
            }
            for isa in Isa::available() {
                prop_assert_eq!(&run(isa), &first, "{:?}", isa);
            }
        }

        #[test]
        fn a_head_is_normalised_and_turned_and_the_same_bits_everywhere(
            (head, norm, angles) in (1usize..40).prop_flat_map(|half| {
                (numbers(2 * half), numbers(2 * half), prop::collection::vec(-3.0f32..3.0, half))
            }),
            normed: bool,
        ) {
            let half = angles.len();
            let cos: Vec<f32> = (0..2 * half).map(|i| angles[i % half].cos()).collect();
            let sin: Vec<f32> = (0..2 * half).map(|i| angles[i % half].sin() * if i < half { -1.0 } else { 1.0 }).collect();
            let run = |isa| {
                let mut head = head.clone();
                let norm = normed.then_some(&norm[..]);
                dispatch(isa, RotateHead { head: &mut head, norm, eps: 1e-6, cos: &cos, sin: &sin });
                head
            };
            let scaled: Vec<f64> = (0..2 * half)
                .map(|i| f64::from(head[i]) * if normed { inverse(&head, 1e-6) * f64::from(norm[i]) } else { 1.0 })
                .collect();
            let first = run(Isa::Portable);
            for i in 0..2 * half {
                let angle = f64::from(angles[i % half]);
                // (a, b) turned by the angle: a cos - b sin, b cos + a sin.
                let other = scaled[(i + half) % (2 * half)] * if i < half { -1.0 } else { 1.0 };
                let expected = scaled[i] * angle.cos() + other * angle.sin();
                prop_assert!(close(first[i], expected, scaled[i].abs() + other.abs()), "{} for {expected}", first[i]);
            }
            for isa in Isa::available() {
                prop_assert_eq!(&run(isa), &first, "{:?}", isa);
            }
        }

        #[test]
        fn swiglu_is_the_plain_formula_and_the_same_bits_everywhere(
            (gate_up, width) in (1usize..50).prop_flat_map(|n| {
                (prop::collection::vec(-120.0f32..120.0, 4 * n), Just(n))
            }),
        ) {
            let run = |isa| {
                let mut inner = vec![f32::NAN; 2 * width];
                dispatch(isa, SwiGlu { gate_up: &gate_up, width, inner: &mut inner });
                inner
            };
            let first = run(Isa::Portable);
            for (at, &got) in first.iter().enumerate() {
                let row = &gate_up[at / width * 2 * width..][..2 * width];
                let (gate, up) = (f64::from(row[at % width]), f64::from(row[width + at % width]));
                let expected = gate / (1.0 + (-gate).exp()) * up;
                prop_assert!(close(got, expected, expected.abs()), "{got} for {expected}");
            }
            for isa in Isa::available() {
                prop_assert_eq!(&run(isa), &first, "{:?}", isa);
            }
        }

        #[test]
        fn candidates_are_the_sorted_row(
            logits in (1usize..200).prop_flat_map(|n| prop::collection::vec((-20i32..20).prop_map(|x| x as f32 / 4.0), n)),
            never in 0usize..250, k in 1usize..9,
        ) {
            let mut order: Vec<usize> = (0..logits.len()).filter(|&i| i != never).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            let sum: f64 = order.iter().map(|&i| f64::from(logits[i]).exp()).sum();
            let mut found = Vec::new();
            candidates(Isa::detect(), &mut logits.clone(), Some(never), k, &mut found);
            prop_assert_eq!(found[0], guess(Isa::detect(), &mut logits.clone(), Some(never)));
            if !order.is_empty() {
                let tokens: Vec<usize> = found.iter().map(|guess| guess.token).collect();
                prop_assert_eq!(&tokens[..], &order[..k.min(order.len())]);
                for guess in &found {
                    prop_assert!(close(guess.probability, f64::from(logits[guess.token]).exp() / sum, 1.0));
                }
            }
        }

        #[test]
        fn a_guess_is_the_first_of_the_likeliest_and_its_share(
            logits in (2usize..200).prop_flat_map(numbers), never in 0usize..250,
        ) {
            let left: Vec<f64> = logits
                .iter()
                .enumerate()
                .map(|(i, &x)| if i == never { f64::NEG_INFINITY } else { f64::from(x) })
                .collect();
            let most = left.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let share = 1.0 / left.iter().map(|x| (x - most).exp()).sum::<f64>();
            let first = guess(Isa::Portable, &mut logits.clone(), Some(never));
            prop_assert_eq!(Some(first.token), left.iter().position(|&x| x == most));
            prop_assert!(close(first.probability, share, 1.0));
            for isa in Isa::available() {
                prop_assert_eq!(guess(isa, &mut logits.clone(), Some(never)), first, "{:?}", isa);
            }
        }
    }

    #[test]
    fn equal_logits_give_the_lowest_token_and_nan_is_passed_over() {
        let mut logits = vec![1.0, f32::NAN, 3.0, 3.0];
        assert_eq!(guess(Isa::detect(), &mut logits, None).token, 2);
        assert_eq!(guess(Isa::detect(), &mut logits, Some(2)).token, 3);
    }
}
