"""Known failures are strict: whatever is not as the ledger says is red."""

import datetime
import tomllib

import pytest
from command_line import ONE, ROOT, start, suite_run

from conformance.harness.ledger import (
    Entry,
    LedgerError,
    bundled_entries,
    parse_entries,
    select,
    settle,
)
from conformance.harness.settings import SettingsError, read_settings, required_slugs

TODAY = datetime.date(2030, 6, 1)
SLUGS = ("attention.a.one", "attention.a.two", "rotary.theta.base")
GOOD = {
    "requirement": "attention.a.one",
    "reason": "kernel ignores it",
    "issue": "https://example.org/1",
    "expires": TODAY,
}


def parsed(**changes):
    table = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
    return parse_entries([table], "pyproject.toml", "tool.conformance.known_failures")[0]


def test_a_whole_entry():
    entry = parsed(kind="wrong values", looks_like="bug", implementation="mine")
    assert (entry.requirement, entry.expires, entry.looks_like) == (SLUGS[0], TODAY, "bug")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reason": None}, "key 'reason' is missing"),
        ({"issue": None}, "key 'issue' is missing"),
        ({"expires": None}, "key 'expires' is missing"),
        ({"requirement": None}, "key 'requirement' is missing"),
        ({"reason": " "}, "key 'reason' is empty"),
        ({"look_like": "x"}, "unknown key 'look_like' (did you mean looks_like?)"),
        ({"expires": "2030-06-01"}, "key 'expires' must be a date"),
        ({"expires": datetime.datetime(2030, 6, 1)}, "key 'expires' must be a date"),
        ({"kind": 3}, "key 'kind' must be a string"),
    ],
)
def test_mistakes_in_an_entry(changes, says):
    with pytest.raises(LedgerError) as raised:
        parsed(**changes)
    message = str(raised.value)
    assert says in message
    assert message.startswith("pyproject.toml: tool.conformance.known_failures entry 1")
    assert "\n" not in message


def test_entries_must_be_tables():
    with pytest.raises(LedgerError, match="array of tables"):
        parse_entries({"requirement": "x"}, "f", "k")
    with pytest.raises(LedgerError, match="not a table"):
        parse_entries(["x"], "f", "k")


def chosen(*entries, implementation="mine", bugs=("bug-a",)):
    return select(entries, implementation, SLUGS, lambda: bugs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"requirement": "attention.a.on"}, "did you mean attention.a.one"),
        ({"looks_like": "bug-b"}, "no planted bug 'bug-b' (did you mean bug-a?)"),
        ({"requirement": "nothing.like.it", "implementation": "other"}, "there is no requirement"),
    ],
)
def test_entries_that_name_nothing(changes, says):
    with pytest.raises(LedgerError) as raised:
        chosen(parsed(**changes))
    assert says in str(raised.value)


@pytest.mark.parametrize("second", [None, "mine"])
def test_duplicates(second):
    with pytest.raises(LedgerError, match="repeats"):
        chosen(parsed(), parsed(implementation=second))


def test_entries_of_another_implementation_are_left_alone():
    assert chosen(parsed(implementation="other")) == {}
    both = chosen(parsed(implementation="other"), parsed(implementation="mine"))
    assert both["attention.a.one"].implementation == "mine"


@pytest.mark.parametrize(
    ("entry", "outcome", "kind", "settled", "says"),
    [
        ({}, "fail", "wrong values", "known_failure", "kernel ignores it"),
        ({}, "pass", None, "ledger_mismatch", "known failure passes"),
        ({}, "not_offered", None, "ledger_mismatch", "is not offered"),
        ({}, "declined", None, "ledger_mismatch", "is declined"),
        ({}, "error", None, "error", ""),
        ({}, "inconclusive", None, "inconclusive", ""),
        ({"kind": "non-finite"}, "fail", "non-finite", "known_failure", ""),
        ({"kind": "non-finite"}, "fail", "wrong values", "ledger_mismatch", "expects non-finite"),
        ({"expires": TODAY - datetime.timedelta(1)}, "fail", "x", "ledger_mismatch", "expired"),
        ({"looks_like": "same"}, "fail", "wrong values", "known_failure", ""),
        ({"looks_like": "same"}, "fail", "non-finite", "ledger_mismatch", "fails differently"),
        ({"looks_like": "harmless"}, "fail", "x", "ledger_mismatch", "harmless passes"),
    ],
)
def test_settling(entry, outcome, kind, settled, says):
    found, reason = settle(
        parsed(**entry),
        outcome,
        kind,
        today=TODAY,
        kind_of_bug={"same": "wrong values", "harmless": None}.get,
    )
    assert found == settled
    assert says in reason


def test_bundled_ledger_is_usable(tmp_path):
    assert all(isinstance(entry, Entry) for entry in bundled_entries())
    file = tmp_path / "known_failures.toml"
    file.write_text(
        '[[known_failures]]\nrequirement = "attention.a.one"\nreason = "r"\nissue = "i"\n'
        "expires = 2030-06-01\n"
    )
    with pytest.raises(LedgerError, match="'implementation' is missing"):
        bundled_entries(file)
    file.write_text("known_failure = 1")
    with pytest.raises(LedgerError, match="unknown key 'known_failure'"):
        bundled_entries(file)
    file.write_text("[")
    with pytest.raises(LedgerError, match=r"known_failures\.toml"):
        bundled_entries(file)


def settings(tmp_path, text):
    (tmp_path / "pyproject.toml").write_text(text)
    return read_settings(tmp_path)


def test_settings(tmp_path):
    assert read_settings(tmp_path).require == ()
    found = settings(tmp_path, '[tool.conformance]\nimplementation = "x"\nrequire = ["rotary"]\n')
    assert (found.implementation, found.require) == ("x", ("rotary",))
    assert settings(tmp_path, "[tool.other]\nx = 1\n").implementation is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('requires = ["x"]', "unknown key 'requires' (did you mean require?)"),
        ('require = "x"', "require must be a list of strings"),
        ("implementation = 3", "implementation must be a string"),
        ("implementation = ", "pyproject.toml: "),
        ("known_failures = 3", "known_failures must be an array of tables"),
    ],
)
def test_mistakes_in_settings(tmp_path, text, says):
    with pytest.raises(SettingsError) as raised:
        settings(tmp_path, f"[tool.conformance]\n{text}\n")
    assert says in str(raised.value)


def test_required_slugs():
    assert required_slugs(["rotary"], SLUGS) == ("rotary.theta.base",)
    assert required_slugs(["attention.a.*", "attention.a.one"], SLUGS) == SLUGS[:2]
    with pytest.raises(SettingsError, match="did you mean attention"):
        required_slugs(["atention"], SLUGS)
    with pytest.raises(SettingsError, match="matches no requirement"):
        required_slugs(["attention.b.*"], SLUGS)


# Through the command line. ReturnsZeros fails as the known bug of the ledger does, or not.

FAKES = ROOT / "meta_tests" / "fakes.py"


def entry(requirement=ONE, **more):
    keys = {
        "requirement": requirement,
        "reason": "written in a hurry",
        "issue": "https://example.org/1",
        **more,
    }
    lines = "".join(f'{key} = "{value}"\n' for key, value in keys.items())
    return f"[[tool.conformance.known_failures]]\n{lines}expires = 2999-01-01\n"


def _aligned_bug():
    """A planted bug that breaks the requirement of these runs."""
    from conformance.known_bugs import all_known_bugs

    return next(bug.id for bug in all_known_bugs().values() if bug.breaks == ONE)


LEDGERS = {
    "as described": lambda: (f"known-bug:{_aligned_bug()}", entry(looks_like=_aligned_bug())),
    "passes": lambda: ("reference", entry()),
    "fails differently": lambda: (f"{FAKES}:CallsExit", entry(looks_like=_aligned_bug())),
    "unknown slug": lambda: ("reference", entry("attention.causal.aligned-to-first-key")),
}


@pytest.fixture
def ledger_run(tmp_path_factory, request):
    def run(name):
        implementation, text = LEDGERS[name]()
        folder = tmp_path_factory.mktemp("ledger")
        return suite_run(folder, "--impl", implementation, files={"pyproject.toml": text})

    if any(item.name.startswith("test_run") for item in request.session.items):
        for name in LEDGERS:
            start(("ledger", name), lambda name=name: run(name))
    return lambda name: start(("ledger", name), lambda: run(name)).result()


def test_run_with_a_known_failure(ledger_run):
    run = ledger_run("as described")
    assert run.status == 0, run.text
    assert run.verdict.startswith("partial: "), run.text
    assert "1 known failure" in run.verdict, run.text
    assert "1 xfailed" in run.out, run.text
    (record,) = run.report().records
    assert record["outcome"] == "known_failure"
    assert record["ledger"]["looks_like"]
    assert record["drawn"] <= 12, "it was shrunk"


def test_run_with_a_known_failure_that_passes(ledger_run):
    run = ledger_run("passes")
    assert run.status == 1, run.text
    assert "known failure passes: remove its entry (pyproject.toml" in run.out, run.text


def test_run_with_a_known_failure_that_fails_differently(ledger_run):
    run = ledger_run("fails differently")
    assert run.status == 1, run.text
    assert "fails differently: raised SystemExit, while" in run.out, run.text


def test_run_with_an_entry_that_matches_nothing(ledger_run):
    run = ledger_run("unknown slug")
    assert run.status == 4, run.text
    assert "aligned-to-first-key' (did you mean" in run.err, run.text
    assert tomllib.loads(entry())  # the example itself is well formed
