"""The table of verbs: the command knows each, and loads nothing of those that are not named."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rcnn_svm.cli import VERBS, build_parser, main

LIBRARIES = {"numpy", "cv2", "PIL", "yaml", "torch", "sklearn", "numba"}


def loaded_by(*words: str) -> tuple[str, set[str]]:
    """Return what a command prints that argparse ends, and the libraries and verbs that it loads."""
    code = (
        "import sys\nfrom rcnn_svm.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    print(*sys.modules, file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    modules = set(result.stderr.split())
    verbs = {name for name in modules if name.startswith("rcnn_svm.cli.")} - {"rcnn_svm.cli.endings"}
    assert "argparse" in modules
    return result.stdout, (modules & LIBRARIES) | verbs


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_alone_loads_no_library_and_no_verb(option: str) -> None:
    assert loaded_by(option)[1] == set()


def test_a_verb_loads_its_own_module() -> None:
    loaded = loaded_by("cache", "--help")[1]
    assert {name for name in loaded if name.startswith("rcnn_svm")} == {"rcnn_svm.cli.cache"}


def test_help_lists_every_verb_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    listed = " ".join(capsys.readouterr().out.split())
    for name, verb in VERBS.items():
        assert f"{name} {verb.help}" in listed


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_tells_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: rcnn-svm {name} [-h]")


def test_a_parser_reads_one_verb_after_another_and_again() -> None:
    parser = build_parser()
    for words in (["layers", "vgg16"], ["presets"], ["layers", "alexnet"]):
        options = parser.parse_args(words)
        assert options.verb == words[0]
        assert callable(options.run)
