//! The order of stages: add, plan (`launch`), accept, commit. The only folder that knows it.
//!
//! ```text
//!   add ──> plan ──────────> [draft] ──> [target] ──> accept ──> commit ──> events
//!           launch: pages,                            draw and   resolve: committed += kept,
//!           layout, bounds                            walk       stops, pages, statistics
//! ```
//! The invariant: *committed = anchor + accepted drafts; the bonus token becomes the next anchor and has no KV yet.*
//! A request with `L` known tokens that is past its prompt has `L - 1` of them committed.
//!
//! Steps are resolved in the order they were launched. With `depth` 1 the next step is planned before the last one is
//! resolved: the plan then holds bounds where only the device knows the truth, and a result for a request that has
//! ended, been retracted or called off meanwhile changes nothing.
//!
//! A failure belongs to one request: its rows give no token, it ends with an error that names it, the others go on.

mod accept;
mod commit;
mod device;
mod launch;
mod lookup;
mod sampling;
mod step_plan;
mod values;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

pub use device::{DeviceInputs, DeviceOutputs};
pub use lookup::LookedUp;
pub use sampling::DeviceSampling;
pub use step_plan::{Outline, StepPlan};
pub use values::{Accepted, AcceptedArrays, DrawnRows, EditedRows, EventArrays, Events, PlanArrays, SamplingArrays};

use crate::draft::LookupRates;
use crate::error::{Error, Result};
use crate::schedule::{Config, Ledger, Params, RecordHandle, Request, Scheduled, Scheduler, Vocabulary, check_tokens};
use crate::stats::Stats;
use crate::types::{RequestId, TokenId};
use crate::verify::Sampler;
use values::Shared;

/// A launched step that is not resolved.
#[derive(Debug)]
struct Flight {
    step: u64,
    rows: Vec<Scheduled>,
}

/// Continuous batching with speculative blocks over one KV pool.
#[derive(Debug)]
pub struct Engine {
    scheduler: Scheduler,
    in_flight: VecDeque<Flight>,
    spare_rows: Vec<Vec<Scheduled>>,
    shared: Arc<Shared>,
    sampler: Sampler,
    drafts: Vec<TokenId>,
    stats: Stats,
    lookups: LookupRates,
    vocabulary: Option<Arc<Vocabulary>>,
    /// With the names of tokens that are no text.
    special: Option<Arc<Vocabulary>>,
    ledger: Arc<Mutex<Ledger>>,
    eos: Vec<TokenId>,
    next_request: u64,
    next_step: u64,
}

/// How many requests and pages are where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests waiting.
    pub waiting: usize,
    /// Requests running.
    pub running: usize,
    /// Steps launched and not resolved.
    pub in_flight: usize,
    /// Pages nobody holds.
    pub free_pages: usize,
    /// Pages the prefix cache holds.
    pub cached_pages: usize,
    /// Cached pages no request holds.
    pub reclaimable_pages: usize,
    /// Pages in all.
    pub total_pages: usize,
    /// Copies of the target's state that cached pages keep, or a step under way is about to.
    pub state_checkpoints: usize,
    /// Times a running request had to give way.
    pub retractions: u64,
}

impl Engine {
    /// An idle engine. `vocabulary` is needed for stop strings only.
    ///
    /// # Errors
    /// `InvalidArgument` naming the size that is out of range; `Length` for a vocabulary of the wrong size.
    pub fn new(config: Config, vocabulary: Option<Vocabulary>) -> Result<Self> {
        if let Some(vocabulary) = vocabulary
            .as_ref()
            .filter(|vocabulary| vocabulary.len() != config.vocab_size)
        {
            return Err(Error::Length {
                name: "vocabulary",
                got: vocabulary.len(),
                expected: config.vocab_size,
            });
        }
        Ok(Self {
            eos: config.eos_ids.clone(),
            scheduler: Scheduler::new(config)?,
            in_flight: VecDeque::new(),
            spare_rows: Vec::new(),
            shared: Arc::default(),
            sampler: Sampler::default(),
            drafts: Vec::new(),
            stats: Stats::new(),
            lookups: LookupRates::new(),
            vocabulary: vocabulary.map(Arc::new),
            special: None,
            ledger: Arc::default(),
            next_request: 0,
            next_step: 0,
        })
    }

    /// The bytes of every token, those that are no text by their names: for requests that do not skip these.
    ///
    /// # Errors
    /// `Length` for a vocabulary of the wrong size.
    pub fn with_special_tokens(mut self, vocabulary: Vocabulary) -> Result<Self> {
        if vocabulary.len() != self.scheduler.config().vocab_size {
            return Err(Error::Length {
                name: "special_vocabulary",
                got: vocabulary.len(),
                expected: self.scheduler.config().vocab_size,
            });
        }
        self.special = Some(Arc::new(vocabulary));
        Ok(self)
    }

    /// The sizes.
    pub fn config(&self) -> &Config {
        self.scheduler.config()
    }

    /// Requests and pages, for looking at.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Acceptance over all requests.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Where requests and pages are.
    pub fn counts(&mut self) -> Result<Counts> {
        self.call_off_dropped()?;
        self.scheduler.kv_mut().available(); // collects what dropped reservations gave back
        let kv = self.scheduler.kv();
        Ok(Counts {
            waiting: self.scheduler.waiting().len(),
            running: self.scheduler.num_running(),
            in_flight: self.in_flight.len(),
            free_pages: kv.pool().num_free(),
            cached_pages: kv.cache().len(),
            reclaimable_pages: kv.cache().reclaimable(),
            total_pages: kv.pool().num_pages(),
            state_checkpoints: {
                let (total, free) = kv.cache().checkpoints();
                total - free
            },
            retractions: self.scheduler.retractions(),
        })
    }

    /// Whether any request waits or runs.
    pub fn has_work(&self) -> bool {
        self.scheduler.num_running() > 0 || self.scheduler.waiting().len() > 0
    }

    /// Queues a request.
    ///
    /// # Errors
    /// `InvalidArgument` naming what is wrong with the prompt or the parameters; `OutOfPages` when the pool could not
    /// hold its longest output even if it were empty.
    pub fn add(&mut self, prompt: Vec<TokenId>, mut params: Params) -> Result<RequestId> {
        let config = self.scheduler.config();
        let refuse = |name, got: String, expected: String| Err(Error::InvalidArgument { name, got, expected });
        if prompt.is_empty() || prompt.len() >= config.max_context {
            let expected = format!("1..{} (max_context less one)", config.max_context - 1);
            return refuse("prompt", format!("{} tokens", prompt.len()), expected);
        }
        check_tokens("prompt", &prompt, config.vocab_size)?;
        params.validate(config.vocab_size, self.vocabulary.is_some())?;
        if !params.skip_special_tokens && self.vocabulary.is_some() && self.special.is_none() {
            let expected = "True, or an engine that knows their names".into();
            return refuse("skip_special_tokens", "False".into(), expected);
        }
        params.settle(prompt.len(), &self.eos);
        let max_total = (prompt.len() + params.max_tokens as usize).min(config.max_context) as u32;
        let id = RequestId(self.next_request);
        let vocabulary = if params.skip_special_tokens {
            self.vocabulary.as_ref()
        } else {
            self.special.as_ref()
        };
        let request = Request::new(id, prompt, params, max_total, vocabulary, &self.ledger);
        self.scheduler.enqueue(request)?;
        self.next_request += 1;
        Ok(id)
    }

    /// What an unfinished request is given, to be looked at while it runs and afterwards; `None` when there is none of that number.
    pub fn record(&self, id: RequestId) -> Option<RecordHandle> {
        // The newest request is the likeliest to be asked for.
        let waiting = self.scheduler.waiting().rev();
        let running = self.scheduler.running().map(|running| &running.request);
        let mut all = waiting.chain(running);
        all.find(|request| request.id == id)
            .map(|request| request.record.clone())
    }

    /// Of the `most` oldest requests: the temperatures of those that draft, how many do not, and how many tokens they have together.
    pub fn drafting(&self, most: usize) -> (Vec<f32>, usize, usize) {
        let running = self.scheduler.running().map(|running| &running.request);
        let oldest = running.chain(self.scheduler.waiting()).take(most);
        let (mut others, mut context) = (0, 0);
        let mut temperatures = Vec::with_capacity(self.scheduler.num_running());
        for request in oldest {
            context += request.tokens.len();
            if request.params.drafts() {
                temperatures.push(request.params.sampling.temperature);
            } else {
                others += 1;
            }
        }
        (temperatures, others, context)
    }

    /// While the drafter rests, steps owe it nothing ([`StepPlan::drafts`] is false): its context ends where it began to rest, and grows again from
    /// where it is woken. It may draft all the same, from what it has.
    pub fn let_drafter_rest(&mut self, rests: bool) {
        self.scheduler.let_drafter_rest(rests);
    }

    /// Whether any request that a launched step is for is still there.
    pub fn is_wanted(&self, plan: &StepPlan) -> bool {
        let flight = self.in_flight.iter().find(|flight| flight.step == plan.step());
        flight.is_some_and(|flight| flight.rows.iter().any(|row| self.scheduler.tenant(row).is_some()))
    }

    /// Ends a request, waiting, running or in flight; there is no event for it. `false`: it had ended already.
    ///
    /// # Errors
    /// None in a consistent state.
    pub fn abort(&mut self, id: RequestId) -> Result<bool> {
        self.scheduler.remove(id)
    }

    /// Calls a step off: its requests go on from their last resolved token. Steps launched after it lose the rows they
    /// share with it. `false`: it was committed or called off already, nothing changed; an interrupt cannot know.
    ///
    /// # Errors
    /// None in a consistent state.
    pub fn cancel(&mut self, plan: &mut StepPlan) -> Result<bool> {
        let ticket = plan.redeem();
        let open = ticket.is_some();
        drop(ticket);
        self.call_off_dropped()?;
        Ok(open)
    }

    /// Calls off every unresolved step, as after an interrupt.
    ///
    /// # Errors
    /// None in a consistent state.
    pub fn cancel_all(&mut self) -> Result<()> {
        self.call_off_dropped()?;
        while let Some(flight) = self.in_flight.pop_front() {
            self.call_off(flight)?;
        }
        Ok(())
    }

    /// Frees up to `count` cached pages that no request holds; returns how many.
    ///
    /// # Errors
    /// None in a consistent state.
    pub fn evict(&mut self, count: usize) -> Result<usize> {
        self.scheduler.kv_mut().evict(count)
    }

    fn next_to_resolve(&self, plan: &StepPlan) -> Result<()> {
        let Some(front) = self.in_flight.front().filter(|_| plan.is_open()) else {
            return Err(closed(plan.step()));
        };
        if front.step == plan.step() {
            return Ok(());
        }
        if self.in_flight.iter().all(|flight| flight.step != plan.step()) {
            return Err(closed(plan.step()));
        }
        let problem = format!("step {} comes first: commit or cancel it", front.step);
        Err(Error::OutOfTurn {
            step: plan.step(),
            problem,
        })
    }

    fn call_off_dropped(&mut self) -> Result<()> {
        for step in self.shared.dropped() {
            // Plans of steps that cancel_all has called off are dropped later; there is nothing left to do for them.
            if let Some(at) = self.in_flight.iter().position(|flight| flight.step == step)
                && let Some(flight) = self.in_flight.remove(at)
            {
                self.call_off(flight)?;
            }
        }
        Ok(())
    }

    fn call_off(&mut self, mut flight: Flight) -> Result<()> {
        for row in flight.rows.drain(..) {
            self.scheduler.call_off(row)?;
        }
        self.spare_rows.push(flight.rows);
        Ok(())
    }
}

fn closed(step: u64) -> Error {
    Error::OutOfTurn {
        step,
        problem: "it is committed or called off already".into(),
    }
}
