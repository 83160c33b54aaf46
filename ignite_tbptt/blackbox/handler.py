"""The Ignite handler that swaps finite-difference gradients into an unchanged model while an engine runs.

The idea: a run opens with bindings on the chosen modules (`module.bind`) and closes without them. Where no module is
chosen, the first forward that builds a graph is watched with `cuts.find_graph_cuts`, and the innermost modules
that cut it are bound before that same forward goes on. Pairs with any engine: Ignite's supervised trainer, a TBPTT
trainer, a process function of one's own.
"""

from __future__ import annotations

import difflib
import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.engine.events import RemovableEventHandle
from ignite.utils import setup_logger
from torch import nn

from ignite_tbptt.blackbox.certificate import Certificate
from ignite_tbptt.blackbox.compiled_code import outside_compiled_code
from ignite_tbptt.blackbox.cut_report import GraphCutReport
from ignite_tbptt.blackbox.cuts import find_graph_cuts, is_compiled, unwrapped
from ignite_tbptt.blackbox.estimator import Estimator
from ignite_tbptt.blackbox.executors import Pool
from ignite_tbptt.blackbox.module import Binding, bind, bindings_of
from ignite_tbptt.blackbox.options import Certify, make_options
from ignite_tbptt.blackbox.step_size import require_positive
from ignite_tbptt.blackbox.task import EvaluationCount, Executor

__all__ = ["FiniteDifferenceGradients", "ModuleChoice"]

# The handlers of each engine, which share its state.
_ATTACHED: weakref.WeakKeyDictionary[Engine, list[FiniteDifferenceGradients]] = weakref.WeakKeyDictionary()

ModuleChoice = str | type[nn.Module] | nn.Module


class FiniteDifferenceGradients:
    """Gives modules that cut the autograd graph gradients by finite differences, during an engine's run.

    Example::

        handler = FiniteDifferenceGradients(model, modules=["cell.actuator"])
        with handler.attach(trainer):
            trainer.run(loader, max_epochs=5)
        print(handler.nfev, handler.seconds)

    The model stays the same object with the same modules, parameters and state_dict keys; only hooks come when the run
    starts and go when it is completed. A run that ends in an exception leaves them in place, unless it is inside the
    ``with``, or until `detach`.

    From the first iteration on ``engine.state`` has ``nfev``, ``seconds`` (inside the modules) and ``wall_seconds``
    (all that gradients have cost), and of the present run ``evaluations_per_second`` (while gradients are taken) and
    ``gradient_share`` (of the time since it started), which Ignite's loggers read as ``state_attributes``.

    With ``modules=None`` the first forward of the model with gradients enabled is preceded by one that is watched (see
    `find_graph_cuts`): the modules in which values leave torch are bound, and a log line says which. A ``detach()`` or
    ``no_grad()`` that stays in torch is left as it is, since it may be meant. So are modules that only round or take
    signs: a difference over a jump means nothing before someone has chosen its step. The log names both.

    The chosen modules run by themselves, so they take what the model gives them. What takes one row of a batch goes
    into the model as ``Blackbox(module_or_fn, in_dims=0, vectorized=False)``.

    Args:
        model: the model, bare or wrapped in DistributedDataParallel, DataParallel or ``torch.compile``.
        modules: names as in ``model.named_modules()`` (of the model inside its wrapper), module classes, or modules
            themselves, one or several; None to find them. A module inside another chosen one is covered by it.
        estimator: how gradients are estimated; central differences by default, "auto" as in `blackbox`.
        executor: where the evaluations run, as in `blackbox`.
        in_dims: the batch axis of each positional argument of the chosen modules whose rows are independent, as in
            `blackbox`: a column of rows then costs no more than one element. Modules that differ in this need a handler
            each.
        out_dims: the batch axis of their outputs, where in_dims is given.
        repeatable: False for modules that are noisy by nature, as in `blackbox`.
        progress: show a bar of evaluations where a gradient takes longer than 2 s, as in `blackbox`.
        certify: estimate the error of some gradients, as in `blackbox`; of each module in `certificates`, and the
            largest on ``engine.state.gradient_error``. See `withhold_steps`.
        evaluator: the old name of `executor`.

    Attributes:
        counts: evaluations and seconds for each bound module, by name, over all runs.
        report: what `find_graph_cuts` found, None before the first forward or where modules were given.

    Raises:
        TypeError: model is not a module; an entry of modules is none of the three.
        ValueError: a name, class or module that is not in the model; an empty choice.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: ModuleChoice | Iterable[ModuleChoice] | None = None,
        *,
        estimator: Estimator | Literal["auto"] | None = None,
        executor: Executor | Pool | None = None,
        in_dims: Any = None,
        out_dims: int | Sequence[int | None] | None = 0,
        repeatable: bool = True,
        progress: bool = False,
        certify: int | Certify | None = None,
        evaluator: Executor | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise TypeError(f"model must be a torch.nn.Module, got {kind}; for a function use blackbox(fn)")
        self._wrapped = model
        self._model: nn.Module = unwrapped(model)
        self._chosen = None if modules is None else _chosen(self._model, modules)
        self._options: dict[str, Any] = {
            "estimator": estimator,
            "executor": executor,
            "in_dims": in_dims,
            "out_dims": out_dims,
            "repeatable": repeatable,
            "progress": progress,
            "certify": certify,
        }
        make_options(**self._options, evaluator=evaluator)
        self._options["executor"] = evaluator if executor is None else executor
        self.counts: dict[str, EvaluationCount] = {}
        self.report: GraphCutReport | None = None
        self.logger = setup_logger(__name__ + "." + self.__class__.__name__)
        self._removals: list[Callable[[], None]] = []
        self._bindings: dict[str, Binding] = {}
        self._states: dict[str, Any] = {}
        self._certificates: dict[str, Certificate] = {}
        self._withholding: list[RemovableEventHandle] = []
        self._attached: dict[int, tuple[Engine, list[Any]]] = {}
        self._running: set[int] = set()
        self._began: dict[int, tuple[float, int, float]] = {}

    @property
    def nfev(self) -> int:
        """Evaluations of modules spent on gradients, over all modules and runs."""
        return sum(count.nfev for count in self.counts.values())

    @property
    def seconds(self) -> float:
        """Time spent in those evaluations."""
        return sum(count.seconds for count in self.counts.values())

    @property
    def wall_seconds(self) -> float:
        """All that gradients have cost, what the evaluations are prepared and contracted with included."""
        return sum(count.wall_seconds for count in self.counts.values())

    def state_dict(self) -> dict[str, Any]:
        """What the random directions of the next gradients depend on, by module: for a checkpoint."""
        return {**self._states, **{name: binding.state_dict() for name, binding in self._bindings.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the directions where the state was taken, now or when the run starts.

        Raises:
            ValueError: it is of other modules than those that were chosen.
        """
        known = None if self._chosen is None else sorted(map(self._told, self._chosen))
        unknown = [] if known is None else sorted(set(state_dict) - set(known))
        if unknown:
            raise ValueError(
                f"state_dict has modules {unknown} that are not among the chosen {known}: give the state of a handler "
                "with the same modules"
            )
        self._states = dict(state_dict)
        for name, binding in self._bindings.items():
            if name in self._states:
                binding.load_state_dict(self._states[name])

    @property
    def certificates(self) -> dict[str, Certificate]:
        """How far off the last gradient of each module was that was certified, by name."""
        self._certificates.update(
            {name: binding.certificates[-1] for name, binding in self._bindings.items() if binding.certificates}
        )
        return dict(self._certificates)

    def withhold_steps(
        self, engine: Engine, event: Any, optimizer: torch.optim.Optimizer, above: float
    ) -> RemovableEventHandle:
        """Leave an optimizer step out where a certificate since the last event says that a gradient is too far off.

        At the event, which comes between backward and step, the gradients are set to None, those included that were
        accumulated before, so that the optimizer passes over its parameters: on all ranks, where one rank says so. Not
        with a GradScaler, which refuses a step without gradients. `detach` takes this back.

        Example::

            handler = FiniteDifferenceGradients(model, certify=1)
            handler.withhold_steps(trainer, Tbptt_Events.BACKWARD_COMPLETED, optimizer, above=0.3)

        Args:
            engine: whose event it is.
            event: `Tbptt_Events.BACKWARD_COMPLETED` in a TBPTT trainer.
            optimizer: whose step is withheld.
            above: the relative error above which it is, see `Certificate`.

        Returns:
            A handle to take this back.

        Raises:
            ValueError: nothing is certified, or `above` is not positive and finite.
        """
        if self._options["certify"] is None:
            raise ValueError("nothing is certified: give FiniteDifferenceGradients(..., certify=1), or 10")
        require_positive("above", above, "give the relative error of a gradient that is too large, 0.3 say")
        seen = self.certificates

        def withhold(_: Engine) -> None:
            wrong = [
                (name, made)
                for name, binding in self._bindings.items()
                for made in _since(binding.certificates, seen.get(name))
                if not made.relative <= above
            ]
            seen.update(self.certificates)
            if (idist.get_world_size() > 1 and idist.all_reduce(float(bool(wrong)), "MAX")) or wrong:
                optimizer.zero_grad(set_to_none=True)
                for name, made in wrong[:1]:
                    self.logger.warning("step withheld: %s, %s; the limit is %.2g", name, made, above)

        handle = engine.add_event_handler(event, withhold)
        self._withholding.append(handle)
        return handle

    def attach(self, engine: Engine) -> FiniteDifferenceGradients:
        """Swap gradients in whenever this engine runs; a second attach to the same engine changes nothing.

        Returns:
            The handler, to be used as ``with handler.attach(engine): engine.run(...)``.
        """
        if id(engine) not in self._attached:
            handles = [
                engine.add_event_handler(Events.STARTED, self._start),
                engine.add_event_handler(Events.ITERATION_COMPLETED, self._tell),
                engine.add_event_handler(Events.COMPLETED, self._complete),
                # terminate(skip_completed=True) fires this alone
                engine.add_event_handler(Events.TERMINATE, self._complete),
            ]
            self._attached[id(engine)] = (engine, handles)
            _ATTACHED.setdefault(engine, []).append(self)
        return self

    def detach(self) -> None:
        """Take the gradients out, and leave every engine."""
        for engine, handles in self._attached.values():
            _ATTACHED[engine].remove(self)
            for handle in handles:
                handle.remove()
        for handle in self._withholding:
            handle.remove()
        self._withholding.clear()
        self._attached.clear()
        self._running.clear()
        self._began.clear()
        self._remove()

    def __enter__(self) -> FiniteDifferenceGradients:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _start(self, engine: Engine) -> None:
        # A run that was interrupted or that raised starts again with its bindings in place.
        self._running.add(id(engine))
        self._began[id(engine)] = time.perf_counter(), self.nfev, self.wall_seconds
        if self._removals:
            return
        self._forget_compiled_code()
        if self._chosen is None:
            self._removals = [_FirstForward(self._model, self._discover).remove]
        else:
            self._bind(self._chosen)

    def _tell(self, engine: Engine) -> None:
        """Put what gradients have cost on the state, for loggers; of several handlers the sum."""
        for name in ("nfev", "seconds", "wall_seconds"):
            setattr(engine.state, name, sum(getattr(handler, name) for handler in _ATTACHED[engine]))
        state: Any = engine.state
        errors = [made.relative for handler in _ATTACHED[engine] for made in handler.certificates.values()]
        if errors:
            state.gradient_error = max(errors)
        begun = [
            (handler, *handler._began[id(engine)]) for handler in _ATTACHED[engine] if id(engine) in handler._began
        ]
        if begun:
            nfev = sum(handler.nfev - before for handler, _, before, _ in begun)
            spent = sum(handler.wall_seconds - before for handler, _, _, before in begun)
            state.evaluations_per_second = nfev / spent if spent else 0.0
            state.gradient_share = spent / (time.perf_counter() - begun[0][1])

    def _complete(self, engine: Engine) -> None:
        if id(engine) not in self._running:
            return
        self._running.remove(id(engine))
        if not self._running:
            self._remove()
            for name, count in self.counts.items():
                self.logger.info(
                    "%s: %d evaluations for %d gradients, %d more to verify and to measure, in %d calls: %.3f s inside "
                    "of %.3f s%s",
                    name,
                    count.nfev,
                    count.gradients,
                    count.probes,
                    count.calls + count.probes,
                    count.seconds,
                    count.wall_seconds,
                    f"; {count.hint}" if count.hint else "",
                )

    def _forget_compiled_code(self) -> None:
        # What torch.compile made of a module does not look at hooks that come or go later.
        if is_compiled(self._wrapped):
            torch.compiler.reset()

    def _remove(self) -> None:
        if not self._removals:
            return
        self._states, self._certificates = self.state_dict(), self.certificates
        self._bindings = {}
        for remove in self._removals:
            remove()
        self._removals = []
        self._forget_compiled_code()

    def _bind(self, paths: list[str]) -> None:
        for path in paths:
            # by its path, since the module there may be another than in the run before
            module = self._model.get_submodule(path)
            name = self._told(path)
            count = self.counts.setdefault(name, EvaluationCount())
            self._removals.append(bind(module, name=name, count=count, **self._options))
            self._bindings[name] = bindings_of(module)[0]
            if name in self._states:
                self._bindings[name].load_state_dict(self._states[name])

    def _told(self, path: str) -> str:
        return path or type(self._model).__name__

    def _discover(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.report = find_graph_cuts(self._model, *args, **kwargs)
        self._chosen = _outermost(self.report.to_bind)
        self._remove()
        self._bind(self._chosen)
        if not self.report:
            self.logger.warning("%s: %s; nothing to do", self._told(""), self.report)
            return
        bound = ", ".join(
            f"{self._told(path)} ({_size(self._model.get_submodule(path))} parameter values)" for path in self._chosen
        )
        told = self.logger.info if bound else self.logger.warning
        told("finite differences for %s\n%s", bound or "no module", self.report)


def _since(certificates: Sequence[Certificate], last: Certificate | None) -> Iterator[Certificate]:
    """Those of all calls after one that was seen before."""
    return itertools.takewhile(lambda made: made is not last, reversed(certificates))


class _FirstForward:
    """A hook before the model's forward that looks for cuts once, when a graph is to be built."""

    def __init__(self, model: nn.Module, discover: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        self._model: nn.Module | None = model
        self._discover = discover
        self._busy = False
        self.remove = model.register_forward_pre_hook(self.before, with_kwargs=True).remove

    def __deepcopy__(self, memo: dict[int, Any]) -> _FirstForward:
        return self

    def __getstate__(self) -> dict[str, Any]:
        # in another process there is no handler to tell
        return {"_model": None, "_busy": False}

    @outside_compiled_code
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Look for cuts; the forward that follows runs with what was bound because of them."""
        if self._busy or module is not self._model or not torch.is_grad_enabled():
            return None
        known = bindings_of(module)
        self._busy = True
        try:
            self._discover(args, kwargs)
        finally:
            self._busy = False
        # A binding that is put on the model itself now is too late to be called before this forward.
        new = [binding for binding in bindings_of(module) if binding not in known]
        return new[0].begin(module, args, kwargs) if new else None


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _chosen(model: nn.Module, modules: ModuleChoice | Iterable[ModuleChoice]) -> list[str]:
    if not isinstance(modules, (str, type, nn.Module, Iterable)):
        raise TypeError(f"modules must be names, classes or modules, got {modules!r}; None has the cuts found")
    choices = [modules] if isinstance(modules, (str, type, nn.Module)) else list(modules)
    if not choices:
        raise ValueError("modules is empty: name at least one module, or pass None to have the cuts found")
    return _outermost(dict.fromkeys(path for choice in choices for path in _matching(model, choice)))


def _matching(model: nn.Module, choice: ModuleChoice) -> list[str]:
    named = dict(model.named_modules())
    if isinstance(choice, str):
        # a module that is used in two places may be called by either name
        by_any_name = dict(model.named_modules(remove_duplicate=False))
        if choice not in by_any_name:
            near = difflib.get_close_matches(choice, by_any_name, n=3, cutoff=0.4) or [n for n in named if n][:10]
            instead = f"the nearest names are {near}" if near else "it has no modules inside; pass the model itself"
            raise ValueError(f"modules: there is no module {choice!r} in {type(model).__name__}; {instead}")
        return [name for name, module in named.items() if module is by_any_name[choice]]
    if isinstance(choice, type):
        matching = [name for name, module in named.items() if isinstance(module, choice)]
        kinds = sorted({type(module).__name__ for module in named.values()})
        if not matching:
            raise ValueError(f"modules: no {choice.__name__} in {type(model).__name__}; it is made of {kinds}")
        return matching
    if isinstance(choice, nn.Module):
        matching = [name for name, module in named.items() if module is choice]
        if not matching:
            raise ValueError(
                f"modules: this {type(choice).__name__} is not part of {type(model).__name__} (a copy of one of its "
                "modules is not the module); name it as in model.named_modules()"
            )
        return matching
    raise TypeError(
        f"modules: expected names, module classes or modules, got {choice!r} of type {type(choice).__name__}"
    )


def _outermost(paths: Iterable[str]) -> list[str]:
    """Without those inside another: the outer one's evaluations run through them."""
    paths = list(paths)

    def inside(path: str, other: str) -> bool:
        return path != other and (other == "" or path.startswith(other + "."))

    return [path for path in paths if not any(inside(path, other) for other in paths)]
