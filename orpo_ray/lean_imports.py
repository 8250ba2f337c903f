"""Faster starts: some imports of libraries wait until their first use.

A process that trains imports about five thousand modules. A third of them come from three causes:
- bitsandbytes starts torch's compiler for its own functions;
- accelerate imports DeepSpeed to ask whether a model is DeepSpeed's;
- `transformers.trainer` imports `datasets`, which imports pandas.

Most runs use none of them. Nothing is left out: the first use imports the rest. Code that only
reads a tokenizer or a config of transformers does not load its model code either.
"""

import gc
import importlib.abc
import importlib.machinery
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from types import ModuleType
from typing import Any

_COMPILES = "bitsandbytes.backends."
"""Its modules call `torch.compile` when they are imported."""
_ASKS_DEEPSPEED = "accelerate.utils.other"
"""Imports DeepSpeed, which starts a compiler, to ask whether a model is its engine."""
_ASKS_DATASETS = "transformers.trainer"
"""Imports `datasets` to ask whether a data set is one of its own."""

_ASKS_ACTIVATIONS = "transformers.utils.type_validators"
"""Imports the activations for their names, which it compares with those in configs."""
_ACTIVATIONS = "transformers.activations"
"""Imports much of the code that models compute with."""
_BEFORE_ACTIVATIONS = ("torch", "transformers.tokenization_utils_base", "transformers.video_utils")
"""Other modules that `_ASKS_ACTIVATIONS` imports.

They are imported first, so that neither they nor another thread gets the stand-in.
"""

_replacing = threading.RLock()
"""Held while a function of a library is replaced, so that two threads do not mix up originals."""


def install() -> None:
    """Make the imports wait from now on; modules that are already imported stay."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    if _ASKS_DEEPSPEED in sys.modules:
        _ask_if_imported(sys.modules[_ASKS_DEEPSPEED])


@contextmanager
def without_collections() -> Iterator[None]:
    """Do work without garbage collections, which go through all modules again and again.

    They take a fifth of the time of a large import and free nothing, because modules stay. Nor do
    they free anything of a block of rows, which has no cycles.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the same modules as Python, and gives some of them a loader that waits."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's spec with a loader that waits, or None if the module needs none."""
        wrapper = _wrapper_for(fullname)
        if wrapper is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = wrapper(spec.loader)
        return spec


def _wrapper_for(name: str) -> "type[_Wrapper] | None":
    if name.startswith(_COMPILES):
        return _CompilesLater
    return {
        _ASKS_DEEPSPEED: _AsksForDeepSpeed,
        _ASKS_DATASETS: _AsksForDataSets,
        _ASKS_ACTIVATIONS: _AsksForActivations,
    }.get(name)


class _Wrapper(importlib.abc.Loader):
    """A loader that calls another one and adds something."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """The module as the other loader makes it."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module


class _AsksForDeepSpeed(_Wrapper):
    """As long as DeepSpeed is not imported, no model is its engine."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then replace its question for DeepSpeed."""
        self._loader.exec_module(module)
        _ask_if_imported(module)


def _ask_if_imported(module: ModuleType) -> None:
    module.is_deepspeed_available = _if_imported("deepspeed", module.is_deepspeed_available)  # type: ignore[attr-defined]


def _if_imported(name: str, is_installed: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: name in sys.modules and is_installed()


class _AsksForDataSets(_Wrapper):
    """As long as `datasets` is not imported, no data set is one of its own."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module while `is_datasets_available` is replaced; it keeps the replacement."""
        from transformers import utils

        with _replacing:
            is_installed = utils.is_datasets_available
            utils.is_datasets_available = _if_imported("datasets", is_installed)
            try:
                self._loader.exec_module(module)
            finally:
                utils.is_datasets_available = is_installed
        if not hasattr(module, "datasets"):
            module.datasets = _ByName("datasets")  # type: ignore[attr-defined]


class _ByName(ModuleType):
    """A module that is imported by its name at each use."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


class _AsksForActivations(_Wrapper):
    """Imports the activations only when a config that names one is checked."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module with a stand-in for the activations, unless they are imported."""
        for name in _BEFORE_ACTIVATIONS:
            importlib.import_module(name)
        stand_in = ModuleType(_ACTIVATIONS)
        stand_in.ACT2FN = _Names()  # type: ignore[attr-defined]
        is_placed = sys.modules.setdefault(_ACTIVATIONS, stand_in) is stand_in
        try:
            self._loader.exec_module(module)
        finally:
            if is_placed:
                del sys.modules[_ACTIVATIONS]


class _Names(Mapping[str, Any]):
    """The activations by name, imported when one is asked for."""

    def __getitem__(self, name: str) -> Any:
        return _activations()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_activations())

    def __len__(self) -> int:
        return len(_activations())


def _activations() -> Mapping[str, Any]:
    by_name: Mapping[str, Any] = importlib.import_module(_ACTIVATIONS).ACT2FN
    return by_name


class _CompilesLater(_Wrapper):
    """Runs a module so that its functions are compiled at their first call."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module; other threads still get torch's own `torch.compile`."""
        import torch

        with _replacing:
            compiles = torch.compile
            torch.compile = _later(compiles)
            try:
                self._loader.exec_module(module)
            finally:
                torch.compile = compiles


def _later(compiles: Callable[..., Any]) -> Callable[..., Any]:
    """A `torch.compile` that compiles at the first call, for this thread and as a decorator too."""
    here = threading.get_ident()

    def put_off(function: Any = None, **options: Any) -> Any:
        if threading.get_ident() != here:
            return compiles(function, **options)
        if function is None:
            return lambda decorated: put_off(decorated, **options)
        if not inspect.isfunction(function):
            return compiles(function, **options)

        @cache
        def compiled() -> Callable[..., Any]:
            made: Callable[..., Any] = compiles(function, **options)
            return made

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    return put_off
