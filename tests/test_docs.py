"""README and docs/: links lead somewhere, every page can be reached, and the examples of
docs/CONTRIBUTING.md run.
"""

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from packaging.requirements import Requirement

from trainer.arguments import get_args_parser

README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
PRESETS = sorted((ROOT / "configs" / "run").glob("*.yaml"))
CONTRIBUTING = (ROOT / "docs" / "CONTRIBUTING.md").read_text()


def without_code(text: str) -> str:
    """The page without its fenced blocks and without the text in backticks."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def links(page: Path) -> list[str]:
    """What the page links to and shows, within the project."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_and_picture_can_be_reached_from_the_readme():
    reached, left = set(), [README]
    while left:
        page = left.pop()
        reached.add(page)
        if page.suffix == ".md":
            targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
            left += targets - reached - {*left}
    assert {*DOCS, *(ROOT / "docs" / "images").glob("*.png")} <= reached


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", [README, *DOCS, *PRESETS], ids=lambda page: page.name)
def test_the_flags_and_files_that_commands_name_exist(page):
    """Of commands over one or more lines, in pages and in the headers of recipes."""
    flags = {option for flag in get_args_parser().flags for option in flag.options}
    known = {
        "main.py": flags,
        "sweep.py": flags | {*re.findall(r'"(--[\w-]+)"', (ROOT / "sweep.py").read_text())},
    }
    text = re.sub(r"\\\n#?\s*", "", page.read_text())
    for script, command in re.findall(
        r"^#? {4}.*?(?<![\w/])(main\.py|sweep\.py) (.*)$", text, re.MULTILINE
    ):
        command = command.partition(" #")[0]
        assert {*re.findall(r"(?<!\S)--[\w-]+", command)} <= known[script], command
        for path in re.findall(r"configs/\S+\.yaml", command):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "folder, page",
    [
        (".", "docs/house.md"),
        *((name, f"{name}/README.md") for name in ("trainer", "sparsity_factory")),
    ],
)
def test_every_file_of_the_project_has_a_line_in_the_table_of_its_folder(folder, page):
    files = {path.name for path in (ROOT / folder).glob("*.py")}
    missing = files - {"__init__.py", *re.findall(r"`(\w+\.py)`", (ROOT / page).read_text())}
    assert not missing, f"each expects a line in {page}"


# ---- the examples of docs/CONTRIBUTING.md ----


def with_diff(text: str, hunk: str) -> str:
    """The text of a file with a hunk applied: `...` stands for whatever is in its place, lines may
    break elsewhere.
    """
    old = [line[1:] for line in hunk.splitlines() if line[:1] in (" ", "-")]
    parts = [re.sub(r"(?:\\\s)+", r"\\s+", re.escape(part)) for part in "\n".join(old).split("...")]
    pattern = "(.*?)".join(parts)
    places = list(re.finditer(pattern, text, re.DOTALL))
    assert len(places) == 1, f"the file has no such place, or several:\n{hunk}"
    there = iter(places[0].groups())
    new = [line[1:] for line in hunk.splitlines() if line[:1] in (" ", "+")]
    new = re.sub(r"\.\.\.", lambda _: next(there).rstrip(", "), "\n".join(new))
    return text[: places[0].start()] + new + text[places[0].end() :]


@pytest.fixture(scope="module")
def factory(tmp_path_factory):
    """`sparsity_factory` with all diffs of the page applied, under another name."""
    folder = tmp_path_factory.mktemp("contributing")
    package = folder / "factory_of_the_page"
    shutil.copytree(
        ROOT / "sparsity_factory", package, ignore=shutil.ignore_patterns("__pycache__")
    )
    for diff in re.findall(r"^```diff\n(.*?)^```$", CONTRIBUTING, re.DOTALL | re.MULTILINE):
        for part in re.split(r"^--- sparsity_factory/", diff, flags=re.MULTILINE)[1:]:
            name, _, hunk = part.partition("\n")
            (package / name).write_text(with_diff((package / name).read_text(), hunk))
    sys.path.insert(0, str(folder))
    yield importlib.import_module(package.name)
    sys.path.remove(str(folder))


def train_step(model, sparsifier) -> None:
    sparsifier.begin_step()
    model.zero_grad()
    model(torch.ones(2, 16)).square().mean().backward()
    sparsifier.end_backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    sparsifier.end_step()


EXAMPLES = re.findall(
    r"^### (.*?)$.*?^```diff\n(.*?)^```$.*?^```python\n(.*?)^```$",
    CONTRIBUTING,
    re.DOTALL | re.MULTILINE,
)


@pytest.mark.parametrize(
    "diff, code", [example[1:] for example in EXAMPLES], ids=[example[0] for example in EXAMPLES]
)
def test_an_example_of_the_page_does_what_the_page_says(factory, diff, code):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)), torch.nn.ReLU())
    names = {name: getattr(factory, name) for name in factory.__all__}
    exec(code, {**names, "model": model, "train_step": train_step})
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    body = [line for line in added if line.strip()]
    assert 5 <= len(body) <= 15, "a method is five to fifteen lines"
    assert max(map(len, body)) <= 120


def test_the_examples_of_the_page_are_in_the_menu(factory):
    text = importlib.import_module(f"{factory.__name__}.list_methods").menu()
    for name in ("relative", "taper", "outputs:N", "late"):
        assert re.search(rf"^{name}  ", text, re.MULTILINE), name
    assert [example[0] for example in EXAMPLES] == [
        "A score",
        "An allocation",
        "A pattern",
        "A schedule",
    ]


def test_constraints_hold_an_exact_version_in_its_range_for_all_that_is_required():
    lines = [
        line.partition("#")[0].strip()
        for name in ("requirements.txt", "tests/requirements.txt")
        for line in (ROOT / name).read_text().splitlines()
    ]
    required = [Requirement(line) for line in lines if line and not line.startswith("-r")]
    exact = {}
    for line in (ROOT / "tests" / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pinned = Requirement(line)
            assert re.fullmatch(r"==[\w.]+", str(pinned.specifier)), line
            exact[pinned.name] = str(pinned.specifier).removeprefix("==")
    for requirement in required:
        assert exact[requirement.name] in requirement.specifier, requirement
