"""`quantize_model`: a whole float model, made quantization-aware by a recipe."""

import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_qwrap.calibration import calibrate_each, has_ranges_to_find
from keras_qwrap.copying import (
    Copier,
    carry_compiled,
    check_built,
    check_float,
    is_graph,
    unwrapped,
)
from keras_qwrap.correction import correct_biases
from keras_qwrap.errors import bad_value
from keras_qwrap.folding import fold_batch_norm
from keras_qwrap.holder import KerasActivationQuantizationHolder, unquantized_name
from keras_qwrap.inner_layers import Example, layer_outputs, quantizable_layers
from keras_qwrap.placement import (
    OutputRange,
    can_be_quantized,
    carries_grid,
    exact_inputs,
    output_range,
    output_ranges,
)
from keras_qwrap.quantizers.base import BaseKerasTrainableQuantizer
from keras_qwrap.quantizers.config import QuantizationMethod, TrainableQuantizerActivationConfig
from keras_qwrap.quantizers.ste import STEActivationQATQuantizer
from keras_qwrap.range_search import weights_threshold
from keras_qwrap.recipes import Decision, Recipe, as_recipe
from keras_qwrap.specs import (
    ActivationSpec,
    WeightsSpec,
    activation_quantizer,
    weights_quantizer,
)
from keras_qwrap.subclassed import QuantizedModel
from keras_qwrap.substitution import GraphNode, graph_nodes, input_layer
from keras_qwrap.supported import check_supported
from keras_qwrap.tensors import to_numpy
from keras_qwrap.weight_paths import default_weights, find_weight
from keras_qwrap.wrapper import KerasQuantizationWrapper


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
    `KerasActivationQuantizationHolder` behind them, `<name>_quantizer`. Behind a function that
    makes an output of the model it has the function's name, so that `output_names` are the same,
    and the function is `<name>_unquantized`. Weights are copied, layers stay shared, and
    `model` is left as it is. Activation ranges come from `calibration_data`, from a later
    `calibrate`, or from training; until then activations pass unquantized in inference. With
    `bias_correction` the recipe also shifts biases, by the same data.

    A layer of a graph that cannot be wrapped is left in float, with a warning. A subclassed model
    becomes a `QuantizedModel`. `quantization_report(quantized, recipe)` says what was left in
    float, and why.

    Args:
        model: a built Keras model without quantized layers.
        recipe: a preset such as "w8a8", a `Recipe`, or its dictionary.
        calibration_data: inputs as `calibrate` takes them; not read where the recipe has no use
            for them, as with weights only.
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
    check_built(model)
    check_float(model)
    if example is not None and is_graph(model):
        raise bad_value("example", example, "None", "Only a subclassed model needs an example.")
    _check_options(model, recipe, calibration_data)
    if recipe.fold_batch_norm:
        model = fold_batch_norm(model)
    if is_graph(model):
        quantizer = _GraphQuantizer(model, recipe)
        new = quantizer.copy_model(model)
        methods = quantizer.methods
    else:
        new, methods = _quantize_subclassed(model, recipe, example)
    if recipe.bias_correction:
        correct_biases(new, model, calibration_data, batch_size, steps)
    if calibration_data is not None and has_ranges_to_find(new):
        calibrate_each(
            new, calibration_data, lambda made: methods[id(made)], batch_size, steps, verbose
        )
    return new


def _check_options(model: keras.Model, recipe: Recipe, data: Any) -> None:
    """Refuse no data where it is needed, and what only a graph allows."""
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


def ordered_nodes(model: keras.Model) -> list[GraphNode]:
    """The nodes of a graph in an order of execution that holders between them do not change.

    Each node stands right behind what it needs, and what the first outputs need comes first.
    (Keras orders by the distance from the outputs, which holders change.)
    """
    made_by = {id(tensor): node for node in graph_nodes(model) for tensor in node.outputs}
    ordered: dict[int, GraphNode] = {}
    stack = [made_by[id(t)] for t in reversed(model.outputs) if id(t) in made_by]
    while stack:
        before = [made_by[id(t)] for t in reversed(stack[-1].inputs) if id(t) in made_by]
        waiting = [node for node in before if id(node) not in ordered]
        if waiting and id(stack[-1]) not in ordered:
            stack += waiting
        else:
            ordered.setdefault(id(stack[-1]), stack.pop())
    return list(ordered.values())


def _in_order(model: keras.Model, graphs: dict[int, keras.Model]) -> Iterator[Any]:
    """Layers and functions of a graph in order of execution; a nested model's, where it stands."""
    graphs[id(model)] = model
    yield from (input_layer(tensor) for tensor in model.inputs)
    for node in ordered_nodes(model):
        if not is_graph(node.operation):
            yield unwrapped(node.operation)
        elif id(node.operation) not in graphs:
            yield from _in_order(node.operation, graphs)


def plan_graph(model: keras.Model, recipe: Recipe) -> tuple[dict[int, Decision], list[keras.Model]]:
    """What a recipe says of each layer and function of a graph, by `id`; and the nested graphs.

    It says the same of a float model and of what was made of it: a wrapper stands for its layer,
    and holders do not count. Functions between layers follow no rule.
    """
    graphs: dict[int, keras.Model] = {}
    found = {id(operation): operation for operation in _in_order(model, graphs)}
    layers = {
        key: operation
        for key, operation in found.items()
        if isinstance(operation, keras.Layer)
        and not isinstance(operation, KerasActivationQuantizationHolder)
    }
    decisions = dict(zip(layers, recipe.plan(list(layers.values())), strict=True))
    return dict.fromkeys(found, recipe.decide(None)) | decisions, list(graphs.values())


Units = dict[str, tuple[keras.Layer, list[keras.KerasTensor]]]


def units_in(model: keras.Model, example: Example | None) -> Units:
    """The inner layers of a subclassed model by path, with their outputs, in the order of a call.

    Layers that the call does not run come last, with no outputs.
    """
    outputs = layer_outputs(model, example)
    layers = quantizable_layers(model)
    return {path: (layers[path], outputs.get(path, [])) for path in [*outputs, *layers]}


def _weight_quantizer(
    layer: keras.Layer, path: str, axes: int | tuple[int, ...] | None, spec: WeightsSpec
) -> BaseKerasTrainableQuantizer:
    weight = to_numpy(find_weight(layer, path)).astype(np.float32)
    if not np.isfinite(weight).all():
        received = f"layer '{layer.name}' whose weight '{path}' is not finite"
        raise bad_value("model", received, "finite weights", "Train it again, or leave it out.")
    number = len(axes) if isinstance(axes, tuple) else 1
    kept = axes if spec.per_channel and number < weight.ndim else None
    params = None
    if spec.range == "mse":
        params = {"threshold": weights_threshold(weight, kept, spec.num_bits, spec.method)}
    return weights_quantizer(spec, kept, weight.ndim, params)


def _gathers(layer: keras.Layer, decision: Decision) -> bool:
    """Whether outputs are entries of a weight, on a grid that is fine enough for them."""
    if type(layer) is not keras.layers.Embedding or not decision.weights:
        return False
    coarse = decision.activations and decision.activations.num_bits < decision.weights.num_bits
    return not coarse and list(default_weights(layer).values()) == [None]


def _output_quantizer(spec: ActivationSpec, output: OutputRange) -> BaseKerasTrainableQuantizer:
    if output is OutputRange.DATA:
        return activation_quantizer(spec)
    params = {"threshold": 1.0, "is_signed": output is OutputRange.SIGNED_UNIT}
    config = TrainableQuantizerActivationConfig(
        QuantizationMethod.POWER_OF_TWO, spec.num_bits, params
    )
    return STEActivationQATQuantizer(config)


def _is_supported(layer: keras.Layer) -> bool:
    """Whether a layer can be wrapped; says what is left in float if not."""
    try:
        check_supported(layer)
    except ValueError as error:
        warnings.warn(f"Layer '{layer.name}' is left in float. {error}", stacklevel=2)
        return False
    return True


class _GraphQuantizer(Copier):
    """Makes the quantized copy of a Functional or Sequential model."""

    def __init__(self, model: keras.Model, recipe: Recipe) -> None:
        super().__init__()
        self.methods: dict[int, str] = {}
        self._model = model
        self._outputs: dict[int, list[OutputRange]] = {}
        self._decisions, graphs = plan_graph(model, recipe)
        for graph in graphs:
            self._outputs |= output_ranges(graph)
        self._exact = exact_inputs(model)
        self._held: dict[int, keras.KerasTensor] = {}
        names = [{op.name for op in getattr(g, "operations", g.layers)} for g in graphs]
        self._taken = set().union(*names)
        self._making = {key: place for graph in graphs for key, place in _making_outputs(graph)}

    def new_layer(self, layer: keras.Layer) -> keras.Layer:
        decision = self._decisions[id(layer)]
        copy = self.plain_copy(layer)
        outputs = [] if _gathers(layer, decision) else self._outputs.get(id(layer), [])
        weights = {}
        if decision.weights:
            weights = {
                path: _weight_quantizer(layer, path, axes, decision.weights)
                for path, axes in default_weights(layer).items()
            }
        if not (weights or (outputs and decision.activations)) or not _is_supported(layer):
            return copy
        activations = []
        if decision.activations:
            activations = [_output_quantizer(decision.activations, output) for output in outputs]
            self.methods |= {id(made): decision.activations.range for made in activations}
        return KerasQuantizationWrapper(copy, weights, activations)

    def call(self, layer: Any, new: Any, args: tuple, kwargs: dict) -> Any:
        args, kwargs = keras.tree.map_structure(
            lambda value: self._held.get(id(value), value), (args, kwargs)
        )
        spec = None
        if not isinstance(layer, keras.Layer) and id(layer) in self._outputs:
            spec = self._decisions[id(layer)].activations
        if spec is None:
            return new(*args, **kwargs)
        kinds = self._outputs[id(layer)]
        stems = [f"{layer.name}_{i}" for i in range(len(kinds))] if kinds[1:] else [layer.name]
        names = [f"{stem}_quantizer" for stem in stems]
        making = self._making.get(id(layer))
        if making is not None and _scope_name(layer.name) == layer.name:
            new.name = self._free(unquantized_name(layer.name))
            self._taken.remove(layer.name)
            names[making] = layer.name
        outputs = new(*args, **kwargs)
        held = [
            self._holder(name, spec, kind)(tensor)
            for name, kind, tensor in zip(names, kinds, keras.tree.flatten(outputs), strict=True)
        ]
        return keras.tree.pack_sequence_as(outputs, held)

    def new_inputs(self, model: keras.Model) -> Any:
        inputs = super().new_inputs(model)
        if model is self._model:
            olds = keras.tree.flatten(model.input)
            for old, new in zip(olds, keras.tree.flatten(inputs), strict=True):
                spec = self._input_spec(old)
                if spec:
                    self._held[id(new)] = self._holder(f"{new.name}_quantizer", spec)(new)
        return inputs

    def sequential_layers(self, model: keras.Sequential) -> list[keras.Layer]:
        layers = super().sequential_layers(model)
        spec = self._input_spec(model.inputs[0]) if model is self._model else None
        if spec is None:
            return layers
        return [self._holder(f"{model.inputs[0].name}_quantizer", spec), *layers]

    def _input_spec(self, tensor: keras.KerasTensor) -> ActivationSpec | None:
        if not can_be_quantized(tensor) or id(tensor) in self._exact:
            return None
        return self._decisions[id(input_layer(tensor))].activations

    def _holder(
        self, name: str, spec: ActivationSpec, output: OutputRange = OutputRange.DATA
    ) -> keras.Layer:
        quantizer = _output_quantizer(spec, output)
        self.methods[id(quantizer)] = spec.range
        return KerasActivationQuantizationHolder(quantizer, name=self._free(_scope_name(name)))

    def _free(self, name: str) -> str:
        """`name`, or what comes next where it is taken; taken from now on."""
        tries = (f"{name}_{number}" if number else name for number in itertools.count())
        free = next(each for each in tries if each not in self._taken)
        self._taken.add(free)
        return free


def _scope_name(name: str) -> str:
    """`name`, with `_` for what TensorFlow does not take in the name of a layer."""
    return re.sub(r"[^A-Za-z0-9_.\\>-]", "_", name)


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


def _quantize_subclassed(
    model: keras.Model, recipe: Recipe, example: Example | None
) -> tuple[keras.Model, dict[int, str]]:
    """The quantized copy of a model without graph, and how each quantizer's range is found."""
    units = units_in(model, example)
    plan = recipe.plan([layer for layer, _ in units.values()])
    decisions = dict(zip(units, plan, strict=True))
    weights = {}
    for path, axes in default_weights(model).items():
        owners = [owner for owner in units if path.startswith(f"{owner}/")]
        spec = decisions[max(owners, key=len)].weights if owners else None
        if spec:
            weights[path] = _weight_quantizer(model, path, axes, spec)
    activations: dict[str, list[BaseKerasTrainableQuantizer]] = {}
    methods: dict[int, str] = {}
    for path, (layer, outputs) in units.items():
        wanted = decisions[path].activations
        floats = all(can_be_quantized(tensor) for tensor in outputs)
        apart = not (carries_grid(layer) or _gathers(layer, decisions[path]))
        if wanted and outputs and floats and apart:
            kind = output_range(layer)
            activations[path] = [_output_quantizer(wanted, kind) for _ in outputs]
            methods |= {id(made): wanted.range for made in activations[path]}
    new = QuantizedModel(model, weights, activations, example=example)
    carry_compiled(model, new)
    return new, methods
