use std::collections::BTreeSet;

use dflash_host_check as _;
use dflash_rs::device::cuda::params::SampleRowsParams;
use dflash_rs::error::Error;
use dflash_rs::step::SamplingArrays;
use dflash_rs::types::TokenId;
use dflash_rs::verify::{History, Sampler, Sampling};

use super::numbers::{Numbers, address, address_mut, share};
use crate::verify::math::{NEGLIGIBLE, weight};

unsafe extern "C" {
    fn dflash_host_sample_f32(p: *const SampleRowsParams);
    fn dflash_host_sample_bf16(p: *const SampleRowsParams);
    fn dflash_emulated_sample_f32(p: *const SampleRowsParams, parts: u32);
    fn dflash_emulated_sample_bf16(p: *const SampleRowsParams, parts: u32);
    fn dflash_host_scratch(p: *const SampleRowsParams, out: *mut u64);
    fn dflash_host_sum_of_masses(masses: *const u64, count: u32) -> u64;
    fn dflash_host_bins(d: *const f32, count: u32, out: *mut i32);
    fn dflash_geometry_sample_scratch(rows: i64, vocab: i64) -> u64;
}

/// Columns of a chunk.
const CHUNK: usize = 4096;
/// Chunks that a block takes at most.
const PARTS: usize = 8;

/// Of wide rows now and then the last column of a chunk, or the first of the next.
fn column(numbers: &mut Numbers, vocab: usize) -> usize {
    if vocab > CHUNK && numbers.chance(0.3) {
        return CHUNK * numbers.within(1, (vocab - 1) / CHUNK) - numbers.below(2);
    }
    numbers.below(vocab)
}

/// One to six columns, rising.
fn columns(numbers: &mut Numbers, vocab: usize) -> BTreeSet<usize> {
    (0..numbers.within(1, 6)).map(|_| column(numbers, vocab)).collect()
}

fn normal(numbers: &mut Numbers) -> f32 {
    (0..6).map(|_| numbers.unit() - 0.5).sum::<f64>() as f32 * 1.4
}

/// Numbers of either sign below 2^`to`, as likely between two powers of two as between the next two, and zeros.
fn magnitudes(numbers: &mut Numbers, vocab: usize, to: i32) -> Vec<f32> {
    let octaves = numbers.pick(&[2, 30, 200]);
    let zeros = numbers.pick(&[0.0, 0.01, 0.9]);
    (0..vocab)
        .map(|_| {
            let sign = numbers.pick(&[-1.0, 1.0]);
            let size = (numbers.unit() + 1.0) * 2f64.powi(to - 1 - numbers.below(octaves) as i32);
            (sign * if numbers.chance(zeros) { 0.0 } else { size }) as f32
        })
        .collect()
}

/// Logits of several kinds: spread, flat, full of ties, near to zero, with forbidden columns, broken.
fn logits(numbers: &mut Numbers, vocab: usize) -> Vec<f32> {
    if numbers.chance(0.2) {
        let to = numbers.pick(&[-100, -8, 2, 4, 5, 60, 127]);
        return magnitudes(numbers, vocab, to);
    }
    let flat = vocab > CHUNK && numbers.chance(0.3);
    let spread = if flat {
        0.01
    } else {
        numbers.pick(&[0.1, 1.0, 3.0, 8.0, 40.0])
    };
    let step = numbers.pick(&[0.0, 0.0, 0.5, 2.0]);
    let shift = numbers.pick(&[0.0, 20.0, -500.0]);
    let forbidden = numbers.pick(&[0.0, 0.0, 0.3, 0.99]);
    let mut row: Vec<f32> = (0..vocab)
        .map(|_| {
            let x = normal(numbers) * spread;
            let x = if step > 0.0 { (x / step).round() * step } else { x } + shift;
            if numbers.chance(forbidden) {
                f32::NEG_INFINITY
            } else {
                x
            }
        })
        .collect();
    if numbers.chance(0.3) {
        let at = numbers.below(vocab);
        row[at] = shift + spread * 5.0;
    }
    match numbers.below(100) {
        0 => row.fill(f32::NEG_INFINITY),
        1 => row[numbers.below(vocab)] = f32::NAN,
        2 => row[numbers.below(vocab)] = f32::INFINITY,
        3 => row.fill(0.0),
        4 => row.iter_mut().for_each(|x| *x *= 1e34), // too large once divided by a small temperature
        _ => {}
    }
    row
}

fn sampling(numbers: &mut Numbers, vocab: usize) -> Sampling {
    let mut s = Sampling {
        seed: numbers.next(),
        temperature: numbers.pick(&[0.0, 0.3, 0.7, 1.0, 1.3, 3.0, 1e-5]),
        ..Sampling::default()
    };
    if numbers.chance(0.4) {
        s.top_k = numbers
            .pick(&[1, 2, 5, 20, 50, 1000, u32::MAX >> 1])
            .min(numbers.within(1, 2 * vocab) as u32);
    }
    if numbers.chance(0.4) {
        s.top_p = numbers.pick(&[1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 0.999_999_9]);
    }
    if numbers.chance(0.3) {
        s.min_p = numbers.pick(&[1e-4, 0.02, 0.3, 1.0]);
    }
    if numbers.chance(0.4) {
        s.repetition_penalty = numbers.pick(&[1.0, 1.1, 0.7, 2.0]);
        s.presence_penalty = numbers.pick(&[0.0, 0.0, 1.0, -0.3]);
        s.frequency_penalty = numbers.pick(&[0.0, 0.0, 1.0, -0.1]);
    }
    if numbers.chance(0.3) {
        for id in columns(numbers, vocab) {
            let bias = numbers.pick(&[1.5, -2.0, f32::NEG_INFINITY, 30.0]);
            s.logit_bias.push((TokenId(id as u32), bias));
        }
    }
    s
}

/// Forbids some tokens, now and then all of them, in rows before a position about the request's.
fn mask(numbers: &mut Numbers, s: &mut Sampling, vocab: usize, base: u64) {
    let all = numbers.chance(0.05);
    let ids = if all {
        (0..vocab).collect()
    } else if vocab > CHUNK && numbers.chance(0.5) {
        (0..vocab).step_by(2).collect() // what is left of a flat row is more than the list holds
    } else {
        columns(numbers, vocab)
    };
    s.masked = ids.into_iter().map(|id| TokenId(id as u32)).collect();
    s.masked_before = base + numbers.below(10) as u64;
}

/// Draws rows of a few requests through both implementations; returns how many rows were compared.
fn compare(numbers: &mut Numbers, vocab: usize, bf16: bool, emulated: bool) -> usize {
    let requests = numbers.within(1, 3);
    let chain = numbers.chance(0.5);
    let stride = vocab + numbers.below(3) * 4;
    let (mut query_starts, mut token_ids, mut positions, mut parents) = (vec![0i32], vec![], vec![], vec![]);
    let (mut histories, mut samplings) = (vec![], vec![]);
    // Now and then the first entries are nobody's.
    let nobodys = numbers.below(3);
    let mut packed = SamplingArrays {
        history_tokens: vec![0; nobodys],
        history_counts: vec![0; nobodys],
        bias_tokens: vec![0; nobodys],
        bias_values: vec![0.0; nobodys],
        ..SamplingArrays::default()
    };
    for _ in 0..requests {
        let nodes = numbers.below(8);
        let base = numbers.below(1 << 20) as i64;
        for i in 0..nodes {
            token_ids.push(column(numbers, vocab) as i64);
            let parent = if i == 0 {
                -1
            } else if chain {
                i as i32 - 1
            } else if numbers.chance(0.02) {
                i as i32 // a tree that is none: the path ends there
            } else {
                numbers.below(i) as i32
            };
            parents.push(parent);
            positions.push(base + i as i64);
        }
        query_starts.push(token_ids.len() as i32);
        let mut s = sampling(numbers, vocab);
        if numbers.chance(0.3) {
            mask(numbers, &mut s, vocab, base as u64);
        }
        let prompt: Vec<TokenId> = (0..numbers.below(6))
            .map(|_| TokenId(column(numbers, vocab) as u32))
            .collect();
        let mut history = History::new(&prompt);
        for _ in 0..numbers.below(6) {
            history.push(TokenId(column(numbers, vocab) as u32));
        }
        packed.push(&s, &history);
        // Of a chunk of prompt the last token is the anchor.
        let anchor = if nodes > 0 && numbers.chance(0.3) { nodes - 1 } else { 0 };
        packed.rows.last_mut().unwrap().anchor = anchor as i32;
        histories.push(history);
        samplings.push(s);
    }
    let total = token_ids.len();
    // All rows, or some of them in another order, with a graph's padding.
    let chosen = numbers.chance(0.5);
    let mut row_tokens: Vec<i32> = if chosen {
        numbers.shuffled(total).into_iter().map(|t| t as i32).collect()
    } else {
        (0..total as i32).collect()
    };
    row_tokens.push(if chosen { -1 } else { total as i32 });
    let count = row_tokens.len();
    let mut values = vec![f32::NAN; count * stride];
    for row in values.chunks_mut(stride) {
        row[..vocab].copy_from_slice(&logits(numbers, vocab));
    }
    let halves: Vec<u16> = values.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    if bf16 {
        for (x, half) in values.iter_mut().zip(&halves) {
            *x = f32::from_bits(u32::from(*half) << 16);
        }
    }
    let score = numbers.chance(0.5);
    let (mut tokens, mut logprobs, mut status) = (vec![-9i64; count], vec![-9f32; count], vec![-9i32; count]);
    // SAFETY: plain numbers.
    let bytes = unsafe { dflash_geometry_sample_scratch(count as i64, vocab as i64) };
    let mut scratch = vec![numbers.pick(&[0, 0xdede_dede_dede_dedeu64]); bytes.div_ceil(8) as usize];
    let params = SampleRowsParams {
        logits: if bf16 { address(&halves) } else { address(&values) },
        sampling: address(&packed.rows),
        query_starts: address(&query_starts),
        row_tokens: if chosen { address(&row_tokens) } else { 0 },
        token_ids: address(&token_ids),
        positions: address(&positions),
        parents: if chain { 0 } else { address(&parents) },
        history_tokens: address(&packed.history_tokens),
        history_counts: address(&packed.history_counts),
        bias_tokens: address(&packed.bias_tokens),
        bias_values: address(&packed.bias_values),
        tokens: address_mut(&mut tokens),
        logprobs: if score { address_mut(&mut logprobs) } else { 0 },
        status: address_mut(&mut status),
        scratch: address_mut(&mut scratch),
        row_stride: stride as i64,
        num_rows: count as i32,
        num_requests: requests as i32,
        vocab: vocab as i32,
        reserved: 0,
    };
    // SAFETY: the arrays outlive the call and have the lengths that params.h asks for.
    unsafe {
        match (bf16, emulated) {
            (false, false) => dflash_host_sample_f32(&raw const params),
            (true, false) => dflash_host_sample_bf16(&raw const params),
            (false, true) => dflash_emulated_sample_f32(&raw const params, numbers.within(1, PARTS) as u32),
            (true, true) => dflash_emulated_sample_bf16(&raw const params, numbers.within(1, PARTS) as u32),
        }
    }
    let mut sampler = Sampler::new();
    for n in 0..count - 1 {
        let t = row_tokens[n] as usize;
        let r = query_starts
            .iter()
            .rposition(|&s| s as usize <= t)
            .unwrap()
            .min(requests - 1);
        let r = (0..=r)
            .rev()
            .find(|&r| query_starts[r] as usize <= t && t < query_starts[r + 1] as usize)
            .unwrap();
        let first = query_starts[r] as usize;
        let mut path = vec![];
        let mut node = t - first;
        while node > packed.rows[r].anchor as usize {
            path.push(TokenId(token_ids[first + node] as u32));
            let parent = parents[first + node] as usize;
            if parent == node {
                break;
            }
            node = parent;
        }
        path.reverse();
        let row = &values[n * stride..n * stride + vocab];
        let position = positions[t] as u64 + 1;
        let drawn = sampler.draw_row(row, &samplings[r], &histories[r], &path, position);
        let expected = match &drawn {
            Ok(token) => (i64::from(token.0), 0),
            Err(Error::BadLogit { value, .. }) if value.contains("overflow") => (-1, 3),
            Err(Error::BadLogit { .. }) => (-1, 1),
            Err(Error::EmptyRow { .. }) => (-1, 2),
            Err(other) => panic!("{other}"),
        };
        assert_eq!(
            (tokens[n], status[n]),
            expected,
            "{:?}, path {path:?}, vocab {vocab}",
            samplings[r]
        );
        if score && let Ok(token) = drawn {
            let expected = sampler.logprob(row, token).unwrap();
            assert_eq!(logprobs[n].to_bits(), expected.to_bits(), "{} {expected}", logprobs[n]);
        }
    }
    assert_eq!((tokens[count - 1], status[count - 1]), (-1, 0), "padding");
    count - 1
}

#[test]
fn every_row_draws_the_token_of_the_reference() {
    let mut numbers = Numbers(6);
    let mut rows = 0;
    while rows < share(100_000) {
        let vocab = numbers.pick(&[1, 2, 5, 63, 64, 65, 100, 130]);
        let bf16 = numbers.chance(0.3);
        rows += compare(&mut numbers, vocab, bf16, false);
    }
}

#[test]
fn wide_rows_draw_the_token_of_the_reference() {
    let mut numbers = Numbers(7);
    let mut rows = 0;
    while rows < share(600) {
        // More columns than one block takes, a last block that is partly full, lists that overflow.
        let vocab = numbers.pick(&[4096, 4097, 8193, 10_000, 20_011]);
        let bf16 = numbers.chance(0.3);
        rows += compare(&mut numbers, vocab, bf16, false);
    }
}

#[test]
fn the_kernels_themselves_draw_the_token_of_the_reference() {
    let mut numbers = Numbers(106);
    let mut rows = 0;
    while rows < share(60) {
        let vocab = numbers.pick(&[1, 65, 300, 4097, 8200, 20_011]);
        let bf16 = numbers.chance(0.5);
        rows += compare(&mut numbers, vocab, bf16, true);
    }
}

/// The token of one row at position 1, its logits in bfloat16 or float32, drawn by the kernels with so many chunks to a block or by their functions
/// alone, and counts and masses of its bins.
fn draw(row: &[f32], bf16: bool, s: &Sampling, emulated: Option<u32>) -> (i64, Vec<u32>, Vec<u64>) {
    let halves: Vec<u16> = row.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    let mut packed = SamplingArrays::default();
    packed.push(s, &History::new(&[]));
    let (mut tokens, mut status) = ([-9i64], [-9i32]);
    // SAFETY: plain numbers.
    let bytes = unsafe { dflash_geometry_sample_scratch(1, row.len() as i64) };
    let mut scratch = vec![0xdede_dede_dede_dedeu64; bytes.div_ceil(8) as usize];
    let params = SampleRowsParams {
        logits: if bf16 { address(&halves) } else { address(row) },
        sampling: address(&packed.rows),
        query_starts: address(&[0i32, 1]),
        token_ids: address(&[0i64]),
        positions: address(&[0i64]),
        bias_tokens: address(&packed.bias_tokens),
        bias_values: address(&packed.bias_values),
        tokens: address_mut(&mut tokens),
        status: address_mut(&mut status),
        scratch: address_mut(&mut scratch),
        row_stride: row.len() as i64,
        num_rows: 1,
        num_requests: 1,
        vocab: row.len() as i32,
        ..SampleRowsParams::default()
    };
    let mut at = [0; 8];
    // SAFETY: the arrays outlive the calls and have the lengths that params.h asks for; eight results.
    unsafe {
        match (bf16, emulated) {
            (false, None) => dflash_host_sample_f32(&raw const params),
            (true, None) => dflash_host_sample_bf16(&raw const params),
            (false, Some(parts)) => dflash_emulated_sample_f32(&raw const params, parts),
            (true, Some(parts)) => dflash_emulated_sample_bf16(&raw const params, parts),
        }
        dflash_host_scratch(&raw const params, at.as_mut_ptr());
    }
    assert_eq!(status, [0], "{s:?}");
    let [_, masses, _, counts, ..] = at.map(|at| at as usize / 8);
    let counts = scratch[counts..][..512]
        .iter()
        .flat_map(|&x| [x as u32, (x >> 32) as u32]);
    (tokens[0], counts.collect(), scratch[masses..][..1024].to_vec())
}

#[test]
fn a_block_draws_from_all_of_its_chunks() {
    let mut numbers = Numbers(29);
    let mut sampler = Sampler::new();
    for _ in 0..share(60) {
        let vocab = numbers.pick(&[8192, 12_289, 20_011]);
        let spread = numbers.pick(&[0.01, 1.0, 3.0]);
        let mut row: Vec<f32> = (0..vocab)
            .map(|_| f32::from_bits((normal(&mut numbers) * spread).to_bits() & 0xffff_0000))
            .collect();
        let mut s = Sampling {
            seed: numbers.next(),
            temperature: numbers.pick(&[0.7, 1.0]),
            ..Sampling::default()
        };
        // Now and then all that is kept lies in one chunk, though more often than not another column would win.
        if numbers.chance(0.3) {
            row[numbers.below(vocab)] = 4.0 * spread;
            s.min_p = 0.5;
        }
        let (bf16, parts) = (numbers.chance(0.5), numbers.within(1, PARTS) as u32);
        let expected = sampler.draw_row(&row, &s, &History::new(&[]), &[], 1).unwrap();
        assert_eq!(
            draw(&row, bf16, &s, Some(parts)).0,
            i64::from(expected.0),
            "{parts} chunks, {s:?}"
        );
    }
}

#[test]
fn the_last_column_above_the_last_bin_is_counted_where_it_belongs() {
    let border = f32::from_bits(0xc1ff_bfff);
    // A logit in bfloat16, and a temperature that makes it that.
    let (x, temperature) = (129..256)
        .map(|i| -0.25 * i as f32)
        .flat_map(|x| (0..9).map(move |i| (x, f32::from_bits((x / border).to_bits() - 4 + i))))
        .find(|&(x, t)| x * (1.0 / t) == border)
        .unwrap();
    let s = Sampling {
        temperature,
        top_k: 2,
        ..Sampling::default()
    };
    let row = [0.0, x - 1.0, -100.0, -100.0, x, f32::NEG_INFINITY]; // the largest of its four
    for bf16 in [false, true] {
        let (_, counts, _) = draw(&row, bf16, &s, None);
        assert_eq!((counts[0], counts[1022], counts[1023]), (1, 1, 4), "{bf16}");
    }
}

#[test]
fn bins_hold_every_column_whatever_the_magnitude_of_its_logit() {
    let mut numbers = Numbers(23);
    for case in 0..share(400) {
        let vocab = numbers.pick(&[1, 300, 4100, 9000]);
        let temperature = numbers.pick(&[1e-30f32, 1e-3, 0.3, 1.0, 7.0, 1e4, 1e30, 1e38]);
        let to = numbers.pick(&[-20, -4, 0, 3, 5]);
        let mut row = magnitudes(&mut numbers, vocab, to);
        for x in &mut row {
            let tempered = (*x * temperature).clamp(-2.5e38, 2.5e38);
            *x = f32::from_bits(tempered.to_bits() & 0xffff_0000);
        }
        let mut s = Sampling {
            temperature,
            top_k: numbers.pick(&[0, 50]),
            top_p: 0.9,
            ..Sampling::default()
        };
        if s.top_k > 0 && numbers.chance(0.5) {
            s.top_p = 1.0;
        }
        if numbers.chance(0.5) {
            s.logit_bias = columns(&mut numbers, vocab)
                .into_iter()
                .map(|id| (TokenId(id as u32), temperature * 0.3))
                .collect();
        }
        let emulated = (case % 20 == 0).then(|| numbers.within(1, PARTS) as u32);
        let (_, got_counts, got_masses) = draw(&row, true, &s, emulated);
        for &(id, bias) in &s.logit_bias {
            row[id.0 as usize] += bias;
        }
        let scale = 1.0 / temperature;
        let top = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b)) * scale;
        let (mut counts, mut masses) = (vec![0; 1024], vec![0; 1024]);
        for x in row {
            let d = x * scale - top;
            let bin = (f64::from(d) * -32.0).floor().min(1023.0) as usize;
            counts[bin] += u32::from(s.top_k > 0);
            if s.top_p < 1.0 && d >= NEGLIGIBLE {
                masses[bin] += weight(d);
            }
        }
        assert!(
            got_counts == counts && got_masses == masses,
            "{vocab} columns below 2^{to}, emulated {emulated:?}, {s:?}"
        );
    }
}

#[test]
fn masses_in_two_halves_carry_over() {
    let mut numbers = Numbers(17);
    for _ in 0..share(20_000) {
        let bits = numbers.within(1, 41);
        let masses: Vec<u64> = (0..numbers.within(1, 40))
            .map(|_| numbers.next() >> (64 - bits))
            .collect();
        // SAFETY: as many masses as it says.
        let got = unsafe { dflash_host_sum_of_masses(masses.as_ptr(), masses.len() as u32) };
        assert_eq!(got, masses.iter().sum::<u64>(), "{masses:x?}");
    }
    // At the very border, from both sides.
    for masses in [
        [0xffff_ffffu64, 0, 1],
        [0xffff_ffff, 1, 0],
        [0x1_0000_0000, 0xffff_ffff, 0],
        [0, 0, 0],
    ] {
        // SAFETY: three masses.
        let got = unsafe { dflash_host_sum_of_masses(masses.as_ptr(), 3) };
        assert_eq!(got, masses.iter().sum::<u64>(), "{masses:x?}");
    }
}

#[test]
fn bins_are_a_32nd_wide_and_the_last_has_all_that_is_lighter() {
    let mut d: Vec<f32> = (0..70_000).map(|i| i as f32 * -5e-4).collect();
    d.extend([
        -0.0,
        -31.968_75,
        -31.968_748,
        -31.999_999,
        -32.0,
        -32.03,
        -1e9,
        f32::MIN,
        f32::NEG_INFINITY,
    ]);
    let mut got = vec![0; d.len()];
    // SAFETY: as many results as numbers.
    unsafe { dflash_host_bins(d.as_ptr(), d.len() as u32, got.as_mut_ptr()) };
    for (d, got) in d.into_iter().zip(got) {
        assert_eq!(f64::from(got), (f64::from(d) * -32.0).floor().min(1023.0), "{d}");
    }
}

#[test]
fn the_parts_of_the_scratch_follow_each_other_and_fill_it() {
    for (rows, vocab) in [(1u64, 1u64), (5, 4096), (7, 4097), (3, 30_000)] {
        let mut got = [0; 8];
        let params = SampleRowsParams {
            num_rows: rows as i32,
            vocab: vocab as i32,
            ..SampleRowsParams::default()
        };
        // SAFETY: addresses are computed, and none is followed; eight results.
        unsafe { dflash_host_scratch(&raw const params, got.as_mut_ptr()) };
        let chunks = vocab.div_ceil(CHUNK as u64);
        // Of a row: its chunks, 1024 masses, 2048 candidates, 1024 counts, four numbers, and a maximum of every 64 columns.
        let sizes = [chunks * got[6], 8 * 1024, 8 * 2048, 4 * 1024, 16, 4 * 64 * chunks];
        let mut at = 0;
        for (part, size) in sizes.into_iter().enumerate() {
            assert_eq!(got[part], at, "{part}");
            at += rows * size;
        }
        // SAFETY: plain numbers.
        let all = unsafe { dflash_geometry_sample_scratch(rows as i64, vocab as i64) };
        assert_eq!((at, got[7]), (all, rows * chunks * 64 - 1));
    }
}
