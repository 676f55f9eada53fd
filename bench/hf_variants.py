"""The models of ``hf_generate.py`` and the ways in which a user may have their ``generate()`` compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import graphcap
from bench import graphcaps
from bench.harness import Skipped

SIZES: dict[str, dict[str, Any]] = {
    "0.6b": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "tie_word_embeddings": True,
    },
}
FAMILIES = {"llama": (transformers.LlamaConfig, 128256), "qwen3": (transformers.Qwen3Config, 151936)}


@dataclass
class Cell:
    """One measurement: a module of its own, and what ``generate()`` gets beside the usual arguments."""

    model: Any
    cache: str
    options: dict[str, Any]
    """graphcap's options"""
    arguments: dict[str, Any]


def build_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A causal LM with seeded random weights; name is ``FAMILY-SIZE``."""
    family, _, size = name.partition("-")
    config_class, vocab_size = FAMILIES[family]
    config = config_class(**SIZES[size], vocab_size=512 if size == "tiny" else vocab_size)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model = model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def eager(cell: Cell) -> None:
    cell.arguments["disable_compile"] = True


def compile_forward(cell: Cell) -> None:
    cell.model.forward = torch.compile(cell.model.forward)
    cell.arguments["disable_compile"] = True


def own_compile(cell: Cell) -> None:
    """What ``generate()`` does by itself with a static cache on CUDA."""
    if cell.cache != "static":
        raise Skipped("generate() compiles by itself with a static cache only")
    if cell.model.device.type != "cuda":
        raise Skipped("needs CUDA")


def graphcap_module(cell: Cell) -> None:
    cell.model.compile(backend=graphcaps.backend(), options=cell.options)
    cell.arguments["disable_compile"] = True


def graphcap_forward(cell: Cell) -> None:
    cell.model.forward = torch.compile(cell.model.forward, backend=graphcaps.backend(), options=cell.options)
    cell.arguments["disable_compile"] = True


def graphcap_compile(cell: Cell) -> None:
    cell.model = graphcap.compile(cell.model, **cell.options)
    cell.arguments["disable_compile"] = True


def graphcap_config(cell: Cell) -> None:
    """``generate()`` compiles the decode steps with our backend, the prefill stays eager."""
    if cell.cache != "static":
        raise Skipped("generate() uses a CompileConfig with a static cache only")
    # Its default mode excludes options, so it goes only where there are some.
    further: dict[str, Any] = {"mode": None, "options": cell.options} if cell.options else {}
    config = transformers.CompileConfig(backend=graphcaps.backend(), **further)
    if cell.model.device.type != "cuda":
        config._compile_all_devices = True  # type: ignore[assignment]
    cell.arguments["compile_config"] = config


VARIANTS: dict[str, Callable[[Cell], None]] = {
    "eager": eager,
    "torch.compile default": compile_forward,
    "HF auto-compile": own_compile,
    "graphcap: model.compile": graphcap_module,
    "graphcap: model.forward": graphcap_forward,
    "graphcap: graphcap.compile": graphcap_compile,
    "graphcap: CompileConfig": graphcap_config,
}
