"""What a run costs, by the prices in a file of the user's own: none travels with the package."""

import math
from dataclasses import dataclass
from pathlib import Path

from orpo_ray.config.near import near_name
from orpo_ray.config.plain_yaml import NotPlainYamlError, parse
from orpo_ray.errors import ConfigError, on_one_line
from orpo_ray.planner.hardware import find_gpus, load_gpus
from orpo_ray.planner.interval import Interval

_FORM = "write `currency: EUR` and `gpus: {rtx4090: 0.45}`, the price of one GPU for an hour"


@dataclass(frozen=True)
class Prices:
    """The price of one GPU for an hour, by its name, all in one currency."""

    currency: str
    gpus: dict[str, float]

    def of(self, gpu: str, count: int, hours: Interval) -> Interval | None:
        """What that many GPUs cost for those hours, or None if the file has no price."""
        price = self.gpus.get(gpu)
        return None if price is None else hours.times(price * count)


def read_prices(path: Path) -> Prices:
    """The prices of a YAML file. Raises ConfigError for a file that is not of the form."""
    try:
        found, _ = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, NotPlainYamlError) as error:
        raise ConfigError(f"--prices: {path} cannot be read: {on_one_line(error)}") from error
    if not isinstance(found, dict) or not isinstance(found.get("gpus"), dict) or not found["gpus"]:
        raise ConfigError(f"--prices: {path} has no prices; {_FORM}")
    if others := [str(key) for key in found if key not in ("currency", "gpus")]:
        near = near_name(others[0], ["currency", "gpus"])
        hint = f"did you mean {near}?" if near else _FORM
        raise ConfigError(f"--prices: {path}: {others[0]} is unknown; {hint}")
    currency = found.get("currency", "")
    if not isinstance(currency, str):
        raise ConfigError(
            f"--prices: {path}: currency must be a word such as EUR, not {currency!r}"
        )
    named: dict[str, list[str]] = {}
    families: dict[str, float] = {}
    prices: dict[str, float] = {}
    for name, price in found["gpus"].items():
        if isinstance(price, bool) or not isinstance(price, int | float) or not _is_price(price):
            raise ConfigError(
                f"--prices: {path}: gpus.{name}: must be a number of 0 or more, not {price!r}"
            )
        meant = _meant(str(name), path)
        if twice := next((other for other, found in named.items() if found == meant), None):
            raise ConfigError(f"--prices: {path}: gpus.{twice} and gpus.{name} are the same GPU")
        named[str(name)] = meant
        into = prices if len(meant) == 1 else families
        into |= dict.fromkeys(meant, float(price))
    return Prices(currency, families | prices)  # h100-sxm has its own price beside that of h100


def _is_price(price: float) -> bool:
    return math.isfinite(price) and price >= 0


def _meant(name: str, path: Path) -> list[str]:
    """The GPUs that a name in the file means."""
    if name in load_gpus():
        return [name]
    try:
        return [gpu.name for gpu in find_gpus(name)]
    except ConfigError as error:
        said = str(error).removeprefix("--gpu: ")
        raise ConfigError(f"--prices: {path}: gpus.{name}: {said}") from None
