"""What a quantizer of one's own must state, and what the base classes refuse."""

import keras
import numpy as np
import pytest
from reference import refused, same

import keras_qwrap as qi

M, T = qi.QuantizationMethod, qi.QuantizationTarget
WEIGHTS = qi.TrainableQuantizerWeightsConfig(M.SYMMETRIC, 4)
ACTIVATION = qi.TrainableQuantizerActivationConfig(M.SYMMETRIC, 4, {"threshold": 2.0})


class Plain(qi.BaseKerasTrainableQuantizer):
    """Gives target and methods to the constructor of the base class."""

    def __init__(self, quantization_config):
        super().__init__(quantization_config, T.Weights, [M.SYMMETRIC])

    def initialize_quantization(self, tensor_shape, name, layer):
        limit = layer.add_weight("limit", shape=(), initializer="ones")
        self.quantizer_parameters = {"limit": limit}
        return self.quantizer_parameters

    def __call__(self, inputs):
        return qi.fake_quantize(inputs, self.quantizer_parameters["limit"] / 8, -8, 7)

    def convert2inferable(self):
        return qi.WeightsSymmetricInferableQuantizer(4, 1.0, False)


@qi.mark_quantizer(T.Weights, [M.SYMMETRIC, M.POWER_OF_TWO], identifier="mine")
class Marked(Plain):
    """Has them from the decorator."""

    def __init__(self, quantization_config):
        qi.BaseKerasTrainableQuantizer.__init__(self, quantization_config)


class WithArgument(Plain):
    """Forgets to store its argument."""

    def __init__(self, quantization_config, slope=1.0):
        super().__init__(quantization_config)
        self.slope = slope


@keras.saving.register_keras_serializable("test_base")
class Complete(WithArgument):
    """Stores it."""

    def get_config(self):
        return super(WithArgument, self).get_config() | {"slope": self.slope}


class Forgetful(WithArgument):
    """Overrides `get_config`, and forgets it all the same."""

    def get_config(self):
        return {"quantization_config": self.quantization_config.get_config()}


@pytest.mark.parametrize(("cls", "methods"), [(Plain, 1), (Marked, 2)])
def test_two_ways_to_give_target_and_methods(cls, methods):
    quantizer = cls(WEIGHTS)
    assert quantizer.quantization_target is T.Weights
    assert quantizer.quantization_method == [M.SYMMETRIC, M.POWER_OF_TWO][:methods]
    wrapper = qi.KerasQuantizationWrapper(keras.layers.Dense(2), {"kernel": quantizer})
    wrapper.build((None, 3))
    assert set(quantizer.quantizer_parameters) == {"limit"}
    weight = np.float32([0.3, -9, 9])
    same(quantizer(weight), np.float32([0.25, -1, 0.875]))
    np.testing.assert_array_equal(quantizer.quantize_to_codes(weight), [2, -8, 7])
    np.testing.assert_array_equal(quantizer.dequantize([2, -8]), [0.25, -1])
    assert (quantizer.num_bits, quantizer.scale, quantizer.zero_point) == (4, 0.125, 0)


def test_the_mark_is_on_the_class():
    assert (Marked.quantization_target, Marked.identifier) == (T.Weights, "mine")
    assert qi.STEWeightQATQuantizer.identifier == "STEWeightQATQuantizer"
    assert not hasattr(Plain, "quantization_target")


def test_the_constructor_overrules_the_mark():
    @qi.mark_quantizer(T.Activation, [M.UNIFORM])
    class Both(Plain):
        pass

    assert Both(WEIGHTS).quantization_target is T.Weights
    assert Both.quantization_target is T.Activation


@pytest.mark.parametrize(
    "arguments", [(), (T.Weights,), (None, [M.SYMMETRIC])], ids=["both", "methods", "target"]
)
def test_a_target_or_method_that_nobody_gave(arguments):
    class Unmarked(qi.BaseKerasTrainableQuantizer):
        def __init__(self, quantization_config):
            super().__init__(quantization_config, *arguments)

    refused(
        TypeError, lambda: Unmarked(WEIGHTS), "Unmarked", "target and methods", "mark_quantizer"
    )


@pytest.mark.parametrize(
    ("target", "methods", "fragments"),
    [
        ("weights", [M.SYMMETRIC], ["quantization_target", "'weights'", "Weights, Activation"]),
        (M.SYMMETRIC, [M.SYMMETRIC], ["quantization_target", "SYMMETRIC", "QuantizationTarget"]),
        (T.Weights, M.SYMMETRIC, ["quantization_method", "SYMMETRIC", "list of"]),
        (T.Weights, [], ["quantization_method", "[]", "list of"]),
        (T.Weights, ["symmetric"], ["quantization_method", "'symmetric'", "UNIFORM"]),
    ],
)
def test_a_target_or_method_of_the_wrong_kind(target, methods, fragments):
    refused(TypeError, lambda: qi.mark_quantizer(target, methods), *fragments)

    class Wrong(qi.BaseKerasTrainableQuantizer):
        def __init__(self, quantization_config):
            super().__init__(quantization_config, target, methods)

    refused(TypeError, lambda: Wrong(WEIGHTS), *fragments)


@pytest.mark.parametrize("config", [ACTIVATION, None, {"weights_n_bits": 8}, M.SYMMETRIC], ids=str)
def test_a_config_of_the_wrong_kind(config):
    for cls in (Plain, Marked, qi.STEWeightQATQuantizer, qi.STEUniformWeightQATQuantizer):
        expected = ["quantization_config", type(config).__name__, "TrainableQuantizerWeightsConfig"]
        refused(TypeError, lambda c=cls: c(config), *expected, f"{cls.__name__} quantizes weights")


def test_a_weights_config_for_an_activation_quantizer():
    for cls in (qi.STEActivationQATQuantizer, qi.STEUniformActivationQATQuantizer):
        expected = ["TrainableQuantizerActivationConfig", f"{cls.__name__} quantizes activation"]
        refused(TypeError, lambda c=cls: c(WEIGHTS), *expected)


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (Plain, M.POWER_OF_TWO),
        (Marked, M.UNIFORM),
        (qi.STEWeightQATQuantizer, M.UNIFORM),
        (qi.STEWeightQATQuantizer, M.LUT_SYM_QUANTIZER),
        (qi.STEUniformWeightQATQuantizer, M.SYMMETRIC),
        (qi.STEActivationQATQuantizer, M.UNIFORM),
        (qi.STEUniformActivationQATQuantizer, M.POWER_OF_TWO),
    ],
)
def test_a_method_that_the_class_does_not_support(cls, method):
    if "Activation" in cls.__name__:
        config = qi.TrainableQuantizerActivationConfig(method)
    else:
        config = qi.TrainableQuantizerWeightsConfig(method)
    message = refused(ValueError, lambda: cls(config), f"'{method.name}'", cls.__name__)
    known = qi.STEWeightQATQuantizer.quantization_method if cls is not Plain else []
    if cls is qi.STEWeightQATQuantizer:
        assert ", ".join(m.name for m in known) in message


def test_a_quantizer_for_the_other_target():
    weights = qi.WeightsSymmetricInferableQuantizer(8, 1.0, False)
    activation = qi.ActivationSymmetricInferableQuantizer(8, 1.0, True)
    dense = keras.layers.Dense(2)
    wrap = qi.KerasQuantizationWrapper
    for wrong in (activation, qi.STEActivationQATQuantizer(ACTIVATION)):
        expected = ["weights_quantizers['kernel']", "for weights", "is for activation"]
        refused(ValueError, lambda q=wrong: wrap(dense, {"kernel": q}), *expected)
    for wrong in (weights, qi.STEWeightQATQuantizer(WEIGHTS)):
        expected = ["for activation", "is for weights", type(wrong).__name__]
        refused(
            ValueError,
            lambda q=wrong: wrap(dense, None, [q]),
            "activation_quantizers[0]",
            *expected,
        )
        refused(ValueError, lambda q=wrong: qi.KerasActivationQuantizationHolder(q), *expected)


def test_a_trainable_quantizer_in_two_places():
    """It holds the variables of the one; an inferable one is copied instead."""
    shared = qi.STEWeightQATQuantizer(WEIGHTS)
    first = qi.KerasQuantizationWrapper(keras.layers.Dense(2, name="one"), {"kernel": shared})
    second = keras.layers.Dense(2)
    refused(
        ValueError,
        lambda: qi.KerasQuantizationWrapper(second, {"kernel": shared}),
        "'one'",
        "used nowhere else",
        "one for each use",
    )
    assert first.weights_quantizers["kernel"] is shared
    inferable = qi.WeightsSymmetricInferableQuantizer(8, 1.0, False)
    for _ in range(2):
        wrapper = qi.KerasQuantizationWrapper(keras.layers.Dense(2), {"kernel": inferable})
        assert wrapper.weights_quantizers["kernel"] is not inferable


def test_the_base_config_is_just_the_quantization_config():
    config = Plain(WEIGHTS).get_config()
    assert list(config) == ["quantization_config"]
    copy = Plain.from_config(config)
    assert type(copy) is Plain
    assert copy.quantization_config == WEIGHTS
    assert Plain.from_config({"quantization_config": WEIGHTS}).quantization_config == WEIGHTS


def test_an_argument_missing_from_the_config_is_refused():
    """It would be lost in a saved file."""
    fragments = ["['slope']", "super().get_config()"]
    refused(ValueError, WithArgument(WEIGHTS, 2.0).get_config, "WithArgument", *fragments)
    for quantizer in (WithArgument(WEIGHTS, 2.0), Forgetful(WEIGHTS, 2.0)):
        wrapper = qi.KerasQuantizationWrapper(keras.layers.Dense(2), {"kernel": quantizer})
        refused(ValueError, wrapper.get_config, type(quantizer).__name__, *fragments)


def test_an_argument_in_the_config_comes_back():
    quantizer = Complete(WEIGHTS, 2.5)
    wrapper = qi.KerasQuantizationWrapper(keras.layers.Dense(2), {"kernel": quantizer})
    copy = qi.KerasQuantizationWrapper.from_config(wrapper.get_config())
    assert type(copy.weights_quantizers["kernel"]) is Complete
    assert copy.weights_quantizers["kernel"].slope == 2.5
    assert copy.weights_quantizers["kernel"].quantization_config == WEIGHTS


def test_what_a_trainable_quantizer_must_define_is_named():
    @qi.mark_quantizer(T.Weights, [M.SYMMETRIC])
    class Nothing(qi.BaseKerasTrainableQuantizer):
        pass

    nothing = Nothing(WEIGHTS)
    for method, action in (
        ("initialize_quantization(", lambda: nothing.initialize_quantization((2,), "w", None)),
        ("__call__(", lambda: nothing(1.0)),
        ("convert2inferable(", nothing.convert2inferable),
    ):
        with pytest.raises(NotImplementedError) as caught:
            action()
        assert f"Nothing must define {method}" in str(caught.value)


def test_what_an_inferable_quantizer_must_define_is_named():
    class Nothing(qi.BaseKerasInferableQuantizer):
        pass

    nothing = Nothing()
    assert nothing.initialize_quantization((2,), "w", None) == {}
    for method, action in (
        ("__call__(", lambda: nothing(1.0)),
        ("num_bits", lambda: nothing.num_bits),
        ("scale", lambda: nothing.scale),
        ("zero_point", lambda: nothing.zero_point),
        ("quantize_to_codes(", lambda: nothing.quantize_to_codes(1.0)),
        ("dequantize(", lambda: nothing.dequantize(1)),
        ("get_config(", nothing.get_config),
    ):
        with pytest.raises(NotImplementedError) as caught:
            action()
        assert f"Nothing must define {method}" in str(caught.value)


class Described(qi.BaseKerasTrainableQuantizer):
    """Of a user's own, with further arguments, which it keeps under their names or not."""

    def __init__(self, quantization_config, momentum=0.9, hidden=3):
        super().__init__(quantization_config, T.Weights, [M.SYMMETRIC])
        self.momentum = momentum
        self._hidden = hidden


@qi.mark_quantizer(T.Weights, [M.SYMMETRIC])
class DescribedInferable(qi.BaseKerasInferableQuantizer):
    def __init__(self, table, offset=0.0):
        self.table, self.offset = table, offset

    def get_config(self):
        raise AssertionError("a repr asks for nothing")

    quantize_to_codes = __call__ = get_config


def test_texts_of_a_users_quantizers():
    assert repr(Described(WEIGHTS)) == "Described('SYMMETRIC', 4)"
    text = "Described('SYMMETRIC', 4, momentum=0.5)"
    assert repr(Described(WEIGHTS, 0.5, 4)) == text
    assert repr(DescribedInferable(list(range(1000)))) == (
        "DescribedInferable(table=[0, 1, 2, 3, ...])"
    )
    assert repr(DescribedInferable({}, 1.5)) == "DescribedInferable(table={}, offset=1.5)"
    assert len(repr(DescribedInferable(np.zeros((100, 100)), "x" * 1000))) < 200


def test_texts_of_our_quantizers():
    """All of what they were given; once a layer holds the ranges, all but these."""
    for quantizer in (
        qi.WeightsSymmetricInferableQuantizer(4, [1.0, 2.0], True, 1, 2, narrow=True),
        qi.WeightsPOTInferableQuantizer(8, 0.5, False),
        qi.WeightsUniformInferableQuantizer(3, [-1.0] * 2, [1.0, 2.0], True, 0, 2),
        qi.WeightsLUTSymmetricInferableQuantizer(2, [-3, 0, 5], 2.0, per_channel=False),
        qi.ActivationSymmetricInferableQuantizer(8, 2.0, signed=False),
        qi.ActivationUniformInferableQuantizer(8, -1.0, 2.5),
        qi.ActivationLutPOTInferableQuantizer(2, [0, 64], 4.0, signed=False),
    ):
        again = eval(repr(quantizer), vars(qi))
        assert again.get_config() == quantizer.get_config()
        assert type(again) is type(quantizer)
    many = qi.WeightsSymmetricInferableQuantizer(8, [1.0] * 1000, True, 1, 2)
    assert repr(many) == (
        "WeightsSymmetricInferableQuantizer(num_bits=8, threshold=[1.0, 1.0, 1.0, 1.0, ...], "
        "per_channel=True, channel_axis=1, input_rank=2)"
    )
    dense = keras.layers.Dense(2, name="dense")
    output = qi.ActivationSymmetricInferableQuantizer(8, 2.0, True)
    layer = qi.KerasQuantizationWrapper(
        dense, {"kernel": qi.STEWeightQATQuantizer(WEIGHTS)}, output
    )
    layer.build((None, 3))
    kernel = "kernel=STEWeightQATQuantizer('SYMMETRIC', 4)"
    assert repr(layer) == (
        f"<KerasQuantizationWrapper name=dense, built=True, layer=Dense, {kernel}, "
        "output_0=ActivationSymmetricInferableQuantizer(num_bits=8, signed=True)>"
    )
    holder = qi.KerasActivationQuantizationHolder(output, name="held")
    assert repr(holder) == (
        "<KerasActivationQuantizationHolder name=held, built=False, output_0="
        "ActivationSymmetricInferableQuantizer(num_bits=8, threshold=2.0, signed=True)>"
    )


def test_texts_are_given_while_a_graph_is_traced():
    """There the value of a variable is not known."""
    texts = []

    class Told(qi.STEWeightQATQuantizer):
        def __call__(self, inputs):
            texts.extend(map(repr, (self, self._by.quantizer)))
            return super().__call__(inputs)

    config = qi.TrainableQuantizerWeightsConfig(M.SYMMETRIC, 8, {"threshold": 1.0}, True, -1, False)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            qi.KerasQuantizationWrapper(keras.layers.Dense(2), {"kernel": Told(config)}),
        ]
    )
    model.predict(np.zeros((1, 3)), verbose=0)
    assert {text.partition("(")[0] for text in texts} == {
        "Told",
        "WeightsSymmetricInferableQuantizer",
    }
