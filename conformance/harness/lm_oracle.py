"""What the oracle says of logits and of caches, and how far a correct implementation may be off.

The oracle is the reference at one rank in float64, with the weights of the directory in the dtype of
the model. The limit is measured on the case: the error of the reference in a 16-bit dtype, and the
change of the result when every weight is off by a rounding step at random, which is what the
conditioning of a deep network makes of rounding.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conformance.harness.gpt_oracle import PERTURBATION, as_tensor, hashable, noise
from conformance.harness.lm_subject import LMCall
from conformance.harness.memo import remembered
from conformance.harness.tolerance import STEP_ERROR, Expectation, expect
from reference_impl.qwen2 import Qwen2, Qwen2Config, generate, load_shards
from reference_impl.qwen2.config import read_config

PERTURBED = 1
"""How many times the weights are perturbed at random."""

LOGITS = "logits"


def everything(output: Tensor) -> Tensor:
    """All of an output."""
    return output


@dataclass(frozen=True)
class Oracle:
    """One forward pass in float64, and what is needed to say how far off others may be.

    The results are ``logits`` and, for each layer, ``keys 0`` … and ``values 0`` ….
    """

    value: dict[str, Tensor]
    variant: dict[str, Tensor] | None
    """The reference's results in a 16-bit dtype; in float32 the noise says it all."""
    noise: dict[str, Tensor]
    dtype: torch.dtype

    @property
    def logits(self) -> Tensor:
        """Logits in float64."""
        return self.value[LOGITS]

    def expectation(
        self, part: Callable[[Tensor], Tensor] = everything, name: str = LOGITS
    ) -> Expectation:
        """The expectation of a part of a result."""
        variants = [] if self.variant is None else [part(self.variant[name])]
        return expect(part(self.value[name]), variants, part(self.noise[name]), self.dtype)


@functools.lru_cache(maxsize=4)  # a case asks for several oracles of one directory in turn
def models_of(call: LMCall) -> tuple[Qwen2, ...]:
    """The reference of a call's directory in its dtype, exactly in float64, and perturbed."""
    directory = call.named("directory")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the head of the file is used
        weights = load_shards(directory, dtype=call.dtype)
    config = read_config(Path(directory))
    rounds = range(PERTURBED + 1)
    return (
        Qwen2(config, weights).eval(),
        *(in_float64(config, weights, call.dtype, round) for round in rounds),
    )


def in_float64(
    config: Qwen2Config, weights: Mapping[str, Tensor], dtype: torch.dtype, round: int
) -> Qwen2:
    """The model in float64, with its weights perturbed in every round but the first."""
    exact = {name: weight.double() for name, weight in weights.items()}
    if not round:
        return Qwen2(config, exact).eval()
    for number, (name, weight) in enumerate(exact.items()):
        moved = noise(weight.numel() + 7919 * round + number)[-weight.numel() :]
        exact[name] = weight * (1 + PERTURBATION * moved.view(weight.shape))
    model = Qwen2(config, exact).eval()
    share = ANGLE_STEPS * STEP_ERROR[wide(dtype)] / STEP_ERROR[dtype]
    for block in model.blocks:
        rotate = block.attention.rotate
        block.attention.rotate = functools.partial(rotate_off, rotate, share * PERTURBATION)
    return model


ANGLE_STEPS = 0.25
"""The relative error of an angle, in steps; it is computed in float32 whatever the dtype."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that angles are computed in."""
    return torch.promote_types(dtype, torch.float32)


def rotate_off(rotate: Callable[..., Tensor], relative: float, x: Tensor, at: Tensor) -> Tensor:
    """The rotation by angles that are off at random, as far positions by more as angles round."""
    return rotate(x, at * (1 + relative * noise(at.numel()).view(at.shape)))


def results(model: Qwen2, ids: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """Logits, keys and values of a forward pass."""
    logits, cache = model(ids, **options)
    found = {LOGITS: logits}
    for layer, (k, v) in enumerate(cache.layers):
        found |= {f"keys {layer}": k, f"values {layer}": v}
    return found


def oracle(call: LMCall, ids: Tensor | None = None, **options: Any) -> Oracle:
    """The oracle of a call's directory on its ids, or on others, with ``valid`` or ``positions``."""
    ids = call.named("ids") if ids is None else ids
    kept = tuple((name, hashable(value)) for name, value in options.items())
    return _oracle(directory_of(call), hashable(ids), kept)


def directory_of(call: LMCall) -> LMCall:
    """The call without its program: what is done with a model does not change it."""
    return replace(call, steps=())


@remembered
def _oracle(call: LMCall, ids: Any, kept: tuple[tuple[str, Any], ...]) -> Oracle:
    ids, options = torch.tensor(ids), {name: as_tensor(value) for name, value in kept}
    typed, exact, *perturbed = models_of(call)
    value = results(exact, ids, options)
    rounded = call.dtype not in (torch.float32, torch.float64)
    variant = results(typed, ids, options) if rounded else None
    squares = {name: each.square() for name, each in value.items()}
    for model in perturbed:
        for name, moved in results(model, ids, options).items():
            squares[name] = squares[name] + ((moved - value[name]) / PERTURBATION).square()
    return Oracle(value, variant, {n: s.sqrt() for n, s in squares.items()}, call.dtype)


# Generation


@remembered
def _continued(call: LMCall, ids: Any, new: int, valid: Any) -> Tensor:
    exact = models_of(call)[1]
    mask = None if valid is None else torch.tensor(valid)
    return generate(exact, torch.tensor(ids), max_new_tokens=new, valid=mask, eos=())


@dataclass(frozen=True)
class Greedy:
    """What greedy decoding gives when no row ends, and how sure that is."""

    tokens: Tensor
    """[batch, new], behind the prompts."""
    gaps: Tensor
    """[batch, new] float64: by how much the token's logit exceeds the next one's."""
    error: float
    """How far a logit of a correct implementation may be off."""

    def sure(self, margin: float = 0.0) -> list[int]:
        """How many tokens of each row any correct implementation gives.

        Two logits that are nearer to each other than both may be off can change places, and with
        them all that follows. ``margin`` is asked for on top.
        """
        clear = self.gaps > 2 * self.error + margin
        return clear.cumprod(-1).sum(-1).tolist()


def greedy(
    call: LMCall, new: int, ids: Tensor | None = None, valid: Tensor | None = None
) -> Greedy:
    """Greedy decoding by the oracle, ``new`` tokens behind each prompt."""
    ids = call.named("ids") if ids is None else ids
    tokens = _continued(directory_of(call), hashable(ids), new, hashable(valid))
    seen, masks = tokens[:, :-1], {}
    if valid is not None:
        rest = torch.ones(len(ids), new - 1, dtype=torch.bool)
        masks["valid"] = torch.cat([valid, rest], dim=1)
    expectation = oracle(call, seen, **masks).expectation(lambda x: x[:, ids.shape[1] - 1 :])
    best = expectation.value.topk(2, dim=-1).values
    gaps = best[..., 0] - best[..., 1]
    return Greedy(tokens[:, ids.shape[1] :], gaps, expectation.limits.largest)
