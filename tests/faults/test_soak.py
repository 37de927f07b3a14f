"""Five minutes of faults, a minute apart; `make soak` is the hour of them."""

import pytest
from faults.soak import soak


@pytest.mark.usefixtures("prepared")
def test_a_run_that_is_struck_again_and_again_ends_whole(machines):
    soaked = soak(machines, minutes=5, every=60, seed=1)
    assert len(soaked.struck) >= 4
