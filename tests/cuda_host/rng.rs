use dflash_host_check as _;
use dflash_rs::rng::{Domain, Stream, gumbel_of_word, ln};

use super::numbers::{Numbers, share};

unsafe extern "C" {
    fn dflash_host_words(seed: u64, position: u64, domain: u32, first: u32, count: u32, out: *mut u32);
    fn dflash_host_uniform(seed: u64, position: u64, domain: u32, index: u32) -> f64;
    fn dflash_host_gumbel(words: *const u32, count: u32, numbers: *mut f32, bounds: *mut f32);
    fn dflash_host_ln(x: *const f32, count: u32, out: *mut f32);
}

const DOMAINS: [Domain; 4] = [Domain::Draw, Domain::Accept, Domain::Residual, Domain::Draft];

/// The kernels' Gumbel numbers of these words, and their bounds.
fn gumbels(words: &[u32]) -> (Vec<f32>, Vec<f32>) {
    let (mut got, mut bounds) = (vec![0f32; words.len()], vec![0f32; words.len()]);
    // SAFETY: as many numbers as words.
    unsafe {
        dflash_host_gumbel(
            words.as_ptr(),
            words.len() as u32,
            got.as_mut_ptr(),
            bounds.as_mut_ptr(),
        )
    };
    (got, bounds)
}

#[test]
fn words_and_coins_are_those_of_the_reference() {
    let mut numbers = Numbers(1);
    for _ in 0..share(20_000) {
        let (seed, position, domain) = (numbers.next(), numbers.next(), numbers.pick(&DOMAINS));
        let first = numbers.next() as u32 / 2;
        let stream = Stream::new(seed, position, domain);
        let mut words = [0u32; 16];
        // SAFETY: sixteen words are written.
        unsafe { dflash_host_words(seed, position, domain as u32, first, 16, words.as_mut_ptr()) };
        for (i, &word) in words.iter().enumerate() {
            assert_eq!(word, stream.word(first + i as u32));
        }
        // SAFETY: plain numbers.
        let coin = unsafe { dflash_host_uniform(seed, position, domain as u32, first) };
        assert_eq!(coin.to_bits(), stream.uniform(first).to_bits());
    }
}

#[test]
fn gumbel_numbers_have_the_bits_of_the_reference_and_stay_below_their_bound() {
    let mut numbers = Numbers(2);
    let mut words: Vec<u32> = (0..share(1_000_000)).map(|_| numbers.next() as u32).collect();
    words.extend(0..1000);
    words.extend(u32::MAX - 1000..=u32::MAX);
    // Around every power of two, from both ends: where exponents and the bound change.
    for shift in 0..32 {
        for delta in 0..64u32 {
            words.extend([(1 << shift) + delta, (1u32 << shift).wrapping_sub(delta)]);
            words.extend([!((1 << shift) + delta), !(1u32 << shift).wrapping_sub(delta)]);
        }
    }
    words.sort_unstable();
    let (got, bounds) = gumbels(&words);
    let mut largest = f32::NEG_INFINITY;
    for ((&word, got), bound) in words.iter().zip(got).zip(bounds) {
        assert_eq!(got.to_bits(), gumbel_of_word(word).to_bits(), "word {word:#x}");
        largest = largest.max(got);
        assert!(
            largest <= bound,
            "word {word:#x}: {largest} for a word no larger, bound {bound}"
        );
    }
}

#[test]
fn the_bound_of_a_word_lies_just_above_the_logarithm_of_what_it_leaves_to_one() {
    let mut numbers = Numbers(16);
    let mut words: Vec<u32> = (0..share(100_000)).map(|_| numbers.next() as u32).collect();
    words.extend((0..32).flat_map(|ones| [0, 1, 511, 512].map(|less| (!(u32::MAX >> ones)).wrapping_sub(less))));
    words.extend([0, 511, u32::MAX - 1023, u32::MAX - 512]);
    let (got, bounds) = gumbels(&words);
    for ((&word, got), bound) in words.iter().zip(got).zip(bounds) {
        let left = f64::from((1 << 23) - 1 - (word >> 9)) / f64::from(1 << 23);
        if left == 0.0 {
            assert_eq!(bound, f32::INFINITY, "word {word:#x}");
            continue;
        }
        // What the arithmetic may be wrong by, and no more: a bound further up is no help.
        let (bound, exact) = (f64::from(bound), -left.ln());
        assert!(
            (exact * 1.000_01..=exact * 1.000_02 + 2e-7).contains(&bound),
            "word {word:#x}: {bound}, {exact}"
        );
        assert!(f64::from(got) <= bound, "word {word:#x}: {bound}, {got}");
        // Of numbers that win, no more than their half a unit and the 23 bits make.
        if left < 0.05 && left > 1e-4 {
            assert!(
                bound - f64::from(got) < 0.6 * left + 2e-4 + 1.5e-7 / left,
                "word {word:#x}: {bound}, {got}"
            );
        }
    }
}

#[test]
fn logarithms_have_the_bits_of_the_reference() {
    let mut numbers = Numbers(3);
    let x: Vec<f32> = (0..share(200_000))
        .map(|_| f32::from_bits(numbers.within(0x0080_0000, 0x7f7f_ffff) as u32))
        .collect();
    let mut got = vec![0f32; x.len()];
    // SAFETY: as many results as arguments.
    unsafe { dflash_host_ln(x.as_ptr(), x.len() as u32, got.as_mut_ptr()) };
    for (x, got) in x.into_iter().zip(got) {
        assert_eq!(got.to_bits(), ln(x).to_bits(), "{x}");
    }
}
