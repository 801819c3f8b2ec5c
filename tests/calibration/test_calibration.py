"""Ranges from data: what is seen, on every backend, and what is left as it was."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference import refused, to_numpy

import keras_qwrap as qi
from keras_qwrap.calibration import calibrate as calibration
from keras_qwrap.calibration.calibrate import calibrate
from keras_qwrap.numerics.search import RANGE_METHODS, find_range
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer

UNIFORM, SYMMETRIC, POT = (
    qi.QuantizationMethod[name] for name in ("UNIFORM", "SYMMETRIC", "POWER_OF_TWO")
)


def moving(bits=8, method=UNIFORM, **kwargs):
    config = qi.TrainableQuantizerActivationConfig(method, bits)
    return MovingAverageActivationQATQuantizer(config, **kwargs)


def holder(name, *args, **kwargs):
    return qi.KerasActivationQuantizationHolder(moving(*args, **kwargs), name=name)


def dense(name, units=4, bits=2, **kwargs):
    config = qi.TrainableQuantizerWeightsConfig(SYMMETRIC, bits)
    return qi.KerasQuantizationWrapper(
        layers.Dense(units, name=name, **kwargs), {"kernel": qi.STEWeightQATQuantizer(config)}
    )


def small_model(**kwargs):
    """Holder, two layers with 2-bit weights, holders behind them."""
    return keras.Sequential(
        [
            keras.Input((3,)),
            holder("input", **kwargs),
            dense("first", activation="relu"),
            holder("hidden", **kwargs),
            dense("second"),
            holder("output", **kwargs),
        ]
    )


def just_holder(*args, shape=(3,), **kwargs):
    return keras.Sequential([keras.Input(shape), holder("only", *args, **kwargs)])


def floats(random, *shape):
    return random.normal(size=shape).astype("float32")


def in_float(model, x):
    """What each holder of `small_model` sees, in numpy, from the quantized weights."""
    seen = {"input": x}
    for index, name in ((1, "hidden"), (3, "output")):
        layer = model.layers[index]
        x = x @ to_numpy(layer.get_quantized_weights()["kernel"]) + to_numpy(layer.layer.bias)
        x = seen[name] = np.maximum(x, 0) if name == "hidden" else x
    return seen


def ends(x):
    return min(float(x.min()), 0.0), max(float(x.max()), 0.0)


@pytest.mark.parametrize("batch_size", [4, 7, 50])
def test_min_max_is_that_of_the_float_activations(batch_size, random):
    """Weights are quantized, activations are not, though they have ranges; for any batches."""
    model, x = small_model(), floats(random, 50, 3)
    for layer in model.layers[::2]:
        layer.activation_holder_quantizer.set_range(-0.1, 0.1)
    found = calibrate(model, x, "minmax", batch_size, verbose=0)
    assert list(found) == ["input", "hidden", "output"]
    for name, values in in_float(model, x).items():
        np.testing.assert_allclose(found[name], ends(values), rtol=1e-5)
    for layer in model.layers[::2]:
        assert layer.activation_holder_quantizer.range == found[layer.name]
    assert found["input"] == ends(x)


@pytest.mark.parametrize("method", RANGE_METHODS)
@pytest.mark.parametrize("grid", [UNIFORM, SYMMETRIC, POT])
def test_range_is_what_the_search_finds_in_all_values(method, grid, random):
    """While they are fewer than the sample."""
    x = floats(random, 60, 3)
    model = just_holder(4, grid)
    found = calibrate(model, x, method, 60, verbose=0)["only"]
    wanted = find_range(x, x.min(), x.max(), method, 4, grid.name.lower())
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_moving_average_is_that_of_training(random):
    x = floats(random, 40, 3) * np.linspace(1, 5, 40, dtype="float32")[:, None]
    model, trained = just_holder(momentum=0.7), just_holder(momentum=0.7)
    found = calibrate(model, x, "moving_average", 8, verbose=0)["only"]
    for i in range(0, 40, 8):
        trained(x[i : i + 8], training=True)
    wanted = trained.layers[0].activation_holder_quantizer.range
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert found[1] < x.max()


@pytest.mark.slow
def test_default_is_mse_and_a_mapping_chooses_by_name(random):
    x = floats(random, 100, 3)

    def run(method):
        keras.utils.set_random_seed(0)
        return calibrate(small_model(bits=3), x, method, verbose=0)

    every = {method: run(method) for method in ("minmax", "mse", "percentile")}
    assert run(None) == every["mse"] != every["minmax"]
    mixed = run({"input": "minmax", "output": "percentile"})
    assert mixed["input"] == every["minmax"]["input"]
    assert mixed["hidden"] == every["mse"]["hidden"]
    assert mixed["output"] == every["percentile"]["output"] != every["minmax"]["output"]


@pytest.fixture
def heavy(random):
    """Numbers for which every method finds another range."""
    x = floats(random, 512, 3)
    return x * np.abs(x)


def own_methods():
    """Wrappers, an input and a layer of a nested model, by rule."""
    inputs = keras.Input((3,), name="inputs")
    nested = keras.Sequential([keras.Input((3,)), layers.Dense(3, name="inner")], name="nested")
    x = nested(layers.Dense(3, name="first")(inputs))
    squares = layers.Multiply(name="squares")([x, x])
    model = keras.Model(inputs, layers.Dense(2, name="last")(squares))
    minmax = qi.ActivationSpec(3, range="minmax")
    rules = [qi.Rule(name="first", activations=qi.ActivationSpec(3, range="percentile"))]
    return qi.quantize_model(model, qi.Recipe(activations=minmax, rules=rules))


def saved_and_reloaded(model, ending, path):
    path = path / f"model.{ending}"
    if ending == "weights.h5":
        model.save_weights(path)
        new = keras.models.clone_model(model)
        new.load_weights(path)
        return new
    qi.save_quantized_model(model, path)
    return qi.keras_load_quantized_model(path, compile=False)


@pytest.mark.parametrize(
    "ending", ["keras", *(pytest.param(e, marks=pytest.mark.slow) for e in ("h5", "weights.h5"))]
)
def test_the_method_of_a_recipe_stays_with_its_quantizers(ending, heavy, tmp_path):
    """Later calibrations, also of reloaded models, find what the recipe's method finds."""
    model = own_methods()
    every = {m: calibrate(model, heavy, m, verbose=0) for m in ("minmax", "percentile", "mse")}
    assert all(every["mse"][name] != every["minmax"][name] for name in every["mse"])
    chosen = {name: "percentile" if name == "first" else "minmax" for name in every["mse"]}
    for each in (model, saved_and_reloaded(model, ending, tmp_path)):
        found = calibrate(each, heavy, verbose=0)
        assert found == {name: every[method][name] for name, method in chosen.items()}
        found = calibrate(each, heavy, {"inner": "mse"}, verbose=0)
        assert found == {n: every["mse" if n == "inner" else m][n] for n, m in chosen.items()}


def test_the_method_of_a_recipe_stays_with_a_model_without_graph(heavy):
    class Net(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = layers.Dense(2)

        def call(self, inputs):
            return self.dense(inputs)

    model = Net()
    model(heavy)
    recipe = qi.Recipe(activations=qi.ActivationSpec(3, range="minmax"))
    quantized = qi.quantize_model(model, recipe, heavy, verbose=0)
    first = calibrate(quantized, heavy, verbose=0)
    assert first == calibrate(quantized, heavy, "minmax", verbose=0)
    assert first != calibrate(quantized, heavy, "mse", verbose=0)


def test_nothing_but_the_ranges_changes(random):
    """Compiled functions, variables, layers and the observer's hook are as before."""
    model, x = small_model(), floats(random, 20, 3)
    model.compile("sgd", "mse")
    before = model.predict(x, verbose=0)
    weights = [to_numpy(w) for w in model.weights]
    attributes = set(vars(model))
    calibrate(model, x, verbose=0)
    for variable, old in zip(model.weights, weights, strict=True):
        if not variable.name.endswith("min_range"):
            changed = variable.name.endswith("max_range")
            assert np.array_equal(to_numpy(variable), old) != changed, variable.path
    assert set(vars(model)) == attributes
    assert all(layer._observer is None for layer in model.layers)
    after = model.predict(x, verbose=0)
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, to_numpy(model(x, training=False)))
    assert len(np.unique(after)) <= 2**8
    model.fit(x, after, epochs=1, verbose=0)


def test_converts_after_calibration(random):
    model, x = small_model(), floats(random, 20, 3)
    calibrate(model, x, verbose=0)
    converted = qi.convert_to_inferable(model)
    np.testing.assert_array_equal(to_numpy(converted(x)), to_numpy(model(x)))


def test_fixed_ranges_are_left_alone_and_quantize(random):
    """What follows sees values clipped by the fixed range."""
    config = qi.TrainableQuantizerActivationConfig(SYMMETRIC, 8, {"threshold": 0.5})
    first = qi.KerasActivationQuantizationHolder(qi.STEActivationQATQuantizer(config))
    model = keras.Sequential([keras.Input((3,)), first, holder("only")])
    found = calibrate(model, floats(random, 50, 3), "minmax", verbose=0)
    assert found == {"only": (-0.5, 0.5 - 0.5 / 128)}
    assert first.activation_holder_quantizer.quantization_config == config


def test_two_outputs_shared_and_nested_layers(random):
    """A shared layer's range covers all its calls; equal names by the models around them."""
    shared = dense("shared")
    wrapped = qi.KerasQuantizationWrapper(
        layers.GRU(2, return_state=True, name="gru"), {}, [moving(), moving()]
    )
    inner = keras.Sequential([keras.Input((4,)), holder("same")], name="inner")
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    output = holder("same")
    mean = holder("mean")
    x, y = mean(shared(a)), mean(shared(b))
    z = output(layers.Add()([inner(x), y]))
    state = wrapped(layers.Reshape((2, 2))(z))
    model = keras.Model([a, b], state)
    x, y = floats(random, 20, 3), 9 * floats(random, 20, 3)
    found = calibrate(model, [x, y], "minmax", verbose=0)
    assert set(found) == {"gru", "gru/output_1", "mean", "same", "inner/same"}
    kernel = to_numpy(shared.get_quantized_weights()["kernel"])
    wanted = ends(np.concatenate([x @ kernel, y @ kernel]))
    np.testing.assert_allclose(found["mean"], wanted, rtol=1e-5)
    again = calibrate(model, {"b": y, "a": x}, "mse", verbose=0)
    assert set(again) == set(found)


def part(name, scale):
    inputs = keras.Input((3,))
    inner = layers.Dense(3, name="e", kernel_initializer=keras.initializers.Constant(scale))
    return keras.Model(inputs, inner(inputs), name=name)


def test_layers_with_one_name_in_nested_models_are_all_set(random):
    """Each to its own range, by its own method."""
    inputs, x = keras.Input((3,)), floats(random, 20, 3)
    ranged = {"e1": 1.0, "e2": 5.0}
    outputs = [part(name, scale)(inputs) for name, scale in ranged.items()]
    model = qi.quantize_model(keras.Model(inputs, layers.Add()(outputs)), {"weights": "float"})
    inner = [model.get_layer(name).get_layer("e") for name in ranged]
    quantizers = {f"e{i}/e": each.activation_quantizers[0] for i, each in enumerate(inner, 1)}
    found = calibrate(model, x, "minmax", verbose=0)
    assert set(quantizers) < set(found)
    for name, quantizer in quantizers.items():
        assert found[name] == quantizer.range
        np.testing.assert_allclose(quantizer.range, ends(ranged[name[:2]] * x.sum(1)), rtol=1e-5)
    other = calibrate(model, x, {"e": "moving_average"}, 5, verbose=0)
    assert all(other[name] != found[name] for name in quantizers)
    refused(ValueError, lambda: calibrate(model, x, {"e": "max"}), "entropy", "method of 'e'")


def test_names_that_stay_alike_are_numbered():
    alike = [holder(name) for name in ("same", "same", "same_1", "same")]

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.holders = alike

        def call(self, inputs):
            return [each(i * inputs) for i, each in enumerate(self.holders, 1)]

    model = Model()
    model(np.ones((1, 2), "float32"))
    found = calibrate(model, np.array([[-1, 1]], "float32"), "minmax", verbose=0)
    assert sorted(found) == ["same", "same_1", "same_2", "same_3"]
    assert [each.activation_holder_quantizer.range[1] for each in alike] == [1, 2, 3, 4]
    assert found["same_1"] == (-3, 3)


def test_subclassed_model(random):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.unused, self.last = dense("first"), holder("unused"), holder("last")
            self.unused.build((None, 3))

        def call(self, inputs):
            return self.last(self.first(inputs))

    model, x = Model(), floats(random, 20, 3)
    model(x)
    with pytest.warns(UserWarning, match="'unused' was not reached") as record:
        found = calibrate(model, iter([x[:8], x[8:]]), "minmax", verbose=0)
    assert (list(found), record[-1].filename) == (["last"], __file__)
    assert model.unused.activation_holder_quantizer.range is None


@pytest.mark.parametrize(("method", "rows"), [("minmax", 400), ("mse", 8), ("moving_average", 8)])
def test_an_outlier_is_clipped_here_and_further_on(method, rows, random):
    """One value of -4,200,000 among normal ones, in a batch of any size, first or later."""
    x = floats(random, rows, 3)
    model = small_model()
    clean = calibrate(model, x, "minmax", verbose=0)
    x[5, 1] = -4.2e6
    with pytest.warns(UserWarning, match=r"'input' has outliers from -4.2e\+06 to"):
        found = calibrate(model, x, method, 100, verbose=0)
    for name in clean:
        width = np.ptp(clean[name])
        assert 0.2 * width < np.ptp(found[name]) < 4 * width, name


def test_an_outlier_in_a_large_tensor_that_the_sample_misses(random):
    x = floats(random, 20, 4000)
    x[3, 7] = 1e9
    with pytest.warns(UserWarning, match="outliers"):
        found = calibrate(just_holder(shape=(4000,)), x, "minmax", 5, verbose=0)["only"]
    clean = ends(np.delete(x, 3, 0))
    assert 0.6 * clean[1] < found[1] < 1.6 * clean[1]
    np.testing.assert_allclose(found[0], clean[0], rtol=0.4)


def test_a_small_batch_of_outliers(random):
    """They stand out only among the values of all batches."""
    x = floats(random, 2000, 3)
    model = just_holder()
    with pytest.warns(UserWarning, match="outliers"):
        found = calibrate(model, iter([x, np.full((1, 3), 1e9)]), "minmax", verbose=0)["only"]
    assert 2 < found[1] < 8


def test_wide_but_honest_ranges_are_kept(random):
    """Heavy tails, sparse values, and less than 100 times the width of most are no outliers."""
    heavy = random.standard_t(2, size=(500, 3)).astype("float32")
    sparse = np.where(random.random((500, 3)) < 1e-3, 1e5, 0).astype("float32")
    even = (random.random((500, 3)) - 0.5).astype("float32")
    even[7, 1] = 80
    for x in (heavy, sparse, even):
        assert calibrate(just_holder(), x, "minmax", verbose=0)["only"] == ends(x)
    even[7, 1] = 120
    few = even[:16].copy()
    assert calibrate(just_holder(), few, "minmax", verbose=0)["only"] == ends(few)
    with pytest.warns(UserWarning, match="outliers"):
        assert calibrate(just_holder(), even, "minmax", verbose=0)["only"][1] < 2


@pytest.mark.parametrize("method", ["minmax", "mse", "entropy"])
@pytest.mark.parametrize("value", [0.0, -0.0, 2.5, -3.0])
def test_a_constant_activation_gets_a_usable_range_and_a_warning(method, value):
    x = np.full((20, 3), value, "float32")
    model = just_holder()
    with pytest.warns(UserWarning, match=f"'only' is always {value + 0.0:g};"):
        low, high = calibrate(model, x, method, verbose=0)["only"]
    assert low <= value <= high
    assert low < high
    y = to_numpy(model(x))
    np.testing.assert_allclose(y, x, rtol=1e-6)
    quantizer = qi.convert_to_inferable(model).layers[0].activation_holder_quantizer
    assert np.isfinite(quantizer.scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_model_that_makes_nan_is_refused_by_layer(bad, random):
    """And no range is set, not even of the layers before."""

    class Spoil(layers.Layer):
        def call(self, inputs):
            return ops.where(inputs > 2.9, bad, inputs)

    model = keras.Sequential(
        [keras.Input((3,)), holder("before"), Spoil(), holder("after"), holder("last")]
    )
    x = floats(random, 3000, 3) / 10
    calibrate(model, x, "minmax", verbose=0)
    before = model.layers[0].activation_holder_quantizer.range
    x[2777, 2] = 3
    message = refused(ValueError, lambda: calibrate(model, x, "minmax", 1000, verbose=0), "finite")
    assert message.startswith("activation of 'after'")
    assert model.layers[0].activation_holder_quantizer.range == before
    assert all(layer._observer is None for layer in model.layers if hasattr(layer, "_observer"))


def test_refused(random):
    model, x = small_model(), floats(random, 10, 3)
    plain = keras.Sequential([keras.Input((3,)), dense("first")])
    refused(ValueError, lambda: calibrate(plain, x), "MovingAverageActivationQATQuantizer")
    refused(TypeError, lambda: calibrate(holder("h"), x), "a Keras model")
    unbuilt = keras.Sequential([holder("h")])
    refused(ValueError, lambda: calibrate(unbuilt, x), "built")
    refused(ValueError, lambda: calibrate(model, x, "max"), "entropy")
    refused(ValueError, lambda: calibrate(model, x, {"input": "max"}), "method of 'input'")
    refused(ValueError, lambda: calibrate(model, x, {"inputs": "mse"}), "inputs", "hidden")
    refused(ValueError, lambda: calibrate(model, x[:, :2], verbose=0), "batch 0")
    refused(ValueError, lambda: calibrate(model, iter([]), verbose=0), "no batch")
    assert model.layers[0].activation_holder_quantizer.range is None


def observed_values(model, *batches, samples=256):
    """What an observer of a model's ranges gives for one batch after the other."""
    rows = calibration._rows(model)
    observer = calibration._Observer(model, [quantizer for _, quantizer in rows], samples)
    found, before = [], 0
    for inputs in batches:
        feed = {"inputs": inputs, "before": np.array(before, "int32")}
        found += calibration._found_in(observer.predict_on_batch(feed), len(rows))
        before += samples * len(inputs)
    return found


@pytest.mark.parametrize("channels", [1, 64, 256])
def test_sampled_positions_reach_every_channel(channels):
    """A stride in step with the channels would see only a part of them."""
    x = np.broadcast_to(np.arange(channels, dtype="float32"), (8, 40 * 256 // channels, channels))
    first, second = observed_values(just_holder(shape=x.shape[1:]), x, x, samples=64)
    for batch in (first, second):
        # Drawn are all but the outermost ones, which stand for themselves.
        drawn = batch.values[batch.weights > 1]
        counts = np.bincount(drawn.astype(int), minlength=channels)
        assert counts.min() > 0 or channels == 256
        assert np.count_nonzero(counts) > 0.7 * channels
        assert counts.max() < 512 / channels * 3 + 20
        np.testing.assert_array_equal(batch.ends, [0, channels - 1])
        assert batch.size == x.size
    assert channels == 1 or not np.array_equal(first.values, second.values)


def test_small_tensors_are_seen_whole():
    """Each value of a tensor, and of each call, once."""
    shared = holder("only")
    a, b = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([a, b], [shared(a), shared(b)])
    x, y = np.arange(30, dtype="float32").reshape(2, 5, 3)
    (batch,) = observed_values(model, [x, y])
    np.testing.assert_array_equal(batch.values, np.arange(30))
    np.testing.assert_array_equal(batch.weights, np.ones(30))


@pytest.mark.parametrize("columns", [9, 17, 300, 1000, 5001])
def test_the_outermost_values_are_seen_whatever_the_size(columns, random):
    """Each once, and the others stand for the rest, ties and negative numbers included."""
    x = np.round(floats(random, 3, columns) * 20)
    (batch,) = observed_values(just_holder(shape=(columns,)), x, samples=16)
    ordered = np.sort(x.ravel())
    outer = np.count_nonzero(batch.weights == 1) // 2
    assert outer >= min(24, (x.size - 48) // 2)
    np.testing.assert_array_equal(batch.values[:outer], ordered[:outer])
    np.testing.assert_array_equal(batch.values[-outer:], ordered[-outer:])
    np.testing.assert_array_equal(batch.ends, ordered[[0, -1]])
    np.testing.assert_allclose(batch.weights.sum(), x.size)
    assert set(batch.values) <= set(ordered)


def rare(random):
    """20 of 131072 values are much larger than the others, but no outliers."""
    x = random.random((64, 2048)).astype("float32")
    x.flat[random.choice(x.size, 20, replace=False)] = 6
    return x


def peaks(random):
    """Heat maps: one peak in each row, and a low background."""
    x = np.abs(floats(random, 64, 2048)) / 50
    x[np.arange(64), random.integers(2048, size=64)] = 0.9 + 0.1 * random.random(64)
    return x


def long_tails(random):
    return random.standard_t(3, size=(64, 2048)).astype("float32")


def uneven(random):
    """Rows of different spread; few values each."""
    return floats(random, 640, 30) * np.exp(floats(random, 640, 1))


def by_batch_size(x, method, sizes=(4, 8, 32, 64), **kwargs):
    shape = x.shape[1:]
    found = [calibrate(just_holder(shape=shape, **kwargs), x, method, n, verbose=0) for n in sizes]
    return np.array([ranges["only"] for ranges in found])


@pytest.mark.parametrize("batch_size", [4, 64])
@pytest.mark.parametrize("method", ["mse", "percentile", "minmax"])
def test_rare_large_values_count(method, batch_size, random):
    """By all squared errors the widest range is better by two orders than one without them."""
    ((_, high),) = by_batch_size(rare(random), method, [batch_size])
    assert high == 6
    ((_, high),) = by_batch_size(peaks(random), method, [batch_size])
    assert high > 0.9


@pytest.mark.parametrize("make", [rare, peaks, long_tails, uneven])
@pytest.mark.parametrize("method", ["mse", "percentile", "entropy"])
def test_ranges_do_not_depend_on_the_cut_or_the_order(make, method, random):
    x = make(random)
    found = by_batch_size(x, method, (4, 32, 64))
    turned = by_batch_size(x[::-1].copy(), method, (32,))
    parts = iter([x[:1], x[1:50], x[50:]])
    cut = calibrate(just_holder(shape=x.shape[1:]), parts, method, verbose=0)["only"]
    found = np.concatenate([found, turned, [cut]])
    tolerance = 0.15 if method == "entropy" else 0.05
    assert np.ptp(found, axis=0).max() < tolerance * np.ptp(found, axis=1).max(), found


def test_order_of_sorted_data_does_not_count(random):
    """All large values in the last rows, or evenly among all."""
    x = random.exponential(size=(64, 2048)).astype("float32")
    ordered = np.sort(x.ravel()).reshape(x.shape)
    for method in ("mse", "percentile"):
        (_, among), (_, last) = (by_batch_size(each, method, [8])[0] for each in (x, ordered))
        assert abs(among - last) < 0.05 * among


def test_calls_of_a_shared_layer_count_by_their_size(random):
    """A few large values of a small tensor do not outweigh those of a large one."""
    shared = holder("only", 4)
    a, b = keras.Input((5000,)), keras.Input((2,))
    model = keras.Model([a, b], [shared(a), shared(b)])
    x, y = random.random((32, 5000)), 3 + random.random((32, 2))
    found = calibrate(model, [x, y], "mse", 16, verbose=0)["only"]
    together = np.concatenate([x.ravel(), y.ravel()]).astype("float32")
    wanted = find_range(together, 0, together.max(), "mse", 4, "uniform")
    np.testing.assert_allclose(found, wanted, rtol=0.05)


@pytest.fixture(params=["float16", "bfloat16", "float64"])
def other_float(request):
    if keras.backend.backend() == "jax" and request.param == "float64":
        pytest.skip("JAX has no float64 unless asked for it.")
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(request.param)
    yield request.param
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(policy)


def test_any_float_type_of_keras(other_float):
    """Of whole numbers, which all of them hold, the ranges are those in float32."""
    x = np.arange(60).reshape(20, 3) % 13 - 6
    for method in RANGE_METHODS:
        assert calibrate(just_holder(), x, method, 8, verbose=0) == {"only": (-6, 6)}
    found = calibrate(just_holder(shape=(300,)), np.tile(x, 100), "mse", 8, verbose=0)
    assert found == {"only": (-6, 6)}


@pytest.mark.parametrize("corrected", [False, True])
def test_models_of_any_float_type_are_quantized(other_float, corrected):
    """Whose layers compute in it."""
    keras.config.set_dtype_policy(other_float)
    ones = {"kernel_initializer": "ones", "bias_initializer": "ones"}
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, activation="relu", **ones), layers.Dense(2, **ones)]
    )
    x = (np.eye(3) * [1, 2, 3])[[0, 1, 2, 1, 0, 2, 0]]
    recipe = qi.Recipe.from_preset("w8a8", bias_correction=corrected)
    quantized = qi.quantize_model(model, recipe, x, 4, verbose=0)
    wanted = 4 * x.sum(axis=1, keepdims=True) + [5, 5]
    found = to_numpy(ops.cast(quantized(x), "float32"))
    np.testing.assert_allclose(found, wanted, rtol=0.02)
