"""docs/models.md holds what benchmarks/families.py finds."""

import importlib
import re

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "models.md"


@pytest.fixture
def families(monkeypatch):
    """benchmarks/families.py, as it imports its neighbours when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("families")


def shown() -> tuple[list[dict[str, str]], list[str]]:
    """The rows of the page's table, and the reasons below it."""
    part = re.search(r"<!-- made by.*?-->\n(.*)<!-- end -->", PAGE.read_text(), re.DOTALL)[1]
    lines = part.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    rows = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return rows, [line for line in lines if line.startswith("- ")]


def check(families, names, features):
    """The page has the outcomes of these features with these families."""
    found = families.outcomes(names, features)
    rows = {row["family"]: row for row in shown()[0]}
    for (family, feature), reason in found.items():
        if feature in families.SCORES:
            worked = feature not in rows[family]["scores"]
        else:
            worked = rows[family][feature] == "yes"
        assert worked == (not reason), (family, feature, reason)
        assert not reason or any(f"{family}, " in line and feature in line for line in shown()[1])


def test_the_page_lists_every_family_in_order(families):
    assert [row["family"] for row in shown()[0]] == list(families.FAMILIES)


def test_what_works_with_a_vit_and_a_swin_is_what_the_page_says(families):
    check(families, ["ViT", "Swin"], ["train", "wanda", "2:4", "heads", "neurons", "shrink"])


@pytest.mark.slow
def test_what_works_with_each_family_is_what_the_page_says(families):
    """Without the export and the score cap, which take seconds each."""
    features = [name for name in families.FEATURES if name not in ("export", "cap")]
    check(families, families.FAMILIES, features)


def test_a_feature_that_fails_is_a_no_with_its_reason(families, monkeypatch):
    def fails(family):
        raise ValueError("it cannot\nbe done")

    works = dict.fromkeys(families.FEATURES, str)
    monkeypatch.setattr(families, "FEATURES", works | {"train": fails})
    lines = families.table(families.outcomes(["ViT"], families.FEATURES))
    assert lines[2].startswith("| ViT | no | all |")
    assert lines[-1] == "- ViT, train: it cannot"
