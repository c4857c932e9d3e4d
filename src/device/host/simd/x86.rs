//! The lanes of x86: a pair of AVX2 registers, and one of AVX-512.
//!
//! # Safety
//! Every `unsafe` block here is an intrinsic whose instruction set [`super::dispatch`] has checked, or a load or store of
//! exactly the array that its reference points to.

use super::{Bf16, KeyChunk, LANES, Lanes, vector};
use std::arch::x86_64::*;

/// `DOT`: the processor multiplies pairs of bfloat16.
#[derive(Clone, Copy)]
pub(super) struct Wide<const DOT: bool>(__m512);

/// Sums of sixteen vectors, one per lane, each as a tree over distances 8, 4, 2, 1. Every step halves two vectors into one, so
/// the whole costs 15 additions and 30 shuffles instead of 64 and 64.
#[inline(always)]
fn transpose_sum(acc: [__m512; 16]) -> __m512 {
    // SAFETY: see the module.
    unsafe {
        let mut eight = [acc[0]; 8];
        for (i, sum) in eight.iter_mut().enumerate() {
            // Vector `i` of the tree belongs to key 4 * (i % 4) + i / 4: the order in which the shuffles deliver the lanes.
            let (a, b) = (acc[8 * (i % 2) + i / 2], acc[8 * (i % 2) + 4 + i / 2]);
            let low = _mm512_shuffle_f32x4(a, b, 0b01_00_01_00);
            *sum = _mm512_add_ps(low, _mm512_shuffle_f32x4(a, b, 0b11_10_11_10));
        }
        let mut four = [acc[0]; 4];
        for (i, sum) in four.iter_mut().enumerate() {
            let (a, b) = (eight[2 * i], eight[2 * i + 1]);
            let even = _mm512_shuffle_f32x4(a, b, 0b10_00_10_00);
            *sum = _mm512_add_ps(even, _mm512_shuffle_f32x4(a, b, 0b11_01_11_01));
        }
        let mut two = [acc[0]; 2];
        for (i, sum) in two.iter_mut().enumerate() {
            let (a, b) = (_mm512_castps_pd(four[2 * i]), _mm512_castps_pd(four[2 * i + 1]));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            *sum = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
        }
        let even = _mm512_shuffle_ps(two[0], two[1], 0b10_00_10_00);
        _mm512_add_ps(even, _mm512_shuffle_ps(two[0], two[1], 0b11_01_11_01))
    }
}

impl<const DOT: bool> Lanes for Wide<DOT> {
    const ROWS: usize = 4;
    const VECTORS: usize = 4;
    const PRODUCT_ROWS: usize = 8;
    const PRODUCT_VECTORS: usize = 2;
    const DOT_ROWS: usize = 4;
    const DOT_OUTPUTS: usize = 4;
    // The pairs as they are and nothing, or first and second halves.
    type Pairs = [__m512; 2];
    #[inline(always)]
    fn fetch<T>(place: &T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(place).cast()) }
    }
    #[inline(always)]
    fn fetch_far<T>(place: &T) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(place).cast()) }
    }
    #[inline(always)]
    fn load_pairs(x: &[[Bf16; 2]; LANES]) -> [__m512; 2] {
        unsafe {
            let pairs = _mm512_loadu_si512(x.as_ptr().cast());
            if DOT {
                return [_mm512_castsi512_ps(pairs), _mm512_setzero_ps()];
            }
            let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            let (first, second) = (_mm512_slli_epi32::<16>(pairs), _mm512_and_si512(pairs, high));
            [_mm512_castsi512_ps(first), _mm512_castsi512_ps(second)]
        }
    }
    #[inline(always)]
    fn splat_pair(x: [Bf16; 2]) -> [__m512; 2] {
        unsafe {
            if DOT {
                let pair = _mm512_set1_epi32((u32::from(x[1].0) << 16 | u32::from(x[0].0)).cast_signed());
                return [_mm512_castsi512_ps(pair), _mm512_setzero_ps()];
            }
            [_mm512_set1_ps(x[0].into()), _mm512_set1_ps(x[1].into())]
        }
    }
    #[inline(always)]
    fn add_pairs(self, x: [__m512; 2], w: [__m512; 2]) -> Self {
        unsafe {
            if !DOT {
                return Self(_mm512_fmadd_ps(x[0], w[0], _mm512_fmadd_ps(x[1], w[1], self.0)));
            }
            // Bit patterns: the two types are one register.
            let (x, w) = (
                std::mem::transmute::<__m512, __m512bh>(x[0]),
                std::mem::transmute::<__m512, __m512bh>(w[0]),
            );
            Self(_mm512_dpbf16_ps(self.0, x, w))
        }
    }
    #[inline(always)]
    fn sums(vectors: &[Self; LANES]) -> Self {
        let mut plain = [vectors[0].0; LANES];
        for (plain, vector) in plain.iter_mut().zip(vectors) {
            *plain = vector.0;
        }
        Self(transpose_sum(plain))
    }
    #[inline(always)]
    fn load_bf16(x: &[Bf16; LANES]) -> Self {
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves)))
        }
    }
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self {
        Self(unsafe { _mm512_loadu_ps(x.as_ptr()) })
    }
    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, a.0, b.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn add_exponent(self, n: Self) -> Self {
        unsafe {
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(n.0));
            Self(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(self.0), n)))
        }
    }
    #[inline(always)]
    fn zero_where_below(self, x: Self, limit: f32) -> Self {
        unsafe {
            let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x.0, _mm512_set1_ps(limit));
            Self(_mm512_mask_mov_ps(self.0, below, _mm512_setzero_ps()))
        }
    }
    #[inline(always)]
    fn dots(q: &[f32], keys: &KeyChunk<'_>) -> Self {
        // All sixteen accumulators live in registers; the keys are memory operands.
        let mut acc = [unsafe { _mm512_setzero_ps() }; LANES];
        for d in 0..keys.vectors() {
            let q = Self::load(vector(q, d));
            for (key, a) in acc.iter_mut().enumerate() {
                *a = Self::load(keys.vector(key, d)).mul_add(q, Self(*a)).0;
            }
        }
        Self(transpose_sum(acc))
    }
}

#[derive(Clone, Copy)]
pub(super) struct Pair(__m256, __m256);

/// The rest of the tree for eight of the keys.
#[inline(always)]
fn half_sum(eight: &[__m256; LANES], base: usize) -> __m256 {
    // SAFETY: see the module.
    unsafe {
        let mut four = [eight[0]; 4];
        for (i, sum) in four.iter_mut().enumerate() {
            let (a, b) = (eight[base + i], eight[base + 4 + i]);
            let low = _mm256_permute2f128_ps(a, b, 0x20);
            *sum = _mm256_add_ps(low, _mm256_permute2f128_ps(a, b, 0x31));
        }
        let mut two = [eight[0]; 2];
        for (i, sum) in two.iter_mut().enumerate() {
            let (a, b) = (_mm256_castps_pd(four[2 * i]), _mm256_castps_pd(four[2 * i + 1]));
            let low = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            *sum = _mm256_add_ps(low, _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
        }
        let even = _mm256_shuffle_ps(two[0], two[1], 0b10_00_10_00);
        _mm256_add_ps(even, _mm256_shuffle_ps(two[0], two[1], 0b11_01_11_01))
    }
}

impl Lanes for Pair {
    const ROWS: usize = 2;
    const VECTORS: usize = 2;
    // Twelve sums, two halves of a vector of weights and an input: of sixteen registers.
    const PRODUCT_ROWS: usize = 6;
    const PRODUCT_VECTORS: usize = 1;
    const DOT_ROWS: usize = 2;
    const DOT_OUTPUTS: usize = 2;
    type Pairs = [Self; 2];
    #[inline(always)]
    fn fetch<T>(place: &T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(place).cast()) }
    }
    #[inline(always)]
    fn fetch_far<T>(place: &T) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(place).cast()) }
    }
    #[inline(always)]
    fn load_pairs(x: &[[Bf16; 2]; LANES]) -> [Self; 2] {
        unsafe {
            let low = _mm256_loadu_si256(x.as_ptr().cast());
            let high = _mm256_loadu_si256(x.as_ptr().add(8).cast());
            let second = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            [
                Self(
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
                ),
                Self(
                    _mm256_castsi256_ps(_mm256_and_si256(low, second)),
                    _mm256_castsi256_ps(_mm256_and_si256(high, second)),
                ),
            ]
        }
    }
    #[inline(always)]
    fn splat_pair(x: [Bf16; 2]) -> [Self; 2] {
        [Self::splat(x[0].into()), Self::splat(x[1].into())]
    }
    #[inline(always)]
    fn add_pairs(self, x: [Self; 2], w: [Self; 2]) -> Self {
        x[0].mul_add(w[0], x[1].mul_add(w[1], self))
    }
    #[inline(always)]
    fn sums(vectors: &[Self; LANES]) -> Self {
        let mut eight = [vectors[0].0; LANES];
        for (eight, vector) in eight.iter_mut().zip(vectors) {
            // SAFETY: see the module.
            *eight = unsafe { _mm256_add_ps(vector.0, vector.1) };
        }
        Self(half_sum(&eight, 0), half_sum(&eight, 8))
    }
    #[inline(always)]
    fn load_bf16(x: &[Bf16; LANES]) -> Self {
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().add(8).cast()));
            Self(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }
    #[inline(always)]
    fn splat(x: f32) -> Self {
        let x = unsafe { _mm256_set1_ps(x) };
        Self(x, x)
    }
    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self {
        unsafe { Self(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
    }
    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), self.0);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), self.1);
        }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        unsafe { Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        unsafe { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        unsafe { Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        unsafe { Self(_mm256_fmadd_ps(self.0, a.0, b.0), _mm256_fmadd_ps(self.1, a.1, b.1)) }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        unsafe { Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn add_exponent(self, n: Self) -> Self {
        unsafe {
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(n.0));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(n.1));
            Self(
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(self.0), low)),
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(self.1), high)),
            )
        }
    }
    #[inline(always)]
    fn zero_where_below(self, x: Self, limit: f32) -> Self {
        unsafe {
            let limit = _mm256_set1_ps(limit);
            Self(
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.0, limit), self.0),
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.1, limit), self.1),
            )
        }
    }
    #[inline(always)]
    fn dots(q: &[f32], keys: &KeyChunk<'_>) -> Self {
        unsafe {
            // Distance 8 of the tree is the sum of the two halves; the rest halves two vectors into one, as above.
            // Four keys at a time: sixteen would need twice the registers there are.
            let mut eight = [_mm256_setzero_ps(); LANES];
            for first in (0..LANES).step_by(4) {
                let mut acc = [Self::splat(0.0); 4];
                for d in 0..keys.vectors() {
                    let q = Self::load(vector(q, d));
                    for (i, a) in acc.iter_mut().enumerate() {
                        *a = Self::load(keys.vector(first + i, d)).mul_add(q, *a);
                    }
                }
                for (i, a) in acc.iter().enumerate() {
                    eight[first + i] = _mm256_add_ps(a.0, a.1);
                }
            }
            Self(half_sum(&eight, 0), half_sum(&eight, 8))
        }
    }
}
