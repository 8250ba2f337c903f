"""A config that extends another one: `extends: base.yaml` at the top of its file.

It is the other config with single settings replaced, as overrides would replace them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.config.foreign.recognise import project_of
from orpo_ray.config.keys import EXTENDS
from orpo_ray.config.merge import merged, merged_places
from orpo_ray.config.plain_yaml import Key, shown
from orpo_ray.config.storage import expanded, is_url, mirrors, without_secrets
from orpo_ray.config.yaml_file import read_yaml
from orpo_ray.errors import ConfigError

Written = tuple[dict[str, Any], dict[Key, str]]
"""Settings as plain data, and for each key where it was written."""

_OF_DATA = (".csv", ".tsv", ".jsonl", ".parquet", ".arrow")


def read_config(path: Path, above: tuple[Path, ...] = ()) -> Written:
    """The settings that a file and those that it extends hold, as written: without defaults.

    `above` are the files that lead to this one. Raises ConfigError with one line on any mistake.
    """
    _refuse_data(path)
    tree, places = read_yaml(path)
    return extended(tree, places, path.parent, (*above, path.resolve()))


def standalone(path: Path) -> str:
    """The text of a config that needs no other file: that of its own file, unless it extends one.

    Raises ConfigError with one line on any mistake.
    """
    tree, _ = read_config(path)
    if EXTENDS not in read_yaml(path)[0]:
        return path.read_text(encoding="utf-8-sig")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def extended(
    tree: dict[str, Any], places: dict[Key, str], folder: Path, above: tuple[Path, ...] = ()
) -> Written:
    """Settings together with those of the file that they extend, if they extend one.

    A relative path starts in `folder`. Raises ConfigError if that file cannot be extended.
    """
    _refuse_foreign(tree, places[()])
    if EXTENDS not in tree:
        return tree, places
    own = {key: value for key, value in tree.items() if key != EXTENDS}
    try:
        base, base_places = _read_base(tree[EXTENDS], folder, above)
    except ConfigError as error:
        raise ConfigError(f"{places.get((EXTENDS,), places[()])}: {EXTENDS}: {error}") from None
    return merged(base, own), merged_places(base, own, base_places, places)


def _read_base(named: Any, folder: Path, above: tuple[Path, ...]) -> Written:
    if not isinstance(named, str) or not named:
        raise ConfigError(f"must be the path of one YAML file, not {shown(named)}")
    if is_url(named):
        raise ConfigError(
            f"{without_secrets(named)}: is a URL; copy the file here, and name its path"
        )
    path = folder / expanded(named)
    if folder.resolve().is_relative_to(mirrors()):
        # The copy of the base, if there is one here, may be old.
        raise ConfigError(
            f"{named}: a config in a bucket cannot extend another file; store what `orpo-ray "
            "config show` prints"
        )
    if path.resolve() in above:
        raise ConfigError(f"{path}: extends itself; remove one of the lines that lead back to it")
    return read_config(path, above)


def _refuse_data(file: Path) -> None:
    """Raise ConfigError for a file of pairs in place of a config."""
    if file.suffix.lower() in _OF_DATA:
        raise ConfigError(
            f"{file}: a file of pairs is no config; name it in one, as "
            f"data: {{train: [{{source: {file}}}]}} beside model: {{base: ...}}"
        )


def _refuse_foreign(tree: Mapping[str, Any], file: str) -> None:
    """Raise ConfigError for a config of another project, whose keys are all unknown here."""
    project = project_of(tree)
    if project is None:
        return
    named = "FILE" if file == "config" else file
    raise ConfigError(
        f"{file}: looks like a config of {project}; write ours with: "
        f"orpo-ray config from {named} > run.yaml"
    )
