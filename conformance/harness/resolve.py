"""From a name to the adapter that it stands for.

A name is a bundled adapter (``torch-sdpa``), ``known-bug:ID``, ``variant:ID``, ``package.module``,
``package.module:object`` or ``path/to/file.py[:object]``. Whatever is wrong with it, or with
what it names, is said in one line by :class:`CannotResolve`; nothing an adapter does in its import
(hanging, calling ``sys.exit``) gets past this module. Imports no torch of its own.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from conformance.contracts import CONTRACTS
from conformance.harness.deadline import DEFAULT_SECONDS, deadline
from conformance.harness.failures import TimedOut
from conformance.implementations import BUNDLED


class CannotResolve(ValueError):
    """A name stands for no usable adapter; the message is one line for the user."""


@dataclass(frozen=True)
class Resolved:
    """An adapter and where it came from."""

    name: str
    adapter: object
    file: str | None
    version: str | None
    lines: tuple[str, ...]
    """Lines of Python that leave the adapter in ``adapter``, without this suite where possible."""

    def import_lines(self, contract: str) -> tuple[str, ...]:
        """Lines of Python that define the contract's method under its own name."""
        if isinstance(self.adapter, ModuleType) and len(self.lines) == 1:
            return (f"from {self.adapter.__name__} import {contract}",)
        return (*self.lines, f"{contract} = adapter.{contract}")


class Planted:
    """One contract from a planted object, every other contract from the reference."""

    def __init__(self, contract: str, planted: object) -> None:
        self._contract = contract
        self._planted = planted
        self._reference = _bundled_object("reference")

    def __getattr__(self, name: str) -> object:
        """A contract's method; nothing else is passed on."""
        if name not in CONTRACTS:
            raise AttributeError(name)
        return getattr(self._planted if name == self._contract else self._reference, name)


def resolve(name: str, *, seconds: float = DEFAULT_SECONDS) -> Resolved:
    """The adapter that ``name`` stands for, checked; :class:`CannotResolve` if there is none."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    resolved = _bounded(name, lambda: _resolve(name), seconds)
    check_adapter(resolved.adapter, name)
    return resolved


def _resolve(name: str) -> Resolved:
    if name in BUNDLED:
        return _of_object(name, _bundled_object(name))
    kind, _, rest = name.partition(":")
    if kind in ("known-bug", "variant"):
        return _planted(name, kind, rest)
    place, _, attribute = _split(name)
    if place.endswith(".py"):
        module, lines = _module_from_file(Path(place))
    else:
        module, lines = _module_by_name(place, name), ()
    return _of_object(name, _object_in(module, attribute, name), lines)


def _split(name: str) -> tuple[str, str, str]:
    """``a.b:c`` in its parts; the colon of a Windows drive is not one of ours."""
    place, colon, attribute = name.rpartition(":")
    if not colon or (os.sep in attribute or "/" in attribute or "\\" in attribute):
        return name, "", ""
    return place, colon, attribute


def _bundled_object(name: str) -> object:
    module, _, attribute = BUNDLED[name].target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    return found() if inspect.isclass(found) else found


def _planted(name: str, kind: str, id: str) -> Resolved:
    if kind == "known-bug":
        from conformance.known_bugs import all_known_bugs as all_of

        getter = "from conformance.known_bugs import all_known_bugs as all_of"
    else:
        from conformance.correct_variants import all_correct_variants as all_of

        getter = "from conformance.correct_variants import all_correct_variants as all_of"
    known = all_of()
    if id not in known:
        what = "known bug" if kind == "known-bug" else "correct variant"
        raise CannotResolve(f"no {what} is called {id!r}{close(id, known)}")
    entry = known[id]
    lines = (getter, f"adapter = all_of()[{id!r}].make()")
    module = sys.modules.get(getattr(entry.make, "__module__", ""), None)
    file = getattr(module, "__file__", None)
    return Resolved(name, Planted(entry.contract, entry.make()), file, _suite_version(), lines)


def _module_from_file(path: Path) -> tuple[ModuleType, tuple[str, ...]]:
    path = path.resolve()
    if not path.is_file():
        raise CannotResolve(f"there is no file {path}")
    sys.path.insert(0, str(path.parent))  # so that it can import its neighbours
    # A file called like a module that is loaded already must not take that one's place.
    clash = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    name = f"conformance_adapter_{path.stem}" if clash else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    lines = (
        "import runpy, types",
        f"module = types.SimpleNamespace(**runpy.run_path({str(path)!r}))",
    )
    return module, lines


def _module_by_name(place: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in place.split(".")):
        raise CannotResolve(_unknown(name))
    top = place.split(".")[0]
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        found = sys.modules.get(top)
    if found is None:
        raise CannotResolve(_unknown(name))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        # Only a module that the user named is unknown; one that it imports is its own error.
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            raise CannotResolve(
                f"implementation {name!r}: no module named {error.name!r}"
            ) from None
        raise


def _unknown(name: str) -> str:
    known = ", ".join(BUNDLED)
    return (
        f"unknown implementation {name!r}{close(name, BUNDLED)}: neither a bundled adapter "
        f"({known}), "
        "known-bug:ID, variant:ID, a module that can be imported, nor a file"
    )


def _object_in(module: ModuleType, attribute: str, name: str) -> object:
    if attribute:
        found = module
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise CannotResolve(
                    f"{module.__name__} has no {attribute!r}{close(attribute, vars(module))}"
                )
            found = getattr(found, part)
        return found() if inspect.isclass(found) else found
    if any(callable(getattr(module, contract, None)) for contract in CONTRACTS):
        return module
    for well_known in ("implementation", "adapter"):
        if hasattr(module, well_known):
            found = getattr(module, well_known)
            return found() if inspect.isclass(found) or inspect.isfunction(found) else found
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__ and offered(value)
    ]
    if len(classes) > 1:
        names = ", ".join(c.__name__ for c in classes)
        raise CannotResolve(
            f"{module.__name__} has several adapters ({names}): name one, as module:object"
        )
    return classes[0]() if classes else module


def _of_object(name: str, adapter: object, lines: tuple[str, ...] = ()) -> Resolved:
    module = adapter if isinstance(adapter, ModuleType) else sys.modules.get(_module_of(adapter))
    file = getattr(module, "__file__", None)
    return Resolved(name, adapter, file, version_of(module), lines_of(adapter, name, lines))


def _module_of(adapter: object) -> str:
    own = vars(adapter).get("__module__") if hasattr(adapter, "__dict__") else None
    return own or type(adapter).__module__


def lines_of(adapter: object, name: str = "", first: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Lines of Python that leave an equal of ``adapter`` in ``adapter``."""
    if isinstance(adapter, ModuleType):
        if first:
            return (*first, "adapter = module")
        return (f"import {adapter.__name__} as adapter",)
    cls = type(adapter)
    place, colon, attribute = _split(name)
    chosen = colon and not place.startswith(("known-bug", "variant"))
    if first:
        made = f"module.{attribute}" if chosen else f"module.{cls.__qualname__}"
        call = "" if chosen and not attribute[:1].isupper() else "()"
        return (*first, f"adapter = {made}{call}")
    if chosen and attribute.isidentifier() and attribute != cls.__name__:
        return (f"from {place} import {attribute} as adapter",)
    return (
        f"from {cls.__module__} import {cls.__qualname__.split('.')[0]}",
        f"adapter = {cls.__qualname__}()",
    )


def from_fixture(adapter: object, name: str) -> Resolved:
    """What a user's own ``implementation`` fixture returned, checked."""
    check_adapter(adapter, name)
    return _of_object(name, adapter)


def version_of(module: ModuleType | None) -> str | None:
    """``__version__`` of the top package of a module, or the version of its distribution."""
    if module is None:
        return None
    top = module.__name__.split(".")[0]
    version = getattr(sys.modules.get(top), "__version__", None)
    if version is None:
        try:
            version = importlib.metadata.version(top)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            return None
    return str(version)


def _suite_version() -> str:
    from conformance import __version__

    return __version__


def offered(adapter: object) -> list[str]:
    """Names of the contracts that an adapter (or a class of adapters) offers."""
    return [name for name in CONTRACTS if callable(getattr(adapter, name, None))]


def check_adapter(adapter: object, name: str) -> None:
    """Raise :class:`CannotResolve` unless it offers a contract, each as the contract is called."""
    names = offered(adapter)
    if not names:
        what = (
            f"module {adapter.__name__}"
            if isinstance(adapter, ModuleType)
            else type(adapter).__name__
        )
        raise CannotResolve(
            f"implementation {name!r} ({what}) offers no contract: it needs at least one of "
            + ", ".join(CONTRACTS)
        )
    for contract in names:
        problem = CONTRACTS[contract].signature_problem(getattr(adapter, contract))
        if problem:
            raise CannotResolve(f"implementation {name!r}: {problem}")


def _bounded(name: str, make: Callable[[], Resolved], seconds: float) -> Resolved:
    """``make()``, with everything that an import can do turned into one line."""
    try:
        with deadline(seconds):
            return make()
    except CannotResolve:
        raise
    except TimedOut as error:
        raise CannotResolve(f"implementation {name!r}: its import was {error}") from None
    except (SystemExit, GeneratorExit) as error:
        said = f" ({error})" if str(error) else ""
        raise CannotResolve(
            f"implementation {name!r}: {type(error).__name__} while it was imported{said}"
        ) from None
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        last = f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
        where = _raised_at(error)
        raise CannotResolve(f"implementation {name!r} cannot be imported: {last}{where}") from None


def _raised_at(error: BaseException) -> str:
    """The deepest line of the traceback, as `` (file.py:12)``."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    return f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"


def close(word: str, known: Iterable[str]) -> str:
    """`` (did you mean …?)``, or nothing."""
    matches = difflib.get_close_matches(word, [str(k) for k in known], n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""
