"""Small networks whose units the tests of mutators know by heart."""

import torch
from torch import nn

SHAPE = (1, 3, 8, 8)
FIRST, SECOND, THIRD = "first_(0, 8)_8", "left_(0, 12)_12", "right_(0, 6)_6"


class Net(nn.Module):
    """A residual add, a concat, a flatten and a depthwise convolution."""

    def __init__(self, seed=0, padding_mode="reflect"):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode=padding_mode)
        self.bn = nn.BatchNorm2d(8)
        self.same = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.left = nn.Conv2d(8, 12, 1)
        self.right = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.joined = nn.BatchNorm2d(18)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(72, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.first(x)))
        x = self.depthwise(x + self.same(x))
        x = torch.relu(self.joined(torch.cat([self.left(x), self.right(x)], 1)))
        return self.fc(self.pool(x).flatten(1))


def randomise_statistics(model):
    """Gives batch norms something to be wrong about."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.is_floating_point():
                    values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
                    getattr(module, name).data.copy_(values)
    return model.eval()
