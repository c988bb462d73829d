"""Small networks with the operators of today's families, exported as users do."""

import warnings

import torch
from torch import nn

from tests.engines.networks.test_onnx_network import ChannelsLast, Residual, Transformer

SIDE = 32


class Windows(nn.Module):
    """Attention in shifted windows of a map that keeps channels last, as Swin's."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(1, 2, 16, 16))
        self.register_buffer("mask", torch.randn(1, 4, 1, 16, 16))
        self.merge, self.fc = nn.Linear(32, 12), nn.Linear(12, 5)

    def attention(self, x):
        n = x.shape[0]
        x = x.view(n, 2, 4, 2, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 8)
        q, k, v = self.qkv(x).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) / 2 + self.bias
        scores = (scores.view(n, 4, 2, 16, 16) + self.mask).view(-1, 2, 16, 16)
        x = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, 8))
        return x.view(n, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(n, 8, 8, 8)

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        for norm in self.norms:
            shifted = torch.roll(norm(x), (-2, -2), (1, 2))
            x = x + torch.roll(self.attention(shifted), (2, 2), (1, 2))
        x = self.merge(torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=-1))
        return self.fc(nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1).flatten(1))


KINDS = (Residual, ChannelsLast, Transformer, Windows)


def export(kind, path):
    """A network of random weights, for one image of ``SIDE`` px; returns it as a module."""
    torch.manual_seed(3)
    module = kind().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, torch.zeros(1, 3, SIDE, SIDE), path, dynamo=False, opset_version=17
        )
    return module
