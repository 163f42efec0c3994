# SPDX-License-Identifier: Apache-2.0
"""The sizes of the comparison, which are the same for all arms and seeds; protocol.md says why."""

import argparse
import dataclasses
import json
from pathlib import Path

from nemo.utils.atomic_files import replacing

CONTEXTS = ((5, 0), (10, 0), (20, 0), (-1, 0))  # [left, right] in attention frames of 80 ms
SEEDS = (0, 1, 2)
MINUTES = (60.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all results that are compared have in common."""

    seconds: float = 16.0
    """Utterances of a speaker are joined until they are so long, for pre-training and the test."""
    fine_tuning_seconds: float = 1.0
    """The same for fine-tuning: as they were said, but for what is shorter than that; CTC learns slowly from long ones."""
    layers: int = 5
    width: int = 128
    classes: int = 128
    pretraining_steps: int = 3000
    pretraining_batch: int = 2
    fine_tuning_steps: int = 1000
    fine_tuning_batch: int = 8
    larger_minutes: float = MINUTES[0]
    """Of transcribed speech, in the larger of the two fine-tunings."""
    smaller_minutes: float = MINUTES[1]
    live_utterances: int = 20
    """Test utterances that are streamed, too."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise ValueError(f"--{field.name} is {value}; it must be above 0")
        if self.smaller_minutes >= self.larger_minutes:
            raise ValueError(f"--smaller_minutes is {self.smaller_minutes}; it must be below {self.larger_minutes}")

    @property
    def minutes(self) -> tuple[float, float]:
        """How much speech each of the two fine-tunings has."""
        return self.larger_minutes, self.smaller_minutes

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add an option for each setting."""
        for field in dataclasses.fields(Settings):
            parser.add_argument(f'--{field.name}', type=field.type, default=field.default, help=str(field.default))

    @classmethod
    def of(cls, options: argparse.Namespace) -> 'Settings':
        """Take the settings from a command line.

        Raises:
            ValueError: naming the option, its value and what is allowed.
        """
        return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})

    def as_dict(self) -> dict:
        """Return the settings, the contexts included, as JSON holds them."""
        return {**dataclasses.asdict(self), 'contexts': [list(context) for context in CONTEXTS]}

    def claim(self, folder: Path) -> None:
        """Make a working folder of these settings.

        Raises:
            ValueError: if it is one of other settings.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / 'settings.json'
        if path.exists():
            check_same(json.loads(path.read_text()), self.as_dict(), path)
            return
        with replacing(path) as partial:
            partial.write_text(json.dumps(self.as_dict(), indent=1) + '\n')


def check_same(found: dict, wanted: dict, where: Path) -> None:
    """Raise ValueError, with the first setting that differs, unless two sets of settings are the same."""
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{where}: {name} is {found.get(name)}, and {wanted.get(name)} elsewhere; results of other settings "
                "need a --work and a --results folder of their own"
            )


def label_of(context) -> str:
    """Return the name that results have for a context: ``5_0``."""
    return '_'.join(map(str, context))
