"""dattri's LoGra: per-sample gradients of linear layers projected from both sides and kept in memory."""

from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.end_to_end.peers.setting import Ready, Setting, imported, mean_losses

FIELDS = ("input_ids", "attention_mask", "labels")


def cache(setting: Setting, dim: int) -> Ready:
    """`LoGraAttributor.cache` without a Hessian: what it does before anything is attributed; `dim` x `dim` numbers.

    A batch of ours stands for one of its items, so that it sees the same batches as the others.
    """
    logra, task = imported("dattri.algorithm.logra"), imported("dattri.task")
    model = setting.model.requires_grad_(True)

    def loss(model: nn.Module, batch: dict[str, Tensor], device: str) -> Tensor:
        return mean_losses(model(**batch, use_cache=False).logits, batch["labels"]).sum()

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    attributor = logra.LoGraAttributor(
        task.AttributionTask(loss, model, weights),
        hessian="Identity", device=str(setting.device), proj_dim=dim * dim, cache_dir=str(setting.folder),
    )  # fmt: skip

    def run(tokens: int) -> None:
        batches = [{name: getattr(batch, name) for name in FIELDS} for batch in setting.batches(tokens)]
        attributor.cache(DataLoader(batches, batch_size=1, collate_fn=lambda items: items[0]))

    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    return Ready(run, sum(module.weight.numel() for module in linear))
