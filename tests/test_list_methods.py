"""The menu of methods, and what docs/methods.md and docs/tests.md say of each."""

import itertools
import re

import pytest
from conftest import ROOT
from made_up import pattern_for

from sparsity_factory import (
    PATTERNS,
    PRUNERS,
    RECONSTRUCTIONS,
    SCHEDULES,
    SCORES,
    PruningError,
    Recipe,
    describe,
)
from sparsity_factory.list_methods import (
    ALONE,
    CHOICES,
    EXAMPLES,
    WIDTH,
    example,
    menu,
    refused_pairs,
)
from sparsity_factory.schedules import users_of
from trainer.arguments import get_args_parser

PAGE = (ROOT / "docs" / "methods.md").read_text()
TESTS = (ROOT / "docs" / "tests.md").read_text()


def rows(page: str, head: str) -> dict[str, list[str]]:
    """The cells of the table of a page with this head, by the name in the first cell."""
    _, _, table = page.partition(f"\n| `{head}` |")
    lines = itertools.takewhile(lambda line: line.startswith("|"), table.splitlines()[2:])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def test_list_methods_prints_every_name_with_its_source_in_lines_of_120(run_main):
    printed = run_main("--list-methods")
    assert printed == menu() + "\n"
    assert max(map(len, printed.splitlines())) <= WIDTH == 120
    words = " ".join(printed.split())
    for registry in (SCORES, PRUNERS, PATTERNS, SCHEDULES, RECONSTRUCTIONS):
        for name, entry in registry.items():
            assert re.search(rf"^{re.escape(name)}  ", printed, re.MULTILINE), name
            assert describe(entry).source.partition(",")[0].partition(";")[0] in words, name


def test_the_page_has_the_menu_as_it_is_printed():
    assert f"```\n{menu()}\n```" in PAGE, (
        "put what `python main.py --list-methods` prints into docs/methods.md"
    )


@pytest.mark.parametrize("flag", CHOICES)
def test_the_page_has_a_row_for_every_method_with_what_it_needs_and_its_source(flag):
    registry, found = CHOICES[flag][1], rows(PAGE, flag)
    assert list(found) == list(registry)

    for name, (_, _, needs, _, source) in found.items():
        described = describe(registry[name])
        assert re.findall(r"`(\w+)`", needs) == sorted(described.needs), name
        assert re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", source).replace(
            " (ICLR)", ""
        ) == described.source.replace(", Plug-and-Play (ICLR)", ""), name
        for number in re.findall(r"arXiv:([\d.]+)", source):
            assert f"(https://arxiv.org/abs/{number})" in source, name


@pytest.mark.parametrize("flag", CHOICES)
def test_every_method_has_a_test(flag):
    found = rows(TESTS, flag)
    assert list(found) == list(CHOICES[flag][1])
    for name, (tests,) in found.items():
        assert "::test_" in tests, name


def test_every_test_that_the_page_names_is_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TESTS)
    assert len(named) > 30
    assert len(named) == TESTS.count("`test_")
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name


def test_the_menu_refuses_what_a_recipe_refuses_and_nothing_else():
    refused = {
        (one, value, other, beside)
        for one, values, other, others, _ in refused_pairs()
        for value in values
        for beside in others
    }
    patterns = [EXAMPLES.get(form, form) for form in PATTERNS]
    for values in itertools.product(PRUNERS, patterns, SCHEDULES, SCORES, RECONSTRUCTIONS):
        choices = dict(
            zip(
                ("pruner", "pattern", "prune_schedule", "score", "reconstruct"), values, strict=True
            )
        )
        pairs = itertools.combinations(choices.items(), 2)
        if any((*one, *other) in refused for one, other in pairs):
            with pytest.raises(PruningError):
                example(**choices).check()
        else:
            example(**choices).check()


@pytest.mark.parametrize("what", ALONE)
def test_what_the_menu_says_is_refused_beside_a_choice_is(what):
    recipe, epochs = ALONE[what]
    with pytest.raises(PruningError, match="expected|needs"):
        recipe.check(epochs)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_refuses_the_flags_that_the_menu_gives_to_others(schedule):
    given = {
        "prune_start": 0.1,
        "prune_end": 0.9,
        "prune_every": 7,
        "prune_rounds": 3,
        "rewind": 0,
        "drop_fraction": 0.1,
        "sr_decay": 0.1,
        "mask_lr": 0.1,
    }
    for name, value in given.items():
        recipe = Recipe(
            "lamp", 0.5, pattern=pattern_for(schedule), prune_schedule=schedule, **{name: value}
        )
        if schedule in users_of(name):
            recipe.check()
        else:
            with pytest.raises(PruningError, match="not with --prune-schedule"):
                recipe.check()


def test_the_readme_names_every_method_in_its_order():
    readme = (ROOT / "README.md").read_text()
    for flag, (_, registry) in CHOICES.items():
        names = re.search(rf"^\| .* \| `{flag}` \| (.*) \|$", readme, re.MULTILINE)[1]
        assert [name.split("`")[1] for name in names.split(", ")] == list(registry)


@pytest.mark.parametrize("schedule", ["gradual", "iterative"])
def test_an_evaluation_prunes_once_and_to_the_target_whatever_the_schedule(
    run_main, tiny, tmp_path, schedule
):
    choices = ["--pruner", "unif", "--sparsity", "0.75", "--prune-schedule", schedule]
    run_main(*tiny, *choices, "--eval", "--output_dir", "out")
    assert ",0.750000," in (tmp_path / "out/sparsity.csv").read_text().splitlines()[-2]


def test_the_help_tells_a_default_where_there_is_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = get_args_parser().format_help()
    assert (
        "(default: None)" not in text
        and "(default: )" not in text
        and "(default: False)" not in text
    )
    for told in (
        "(default: magnitude)",
        "(default: one-shot)",
        "(default: 0.75)",
        "(default: 0.0)",
    ):
        assert told in text
