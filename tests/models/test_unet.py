import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ilvr_lightning.models.blocks import Attention, ResBlock, group_norm, timestep_embedding
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import Stage, UNet
from tests.support import golden


def make(
    image_size: tuple[int, int] = (8, 8),
    image_channels: int = 3,
    *,
    attention: tuple[int, ...] = (4,),
    resblock_updown: bool = False,
) -> UNet:
    """A small U-Net whose zero-initialised layers are filled, so that every layer matters."""
    config = UNetConfig(
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        num_head_channels=4,
        attention_resolutions=attention,
        resblock_updown=resblock_updown,
    )
    network = UNet(config, image_size, image_channels).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return network


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("model", golden.MODELS)
def test_matches_the_reference_implementation(model: golden.ModelName) -> None:
    x, t = golden.array(f"unet/{model}/x"), golden.array(f"unet/{model}/t")
    with torch.no_grad():
        out = golden.network(model)(x, t)
    torch.testing.assert_close(out, golden.array(f"unet/{model}/out"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("resblock_updown", [False, True])
def test_transposed_image_and_kernels_give_the_transposed_output(resblock_updown: bool) -> None:
    """Sides that are not equal are handled alike, attention (over all pixels) included."""
    network = make((8, 16), attention=(8, 4), resblock_updown=resblock_updown)
    x, t = images(2, 3, 8, 16), torch.tensor([0, 700])
    out = network(x, t)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.mT.contiguous()
    torch.testing.assert_close(network(x.mT.contiguous(), t), out.mT, rtol=0, atol=1e-9)


def test_other_sizes_than_the_training_size_run_with_the_same_attention() -> None:
    """Attention stays at its level: without it in the network, distant pixels could not matter."""
    network = make((8, 8), attention=(4,))
    x, t = images(1, 3, 32, 32).requires_grad_(), torch.tensor([5])
    network(x, t)[0, 0, 0, 0].backward()
    assert x.grad is not None
    assert bool((x.grad[0, :, -1, -1] != 0).all())


def test_learned_variance_follows_the_mean() -> None:
    network = UNet(UNetConfig(channels=8, channel_mult=(1,), num_res_blocks=1, learn_sigma=True), (8, 8))
    bias = network.out.bias
    assert isinstance(bias, nn.Parameter)
    bias.data[:3], bias.data[3:] = 1.0, 2.0
    with torch.no_grad():
        out = network(torch.rand(1, 3, 8, 8), torch.tensor([0]))
    mean, variance = out.chunk(2, 1)
    assert torch.equal(mean, torch.ones(1, 3, 8, 8))
    assert torch.equal(variance, torch.full((1, 3, 8, 8), 2.0))


def test_greyscale_network_is_a_colour_network_of_equal_channels() -> None:
    colour, grey = make(image_channels=3), make(image_channels=1)
    state = colour.state_dict()
    state["encoder.0.block.weight"] = state["encoder.0.block.weight"].sum(1, keepdim=True)
    state["out.weight"], state["out.bias"] = state["out.weight"][:1], state["out.bias"][:1]
    grey.load_state_dict(state)
    x, t = images(2, 1, 8, 8), torch.tensor([1, 2])
    torch.testing.assert_close(grey(x, t), colour(x.expand(-1, 3, -1, -1), t)[:, :1], rtol=0, atol=1e-10)


def test_attention_is_at_the_named_levels_alone() -> None:
    config = UNetConfig(
        channels=8, channel_mult=(1, 1, 1), num_res_blocks=2, num_head_channels=8, attention_resolutions=(16, 4)
    )
    network = UNet(config, (16, 32))
    # Heights that the stages' blocks see: encoder 16 | 8 | 4, decoder back.
    encoder = [stage.attention is not None for stage in network.encoder if isinstance(stage, Stage)]
    decoder = [stage.attention is not None for stage in network.decoder if isinstance(stage, Stage)]
    assert encoder == [False, True, True, False, False, False, False, True, True]
    assert decoder == [True] * 3 + [False] * 3 + [True] * 3


def test_new_network_answers_zero() -> None:
    network = UNet(UNetConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1), (8, 8))
    with torch.no_grad():
        out = network(torch.randn(2, 3, 8, 8), torch.tensor([0, 999]))
    assert torch.equal(out, torch.zeros(2, 3, 8, 8))


def test_new_blocks_are_the_identity() -> None:
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(ResBlock(8, 8, 16, scale_shift=True)(x, torch.randn(2, 16)), x)
    assert torch.equal(Attention(8, 2)(x), x)


def test_dropout_acts_in_training_alone() -> None:
    config = UNetConfig(channels=8, channel_mult=(1,), num_res_blocks=1, dropout=0.9)
    network = UNet(config, (4, 4))
    for parameter in network.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    x, t = torch.ones(1, 3, 4, 4), torch.tensor([0])
    with torch.no_grad():
        assert not torch.equal(network(x, t), network(x, t))
        network.eval()
        assert torch.equal(network(x, t), network(x, t))


def test_timestep_embedding() -> None:
    """Cosines first; frequencies 10000^(-i/half) (ADM's)."""
    embedding = timestep_embedding(torch.tensor([0, 7]), 5).double()
    assert embedding[0].tolist() == [1, 1, 0, 0, 0]
    angles = torch.tensor([7.0, 0.07], dtype=torch.float64)
    expected = torch.cat([angles.cos(), angles.sin(), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(embedding[1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "nearest"), [((30, 32), (32, 32)), ((32, 35), (32, 36)), ((1, 1), (4, 4))])
def test_size_that_the_levels_do_not_divide(size: tuple[int, int], nearest: tuple[int, int]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
        UNet(UNetConfig(channels=8, channel_mult=(1, 1, 1)), size)
    assert str(error.value) == (
        "data.image_size must be a multiple of 4 for 3 levels of model.channel_mult: "
        f"got {size[0]}x{size[1]}; give {nearest[0]}x{nearest[1]} or fewer levels"
    )


def test_heads_that_do_not_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="must divide a level's 8 channels: got -1 and 3"):
        UNet(UNetConfig(channels=8, channel_mult=(1,), num_head_channels=-1, num_heads=3), (4, 4))


@pytest.mark.parametrize("side", [4, 32])
def test_group_norm_in_channels_last(side: int) -> None:
    """Small maps go another way on a CPU: same values, same memory format."""
    torch.manual_seed(0)
    norm = group_norm(64)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 64, side, side)
    out = norm(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, F.group_norm(x, 32, norm.weight, norm.bias), rtol=0, atol=1e-5)
