"""`Recipe`: the choices of a pruning run, as one value."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from .errors import PruningError


@dataclass(frozen=True)
class Recipe:
    """What prunes a model, named as on the command line; without a pruner the model stays dense."""

    pruner: str | None = None
    sparsity: float | None = None
    custom_config: Mapping | None = None

    @classmethod
    def from_dict(cls, stored) -> "Recipe":
        """The recipe of an untrusted checkpoint. Raises PruningError."""
        if stored is None:
            return cls()
        if not isinstance(stored, Mapping):
            raise PruningError(f"its recipe is a {type(stored).__name__}, expected a mapping")
        stored = {("pruner" if key == "name" else key): value for key, value in stored.items()}
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in names})

    def to_dict(self) -> dict:
        return asdict(self)

    def differences(self, other: "Recipe") -> list[str]:
        """The names of the choices that are not the same."""
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]

    def in_words(self) -> str:
        """The flags that ask for it."""
        if self.pruner is None:
            return "no pruner"
        return f"--pruner {self.pruner} " + (
            "--custom-config" if self.sparsity is None else f"--sparsity {self.sparsity}")
