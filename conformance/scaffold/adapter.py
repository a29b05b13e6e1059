"""The skeleton of an adapter: the contracts' own signatures, with nothing behind them.

It is generated from :mod:`conformance.contracts`, so that it cannot drift from them. It imports nothing
of the suite when it runs, and every function in it declines until it is filled in.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from conformance.contracts import CONTRACTS, Contract

MODULE = "conformance_adapter"
"""Name of the module that is written."""

CONTRACTS_PACKAGE = "conformance.contracts"

LINE_LENGTH = 88
"""What formatters keep lines to."""

HEAD = '''"""What the conformance suite calls. Each function is to call this repository's own code.

- Take the options out of a signature that your code does not have: a case that needs one is then
  declined, and counted. An option that is named and then ignored fails.
- ``raise NotImplementedError("why")`` declines one case: a dtype, a width, a backward pass.
- Take out functions that you do not offer.

    python -m pytest --pyargs conformance --impl {module} --smoke   # is it wired right?
    python -m pytest --pyargs conformance --impl {module} -n 2      # everything
"""

from __future__ import annotations
'''


def skeleton(names: Iterable[str]) -> str:
    """The source of an adapter of the contracts ``names``, each a function that declines."""
    contracts = [CONTRACTS[name] for name in names]
    imports = "\n".join(_import_lines(contracts))
    functions = "\n\n\n".join(_function(contract) for contract in contracts)
    return f"{HEAD.format(module=MODULE)}\n{imports}\n\n\n{functions}\n"


def _function(contract: Contract) -> str:
    """The contract's method as a function, docstring and all."""
    method = getattr(contract.protocol, contract.name)
    source = textwrap.dedent(inspect.getsource(method)).rstrip()
    # Text and not ast.unparse, which would lose the lines of signature and docstring.
    for taken, left in (("    self,\n", ""), ("(self, ", "("), ("(self)", "()")):
        if taken in source:
            source = source.replace(taken, left, 1)
            break
    why = f'"{contract.name}: call your code here"'
    return f"{source}\n    raise NotImplementedError({why})"


def _import_lines(contracts: list[Contract]) -> list[str]:
    """The imports that the annotations need; those of torch and the suite are for type checkers."""
    plain: dict[str, set[str]] = {}
    checked: dict[str, set[str]] = {}
    for contract in contracts:
        module = importlib.import_module(contract.protocol.__module__)
        origins = _origins(Path(module.__file__).read_text("utf-8"))
        for name in sorted(_annotation_names(contract)):
            origin = origins.get(name)
            if origin is None:
                continue  # a builtin
            standard = origin.split(".")[0] in ("typing", "collections")
            (plain if standard else checked).setdefault(origin, set()).add(name)
    lines = _written(plain)
    if checked:
        lines = _written({**plain, "typing": {*plain.get("typing", ()), "TYPE_CHECKING"}})
        block = "\n".join(_written(checked))
        lines += ["", "if TYPE_CHECKING:", textwrap.indent(block, "    ")]
    return lines


def _written(imports: dict[str, set[str]]) -> list[str]:
    whole = [f"import {origin}" for origin, names in sorted(imports.items()) if origin in names]
    taken = ((origin, _in_order(names - {origin})) for origin, names in sorted(imports.items()))
    return whole + [_from_line(origin, names) for origin, names in taken if names]


def _from_line(origin: str, names: list[str]) -> str:
    line = f"from {origin} import {', '.join(names)}"
    if len(line) + 4 <= LINE_LENGTH:
        return line
    return f"from {origin} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def _in_order(names: set[str]) -> list[str]:
    """As formatters sort the names of an import: constants before classes."""
    return sorted(names, key=lambda name: (not name.isupper(), name))


def _annotation_names(contract: Contract) -> Iterator[str]:
    """Every name in the annotations of the contract's method."""
    annotations = getattr(contract.protocol, contract.name).__annotations__
    for annotation in annotations.values():
        for node in ast.walk(ast.parse(annotation, mode="eval")):
            if isinstance(node, ast.Name):
                yield node.id


def _origins(source: str) -> dict[str, str]:
    """Where each name of a contracts' module is to be imported from."""
    found: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name: node.module for alias in node.names}
    classes = (node.name for node in tree.body if isinstance(node, ast.ClassDef))
    return found | dict.fromkeys(classes, CONTRACTS_PACKAGE)
