//! One routine, compiled twice: for the baseline processor and for AVX2, chosen at run time.
//!
//! The compiler vectorises plain loops; nothing here is written in intrinsics. Only AVX2 is enabled, not FMA, and Rust never
//! contracts `a * b + c`, so both versions do the same IEEE operations and give the same bits.

/// A computation on a row. `run` and all it calls are `inline(always)`, or they stay compiled for the baseline.
pub(crate) trait Routine {
    type Output;

    fn run(self) -> Self::Output;
}

/// Runs `routine` with the widest vectors this processor has.
pub(crate) fn widest<R: Routine>(routine: R) -> R::Output {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2<R: Routine>(routine: R) -> R::Output {
            routine.run()
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the feature, by the line above.
            return unsafe { avx2(routine) };
        }
    }
    routine.run()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Domain, Stream, gumbel_of_word};
    use crate::verify::math::weight;

    struct Bits(u64);

    impl Routine for Bits {
        type Output = Vec<(u32, u32, u64)>;

        #[inline(always)]
        fn run(self) -> Self::Output {
            let mut words = [0u32; 256];
            Stream::new(self.0, 1, Domain::Draw).fill_words(0, &mut words);
            let gumbel = words.map(gumbel_of_word);
            let weights = gumbel.map(|g| weight(-4.0 * g.abs()));
            words
                .iter()
                .zip(gumbel)
                .zip(weights)
                .map(|((&w, g), x)| (w, g.to_bits(), x))
                .collect()
        }
    }

    #[test]
    fn wide_vectors_give_the_bits_of_the_baseline() {
        for seed in 0..20 {
            assert_eq!(widest(Bits(seed)), Bits(seed).run());
        }
    }
}
