from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM, SiglipVisionModel

from pivot_megatron.convert.tiny_checkpoints import SPECIAL_TOKENS, make_encoder, make_head, make_tokenizer
from pivot_megatron.errors import UserError

CORPUS = [
    "How many red circles are there? There are 12 of them, left of the blue square.",
    "Which shape is above the large yellow triangle? A small green star, touching its upper corner.",
] * 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer(CORPUS, 320)


def encoder(folder: Path, *, seed: int = 0, heads: int = 2) -> Path:
    make_encoder(folder, image_size=32, patch_size=8, hidden_size=32, layers=3, heads=heads, ffn=48, seed=seed)
    return folder


def head(folder: Path, tokenizer: PreTrainedTokenizerBase, *, tied: bool = True, heads: int = 4) -> Path:
    make_head(folder, tokenizer, hidden_size=32, layers=2, heads=heads, kv_heads=2, ffn=48, tied=tied, seed=0)
    return folder


def tensor_names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return sorted(weights.keys())


def test_tokenizer_reloads_as_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nHow many red?  Caf\u00e9 \u4f60\u597d 120<|im_end|>\n"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert loaded.bos_token is None
    assert loaded.chat_template == tokenizer.chat_template


def test_tokenizer_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 320
    ids = [tokenizer.encode(token) for token in SPECIAL_TOKENS]
    assert ids == [[317], [318], [319]]
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]
    assert tokenizer.decode([317, *tokenizer.encode("red"), 319], skip_special_tokens=True) == "red"


def test_tokenizer_is_deterministic(tokenizer: PreTrainedTokenizerBase) -> None:
    assert make_tokenizer(CORPUS, 320).get_vocab() == tokenizer.get_vocab()


def test_chat_template_is_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "<image>\nHow many?"}, {"role": "assistant", "content": "3"}]
    question = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == question
    assert tokenizer.apply_chat_template(turns, tokenize=False) == question + "3<|im_end|>\n"
    own = [{"role": "system", "content": "Be brief."}, *turns]
    assert str(tokenizer.apply_chat_template(own, tokenize=False)).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_too_small_a_vocabulary_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"vocab_size >= 259.*found 258"):
        make_tokenizer(CORPUS, 258)


def test_encoder_loads_in_plain_transformers(tmp_path: Path) -> None:
    loaded: Any = SiglipVisionModel.from_pretrained(encoder(tmp_path), output_loading_info=True)
    model, loading = loaded
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert model.config.model_type == "siglip_vision_model"
    names = tensor_names(tmp_path)
    assert all(name.startswith("vision_model.") for name in names)
    assert "vision_model.head.probe" in names and "vision_model.encoder.layers.2.self_attn.q_proj.weight" in names
    processors: Any = AutoImageProcessor
    processor = processors.from_pretrained(tmp_path, backend="pil")
    pixels = processor(images=[torch.full((3, 50, 70), 255, dtype=torch.uint8).numpy()], return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels["pixel_values"], torch.ones(1, 3, 32, 32))


def test_encoder_depends_on_the_seed_only(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    weights = [
        (encoder(tmp_path / name, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tied", [True, False])
def test_head_loads_in_plain_transformers(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tied: bool) -> None:
    folder = head(tmp_path, tokenizer, tied=tied)
    loaded: Any = Qwen2ForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, loading = loaded
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert ("lm_head.weight" in tensor_names(folder)) is not tied
    assert model.config.vocab_size == 384 and model.config.rope_parameters["rope_theta"] == 1e6
    assert model.model.layers[0].self_attn.head_dim == 8
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.model.embed_tokens.weight[tokenizer.pad_token_id].abs().sum() > 0
    ids = AutoTokenizer.from_pretrained(folder)("How many red?", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape == (1, ids.shape[1], 384)


def test_sizes_that_do_not_divide_are_the_users_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"encoder: hidden_size.*heads=3, found 32"):
        encoder(tmp_path, heads=3)
    with pytest.raises(UserError, match=r"head: heads.*kv_heads=2, found 1"):
        head(tmp_path, tokenizer, heads=1)


def test_head_of_a_given_vocabulary(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    sizes = {"hidden_size": 32, "layers": 1, "heads": 4, "kv_heads": 2, "ffn": 48, "tied": True, "seed": 0}
    make_head(tmp_path / "head", tokenizer, **sizes, vocabulary=700)
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path / "head")
    assert loaded.get_input_embeddings().weight.shape == (700, 32)
    with pytest.raises(UserError, match=r"expected vocabulary > 320 .*, found 320"):
        make_head(tmp_path / "small", tokenizer, **sizes, vocabulary=320)
