"""A mask: which weights of a model may change (docs/method.md, "From ranking to mask")."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fillm.errors import UsageError
from fillm.masks.mask_files import load_mask, read_bools, save_mask, why_no_name, write_bools
from fillm.masks.tensor_mask import TensorMask
from fillm.models import TensorInfo, catalogue, select_tensors


class Mask(Mapping[str, TensorMask]):
    """Selected weights by tensor name, in the order of the names; tensors of which nothing is selected are left out.

    Args:
        tensors: by name.
        provenance: where it comes from, plain values for JSON.
        model_fingerprint: of the model it was made for, as `fillm.models.model_fingerprint` gives it; None if unknown.

    Raises:
        UsageError: for a name that no parameter can have.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorMask],
        provenance: Mapping[str, Any] | None = None,
        model_fingerprint: str | None = None,
    ) -> None:
        for name in tensors:
            if (why := why_no_name(name)) is not None:
                raise UsageError(f"mask of the tensor {name!r}: {why}")
        self._tensors: Mapping[str, TensorMask] = {name: tensors[name] for name in sorted(tensors) if tensors[name]}
        self.provenance, self.model_fingerprint = dict(provenance or {}), model_fingerprint

    @classmethod
    def whole(cls, model: nn.Module, names: Iterable[str]) -> "Mask":
        """Whole tensors of a model.

        Raises:
            UsageError: for a name that is not one of its parameters'.
        """
        shapes = _shapes(model, sorted(names))
        provenance = {"method": "names", "names": list(shapes)}
        return cls({name: TensorMask(shape) for name, shape in shapes.items()}, provenance)

    @classmethod
    def from_names(cls, model: nn.Module, names: Iterable[str]) -> "Mask":
        """Whole tensors of a model, from a list of names such as Hugging Face's `modules_to_save`.

        Args:
            model: whose tensors they are.
            names: each a path of a module or its end (`lm_head`, `layers.3.mlp`), then all parameters below it, tied
                ones included; or else a parameter, a kind (`norm`) or a glob on parameter names (`*.mlp.*`).

        Raises:
            UsageError: naming the first that matches nothing.
        """
        infos, wanted, found = catalogue(model), list(names), set()
        for pattern in wanted:
            below = [info for info in infos if any(f".{pattern}." in f".{owner}." for owner in _owners(info))]
            found |= {info.name for info in below or select_tensors(infos, pattern)}
        return cls.whole(model, found)

    @classmethod
    def from_bool(cls, chosen: Mapping[str, Tensor]) -> "Mask":
        """From plain `{name: bool tensor}`, True where a weight is selected.

        Raises:
            UsageError: for a tensor that is not bool.
        """
        for name, tensor in chosen.items():
            if tensor.dtype != torch.bool:
                raise UsageError(f"mask of {name}: must be bool, not {tensor.dtype}")
        return cls({name: TensorMask.from_bool(tensor.cpu()) for name, tensor in chosen.items()}, {"method": "bool"})

    def __getitem__(self, name: str) -> TensorMask:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Mask({self.count} weights of {len(self)} tensors)"

    @property
    def count(self) -> int:
        """Selected weights."""
        return sum(tensor.count for tensor in self.values())

    def __or__(self, other: "Mask") -> "Mask":
        """The weights of either mask.

        Raises:
            UsageError: for masks of different models.
        """
        return self._combined(other, "union", {*self, *other}, torch.bitwise_or)

    def __and__(self, other: "Mask") -> "Mask":
        """The weights of both masks.

        Raises:
            UsageError: for masks of different models.
        """
        return self._combined(other, "intersection", set(self) & set(other), torch.bitwise_and)

    def _combined(
        self, other: "Mask", method: str, names: set[str], operation: Callable[[Tensor, Tensor], Tensor]
    ) -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        prints = [print_ for print_ in (self.model_fingerprint, other.model_fingerprint) if print_ is not None]
        if len(set(prints)) > 1:
            raise UsageError(f"{method} of two masks: made for different models ({_differ(*prints)})")
        tensors = {}
        for name in sorted(names):
            if name not in self or name not in other:
                tensors[name] = self[name] if name in self else other[name]
                continue
            one, two = self[name], other[name]
            if one.shape != two.shape:
                shapes = f"{list(one.shape)} and {list(two.shape)}"
                raise UsageError(f"{method} of two masks: {name} has the shapes {shapes}; they are of different models")
            tensors[name] = one.combined(two, operation)
        provenance = {"method": method, "of": [self.provenance, other.provenance]}
        return Mask(tensors, provenance, prints[0] if prints else None)

    def complement(self, model: nn.Module) -> "Mask":
        """Every weight of the model's parameters that is not selected.

        Raises:
            UsageError: as `check`.
        """
        self.check(model)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        tensors = {name: self[name].complement() if name in self else TensorMask(shapes[name]) for name in shapes}
        return Mask(tensors, {"method": "complement", "of": [self.provenance]}, self.model_fingerprint)

    def check(self, model: nn.Module, fingerprint: str | None = None) -> None:
        """Refuses a model that the mask was not made for. Reads, and so verifies, all of a loaded mask.

        Args:
            model: whose weights are to be changed.
            fingerprint: `fillm.models.model_fingerprint(model)`, which reads all weights; without it, names and shapes
                are compared alone.

        Raises:
            UsageError: naming the first tensor that the model does not have or has in another shape; or both
                fingerprints, if they differ.
        """
        shapes = _shapes(model, self)
        for name, tensor in self.items():
            if shapes[name] != tensor.shape:
                raise UsageError(
                    f"the mask selects from {name} of shape {list(tensor.shape)}, here it has {list(shapes[name])}; "
                    "the mask is of another model"
                )
        if fingerprint is not None and self.model_fingerprint not in (None, fingerprint):
            raise UsageError(
                f"the mask was made for other weights ({_differ(self.model_fingerprint, fingerprint)}); "
                "give the model that it was made for, or make the mask again"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the mask: one bit a weight at most, a few bytes for a whole tensor, one bit a row for rows.

        Raises:
            RunFolderError: if the disk refuses.
        """
        save_mask(path, self._tensors, self.provenance, self.model_fingerprint)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Mask":
        """Opens a saved mask; a tensor's bits stay on the disk, mapped, and are verified when first asked for.

        Raises:
            MaskError: naming the file and what is wrong with it, here or when a tensor is asked for.
        """
        tensors, provenance, fingerprint = load_mask(path)
        mask = cls({}, provenance, fingerprint)
        mask._tensors = tensors
        return mask

    def export_bool(self, path: str | os.PathLike[str]) -> None:
        """Writes `{name: bool tensor}` as safetensors, a byte a weight; of a tensor that is absent nothing is selected.

        Raises:
            RunFolderError: if the disk refuses.
        """
        write_bools(path, self._tensors)

    @classmethod
    def import_bool(cls, path: str | os.PathLike[str]) -> "Mask":
        """Reads `{name: bool tensor}` from safetensors, one tensor at a time.

        Raises:
            MaskError: naming the file and what is wrong with it.
        """
        return cls(read_bools(path), {"method": "bool"})

    def tensor_names(self) -> list[str]:
        """The selected tensors, as a list of names can say it.

        Raises:
            UsageError: if of one of them only a part is selected.
        """
        for name, tensor in self.items():
            if tensor.form != "whole":
                raise UsageError(f"{name}: only a part is selected, which a name cannot say; save or export the mask")
        return list(self)

    def module_names(self) -> list[str]:
        """The modules that own the selected tensors, as in `modules_to_save`, which trains all a module owns.

        Raises:
            UsageError: as `tensor_names`.
        """
        return sorted({name.rpartition(".")[0] for name in self.tensor_names()})


def _owners(info: TensorInfo) -> Iterator[str]:
    """Paths of the modules that have the tensor: several where it is tied."""
    yield info.module
    for name in info.tied:
        yield name.rpartition(".")[0]


def _shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters, looked up by the one name that optimisers and masks know each by.

    Raises:
        UsageError: for a name that is no parameter's.
    """
    parameters = dict(model.named_parameters())
    shapes = {}
    for name in names:
        if name not in parameters:
            tied = dict(model.named_parameters(remove_duplicate=False)).get(name)
            own = next((own for own, parameter in parameters.items() if parameter is tied), None)
            why = "does not have; it is of another model" if own is None else f"calls {own}: use that name"
            raise UsageError(f"the mask selects from {name}, which this model {why}")
        shapes[name] = tuple(parameters[name].shape)
    return shapes


def _differ(one: str, other: str) -> str:
    return f"model fingerprints {one[:12]}... and {other[:12]}..."
