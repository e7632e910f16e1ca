"""Measure time and memory of the bag loss and of ordinary cross-entropy, forward and backward.

All contestants run on random bfloat16 numbers, in interleaved rounds in one process. First the loss
alone, on given logits, for some bag sizes, eager and compiled; the paper's loop of cross-entropies
is measured, too. Then LM head and loss together for the largest bag, whole and in chunks. These are
compared with the fused versions for one target that torch (from 2.13 on), and, if they are
installed and there is an accelerator, Liger-Kernel and cut-cross-entropy have. Each is compared
with the cross-entropy of its own kind, eager or compiled. Writes table, JSON and plot. The table
marks what does not fit into memory.

    python scripts/benchmark/loss.py --bag-sizes 1 4 16 --chunks 4 8
"""

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import measuring
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.tools.utils import device_type

from command_line import documented_parser
from torchtitan.experiments.tst.core import BagLoss
from torchtitan.experiments.tst.core.head import chunked_loss

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Results = dict[str, measuring.Measurement]

HEADER = ["ms", "ratio", "extra MiB", "ratio"]
ORDINARY, PAPER, BAG = "cross-entropy", "paper's loop", "bag loss"


def papers_loop(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the paper's loss: the sum of a cross-entropy for each offset of the bag, over s."""
    logits = logits.flatten(0, 1).float()
    losses = [
        F.cross_entropy(logits, labels[..., i].flatten(), reduction="sum")
        for i in range(labels.shape[-1])
    ]
    return torch.stack(losses).sum() / labels.shape[-1]


def contestants(labels: torch.Tensor, compiled: bool) -> dict[str, Loss]:
    """Return the losses of logits (1, N, V) and bags (1, N, s) by name.

    The ordinary cross-entropy uses only the first target of a bag.
    """
    bag_loss = BagLoss("mce", overwrite_logits=True)
    coefficients = bag_loss.coefficients(bag_loss.counts(labels))
    losses: dict[str, Loss] = {
        ORDINARY: lambda logits, labels: cross_entropy_loss(logits, labels[..., 0]),
        PAPER: papers_loop,
        BAG: lambda logits, labels: bag_loss.sum(logits, labels, coefficients),
    }
    if not compiled:
        return losses
    torch.compiler.reset()
    return {name: torch.compile(loss) for name, loss in losses.items()}


def loss_alone(logits: torch.Tensor, labels: torch.Tensor, rounds: int, compiled: bool) -> Results:
    """Measure each loss on logits, as if an LM head had just computed them."""
    computed = logits.clone().requires_grad_()

    def run(loss: Loss) -> measuring.Run:
        return lambda: torch.autograd.grad(loss(computed, labels), computed)

    runs = {name: run(loss) for name, loss in contestants(labels, compiled).items()}
    return measuring.measure(runs, rounds, prepare=lambda: computed.data.copy_(logits))


def head_and_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunks: list[int], rounds: int
) -> Results:
    """Measure LM head and loss of hidden states (1, N, d) and a head (V, d), eager and compiled."""
    target = labels[..., 0].flatten().contiguous()
    runs: dict[str, measuring.Run] = {}

    def add(name: str, loss: Callable[[], torch.Tensor]) -> None:
        runs[name] = lambda: torch.autograd.grad(loss(), (hidden, weight))

    for compiled in (False, True):
        losses = contestants(labels, compiled)
        for name in (ORDINARY, BAG):
            loss, label = losses[name], f"{name}, {'compiled' if compiled else 'eager'}"
            add(label, lambda loss=loss: loss(F.linear(hidden, weight), labels))
            for n in chunks:
                add(
                    f"{label}, {n} chunks",
                    lambda loss=loss, n=n: chunked_loss(hidden, weight, labels, loss, n),
                )
    if hasattr(F, "linear_cross_entropy"):
        for n in chunks:
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=-(-len(target) // n))
            add(
                f"torch's linear_cross_entropy, {n} chunks",
                lambda options=options: F.linear_cross_entropy(
                    hidden[0], weight, target, reduction="sum", options=options
                ),
            )
    if device_type != "cpu" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        add("Liger-Kernel's", lambda: liger(weight, hidden[0], target))
    if device_type != "cpu" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        add(
            "cut-cross-entropy's",
            lambda: linear_cross_entropy(hidden[0], weight, target, reduction="sum"),
        )
    return measuring.measure(runs, rounds, warmup=1)


def rows(results: Results, reference: Callable[[str], str]) -> list[list[str]]:
    """Return table rows: time and memory, each with its ratio to the reference's."""
    lines = []
    for name, result in results.items():
        if result.out_of_memory:
            lines.append([name, "out of memory", "", "", ""])
            continue
        other = results[reference(name)]
        of_memory = result.peak_bytes / other.peak_bytes if other.peak_bytes else math.nan
        lines.append(
            [
                name,
                f"{1e3 * result.median:.1f}",
                f"{result.ratio(other):.2f}",
                f"{result.peak_bytes / 2**20:.0f}",
                f"{of_memory:.2f}",
            ]
        )
    return lines


def plot(alone: dict[str, dict[int, Results]], together: Results, file: Path) -> None:
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, name in (("C1", PAPER), ("C0", BAG)):
        for kind, line in (("eager", "-"), ("compiled", "--")):
            ratios = {s: r[name].ratio(r[ORDINARY]) for s, r in alone[kind].items()}
            left.plot(
                list(ratios), list(ratios.values()), line, marker="o", color=color,
                label=f"{name}, {kind}",
            )  # fmt: skip
    left.axhline(1, color="0.6", linewidth=1)
    left.set(
        title="Loss alone, forward and backward",
        xlabel="bag size",
        ylabel="time of one cross-entropy",
        xscale="log",
        yscale="log",
    )
    left.set_xticks(sizes := list(alone["eager"]), [str(s) for s in sizes])
    left.legend()
    names = [name for name in together if not together[name].out_of_memory][::-1]
    reference = together[f"{ORDINARY}, eager"]
    for offset, color, label, values in (
        (0.2, "C0", "time", [together[name].ratio(reference) for name in names]),
        (
            -0.2,
            "C2",
            "memory",
            [together[name].peak_bytes / (reference.peak_bytes or math.nan) for name in names],
        ),
    ):
        right.barh([i + offset for i in range(len(names))], values, 0.4, color=color, label=label)
    right.set_yticks(range(len(names)), names)
    right.axvline(1, color="0.6", linewidth=1)
    right.set(
        title="LM head and loss, forward and backward",
        xlabel="relative to the eager cross-entropy",
    )
    right.legend()
    figure.savefig(file, dpi=110)


def arguments() -> argparse.Namespace:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "--bag-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[4, 8], help="numbers of chunks of the LM head"
    )
    parser.add_argument("--vocab-size", type=int, default=128_256, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=576, help="width of the hidden states")
    positions = (512, 4096) if device_type == "cpu" else (8192, 16_384)
    parser.add_argument(
        "--positions",
        type=int,
        nargs=2,
        default=positions,
        metavar=("LOSS", "HEAD"),
        help="number of positions: of the loss alone, and of LM head and loss (default here: "
        "%(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/benchmark"),
        help="folder of the results (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    measuring.compile_for_each_shape()
    positions, of_head = args.positions
    largest = max(args.bag_sizes)
    torch.manual_seed(0)
    with torch.device(device_type):
        hidden = torch.randn(1, max(positions, of_head), args.width, dtype=torch.bfloat16)
        weight = torch.randn(args.vocab_size, args.width, dtype=torch.bfloat16)
        weight *= 3 / args.width**0.5
        labels = torch.randint(args.vocab_size, (1, max(positions, of_head), largest))
    logits = F.linear(hidden[:, :positions], weight)
    alone = {
        kind: {
            s: loss_alone(logits, labels[:, :positions, :s], args.rounds, kind == "compiled")
            for s in args.bag_sizes
        }
        for kind in ("eager", "compiled")
    }
    del logits
    together = head_and_loss(
        hidden[:, :of_head].requires_grad_(),
        weight.requires_grad_(),
        labels[:, :of_head],
        args.chunks,
        args.rounds,
    )
    texts = [f"Vocabulary {args.vocab_size:,}, bfloat16, medians of {args.rounds} rounds"]
    for kind, by_size in alone.items():
        for s, results in by_size.items():
            title = f"Loss alone, {kind}, s = {s}, {positions} positions"
            texts.append(measuring.table([title, *HEADER], rows(results, lambda name: ORDINARY)))
    lines = rows(
        together, lambda name: f"{ORDINARY}, {'compiled' if 'compiled' in name else 'eager'}"
    )
    title = f"LM head and loss, width {args.width}, s = {largest}, {of_head} positions"
    texts.append(measuring.table([title, *HEADER], lines))
    numbers = {
        "arguments": {**vars(args), "output": str(args.output)},
        "loss_alone": {
            kind: {
                s: {name: result.json() for name, result in results.items()}
                for s, results in by_size.items()
            }
            for kind, by_size in alone.items()
        },
        "head_and_loss": {name: result.json() for name, result in together.items()},
    }
    measuring.write_results(args.output, "loss", "\n\n".join(texts), numbers)
    plot(alone, together, args.output / "loss.png")


if __name__ == "__main__":
    main()
