"""What SGLang's CUDA-only kernel package is to a server on a CPU: importable, and in torch where CPU code
calls it.

The published wheel fails at import without libcuda, and SGLang imports it before plugins load, so this
package stands first on the path of the servers that the testbed launches. Every name resolves; one without an
implementation raises when it is called, naming itself. The kernels that gated delta nets and small mixtures
of experts need are in `_torch_kernels`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__version__ = "0.4.10"  # what SGLang 0.5.23 asks for at least


class Missing:
    """A kernel that has no CPU form here."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{self._name} has no CPU form in the testbed's stand-in for sgl_kernel")


def missing_names(module: str) -> Callable[[str], Missing]:
    """A module's `__getattr__` under which every public name is a Missing kernel."""

    def resolve(name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{module}.{name}")

    return resolve


class _MissingModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every submodule that isn't on disk; appended, so those on disk win."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith("sgl_kernel."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = missing_names(spec.name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(_MissingModules())
__getattr__ = missing_names("sgl_kernel")

# Not `from sgl_kernel import`: every name already resolves, to a Missing one.
importlib.import_module("sgl_kernel._torch_kernels").register()
