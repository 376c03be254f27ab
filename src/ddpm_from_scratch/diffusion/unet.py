"""The noise network of DDPM: a U-Net with `diffusers.UNet2DModel`'s configuration, weight names and outputs.

The architecture is that of Ho et al. 2020 (appendix B): residual blocks of two convolutions with group normalisation,
self-attention at some resolutions, and a sinusoidal embedding of the timestep added in every residual block; or ADM's
(Dhariwal, Nichol 2021), where the embedding scales too and residual blocks change the resolution. The layers are this
project's own; names and shapes of the weights are those of `UNet2DModel`, so checkpoints go both ways.
"""

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .blocks import Attention, DownBlock, GroupNorm, MidBlock, ResnetBlock, TimeEmbedding, UpBlock, timestep_embedding
from .stock import altered, safe_weights, write_config
from .unet_config import DOWN_BLOCKS, UP_BLOCKS, check_network, embed_dim, halvings, head_widths


class ScratchUNet2DModel(UNet2DModel):
    """A `diffusers.UNet2DModel` whose layers are this project's own.

    Configuration keys, weight names and outputs are those of `UNet2DModel` for the DDPM family, so that its checkpoints
    load here and those saved here load there. A fresh network starts as the paper's does: Xavier-uniform weights, and
    zeros in the last layer of every residual and attention block and of the network.

    Honoured as in `UNet2DModel`: sample_size, in_channels, out_channels (twice in_channels for a learned variance),
    center_input_sample, time_embedding_dim, freq_shift, flip_sin_to_cos, block_out_channels, layers_per_block,
    mid_block_scale_factor, downsample_padding (0 or 1), dropout, attention_head_dim, norm_num_groups,
    attn_norm_num_groups, norm_eps, add_attention, num_class_embeds, class_embed_type None, "timestep" and "identity",
    num_train_timesteps (recorded; needed for "learned" alone), time_embedding_type "positional" and "learned",
    mid_block_type "UNetMidBlock2D" or None, down_block_types "DownBlock2D", "AttnDownBlock2D" and
    "ResnetDownsampleBlock2D", up_block_types "UpBlock2D", "AttnUpBlock2D" and "ResnetUpsampleBlock2D", downsample_type
    and upsample_type "conv" and "resnet", resnet_time_scale_shift "default" and "scale_shift".

    Beyond `UNet2DModel`, attention_head_dim may be a list with a width for each level, as networks with a fixed number
    of heads need it.

    Refused with a ValueError that names the key: time_embedding_type "fourier" and the skip blocks, which are score
    SDEs'; blocks without a counterpart in pixel DDPMs (K-, Simple-, cross-attention, VAE's); act_fn other than "silu";
    resnet_time_scale_shift "ada_group" and "spatial"; downsample_padding above 1.
    """

    _repeated_blocks = ("ResnetBlock", "Attention")  # what `compile_repeated_blocks` compiles, once for each form

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | Sequence[int] | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        # Past UNet2DModel's own constructor: its layers are never built.
        super(UNet2DModel, self).__init__()
        check_network(self.config)
        self.sample_size = sample_size
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self._build_embeddings(dict(self.config))
        self._build_levels(dict(self.config))
        self.conv_norm_out = GroupNorm(norm_num_groups, block_out_channels[0], norm_eps)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, 3, padding=1)
        self._initialise()

    def _build_embeddings(self, config: dict[str, Any]) -> None:
        """Build what embeds timesteps and class labels."""
        width, embedded = config["block_out_channels"][0], embed_dim(config)
        if config["time_embedding_type"] == "learned":
            self.time_proj = nn.Embedding(config["num_train_timesteps"], width)
        self.time_embedding = TimeEmbedding(width, embedded)
        self.class_embedding: nn.Module | None = None
        if config["class_embed_type"] == "timestep":
            self.class_embedding = TimeEmbedding(width, embedded)
        elif config["class_embed_type"] == "identity":
            self.class_embedding = nn.Identity()
        elif config["num_class_embeds"] is not None:
            self.class_embedding = nn.Embedding(config["num_class_embeds"], embedded)

    def _build_levels(self, config: dict[str, Any]) -> None:
        """Build the down blocks, the middle block and the up blocks."""
        all_channels, layers = config["block_out_channels"], config["layers_per_block"]
        last = len(all_channels) - 1
        configs = [{**config, "attention_head_dim": width} for width in head_widths(config)]
        self.down_blocks = nn.ModuleList()
        skips = [all_channels[0]]  # channels of every result of the way down
        for level, (kind, channels) in enumerate(zip(config["down_block_types"], all_channels, strict=True)):
            halve, outputs = level < last, [channels] * layers
            self.down_blocks.append(DownBlock([skips[-1], *outputs], DOWN_BLOCKS[kind], halve, configs[level]))
            skips += outputs + [channels] * halve

        self.mid_block = MidBlock(skips[-1], configs[-1]) if config["mid_block_type"] is not None else None

        self.up_blocks = nn.ModuleList()
        below = skips[-1]
        for level, (kind, channels) in enumerate(zip(config["up_block_types"], reversed(all_channels), strict=True)):
            taken = [skips.pop() for _ in range(layers + 1)]
            up = UpBlock(below, channels, taken, UP_BLOCKS[kind], level < last, configs[last - level])
            self.up_blocks.append(up)
            below = channels

    def _initialise(self) -> None:
        """Initialise as the code of Ho et al. does: Xavier-uniform weights, zero biases, and zeros in last layers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        last = [m.conv2 for m in self.modules() if isinstance(m, ResnetBlock)]
        last += [m.to_out[0] for m in self.modules() if isinstance(m, Attention)]  # type: ignore[misc]
        for module in (*last, self.conv_out):
            nn.init.zeros_(module.weight)

    @classmethod
    def from_stock(cls, unet: UNet2DModel) -> Self:
        """Wrap the tensors of a stock network in this class, without a copy and in the same mode.

        Raises:
            ValueError: if its configuration is one that this class refuses.
        """
        with torch.device("meta"):
            own: Self = altered(unet, cls)
        own.load_state_dict(unet.state_dict(keep_vars=True), strict=True, assign=True)
        if unet.is_gradient_checkpointing:
            own.enable_gradient_checkpointing()
        return own.train(unet.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:  # noqa: ANN401
        """As `ModelMixin.from_pretrained`, but a checkpoint that does not hold exactly this network is refused.

        Pickled weights (`.bin`) are only read with `use_safetensors=False`.

        Raises:
            ValueError: naming the weights that are missing, unexpected or of another shape.
            OSError: there are no weights, or only pickled ones.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        with safe_weights(pretrained_model_name_or_path, kwargs):
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        wrong = {kind: keys for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if (keys := info[kind])}
        if wrong:
            found = "; ".join(f"{kind.replace('_', ' ')}: {_shortened(keys)}" for kind, keys in wrong.items())
            raise ValueError(f"The weights in {pretrained_model_name_or_path} do not fit their config.json: {found}.")
        return (model, info) if wants_info else model

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the configuration under the name of `UNet2DModel`, so that both classes can load it."""
        write_config(self.to_json_string(), json_file_path, _class_name=UNet2DModel.__name__)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict from x_t and t.

        Args:
            sample: x_t, [B, in_channels, H, W]; H and W divisible by 2 ** (number of levels - 1).
            timestep: one for all, or [B].
            class_labels: required if, and only if, the network is conditioned on them: LongTensor [B]; numbers [B] for
                class_embed_type "timestep"; [B, embed_dim] for "identity".
            return_dict: False for a tuple.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: for a shape that does not fit, or labels that are missing or too many.
        """
        self._check_input(sample, class_labels)
        x = 2 * sample - 1 if self.config["center_input_sample"] else sample
        emb = F.silu(self._embed(timestep, class_labels, x))

        if x.device.type == "cpu":  # whose convolutions are fastest so; on a GPU the weights' format decides
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        results = [x]
        for block in self.down_blocks:
            results += self._run(block, results[-1], emb)
        x = results[-1]
        if self.mid_block is not None:
            x = self._run(self.mid_block, x, emb)
        for block in self.up_blocks:
            x = self._run(block, x, [results.pop() for _ in block.resnets], emb)  # type: ignore[union-attr]
        x = self.conv_out(F.silu(self.conv_norm_out(x))).contiguous()
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:  # noqa: ANN401
        """Run a block; with gradient checkpointing, the backward pass computes its inner results again."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _embed(self, timestep: Tensor | float | int, class_labels: Tensor | None, x: Tensor) -> Tensor:
        """Embed timesteps and, if the network is class-conditional, class labels: [B, embed_dim]."""
        t = torch.as_tensor(timestep, device=x.device).reshape(-1)
        if t.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"{t.shape[0]} timesteps for a batch of {x.shape[0]}: pass one, or one per sample.")
        emb = self.time_embedding(self._project(t.expand(x.shape[0])))
        if self.class_embedding is None or class_labels is None:
            return emb
        kind = self.config["class_embed_type"]
        embedded = self.class_embedding(self._project(class_labels) if kind == "timestep" else class_labels)
        return emb + embedded.to(emb.dtype)

    def _project(self, t: Tensor) -> Tensor:
        """The sinusoids of numbers, or their learned embedding: [B] -> [B, block_out_channels[0]]."""
        if self.config["time_embedding_type"] == "learned":
            if t.is_floating_point():
                raise ValueError(f"time_embedding_type='learned' has whole timesteps alone, not {t.dtype}.")
            return self.time_proj(t)
        width, flip = self.config["block_out_channels"][0], self.config["flip_sin_to_cos"]
        sinusoids = timestep_embedding(t, width, flip, self.config["freq_shift"])
        return sinusoids.to(self.time_embedding.linear_1.weight.dtype)

    def _check_input(self, sample: Tensor, class_labels: Tensor | None) -> None:
        channels, levels = self.config["in_channels"], len(self.config["block_out_channels"])
        factor = halvings(self.config["block_out_channels"])
        if sample.ndim != 4 or sample.shape[1] != channels or sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; this network takes [B, {channels}, H, W] with H and W "
                f"divisible by {factor}, since it halves the resolution {levels - 1} times."
            )
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                "class_labels is missing: this network is class-conditional, pass a LongTensor [B]."
                if class_labels is None
                else "class_labels was passed, but this network is not class-conditional (num_class_embeds=None)."
            )
        of_each = (embed_dim(self.config),) if self.config["class_embed_type"] == "identity" else ()
        if class_labels is not None and tuple(class_labels.shape) != (sample.shape[0], *of_each):
            needed = f"{of_each[0]} numbers" if of_each else "one"
            raise ValueError(
                f"class_labels has shape {tuple(class_labels.shape)}; a batch of {len(sample)} needs {needed} each."
            )


def _shortened(keys: Sequence[object]) -> str:
    return ", ".join(map(str, keys[:5])) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
