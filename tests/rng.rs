//! The generator's bits are a contract: a device that repeats the documented arithmetic must meet these very numbers.

use dflash_rs::rng::{Domain, GUMBEL_MAX, GUMBEL_MIN, Stream, gumbel, gumbel_of_word, ln, philox4x32_10};
use proptest::prelude::*;

#[test]
fn philox_meets_the_published_known_answers() {
    // kat_vectors of Random123 (Salmon et al.), philox4x32 with 10 rounds.
    let cases = [
        (
            [0, 0, 0, 0],
            [0, 0],
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
        ),
        (
            [u32::MAX; 4],
            [u32::MAX; 2],
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
        ),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, expected) in cases {
        assert_eq!(philox4x32_10(counter, key), expected);
    }
}

#[test]
fn the_key_lands_in_the_documented_counter_words() {
    let seed = 0x0123_4567_89ab_cdef;
    let position = 0xfedc_ba98_7654_3210;
    let block = philox4x32_10([5, 0x7654_3210, 0xfedc_ba98, 1], [0x89ab_cdef, 0x0123_4567]);
    let stream = Stream::new(seed, position, Domain::Accept);
    let words: Vec<u32> = (20..24).map(|column| stream.word(column)).collect();
    assert_eq!(words, block);
    // Coin 10 is columns 20 (high) and 21 (low), 53 bits of them.
    let bits = (u64::from(block[0]) << 32 | u64::from(block[1])) >> 11;
    assert_eq!(stream.uniform(10), bits as f64 / 2f64.powi(53));
    assert_eq!(gumbel(seed, position, 22, Domain::Accept), gumbel_of_word(block[2]));
}

// ln(-ln u) in f64, with the symmetric grid u = k / 2^31.
fn exact_gumbel(word: u32) -> f64 {
    let k = (word >> 1) | 1;
    let exponential = if k >= 1 << 30 {
        -(-f64::from((1u32 << 31) - k) / 2f64.powi(31)).ln_1p()
    } else {
        -(f64::from(k) / 2f64.powi(31)).ln()
    };
    -exponential.ln()
}

#[test]
fn gumbel_numbers_are_within_the_stated_error_over_the_whole_range() {
    let strided = (0..1u64 << 32).step_by(10_007).map(|w| w as u32);
    let low = 0..5_000u32;
    let high = (u32::MAX - 5_000)..=u32::MAX;
    // Around u = 2/3 * 2^-n, where the range reduction changes its exponent.
    let seams = (1..32).flat_map(|n| {
        let seam = (2.0 / 3.0 * 2f64.powi(32 - n)) as u32;
        seam.saturating_sub(300)..=seam.saturating_add(300)
    });
    let mut worst = 0.0f64;
    for word in strided.chain(low).chain(high).chain(seams) {
        let got = gumbel_of_word(word);
        assert!((GUMBEL_MIN..=GUMBEL_MAX).contains(&got), "{word:#x}: {got}");
        worst = worst.max((f64::from(got) - exact_gumbel(word)).abs());
    }
    assert!(worst < 3e-6, "worst error {worst:e}");
}

#[test]
fn the_stated_bounds_are_reached() {
    assert!(gumbel_of_word(u32::MAX) > GUMBEL_MAX - 1e-4);
    assert!(gumbel_of_word(0) < GUMBEL_MIN + 1e-4);
}

#[test]
fn gumbel_bits_do_not_drift() {
    // Computed once from the documented arithmetic with NumPy float32, operation by operation (tests/python/test_verify.py
    // repeats that computation on random words).
    for (word, bits) in GOLDEN {
        assert_eq!(
            gumbel_of_word(word).to_bits(),
            bits,
            "word {word:#010x}: {}",
            gumbel_of_word(word)
        );
    }
}

const GOLDEN: [(u32, u32); 14] = [
    (0x0000_0000, 0xc044_5180),
    (0x0000_0001, 0xc044_5180),
    (0x0000_0002, 0xc044_5180),
    (0xffff_ffff, 0x41ab_e687),
    (0xffff_fffd, 0x41ab_e687),
    (0x8000_0000, 0x3ebb_a795),
    (0x7fff_ffff, 0x3ebb_a795),
    (0xaaaa_aaaa, 0x3f67_18af),
    (0x5555_5555, 0xbdc0_9c28),
    (0x1234_5678, 0xbf78_dc16),
    (0x9e37_79b9, 0x3f3b_4028),
    (0xdead_beef, 0x3ffc_2b26),
    (0x0001_0000, 0xc019_fd1a),
    (0xfffe_0000, 0x4126_5af6),
];

#[test]
fn ln_is_accurate_for_every_exponent() {
    for e in -126..=127 {
        for step in 0..500 {
            let x = 2f32.powi(e) * (1.0 + step as f32 / 500.0);
            let exact = f64::from(x).ln();
            let error = (f64::from(ln(x)) - exact).abs();
            assert!(error <= 2e-7 * exact.abs().max(1.0), "ln({x:e}): error {error:e}");
        }
    }
}

#[test]
fn moments_of_a_million_gumbel_numbers_are_those_of_the_distribution() {
    let n = 1_000_000u32;
    let mut words = vec![0; n as usize];
    Stream::new(7, 3, Domain::Draw).fill_words(0, &mut words);
    let g: Vec<f64> = words.iter().map(|&w| f64::from(gumbel_of_word(w))).collect();
    let mean = g.iter().sum::<f64>() / f64::from(n);
    let variance = g.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / f64::from(n);
    // Standard errors: 0.0013 and about 0.0035.
    assert!((mean - 0.577_215_66).abs() < 0.006, "mean {mean}");
    assert!(
        (variance - std::f64::consts::PI.powi(2) / 6.0).abs() < 0.016,
        "variance {variance}"
    );
}

proptest! {
    #[test]
    fn a_run_of_words_equals_the_single_words(
        seed: u64, position: u64, block in 0u32..1 << 20, len in 0usize..150,
    ) {
        let stream = Stream::new(seed, position, Domain::Residual);
        let mut words = vec![0; len];
        stream.fill_words(4 * block, &mut words);
        for (i, &word) in words.iter().enumerate() {
            prop_assert_eq!(word, stream.word(4 * block + i as u32));
        }
    }

    #[test]
    fn any_part_of_the_key_changes_the_number(seed: u64, position: u64, column in 0u32..1 << 20) {
        let word = |s, p, c, d| Stream::new(s, p, d).word(c);
        let here = word(seed, position, column, Domain::Draw);
        // A 2^-32 coincidence per comparison is as good as never at this number of cases.
        prop_assert_ne!(here, word(seed ^ 1, position, column, Domain::Draw));
        prop_assert_ne!(here, word(seed ^ 1 << 40, position, column, Domain::Draw));
        prop_assert_ne!(here, word(seed, position ^ 1, column, Domain::Draw));
        prop_assert_ne!(here, word(seed, position ^ 1 << 40, column, Domain::Draw));
        prop_assert_ne!(here, word(seed, position, column + 1, Domain::Draw));
        for domain in [Domain::Accept, Domain::Residual, Domain::Draft] {
            prop_assert_ne!(here, word(seed, position, column, domain));
        }
    }
}
