import base64
import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.evaluation.metrics import wilson
from sfumato.evaluation.report import (
    GridSection,
    MetricRow,
    Report,
    Table,
    label_rows,
    loss_curve_svg,
    picture_grid,
    plain_table,
    render_report,
    write_report,
)

ATTACK = "<script>alert('x')</script> \" onerror=\"alert(1)"


def pictures(rows: int = 2, columns: int = 3, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, 3, size, size, generator=torch.Generator().manual_seed(seed))


def metric_rows() -> list[MetricRow]:
    return [
        MetricRow("UA", "Not judged a sneaker.", wilson(8, 200), wilson(197, 200), "at least 95 %", True),
        MetricRow("CRA", "Styles and colours kept.", wilson(396, 400), wilson(390, 400), "at least 98 %", False),
        MetricRow("IRA", "Other garments kept.", wilson(0, 7), wilson(7, 7)),
    ]


def test_each_row_of_a_grid_has_its_label_beside_it():
    grid = picture_grid(pictures(), scale=6)
    labelled = label_rows(grid, ["short", "a longer label"])
    assert labelled.height == grid.height and labelled.mode == "RGB"
    width = labelled.width - grid.width
    assert np.array_equal(np.asarray(labelled)[:, width:], np.asarray(grid))
    ink = np.asarray(labelled.crop((0, 0, width, grid.height)).convert("L")) < 128
    above, below = ink[: grid.height // 2], ink[grid.height // 2 :]
    assert 0 < above.any(0).sum() < below.any(0).sum() < width
    assert not above[:3].any() and not below[-3:].any()


def history(steps: int = 50) -> list[dict[str, float]]:
    return [
        {"step": i, "loss": 1 / (1 + i), "forget": 0.5 / (1 + i), "learning_rate": 1e-5, "seconds": 0.1 * i}
        for i in range(steps)
    ]


def full_report(label: str = "a red sneaker") -> Report:
    section = GridSection(
        title="Forgotten",
        text="Same prompts, same seeds.",
        row_labels=[label, "a blue bag"],
        column_labels=["seed 0", "seed 1", "seed 2"],
        grids=[("before", pictures(seed=1)), ("after", pictures(seed=2))],
        table=Table(["sampler", "distance"], [["DDIM", "18.42"], ["TimeShift", "11.97"]]),
    )
    return Report(
        title="Erasing “sneaker”",
        summary="sneaker is gone, everything else stayed.",
        metrics=metric_rows(),
        sections=[section],
        history=history(),
        facts={"time": "94 s", "peak memory": "612 MB"},
        command="sfumato demo --concept sneaker --seed 0",
        reproduce="Bit for bit on the same device.",
    )


class Page(HTMLParser):
    """Collects tags with their attributes, and the text that is shown."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.text += data

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def test_grid_enlarges_each_pixel_to_a_square_and_leaves_white_gaps() -> None:
    source = pictures(rows=2, columns=3, size=4)
    image = picture_grid(source, scale=3, gap=2)
    assert image.mode == "RGB"
    assert image.size == (3 * (3 * 4 + 2) - 2, 2 * (3 * 4 + 2) - 2)
    sheet = np.asarray(image)
    second_row_third_column = sheet[14:26, 28:40]
    expected = (source[1, 2].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy().repeat(3, 0).repeat(3, 1)
    assert (second_row_third_column == expected).all()
    assert (sheet[12:14] == 255).all()
    assert (sheet[:, 12:14] == 255).all()


def test_grid_without_enlargement_and_gap_is_the_pictures() -> None:
    source = torch.zeros(1, 2, 3, 2, 5)
    source[0, 1] = 1
    sheet = np.asarray(picture_grid(source.half(), scale=1, gap=0))
    assert sheet.shape == (2, 10, 3)
    assert (sheet[:, :5] == 0).all()
    assert (sheet[:, 5:] == 255).all()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (torch.zeros(2, 3, 8, 8), "shape"),
        (torch.zeros(1, 0, 3, 8, 8), "empty"),
        (torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8), "divide"),
        (torch.full((1, 1, 3, 8, 8), -1.0), "from -1 to -1"),
        (torch.full((1, 1, 3, 8, 8), math.nan), r"in \[0, 1\]"),
    ],
)
def test_grid_refuses_what_is_not_pictures(wrong: torch.Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        picture_grid(wrong)


def test_grid_refuses_scale_zero() -> None:
    with pytest.raises(ValueError, match="scale"):
        picture_grid(pictures(), scale=0)


def test_section_refuses_labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 rows, but there are 1"):
        GridSection("t", "", ["one"], [], [("before", pictures())])
    with pytest.raises(ValueError, match="columns"):
        GridSection("t", "", ["one", "two"], ["seed 0"], [("before", pictures())])
    with pytest.raises(ValueError, match="columns"):
        GridSection("t", "", ["one", "two"], [], [("before", pictures()), ("after", pictures(columns=4))])
    with pytest.raises(ValueError, match="no grids"):
        GridSection("t", "", [], [], [])


def test_table_refuses_ragged_rows() -> None:
    with pytest.raises(ValueError, match="2 columns"):
        Table(["a", "b"], [["1", "2"], ["1"]])


def test_plain_table_aligns_columns() -> None:
    assert plain_table(metric_rows()).splitlines() == [
        "UA    4.0 % [2.0, 7.7]    ->   98.5 % [95.7, 99.5]   target at least 95 %: reached",
        "CRA  99.0 % [97.5, 99.6]  ->   97.5 % [95.5, 98.6]   target at least 98 %: missed",
        "IRA   0.0 % [0.0, 35.4]   ->  100.0 % [64.6, 100.0]",
    ]
    assert plain_table([]) == ""


def test_loss_curve_draws_every_term_and_nothing_else() -> None:
    svg = loss_curve_svg(history())
    assert svg.startswith("<svg")
    root = ElementTree.fromstring(svg)
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"loss", "forget", "step"} <= texts
    assert not {"learning_rate", "seconds"} & texts


def test_loss_curve_is_the_same_string_each_time_and_takes_the_colour_of_the_page() -> None:
    svg = loss_curve_svg(history())
    assert svg == loss_curve_svg(history())
    assert "currentColor" in svg
    assert "#010203" not in svg


def test_loss_curve_leaves_matplotlib_as_it_was() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    loss_curve_svg(history())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 0, "loss": 1.0}],
        [{"step": 0, "loss": 1.0, "forget": 2.0}, {"step": 1, "loss": 0.5}],
        [{"step": i, "loss": math.nan if i == 3 else -1.0} for i in range(60)],
        [{"step": 0, "loss": math.nan}],
        [{"loss": 1.0}, {"loss": 0.5}],
        [{"step": i, "big $x^2$": 100.0, "_small & <b>": 0.001} for i in range(5)],
    ],
)
def test_loss_curve_copes_with_short_sparse_and_odd_histories(rows: list[dict[str, float]]) -> None:
    ElementTree.fromstring(loss_curve_svg(rows))


def test_loss_curve_of_terms_far_apart_has_plain_numbers_on_its_axis() -> None:
    svg = loss_curve_svg([{"step": i, "forget": 10 * 0.95**i, "retain": 0.02} for i in range(100)])
    texts = {element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert {"10", "1", "0.1"} <= texts
    assert "mathdefault" not in svg


def test_loss_curve_names_an_empty_history() -> None:
    with pytest.raises(ValueError, match="no loss"):
        loss_curve_svg([])


def test_page_loads_nothing() -> None:
    html = render_report(full_report())
    page = Page(html)
    assert not page.of("script")
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
                assert value is not None
                assert value.startswith(("data:", "#")), value
    assert not re.search(r"@import|url\((?!#)", html)


def test_page_escapes_every_text() -> None:
    report = full_report(ATTACK)
    report.title = report.summary = report.command = report.reproduce = ATTACK
    report.facts = {ATTACK: ATTACK}
    report.metrics = [MetricRow(ATTACK, ATTACK, wilson(1, 2), wilson(1, 2), ATTACK, True)]
    report.history = [{"step": 0, ATTACK: 1.0}]
    report.sections[0].title = report.sections[0].text = ATTACK
    html = render_report(report)
    page = Page(html)
    assert "<script" not in html
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert ATTACK in page.text
    assert any(ATTACK in (image["alt"] or "") for image in page.of("img"))


def test_page_holds_everything_given() -> None:
    report = full_report()
    page = Page(render_report(report))
    words = " ".join(page.text.split())
    for row in report.metrics:
        assert row.name in words
        assert row.explanation in words
        for proportion in (row.before, row.after):
            shown = f"{100 * proportion.value:.1f} % [{100 * proportion.low:.1f}, {100 * proportion.high:.1f}]"
            assert f"{shown} {proportion.successes} of {proportion.total}" in words
    given = [report.title, report.summary, report.command, report.reproduce, *report.facts, *report.facts.values()]
    section = report.sections[0]
    given += [section.title, section.text, *section.row_labels, *section.column_labels]
    given += [
        "DDIM",
        "18.42",
        "TimeShift",
        "11.97",
        "at least 95 %",
        "✓ reached",
        "✗ missed",
        "1 of 2 targets reached",
    ]
    for text in given:
        assert text in words


def test_page_holds_the_pictures_with_descriptions() -> None:
    report = full_report()
    images = Page(render_report(report)).of("img")
    assert [image["alt"] for image in images] == [
        "before: a red sneaker, seed 0, seed 1, seed 2",
        "after: a red sneaker, seed 0, seed 1, seed 2",
        "before: a blue bag, seed 0, seed 1, seed 2",
        "after: a blue bag, seed 0, seed 1, seed 2",
    ]
    strip = Image.open(io.BytesIO(base64.b64decode((images[3]["src"] or "").partition(",")[2])))
    assert strip.size == (int(images[3]["width"] or 0), int(images[3]["height"] or 0))
    scale = 16  # 8-pixel pictures, shown at 128
    expected = report.sections[0].grids[1][1][1, 0].permute(1, 2, 0)
    seen = torch.from_numpy(np.asarray(strip)[: 8 * scale : scale, : 8 * scale : scale] / 255.0)
    assert (seen - expected).abs().max() <= 0.5 / 255 + 1e-6


def test_page_reduces_large_pictures() -> None:
    report = Report("t", "s", sections=[GridSection("g", "", ["p"], [], [("before", pictures(1, 2, 512))])])
    image = Page(render_report(report)).of("img")[0]
    assert (image["width"], image["height"]) == (str(2 * 256 + 4), "256")


def test_page_is_accessible() -> None:
    page = Page(render_report(full_report()))
    assert page.of("html") == [{"lang": "en"}]
    assert len(page.of("h1")) == 1
    assert all(heading.get("scope") in ("row", "col") for heading in page.of("th"))
    assert all(image["alt"] for image in page.of("img"))


def test_equal_reports_give_equal_bytes(tmp_path: Path) -> None:
    first = write_report(full_report(), tmp_path / "deep" / "a.html")
    second = write_report(full_report(), tmp_path / "b.html")
    assert first == tmp_path / "deep" / "a.html"
    assert first.read_bytes() == second.read_bytes()
    assert [file.name for file in first.parent.iterdir()] == ["a.html"]


def test_page_does_without_what_is_not_there() -> None:
    page = Page(render_report(Report("Only a title", "And a verdict.")))
    words = " ".join(page.text.split())
    assert "And a verdict." in words
    for absent in ("Measured", "Training", "This run", "Do it again", "target"):
        assert absent not in words.partition("Only a title And")[2]
    assert not page.of("img")
    assert not page.of("table")


def test_page_without_targets_has_no_target_column() -> None:
    words = Page(render_report(Report("t", "s", metrics=metric_rows()[2:]))).text
    assert "target" not in words


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}: run pip install 'sfumato\[eval\]'"):
        render_report(full_report())


def test_numbers_survive_as_json() -> None:
    report = full_report()
    read = json.loads(json.dumps(report.as_dict()))
    assert read["metrics"][0]["after"] == wilson(197, 200).as_dict()
    assert read["facts"] == report.facts
    assert "history" not in read
