"""For authors of models: a class decorator, after which every instance compiles itself at its first call.

    python examples/decorator.py

The number of tokens is declared dynamic: one graph is traced and compiled for every size, 1 included, and each size
that comes often enough is captured. Without a GPU this happens on the simulated device, which is not faster.
"""

import torch
from torch import Tensor, nn

import graphcap

SIMULATE = not torch.cuda.is_available()


@graphcap.eager(fake=torch.empty_like)
def log_routing(expert: Tensor) -> Tensor:
    """Reads values on the host, which no graph can hold: it runs live on every call, between two captured pieces.

    ``fake`` tells the trace what comes out, as the body itself cannot run without values.
    """
    print(f"  tokens per expert: {torch.bincount(expert.flatten(), minlength=2).tolist()}")
    return expert.clone()


@graphcap.support_graph_compile(dynamic_arg_dims={"x": 0}, capture_sizes=[1, 4], simulate=SIMULATE)
class TwoExperts(nn.Module):
    """A router and two experts, ``[num_tokens, 32] -> [num_tokens, 32]``."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        expert = log_routing(self.router(x).argmax(dim=-1, keepdim=True))
        first, second = (each(x) for each in self.experts)
        return torch.where(expert == 0, first, second)


def main() -> None:
    torch.manual_seed(0)
    model = TwoExperts().eval().to("cpu" if SIMULATE else "cuda")
    with torch.inference_mode():
        for num_tokens in (4, 4, 4, 1, 1, 7):  # declared sizes are captured at their second sight, 7 stays live
            x = torch.randn(num_tokens, 32, device=model.router.weight.device)
            print(f"{num_tokens} tokens")
            compiled = model(x)
            with graphcap.disabled():
                difference = (compiled - model(x)).abs().max()
            print(f"  differs from eager by at most {difference:.1e}")
    print(graphcap.explain(model))


if __name__ == "__main__":
    main()
