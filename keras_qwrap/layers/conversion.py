"""What a converted layer holds in the place of a trained weight."""

from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_qwrap.layers.owner import Quantizer, inferable_twin
from keras_qwrap.numerics.checks import Told, bad_value, naming, warn
from keras_qwrap.numerics.tensors import Tensor, to_numpy
from keras_qwrap.quantizers.base import BaseKerasInferableQuantizer


class ConvertedWeight(NamedTuple):
    """A weight as a converted layer holds it.

    Attributes:
        values: in the variable's dtype, what the layer computes with.
        codes: of these values; None where the inferable quantizer defines no codes.
        twin: the inferable quantizer.
        computed: what the trained quantizer makes of the latent weight, in the variable's dtype.
    """

    values: np.ndarray
    codes: np.ndarray | None
    twin: BaseKerasInferableQuantizer
    computed: np.ndarray

    def warn_of_difference(self, where: str) -> None:
        """Say that the converted layer computes with other values than the trained one did."""
        differing = self.values != self.computed
        if np.any(differing):
            wide = self.values.astype(np.float64) - self.computed
            warn(
                f"{where}: {np.count_nonzero(differing)} of {differing.size} values differ from "
                f"those of training, by up to {np.max(np.abs(wide)):.3g}: "
                f"{type(self.twin).__name__}, which `convert2inferable` gave, cannot hold them. "
                "The converted layer has what it makes of the latent weight."
            )


def converted_weight(
    where: str, quantizer: Quantizer, variable: keras.Variable, computed: Tensor
) -> ConvertedWeight:
    """What becomes of a weight in conversion.

    The values that the trained quantizer computes, if its inferable twin holds them exactly:
    `dequantize(quantize_to_codes(y)) == y`, or `twin(y) == y` where the twin defines no codes. Else
    what the twin makes of the latent weight.

    Args:
        where: names the layer and the weight.
        quantizer: of the weight.
        variable: the latent weight, or one that is converted already.
        computed: the quantizer's output for it.

    Raises:
        TypeError, ValueError: the weight holds NaN or infinity, or numbers for which the inferable
            quantizer has no grid.
    """
    latent = to_numpy(variable)
    if not np.isfinite(latent.astype(np.float32)).all():
        fix = "Train it again from finite weights, with a lower learning rate."
        raise bad_value(where, Told("values that are not finite"), "finite numbers", fix)
    if not np.isfinite(to_numpy(ops.cast(computed, "float32"))).all():
        received = Told(f"values up to {np.abs(latent).max():.3g}")
        fix = "Its grid ends beyond them: scale the weight down."
        raise bad_value(where, received, "values whose grid float32 can hold", fix)

    def of_variable(values: Tensor) -> np.ndarray:
        return to_numpy(ops.cast(values, variable.dtype))

    wanted = of_variable(computed)
    with naming(where):
        twin = inferable_twin(quantizer)
        for source in (wanted, latent):
            codes = twin.quantize_to_codes(source) if twin.has_codes else None
            held = twin(ops.convert_to_tensor(source)) if codes is None else twin.dequantize(codes)
            values = of_variable(held)
            if np.array_equal(values, wanted):
                break
    return ConvertedWeight(values, codes, twin, wanted)
