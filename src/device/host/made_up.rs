//! Numbers for tests.

use super::view::Bf16;

/// `count` numbers in -1..1 that hang on `seed` alone; with `halves`, ones that bfloat16 holds.
pub(super) fn numbers(count: usize, seed: u64, halves: bool) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let x = ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 2.0;
        if halves { f32::from(Bf16::from(x)) } else { x }
    };
    (0..count).map(|_| next()).collect()
}
