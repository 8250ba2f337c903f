"""The shapes that preference files have, in one table, and how a row of each becomes a pair."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from itertools import product
from typing import Any

from orpo_ray.config.data import Columns
from orpo_ray.data import labelled, ranked
from orpo_ray.data.joining import (
    Sides,
    Single,
    context_of,
    system_columns,
    system_of,
    to_pair,
    to_single,
)
from orpo_ray.data.json_text import unpacked
from orpo_ray.data.messages import (
    RowRefused,
    has_dialogue,
    refuse_images,
    split_dialogues,
    starts_dialogue,
    text_of,
)
from orpo_ray.data.pairs import Pair, Refusal, Row
from orpo_ray.data.ranked import BEST_WORST, Ranking

PROMPTS = ("prompt", "question", "request", "query", "context", "instruction", "input")
CONVERSATIONS = ("conversations", "conversation", "messages")
_SIDES = (
    ("chosen", "rejected"),
    ("chosen", "reject"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("preferred", "dispreferred"),
    ("chosen_messages", "rejected_messages"),
)
_OUTPUTS = (
    ("output_1", "output_2"),
    ("response_1", "response_2"),
    ("answer_1", "answer_2"),
    ("response1", "response2"),
    ("answer1", "answer2"),
    ("response-1", "response-2"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
)
_LABELS = ("label", "preference", "winner", "choice", "comparison", "selected")
_FIRST, _SECOND = ("1", "left", "a", "model_a"), ("2", "right", "b", "model_b")
_ALPACA = ("input", "history")
_ALL_PROMPTS = frozenset({*PROMPTS, *CONVERSATIONS})
_KEYS_OF_SIDE_TABLES = frozenset({"id", "idx", "index", "prompt_id", "uid", "source", "category"})


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of a run are read.

    `columns` names the columns of a file whose shape is not in `SHAPES`. Only a row of scored
    answers may have several pairs, and `ranking` chooses them. Without `single_answers`, a row with
    one answer and a label is refused. With `all_turns`, earlier assistant turns are trained, too,
    and the two sides may part at one of them.
    """

    columns: Columns | None = None
    ranking: Ranking = BEST_WORST
    single_answers: bool = False
    all_turns: bool = False


@dataclass(frozen=True)
class _Ranked:
    """Scored answers of one row, and the column of its prompt."""

    row: Row
    prompt: str
    answers: list[ranked.Scored]


_Found = Sides | _Ranked | Single


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape of rows, recognised by its columns.

    A row has this shape if it has both columns of one pair of `sides`, and one of the columns in
    `prompt`. A shape with an empty `prompt` needs no such column. `read` takes the row and the
    names of its prompt, chosen and rejected column. It returns the three values, scored answers or
    a single answer, or None if the values show that the row has a shape that comes later in
    `SHAPES`.
    """

    name: str
    prompt: tuple[str, ...]
    sides: tuple[tuple[str, str], ...]
    read: Callable[[Row, str, str, str], _Found | None]
    also: tuple[str, ...] = ()
    """Other columns that `read` uses."""


def read_pairs(row: Row, reading: Reading) -> list[Pair] | Refusal:
    """The pairs in a row, or why there is none."""
    try:
        row, not_read = unpacked_row(row)
        whole = row | _label_studio_task(row)
        refuse_images(whole)
        found, used = _find_sides(row, reading.columns)
        for name in {*used, *system_columns(reading.columns)} & not_read.keys():
            raise not_read[name]
        system, context = system_of(whole, reading.columns), context_of(whole)
        if isinstance(found, Single):
            if not reading.single_answers:
                raise RowRefused("unpaired")
            return [to_single(found, system, context)]
        sides = _chosen(found, reading.ranking) if isinstance(found, _Ranked) else [found]
        return [to_pair(one, system, context, reading.all_turns) for one in sides]
    except RowRefused as refused:
        return refused.refusal


def used_columns(row: Row, columns: Columns | None = None) -> set[str]:
    """The columns that a row's pair is read from; none if the row holds no pair."""
    try:
        row, _ = unpacked_row(row)
        _, used = _find_sides(row, columns)
        return {*used, *system_columns(columns), *context_of(row)}
    except RowRefused:
        return set()


def unpacked_row(row: Row) -> tuple[Row, dict[str, RowRefused]]:
    """The row with messages in place of their JSON text, and why columns cannot be read.

    Those matter only if a pair is read from them.
    """
    found, not_read = {}, {}
    for name, value in row.items():
        try:
            found[name] = unpacked(value, name)
        except RowRefused as refused:
            found[name], not_read[name] = value, refused
    return found, not_read


def _find_sides(row: Row, columns: Columns | None) -> tuple[_Found, tuple[str, ...]]:
    """What `Shape.read` returns, and the columns that it comes from."""
    if columns is not None:
        named = columns.named
        missing = [name for name in named if name not in row]
        if not missing:
            _refuse_missing_system(row, columns)
            return _read_named(row, columns), named
        # A second source, often `eval`, may have another shape: it lacks all of these columns.
        # A row that has some of them is a sign of a spelling mistake.
        if len(missing) < len(named):
            raise RowRefused("missing-column", f"{', '.join(missing)} is not among {_names(row)}")
    present = {name for name, value in row.items() if value is not None}
    for shape in SHAPES:
        sides = next((pair for pair in shape.sides if present.issuperset(pair)), None)
        if sides is None:
            continue
        prompt = _find_prompt(present, shape)
        if prompt is None:
            continue
        found = shape.read(row, prompt, *sides)
        if found is not None:
            return found, (prompt, *sides, *shape.also)
    raise RowRefused(*_why_no_shape(row, present))


def _refuse_missing_system(row: Row, columns: Columns) -> None:
    if columns.system is not None and columns.system not in row:
        raise RowRefused("missing-column", f"{columns.system} is not among {_names(row)}")


def _find_prompt(present: Set[str], shape: Shape) -> str | None:
    """The prompt's column, "" for a shape without one, or None if the row does not match."""
    if not shape.prompt:
        return ""
    found = [name for name in shape.prompt if name in present]
    if len(found) > 1 and found[0] not in ("prompt", "instruction"):
        raise RowRefused("unknown-shape", f"{' and '.join(found)} could each be the prompt")
    return found[0] if found else None


def _why_no_shape(row: Row, present: Set[str]) -> tuple[str, str]:
    """Why a row holds no pair, as code and detail.

    "unknown-shape" is the last answer: other reasons tell the user more.
    """
    for chosen, rejected in _SIDES:
        if chosen in row and rejected in row:
            return ("missing-rejected" if chosen in present else "missing-chosen"), ""
    for chosen, rejected in _SIDES:
        if chosen in present:
            return "missing-rejected", f"found {_names(row)}"
        if rejected in present:
            return "missing-chosen", f"found {_names(row)}"
    if null := _null_of_single(row, present):
        return null
    if present & _ALL_PROMPTS and present - _ALL_PROMPTS <= _KEYS_OF_SIDE_TABLES:
        return "prompts-only", ""
    return "unknown-shape", f"found {_names(row)}"


def _null_of_single(row: Row, present: Set[str]) -> tuple[str, str] | None:
    """Why a row with an answer and a label holds none, if one of them is null."""
    for name in labelled.SPEAKING:
        if name in row and name not in present and present & {*labelled.ANSWERS, *CONVERSATIONS}:
            return "wrong-label", f"{name} is null"
    for name in labelled.ANSWERS:
        if name in row and name not in present and present & {*labelled.SPEAKING}:
            return "wrong-type", f"{name} is null"
    return None


def _names(row: Row) -> str:
    return "columns " + ", ".join(list(row)[:12]) if row else "no columns"


# --- reading the three values of each shape -------------------------------------------------------


def _read_named(row: Row, columns: Columns) -> Sides | Single:
    """The values of a row whose columns the user names."""
    if columns.completion is None:
        return _read_explicit(row, *columns.named)
    prompt, answer, label = columns.named
    is_good = labelled.says_good(row[label], label)
    if is_good is None:
        raise RowRefused("wrong-label", f"{label} {row[label]!r}")
    return Single(row[prompt], row[answer], is_good, answer)


def _read_explicit(row: Row, prompt: str, chosen: str, rejected: str) -> Sides:
    better, worse = row[chosen], row[rejected]
    if starts_dialogue(better) and starts_dialogue(worse):
        better, worse, apart = split_dialogues(better, worse)
        return Sides(row[prompt], better, worse, apart)
    return Sides(row[prompt], better, worse)


def _read_alpaca(row: Row, prompt: str, chosen: str, rejected: str) -> Sides:
    return Sides(alpaca_prompt(row, prompt), row[chosen], row[rejected])


def alpaca_prompt(row: Row, prompt: str) -> Any:
    """The instruction with its input, after the turns of its history."""
    instruction, extra = text_of(row[prompt], prompt), text_of(row.get("input") or "", "input")
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    history = row.get("history") or []
    if not history:
        return question
    try:
        earlier = []
        for asked, answered in history:
            earlier.append({"role": "user", "content": asked})
            earlier.append({"role": "assistant", "content": answered})
    except (TypeError, ValueError) as error:
        raise RowRefused(
            "wrong-type", "history is not a list of question and answer pairs"
        ) from error
    return [*earlier, {"role": "user", "content": question}]


def _read_openai(row: Row, prompt: str, chosen: str, rejected: str) -> Sides:
    value = row[prompt]
    messages = value.get("messages") if isinstance(value, dict) else value
    return Sides(messages, row[chosen], row[rejected])


def _read_labelled(row: Row, prompt: str, first: str, second: str) -> Sides:
    label = next((row[name] for name in _LABELS if row.get(name) is not None), None)
    is_first = _names_first(label, first, second)
    better, worse = (first, second) if is_first else (second, first)
    read = _read_alpaca if prompt == "instruction" else _read_explicit
    return read(row, prompt, better, worse)


def _names_first(label: Any, first: str, second: str) -> bool:
    """Whether a label means the first of two answers: a number, a side, a column, or votes."""
    votes = label if isinstance(label, list) else [label]
    given = [vote for vote in votes if not isinstance(vote, dict) or _counts(vote)]
    values = [vote.get("value") if isinstance(vote, dict) else vote for vote in given]
    names = [str(value).strip().lower() for value in values if not isinstance(value, bool)]
    for_first = sum(name in (*_FIRST, first) for name in names)
    for_second = sum(name in (*_SECOND, second) for name in names)
    if for_first + for_second < len(values) or for_first == for_second:
        raise RowRefused("wrong-label", f"label {label!r}")
    return for_first > for_second


def _counts(vote: Row) -> bool:
    """Whether a vote of Argilla was sent: others are drafts, or were taken back."""
    return vote.get("status") in (None, "submitted")


def _read_label_studio(row: Row, prompt: str, data: str, annotations: str) -> Sides | None:
    """A task of Label Studio with its pairwise annotations; a vote is `left` or `right`."""
    task = _label_studio_task(row)
    sides = next((pair for pair in _OUTPUTS if task.keys() >= set(pair)), None)
    asked = next((name for name in PROMPTS if name in task), None)
    if sides is None or asked is None:
        return None
    done = (each for each in _dicts(row[annotations]) if not each.get("was_cancelled"))
    results = (result for each in done for result in _dicts(each.get("result")))
    votes = [result.get("value") for result in results if result.get("type") == "pairwise"]
    selected = [vote["selected"] for vote in _dicts(votes) if "selected" in vote]
    return _read_labelled({**task, "label": selected}, asked, *sides)


def _label_studio_task(row: Row) -> Row:
    """The columns inside of a task; none if the row is no task of Label Studio."""
    task = row.get("data")
    if not isinstance(task, dict) or not isinstance(row.get("annotations"), list):
        return {}
    return {name: unpacked(value, name) for name, value in task.items()}


def _dicts(values: Any) -> list[Row]:
    """The objects in a list; none if it is no list."""
    return [each for each in values if isinstance(each, dict)] if isinstance(values, list) else []


def _read_implicit(row: Row, prompt: str, chosen: str, rejected: str) -> Sides | None:
    better, worse = row[chosen], row[rejected]
    texts = isinstance(better, str) and isinstance(worse, str)
    if has_dialogue(better) and has_dialogue(worse):
        return Sides(None, *split_dialogues(better, worse))
    conversations = any(isinstance(side, list) and len(side) > 1 for side in (better, worse))
    if row.get("messages") is not None and not conversations:
        return None
    if texts and not row.keys() & _ALL_PROMPTS:
        code = "prompt-elsewhere" if "prompt_id" in row else "unknown-shape"
        raise RowRefused(code, f"found {_names(row)}")
    return Sides(None, better, worse)


def _read_swift(row: Row, prompt: str, chosen: str, rejected: str) -> Sides:
    """The conversation is the chosen one; the other answers its last question, or is another."""
    conversation, other = row[chosen], row[rejected]
    if isinstance(conversation, list) and not (isinstance(other, list) and len(other) > 1):
        return Sides(conversation[:-1], conversation[-1:], other)
    return Sides(None, conversation, other)


def _read_single(row: Row, prompt: str, answer: str, label: str) -> Single | None:
    is_good = labelled.is_good(row, label)
    if is_good is None:
        return None
    question = alpaca_prompt(row, prompt) if prompt == "instruction" else row[prompt]
    return Single(question, row[answer], is_good, answer)


def _read_labelled_conversation(
    row: Row, prompt: str, conversation: str, label: str
) -> Single | None:
    """The last turn of a conversation is the answer."""
    is_good = labelled.is_good(row, label)
    return None if is_good is None else Single(None, row[conversation], is_good, conversation)


def _read_ranked(row: Row, prompt: str, answers: str, scores: str) -> _Ranked | None:
    found = ranked.scored_answers(row, answers, scores)
    return None if found is None else _Ranked(row, prompt, found)


def _chosen(found: _Ranked, ranking: Ranking) -> list[Sides]:
    """The three values of each pair of scored answers."""
    read = _read_alpaca if found.prompt == "instruction" else _read_explicit
    return [
        read({**found.row, "chosen": better, "rejected": worse}, found.prompt, "chosen", "rejected")
        for better, worse in ranked.choose_pairs(found.answers, ranking)
    ]


SHAPES = (
    Shape(
        name="two outputs and a label",
        prompt=PROMPTS,
        sides=_OUTPUTS,
        read=_read_labelled,
        also=(*_LABELS, *_ALPACA),
    ),
    Shape(
        name="Label Studio's pairwise export",
        prompt=(),
        sides=(("data", "annotations"),),
        read=_read_label_studio,
    ),
    Shape(
        name="OpenAI preference",
        prompt=("input",),
        sides=(("preferred_output", "non_preferred_output"),),
        read=_read_openai,
    ),
    Shape(
        name="ShareGPT conversations",
        prompt=("conversations", "conversation"),
        sides=_SIDES,
        read=_read_explicit,
    ),
    Shape(
        name="Alpaca instruction",
        prompt=("instruction",),
        sides=_SIDES,
        read=_read_alpaca,
        also=_ALPACA,
    ),
    Shape(name="prompt and two answers", prompt=PROMPTS, sides=_SIDES, read=_read_explicit),
    Shape(name="prompt inside the answers", prompt=(), sides=_SIDES, read=_read_implicit),
    Shape(name="messages and two answers", prompt=("messages",), sides=_SIDES, read=_read_explicit),
    Shape(
        name="messages and a rejected answer",
        prompt=(),
        sides=(("messages", "rejected_response"), ("messages", "rejected_messages")),
        read=_read_swift,
    ),
    Shape(
        name="answers with scores",
        prompt=(*PROMPTS, *CONVERSATIONS),
        sides=ranked.COLUMNS,
        read=_read_ranked,
        also=_ALPACA,
    ),
    Shape(
        name="one answer and a label",
        prompt=(*PROMPTS, *CONVERSATIONS),
        sides=tuple(product(labelled.ANSWERS, labelled.LABELS)),
        read=_read_single,
        also=(*_ALPACA, *labelled.SPEAKING, labelled.DOWN),
    ),
    Shape(
        name="a conversation and a label",
        prompt=(),
        sides=tuple(product(CONVERSATIONS, labelled.LABELS)),
        read=_read_labelled_conversation,
        also=(*labelled.SPEAKING, labelled.DOWN),
    ),
)
