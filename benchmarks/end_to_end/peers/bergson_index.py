"""bergson's index of per-sample gradients, projected from both sides or as they are."""

import itertools
import logging
import shutil

from datasets import Dataset
from torch import nn

from benchmarks.end_to_end.peers.setting import Ready, Setting, imported
from fillm.data import plan_batches


def index(setting: Setting, dim: int | None) -> Ready:
    """`collect_gradients`, the passes of `bergson build`, with its files on the disk; `dim` x `dim` numbers a module.

    Projection matrices are made in the first run and kept. Parameters are frozen as bergson freezes them.
    """
    bergson = imported("bergson")
    logging.getLogger("bergson").setLevel(logging.WARNING)
    model, samples = setting.model, setting.samples
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    processor = bergson.GradientProcessor(projection_dim=dim)
    rows = {"input_ids": [list(s.input_ids) for s in samples], "labels": [list(s.labels) for s in samples]}
    data, runs = Dataset.from_dict(rows), itertools.count()

    def run(tokens: int) -> None:
        config = bergson.IndexConfig(
            run_path=str(setting.folder / f"index-{next(runs)}"),
            projection_dim=dim or 0, loss_reduction="mean", token_batch_size=tokens,
        )  # fmt: skip
        config.partial_run_path.mkdir(parents=True)
        batches = plan_batches(samples.lengths, tokens)
        bergson.collect_gradients(model, data, processor, config, batches=batches)
        shutil.rmtree(config.partial_run_path)

    linear = (module for module in model.base_model.modules() if isinstance(module, nn.Linear))
    return Ready(run, sum(module.weight.numel() for module in linear))
