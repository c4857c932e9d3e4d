//! Watches what a step costs the host beside the two models: plan, set_drafts, accept_sampled and commit of a decoding
//! batch with blocks of 16. It must stay far below a model's forward (about 6 ms at a thousand tokens a second and six
//! tokens a step). `cargo bench --bench crossing`; the same from Python in `benchmarks/test_crossing.py`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use dflash_rs::schedule::{Config, Params};
use dflash_rs::step::Engine;
use dflash_rs::types::TokenId;
use dflash_rs::verify::Sampling;

const BLOCK: usize = 16;
const CONTEXT: usize = 4096;

struct Batch {
    engine: Engine,
    size: usize,
    drafts: Vec<i64>,
    sampled: Vec<i64>,
}

impl Batch {
    /// `size` requests past their prompts.
    fn new(size: usize) -> Self {
        let config = Config {
            num_pages: size * (CONTEXT / 16 + 4),
            page_size: 16,
            max_running: size,
            max_context: CONTEXT,
            block_size: BLOCK,
            max_batch_tokens: size * BLOCK * 4,
            vocab_size: 151_936,
            ..Config::default()
        };
        let mut engine = Engine::new(config, None).unwrap();
        for request in 0..size as u32 {
            let params = Params {
                sampling: Sampling {
                    temperature: 0.0,
                    ..Sampling::default()
                },
                max_tokens: CONTEXT as u32,
                ..Params::default()
            };
            let prompt = (0..32).map(|at| TokenId(100 + request + at)).collect();
            engine.add(prompt, params).unwrap();
        }
        let mut plan = engine.plan(BLOCK).unwrap().unwrap();
        let accepted = engine.accept_sampled(&plan, &vec![1; size], &[]).unwrap();
        engine.commit(&mut plan, &accepted, true).unwrap();
        // Row r accepts between 0 and 10 drafts, five on average.
        let mut sampled = Vec::with_capacity(size * BLOCK);
        for row in 0..size {
            let accepted = row * 7 % 11;
            sampled.extend((0..BLOCK).map(|at| if at < accepted { 1 } else { 2 }));
        }
        Self {
            engine,
            size,
            drafts: vec![1; size * (BLOCK - 1)],
            sampled,
        }
    }

    fn has_room(&self) -> bool {
        let longest = self.engine.scheduler().running().map(|row| row.bounds().1).max();
        self.engine.scheduler().num_running() == self.size
            && longest.is_some_and(|hi| (hi as usize) < CONTEXT - 2 * BLOCK)
    }

    fn step(&mut self) {
        let mut plan = self.engine.plan(BLOCK).unwrap().unwrap();
        plan.set_drafts(&self.drafts, BLOCK - 1).unwrap();
        let accepted = self.engine.accept_sampled(&plan, &self.sampled, &[]).unwrap();
        black_box(self.engine.commit(&mut plan, &accepted, true).unwrap());
    }
}

fn crossing(c: &mut Criterion) {
    let mut group = c.benchmark_group("crossing block 16");
    for size in [1, 16, 64, 256] {
        let mut batch = Batch::new(size);
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter_custom(|steps| {
                let mut spent = Duration::ZERO;
                for _ in 0..steps {
                    if !batch.has_room() {
                        batch = Batch::new(size);
                    }
                    let begin = Instant::now();
                    batch.step();
                    spent += begin.elapsed();
                }
                spent
            });
        });
    }
    group.finish();
}

criterion_group!(benches, crossing);
criterion_main!(benches);
