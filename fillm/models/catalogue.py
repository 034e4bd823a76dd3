"""The catalogue of a model's tensors: what each one is and where in the model it stands.

Structure decides first (the module that owns a tensor, the model's own input and output embeddings), well-known names
second. Two decisions that structure does not settle:

* A mixture's router (`mlp.gate`) and its shared expert are `mlp`: every token goes through them. `expert` is kept for
  the weights that only routed tokens see.
* Learned position embeddings are `embed`, as are type embeddings; a tied head is the embedding's tensor and so `embed`.
"""

from dataclasses import dataclass

from torch import Tensor, nn

KINDS: tuple[str, ...] = ("mlp", "attn", "norm", "embed", "lm_head", "expert", "lora", "other")

_WRAPPERS = frozenset({"base_layer", "original_module", "modules_to_save"})
_NORM_NAMES = ("layernorm", "layer_norm", "rmsnorm", "rms_norm")
_ATTENTION_NAMES = frozenset(
    [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "qkv_proj",
        "out_proj",
        "query",
        "key",
        "value",
        "query_key_value",
        "c_attn",
        "wqkv",
        "qkv",
        "q",
        "k",
        "v",
    ]
)
_MLP_NAMES = frozenset(
    [
        "fc1",
        "fc2",
        "fc_in",
        "fc_out",
        "c_fc",
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
        "dense_h_to_4h",
        "dense_4h_to_h",
        "w1",
        "w2",
        "w3",
        "router",
    ]
)
_MLP_BLOCKS = ("mlp", "ffn", "feed_forward", "feedforward", "block_sparse_moe", "moe", "shared_expert")


@dataclass(frozen=True)
class TensorInfo:
    """One parameter tensor of a model.

    Attributes:
        name: its (first) name in `named_parameters()`.
        kind: one of `KINDS`.
        layer: index of the block it belongs to, -1 if none.
        numel: number of entries.
        shape: its shape.
        tied: the other names of the same tensor.
        expert: number of experts whose weights it holds (the first axis of a fused stack), 0 if it is no expert's.
        lora: whether it belongs to a low-rank adapter.
        module: path of the module that owns it.
    """

    name: str
    kind: str
    layer: int
    numel: int
    shape: tuple[int, ...]
    tied: tuple[str, ...]
    expert: int
    lora: bool
    module: str


def catalogue(model: nn.Module) -> list[TensorInfo]:
    """Every parameter tensor of `model` that a gradient can reach, once, in the order of `named_parameters()`.

    Weights that are packed as integers (bitsandbytes' 4-bit and 8-bit ones) have none and are not listed; adapters,
    norms and embeddings beside them are.

    Args:
        model: a `PreTrainedModel`, a PEFT model around one, or any module (then no tensor is told to be `lm_head` by
            structure). Works on the meta device: no value is read.

    Returns:
        One `TensorInfo` a tensor; tied tensors appear under their first name.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    inputs, outputs = (
        _embedding_tensors(model, "get_input_embeddings"),
        _embedding_tensors(model, "get_output_embeddings"),
    )
    infos = []
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        module = name.rpartition(".")[0]
        lora = any(part.startswith("lora_") for part in name.split("."))
        kind = "lora" if lora else _kind(name, parameter, modules[module], inputs, outputs)
        infos.append(
            TensorInfo(
                name=name,
                kind=kind,
                layer=_layer(name, modules),
                numel=parameter.numel(),
                shape=tuple(parameter.shape),
                tied=tuple(names[id(parameter)][1:]),
                expert=_experts_held(name, parameter, modules) if kind == "expert" else 0,
                lora=lora,
                module=module,
            )
        )
    return infos


def _embedding_tensors(model: nn.Module, getter: str) -> set[int]:
    """Ids of the tensors of the model's input or output embeddings; empty if it has none or does not say."""
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return set()
    return set() if module is None else {id(parameter) for parameter in module.parameters()}


def _layer(name: str, modules: dict[str, nn.Module]) -> int:
    """The first index into a `ModuleList` along the tensor's path: the block, not an expert inside it."""
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if part.isdecimal() and isinstance(modules.get(".".join(parts[:depth])), nn.ModuleList):
            return int(part)
    return -1


def _kind(name: str, parameter: Tensor, owner: nn.Module, inputs: set[int], outputs: set[int]) -> str:
    parts = [part for part in name.lower().split(".") if part not in _WRAPPERS]
    path, last_module = parts[:-1], (parts[-2] if len(parts) > 1 else "")
    if id(parameter) in inputs or isinstance(owner, nn.Embedding):
        return "embed"
    if id(parameter) in outputs:
        return "lm_head"
    if _is_norm(owner, last_module):
        return "norm"
    if any("expert" in part and "shared" not in part for part in path):
        return "expert"
    return next((kind for part in parts if (kind := _kind_of_component(part))), "other")


def _is_norm(owner: nn.Module, last_module: str) -> bool:
    if "norm" in type(owner).__name__.lower() or any(word in last_module for word in _NORM_NAMES):
        return True
    # A projection may be called `norm_proj`; only a module without matrices may be a norm by the word alone.
    vectors_only = all(parameter.ndim < 2 for parameter in owner.parameters(recurse=False))
    return vectors_only and ("norm" in last_module or last_module.startswith("ln_"))


def _kind_of_component(part: str) -> str | None:
    """The kind that one component of a tensor's path speaks for: the outermost one that speaks decides."""
    if part in ("wte", "wpe") or "embed" in part:
        return "embed"
    if part in _ATTENTION_NAMES or "attn" in part or "attention" in part:
        return "attn"
    if part in _MLP_NAMES or any(word in part for word in _MLP_BLOCKS):
        return "mlp"
    return "lm_head" if part in ("lm_head", "embed_out") else None


def _experts_held(name: str, parameter: Tensor, modules: dict[str, nn.Module]) -> int:
    """The length of the expert axis of a fused stack; 1 for a tensor of one expert of a `ModuleList`."""
    parts = name.split(".")
    for depth in range(len(parts) - 1):
        if "expert" in parts[depth].lower() and isinstance(modules.get(".".join(parts[: depth + 1])), nn.ModuleList):
            return 1
    return int(parameter.shape[0])
