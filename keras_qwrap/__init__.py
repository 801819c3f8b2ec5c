"""Quantization-aware training for Keras 3: wrap layers, train, convert, save, reload exactly.

Importing this package is enough to load any file saved with it.
"""

from keras_qwrap._version import __version__
from keras_qwrap.files import custom_objects, keras_load_quantized_model
from keras_qwrap.holder import KerasActivationQuantizationHolder
from keras_qwrap.models import convert_to_inferable
from keras_qwrap.quantizers import inferable as keras_inferable_quantizers
from keras_qwrap.quantizers.base import (
    BaseKerasInferableQuantizer,
    BaseKerasTrainableQuantizer,
    mark_quantizer,
)
from keras_qwrap.quantizers.config import (
    QuantizationMethod,
    QuantizationTarget,
    TrainableQuantizerActivationConfig,
    TrainableQuantizerWeightsConfig,
)
from keras_qwrap.quantizers.inferable import (
    ActivationLutPOTInferableQuantizer,
    ActivationPOTInferableQuantizer,
    ActivationSymmetricInferableQuantizer,
    ActivationUniformInferableQuantizer,
    WeightsLUTPOTInferableQuantizer,
    WeightsLUTSymmetricInferableQuantizer,
    WeightsPOTInferableQuantizer,
    WeightsSymmetricInferableQuantizer,
    WeightsUniformInferableQuantizer,
)
from keras_qwrap.quantizers.ste import (
    STEActivationQATQuantizer,
    STEUniformActivationQATQuantizer,
    STEUniformWeightQATQuantizer,
    STEWeightQATQuantizer,
)
from keras_qwrap.rounding import (
    fake_lookup,
    fake_quantize,
    fake_quantize_covered,
    fake_quantize_unclipped,
)
from keras_qwrap.wrapper import KerasQuantizationWrapper

NodeWeightsQuantizationConfig = TrainableQuantizerWeightsConfig
NodeActivationQuantizationConfig = TrainableQuantizerActivationConfig

__all__ = [
    "ActivationLutPOTInferableQuantizer",
    "ActivationPOTInferableQuantizer",
    "ActivationSymmetricInferableQuantizer",
    "ActivationUniformInferableQuantizer",
    "BaseKerasInferableQuantizer",
    "BaseKerasTrainableQuantizer",
    "KerasActivationQuantizationHolder",
    "KerasQuantizationWrapper",
    "NodeActivationQuantizationConfig",
    "NodeWeightsQuantizationConfig",
    "QuantizationMethod",
    "QuantizationTarget",
    "STEActivationQATQuantizer",
    "STEUniformActivationQATQuantizer",
    "STEUniformWeightQATQuantizer",
    "STEWeightQATQuantizer",
    "TrainableQuantizerActivationConfig",
    "TrainableQuantizerWeightsConfig",
    "WeightsLUTPOTInferableQuantizer",
    "WeightsLUTSymmetricInferableQuantizer",
    "WeightsPOTInferableQuantizer",
    "WeightsSymmetricInferableQuantizer",
    "WeightsUniformInferableQuantizer",
    "__version__",
    "convert_to_inferable",
    "custom_objects",
    "fake_lookup",
    "fake_quantize",
    "fake_quantize_covered",
    "fake_quantize_unclipped",
    "keras_inferable_quantizers",
    "keras_load_quantized_model",
    "mark_quantizer",
]
