"""Raw rows in, tokenised pairs or reasons out.

This step runs in parallel, one Arrow block at a time.
"""

import difflib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orpo_ray.config.data import Columns
from orpo_ray.data import near
from orpo_ray.data.checks import WHOLE_FILE, check_pair, explain
from orpo_ray.data.formats import Reading, read_pairs, used_columns
from orpo_ray.data.pairs import Pair, Refusal, Row, TokenPair
from orpo_ray.data.readers import RawRow
from orpo_ray.data.store import SCHEMA, SIDES, TRAINED
from orpo_ray.data.tokenise import Limits, PairTokeniser, fit
from orpo_ray.errors import DataError
from orpo_ray.lean_imports import without_collections

RAW = pa.schema(
    [
        ("source", pa.int32()),
        ("line", pa.int64()),
        ("text", pa.large_binary()),
        ("problem", pa.string()),
    ]
)
"""A raw row: number of its source, line, JSON text, and the problem that its reader found."""

RESULT = pa.schema(
    [
        ("source", pa.int32()),
        ("line", pa.int64()),
        ("nth", pa.int32()),
        ("code", pa.string()),
        ("detail", pa.string()),
        *SCHEMA,
        ("pair_key", pa.binary()),
        ("prompt_key", pa.binary()),
        ("multi_turn", pa.bool_()),
        ("truncated", pa.bool_()),
        ("ignored", pa.list_(pa.string())),
        ("signature", pa.binary()),
        ("unused", pa.string()),
    ]
)
"""What became of a row: an empty `code` and token ids, or the code of the reason.

`nth` counts the pairs of a row from 0: most rows have one.

Pairs with the same tokens have equal `pair_key`. Prompts that the template writes alike, but for
white space, have equal `prompt_key`. `ignored` names the fields that the chat template does not
write. `signature` finds near-duplicates. `unused` is null but in the first row of a block: there it
has, as JSON, the `count_unused` of the block.
"""

SNIFFED_ROWS = 20
"""How many first rows of a source tell its columns."""
_SHOWN_COLUMNS = 12
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_SAVE_AS_UTF_8 = "save the file as UTF-8"
_KEY_BYTES = 16
_BLOCK_ROWS = 512
_BLOCK_BYTES = 2**20


def facts_of(rows: pa.Table) -> pa.Table:
    """What chooses the pairs to train on: RESULT rows with counts in place of ids and ranges.

    Signatures are left on disk: they take more than all other facts.
    """
    return counted(rows.drop_columns(["signature"]))


def counted(rows: pa.Table) -> pa.Table:
    """The rows with the numbers of tokens in place of ids, and of ranges."""
    for side in SIDES:
        column = rows.schema.get_field_index(side)
        rows = rows.set_column(column, side, pc.fill_null(pc.list_value_length(rows[side]), 0))
    for name in TRAINED:
        counts = pa.array(_tokens_in(rows[name]), pa.int32())
        rows = rows.set_column(rows.schema.get_field_index(name), name, counts)
    return rows


def _tokens_in(ranges: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """The number of tokens in each row's ranges; 0 for a row without any."""
    flat = ranges.combine_chunks()
    starts, stops = flat.values.to_numpy().reshape(-1, 2).T
    before = np.concatenate([[0], np.cumsum(stops - starts, dtype=np.int64)])
    found: npt.NDArray[np.int64] = np.diff(before[flat.offsets.to_numpy() // 2])
    return found


def raw_blocks(rows: Iterable[RawRow], source: int) -> Iterator[pa.Table]:
    """Rows of one source as RAW blocks; the content decides where a block ends."""
    block: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        block.append({"source": source, "line": row.line, "text": row.text, "problem": row.problem})
        size += len(row.text)
        if len(block) == _BLOCK_ROWS or size > _BLOCK_BYTES:
            yield pa.Table.from_pylist(block, schema=RAW)
            block, size = [], 0
    if block:
        yield pa.Table.from_pylist(block, schema=RAW)


class RowProcessor:
    """Recognises, checks, renders and tokenises blocks of raw rows.

    It is built once in each worker process.
    """

    def __init__(
        self,
        tokenizer: Any,
        labels: Sequence[str],
        limits: Limits,
        reading: Reading,
    ) -> None:
        self._tokeniser = PairTokeniser(tokenizer, all_turns=reading.all_turns)
        self._labels = labels
        self._limits = limits
        self._reading = reading

    def __call__(self, block: pa.Table) -> pa.Table:
        """RAW rows to RESULT rows, in order: one for each row, or for each of its pairs."""
        with without_collections():
            return self._process(block.to_pylist())

    def _process(self, raws: list[dict[str, Any]]) -> pa.Table:
        parsed = [parse_row(raw["text"], raw["problem"]) for raw in raws]
        read = [one for raw, row in zip(raws, parsed, strict=True) for one in self._read(raw, row)]
        good = [(place, found) for place, found in read if isinstance(found, Pair)]
        outcomes = iter(self._outcomes(good))
        rows = [
            place | (next(outcomes) if isinstance(found, Pair) else _refused(found))
            for place, found in read
        ]
        objects = [row for row in parsed if isinstance(row, dict)]
        if unused := count_unused(objects, self._reading.columns):
            rows[0]["unused"] = json.dumps(unused)
        return pa.Table.from_pylist(rows, schema=RESULT)

    def _read(
        self, raw: dict[str, Any], row: Row | Refusal
    ) -> Iterator[tuple[dict[str, Any], Pair | Refusal]]:
        """Each pair of a parsed row, or the refusal of the row, with where it comes from."""
        found = row if isinstance(row, Refusal) else read_pairs(row, self._reading)
        pairs: Sequence[Pair | Refusal] = [found] if isinstance(found, Refusal) else found
        row_id = f"{self._labels[raw['source']]}:{raw['line']}"
        for nth, pair in enumerate(pairs):
            pair_id = row_id if len(pairs) == 1 else f"{row_id}.{nth + 1}"
            place = {"source": raw["source"], "line": raw["line"], "nth": nth, "pair_id": pair_id}
            yield place, pair if isinstance(pair, Refusal) else check_pair(pair) or pair

    def _outcomes(self, good: Sequence[tuple[dict[str, Any], Pair]]) -> list[dict[str, Any]]:
        """What becomes of each pair, given with where it comes from."""
        pairs = [pair for _, pair in good]
        tokens = self._tokeniser.pairs(pairs, [place["pair_id"] for place, _ in good])
        outcomes = [self._outcome(*each) for each in zip(pairs, tokens, strict=True)]
        kept = [each for each in zip(outcomes, pairs, strict=True) if not each[0]["code"]]
        signatures = near.signatures([pair for _, pair in kept])
        for (outcome, _), signature in zip(kept, signatures, strict=True):
            outcome["signature"] = signature
        return outcomes

    def _outcome(self, pair: Pair, tokens: TokenPair | Refusal) -> dict[str, Any]:
        if isinstance(tokens, Refusal):
            return _refused(tokens)
        fitted = fit(tokens, self._limits, self._tokeniser.bos_id)
        if isinstance(fitted, Refusal):
            return _refused(fitted)
        return {
            "code": "",
            "detail": "",
            "prompt": fitted.prompt,
            "chosen": fitted.chosen,
            "rejected": fitted.rejected,
            **{name: ranges.ravel() for name, ranges in zip(TRAINED, fitted.trained, strict=True)},
            "pair_key": _pair_key(tokens),
            "prompt_key": _prompt_key(tokens),
            "multi_turn": pair.multi_turn,
            "truncated": len(fitted.prompt) < len(tokens.prompt),
            "ignored": self._tokeniser.ignored_fields(pair),
        }


def parse_row(text: bytes, problem: str = "") -> Row | Refusal:
    """The JSON object in one row's text, or why there is none."""
    if problem:
        return Refusal(problem, _SAVE_AS_UTF_8 if problem == "invalid-utf8" else "")
    try:
        row = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return Refusal("invalid-utf8", f"byte {error.start + 1} of the row; {_SAVE_AS_UTF_8}")
    except _DuplicateKeyError as error:
        return Refusal("duplicate-key", str(error))
    except json.JSONDecodeError as error:
        return Refusal("not-json", f"{error.msg}, column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Refusal("not-json", type(error).__name__)
    return row if isinstance(row, dict) else Refusal("not-an-object", f"a {type(row).__name__}")


def refuse_whole_file(name: str, rows: Iterable[RawRow], reading: Reading) -> None:
    """Raise DataError if each of the first rows has a reason that holds for the whole file."""
    refusals = []
    for row in _first_rows(rows):
        found = read_pairs(row, reading)
        if not (isinstance(found, Refusal) and found.code in WHOLE_FILE):
            return
        refusals.append(found)
    if refusals:
        raise DataError(f"{name}: {explain(refusals[0])}")


def lacks_columns(rows: Iterable[RawRow], columns: Columns) -> str | None:
    """The text for a message if no named column is in the first rows, else None."""
    found = list(dict.fromkeys(name for row in _first_rows(rows) for name in row))
    named = columns.named
    if not found or set(named) & set(found):
        return None
    near = [match for name in named for match in difflib.get_close_matches(name, found, 1)]
    hint = f"; did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
    return f"{', '.join(named)} not among columns {', '.join(found[:_SHOWN_COLUMNS])}{hint}"


def unused_in(rows: Iterable[RawRow], columns: Columns | None) -> list[str]:
    """Columns that no pair of the first rows uses."""
    found = list(_first_rows(rows))
    used = set().union(*(used_columns(row, columns) for row in found))
    if not used:
        return []
    names = dict.fromkeys(name for row in found for name in row)
    return [name for name in names if name not in used]


def count_unused(rows: Iterable[Row], columns: Columns | None) -> Counter[str]:
    """How many of the rows have something in each column that no pair is read from.

    Of rows with the same columns only the first ones are looked at closely: that takes about as
    long as reading them.
    """
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        names = tuple(name for name, value in row.items() if value not in _EMPTY)
        alike.setdefault(names, []).append(row)
    found: Counter[str] = Counter()
    for names, group in alike.items():
        used = set().union(*(used_columns(row, columns) for row in group[:SNIFFED_ROWS]))
        if used:
            found.update({name: len(group) for name in names if name not in used})
    return found


def some_of(names: Sequence[str]) -> str:
    """The first of these names for a message, and how many more there are."""
    more = len(names) - _SHOWN_COLUMNS
    return ", ".join(names[:_SHOWN_COLUMNS]) + (f" and {more} more" if more > 0 else "")


def _first_rows(rows: Iterable[RawRow]) -> Iterator[Row]:
    """The first rows of a source, without those that are no JSON objects."""
    for raw in itertools.islice(rows, SNIFFED_ROWS):
        row = parse_row(raw.text, raw.problem)
        if isinstance(row, dict):
            yield row


class _DuplicateKeyError(ValueError):
    pass


def _unique(items: list[tuple[str, Any]]) -> Row:
    row = dict(items)
    if len(row) < len(items):
        names = [name for name, _ in items]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return row


def _refused(refusal: Refusal) -> dict[str, Any]:
    # A detail may quote broken text, and Arrow holds valid UTF-8 only.
    detail = refusal.detail.encode("utf-8", errors="backslashreplace").decode("utf-8")
    return {"code": refusal.code, "detail": detail}


def _pair_key(pair: TokenPair) -> bytes:
    """Equal for pairs that are trained alike, whatever their rows look like.

    The ids are those before a prompt is cut: two pairs may have the same end of a prompt.
    """
    sides = (pair.prompt, pair.chosen, pair.rejected)
    return _key(repr([len(side) for side in sides]).encode(), *(side.tobytes() for side in sides))


def _prompt_key(pair: TokenPair) -> bytes:
    """Equal for prompts that the template writes alike, but for white space.

    Prompts with other white space ask the same, so they are held out together.
    """
    return _key("".join(pair.written.split()).encode())


def _key(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=_KEY_BYTES).digest()
