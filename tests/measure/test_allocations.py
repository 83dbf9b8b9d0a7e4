"""The peak of known allocations, and which of them were what."""

from gradlite.measure.allocations import ByCategory, Change, Sighting, StepTimes, split_peak

STEP = StepTimes(begin=100, forward_end=200, end=300)


def test_each_rule_on_one_block() -> None:
    changes = [
        Change(10, 1, 1000),  # a weight that was made under the watch
        Change(20, 2, 200),  # made before, given back after: state
        Change(110, 3, 30),  # forward, lives at its end: held
        Change(120, 4, 4),  # forward, given back in it: temporary
        Change(130, 4, -4),
        Change(210, 5, 50),  # seen as a gradient
        Change(220, 6, 6),  # backward: temporary
        Change(240, 6, -6),
        Change(250, 3, -30),
        Change(260, 7, 70),  # made in the step and kept: state
        Change(290, 5, -50),
        Change(400, 2, -200),
        Change(500, 8, 10**9),  # after the step
    ]
    peak = split_peak(changes, [Sighting(230, 5)], {1: 1000, 99: 5}, STEP)
    # at 260: 1005 + 200 + 50 + 70 = 1325; at 220: 1005 + 200 + 30 + 50 + 6 = 1291
    assert peak == ByCategory(weights=1005, gradients=50, optimizer_state=270)
    without_new_state = [change for change in changes if change.address != 7]
    peak = split_peak(without_new_state, [Sighting(230, 5)], {1: 1000, 99: 5}, STEP)
    assert peak == ByCategory(weights=1005, gradients=50, optimizer_state=200, held_activations=30, temporaries=6)
    assert peak.total == 1291


def test_an_address_used_again_is_another_block() -> None:
    changes = [
        Change(110, 1, 10),
        Change(120, 1, -10),
        Change(210, 1, 8),
        Change(220, 1, -8),
    ]
    assert split_peak(changes, [Sighting(215, 1)], {}, STEP) == ByCategory(temporaries=10)
    assert split_peak(changes, [Sighting(115, 1)], {}, STEP) == ByCategory(gradients=10)


def test_a_peak_outside_the_step_does_not_count() -> None:
    changes = [Change(10, 1, 500), Change(20, 1, -500), Change(30, 2, 7), Change(150, 3, 1), Change(160, 3, -1)]
    assert split_peak(changes, [], {}, STEP) == ByCategory(optimizer_state=7, temporaries=1)


def test_what_is_given_back_in_the_step_counts_until_then() -> None:
    changes = [Change(10, 1, 500), Change(150, 1, -500), Change(160, 2, 100), Change(170, 2, -100)]
    assert split_peak(changes, [], {}, STEP) == ByCategory(optimizer_state=500)


def test_memory_given_back_that_was_never_seen_is_passed_over() -> None:
    assert split_peak([Change(150, 1, -64), Change(160, 2, 3)], [], {9: 4}, STEP) == ByCategory(weights=4, optimizer_state=3)


def test_a_step_without_allocations_has_the_memory_it_began_with() -> None:
    assert split_peak([Change(10, 1, 3)], [], {9: 4}, STEP) == ByCategory(weights=4, optimizer_state=3)
