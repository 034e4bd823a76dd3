"""JSON, YAML and text that anybody may have written: read within bounds, every fault of theirs a `ValueError`.

A file may be endless, nested deeper than Python's stack, or a few lines that unfold to billions of entries.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import yaml

LARGEST = 1 << 26  # bytes of a document: 64 MiB
MOST_ENTRIES = 1 << 22  # of a YAML document, what its aliases stand for included


def read_bytes(path: str | os.PathLike[str], most: int = LARGEST) -> bytes:
    """A file's bytes; no more than `most` are read.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is longer.
    """
    with open(path, "rb") as file:
        # The size that is told may be of a pipe or of a file that grows.
        if os.fstat(file.fileno()).st_size <= most and len(data := file.read(most + 1)) <= most:
            return data
    raise ValueError(f"larger than {most >> 20} MiB")


def read_text(path: str | os.PathLike[str], most: int = LARGEST) -> str:
    """A text file in UTF-8; raises as `read_bytes`."""
    return read_bytes(path, most).decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: not JSON, nested too deep, or with numbers too long.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json_document(path: str | os.PathLike[str], most: int = LARGEST) -> Any:
    """What a file of JSON says.

    Raises:
        OSError: if it cannot be read.
        ValueError: as `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, most))


def read_yaml_document(path: str | os.PathLike[str], most: int = LARGEST) -> Any:
    """What a file of YAML says, plain values only.

    Raises:
        OSError: if it cannot be read.
        ValueError: larger than `most`, not YAML, nested too deep, or unfolding to too many entries.
    """
    return parse_yaml(read_text(path, most))


def parse_yaml(text: str) -> Any:
    """What YAML says; raises as `read_yaml_document`."""
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _unfolded(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        at = f" (line {where.line + 1}, column {where.column + 1})" if where else ""
        raise ValueError(", ".join(filter(None, (error.context, error.problem))) + at) from None
    # What it makes of tags on values that do not fit them (`!!bool maybe`, `2001-99-99`) has no kind of its own.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    finally:
        if loader is not None:
            loader.dispose()


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many entries a node stands for; an alias counts as often as it is used."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("an entry that holds itself")
        return known[id(node)]
    known[id(node)] = 0
    count = 1 + sum(_unfolded(part, known) for part in _parts(node))
    if count > MOST_ENTRIES:
        raise ValueError(f"more than {MOST_ENTRIES} entries")
    known[id(node)] = count
    return count


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value
