"""Quantization-aware training for Keras 3: wrap layers, train, convert, save, reload exactly.

Importing this package is enough to load any file saved with it.
"""

from keras_qwrap._version import __version__
from keras_qwrap.calibration.calibrate import calibrate
from keras_qwrap.calibration.schedules import DelayQuantization, FreezeRanges
from keras_qwrap.files.mct import migrate_mct_file
from keras_qwrap.files.saving import (
    custom_objects,
    keras_load_quantized_model,
    save_quantized_model,
)
from keras_qwrap.layers.holder import KerasActivationQuantizationHolder
from keras_qwrap.layers.layer_table import register_layer, register_layer_weights
from keras_qwrap.layers.weights import weight_paths
from keras_qwrap.layers.wrapper import KerasQuantizationWrapper
from keras_qwrap.models.batch_norm import fold_batch_norm, fold_scales
from keras_qwrap.models.convert import convert_to_inferable, unwrap_model
from keras_qwrap.models.subclassed import QuantizedModel
from keras_qwrap.numerics.rounding import (
    fake_lookup,
    fake_quantize,
    fake_quantize_covered,
    fake_quantize_unclipped,
)
from keras_qwrap.quantizers import inferable as keras_inferable_quantizers
from keras_qwrap.quantizers.base import (
    BaseKerasInferableQuantizer,
    BaseKerasTrainableQuantizer,
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
from keras_qwrap.quantizers.marks import mark_quantizer
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer
from keras_qwrap.quantizers.ste import (
    STEActivationQATQuantizer,
    STEUniformActivationQATQuantizer,
    STEUniformWeightQATQuantizer,
    STEWeightQATQuantizer,
)
from keras_qwrap.recipes.quantize import quantize_model
from keras_qwrap.recipes.recipe import Recipe
from keras_qwrap.recipes.rules import ActivationSpec, Rule, WeightsSpec
from keras_qwrap.reports.inspection import inspect_file
from keras_qwrap.reports.report import quantization_report

NodeWeightsQuantizationConfig = TrainableQuantizerWeightsConfig
NodeActivationQuantizationConfig = TrainableQuantizerActivationConfig

__all__ = [
    "ActivationLutPOTInferableQuantizer",
    "ActivationPOTInferableQuantizer",
    "ActivationSpec",
    "ActivationSymmetricInferableQuantizer",
    "ActivationUniformInferableQuantizer",
    "BaseKerasInferableQuantizer",
    "BaseKerasTrainableQuantizer",
    "DelayQuantization",
    "FreezeRanges",
    "KerasActivationQuantizationHolder",
    "KerasQuantizationWrapper",
    "MovingAverageActivationQATQuantizer",
    "NodeActivationQuantizationConfig",
    "NodeWeightsQuantizationConfig",
    "QuantizationMethod",
    "QuantizationTarget",
    "QuantizedModel",
    "Recipe",
    "Rule",
    "STEActivationQATQuantizer",
    "STEUniformActivationQATQuantizer",
    "STEUniformWeightQATQuantizer",
    "STEWeightQATQuantizer",
    "TrainableQuantizerActivationConfig",
    "TrainableQuantizerWeightsConfig",
    "WeightsLUTPOTInferableQuantizer",
    "WeightsLUTSymmetricInferableQuantizer",
    "WeightsPOTInferableQuantizer",
    "WeightsSpec",
    "WeightsSymmetricInferableQuantizer",
    "WeightsUniformInferableQuantizer",
    "__version__",
    "calibrate",
    "convert_to_inferable",
    "custom_objects",
    "fake_lookup",
    "fake_quantize",
    "fake_quantize_covered",
    "fake_quantize_unclipped",
    "fold_batch_norm",
    "fold_scales",
    "inspect_file",
    "keras_inferable_quantizers",
    "keras_load_quantized_model",
    "mark_quantizer",
    "migrate_mct_file",
    "quantization_report",
    "quantize_model",
    "register_layer",
    "register_layer_weights",
    "save_quantized_model",
    "unwrap_model",
    "weight_paths",
]


def __dir__() -> list[str]:
    return __all__
