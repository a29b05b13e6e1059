"""Hypothesis settings of the suite: ``gate`` (default), ``explore``, ``nightly`` and ``smoke``.

They apply to requirements alone, and leave the settings of other tests in the same run as they are.
Any other profile that is asked for by name (``--hypothesis-profile``) is used as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import InvalidArgument
from hypothesis.internal.cache import LRUCache
from hypothesis.internal.conjecture import providers

_COMMON = {
    "deadline": None,  # requirements have a deadline of their own; first calls compile
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "report_multiple_bugs": False,
}

# Said of every profile: where the variable CI is set, Hypothesis draws the same cases each time
# unless told otherwise, and a nightly run would look at nothing new.
PROFILES = {
    "gate": settings(max_examples=12, derandomize=True, database=None, **_COMMON),
    "smoke": settings(max_examples=2, derandomize=True, database=None, **_COMMON),
    "explore": settings(max_examples=100, derandomize=False, **_COMMON),
    "nightly": settings(max_examples=500, derandomize=False, print_blob=True, **_COMMON),
}

# A failure is found as with the gate, and not made smaller: for planted bugs and known failures.
_WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)

_active = PROFILES["gate"]
_seed: int | None = None


def register() -> None:
    """Make the profiles known to Hypothesis by name, for ``--hypothesis-profile``.

    A profile that the user registered under the same name stays, for the user's own tests.
    """
    for name, profile in PROFILES.items():
        try:
            settings.get_profile(name)
        except InvalidArgument:
            settings.register_profile(name, profile)


def activate(name: str, *, seed: object = None) -> None:
    """Use a profile for every requirement from now on; a seed makes it random but repeatable."""
    global _active
    _active = PROFILES[name] if name in PROFILES else settings.get_profile(name)
    if seed is not None:
        _active = settings(_active, derandomize=False, database=None)


def active() -> settings:
    """The settings that requirements run with."""
    return _active


def seed() -> int | None:
    """The seed that cases are drawn with; None leaves it to the settings."""
    return _seed


@contextmanager
def temporarily(profile: settings, *, seed: int | None = None):
    """Use other settings, and a seed, for a while."""
    global _active, _seed
    before, (_active, _seed) = (_active, _seed), (profile, seed)
    try:
        yield
    finally:
        _active, _seed = before


def without_shrinking(profile: settings) -> settings:
    """The same settings, stopping at the first failing case."""
    return settings(profile, phases=_WITHOUT_SHRINKING)


@contextmanager
def without_local_constants() -> Iterator[None]:
    """Draw cases that do not depend on which other modules happen to be loaded.

    Hypothesis mixes constants from the source of every local module into what it draws, so that a
    derandomized run would draw other cases in another repository, or after a change of unrelated
    code. There is no setting for it; where its internals have changed, nothing is done here.
    """
    names = ("_get_local_constants", "CONSTANTS_CACHE")
    before = {name: getattr(providers, name) for name in names if hasattr(providers, name)}
    if len(before) < len(names):
        yield
        return
    providers._get_local_constants = lambda: _NO_CONSTANTS
    providers.CONSTANTS_CACHE = _ALLOWED_CONSTANTS
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(providers, name, value)


_NO_CONSTANTS = providers.Constants() if hasattr(providers, "Constants") else None
_ALLOWED_CONSTANTS = LRUCache(1024)
