"""A Hugging Face decoder: the whole of ``generate()`` through graphcap, with a growing and with a static KV cache.

    pip install 'torch-graphcap[demo]'
    python examples/huggingface.py

``torch.compile(model).generate()`` would run the original module; ``model.compile()`` works in place. Without a GPU the
graphs are captured and replayed on the simulated device, which shows every decision and is not faster.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphcap
from graphcap.compiler.backend import graphcap as backend


def build(device: str) -> LlamaForCausalLM:
    """A small Llama with random weights; ``from_pretrained`` gives you a real one."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device).eval().requires_grad_(False)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompt = torch.randint(1, 512, (1, 12), device=device)
    for cache in ("dynamic", "static"):
        model = build(device)
        # disable_compile: on a GPU generate() would otherwise compile a static cache's decode steps with Inductor.
        arguments = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
        expected = model.generate(prompt, **arguments)

        # In an environment where torch-graphcap is installed, backend="graphcap" finds the same function by its name.
        model.compile(backend=backend, options={"simulate": device == "cpu"})
        tokens = model.generate(prompt, **arguments)

        print(f"{cache} cache: the tokens are {'' if torch.equal(tokens, expected) else 'NOT '}eager's")
        # A growing cache keeps attention out of the graphs, a static one lets a decode step be a single graph.
        print(graphcap.explain(model))


if __name__ == "__main__":
    main()
