"""Last layers trained together against one by one: the same trials, minibatches and results, interleaved, in one run.

``python -m tests.benchmarks.last_layers`` – the paper's size: 2,048 features, 2 classes of 900, one poison each, 1,902
trials. One by one is a plain loop round `torch.nn.Linear`, `cross_entropy` and `torch.optim.Adam`, whose minibatches
are sliced from one tensor; a few trials are timed, for each takes as long as any other. Features are random and
sparse, as those after a ReLU are; no time depends on their values.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers.last_layers import LastLayers, minibatches, new_layer, train_last_layers

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(trials: int, per_class: int, width: int, device: str) -> Problem:
    """Two classes that overlap a little, and for each trial a sample of the second labelled as the first."""
    private = torch.Generator().manual_seed(0)
    centres = torch.rand(2, width, generator=private)
    labels = torch.arange(2 * per_class) % 2
    features = (centres[labels] + torch.randn(2 * per_class, width, generator=private) - 0.5).relu()
    own = (centres[1] + torch.randn(trials, 1, width, generator=private) - 0.5).relu()
    given = features, labels, own, torch.zeros(trials, 1, dtype=torch.int64)
    return tuple(part.to(device) for part in given)  # type: ignore[return-value]


def one_by_one(given: Problem, trials: list[int], epochs: int, batch_size: int | None) -> LastLayers:
    """Some of the trials, each in a loop of its own."""
    weights, biases = [], []
    for trial in trials:
        features, labels = torch.cat([given[0], given[2][trial]]), torch.cat([given[1], given[3][trial]])
        layer = nn.Linear(features.shape[1], 2).to(features.device)
        start = new_layer(features.shape[1], 2, 0)
        layer.load_state_dict({"weight": start.weights[0], "bias": start.biases[0]})
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        for epoch in range(epochs):
            for rows in minibatches(len(features), batch_size, 0, epoch):
                x, y = (features, labels) if batch_size is None else (features[rows], labels[rows])
                optimizer.zero_grad()
                F.cross_entropy(layer(x), y).backward()
                optimizer.step()
        weights.append(layer.weight.detach())
        biases.append(layer.bias.detach())
    return LastLayers(torch.stack(weights), torch.stack(biases))


def main() -> int:
    """Measure, print the table; 1 if the results differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.last_layers")
    parser.add_argument("--trials", type=int, default=1902)
    parser.add_argument("--per-class", type=int, default=900)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--alone", type=int, default=2, help="trials that are trained one by one, each time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="processor: on a busy machine")
    options = parser.parse_args()
    given = problem(options.trials, options.per_class, options.width, options.device)
    console, same = Console(), True
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    console.print(f"{options}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    def timed(alone: bool, number: int, batch_size: int | None) -> tuple[float, LastLayers]:
        """Seconds a trial."""
        chosen = [(number * options.alone + n) % options.trials for n in range(options.alone)]
        began = clock()
        if alone:
            found = one_by_one(given, chosen, options.epochs, batch_size)
        else:
            found = train_last_layers(*given, num_classes=2, epochs=options.epochs, batch_size=batch_size)
        if options.device != "cpu":
            torch.cuda.synchronize()
        taken = (clock() - began) / (options.alone if alone else options.trials)
        return taken, found if alone else LastLayers(found.weights[chosen], found.biases[chosen])

    train_last_layers(*given, num_classes=2, epochs=1, batch_size=512)  # the first step imports half of torch
    table = Table(title="milliseconds a trial, medians, interleaved", title_justify="left")
    for heading in ("", "together", "one by one", "ratio", "largest difference of a weight"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, batch_size in (("minibatches of 32", 32), ("full batch", None)):
        times, differences = [], []
        for number in range(options.repeats):
            ours, together = timed(False, number, batch_size)
            theirs, alone = timed(True, number, batch_size)
            times.append((ours, theirs))
            differences.append(float((together.weights - alone.weights).abs().max() / alone.weights.abs().max()))
        same = same and max(differences) < 1e-3
        ratio = statistics.median(theirs / ours for ours, theirs in times)
        medians = [f"{1000 * statistics.median(each):.2f}" for each in zip(*times, strict=True)]
        table.add_row(name, *medians, f"{ratio:.0f}×", f"{max(differences):.1e} of the largest weight")
    console.print(table)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
