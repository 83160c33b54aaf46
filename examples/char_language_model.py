"""A language model of characters
==============================

On the documentation of Python itself, trained by truncated back-propagation.

The text is `pydoc_data.topics`, 465,000 characters of English that come with every Python: nothing is downloaded. Nine
tenths of it are laid out as rows that go on from batch to batch, and a recurrent network learns to tell the next
character; the last tenth is held out. What it has learned is measured in bits per character there, beside the entropy
of the single characters and zlib. It prints a table and a sample of text, and draws output/char_language_model.png.

::

    python examples/char_language_model.py                       # about a minute
    python examples/char_language_model.py --cell gru --epochs 4
    python examples/char_language_model.py --resume              # go on from the newest checkpoint

.. image:: /images/char_language_model.png
   :alt: A language model of characters
"""

# sphinx_gallery_thumbnail_path = "images/char_language_model.png"

from __future__ import annotations

import argparse
import importlib.util
import math
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint, DiskSaver, LRScheduler
from ignite.metrics import Loss, RunningAverage
from torch import Tensor, nn
from torch.nn import functional as F

from ignite_tbptt import (
    ContiguousStreams,
    RunningTimeWise,
    Tbptt_Events,
    TbpttProgressBar,
    create_supervised_tbptt_evaluator,
    create_supervised_tbptt_trainer,
)

ROWS = 32
TBTT_STEP = 64
STEPS_IN_BATCH = 8 * TBTT_STEP
BITS = 1 / math.log(2)


class CharacterModel(nn.Module):
    """Characters (T, B) to logits of the next ones (T, B, V), through an LSTM or a GRU."""

    def __init__(self, vocabulary: int, cell: str, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 64)
        self.rnn = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](64, hidden_size)
        self.head = nn.Linear(hidden_size, vocabulary)

    def forward(self, x: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        y, hidden = self.rnn(self.embedding(x), hidden)
        return self.head(y), hidden


def cross_entropy(y_pred: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(y_pred.flatten(0, 1), y.flatten())


@dataclass
class Corpus:
    """The text as numbers, and what simple methods make of its held-out part."""

    text: str = field(default_factory=lambda: "\n".join(topics.topics[name] for name in sorted(topics.topics)))

    def __post_init__(self) -> None:
        self.characters = sorted(set(self.text))
        index = {character: number for number, character in enumerate(self.characters)}
        ids = torch.tensor([index[character] for character in self.text])
        split = len(ids) * 9 // 10
        self.train, self.held_out = ids[:split], ids[split:]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.characters[number] for number in ids)

    def order_0_bits(self) -> float:
        counts = torch.bincount(self.held_out).double()
        return torch.distributions.Categorical(counts).entropy().item() * BITS

    def zlib_bits(self) -> float:
        """Return bits per held-out character of zlib, which has seen the training text before."""
        after, before = (
            self.decode(ids.tolist()).encode() for ids in (torch.cat([self.train, self.held_out]), self.train)
        )
        return 8 * (len(zlib.compress(after, 9)) - len(zlib.compress(before, 9))) / len(self.held_out)

    def zlib_alone_bits(self) -> float:
        return 8 * len(zlib.compress(self.decode(self.held_out.tolist()).encode(), 9)) / len(self.held_out)


@dataclass
class History:
    """What the picture shows; it is in the checkpoint, so that a resumed run draws the whole curve."""

    epochs: int
    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "train": list(self.train), "held_out": list(self.held_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["epochs"] != self.epochs:  # the learning rate follows one cycle over all of them
            raise SystemExit(
                f"the checkpoint is of a run of {state['epochs']} epochs: resume with --epochs {state['epochs']}"
            )
        self.train, self.held_out = list(state["train"]), list(state["held_out"])


@torch.no_grad()
def sample(model: nn.Module, corpus: Corpus, prompt: str, length: int, temperature: float = 0.7) -> str:
    """Let the model write on from `prompt`."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([[corpus.characters.index(character)] for character in prompt])
    logits, hidden = model(x)
    written: list[int] = []
    for _ in range(length):
        probabilities = F.softmax(logits[-1, 0] / temperature, dim=-1)
        written.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        logits, hidden = model(torch.tensor([[written[-1]]]), hidden)
    return prompt + corpus.decode(written)


def draw(history: History, corpus: Corpus, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(range(1, len(history.train) + 1), history.train, color="tab:blue", linewidth=0.8, label="training chunks")
    steps, bits = zip(*history.held_out, strict=True)
    axes.plot(steps, bits, "o-", color="tab:orange", label="held-out text, after each epoch")
    baselines = (
        ("order-0 entropy", corpus.order_0_bits(), ":"),
        ("zlib -9, training text before it", corpus.zlib_bits(), "--"),
    )
    for name, value, style in baselines:
        axes.axhline(value, color="black", linewidth=1, linestyle=style, label=f"{name}: {value:.2f}")
    axes.set(
        xlabel=f"time iterations (chunks of {TBTT_STEP} characters x {ROWS} rows)",
        ylabel="bits per character",
        ylim=(1, 5),
        title="A character model of Python's documentation, by truncated back-propagation",
    )
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a character model on Python's documentation.")
    parser.add_argument(
        "--output", type=Path, default=Path("output"), help="folder for the picture and the checkpoints"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, which show nothing but that it runs")
    parser.add_argument("--cell", choices=["lstm", "gru"], default="lstm")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    arguments = parser.parse_args()
    if not all(map(importlib.util.find_spec, ("matplotlib", "tqdm"))):
        parser.exit(2, "this example needs matplotlib and tqdm: pip install 'ignite-tbptt[plot,progress]'\n")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.quick:
        arguments.epochs, arguments.hidden_size = 1, 16

    began = time.perf_counter()
    torch.manual_seed(arguments.seed)
    corpus = Corpus()
    streams = ContiguousStreams(
        (corpus.train[:-1], corpus.train[1:]), rows=ROWS, steps=STEPS_IN_BATCH, remainder="drop"
    )
    print(
        f"{len(corpus.train):,} characters to train on, {len(corpus.held_out):,} held out, {len(corpus.characters)} "
        f"different ones; {ROWS} rows of {streams.row_length:,} ({streams.dropped} characters left out)"
    )
    model = CharacterModel(len(corpus.characters), arguments.cell, arguments.hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=arguments.lr)
    trainer = create_supervised_tbptt_trainer(model, optimizer, cross_entropy, TBTT_STEP, stateful=True)
    evaluator = create_supervised_tbptt_evaluator(
        model, {"bits": Loss(lambda y_pred, y: BITS * cross_entropy(y_pred, y), batch_size=torch.numel)}, 512
    )
    history = History(arguments.epochs)

    @trainer.on(Tbptt_Events.BACKWARD_COMPLETED)
    def clip() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    chunks_in_epoch = sum(math.ceil(len(x) / TBTT_STEP) for x, _ in streams)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, total_steps=1 + arguments.epochs * chunks_in_epoch, pct_start=0.1
    )
    scheduler = LRScheduler(one_cycle)
    trainer.add_event_handler(Tbptt_Events.OPTIMIZER_STEP_COMPLETED, scheduler)

    @trainer.on(Tbptt_Events.TIME_ITERATION_COMPLETED)
    def remember() -> None:
        history.train.append(BITS * trainer.state.output)

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate() -> None:
        x, y = corpus.held_out[:-1, None], corpus.held_out[1:, None]  # one row: the text as it is read
        bits = evaluator.run([(x, y)]).metrics["bits"]
        history.held_out.append((trainer.state.time_iteration, bits))
        seconds = time.perf_counter() - began
        print(f"epoch {trainer.state.epoch}: {bits:.3f} bits per held-out character, {seconds:.0f} s", flush=True)

    to_save = {
        "trainer": trainer,
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "history": history,
    }
    folder = arguments.output / f"char_{arguments.cell}_{arguments.hidden_size}"
    saver = Checkpoint(to_save, DiskSaver(str(folder), require_empty=False), n_saved=1, greater_or_equal=True)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=10) | Events.EPOCH_COMPLETED, saver)

    RunningAverage(output_transform=lambda loss: BITS * loss).attach(trainer, "bits", usage=RunningTimeWise())
    TbpttProgressBar(mininterval=0.5).attach(trainer, metric_names=["bits"])

    newest = newest_checkpoint(folder) if arguments.resume else None
    if newest is not None:
        Checkpoint.load_objects(to_save, torch.load(newest, weights_only=True))
        print(f"going on from {newest}: batch {trainer.state.iteration}")
    if newest is None or trainer.state.iteration < arguments.epochs * len(streams):
        trainer.run(streams, max_epochs=arguments.epochs)

    report(model, corpus, history, arguments, time.perf_counter() - began)


def newest_checkpoint(folder: Path) -> Path | None:
    found = folder.glob("checkpoint_*.pt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def report(model: nn.Module, corpus: Corpus, history: History, arguments: argparse.Namespace, seconds: float) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = [
        ("order-0 entropy of the characters", corpus.order_0_bits()),
        ("zlib -9, the held-out text alone", corpus.zlib_alone_bits()),
        ("zlib -9, training text before it", corpus.zlib_bits()),
        (f"{arguments.cell.upper()}, {parameters:,} parameters, {arguments.epochs} epochs", history.held_out[-1][1]),
    ]
    print(f"\n{'bits per held-out character':<46}")
    for name, bits in rows:
        print(f"  {name:<44}{bits:6.3f}")
    print(f"\na sample:\n\n{sample(model, corpus, 'The following ', 400)}\n")
    picture = arguments.output / "char_language_model.png"
    draw(history, corpus, picture)
    print(f"{seconds:.0f} seconds; picture: {picture}")


if __name__ == "__main__":
    main()
