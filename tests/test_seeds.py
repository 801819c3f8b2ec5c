"""The code blocks of the two documents that this package implements, with changed imports only.

Filled in are what the documents leave open: the `...`, `custom_quantize`, and how the class is
found when a file is loaded. The text between `fmt: off` and `fmt: on` is theirs.
"""

# ruff: noqa: E501, F541, RET504, UP008, W291, W293

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import keras_qwrap as qi
from keras_qwrap import (
    BaseKerasTrainableQuantizer,
    NodeActivationQuantizationConfig,
    NodeWeightsQuantizationConfig,
)

pytestmark = pytest.mark.tensorflow

NEW_PARAM = "new_param_name"


@tf.custom_gradient
def trains(quantized, new_param):
    """`quantized`, bit for bit, with a gradient for the parameter that it was made with."""

    def grad(upstream):
        return upstream, tf.fill(tf.shape(new_param), tf.reduce_mean(upstream))

    return tf.identity(quantized), grad


def custom_quantize(inputs, new_param):
    """Unsigned 8-bit codes over `[-t, t]`, with `t` the largest of the parameter's elements."""
    new_param = tf.convert_to_tensor(new_param)
    bound = tf.stop_gradient(tf.reduce_max(new_param))
    scale = (bound + bound) * np.float32(1 / 255)
    zero_point = tf.round(bound / scale)
    return trains(qi.fake_quantize(inputs, scale, -zero_point, 255 - zero_point), new_param)


# fmt: off
@keras.saving.register_keras_serializable("test_seeds")
class MyWeightsTrainingQuantizer(BaseKerasTrainableQuantizer):
    def __init__(self, quantization_config: NodeWeightsQuantizationConfig):
        super(MyWeightsTrainingQuantizer, self).__init__(quantization_config,
                                                 qi.QuantizationTarget.Weights,
                                                 [qi.QuantizationMethod.SYMMETRIC])
        # Define your new params here:
        self.new_param = quantization_config.weights_quantization_params[NEW_PARAM]
    
    def initialize_quantization(self, tensor_shape, name, layer):
        # Creating new params for quantizer
        new_param = layer.add_weight(NEW_PARAM,
                                     shape=len(tensor_shape),
                                     initializer=tf.keras.initializers.Constant(1.0),
                                     trainable=True)
        new_param.assign(self.new_param)
        # Save the quantizer parameters for later calculations
        self.quantizer_parameters = {NEW_PARAM: new_param}
        return self.quantizer_parameters
    
    def __call__(self, inputs):
        # Your quantization logic here
        new_param = self.quantizer_parameters[NEW_PARAM]
        # Custom quantization function you need to implement
        quantized_inputs = custom_quantize(inputs, new_param)
        return quantized_inputs

    def convert2inferable(self):
        bound = float(tf.reduce_max(self.quantizer_parameters[NEW_PARAM]))
        return qi.WeightsUniformInferableQuantizer(8, -bound, bound, per_channel=False)


class MyActivationsTrainingQuantizer(BaseKerasTrainableQuantizer):
    def __init__(self, quantization_config: NodeActivationQuantizationConfig):
        super(MyActivationsTrainingQuantizer, self).__init__(quantization_config,
                                                 qi.QuantizationTarget.Activation,
                                                 [qi.QuantizationMethod.SYMMETRIC])
        # Define your new params here:
        self.new_param = quantization_config.activation_quantization_params[NEW_PARAM]
    
    def initialize_quantization(self, tensor_shape, name, layer):
        # Creating new params for quantizer
        new_param = layer.add_weight(NEW_PARAM,
                                     shape=len(tensor_shape),
                                     initializer=tf.keras.initializers.Constant(1.0),
                                     trainable=True)
        new_param.assign(self.new_param)
        # Save the quantizer parameters for later calculations
        self.quantizer_parameters = {NEW_PARAM: new_param}
        return self.quantizer_parameters
    
    def __call__(self, inputs):
        # Your quantization logic here
        new_param = self.quantizer_parameters[NEW_PARAM]
        # Custom quantization function you need to implement
        quantized_inputs = custom_quantize(inputs, new_param)
        return quantized_inputs

    def convert2inferable(self):
        bound = float(tf.reduce_max(self.quantizer_parameters[NEW_PARAM]))
        return qi.ActivationUniformInferableQuantizer(8, -bound, bound)
# fmt: on


def weights_quantizer(rank, bound):
    params = {NEW_PARAM: [bound] + [bound / 2] * (rank - 1)}
    config = NodeWeightsQuantizationConfig(
        qi.QuantizationMethod.SYMMETRIC, weights_quantization_params=params
    )
    return MyWeightsTrainingQuantizer(config)


def activation_quantizer(rank, bound):
    params = {NEW_PARAM: [bound] + [bound / 2] * (rank - 1)}
    config = NodeActivationQuantizationConfig(
        qi.QuantizationMethod.SYMMETRIC, activation_quantization_params=params
    )
    return MyActivationsTrainingQuantizer(config)


LAYERS = {
    "Dense": (lambda: keras.layers.Dense(3), {"kernel": 2}, 2, (5,)),
    "Conv2D": (lambda: keras.layers.Conv2D(3, 2), {"kernel": 4}, 4, (4, 4, 2)),
    "DepthwiseConv2D": (
        lambda: keras.layers.DepthwiseConv2D(2, depth_multiplier=2),
        {"kernel": 4},
        4,
        (4, 4, 2),
    ),
    "LSTM": (
        lambda: keras.layers.LSTM(3),
        {"cell/kernel": 2, "cell/recurrent_kernel": 2},
        2,
        (4, 2),
    ),
}


def quantized(name):
    """A model of one wrapped layer, and inputs."""
    make, weights, output_rank, shape = LAYERS[name]
    keras.utils.set_random_seed(0)
    wrapper = qi.KerasQuantizationWrapper(
        make(),
        {path: weights_quantizer(rank, 0.5) for path, rank in weights.items()},
        activation_quantizer(output_rank, 1.0),
        name="wrapped",
    )
    x = np.random.default_rng(0).normal(size=(32, *shape)).astype("float32")
    return keras.Sequential([keras.Input(shape), wrapper]), x


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_trainable_quantizers_of_the_document(name, tmp_path):
    """One epoch of training, conversion, both file formats: no bit changes."""
    model, x = quantized(name)
    wrapper, weights = model.layers[0], LAYERS[name][1]
    y = np.random.default_rng(1).normal(size=(32, *model.output_shape[1:])).astype("float32")
    before = [ops.convert_to_numpy(v.value).copy() for v in model.trainable_variables]
    model.compile("adam", "mse")
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    trained = {
        v.path
        for v, old in zip(model.trainable_variables, before, strict=True)
        if any_change(v, old)
    }
    assert trained == {v.path for v in model.trainable_variables}
    assert sum(NEW_PARAM in path for path in trained) == len(weights) + 1
    assert len(np.unique(wrapper.get_codes()[next(iter(weights))][0])) > 5

    converted = qi.convert_to_inferable(model)
    eager, graph = ops.convert_to_numpy(model(x)), model.predict(x, verbose=0)
    same_outputs(converted, x, eager, graph)
    objects = {"MyActivationsTrainingQuantizer": MyActivationsTrainingQuantizer}
    for ending in ("keras", "h5"):
        path = tmp_path / f"model.{ending}"
        model.save(path)
        loaded = qi.keras_load_quantized_model(path, custom_objects=objects, compile=False)
        same_outputs(loaded, x, eager, graph)
        kept = loaded.layers[0].activation_quantizers[0]
        assert isinstance(kept, MyActivationsTrainingQuantizer)
        converted.save(path)
        same_outputs(qi.keras_load_quantized_model(path, compile=False), x, eager, graph)


def on_another_grid(inputs, new_param):
    """Signed 8-bit codes over `[-t, t)`: not what the documents' inferable quantizers hold."""
    bound = tf.stop_gradient(tf.reduce_max(tf.convert_to_tensor(new_param)))
    return trains(qi.fake_quantize(inputs, bound * np.float32(1 / 128), -128, 127), new_param)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_trainable_quantizers_that_compute_on_another_grid(name, tmp_path, monkeypatch):
    """They convert with a warning; the converted model has the weights of the named quantizer."""
    monkeypatch.setitem(globals(), "custom_quantize", on_another_grid)
    model, x = quantized(name)
    wrapper, weights = model.layers[0], LAYERS[name][1]
    model.compile("adam", "mse")
    model.fit(x, np.zeros((32, *model.output_shape[1:])), batch_size=8, verbose=0)
    with pytest.warns(UserWarning, match="differ from those of training") as caught:
        converted = qi.convert_to_inferable(model)
    named = [str(warning.message).partition(":")[0] for warning in caught]
    assert named == [f"layer 'wrapped', weight '{path}'" for path in weights]
    for path in weights:
        quantizer = wrapper.weights_quantizers[path].convert2inferable()
        latent = ops.convert_to_numpy(wrapper.latent_weight(path))
        held = converted.layers[0].get_quantized_weights()[path]
        assert np.array_equal(held, quantizer(latent))
        assert np.array_equal(wrapper.get_codes()[path][0], quantizer.quantize_to_codes(latent))
    eager, graph = ops.convert_to_numpy(converted(x)), converted.predict(x, verbose=0)
    objects = {"MyActivationsTrainingQuantizer": MyActivationsTrainingQuantizer}
    for ending in ("keras", "h5"):
        converted.save(tmp_path / f"model.{ending}")
        loaded = qi.keras_load_quantized_model(tmp_path / f"model.{ending}", compile=False)
        same_outputs(loaded, x, eager, graph)
        model.save(tmp_path / f"trained.{ending}")
        loaded = qi.keras_load_quantized_model(
            tmp_path / f"trained.{ending}", custom_objects=objects, compile=False
        )
        same_outputs(loaded, x, ops.convert_to_numpy(model(x)), model.predict(x, verbose=0))


def any_change(variable, old):
    return not np.array_equal(ops.convert_to_numpy(variable.value), old)


def same_outputs(model, x, eager, graph):
    assert np.array_equal(ops.convert_to_numpy(model(x)), eager)
    assert np.array_equal(model.predict(x, verbose=0), graph)


def test_weights_usage_example_of_the_document():
    # fmt: off
    # Creates a WeightsSymmetricInferableQuantizer instance for quantizing a tensor with four dimensions.
    # The quantizer uses 8 bits for quantization and quantizes the tensor per channel.
    # The quantizer uses three thresholds (1, 2, and 3) for quantizing each of the three output channels.
    # The quantization axis is the last dimension (-1).
    quantizer = qi.keras_inferable_quantizers.WeightsSymmetricInferableQuantizer(num_bits=8,
                                                                                 threshold=[2.0, 3.0, 1.0],
                                                                                 per_channel=True,
                                                                                 channel_axis=-1,
                                                                                 input_rank=4)

    # Initialize a random input to quantize. Note that the input must have float data type.
    input_tensor = tf.random.uniform(shape=(1, 3, 3, 3), minval=-100, maxval=100, dtype=tf.float32)
    # Quantize tensor
    quantized_tensor = quantizer(input_tensor)
    print(quantized_tensor)

    # The maximal threshold is 3 using a signed quantization, so we expect all values to be in this range
    assert tf.reduce_max(quantized_tensor) < 3, f'Quantized values should not contain values greater than maximal threshold'
    assert tf.reduce_min(quantized_tensor) >= -3, f'Quantized values should not contain values lower than minimal threshold'

    # fmt: on
    step = np.float32([2.0, 3.0, 1.0]) / np.float32(128)
    codes = np.clip(np.round(input_tensor.numpy() / step), -128, 127)
    assert np.array_equal(quantized_tensor.numpy(), codes.astype("float32") * step)


def test_activation_usage_example_of_the_document():
    # fmt: off
    # Creates an ActivationSymmetricInferableQuantizer quantizer.
    # The quantizer uses 8 bits for quantization and quantizes the tensor per-tensor 
    # (per-channel quantization is not supported in activation quantizers). 
    # The quantization is unsigned, meaning the range of values is between 0 and the
    # threshold, which is 5.0.
    quantizer = qi.keras_inferable_quantizers.ActivationSymmetricInferableQuantizer(num_bits=8,
                                                                                    threshold=[5.0],
                                                                                    signed=False)

    # Initialize a random input to quantize. Note that the input must have float data type.
    input_tensor = tf.random.uniform(shape=(1, 3, 3, 3), minval=-100, maxval=100, dtype=tf.float32)
    # Quantize tensor
    quantized_tensor = quantizer(input_tensor)
    print(quantized_tensor)

    # The maximal threshold is 3 using a signed quantization, so we expect all values to be in this range
    assert tf.reduce_max(quantized_tensor) < 5, f'Quantized values should not contain values greater than maximal threshold'
    assert tf.reduce_min(quantized_tensor) >= 0, f'Quantized values should not contain values lower than minimal threshold'

    # fmt: on
    step = np.float32(5.0) / np.float32(256)
    codes = np.clip(np.round(input_tensor.numpy() / step), 0, 255)
    assert np.array_equal(quantized_tensor.numpy(), codes.astype("float32") * step)
