//! What stands between the two products of an expert.

use super::super::linear::PANEL;
use super::super::rowwise::{logistic, silu};
use super::super::simd::{Lanes, Routine};
use super::super::view::{LANES, RowsMut};

/// A function of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// `x` times the normal distribution function of `x`, to 2e-7 of `x`.
    Gelu,
    /// The same by the hyperbolic tangent that usually stands for it.
    GeluTanh,
    /// The square of what is positive, 0 elsewhere.
    ReluSquared,
}

/// What an expert makes of its first product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Between {
    /// Of gate and up: `activation(gate) * up`.
    Gated(Activation),
    /// Of gate, cut at `limit`, and up, cut at `limit` either way: `gate / (1 + exp(-alpha gate)) * (up + 1)`.
    Clamped {
        /// What the gate is multiplied by in the exponential.
        alpha: f32,
        /// Above 0.
        limit: f32,
    },
    /// Of the only half there is: `activation(up)`.
    Plain(Activation),
}

impl Between {
    /// Halves of the first product: gate and up, or up alone.
    pub fn halves(self) -> usize {
        match self {
            Self::Gated(_) | Self::Clamped { .. } => 2,
            Self::Plain(_) => 1,
        }
    }

    /// Where a row of the first weight is among the rows that are packed, of `inner` in each half: sixteen of gate and sixteen of up in turn,
    /// so that a panel has both halves of what it gives.
    pub(super) fn place(self, row: usize, inner: usize) -> usize {
        match self.halves() {
            1 => row,
            _ => {
                let (half, n) = (row / inner, row % inner);
                n / LANES * PANEL + half * LANES + n % LANES
            }
        }
    }
}

/// Rows of `width` elements as [`Between::place`] has them, to `inner`.
pub(super) struct Activate<'a, 'i> {
    pub between: Between,
    pub from: &'a [f32],
    pub width: usize,
    pub inner: &'a mut RowsMut<'i, f32>,
}

impl Routine for Activate<'_, '_> {
    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        use Activation::{Gelu, GeluTanh, ReluSquared, Silu};
        match self.between {
            Between::Gated(Silu) => self.halves::<L, GatedBy<AsSilu>>(GatedBy(AsSilu)),
            Between::Gated(Gelu) => self.halves::<L, GatedBy<AsGelu>>(GatedBy(AsGelu)),
            Between::Gated(GeluTanh) => self.halves::<L, GatedBy<AsGeluTanh>>(GatedBy(AsGeluTanh)),
            Between::Gated(ReluSquared) => self.halves::<L, GatedBy<AsReluSquared>>(GatedBy(AsReluSquared)),
            Between::Clamped { alpha, limit } => self.halves::<L, Clamp>(Clamp { alpha, limit }),
            Between::Plain(Silu) => self.plain::<L, AsSilu>(),
            Between::Plain(Gelu) => self.plain::<L, AsGelu>(),
            Between::Plain(GeluTanh) => self.plain::<L, AsGeluTanh>(),
            Between::Plain(ReluSquared) => self.plain::<L, AsReluSquared>(),
        }
    }
}

impl Activate<'_, '_> {
    #[inline(always)]
    fn halves<L: Lanes, G: OfTwo>(&mut self, of: G) {
        for (row, both) in self.from.chunks_exact(self.width).enumerate() {
            let inner = self.inner.row_mut(row, 0).as_chunks_mut::<LANES>().0;
            let halves = both.as_chunks::<LANES>().0.as_chunks::<2>().0;
            for (inner, [gate, up]) in inner.iter_mut().zip(halves) {
                of.of(L::load(gate), L::load(up)).store(inner);
            }
        }
    }

    #[inline(always)]
    fn plain<L: Lanes, A: OfOne>(&mut self) {
        for (row, up) in self.from.chunks_exact(self.width).enumerate() {
            let inner = self.inner.row_mut(row, 0).as_chunks_mut::<LANES>().0;
            for (inner, up) in inner.iter_mut().zip(up.as_chunks::<LANES>().0) {
                A::of(L::load(up)).store(inner);
            }
        }
    }
}

/// An [`Activation`] of sixteen numbers: traits where closures would not be compiled for the instruction set.
trait OfOne {
    fn of<L: Lanes>(x: L) -> L;
}

trait OfTwo {
    fn of<L: Lanes>(&self, gate: L, up: L) -> L;
}

struct GatedBy<A>(A);

impl<A: OfOne> OfTwo for GatedBy<A> {
    #[inline(always)]
    fn of<L: Lanes>(&self, gate: L, up: L) -> L {
        A::of(gate).mul(up)
    }
}

struct Clamp {
    alpha: f32,
    limit: f32,
}

impl OfTwo for Clamp {
    #[inline(always)]
    fn of<L: Lanes>(&self, gate: L, up: L) -> L {
        let gate = at_most(gate, self.limit);
        // What is no number is the second of a pair, and stays.
        let up = at_most(L::splat(-self.limit).max(up), self.limit);
        logistic(gate, gate.mul(L::splat(self.alpha))).mul(up.add(L::splat(1.0)))
    }
}

/// The smaller of `x` and `limit`; what is no number stays none.
#[inline(always)]
fn at_most<L: Lanes>(x: L, limit: f32) -> L {
    let zero = L::splat(0.0);
    zero.sub(L::splat(-limit).max(zero.sub(x)))
}

struct AsSilu;

impl OfOne for AsSilu {
    #[inline(always)]
    fn of<L: Lanes>(x: L) -> L {
        silu(x)
    }
}

struct AsGelu;

impl OfOne for AsGelu {
    /// The error function as in Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    #[inline(always)]
    fn of<L: Lanes>(x: L) -> L {
        let (zero, one) = (L::splat(0.0), L::splat(1.0));
        let size = zero.sub(x).max(x);
        let t = one.div(size.mul_add(L::splat(0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2), one));
        let mut p = L::splat(1.061_405_4);
        for c in [-1.453_152, 1.421_413_7, -0.284_496_72, 0.254_829_6] {
            p = p.mul_add(t, L::splat(c));
        }
        let e = x.mul(x).mul(L::splat(-0.5 * std::f32::consts::LOG2_E)).exp2();
        // The distribution function of -|x|, and of x where that is positive.
        let tail = p.mul(t).mul(e).mul(L::splat(0.5));
        let below = tail.add(one.sub(tail.add(tail)).zero_where_below(x, 0.0));
        x.mul(below)
    }
}

struct AsGeluTanh;

impl OfOne for AsGeluTanh {
    /// `x (1 + tanh(z / 2)) / 2` is `x / (1 + exp(-z))`.
    #[inline(always)]
    fn of<L: Lanes>(x: L) -> L {
        let scale = 2.0 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
        let z = x.mul(x).mul_add(L::splat(scale * 0.044_715), L::splat(scale));
        logistic(x, z.mul(x))
    }
}

struct AsReluSquared;

impl OfOne for AsReluSquared {
    #[inline(always)]
    fn of<L: Lanes>(x: L) -> L {
        let positive = x.zero_where_below(x, 0.0);
        positive.mul(positive)
    }
}
