"""Measure the time and memory of scoring a checkpoint, export included.

The task is made up: each question has four answers, so it is four requests. It prints the seconds
of each part, requests and tokens per second, and the peak memory of the process.

    python scripts/benchmark/evaluation.py outputs/demo/tst --questions 1000 --tokens 60
"""

import argparse
import json
import resource
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from measuring import device_module, device_type, table, write_results

from torchtitan.experiments.tst.data.tokenizer import open_tokenizer
from torchtitan.experiments.tst.resilience.checkpoint.inventory import find_checkpoint
from torchtitan.experiments.tst.results.export import exported
from torchtitan.experiments.tst.results.harness import Harness

ANSWERS = 4
TASK = """\
task: made_up
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="checkpoint or run folder")
    parser.add_argument("--questions", type=int, default=500, help="number of questions")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of a request, about")
    parser.add_argument("--batch-size", default="64", help='sequences in a batch, or "auto"')
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    options = parser.parse_args()
    checkpoint = find_checkpoint(options.model)
    marks = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder, exported(checkpoint, []) as hf:
        marks.append(time.perf_counter())
        tokens = write_task(Path(folder), hf, options.questions, options.tokens)
        harness = Harness(["made_up"], Path(folder), options.batch_size)
        harness.check()
        marks.append(time.perf_counter())
        model = harness.load(hf)
        marks.append(time.perf_counter())
        harness.run(model, ["made_up"])
        marks.append(time.perf_counter())
    export, tasks, load, score = (after - before for before, after in pairwise(marks))
    requests = ANSWERS * options.questions
    gigabytes = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = [
        ["checkpoint", f"{gigabytes:.2f} GB"],
        ["export", f"{export:.1f} s"],
        ["look through the harness's tasks, once", f"{tasks:.1f} s"],
        ["load the model", f"{load:.1f} s"],
        [f"score {requests:,} requests of {tokens:.0f} tokens", f"{score:.1f} s"],
        ["requests per second", f"{requests / score:,.1f}"],
        ["tokens per second", f"{requests * tokens / score:,.0f}"],
        ["peak memory of the process", f"{peak:.2f} GiB"],
    ]
    if device_type != "cpu":
        rows.append(
            ["peak memory of the GPU", f"{device_module.max_memory_allocated() / 2**30:.2f} GiB"]
        )
    results = {"requests": requests, "tokens": tokens, "seconds": [export, tasks, load, score]}
    write_results(options.output, "evaluation", table(["", ""], rows), results | {"GiB": peak})


def write_task(folder: Path, model: Path, questions: int, tokens: int) -> float:
    """Write the task, and return the mean number of tokens of a request."""
    encode = open_tokenizer(model).tokenizer.encode
    text, answers = " the value of", [" one", " two", " three", " four"]
    length = len(encode(text, add_special_tokens=False).ids)
    records = [
        {"question": f"{n}" + text * (tokens // length), "choices": answers}
        for n in range(questions)
    ]
    data = folder / "made_up.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "made_up.yaml").write_text(TASK.format(data=data))
    some = [len(encode(r["question"] + answer).ids) for r in records[:10] for answer in answers]
    return sum(some) / len(some)


if __name__ == "__main__":
    main()
