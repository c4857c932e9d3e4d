//! Acceptance counters.

use dflash_rs::error::Error;
use dflash_rs::stats::Stats;
use proptest::prelude::*;

#[test]
fn tau_counts_the_bonus_and_plain_passes() {
    let mut stats = Stats::new();
    assert_eq!((stats.tau(), stats.acceptance_rate()), (None, None));
    stats.record(3, 2, 3).unwrap();
    stats.record(3, 0, 1).unwrap();
    stats.record(0, 0, 1).unwrap();
    stats.record(3, 3, 2).unwrap(); // cut by a stop
    assert_eq!(stats.tau(), Some(7.0 / 4.0));
    assert_eq!(stats.acceptance_rate(), Some(5.0 / 9.0));
    assert_eq!(stats.histogram(), [2, 0, 1, 1]);
    assert_eq!(stats.acceptance_per_position(), [2.0 / 3.0, 2.0 / 3.0, 1.0 / 3.0]);
}

#[test]
fn shorter_blocks_do_not_count_against_later_positions() {
    let mut stats = Stats::new();
    stats.record(1, 1, 2).unwrap();
    stats.record(4, 4, 5).unwrap();
    assert_eq!(stats.acceptance_per_position(), [1.0; 4]);
}

#[test]
fn impossible_counts_are_refused_and_change_nothing() {
    let mut stats = Stats::new();
    assert_eq!(
        stats.record(2, 3, 1),
        Err(Error::AcceptedExceedsDrafted {
            accepted: 3,
            drafted: 2
        })
    );
    assert!(stats.record(2, 1, 3).is_err());
    assert_eq!(stats, Stats::new());
}

proptest! {
    #[test]
    fn merging_parts_equals_recording_the_whole(
        passes in prop::collection::vec((0u32..9, 0u32..9, 0u32..9), 0..60), split in 0usize..60,
    ) {
        let (mut whole, mut left, mut right) = (Stats::new(), Stats::new(), Stats::new());
        for (i, &(d, a, c)) in passes.iter().enumerate() {
            let (a, part) = (a.min(d), if i < split { &mut left } else { &mut right });
            let c = c.min(a + 1);
            whole.record(d, a, c).unwrap();
            part.record(d, a, c).unwrap();
        }
        let mut other_way = right.clone();
        other_way.merge(&left);
        left.merge(&right);
        prop_assert_eq!(&left, &whole);
        prop_assert_eq!(&other_way, &whole);
        prop_assert_eq!(whole.histogram().iter().sum::<u64>(), whole.passes());
    }
}
