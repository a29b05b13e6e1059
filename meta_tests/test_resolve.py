"""Names stand for adapters, and whatever is wrong with a name is said in one line."""

import io
import itertools
import signal
import sys

import pytest
from command_line import ROOT

from conformance.contracts import CONTRACTS
from conformance.harness.resolve import CannotResolve, close, from_fixture, resolve

FAKES = f"{ROOT / 'meta_tests' / 'fakes.py'}"

_numbers = itertools.count()

METHOD = "def attention(q, k, v, *, causal=False): return q\n"
CLASS = "class {name}:\n    def attention(self, q, k, v): return {name}\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a module that can be imported; gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"adapter_under_test_{next(_numbers)}"

    def write(text):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    sys.modules.pop(name, None)


def refused(name, seconds=20.0):
    with pytest.raises(CannotResolve) as raised:
        resolve(name, seconds=seconds)
    message = str(raised.value)
    assert "\n" not in message, message
    return message


def test_bundled_name():
    found = resolve("reference")
    assert type(found.adapter).__name__ == "Reference"
    assert found.import_lines("attention") == (
        "from conformance.implementations.reference import Reference",
        "adapter = Reference()",
        "attention = adapter.attention",
    )


@pytest.mark.parametrize("kind", ["known-bug", "variant"])
def test_planted_objects_give_one_contract_and_the_reference_the_others(kind):
    from conformance.correct_variants import all_correct_variants
    from conformance.known_bugs import all_known_bugs

    planted = next(
        iter((all_known_bugs() if kind == "known-bug" else all_correct_variants()).values())
    )
    adapter = resolve(f"{kind}:{planted.id}").adapter
    for contract in CONTRACTS:
        method = getattr(adapter, contract)
        is_reference = type(getattr(method, "__self__", None)).__name__ == "Reference"
        assert is_reference == (contract != planted.contract)


def test_reproduction_lines_of_a_planted_bug_run():
    from conformance.known_bugs import all_known_bugs

    bug = next(iter(all_known_bugs().values()))
    found = resolve(f"known-bug:{bug.id}")
    namespace = {}
    exec("\n".join(found.import_lines(bug.contract)), namespace)
    assert callable(namespace[bug.contract])


def test_a_module_with_contract_functions_is_the_adapter(package):
    name = package(METHOD + "class Other:\n    def attention(self, q, k, v): pass\n")
    found = resolve(name)
    assert found.adapter is sys.modules[name]
    assert found.import_lines("attention") == (f"from {name} import attention",)


@pytest.mark.parametrize("well_known", ["implementation", "adapter"])
def test_a_module_names_its_adapter(package, well_known):
    text = CLASS.format(name="A") + CLASS.format(name="B") + f"{well_known} = B()\n"
    assert type(resolve(package(text)).adapter).__name__ == "B"


def test_the_only_class_is_the_adapter(package):
    text = "from decimal import Decimal\nclass Helper: pass\n" + CLASS.format(name="Only")
    name = package(text)
    found = resolve(name)
    assert type(found.adapter).__name__ == "Only"
    namespace = {}
    exec("\n".join(found.import_lines("attention")), namespace)
    assert namespace["attention"](1, 2, 3) is type(found.adapter)


def test_an_object_is_named(package):
    name = package(CLASS.format(name="A") + CLASS.format(name="B") + "made = A()\n")
    assert type(resolve(f"{name}:B").adapter).__name__ == "B"
    found = resolve(f"{name}:made")
    assert found.adapter is sys.modules[name].made
    assert found.import_lines("attention")[0] == f"from {name} import made as adapter"


def test_a_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour.py").write_text("x = 1\n")
    # Called like a module of the standard library, whose place it must not take.
    file = tmp_path / "queue.py"
    file.write_text("import neighbour\n" + METHOD + CLASS.format(name="Named"))
    import queue

    assert resolve(str(file)).adapter.attention(1, 2, 3) == 1
    assert type(resolve(f"{file}:Named").adapter).__name__ == "Named"
    assert sys.modules["queue"] is queue
    namespace = {}
    exec("\n".join(resolve(f"{file}:Named").import_lines("attention")), namespace)
    assert namespace["attention"](1, 2, 3).__name__ == "Named"


def test_close_names_are_offered():
    assert "did you mean reference" in refused("refrence")
    assert "no known bug is called 'attn-gqa-tile'" in refused("known-bug:attn-gqa-tile")
    assert "did you mean attn-gqa" in refused("known-bug:attn-gqa-tile-not-interleaved")
    assert close("zzz", ["abc"]) == ""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module_anywhere", "unknown implementation"),
        ("not a name", "unknown implementation"),
        ("", "unknown implementation"),
        ("conformance.no_such_module", "no module named 'conformance.no_such_module'"),
        ("no/such/file.py", "there is no file"),
        ("variant:nope", "no correct variant is called 'nope'"),
        (f"{FAKES}:Nope", "has no 'Nope'"),
        (f"{FAKES}:OffersNothing", "offers no contract"),
        (f"{FAKES}:WrongSignature", "takes too few positional arguments"),
        (f"{FAKES}:RequiresMore", "requires 'rotary'"),
        (FAKES, "has several adapters"),
    ],
)
def test_mistakes(name, says):
    assert says in refused(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "import no_such_dependency\n",
            "ModuleNotFoundError: No module named 'no_such_dependency'",
        ),
        ("def broken(:\n", "SyntaxError"),
        ("raise RuntimeError('first line\\nlast line')\n", "RuntimeError: last line"),
        ("class A:\n    def __init__(self, size): pass\n    attention = print\n", "TypeError: "),
        ("import sys; sys.exit(0)\n", "SystemExit while it was imported"),
        ("import sys; sys.exit('no GPU here')\n", "no GPU here"),
        ("x = 1\n", "offers no contract"),
    ],
)
def test_imports_that_fail(package, text, says):
    assert says in refused(package(text))


def test_an_import_that_hangs(package):
    name = package("import time\ntime.sleep(3600)\n")
    assert "its import was not finished after 0.3 s" in refused(name, seconds=0.3)


def test_what_a_fixture_returns_is_checked():
    with pytest.raises(CannotResolve, match="offers no contract"):
        from_fixture(object(), "fixture")
    assert from_fixture(resolve("reference").adapter, "fixture").file.endswith("reference.py")


def test_a_deadline_needs_no_stderr_that_is_a_file(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert resolve("reference").name == "reference"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
