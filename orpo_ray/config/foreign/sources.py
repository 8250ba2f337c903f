"""Where the pairs come from, and how long they may be."""

import re
from pathlib import PurePosixPath
from typing import Any

from orpo_ray.config.foreign.draft import Draft, is_unset
from orpo_ray.config.plain_yaml import shown

_LOADERS = ("json", "jsonl", "csv", "parquet", "text", "arrow")
_SMALL_SHARE = 0.01
TEMPLATES = {
    "chatml": "chatml",
    "qwen": "chatml",
    "qwen2": "chatml",
    "qwen_25": "chatml",
    "qwen25": "chatml",
    "qwen3": "qwen3",
    "qwen3_nothink": "chatml",
    "qwen3_5": "qwen3",
    "llama3": "llama3",
    "llama-3": "llama3",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma_chat": "gemma",
    "mistral": "mistral",
    "mistral_v1": "mistral",
    "mistral_v2v3": "mistral",
    "phi3": "phi3",
    "phi_3": "phi3",
    "phi": "phi3",
    "empty": "plain",
}
"""Template names of other projects, each with our template of the same or nearly the same text."""
_OWN_TEMPLATE = ("tokenizer_default", "default", "auto")


def source(name: Any, split: Any = None, **more: Any) -> dict[str, Any]:
    """One source, without the keys that are not set or have our default."""
    extra = {key: value for key, value in more.items() if not is_unset(value) and value != 1}
    if extra.get("config") == "default" or "://" in str(name) or is_file(str(name)):
        extra.pop("config", None)
    entry = {"source": str(name)}
    if not is_unset(split) and split != "train":
        entry["split"] = str(split)
    return {**entry, **extra}


def is_file(name: str) -> bool:
    """Whether the name of a source is that of a file."""
    return PurePosixPath(name.removesuffix(".gz")).suffix.lower() in (
        ".json",
        ".jsonl",
        ".csv",
        ".parquet",
    )


def files_of(name: Any, data_files: Any) -> list[str]:
    """The files of a dataset, or the dataset itself if no files are named."""
    if isinstance(data_files, dict):
        data_files = list(data_files.values())
    files = data_files if isinstance(data_files, list) else [data_files]
    named = [str(file) for file in files if not is_unset(file)]
    if not named:
        return [str(name)]
    if name in _LOADERS or is_unset(name):
        return named
    return [file if "://" in file else f"hf://datasets/{name}/{file}" for file in named]


def put_sources(draft: Draft, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    """Put the sources for training and evaluation.

    If there is none to train on, a placeholder is put, because a config needs one.
    """
    _drop_splits(draft, "data.train", train)
    for name in dict.fromkeys(entry["source"] for entry in train if is_file(entry["source"])):
        others = [entry for entry in held_out if entry["source"] != name]
        if len(others) < len(held_out):
            draft.remark("data.train", f"{name}: a share of the trained file is held out")
        held_out = others
    _drop_splits(draft, "data.eval", held_out)
    if not train:
        train = [{"source": "pairs.jsonl"}]
        draft.remark("data.train", "no pairs are named there; write yours")
    draft.put("data.train", train)
    if held_out:
        draft.put("data.eval", held_out)


def _drop_splits(draft: Draft, key: str, entries: list[dict[str, Any]]) -> None:
    """Remove the splits of files, which have none here, with a remark."""
    for entry in entries:
        if "split" in entry and is_file(entry["source"]):
            split = entry.pop("split")
            draft.remark(key, f"{entry['source']}: split {split}: a file is read whole here")


def put_held_out(draft: Draft, key: str, size: Any) -> None:
    """Put the held-out share, if no evaluation pairs are named. `key` is its foreign name."""
    if "data.eval" in draft.settings:
        return
    if not size:
        remark = "orpo_ray always holds out some pairs; name data.eval to choose them"
        draft.put("data.eval_fraction", _SMALL_SHARE, remark)
    elif size < 1:
        draft.put("data.eval_fraction", size)
    else:
        remark = f"{key}: {size} pairs there, a share here: write {size} / the number of pairs"
        draft.put("data.eval_fraction", 0.05, remark)


def put_lengths(draft: Draft, whole: Any, prompt: Any, cut: str) -> None:
    """Tokens of a pair; `cut` says what the project does with longer ones."""
    if whole is not None:
        draft.put("data.max_length", max(8, int(whole)))
    limit = draft.settings.get("data.max_length", 2048)
    if prompt is not None and prompt < limit:
        draft.put("data.max_prompt_length", max(4, int(prompt)))
        draft.put("data.overlong", "truncate-prompt-left", cut)
        return
    told = "a prompt may take half of it; set max_prompt_length for longer ones"
    if prompt is not None:
        told = f"max_prompt_length: {prompt}: leaves no room for an answer; here it is half"
    draft.remark("data.max_length" if whole is not None else "data.train", told)
    draft.put("data.overlong", "drop", cut)


def put_template(draft: Draft, key: str, written: Any) -> None:
    """Put the chat template, by our name of it."""
    if written is None:
        return
    name = str(written)
    if name in _OWN_TEMPLATE or name.startswith("tokenizer_default"):
        draft.put("model.chat_template", None, f"{key}: {name}: the base's own")
    elif name in TEMPLATES:
        ours = TEMPLATES[name]
        told = f"{key}: {name}: {ours} here, without a system text of its own"
        draft.put("model.chat_template", ours, "" if ours == name else told)
    elif re.search(r"[{\n]", name):
        remark = (
            f"{key}: a text there, a file here: save it and name the file; null is the base's own"
        )
        draft.put("model.chat_template", None, remark)
    elif name.endswith((".jinja", ".j2", ".jinja2")):
        draft.put("model.chat_template", name)
    else:
        remark = (
            f"{key}: {shown(name)}: no template here has this name; null takes the base's own; or "
            "name a Jinja file"
        )
        draft.put("model.chat_template", None, remark)
