"""A network of one's own, as `own_model.ipynb` takes it: the model ``example_model:build``.

    python notebooks/example_model.py    # trains it and writes example_model.safetensors beside this file

Take this file as a pattern. Training may feed the network however it likes; what `build` returns takes inputs in
[0, 1], normalises them itself, and gives logits.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wda

WEIGHTS = Path(__file__).with_suffix(".safetensors")


class Net(nn.Module):
    """A convolutional network on the 8 by 8 digits."""

    def __init__(self) -> None:
        super().__init__()
        # buffers: they are saved with the weights, and move to a device and a precision with them
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))
        self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 4 * 4, 32)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, for images in [0, 1]: the normalisation is here, not in the loader of the data."""
        x = (x - self.mean) / self.std
        x = torch.relu(self.norm(self.conv(x)))
        x = self.drop(torch.relu(self.hidden(x.flatten(1))))
        return self.out(x)


def build() -> nn.Module:
    """The trained network: what ``example_model:build`` names."""
    net = Net()
    net.load_state_dict(load_file(WEIGHTS))
    return net


def train(seed: int = 0) -> Net:
    """The network trained on the digits, a few seconds on one core."""
    torch.manual_seed(seed)
    x, y = wda.data.load("digits", split="train")
    net = Net().train()
    net.mean, net.std = x.mean(), x.std()
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(32):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    return net.eval()


if __name__ == "__main__":
    save_file(train().state_dict(), WEIGHTS)
