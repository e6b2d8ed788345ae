"""The choices of a run as one value: what is refused, stored, compared and shown."""

import dataclasses
import io

import pytest
import torch
from made_up import pattern_for

from sparsity_factory import SCHEDULES, PruningError, Recipe, check_request, describe
from sparsity_factory.schedules import Schedule

LAMP = Recipe("lamp", 0.65)


def custom(*levels, mode="unstructured", **fields) -> Recipe:
    return Recipe(
        "custom", custom_config={"sparsity": {"mode": mode, "level": list(levels)}}, **fields
    )


def scheduled(schedule: str, **fields) -> Recipe:
    return Recipe(
        "lamp", 0.65, prune_schedule=schedule, **{"pattern": pattern_for(schedule), **fields}
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_accepted_with_its_defaults_and_says_what_it_is(schedule):
    scheduled(schedule).check()
    line, source, needs = describe(SCHEDULES[schedule])
    assert line.endswith(".") and (source or schedule == "one-shot") and not needs
    assert set(SCHEDULES[schedule].uses) <= {field.name for field in dataclasses.fields(Recipe)}


def test_the_dense_recipe_is_accepted():
    Recipe().check()
    Recipe(seed=3).check()


REFUSED = {
    "sparsity without a pruner": (Recipe(sparsity=0.5), "--sparsity 0.5 needs --pruner"),
    "schedule without a pruner": (
        Recipe(prune_schedule="rigl"),
        "--prune-schedule rigl needs --pruner",
    ),
    "configuration without a pruner": (Recipe(custom_config={}), "--custom-config needs --pruner"),
    "unknown pruner": (Recipe("lamb", 0.5), "--pruner lamb: expected one of lamp"),
    "pruner of no text": (Recipe(["lamp"], 0.5), "--pruner"),
    "unknown score": (Recipe("lamp", 0.5, score="size"), "--score size: expected one of magnitude"),
    "unknown schedule": (
        scheduled("oneshot"),
        "--prune-schedule oneshot: expected one of one-shot",
    ),
    "no sparsity": (Recipe("lamp"), "--pruner lamp needs --sparsity"),
    "sparsity of 1": (Recipe("lamp", 1.0), "--sparsity 1.0"),
    "sparsity of no number": (Recipe("lamp", True), "--sparsity"),
    "sparsity that is NaN": (Recipe("lamp", float("nan")), "--sparsity nan"),
    "sparsity with n:m": (
        Recipe("lamp", 0.5, pattern="2:4"),
        "--sparsity 0.5: expected none with --pattern 2:4",
    ),
    "n above m": (Recipe("unif", pattern="4:2"), "pattern '4:2': expected n:m"),
    "sparsity with custom": (
        custom(0.5, sparsity=0.5),
        "--sparsity 0.5: expected none with --pruner custom",
    ),
    "unknown pattern": (
        Recipe("lamp", 0.5, pattern="2x4"),
        "unknown pattern '2x4': expected unstructured, row",
    ),
    "pattern with custom": (
        custom(0.5, pattern="row"),
        "--pattern row: expected none with --pruner custom",
    ),
    "custom without configuration": (Recipe("custom"), "--pruner custom needs --custom-config"),
    "configuration of no mapping": (Recipe("custom", custom_config=[0.5]), "expected a mapping"),
    "wrong level": (custom(1.5), "level 0 is 1.5"),
    "configuration with lamp": (
        dataclasses.replace(LAMP, custom_config={}),
        "--custom-config needs --pruner custom",
    ),
    "start of 1": (scheduled("gradual", prune_start=1.0), "--prune-start 1.0"),
    "end of 0": (scheduled("gradual", prune_end=0.0), "--prune-end 0.0"),
    "end before start": (
        scheduled("gradual", prune_start=0.5, prune_end=0.5),
        "more than --prune-start 0.5",
    ),
    "every 0 steps": (scheduled("gradual", prune_every=0), "--prune-every 0"),
    "every half step": (scheduled("gradual", prune_every=0.5), "--prune-every 0.5"),
    "no round": (scheduled("iterative", prune_rounds=0), "--prune-rounds 0"),
    "too many rounds": (scheduled("iterative", prune_rounds=10**9), "--prune-rounds"),
    "rewind before the first epoch": (scheduled("iterative", rewind=-1), "--rewind -1"),
    "rewind of no round": (
        scheduled("gradual", rewind=1),
        "--rewind 1: not with --prune-schedule gradual",
    ),
    "drop fraction of 0": (scheduled("set", drop_fraction=0.0), "--drop-fraction 0.0"),
    "drop fraction above 1": (scheduled("set", drop_fraction=1.1), "--drop-fraction 1.1"),
    "learned masks of single weights": (
        Recipe("lamp", 0.65, prune_schedule="maskllm"),
        "--prune-schedule maskllm: expected n:m or x:m",
    ),
    "learned masks of large groups": (
        Recipe("unif", pattern="8:16", prune_schedule="maskllm"),
        "m of at most 8",
    ),
    "learned masks both ways": (
        Recipe("unif", pattern="2:4t", prune_schedule="maskllm"),
        "expected n:m or x:m",
    ),
    "no rate for the masks": (
        scheduled("maskllm", mask_lr=0.0),
        "--mask-lr 0.0: expected a number above 0",
    ),
    "negative decay": (scheduled("sr-ste", sr_decay=-1e-4), "--sr-decay"),
    "infinite decay": (scheduled("sr-ste", sr_decay=float("inf")), "--sr-decay inf"),
    "another schedule's field": (
        scheduled("ste", sr_decay=0.1),
        "--sr-decay 0.1: not with --prune-schedule ste; only",
    ),
    "a time for one-shot": (
        scheduled("one-shot", prune_end=0.5),
        "--prune-end 0.5: not with --prune-schedule one",
    ),
    "no images": (dataclasses.replace(LAMP, calibration_images=0), "--calibration-images 0"),
    "negative seed": (dataclasses.replace(LAMP, seed=-1), "--seed -1"),
    "unknown reconstruction": (
        dataclasses.replace(LAMP, reconstruct="sgd"),
        "--reconstruct sgd: expected one of none",
    ),
    "reconstruction with ste": (
        scheduled("ste", reconstruct="obs"),
        "--reconstruct obs: expected none with",
    ),
    "reconstruction with sr-ste": (
        scheduled("sr-ste", reconstruct="obs-mask"),
        "which trains the pruned weights",
    ),
    "reconstruction with a rewind": (
        scheduled("iterative", rewind=0, reconstruct="obs"),
        "none with --rewind",
    ),
    "reconstruction of nothing": (Recipe(reconstruct="obs"), "--reconstruct obs"),
    "lamp with n:m": (Recipe("lamp", pattern="2:4"), "--pruner lamp: expected unif"),
    "set with n:m": (Recipe("unif", pattern="2:4", prune_schedule="set"), "groups would break"),
    "rigl with x:m": (scheduled("rigl", pattern="x:4"), "groups would break"),
    "rigl with custom n:m": (custom(0.5, [2, 4], prune_schedule="rigl"), "groups would break"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(case):
    recipe, message = REFUSED[case]
    with pytest.raises(PruningError) as error:
        recipe.check()
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("attribute", "fields", "message"),
    [
        ("moves_weights", {"pattern": "2:4"}, "groups would break"),
        ("goes_dense", {"sparsity": 0.5, "pattern": "heads"}, "come back in a dense phase"),
        ("learns_masks", {"sparsity": 0.5}, "each mask of a group has a logit"),
        ("trains_pruned", {"sparsity": 0.5, "reconstruct": "obs"}, "trains the pruned weights"),
    ],
)
def test_a_new_schedule_is_combined_by_what_it_says_of_itself(
    monkeypatch, attribute, fields, message
):
    recipe = Recipe("unif", prune_schedule="mine", **fields)
    monkeypatch.setitem(SCHEDULES, "mine", type("Mine", (Schedule,), {}))
    recipe.check()
    monkeypatch.setitem(SCHEDULES, "mine", type("Mine", (Schedule,), {attribute: True}))
    with pytest.raises(PruningError, match=message):
        recipe.check()


def test_a_request_and_a_recipe_are_refused_in_the_same_words():
    for choices in (
        {"pruner": "lump", "sparsity": 0.5},
        {"pruner": "lamp", "sparsity": 1.5},
        {"pruner": "lamp"},
        {"pruner": "lamp", "sparsity": 0.5, "custom_config": {}},
        {"pruner": "lamp", "pattern": "2:4"},
    ):
        messages = []
        for refuse in (Recipe(**choices).check, lambda choices=choices: check_request(**choices)):
            with pytest.raises(PruningError) as error:
                refuse()
            messages.append(str(error.value))
        as_flags, as_arguments = messages
        assert "--pruner" in as_flags or "--sparsity" in as_flags
        plain = as_flags.replace("--custom-config", "custom_config").replace("--", "")
        assert plain == as_arguments.replace("'", "")


def test_dense_levels_of_a_custom_configuration_leave_rigl_free_to_move_weights():
    custom("dense", [4, 4], 0.9, prune_schedule="rigl").check()


@pytest.mark.parametrize(
    ("rewind", "epochs", "good"), [(0, 10, True), (2, 10, True), (3, 10, False)]
)
def test_a_rewind_lies_before_the_first_round(rewind, epochs, good):
    recipe = scheduled("iterative", rewind=rewind, prune_start=0.2)
    if good:
        recipe.check(epochs)
        assert recipe.steps(1000, 100).rewind == rewind * 100
    else:
        for attempt in (lambda: recipe.check(epochs), lambda: recipe.steps(1000, 100)):
            with pytest.raises(
                PruningError, match="--rewind 3: expected an epoch up to the first round"
            ):
                attempt()


# ---- stored ----


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        LAMP,
        scheduled("iterative", rewind=0, prune_rounds=3, seed=2**40),
        custom((2, 4), "1:4", 0.5, mode="nxm", prune_schedule="gradual", prune_end=0.5),
    ],
)
def test_a_recipe_survives_a_file_that_is_read_with_weights_only(recipe):
    file = io.BytesIO()
    torch.save(recipe.to_dict(), file)
    file.seek(0)
    restored = Recipe.from_dict(torch.load(file, weights_only=True))
    assert restored.differences(recipe) == []
    assert restored.to_dict() == recipe.to_dict()


def test_the_entry_of_older_checkpoints_is_read():
    assert Recipe.from_dict({"name": "lamp", "sparsity": 0.65, "custom_config": None}) == LAMP


def test_a_stored_recipe_is_no_part_of_the_one_it_came_from():
    recipe = custom([2, 4], mode="nxm")
    recipe.to_dict()["custom_config"]["sparsity"]["level"][0][0] = 1
    assert recipe.custom_config["sparsity"]["level"] == [[2, 4]]


def test_a_newer_field_that_says_nothing_is_passed_over_and_one_that_says_something_is_refused():
    assert Recipe.from_dict({**LAMP.to_dict(), "novelty": "none"}) == LAMP
    with pytest.raises(PruningError, match="'novelty': 'obs', which is not known here"):
        Recipe.from_dict({**LAMP.to_dict(), "novelty": "obs"})


@pytest.mark.parametrize(
    "untrusted",
    [
        None,
        "lamp",
        [("pruner", "lamp")],
        {"pruner": "lamp"},
        {"name": "lamp"},
        {3: "lamp"},
        {(): "lamp"},
        {"pruner": torch.ones(3), "sparsity": 0.5},
        {"pruner": "lamp", "sparsity": torch.tensor(0.5)},
        {"pruner": "lamp", "sparsity": "0.5"},
        {"pruner": "lamp", "sparsity": 10**5000},
        {"pruner": "custom", "custom_config": {"sparsity": [1]}},
        {"pruner": "custom", "custom_config": {}},
        {"pruner": "custom", "custom_config": {"sparsity": {"mode": "nxm", "level": 3}}},
        {"pruner": "lamp", "sparsity": 0.5, "prune_schedule": "iterative", "prune_rounds": 2**60},
        {"pruner": "x\ny", "sparsity": 0.5},
        {"pruner": "lamp", "sparsity": 0.5, "novelty": torch.ones(2)},
    ],
)
def test_a_damaged_recipe_is_refused_in_one_line(untrusted):
    with pytest.raises(PruningError) as error:
        Recipe.from_dict(untrusted)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# ---- compared ----


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (LAMP, Recipe("lamp", 0.65, seed=3), []),
        (LAMP, Recipe("lamp", 0.65, drop_fraction=0.5), []),
        (LAMP, Recipe("glob", 0.6), ["pruner", "sparsity"]),
        (LAMP, Recipe(), ["pruner", "sparsity"]),
        (Recipe(), Recipe(seed=3), []),
        (scheduled("set"), scheduled("set", seed=3), ["seed"]),
        (
            scheduled("rigl", drop_fraction=0.3),
            scheduled("rigl", drop_fraction=0.2),
            ["drop_fraction"],
        ),
        (custom([2, 4], 0.5), custom("2:4", 0.50, mode="nxm"), []),
        (custom([2, 4]), custom([4, 2]), []),  # the oldest form
        (custom([2, 4]), custom([1, 4]), ["custom_config"]),
        (custom("dense"), custom(0), []),
    ],
)
def test_recipes_are_compared_by_meaning(one, other, expected):
    assert one.differences(other) == other.differences(one) == expected


def test_of_patterns_the_default_counts_first_wherever_it_stands():
    def named(**levels):
        return Recipe("custom", custom_config={"sparsity": {"mode": "nxm", "level": levels}})

    assert named(a=0.5, default=[2, 4]).differences(named(default="2:4", a=0.5)) == []
    # Later lines win
    assert named(a=0.5, b=0.4).differences(named(b=0.4, a=0.5)) == ["custom_config"]


# ---- shown ----


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe(), "no pruner"),
        (LAMP, "--pruner lamp --sparsity 0.65"),
        (
            scheduled("rigl", drop_fraction=0.2),
            "--pruner lamp --sparsity 0.65 --prune-schedule rigl --drop-fraction 0.2",
        ),
        (custom(0.5), "--pruner custom --custom-config"),
        (
            scheduled("iterative", rewind=0),
            "--pruner lamp --sparsity 0.65 --prune-schedule iterative --rewind 0",
        ),
    ],
)
def test_a_recipe_is_shown_as_the_flags_that_ask_for_it(recipe, words):
    assert recipe.in_words() == words


# ---- scaled ----


def test_scaled_levels_round_to_the_nearest_n():
    shapes = {"a": (4, 8), "b": (4, 8), "c": (2, 5)}
    recipe = custom([2, 4], 0.5, "dense", mode="nxm")
    levels = recipe.levels(shapes)

    def level(scale):
        return recipe.request(shapes, levels, scale)["custom_config"]["sparsity"]["level"]

    assert level(lambda sparsity: 0.0) == [(4, 4), 0.0, 0.0]
    assert level(lambda sparsity: sparsity * 0.6) == [(3, 4), 0.3, 0.0]
    assert level(lambda sparsity: sparsity) == [(2, 4), 0.5, 0.0]
    assert (
        Recipe("unif", pattern="2:4").request(shapes, {}, lambda sparsity: sparsity * 0.6)[
            "pattern"
        ]
        == "3:4"
    )
    assert (
        Recipe("unif", pattern="2:4t").request(shapes, {}, lambda sparsity: sparsity * 0.6)[
            "pattern"
        ]
        == "3:4t"
    )
    assert LAMP.request(shapes, {}, lambda sparsity: sparsity / 2)["sparsity"] == 0.325


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_another_schedule_keeps_what_it_uses_and_drops_the_rest(schedule):
    asked = Recipe(
        "lamp",
        0.65,
        score="wanda",
        pattern=pattern_for(schedule),
        prune_start=0.1,
        prune_end=0.5,
        prune_every=7,
        prune_rounds=2,
        drop_fraction=0.2,
        sr_decay=1e-3,
        mask_lr=0.1,
        calibration_images=64,
        seed=3,
    )
    recipe = asked.with_schedule(schedule)
    recipe.check()

    kept = {
        "pruner",
        "sparsity",
        "pattern",
        "score",
        "calibration_images",
        "seed",
        *SCHEDULES[schedule].uses,
    }
    for field in dataclasses.fields(Recipe):
        expected = getattr(asked, field.name) if field.name in kept else field.default
        assert getattr(recipe, field.name) == (
            schedule if field.name == "prune_schedule" else expected
        )
