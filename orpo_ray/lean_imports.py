"""Starts that cost less: what libraries load for themselves when imported, put off until it is used.

A process that trains imports some five thousand modules. A third of them serve torch's compiler,
which bitsandbytes starts for functions of its own, DeepSpeed, which accelerate asks whether a model
is its own, and pandas, which comes with `datasets`: most runs call none of them. Nothing is left
out: what is put off is loaded by the first use.
"""

import gc
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import LazyLoader
from types import ModuleType
from typing import Any

_NAMED_ONLY = "datasets"
"""transformers' Trainer imports it to ask of data sets whether they are its own."""
_COMPILES = "bitsandbytes.backends."
_ASKS_DEEPSPEED = "accelerate.utils.other"
"""Imports DeepSpeed, which runs a compiler meanwhile, to ask whether a model is its engine."""


def install() -> None:
    """Put off from now on; of what is imported already nothing changes."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


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
        """The module as it lies on disk, or None for all that is not put off."""
        wrapper = _wrapper_for(fullname)
        if wrapper is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = wrapper(spec.loader)
        return spec


def _wrapper_for(name: str) -> type[importlib.abc.Loader] | None:
    if name.startswith(_COMPILES):
        return _CompilesLater
    return {_NAMED_ONLY: LazyLoader, _ASKS_DEEPSPEED: _AsksWhatIsLoaded}.get(name)


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


class _AsksWhatIsLoaded(_Wrapper):
    """Where DeepSpeed is not loaded yet, no model is wrapped in its engine."""

    def exec_module(self, module: ModuleType) -> None:
        """Run it, then have it look before it asks."""
        self._loader.exec_module(module)
        is_installed = module.is_deepspeed_available
        module.is_deepspeed_available = lambda: "deepspeed" in sys.modules and is_installed()


class _CompilesLater(_Wrapper):
    """Runs a module whose `torch.compile` compiles, and loads the compiler, at the first call."""

    def exec_module(self, module: ModuleType) -> None:
        """Run it; nobody else sees the other `torch.compile`."""
        import torch

        compiles = torch.compile
        torch.compile = _later(compiles)
        try:
            self._loader.exec_module(module)
        finally:
            torch.compile = compiles


def _later(compiles: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile`, as a function and as a decorator with options, for functions called later."""

    def put_off(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return lambda decorated: put_off(decorated, **options)

        @cache
        def compiled() -> Callable[..., Any]:
            return compiles(function, **options)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    return put_off
