"""The pages leave nothing out: public names, examples, protocols' checks, decisions."""

from __future__ import annotations

import re
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
