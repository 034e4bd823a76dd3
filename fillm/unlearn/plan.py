"""What a run will do and take, from its settings: the steps of the loop, and the lines of `--dry-run`."""

from collections.abc import Mapping

import torch
from fillm_kernels.arguments import accumulation_dtype
from torch import nn

from fillm.data import SampleSet, check_fits_model
from fillm.finetune.schedule import warmup_steps
from fillm.masks import Mask
from fillm.models import with_lora
from fillm.rank.plan_lines import in_bytes
from fillm.rank.unloaded_model import meta_model
from fillm.unlearn.choosing import adapted_modules
from fillm.unlearn.config import INFLUENCE, TASK_VECTOR, UnlearnConfig, loss_options
from fillm.unlearn.freezing import frozen_outside
from fillm.unlearn.losses import LossOptions, UnlearnLoss, make_loss
from fillm.unlearn.sampling import steps_per_epoch
from fillm.unlearn.stopping import StoppingRule
from fillm.unlearn.task_vector import Learning
from fillm.unlearn.training import Plan


def plan_of(config: UnlearnConfig, num_forget: int) -> Plan:
    """What the loop does, from resolved settings and the size of the forget set.

    Raises:
        UsageError: a warm-up that the run would not get beyond.
    """
    per_step = config.batch_size * config.gradient_accumulation
    epoch = steps_per_epoch(num_forget, per_step)
    steps = config.max_steps or int(config.epochs or 0) * epoch
    return Plan(
        steps=steps,
        samples_per_step=per_step,
        batch_size=config.batch_size,
        lr=config.lr,
        schedule=config.schedule,
        warmup=warmup_steps(config.warmup, steps),
        clip_norm=config.clip_norm,
        eval_every=config.eval_every or epoch,
        rule=StoppingRule(config.stop_forget_loss, config.stop_retain_loss),
        autocast=torch.bfloat16 if config.mixed_precision == "bf16" else None,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
    )


def loss_of(config: UnlearnConfig) -> UnlearnLoss:
    """What the steps minimise."""
    if config.loss == TASK_VECTOR:
        return Learning()
    return make_loss(config.loss, LossOptions(seed=config.seed, **loss_options(config)))


def savings_lines(savings: Mapping[str, int | None], model: nn.Module, mask: Mask, parameters: int) -> list[str]:
    """What is trained, and what is saved by freezing all else, for a person.

    Args:
        savings: as `frozen_outside` tells them.
        model: that is trained, with adapters where these are.
        mask: of it.
        parameters: of the model without adapters.
    """
    weights, masters = dict(model.named_parameters()), 0
    for name, entry in mask.items():
        wide = accumulation_dtype(weights[name].dtype)
        masters += entry.count * wide.itemsize if wide != weights[name].dtype else 0
    more = f"; float32 masters: {in_bytes(masters)}" if masters else ""
    return [
        f"training {mask.count:,} of {parameters:,} weights, in {savings['tensors_trained']} of {savings['tensors']} "
        f"tensors; no backward in {savings['layers_without_backward']} of {savings['layers']} layers",
        f"weight gradients: {in_bytes(savings['weight_gradient_bytes'])} "
        f"({in_bytes(savings['weight_gradient_bytes_saved'])} never formed); optimiser state: "
        f"{in_bytes(savings['state_bytes'])} ({in_bytes(savings['state_bytes_saved'])} saved){more}",
    ]


def plan_lines(config: UnlearnConfig, mask: Mask, sets: Mapping[str, SampleSet]) -> list[str]:
    """Lines for a person, from the model's configuration alone.

    Args:
        config: resolved.
        mask: what would be trained; compared with the model by names and shapes.
        sets: `forget` and `retain`.

    Raises:
        FillmError: as the run itself would.
    """
    model = meta_model(config)
    mask.check(model)
    for which, samples in sets.items():
        check_fits_model(samples, model, f"--{which}")
    parameters = sum(p.numel() for p in model.parameters())
    lines = [f"{which}: {len(some)} samples, {some.num_tokens:,} tokens" for which, some in sets.items()]
    if config.loss == INFLUENCE:
        return [*lines, f"one step on {mask.count:,} of {parameters:,} weights, after one pass over each set"]
    loss, plan = loss_of(config), plan_of(config, len(sets["forget"]))
    loss.check(model)
    reference = _reference_lines(loss, model, sets)
    if config.lora_rank is not None:
        modules = adapted_modules(model, mask)
        model = with_lora(model, config.lora_rank, config.seed, modules)
        mask = trained_mask(model)
        lines.append(f"adapters of rank {config.lora_rank} inside {len(modules)} selected modules are trained")
    lines += savings_lines(frozen_outside(model, mask).savings, model, mask, parameters)
    beside = " and as many retain samples" if loss.uses_retain else ""
    lines.append(
        f"{plan.steps} steps of {plan.samples_per_step} forget samples{beside}, an evaluation every {plan.eval_every}"
    )
    return [*lines, *reference]


def trained_mask(model: nn.Module) -> Mask:
    """All that adapters have put into a model."""
    return Mask.whole(model, [name for name, p in model.named_parameters() if p.requires_grad])


def _reference_lines(loss: UnlearnLoss, model: nn.Module, sets: Mapping[str, SampleSet]) -> list[str]:
    """What is recorded of the untouched model, in the place of a second one."""
    head = model.get_output_embeddings().weight
    vocabulary, width = head.shape
    lines = []
    for name, recorded in loss.needs.items():
        samples = sets["forget" if name == "alternatives" else name]
        tokens = sum(sample.num_counted for sample in samples)
        size = {
            "nll": 4 * len(samples),
            "block": tokens * width * head.element_size(),
            "distributions": min(4 * tokens * vocabulary, (tokens * width + head.numel()) * head.element_size()),
        }[recorded.kind]
        lines.append(f"reference of {name}: about {in_bytes(size)}")
    return lines
