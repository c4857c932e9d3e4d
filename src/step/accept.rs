//! What a step keeps: the target's tokens, drawn here or on a device, and the walk along the drafts.

use super::Engine;
use super::step_plan::StepPlan;
use super::values::{Accepted, AcceptedArrays, DrawnRows, EditedRows, PlanArrays};
use crate::draft::DraftTree;
use crate::error::{Error, Result, indices};
use crate::schedule::{Running, Scheduled, Scheduler, Work};
use crate::types::TokenId;
use crate::verify::{Sampler, top_logprobs, walk_chain, walk_tree};

impl Engine {
    /// Draws the target's tokens and walks the drafts. `logits` is `[N, vocab_size]`, row-major, in the order of the
    /// plan's `logit_rows`. Only rows the walk reaches are drawn.
    ///
    /// # Errors
    /// `OutOfTurn` when an earlier step is unresolved, this one is closed, or drafts are missing; `Length`. What is
    /// wrong with one row's logits fails that request alone, see [`Accepted::failed`].
    pub fn accept(&mut self, plan: &StepPlan, logits: &[f32]) -> Result<Accepted> {
        self.accept_edited(plan, logits, &EditedRows::default())
    }

    /// The same where rows were edited: these are drawn from what was made of them, and scored by what they were.
    ///
    /// A row without a token is where plain decoding would end its request, so the walk ends before it: the draft that leads there is kept as
    /// the last token, and the request ends in the next step, unless this token ends it otherwise.
    ///
    /// # Errors
    /// As [`Self::accept`]; what does not fit together in `edited`.
    pub fn accept_edited(&mut self, plan: &StepPlan, logits: &[f32], edited: &EditedRows<'_>) -> Result<Accepted> {
        let vocab = self.scheduler.config().vocab_size;
        let expected = plan.arrays().logit_rows.len() * vocab;
        if logits.len() != expected {
            return Err(Error::Length {
                name: "logits",
                got: logits.len(),
                expected,
            });
        }
        self.accept_rows(plan, edited, |sampler, context, path, token, out| {
            let at = context.first_logit + token;
            let row = &logits[at * vocab..(at + 1) * vocab];
            let drawn = context.draw(sampler, row, path)?;
            context.score(sampler, row, drawn, out)?;
            Ok(drawn)
        })
    }

    /// Draws edited rows of the next step to resolve, `[E]`: for a device that walks its drafts itself. -1 for a row without a token.
    ///
    /// # Errors
    /// As [`Self::accept_edited`].
    pub fn draw_edited(&mut self, plan: &StepPlan, edited: &EditedRows<'_>) -> Result<Vec<i64>> {
        self.call_off_dropped()?;
        self.next_to_resolve(plan)?;
        let Self {
            scheduler,
            in_flight,
            sampler,
            drafts,
            ..
        } = self;
        let (vocab, layout) = (scheduler.config().vocab_size, plan.arrays());
        edited.check(layout.logit_rows.len(), vocab)?;
        let mut tokens = Vec::with_capacity(edited.rows.len());
        for (row, scheduled) in in_flight[0].rows.iter().enumerate() {
            let end = i64::from(layout.logit_starts[row + 1]);
            let next = |drawn: usize| edited.rows.get(drawn).copied().filter(|&at| at < end);
            if next(tokens.len()).is_none() {
                continue;
            }
            let decodes = scheduled.work == Work::Decode;
            let tree = plan.tree_of(row)?.filter(|_| decodes);
            drafts.clear();
            if decodes && tree.is_none() {
                plan.drafts_of(row, drafts)?;
            }
            let running = scheduler.tenant(scheduled);
            let context = running.map(|running| Context::new(scheduler, scheduled, running, layout.logit_starts[row]));
            let context = context.transpose()?;
            while let Some(at) = next(tokens.len()) {
                let node = (at - i64::from(layout.logit_starts[row])) as usize;
                let path = match &tree {
                    None => drafts[..node].to_vec(),
                    Some(tree) => tree.path_tokens(node),
                };
                let drawn = context.as_ref().map(|context| {
                    let row = edited.row(tokens.len(), vocab)?;
                    context.draw(sampler, row, &path)
                });
                // Whoever has left, and a row without a token, have none.
                tokens.push(drawn.and_then(Result::ok).map_or(-1, |drawn| i64::from(drawn.0)));
            }
        }
        Ok(tokens)
    }

    /// Walks the drafts with tokens that were drawn elsewhere. `sampled` is `[N]` in the order of the plan's `logit_rows`,
    /// `logprobs` likewise or empty.
    ///
    /// # Errors
    /// As [`Self::accept`]; `InvalidArgument` for a sampled token outside the vocabulary.
    pub fn accept_sampled(&mut self, plan: &StepPlan, sampled: &[i64], logprobs: &[f32]) -> Result<Accepted> {
        self.accept_drawn(
            plan,
            &DrawnRows {
                tokens: sampled,
                logprobs,
                ..DrawnRows::default()
            },
        )
    }

    /// Walks the drafts with what a device drew.
    ///
    /// # Errors
    /// As [`Self::accept`]. A row that could not be drawn, or whose token is outside the vocabulary, fails its request alone.
    pub fn accept_drawn(&mut self, plan: &StepPlan, drawn: &DrawnRows<'_>) -> Result<Accepted> {
        let vocab = self.scheduler.config().vocab_size as i64;
        let rows = plan.arrays().logit_rows.len();
        let tops = drawn.top_count * rows;
        for (name, got, expected) in [
            ("sampled", drawn.tokens.len(), rows),
            ("logprobs", drawn.logprobs.len(), rows),
            ("status", drawn.status.len(), rows),
            ("top_tokens", drawn.top_tokens.len(), tops),
            ("top_logprobs", drawn.top_logprobs.len(), tops),
        ] {
            let left_out = got == 0 && matches!(name, "logprobs" | "status");
            if got != expected && !left_out {
                return Err(Error::Length { name, got, expected });
            }
        }
        self.accept_rows(plan, &drawn.edited, |_, context, _, token, out| {
            let at = context.first_logit + token;
            let (chosen, status) = (drawn.tokens[at], drawn.status.get(at).copied().unwrap_or(0));
            if status != 0 {
                return Err(row_failure(status, vocab as usize));
            }
            if chosen < 0 || chosen >= vocab {
                let expected = format!("tokens in {}", indices(vocab as usize));
                return Err(Error::InvalidArgument {
                    name: "sampled",
                    got: format!("token {chosen}"),
                    expected,
                });
            }
            if !drawn.logprobs.is_empty() || drawn.top_count > 0 {
                let logprob = drawn.logprobs.get(at).copied().unwrap_or(f32::NAN);
                let wanted = context.running.request.params.alternatives() as usize;
                let best = at * drawn.top_count..at * drawn.top_count + wanted.min(drawn.top_count);
                let top = drawn.top_tokens[best.clone()].iter().zip(&drawn.top_logprobs[best]);
                score(out, logprob, top.map(|(&token, &logprob)| (token, logprob)));
            }
            Ok(TokenId(chosen as u32))
        })
    }

    fn accept_rows(
        &mut self,
        plan: &StepPlan,
        edited: &EditedRows<'_>,
        mut draw: impl FnMut(&mut Sampler, &Context, &[TokenId], usize, &mut AcceptedArrays) -> Result<TokenId>,
    ) -> Result<Accepted> {
        self.call_off_dropped()?;
        self.next_to_resolve(plan)?;
        let Self {
            scheduler,
            in_flight,
            shared,
            sampler,
            drafts,
            ..
        } = self;
        let (vocab, layout) = (scheduler.config().vocab_size, plan.arrays());
        edited.check(layout.logit_rows.len(), vocab)?;
        let mut accepted = shared.accepted(plan.step());
        for (row, scheduled) in in_flight[0].rows.iter().enumerate() {
            let out = accepted.arrays_mut();
            out.token_starts.push(out.tokens.len() as i32);
            out.commit_starts.push(out.commit_rows.len() as i32);
            out.accepted.push(0);
            // Whoever left meanwhile gains nothing, and nothing of theirs is worth keeping.
            let Some(running) = scheduler.tenant(scheduled) else {
                continue;
            };
            let start = layout.query_starts[row] as usize;
            match scheduled.work {
                Work::Prefill { last: false } => {
                    keep_chain(out, layout, start, scheduled.len);
                    continue;
                }
                Work::Prefill { last: true } => drafts.clear(),
                Work::Decode => plan.drafts_of(row, drafts)?,
            }
            let context = Context::new(scheduler, scheduled, running, layout.logit_starts[row])?;
            let before = Lengths::of(out);
            let tree = plan.tree_of(row)?.filter(|_| scheduled.work == Work::Decode);
            let walked = context.walk(drafts, tree.as_ref(), |path, token| {
                let drawn = match edited.find(context.first_logit + token) {
                    None => draw(sampler, &context, path, token, out)?,
                    Some(at) => {
                        let drawn = context.draw(sampler, edited.row(at, vocab)?, path)?;
                        let raw = &edited.raw[at * vocab..(at + 1) * vocab];
                        context.score(sampler, raw, drawn, out)?;
                        drawn
                    }
                };
                out.tokens.push(i64::from(drawn.0));
                Ok(drawn)
            });
            match walked {
                Ok((drafts_accepted, path)) => {
                    out.accepted[row] = drafts_accepted as i32;
                    match (scheduled.work, path) {
                        (Work::Prefill { .. }, _) => keep_chain(out, layout, start, scheduled.len),
                        (Work::Decode, None) => keep_chain(out, layout, start, drafts_accepted + 1),
                        (Work::Decode, Some(path)) => keep_path(out, layout, start, &path),
                    }
                }
                Err(error) => {
                    before.restore(out);
                    accepted.failed.push((row, error));
                }
            }
        }
        let out = accepted.arrays_mut();
        out.token_starts.push(out.tokens.len() as i32);
        out.commit_starts.push(out.commit_rows.len() as i32);
        out.logprobs.resize(out.tokens.len(), f32::NAN);
        out.top_starts.resize(out.tokens.len() + 1, out.top_tokens.len() as i32);
        Ok(accepted)
    }
}

/// A request whose rows are drawn.
struct Context<'a> {
    running: &'a Running,
    first_logit: usize,
    /// Position of the token whose logits come first.
    position: u64,
}

/// What was drawn before a row's turn, to go back to when the row fails.
struct Lengths {
    tokens: usize,
    top_tokens: usize,
}

impl Lengths {
    fn of(out: &AcceptedArrays) -> Self {
        Self {
            tokens: out.tokens.len(),
            top_tokens: out.top_tokens.len(),
        }
    }

    fn restore(&self, out: &mut AcceptedArrays) {
        out.tokens.truncate(self.tokens);
        out.logprobs.truncate(self.tokens);
        out.top_starts.truncate(self.tokens);
        out.top_tokens.truncate(self.top_tokens);
        out.top_logprobs.truncate(self.top_tokens);
    }
}

/// Keeps the first `len` packed tokens of a row that begins at `start`.
fn keep_chain(out: &mut AcceptedArrays, layout: &PlanArrays, start: usize, len: u32) {
    let end = start + len as usize;
    out.commit_rows.extend(start as i64..end as i64);
    out.commit_slots.extend_from_slice(&layout.slots[start..end]);
}

/// Keeps the anchor of a row that begins at `start`, and the nodes of its tree on `path`. Their KV is to be where a chain's would be.
fn keep_path(out: &mut AcceptedArrays, layout: &PlanArrays, start: usize, path: &[u32]) {
    out.commit_slots
        .extend_from_slice(&layout.slots[start..=start + path.len()]);
    out.commit_rows.push(start as i64);
    for (depth, &node) in path.iter().enumerate() {
        let (node, place) = (start + node as usize, start + depth + 1);
        out.commit_rows.push(node as i64);
        if node != place {
            out.move_from.push(layout.slots[node]);
            out.move_to.push(layout.slots[place]);
        }
    }
}

impl<'a> Context<'a> {
    fn new(scheduler: &Scheduler, scheduled: &Scheduled, running: &'a Running, first_logit: i32) -> Result<Self> {
        let committed = scheduler.kv().table().committed(scheduled.launched.key())?;
        Ok(Self {
            running,
            first_logit: first_logit as usize,
            position: match scheduled.work {
                Work::Prefill { .. } => u64::from(committed + scheduled.len - 1),
                Work::Decode => u64::from(committed),
            },
        })
    }

    /// Follows the row's drafts while they are what `take` gives after each: how many are kept and, of a tree, which nodes.
    fn walk(
        &self,
        drafts: &[TokenId],
        tree: Option<&DraftTree>,
        mut take: impl FnMut(&[TokenId], usize) -> Result<TokenId>,
    ) -> Result<(u32, Option<Vec<u32>>)> {
        let edited = self.running.request.params.edited;
        let mut visited = Vec::new();
        let mut visit = |path: &[TokenId], token: usize| {
            let drawn = take(path, token)?;
            if edited {
                visited.push(token as u32);
            }
            Ok(drawn)
        };
        let walked = match tree {
            None => walk_chain(drafts, |token| visit(&drafts[..token], token)).map(|walk| (walk.accepted, None)),
            Some(tree) => walk_tree(tree, |node| visit(&tree.path_tokens(node), node))
                .map(|walk| (walk.path.len() as u32, Some(walk.path))),
        };
        // The row after the last one visited has no token: the walk ends before it.
        if walked.is_err() && !visited.is_empty() {
            let path = visited.split_off(1);
            return Ok((path.len() as u32, tree.is_some().then_some(path)));
        }
        walked
    }

    fn draw(&self, sampler: &mut Sampler, row: &[f32], path: &[TokenId]) -> Result<TokenId> {
        let request = &self.running.request;
        let place = self.position + path.len() as u64 + 1;
        sampler.draw_row(row, &request.params.sampling, &request.history, path, place)
    }

    /// Scores a token by its raw row, if the request asked for that.
    fn score(&self, sampler: &mut Sampler, row: &[f32], drawn: TokenId, out: &mut AcceptedArrays) -> Result<()> {
        let params = &self.running.request.params;
        if !params.scores() {
            return Ok(());
        }
        let alternatives = params.alternatives() as usize;
        let top = if alternatives > 0 {
            top_logprobs(row, alternatives)?
        } else {
            Vec::new()
        };
        let logprob = sampler.logprob(row, drawn)?;
        let top = top.iter().map(|&(token, logprob)| (i64::from(token.0), logprob));
        score(out, logprob, top);
        Ok(())
    }
}

/// Scores of the token that is pushed next. They are rare: what nobody asked for is filled in at the end.
fn score(out: &mut AcceptedArrays, logprob: f32, top: impl Iterator<Item = (i64, f32)>) {
    if !logprob.is_nan() {
        out.logprobs.resize(out.tokens.len(), f32::NAN);
        out.logprobs.push(logprob);
    }
    let start = out.top_tokens.len();
    for (token, logprob) in top {
        out.top_tokens.push(token);
        out.top_logprobs.push(logprob);
    }
    if out.top_tokens.len() > start {
        out.top_starts.resize(out.tokens.len(), start as i32);
        out.top_starts.push(start as i32);
    }
}

/// What a `RowStatus` of `cuda/params.h` means.
fn row_failure(status: i32, columns: usize) -> Error {
    let got = match status {
        1 => "NaN or +inf",
        2 => return Error::EmptyRow { columns },
        3 => "an overflow of logit / temperature",
        _ => "a row of unknown status",
    };
    Error::RowFailed { got }
}
