"""Two runs of the same samples against counts by hand and definitions, and files that do not belong together."""

from __future__ import annotations

import json
from itertools import product
from math import comb

import numpy as np
import pytest

from downstream.paired import binomial_two_sided, bootstrap, compare_predictions, comparison_json, comparison_tables
from vlp.cli import main


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(right: str, said: str = "") -> list[dict]:
    """A row a character of ``right``, 1 = right; two questions an image."""
    return [
        {"key": f"q{i}", "image": f"i{i // 2}", "question": f"what {i}", "answer": f"{said}{i}", "accuracy": float(one)}
        for i, one in enumerate(right)
    ]


def test_counts_means_and_the_samples_that_changed(tmp_path):
    a = write(tmp_path / "a.jsonl", answers("11010000", "old "))
    b = write(tmp_path / "b.jsonl", reversed(answers("10111100", "new ")))  # the order does not matter
    found = compare_predictions(a, b, shown=3)
    (one,) = found.differences
    assert (found.samples, found.groups, one.metric, one.samples) == (8, 4, "accuracy", 8)
    assert (one.a, one.b, one.difference) == (3 / 8, 5 / 8, 2 / 8)
    assert (one.wins, one.losses, one.ties) == (3, 1, 4)
    assert one.p == pytest.approx(2 * (comb(4, 0) + comb(4, 1)) / 2**4)
    assert [(c.key, c.a, c.b, c.said_a, c.said_b) for c in found.changes] == [
        ("q2", 0, 1, "old 2", "new 2"),
        ("q4", 0, 1, "old 4", "new 4"),
        ("q1", 1, 0, "old 1", "new 1"),
    ]
    assert len(comparison_tables(a, b, found)) == 2


@pytest.mark.parametrize("wins, losses", [(0, 0), (5, 5), (9, 1), (3, 8), (400, 350)])
def test_sign_test_is_the_binomial_sum(wins, losses):
    number, fewer = wins + losses, min(wins, losses)
    tail = sum(comb(number, i) for i in range(fewer + 1)) / 2**number
    assert binomial_two_sided(wins, losses) == pytest.approx(min(1, 2 * tail), rel=1e-12)
    assert binomial_two_sided(losses, wins) == binomial_two_sided(wins, losses)


def test_bootstrap_draws_images_not_samples():
    """Against all draws with repetition of three images, one of which has two samples."""
    values = {("a", 0): (0.0, 1.0), ("b", 0): (1.0, 1.0), ("c", 0): (0.0, 1.0), ("d", 0): (1.0, 0.0)}
    clusters = {("a", 0): "x", ("b", 0): "x", ("c", 0): "y", ("d", 0): "z"}
    changes = {"x": [1, 0], "y": [1], "z": [-1]}
    means = [np.mean([v for name in drawn for v in changes[name]]) for drawn in product("xyz", repeat=3)]
    low, high = bootstrap({"m": values}, clusters, 20000)["m"]
    assert (low, high) == tuple(
        np.percentile(means, [2.5, 97.5], method="inverted_cdf")
    )  # 1 of 27 draws is all y, 1 is all z
    spread = bootstrap({"m": values}, {key: key for key in clusters}, 2000)["m"]
    assert spread != (low, high)


def test_metrics_of_rows_and_of_results(tmp_path):
    """Each row names its metrics; those that only the results have are shown without a test; the headline leads."""
    for name, hits, total in (("a", (1, 0, 0), 100.0), ("b", (1, 1, 0), 150.0)):
        rows = [
            {"key": f"t2i/{i}", "metrics": {"t2i/R@1": hit, "t2i/reciprocal rank": (1 + hit) / 2}}
            for i, hit in enumerate(hits)
        ]
        rows.append({"key": "i2t/0", "metrics": {"i2t/R@1": 1.0}, "found": [f"text of {name}"]})
        write(tmp_path / name / "predictions.jsonl", rows)
        result = {"headline": "t2i/R@1", "metrics": {"t2i/R@1": sum(hits) / 3, "rSum": total}}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    a, b = tmp_path / "a" / "predictions.jsonl", tmp_path / "b" / "predictions.jsonl"
    found = compare_predictions(a, b)
    by_name = {one.metric: one for one in found.differences}
    assert list(by_name) == ["t2i/R@1", "t2i/reciprocal rank", "i2t/R@1", "rSum"]
    assert by_name["t2i/R@1"].samples == 3 and by_name["i2t/R@1"].samples == 1 and by_name["rSum"].p is None
    assert by_name["rSum"].difference == 50 and by_name["i2t/R@1"].ties == 1
    assert found.metric == "t2i/R@1" and [change.key for change in found.changes] == ["t2i/1"]
    tree = json.loads(json.dumps(comparison_json(a, b, found)))
    assert tree["differences"][0]["wins"] == 1 and tree["changes"][0]["b"] == 1


def test_equal_keys_are_told_apart_by_their_order(tmp_path):
    rows = [{"key": "0", "accuracy": value} for value in (0.0, 1.0)]
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows)
    found = compare_predictions(a, b)
    assert found.samples == 2 and found.differences[0].ties == 2 and not found.changes


@pytest.mark.parametrize(
    "rows, message",
    [
        (answers("11"), r"other samples: 1 of 3 are in .*a\.jsonl alone, as 'q2'"),
        (answers("1111"), r"other samples: 1 of 4 are in .*b\.jsonl alone, as 'q3'"),
        ([{**row, "question": "why?"} for row in answers("111")], "question of 'q0' is 'what 0' in one, 'why\\?' in"),
        ([{"key": row["key"]} for row in answers("111")], "neither metrics nor any of accuracy"),
        ([], "has no rows"),
        ([{"no": "key"}], "line 1: not a row of predictions"),
    ],
)
def test_files_that_cannot_be_compared(tmp_path, rows, message):
    a, b = write(tmp_path / "a.jsonl", answers("101")), write(tmp_path / "b.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        compare_predictions(a, b)
    assert "\n" not in str(error.value)


def test_on_the_command_line(tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl", answers("1100")), write(tmp_path / "b.jsonl", answers("1110", "[new] "))
    out = tmp_path / "new" / "out.json"
    assert main(["evaluate", "--predictions", str(a), str(b), "--out", str(out), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "+0.2500" in printed and "[new] 2" in printed and json.loads(out.read_text())["samples"] == 4
    assert main(["evaluate", "vqa", "--predictions", str(a), str(b)]) == 2
    assert "takes nothing beside it" in capsys.readouterr().err
