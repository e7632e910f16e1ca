"""A job that writes down what every rank reads, launched by test_elastic.py.

Beside the arguments of a job it takes two for rank 1: ``--poison=N,M`` spoils its loss in steps N
and M, and with ``--signal=STEP,NUMBER`` it sends itself a signal in a step.
"""

import json
import os
import sys
import time
from pathlib import Path

from torchtitan.experiments.tst import train
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer


def numbers(option):
    """Take an option out of the arguments; gives its numbers, none if it is not there."""
    found = [argument for argument in sys.argv if argument.startswith(f"{option}=")]
    for argument in found:
        sys.argv.remove(argument)
    return [int(number) for argument in found for number in argument.partition("=")[2].split(",")]


POISONED_STEPS = numbers("--poison")
SIGNAL = numbers("--signal")


class RecordingTrainer(SuperpositionTrainer):
    def batch_generator(self, data_iterable):
        batch_rank = 0
        if self.parallel_dims.dp_enabled:
            batch_rank = self.parallel_dims.get_mesh("batch").get_local_rank()
        # ranks of one data-parallel rank read the same, which one of them writes down
        of_model = os.environ["LOCAL_RANK"] if self.parallel_dims.tp_enabled else "0"
        name = f"windows-{batch_rank}.jsonl" if of_model == "0" else "others"
        with Path(self.job_config.job.dump_folder, name).open("a", buffering=1) as file:
            for input_dict, labels in super().batch_generator(data_iterable):
                windows = input_dict["input"].tolist()
                file.write(json.dumps({"step": self.step, "windows": windows}) + "\n")
                yield input_dict, labels

    def forward_backward_step(self, **kwargs):
        if SIGNAL and self.step == SIGNAL[0] and os.environ["RANK"] == "1":
            os.kill(os.getpid(), SIGNAL[1])
            while not self.stop_request.signal:  # another thread receives it
                time.sleep(0.001)
        if self.step in POISONED_STEPS and os.environ["RANK"] == "1":
            hook = self.model_parts[0].register_forward_hook(lambda m, i, logits: logits * 1e38**2)
            try:
                return super().forward_backward_step(**kwargs)
            finally:
                hook.remove()
        return super().forward_backward_step(**kwargs)


if __name__ == "__main__":
    train.SuperpositionTrainer = RecordingTrainer
    try:
        train.main()
    except SystemExit as error:
        print(f"rank {os.environ['RANK']} ended with {error.code}", file=sys.stderr)
        raise
