//! Watches the cost of accepting a batch on a CPU: one draw per row reached, then the walk.
//!
//! Rows look like those of language models: a few likely tokens and a wide tail, so blocks of columns that cannot win are
//! skipped; `flat` is the opposite, in which every column takes part. `cargo bench --bench verify`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dflash_rs::draft::{DraftTree, TopK};
use dflash_rs::rng::{Domain, Stream};
use dflash_rs::types::TokenId;
use dflash_rs::verify::{History, Sampler, Sampling, walk_chain};

// Normal tail of deviation 2 and a hundred likelier tokens, up to 12 above it.
fn row(vocab: usize, seed: u64) -> Vec<f32> {
    let stream = Stream::new(seed, 0, Domain::Draft);
    let mut row: Vec<f32> = (0..vocab as u32)
        .map(|c| {
            let (a, b) = (stream.uniform(2 * c).max(1e-9), stream.uniform(2 * c + 1));
            (2.0 * (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
        })
        .collect();
    for rank in 0..100 {
        let at = stream.word(1 << 20 | rank) as usize % vocab;
        row[at] = 14.0 - 2.0 * (1.0 + rank as f32).ln();
    }
    row
}

fn sample_row(c: &mut Criterion) {
    let settings = [
        (
            "greedy",
            Sampling {
                temperature: 0.0,
                ..Sampling::default()
            },
        ),
        (
            "temperature",
            Sampling {
                temperature: 0.7,
                ..Sampling::default()
            },
        ),
        (
            "top-k top-p min-p",
            Sampling {
                temperature: 0.7,
                top_k: 50,
                top_p: 0.95,
                min_p: 0.02,
                ..Sampling::default()
            },
        ),
        (
            "top-p",
            Sampling {
                temperature: 1.0,
                top_p: 0.95,
                ..Sampling::default()
            },
        ),
    ];
    let history = History::default();
    for vocab in [4096, 151_936] {
        let mut group = c.benchmark_group(format!("draw_row/{vocab}"));
        group.throughput(Throughput::Elements(vocab as u64));
        let logits = row(vocab, 1);
        let flat = vec![0.25f32; vocab];
        let mut sampler = Sampler::new();
        let mut position = 0u64;
        for (name, sampling) in &settings {
            group.bench_function(*name, |b| {
                b.iter(|| {
                    position += 1;
                    sampler.draw_row(black_box(&logits), sampling, &history, &[], position)
                })
            });
        }
        group.bench_function("temperature flat", |b| {
            b.iter(|| {
                position += 1;
                sampler.draw_row(black_box(&flat), &settings[1].1, &history, &[], position)
            })
        });
        group.bench_function("logprob", |b| {
            b.iter(|| sampler.logprob(black_box(&logits), TokenId(3)))
        });
        group.finish();
    }
}

// 256 requests, blocks of 16: the draws of the rows reached and the walk, drafts right with probability 0.8.
fn batch(c: &mut Criterion) {
    let (requests, drafts, vocab) = (256usize, 15usize, 4096usize);
    let rows: Vec<Vec<f32>> = (0..64).map(|seed| row(vocab, seed)).collect();
    let row_of = |request: usize, i: usize| &rows[(request * 7 + i) % rows.len()];
    let mut group = c.benchmark_group("batch 256x16");
    for (name, temperature) in [("greedy", 0.0), ("temperature", 0.7)] {
        let history = History::default();
        let sampling = |request: usize| Sampling {
            temperature,
            seed: request as u64,
            ..Sampling::default()
        };
        let mut sampler = Sampler::new();
        let coins = Stream::new(5, 5, Domain::Draft);
        let proposals: Vec<Vec<TokenId>> = (0..requests)
            .map(|r| {
                (0..drafts)
                    .map(|i| {
                        let right = sampler
                            .draw_row(row_of(r, i), &sampling(r), &history, &[], i as u64)
                            .unwrap();
                        if coins.uniform((r * 16 + i) as u32) < 0.8 {
                            right
                        } else {
                            TokenId(right.0 ^ 1)
                        }
                    })
                    .collect()
            })
            .collect();
        group.bench_function(BenchmarkId::new("draw and walk", name), |b| {
            b.iter(|| {
                let mut committed = 0;
                for (r, proposal) in proposals.iter().enumerate() {
                    let sampling = sampling(r);
                    let walk = walk_chain(proposal, |i| {
                        sampler.draw_row(row_of(r, i), &sampling, &history, &proposal[..i], i as u64)
                    });
                    committed += walk.unwrap().accepted + 1;
                }
                committed
            })
        });
    }
    let says: Vec<Vec<TokenId>> = (0..requests)
        .map(|r| (0..16).map(|i| TokenId(((r * i) % 13 == 12) as u32)).collect())
        .collect();
    let proposal = vec![TokenId(0); drafts];
    group.bench_function("walk of rows drawn elsewhere", |b| {
        b.iter(|| {
            let walks = says
                .iter()
                .map(|row| walk_chain(black_box(&proposal), |i| Ok(row[i])).unwrap());
            walks.map(|w| w.accepted).sum::<u32>()
        })
    });
    group.finish();
}

fn tree(c: &mut Criterion) {
    let (depth, k) = (15usize, 64usize);
    let stream = Stream::new(3, 3, Domain::Draft);
    let tokens: Vec<TokenId> = (0..depth * k).map(|i| TokenId(i as u32)).collect();
    let mut log_probs: Vec<f32> = (0..depth * k)
        .map(|i| (stream.uniform(i as u32).max(1e-6)).ln() as f32 * 4.0)
        .collect();
    log_probs
        .chunks_mut(k)
        .for_each(|row| row.sort_by(|a, b| b.total_cmp(a)));
    let mut group = c.benchmark_group("tree");
    for nodes in [64, 256] {
        group.bench_function(BenchmarkId::new("build and masks", nodes), |b| {
            b.iter(|| {
                let mut source = TopK::new(&tokens, &log_probs, k).unwrap();
                let tree = DraftTree::build(TokenId(1), nodes, depth, &mut source).unwrap();
                (tree.masks(), tree)
            })
        });
    }
    group.finish();
}

criterion_group!(benches, sample_row, batch, tree);
criterion_main!(benches);
