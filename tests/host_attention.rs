//! Block attention on the host against a float64 reference, and the promise that a row does not depend on its surroundings.

use dflash_rs::device::host::{
    AttentionBatch, AttentionTensors, BatchArrays, Bf16, Element, HostKernels, Isa, Layout, Rows, RowsMut,
};
use dflash_rs::device::{AttentionParams, Mask};
use dflash_rs::error::Error;
use proptest::prelude::*;

/// One request: keys and values of its whole sequence by position, so that any split into context and block can be asked for.
#[derive(Clone)]
struct Sequence {
    context: usize,
    len: usize,
    valid_from: usize,
    /// Parent of each block token; a chain when empty.
    parents: Vec<usize>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    q_heads: usize,
    kv_heads: usize,
    dim: usize,
    page_size: usize,
    softcap: Option<f32>,
    sinks: bool,
}

impl Shape {
    /// Scores of every head's sink, from far below to far above those of its keys.
    fn sinks(&self) -> Option<Vec<f32>> {
        self.sinks
            .then(|| (0..self.q_heads).map(|head| head as f32 * 1.5 - 4.0).collect())
    }
}

/// A small deterministic generator: values in (-1, 1) that bfloat16 holds exactly, so that every storage sees the same numbers.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n)
            .map(|_| (self.next() % 255) as f32 / 128.0 - 127.0 / 128.0)
            .collect()
    }
}

fn sequence(numbers: &mut Numbers, shape: Shape, context: usize, len: usize) -> Sequence {
    Sequence {
        context,
        len,
        valid_from: 0,
        parents: vec![],
        q: numbers.values(len * shape.q_heads * shape.dim),
        k: numbers.values((context + len) * shape.kv_heads * shape.dim),
        v: numbers.values((context + len) * shape.kv_heads * shape.dim),
    }
}

impl Sequence {
    fn is_ancestor(&self, ancestor: usize, mut token: usize) -> bool {
        while token > ancestor {
            if token == 0 || self.parents[token] == usize::MAX {
                return false;
            }
            token = self.parents[token];
        }
        token == ancestor
    }

    fn depth(&self, token: usize) -> usize {
        (0..token).filter(|&a| self.is_ancestor(a, token)).count()
    }

    /// Does block token `token` see key `key` (a context position, or `context + block token`)? Written from the contract.
    fn sees(&self, params: &AttentionParams, token: usize, key: usize) -> bool {
        let tree = params.mask == Mask::Ancestors;
        let position = |t: usize| self.context + if tree { self.depth(t) } else { t };
        let p = position(token);
        let (visible, j) = if key < self.context {
            (key >= self.valid_from, key)
        } else {
            let other = key - self.context;
            let visible = match params.mask {
                Mask::Causal => other <= token,
                Mask::Block => true,
                Mask::Ancestors => self.is_ancestor(other, token),
            };
            (visible, position(other))
        };
        visible && params.window.is_none_or(|w| p.abs_diff(j) < w)
    }
}

fn reference(sequences: &[Sequence], shape: Shape, params: &AttentionParams) -> Vec<f64> {
    let Shape {
        q_heads, kv_heads, dim, ..
    } = shape;
    let mut out = Vec::new();
    for s in sequences {
        for token in 0..s.len {
            for head in 0..q_heads {
                let kv = head / (q_heads / kv_heads);
                let at = |x: &[f32], row: usize, heads: usize, head: usize, d: usize| {
                    f64::from(x[(row * heads + head) * dim + d])
                };
                let keys: Vec<usize> = (0..s.context + s.len)
                    .filter(|&key| s.sees(params, token, key))
                    .collect();
                let scores: Vec<f64> = keys
                    .iter()
                    .map(|&key| {
                        let dot: f64 = (0..dim)
                            .map(|d| at(&s.q, token, q_heads, head, d) * at(&s.k, key, kv_heads, kv, d))
                            .sum();
                        let score = dot * f64::from(params.scale);
                        let cap = params.softcap.map(f64::from);
                        cap.map_or(score, |c| c * (score / c).tanh())
                    })
                    .collect();
                let sink = shape.sinks().map_or(f64::NEG_INFINITY, |s| f64::from(s[head]));
                let max = scores.iter().copied().fold(sink, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let total = weights.iter().sum::<f64>() + (sink - max).exp();
                for d in 0..dim {
                    let sum: f64 = keys
                        .iter()
                        .zip(&weights)
                        .map(|(&key, w)| w * at(&s.v, key, kv_heads, kv, d))
                        .sum();
                    out.push(sum / total);
                }
            }
        }
    }
    out
}

struct Outcome<E> {
    out: Vec<E>,
    k_cache: Vec<E>,
    slots: Vec<i64>,
}

fn convert<E: Element>(x: &[f32]) -> Vec<E> {
    let mut out = vec![E::default(); x.len()];
    E::narrow(x, &mut out);
    out
}

fn widen<E: Element>(x: &[E]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    E::widen(x, &mut out);
    out
}

/// Lays the sequences out in a paged cache whose unused slots and whose output are NaN, and runs the kernel.
fn attend<E: Element>(
    kernels: &HostKernels,
    sequences: &[Sequence],
    shape: Shape,
    params: &AttentionParams,
    store: bool,
    seed: u64,
) -> Outcome<E> {
    let Shape {
        q_heads,
        kv_heads,
        dim,
        page_size,
        ..
    } = shape;
    let sinks = shape.sinks();
    let mut numbers = Numbers(seed);
    let row = kv_heads * dim;
    let width = sequences
        .iter()
        .map(|s| (s.context + s.len).div_ceil(page_size))
        .max()
        .unwrap_or(0)
        + 1;
    let pages = width * sequences.len() + 3;
    let num_slots = pages * page_size;
    let mut free: Vec<i32> = (0..pages as i32).collect();
    for i in (1..free.len()).rev() {
        free.swap(i, numbers.below(i + 1));
    }
    let mut page_table = vec![-1; sequences.len() * width];
    let mut row_ids: Vec<i32> = (0..sequences.len() as i32).collect();
    row_ids.reverse();
    let mut k_cache = vec![f32::NAN; num_slots * row];
    let mut v_cache = vec![f32::NAN; num_slots * row];
    let (mut q, mut k, mut v, mut slots) = (vec![], vec![], vec![], vec![]);
    let mut query_starts = vec![0];
    let words = sequences.iter().map(|s| s.len.div_ceil(64)).max().unwrap_or(0);
    let mut bits: Vec<u64> = vec![];
    for (s, &row_id) in sequences.iter().zip(&row_ids) {
        let table = &mut page_table[row_id as usize * width..][..width];
        for entry in &mut table[..(s.context + s.len).div_ceil(page_size)] {
            *entry = free.pop().unwrap();
        }
        let slot = |position: usize| table[position / page_size] as usize * page_size + position % page_size;
        for position in s.valid_from..s.context {
            let from = position * row..(position + 1) * row;
            k_cache[slot(position) * row..][..row].copy_from_slice(&s.k[from.clone()]);
            v_cache[slot(position) * row..][..row].copy_from_slice(&s.v[from]);
        }
        slots.extend((s.context..s.context + s.len).map(|position| slot(position) as i64));
        q.extend_from_slice(&s.q);
        k.extend_from_slice(&s.k[s.context * row..]);
        v.extend_from_slice(&s.v[s.context * row..]);
        query_starts.push(query_starts.last().unwrap() + s.len as i32);
        if params.mask == Mask::Ancestors {
            for token in 0..s.len {
                let mut mask = vec![0; words];
                (0..=token)
                    .filter(|&a| s.is_ancestor(a, token))
                    .for_each(|a| mask[a / 64] |= 1 << (a % 64));
                bits.extend(mask);
            }
        }
    }
    let context_lens: Vec<i32> = sequences.iter().map(|s| s.context as i32).collect();
    let valid_from: Vec<i32> = sequences.iter().map(|s| s.valid_from as i32).collect();
    let batch = AttentionBatch::new(BatchArrays {
        query_starts: &query_starts,
        context_lens: &context_lens,
        page_table: &page_table,
        table_width: width,
        row_ids: &row_ids,
        page_size,
        num_slots,
        slots: store.then_some(&slots),
        valid_from: Some(&valid_from),
        ancestors: (params.mask == Mask::Ancestors).then_some((&bits, words)),
    })
    .unwrap();

    let tokens = batch.tokens();
    // Heads before tokens, as torch's transposed views have them, for q and v; tokens before heads for k.
    let transposed = |heads: usize| Layout {
        rows: tokens,
        heads,
        dim,
        row_stride: dim,
        head_stride: tokens * dim,
    };
    let transpose = |x: &[f32], heads: usize| {
        let mut y = vec![0.0; x.len()];
        for t in 0..tokens {
            for h in 0..heads {
                y[(h * tokens + t) * dim..][..dim].copy_from_slice(&x[(t * heads + h) * dim..][..dim]);
            }
        }
        y
    };
    let (q, k, v) = (
        convert::<E>(&transpose(&q, q_heads)),
        convert::<E>(&k),
        convert::<E>(&transpose(&v, kv_heads)),
    );
    let mut k_cache = convert::<E>(&k_cache);
    let mut v_cache = convert::<E>(&v_cache);
    let mut out = convert::<E>(&vec![f32::NAN; tokens * q_heads * dim]);
    let cache = Layout::contiguous(num_slots, kv_heads, dim);
    kernels
        .block_attention(
            &batch,
            params,
            AttentionTensors {
                q: Rows::from_slice("q", &q, transposed(q_heads)).unwrap(),
                k: Rows::from_slice("k", &k, Layout::contiguous(tokens, kv_heads, dim)).unwrap(),
                v: Rows::from_slice("v", &v, transposed(kv_heads)).unwrap(),
                k_cache: RowsMut::from_slice("k_cache", &mut k_cache, cache).unwrap(),
                v_cache: RowsMut::from_slice("v_cache", &mut v_cache, cache).unwrap(),
                out: RowsMut::from_slice("out", &mut out, Layout::contiguous(tokens, q_heads, dim)).unwrap(),
                sinks: sinks.as_deref(),
            },
        )
        .unwrap();
    Outcome { out, k_cache, slots }
}

fn params(shape: Shape, mask: Mask, window: Option<usize>) -> AttentionParams {
    AttentionParams {
        scale: 2.0 / (shape.dim as f32).sqrt(),
        mask,
        window,
        softcap: shape.softcap,
    }
}

fn assert_close(got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(got) - expected).abs();
        assert!(error <= tolerance, "element {i}: got {got}, expected {expected}");
    }
}

fn random_tree(numbers: &mut Numbers, len: usize) -> Vec<usize> {
    // Sometimes a second root: a forest is as good as a tree.
    (0..len)
        .map(|i| {
            if i == 0 || numbers.below(12) == 0 {
                usize::MAX
            } else {
                numbers.below(i)
            }
        })
        .collect()
}

fn random_batch(numbers: &mut Numbers, shape: Shape, mask: Mask) -> Vec<Sequence> {
    (0..1 + numbers.below(4))
        .map(|_| {
            let longest = if numbers.below(4) == 0 { 80 } else { 18 };
            let (context, len) = (numbers.below(90), numbers.below(longest));
            let mut s = sequence(numbers, shape, context, len);
            s.valid_from = if numbers.below(2) == 0 {
                0
            } else {
                numbers.below(context + 1)
            };
            if mask == Mask::Ancestors {
                s.parents = random_tree(numbers, len);
            }
            s
        })
        .collect()
}

fn any_mask() -> impl Strategy<Value = Mask> {
    prop_oneof![Just(Mask::Causal), Just(Mask::Block), Just(Mask::Ancestors)]
}

fn any_shape() -> impl Strategy<Value = Shape> {
    let heads = prop_oneof![Just((1, 1)), Just((4, 2)), Just((3, 1)), Just((4, 4)), Just((10, 2))];
    let dim = prop_oneof![15 => prop::sample::select(vec![16, 64, 40, 80, 7, 128, 256]), 1 => Just(512)];
    let page = prop_oneof![Just(1), Just(16), Just(64), Just(5)];
    let softcap = prop_oneof![3 => Just(None), 1 => Just(Some(0.7)), 1 => Just(Some(30.0))];
    (heads, dim, page, softcap, prop::bool::weighted(0.3)).prop_map(
        |((q_heads, kv_heads), dim, page_size, softcap, sinks)| Shape {
            q_heads,
            kv_heads,
            dim,
            page_size,
            softcap,
            sinks,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn every_row_is_the_softmax_average_of_its_visible_values(
        shape in any_shape(), mask in any_mask(), window in prop::option::of(1..40usize), store: bool, seed: u64,
    ) {
        let sequences = random_batch(&mut Numbers(seed), shape, mask);
        let params = params(shape, mask, window);
        let expected = reference(&sequences, shape, &params);
        for isa in Isa::available() {
            let kernels = HostKernels::default().with_isa(isa);
            assert_close(&attend::<f32>(&kernels, &sequences, shape, &params, store, seed).out, &expected, 1e-5);
            let half = attend::<Bf16>(&kernels, &sequences, shape, &params, store, seed).out;
            assert_close(&widen(&half), &expected, 4e-3);
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits(
        shape in any_shape(), mask in any_mask(), window in prop::option::of(1..40usize), seed: u64,
    ) {
        let sequences = random_batch(&mut Numbers(seed), shape, mask);
        let params = params(shape, mask, window);
        let bits = |isa| {
            let kernels = HostKernels::default().with_isa(isa);
            let out = attend::<f32>(&kernels, &sequences, shape, &params, true, seed).out;
            out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let portable = bits(Isa::Portable);
        for isa in Isa::available() {
            prop_assert_eq!(&bits(isa), &portable, "{:?}", isa);
        }
    }

    #[test]
    fn a_row_alone_equals_the_row_in_a_batch_on_other_pages(
        shape in any_shape(), mask in any_mask(), window in prop::option::of(1..40usize), seed: u64, page_size in 1..40usize,
    ) {
        let sequences = random_batch(&mut Numbers(seed), shape, mask);
        let params = params(shape, mask, window);
        let kernels = HostKernels::default();
        let together = attend::<f32>(&kernels, &sequences, shape, &params, true, seed).out;
        let mut alone = Vec::new();
        for s in &sequences {
            let shape = Shape { page_size, ..shape };
            alone.extend(attend::<f32>(&kernels, std::slice::from_ref(s), shape, &params, true, seed ^ 1).out);
        }
        prop_assert_eq!(together.into_iter().map(f32::to_bits).collect::<Vec<_>>(),
                        alone.into_iter().map(f32::to_bits).collect::<Vec<_>>());
    }

    #[test]
    fn verifying_a_block_gives_the_bits_of_decoding_it_token_by_token(
        shape in any_shape(), window in prop::option::of(1..40usize), seed: u64, len in 1..20usize, context in 0..100usize,
    ) {
        let block = sequence(&mut Numbers(seed), shape, context, len);
        let params = params(shape, Mask::Causal, window);
        let kernels = HostKernels::default();
        let verified = attend::<f32>(&kernels, std::slice::from_ref(&block), shape, &params, true, seed).out;
        let (row, q_row) = (shape.kv_heads * shape.dim, shape.q_heads * shape.dim);
        for token in 0..len {
            let mut step = block.clone();
            (step.context, step.len) = (context + token, 1);
            step.k.truncate((context + token + 1) * row);
            step.v.truncate((context + token + 1) * row);
            step.q = block.q[token * q_row..(token + 1) * q_row].to_vec();
            let decoded = attend::<f32>(&kernels, &[step], shape, &params, true, seed).out;
            prop_assert_eq!(&decoded[..], &verified[token * q_row..(token + 1) * q_row], "token {}", token);
        }
    }

    #[test]
    fn a_path_of_a_tree_gives_the_bits_of_the_chain(
        shape in any_shape(), window in prop::option::of(1..40usize), seed: u64, len in 1..90usize, context in 0..60usize,
    ) {
        let mut numbers = Numbers(seed);
        let mut tree = sequence(&mut numbers, shape, context, len);
        tree.parents = random_tree(&mut numbers, len);
        let kernels = HostKernels::default();
        let (row, q_row) = (shape.kv_heads * shape.dim, shape.q_heads * shape.dim);
        let in_tree = params(shape, Mask::Ancestors, window);
        let verified = attend::<f32>(&kernels, std::slice::from_ref(&tree), shape, &in_tree, true, seed).out;
        let leaf = numbers.below(len);
        let path: Vec<usize> = (0..=leaf).filter(|&a| tree.is_ancestor(a, leaf)).collect();
        let pick = |x: &[f32], first: usize, row: usize| {
            path.iter().flat_map(|&t| x[(first + t) * row..(first + t + 1) * row].to_vec()).collect::<Vec<_>>()
        };
        let chain = Sequence {
            len: path.len(),
            q: pick(&tree.q, 0, q_row),
            k: [tree.k[..context * row].to_vec(), pick(&tree.k, context, row)].concat(),
            v: [tree.v[..context * row].to_vec(), pick(&tree.v, context, row)].concat(),
            parents: vec![],
            ..tree.clone()
        };
        let plain = AttentionParams { mask: Mask::Causal, ..in_tree };
        let decoded = attend::<f32>(&kernels, &[chain], shape, &plain, true, seed).out;
        prop_assert_eq!(pick(&verified, 0, q_row), decoded);
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let shape = Shape {
        q_heads: 8,
        kv_heads: 4,
        dim: 64,
        page_size: 16,
        softcap: None,
        sinks: false,
    };
    let mut numbers = Numbers(5);
    let sequences: Vec<_> = (0..6)
        .map(|i| sequence(&mut numbers, shape, 700 + 31 * i, 40))
        .collect();
    let params = params(shape, Mask::Causal, None);
    let run = |threads| {
        let kernels = HostKernels::default().with_threads(threads);
        attend::<f32>(&kernels, &sequences, shape, &params, true, 1).out
    };
    let one = run(1);
    assert_close(&one, &reference(&sequences, shape, &params), 1e-5);
    for threads in [2, 3, 64] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

#[test]
fn the_keys_of_a_step_are_written_to_its_slots_and_nowhere_else() {
    let shape = Shape {
        q_heads: 2,
        kv_heads: 2,
        dim: 16,
        page_size: 4,
        softcap: None,
        sinks: false,
    };
    let mut numbers = Numbers(9);
    let sequences = [sequence(&mut numbers, shape, 6, 3), sequence(&mut numbers, shape, 0, 5)];
    let params = params(shape, Mask::Causal, None);
    let kernels = HostKernels::default();
    let row = shape.kv_heads * shape.dim;
    let written = attend::<f32>(&kernels, &sequences, shape, &params, true, 3);
    let scratch = attend::<f32>(&kernels, &sequences, shape, &params, false, 3);
    assert_eq!(written.out, scratch.out);
    let new: Vec<&[f32]> = sequences
        .iter()
        .flat_map(|s| s.k[s.context * row..].chunks(row))
        .collect();
    for slot in 0..written.k_cache.len() / row {
        let (after, before) = (
            &written.k_cache[slot * row..][..row],
            &scratch.k_cache[slot * row..][..row],
        );
        match written.slots.iter().position(|&s| s == slot as i64) {
            Some(token) => {
                assert_eq!(after, new[token]);
                assert!(before.iter().all(|x| x.is_nan()), "a scratch block was written");
            }
            None => assert!(after.iter().zip(before).all(|(a, b)| a.to_bits() == b.to_bits())),
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let shape = Shape {
        q_heads: 1,
        kv_heads: 1,
        dim: 16,
        page_size: 16,
        softcap: None,
        sinks: false,
    };
    let mut s = sequence(&mut Numbers(2), shape, 50, 4);
    s.q.iter_mut().for_each(|x| *x *= 1000.0);
    let params = params(shape, Mask::Block, None);
    let got = attend::<f32>(
        &HostKernels::default(),
        std::slice::from_ref(&s),
        shape,
        &params,
        false,
        1,
    )
    .out;
    assert_close(&got, &reference(&[s], shape, &params), 2e-3);
}

#[test]
fn an_empty_batch_is_success() {
    let shape = Shape {
        q_heads: 2,
        kv_heads: 1,
        dim: 16,
        page_size: 16,
        softcap: None,
        sinks: false,
    };
    let params = params(shape, Mask::Causal, None);
    assert!(
        attend::<f32>(&HostKernels::default(), &[], shape, &params, true, 1)
            .out
            .is_empty()
    );
}

fn arrays() -> BatchArrays<'static> {
    BatchArrays {
        query_starts: &[0, 2, 3],
        context_lens: &[5, 8],
        page_table: &[0, 1, 2, 3],
        table_width: 2,
        row_ids: &[1, 0],
        page_size: 4,
        num_slots: 16,
        slots: Some(&[3, 4, 15]),
        valid_from: Some(&[5, 0]),
        ancestors: Some((&[1, 3, 1], 1)),
    }
}

#[test]
fn a_bad_step_is_refused_by_name_value_and_expectation() {
    assert!(AttentionBatch::new(arrays()).is_ok());
    let message = |arrays| AttentionBatch::new(arrays).unwrap_err().to_string();
    let base = arrays();
    let cases = [
        (
            BatchArrays {
                query_starts: &[1, 2, 3],
                ..base
            },
            "query_starts: got Some(1) first, expected 0 first",
        ),
        (
            BatchArrays {
                query_starts: &[],
                ..base
            },
            "query_starts: got None first, expected 0 first",
        ),
        (
            BatchArrays {
                query_starts: &[0, 4, 3],
                ..base
            },
            "query_starts: got 4 then 3 at index 2, expected offsets that do not fall",
        ),
        (
            BatchArrays {
                query_starts: &[0, 3],
                ..base
            },
            "context_lens: got 2 elements, expected 1",
        ),
        (
            BatchArrays {
                context_lens: &[-1, 8],
                ..base
            },
            "context_lens: got -1 at index 0, expected at least 0",
        ),
        (
            BatchArrays {
                context_lens: &[9, 8],
                ..base
            },
            "context_lens: got 9 at index 0, expected at most 8, 2 pages of 4 slots in a row of page_table",
        ),
        (
            BatchArrays {
                row_ids: &[1, 2],
                ..base
            },
            "row_ids: got 2 at index 1, expected a row of page_table, 0..1",
        ),
        (
            BatchArrays {
                row_ids: &[-1, 0],
                ..base
            },
            "row_ids: got -1 at index 0, expected a row of page_table, 0..1",
        ),
        (
            BatchArrays {
                page_table: &[0, 1, 2, 4],
                context_lens: &[5, 8],
                ..base
            },
            "page_table: got page 4 at [1, 1], expected a page of 4 slots within num_slots 16",
        ),
        (
            BatchArrays {
                page_table: &[-1, 1, 2, 3],
                ..base
            },
            "page_table: got page -1 at [0, 0], expected a page of 4 slots within num_slots 16",
        ),
        (
            BatchArrays {
                page_table: &[0, 1, 2],
                ..base
            },
            "page_table: got 3 entries, expected whole rows of 2 pages",
        ),
        (
            BatchArrays {
                slots: Some(&[3, 4, 16]),
                ..base
            },
            "slots: got 16 at index 2, expected 0..15",
        ),
        (
            BatchArrays {
                slots: Some(&[3, 4]),
                ..base
            },
            "slots: got 2 elements, expected 3",
        ),
        (
            BatchArrays {
                valid_from: Some(&[6, 0]),
                ..base
            },
            "valid_from: got 6 at index 0, expected 0..5 (the context length)",
        ),
        (
            BatchArrays { page_size: 0, ..base },
            "page_size: got 0, expected at least 1",
        ),
        (
            BatchArrays {
                ancestors: Some((&[1, 2, 1, 0], 1)),
                ..base
            },
            "ancestors: got 4 elements, expected 3",
        ),
        (
            BatchArrays {
                ancestors: Some((&[1, 1, 1], 1)),
                ..base
            },
            "ancestors: got [1] for packed token 1, expected its own bit 1 and exactly the bits of its highest other token, its parent",
        ),
        (
            BatchArrays {
                ancestors: Some((&[3, 3, 1], 1)),
                ..base
            },
            "ancestors: got bit 1 for token 0, expected bits in 0..0: parents come first",
        ),
    ];
    for (arrays, expected) in cases {
        assert_eq!(message(arrays), expected);
    }
}

#[test]
fn views_that_overlap_or_overrun_are_refused() {
    let data = [0.0f32; 64];
    let layout = Layout::contiguous(4, 2, 8);
    assert!(Rows::from_slice("k", &data, layout).is_ok());
    let long = Rows::from_slice("k", &data, Layout { rows: 5, ..layout }).unwrap_err();
    assert_eq!(
        long,
        Error::Length {
            name: "k",
            got: 64,
            expected: 80
        }
    );
    for (row_stride, head_stride) in [(15, 8), (16, 7), (8, 8), (0, 8)] {
        let error = Rows::from_slice(
            "k",
            &data,
            Layout {
                row_stride,
                head_stride,
                ..layout
            },
        )
        .unwrap_err();
        assert_eq!(
            error,
            Error::OverlappingRows {
                name: "k",
                row_stride,
                head_stride,
                dim: 8
            }
        );
    }
    // Heads outermost, as in a transposed tensor, is fine.
    assert!(
        Rows::from_slice(
            "k",
            &data,
            Layout {
                row_stride: 8,
                head_stride: 32,
                ..layout
            }
        )
        .is_ok()
    );
}

#[test]
// Ties between two bfloat16 numbers, written out in full: shortened they would not look like ties.
#[allow(clippy::excessive_precision)]
fn rounding_to_bfloat16_is_to_nearest_even_and_keeps_nan() {
    for (x, expected) in [
        (1.0f32, 0x3f80u16),
        (1.00390625, 0x3f80),
        (1.01171875, 0x3f82),
        (f32::INFINITY, 0x7f80),
        (3.4e38, 0x7f80),
    ] {
        assert_eq!(Bf16::from(x), Bf16(expected), "{x}");
    }
    assert!(f32::from(Bf16::from(f32::from_bits(0x7f80_0001))).is_nan());
}
