//! Many rounds with keyed numbers: outputs of six and more tokens against the target's law by chi-square. One-step tests
//! cannot see coins that are consumed twice; these do.

mod common;

use common::*;
use dflash_rs::rng::{Domain, Stream};
use dflash_rs::types::TokenId;
use dflash_rs::verify::{Coins, History, KeyedCoins, Sampler, Sampling, block, token, walk_chain};

/// Each token depends on the one before it; the anchor is token 0.
struct Markov {
    target: Vec<Vec<f64>>,
    draft: Vec<Vec<f64>>,
}

impl Markov {
    fn flat(target: &[f64], draft: &[f64]) -> Self {
        Self {
            target: vec![target.to_vec(); target.len()],
            draft: vec![draft.to_vec(); draft.len()],
        }
    }

    fn random(vocab: usize, seed: u64) -> Self {
        let mut numbers = Numbers::new(seed);
        let mut rows = || (0..vocab).map(|_| numbers.distribution(vocab)).collect();
        Self {
            target: rows(),
            draft: rows(),
        }
    }

    fn law(&self, len: usize) -> Vec<f64> {
        sequences(self.target.len(), len)
            .iter()
            .map(|s| {
                let mut last = 0;
                s.iter()
                    .map(|&t| std::mem::replace(&mut last, t))
                    .zip(s)
                    .map(|(a, &b)| self.target[a][b])
                    .product()
            })
            .collect()
    }
}

#[derive(Clone, Copy)]
enum Level {
    Token,
    Block,
}

/// One sequence of `len` tokens, `g` sampled drafts per round, coins from `coins(round_start)`.
fn generate<C: Coins>(
    model: &Markov,
    seed: u64,
    g: usize,
    len: usize,
    level: Level,
    coins: impl Fn(u64) -> C,
) -> Vec<usize> {
    let vocab = model.target.len();
    let mut text = vec![0];
    while text.len() <= len {
        let start = text.len() as u64;
        let stream = Stream::new(seed, start, Domain::Draft);
        let (mut p, mut q, mut drafts) = (Vec::new(), Vec::new(), Vec::new());
        let mut last = text[text.len() - 1];
        for i in 0..=g {
            p.extend_from_slice(&model.target[last]);
            if i < g {
                let row = &model.draft[last];
                q.extend_from_slice(row);
                let (mut u, mut x) = (stream.uniform(i as u32), vocab);
                for (v, &w) in row.iter().enumerate().filter(|&(_, &w)| w > 0.0) {
                    x = v;
                    u -= w;
                    if u < 0.0 {
                        break;
                    }
                }
                drafts.push(x);
                last = x;
            }
        }
        let ids = tokens(&drafts);
        let verdict = match level {
            Level::Token => token::verify(&p, &q, vocab, &ids, &mut coins(start)),
            Level::Block => block::verify(&p, &q, vocab, &ids, &mut coins(start)),
        }
        .unwrap();
        text.extend_from_slice(&drafts[..verdict.accepted as usize]);
        text.push(verdict.last.0 as usize);
    }
    text[1..=len].to_vec()
}

fn z_of(model: &Markov, len: usize, sequences: u64, mut text: impl FnMut(u64) -> Vec<usize>) -> f64 {
    let law = model.law(len);
    let mut counts = vec![0; law.len()];
    for seed in 0..sequences {
        counts[index(&text(seed), model.target.len())] += 1;
    }
    chi_square_z(&counts, &law)
}

// Seeded, hence no chance of a flaky failure; under the right law a fresh set of seeds would exceed this once in 10^4.
const PLAUSIBLE: f64 = 4.0;

#[test]
fn rounds_with_fresh_coins_have_the_target_law() {
    let models = [
        ("p = .5, q = .85, g = 3", Markov::flat(&[0.5, 0.5], &[0.85, 0.15]), 3, 6),
        ("p = .2, q = .6, g = 2", Markov::flat(&[0.2, 0.8], &[0.6, 0.4]), 2, 8),
        ("random, V = 3, g = 3", Markov::random(3, 1), 3, 6),
        ("random, V = 3, g = 2", Markov::random(3, 2), 2, 6),
    ];
    for (name, model, g, len) in &models {
        for level in [Level::Token, Level::Block] {
            let z = z_of(model, *len, 12_000, |seed| {
                generate(model, seed, *g, *len, level, |start| KeyedCoins::new(seed, start))
            });
            assert!(
                z.abs() < PLAUSIBLE,
                "{name}, {}: z = {z}",
                match level {
                    Level::Token => "token",
                    Level::Block => "block",
                }
            );
        }
    }
}

/// The known mistake: coins keyed by each draft's absolute position, so that a partial accept leaves coins whose value
/// already had a say to the next round.
struct ReusedCoins {
    seed: u64,
    start: u64,
    last: KeyedCoins,
}

impl Coins for ReusedCoins {
    fn accept(&mut self, column: usize, bound: f64, ratio: &mut dyn FnMut() -> (f64, f64)) -> bool {
        let u = Stream::new(self.seed, self.start + column as u64, Domain::Accept).uniform(0);
        let (part, whole) = ratio();
        u < bound && u * whole < part
    }

    fn pick(&mut self, weights: &[f64]) -> usize {
        self.last.pick(weights)
    }
}

#[test]
fn coins_keyed_by_absolute_position_are_caught() {
    let model = Markov::flat(&[0.5, 0.5], &[0.85, 0.15]);
    let z = z_of(&model, 6, 12_000, |seed| {
        generate(&model, seed, 3, 6, Level::Block, |start| ReusedCoins {
            seed,
            start,
            last: KeyedCoins::new(seed, start),
        })
    });
    assert!(z > 10.0, "the suite is blind to reused coins: z = {z}");
}

#[test]
fn one_round_of_reused_coins_looks_right_which_is_why_rounds_are_tested() {
    // The first token alone has the right law even with the mistake: a one-step oracle passes.
    let model = Markov::flat(&[0.5, 0.5], &[0.85, 0.15]);
    let z = z_of(&model, 1, 12_000, |seed| {
        generate(&model, seed, 3, 1, Level::Block, |start| ReusedCoins {
            seed,
            start,
            last: KeyedCoins::new(seed, start),
        })
    });
    assert!(z < PLAUSIBLE, "z = {z}");
}

fn draw(model: &Markov, sampler: &mut Sampler, seed: u64, context: &[usize]) -> TokenId {
    let logits: Vec<f32> = model.target[context[context.len() - 1]]
        .iter()
        .map(|p| p.ln() as f32)
        .collect();
    let sampling = Sampling {
        seed,
        ..Sampling::default()
    };
    sampler
        .draw_row(&logits, &sampling, &History::default(), &[], context.len() as u64)
        .unwrap()
}

#[test]
fn sample_and_match_gives_the_text_of_plain_decoding_and_its_law() {
    let model = Markov::random(3, 5);
    let mut sampler = Sampler::new();
    let len = 6;
    let z = z_of(&model, len, 8_000, |seed| {
        let mut plain = vec![0];
        while plain.len() <= len {
            let token = draw(&model, &mut sampler, seed, &plain);
            plain.push(token.0 as usize);
        }
        let mut numbers = Numbers::new(seed);
        let mut text = vec![0];
        while text.len() <= len {
            let g = numbers.below(5);
            let drafts: Vec<usize> = (0..g).map(|_| numbers.below(3)).collect();
            let mut context = text.clone();
            let walk = walk_chain(&tokens(&drafts), |row| {
                context.truncate(text.len());
                context.extend_from_slice(&drafts[..row]);
                Ok(draw(&model, &mut sampler, seed, &context))
            })
            .unwrap();
            text.extend_from_slice(&drafts[..walk.accepted as usize]);
            text.push(walk.bonus.0 as usize);
        }
        assert_eq!(text[..=len], plain[..=len], "seed {seed}");
        plain[1..=len].to_vec()
    });
    assert!(z.abs() < PLAUSIBLE, "z = {z}");
}

#[test]
fn keyed_and_given_coins_draw_the_last_token_in_proportion_to_its_weight() {
    let weights = [0.0, 1e-3, 0.5, 0.0, 2.0, 0.25];
    let sum: f64 = weights.iter().sum();
    let law: Vec<f64> = weights.iter().map(|w| w / sum).collect();
    let mut keyed = vec![0; weights.len()];
    let mut given = vec![0; weights.len()];
    let mut numbers = Numbers::new(3);
    for seed in 0..20_000 {
        keyed[KeyedCoins::new(seed, 1).pick(&weights)] += 1;
        let u = numbers.uniform();
        given[dflash_rs::verify::GivenCoins::new(&[], u, 0).unwrap().pick(&weights)] += 1;
    }
    for counts in [keyed, given] {
        assert!(chi_square_z(&counts, &law).abs() < PLAUSIBLE, "{counts:?}");
    }
}
