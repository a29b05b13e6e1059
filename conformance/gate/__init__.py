"""The regression gate: is the head slower than the base? Paired, interleaved, with a stated error rate.

``command``     ``python -m conformance gate``, and ``settings`` of the pyproject.toml
``sides``       adapters, or git revisions in worktrees
``worker``      a process that holds one side; ``workers`` starts and asks it
``measuring``   process pairs that are timed by turns, and ``sm_clock`` of a GPU
``samples``     what is measured: logarithms of ratios, by process pair and round
``statistics``  the Hodges–Lehmann estimate and its exact bounds
``rule``        what the gate can say, and the numbers that it is held to
``evidence``    what one stage of measurement says; ``judgement`` takes both stages together
``decide``      the course of a run: screen, more pairs, confirmation
``metrics``     deterministic metrics, compared exactly
``rows``        what is said of each benchmark; ``result`` of all, and ``output`` writes it down
"""
