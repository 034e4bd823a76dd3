"""Run by test_processes under torchrun: a masked Trainer and a Sophia estimate on two processes."""

import copy
import sys

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from fillm import MaskCallback, MaskedOptimizer, Sophia
from tests.unlearn.standin import booleans, llama, random_mask

KINDS = {"model.layers.1.mlp.down_proj.weight": "rows", "model.layers.2.self_attn.q_proj.weight": "bits"}


def assert_same(tensor: torch.Tensor) -> None:
    """The same bits on both processes."""
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.detach().contiguous())
    assert torch.equal(*both)


def main(folder: str) -> None:
    model = llama()
    torch.manual_seed(9)
    mask = random_mask(model, KINDS)
    start, callback = copy.deepcopy(model.state_dict()), MaskCallback(mask)
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 0.01}
    given |= {"weight_decay": 0.1, "max_grad_norm": 0.05, "report_to": [], "use_cpu": True, "ddp_backend": "gloo"}
    arguments = TrainingArguments(folder, save_strategy="no", disable_tqdm=True, **given)
    ids = torch.randint(0, 37, (16, 7), generator=torch.Generator().manual_seed(4))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert dist.get_world_size() == 2 and callback.verification.outside_mask_bit_equal
    for name, chosen in booleans(model, mask).items():
        now = model.get_parameter(name).detach()
        assert torch.equal(now[~chosen], start[name][~chosen])
        assert not chosen.any() or not torch.equal(now, start[name])
        assert_same(now)

    inner = Sophia(model.parameters())
    own = ids[dist.get_rank() :: 2]  # other samples on each
    MaskedOptimizer(inner, mask, model).estimate(lambda: model(input_ids=own).logits.flatten(0, 1))
    assert len(inner.state) == 2
    for state in inner.state.values():
        assert state["hessian"].sum() > 0
        assert_same(state["hessian"])
    print("both agree", flush=True)
    dist.barrier()  # a process that leaves with gloo's threads alive may abort, and take the other with it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
