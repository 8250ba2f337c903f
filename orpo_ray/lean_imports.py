"""Starts that cost less: what libraries load for themselves when imported, put off until it is
used.

A process that trains imports some five thousand modules. A third of them serve torch's compiler,
which bitsandbytes starts for functions of its own, DeepSpeed, which accelerate asks whether a model
is its own, and pandas, which comes with `datasets`: most runs call none of them. Nothing is left
out: what is put off is loaded by the first use. Who reads a tokenizer or a config of transformers
does not load its model code, either.
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
_ASKS_DEEPSPEED = "accelerate.utils.other"
"""Imports DeepSpeed, which runs a compiler meanwhile, to ask whether a model is its engine."""
_ASKS_DATASETS = "transformers.trainer"
"""Imports `datasets` to ask of data sets whether they are its own."""

_ASKS_ACTIVATIONS = "transformers.utils.type_validators"
_ACTIVATIONS = "transformers.activations"
"""Imported by every model's config for its list of names; it imports all that models compute with.
"""
_BEFORE_ACTIVATIONS = ("torch", "transformers.tokenization_utils_base", "transformers.video_utils")
"""What a config's checks import, too: it meets no stand-in, and nor does another thread meanwhile.
"""

_replacing = threading.RLock()
"""Held while a function of a library is another one: two threads would put back each other's."""


def install() -> None:
    """Put off from now on; of what is imported already little changes."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    if _ASKS_DEEPSPEED in sys.modules:
        _look_first(sys.modules[_ASKS_DEEPSPEED])


@contextmanager
def without_collections() -> Iterator[None]:
    """Import without garbage collections, which look through all modules again and again.

    They are a fifth of the time of a large import, and find nothing: modules stay.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what Python finds, with a loader around it that waits."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module as it lies on disk, or None for all that puts nothing off."""
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
    """A loader that does what another one does, and more."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As Python does."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module


class _AsksForDeepSpeed(_Wrapper):
    """Where DeepSpeed is not loaded yet, no model is wrapped in its engine."""

    def exec_module(self, module: ModuleType) -> None:
        """Run it, then have it look before it asks."""
        self._loader.exec_module(module)
        _look_first(module)


def _look_first(module: ModuleType) -> None:
    module.is_deepspeed_available = _if_loaded("deepspeed", module.is_deepspeed_available)  # type: ignore[attr-defined]


def _if_loaded(name: str, is_installed: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: name in sys.modules and is_installed()


class _AsksForDataSets(_Wrapper):
    """Where `datasets` is not loaded yet, no data set is one of its."""

    def exec_module(self, module: ModuleType) -> None:
        """Run it with a question that looks first, which it keeps."""
        from transformers import utils

        with _replacing:
            is_installed = utils.is_datasets_available
            utils.is_datasets_available = _if_loaded("datasets", is_installed)
            try:
                self._loader.exec_module(module)
            finally:
                utils.is_datasets_available = is_installed
        if not hasattr(module, "datasets"):
            module.datasets = _ByName("datasets")  # type: ignore[attr-defined]


class _ByName(ModuleType):
    """A module that is looked up each time, by its name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


class _AsksForActivations(_Wrapper):
    """Looks activations up when a config names one that is to be checked."""

    def exec_module(self, module: ModuleType) -> None:
        """Run it while a stand-in has the place of the activations, unless they are there."""
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
    """The activations by name, loaded when they are looked at."""

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
    """Runs a module whose `torch.compile` compiles, and loads the compiler, at the first call."""

    def exec_module(self, module: ModuleType) -> None:
        """Run it; other threads have torch's own `torch.compile`."""
        import torch

        with _replacing:
            compiles = torch.compile
            torch.compile = _later(compiles)
            try:
                self._loader.exec_module(module)
            finally:
                torch.compile = compiles


def _later(compiles: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for functions that this thread calls later, also as a decorator."""
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
