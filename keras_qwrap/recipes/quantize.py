"""`quantize_model`: a whole float model, made quantization-aware by a recipe."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_qwrap.calibration.batches import batches
from keras_qwrap.calibration.bias import correct_biases
from keras_qwrap.calibration.calibrate import calibrate, has_ranges_to_find
from keras_qwrap.layers.holder import KerasActivationQuantizationHolder, unquantized_name
from keras_qwrap.layers.keras_internals import graph_nodes, input_layer
from keras_qwrap.layers.layer_table import OutputRange
from keras_qwrap.layers.remaking import loads_by_itself
from keras_qwrap.layers.wrapper import KerasQuantizationWrapper
from keras_qwrap.models.batch_norm import fold_batch_norm
from keras_qwrap.models.copying import Copier, carry_compiled, check_built, check_float
from keras_qwrap.models.graph import is_graph
from keras_qwrap.models.subclassed import QuantizedModel
from keras_qwrap.models.taps import Example
from keras_qwrap.numerics.checks import Told, bad_value, naming, warn
from keras_qwrap.numerics.search import weights_threshold
from keras_qwrap.numerics.tensors import to_numpy
from keras_qwrap.quantizers.base import BaseKerasTrainableQuantizer
from keras_qwrap.quantizers.config import QuantizationMethod, TrainableQuantizerActivationConfig
from keras_qwrap.quantizers.ste import STEActivationQATQuantizer
from keras_qwrap.recipes.places import (
    graphs_in,
    input_names,
    input_quantizer_name,
    ordered_nodes,
    scope_name,
)
from keras_qwrap.recipes.plan import Plan, PlannedOutputs, PlannedWeight, plan
from keras_qwrap.recipes.recipe import Recipe, as_recipe
from keras_qwrap.recipes.rules import (
    ActivationSpec,
    WeightsSpec,
    activation_quantizer,
    weights_quantizer,
)


def quantize_model(
    model: keras.Model,
    recipe: str | dict | Recipe = "w8a8",
    calibration_data: Any = None,
    batch_size: int = 32,
    steps: int | None = None,
    verbose: str | int = "auto",
    example: Example | None = None,
) -> keras.Model:
    """A new quantization-aware model that computes as `model` does, on the grids of a recipe.

    Every layer whose weights are quantized or whose output is, is a `KerasQuantizationWrapper` of
    the same name in the new model; inputs and functions between layers have a
    `KerasActivationQuantizationHolder` behind them, `<name>_quantizer` (`input_quantizer` where an
    input has no name). Behind a function that
    makes an output of the model it has the function's name, so that `output_names` are the same,
    and the function is `<name>_unquantized`. Weights are copied, layers stay shared, and
    `model` is left as it is. Activation ranges come from `calibration_data`, from a later
    `calibrate`, or from training; until then activations pass unquantized in inference. Inputs that
    lookups read stay as they are; so do those of rank 3 or less that only layers outside Keras
    read, if calibration finds whole numbers alone in them. With `bias_correction` the recipe also
    shifts biases, by the same data.

    A layer of a graph that cannot be wrapped is left as it is, with a warning. A subclassed model
    becomes a `QuantizedModel`. `quantization_report(quantized, recipe)` says what was left in
    float, and why.

    Args:
        model: a built Keras model without quantized layers.
        recipe: a preset such as "w8a8", a `Recipe`, or its dictionary.
        calibration_data: inputs as `calibrate` takes them; not read where the recipe quantizes
            weights alone.
        batch_size: rows of an array in each calibration step, as `calibrate` takes them.
        steps: calibration steps; all data by default.
        verbose: progress display of the calibration: "auto", 0 or 1.
        example: for a subclassed model, arguments of a call as `QuantizedModel` takes them.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: it is not built, quantized already, or holds a layer that cannot be made again
            from its config; the recipe does not fit it; the data does not.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_qwrap as qi

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")])
    images = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    quantized = qi.quantize_model(model, "w8a8", images, verbose=0)
    print(type(quantized.get_layer("dense")).__name__)  # KerasQuantizationWrapper
    ```
    """
    recipe = as_recipe(recipe)
    _check(model, recipe, calibration_data, example)
    if recipe.fold_batch_norm:
        model = fold_batch_norm(model)
    planned = plan(model, recipe, example)
    _warn_of_rules_in_vain(planned)
    if is_graph(model):
        new = _GraphQuantizer(model, planned).copy_model(model)
    else:
        new = _quantize_subclassed(model, planned, example)
    if recipe.bias_correction:
        correct_biases(new, model, calibration_data, batch_size, steps)
    if calibration_data is not None and has_ranges_to_find(new):
        calibrate(new, calibration_data, None, batch_size, steps, verbose)
    elif calibration_data is not None and _finds_ranges(recipe) and not recipe.bias_correction:
        for _ in batches(new, calibration_data, batch_size, steps):
            pass  # Refuses data that does not fit, though nothing is to be found in it.
    return new


def _check(model: keras.Model, recipe: Recipe, data: Any, example: Example | None) -> None:
    """Refuse what is no float model, no data where it is needed, and what only a graph allows."""
    check_built(model)
    check_float(model)
    if example is not None and is_graph(model):
        raise bad_value("example", example, "None", "Only a subclassed model needs an example.")
    for option in ("fold_batch_norm", "bias_correction"):
        if getattr(recipe, option) and not is_graph(model):
            expected = f"{option}=False for a subclassed model"
            raise bad_value("recipe", recipe, expected, "It has no graph.")
    if recipe.bias_correction and (data is None or isinstance(data, Iterator)):
        raise bad_value(
            "calibration_data",
            data,
            "data that can be read twice, for bias_correction",
            "Pass an array, a dataset or a list of batches.",
        )


def _finds_ranges(recipe: Recipe) -> bool:
    specs = [recipe.activations, *(rule.activations for rule in recipe.rules)]
    return any(isinstance(spec, ActivationSpec) for spec in specs)


def _warn_of_rules_in_vain(planned: Plan) -> None:
    """Say which rules ask for what they cannot have."""
    for of_weights, of_activations in planned.rules_in_vain():
        if of_weights or of_activations:
            text = f"{of_weights}{of_activations}."
            warn(f"{text} `quantization_report(model, recipe)` says what is done instead.")


def _weights_quantizers(
    layer: keras.Layer, planned: Plan
) -> dict[str, BaseKerasTrainableQuantizer]:
    """The quantizers of a layer's weights, by path."""
    return {
        weight.path: _weight_quantizer(layer, weight, weight.spec)
        for weight in sorted(planned.weights(layer), key=lambda each: each.path)
        if weight.spec
    }


def _weight_quantizer(
    layer: keras.Layer, planned: PlannedWeight, spec: WeightsSpec
) -> BaseKerasTrainableQuantizer:
    axes = planned.axes
    weight = to_numpy(planned.variable).astype(np.float32)
    if not np.isfinite(weight).all():
        received = Told(f"layer '{layer.name}' whose weight '{planned.path}' is not finite")
        raise bad_value("model", received, "finite weights", "Train it again, or leave it out.")
    number = len(axes) if isinstance(axes, tuple) else 1
    kept = axes if spec.per_channel and number < weight.ndim else None
    params = None
    if spec.range == "mse":
        params = {"threshold": weights_threshold(weight, kept, spec.num_bits, str(spec.method))}
    with naming(f"layer '{layer.name}', weight '{planned.path}'"):
        return weights_quantizer(spec, kept, weight.ndim, params)


def _output_quantizers(planned: PlannedOutputs) -> list[BaseKerasTrainableQuantizer]:
    """A quantizer for each output; none where they stay as they are."""
    spec = planned.spec
    return [_output_quantizer(spec, each) for each in planned.ranges] if spec else []


def _output_quantizer(spec: ActivationSpec, output: OutputRange) -> BaseKerasTrainableQuantizer:
    if output is OutputRange.DATA:
        return activation_quantizer(spec)
    params = {"threshold": 1.0, "is_signed": output is OutputRange.SIGNED_UNIT}
    config = TrainableQuantizerActivationConfig(
        QuantizationMethod.POWER_OF_TWO, spec.num_bits, params
    )
    return STEActivationQATQuantizer(config)


class _GraphQuantizer(Copier):
    """Makes the quantized copy of a Functional or Sequential model."""

    def __init__(self, model: keras.Model, planned: Plan) -> None:
        super().__init__()
        self._model = model
        self._plan = planned
        self._held: dict[int, keras.KerasTensor] = {}
        graphs = graphs_in(model)
        names = [{op.name for op in getattr(g, "operations", g.layers)} for g in graphs]
        self._taken = set().union(*names)
        self._making = {key: place for graph in graphs for key, place in _making_outputs(graph)}
        self._frozen = _frozen_functions(model)

    def new_layer(self, layer: keras.Layer) -> keras.Layer:
        copy = self.plain_copy(layer)
        weights = _weights_quantizers(layer, self._plan)
        activations = _output_quantizers(self._plan.outputs(layer))
        # A wrapper loads what Keras saves of a layer, and cannot load.
        if not (weights or activations) and loads_by_itself(layer):
            return copy
        refusal = self._plan.refusal(layer)
        if refusal:
            warn(f"Layer '{layer.name}' is left as it is. {refusal}")
            return copy
        return KerasQuantizationWrapper(copy, weights, activations)

    def call(self, layer: Any, new: Any, args: tuple, kwargs: dict) -> Any:
        args, kwargs = keras.tree.map_structure(
            lambda value: self._held.get(id(value), value), (args, kwargs)
        )
        # The outputs of a layer are quantized by its wrapper.
        is_function = not isinstance(layer, keras.Layer)
        quantizers = _output_quantizers(self._plan.outputs(layer)) if is_function else []
        if not quantizers:
            return new(*args, **kwargs)
        several = len(quantizers) > 1
        stems = [f"{layer.name}_{i}" if several else layer.name for i in range(len(quantizers))]
        names = [f"{stem}_quantizer" for stem in stems]
        making = self._making.get(id(layer))
        if making is not None and scope_name(layer.name) == layer.name:
            new.name = self._free(unquantized_name(layer.name))
            self._taken.remove(layer.name)
            names[making] = layer.name
        outputs = new(*args, **kwargs)
        trainable = id(layer) not in self._frozen
        held = [
            self._holder(name, quantizer, trainable)(tensor)
            for name, quantizer, tensor in zip(
                names, quantizers, keras.tree.flatten(outputs), strict=True
            )
        ]
        return keras.tree.pack_sequence_as(outputs, held)

    def new_inputs(self, model: keras.Model) -> Any:
        inputs = super().new_inputs(model)
        if model is self._model:
            news = keras.tree.flatten(inputs)
            for old, new, name in zip(model.inputs, news, input_names(model), strict=True):
                quantizer = self._input_quantizer(old)
                if quantizer:
                    holder = self._holder(input_quantizer_name(name), quantizer, model.trainable)
                    self._held[id(new)] = holder(new)
        return inputs

    def sequential_layers(self, model: keras.Sequential) -> list[keras.Layer]:
        layers = super().sequential_layers(model)
        quantizer = self._input_quantizer(model.inputs[0]) if model is self._model else None
        if quantizer is None:
            return layers
        name = input_quantizer_name(input_names(model)[0])
        return [self._holder(name, quantizer, model.trainable), *layers]

    def _input_quantizer(self, tensor: keras.KerasTensor) -> BaseKerasTrainableQuantizer | None:
        outputs = self._plan.outputs(input_layer(tensor))
        if outputs.spec is None:
            return None
        return activation_quantizer(outputs.spec, outputs.may_be_whole)

    def _holder(
        self, name: str, quantizer: BaseKerasTrainableQuantizer, trainable: bool
    ) -> keras.Layer:
        name = self._free(scope_name(name))
        return KerasActivationQuantizationHolder(quantizer, name=name, trainable=trainable)

    def _free(self, name: str) -> str:
        """`name`, or what comes next where it is taken; taken from now on."""
        tries = (f"{name}_{number}" if number else name for number in itertools.count())
        free = next(each for each in tries if each not in self._taken)
        self._taken.add(free)
        return free


def _frozen_functions(model: keras.Model) -> set[int]:
    """The `id` of each function of a graph, or of one inside it, whose results training leaves.

    It is in a frozen model, or all layers that it depends on are frozen, and there is one.
    """
    before: dict[int, set[bool]] = {}

    def visit(graph: keras.Model, given: list[set[bool]], trainable: bool) -> list[set[bool]]:
        """What is known, behind a graph's outputs, of the layers before: which flags they have."""
        trainable = trainable and graph.trainable
        known = {id(tensor): flags for tensor, flags in zip(graph.inputs, given, strict=True)}
        for node in ordered_nodes(graph):
            read = [known.get(id(tensor), set()) for tensor in node.inputs]
            if is_graph(node.operation):
                made = visit(node.operation, read, trainable)
            else:
                found = set().union(*read)
                if isinstance(node.operation, keras.Layer):
                    found |= {trainable and node.operation.trainable}
                seen = {False} if not trainable else found or {True}
                before[id(node.operation)] = before.get(id(node.operation), set()) | seen
                made = [found] * len(node.outputs)
            known |= {id(tensor): flags for tensor, flags in zip(node.outputs, made, strict=True)}
        return [known.get(id(tensor), set()) for tensor in graph.outputs]

    visit(model, [set()] * len(model.inputs), True)
    return {key for key, flags in before.items() if flags == {False}}


def _making_outputs(graph: keras.Model) -> Iterator[tuple[int, int]]:
    """The `id` of each operation that makes one output of a graph, and which of its outputs it is.

    One that makes several is left out: they have one name.
    """
    leaving = {id(tensor) for tensor in graph.outputs}
    calls = Counter(id(node.operation) for node in graph_nodes(graph))
    for node in graph_nodes(graph):
        places = [i for i, tensor in enumerate(node.outputs) if id(tensor) in leaving]
        if len(places) == calls[id(node.operation)] == 1:
            yield id(node.operation), places[0]


def _quantize_subclassed(model: keras.Model, planned: Plan, example: Example | None) -> keras.Model:
    """The quantized copy of a model without graph."""
    weights = _weights_quantizers(model, planned)
    activations = {
        path: _output_quantizers(planned.outputs(layer)) for path, layer in planned.units.items()
    }
    new = QuantizedModel(model, weights, activations, example=example)
    carry_compiled(model, new)
    return new
