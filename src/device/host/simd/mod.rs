//! Sixteen lanes of f32, three ways: AVX-512 (with and without bfloat16 products), a pair of AVX2 registers, or plain arrays.
//!
//! Promise: every instruction set gives the same bits. All of them do the same IEEE operations (fused multiply-add included) in the
//! same order, lane by lane, so a machine without AVX computes the text that a machine with it computes. `[f32; 16]` is the
//! definition, the other two are tested against it.
//!
//! # Safety
//! The vector types below are named in one place, [`dispatch`], which hands them to a routine only after the processor said that it
//! has the instructions. Everything that takes a `Lanes` type is `inline(always)`, so it is compiled inside that function. A closure
//! is not, even if it is inlined later: closures do no vector arithmetic here, or every instruction would become a call.
//! Memory is touched through references of the exact size only, or through [`KeyChunk`], whose constructors own the argument.

use super::view::{Bf16, KeyChunk, LANES};
use crate::error::{Error, Result};
use std::ffi::{OsStr, OsString};
use std::sync::OnceLock;

/// Environment variable that names the instruction set of the host kernels, by [`Isa::name`]; read once per process.
const VARIABLE: &str = "DFLASH_CPU_ISA";

/// The instruction set a kernel runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Arrays of sixteen floats; the compiler vectorises them for whatever it targets (NEON on aarch64).
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F.
    Avx512,
    /// AVX-512 F with products of bfloat16 pairs.
    Avx512Bf16,
}

impl Isa {
    /// The widest set this processor has.
    pub fn detect() -> Self {
        *Self::available().last().expect("the portable set is always there")
    }

    /// The set of this process: what the environment variable `DFLASH_CPU_ISA` names, else the widest this processor has.
    ///
    /// # Errors
    /// `InvalidArgument` when the variable names no set, or one that this processor lacks.
    pub fn chosen() -> Result<Self> {
        static CHOSEN: OnceLock<Result<Isa>> = OnceLock::new();
        let read = || Self::choose(std::env::var_os(VARIABLE), &Self::available());
        CHOSEN.get_or_init(read).clone()
    }

    fn choose(name: Option<OsString>, available: &[Self]) -> Result<Self> {
        let Some(name) = name else {
            return Ok(*available.last().expect("the portable set is always there"));
        };
        let named = |isa: &&Self| name == OsStr::new(isa.name());
        let refused = |what: &str| Error::InvalidArgument {
            name: VARIABLE,
            got: format!("{name:?}{what}"),
            expected: available.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(" or "),
        };
        match Self::ALL.iter().find(named) {
            None => Err(refused("")),
            Some(isa) if available.contains(isa) => Ok(*isa),
            Some(_) => Err(refused(" on a processor without it")),
        }
    }

    /// Every set there is, narrowest first.
    const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512_bf16",
        }
    }

    /// Every set this processor can run, narrowest first.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut sets = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                sets.push(Self::Avx2);
                if is_x86_feature_detected!("avx512f") {
                    sets.push(Self::Avx512);
                    if is_x86_feature_detected!("avx512bf16") {
                        sets.push(Self::Avx512Bf16);
                    }
                }
            }
        }
        sets
    }

    /// Whether products of bfloat16 pairs are one instruction, and so about twice as fast as products of f32.
    pub fn multiplies_bf16(self) -> bool {
        self == Self::Avx512Bf16
    }
}

/// A computation written once for any lanes.
pub(super) trait Routine {
    /// Runs it; implementations are `inline(always)`.
    fn run<L: Lanes>(self);
}

/// Runs `routine` with the vectors of `isa`.
///
/// # Panics
/// When the processor lacks `isa`; [`Isa::available`] lists what it has.
pub(super) fn dispatch<R: Routine>(isa: Isa, routine: R) {
    match isa {
        Isa::Portable => routine.run::<[f32; LANES]>(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            #[target_feature(enable = "avx2,fma")]
            fn run<R: Routine>(routine: R) {
                routine.run::<x86::Pair>();
            }
            assert!(
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
                "no AVX2 here"
            );
            // SAFETY: the line above.
            unsafe { run(routine) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            #[target_feature(enable = "avx512f,avx2,fma")]
            fn run<R: Routine>(routine: R) {
                routine.run::<x86::Wide<false>>();
            }
            assert!(is_x86_feature_detected!("avx512f"), "no AVX-512 here");
            assert!(
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
                "no AVX2 here"
            );
            // SAFETY: the lines above.
            unsafe { run(routine) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => {
            #[target_feature(enable = "avx512bf16,avx512f,avx2,fma")]
            fn run<R: Routine>(routine: R) {
                routine.run::<x86::Wide<true>>();
            }
            assert!(
                is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16"),
                "no AVX-512 BF16 here"
            );
            assert!(
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
                "no AVX2 here"
            );
            // SAFETY: the lines above.
            unsafe { run(routine) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 => panic!("{isa:?} is an x86 instruction set"),
    }
}

/// Sixteen f32 values.
pub(super) trait Lanes: Copy {
    /// Rows, and vectors of the head, whose sums fit the registers together.
    const ROWS: usize;
    /// See `ROWS`; 2 or 4.
    const VECTORS: usize;
    /// Rows, at most 8, and vectors, 1 or 2, of a product whose sums fit the registers beside the weights they meet.
    const PRODUCT_ROWS: usize;
    /// See `PRODUCT_ROWS`.
    const PRODUCT_VECTORS: usize;
    /// Rows, at most 4, and outputs, a divisor of sixteen, whose sums fit the registers beside the vectors of inputs and weights they are
    /// made of.
    const DOT_ROWS: usize;
    /// See `DOT_ROWS`.
    const DOT_OUTPUTS: usize;

    /// Sixteen pairs of bfloat16 values, ready to be multiplied.
    type Pairs: Copy;

    /// Has the memory around `place` brought near, to be read some microseconds later. It changes nothing but the time that takes.
    fn fetch<T>(place: &T);
    /// The same for what is read a little later: as far as the second cache, which has more requests under way than the first.
    fn fetch_far<T>(place: &T);
    fn splat(x: f32) -> Self;
    fn load(x: &[f32; LANES]) -> Self;
    /// Sixteen bfloat16 values, widened exactly.
    fn load_bf16(x: &[Bf16; LANES]) -> Self;
    fn load_pairs(x: &[[Bf16; 2]; LANES]) -> Self::Pairs;
    /// The same pair in every lane.
    fn splat_pair(x: [Bf16; 2]) -> Self::Pairs;
    /// Per lane the product of the second halves is added to `self`, then that of the first halves; each addition rounds once, the
    /// products are exact. That is the order of the processors that have an instruction for it; those take values below 2^-126 for 0.
    fn add_pairs(self, x: Self::Pairs, w: Self::Pairs) -> Self;
    fn store(self, out: &mut [f32; LANES]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// The larger of the two; `other` where they do not compare.
    fn max(self, other: Self) -> Self;
    /// Adds the low bits of `n` to the exponents: `self * 2^n` for n in the low nine bits of `n`'s pattern.
    fn add_exponent(self, n: Self) -> Self;
    /// Zero in the lanes where `x < limit`.
    fn zero_where_below(self, x: Self, limit: f32) -> Self;
    /// The sixteen dot products of `q` (whole vectors, zero-padded) with the keys of a chunk.
    /// Per key: lane-wise fused multiply-adds along the head, then a tree over distances 8, 4, 2, 1.
    fn dots(q: &[f32], keys: &KeyChunk<'_>) -> Self;

    /// 2^x for x <= 0, to about one unit in the last place; exactly 0 below 2^-125.
    #[inline(always)]
    fn exp2(self) -> Self {
        // Adding 1.5 * 2^23 leaves round(x) in the low bits of the sum.
        let magic = Self::splat(12_582_912.0);
        let shifted = self.add(magic);
        let f = self.sub(shifted.sub(magic));
        // Taylor of 2^f on [-1/2, 1/2], degree 7: truncation below 6e-9.
        let mut p = Self::splat(1.525_273_4e-5);
        for c in [
            1.540_353e-4,
            1.333_355_8e-3,
            9.618_129e-3,
            5.550_411e-2,
            2.402_265e-1,
            std::f32::consts::LN_2,
            1.0,
        ] {
            p = p.mul_add(f, Self::splat(c));
        }
        p.add_exponent(shifted).zero_where_below(self, -125.0)
    }

    /// Sum of the lanes: a tree over distances 8, 4, 2, 1.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut x = [0.0; LANES];
        self.store(&mut x);
        tree_sum(x)
    }

    /// [`Self::sum`] of each of sixteen vectors, one per lane.
    #[inline(always)]
    fn sums(vectors: &[Self; LANES]) -> Self {
        let mut out = [0.0; LANES];
        for (out, vector) in out.iter_mut().zip(vectors) {
            *out = vector.sum();
        }
        Self::load(&out)
    }

    /// Largest lane.
    #[inline(always)]
    fn max_lane(self) -> f32 {
        let mut x = [0.0; LANES];
        self.store(&mut x);
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

#[inline(always)]
fn tree_sum(mut x: [f32; LANES]) -> f32 {
    for distance in [8, 4, 2, 1] {
        for i in 0..distance {
            x[i] += x[i + distance];
        }
    }
    x[0]
}

#[inline(always)]
fn vector(x: &[f32], index: usize) -> &[f32; LANES] {
    x[index * LANES..(index + 1) * LANES]
        .try_into()
        .expect("sixteen elements")
}

impl Lanes for [f32; LANES] {
    const ROWS: usize = 1;
    const VECTORS: usize = 2;
    const PRODUCT_ROWS: usize = 2;
    const PRODUCT_VECTORS: usize = 2;
    const DOT_ROWS: usize = 1;
    const DOT_OUTPUTS: usize = 2;
    type Pairs = [Self; 2];
    #[inline(always)]
    fn fetch<T>(_: &T) {}
    #[inline(always)]
    fn fetch_far<T>(_: &T) {}
    #[inline(always)]
    fn load_pairs(x: &[[Bf16; 2]; LANES]) -> [Self; 2] {
        [0, 1].map(|half| std::array::from_fn(|i| x[i][half].into()))
    }
    #[inline(always)]
    fn splat_pair(x: [Bf16; 2]) -> [Self; 2] {
        x.map(|x| Self::splat(x.into()))
    }
    #[inline(always)]
    fn add_pairs(self, x: [Self; 2], w: [Self; 2]) -> Self {
        x[0].mul_add(w[0], x[1].mul_add(w[1], self))
    }
    #[inline(always)]
    fn splat(x: f32) -> Self {
        [x; LANES]
    }
    #[inline(always)]
    fn load_bf16(x: &[Bf16; LANES]) -> Self {
        std::array::from_fn(|i| x[i].into())
    }
    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self {
        *x
    }
    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        *out = self;
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] + other[i])
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] - other[i])
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] * other[i])
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] / other[i])
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|i| self[i].mul_add(a[i], b[i]))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        std::array::from_fn(|i| if self[i] > other[i] { self[i] } else { other[i] })
    }
    #[inline(always)]
    fn add_exponent(self, n: Self) -> Self {
        std::array::from_fn(|i| f32::from_bits(self[i].to_bits().wrapping_add(n[i].to_bits() << 23)))
    }
    #[inline(always)]
    fn zero_where_below(self, x: Self, limit: f32) -> Self {
        std::array::from_fn(|i| if x[i] < limit { 0.0 } else { self[i] })
    }
    #[inline(always)]
    fn dots(q: &[f32], keys: &KeyChunk<'_>) -> Self {
        std::array::from_fn(|key| {
            let mut acc = [0.0; LANES];
            for d in 0..keys.vectors() {
                acc = keys.vector(key, d).mul_add(*vector(q, d), acc);
            }
            tree_sum(acc)
        })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(name: &str, available: &[Isa]) -> Result<Isa> {
        Isa::choose(Some(name.into()), available)
    }

    #[test]
    fn the_widest_set_runs_unless_a_narrower_one_is_named() {
        let available = [Isa::Portable, Isa::Avx2, Isa::Avx512];
        assert_eq!(Isa::choose(None, &available), Ok(Isa::Avx512));
        for isa in available {
            assert_eq!(choose(isa.name(), &available), Ok(isa));
        }
        assert_eq!(choose("avx512_bf16", &Isa::ALL), Ok(Isa::Avx512Bf16));
    }

    #[test]
    fn a_set_that_the_processor_lacks_or_nobody_knows_is_refused() {
        let available = [Isa::Portable, Isa::Avx2];
        let refused = |name| choose(name, &available).unwrap_err().to_string();
        assert_eq!(
            refused("avx512"),
            "DFLASH_CPU_ISA: got \"avx512\" on a processor without it, expected portable or avx2"
        );
        assert_eq!(
            refused("AVX2"),
            "DFLASH_CPU_ISA: got \"AVX2\", expected portable or avx2"
        );
        assert!(choose("", &available).is_err());
    }
}
