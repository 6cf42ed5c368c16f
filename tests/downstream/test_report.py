"""The report: what it holds, what it must not hold, and that page and terminal say the same."""

import json
import math
import re
from html.parser import HTMLParser
from io import StringIO

import pytest
import torch
from rich.console import Console

from downstream.charts import NONE, draw, smoothed, ticks
from downstream.report import (
    Caption,
    Curve,
    Hit,
    Query,
    Question,
    Report,
    Row,
    blocks,
    curves_from_metrics,
    data_uri,
    ordinal,
    percent,
    render,
    table,
    write_report,
)
from vlp.data.reader import open_reader

HOSTILE = "<script>alert('x')</script>\"><img src=q onerror=alert(1)> [bold]&amp;[/] {{ 7 * 7 }}"
VOID = {"meta", "link", "img", "br", "line", "polyline", "circle"}


class Page(HTMLParser):
    """Checks that tags close in order, and gathers what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def webp():
    return open_reader("emoji:fluent3d")[0].files["webp"]


def full(webp: bytes, text: str = "red apple") -> Report:
    pixels = torch.arange(3 * 8 * 6, dtype=torch.uint8).reshape(3, 8, 6)
    return Report(
        title=f"Title {text}",
        lead=f"Lead {text}",
        facts=[("seed", "0"), ("command", f"vlp demo {text}")],
        rows=[
            Row("search", "unseen style", "R@1", 0.183, {"chance": 1 / 1106}, method="ITC", headline=f"found {text}"),
            Row("search", "unseen style", "R@1", 0.2, {"chance": 1 / 1106}, method=f"sum {text}", note=f"note {text}"),
            Row("search", "unseen style", "median rank", 14.0, None, False, method="ITC", kind="plain"),
            Row("VQA", f"test {text}", "accuracy", 0.973, {"majority": 0.373, "question only": 0.67}),
            Row("captioning", "unseen style", "CIDEr-D", 1.8423, 0.021, kind="plain"),
        ],
        splits={"unseen style": f"fluent3d, a style never seen in training {text}"},
        curves=[Curve(f"ITC {text}", [(0, 5.5), (100, 3.0), (200, math.nan), (300, 1.25)], 5.545)],
        queries={
            f"found {text}": [Query(text, webp, [Hit(webp, text, 1.5, False), Hit(pixels, "pear", None, True)], 2)],
            "missed": [
                Query(text, webp, [Hit(webp, "pear", 1.0, False)], 22),
                Query(pixels, text, [Hit(None, "pear", 1.0, False)], None),
            ],
        },
        questions=[Question(pixels, f"what? {text}", "red", text, False, 0.42)],
        captions=[Caption(webp, f"wrote {text}", [f"one {text}", "two"])],
        notes=[f"a note {text}"],
    )


def test_all_sections_are_there(webp):
    page = Page(render(full(webp)))
    ids = [attrs["id"] for attrs in page.named("section")]
    assert ids == ["results", "retrieval", "questions", "captions", "training", "run"]
    assert [attrs["href"] for attrs in page.named("a")] == [f"#{one}" for one in ids]
    for said in (
        "fluent3d, a style never seen in training",
        "The right one came 22nd",
        "The right one is not among them: red apple",
        "right answer: red",
        "42.0 % sure",
        "lower is better",
        "chance 5.54",
    ):
        assert said in page.text.replace("\N{NO-BREAK SPACE}", " "), said


def test_an_empty_report_has_no_empty_sections():
    page = Page(render(Report("Title", "Lead", queries={"none": []}, curves=[Curve("itc", [])])))
    assert not page.named("section") and not page.named("a") and not page.named("img")
    assert page.text == "Title Title Lead"


def test_hostile_words_stay_words(webp):
    page = Page(render(full(webp, HOSTILE)))
    assert not page.named("script")
    assert all(attrs["src"].startswith("data:image/") for attrs in page.named("img"))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert HOSTILE in " ".join(page.words) and "{{ 7 * 7 }}" in page.text
    drawn = printed(full(webp, HOSTILE))
    assert "[bold]" in drawn.replace("\n", "")


def test_nothing_is_asked_of_the_network(webp):
    text = render(full(webp))
    assert not re.search(r"(https?:)?//\w|@import|url\(", re.sub(r"base64,[\w+/=]+", "", text))
    page = Page(text)
    assert not page.named("script") and not page.named("iframe")
    assert all(attrs["href"].startswith("data:") for attrs in page.named("link"))
    policy = next(a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_every_picture_has_words(webp):
    page = Page(render(full(webp)))
    assert all(attrs.get("alt") for attrs in page.named("img"))
    (chart,) = page.named("svg")
    assert chart["aria-label"] == "ITC red apple: from 5.50 to 1.25 over 300 samples; chance is 5.54"
    assert page.named("html")[0]["lang"] == "en"


def printed(report: Report) -> str:
    out = StringIO()
    Console(file=out, width=160).print(table(report))
    return out.getvalue()


def test_the_terminal_says_the_same_numbers(webp):
    report = full(webp)
    page, drawn = Page(render(report)).text, printed(report)
    cells = [cell.text for one in blocks(report.rows) for _, line in (*one.lines, *one.floors) for cell in line]
    assert {"18.3\xa0%", "20.0\xa0%", "0.09\xa0%", "97.3\xa0%", "67.0\xa0%", "14", "1.84", "0.021"} <= set(cells)
    for cell in cells:
        assert " ".join(cell.split()) in page and cell in drawn, cell


def test_tables_group_by_task_and_mark_the_best(webp):
    rows = [
        Row("a", "s", "R@1", 0.2, 0.1, method="x"),
        Row("b", "s", "loss", 0.5, higher_is_better=False, method="x", kind="plain"),
        Row("a", "s", "R@1", 0.3, 0.1, method="y"),
        Row("a", "t", "R@1", 0.4, method="x"),
        Row("b", "s", "loss", 0.4, higher_is_better=False, method="y", kind="plain"),
        Row("a", "s", "R@5", 0.9, method="y"),
    ]
    made = blocks(rows)
    assert [(one.task, one.split) for one in made] == [("a", "s"), ("a", "t"), ("b", "s")]
    first = {name: [(cell.text, cell.best) for cell in line] for name, line in made[0].lines}
    assert first == {"x": [("20.0\xa0%", False), (NONE, False)], "y": [("30.0\xa0%", True), ("90.0\xa0%", True)]}
    assert [(name, [cell.text for cell in line]) for name, line in made[0].floors] == [("floor", ["10.0\xa0%", NONE])]
    assert [line[0].best for _, line in made[1].lines] == [False], "one method is not the best of anything"
    assert [line[0].best for _, line in made[2].lines] == [False, True]


def test_curves_come_from_the_metrics_of_a_run(tmp_path):
    records = [
        {"seen": 64, "itc/loss": 5.0, "new/loss": 1.0, "lr": 1e-3, "loss": 6.0},
        {"seen": 128, "itc/loss": 4.0, "itc/accuracy": 0.5},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records) + '{"seen": 19')
    assert curves_from_metrics(path, {"itc": 5.5}) == [
        Curve("Image-text contrast (ITC)", [(64, 5.0), (128, 4.0)], 5.5),
        Curve("new", [(64, 1.0)], None),
    ]


def test_a_chart_keeps_its_lines_inside():
    chart = draw("loss", [(100 * i, 8.0 - 0.07 * i) for i in range(101)], 5.5, "samples")
    assert chart is not None
    places = [tuple(map(float, one.split(","))) for one in chart.smooth.split()]
    assert len(places) == 101 and all(
        chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in places
    )
    assert places[0][1] < chart.chance[0] < places[-1][1], "a fall crosses the chance level downwards"
    assert (chart.last, chart.chance[1]) == ((*places[-1], "1"), "chance 5.50")
    assert draw("loss", [(1, math.nan)], None, "samples") is None
    assert draw("loss", [(0, 0.0)], None, "samples") is not None


def test_smoothing_keeps_ends_and_lines():
    line = [0.5 * i for i in range(200)]
    assert smoothed(line) == pytest.approx(line)
    noise = [(-1.0) ** i for i in range(200)]
    assert (smoothed(noise)[0], smoothed(noise)[-1]) == (1.0, -1.0)
    assert max(map(abs, smoothed(noise)[20:-20])) < 0.2


@pytest.mark.parametrize(("low", "high"), [(0, 5.6), (0.58, 0.66), (-3, 3), (2, 2), (0, 0), (0, 1e-4)])
def test_ticks_enclose_the_values(low, high):
    found = ticks(low, high, 4)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7
    assert len({f"{one:g}" for one in found}) == len(found)


def test_numbers_in_words():
    assert [percent(x) for x in (0, 1 / 1106, 0.00996, 0.183, 1)] == [
        f"{x}\xa0%" for x in ("0.0", "0.09", "1.0", "18.3", "100.0")
    ]
    assert [ordinal(x) for x in (1, 2, 3, 11, 12, 22, 113, 1201)] == [
        *("1st", "2nd", "3rd", "11th", "12th", "22nd", "113th"),
        "1,201st",
    ]


def test_pictures(webp, tmp_path):
    assert data_uri(webp).startswith("data:image/webp;base64,")
    assert data_uri(torch.zeros(3, 4, 4, dtype=torch.uint8)).startswith("data:image/png;base64,")
    with pytest.raises(ValueError, match="no PNG, WebP, JPEG or GIF"):
        data_uri(b"<svg onload=alert(1)>")
    with pytest.raises(ValueError, match=r"torch.float32 \(3, 4, 4\)"):
        data_uri(torch.zeros(3, 4, 4))
    path = write_report(full(webp), tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == render(full(webp))
