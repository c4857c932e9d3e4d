//! Counter-based random numbers: every number is a pure function of its key, none is ever "next".
//!
//! A key is `(seed, position, column, domain)`. Nothing is stored between draws, so a row may be drawn on any
//! thread, on any device and in any order, and gives the same bits. Speculation becomes invisible through this
//! alone: the token at position `n` uses the same numbers whether it was drawn in a block, in a tree or by itself.
//!
//! # The bits
//! Philox 4x32-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011), one call per four columns:
//!
//! ```text
//! key     = [seed low 32, seed high 32]
//! counter = [column >> 2, position low 32, position high 32, domain]
//! word(column) = output[column & 3]
//! ```
//!
//! # The Gumbel number of a word
//! Only IEEE-754 binary32 additions, multiplications and comparisons and 32-bit integer operations, each rounded on its
//! own: no library function and **no fused multiply-add** (a CUDA kernel uses `__fmul_rn` / `__fadd_rn`).
//!
//! ```text
//! k  = (word >> 1) | 1                                        odd, so u = k / 2^31 lies in (0, 1) on a symmetric grid
//! hi = float(k >> 16), lo = float(k & 0xffff)                 both exact
//! e  = (bits(hi * 65536 + lo) - 0x3f2aaaab) >> 23  (signed)   k is about f * 2^e with f in [2/3, 4/3)
//! s  = float_from_bits((127 - e) << 23)                       2^-e
//! r  = (hi * (65536 * s) - 1) + lo * s                        f - 1, one rounding: exact in relative terms near u = 1
//! E  = 0 - ((float(e - 31)) * LN2 + log1p(r))                 -ln u, an exponential number, in [2^-31, 21.49]
//! gumbel = 0 - ln(E)
//! ln(x): e = (bits(x) - 0x3f2aaaab) >> 23 (signed); f = float_from_bits(bits(x) - (e << 23)); float(e) * LN2 + log1p(f - 1)
//! log1p(r) = r + (r * r) * P(r),  P by Horner's rule from the highest of the nine coefficients below
//! ```
//!
//! `log1p` is within 2e-7 of the real logarithm (relative) and the Gumbel number within 3e-6 (absolute; an ulp at its
//! largest value is 1.9e-6). Its range is [`GUMBEL_MIN`, `GUMBEL_MAX`], which lets a row sampler skip columns exactly.

/// What a random number is for. No key is consumed twice because each use has a domain of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Domain {
    /// The target's own token (sample-and-match, plain decoding). Position = that of the token drawn.
    Draw = 0,
    /// Accept coins of the ratio verifiers. Position = sequence length at the start of the round.
    Accept = 1,
    /// The last token of a ratio-verified round. Position = sequence length at the start of the round.
    Residual = 2,
    /// Tokens a drafter samples. Position = sequence length at the start of the round, or the token's own.
    Draft = 3,
}

const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// Philox 4x32 with ten rounds: one block of four words.
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let mut lanes = [[counter[0]], [counter[1]], [counter[2]], [counter[3]]];
    rounds(&mut lanes, key);
    [lanes[0][0], lanes[1][0], lanes[2][0], lanes[3][0]]
}

// Words are kept apart (structure of arrays) so that the compiler runs N blocks in one vector register.
#[inline(always)]
fn rounds<const N: usize>(x: &mut [[u32; N]; 4], mut key: [u32; 2]) {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(W0), key[1].wrapping_add(W1)];
        }
        #[allow(clippy::needless_range_loop)] // four rows in step
        for i in 0..N {
            let a = u64::from(M0) * u64::from(x[0][i]);
            let b = u64::from(M1) * u64::from(x[2][i]);
            let y0 = (b >> 32) as u32 ^ x[1][i] ^ key[0];
            let y2 = (a >> 32) as u32 ^ x[3][i] ^ key[1];
            x[0][i] = y0;
            x[1][i] = b as u32;
            x[2][i] = y2;
            x[3][i] = a as u32;
        }
    }
}

/// The numbers of one `(seed, position, domain)`: one word per column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
    position: [u32; 2],
    domain: u32,
}

impl Stream {
    /// Names the stream; computes nothing.
    pub fn new(seed: u64, position: u64, domain: Domain) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            position: [position as u32, (position >> 32) as u32],
            domain: domain as u32,
        }
    }

    /// The word of `column`.
    pub fn word(&self, column: u32) -> u32 {
        let counter = [column >> 2, self.position[0], self.position[1], self.domain];
        philox4x32_10(counter, self.key)[(column & 3) as usize]
    }

    /// The words of the `4 N` columns from `first` on (a multiple of four): `[w][i]` is that of column `first + 4 i + w`.
    #[inline(always)]
    pub(crate) fn lanes<const N: usize>(&self, first: u32) -> [[u32; N]; 4] {
        debug_assert_eq!(first & 3, 0);
        let mut x = [
            [0u32; N],
            [self.position[0]; N],
            [self.position[1]; N],
            [self.domain; N],
        ];
        for (i, lane) in x[0].iter_mut().enumerate() {
            *lane = (first >> 2).wrapping_add(i as u32);
        }
        rounds(&mut x, self.key);
        x
    }

    /// The words of columns `first .. first + out.len()`; `first` is a multiple of four.
    #[inline(always)]
    pub fn fill_words(&self, first: u32, out: &mut [u32]) {
        const N: usize = 8;
        for (i, chunk) in out.chunks_mut(4 * N).enumerate() {
            let words = self.lanes::<N>(first.wrapping_add((4 * N * i) as u32));
            for (j, word) in chunk.iter_mut().enumerate() {
                *word = words[j & 3][j >> 2];
            }
        }
    }

    /// The Gumbel(0, 1) number of `column`.
    pub fn gumbel(&self, column: u32) -> f32 {
        gumbel_of_word(self.word(column))
    }

    /// A coin in `[0, 1)` with 53 random bits, from the words of columns `2 * index` (high half) and `2 * index + 1` (low).
    pub fn uniform(&self, index: u32) -> f64 {
        let column = 2 * index;
        let counter = [column >> 2, self.position[0], self.position[1], self.domain];
        let block = philox4x32_10(counter, self.key);
        let at = (column & 3) as usize;
        let bits = (u64::from(block[at]) << 32) | u64::from(block[at + 1]);
        (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

/// The Gumbel(0, 1) number keyed by `(seed, position, column, domain)`.
pub fn gumbel(seed: u64, position: u64, column: u32, domain: Domain) -> f32 {
    Stream::new(seed, position, domain).gumbel(column)
}

/// Smallest value of [`gumbel_of_word`] (words 0 to 3), rounded down.
pub const GUMBEL_MIN: f32 = -3.0675;
/// Largest value of [`gumbel_of_word`] (words `!3` to `!0`), rounded up.
pub const GUMBEL_MAX: f32 = 21.4876;

const LN2: f32 = std::f32::consts::LN_2;
const TWO_THIRDS: u32 = 0x3f2a_aaab;
// Least maximum of |error * r| on |r| <= 1/3 (weighted least squares, then rounded to f32), so that log1p keeps its
// relative precision near r = 0, where the large Gumbel numbers come from.
const LOG1P: [f32; 9] = [
    -0.5,
    0.333_332_1,
    -0.249_995_07,
    0.200_107_92,
    -0.166_895_5,
    0.140_003_71,
    -0.120_774_53,
    0.140_089_36,
    -0.133_149_7,
];

#[inline(always)]
fn log1p(r: f32) -> f32 {
    let mut p = LOG1P[8];
    for c in LOG1P[..8].iter().rev() {
        p = p * r + c;
    }
    r + (r * r) * p
}

/// Natural logarithm of a positive normal `f32` by the arithmetic of the module doc (same bits on every device).
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    let bits = x.to_bits();
    let e = (bits.wrapping_sub(TWO_THIRDS) as i32) >> 23;
    let f = f32::from_bits(bits.wrapping_sub((e << 23) as u32));
    e as f32 * LN2 + log1p(f - 1.0)
}

/// Gumbel(0, 1) number of one random word; see the module doc for the exact arithmetic.
#[inline(always)]
pub fn gumbel_of_word(word: u32) -> f32 {
    let k = (word >> 1) | 1;
    // Signed conversions: they have a vector instruction everywhere.
    let hi = (k >> 16) as i32 as f32;
    let lo = (k & 0xffff) as i32 as f32;
    let e = ((hi * 65536.0 + lo).to_bits().wrapping_sub(TWO_THIRDS) as i32) >> 23;
    let s = f32::from_bits(((127 - e) << 23) as u32);
    let r = (hi * (65536.0 * s) - 1.0) + lo * s;
    let exponential = 0.0 - ((e - 31) as f32 * LN2 + log1p(r));
    0.0 - ln(exponential)
}
