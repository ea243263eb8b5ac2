"""The documentation: generated pages are current, links lead somewhere, arguments that are named exist."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from lowrank_train import optim

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generator()


@pytest.mark.parametrize("path", sorted(generate.pages()), ids=lambda path: path.name)
def test_generated_pages_are_current(path: Path) -> None:
    assert path.is_file(), "run: make docs"
    assert path.read_text() == generate.pages()[path], "run: make docs"


def test_no_page_of_an_optimizer_that_is_gone() -> None:
    assert sorted(path.stem for path in (DOCS / "reference").glob("*.md")) == optim.names()


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    found = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in found}


PAGES = sorted([*DOCS.glob("*.md"), *(DOCS / "reference").glob("*.md"), *ROOT.glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


FILES_NAMED = re.compile(r"`((?:optim|lowrank_train|launch|tests|configs|docs)/[\w./]*\w)/?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_named_in_prose_exist(page: Path) -> None:
    named = FILES_NAMED.findall(page.read_text())
    examples = {"launch/COMMAND.py"}
    assert not [name for name in named if not (ROOT / name).exists() and "NAME" not in name and name not in examples]


def test_the_code_of_the_readme_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_arguments_of_the_migration_table_exist() -> None:
    """In the rows below an optimizer's name, until the next one."""
    rows = [line.split("|")[1:-1] for line in (DOCS / "migration.md").read_text().splitlines() if line.startswith("|")]
    current, checked = "", 0
    for _, ours, about in rows[2:]:
        names = [word for word in re.findall(r"`(\w+)`", ours) if word in optim.names()]
        current = names[0] if names else current
        valid = inspect.signature(optim.find(current)).parameters
        for key in [*re.findall(r"`(\w+)=`", ours), *re.findall(r"^ `(\w+)=\"", about)]:
            assert key in valid, (current, key)
            checked += 1
    assert checked > 30


def test_conventions_of_the_migration_table() -> None:
    defaults = {name: inspect.signature(optim.find(name)).parameters for name in optim.names()}
    assert defaults["apollo_mini"]["scale"].default == pytest.approx(128**0.5)
    assert defaults["apollo"]["basis"].default == "gaussian"
    assert defaults["dct_adamw"]["refresh_interval"].default == 100
    assert defaults["muon"]["adjust_lr"].default == "original"
