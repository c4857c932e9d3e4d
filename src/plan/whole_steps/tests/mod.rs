//! Which width is chosen, in worlds whose times and acceptance are known.

use super::*;
use proptest::prelude::*;

mod looks;

/// A device: what a step takes, and how likely the draft at each position is.
struct World {
    fixed: f64,
    row: f64,
    drafting: f64,
    likely: f64,
    noise: u64,
}

impl World {
    fn time(&self, requests: usize, width: usize) -> f64 {
        let drafting = if width > 1 { self.drafting } else { 0.0 };
        self.fixed + drafting + self.row * (requests * width) as f64
    }

    fn tokens(&self, width: usize) -> f64 {
        (0..width).map(|n| self.likely.powi(n as i32)).sum()
    }

    fn goodput(&self, requests: usize, width: usize) -> f64 {
        self.tokens(width) / self.time(requests, width)
    }

    fn random(&mut self) -> f64 {
        self.noise = self
            .noise
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.noise >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Takes `steps` steps and tells tokens per request, seconds and the widths. Times are `noise` longer now and then.
    fn run(
        &mut self,
        planner: &mut WidthPlanner,
        steps: usize,
        size: impl Fn(usize) -> usize,
        noise: f64,
    ) -> (f64, f64, Vec<usize>) {
        let (mut tokens, mut seconds, mut widths) = (0.0, 0.0, Vec::new());
        let mut last = 0;
        for step in 0..steps {
            let requests = size(step);
            let width = planner.choose(requests, 0, &[]);
            let mut time = self.time(requests, width);
            if self.random() < 0.2 {
                time *= 1.0 + noise * self.random();
            }
            // Only where the step before had the same width is the time a clean one.
            if last == width {
                planner.observe(requests, 0, width, time);
            }
            let accepted: Vec<u32> = (0..requests)
                .map(|_| (1..width).take_while(|_| self.random() < self.likely).count() as u32)
                .collect();
            planner.record(width, &accepted, &[]).unwrap();
            tokens += self.tokens(width);
            seconds += time;
            widths.push(width);
            last = width;
        }
        (tokens, seconds, widths)
    }
}

const WIDTHS: [usize; 5] = [1, 2, 4, 8, 16];

fn planner() -> WidthPlanner {
    WidthPlanner::new(&WIDTHS).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_width_would_have_been_much_faster(
        row in 0.001f64..1.0,
        drafting in 0.0f64..1.0,
        likely in 0.0f64..0.98,
        requests in 1usize..64,
        noise in 0u64..1000,
    ) {
        let mut world = World { fixed: 1.0, row, drafting, likely, noise };
        let mut planner = planner();
        world.run(&mut planner, 300, |_| requests, 0.0);
        let (tokens, seconds, _) = world.run(&mut planner, 3000, |_| requests, 0.0);
        let best = WIDTHS.iter().map(|&w| world.goodput(requests, w)).fold(0.0, f64::max);
        // What is not WIDER times as good is not changed to; looking at widths costs a little more.
        prop_assert!(tokens / seconds >= 0.87 * best, "{} of {}", tokens / seconds, best);
    }

    #[test]
    fn batches_that_change_and_times_that_scatter_do_not_make_it_much_slower_than_plain_steps(
        row in 0.001f64..1.0,
        drafting in 0.0f64..1.0,
        likely in 0.0f64..0.98,
        low in 1usize..40,
        span in 1usize..20,
        noise in 0u64..1000,
    ) {
        let mut world = World { fixed: 1.0, row, drafting, likely, noise };
        let mut planner = planner();
        let size = |step: usize| low + step / 7 % span;
        let (tokens, seconds, _) = world.run(&mut planner, 6000, size, 0.5);
        // The same steps, plain, and disturbed as often.
        let plain: f64 = (0..6000).map(|step| world.time(size(step), 1)).sum::<f64>() * 1.05;
        prop_assert!(tokens / seconds >= 0.85 * 6000.0 / plain, "{} of {}", tokens / seconds, 6000.0 / plain);
    }

    #[test]
    fn sizes_of_batches_rise_without_gaps(requests in 1usize..5000) {
        let (size, next) = (size_of(requests), size_of(requests + 1));
        prop_assert!(next == size || next == size + 1);
        prop_assert_eq!(next > size, most_of(size) == requests as f64);
    }
}

fn world(row: f64, likely: f64) -> World {
    World {
        fixed: 1.0,
        row,
        drafting: 0.2,
        likely,
        noise: 7,
    }
}

#[test]
fn whole_blocks_come_first_and_every_width_is_tried_where_nothing_is_known() {
    let (_, _, widths) = world(0.001, 0.9).run(&mut planner(), 24, |_| 1, 0.0);
    for (look, width) in [16, 8, 4, 2, 1].iter().enumerate() {
        assert!(widths[4 * look..4 * look + 4].iter().all(|w| w == width), "{widths:?}");
    }
    assert_eq!(widths[20..], [16; 4]);
}

#[test]
fn another_size_is_judged_by_its_neighbours_and_little_is_tried_again() {
    let (mut world, mut planner) = (world(0.5, 0.5), planner());
    world.run(&mut planner, 100, |_| 24, 0.0);
    let (_, _, widths) = world.run(&mut planner, 100, |_| 20, 0.0);
    assert!(widths.iter().all(|&w| w <= 2), "{widths:?}");
}

#[test]
fn what_is_far_too_slow_is_looked_at_rarely_and_still_now_and_then() {
    let (mut world, mut planner) = (world(0.2, 0.0), planner());
    world.run(&mut planner, 100, |_| 16, 0.0);
    let (_, _, widths) = world.run(&mut planner, 20_000, |_| 16, 0.0);
    let count = |width| widths.iter().filter(|&&w| w == width).count();
    assert!((1..60).contains(&count(16)), "{}", count(16));
    assert!(count(1) > 19_000, "{}", count(1));
}

#[test]
fn drafts_that_get_better_are_noticed() {
    let mut planner = planner();
    world(0.01, 0.0).run(&mut planner, 2000, |_| 8, 0.0);
    assert_eq!(planner.choose(8, 0, &[]), 1);
    world(0.01, 0.95).run(&mut planner, 2000, |_| 8, 0.0);
    let (_, _, widths) = world(0.01, 0.95).run(&mut planner, 100, |_| 8, 0.0);
    assert!(widths.iter().filter(|&&w| w >= 8).count() > 80, "{widths:?}");
}

#[test]
fn steps_that_get_dearer_are_noticed() {
    let mut planner = planner();
    let (_, _, widths) = world(0.001, 0.8).run(&mut planner, 300, |_| 8, 0.0);
    assert_eq!(widths[299], 16);
    let (_, _, widths) = world(1.0, 0.8).run(&mut planner, 1500, |_| 8, 0.0);
    assert!(widths[1400..].iter().filter(|&&w| w <= 2).count() > 80, "{widths:?}");
}

/// Tokens per second of the planner and of plain steps, at one moment's pace after the other.
fn under(pace: impl Fn(usize) -> f64, world: &mut World, requests: usize, steps: usize) -> (f64, f64) {
    let (mut planner, mut last) = (planner(), 0);
    let (mut tokens, mut seconds, mut plain) = (0.0, 0.0, 0.0);
    for step in 0..steps {
        let width = planner.choose(requests, 0, &[]);
        let time = world.time(requests, width) * pace(step);
        if last == width {
            planner.observe(requests, 0, width, time);
        }
        let accepted: Vec<u32> = (0..requests)
            .map(|_| (1..width).take_while(|_| world.random() < world.likely).count() as u32)
            .collect();
        planner.record(width, &accepted, &[]).unwrap();
        tokens += world.tokens(width);
        seconds += time;
        plain += world.time(requests, 1) * pace(step);
        last = width;
    }
    (tokens / seconds, steps as f64 / plain)
}

#[test]
fn a_machine_that_slows_down_and_contexts_that_grow_do_not_look_like_one_width() {
    // Drafting is worth little here, and does not pay.
    let slower = |step: usize| 1.0 + step as f64 / 2000.0;
    let waves = |step: usize| 1.5 + (step as f64 / 400.0).sin() / 2.0;
    // Bad moments of ten steps, which a look can fall into.
    let moments = |step: usize| if step / 10 % 7 == 3 { 2.5 } else { 1.0 };
    for (name, pace) in [
        ("slower", &slower as &dyn Fn(usize) -> f64),
        ("waves", &waves),
        ("moments", &moments),
    ] {
        for requests in [1, 3, 16] {
            let (own, plain) = under(pace, &mut world(0.1, 0.3), requests, 8000);
            assert!(own > 0.94 * plain, "{name}, {requests}: {own} of {plain}");
        }
    }
}

/// Steps of one request with this context, and how likely its drafts are: the widths, and tokens and seconds together.
fn alone(
    planner: &mut WidthPlanner,
    world: &mut World,
    steps: usize,
    context: impl Fn(usize) -> usize,
    temperature: f32,
) -> (Vec<usize>, f64) {
    let (mut widths, mut last, mut tokens, mut seconds) = (Vec::new(), 0, 0.0, 0.0);
    for step in 0..steps {
        let context = context(step);
        let width = planner.choose(1, context, &[temperature]);
        // Every row looks at all of the context.
        let time = world.time(1, width) * (1.0 + (context * width) as f64 / 4096.0);
        if last == width {
            planner.observe(1, context, width, time);
        }
        let accepted = (1..width).take_while(|_| world.random() < world.likely).count();
        planner.record(width, &[accepted as u32], &[temperature]).unwrap();
        tokens += 1.0 + accepted as f64;
        seconds += time;
        widths.push(width);
        last = width;
    }
    (widths, tokens / seconds)
}

#[test]
fn texts_too_long_for_drafts_to_pay_decode_plainly_while_short_ones_go_on_drafting() {
    let (mut world, mut planner) = (world(0.001, 0.6), planner());
    let share = |widths: &[usize], plain: bool| {
        widths.iter().filter(|&&w| (w == 1) == plain).count() as f64 / widths.len() as f64
    };
    // Short texts and long ones in turn, which grow a token a step.
    for _ in 0..2 {
        let (widths, _) = alone(&mut planner, &mut world, 400, |step| step, 0.0);
        assert!(share(&widths[100..], false) > 0.8, "{widths:?}");
        let (widths, _) = alone(&mut planner, &mut world, 400, |step| 20_000 + step, 0.0);
        assert!(share(&widths[100..], true) > 0.8, "{widths:?}");
    }
}

#[test]
fn requests_that_sample_are_not_judged_by_greedy_ones() {
    let mut planner = planner();
    let (widths, _) = alone(&mut planner, &mut world(0.02, 0.95), 400, |_| 0, 0.0);
    assert!(widths[300..].iter().filter(|&&w| w >= 8).count() > 80, "{widths:?}");
    let (widths, _) = alone(&mut planner, &mut world(0.1, 0.1), 400, |_| 0, 1.3);
    assert!(widths[60..].iter().filter(|&&w| w == 1).count() > 300, "{widths:?}");
    // And the other way around; the batch is judged by its mixture.
    assert!(planner.acceptance(0.0, 0) > 0.9 && planner.acceptance(1.3, 0) < 0.2);
    let tokens = |temperatures: &[f32]| planner.tokens(temperatures)[4];
    let (greedy, sampled, both) = (tokens(&[0.0]), tokens(&[1.3]), tokens(&[0.0, 1.3, 1.0, 0.0]));
    assert!(
        (both - (greedy + sampled) / 2.0).abs() < 1e-9,
        "{greedy} {sampled} {both}"
    );
}

#[test]
fn lengths_of_contexts_are_one_up_to_511_tokens_a_request_and_one_to_each_doubling() {
    let lengths = [
        (1, 0),
        (1, 511),
        (1, 512),
        (1, 1023),
        (1, 1024),
        (4, 2047),
        (4, 2048),
        (0, 9),
        (1, 1 << 20),
    ];
    assert_eq!(
        lengths.map(|(requests, context)| length_of(requests, context)),
        [0, 0, 1, 1, 2, 0, 1, 0, 12]
    );
}

#[test]
fn times_of_contexts_of_another_length_are_their_own_and_bound_longer_ones_from_below() {
    let mut planner = planner();
    planner.observe(2, 1000, 1, 0.5);
    planner.observe(2, 3000, 1, 0.75);
    let times = |context| planner.times(2, context)[0];
    assert_eq!(
        [times(0), times(1100), times(2900), times(9000)],
        [Some(0.5), None, Some(0.75), None]
    );
    let least = |context| planner.at_least(2, context, 4);
    assert_eq!(
        [least(0), least(1100), least(2900), least(9000)],
        [0.5, 0.5, 0.75, 0.75]
    );
}

#[test]
fn where_nothing_can_be_timed_whole_blocks_are_taken_most_of_the_time() {
    let mut planner = planner();
    let widths: Vec<usize> = (0..1000).map(|_| planner.choose(3, 0, &[])).collect();
    assert!(widths.iter().filter(|&&w| w == 16).count() > 900);
    assert_eq!(planner.times(3, 0), [None; 5]);
}

#[test]
fn where_nothing_can_be_timed_every_width_is_looked_at_again_after_as_many_steps() {
    let mut planner = planner();
    assert!(
        (0..9).all(|_| planner.choose(0, 0, &[]) == 16),
        "a step of nobody is none"
    );
    let widths: Vec<usize> = (0..2 * FRESH as usize + 40)
        .map(|_| planner.choose(3, 0, &[]))
        .collect();
    for (step, &width) in widths.iter().enumerate() {
        let look = step % FRESH as usize;
        let expected = if look < 20 { [16, 8, 4, 2, 1][look / 4] } else { 16 };
        assert_eq!(width, expected, "{step}");
    }
}

#[test]
fn sizes_of_batches_are_single_ones_up_to_32_and_sixteen_to_each_doubling() {
    assert_eq!(
        [1, 2, 32, 33, 34, 35, 64, 65, 68, 69, 128].map(size_of),
        [0, 1, 31, 32, 32, 33, 47, 48, 48, 49, 63]
    );
    assert_eq!(size_of(0), 0);
    let mut requests = 0;
    for size in 0..32 + 16 * 6 {
        while size_of(requests + 1) == size {
            requests += 1;
        }
        assert_eq!((size_of(requests + 1), most_of(size)), (size + 1, requests as f64));
    }
    assert_eq!(requests, 2048);
}

#[test]
fn a_typical_time_is_the_lower_quartile_of_the_latest() {
    let mut times = Times::default();
    let all: Vec<f64> = (0..50).map(|at| f64::from(at * 37 % 50)).collect();
    for (at, &time) in all.iter().enumerate() {
        times.add(time, at as u64);
        let mut latest = all[(at + 1).saturating_sub(KEPT)..=at].to_vec();
        latest.sort_by(f64::total_cmp);
        assert_eq!(
            (times.typical, times.seen),
            (Some(latest[(latest.len() - 1) / 4]), at as u64)
        );
    }
    times.look(90);
    assert_eq!((times.seen, times.tried), (90, None));
    let mut untimed = Times::default();
    untimed.look(90);
    assert_eq!((untimed.seen, untimed.tried), (0, Some(90)));
}

/// A planner of two widths that knows these times of steps of four requests, and uses the first of them.
fn knowing(widths: [usize; 2], times: [Option<f64>; 2]) -> WidthPlanner {
    let mut planner = WidthPlanner::new(&widths).unwrap();
    planner.current = 0;
    let size = planner.size(4, 0);
    size.steps = 1000;
    for (known, time) in size.times.iter_mut().zip(times) {
        (known.typical, known.seen) = (time, 1000);
    }
    planner
}

#[test]
fn a_width_is_left_for_a_wider_one_or_a_narrower_one_only_where_that_is_better_by_its_margin() {
    // Nothing is known of drafts: a width of 2 has 1.7 tokens.
    let wider = |better: f64| knowing([1, 2], [Some(1.0), Some(1.7 / better)]).choose(4, 0, &[]);
    assert_eq!((wider(WIDER - 0.005), wider(WIDER + 0.005)), (1, 2));
    let narrower = |better: f64| {
        let mut planner = knowing([1, 2], [Some(1.0), Some(1.7 * better)]);
        planner.current = 1;
        planner.choose(4, 0, &[])
    };
    assert_eq!((narrower(NARROWER - 0.005), narrower(NARROWER + 0.005)), (2, 1));
}

#[test]
fn a_width_that_was_never_tried_is_tried_only_where_it_looks_better_by_a_margin_at_best() {
    let with = |chance: f64| {
        let mut planner = knowing([1, 2], [Some(1.0), None]);
        planner.acceptance[0] = Acceptance::seen(1e9, 1e9 * chance);
        planner.choose(4, 0, &[])
    };
    // At best it takes no longer than a plain step.
    assert_eq!((with(HOPE - 1.005), with(HOPE - 0.995)), (1, 2));
}

#[test]
fn a_step_takes_at_least_what_one_no_wider_takes_for_its_share_of_the_requests() {
    let planner = knowing([1, 2], [Some(1.0), Some(3.0)]);
    let least = |requests, index| planner.at_least(requests, 0, index);
    assert_eq!([least(2, 0), least(4, 0), least(8, 0)], [0.5, 1.0, 1.0]);
    assert_eq!([least(2, 1), least(4, 1), least(8, 1)], [1.5, 3.0, 3.0]);
    assert_eq!(knowing([1, 2], [None, Some(3.0)]).at_least(4, 0, 0), 0.0);
}

#[test]
fn the_pace_follows_the_times_of_the_width_in_use_once_enough_are_known() {
    let mut planner = WidthPlanner::new(&[1, 2]).unwrap();
    planner.current = 0;
    for _ in 0..KEPT {
        planner.observe(4, 0, 1, 3.0);
        planner.observe(4, 0, 2, 5.0);
        assert_eq!(planner.pace, 1.0);
    }
    planner.observe(4, 0, 1, 3.0);
    planner.observe(4, 0, 2, 9.0);
    assert_eq!(planner.pace, 1.0);
    planner.observe(4, 0, 1, 3.1);
    assert_eq!(planner.pace, PACE_UP);
    assert_eq!(planner.times(4, 0), [Some(3.0 * PACE_UP), Some(5.0 * PACE_UP)]);
    planner.observe(4, 0, 1, 2.9);
    assert_eq!(planner.pace, PACE_UP * PACE_DOWN);
    // It is kept as a share of the pace.
    planner.pace = 2.0;
    for _ in 0..KEPT {
        planner.observe(9, 0, 2, 5.0);
    }
    assert_eq!((planner.times(9, 0), planner.pace), (vec![None, Some(5.0)], 2.0));
    planner.observe(4, 0, 1, 4.0);
    assert_eq!(planner.pace, 2.0 * PACE_DOWN, "6 would be typical now");
    assert_eq!(planner.times(1, 0), [None; 2]);
    for nothing in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        planner.observe(1, 0, 1, nothing);
        assert_eq!(planner.times(1, 0), [None; 2], "{nothing}");
    }
}

#[test]
fn its_widths_and_what_it_learnt_of_drafts_can_be_asked() {
    let mut planner = planner();
    assert_eq!(planner.widths(), WIDTHS);
    assert_eq!((planner.acceptance(0.0, 0), planner.acceptance(0.0, 14)), (0.7, 0.7));
    planner.record(2, &[1], &[]).unwrap();
    assert!((planner.acceptance(0.0, 0) - 3.8 / 5.0).abs() < 1e-12);
}

#[test]
fn one_width_is_no_choice() {
    let mut planner = WidthPlanner::new(&[8]).unwrap();
    planner.observe(4, 0, 8, 0.1);
    planner.observe(4, 0, 5, 0.1);
    planner.observe(4, 0, 8, f64::NAN);
    assert_eq!((planner.choose(4, 0, &[]), planner.times(4, 0)), (8, vec![Some(0.1)]));
}

/// Steps of a plain pass, a chain of 7 drafts and a tree of 16, whose paths are accepted with these chances.
fn widths_with_a_tree(chain: f64, tree: f64, row: f64) -> Vec<usize> {
    let mut planner = WidthPlanner::with_tree(&[1, 8, 17], 7).unwrap();
    let mut world = World {
        fixed: 1.0,
        row,
        drafting: 0.1,
        likely: 0.0,
        noise: 7,
    };
    let (mut widths, mut last) = (Vec::new(), 0);
    for _ in 0..4000 {
        let width = planner.choose(1, 0, &[]);
        if last == width {
            planner.observe(1, 0, width, world.time(1, width));
        }
        world.likely = if width == 17 { tree } else { chain };
        let accepted = (1..width.min(8)).take_while(|_| world.random() < world.likely).count();
        planner.record(width, &[accepted as u32], &[]).unwrap();
        widths.push(width);
        last = width;
    }
    widths.split_off(2000)
}

#[test]
fn a_tree_is_taken_where_its_paths_are_worth_its_rows() {
    let share = |widths: &[usize], width| widths.iter().filter(|&&w| w == width).count() as f64 / widths.len() as f64;
    // 2.2 tokens a pass against 3.1, for a step of 1.15 against 1.24.
    assert!(share(&widths_with_a_tree(0.55, 0.7, 0.008), 17) > 0.9);
    // Rows as dear as passes: 2.2 tokens in 1.9, 3.1 in 2.8.
    assert!(share(&widths_with_a_tree(0.55, 0.7, 0.1), 8) > 0.8);
    // Nothing is accepted.
    assert!(share(&widths_with_a_tree(0.0, 0.0, 0.05), 1) > 0.9);
}

#[test]
fn a_tree_learns_apart_and_is_taken_for_a_chain_until_then() {
    let mut planner = WidthPlanner::with_tree(&[1, 4, 9], 3).unwrap();
    let at = |planner: &WidthPlanner| planner.tokens(&[0.0]);
    let as_the_chain = |planner: &WidthPlanner| (at(planner)[1] - at(planner)[2]).abs() < 1e-12;
    assert!(as_the_chain(&planner), "as deep as the chain is long");
    planner.record(4, &[0], &[]).unwrap();
    assert!(as_the_chain(&planner), "what the chain learns is believed of the tree");
    let chain = at(&planner)[1];
    planner.record(9, &[3], &[]).unwrap();
    let after = at(&planner);
    assert!(
        (after[1] - chain).abs() < 1e-12 && after[2] > chain,
        "{after:?} {chain}"
    );
    assert!(planner.record(9, &[4], &[]).is_err(), "deeper than it is");
    for depth in [0, 9] {
        let error = WidthPlanner::with_tree(&[1, 9], depth).unwrap_err().to_string();
        assert!(error.starts_with("tree_depth: got"), "{error}");
    }
    assert!(WidthPlanner::with_tree(&[1, 9], 8).is_ok(), "a chain is a tree");
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    for widths in [&[][..], &[0, 2], &[2, 2], &[4, 2], &[1, 4097]] {
        let error = WidthPlanner::new(widths).unwrap_err().to_string();
        assert!(error.starts_with("widths: got"), "{error}");
    }
    let mut planner = planner();
    let before = planner.acceptance(0.0, 0);
    assert!(planner.record(4, &[1, 4], &[]).is_err() && planner.record(0, &[], &[]).is_err());
    assert_eq!(planner.acceptance(0.0, 0), before);
}
