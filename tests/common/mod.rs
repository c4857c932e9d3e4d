//! Exact laws of verifiers on small vocabularies: every draft, every coin, every draw, weighted by its probability.
#![allow(dead_code)] // each test binary uses a part

use dflash_rs::rng::{Domain, Stream};
use dflash_rs::types::TokenId;
use dflash_rs::verify::{Coins, Verdict};

/// A reproducible source of test numbers.
pub struct Numbers {
    stream: Stream,
    next: u32,
}

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self {
            stream: Stream::new(seed, 0, Domain::Draft),
            next: 0,
        }
    }

    pub fn uniform(&mut self) -> f64 {
        self.next += 1;
        self.stream.uniform(self.next)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }

    /// A random distribution; about a quarter of the entries are zero.
    pub fn distribution(&mut self, vocab: usize) -> Vec<f64> {
        let mut w: Vec<f64> = (0..vocab)
            .map(|_| {
                if self.uniform() < 0.25 {
                    0.0
                } else {
                    -self.uniform().max(1e-12).ln()
                }
            })
            .collect();
        let at = self.below(vocab);
        w[at] += 0.1;
        let sum: f64 = w.iter().sum();
        w.iter().map(|x| x / sum).collect()
    }

    pub fn pick(&mut self, p: &[f64]) -> usize {
        let u = self.uniform();
        let mut sum = 0.0;
        for (i, &x) in p.iter().enumerate() {
            sum += x;
            if u < sum {
                return i;
            }
        }
        p.iter().rposition(|&x| x > 0.0).unwrap()
    }
}

/// A conditional distribution for every prefix of up to `depth` tokens.
pub struct Model {
    pub vocab: usize,
    rows: Vec<Vec<f64>>,
}

impl Model {
    pub fn random(vocab: usize, depth: usize, numbers: &mut Numbers) -> Self {
        let contexts = (0..=depth).map(|d| vocab.pow(d as u32)).sum();
        Self {
            vocab,
            rows: (0..contexts).map(|_| numbers.distribution(vocab)).collect(),
        }
    }

    /// The same distribution after every prefix.
    pub fn constant(row: &[f64], depth: usize) -> Self {
        let contexts = (0..=depth).map(|d| row.len().pow(d as u32)).sum();
        Self {
            vocab: row.len(),
            rows: vec![row.to_vec(); contexts],
        }
    }

    pub fn one_hot(vocab: usize, depth: usize, numbers: &mut Numbers) -> Self {
        let contexts = (0..=depth).map(|d| vocab.pow(d as u32)).sum();
        let rows = (0..contexts)
            .map(|_| {
                let hot = numbers.below(vocab);
                (0..vocab).map(|v| f64::from(v == hot)).collect()
            })
            .collect();
        Self { vocab, rows }
    }

    pub fn row(&self, prefix: &[usize]) -> &[f64] {
        let level: usize = (0..prefix.len()).map(|d| self.vocab.pow(d as u32)).sum();
        &self.rows[level + index(prefix, self.vocab)]
    }

    /// Probability of every sequence of `len` tokens.
    pub fn law(&self, len: usize) -> Vec<f64> {
        sequences(self.vocab, len)
            .iter()
            .map(|s| self.probability(s, 0))
            .collect()
    }

    /// Probability of `sequence[from..]` after `sequence[..from]`.
    pub fn probability(&self, sequence: &[usize], from: usize) -> f64 {
        (from..sequence.len())
            .map(|i| self.row(&sequence[..i])[sequence[i]])
            .product()
    }
}

pub fn index(sequence: &[usize], vocab: usize) -> usize {
    sequence.iter().fold(0, |at, &t| at * vocab + t)
}

pub fn sequences(vocab: usize, len: usize) -> Vec<Vec<usize>> {
    (0..vocab.pow(len as u32))
        .map(|mut n| {
            let mut s = vec![0; len];
            for t in s.iter_mut().rev() {
                *t = n % vocab;
                n /= vocab;
            }
            s
        })
        .collect()
}

pub fn tokens(ids: &[usize]) -> Vec<TokenId> {
    ids.iter().map(|&t| TokenId(t as u32)).collect()
}

/// Random choices replayed from a script, so that one deterministic program can be run through all its outcomes.
#[derive(Default)]
pub struct Branches {
    script: Vec<usize>,
    options: Vec<Vec<f64>>,
    at: usize,
}

impl Branches {
    /// Chooses among weighted outcomes; impossible ones are never chosen.
    pub fn choose(&mut self, probabilities: &[f64]) -> usize {
        if self.at == self.script.len() {
            let first = probabilities
                .iter()
                .position(|&p| p > 0.0)
                .expect("some outcome is possible");
            self.script.push(first);
            self.options.push(probabilities.to_vec());
        }
        let choice = self.script[self.at];
        self.at += 1;
        choice
    }

    fn probability(&self) -> f64 {
        self.script.iter().zip(&self.options).map(|(&c, o)| o[c]).product()
    }

    // The next script in lexical order; false when all are done.
    fn advance(&mut self) -> bool {
        self.at = 0;
        while let (Some(last), Some(options)) = (self.script.pop(), self.options.pop()) {
            if let Some(next) = (last + 1..options.len()).find(|&c| options[c] > 0.0) {
                self.script.push(next);
                self.options.push(options);
                return true;
            }
        }
        false
    }

    /// Runs `program` once per outcome and hands each result with its probability to `sink`.
    pub fn explore<T>(mut program: impl FnMut(&mut Self) -> T, mut sink: impl FnMut(T, f64)) {
        let mut branches = Self::default();
        loop {
            let outcome = program(&mut branches);
            sink(outcome, branches.probability());
            if !branches.advance() {
                return;
            }
        }
    }
}

impl Coins for Branches {
    fn accept(&mut self, _: usize, bound: f64, ratio: &mut dyn FnMut() -> (f64, f64)) -> bool {
        let (part, whole) = ratio();
        let h = if whole > 0.0 {
            part / whole
        } else {
            f64::from(part > 0.0)
        };
        let h = h.min(bound).clamp(0.0, 1.0);
        self.choose(&[h, 1.0 - h]) == 0
    }

    fn pick(&mut self, weights: &[f64]) -> usize {
        let sum: f64 = weights.iter().sum();
        let p: Vec<f64> = weights.iter().map(|w| w / sum).collect();
        self.choose(&p)
    }
}

/// A ratio verifier: rows p [g + 1, V], rows q [g, V], drafts, coins.
pub type Verifier = fn(&[f64], &[f64], usize, &[TokenId], &mut Branches) -> Verdict;

/// The law of the first `g + 1` tokens when a round of `verify` is followed by plain decoding, and the expected number of
/// accepted drafts. `length` says how many of the drafts are verified; it sees what a policy must not see, too.
pub fn law_of_round(
    target: &Model,
    drafter: &Model,
    g: usize,
    length: impl Fn(&[usize]) -> usize,
    verify: Verifier,
) -> (Vec<f64>, f64) {
    let vocab = target.vocab;
    let all = sequences(vocab, g + 1);
    let mut law = vec![0.0; all.len()];
    let mut expected = 0.0;
    for drafts in sequences(vocab, g) {
        let chance = drafter.probability(&drafts, 0);
        if chance == 0.0 {
            continue;
        }
        let n = length(&drafts).min(g);
        let p: Vec<f64> = (0..=n).flat_map(|i| target.row(&drafts[..i]).to_vec()).collect();
        let q: Vec<f64> = (0..n).flat_map(|i| drafter.row(&drafts[..i]).to_vec()).collect();
        let ids = tokens(&drafts[..n]);
        Branches::explore(
            |coins| verify(&p, &q, vocab, &ids, coins),
            |verdict, probability| {
                let accepted = verdict.accepted as usize;
                expected += chance * probability * accepted as f64;
                let mut out = drafts[..accepted].to_vec();
                out.push(verdict.last.0 as usize);
                spread(&mut law, &all, target, &out, chance * probability);
            },
        );
    }
    (law, expected)
}

/// Adds `weight` to every sequence that starts with `out`, by the target's law of the rest.
pub fn spread(law: &mut [f64], all: &[Vec<usize>], target: &Model, out: &[usize], weight: f64) {
    for (sequence, mass) in all.iter().zip(law.iter_mut()) {
        if sequence.starts_with(out) {
            *mass += weight * target.probability(sequence, out.len());
        }
    }
}

pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

/// Pearson's statistic minus its mean, in its standard deviations: about N(0, 1) when counts follow the law.
/// Cells expected fewer than five times are pooled.
pub fn chi_square_z(counts: &[u64], law: &[f64]) -> f64 {
    let n: u64 = counts.iter().sum();
    let (mut statistic, mut cells) = (0.0, 0.0);
    let (mut pooled_count, mut pooled_law) = (0.0, 0.0);
    for (&count, &p) in counts.iter().zip(law) {
        let expected = p * n as f64;
        if expected < 5.0 {
            assert!(p > 0.0 || count == 0, "an impossible output was produced {count} times");
            pooled_count += count as f64;
            pooled_law += p;
        } else {
            statistic += (count as f64 - expected).powi(2) / expected;
            cells += 1.0;
        }
    }
    let expected = pooled_law * n as f64;
    if expected >= 5.0 {
        statistic += (pooled_count - expected).powi(2) / expected;
        cells += 1.0;
    }
    let freedom: f64 = cells - 1.0;
    (statistic - freedom) / (2.0 * freedom).sqrt()
}
