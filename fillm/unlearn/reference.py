"""What the untouched model said of a set, kept on disk in the place of a second model.

A folder: `reference.json` (what it was made from), `head` (where distributions are kept as hidden states) and `rows-0`,
`rows-1`, ... Each of these is a pair of files with a checksum that appears whole or not at all, so a recording that was
stopped goes on after its last whole pair and ends with the same bytes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fillm.data import DEFAULT_TOKENS_PER_BATCH, SampleSet, collate, plan_batches
from fillm.errors import RunFolderError
from fillm.rank.plan_lines import in_bytes
from fillm.runs.state_files import load_pair, read_json, save_pair, write_json, writing
from fillm.statistics.store_format import differences
from fillm.unlearn.recording import Form, Head, chosen_form, head_logits, record

SetName = Literal["forget", "retain", "alternatives"]
_MADE_FROM = "reference.json"
SHARD_BYTES = 1 << 26  # a pair of files ends after the batch that brings it here


@dataclass(frozen=True)
class Recorded:
    """One thing to record of a set.

    Attributes:
        kind: `nll` of every sample's whole answer; `distributions` over the vocabulary at every answer token; `block`:
            the output of one block at every answer token.
        layer: which block.
    """

    kind: Literal["nll", "distributions", "block"]
    layer: int | None = None


@dataclass(frozen=True)
class ReferenceRows:
    """What was recorded of the samples of a batch, in their order.

    Attributes:
        values: `nll`: [B] in nats. `block`: [N, H]. `distributions`: [N, V] log-probabilities, or the [N, H] inputs of
            the head. In the dtype that the model gave, float32 at least for `nll` and log-probabilities.
        head: the original's output embedding, where `values` are its inputs.
    """

    values: Tensor
    head: Head | None = None

    def log_probs(self, rows: slice) -> Tensor:
        """Of some of the N answer tokens: [rows, V] log-probabilities, float32 (float64 for a float64 model)."""
        if self.head is None:
            return self.values[rows]
        logits = head_logits(self.values[rows], self.head)
        return torch.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))


class ReferenceCache:
    """Recorded values of every sample of one set, memory-mapped; made by `ReferenceCache.make`."""

    def __init__(self, shards: Sequence[Mapping[str, Tensor]], samples: SampleSet, head: Head | None) -> None:
        self._values = [shard["values"] for shard in shards]
        self._head = head
        self._head_on: dict[torch.device, Head] = {}
        self._place: dict[int, tuple[int, int, int]] = {}  # sample -> shard, first row, number of rows
        for number, shard in enumerate(shards):
            row = 0
            for position in shard["positions"].tolist():
                count = samples[position].num_counted if shard["values"].ndim == 2 else 1
                self._place[position] = (number, row, count)
                row += count

    @classmethod
    def make(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module,
        samples: SampleSet,
        recorded: Recorded,
        *,
        fingerprint: str,
        tokens_per_batch: int | None = None,
        notice: Callable[[str], None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> "ReferenceCache":
        """Records what is not recorded yet, and opens it. With everything recorded the model is not run.

        Args:
            folder: of this set alone; made if there is none.
            model: untouched, unless the recording is complete. Run in eval mode, without gradient, under whatever
                autocast the caller has on; left in the mode it came in.
            samples: the set.
            recorded: what of it.
            fingerprint: of the untouched model's weights.
            tokens_per_batch: of a forward pass; a recording is continued with what it was begun with.
            notice: told in one line, before the first file, what will be kept and how many bytes that is.
            progress: told after every batch how many samples are done; what it raises stops the recording, and whole
                pairs of files stay.

        Raises:
            RunFolderError: if the folder was made from something else or is damaged, or if the disk refuses.
        """
        folder = Path(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        budget = DEFAULT_TOKENS_PER_BATCH if tokens_per_batch is None else tokens_per_batch
        batches = plan_batches(samples.lengths, budget)
        made_from = {
            "model": fingerprint,
            "data": samples.fingerprint,
            "kind": recorded.kind,
            "layer": recorded.layer,
            "tokens_per_batch": budget,
        }
        form, head = _begun(folder, made_from)
        if form is None:
            form, head = chosen_form(model, samples, batches[0], recorded.kind, recorded.layer)
            if notice is not None:
                notice(f"reference of {samples.source}: {form.what}, {in_bytes(form.nbytes)} in {folder}")
            if head is not None:
                save_pair(folder, "head", {name: part for name, part in head.items() if part is not None}, {})
            with writing(folder):
                write_json(folder / _MADE_FROM, {**made_from, **form.as_json()})
        shards, done = [], 0
        for number, members in enumerate(_shards(batches, samples, form)):
            found = load_pair(folder, stem := f"rows-{number}")
            if found is None:
                values = []
                for batch in members:
                    values.append(record(model, collate(samples, batch), form))
                    done += len(batch)
                    if progress is not None:
                        progress(done)
                positions = torch.tensor([position for batch in members for position in batch])
                save_pair(folder, stem, {"values": torch.cat(values), "positions": positions}, {})
                found = load_pair(folder, stem)  # memory-mapped
            else:
                done += sum(map(len, members))
            shards.append(found[0])
        return cls(shards, samples, head)

    def rows(self, indices: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> ReferenceRows:
        """What was recorded of some samples.

        Args:
            indices: positions in the set, in the order of the batch: `Batch.indices`.
            device: where the batch is.
        """
        parts = []
        for index in indices:
            shard, row, count = self._place[int(index)]
            parts.append(self._values[shard][row : row + count])
        device = torch.device(device)
        if self._head is not None and device not in self._head_on:
            self._head_on[device] = {
                name: None if part is None else part.to(device) for name, part in self._head.items()
            }
        return ReferenceRows(torch.cat(parts).to(device), self._head_on.get(device))


def _begun(folder: Path, made_from: Mapping[str, Any]) -> tuple[Form | None, Head | None]:
    """How a recording that has been begun keeps its rows; refuses one of something else."""
    found = read_json(folder / _MADE_FROM)
    if found is None:
        return None, None
    if differs := differences({name: found.get(name) for name in made_from}, made_from):
        raise RunFolderError(
            f"{folder}: made from something else ({differs}); give what it was made from, or --overwrite"
        )
    form = Form.from_json(found)
    if form.name != "head-inputs":
        return form, None
    head = load_pair(folder, "head")
    if head is None:
        raise RunFolderError(f"{folder}: damaged (the output embedding is missing); start anew with --overwrite")
    return form, {"weight": head[0]["weight"], "bias": head[0].get("bias")}


def _shards(batches: list[list[int]], samples: SampleSet, form: Form) -> list[list[list[int]]]:
    """Runs of batches whose rows fill a pair of files."""
    shards: list[list[list[int]]] = []
    filled = SHARD_BYTES
    for batch in batches:
        if filled >= SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(batch)
        filled += form.bytes_of(len(batch), sum(samples[position].num_counted for position in batch))
    return shards
