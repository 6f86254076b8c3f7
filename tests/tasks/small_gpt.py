"""A GPT that several tests of its parts share."""

import torch

from trainerkit.tasks.lm import GPT

SMALL = {"vocab_size": 23, "context_length": 16, "n_layers": 2, "d_model": 24, "n_heads": 4}


def gpt(**options):
    """With weights from a file if one is named, else with weights so large that every part matters; always the same."""
    torch.manual_seed(1)
    network = GPT(**SMALL | options)
    if "weights" not in options:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def tokens(rows=2, length=11):
    return torch.randint(23, (rows, length), generator=torch.Generator().manual_seed(2))
