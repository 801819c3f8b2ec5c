"""The models whose files are kept in `saved/` for good.

`python tests/saved_models.py` writes those of this version, once, before it is released; what is
there already is left as it is. Every serializable class of the package is in one of them.
"""

from pathlib import Path

import keras
import numpy as np
from keras import layers
from layer_cases import floats
from subclassed_models import Net

import keras_qwrap as qi

SAVED = Path(__file__).resolve().parent / "saved"
METHOD = qi.QuantizationMethod
Wrapper, Holder = qi.KerasQuantizationWrapper, qi.KerasActivationQuantizationHolder
CHANNELS = {"per_channel": True, "channel_axis": -1, "input_rank": 2}
IMAGES, ROWS = floats(4, 6, 6, 2), floats(4, 5)


def ste(method, bits, **params):
    config = qi.TrainableQuantizerWeightsConfig(method, bits, params)
    uniform = method is METHOD.UNIFORM
    return (qi.STEUniformWeightQATQuantizer if uniform else qi.STEWeightQATQuantizer)(config)


def output(method, cls, **params):
    return cls(qi.TrainableQuantizerActivationConfig(method, 8, params))


def trained() -> tuple[keras.Model, np.ndarray]:
    """Every trainable quantizer, after a few steps."""
    keras.utils.set_random_seed(0)
    moving = qi.MovingAverageActivationQATQuantizer
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            Holder(output(METHOD.UNIFORM, moving), name="image"),
            Wrapper(
                layers.Conv2D(3, 3, name="conv"),
                {"kernel": ste(METHOD.SYMMETRIC, 4)},
                output(METHOD.POWER_OF_TWO, qi.STEActivationQATQuantizer, threshold=4.0),
            ),
            layers.BatchNormalization(name="norm"),
            layers.Flatten(name="flat"),
            Wrapper(
                layers.Dense(3, name="hidden"),
                {"kernel": ste(METHOD.UNIFORM, 3)},
                output(
                    METHOD.UNIFORM,
                    qi.STEUniformActivationQATQuantizer,
                    range_min=-3.0,
                    range_max=2.0,
                ),
            ),
            Wrapper(
                layers.Dense(2, name="out"),
                {"kernel": ste(METHOD.POWER_OF_TWO, 8, threshold=[1.0, 0.5])},
            ),
        ],
        name="trained",
    )
    model.compile(keras.optimizers.SGD(0.01), keras.losses.MeanSquaredError())
    model.fit(IMAGES, floats(4, 2, seed=1), epochs=3, verbose=0)
    return model, IMAGES


def converted() -> tuple[keras.Model, np.ndarray]:
    """Every inferable quantizer."""
    keras.utils.set_random_seed(0)
    table = [-128, -40, -5, 0, 9, 30, 64, 127]
    outputs = [
        qi.ActivationSymmetricInferableQuantizer(8, 4.0, True),
        qi.ActivationPOTInferableQuantizer(6, 4.0, True),
        qi.ActivationUniformInferableQuantizer(5, -2.0, 3.0),
        qi.ActivationLutPOTInferableQuantizer(3, table, 4.0, True),
        None,
    ]
    weights = [
        qi.WeightsSymmetricInferableQuantizer(8, [0.5, 0.25, 0.75], **CHANNELS),
        qi.WeightsPOTInferableQuantizer(4, 0.5, per_channel=False),
        qi.WeightsUniformInferableQuantizer(2, [-0.5] * 3, [0.25, 0.5, 1.0], **CHANNELS),
        qi.WeightsLUTSymmetricInferableQuantizer(3, table, [0.7, 0.8, 0.9], **CHANNELS),
        qi.WeightsLUTPOTInferableQuantizer(3, table, 1.0, per_channel=False),
    ]
    parts = [
        Wrapper(layers.Dense(3, name=f"dense_{i}", bias_initializer="normal"), {"kernel": w}, a)
        for i, (w, a) in enumerate(zip(weights, outputs, strict=True))
    ]
    held = Holder(qi.ActivationUniformInferableQuantizer(16, -4.0, 4.0), name="held")
    model = keras.Sequential([keras.Input((5,)), held, *parts], name="converted")
    return qi.convert_to_inferable(model), ROWS


def subclassed() -> tuple[keras.Model, np.ndarray]:
    """A `QuantizedModel`, converted."""
    keras.utils.set_random_seed(0)
    net = Net()
    net(ROWS)
    quantized = qi.quantize_model(net, "w8a8", ROWS, verbose=0)
    return qi.convert_to_inferable(quantized), ROWS


MODELS = {
    "trained": (trained, (".keras", ".h5")),
    "converted": (converted, (".keras", ".h5")),
    "subclassed": (subclassed, (".keras",)),
}


def main() -> None:
    """Write the files of this version that are not there yet."""
    folder = SAVED / qi.__version__
    folder.mkdir(parents=True, exist_ok=True)
    for name, (make, endings) in MODELS.items():
        model, inputs = make()
        if (folder / f"{name}.npz").exists():
            continue
        for ending in endings:
            qi.save_quantized_model(model, folder / f"{name}{ending}")
        weights = {f"weight_{i}": array for i, array in enumerate(model.get_weights())}
        outputs = keras.ops.convert_to_numpy(model(inputs, training=False))
        np.savez_compressed(folder / f"{name}.npz", inputs=inputs, outputs=outputs, **weights)


if __name__ == "__main__":
    main()
