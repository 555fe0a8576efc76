"""The U-Net's settings. Standard library only, so that a command line can read them at once."""

import math
from dataclasses import dataclass

MAX_CHANNELS, MAX_LEVELS, MAX_BLOCKS = 16384, 12, 64
"""The largest width, number of levels and blocks per level: beyond any network that is trained."""
MAX_FEATURES = 2**28
"""The most values in the first feature maps of one image: a gigabyte of float32."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The architecture, under ADM's flag names.

    Raises:
        ValueError: a setting is out of its range; the message names it and what to give.
    """

    channels: int = 64
    """Width of the first level."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 4)
    """Width of each level, as multiples of channels."""
    num_res_blocks: int = 2
    """Residual blocks per level."""
    attention_resolutions: tuple[int, ...] = (16, 8)
    """Heights of the feature maps that have self-attention, at the training size."""
    num_head_channels: int = 64
    """Channels of an attention head; -1: num_heads decides."""
    num_heads: int = 4
    """Attention heads where num_head_channels is -1."""
    resblock_updown: bool = False
    """Residual blocks for down- and upsampling (Brock et al. 2019) in place of strided convolutions."""
    use_scale_shift_norm: bool = True
    """The timestep scales and shifts after normalisation (adaptive group normalisation)."""
    use_new_attention_order: bool = False
    """Split queries, keys and values before the heads; matters only for weights that were trained so."""
    dropout: float = 0.0
    """Dropout probability in the residual blocks."""
    learn_sigma: bool = False
    """Predict the variance too (Nichol and Dhariwal 2021)."""
    downsample_padding: int = 1
    """Padding of strided convolutions: 1 on every side; 0 pads the right and lower side only, as Ho et al. do."""
    flip_sin_to_cos: bool = True
    """Put cosines before sines in the timestep embedding; off in the code of Ho et al. 2020."""
    freq_shift: int = 0
    """Number subtracted from the divisor of the embedding's frequencies; 1 in the code of Ho et al. 2020."""
    timestep_scale: float = 1.0
    """Factor of the timesteps that the embedding sees; 1000/T where improved-diffusion rescaled them."""
    norm_num_groups: int = 32
    """Groups of the normalisation."""
    norm_eps: float = 1e-5
    """Epsilon of the normalisation; 1e-6 in the code of Ho et al. 2020."""

    def __post_init__(self) -> None:
        for name in ("channels", "num_res_blocks", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1: got {getattr(self, name)}")
        for name in ("timestep_scale", "norm_eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"model.{name} must be above 0: got {getattr(self, name)}")
        for name in ("downsample_padding", "freq_shift"):
            if getattr(self, name) not in (0, 1):
                raise ValueError(f"model.{name} must be 0 or 1: got {getattr(self, name)}")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"model.channel_mult must list numbers of at least 1: got {list(self.channel_mult)}")
        widest, levels = self.channels * max(self.channel_mult), len(self.channel_mult)
        if widest > MAX_CHANNELS or self.num_res_blocks > MAX_BLOCKS or levels > MAX_LEVELS:
            raise ValueError(
                f"model.channels times model.channel_mult must be at most {MAX_CHANNELS}, of {MAX_LEVELS} levels "
                f"and model.num_res_blocks={MAX_BLOCKS}: got {widest}, {levels} and {self.num_res_blocks}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must be at least 0 and below 1: got {self.dropout}")
        if self.num_head_channels == 0 or self.num_head_channels < -1:
            raise ValueError(f"model.num_head_channels must be positive, or -1: got {self.num_head_channels}")
        if self.num_heads < 1:
            raise ValueError(f"model.num_heads must be at least 1: got {self.num_heads}")

    def heads(self, width: int) -> int:
        """Attention heads of a level of this width; a level narrower than one head has a single one.

        Raises:
            ValueError: they do not divide it.
        """
        count = self.num_heads if self.num_head_channels == -1 else max(1, width // self.num_head_channels)
        if width % count or (self.num_head_channels != -1 and count > 1 and width % self.num_head_channels):
            raise ValueError(
                f"model.num_head_channels or model.num_heads must divide a level's {width} channels: "
                f"got {self.num_head_channels} and {self.num_heads}"
            )
        return count

    def check_size(self, height: int, width: int) -> None:
        """Raise a ValueError that says what to give unless the levels divide the size, and one image fits in memory."""
        most = MAX_FEATURES // self.channels
        if height * width > most:
            raise ValueError(
                f"data.image_size must be of at most {most:,} pixels for model.channels={self.channels}: "
                f"got {height}x{width}"
            )
        multiple = 2 ** (len(self.channel_mult) - 1)
        if height % multiple or width % multiple:
            raise ValueError(
                f"data.image_size must be a multiple of {multiple} for {len(self.channel_mult)} levels of "
                f"model.channel_mult: got {height}x{width}; "
                f"give {_nearest(height, multiple)}x{_nearest(width, multiple)} or fewer levels"
            )

    def check_attention(self, height: int) -> None:
        """Raise a ValueError unless every resolution with attention is the height of a level."""
        heights = [height // 2**level for level in range(len(self.channel_mult))]
        for resolution in self.attention_resolutions:
            if resolution not in heights:
                raise ValueError(
                    f"model.attention_resolutions must be heights of the levels, {', '.join(map(str, heights))}: "
                    f"got {resolution}"
                )


def _nearest(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
