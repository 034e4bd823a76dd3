"""Load a causal language model and its tokenizer: safetensors only, no remote code unless asked, errors on one line."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fillm.errors import ModelError
from fillm.hub import announce, quiet_loggers
from fillm.paths import expanded

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LARGEST = 1 << 29  # bytes of a file of a configuration or tokenizer
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_CAUSAL = ("CausalLM", "LMHeadModel", "ConditionalGeneration")


def resolve_device(device: str = "auto") -> torch.device:
    """`auto` (the first CUDA device, or else the CPU), `cpu`, `cuda` or `cuda:i`, as a device that is there.

    Raises:
        ModelError: no such device on this machine, or no device's name.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ModelError(f"--device {device}: no device's name; give auto, cpu, cuda or cuda:i") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ModelError(f"--device {device}: this machine has {count or 'no'} CUDA devices; give --device cpu or auto")
    if chosen.type not in ("cpu", "cuda"):
        raise ModelError(f"--device {device}: only cpu and cuda are supported")
    return chosen


def load_model(
    model: str,
    *,
    adapter: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model in eval mode, no parameter requiring grad.

    Args:
        model: a folder as `save_pretrained` writes it, or a Hub id.
        adapter: a PEFT adapter's folder or Hub id, put around the model and not merged.
        dtype: dtype of the weights: `float32`, `bfloat16`, `float16`, or `auto` for the one they were saved in.
        device: see `resolve_device`.
        trust_remote_code: whether Python code that comes with the weights may run.

    Returns:
        The `PreTrainedModel` (with an adapter, the `PeftModel` around it) on the device.

    Raises:
        ModelError: no such folder or id, no config or weights, pickled weights only, damaged or missing tensors, not a
            causal language model, remote code without leave, no such device, adapter that cannot be put on.
    """
    target = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"--dtype {dtype}: give one of {', '.join(DTYPES)} or auto")
    config = load_config(model, trust_remote_code)
    # Packed weights are unpacked by kernels of one kind of device: they are put there as they are read.
    packed = getattr(config, "quantization_config", None) is not None
    with quiet_transformers(), explained(model):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model,
            config=config,
            dtype="auto" if dtype == "auto" else DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            device_map={"": target} if packed else None,
            output_loading_info=True,
            # Reported below by name, where transformers only logs the names; packed weights have shapes of their own.
            ignore_mismatched_sizes=not packed,
        )
    missing = sorted(report.get("missing_keys") or ()) + sorted(map(_first, report.get("mismatched_keys") or ()))
    if missing:
        raise ModelError(
            f"{model}: the weights lack {_some(missing)} or hold it in another shape than config.json says"
        )
    if adapter is not None:
        loaded = _with_adapter(loaded, adapter)
    loaded = (loaded if packed else loaded.to(target)).eval()
    return loaded.requires_grad_(False)


def load_tokenizer(source: str, *, trust_remote_code: bool = False, option: str = "--model") -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder or under a Hub id.

    Args:
        source: the folder or id.
        trust_remote_code: whether Python code that comes with it may run.
        option: the flag that named it, `--model` or `--tokenizer`, for messages.

    Raises:
        ModelError: no such folder or id, no tokenizer in it, or one that cannot be read.
    """
    folder = local_folder(source)
    if folder is not None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        if option == "--tokenizer":
            raise ModelError(f"--tokenizer {source}: holds no tokenizer (no tokenizer.json); give a folder with one")
        _require_config(source, folder)
        raise ModelError(f"{source}: holds no tokenizer (no tokenizer.json); give --tokenizer")
    with quiet_transformers(), explained(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    # tokenizers 0.23 keeps the words that a tokenizer has met after it is gone, 0.4 MB of 800 rows, in a process that
    # loads one for every run. Without them it was not measurably slower.
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if hasattr(model, "_resize_cache"):
        model._resize_cache(0)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer's files into a folder.

    Raises:
        OSError: if the disk refuses.
    """
    try:
        with quiet_transformers():
            tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from None  # the library tokenizers has no kind of its own for a disk that refuses


def local_folder(source: str) -> Path | None:
    """The folder, `None` for what can only be a Hub id."""
    path = expanded(source)
    if path.is_dir():
        _refuse_endless(path)
        return path
    if path.exists():
        raise ModelError(f"{source}: is a file; give the folder that holds config.json and the weights")
    if not _HUB_ID.fullmatch(source):
        raise ModelError(f"{source}: no such folder")
    announce(source, "no such folder")
    return None


def _refuse_endless(folder: Path) -> None:
    """Configurations and tokenizers are read as a whole by the libraries, however large; the largest have some MB."""
    for path in (*folder.glob("*.json"), *folder.glob("*.txt"), *folder.glob("*.model"), *folder.glob("*.jinja")):
        if path.is_file() and path.stat().st_size > _LARGEST:
            raise ModelError(f"{path}: larger than {_LARGEST >> 20} MiB, which no configuration or tokenizer is")


def _require_config(source: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        hint = " (an adapter: give its base as --model and it as --adapter)" if is_adapter else ""
        if (folder / "model" / "config.json").is_file():  # a run's folder, one level too high
            hint = f" (there is one in {Path(source) / 'model'}: give that)"
        raise ModelError(f"{source}: no config.json in it{hint}; not a model's folder")


def load_config(model: str, trust_remote_code: bool) -> Any:
    """The configuration of a causal language model with weights in safetensors; `ModelError` for anything else."""
    folder = local_folder(model)
    if folder is not None:
        _require_config(model, folder)
        if not any(folder.glob("*.safetensors")):
            pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
            found = f"only pickled weights ({_some(pickled)}), which are never loaded" if pickled else "no weights"
            raise ModelError(f"{model}: {found}; save the model as model.safetensors")
    with quiet_transformers(), explained(model):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    named = [str(name) for name in getattr(config, "architectures", None) or ()]
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if (known is None and not remote) or (named and not any(word in name for name in named for word in _CAUSAL)):
        raise ModelError(f"{model}: {', '.join(named) or config.model_type} is not a causal language model")
    return config


def imported_peft(needed_by: str) -> Any:
    """The package peft, without what the packages that it looks for have to say.

    Raises:
        ModelError: it is not installed; begins with `needed_by`.
    """
    try:
        with quiet_transformers():
            import peft
    except ImportError:
        raise ModelError(f"{needed_by} needs the package peft; pip install 'fillm[adapters]'") from None
    return peft


def _with_adapter(model: PreTrainedModel, adapter: str) -> Any:
    peft = imported_peft(f"--adapter {adapter}:")
    folder = local_folder(adapter)
    if folder is None:
        # Fetched by name: left to itself, peft falls back to an adapter_model.bin where it finds no safetensors.
        with quiet_transformers(), explained(adapter):
            folder = Path(huggingface_hub.snapshot_download(adapter, allow_patterns=list(_ADAPTER_FILES)))
    for name in _ADAPTER_FILES:
        if not (folder / name).is_file():
            raise ModelError(f"--adapter {adapter}: no {name} in it; adapters are read from safetensors only")
    try:
        with quiet_transformers(), explained(adapter), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # peft reads what transformers has deprecated
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapped = peft.PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
    except (RuntimeError, KeyError, TypeError, UserWarning) as error:
        raise ModelError(f"--adapter {adapter}: does not fit the model: {_shortened(error)}") from None
    return wrapped


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and no advice from transformers and its Hub: what matters of it is raised as an error."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with quiet_loggers("bitsandbytes"):  # it tells of kernels that it could have
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def explained(source: str) -> Iterator[None]:
    """What loading raises, as one line that says what is wrong with `source`."""
    try:
        yield
    except SafetensorError as error:
        raise ModelError(f"{source}: damaged weights in {_damaged_file(source)}: {_shortened(error)}") from None
    except ImportError as error:  # of what a quantised model is read with
        raise ModelError(f"{source}: {_shortened(error)}") from None
    except Exception as error:
        # The library tokenizers has no kind of its own for a damaged file, and a configuration may be nested too deep.
        if not isinstance(error, OSError | ValueError | RecursionError) and type(error) is not Exception:
            raise
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"{source}: needs Python code that comes with it; read that code, then give --trust-remote-code"
            ) from None
        if expanded(source).is_dir():
            raise ModelError(f"{source}: {_shortened(error)}") from None
        raise ModelError(f"{source}: no such folder, and the Hub does not give it: {_shortened(error)}") from None


def _damaged_file(source: str) -> str:
    for path in sorted(expanded(source).glob("*.safetensors")):
        try:
            with safe_open(str(path), framework="pt"):
                pass
        except (SafetensorError, OSError):
            return path.name
    return "a safetensors file"


def _first(key: Any) -> str:
    """Mismatched keys come with their shapes."""
    return str(key[0] if isinstance(key, tuple) else key)


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + rest


def _shortened(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
