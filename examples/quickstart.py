"""The shortest way: hand a model to ``torch.compile``, call it, and ask what happened.

    python examples/quickstart.py

Without a GPU the graphs are captured and replayed on the simulated device, which shows every decision and is not
faster.
"""

import torch
from torch import Tensor, nn

import graphcap
from graphcap.compiler.backend import graphcap as backend


class Block(nn.Module):
    """Self-attention and a feed-forward layer, ``[batch, tokens, hidden] -> [batch, tokens, hidden]``."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.RMSNorm(hidden), nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.feed = nn.Sequential(nn.RMSNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed(x)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(hidden=64, heads=4) for _ in range(4)]).to(device).eval()

    # In an environment where torch-graphcap is installed, backend="graphcap" finds the same function by its name.
    fast = torch.compile(model, backend=backend, options={"simulate": device == "cpu"})

    x = torch.randn(2, 16, 64, device=device)
    with torch.inference_mode():
        for call in range(5):  # the first compiles, the third captures, the others replay
            difference = (fast(x) - model(x)).abs().max()
            print(f"call {call}: differs from eager by at most {difference:.1e}")

    # Four blocks, but only four pieces of code: before, between and after the attentions, and attention itself.
    print(graphcap.explain(fast))


if __name__ == "__main__":
    main()
