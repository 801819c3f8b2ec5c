"""The demo: its comparison can say no, and the whole of it says yes."""

import re
import subprocess
import sys
from dataclasses import replace

import keras
import numpy as np
import pytest
from rich.console import Console

import keras_qwrap as qi
from keras_qwrap import demo

CODES = {
    "a/kernel/codes": np.array([[1, -127], [3, 4]], np.int32),
    "a/kernel/scale": np.array([[0.5, 0.25]], np.float32),
    "a/kernel/zero_point": np.array(0, np.int32),
}
OUTPUTS = np.array([[0.1, 0.9], [0.7, 0.2], [0.3, 0.4]], np.float32)
RELOADED = ["reloaded .keras", "reloaded .h5"]
CELLS = ["converted", *RELOADED, demo.CODES]


def equal_results() -> dict[str, demo.Result]:
    """Results that are equal, in arrays of their own."""

    def result() -> demo.Result:
        return demo.Result(OUTPUTS.copy(), {key: value.copy() for key, value in CODES.items()})

    return {name: result() for name in ("float", "quantized", "converted", *RELOADED)}


def one_step_up(array: np.ndarray) -> np.ndarray:
    """`array` with its last element moved to the next number."""
    moved = array.copy()
    last = moved[..., -1:]
    moved[..., -1:] = np.nextafter(last, np.inf) if array.dtype.kind == "f" else last + 1
    return moved


def noes(results: dict[str, demo.Result]) -> list[str]:
    return [name for name, same in demo.compare(results).items() if not same]


def test_equal_results_are_identical():
    assert demo.compare(equal_results()) == dict.fromkeys(CELLS, True)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("float", []),
        ("quantized", ["converted"]),
        ("converted", ["converted", *RELOADED]),
        ("reloaded .keras", ["reloaded .keras"]),
        ("reloaded .h5", ["reloaded .h5"]),
    ],
)
def test_outputs_that_differ_by_one_ulp_are_not_identical(changed, expected):
    results = equal_results()
    results[changed] = replace(results[changed], outputs=one_step_up(OUTPUTS))
    assert noes(results) == expected


def test_outputs_of_another_shape_are_not_identical():
    results = equal_results()
    results["converted"] = replace(results["converted"], outputs=OUTPUTS[:1])
    assert noes(results) == ["converted", *RELOADED]


@pytest.mark.parametrize("name", RELOADED)
@pytest.mark.parametrize("key", ["a/kernel/codes", "a/kernel/scale"])
def test_codes_that_differ_are_not_identical(name, key):
    results = equal_results()
    results[name] = replace(results[name], codes=CODES | {key: one_step_up(CODES[key])})
    assert noes(results) == [demo.CODES]


@pytest.mark.parametrize("codes", [{}, CODES | {"b/kernel/codes": np.zeros(2, np.int32)}])
def test_missing_and_further_codes_are_not_identical(codes):
    results = equal_results()
    results["reloaded .h5"] = replace(results["reloaded .h5"], codes=codes)
    assert noes(results) == [demo.CODES]


@pytest.mark.parametrize(
    ("codes", "bits"),
    [([-127, 127], 8), ([-128, 5], 8), ([0, 128], 9), ([-8, 7], 4), ([-1, 1], 2), ([-9, 0], 5)],
)
def test_weight_bits_are_those_the_codes_need(codes, bits):
    arrays = {"a/codes": np.array([0, 1]), "b/codes": np.array(codes), "b/scale": np.float32(999)}
    assert demo.Result(OUTPUTS, arrays).weight_bits == bits


def test_float_weights_have_32_bits():
    assert demo.Result(OUTPUTS, {}).weight_bits == 32


def rendered(results: dict[str, demo.Result], same: dict[str, bool]) -> dict[str, list[str]]:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(demo.render(results, np.array([1, 0, 0]), same))
    return table_rows(capture.get())


def table_rows(text: str) -> dict[str, list[str]]:
    """First cell -> the other cells of every row of a printed table."""
    rows = [re.split("[│┃]", line)[1:-1] for line in text.splitlines() if line[:1] in "│┃"]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows if cells}


def test_table():
    results = equal_results()
    results["float"] = demo.Result(np.roll(OUTPUTS, 1, axis=1), {}, size=1500)
    assert rendered(results, dict.fromkeys(CELLS, True) | {"reloaded .h5": False}) == {
        "": ["accuracy", "weight bits", "file size", "outputs identical"],
        "float": ["33.33%", "32", "2 kB", ""],
        "quantized": ["66.67%", "8", "", ""],
        "converted": ["66.67%", "8", "", "yes"],
        "reloaded .keras": ["66.67%", "8", "", "yes"],
        "reloaded .h5": ["66.67%", "8", "", "no"],
        demo.CODES: ["", "", "", "yes"],
    }


@pytest.mark.parametrize(
    ("ends", "method", "threshold", "signed"),
    [
        ((0.0, 3.1), "POWER_OF_TWO", 4.0, False),
        ((0.0, 4.0), "POWER_OF_TWO", 4.0, False),
        ((0.0, 0.2), "POWER_OF_TWO", 0.25, False),
        ((-2.5, 1.0), "SYMMETRIC", 2.5, True),
        ((-2.5, 3.5), "SYMMETRIC", 3.5, True),
    ],
)
def test_activation_ranges_become_thresholds(ends, method, threshold, signed):
    quantization = demo.Quantization(8, dict.fromkeys(demo.QUANTIZED_TENSORS, ends))
    holder = demo.build_model(quantization).get_layer("pixels")
    config = holder.activation_holder_quantizer.quantization_config
    assert config.activation_quantization_method is qi.QuantizationMethod[method]
    params = {"threshold": threshold, "is_signed": signed}
    assert config.activation_quantization_params == params


def test_both_models_come_from_the_same_lines_and_start_from_the_same_weights(random):
    images = random.uniform(size=(4, 8, 8, 1)).astype("float32")
    model = demo.build_model()
    ranges = demo.find_ranges(model, images)
    quantized = demo.build_model(demo.Quantization(4, ranges))
    demo.copy_weights(model, quantized)
    assert [layer.name for layer in quantized.layers] == [layer.name for layer in model.layers]
    outputs = keras.ops.convert_to_numpy(model(images))
    np.testing.assert_allclose(ranges["logits"], (outputs.min(), outputs.max()), rtol=1e-5)
    assert ranges["pixels"] == (images.min(), images.max())
    wrapped = [x for x in quantized.layers if isinstance(x, qi.KerasQuantizationWrapper)]
    assert [w.name for w in wrapped if w.is_weights_quantization] == [
        "conv_1", "conv_2", "hidden", "logits"
    ]  # fmt: skip
    assert [w.name for w in wrapped if w.is_activation_quantization] == [
        *demo.QUANTIZED_TENSORS[1:]
    ]
    for wrapper in wrapped:
        for mine, theirs in zip(
            wrapper.layer.get_weights(), model.get_layer(wrapper.name).get_weights(), strict=True
        ):
            assert np.array_equal(mine, theirs)
    assert demo.Result(outputs, demo.collect_codes(quantized)).weight_bits == 4


def test_data_is_split_by_the_seed():
    (x, y), (x_test, y_test) = demo.load_data(0)
    assert (x.shape, x.dtype, y.shape) == ((1437, 8, 8, 1), "float32", (1437,))
    assert (x_test.shape, y_test.shape) == ((360, 8, 8, 1), (360,))
    assert (x.min(), x.max()) == (0, 1)
    assert not np.array_equal(demo.load_data(1)[1][1], y_test)
    assert np.array_equal(demo.load_data(0)[1][1], y_test)


@pytest.mark.slow
def test_a_failure_in_the_new_process_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)Reloading failed with 1:.*images\.npy"):
        demo.reload_in_new_process(tmp_path)


@pytest.mark.slow
def test_status_is_1_if_a_file_gives_other_outputs(monkeypatch, capsys):
    honest = demo.reload_in_new_process

    def spoiled(folder):
        results = honest(folder)
        results[".h5"] = replace(results[".h5"], outputs=one_step_up(results[".h5"].outputs))
        return results

    monkeypatch.setattr(demo, "reload_in_new_process", spoiled)
    assert demo.run(bits=4, epochs=1, seed=3) == 1
    rows = table_rows(capsys.readouterr().out)
    assert {name: rows[name][-1] for name in CELLS} == dict.fromkeys(CELLS, "yes") | {
        "reloaded .h5": "no"
    }


@pytest.mark.slow
@pytest.mark.tensorflow
def test_demo(tmp_path):
    """The README's first command, as a user types it, with accuracies on TensorFlow's kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "keras_qwrap", "demo", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "WARNING:" not in done.stderr.replace("WARNING: All log messages before absl", "")
    rows = table_rows(done.stdout)
    assert {name: rows[name][-1] for name in CELLS} == dict.fromkeys(CELLS, "yes")
    accuracy = {name: float(row[0].rstrip("%")) for name, row in rows.items() if "%" in row[0]}
    assert accuracy.pop("float") > 97
    assert len(set(accuracy.values())) == 1
    assert len(accuracy) == 4
    gap = abs(accuracy["quantized"] - float(rows["float"][0].rstrip("%")))
    assert gap <= 0.6
    assert [rows[name][1] for name in ("float", "quantized", *CELLS[:3])] == ["32", *["8"] * 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.h5", "model.keras"]
    for line in ("Training in float", "Training with quantization"):
        assert line in done.stdout


def trained_and_converted() -> tuple[keras.Model, keras.Model]:
    ranges = dict.fromkeys(demo.QUANTIZED_TENSORS, (0.0, 1.0))
    quantized = demo.build_model(demo.Quantization(8, ranges))
    quantized.compile(keras.optimizers.Adam(), "mse")
    quantized.fit(np.ones((2, 8, 8, 1)), np.ones((2, 10)), verbose=0)
    return quantized, qi.convert_to_inferable(quantized)


@pytest.mark.slow
def test_training_goes_past_converted_weights():
    """Training the converted model must not move weights off their grid."""
    _, converted = trained_and_converted()
    before = demo.collect_codes(converted)
    trainable = {id(variable) for variable in converted.trainable_variables}
    for layer in converted.layers:
        if isinstance(layer, qi.KerasQuantizationWrapper) and layer.is_weights_quantization:
            assert id(layer.latent_weight("kernel")) not in trainable
    converted.compile(keras.optimizers.Adam(), "mse")
    converted.fit(np.ones((2, 8, 8, 1)), np.ones((2, 10)), verbose=0)
    after = demo.collect_codes(converted)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_converted_file_is_little_larger_than_the_float_one(tmp_path):
    """Keras needs 5 to 7 kB for each wrapped layer; a weight stored twice needs 160 kB."""
    _, converted = trained_and_converted()
    demo.build_model().save(tmp_path / "float.keras")
    converted.save(tmp_path / "converted.keras")
    sizes = [(tmp_path / f"{name}.keras").stat().st_size for name in ("float", "converted")]
    assert sizes[1] < sizes[0] + 100_000
