"""A job that writes down what every rank reads; ``--poison=N,M`` spoils rank 1's loss
in steps N and M.

Run under torchrun by test_elastic.py with the arguments of a job.
"""

import json
import os
import sys
from pathlib import Path

from torchtitan.experiments.tst import train
from torchtitan.experiments.tst.trainer import SuperpositionTrainer

poison = [argument for argument in sys.argv if argument.startswith("--poison=")]
for argument in poison:
    sys.argv.remove(argument)
POISONED_STEPS = [int(step) for step in poison[0].partition("=")[2].split(",")] if poison else []


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
