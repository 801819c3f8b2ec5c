"""State, losses, masks and random numbers under a wrapper are those of the bare layer.

The same model runs with and without wrapper; where everything must stay equal, the quantizer is
one that leaves weights as they are.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import Composite, activation, fixed, floats, register, weight

import keras_qwrap as qi

Wrapper = qi.KerasQuantizationWrapper


def to_numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def equal(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b), strict=True)


@register
class Untouched(qi.BaseKerasTrainableQuantizer):
    """Counts as a weights quantizer and leaves the weight as it is."""

    def __init__(self, quantization_config):
        super().__init__(
            quantization_config, qi.QuantizationTarget.Weights, [qi.QuantizationMethod.SYMMETRIC]
        )

    def initialize_quantization(self, tensor_shape, name, layer):
        return {}

    def __call__(self, inputs):
        return inputs * 1.0


def untouched():
    return Untouched(qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC))


def twins(layer, paths, shape):
    """The same model twice, with the same weights: bare, and under a wrapper that changes nothing.

    `layer` is a function that makes the layer.
    """
    models = []
    for wrap in (False, True):
        keras.utils.set_random_seed(5)
        inner = layer()
        outer = Wrapper(inner, {path: untouched() for path in paths}) if wrap else inner
        models.append((keras.Sequential([keras.Input(shape), outer]), inner))
    (bare, bare_layer), (wrapped, wrapped_layer) = models
    wrapped_layer.set_weights(bare_layer.get_weights())
    return bare, bare_layer, wrapped, wrapped_layer


def fit(model, x, y, epochs=2, **arguments):
    model.compile(keras.optimizers.SGD(0.1), "mse", **arguments)
    history = model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0)
    return history.history["loss"]


@pytest.mark.parametrize("eager", [False, True])
def test_batch_normalization_statistics(eager):
    bare, bare_layer, wrapped, layer = twins(
        layers.BatchNormalization, ["gamma", "beta", "moving_mean"], (3,)
    )
    before = to_numpy(layer.moving_variance)
    x, y = floats(8, 3) * 2 + 1, floats(8, 3)
    arguments = {"run_eagerly": True} if eager else {"jit_compile": False}
    assert fit(bare, x, y, **arguments) == fit(wrapped, x, y, **arguments)
    equal(bare_layer.variables, layer.variables)
    assert not np.array_equal(to_numpy(layer.moving_variance), before)


def test_batch_normalization_statistics_with_quantized_gamma():
    """The statistics see the layer's input, which quantizing gamma does not change."""
    keras.utils.set_random_seed(0)
    bare, layer = layers.BatchNormalization(), layers.BatchNormalization()
    wrapper = Wrapper(layer, {"gamma": fixed(2.0, 3)}, activation())
    for _ in range(3):
        bare(floats(8, 3), training=True)
        wrapper(floats(8, 3), training=True)
    equal([bare.moving_mean, bare.moving_variance], [layer.moving_mean, layer.moving_variance])


def test_dropout_inside_a_composite():
    bare, bare_layer, wrapped, layer = twins(
        lambda: Composite(0.5), ["first/kernel", "blocks/0/kernel"], (5,)
    )
    x, y = floats(8, 5), floats(8, 2)
    losses = fit(bare, x, y, jit_compile=False)
    assert losses == fit(wrapped, x, y, jit_compile=False)
    equal(bare_layer.variables, layer.variables)
    state = to_numpy(layer.dropout.seed_generator.state)
    np.testing.assert_array_equal(state, to_numpy(bare_layer.dropout.seed_generator.state))
    assert state[1] != 0


@register
class AddsLoss(layers.Layer):
    def build(self, input_shape):
        self.factor = self.add_weight(name="factor", shape=(), initializer="ones")

    def call(self, inputs):
        self.add_loss(3.0 * self.factor)
        return inputs * self.factor


@register
class SumOfWeights(keras.regularizers.Regularizer):
    def __call__(self, x):
        return ops.sum(x)

    def get_config(self):
        return {}


LOSSES = {
    "kernel_regularizer": (
        lambda: layers.Dense(2, kernel_initializer="ones", kernel_regularizer=SumOfWeights()),
        6.0,
    ),
    "activity_regularizer": (
        lambda: layers.Dense(2, kernel_initializer="ones", activity_regularizer=ops.sum),
        6.0,
    ),
    "add_loss": (AddsLoss, 3.0),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("eager", [False, True])
def test_losses_are_counted_once(kind, eager):
    make, expected = LOSSES[kind]
    path = "factor" if kind == "add_loss" else "kernel"
    x = np.ones((1, 3), "float32")
    for layer in (make(), Wrapper(make(), {path: fixed(4.0)})):
        model = keras.Sequential([keras.Input((3,)), layer])
        model(x)
        assert [to_numpy(loss) for loss in model.losses] == [expected]
        target = to_numpy(model(x))
        model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=eager)
        assert model.evaluate(x, target, verbose=0) == expected
        assert model.fit(x, target, verbose=0).history["loss"] == [expected]
        model(x)
        assert len(model.losses) == 1


def test_own_activity_regularizer_sees_the_quantized_output():
    wrapper = Wrapper(
        layers.Dense(2, kernel_initializer="ones"),
        activation_quantizers=activation(2.0, 2),
        activity_regularizer=ops.sum,
    )
    wrapper(np.full((1, 3), 0.3, "float32"))
    assert [to_numpy(loss) for loss in wrapper.losses] == [2.0]


def _masked(wrap):
    embedding = layers.Embedding(4, 3, mask_zero=True)
    lstm = layers.LSTM(2)
    if wrap:
        embedding = Wrapper(embedding, {"embeddings": untouched()}, activation(0.5, 16))
        lstm = Wrapper(lstm, {"cell/kernel": untouched()})
    return keras.Sequential([keras.Input((4,), dtype="int32"), embedding, lstm])


def test_masks_pass_through():
    """The output quantizer keeps the mask; its grid, 16 bits around 0.5, holds the values below."""
    bare, wrapped = _masked(False), _masked(True)
    weights = bare.get_weights()
    weights[0] = np.round(weights[0] * 2**10) / 2**10
    bare.set_weights(weights)
    wrapped.layers[0].layer.set_weights(weights[:1])
    wrapped.layers[1].layer.set_weights(weights[1:])
    x = np.array([[1, 2, 0, 0], [3, 1, 2, 0]], "int32")
    expected = to_numpy(bare(x))
    np.testing.assert_array_equal(to_numpy(wrapped(x)), expected)
    unpadded = to_numpy(wrapped(x[:1, :2]))
    np.testing.assert_allclose(unpadded, expected[:1], rtol=1e-5)
    mask = wrapped.layers[0].compute_mask(x)
    np.testing.assert_array_equal(to_numpy(mask), x != 0)


def test_attention_uses_the_masks_of_its_inputs():
    """The embedding is called anew for each use, since a call takes the mask off its input."""
    embedding = layers.Embedding(4, 4, mask_zero=True, embeddings_initializer="normal")
    bare, attention = layers.MultiHeadAttention(1, 2), layers.MultiHeadAttention(1, 2)
    wrapper = Wrapper(attention, {"query/kernel": untouched()}, activation(0.5, 16))
    holder = qi.KerasActivationQuantizationHolder(activation(0.5, 16))
    x = np.array([[1, 2, 0, 0]], "int32")

    def call(layer):
        return layer(query := embedding(x), query)

    call(bare)
    call(wrapper)
    attention.set_weights(bare.get_weights())
    masked = to_numpy(call(wrapper))
    np.testing.assert_array_equal(masked, to_numpy(holder(call(bare))))
    unmasked = embedding(x) * 1.0
    assert not np.array_equal(to_numpy(wrapper(unmasked, unmasked)), masked)


def test_stateful_gru_advances():
    keras.utils.set_random_seed(0)
    bare, inner = layers.GRU(2, stateful=True), layers.GRU(2, stateful=True)
    wrapper = Wrapper(inner, {"cell/kernel": untouched()})
    x = floats(1, 3, 2)
    bare(x)
    wrapper(x)
    inner.set_weights(bare.get_weights())
    bare.reset_states()
    inner.reset_states()
    outputs = [(to_numpy(bare(x)), to_numpy(wrapper(x))) for _ in range(2)]
    for expected, got in outputs:
        np.testing.assert_array_equal(got, expected)
    assert not np.array_equal(outputs[0][0], outputs[1][0])
    equal(inner.states, bare.states)


@register
class Counts(layers.Layer):
    """Owns a metric that it updates in its call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = keras.metrics.Sum(name="seen")

    def build(self, input_shape):
        self.factor = self.add_weight(name="factor", shape=(), initializer="ones")

    def call(self, inputs):
        self.seen.update_state(inputs)
        return inputs * self.factor


@pytest.mark.tensorflow
def test_metric_inside_a_wrapped_layer():
    """Bare layers with a metric of their own train on TensorFlow only."""
    x = np.ones((8, 3), "float32")
    for wrap in (False, True):
        inner = Counts()
        layer = Wrapper(inner, {"factor": untouched()}) if wrap else inner
        model = keras.Sequential([keras.Input((3,)), layer])
        fit(model, x, x, epochs=1, jit_compile=False)
        assert float(inner.seen.result()) == 24.0


def test_metric_inside_a_wrapped_layer_called_eagerly():
    inner = Counts()
    wrapper = Wrapper(inner, {"factor": untouched()})
    wrapper(np.ones((8, 3), "float32"))
    assert float(inner.seen.result()) == 24.0


@register
class Noise(layers.Layer):
    """Draws from Keras' global seed generator."""

    def build(self, input_shape):
        self.factor = self.add_weight(name="factor", shape=(), initializer="ones")

    def call(self, inputs):
        return inputs * self.factor + keras.random.normal(ops.shape(inputs))


def _draws(layer):
    keras.utils.set_random_seed(7)
    return [to_numpy(layer(np.zeros((2, 3), "float32"))) for _ in range(3)]


def test_global_seed_generator_advances():
    bare, wrapper = Noise(), Wrapper(Noise(), {"factor": untouched()})
    wrapper.build((2, 3))
    bare.build((2, 3))
    got = _draws(wrapper)
    equal(got, _draws(bare))
    assert not np.array_equal(got[0], got[1])


@pytest.mark.tensorflow
def test_global_seed_generator_advances_in_a_graph():
    model = keras.Sequential([keras.Input((3,)), Wrapper(Noise(), {"factor": untouched()})])
    model.compile(jit_compile=False)
    first, second = (model.predict(np.zeros((2, 3), "float32"), verbose=0) for _ in range(2))
    assert not np.array_equal(first, second)


@register
class DropoutCell(layers.Layer):
    """A recurrent cell that draws a new dropout mask, and so writes a state, at every step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.state_size = self.output_size = 2
        self.dense = layers.Dense(2)
        self.dropout = layers.Dropout(0.5, seed=1)

    def build(self, input_shape):
        self.dense.build((input_shape[0], input_shape[-1] + 2))

    def call(self, inputs, states, training=False):
        joined = ops.concatenate([inputs, states[0]], -1)
        output = self.dropout(self.dense(joined), training=training)
        return output, [output]


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_cell_that_holds_dropout(jit_compile):
    """Its state is written inside the traced loop; JAX refuses that unwrapped as well."""
    bare, bare_layer, wrapped, layer = twins(
        lambda: layers.RNN(DropoutCell()), ["cell/dense/kernel"], (4, 3)
    )
    x, y = floats(8, 4, 3), floats(8, 2)
    fit(bare, x, y, jit_compile=jit_compile)
    fit(wrapped, x, y, jit_compile=jit_compile)
    state = to_numpy(layer.cell.dropout.seed_generator.state)
    np.testing.assert_array_equal(state, to_numpy(bare_layer.cell.dropout.seed_generator.state))
    assert state[1] >= 4 * 4
    if not jit_compile:
        equal(bare_layer.variables, layer.variables)


@register
class Normalized(layers.Layer):
    """Divides its own kernel by its norm in training and reads it afterwards."""

    def build(self, input_shape):
        self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1], 2))

    def call(self, inputs, training=False):
        if training:
            self.kernel.assign(self.kernel / ops.sqrt(ops.sum(ops.square(self.kernel))))
        return ops.matmul(inputs, self.kernel)


def test_layer_that_assigns_its_quantized_weight_reads_the_new_one_quantized():
    inner = Normalized()
    wrapper = Wrapper(inner, {"kernel": fixed(1.0, 4)})
    wrapper.build((None, 3))
    start = np.array([[3.0, 0.1], [-2.5, 0.4], [1.0, -4.0]], "float32")
    inner.kernel.assign(start)

    def grid(kernel):
        return np.clip(np.round(kernel * 8), -8, 7) / np.float32(8)

    normalized = grid(start) / np.sqrt(np.sum(np.square(grid(start))))
    got = to_numpy(wrapper(np.eye(3, dtype="float32"), training=True))
    np.testing.assert_allclose(to_numpy(inner.kernel), normalized, rtol=1e-6)
    np.testing.assert_array_equal(got, grid(to_numpy(inner.kernel)))
    np.testing.assert_array_equal(to_numpy(wrapper(np.eye(3, dtype="float32"))), got)


def test_spectral_normalization_under_the_wrapper():
    """Keras' own layer of this kind, with a quantizer that changes nothing, against itself."""
    bare, bare_layer, wrapped, layer = twins(
        lambda: layers.SpectralNormalization(layers.Dense(2)), ["layer/kernel"], (3,)
    )
    for model in (bare, wrapped):
        model(floats(4, 3), training=True)
    equal(bare_layer.variables, layer.variables)


def test_weights_quantizer_sees_training():
    """The `training` of the call reaches quantizers that ask for it, also of plain layers."""
    seen = []

    class Asks(Untouched):
        def __call__(self, inputs, training):
            seen.append(training)
            return inputs

    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC)
    wrapper = Wrapper(layers.Dense(2), {"kernel": Asks(config)})
    wrapper(floats(2, 3), training=True)
    wrapper(floats(2, 3), training=False)
    assert seen == [True, False]


def test_non_trainable_float32_variable_is_not_rounded_by_a_mixed_policy():
    layer = layers.BatchNormalization(dtype="mixed_float16")
    wrapper = Wrapper(layer, {"gamma": weight(per_channel=False)})
    wrapper.build((None, 3))
    layer.moving_mean.assign(np.full(3, 1.0001, "float32"))
    wrapper(floats(2, 3))
    np.testing.assert_array_equal(to_numpy(layer.moving_mean), np.full(3, 1.0001, "float32"))
