"""RUN/config.json, and settings files that users write."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ltloss._deprecation import renamed_keys
from ltloss.errors import UserError, in_one_line, nearest
from ltloss.losses.defaults import FORMER_OPTIONS
from ltloss.training.model.registry import options_in_force
from ltloss.training.run.settings import SETTINGS, Settings, checked, positive
from ltloss.training.stored_keys import FORMER_SETTINGS, named_as_now, stored

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class RunConfig:
    """The content of RUN/config.json: settings, and facts about the data. They suffice to rebuild the classifier."""

    settings: Settings
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]  # training images per class, after the long tail
    image_shape: tuple[int, ...]  # (channels, height, width), or (D,) of embeddings
    mean: tuple[float, ...]  # per channel, pixels in [0, 1], or per feature of embeddings
    std: tuple[float, ...]
    versions: Mapping[str, str]

    @property
    def loss(self) -> str:
        """Name of the loss."""
        return self.settings.loss

    @property
    def backbone(self) -> str:
        """Name of the backbone, or of the head over embeddings."""
        return self.settings.head if self.of_embeddings else self.settings.backbone

    @property
    def of_embeddings(self) -> bool:
        """Whether the run classifies embeddings, not images."""
        return len(self.image_shape) == 1

    @property
    def embedding_size(self) -> int:
        """Length D of the feature vector; with a linear head, that of the embeddings."""
        linear = self.of_embeddings and self.settings.head == "linear"
        return self.image_shape[0] if linear else self.settings.embedding_size

    def in_force(self, *, amp: bool | None = None) -> RunConfig:
        """The configuration with values for all options of the loss, ``amp``, ``rounding`` and ``embedding_size``.

        So a run keeps its meaning if a later version has other defaults.
        """
        settings = self.settings
        known = settings.all_loss_options
        options = options_in_force(self.loss, self.class_counts, self.embedding_size, known)
        added = {name: value for name, value in options.items() if name not in known}
        common: dict[str, Any] = {name: added.pop(name) for name in ("scale", "margin", "tau") if name in added}
        kept = {name: value for name, value in settings.loss_options.items() if name not in FORMER_OPTIONS}
        if settings.amp is None:
            common["amp"] = amp
        common |= {"rounding": settings.rounding_in_force, "embedding_size": self.embedding_size}
        return replace(self, settings=replace(settings, **common, loss_options={**kept, **added}))

    def to_json(self) -> str:
        """The text of config.json: settings and facts side by side."""
        facts = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "settings"}
        return json.dumps({**stored(asdict(self.settings)), **facts}, indent=2) + "\n"

    @classmethod
    def read(cls, run: Path) -> RunConfig:
        """Read RUN/config.json; UserError if ``run`` is no run or the file is damaged."""
        path = run / "config.json"
        if not path.is_file():
            raise UserError(
                f"{run} is not a run (it has no config.json); give the folder that `ltloss train --out` wrote"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            missing = [name for name in _FACTS if name not in values]
            if missing:
                raise ValueError(f"it lacks {missing[0]}")
            facts = {name: values[name] for name in _FACTS}
            _check_facts(facts)
            facts |= {name: tuple(value) for name, value in facts.items() if isinstance(value, list)}
            values = _of_a_run(values)
            return cls(Settings(**{name: values[name] for name in SETTINGS if name in values}), **facts)
        except (TypeError, ValueError, OverflowError, RecursionError, UserError) as error:
            raise UserError(f"{path} is damaged ({_reason(error)}); train the run again") from error


def _of_a_run(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config.json by today's names. In version 0.1, ``long-tail`` had the log prior by default."""
    values = named_as_now(values)
    versions, options = values.get("versions"), values.get("loss_options", {})
    if values.get("loss") != "long-tail" or not isinstance(versions, dict) or not isinstance(options, dict):
        return values
    if not str(versions.get("ltloss")).startswith("0.1."):
        return values
    options = dict(options)
    if "min_angle_rows" in options:  # no warning: the user of a run did not write it
        options["min_angle_classes"] = options.pop("min_angle_rows")
    prior = options.pop("form", "recommended") == "recommended"
    if prior and options.get("normalize_features") is False:
        options.setdefault("feature_norm_weight", 0.1)  # features that kept their length had L3
    return {**values, "loss": "long-tail-prior" if prior else "long-tail", "loss_options": options}


_FACTS = [item.name for item in fields(RunConfig) if item.name != "settings"]


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raise ValueError if a fact about the data in config.json has a wrong type, length or range."""
    names, shape = facts["class_names"], facts["image_shape"]
    channels = shape[0] if isinstance(shape, list) and shape else 0
    versions = facts["versions"]
    holds = {
        "class_names": _list_of(names, str) and len(set(names)) == len(names) > 0,
        "class_counts": _list_of(facts["class_counts"], int, len(names)) and min(facts["class_counts"]) >= 0,
        "image_shape": ((_list_of(shape, int, 3) and channels in (1, 3)) or _list_of(shape, int, 1))
        and min(shape) >= 1,
        "mean": _list_of(facts["mean"], (int, float), channels) and all(map(math.isfinite, facts["mean"])),
        "std": _list_of(facts["std"], (int, float), channels) and all(map(positive, facts["std"])),
        "versions": isinstance(versions, dict) and _list_of(list(versions.values()), str),
    }
    for name, good in holds.items():
        if not good:
            raise ValueError(f"{name} cannot be {str(facts[name])[:60]}")


def _list_of(value: Any, kind: type | tuple[type, ...], length: int | None = None) -> bool:
    """Whether ``value`` is a list of that length whose items are of that type; true and false are no numbers."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        return False
    return all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def _reason(error: Exception) -> str:
    known = isinstance(error, (ValueError, OSError, UserError, RecursionError))
    return in_one_line(error if known else repr(error))


def read_settings_file(path: Path) -> dict[str, Any]:
    """Settings from a TOML or JSON file. It may be the config.json of a run, whose facts are ignored.

    Raises UserError for a file that cannot be read and for an unknown key, with the nearest valid ones.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"--config {path} does not exist; give a TOML or JSON file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"--config {path} cannot be read ({_reason(error)}); correct the file") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold names and values; got a {type(values).__name__}; correct the file")
    if "versions" in values:  # the config.json of a run
        values = _of_a_run(values)
    given = [(name.replace("-", "_"), value) for name, value in values.items() if name not in _FACTS]
    try:
        settings = renamed_keys(_once(given), FORMER_SETTINGS)
    except (TypeError, ValueError) as error:
        raise UserError(f"--config {path}: {error}") from error
    for name in settings:
        if name not in SETTINGS:
            raise UserError(f"--config {path}: unknown setting {name}; {nearest(name, SETTINGS)}")
    try:
        return {name: checked(name, value) for name, value in settings.items()}
    except (OverflowError, ValueError) as error:  # the latter: of TOML, too long for Python to write it in an error
        raise UserError(f"--config {path} holds a number that is too large ({error}); correct the file") from error
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dictionary; ValueError if a name is given twice."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return dict(pairs)
