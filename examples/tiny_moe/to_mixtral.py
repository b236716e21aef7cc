"""Writes the trained model ``gated_top2`` as a transformers model folder, in Mixtral's form.

    python -m examples.tiny_moe.to_mixtral build/tiny_mixtral
    moe-infer export build/tiny_mixtral build/tiny_mixtral_onnx
    python examples/generate.py build/tiny_mixtral_onnx --prompt "In the beginning"

The architecture is Mixtral's: RMS norms, rotary positions over half-split heads, gated silu
experts, softmax over all of them, the two largest, divided by their sum. What differs is only how
it is written down, and the conversion is exact:

* the embedding is multiplied by sqrt(d_model), and its unscaled rows are the output's: Mixtral has
  two tensors, so the factor goes into the first;
* queries, keys and values are one tensor (d_model, 3 * d_model); Mixtral has three, transposed;
* gate and up are two tensors; transformers 5 has one, gate rows first.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from examples.tiny_moe.export import HERE, load_model
from examples.tiny_moe.model import EPSILON, GatedExperts, LanguageModel
from examples.tiny_moe.tokenizer import _WORD, Tokenizer

VARIANT = "gated_top2"


def config_of(model: LanguageModel) -> Any:
    """The same sizes as a ``MixtralConfig``."""
    from transformers import MixtralConfig

    sizes = model.config
    return MixtralConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.d_model,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        max_position_embeddings=sizes.context,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        # The text has no token that begins or ends it.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def convert(model: LanguageModel) -> Any:
    """A ``MixtralForCausalLM`` in float32 that computes what ``model`` does."""
    from transformers import MixtralForCausalLM

    target = MixtralForCausalLM(config_of(model)).eval()
    target.load_state_dict(state_of(model))
    return target


def state_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Mixtral's tensors by their names."""
    d = model.config.d_model
    embedding = model.embedding.detach().float()
    state = {
        "model.embed_tokens.weight": embedding * math.sqrt(d),
        "model.norm.weight": model.norm.weight.detach().float(),
        "lm_head.weight": embedding,
    }
    for i, block in enumerate(model.blocks):
        experts, norm = block.moe, block.moe_norm
        if not isinstance(experts, GatedExperts) or norm is None:
            raise ValueError(f"only '{VARIANT}' has Mixtral's layers, this is another variant")
        qkv = block.attention.qkv.detach().float()
        tensors = {
            "input_layernorm.weight": block.attention_norm.weight,
            "post_attention_layernorm.weight": norm.weight,
            "self_attn.q_proj.weight": qkv[:, :d].T,
            "self_attn.k_proj.weight": qkv[:, d : 2 * d].T,
            "self_attn.v_proj.weight": qkv[:, 2 * d :].T,
            "self_attn.o_proj.weight": block.attention.out.T,
            "mlp.gate.weight": experts.router.T,
            "mlp.experts.gate_up_proj": torch.cat([experts.gate, experts.up], 1),
            "mlp.experts.down_proj": experts.down,
        }
        for name, tensor in tensors.items():
            state[f"model.layers.{i}.{name}"] = tensor.detach().float().contiguous()
    return state


def convert_tokenizer(tokenizer: Tokenizer) -> Any:
    """The same tokens as a ``tokenizers.Tokenizer``."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    tokens = tokenizer.tokens
    if len(set(tokens)) != len(tokens):
        raise ValueError("two tokens have the same text, which the tokenizers library cannot hold")
    merges = [(tokens[left], tokens[right]) for left, right in tokenizer.merges]
    fast = Fast(models.BPE({text: i for i, text in enumerate(tokens)}, merges))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD.pattern), "isolated")
    fast.decoder = decoders.Fuse()
    return fast


def write(folder: Path, source: Path = HERE) -> None:
    """Writes model and tokenizer as transformers loads them."""
    folder.mkdir(parents=True, exist_ok=True)
    convert(load_model(VARIANT, source)).save_pretrained(folder)
    convert_tokenizer(Tokenizer.load()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write(folder)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main()
