"""The house keeps its rules: who imports whom, what a requirement says, what has a docstring."""

import ast
import importlib
import inspect
import re
import subprocess
import sys

import pytest
from command_line import ROOT

from conformance.contracts import CONTRACTS
from conformance.harness.requirement import all_requirements
from conformance.implementations.reference import Reference

SOURCES = sorted(
    path
    for folder in ("conformance", "reference_impl", "fixtures", "meta_tests")
    for path in (ROOT / folder).rglob("*.py")
)
OURS = [
    path for path in SOURCES if path.parts[len(ROOT.parts)] in ("conformance", "reference_impl")
]
REQUIREMENTS = all_requirements()


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.relative_to(ROOT).as_posix())


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, anywhere=True):
    """The modules that a file imports, with the names taken from them; or only at module level.

    What is imported for annotations alone, under TYPE_CHECKING, is not imported.
    """
    tree = ast.parse(path.read_text())
    found = set()

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path.name} has a relative import"
                found.add(child.module)
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            elif anywhere and is_import_module(child):
                found.add(ast.unparse(child.args[0]).strip("f'\""))
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if anywhere or not inside:
                visit(child)

    visit(tree)
    return found


def is_import_module(node):
    """Whether a node is a call of import_module with the name of a module."""
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("import_module")
        and isinstance(node.args[0], (ast.Constant, ast.JoinedStr))
    )


def imports_package(path, package, **options):
    return sorted(
        name
        for name in imports(path, **options)
        if name == package or name.startswith(f"{package}.")
    )


# Import directions


@named([path for path in OURS if path.parts[len(ROOT.parts)] == "reference_impl"])
def test_reference_never_imports_the_suite(path):
    for package in ("conformance", "meta_tests", "pytest", "hypothesis"):
        assert not imports_package(path, package)


WHEN_NEEDED = {
    # Other formats than safetensors are transformers' to read, and only when one is met.
    "reference_impl/hf_directory.py",
    # The model around compressed experts is transformers' own, and so is the oracle of its function.
    "reference_impl/shared_core/model.py",
    "reference_impl/shared_core/trained_model.py",
    "conformance/harness/compressed_oracle.py",
    "conformance/harness/compressed_saved.py",
}
"""Files that import transformers inside functions."""

ABOUT_TRANSFORMERS = {"reference_impl/shared_core/distillation_trainer.py"}
"""Files that extend a class of transformers, and are imported inside functions."""


@named([path for path in OURS if "implementations" not in path.parts])
def test_transformers_is_imported_by_adapters_alone(path):
    if path.relative_to(ROOT).as_posix() in ABOUT_TRANSFORMERS:
        return
    if path.relative_to(ROOT).as_posix() in WHEN_NEEDED:
        assert not any(name.startswith("transformers") for name in imports(path, anywhere=False))
        return
    assert not imports_package(path, "transformers")


@named(OURS)
def test_nothing_that_is_installed_imports_the_meta_tests(path):
    for package in ("meta_tests", "mutants", "fakes", "command_line"):
        assert not imports_package(path, package)


@named([path for path in OURS if not path.name.startswith("test_")])
def test_requirements_are_not_imported_at_module_level(path):
    found = imports(path, anywhere=False)
    assert not {name for name in found if name.startswith("conformance.test_")}


@named([path for path in OURS if path.parent.name in ("known_bugs", "correct_variants")])
def test_planted_implementations_know_the_reference_alone(path):
    found = {name for name in imports(path) if name.startswith("conformance")}
    allowed = ("conformance.known_bugs", "conformance.correct_variants")
    assert not {name for name in found if not name.startswith(allowed)}


@named(
    [
        path
        for path in OURS
        if path.parent.name == "implementations"
        and path.name not in ("__init__.py", "reference.py")
    ]
)
def test_adapters_do_not_reach_into_the_harness(path):
    for package in (
        "conformance.harness",
        "conformance.known_bugs",
        "conformance.correct_variants",
    ):
        assert not imports_package(path, package)


def loads(module):
    """The names of all modules that importing this one loads, in a process of its own."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("conformance", {"torch", "transformers", "hypothesis", "pytest"}),
        ("conformance.contracts", {"torch", "transformers", "hypothesis", "pytest"}),
        ("conformance.implementations", {"torch", "transformers"}),
        ("conformance.plugin", {"transformers"}),
        ("conformance.harness.kill_matrix", {"transformers"}),
        (
            "reference_impl.cached_attention",
            {"conformance", "transformers", "hypothesis", "pytest"},
        ),
    ],
)
def test_imports_stay_light(module, heavy):
    assert not loads(module) & heavy


# Requirements


@pytest.mark.parametrize("slug", REQUIREMENTS)
def test_requirement_says_what_it_checks(slug):
    record = REQUIREMENTS[slug]
    assert record.slug == slug
    assert re.fullmatch(r"[a-z_]+\.[a-z0-9-]+\.[a-z0-9-]+", slug), "not contract.topic.rule"
    assert slug.split(".")[0] == record.contract
    assert record.contract in CONTRACTS
    assert record.level in ("core", "extended")
    assert record.source.strip(), "no source"
    assert record.rule.endswith("."), "the rule is not a sentence"
    assert not re.search(r"\bshould\b", record.rule, re.IGNORECASE), (
        "a rule states, it does not wish"
    )
    function = inspect.unwrap(record.test)
    assert function.__module__ == f"conformance.test_{record.contract}"
    assert function.__name__.startswith("test_")
    assert record.contract in inspect.signature(function).parameters


def test_rules_and_slugs_are_unique():
    by_file = {}
    for record in REQUIREMENTS.values():
        function = inspect.unwrap(record.test)
        by_file.setdefault((function.__module__, function.__name__), []).append(record.slug)
    assert not {name: slugs for name, slugs in by_file.items() if len(slugs) > 1}
    written = [
        slug
        for path in (ROOT / "conformance").glob("test_*.py")
        for slug in re.findall(r'@requirement\(\s*"([^"]+)"', path.read_text())
    ]
    assert sorted(written) == sorted(REQUIREMENTS), "a slug is used twice, or a file is not read"


@named(sorted((ROOT / "conformance").glob("test_*.py")))
def test_every_test_of_a_contract_is_a_requirement(path):
    module = importlib.import_module(module_name(path))
    tests = [v for n, v in vars(module).items() if n.startswith("test_") and callable(v)]
    assert tests
    assert all(hasattr(test, "requirement") for test in tests)
    assert len(tests) == len(re.findall(r"^def test_", path.read_text(), re.MULTILINE))


def test_every_contract_has_core_or_extended_requirements_and_a_smoke_test():
    for contract in CONTRACTS:
        records = [r for r in REQUIREMENTS.values() if r.contract == contract]
        assert records, f"{contract} has no requirement"
        assert any(r.smoke for r in records), f"{contract} has no requirement for --smoke"


def test_set_of_requirements_is_the_one_on_file():
    file = ROOT / "fixtures" / "requirements.txt"
    again = "write it anew: python fixtures/regenerate.py"
    assert file.exists(), f"{file.name} is missing; {again}"
    on_file = file.read_text().splitlines()
    lost, new = set(on_file) - set(REQUIREMENTS), set(REQUIREMENTS) - set(on_file)
    assert not lost, f"lost: {sorted(lost)}; if that is meant, {again}"
    assert not new, f"not on file: {sorted(new)}; {again}"
    assert on_file == sorted(REQUIREMENTS), f"not sorted, or a line twice; {again}"


# Contracts


@pytest.mark.parametrize("name", CONTRACTS)
def test_reference_offers_every_contract_with_every_option(name):
    contract, method = CONTRACTS[name], getattr(Reference(), name)
    assert contract.signature_problem(method) is None
    parameters = inspect.signature(method).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        assert set(contract.defaults) <= set(parameters)
        for option, default in contract.defaults.items():
            assert parameters[option].default == default


def test_parts_of_the_reference_do_not_override_each_other():
    """The reference inherits from a class a contract: a step of one must not be a step of another."""
    seen = {}
    for base in Reference.__mro__[1:-1]:
        for name, value in vars(base).items():
            if name.startswith("__"):
                continue
            owner, other = seen.setdefault(name, (base, value))
            assert issubclass(owner, base) or other is value, (
                f"{name} of {owner.__name__} takes the place of that of {base.__name__}"
            )


@pytest.mark.parametrize("name", CONTRACTS)
def test_contract_documents_every_option(name):
    text = inspect.getdoc(getattr(CONTRACTS[name].protocol, name))
    for option in CONTRACTS[name].defaults:
        assert f"``{option}``" in text or name == "rotary_module", f"{option} is not explained"


# Modules


@named(SOURCES)
def test_source_compiles_and_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    compile(tree, str(path), "exec")
    assert ast.get_docstring(tree), f"{path.name} has no docstring"


LIGHT = [
    path for path in OURS if "implementations" not in path.parts and path.name != "__main__.py"
]


@named(LIGHT)
def test_module_imports(path):
    importlib.import_module(module_name(path))


@named([p for p in OURS if p.parent.name not in ("known_bugs", "correct_variants")])
def test_public_names_have_docstrings(path):
    bare = []

    def visit(node, owner, plain):
        for child in node.body:
            if not isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                continue
            if child.name.startswith("_"):
                continue
            if not ast.get_docstring(child) and not (owner and not plain):
                bare.append(f"{owner}{child.name}")
            if isinstance(child, ast.ClassDef):
                visit(child, f"{child.name}.", not child.bases)

    visit(ast.parse(path.read_text()), "", True)
    assert not bare, f"no docstring: {bare}"


@named([p for p in OURS if p.parent.name in ("known_bugs", "correct_variants")])
def test_planted_classes_say_what_they_are(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.decorator_list:
            assert ast.get_docstring(node), f"{node.name} has no docstring"
