"""Tables that fit: cells are put one above the other, then broken, and nothing is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_qwrap.reports.text import html_table, paragraph, text_table

ROWS = [
    ("layer", "class", "bits"),
    ("block/conv1", "SeparableConv2D", "8"),
    ("head", "Dense", "4"),
]
STACKS = [(0, 1), (2,)]

LAID_OUT = {
    80: [
        "layer        class            bits",
        "block/conv1  SeparableConv2D  8",
        "head         Dense            4",
    ],
    33: [
        "layer            bits",
        "class",
        "block/conv1      8",
        "SeparableConv2D",
        "head             4",
        "Dense",
    ],
    15: [
        "layer      bits",
        "class",
        "block/     8",
        "conv1",
        "Separable",
        "Conv2D",
        "head       4",
        "Dense",
    ],
    11: [
        "layer  bits",
        "class",
        "block  8",
        "/",
        "conv1",
        "Separ",
        "able",
        "Conv2",
        "D",
        "head   4",
        "Dense",
    ],
}


@pytest.mark.parametrize("width", LAID_OUT)
def test_a_table_is_laid_out_for_the_width(width):
    lines = text_table(ROWS, STACKS, width)
    assert max(map(len, lines)) <= width
    assert lines == LAID_OUT[width]


def test_a_number_in_brackets_stays_with_its_word():
    rows = [("range", "of"), ("-0.25..0.125 (12 channels)", "kernel")]
    lines = text_table(rows, [(0,), (1,)], 21)
    assert [line.split("  ") for line in lines[1:]] == [
        ["-0.25..0.125", " kernel"],
        ["(12 channels)"],
    ]


CELLS = st.text("ab/_ .Z(", max_size=12).map(str.strip)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=4), st.integers(5, 60))
def test_no_line_is_wider_and_no_letter_is_lost(rows, width):
    lines = text_table(rows, STACKS, width)
    assert all(len(line) <= width for line in lines)
    letters = sorted("".join("".join(row) for row in rows).replace(" ", ""))
    assert sorted("".join(lines).replace(" ", "")) == letters


def test_paragraphs(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert paragraph("word by word, by word", " ") == [" word by word, by", "   word"]
    assert max(map(len, paragraph("x" * 99))) == 20


def test_html():
    assert html_table([("a", "b"), ("<1>", "&")]) == (
        "<table><tr><th>a</th><th>b</th></tr><tr><td>&lt;1&gt;</td><td>&amp;</td></tr></table>"
    )
