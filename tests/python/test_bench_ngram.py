"""The look-up drafter and the repetition share, on cases small enough to check by hand."""

from __future__ import annotations

import pytest

from dflash_rs._core import Lookup
from dflash_rs.bench.ngram import lookup_tau, repeated_ngram_share, simulate_lookup


def test_a_text_without_repetition_has_share_zero():
    assert repeated_ngram_share(list(range(20))) == 0.0


def test_a_text_shorter_than_the_gram_has_share_zero():
    assert repeated_ngram_share([1, 2, 3]) == 0.0
    assert repeated_ngram_share([]) == 0.0


def test_the_share_counts_every_later_occurrence():
    # 4-grams of 1 2 3 4 1 2 3 4: 1234 2341 3412 4123 1234; the last one is a repeat.
    assert repeated_ngram_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    # One token over and over: 7 grams, the first is new.
    assert repeated_ngram_share([5] * 10) == pytest.approx(6 / 7)


def test_the_longest_suffix_wins_over_a_later_shorter_one():
    index = Lookup()
    index.extend([1, 2, 7, 9, 2, 8, 1, 2])
    # (1, 2) was followed by 7; the later match of (2,) alone was followed by 8.
    assert index.propose(2).tolist() == [7, 9]


def test_the_latest_occurrence_wins_among_equal_lengths():
    index = Lookup()
    index.extend([2, 7, 2, 8, 2])
    assert index.propose(1).tolist() == [8]


def test_a_suffix_never_matches_itself():
    index = Lookup()
    index.extend([1, 2, 3])
    assert index.propose(4).size == 0


def test_a_loop_shorter_than_the_block_is_continued_through_the_draft():
    index = Lookup()
    index.extend([9, 4, 5, 4, 5])
    assert index.propose(5).tolist() == [4, 5, 4, 5, 4]


def test_a_text_that_never_repeats_gives_one_token_per_pass():
    run = simulate_lookup([1, 2, 3], [4, 5, 6, 7, 8], block_size=8)
    assert (run.tokens, run.steps, run.tau) == (4, 4, 1.0)


def test_a_loop_is_drafted_in_whole_blocks():
    prompt, output = [1, 2, 3, 1, 2, 3], [1, 2, 3, 1, 2, 3, 1, 2, 3]
    # Token 1 comes from the prefill. The suffix (2, 3, 1) was followed by 2 3 1, so each pass accepts three drafts
    # and adds its own token: 8 tokens in two passes of block size 4.
    run = simulate_lookup(prompt, output, block_size=4)
    assert (run.tokens, run.steps, run.tau) == (8, 2, 4.0)


def test_a_wrong_draft_costs_the_rest_of_its_block_only():
    # After 1 the look-up proposes 2 3 4 and the model says 2 9.
    run = simulate_lookup([1, 2, 3, 4], [1, 2, 9], block_size=4)
    assert (run.tokens, run.steps) == (2, 1)


def test_an_output_of_one_token_has_no_decode_pass():
    run = simulate_lookup([1, 2], [3], block_size=4)
    assert (run.tokens, run.steps, run.tau) == (0, 0, 0.0)
    assert lookup_tau([([1, 2], [3])], block_size=4) == 0.0


def test_lookup_tau_weights_outputs_by_their_passes():
    pairs = [([1, 2, 3, 1, 2, 3], [1, 2, 3, 1, 2, 3, 1, 2, 3]), ([1, 2, 3], [4, 5, 6, 7, 8])]
    assert lookup_tau(pairs, block_size=4) == pytest.approx((8 + 4) / (2 + 4))


@pytest.mark.parametrize("block_size", [0, 1])
def test_a_block_without_room_for_a_draft_is_refused(block_size):
    with pytest.raises(ValueError, match="block_size"):
        simulate_lookup([1], [1, 2], block_size=block_size)
