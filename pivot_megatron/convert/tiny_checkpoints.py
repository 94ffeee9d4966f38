"""Small SigLIP and Qwen2.5 checkpoints made on the spot, in the folders and tensor names of the hub's real ones.

Everything downstream (import, training, export, reloading) sees an ordinary Hugging Face folder, so what works on these
works on the released checkpoints. The same arguments always give the same files.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from pivot_megatron.errors import UserError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# The split of Qwen2.5's own tokenizer; `\p{N}` without a quantifier is what makes every digit a token of its own.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

_BYTES = 256
_VOCAB_MULTIPLE = 64


def make_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE like Qwen2.5's on `corpus`, with ChatML as its chat template.

    The ids are laid out as in Qwen2.5: the 256 bytes and the merges first, then the special tokens. A corpus with
    too few different words gives fewer than `vocab_size` tokens; `len(tokenizer)` is the number there are.

    Raises:
        UserError: `vocab_size` has no room for the bytes and the special tokens.
    """
    smallest = _BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"tokenizer: expected vocab_size >= {smallest} ({_BYTES} bytes + {len(SPECIAL_TOKENS)} special tokens), "
            f"found {vocab_size}; choose a larger one"
        )
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer: PreTrainedTokenizerBase = Qwen2Tokenizer(
        tokenizer_object=bpe,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    return tokenizer


def make_encoder(
    folder: Path,
    *,
    image_size: int,
    patch_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    ffn: int,
    seed: int,
) -> None:
    """Write a randomly initialised SigLIP vision encoder, pooling head included, and its image processor to `folder`.

    `image_size` and `patch_size` are in pixels. The weights are float32, drawn by Hugging Face's own initialisation.

    Raises:
        UserError: the sizes do not divide.
    """
    _divides("encoder: hidden_size", hidden_size, "heads", heads)
    _divides("encoder: image_size", image_size, "patch_size", patch_size)
    config = SiglipVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiglipVisionModel(config)
    model.save_pretrained(folder)
    _prefix_names(folder / "model.safetensors", "vision_model.")
    size = {"height": image_size, "width": image_size}
    SiglipImageProcessorPil(size=size).save_pretrained(folder)


def make_head(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    tied: bool,
    seed: int,
    vocabulary: int | None = None,
) -> None:
    """Write a randomly initialised Qwen2.5 language model and `tokenizer` to `folder`.

    The model's vocabulary is `vocabulary`, or the next multiple of 64 above `len(tokenizer)`. As in Qwen2.5 there is
    always a spare row, so that an image token can take an id without resizing. `tied` shares the embedding with the
    output layer.

    Raises:
        UserError: the sizes do not divide, or `vocabulary` leaves no spare row.
    """
    _divides("head: hidden_size", hidden_size, "heads", heads)
    _divides("head: heads", heads, "kv_heads", kv_heads)
    rows = vocabulary or (len(tokenizer) // _VOCAB_MULTIPLE + 1) * _VOCAB_MULTIPLE
    if rows <= len(tokenizer):
        raise UserError(
            f"head: expected vocabulary > {len(tokenizer)} (the tokenizer's), found {rows}; choose a larger one"
        )
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    # Here and not in the config, as Qwen2.5 has it: there it would freeze that row of the embedding at zero.
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _divides(whole: str, size: int, part: str, by: int) -> None:
    if size % by:
        raise UserError(f"{whole}: expected a multiple of {part}={by}, found {size}; change one of the two")


def _prefix_names(weights: Path, prefix: str) -> None:
    """Rename every tensor to `prefix` + name, where it does not start so already.

    Hub files of SigLIP carry the prefix; transformers 5 no longer writes it, and reads both.
    """
    tensors = load_file(weights)
    renamed = {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in tensors.items()}
    save_file(renamed, weights, metadata={"format": "pt"})
