"""New models and the tokenizers trained for them."""

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fillm.data import Row
from fillm.data.templates import CHAT, parse_template
from fillm.errors import DataError, ModelError, UsageError
from fillm.models import quiet_transformers
from fillm.paths import expanded

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
_BYTES = 256
_SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 2048},
    "small": {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 4096},
}


def architecture_config(architecture: str) -> PretrainedConfig:
    """The configuration of a new model.

    Args:
        architecture: `tiny` (a Llama of 4 layers, hidden 128, vocabulary 2048), `small` (hidden 256, vocabulary 4096;
            both 4 heads, head and embedding apart), or the path of a transformers `config.json` or of its folder.

    Raises:
        UsageError: neither of the names nor a path.
        ModelError: a file that is no configuration of a causal language model.
    """
    if architecture in _SIZES:
        return LlamaConfig(
            **_SIZES[architecture],
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
        )
    path = expanded(architecture)
    if not path.exists():
        raise UsageError(f"--architecture {architecture}: neither {' nor '.join(_SIZES)} nor an existing config.json")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"--architecture {architecture}: no causal language model's config.json: {error}") from None
    return config


def new_model(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A model with random weights (float32, as the architecture initialises itself) that fits the tokenizer.

    Args:
        config: its configuration; vocabulary size and special tokens are set to the tokenizer's.
        tokenizer: the tokenizer it is to be used with.
        seed: of the weights; the global random state is left as it was.
    """
    config.vocab_size = len(tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def training_texts(rows: Sequence[Row], template: str) -> list[str]:
    """The text of every row as the model will meet it, to train a tokenizer on.

    Raises:
        DataError: no row has text (rows of `input_ids` need a given tokenizer or none at all).
    """
    parsed = parse_template(template)
    texts = []
    for row in rows:
        fields = [row.fields.get(name) for name in ("question", "answer", "text", "labels")]
        strings = [field for field in fields if isinstance(field, str)]
        if len(strings) == 2 and template != CHAT:
            strings = [f"{parsed.before}{strings[0]}{parsed.between}", parsed.completion(strings[1])]
        if strings:
            texts.append("".join(strings) if template != CHAT else " ".join(strings))
    if not texts:
        raise DataError("no row has text to train a tokenizer on; give --model, or --tokenizer for a new model")
    return texts


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (every text encodes, nothing is unknown) with `<pad>`, `<bos>` and `<eos>`.

    A sequence begins with `<bos>`. Small data may not have `vocab_size` tokens worth merging; then there are fewer.

    Args:
        texts: what it is trained on.
        vocab_size: most tokens, the 256 bytes and the 3 special tokens included.

    Raises:
        UsageError: no room for the bytes.
    """
    if vocab_size < _BYTES + 3:
        raise UsageError(
            f"--vocab-size {vocab_size}: give at least {_BYTES + 3}, one for each byte and 3 special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
