"""What the tests of moving averages share: quantizers, and a reference in numpy."""

import math

import numpy as np
from reference import integer_codes, integer_values, to_numpy

import keras_qwrap as qi
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer

M = qi.QuantizationMethod
METHODS = [M.UNIFORM, M.SYMMETRIC, M.POWER_OF_TWO]
BATCHES = [[0.5, 2.0], [-1.0, 0.25], [3.0, 4.5], [-0.125, -0.5]]


def make(method=M.UNIFORM, bits=8, params=None, momentum=0.9, range_method="mse", **options):
    config = qi.TrainableQuantizerActivationConfig(method, bits, params or {}, **options)
    return MovingAverageActivationQATQuantizer(config, momentum, range_method)


def hold(quantizer, shape=(None,)):
    holder = qi.KerasActivationQuantizationHolder(quantizer)
    holder.build(shape)
    return holder


def holding(low, high, *args, **kwargs):
    """A holder whose quantizer has a range."""
    quantizer = make(*args, **kwargs)
    holder = hold(quantizer)
    quantizer.set_range(low, high)
    return holder


def state(quantizer, role):
    return to_numpy(quantizer.quantizer_parameters[role]).item()


def f32(numbers):
    return np.asarray(numbers, np.float32)


def moving_ranges(batches, momentum):
    """The range after each batch; float32 as the quantizer is."""
    old, new = np.float32(momentum), np.float32(1 - momentum)
    low, high = np.float32(0), np.float32(0)
    for batch in batches:
        least, most = min(*f32(batch), np.float32(0)), max(*f32(batch), np.float32(0))
        begun = low < 0 or high > 0
        low = old * low + new * least if begun else least
        high = old * high + new * most if begun else most
        yield float(low), float(high)


def grid_of(low, high, method, bits):
    """Scale, zero point, lowest and highest code, of a range that is wide enough."""
    low, high = np.float32(low), np.float32(high)
    if method is M.UNIFORM:
        scale = (high - low) * np.float32(1 / (2**bits - 1))
        return scale, int(np.round(-low / scale)), 0, 2**bits - 1
    signed = low < 0
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    scale = high * np.float32(1 / highest)
    if signed:
        scale = max(scale, -low * np.float32(2.0 ** (1 - bits)))
    if method is M.POWER_OF_TWO:
        fraction, exponent = math.frexp(scale)
        scale = np.float32(2.0 ** (exponent if fraction > 0.5 else exponent - 1))
    return scale, 0, lowest, highest


def quantized(x, low, high, method, bits):
    scale, zero_point, lowest, highest = grid_of(low, high, method, bits)
    codes = integer_codes(x, scale, zero_point, lowest, highest)
    return integer_values(codes, scale, zero_point)
