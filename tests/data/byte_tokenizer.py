"""A byte-level tokenizer made on the spot: one token a byte, so that a reader can see what each id stands for."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(
    *, bos: bool = True, eos: bool = True, appends_eos: bool = False, chat: bool = False
) -> PreTrainedTokenizerFast:
    vocab = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<s>": 256, "</s>": 257}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos or appends_eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if appends_eos else "")
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    names = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
