//! A few threads that wait close by.
//!
//! The products of a small model last some ten microseconds, as long as it takes to start a thread or to wake one. Here helpers
//! wait awake for a moment after each piece of work, then sleep; a piece is handed over in well under a microsecond.
//!
//! ```text
//!   caller   post job --> works itself, part by part --> takes back what nobody began --> waits for who began
//!   helper   awake: sees it --> works, part by part --> done
//!            asleep: is woken, and finds the job taken back if the caller was faster
//! ```
//! The caller never waits for a helper that has not begun, so a helper that gets no processor costs nothing but its help. One that
//! loses its processor in the middle of a part holds the caller up: where that happens the machine has more to do than processors,
//! and the next calls do without helpers for a while ([`Patience`]).
//! There is one team in a process; whoever finds it in use works alone.
//!
//! # Safety
//! A job is a borrowed closure whose lifetime is erased while it is posted. It is called by a helper only between the moment when
//! the helper's state goes from `POSTED` to `BEGUN` and the moment when it goes to `DONE`, and [`run`] does not return, not even by a
//! panic, before every helper's state is `IDLE` or `DONE`: until then the closure and what it borrows are alive.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long a helper stays awake without work.
const AWAKE: Duration = Duration::from_millis(1);
/// How much longer than the caller a helper may take for its share before it counts as held up: a part is some ten microseconds.
const HELD_UP: Duration = Duration::from_micros(200);
/// For how long the caller works alone after that: at first, and at most, when it happens again and again.
const ALONE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(128));
/// More helpers than this help nobody.
const MAX_HELPERS: usize = 63;

const IDLE: u32 = 0;
const POSTED: u32 = 1;
const BEGUN: u32 = 2;
const DONE: u32 = 3;

type Job = *const (dyn Fn() + Sync);

struct Helper {
    state: AtomicU32,
    asleep: AtomicBool,
    failed: AtomicBool,
    job: UnsafeCell<Option<Job>>,
}

// SAFETY: `job` is written by the caller in state IDLE or DONE and read by the helper in state BEGUN; the state's release and acquire
// order the two. The closure is Sync.
unsafe impl Send for Helper {}
// SAFETY: as above.
unsafe impl Sync for Helper {}

impl Helper {
    fn serve(&self) {
        loop {
            let since = Instant::now();
            let mut turns = 0u32;
            while self.state.load(Ordering::Acquire) != POSTED {
                turns = turns.wrapping_add(1);
                if turns.is_multiple_of(64) {
                    if since.elapsed() > AWAKE {
                        self.asleep.store(true, Ordering::SeqCst);
                        while self.state.load(Ordering::SeqCst) != POSTED {
                            std::thread::park();
                        }
                        self.asleep.store(false, Ordering::SeqCst);
                    } else {
                        // Others may want the processor: between our products the caller's own library wakes threads of its own.
                        std::thread::yield_now();
                    }
                }
                std::hint::spin_loop();
            }
            if self
                .state
                .compare_exchange(POSTED, BEGUN, Ordering::AcqRel, Ordering::Acquire)
                .is_err()
            {
                continue;
            }
            // SAFETY: state BEGUN, see the module.
            let job = unsafe { (*self.job.get()).map(|job| &*job) };
            if let Some(job) = job
                && catch_unwind(AssertUnwindSafe(job)).is_err()
            {
                self.failed.store(true, Ordering::Relaxed);
            }
            self.state.store(DONE, Ordering::Release);
        }
    }
}

/// Whether helpers are worth asking. After a call that was held up they are not asked for a while, longer every time it happens
/// again soon; a rare accident on a quiet machine costs a millisecond of help.
struct Patience {
    /// How long the last time alone was, and when it ended or will.
    last: Option<(Duration, Instant)>,
}

impl Patience {
    fn alone(&self, now: Instant) -> bool {
        self.last.is_some_and(|(_, until)| now < until)
    }

    /// A helper was done `waited` after the caller, which had worked for `worked`. Parts are of one size, so a helper that keeps its
    /// processor needs no longer for its last one than the caller for all of its own.
    fn waited(&mut self, now: Instant, worked: Duration, waited: Duration) {
        if waited <= worked + HELD_UP {
            return;
        }
        let pause = match self.last {
            Some((last, until)) if now.saturating_duration_since(until) < 4 * last => (2 * last).min(ALONE.1),
            _ => ALONE.0,
        };
        self.last = Some((pause, now + pause));
    }
}

/// The helpers of one process. A forked child has the memory of its parent's and not the threads.
struct Team {
    process: u32,
    helpers: Vec<(Arc<Helper>, Thread)>,
    patience: Patience,
}

static TEAM: Mutex<Team> = Mutex::new(Team {
    process: 0,
    helpers: Vec::new(),
    patience: Patience { last: None },
});

/// Calls `part(0)` .. `part(parts - 1)`, each once, on up to `threads` threads, the caller's included.
///
/// # Panics
/// When a part panics, after all of them have ended.
pub(super) fn run(threads: usize, parts: usize, part: impl Fn(usize) + Sync) {
    let alone = || (0..parts).for_each(&part);
    let wanted = threads.min(parts).saturating_sub(1).min(MAX_HELPERS);
    if wanted == 0 {
        return alone();
    }
    let mut team = match TEAM.try_lock() {
        Ok(team) => team,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return alone(),
    };
    let begun = Instant::now();
    if team.patience.alone(begun) {
        drop(team);
        return alone();
    }
    let helpers = team.of(wanted);
    let next = AtomicUsize::new(0);
    let job = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= parts {
                break;
            }
            part(index);
        }
    };
    let borrowed: &(dyn Fn() + Sync) = &job;
    // SAFETY: only the lifetime changes; see the module.
    let erased: Job = unsafe { std::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync)>(borrowed) };
    for (helper, thread) in helpers {
        // SAFETY: nobody else posts (the lock), and the helper is IDLE or DONE: the last call waited for that.
        unsafe { *helper.job.get() = Some(erased) };
        helper.state.store(POSTED, Ordering::SeqCst);
        if helper.asleep.load(Ordering::SeqCst) {
            thread.unpark();
        }
    }
    let own = catch_unwind(AssertUnwindSafe(&job));
    let own_end = Instant::now();
    let mut failed = false;
    for (helper, _) in helpers {
        let mut turns = 0u32;
        let taken_back = helper
            .state
            .compare_exchange(POSTED, IDLE, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        while !taken_back && helper.state.load(Ordering::Acquire) != DONE {
            turns += 1;
            if turns > 2000 {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        failed |= helper.failed.swap(false, Ordering::Relaxed);
    }
    let end = Instant::now();
    team.patience.waited(end, own_end - begun, end - own_end);
    drop(team);
    if let Err(panic) = own {
        resume_unwind(panic);
    }
    assert!(!failed, "a helper thread panicked");
}

/// Calls `work` with every one of `items`, on up to `threads` threads, the caller's included.
///
/// # Panics
/// As [`run`].
pub(super) fn each<T: Send>(threads: usize, items: Vec<T>, work: impl Fn(T) + Sync) {
    if threads < 2 {
        return items.into_iter().for_each(work);
    }
    let items: Vec<_> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    run(threads, items.len(), |part| {
        let item = items[part].lock().map_or(None, |mut item| item.take());
        item.into_iter().for_each(&work);
    });
}

impl Team {
    /// `count` helpers; fewer when the system gives no more threads.
    fn of(&mut self, count: usize) -> &[(Arc<Helper>, Thread)] {
        let process = std::process::id();
        if self.process != process {
            self.helpers.clear();
            self.process = process;
        }
        while self.helpers.len() < count {
            let helper = Arc::new(Helper {
                state: AtomicU32::new(IDLE),
                asleep: AtomicBool::new(false),
                failed: AtomicBool::new(false),
                job: UnsafeCell::new(None),
            });
            let serving = Arc::clone(&helper);
            let name = format!("dflash-host-{}", self.helpers.len() + 1);
            let Ok(thread) = std::thread::Builder::new().name(name).spawn(move || serving.serve()) else {
                break;
            };
            self.helpers.push((helper, thread.thread().clone()));
        }
        &self.helpers[..count.min(self.helpers.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            for parts in [0, 1, 2, 7, 100] {
                let runs: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    run(threads, parts, |i| {
                        runs[i].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 50));
            }
        }
    }

    #[test]
    fn who_was_held_up_works_alone_for_a_while_and_longer_each_time_it_happens_again() {
        let (mut patience, mut now) = (Patience { last: None }, Instant::now());
        let (work, long) = (Duration::from_micros(20), HELD_UP * 2);
        patience.waited(now, work, HELD_UP);
        assert!(!patience.alone(now), "no longer than a helper may take");
        patience.waited(now, long, long);
        assert!(!patience.alone(now), "parts that take as long");
        for pause in [1, 2, 4, 8, 16, 32, 64, 128, 128].map(Duration::from_millis) {
            patience.waited(now, work, long);
            assert!(
                patience.alone(now + pause - work) && !patience.alone(now + pause),
                "{pause:?}"
            );
            now += pause + work;
        }
        now += ALONE.1 * 5;
        patience.waited(now, work, long);
        assert!(!patience.alone(now + ALONE.0), "what was long ago is forgotten");
    }

    #[test]
    fn helpers_that_fell_asleep_are_woken() {
        let count = AtomicUsize::new(0);
        for _ in 0..5 {
            std::thread::sleep(AWAKE * 3);
            run(3, 64, |_| {
                count.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(50));
            });
        }
        assert_eq!(count.load(Ordering::Relaxed), 5 * 64);
    }

    #[test]
    fn calls_from_many_threads_and_from_within_a_part_all_end() {
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        run(2, 5, |_| {
                            run(2, 3, |_| {
                                count.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(count.load(Ordering::Relaxed), 4 * 100 * 15);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_team_usable() {
        for bad in [0, 31] {
            let caught = catch_unwind(|| {
                run(2, 32, |i| {
                    std::thread::sleep(Duration::from_micros(20));
                    assert!(i != bad, "part {i}");
                });
            });
            assert!(caught.is_err());
            let count = AtomicUsize::new(0);
            run(2, 32, |_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.load(Ordering::Relaxed), 32);
        }
    }
}
