"""The figures of README and docs are those of the records, and the check of them can fail."""

from __future__ import annotations

import re

import pytest
from readme_figures import check, pages, shows
from readme_tables import compress_record

TEXT = pages()
STUDENT = ("student 2 + 0 (recipe `fast`)", "`onnxruntime-int8`")
WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "half": 2, "third": 3, "quarter": 4}


def test_every_figure_is_that_of_a_record() -> None:
    done = check(TEXT)
    assert done.problems == []
    assert len(done.figures) > 150


def test_every_figure_that_is_changed_is_found() -> None:
    """The last digit of each is another: each is a problem of its own."""
    changed, figures = TEXT, check(TEXT).figures
    for _, end in figures:
        changed = changed[: end - 1] + str((int(TEXT[end - 1]) + 1) % 10) + changed[end:]
    wrong = [problem for problem in check(changed).problems if "the page says" in problem]
    assert len(wrong) == len(figures)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("So at the paper's lambda", "It takes 3.3 ms. So at the paper's lambda"),
        ("| SASRec+ | `onnxruntime-int8`", "| SASRec+ | `onnxruntime-int4`"),
        ("| student 1 + 1, 1 step |", "| student 1 + 1, 4 step |"),
        ("(938 users)", "(939 users)"),
        ("; at 1, 4 and 32 steps `verify` refuses it", ""),
        (".94 of the lists' items stay. ", ""),
        ("| ADRec as published | 16.82 |", "| ADRec as published | 16.92 |"),
    ],
)
def test_what_no_record_says_is_found(old: str, new: str) -> None:
    assert old in TEXT
    assert len(check(TEXT.replace(old, new)).problems) > len(check(TEXT).problems)


@pytest.mark.parametrize(
    ("token", "value", "expected"),
    [
        (".94", 0.9393, True), (".94", 0.9491, False), ("10485", 10485.4, True), ("1/18.6", 0.053846, True),
        ("1/18.6", 0.0534, False), ("9e-7", 8.58e-7, True), ("9e-7", 9.6e-7, False),
        ("8.5e-7", 8.49875e-7, True), ("9e-7", 8.49875e-7, False), ("100.00", 99.997, True),
    ],
)  # fmt: skip
def test_a_number_is_compared_as_it_is_printed(token: str, value: float, expected: bool) -> None:
    assert shows(token, value) == expected


def test_figures_in_words() -> None:
    student = compress_record(*STUDENT)
    (batch,) = [each for each in student["timings"] if each["batch_size_users"] == 512]
    (hundreds,) = re.findall(r"no loss that can be told, (\w+) hundred\s+times `reference`", TEXT)
    assert round(batch["times_reference"]["value"] / 100) == WORDS[hundreds]
    assert student["accuracy"]["ndcg20_kept_percent"]["high"] >= 100
    small = compress_record("2 + 2, 1 step", "int8 stored, `cached`")
    (part,) = re.findall(r"--recipe small --out \S+ +# a (\w+) of the bytes", TEXT)
    assert round(small["teacher_file_bytes"] / small["file_bytes"]) == WORDS[part]
