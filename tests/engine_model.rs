//! Random lives of an engine against a fake device that answers late.
//!
//! The fake target's next token is a hash of the whole prefix, and the KV it writes for a token is the hash of the text
//! up to it, so a slot that was overwritten, shared wrongly or never written shows. The device runs steps in launch
//! order, at a random moment between launch and resolve, and reads the page table only then. A target with recurrent state keeps the same
//! hash in a slot per row, which moves on only when a step is resolved, and in the checkpoints that plans name.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::Ordering;

use dflash_rs::draft::DraftTree;
use dflash_rs::kv::pages_for;
use dflash_rs::schedule::{Config, Finish, Params, Running, Vocabulary};
use dflash_rs::step::{Accepted, Engine, Events, StepPlan};
use dflash_rs::types::{RequestId, TokenId};
use dflash_rs::verify::Sampling;
use proptest::prelude::*;

const VOCAB: u32 = 13;
const EOS: u32 = 12;
const SPELLING: [&str; VOCAB as usize] = ["a", "b", "c", "ab", "ba", "", "cc", "d", "e", "dd", "ea", "f", "<eos>"];

fn mix(hash: u64, token: u32) -> u64 {
    let hash = (hash ^ u64::from(token) ^ 0x9E37_79B9).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    hash ^ (hash >> 29)
}

fn hash_of(text: &[u32]) -> u64 {
    text.iter().fold(1, |hash, &token| mix(hash, token))
}

/// What the target says after `text`. Few distinct states, so that stop strings and end-of-text do occur.
fn next(text: &[u32]) -> u32 {
    ((hash_of(text) >> 17) % u64::from(VOCAB)) as u32
}

impl Ask {
    /// What the target says for this request: of tokens that would end the text too early the next one that does not.
    fn next(&self, text: &[u32]) -> u32 {
        let mut token = next(text);
        while text.len() < self.prompt.len() + self.min_tokens as usize && (token == EOS || Some(token) == self.stop_id)
        {
            token = (token + 1) % VOCAB;
        }
        token
    }
}

#[derive(Clone, Debug)]
struct Ask {
    prompt: Vec<u32>,
    max_tokens: u32,
    min_tokens: u32,
    stop_id: Option<u32>,
    stops: Vec<&'static str>,
    ignore_eos: bool,
    draft: bool,
}

/// What a plain loop over the target says, written without any of the engine's code.
fn plain_run(ask: &Ask, max_context: usize) -> (Vec<u32>, Finish, Option<usize>) {
    let (mut text, mut out, mut bytes) = (ask.prompt.clone(), Vec::new(), String::new());
    loop {
        let token = ask.next(&text);
        text.push(token);
        out.push(token);
        let early = out.len() <= ask.min_tokens as usize;
        let watched = !ask.stops.is_empty();
        if (token == EOS && !ask.ignore_eos) || ask.stop_id == Some(token) {
            return (out, Finish::StopToken, watched.then_some(bytes.len()));
        }
        let fresh = bytes.len();
        bytes.push_str(SPELLING[token as usize]);
        // Matches that this token completes.
        let complete =
            |stop: &&str| (0..bytes.len()).find(|&at| at + stop.len() > fresh && bytes[at..].starts_with(*stop));
        if let Some(cut) = ask.stops.iter().filter_map(complete).min().filter(|_| !early) {
            return (out, Finish::StopString, Some(cut));
        }
        if out.len() == ask.max_tokens as usize || text.len() == max_context {
            return (out, Finish::Length, watched.then_some(bytes.len()));
        }
    }
}

struct Launch {
    plan: StepPlan,
    sampled: Option<Vec<i64>>,
    /// What the host knew of each row's text when it launched.
    known: Vec<Vec<u32>>,
    /// Where the device found each row, and the slots it wrote.
    begun: Vec<(usize, Vec<i64>)>,
}

#[derive(Default)]
struct DeviceRow {
    text: Vec<u32>,
    committed: usize,
}

struct Life {
    engine: Engine,
    config: Config,
    kv: Vec<u64>,
    /// The state of each row, of a target that has one, and its copies.
    states: HashMap<i32, u64>,
    copies: Vec<u64>,
    device: HashMap<u64, DeviceRow>,
    flights: VecDeque<Launch>,
    asks: HashMap<u64, Ask>,
    said: HashMap<u64, Vec<u32>>,
    ended: HashMap<u64, (u8, i64)>,
    gone: HashSet<u64>,
    quality: u32,
    dice: u64,
}

impl Life {
    fn new(config: Config, quality: u32) -> Self {
        let table = Vocabulary::new(SPELLING).unwrap();
        Self {
            engine: Engine::new(config.clone(), Some(table)).unwrap(),
            kv: vec![0; config.num_pages * config.page_size],
            states: HashMap::new(),
            copies: vec![0; config.state_checkpoints.unwrap_or(0)],
            config,
            device: HashMap::new(),
            flights: VecDeque::new(),
            asks: HashMap::new(),
            said: HashMap::new(),
            ended: HashMap::new(),
            gone: HashSet::new(),
            quality,
            dice: 7,
        }
    }

    fn roll(&mut self, sides: u32) -> u32 {
        self.dice = mix(self.dice, sides);
        (self.dice >> 33) as u32 % sides
    }

    fn add(&mut self, ask: Ask) {
        let params = Params {
            sampling: Sampling {
                temperature: 0.0,
                ..Sampling::default()
            },
            max_tokens: ask.max_tokens,
            min_tokens: ask.min_tokens,
            stop_ids: ask.stop_id.map(TokenId).into_iter().collect(),
            stop_strings: ask.stops.iter().map(|stop| stop.as_bytes().to_vec()).collect(),
            ignore_eos: ask.ignore_eos,
            edited: false,
            draft: ask.draft,
            ..Params::default()
        };
        let before = self.engine.counts().unwrap();
        let total = (ask.prompt.len() + ask.max_tokens as usize).min(self.config.max_context);
        let fits = ask.prompt.len() < self.config.max_context
            && pages_for(total - 1, self.config.page_size) <= self.config.num_pages;
        match self
            .engine
            .add(ask.prompt.iter().copied().map(TokenId).collect(), params)
        {
            Ok(id) => {
                assert!(fits, "a request that cannot finish alone was let in");
                self.said.insert(id.0, Vec::new());
                self.asks.insert(id.0, ask);
            }
            Err(error) => {
                assert!(!fits, "refused although it fits: {error}");
                assert_eq!(self.engine.counts().unwrap(), before);
            }
        }
    }

    fn launch(&mut self) {
        if self.flights.len() > self.config.depth {
            assert!(
                self.engine.plan(usize::MAX).is_err(),
                "more unresolved steps than the depth allows"
            );
            return;
        }
        let cap = 1 + self.roll(self.config.block_size as u32 + 2) as usize;
        if !self.flights.is_empty() && self.roll(2) == 0 {
            // What waits, or has a prompt to compute, comes first; otherwise everything decodes.
            if let Some(plan) = self.engine.plan_ahead(cap).unwrap() {
                assert!(plan.arrays().is_prefill.iter().all(|&prefill| !prefill));
                return self.launched(plan, cap);
            }
            return;
        }
        let Some(plan) = self.engine.plan(cap).unwrap() else {
            assert!(
                !self.engine.has_work() || !self.flights.is_empty(),
                "there is work and nothing to wait for"
            );
            return;
        };
        self.launched(plan, cap);
    }

    fn launched(&mut self, mut plan: StepPlan, cap: usize) {
        let arrays = plan.arrays();
        assert!(arrays.token_ids.len() <= self.config.max_batch_tokens);
        assert!(arrays.row_ids.len() <= self.config.max_running);
        let kv = self.engine.scheduler().kv();
        let mut known = Vec::new();
        for (row, &id) in arrays.request_ids.iter().enumerate() {
            let running = self
                .engine
                .scheduler()
                .running()
                .find(|running| running.request.id.0 == id)
                .unwrap();
            known.push(running.request.tokens.iter().map(|token| token.0).collect());
            let len = arrays.block_len[row] as u32;
            // The row owns whatever the device may write, and nobody else has a part in it.
            let (_, hi) = running.bounds();
            assert!(hi <= kv.table().allocated(running.key).unwrap());
            let first = arrays.context_lens[row] as usize / self.config.page_size;
            for &page in &kv.table().pages(running.key).unwrap()[first..pages_for(hi as usize, self.config.page_size)] {
                assert!(
                    kv.pool().owners(page) == 1 && !kv.cache().holds(page),
                    "a step would write a shared page"
                );
            }
            assert!(arrays.is_prefill[row] || len as usize <= cap.min(self.config.block_size));
        }
        if self.roll(3) == 0 {
            let arrays = plan.arrays();
            let lengths: Vec<i32> = arrays
                .draft_rows
                .iter()
                .map(|&row| arrays.block_len[row as usize])
                .collect();
            let widths = lengths.iter().map(|&len| 1 + self.roll(len as u32) as i32);
            let widths: Vec<i32> = widths.collect();
            plan.narrow(&widths).unwrap();
        }
        self.flights.push_back(Launch {
            plan,
            sampled: None,
            known,
            begun: Vec::new(),
        });
    }

    /// Runs every launched step that has not run yet, in order.
    fn run_device(&mut self) {
        for at in 0..self.flights.len() {
            if self.flights[at].sampled.is_none() {
                if at == 0 && self.roll(2) == 0 {
                    // A device without a queue of its own: the host knows everything by now.
                    self.settle();
                }
                let mut flight = std::mem::replace(&mut self.flights[at], placeholder(&mut self.engine));
                self.execute(&mut flight);
                self.flights[at] = flight;
            }
        }
    }

    /// Tells the oldest step what the host knows now. Where the device has taken it already, that is what it found.
    fn settle(&mut self) {
        let flight = &mut self.flights[0];
        self.engine.settle(&mut flight.plan).unwrap();
        let arrays = flight.plan.arrays();
        for (row, &id) in arrays.request_ids.iter().enumerate() {
            let (start, end) = (arrays.query_starts[row] as usize, arrays.query_starts[row + 1] as usize);
            let first = arrays.context_lens[row] as usize;
            assert!(arrays.start_known[row] && arrays.token_ids[start] >= 0);
            let chains = arrays.parents.is_empty();
            let mut places = (first as i64..).zip(&arrays.positions[start..end]);
            assert!(!chains || places.all(|(place, &position)| place == position));
            let mut tenants = self.engine.scheduler().running();
            // Whoever was retracted meanwhile may have entered again, in another row.
            let here =
                |running: &&Running| running.request.id.0 == id && running.key.slot.0 as i32 == arrays.row_ids[row];
            match tenants.find(here) {
                Some(running) => {
                    if let Some((committed, slots)) = flight.begun.get(row) {
                        assert_eq!(
                            (first, &arrays.slots[start..end]),
                            (*committed, &slots[..]),
                            "request {id}"
                        );
                    }
                    flight.known[row] = running.request.tokens.iter().map(|token| token.0).collect();
                }
                None => {
                    // It has ended: a token of no meaning behind what it had.
                    let text = self.device.get(&id).map_or(&[][..], |state| &state.text);
                    let text = if text.len() < first { &flight.known[row] } else { text };
                    flight.known[row] = text[..first].to_vec();
                    flight.known[row].push(arrays.token_ids[start] as u32);
                }
            }
        }
    }

    /// Trees of random shape for the rows that draft, as good as the drafts of chains are.
    fn plant(&mut self, flight: &mut Launch) {
        let arrays = flight.plan.arrays().clone();
        let mut trees = Vec::new();
        for &row in &arrays.draft_rows {
            let text = &flight.known[row as usize][..=arrays.context_lens[row as usize] as usize];
            let (mut tokens, mut parents) = (vec![TokenId(text[text.len() - 1])], vec![0]);
            let mut texts = vec![text.to_vec()];
            for node in 1..=self.roll(arrays.block_len[row as usize] as u32) as usize {
                let parent = self.roll(node as u32) as usize;
                let mut text = texts[parent].clone();
                let good = self.roll(100) < self.quality;
                let draft = if good { next(&text) } else { self.roll(VOCAB) };
                text.push(draft);
                tokens.push(TokenId(draft));
                parents.push(parent as u32);
                texts.push(text);
            }
            trees.push(DraftTree::from_parents(&tokens, &parents).unwrap());
        }
        flight.plan.set_trees(&trees).unwrap();
        let arrays = flight.plan.arrays();
        assert!(
            flight.plan.narrow(&vec![1; arrays.draft_rows.len()]).is_err(),
            "a tree is not narrowed"
        );
    }

    fn execute(&mut self, flight: &mut Launch) {
        let arrays = flight.plan.arrays();
        let known = arrays.start_known.iter().all(|&known| known);
        let known = known
            && arrays.query_starts[..arrays.row_ids.len()]
                .iter()
                .all(|&at| arrays.token_ids[at as usize] >= 0);
        if known && !arrays.draft_rows.is_empty() && self.roll(2) == 0 {
            self.plant(flight);
        }
        let arrays = flight.plan.arrays().clone();
        let planted = !arrays.parents.is_empty();
        let width = self.engine.scheduler().kv().table().width();
        let size = self.config.page_size;
        let mut written = HashSet::new();
        let mut drafts: Vec<i64> = Vec::new();
        let columns = self.config.block_size - 1;
        let mut sampled = vec![-1; arrays.logit_rows.len()];
        for row in 0..arrays.row_ids.len() {
            let id = arrays.request_ids[row];
            let ask = self.asks[&id].clone();
            let (start, end) = (arrays.query_starts[row] as usize, arrays.query_starts[row + 1] as usize);
            let mut state = self.device.remove(&id).unwrap_or_default();
            let prefill = arrays.is_prefill[row];
            if prefill || arrays.token_ids[start] >= 0 {
                // The host states where the row is and what it has: a fresh, resumed or resolved row.
                state.committed = arrays.context_lens[row] as usize;
                state.text = flight.known[row][..=state.committed].to_vec();
            }
            if arrays.start_known[row] {
                assert_eq!(state.committed, arrays.context_lens[row] as usize);
            } else {
                assert!(state.committed >= arrays.context_lens[row] as usize);
            }
            flight.begun.push((state.committed, Vec::new()));
            let mut path = state.text[..state.committed].to_vec();
            let slot = |position: usize, engine: &Engine| {
                let entry = arrays.row_ids[row] as usize * width + position / size;
                let page = engine.scheduler().kv().table().flat()[entry].load(Ordering::Relaxed) as usize;
                page * size + position % size
            };
            let mut hash = 1;
            for (position, &token) in path.iter().enumerate() {
                hash = mix(hash, token);
                assert_eq!(
                    self.kv[slot(position, &self.engine)],
                    hash,
                    "request {id} reads stale KV at {position}"
                );
            }
            if self.config.state_checkpoints.is_some() {
                let restore = arrays.state_restore[row];
                if restore >= 0 {
                    self.states.insert(arrays.row_ids[row], self.copies[restore as usize]);
                } else if arrays.context_lens[row] == 0 {
                    self.states.insert(arrays.row_ids[row], 1);
                }
                let state = self.states.get(&arrays.row_ids[row]);
                assert_eq!(state, Some(&hash), "request {id} starts from the state of another text");
            }
            let mut block = Vec::new();
            if planted && !prefill {
                assert_eq!(arrays.token_ids[start] as u32, state.text[state.committed]);
                block.extend(arrays.token_ids[start..end].iter().map(|&token| token as u32));
            } else if prefill {
                block.extend(arrays.token_ids[start..end].iter().map(|&token| token as u32));
                path.extend(&block);
                state.text = path.clone();
            } else {
                block.push(state.text[state.committed]);
                path.push(block[0]);
                let mut row_drafts = Vec::new();
                for _ in 0..columns {
                    let mut draft = ask.next(&path);
                    if self.roll(100) >= self.quality {
                        draft = self.roll(VOCAB);
                    }
                    path.push(draft);
                    row_drafts.push(i64::from(draft));
                }
                block.extend(row_drafts[..end - start - 1].iter().map(|&draft| draft as u32));
                if end - start > 1 {
                    drafts.extend(row_drafts);
                }
            }
            // The text up to each token of the row; in a chain each one follows the one before it.
            let mut texts: Vec<Vec<u32>> = Vec::new();
            let words = arrays.ancestors.len() / arrays.token_ids.len();
            let mut logit = arrays.logit_starts[row] as usize;
            for (at, &token) in block.iter().enumerate() {
                let parent = if planted {
                    arrays.parents[start + at]
                } else {
                    at as i32 - 1
                };
                let before = usize::try_from(parent).map(|parent| texts[parent].clone());
                let mut text = before.unwrap_or_else(|_| state.text[..state.committed].to_vec());
                text.push(token);
                texts.push(text.clone());
                let slot = slot(state.committed + at, &self.engine);
                if arrays.start_known[row] {
                    assert_eq!(slot as i64, arrays.slots[start + at]);
                    assert_eq!(text.len() as i64 - 1, arrays.positions[start + at]);
                }
                if planted {
                    let mask = &arrays.ancestors[(start + at) * words..(start + at + 1) * words];
                    let seen: u32 = mask.iter().map(|bits| bits.count_ones()).sum();
                    assert_eq!(seen as usize, text.len() - state.committed, "a token sees its path");
                }
                flight.begun[row].1.push(slot as i64);
                assert!(written.insert(slot), "two rows write slot {slot}");
                self.kv[slot] = hash_of(&text);
                if arrays.logit_rows.get(logit) == Some(&((start + at) as i32)) {
                    sampled[logit] = i64::from(ask.next(&text));
                    logit += 1;
                }
            }
            assert_eq!(logit, arrays.logit_starts[row + 1] as usize);
            // The device moves on by itself; it knows nothing of stops.
            if prefill {
                state.committed += block.len();
                if let Some(&save) = arrays.state_save.get(row).filter(|&&save| save >= 0) {
                    self.copies[save as usize] = hash_of(&state.text[..state.committed]);
                }
                if arrays.logit_starts[row] < arrays.logit_starts[row + 1] {
                    state.text.push(ask.next(&state.text));
                }
            } else {
                let mut text = state.text[..=state.committed].to_vec();
                let mut from = 0;
                let mut path = Vec::new();
                while let Some(node) = (from + 1..block.len()).find(|&node| {
                    let parent = if planted {
                        arrays.parents[start + node] as usize
                    } else {
                        node - 1
                    };
                    parent == from && block[node] == ask.next(&text)
                }) {
                    text.push(block[node]);
                    path.push(node);
                    from = node;
                }
                if self.config.depth > 0 {
                    // The next step may run before the host has heard of this one.
                    let slots: Vec<usize> = (0..=path.len())
                        .map(|at| slot(state.committed + at, &self.engine))
                        .collect();
                    let kept: Vec<u64> = path
                        .iter()
                        .map(|&node| self.kv[slot(state.committed + node, &self.engine)])
                        .collect();
                    for (&slot, kv) in slots[1..].iter().zip(kept) {
                        self.kv[slot] = kv;
                    }
                }
                state.committed = text.len();
                text.push(ask.next(&text));
                state.text = text;
            }
            self.device.insert(id, state);
        }
        if !planted && !arrays.draft_rows.is_empty() {
            flight.plan.set_drafts(&drafts, columns).unwrap();
        }
        flight.sampled = Some(sampled);
    }

    /// Resolves the oldest step; `fail` makes the device return nonsense for one of its requests.
    fn resolve(&mut self, fail: bool) {
        self.run_device();
        let Some(flight) = self.flights.pop_front() else {
            return;
        };
        self.flights.push_front(flight);
        self.settle();
        let mut flight = self.flights.pop_front().unwrap();
        let mut sampled = flight.sampled.take().unwrap();
        let mut victim = None;
        if fail && !sampled.is_empty() {
            let logit = self.roll(sampled.len() as u32) as i32;
            let starts = &flight.plan.arrays().logit_starts;
            let row = starts.iter().rposition(|&start| start <= logit).unwrap();
            let row = (0..=row).rev().find(|&row| starts[row] < starts[row + 1]).unwrap();
            victim = Some(flight.plan.arrays().request_ids[row]);
            sampled[starts[row] as usize] = i64::from(VOCAB);
        }
        let accepted = self.engine.accept_sampled(&flight.plan, &sampled, &[]).unwrap();
        let kept = accepted.arrays();
        assert_eq!(kept.commit_rows.len(), kept.commit_slots.len());
        let moved: Vec<u64> = kept.move_from.iter().map(|&slot| self.kv[slot as usize]).collect();
        if self.config.depth == 0 {
            for (&slot, kv) in kept.move_to.iter().zip(moved) {
                self.kv[slot as usize] = kv;
            }
        }
        let events = self.engine.commit(&mut flight.plan, &accepted, true).unwrap();
        self.hear(&events, &accepted, victim);
        let layout = flight.plan.arrays();
        for (&row, id) in layout.row_ids.iter().zip(&layout.request_ids) {
            // What was kept is folded in once it is booked; a step that is called off leaves states as they were.
            if let Some(there) = self.device.get(id).filter(|_| victim != Some(*id)) {
                self.states.insert(row, hash_of(&there.text[..there.committed]));
            }
        }
        assert!(
            self.engine.commit(&mut flight.plan, &accepted, true).is_err(),
            "a step resolves once"
        );
    }

    fn hear(&mut self, events: &Events, accepted: &Accepted, victim: Option<u64>) {
        let arrays = events.arrays();
        assert_eq!(accepted.step(), events.step());
        for (at, &id) in arrays.request_ids.iter().enumerate() {
            assert!(
                !self.gone.contains(&id) && !self.ended.contains_key(&id),
                "request {id} speaks after its end"
            );
            let new = &arrays.tokens[arrays.token_starts[at] as usize..arrays.token_starts[at + 1] as usize];
            self.said
                .get_mut(&id)
                .unwrap()
                .extend(new.iter().map(|&token| token as u32));
            assert!(arrays.accepted[at] <= arrays.drafted[at] && arrays.drafted[at] <= arrays.verified[at]);
            if arrays.finish[at] == Finish::Error as u8 {
                assert_eq!(Some(id), victim, "only the failed request ends with an error");
                assert!(events.errors().iter().any(|(request, _)| *request == id));
                self.gone.insert(id);
            } else if arrays.finish[at] != 0 {
                self.ended.insert(id, (arrays.finish[at], arrays.text_ends[at]));
            }
        }
    }

    fn abort(&mut self, which: u32) {
        let mut live: Vec<u64> = self
            .asks
            .keys()
            .copied()
            .filter(|id| !self.gone.contains(id) && !self.ended.contains_key(id))
            .collect();
        live.sort_unstable();
        if live.is_empty() {
            return;
        }
        let id = live[which as usize % live.len()];
        assert!(self.engine.abort(RequestId(id)).unwrap());
        assert!(!self.engine.abort(RequestId(id)).unwrap(), "it has ended already");
        self.gone.insert(id);
    }

    fn check(&mut self) {
        let counts = self.engine.counts().unwrap();
        let scheduler = self.engine.scheduler();
        let kv = scheduler.kv();
        let mut owners = vec![0; self.config.num_pages];
        for running in scheduler.running() {
            let pages = kv.table().pages(running.key).unwrap();
            for page in pages {
                owners[page.0 as usize] += 1;
            }
            let committed = kv.table().committed(running.key).unwrap() as usize;
            let (lo, hi) = running.bounds();
            assert!(committed <= lo as usize && lo <= hi, "{committed} <= {lo} <= {hi}");
            assert!(running.draft_valid_from as usize <= committed);
            // Rejecting everything for ever never grows a row: surplus is bounded by the steps under way.
            let reach = running.request.tokens.len() + (self.config.depth + 1) * self.config.block_size;
            assert!(pages.len() <= pages_for(reach, self.config.page_size));
            let mut hash = 1;
            for (position, token) in running.request.tokens[..committed].iter().enumerate() {
                hash = mix(hash, token.0);
                let slot = pages[position / self.config.page_size].0 as usize * self.config.page_size
                    + position % self.config.page_size;
                assert_eq!(
                    self.kv[slot], hash,
                    "committed KV of {:?} at {position}",
                    running.request.id
                );
            }
        }
        let mut free = 0;
        for page in (0..self.config.num_pages as u32).map(dflash_rs::types::PageId) {
            let cached = kv.cache().holds(page);
            let expected = owners[page.0 as usize] + u32::from(cached);
            assert_eq!(kv.pool().owners(page), expected, "owners of page {page:?}");
            free += usize::from(expected == 0);
            if let Some(text) = kv.cache().text_of(page) {
                let text: Vec<u32> = text.iter().map(|token| token.0).collect();
                for at in text.len() - self.config.page_size..text.len() {
                    let slot = page.0 as usize * self.config.page_size + at % self.config.page_size;
                    assert_eq!(self.kv[slot], hash_of(&text[..=at]), "cached page {page:?} at {at}");
                }
            }
        }
        assert_eq!(counts.free_pages, free);
        assert!(counts.reclaimable_pages <= counts.cached_pages);
    }

    /// Lets everyone finish, then holds each text against the plain run.
    fn finish(mut self) {
        let mut patience = 40_000;
        while self.engine.has_work() || !self.flights.is_empty() {
            if self.flights.len() <= self.config.depth {
                self.launch();
            }
            if self.flights.len() > self.config.depth || self.roll(3) == 0 {
                self.resolve(false);
            }
            patience -= 1;
            assert!(patience > 0, "requests do not finish: {:?}", self.engine.counts());
        }
        self.check();
        for (id, ask) in &self.asks {
            let (text, finish, text_end) = plain_run(ask, self.config.max_context);
            if self.gone.contains(id) {
                assert!(
                    text.starts_with(&self.said[id]),
                    "request {id} said something else before its abort"
                );
                continue;
            }
            assert_eq!(self.said[id], text, "request {id}: {ask:?}");
            let end = text_end.map_or(-1, |end| end as i64);
            assert_eq!(self.ended[id], (finish as u8, end), "request {id}: {ask:?}");
        }
        let counts = self.engine.counts().unwrap();
        assert_eq!((counts.running, counts.waiting, counts.in_flight), (0, 0, 0));
        assert_eq!(counts.free_pages + counts.cached_pages, counts.total_pages);
        assert_eq!(counts.reclaimable_pages, counts.cached_pages);
        assert_eq!(self.engine.evict(usize::MAX).unwrap(), counts.cached_pages);
        assert_eq!(self.engine.counts().unwrap().free_pages, counts.total_pages);
        assert_eq!(
            self.engine.scheduler().kv().table().num_free_rows(),
            self.engine.scheduler().kv().table().max_rows()
        );
    }
}

/// An empty plan to stand in a queue while the real one is worked on.
fn placeholder(_: &mut Engine) -> Launch {
    let mut other = Engine::new(
        Config {
            num_pages: 1,
            page_size: 1,
            ..Config::default()
        },
        None,
    )
    .unwrap();
    other
        .add(
            vec![TokenId(0)],
            Params {
                max_tokens: 1,
                ..Params::default()
            },
        )
        .unwrap();
    Launch {
        plan: other.plan(1).unwrap().unwrap(),
        sampled: None,
        known: Vec::new(),
        begun: Vec::new(),
    }
}

#[derive(Clone, Debug)]
enum Op {
    Arrive(Ask),
    Launch,
    Run,
    Resolve,
    Fail,
    Abort(u32),
    Drop(bool),
    CancelAll,
    Evict(usize),
}

fn asks() -> impl Strategy<Value = Ask> {
    // Two families of prompts with long common beginnings.
    let prompt = (0..2u32, 1..40usize, 0..3u32).prop_map(|(family, len, tail)| {
        let mut prompt: Vec<u32> = (0..len as u32).map(|at| (at * (family + 2)) % 11).collect();
        *prompt.last_mut().unwrap() = tail;
        prompt
    });
    let stops = prop_oneof![
        3 => Just(vec![]),
        1 => Just(vec!["bab", "cc"]),
        1 => Just(vec!["ddd"]),
        1 => Just(vec!["ea", "abc", "f<"]),
    ];
    (
        prompt,
        (1..30u32, prop_oneof![2 => Just(0.0), 1 => 0.0..=1.0f64]),
        prop::option::weighted(0.2, 0..VOCAB),
        stops,
        any::<bool>(),
        prop::bool::weighted(0.9),
    )
        .prop_map(|(prompt, (max_tokens, least), stop_id, stops, ignore_eos, draft)| Ask {
            prompt,
            max_tokens,
            min_tokens: (f64::from(max_tokens) * least) as u32,
            stop_id,
            stops,
            ignore_eos,
            draft,
        })
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => asks().prop_map(Op::Arrive),
        12 => Just(Op::Launch),
        3 => Just(Op::Run),
        12 => Just(Op::Resolve),
        1 => Just(Op::Fail),
        1 => any::<u32>().prop_map(Op::Abort),
        1 => any::<bool>().prop_map(Op::Drop),
        1 => Just(Op::CancelAll),
        1 => (0..5usize).prop_map(Op::Evict),
    ];
    prop::collection::vec(op, 1..80)
}

fn configs() -> impl Strategy<Value = Config> {
    (
        prop_oneof![Just(1usize), Just(3), Just(16), Just(64)],
        1..5usize,
        1..9usize,
        0..40usize,
        0..2usize,
        any::<bool>(),
        30..80usize,
        2..90usize,
        prop::option::of(0..6usize),
    )
        .prop_map(
            |(page_size, max_running, block_size, batch, depth, prefix_cache, max_context, slots, copies)| Config {
                // From hopelessly small to comfortable.
                num_pages: pages_for(slots * 2, page_size).max(1),
                page_size,
                max_running,
                max_context,
                block_size,
                max_batch_tokens: max_running + batch,
                vocab_size: VOCAB as usize,
                eos_ids: vec![TokenId(EOS)],
                prefix_cache,
                // With results one step late a state moves on before it is known whether it may.
                state_checkpoints: copies.filter(|_| depth == 0),
                depth,
            },
        )
}

proptest! {
    // `make soak` sets PROPTEST_CASES and PROPTEST_RNG_SEED, and goes on for as long as one likes.
    #[test]
    fn whatever_happens_every_text_is_the_plain_one_and_no_page_is_lost(
        config in configs(),
        quality in prop_oneof![Just(0u32), Just(60), Just(90), Just(100)],
        ops in ops(),
    ) {
        let mut life = Life::new(config, quality);
        for op in ops {
            match op {
                Op::Arrive(ask) => life.add(ask),
                Op::Launch => life.launch(),
                Op::Run => life.run_device(),
                Op::Resolve => life.resolve(false),
                Op::Fail => life.resolve(true),
                Op::Abort(which) => life.abort(which),
                Op::Drop(ran) => {
                    // An interrupt, before or after the device did the step.
                    if ran {
                        life.run_device();
                    }
                    drop(life.flights.pop_back());
                }
                Op::CancelAll => {
                    life.engine.cancel_all().unwrap();
                    life.flights.clear();
                }
                Op::Evict(count) => {
                    let before = life.engine.counts().unwrap();
                    let freed = life.engine.evict(count).unwrap();
                    prop_assert_eq!(freed, count.min(before.reclaimable_pages));
                }
            }
            life.check();
        }
        life.finish();
    }
}
