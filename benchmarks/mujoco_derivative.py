"""What does the derivative of MuJoCo's step cost here, beside MuJoCo's own finite differences?

Half-cheetah, B = 64 states with contacts: the Jacobians of the next state by state and control, from `blackbox` around
one `mujoco.rollout` call, on one thread and on two, and from a loop of ``mujoco.mjd_transitionFD`` over the rows, in
turn in one process. All take central differences. Then the largest difference of both, for a random cotangent.

    python benchmarks/mujoco_derivative.py     # needs pip install 'ignite-tbptt[mujoco]'
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import figure

from ignite_tbptt.blackbox import AbsoluteStep, CentralDifference, blackbox

STEP = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="of timings, in turn")
    parser.add_argument("--rows", type=int, default=64)
    given = parser.parse_args()
    import gymnasium
    import mujoco
    from mujoco.rollout import Rollout

    assets = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
    model = mujoco.MjModel.from_xml_path(str(assets / "half_cheetah.xml"))
    # the solver iterates to the end, so that both start from no guess and get the same accelerations
    model.opt.tolerance, model.opt.iterations = 0, 50
    nq, nv, nu = model.nq, model.nv, model.nu

    def simulator(threads: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        pool, data = Rollout(nthread=threads), [mujoco.MjData(model) for _ in range(threads)]

        def simulate(state: np.ndarray, control: np.ndarray) -> np.ndarray:
            start = np.concatenate([np.zeros((len(state), 1)), state], 1)
            states, _ = pool.rollout(model, data, start, control[:, None, :], nstep=1)
            return states[:, -1, 1:]

        return simulate

    simulators = {threads: simulator(threads) for threads in (1, 2)}
    generator = np.random.default_rng(0)
    states = np.zeros((given.rows, nq + nv))
    controls = generator.uniform(-1, 1, (given.rows, nu))
    for _ in range(30):  # until it has come down on its feet
        states = simulators[1](states + 1e-3 * generator.normal(size=states.shape), controls)
    cotangents = generator.normal(size=states.shape)
    estimator = CentralDifference(step_size=AbsoluteStep(STEP))
    boxes = {threads: blackbox(f, numpy=True, in_dims=0, estimator=estimator) for threads, f in simulators.items()}

    def ours(f: Any) -> tuple[np.ndarray, np.ndarray]:
        x, u = (torch.from_numpy(part).requires_grad_() for part in (states, controls))
        f(x, u).backward(torch.from_numpy(cotangents))
        assert x.grad is not None
        assert u.grad is not None
        return x.grad.numpy(), u.grad.numpy()

    own = mujoco.MjData(model)
    a, b = np.zeros((2 * nv, 2 * nv)), np.zeros((2 * nv, nu))

    def native() -> tuple[np.ndarray, np.ndarray]:
        found = np.zeros_like(states), np.zeros_like(controls)
        for row in range(given.rows):
            mujoco.mj_resetData(model, own)
            own.qpos[:], own.qvel[:], own.ctrl[:] = states[row, :nq], states[row, nq:], controls[row]
            mujoco.mj_forward(model, own)
            mujoco.mjd_transitionFD(model, own, STEP, True, a, b, None, None)
            found[0][row], found[1][row] = cotangents[row] @ a, cotangents[row] @ b
        return found

    mine, theirs = ours(boxes[2]), native()
    apart = max(float(np.abs(m - t).max()) for m, t in zip(mine, theirs, strict=True))
    size = max(float(np.abs(t).max()) for t in theirs)
    figure(f"half-cheetah: largest difference of both gradients, of {size:.3g}", apart)
    runs: dict[str, Callable[[], Any]] = {
        "loop of mjd_transitionFD": native,
        **{f"blackbox on {n} thread{'s' * (n > 1)}": functools.partial(ours, f) for n, f in boxes.items()},
    }
    for f in boxes.values():
        for _ in range(3):  # the first gradients verify
            ours(f)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(given.pairs):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    peer = times["loop of mjd_transitionFD"]
    for name, spent in times.items():
        figure(f"half-cheetah, {given.rows} rows: {name}", 1e3 * statistics.median(spent), "ms")
        if spent is not peer:
            ratio = statistics.median(m / t for m, t in zip(spent, peer, strict=True))
            figure(f"half-cheetah, {given.rows} rows: {name} over mjd_transitionFD", ratio, "x")


if __name__ == "__main__":
    main()
