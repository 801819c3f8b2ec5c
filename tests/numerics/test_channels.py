"""Kept axes: shapes, spreading and gathering of ranges, and every refusal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import refused

from keras_qwrap.numerics.channels import Channels, check_bool, check_channel_axis, make_channels


@st.composite
def shapes_and_axes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    axes = st.sets(st.integers(0, len(shape) - 1), min_size=1)
    return shape, tuple(sorted(draw(axes)))


@given(shapes_and_axes(), st.data())
def test_ranges_line_up_with_the_kept_axes(case, data):
    shape, kept = case
    given_axes = tuple(data.draw(st.sampled_from([a, a - len(shape)])) for a in kept)
    axis = given_axes[0] if len(kept) == 1 else given_axes
    channels = make_channels(True, axis, len(shape))
    assert channels == Channels(kept, len(shape))
    assert set(channels.reduced) | set(kept) == set(range(len(shape)))
    assert not set(channels.reduced) & set(kept)
    values = np.arange(np.prod([shape[a] for a in kept]), dtype=np.float32)
    values = values.reshape([shape[a] for a in kept])
    spread = channels.spread("threshold", values)
    assert spread.shape == channels.range_shape(shape)
    channels.check_tensor("inputs", spread.shape, shape)
    np.testing.assert_array_equal(channels.spread("threshold", spread), spread)
    assert channels.gather(spread) == values.tolist()
    index = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    assert np.broadcast_to(spread, shape)[index] == values[tuple(index[a] for a in kept)]


def test_without_a_kept_axis_one_range_fits_any_tensor():
    channels = make_channels(False, None, None)
    assert (channels.reduced, channels.range_shape((3, 4))) == (None, ())
    for value in (2.0, [2.0], [[2.0]]):
        spread = channels.spread("threshold", np.asarray(value))
        assert spread.shape == ()
        assert channels.gather(spread) == 2.0
    for shape in ((), (3,), (1, 2, 3)):
        channels.check_tensor("inputs", (), shape)


def test_an_empty_list_of_axes_is_no_way_to_say_per_tensor():
    refused(TypeError, lambda: make_channels(True, (), 2), "channel_axis", "()")


@pytest.mark.parametrize(
    ("arguments", "error", "fragments"),
    [
        ((True, None, 2), ValueError, ["channel_axis", "None", "per_channel=True"]),
        ((True, 0, None), ValueError, ["input_rank", "None", "per_channel=True"]),
        ((True, None, None), ValueError, ["channel_axis", "None"]),
        ((True, 2, 2), ValueError, ["channel_axis", "received 2", "from -2 to 1", "rank 2"]),
        ((True, -3, 2), ValueError, ["channel_axis", "received -3", "from -2 to 1"]),
        ((True, (0, 4), 4), ValueError, ["channel_axis", "(0, 4)", "from -4 to 3"]),
        ((True, (1, 0), 2), ValueError, ["channel_axis", "(1, 0)", "ascending"]),
        ((True, (1, -1), 2), ValueError, ["channel_axis", "(1, -1)", "distinct"]),
        ((True, 0, 0), ValueError, ["input_rank", "received 0", "from 1 to 32"]),
        ((True, 0, -2), ValueError, ["input_rank", "received -2", "from 1 to 32"]),
        ((True, 0, 33), ValueError, ["input_rank", "received 33", "from 1 to 32"]),
        ((True, 0, 10**9), ValueError, ["input_rank", "received 1000000000", "from 1 to 32"]),
        ((True, 0, 2.0), TypeError, ["input_rank", "2.0", "an int"]),
        ((True, 0, True), TypeError, ["input_rank", "True", "an int"]),
        ((True, 1.0, 2), TypeError, ["channel_axis", "1.0", "tuple of ints"]),
        ((True, "0", 2), TypeError, ["channel_axis", "'0'", "tuple of ints"]),
        ((True, (0, None), 2), TypeError, ["channel_axis", "(0, None)", "tuple of ints"]),
        ((True, False, 2), TypeError, ["channel_axis", "False", "tuple of ints"]),
        ((1, 0, 2), TypeError, ["per_channel", "received 1", "True or False"]),
        ((None, 0, 2), TypeError, ["per_channel", "None", "True or False"]),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, fragments):
    refused(error, lambda: make_channels(*arguments), *fragments)


def test_the_number_of_ranges_must_fit():
    one, two = Channels(), Channels((1, 2), 3)
    refused(ValueError, lambda: one.spread("threshold", np.ones(2)), "threshold", "[1.0, 1.0]")
    for values in (np.ones(()), np.ones(6), np.ones((2, 2, 3)), np.ones((1, 1, 2, 3))):
        refused(ValueError, lambda v=values: two.spread("min_range", v), "min_range", "2 dimension")


def test_tensors_that_do_not_fit_the_ranges():
    channels = Channels((1,), 2)
    channels.check_tensor("inputs", (1, 3), (7, 3))
    fragments = ["inputs", "(7, 3, 1)", "rank 2", "input_rank"]
    refused(ValueError, lambda: channels.check_tensor("inputs", (1, 3), (7, 3, 1)), *fragments)
    fragments = ["kernel", "(7, 4)", "[3] channels", "axes [1]", "[4] thresholds"]
    refused(ValueError, lambda: channels.check_tensor("kernel", (1, 3), (7, 4)), *fragments)


def test_flags_and_axes_of_numpy():
    assert check_bool("x", np.bool_(True)) is True
    assert check_channel_axis(np.int64(-1)) == (-1,)
    assert check_channel_axis([0, np.int32(2)]) == (0, 2)
