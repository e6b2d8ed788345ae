"""What the choices of a search lose, measured once and kept in its folder."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import torch

import utils
from sparsity_factory import SCORES, Statistics, prunable_weights, prune
from sparsity_factory.custom_yaml import Amount
from sparsity_factory.levels import MEASURES, Divergence, Pruned, at_levels
from sparsity_factory.method import describe
from sparsity_factory.pruners import mask_at
from sparsity_factory.scores import Layer, Scores
from sparsity_factory.time_table import Part, TimeTable
from sparsity_factory.unit_patterns import keep_units

from .calibration_images import Calibration
from .job_folder import JobFolder
from .search_space import Space
from .stop_signals import StopSignals
from .tokens import all_tokens

#: Images on which predictions are compared with the dense ones.
TRIAL_IMAGES = 256
#: Chooses among heads and neurons, which magnitudes do not tell apart.
UNIT_SCORE = "fisher"
#: How much the losses of heads and neurons count beside those of levels, in the order of trials.
UNIT_FACTORS = (1, 4, 16)


class Bench:
    """The loss of each part at each of its choices, measured unless the record has it.

    score: the name of the score by which the run has to choose its masks.
    losses: by part and choice: the sum over its layers. Heads and neurons lose what the layer loses
        that reads them.
    unit_losses: the same of heads and neurons alone, by their scores.
    """

    def __init__(
        self,
        options,
        space: Space,
        model,
        calibration: Calibration,
        record: "Record",
        stop: StopSignals,
    ):
        self.space = space
        self.record = record
        self.stop = stop
        self.score = UNIT_SCORE if space.has_units else "magnitude"
        self._model = model
        self._weights = prunable_weights(model)
        self._measure = MEASURES[options.measure]
        self._of_obs = options.of_obs
        self._compensates = options.reconstruct != "none"
        self._reconstruct = options.reconstruct
        self._options = options.method_options
        self._calibration = calibration
        self._pruned: dict[tuple[str, str], Pruned] = {}

        autocast = calibration.compute.autocast()
        self._divergence = Divergence(model, _first(calibration.loader), autocast)
        # The reconstruction of a trial sees all calibration images, so others judge it
        self._judge = Divergence(model, _first(calibration.others(TRIAL_IMAGES)), autocast)
        self.statistics = self._collect(model, calibration)
        self._scores = Scores(self._weights, SCORES[self.score], statistics=self.statistics)

        logger = utils.MetricLogger()
        for part in logger.log_every(list(space.parts), 12, "Part:"):
            for name in part.weights:
                self._measure_levels(name)
            self._measure_units(part)
        self.losses = {
            part.name: {text: self._loss(part, text) for text in space.choices[part.name]}
            for part in space.parts
        }
        self.unit_losses = {part.name: self._score_units(part) for part in space.parts}

    def weighed(self) -> Iterator[dict[str, dict[str, float]]]:
        """The losses, with those of heads and neurons by either estimate times some factors."""
        if not self.space.has_units:
            yield self.losses
            return
        for losses in (self.losses, self.unit_losses):
            for factor in UNIT_FACTORS:
                scaled = {}
                for part, own in self.losses.items():
                    units = {
                        text: factor * loss
                        for text, loss in losses.get(part, {}).items()
                        if self.space.choices[part][text].units
                    }
                    scaled[part] = {**own, **units}
                yield scaled

    def alone(self) -> Iterator[dict[str, dict[str, float]]]:
        """The losses of the choices with each pattern alone, and of dense parts."""
        kinds = {
            kind
            for part, own in self.losses.items()
            for text in own
            for kind in self.space.kinds(part, text)
        }

        for kind in sorted(kinds):
            yield {
                part: {
                    text: loss
                    for text, loss in own.items()
                    if self.space.kinds(part, text) <= {kind}
                }
                for part, own in self.losses.items()
            }

    def trial(self, chosen: Mapping[str, str]) -> float:
        """How far predictions are from the dense ones when the run's reconstruction has pruned."""
        key = " ".join(["pruned", *chosen.values()])
        if key not in self.record.divergences:
            self.stop.check_alone()
            pruned = copy.deepcopy(self._model)

            autocast = self._calibration.compute.autocast()
            with autocast, utils.full_precision(), all_tokens(pruned):
                prune(
                    pruned,
                    "custom",
                    custom_config=self.space.config(chosen),
                    score=self.score,
                    batches=self._calibration.loader,
                    loss=torch.nn.functional.cross_entropy,
                    reconstruct=self._reconstruct,
                    method_options=self._options,
                )
            self.record.add(divergence=[key, self._judge.of(pruned)])
        return self.record.divergences[key]

    def _score_units(self, part: Part) -> dict[str, float]:
        """What heads or neurons lose by their scores, half of w^2 mean(g^2), by choice."""
        counts = {text: own.units for text, own in self.space.choices[part.name].items()}
        if not any(counts.values()):
            return {}
        (scores,) = self._scores.of_groups([part.group], [part.group.weights(self._weights)])
        ranked = scores.sort(descending=True).values
        return {text: float(ranked[kept:].sum()) / 2 for text, kept in counts.items() if kept}

    def divergence(self, chosen: Mapping[str, str]) -> float:
        """How far predictions at these choices are from the dense ones, in nats per image."""
        key = " ".join(chosen.values())
        if key not in self.record.divergences:
            self.stop.check_alone()
            new = {}
            for part in self.space.parts:
                for name, level in self._levels_of(part, chosen[part.name]):
                    new[name] = self._at_level(part, name, level).new
            self.record.add(divergence=[key, self._divergence(new)])
        return self.record.divergences[key]

    def _levels_of(self, part: Part, text: str) -> list[tuple[str, str]]:
        """The weights that a choice prunes, and the texts by which their losses are known."""
        choice = self.space.choices[part.name][text]
        if choice.units:
            return [(part.last, text)]
        return [(name, level) for name, level in choice.levels.items() if level != "dense"]

    def _loss(self, part: Part, text: str) -> float:
        return sum(self.record.losses[name][level] for name, level in self._levels_of(part, text))

    def _measure_levels(self, name: str) -> None:
        known = self.record.losses.get(name, {})
        missing = [level for level in self.space.levels[name] if level not in known]
        for level, pruned in zip(missing, self._at(name, missing), strict=True):
            self._note(name, level, pruned)

    def _measure_units(self, part: Part) -> None:
        for text, choice in self.space.choices[part.name].items():
            if choice.units and text not in self.record.losses.get(part.last, {}):
                self._note(part.last, text, self._with_units(part, choice.units))

    def _note(self, name: str, text: str, pruned: Pruned) -> None:
        self._pruned[name, text] = pruned
        self.record.add(loss=[name, text, self._measure(pruned)])
        self.stop.check_alone()

    def _at_level(self, part: Part, name: str, text: str) -> Pruned:
        """A layer at a level, or without the heads or neurons that a choice removes."""
        if (name, text) not in self._pruned:
            if text in self.space.levels[name]:
                (self._pruned[name, text],) = self._at(name, [text])
            else:
                units = self.space.choices[part.name][text].units
                self._pruned[name, text] = self._with_units(part, units)
        return self._pruned[name, text]

    def _at(self, name: str, levels: Sequence[str]) -> Iterator[Pruned]:
        """A layer at some levels."""
        return self._at_amounts(name, [self.space.levels[name][level] for level in levels])

    def _with_units(self, part: Part, count: int) -> Pruned:
        """The layer that reads the heads or neurons of a part, without those that go."""
        masks = keep_units(self._model, self._scores, lambda units: {part.name: count})
        (pruned,) = self._at_amounts(part.last, [masks[part.last]])
        return pruned

    def _at_amounts(self, name: str, amounts: Sequence[Amount | torch.Tensor]) -> Iterator[Pruned]:
        found = at_levels(
            self._weights[name].detach(),
            Layer(name, statistics=self.statistics, device=self._weights[name].device),
            amounts,
            divergence=self._divergence,
            mask_of=None if self._compensates else partial(mask_at, self._scores, name),
            **self._of_obs,
        )
        for pruned in found:
            self._scores.check()
            yield pruned

    def _collect(self, model, calibration: Calibration) -> Statistics:
        needs = set(self._measure.needs) | describe(SCORES[self.score]).needs
        if self.record.statistics.exists():
            statistics = Statistics(self._weights, needs)
            statistics.load_state_dict(torch.load(self.record.statistics, weights_only=True))
            return statistics
        statistics = calibration(needs)
        utils.write_atomically(
            self.record.statistics, lambda file: torch.save(statistics.state_dict(), file)
        )
        return statistics


class Record:
    """The folder of a search: its settings, and its measurements as they come.

    losses: by weight and level, or number of heads or neurons. table: what a `TimeTable` holds.
    divergences: by the choices of all parts. statistics: a file, until the search is done.
    """

    def __init__(self, options, args, space: Space):
        """Raises UserError when the folder holds a search with other arguments."""
        self.losses: dict[str, dict[str, float]] = {}
        self.table: TimeTable | None = None
        self.divergences: dict[str, float] = {}
        self.folder = JobFolder(options.output_dir, "measured.jsonl", job="search")
        self.statistics = self.folder.path / "statistics.pth"

        names = ("budget", "budget_of", "measure", "reconstruct", "exchanges")
        own = {name: getattr(options, name) for name in names}
        self.folder.agree(args, {**own, **space.settings()})
        for measured in self.folder.read(_measured):
            self._take(**measured)

    def open(self) -> None:
        """Makes and locks the folder."""
        self.folder.open()

    def add(self, **measured) -> None:
        """Keeps a measurement, as one of the arguments of `_take`."""
        self._take(**measured)
        self.folder.add(json.dumps(measured))

    def finish(self) -> None:
        self.statistics.unlink(missing_ok=True)

    def _take(self, loss=None, table=None, divergence=None) -> None:
        if loss:
            name, level, value = loss
            self.losses.setdefault(name, {})[level] = value
        if divergence:
            choices, value = divergence
            self.divergences[choices] = value
        if table:
            self.table = TimeTable(*table)


# ---- helpers, not exported ----


def _first(loader) -> list:
    """The batches of the first `TRIAL_IMAGES` images."""
    return list(islice(loader, -(-TRIAL_IMAGES // loader.batch_sampler.batch_size)))


def _measured(line: str) -> dict:
    """A line of measured.jsonl. Raises ValueError if it was not written whole."""
    measured = json.loads(line)
    if not isinstance(measured, dict):
        raise ValueError(line)
    return measured
