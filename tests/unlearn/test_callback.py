"""MaskCallback in transformers' Trainer: nothing outside the mask moves, and what is inside is trained."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from fillm import MaskCallback, MaskedOptimizer, frozen_outside
from fillm.errors import NumericsError, UsageError
from tests.unlearn.standin import booleans, llama, random_mask

KINDS = {
    "model.layers.1.mlp.down_proj.weight": "rows",
    "model.layers.2.self_attn.q_proj.weight": "bits",
    "model.layers.3.input_layernorm.weight": "whole",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


def rows(count=11):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 37, (count, 7), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **settings):
    chosen = {"per_device_train_batch_size": 2, "max_steps": 12, "learning_rate": 0.01, "weight_decay": 0.1}
    chosen |= {"max_grad_norm": 0.05, "lr_scheduler_type": "linear", "report_to": [], "disable_tqdm": True, "seed": 3}
    chosen |= {"use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(output_dir=str(folder), **(chosen | settings))


def as_trainer_has_it(model):
    """AdamW as Trainer makes it: norms do not decay."""
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}
    norms = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, norms], lr=0.01)


def assert_only_inside(model, start, mask):
    for name, chosen in booleans(model, mask).items():
        now, was = model.get_parameter(name).detach(), start[name]
        assert torch.equal(now[~chosen], was[~chosen]), name
        assert not chosen.any() or not torch.equal(now, was), name


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"gradient_accumulation_steps": 3}, torch.float32),
        ({"bf16": True, "lr_scheduler_type": "cosine"}, torch.float32),
        ({"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0}, torch.bfloat16),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, torch.bfloat16),
    ],
    ids=["float32", "accumulation", "bf16", "sgd on bfloat16", "checkpointing"],
)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_trainer_leaves_what_is_outside_as_it_was(tmp_path, settings, dtype):
    model = llama().to(dtype)
    mask = random_mask(model, KINDS)
    start = copy.deepcopy(model.state_dict())
    callback = MaskCallback(mask, master_weights=dtype == torch.bfloat16)
    trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=rows(), callbacks=[callback])
    trainer.train()
    assert_only_inside(model, start, mask)
    found = callback.verification
    assert found.outside_mask_bit_equal and found.mask_applied
    assert found.selected_parameters == sum(e.count for e in mask.values())
    assert callback.savings["lowest_layer"] == 1
    assert all(p.requires_grad for p in model.parameters()) and not model.lm_head.weight._post_accumulate_grad_hooks


def test_the_norm_that_trainer_clips_by_is_that_of_the_mask(tmp_path):
    model, twin = llama(), llama()
    mask = random_mask(model, KINDS)
    trainer = Trainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows(2), callbacks=[MaskCallback(mask)])
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    # The same in a plain loop: the batch is always these two rows, in an order that does not matter.
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    optimizer = MaskedOptimizer(as_trainer_has_it(twin), mask, twin)
    with frozen_outside(twin, mask):
        for step in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (3 - step) / 3
            twin(input_ids=ids, labels=ids).loss.backward()
            assert optimizer.clip_grad_norm_(0.05).item() == pytest.approx(logged[step], rel=1e-4)
            optimizer.step()
            optimizer.zero_grad()
    for name in KINDS:
        torch.testing.assert_close(model.get_parameter(name), twin.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_added_later_or_with_a_masked_optimiser_it_does_the_same(tmp_path):
    trained, mask = [], random_mask(llama(), KINDS)
    for how in ("callback", "added", "optimizers"):
        model = llama()
        optimizers = (None, None)
        if how == "optimizers":
            optimizers = (MaskedOptimizer(as_trainer_has_it(model), mask, model), None)
        callback = MaskCallback(mask)
        given = [] if how == "added" else [callback]
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=given, optimizers=optimizers)
        if how == "added":
            trainer.add_callback(callback)
        trainer.train()
        assert callback.verification.outside_mask_bit_equal
        trained.append(model)
    for other in trained[1:]:
        assert all(torch.equal(a, b) for a, b in zip(trained[0].parameters(), other.parameters(), strict=True))


def test_a_resumed_training_ends_with_the_same_bits(tmp_path):
    mask = random_mask(llama(), KINDS)

    def trainer():
        model = llama()
        optimizers = (MaskedOptimizer(as_trainer_has_it(model), mask, model), None)
        settings = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
        return Trainer(model, settings, train_dataset=rows(), callbacks=[MaskCallback(mask)], optimizers=optimizers)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_without_a_masked_optimiser_it_says_what_to_hand_over(tmp_path, dtype):
    mask = random_mask(llama(), KINDS)

    def trainer():
        settings = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        callback = MaskCallback(mask, master_weights=True)
        return Trainer(llama().to(dtype), settings, train_dataset=rows(), callbacks=[callback])

    trainer().train()
    with pytest.raises(UsageError, match=r"hand it optimizers=\(fillm.MaskedOptimizer\(...\), None\)$"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_second_training_goes_on_inside_the_same_mask(tmp_path):
    model = llama()
    mask = random_mask(model, KINDS)
    start = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows(), callbacks=[MaskCallback(mask)])
    trainer.train()
    trainer.train()
    assert_only_inside(model, start, mask)


def test_the_step_that_a_float16_scaler_takes_is_the_masked_one(tmp_path):
    """accelerate binds the step of what it wraps when it wraps it; the mask comes later."""
    accelerator = Accelerator(cpu=True)
    model = llama()
    mask = random_mask(model, KINDS)
    start, scaler = copy.deepcopy(model.state_dict()), torch.amp.GradScaler("cpu", init_scale=4.0)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    MaskCallback(mask).on_train_begin(None, None, None, model=model, optimizer=optimizer)
    with accelerator.accumulate(model):
        ids = torch.arange(12).view(2, 6)
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        optimizer.step()
    assert not optimizer.step_was_skipped
    assert_only_inside(model, start, mask)


class Meddler(TrainerCallback):
    """Writes where it should not, or undoes what was trained."""

    def __init__(self, model: nn.Module, undo: bool) -> None:
        self.start = copy.deepcopy(model.state_dict()) if undo else None

    def on_step_end(self, args, state, control, model, **kwargs):
        if self.start:
            model.load_state_dict(self.start)
        elif state.global_step == 2:
            with torch.no_grad():
                model.lm_head.weight[3, 2] += 1


def test_a_change_outside_or_none_inside_does_not_pass_in_silence(tmp_path):
    model = llama()
    callbacks = [MaskCallback(random_mask(model, KINDS)), Meddler(model, undo=False)]
    with pytest.raises(NumericsError, match="outside the mask changed in 1 tensors .lm_head.weight"):
        Trainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows(), callbacks=callbacks).train()
    callbacks = [MaskCallback(random_mask(model, KINDS)), Meddler(model, undo=True)]
    with pytest.warns(UserWarning, match="none of the selected weights"):
        Trainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows(), callbacks=callbacks).train()


def test_a_mask_of_another_model_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UsageError, match="of which the model knows nothing"):
        Trainer(
            llama(1), arguments(tmp_path), train_dataset=rows(), callbacks=[MaskCallback(random_mask(llama(), KINDS))]
        )


@pytest.mark.filterwarnings("ignore")  # of a package that this project does not pin
def test_trl(tmp_path):
    trl = pytest.importorskip("trl")
    words = {f"w{n}": n for n in range(36)} | {"[PAD]": 36}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "[PAD]")), eos_token="w0", pad_token="[PAD]"
    )
    model = llama()
    mask = random_mask(model, KINDS)
    start, callback = copy.deepcopy(model.state_dict()), MaskCallback(mask)
    given = {"max_steps": 4, "weight_decay": 0.1, "learning_rate": 0.01, "use_cpu": True, "bf16": False}
    config = trl.SFTConfig(str(tmp_path), max_length=16, report_to=[], save_strategy="no", disable_tqdm=True, **given)
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    trainer = trl.SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    assert_only_inside(model, start, mask)
    assert callback.verification.outside_mask_bit_equal and callback.savings["layers_without_backward"] == 1
