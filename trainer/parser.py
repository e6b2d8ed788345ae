"""The parser of every command, and what sweeps and resumed runs make of each flag of main.py."""

import argparse
from dataclasses import dataclass

from sparsity_factory.errors import short
from utils import UserError

#: What a sweep or a search makes of a flag of main.py.
SHARED = "shared"  # two starts of one sweep must agree on it
FREE = "free"  # two starts may differ, since it changes no result
REFUSED = "refused"  # the sweep has a flag of its own instead, or none


class Parser(argparse.ArgumentParser):
    """Parses a command line; a mistake in it is a UserError."""

    def __init__(self, name: str, description: str | None, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(name, description=description, **options)
        self.flags: list[Flag] = []  # of the groups of class Group

    def error(self, message):
        raise UserError(message)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action):
        has_default = action.default not in (None, "") and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


class Extend(argparse.Action):
    """Collects the values of a flag that may be given several times."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (before if isinstance(before, list) else []) + values)


@dataclass(frozen=True)
class Flag:
    """One setting of main.py.

    options: how it is typed, with the opposite of a switch. sweep: SHARED, FREE or REFUSED.
    instead: the flag of a sweep that replaces it. continues: a resumed run takes the value from
    its checkpoint, unless the flag is given; by default those do that sweeps share, because they
    change results.
    """

    action: argparse.Action
    options: tuple[str, ...]
    sweep: str
    instead: str
    continues: bool

    @property
    def name(self) -> str:
        """The name in the parsed arguments and in a YAML file: `batch_size`."""
        return self.action.dest

    @property
    def default(self):
        return self.action.default

    def __str__(self) -> str:
        return self.options[0]

    def read(self, value, where: str):
        """A value of a YAML file or a checkpoint, as the command line would have read it.

        where: begins the message of the UserError that a wrong value raises.
        """
        action = self.action
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{where}: expected true or false, got {short(value)}")
            return value

        if value is None and action.default is None:
            return None
        # YAML reads a bare `off` as False
        if value is False and "off" in (action.choices or ()):
            value = "off"

        if action.nargs != "+":
            return self._read_one(value, where)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise UserError(f"{where}: expected at least one value")
        return [self._read_one(item, where) for item in values]

    def _read_one(self, value, where: str):
        action = self.action
        mismatch = f"{where}: expected a value of type {action.type.__name__}, got {short(value)}"
        if isinstance(value, (dict, list, bool)) or value is None:
            raise UserError(mismatch)

        try:
            value = action.type(str(value))
        except ValueError:  # also of an integer that has too many digits to be printed
            raise UserError(mismatch) from None

        if action.choices and value not in action.choices:
            expected = ", ".join(action.choices)
            raise UserError(f"{where}: expected one of {expected}, got {short(value)}")
        return value


class Group:
    """A titled group of flags in the help of main.py; the parser lists them in `flags`."""

    def __init__(self, parser: Parser, title: str, continues: bool = True):
        """continues: whether a resumed run takes those that sweeps share from its checkpoint."""
        self._parser = parser
        self._group = parser.add_argument_group(title)
        self._continues = continues

    def add(
        self, option, type, default, *, sweep=SHARED, instead="", continues=None, also="", **options
    ) -> None:
        """Adds a flag; one of type bool is given without a value. also: its other spelling."""
        names = (option, also) if also else (option,)
        if type is bool:
            action = self._group.add_argument(*names, action="store_true", **options)
        else:
            action = self._group.add_argument(*names, type=type, default=default, **options)
        self._list(action, names, sweep, instead, continues)

    def switch(self, name, default: bool, *, help, sweep=SHARED, continues=None) -> None:
        """Adds `--name` and `--no-name`."""
        dest = name.replace("-", "_")
        names = (f"--{name}", f"--no-{name}")
        action = self._group.add_argument(
            names[0], action="store_true", dest=dest, default=default, help=help
        )
        self._group.add_argument(
            names[1], action="store_false", dest=dest, default=default, help="the opposite"
        )
        self._list(action, names, sweep, continues=continues)

    def _list(self, action, names, sweep, instead="", continues=None) -> None:
        if continues is None:
            continues = self._continues and sweep == SHARED
        self._parser.flags.append(Flag(action, names, sweep, instead, continues))
