"""Values of Arrow tables and hub datasets as what JSON holds.

All structs of an Arrow column have the same fields: a field that one row has is a null in the
others. So a null in a struct is left out, at every depth, and nothing is trained that no row had.
"""

from collections.abc import Iterable, Iterator
from datetime import date, time
from decimal import Decimal
from typing import Any

import pyarrow as pa
from pyarrow import types

_LISTS = (
    types.is_list,
    types.is_large_list,
    types.is_fixed_size_list,
    types.is_list_view,
    types.is_large_list_view,
)
_PLAIN = (
    types.is_string,
    types.is_large_string,
    types.is_string_view,
    types.is_boolean,
    types.is_integer,
    types.is_float32,
    types.is_float64,
    types.is_null,
)


def plain_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    """The rows of a table. Raises ValueError for a map that has a key twice.

    Columns whose type is plain, such as texts, cost nothing here.
    """
    for batch in batches:
        names = [field.name for field in batch.schema if not _is_plain(field.type)]
        try:
            rows = batch.to_pylist(maps_as_pydicts="strict" if names else None)
        except KeyError as error:
            raise ValueError(f"a map has a key twice: {error.args[0]}") from error
        for row in rows:
            row.update((name, plain_column(row[name])) for name in names)
            yield row


def plain_column(value: Any) -> Any:
    """The value of one column of a row.

    A value with something that JSON cannot hold, such as an image, becomes an object that names its
    type. No recognised column may hold that.
    """
    try:
        return _plain(value)
    except _NotPlainError as error:
        return {"type": str(error)}


class _NotPlainError(Exception):
    pass


def _is_plain(kind: pa.DataType) -> bool:
    """Whether JSON holds all values of a type as Python has them."""
    if types.is_dictionary(kind) or any(is_kind(kind) for is_kind in _LISTS):
        return _is_plain(kind.value_type)
    return any(is_kind(kind) for is_kind in _PLAIN)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, dict):
        return {_key(name): _plain(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return _plain_scalar(value)


def _key(name: Any) -> str:
    """The name of a field, or the key of a map."""
    return name if isinstance(name, str) else str(_plain(name))


def _plain_scalar(value: Any) -> Any:
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _NotPlainError("bytes") from error
    raise _NotPlainError(type(value).__name__)
