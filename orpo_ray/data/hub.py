"""Rows of a dataset on the Hugging Face hub, and one line for each reason why there are none."""

from collections.abc import Iterator
from typing import Any

from orpo_ray.config.data import Source
from orpo_ray.data.plain import plain_column
from orpo_ray.errors import DataError, on_one_line


def read_hub(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """Index and row of one split, with plain values.

    Raises DataError if the dataset is unknown, gated or cannot be reached.
    """
    import datasets

    try:
        rows = datasets.load_dataset(
            source.source, source.config, split=source.split, revision=source.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(explain_hub_error(source, error)) from error
    for index, row in enumerate(rows):
        yield index, {name: plain_column(value) for name, value in row.items()}


def explain_hub_error(source: Source, error: Exception) -> str:
    """What is wrong and what to do, from an error of the hub libraries."""
    name, text = source.source, on_one_line(error)
    chain = f"{text} {error.__cause__ or ''} {type(error).__name__}".lower()
    if "gated" in chain:
        page = f"https://huggingface.co/datasets/{name}"
        return (
            f"hub dataset {name} is gated: accept its terms on {page} and log in with "
            "`hf auth login`"
        )
    if "offline" in chain:
        return (
            f"hub dataset {name} is not in the local cache and this machine is offline "
            "(HF_HUB_OFFLINE): fetch it once while online, or name a local file"
        )
    if "config name is missing" in chain or "builderconfig" in chain:
        return f"hub dataset {name}: set `config` of the source to a configuration: {text[:300]}"
    if "split" in chain and "should be one of" in chain:
        return f"hub dataset {name} has no split {source.split!r}: {text}"
    if type(error).__name__ == "DatasetNotFoundError":
        return (
            f"{name} is neither a local file nor a hub dataset this account can read (private "
            "ones: `hf auth login`)"
        )
    if isinstance(error, ConnectionError):
        return f"hub dataset {name} cannot be reached and is not in the local cache: {text}"
    return f"hub dataset {name} cannot be loaded: {text[:300]}"
