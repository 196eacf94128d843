"""Layers whose gradient on a GPU differs from run to run."""

from torch import nn

# torch.use_deterministic_algorithms lists them; of other layers all gradients are deterministic.
KINDS = (
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.FractionalMaxPool2d, nn.MaxUnpool2d),
    *(nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Upsample),
)


def nondeterministic_layers(network: nn.Module) -> list[str]:
    """Return names of the layers without a deterministic gradient on a GPU.

    Adaptive average pooling to one place is a mean, whose gradient is deterministic.

    Examples:
        >>> pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(7))
        >>> nondeterministic_layers(pool)
        ['1 (AdaptiveAvgPool2d)']
    """
    return [
        f"{name} ({type(each).__name__})"
        for name, each in network.named_modules()
        if isinstance(each, KINDS) and getattr(each, "output_size", None) not in (1, (1, 1))
    ]
