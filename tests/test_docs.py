"""The pages leave nothing out: public names, examples, protocols' checks, decisions."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest

import rcnn_svm
from rcnn_svm import contracts

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def directives(name: str, folder: Path) -> list[str]:
    """Return what directives of this name are given on the pages of a folder, as often as they are."""
    pattern = re.compile(rf"^(?:\.\. |```\{{)(?:{name})(?:::|\}}) (\S+)$", re.MULTILINE)
    return [
        found for page in sorted(folder.glob("*.md")) for found in pattern.findall(page.read_text("utf-8"))
    ]


def test_every_public_name_has_one_entry_in_the_api_and_a_line_of_its_table() -> None:
    entries = directives("auto(?:class|function|data)", DOCS / "api")
    public = [entry for entry in entries if entry.count(".") == 1]
    assert sorted(public) == sorted(f"rcnn_svm.{name}" for name in rcnn_svm.__all__)
    assert len(entries) == len(set(entries))
    tables = "".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    for name in public:
        assert f"\n   ~{name}\n" in tables


@pytest.mark.parametrize("page", ["examples.md", "change.md"])
def test_every_example_is_shown_once(page: str) -> None:
    shown = re.findall(r"^```\{literalinclude\} \.\./examples/(\S+)$", (DOCS / page).read_text("utf-8"), re.M)
    assert sorted(shown) == EXAMPLES


def test_every_example_may_say_what_it_prints() -> None:
    assert sorted(f"{name}.py" for name in directives("printed", DOCS)) == EXAMPLES


@pytest.mark.parametrize("check", [name for name in contracts.__all__ if name.startswith("check_")])
def test_every_check_is_told_where_parts_are_changed(check: str) -> None:
    assert f"`{check}`" in (DOCS / "change.md").read_text("utf-8")


def test_every_setting_of_the_page_exists() -> None:
    from rcnn_svm.config import to_dict
    from rcnn_svm.experiment.config import ExperimentConfig

    values = to_dict(ExperimentConfig())
    table = (DOCS / "change.md").read_text("utf-8").partition("## Settings")[2]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][2:]
    named = [name for row in rows for name in re.findall(r"`([a-z_]+(?:\.[a-z_*]+)?)`", row)]
    settings = [name for name in named if name.partition(".")[0] in values]
    assert len(settings) > 30
    for setting in settings:
        room, _, key = setting.partition(".")
        assert key in ("", "*") or key in values[room], setting


def test_decisions_are_numbered_without_a_gap() -> None:
    pages = sorted((DOCS / "adr").glob("0*.md"))
    for number, page in enumerate(pages, 1):
        assert page.name.startswith(f"{number:04}-")
        assert page.read_text("utf-8").startswith(f"# {number}. ")


@pytest.mark.slow
def test_the_code_of_why_svm_prints_what_the_page_says() -> None:
    """In one session from top to bottom; numbers may be off by 0.03, as they are between machines."""
    import torch

    number = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
    page = (DOCS / "why-svm.md").read_text("utf-8")
    blocks = re.findall(r"^```(python|text)\n(.*?)^```$", page, re.M | re.S)
    assert len(blocks) > 30
    session: dict[str, object] = {}
    with torch.random.fork_rng():
        for (kind, code), (after, shown) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
            if kind == "python":
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(code, session)
                said, expected = printed.getvalue(), shown if after == "text" else ""
                assert number.sub("#", said).split() == number.sub("#", expected).split(), code
                values, stated = (
                    [float(n.replace(",", "")) for n in number.findall(t)] for t in (said, expected)
                )
                assert values == pytest.approx(stated, abs=0.03), code


@pytest.mark.slow
def test_the_figures_of_why_svm_are_those_that_its_script_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["why_svm.py", "--out", str(tmp_path)])
    runpy.run_path(str(DOCS / "why_svm.py"), run_name="__main__")
    page = (DOCS / "why-svm.md").read_text("utf-8")
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert sorted(re.findall(r"^!\[.+\]\((\S+)\)$", page, re.M)) == drawn
    for name in drawn:  # another matplotlib writes other numbers; texts are the same
        texts = [
            re.findall(r"<text .*?>(.*?)</text>", (at / name).read_text("utf-8")) for at in (DOCS, tmp_path)
        ]
        assert texts[0] == texts[1] != []
