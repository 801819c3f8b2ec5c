"""How refusals are worded."""

from keras_qwrap.errors import bad_type, bad_value


def test_numbers_are_told_from_texts_and_texts_read_as_they_are():
    """A text stands in quotes; what else it may look like has its type behind it."""
    error = bad_value("num_bits", 1, "2 to 16", "Use 8.")
    assert str(error) == "num_bits: received 1 (of type int), expected 2 to 16. Use 8."
    error = bad_type("num_bits", "1", "an int", "Use 8.")
    assert str(error) == "num_bits: received '1', expected an int. Use 8."
    assert type(bad_value("x", 1, "", "")) is ValueError
    assert type(error) is TypeError


def test_long_values_are_cut():
    text = str(bad_value("x", [10] * 100, "less", "Fix it."))
    assert text.startswith("x: received [10, 10,")
    assert "... (of type list), expected less. Fix it." in text
    assert len(text) < 180
