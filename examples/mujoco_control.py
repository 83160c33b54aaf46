"""Control through a physics engine
================================

Train a recurrent controller through the physics engine that it drives: a double pendulum on a cart, upright.

MuJoCo computes each step of the motion in C; autograd cannot see through it. `blackbox` gives it a gradient by central
differences, the rows of a batch and all moved points in one `mujoco.rollout` call on two threads. The TBPTT trainer
carries the state of the physics and that of the controller from chunk to chunk, in chunks that grow from half a second
to two, and a handler sets those upright again that have fallen. In three minutes the poles stay up; the cart
is asked to follow a target as well, which takes longer to learn.

The pictures show the loss, the motion before and after, and how long controllers keep the poles up that are random,
untrained and trained.

.. image:: /images/mujoco_control_rendered.png
   :alt: Control through a physics engine

.. image:: /images/mujoco_control.png
   :alt: Control through a physics engine
"""

# sphinx_gallery_thumbnail_path = "images/mujoco_control_rendered.png"

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import PiecewiseLinear
from torch import Tensor, nn

from ignite_tbptt import Tbptt_Events, create_supervised_tbptt_trainer, reset_hidden
from ignite_tbptt.blackbox import blackbox

STEPS, BATCH, EPOCHS = 200, 16, 12  # 0.02 s a step
CHUNKS = 25, 50, 100
FALLEN = 0.6  # radians


class Physics:
    """Steps of MuJoCo for a batch of states: (rows, 6) positions and velocities, (rows, 1) controls."""

    def __init__(self, threads: int = 2) -> None:
        import gymnasium
        import mujoco
        from mujoco.rollout import Rollout

        assets = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
        self.model = mujoco.MjModel.from_xml_path(str(assets / "inverted_double_pendulum.xml"))
        self._data = [mujoco.MjData(self.model) for _ in range(threads)]
        self._rollout = Rollout(nthread=threads)

    def __call__(self, state: np.ndarray, control: np.ndarray) -> np.ndarray:
        """The state after two time steps of 0.01 s."""
        start = np.concatenate([np.zeros((len(state), 1)), state], 1)  # the first entry is the time
        states, _ = self._rollout.rollout(self.model, self._data, start, control[:, None, :], nstep=2)
        return states[:, -1, 1:]


class Controller(nn.Module):
    """A GRU that sees the state and a target for the cart, and the physics that it drives."""

    def __init__(self, physics: Physics, size: int = 32) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, size)
        self.out = nn.Linear(size + 8, 1)
        self.physics = physics.model
        self.step = blackbox(physics, numpy=True, in_dims=0)

    def forward(self, targets: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(steps, rows, 1) targets -> (steps, rows, 6) states."""
        memory, state = hidden
        states = []
        for target in targets:
            seen = observed(state, target)
            memory = self.cell(seen, memory)
            state = self.step(state, torch.tanh(self.out(torch.cat([memory, seen], 1))))
            states.append(state)
        return torch.stack(states), (memory, state)


def observed(state: Tensor, target: Tensor) -> Tensor:
    """What a controller sees, (rows, 8), in numbers of about 1."""
    position, velocity = state[:, :3], state[:, 3:] / state.new_tensor([1.0, 4.0, 4.0])
    return torch.cat([position * state.new_tensor([1.0, 3.0, 3.0]), velocity, target, target - state[:, :1]], 1)


def has_fallen(states: Tensor) -> Tensor:
    """(..., 6) states -> (...), whether one of the poles leans too far."""
    return (states[..., 1].abs() > FALLEN) | ((states[..., 1] + states[..., 2]).abs() > FALLEN)


def cost(states: Tensor, targets: Tensor) -> Tensor:
    """How far the cart is from its target, the poles from upright, and how fast all are; a constant after a fall."""
    first, second = states[..., 1], states[..., 1] + states[..., 2]
    upright = (1 - first.cos()) + (1 - second.cos())
    each = (states[..., 0] - targets[..., 0]) ** 2 + 3 * upright + 0.001 * (states[..., 3:] ** 2).sum(-1)
    return torch.where(has_fallen(states.detach()).cumsum(0) > 1, 3.0, each).mean()


def jumps(steps: int, rows: int, generator: torch.Generator) -> Tensor:
    """(steps, rows, 1) places for the cart, another one every second."""
    levels = 0.4 * torch.rand(math.ceil(steps / 50), rows, 1, generator=generator) - 0.2
    return levels.repeat_interleave(50, 0)[:steps]


def batches(count: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Targets, which are seen and asked for."""
    found = []
    for _ in range(count):
        targets = jumps(STEPS, BATCH, generator)
        found.append((targets, targets))
    return found


def start(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A controller without memories, and poles that are nearly upright."""
    return torch.zeros(rows, size), 0.05 * torch.randn(rows, 6, generator=generator)


def train(model: Controller, generator: torch.Generator, epochs: int, count: int) -> list[float]:
    """Losses of all chunks, which grow: long ones are of use once the poles stay up."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    trainer = create_supervised_tbptt_trainer(
        model, optimizer, cost, CHUNKS[0], initial_hidden=lambda x: start(x.shape[1], model.cell.hidden_size, generator)
    )
    half, all_of_it = epochs * count // 2, epochs * count
    schedule = PiecewiseLinear(optimizer, "lr", [(half, 3e-3), (all_of_it, 1e-4)])
    trainer.add_event_handler(Events.ITERATION_STARTED, schedule)
    losses: list[float] = []

    @trainer.on(Events.EPOCH_STARTED)
    def grow(engine: Engine) -> None:
        state: Any = engine.state
        state.tbtt_step = CHUNKS[(state.epoch - 1) * len(CHUNKS) // epochs]

    @trainer.on(Tbptt_Events.TIME_ITERATION_STARTED)
    def set_upright(engine: Engine) -> None:
        state: Any = engine.state
        if state.hidden is not None:
            physics = state.hidden[1]
            fallen = has_fallen(physics) | (physics[:, 0].abs() > 0.95)
            state.hidden = reset_hidden(state.hidden, fallen, dim=0)

    @trainer.on(Tbptt_Events.BACKWARD_COMPLETED)
    def clip(engine: Engine) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    @trainer.on(Tbptt_Events.TIME_ITERATION_COMPLETED)
    def keep(engine: Engine) -> None:
        state: Any = engine.state
        losses.append(float(state.output))

    trainer.run(batches(count, generator), max_epochs=epochs)
    return losses


@torch.no_grad()
def drive(
    model: Controller, control: Callable[[Tensor], Tensor] | None, rows: int, steps: int
) -> tuple[Tensor, Tensor]:
    """(steps, rows, 6) states and (steps, rows, 1) targets, under the model or another control."""
    generator = torch.Generator().manual_seed(1)
    targets = jumps(steps, rows, generator)
    memory, state = start(rows, model.cell.hidden_size, generator)
    if control is None:
        return model(targets, (memory, state))[0], targets
    states = []
    for _ in range(steps):
        state = model.step(state, control(state))
        states.append(state)
    return torch.stack(states), targets


def seconds_upright(states: Tensor) -> float:
    """Until the poles have fallen, in the mean over rows."""
    before = (has_fallen(states).cumsum(0) == 0).sum(0)
    return 0.02 * float(before.double().mean())


def main(arguments: Sequence[str] = ()) -> None:
    """Train, compare, draw."""
    parser = argparse.ArgumentParser(description="Train a recurrent controller through MuJoCo.")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the pictures")
    parser.add_argument("--quick", action="store_true", help="a few seconds, which show nothing but that it runs")
    given = parser.parse_args(arguments)
    for package, extra in (("matplotlib", "plot"), ("mujoco", "mujoco"), ("gymnasium", "mujoco")):
        if importlib.util.find_spec(package) is None:
            parser.exit(2, f"this example needs {package}: pip install 'ignite-tbptt[plot,mujoco]', {extra} for it\n")
    given.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Controller(Physics())
    steps = 20 if given.quick else 250
    before, _ = drive(model, None, 32, steps)
    random, _ = drive(model, lambda state: torch.rand(len(state), 1, generator=generator) * 2 - 1, 32, steps)
    begun = time.perf_counter()
    losses = train(model, generator, 3 if given.quick else EPOCHS, 1 if given.quick else 10)
    spent = time.perf_counter() - begun
    after, targets = drive(model, None, 32, steps)
    compared = {"random": random, "untrained": before, "trained": after}
    print(f"trained for {spent:.0f} s: {len(losses)} chunks, {model.step.nfev:,} evaluations for gradients")
    for name, states in compared.items():
        print(f"{name:10} upright for {seconds_upright(states):5.2f} s of {0.02 * steps:.1f}")
    late = states[steps // 2 :, :, 0] - targets[steps // 2 :, :, 0]
    print(f"distance of the cart from its target in the second half: {float(late.abs().mean()):.3f}")
    path = given.output / "mujoco_control.png"
    draw(losses, compared, targets, path)
    print(f"drawn: {path}")
    render(model.physics, {"before": before, "after": after}, given.output / "mujoco_control_rendered.png")


def draw(losses: list[float], compared: dict[str, Tensor], targets: Tensor, path: Path) -> None:
    """The loss, the motion before and after, and the time upright."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    width = max(1, len(losses) // 100)
    smooth = [sum(losses[k : k + width]) / width for k in range(0, len(losses) - width + 1, width)]
    first.semilogy([width * k for k in range(len(smooth))], smooth, color="tab:blue")
    first.set(title="Loss", xlabel="chunk, of 0.5 to 2 s")
    for axes, name in ((second, "untrained"), (third, "trained")):
        states = compared[name][:, 0]
        for k in range(0, len(states), 5):
            x, one, two = states[k, 0], states[k, 1], states[k, 1] + states[k, 2]
            joints = torch.stack([x, x + 0.6 * one.sin(), x + 0.6 * one.sin() + 0.6 * two.sin()])
            heights = torch.stack([0 * x, 0.6 * one.cos(), 0.6 * one.cos() + 0.6 * two.cos()])
            axes.plot(joints + 0.012 * k, heights, color="tab:blue", alpha=0.25 + 0.75 * k / len(states), linewidth=1)
        axes.plot(
            targets[:, 0, 0] + 0.012 * torch.arange(len(targets)),
            0 * targets[:, 0, 0] - 0.1,
            "k:",
            label="target of the cart",
        )
        axes.set(title=f"{name}: every 0.1 s, further right", ylim=(-1.4, 1.4), aspect="equal")
        axes.legend(frameon=False, loc="lower right")
    names = list(compared)
    fourth.bar(names, [seconds_upright(compared[name]) for name in names], color=["tab:gray", "tab:red", "tab:blue"])
    fourth.set(title=f"Seconds upright, of {0.02 * len(targets):.1f}, mean of {targets.shape[1]}")
    first.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def render(model: Any, motions: dict[str, Tensor], path: Path) -> None:
    """A strip of rendered pictures, where OpenGL can draw without a screen."""
    import mujoco
    from matplotlib.figure import Figure

    try:
        renderer = mujoco.Renderer(model, 160, 240)
    except Exception as error:  # of every kind, by what is missing: EGL, a driver, a display
        print(f"not rendered: {error}; MUJOCO_GL=egl or MUJOCO_GL=osmesa chooses what draws without a screen")
        return
    data, camera = mujoco.MjData(model), mujoco.MjvCamera()
    camera.lookat[:], camera.distance, camera.azimuth, camera.elevation = (0, 0, 0.3), 3.0, 90, -10
    figure = Figure(figsize=(12, 2.7), layout="constrained")
    for row, (name, states) in zip(figure.subplots(2, 8), motions.items(), strict=True):
        for axes, k in zip(row, range(0, len(states), max(1, len(states) // 8)), strict=False):
            data.qpos[:], data.qvel[:] = states[k, 0, :3].numpy(), 0
            mujoco.mj_forward(model, data)
            renderer.update_scene(data, camera)
            axes.imshow(renderer.render())
            axes.set_title(f"{name}, {0.02 * k:.1f} s", fontsize="small")
            axes.axis("off")
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
