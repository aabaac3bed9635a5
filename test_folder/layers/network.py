"""A small network, LoRAs and plans for it, and a photograph of all that must come back."""

import copy

import torch
from torch import nn

from klora.lora import LowRank, Plan
from test_folder import tiny

ENGINES = ["gated", "merged"]
LAYERS = ("to_q", "mlp.0", "mlp.2")


class Network(nn.Module):
    """Linears at the top and deeper down, with and without bias, and parts that no LoRA touches."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(6, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.mlp = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 6))
        self.untouched = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.untouched(self.mlp(self.norm(self.to_q(x))))


def random_lora(model, names, rank, seed):
    shapes = tiny.linear_shapes(model)
    drawn = tiny.random_lora({name: shapes[name] for name in names}, rank, seed=seed)
    return {name: LowRank(*pair) for name, pair in drawn.items()}


def two_loras(model):
    """Content and style share the first layer; each has one of the others, and their ranks differ."""
    return random_lora(model, LAYERS[:2], 3, seed=1), random_lora(model, LAYERS[::2], 2, seed=2)


def switching_plan(model, steps=8, seed=2):
    """A layer changes hands after some steps and not after others; strengths are not 1."""
    wins = torch.rand(steps, len(LAYERS), generator=torch.Generator().manual_seed(seed)) < 0.5
    return Plan(LAYERS, two_loras(model), torch.stack([wins * 0.7, ~wins * 1.3], dim=-1))


def changes(plan):
    """Whether a layer's gates differ from those of the step before: bool [steps - 1, layers]."""
    return (plan.gates[1:] != plan.gates[:-1]).any(-1)


def dense(model, plan, step):
    """A copy of the model whose weights are W + dW."""
    merged = copy.deepcopy(model)
    for index, name in enumerate(plan.layers):
        for part, gate in zip(plan.loras, plan.gates[step, index], strict=True):
            if name in part:
                merged.get_submodule(name).weight.data += gate * (part[name].B @ part[name].A)
    return merged


def photograph(model):
    """All that must be as before: the module tree in order, and every tensor's identity and bits."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [
            (name, id(module), *module._parameters, *module._modules, *module._forward_pre_hooks)
            for name, module in model.named_modules()
        ],
        [(name, id(tensor), tensor.requires_grad, tensor.numpy(force=True).tobytes()) for name, tensor in tensors],
        list(model.state_dict()),
    )
