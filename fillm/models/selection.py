"""Choose tensors of a catalogue by kind or by globs on their names."""

import fnmatch
from collections.abc import Sequence

from fillm.errors import UsageError
from fillm.models.catalogue import KINDS, TensorInfo


def select_tensors(
    catalogue: Sequence[TensorInfo],
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> list[TensorInfo]:
    """The tensors that `include` names and `exclude` does not, in the order of the catalogue.

    Args:
        catalogue: what `fillm.models.catalogue` returned.
        include: kinds (`mlp`, `attn`, ...) and globs on names (`*.mlp.*`), listed or separated by commas; `None` or
            empty is all of them. A tied tensor is matched by any of its names.
        exclude: the same; what it matches is left out.

    Raises:
        UsageError: a pattern that matches no tensor (a kind the model has none of may be excluded all the same), or
            nothing left.
    """
    kept = list(catalogue)
    if wanted := _patterns(include):
        names = set().union(*(_matched(catalogue, pattern, "--include") for pattern in wanted))
        kept = [info for info in kept if info.name in names]
    if unwanted := _patterns(exclude):
        names = set().union(*(_matched(catalogue, pattern, "--exclude") for pattern in unwanted))
        kept = [info for info in kept if info.name not in names]
    if not kept:
        raise UsageError(f"--exclude {exclude}: leaves none of the {len(catalogue)} tensors")
    return kept


def _patterns(given: str | Sequence[str] | None) -> list[str]:
    listed = [given] if isinstance(given, str) else given or []
    return [pattern.strip() for text in listed for pattern in text.split(",") if pattern.strip()]


def _matched(catalogue: Sequence[TensorInfo], pattern: str, flag: str) -> set[str]:
    if pattern in KINDS:
        names = {info.name for info in catalogue if info.kind == pattern}
        if names or flag == "--exclude":
            return names
    else:
        names = {
            info.name
            for info in catalogue
            if any(fnmatch.fnmatchcase(name, pattern) for name in (info.name, *info.tied))
        }
        if names:
            return names
    present = ", ".join(kind for kind in KINDS if any(info.kind == kind for info in catalogue))
    raise UsageError(f"{flag} {pattern}: matches no tensor; give a kind ({present}) or a glob on names such as '*mlp*'")
