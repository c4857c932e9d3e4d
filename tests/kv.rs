//! The KV bookkeeping by itself, without an engine.

use dflash_rs::error::Error;
use dflash_rs::kv::{Admitted, Kv, Reservation, pages_for, room};
use dflash_rs::types::{PageId, TokenId};
use proptest::prelude::*;

fn text(ids: impl IntoIterator<Item = u32>) -> Vec<TokenId> {
    ids.into_iter().map(TokenId).collect()
}

fn kv(num_pages: usize, page_size: usize) -> Kv {
    Kv::new(num_pages, page_size, 4, 64, true).unwrap()
}

/// Lets `tokens` in and commits all but the last one.
fn prefilled(kv: &mut Kv, tokens: &[TokenId], injected: bool) -> Admitted {
    let row = kv.admit(tokens, 0, false).unwrap().unwrap();
    let width = tokens.len() as u32 - row.cached_tokens;
    let launched = kv
        .reserve(row.key, tokens.len() as u32, width)
        .unwrap()
        .unwrap()
        .launch(kv.table_mut())
        .unwrap();
    assert!(launched.commit(kv.table_mut(), width).unwrap());
    let valid_from = if injected {
        row.draft_valid_from
    } else {
        tokens.len() as u32
    };
    kv.share(row.key, tokens, tokens.len() as u32, valid_from).unwrap();
    row
}

#[test]
fn a_dropped_reservation_gives_its_pages_back_from_any_thread() {
    let mut kv = kv(4, 4);
    let row = kv.admit(&text(0..3), 0, false).unwrap().unwrap();
    let reservation = kv.reserve(row.key, 12, 9).unwrap().unwrap();
    assert_eq!(reservation.pages().len(), 2);
    assert_eq!(kv.available(), 1);
    std::thread::spawn(move || drop(reservation)).join().unwrap();
    assert_eq!(kv.available(), 3);
    assert_eq!(kv.table().allocated(row.key), Ok(4), "the row never had them");
}

#[test]
fn running_short_is_none_and_changes_nothing() {
    let mut kv = kv(4, 4);
    let row = kv.admit(&text(0..4), 0, false).unwrap().unwrap();
    let held = kv.reserve(row.key, 12, 8).unwrap().unwrap();
    for _ in 0..2 {
        assert!(kv.reserve(row.key, 8, 4).unwrap().is_some(), "one more page is free");
        assert!(kv.reserve(row.key, 9, 5).unwrap().is_none(), "two are not");
        assert_eq!(kv.admit(&text(50..58), 0, false).unwrap(), None);
        assert_eq!(kv.available(), 1);
        assert_eq!(kv.table().num_free_rows(), 3);
    }
    drop(held);
}

#[test]
fn a_reservation_for_a_tenant_that_left_is_handed_back_whole() {
    let mut kv = kv(4, 4);
    let row = kv.admit(&text(0..4), 0, false).unwrap().unwrap();
    let reservation = kv.reserve(row.key, 12, 8).unwrap().unwrap();
    kv.release(row.key).unwrap();
    let failed = reservation.launch(kv.table_mut()).unwrap_err();
    assert!(matches!(failed.error, Error::StaleRow { .. }));
    assert_eq!(failed.reservation.pages().len(), 2);
    drop(failed);
    assert_eq!(kv.available(), 4);
}

#[test]
fn a_second_release_is_an_error_even_when_the_row_has_a_new_tenant() {
    let mut kv = kv(4, 4);
    let first = kv.admit(&text(0..4), 0, false).unwrap().unwrap();
    kv.release(first.key).unwrap();
    assert!(matches!(kv.release(first.key), Err(Error::StaleRow { .. })));
    let second = kv.admit(&text(4..9), 0, false).unwrap().unwrap();
    assert_eq!(first.key.slot, second.key.slot);
    assert!(matches!(kv.release(first.key), Err(Error::StaleRow { .. })));
    assert!(matches!(kv.table().allocated(first.key), Err(Error::StaleRow { .. })));
    assert!(kv.table().is_live(second.key) && !kv.table().is_live(first.key));
    assert_eq!(kv.table().allocated(second.key), Ok(8));
}

#[test]
fn a_row_is_not_given_away_while_a_step_that_names_it_is_under_way() {
    let mut kv = Kv::new(8, 4, 1, 64, true).unwrap();
    let row = kv.admit(&text(0..4), 0, false).unwrap().unwrap();
    let launched = kv
        .reserve(row.key, 4, 4)
        .unwrap()
        .unwrap()
        .launch(kv.table_mut())
        .unwrap();
    kv.release(row.key).unwrap();
    assert_eq!(kv.available(), 8, "its pages are free at once");
    assert_eq!(kv.admit(&text(0..4), 0, false).unwrap(), None, "its row is not");
    assert_eq!(
        launched.commit(kv.table_mut(), 4),
        Ok(false),
        "and its result changes nothing"
    );
    assert!(kv.admit(&text(0..4), 0, false).unwrap().is_some());
}

#[test]
fn keeping_more_than_was_written_is_an_error() {
    let mut kv = kv(4, 4);
    let row = kv.admit(&text(0..4), 0, false).unwrap().unwrap();
    let launched = kv
        .reserve(row.key, 3, 3)
        .unwrap()
        .unwrap()
        .launch(kv.table_mut())
        .unwrap();
    let error = Error::AcceptedExceedsDrafted {
        accepted: 4,
        drafted: 3,
    };
    assert_eq!(launched.commit(kv.table_mut(), 4), Err(error));
    assert_eq!(kv.table().committed(row.key), Ok(0));
}

#[test]
fn the_last_prompt_token_is_always_computed() {
    let mut kv = kv(8, 4);
    let first = prefilled(&mut kv, &text(0..8), true);
    kv.release(first.key).unwrap();
    let again = kv.admit(&text(0..8), 0, false).unwrap().unwrap();
    assert_eq!(again.cached_tokens, 4);
    let longer = kv.admit(&text(0..9), 0, false).unwrap().unwrap();
    assert_eq!(longer.cached_tokens, 8);
    assert_eq!(
        kv.table().pages(longer.key).unwrap()[0],
        kv.table().pages(again.key).unwrap()[0]
    );
}

#[test]
fn draft_context_is_valid_only_after_the_last_page_without_it() {
    let mut kv = kv(16, 4);
    let plain = prefilled(&mut kv, &text(0..8), false);
    kv.release(plain.key).unwrap();
    let row = prefilled(&mut kv, &text(0..16), true);
    assert_eq!((row.cached_tokens, row.draft_valid_from), (8, 8));
    kv.release(row.key).unwrap();
    let reader = kv.admit(&text(0..17), 0, false).unwrap().unwrap();
    assert_eq!(
        (reader.cached_tokens, reader.draft_valid_from),
        (16, 8),
        "pages 2 and 3 have draft K/V"
    );
}

#[test]
fn a_drafting_request_computes_pages_without_draft_context_again_and_leaves_better_ones() {
    let mut kv = kv(16, 4);
    let plain = prefilled(&mut kv, &text(0..12), false);
    let held = kv.admit(&text(0..5), 0, false).unwrap().unwrap();
    kv.release(plain.key).unwrap();
    let drafting = |kv: &mut Kv| {
        let row = kv.admit(&text(0..13), 0, true).unwrap().unwrap();
        assert_eq!((row.cached_tokens, row.draft_valid_from), (0, 0));
        let reserved = kv.reserve(row.key, 13, 13).unwrap().unwrap();
        let launched = reserved.launch(kv.table_mut()).unwrap();
        assert!(launched.commit(kv.table_mut(), 13).unwrap());
        kv.share(row.key, &text(0..13), 13, 0).unwrap();
        row
    };
    let row = drafting(&mut kv);
    kv.release(row.key).unwrap();
    let next = kv.admit(&text(0..13), 0, true).unwrap().unwrap();
    assert_eq!(next.cached_tokens, 0, "somebody reads the first page, so it stayed");
    kv.release(next.key).unwrap();
    kv.release(held.key).unwrap();

    let row = drafting(&mut kv);
    assert_eq!(kv.cache().len(), 3);
    let own = kv.table().pages(row.key).unwrap()[..3].to_vec();
    kv.release(row.key).unwrap();
    for drafts in [true, false] {
        let next = kv.admit(&text(0..13), 0, drafts).unwrap().unwrap();
        assert_eq!((next.cached_tokens, next.draft_valid_from), (12, 0));
        assert_eq!(kv.table().pages(next.key).unwrap()[..3], own);
        kv.release(next.key).unwrap();
    }
    assert_eq!(kv.evict(9), Ok(3));
    assert_eq!(kv.pool().num_free(), 16);
}

#[test]
fn eviction_takes_the_least_recently_used_leaf_and_never_what_a_request_holds() {
    let mut kv = kv(8, 4);
    let old = prefilled(&mut kv, &text(0..8), true);
    let new = prefilled(&mut kv, &text(20..28), true);
    kv.release(old.key).unwrap();
    kv.release(new.key).unwrap();
    let reader = kv.admit(&text(0..5), 0, false).unwrap().unwrap();
    assert_eq!(reader.cached_tokens, 4);
    assert_eq!(kv.evict(1), Ok(1));
    assert!(
        kv.admit(&text(0..9), 0, false)
            .unwrap()
            .is_some_and(|row| row.cached_tokens == 4),
        "its leaf was the oldest"
    );
    assert_eq!(kv.evict(9), Ok(2), "the reader's page stays, the shortfall is told");
    assert_eq!(kv.cache().len(), 1);
}

#[test]
fn a_waiting_allocation_evicts_just_enough() {
    let mut kv = kv(4, 4);
    let row = prefilled(&mut kv, &text(0..12), true);
    kv.release(row.key).unwrap();
    assert_eq!((kv.pool().num_free(), kv.cache().len()), (1, 3));
    let other = kv.admit(&text(30..38), 0, false).unwrap().unwrap();
    assert_eq!((kv.pool().num_free(), kv.cache().len()), (0, 2));
    assert_eq!(kv.table().allocated(other.key), Ok(8));
}

fn stateful(num_pages: usize, checkpoints: usize) -> Kv {
    kv(num_pages, 4).with_checkpoints(checkpoints)
}

/// Lets `tokens` in, commits and shares all of them, and attaches a checkpoint where their last whole page ends; gives its number.
fn with_copy(kv: &mut Kv, tokens: &[TokenId]) -> (Admitted, Option<u32>) {
    let row = prefilled(kv, tokens, true);
    let copy = kv.take_checkpoint();
    let id = copy.as_ref().map(|copy| copy.id().0);
    let end = tokens.len() as u32 / 4 * 4;
    if let Some(copy) = copy {
        kv.attach(row.key, end, copy).unwrap();
    }
    (row, id)
}

#[test]
fn of_a_target_with_state_a_hit_ends_where_a_copy_of_the_state_is() {
    let mut kv = stateful(16, 2);
    let (first, copy) = with_copy(&mut kv, &text(0..9));
    let longer = kv.admit(&text(0..17), 0, false).unwrap().unwrap();
    assert_eq!((longer.cached_tokens, longer.restore.map(|id| id.0)), (8, copy));
    let shorter = kv.admit(&text(0..6), 0, false).unwrap().unwrap();
    assert_eq!(
        (shorter.cached_tokens, shorter.restore),
        (0, None),
        "the copy lies beyond"
    );
    assert_eq!(shorter.known_tokens, 4, "but its text is known that far");
    for row in [first, longer, shorter] {
        kv.release(row.key).unwrap();
    }
    let mut none = stateful(16, 0);
    let row = prefilled(&mut none, &text(0..9), true);
    none.release(row.key).unwrap();
    assert_eq!(none.admit(&text(0..9), 0, false).unwrap().unwrap().cached_tokens, 0);
    assert!(none.take_checkpoint().is_none());
}

#[test]
fn a_copy_goes_with_its_page_and_is_taken_back_only_from_pages_nobody_holds() {
    let mut kv = stateful(16, 1);
    let (first, copy) = with_copy(&mut kv, &text(0..9));
    assert!(kv.take_checkpoint().is_none(), "a request holds the page");
    kv.release(first.key).unwrap();
    let reader = kv.admit(&text(0..9), 0, false).unwrap().unwrap();
    assert_eq!(reader.restore.map(|id| id.0), copy);
    assert!(kv.take_checkpoint().is_none(), "a request is to start from it");
    kv.release(reader.key).unwrap();
    let taken = kv.take_checkpoint().unwrap();
    assert_eq!(Some(taken.id().0), copy);
    assert_eq!(kv.admit(&text(0..9), 0, false).unwrap().unwrap().cached_tokens, 0);
    kv.give_back(taken);
    let (other, again) = with_copy(&mut kv, &text(40..49));
    assert_eq!(again, copy);
    kv.release(other.key).unwrap();
    kv.evict(usize::MAX).unwrap();
    assert_eq!(kv.cache().checkpoints(), (1, 1));
}

#[test]
fn who_computes_a_known_page_again_for_want_of_a_copy_leaves_one_behind_it() {
    let mut kv = stateful(16, 4);
    let (first, _) = with_copy(&mut kv, &text(0..5));
    prefilled(&mut kv, &text(0..5), true);
    kv.release(first.key).unwrap();
    let plain = prefilled(&mut kv, &text(0..13), true);
    kv.release(plain.key).unwrap();
    // Pages two and three are known, the state only after the first.
    let (row, copy) = with_copy(&mut kv, &text(0..17));
    assert_eq!((row.cached_tokens, row.known_tokens), (4, 12));
    kv.release(row.key).unwrap();
    let next = kv.admit(&text(0..21), 0, false).unwrap().unwrap();
    assert_eq!((next.cached_tokens, next.restore.map(|id| id.0)), (16, copy));
}

#[test]
fn a_checkpoint_for_a_place_that_is_no_end_of_a_committed_page_is_refused_and_free_again() {
    let mut kv = stateful(8, 1);
    let row = prefilled(&mut kv, &text(0..9), true);
    for end in [0, 3, 12] {
        let copy = kv.take_checkpoint().unwrap();
        assert_eq!(
            kv.attach(row.key, end, copy),
            Err(Error::SlotsNotOwned { end, owned: 9 })
        );
    }
    kv.release(row.key).unwrap();
    let copy = kv.take_checkpoint().unwrap();
    assert!(matches!(kv.attach(row.key, 8, copy), Err(Error::StaleRow { .. })));
    assert_eq!(kv.cache().checkpoints(), (1, 1));
}

proptest! {
    /// Whatever order checkpoints are taken, attached, given back, stolen and evicted in: each is in one hand, and what a request was told to
    /// start from stays while it runs.
    #[test]
    fn checkpoints_are_conserved_and_never_shared(
        total in 0..5usize,
        num_pages in 2..20usize,
        ops in prop::collection::vec((0..6u8, 0..4usize, 1..22u32), 1..60),
    ) {
        let mut kv = stateful(num_pages, total);
        let mut rows: Vec<(Admitted, Vec<TokenId>)> = Vec::new();
        let mut held = Vec::new();
        for (op, which, size) in ops {
            match op {
                0 | 1 => {
                    let tokens = text((0..size).map(|at| at % (5 + which as u32 % 2)));
                    if let Some(row) = kv.admit(&tokens, 0, false).unwrap() {
                        prop_assert_eq!(row.restore.is_some(), row.cached_tokens > 0);
                        let width = size - row.cached_tokens;
                        let launched = kv.reserve(row.key, size, width).unwrap().unwrap().launch(kv.table_mut()).unwrap();
                        prop_assert!(launched.commit(kv.table_mut(), width).unwrap());
                        kv.share(row.key, &tokens, size, 0).unwrap();
                        rows.push((row, tokens));
                    }
                }
                2 => held.extend(kv.take_checkpoint()),
                3 if !held.is_empty() => {
                    let copy = held.swap_remove(which % held.len());
                    match rows.get(which) {
                        Some((row, tokens)) if tokens.len() >= 4 => {
                            kv.attach(row.key, tokens.len() as u32 / 4 * 4, copy).unwrap();
                        }
                        _ => kv.give_back(copy),
                    }
                }
                4 if which < rows.len() => kv.release(rows.swap_remove(which).0.key).unwrap(),
                5 => {
                    kv.evict(which).unwrap();
                }
                _ => {}
            }
            let mut owned: Vec<u32> = (0..num_pages as u32)
                .filter_map(|page| kv.cache().checkpoint_of(PageId(page)))
                .map(|id| id.0)
                .chain(held.iter().map(|copy| copy.id().0))
                .collect();
            owned.sort_unstable();
            let distinct = owned.windows(2).all(|pair| pair[0] < pair[1]);
            prop_assert!(distinct, "a checkpoint in two hands: {:?}", owned);
            prop_assert_eq!(kv.cache().checkpoints(), (total, total - owned.len()));
            for (row, _) in rows.iter().filter(|(row, _)| row.restore.is_some()) {
                let last = kv.table().pages(row.key).unwrap()[row.cached_tokens as usize / 4 - 1];
                prop_assert_eq!(kv.cache().checkpoint_of(last), row.restore);
            }
        }
    }
}

proptest! {
    /// Reservations are held for as long as they like, so an allocation can fail at any point.
    #[test]
    fn pages_are_conserved_whatever_order_things_are_held_and_dropped(
        page_size in 1..5usize,
        num_pages in 1..24usize,
        ops in prop::collection::vec((0..6u8, 0..4usize, 1..24u32), 1..60),
    ) {
        let mut kv = kv(num_pages, page_size);
        let mut rows: Vec<(Admitted, Vec<TokenId>, bool)> = Vec::new();
        let mut held: Vec<Reservation> = Vec::new();
        for (op, which, size) in ops {
            let before = (kv.available(), kv.cache().len(), kv.table().num_free_rows());
            let row = rows.get(which).map(|(row, _, _)| *row);
            match op {
                0 => {
                    let tokens = text((0..size).map(|at| at % 7));
                    let spare = which;
                    let drafts = size % 2 == 0;
                    match kv.admit(&tokens, spare, drafts).unwrap() {
                        Some(row) => {
                            prop_assert!(kv.available() >= spare);
                            prop_assert!(!drafts || row.draft_valid_from == 0);
                            rows.push((row, tokens, drafts));
                        }
                        None => {
                            prop_assert_eq!(before, (kv.available(), kv.cache().len(), kv.table().num_free_rows()));
                        }
                    }
                }
                1 | 2 if row.is_some() => {
                    let row = row.unwrap();
                    let end = kv.table().committed(row.key).unwrap() + size;
                    let need = pages_for(end as usize, page_size);
                    match kv.reserve(row.key, end.min(64), size) {
                        Ok(Some(reservation)) if op == 1 => held.push(reservation),
                        Ok(Some(reservation)) => {
                            let keep = size.min(end.min(64) - kv.table().committed(row.key).unwrap());
                            let launched = reservation.launch(kv.table_mut()).unwrap();
                            prop_assert!(launched.commit(kv.table_mut(), keep).unwrap());
                            let tokens = &mut rows[which].1;
                            let committed = kv.table().committed(row.key).unwrap() as usize;
                            while tokens.len() < committed {
                                tokens.push(TokenId(tokens.len() as u32 % 7));
                            }
                            let valid_from = if rows[which].2 { 0 } else { u32::MAX };
                            kv.share(row.key, &rows[which].1, committed as u32, valid_from).unwrap();
                        }
                        Ok(None) => {
                            prop_assert!(need > kv.table().pages(row.key).unwrap().len() + before.0);
                            prop_assert_eq!(before, (kv.available(), kv.cache().len(), kv.table().num_free_rows()));
                        }
                        Err(error) => prop_assert!(false, "{}", error),
                    }
                }
                3 if !held.is_empty() => drop(held.swap_remove(which % held.len())),
                4 if row.is_some() => {
                    kv.release(rows.swap_remove(which).0.key).unwrap();
                }
                5 => {
                    let reclaimable = kv.cache().reclaimable();
                    prop_assert_eq!(kv.evict(which).unwrap(), which.min(reclaimable));
                }
                _ => {}
            }
            kv.available();
            let mut owners = vec![0u32; num_pages];
            for (row, _, _) in &rows {
                for page in kv.table().pages(row.key).unwrap() {
                    owners[page.0 as usize] += 1;
                }
            }
            for page in held.iter().flat_map(|reservation| reservation.pages()) {
                owners[page.0 as usize] += 1;
            }
            for page in 0..num_pages as u32 {
                let cached = u32::from(kv.cache().holds(PageId(page)));
                prop_assert_eq!(kv.pool().owners(PageId(page)), owners[page as usize] + cached);
            }
        }
        held.clear();
        for (row, _, _) in rows {
            kv.release(row.key).unwrap();
        }
        kv.evict(usize::MAX).unwrap();
        kv.available();
        prop_assert_eq!(kv.pool().num_free(), num_pages);
    }
}

#[test]
fn a_row_gets_whole_pages_for_what_a_step_may_write_and_keeps_what_it_has() {
    assert_eq!(room(100, 100, 16, 1), 116);
    assert_eq!(room(100, 112, 16, 16), 128);
    assert_eq!(room(96, 112, 16, 16), 112, "it fits exactly");
    assert_eq!(room(5, 64, 16, 16), 64, "nothing is given back");
}

#[test]
fn a_text_longer_than_a_row_is_an_error_with_both_lengths_and_one_of_a_rows_length_is_let_in() {
    let mut kv = kv(32, 4);
    assert_eq!((kv.page_size(), kv.table().width()), (4, 16));
    let refused = Error::SlotsNotOwned { end: 65, owned: 64 };
    assert_eq!(kv.admit(&text(0..65), 0, false), Err(refused));
    assert_eq!((kv.available(), kv.table().num_free_rows()), (32, 4));
    let row = kv.admit(&text(0..64), 0, false).unwrap().unwrap();
    assert_eq!(kv.table().allocated(row.key), Ok(64));
    let refused = Error::SlotsNotOwned { end: 65, owned: 64 };
    assert_eq!(kv.reserve(row.key, 65, 1).unwrap_err(), refused);
    assert!(kv.reserve(row.key, 64, 1).unwrap().unwrap().pages().is_empty());
}

#[test]
fn of_two_reservations_the_row_has_room_for_one_and_the_other_is_handed_back() {
    let mut kv = kv(64, 4);
    let row = kv.admit(&text(0..4), 0, false).unwrap().unwrap();
    let first = kv.reserve(row.key, 64, 8).unwrap().unwrap();
    let second = kv.reserve(row.key, 64, 8).unwrap().unwrap();
    let launched = first.launch(kv.table_mut()).unwrap();
    let failed = second.launch(kv.table_mut()).unwrap_err();
    assert_eq!(failed.error, Error::SlotsNotOwned { end: 124, owned: 64 });
    assert_eq!(failed.reservation.pages().len(), 15);
    drop(failed);
    launched.cancel(kv.table_mut());
    kv.release(row.key).unwrap();
    assert_eq!((kv.available(), kv.table().num_free_rows()), (64, 4));
}

#[test]
fn a_step_cannot_commit_more_than_its_row_owns() {
    let mut kv = kv(8, 4);
    let row = kv.admit(&text(0..6), 0, false).unwrap().unwrap();
    let launch = |kv: &mut Kv, width| {
        let reserved = kv.reserve(row.key, 8, width).unwrap().unwrap();
        reserved.launch(kv.table_mut()).unwrap()
    };
    assert_eq!(launch(&mut kv, 5).commit(kv.table_mut(), 5), Ok(true));
    let refused = Error::SlotsNotOwned { end: 9, owned: 8 };
    assert_eq!(launch(&mut kv, 4).commit(kv.table_mut(), 4), Err(refused));
    assert_eq!(kv.table().committed(row.key), Ok(5));
    assert_eq!(launch(&mut kv, 3).commit(kv.table_mut(), 3), Ok(true));
    assert_eq!(kv.table().committed(row.key), Ok(8));
}

#[test]
fn a_cached_page_tells_the_text_that_leads_to_it_and_its_own() {
    let mut kv = kv(8, 4);
    let row = prefilled(&mut kv, &text(0..10), true);
    let pages = kv.table().pages(row.key).unwrap().to_vec();
    assert_eq!(kv.cache().text_of(pages[0]), Some(text(0..4)));
    assert_eq!(kv.cache().text_of(pages[1]), Some(text(0..8)));
    assert_eq!(kv.cache().text_of(pages[2]), None, "it is not full");
    assert_eq!((kv.cache().len(), kv.cache().is_empty()), (2, false));
}

#[test]
fn of_two_pages_with_one_text_the_first_stays_unless_only_the_second_has_draft_context() {
    for (has, injected) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut kv = kv(8, 4);
        let [first, second] = [0, 1].map(|_| {
            let row = kv.admit(&text(0..5), 0, false).unwrap().unwrap();
            let reserved = kv.reserve(row.key, 5, 5).unwrap().unwrap();
            let launched = reserved.launch(kv.table_mut()).unwrap();
            assert_eq!(launched.commit(kv.table_mut(), 5), Ok(true));
            (row.key, kv.table().pages(row.key).unwrap()[0])
        });
        let valid_from = |injected| if injected { 0 } else { 5 };
        kv.share(first.0, &text(0..5), 5, valid_from(has)).unwrap();
        assert_eq!(kv.cache().reclaimable(), 0, "its first owner holds it");
        kv.release(first.0).unwrap();
        assert_eq!(kv.cache().reclaimable(), 1);
        kv.share(second.0, &text(0..5), 5, valid_from(injected)).unwrap();
        let (kept, reclaimable) = if injected && !has { (second.1, 0) } else { (first.1, 1) };
        assert!(kv.cache().holds(kept));
        assert_eq!((kv.cache().len(), kv.cache().reclaimable()), (1, reclaimable));
        kv.release(second.0).unwrap();
        assert_eq!((kv.cache().reclaimable(), kv.available()), (1, 8));
        let reader = kv.admit(&text(0..5), 0, false).unwrap().unwrap();
        let valid_from = if has || injected { 0 } else { 4 };
        assert_eq!((reader.cached_tokens, reader.draft_valid_from), (4, valid_from));
    }
}
