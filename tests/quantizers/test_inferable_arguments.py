"""Constructor arguments of the inferable quantizers: each matters, is stored, and is checked."""

import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops
from reference import refused, to_numpy

import keras_qwrap as qi

TABLE = [-90, -3, 20, 5]
CHANNELS = {"per_channel": True, "channel_axis": -1, "input_rank": 2}
LOOKUP = {"lut_values": TABLE, "lut_values_bitwidth": 9, "eps": 0.5}
SYMMETRIC = {"num_bits": 3, "threshold": [2.0, 0.5, 1.0]}
UNIFORM = {"num_bits": 3, "min_range": [-1.0, -2.0, -3.0], "max_range": [2.0, 1.5, 0.25]}
OTHER_LOOKUP = {"lut_values": [1, 2, 3], "lut_values_bitwidth": 12, "eps": 0.0}

# class, all arguments at other than their defaults, another value for each of them
ROWS = [
    (
        qi.WeightsSymmetricInferableQuantizer,
        SYMMETRIC | CHANNELS | {"narrow": True},
        {"num_bits": 2, "threshold": [4.0, 0.3, 1.0], "narrow": False},
    ),
    (
        qi.WeightsPOTInferableQuantizer,
        SYMMETRIC | CHANNELS | {"narrow": True},
        {"num_bits": 2, "threshold": [4.0, 0.5, 1.0], "narrow": False},
    ),
    (
        qi.WeightsUniformInferableQuantizer,
        UNIFORM | CHANNELS,
        {"num_bits": 2, "min_range": [-1.0, -2.5, -3.0], "max_range": [2.0, 1.6, 0.2]},
    ),
    (
        qi.WeightsLUTSymmetricInferableQuantizer,
        SYMMETRIC | CHANNELS | LOOKUP,
        {"num_bits": 2, "threshold": [4.0, 0.3, 1.0]} | OTHER_LOOKUP,
    ),
    (
        qi.WeightsLUTPOTInferableQuantizer,
        SYMMETRIC | CHANNELS | LOOKUP,
        {"num_bits": 2, "threshold": [4.0, 0.5, 1.0]} | OTHER_LOOKUP,
    ),
    (
        qi.ActivationSymmetricInferableQuantizer,
        {"num_bits": 3, "threshold": 1.75, "signed": True},
        {"num_bits": 2, "threshold": 1.6, "signed": False},
    ),
    (
        qi.ActivationPOTInferableQuantizer,
        {"num_bits": 3, "threshold": 2.0, "signed": True},
        {"num_bits": 2, "threshold": 1.0, "signed": False},
    ),
    (
        qi.ActivationUniformInferableQuantizer,
        {"num_bits": 3, "min_range": -1.0, "max_range": 2.0},
        {"num_bits": 2, "min_range": -2.0, "max_range": 1.5},
    ),
    (
        qi.ActivationLutPOTInferableQuantizer,
        {"num_bits": 3, "threshold": 2.0, "signed": True} | LOOKUP,
        {"num_bits": 2, "threshold": 1.0} | OTHER_LOOKUP,
    ),
]
IDS = [cls.__name__ for cls, _, _ in ROWS]


def behaviour(quantizer):
    """What a user can see: outputs, codes and their width."""
    x = np.linspace(-2.9, 2.9, 303, dtype=np.float32).reshape(101, 3)
    y = to_numpy(quantizer(ops.array(x))).tolist()
    return quantizer.num_bits, y, quantizer.quantize_to_codes(x).tolist()


def test_there_is_a_row_for_every_class():
    names = [n for n in dir(qi) if n.endswith("InferableQuantizer") and not n.startswith("Base")]
    assert sorted(IDS) == sorted(names)


@pytest.mark.parametrize(("cls", "arguments", "others"), ROWS, ids=IDS)
def test_every_argument_matters(cls, arguments, others):
    parameters = set(inspect.signature(cls).parameters)
    channels = {"per_channel", "channel_axis", "input_rank"} & parameters
    assert set(arguments) == parameters
    changed = set(others) | channels
    if cls is qi.ActivationLutPOTInferableQuantizer:
        others = others | {"lut_values": [1, 2, 3]}
        plain = cls(**arguments | {"lut_values": [1, 2, 3]})
        unsigned = cls(**arguments | {"lut_values": [1, 2, 3], "signed": False})
        assert behaviour(plain) != behaviour(unsigned)
        changed.add("signed")
    assert changed == parameters
    before = behaviour(cls(**arguments))
    for name, value in others.items():
        assert behaviour(cls(**arguments | {name: value})) != before, name


@pytest.mark.parametrize(("cls", "arguments", "others"), ROWS[:5], ids=IDS[:5])
def test_channel_arguments_matter(cls, arguments, others):
    x = np.linspace(-2.9, 2.9, 9, dtype=np.float32).reshape(3, 3)
    along_last, along_first = (to_numpy(cls(**arguments | {"channel_axis": a})(x)) for a in (1, 0))
    assert not np.array_equal(along_last, along_first)
    single = {k: v[0] for k, v in arguments.items() if k in ("threshold", "min_range", "max_range")}
    per_tensor = cls(**arguments | single | {"per_channel": False})
    assert not np.array_equal(to_numpy(per_tensor(x)), along_last)
    refused(ValueError, lambda: cls(**arguments | {"input_rank": 3})(x), "rank 3", "(3, 3)")


@pytest.mark.parametrize(("cls", "arguments", "others"), ROWS, ids=IDS)
def test_config_round_trip(cls, arguments, others):
    """Exactly the arguments, as plain values that survive JSON and Keras' serialization."""
    quantizer = cls(**arguments)
    config = quantizer.get_config()
    assert config == arguments | ({"channel_axis": 1} if "channel_axis" in arguments else {})
    copies = [
        cls.from_config(json.loads(json.dumps(config))),
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(quantizer)),
    ]
    for copy in copies:
        assert type(copy) is cls
        assert copy.get_config() == config
        assert behaviour(copy) == behaviour(quantizer)


@pytest.mark.parametrize(("cls", "arguments", "others"), ROWS[:5], ids=IDS[:5])
def test_ranges_may_have_the_shape_of_the_weight(cls, arguments, others):
    """`(1, 1, 1, C)` is as good as `(C,)`, and the config says `(C,)`."""
    arguments = arguments | {"input_rank": 4}
    ends = [key for key in ("threshold", "min_range", "max_range") if key in arguments]
    x = np.linspace(-2.9, 2.9, 54, dtype=np.float32).reshape(3, 3, 2, 3)
    plain = cls(**arguments)
    for make in (np.float32, list):
        spread = {key: make(np.reshape(arguments[key], (1, 1, 1, 3)).tolist()) for key in ends}
        quantizer = cls(**arguments | spread)
        assert quantizer.get_config() == plain.get_config()
        np.testing.assert_array_equal(to_numpy(quantizer(x)), to_numpy(plain(x)))
        np.testing.assert_array_equal(quantizer.quantize_to_codes(x), plain.quantize_to_codes(x))
    for shape in ((3, 1, 1, 1), (1, 1, 3)):
        other = {key: np.reshape(arguments[key], shape) for key in ends}
        refused(ValueError, lambda other=other: cls(**arguments | other), "1 dimension", "with 4")


LOOKUPS = [row[:2] for row in ROWS if "lut_values" in row[1]]


@pytest.mark.parametrize(("cls", "arguments"), LOOKUPS)
def test_indices_are_narrower_than_the_entries_of_the_table(cls, arguments):
    table = {"lut_values": [-2, 1, 3], "num_bits": 3}
    with pytest.warns(UserWarning, match="num_bits: received 3, as many as") as caught:
        cls(**arguments | table | {"lut_values_bitwidth": 3})
    assert caught[0].filename == __file__
    wide = arguments | table | {"num_bits": 4, "lut_values_bitwidth": 3}
    refused(ValueError, lambda: cls(**wide), "num_bits: received 4", "lut_values_bitwidth=3")


@pytest.mark.parametrize(("cls", "arguments", "others"), ROWS[:5], ids=IDS[:5])
def test_config_round_trip_with_two_axes_and_arrays(cls, arguments, others):
    """Ranges may be arrays of odd float32 values; a tuple of axes comes back from JSON."""
    odd = {
        key: np.float32([[value[0], value[1]]] * 3)
        * np.float32(1 if "POT" in cls.__name__ else 1.1)
        for key, value in arguments.items()
        if key in ("threshold", "min_range", "max_range")
    }
    quantizer = cls(**arguments | odd | {"channel_axis": (0, 2), "input_rank": 3})
    config = json.loads(json.dumps(quantizer.get_config()))
    copy = cls.from_config(config)
    x = np.linspace(-3, 3, 24, dtype=np.float32).reshape(3, 4, 2)
    assert copy.get_config() == config
    assert quantizer.scale.shape == (3, 1, 2)
    np.testing.assert_array_equal(copy.scale, quantizer.scale)
    np.testing.assert_array_equal(to_numpy(copy(x)), to_numpy(quantizer(x)))


@pytest.mark.parametrize(("cls", "arguments", "others"), ROWS, ids=IDS)
def test_the_arguments_are_not_kept_or_changed(cls, arguments, others):
    given = {k: np.array(v) if isinstance(v, list) else v for k, v in arguments.items()}
    quantizer = cls(**given)
    before = behaviour(quantizer)
    for value in given.values():
        if isinstance(value, np.ndarray):
            value[:] = 77
    quantizer.get_config().clear()
    assert behaviour(quantizer) == before


THRESHOLD = [
    ({"threshold": []}, ValueError, ["threshold", "[]", "at least one"]),
    ({"threshold": 0.0}, ValueError, ["threshold", "0.0", "positive"]),
    ({"threshold": [1.0, -2.0, 1.0]}, ValueError, ["threshold", "-2.0", "positive"]),
    ({"threshold": np.nan}, ValueError, ["threshold", "nan", "finite"]),
    ({"threshold": [1.0, np.inf, 1.0]}, ValueError, ["threshold", "inf", "finite"]),
    ({"threshold": "1"}, TypeError, ["threshold", "'1'", "real numbers"]),
    ({"threshold": None}, ValueError, ["threshold", "None", "finite"]),
    ({"threshold": 2.0**-140}, ValueError, ["threshold", "step", "2**-126"]),
]
RANGE = [
    ({"min_range": 3.0, "max_range": 3.0}, ValueError, ["min_range", "3.0", "below max_range"]),
    (
        {"min_range": 4.0, "max_range": 3.0},
        ValueError,
        ["min_range", "4.0", "below max_range, 3.0"],
    ),
    ({"min_range": [-1.0, -1.0], "max_range": [1.0]}, ValueError, ["max_range", "(2,)", "Match"]),
    ({"min_range": np.nan, "max_range": 1.0}, ValueError, ["min_range", "nan", "finite"]),
    ({"min_range": 0.0, "max_range": np.inf}, ValueError, ["max_range", "inf", "finite"]),
    ({"min_range": [], "max_range": []}, ValueError, ["min_range", "[]", "at least one"]),
    ({"min_range": -1.0, "max_range": "1"}, TypeError, ["max_range", "'1'", "real numbers"]),
    ({"min_range": -1e-45, "max_range": 1e-45}, ValueError, ["max_range", "step", "2**-126"]),
    ({"min_range": -3e38, "max_range": 3e38}, ValueError, ["max_range", "step", "finite"]),
]
TABLES = [
    ({"lut_values": []}, ValueError, ["lut_values", "[]", "at least one"]),
    ({"lut_values": [0.5]}, ValueError, ["lut_values", "[0.5]", "list of integers"]),
    ({"lut_values": [[1]]}, ValueError, ["lut_values", "[[1]]", "list of integers"]),
    ({"lut_values": [1, 1]}, ValueError, ["lut_values", "[1, 1]", "distinct"]),
    ({"lut_values": list(range(9))}, ValueError, ["lut_values", "at most 8", "num_bits=3"]),
    ({"lut_values": [300]}, ValueError, ["lut_values", "[300]", "integers from -256 to 255"]),
    ({"lut_values": ["1"]}, TypeError, ["lut_values", "['1']", "real numbers"]),
    ({"lut_values_bitwidth": 17}, ValueError, ["lut_values_bitwidth", "17", "2 to 16"]),
    ({"lut_values_bitwidth": 8.5}, TypeError, ["lut_values_bitwidth", "8.5", "2 to 16"]),
    ({"eps": -1.0}, ValueError, ["eps", "-1.0", "not negative"]),
    ({"eps": [0.1, 0.2]}, ValueError, ["eps", "[0.1, 0.2]", "one number"]),
    ({"eps": None}, ValueError, ["eps", "None", "finite"]),
]
PER_CHANNEL = [
    ({"channel_axis": None}, ValueError, ["channel_axis", "None", "per_channel=True"]),
    ({"input_rank": None}, ValueError, ["input_rank", "None", "per_channel=True"]),
    ({"channel_axis": 2}, ValueError, ["channel_axis", "2", "from -2 to 1"]),
    ({"channel_axis": (0, 1)}, ValueError, ["2 dimension"]),
    ({"per_channel": False}, ValueError, ["one number", "per tensor"]),
    ({"per_channel": "yes"}, TypeError, ["per_channel", "'yes'", "True or False"]),
]
BITS = [
    ({"num_bits": bits}, error, ["num_bits", repr(bits), "from 2 to 16"])
    for bits, error in ((1, ValueError), (17, ValueError), (8.5, TypeError), ("8", TypeError))
]
POT = [({"threshold": [1.0, 2.5, 1.0]}, ValueError, ["threshold", "2.5", "powers of two"])]
SIGNED = [({"signed": 1}, TypeError, ["signed", "1", "True or False"])]
NARROW = [({"narrow": 1}, TypeError, ["narrow", "1", "True or False"])]


def bad_rows():
    for cls, arguments, _ in ROWS:
        rows = list(BITS)
        for name, more in (
            ("threshold", THRESHOLD),
            ("min_range", RANGE),
            ("lut_values", TABLES),
            ("per_channel", PER_CHANNEL),
            ("signed", SIGNED),
            ("narrow", NARROW),
        ):
            rows += more if name in arguments else []
        rows += POT if "POT" in cls.__name__ else []
        for changes, error, fragments in rows:
            if "step" in fragments and "per_channel" in arguments:
                changes = {name: [value] * 3 for name, value in changes.items()}
            yield pytest.param(
                cls, arguments | changes, error, fragments, id=f"{cls.__name__}{changes}"
            )


@pytest.mark.parametrize(("cls", "arguments", "error", "fragments"), list(bad_rows()))
def test_bad_arguments_are_refused_at_construction(cls, arguments, error, fragments):
    refused(error, lambda: cls(**arguments), *fragments)


def test_activations_have_one_range():
    for cls, rest in (
        (qi.ActivationSymmetricInferableQuantizer, ([1.0, 2.0], True)),
        (qi.ActivationPOTInferableQuantizer, ([1.0, 2.0], True)),
        (qi.ActivationUniformInferableQuantizer, ([-1.0, -1.0], [1.0, 2.0])),
    ):
        refused(ValueError, lambda c=cls, r=rest: c(8, *r), "one number", "per tensor")
