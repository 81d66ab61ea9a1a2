"""What goes in and out of SAM2's graphs. Weights have the official names; their shapes are the file's.

    encoder         pictures to features on three grids, a batch of frames at once
    prompt          points, a box or a mask on one frame to a mask and a pointer, without any memory
    memory_encoder  features and the mask of a prompted frame to its memory
    track_<n>       a frame with up to n memories to mask, pointer and its own memory, in one launch

In half precision, for GPUs, the last one is in parts, and its attention to memories a kernel's (`by_kernel`):

    track_start_<n>      the frame's tokens, and keys and values of memories and pointers
    track_query          tokens after a layer's attention to themselves, and their queries
    track_attention_<n>  the kernel: as many of the keys as `seen` says
    track_read           tokens after what the queries found and the layer's feed-forward
    track_end            tokens to mask, pointer and memory

Features are [cells, channels], row by row. `feat` has T cells, `high1` 4T, `high0` 16T; masks are logits
[S/4, S/4]. Inputs whose name ends in `_bias` are 0 for what counts and MASKED for what does not. Position
tables and rotations are the host's, so that no graph stores them.

`POSITION` is no file's: it is computed from the two stored position embeddings.
"""

from collections.abc import Iterator

from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.sam2.config import Sam2Config, Sam2Plan, pointers_of, trunk_blocks

# Raise it whenever an exported graph computes something else or has other inputs or outputs (see
# engines/contracts).
GRAPHS_VERSION = 1

POSITION = "image_encoder.trunk.position"
POS_EMBED = "image_encoder.trunk.pos_embed"
POS_EMBED_WINDOW = "image_encoder.trunk.pos_embed_window"
TIME_ROWS = "maskmem_tpos_enc"
NO_POINTER = "no_obj_ptr"
CROSS = "cross_attn_image"  # a layer's attention to memories
MASK_DOWNSAMPLE = "mask_downsample"

LABELS = (-1, 0, 1, 2, 3)  # columns of the prompt's one-hot labels: none, background, object, box corners


def networks(config: Sam2Config, plan: Sam2Plan) -> dict[str, Network]:
    """Every graph by name."""
    found = [_encoder(config, plan), _prompt(config, plan), _memory_encoder(config, plan)]
    if plan.by_kernel:
        found += [_track_start(config, plan, memories) for memories in plan.memories]
        found += [_track_query(config, plan), _track_read(config, plan), _track_end(config, plan)]
    else:
        found += [_track(config, plan, memories) for memories in plan.memories]
    return {network.name: network for network in found}


def kernels(config: Sam2Config, plan: Sam2Plan) -> dict[str, Network]:
    """What is computed beside the graphs, by name; it has no weights."""
    found = [_track_attention(config, plan, n) for n in plan.memories] if plan.by_kernel else []
    return {network.name: network for network in found}


def layer_scope(n: int | str) -> str:
    """What the names of a memory attention layer's weights begin with."""
    return f"memory_attention.layers.{n}."


def required_tensors(config: Sam2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the official file."""
    shapes = {w.name: w.shape for n in networks(config, Sam2Plan()).values() for w in n.weights}
    del shapes[POSITION]
    shapes[POS_EMBED] = (1, config.dim, config.background, config.background)
    shapes[POS_EMBED_WINDOW] = (1, config.dim, config.windows[0], config.windows[0])
    shapes[TIME_ROWS] = (config.memory_frames, 1, 1, config.memory_channels)
    shapes[f"{MASK_DOWNSAMPLE}.weight"], shapes[f"{MASK_DOWNSAMPLE}.bias"] = (1, 1, 4, 4), (1,)
    shapes["no_mem_pos_enc"] = (1, 1, config.channels)  # in the file, and used by none of the eight
    return shapes


def _features(c: Sam2Config, *lead: int) -> tuple[Tensor, ...]:
    return (
        Tensor("feat", (*lead, c.tokens, c.channels)),
        Tensor("high1", (*lead, 4 * c.tokens, c.channels // 4)),
        Tensor("high0", (*lead, 16 * c.tokens, c.channels // 8)),
    )


def _encoder(c: Sam2Config, plan: Sam2Plan) -> Network:
    return Network(
        name="encoder",
        part="sam2",
        inputs=(Tensor("pixels", (plan.batch, 3, c.image_size, c.image_size)),),
        weights=tuple(_typed(plan, (*_trunk(c), *_neck(c)))),
        outputs=_features(c, plan.batch),
    )


def _prompt(c: Sam2Config, plan: Sam2Plan) -> Network:
    n = plan.prompt_tokens
    return Network(
        name="prompt",
        part="sam2",
        inputs=(
            *_features(c),
            Tensor("points", (n, 2)),  # pixels of the model's input
            Tensor("labels", (n, len(LABELS))),  # one-hot
            Tensor("token_bias", (n,)),
            Tensor("dense", (c.mask_size, c.mask_size)),  # a mask prompt, logits
            Tensor("use_dense", (1,)),
            Tensor("use_no_memory", (1,)),  # 1, but 0 for mask prompts
            Tensor("multimask", (1,)),  # 1: best of three; 0: the first, unless it is unstable
        ),
        weights=(*_prompt_encoder(c), *_decoder(c), Tensor("no_mem_embed", (1, 1, c.channels))),
        outputs=(
            Tensor("mask", (c.mask_size, c.mask_size)),
            Tensor("pointer", (c.channels,)),
            Tensor("object_score", (1,)),
            Tensor("iou", (1,)),
        ),
    )


def _memory_encoder(c: Sam2Config, plan: Sam2Plan) -> Network:
    return Network(
        name="memory_encoder",
        part="sam2",
        inputs=(
            Tensor("feat", (c.tokens, c.channels)),
            Tensor("mask", (c.mask_size, c.mask_size)),
            Tensor("object_score", (1,)),
        ),
        weights=tuple(_memory_encoder_weights(c, plan)),
        outputs=(memory_tensor(c, plan, "memory"),),
    )


def _track(c: Sam2Config, plan: Sam2Plan, memories: int) -> Network:
    layers = [layer_scope(n) for n in range(c.memory_layers)]
    of_layers = (w for layer in layers for part in (_query_weights, _read_weights) for w in part(c, layer))
    return Network(
        name=f"track_{memories}",
        part="sam2",
        inputs=(
            *_features(c),
            Tensor("memory_bias", (memories,)),
            Tensor("pointer_bias", (pointers_of(memories),)),
            *_looked_at(c, plan, memories),
        ),
        weights=(*_start_weights(c, plan), *_typed(plan, tuple(of_layers)), *_end_weights(c, plan)),
        outputs=_tracked(c, plan),
    )


def _track_start(c: Sam2Config, plan: Sam2Plan, memories: int) -> Network:
    seen = _seen_tokens(c, memories)
    return Network(
        name=f"track_start_{memories}",
        part="sam2",
        inputs=(_features(c)[0], *_looked_at(c, plan, memories)),
        weights=tuple(_start_weights(c, plan)),
        outputs=(
            _tokens(c),
            Tensor("keys", (c.memory_layers, seen, c.channels), plan.half),
            Tensor("values", (seen, c.memory_channels), plan.half),
        ),
    )


def _track_query(c: Sam2Config, plan: Sam2Plan) -> Network:
    return Network(
        name="track_query",
        part="sam2",
        inputs=(_tokens(c), *_rotations(c)),
        weights=tuple(_typed(plan, _query_weights(c))),
        outputs=(Tensor("x_out", (c.tokens, c.channels)), Tensor("q", (c.tokens, c.channels), plan.half)),
        scope=layer_scope("{n}"),
        repeats=c.memory_layers,
    )


def _track_attention(c: Sam2Config, plan: Sam2Plan, memories: int) -> Network:
    tokens = _seen_tokens(c, memories)
    return Network(
        name=f"track_attention_{memories}",
        part="sam2",
        inputs=(
            Tensor("q", (c.tokens, c.channels), plan.half),
            Tensor("keys", (tokens, c.channels), plan.half),  # of one layer
            Tensor("values", (tokens, c.memory_channels), plan.half),
            Tensor("seen", (2,), "int64"),  # tokens of memories, and of pointers, that count: the first ones
        ),
        weights=(),
        outputs=(Tensor("attended", (c.tokens, c.memory_channels), plan.half),),
    )


def _track_read(c: Sam2Config, plan: Sam2Plan) -> Network:
    return Network(
        name="track_read",
        part="sam2",
        inputs=(_tokens(c), Tensor("attended", (c.tokens, c.memory_channels), plan.half)),
        weights=tuple(_typed(plan, _read_weights(c))),
        outputs=(Tensor("x_out", (c.tokens, c.channels)),),
        scope=layer_scope("{n}"),
        repeats=c.memory_layers,
    )


def _track_end(c: Sam2Config, plan: Sam2Plan) -> Network:
    return Network(
        name="track_end",
        part="sam2",
        inputs=(_tokens(c), *_features(c)),
        weights=tuple(_end_weights(c, plan)),
        outputs=_tracked(c, plan),
    )


def _tokens(c: Sam2Config) -> Tensor:
    return Tensor("x", (c.tokens, c.channels))


def _seen_tokens(c: Sam2Config, memories: int) -> int:
    return memories * c.tokens + pointers_of(memories) * c.pointer_tokens


def _rotations(c: Sam2Config) -> tuple[Tensor, Tensor]:
    shape = (c.tokens, c.channels // 2)
    return Tensor("rope_cos", shape), Tensor("rope_sin", shape)


def _looked_at(c: Sam2Config, plan: Sam2Plan, memories: int) -> tuple[Tensor, ...]:
    pointers = pointers_of(memories)
    return (
        Tensor("position", (c.tokens, c.channels)),
        Tensor("memory_position", (c.tokens, c.memory_channels)),
        *_rotations(c),
        Tensor("memory_time", (memories, c.memory_channels)),
        Tensor("pointers", (pointers, c.channels)),
        *((Tensor("pointer_time", (pointers,)),) if c.new else ()),
        *(memory_tensor(c, plan, f"memory_{i}") for i in range(memories)),
    )


def _tracked(c: Sam2Config, plan: Sam2Plan) -> tuple[Tensor, ...]:
    return (
        Tensor("mask", (c.mask_size, c.mask_size)),
        Tensor("pointer", (c.channels,)),
        Tensor("object_score", (1,)),
        memory_tensor(c, plan, "memory"),
    )


def memory_tensor(c: Sam2Config, plan: Sam2Plan, name: str) -> Tensor:
    """Memories are rounded to bf16, as the official code keeps them; fp32 graphs hold the rounded numbers in
    float32, because ONNX Runtime gives numpy no bf16.
    """
    return Tensor(name, (c.tokens, c.memory_channels), "float32" if plan.half == "float32" else "bfloat16")


def _typed(plan: Sam2Plan, tensors: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Weights of matrices and convolutions in the plan's half type; the rest stays in float32."""
    for t in tensors:
        yield Tensor(t.name, t.shape, plan.half if t.dtype == "linear" else "float32")


def _pair(name: str, *shape: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer or convolution that may be of the half type."""
    return Tensor(f"{name}.weight", shape, "linear"), Tensor(f"{name}.bias", shape[:1])


def _exact(name: str, *shape: int) -> tuple[Tensor, Tensor]:
    """The same, always float32."""
    return Tensor(f"{name}.weight", shape), Tensor(f"{name}.bias", shape[:1])


def _norm(name: str, size: int) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.weight", (size,)), Tensor(f"{name}.bias", (size,))


def _trunk(c: Sam2Config) -> tuple[Tensor, ...]:
    trunk = "image_encoder.trunk"
    tensors = [*_pair(f"{trunk}.patch_embed.proj", c.dim, 3, c.patch, c.patch)]
    tensors.append(Tensor(POSITION, (c.mask_size, c.mask_size, c.dim)))
    for block in trunk_blocks(c):
        name = f"{trunk}.blocks.{block.n}"
        tensors += _norm(f"{name}.norm1", block.dim_in)
        tensors += _pair(f"{name}.attn.qkv", 3 * block.dim, block.dim_in)
        tensors += _pair(f"{name}.attn.proj", block.dim, block.dim)
        tensors += _norm(f"{name}.norm2", block.dim)
        tensors += _pair(f"{name}.mlp.layers.0", 4 * block.dim, block.dim)
        tensors += _pair(f"{name}.mlp.layers.1", block.dim, 4 * block.dim)
        if block.pool:
            tensors += _pair(f"{name}.proj", block.dim, block.dim_in)
    return tuple(tensors)


def _neck(c: Sam2Config) -> tuple[Tensor, ...]:
    """convs.0 is the coarsest grid's; conv_s0 and conv_s1 are the decoder's, run once per frame here."""
    stages = len(c.blocks)
    tensors: list[Tensor] = []
    for i in range(stages):
        tensors += _pair(f"image_encoder.neck.convs.{i}.conv", c.channels, c.stage_dim(stages - 1 - i), 1, 1)
    tensors += _pair("sam_mask_decoder.conv_s0", c.channels // 8, c.channels, 1, 1)
    tensors += _pair("sam_mask_decoder.conv_s1", c.channels // 4, c.channels, 1, 1)
    return tuple(tensors)


def _start_weights(c: Sam2Config, plan: Sam2Plan) -> Iterator[Tensor]:
    for n in range(c.memory_layers):
        yield from _typed(plan, _pair(f"{layer_scope(n)}{CROSS}.k_proj", c.channels, c.memory_channels))
    if c.new:
        yield from _exact("obj_ptr_tpos_proj", c.memory_channels, c.channels)


def _query_weights(c: Sam2Config, layer: str = "") -> tuple[Tensor, ...]:
    projections = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")] + [f"{CROSS}.q_proj"]
    tensors = [w for name in projections for w in _pair(f"{layer}{name}", c.channels, c.channels)]
    return (*tensors, *_norm(f"{layer}norm1", c.channels), *_norm(f"{layer}norm2", c.channels))


def _read_weights(c: Sam2Config, layer: str = "") -> tuple[Tensor, ...]:
    return (
        *_pair(f"{layer}{CROSS}.v_proj", c.channels, c.memory_channels),
        *_pair(f"{layer}{CROSS}.out_proj", c.channels, c.channels),
        *_norm(f"{layer}norm3", c.channels),
        *_pair(f"{layer}linear1", c.memory_ffn, c.channels),
        *_pair(f"{layer}linear2", c.channels, c.memory_ffn),
    )


def _end_weights(c: Sam2Config, plan: Sam2Plan) -> Iterator[Tensor]:
    yield from _norm("memory_attention.norm", c.channels)
    yield Tensor("sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", (2, c.channels // 2))
    yield Tensor("sam_prompt_encoder.not_a_point_embed.weight", (1, c.channels))
    yield Tensor("sam_prompt_encoder.no_mask_embed.weight", (1, c.channels))
    yield from _decoder(c)
    yield from _memory_encoder_weights(c, plan)


def _memory_encoder_weights(c: Sam2Config, plan: Sam2Plan) -> Iterator[Tensor]:
    """The mask passes four convolutions of stride 2: 1, 4, 16, 64, 256 channels."""
    name, d = "memory_encoder", c.channels
    tensors: list[Tensor] = []
    for i in range(4):
        conv, norm = (
            f"{name}.mask_downsampler.encoder.{3 * i}",
            f"{name}.mask_downsampler.encoder.{3 * i + 1}",
        )
        tensors += (*_pair(conv, 4 ** (i + 1), 4**i, 3, 3), *_norm(norm, 4 ** (i + 1)))
    tensors += _pair(f"{name}.mask_downsampler.encoder.12", d, 4**4, 1, 1)
    tensors += _pair(f"{name}.pix_feat_proj", d, d, 1, 1)
    for i in range(c.fuser_layers):
        layer = f"{name}.fuser.layers.{i}"
        tensors += _pair(f"{layer}.dwconv", d, 1, c.fuser_kernel, c.fuser_kernel)
        tensors += _norm(f"{layer}.norm", d)
        tensors += (*_pair(f"{layer}.pwconv1", 4 * d, d), *_pair(f"{layer}.pwconv2", d, 4 * d))
        tensors.append(Tensor(f"{layer}.gamma", (d,)))
    tensors += _pair(f"{name}.out_proj", c.memory_channels, d, 1, 1)
    if c.new:
        tensors.append(Tensor("no_obj_embed_spatial", (1, c.memory_channels)))
    return _typed(plan, tuple(tensors))


def _prompt_encoder(c: Sam2Config) -> tuple[Tensor, ...]:
    name, d = "sam_prompt_encoder", c.channels
    down = f"{name}.mask_downscaling"
    return (
        Tensor(f"{name}.pe_layer.positional_encoding_gaussian_matrix", (2, d // 2)),
        *(Tensor(f"{name}.point_embeddings.{i}.weight", (1, d)) for i in range(4)),
        Tensor(f"{name}.not_a_point_embed.weight", (1, d)),
        Tensor(f"{name}.no_mask_embed.weight", (1, d)),
        *_exact(f"{down}.0", 4, 1, 2, 2),
        *_norm(f"{down}.1", 4),
        *_exact(f"{down}.3", 16, 4, 2, 2),
        *_norm(f"{down}.4", 16),
        *_exact(f"{down}.6", d, 16, 1, 1),
    )


def _decoder(c: Sam2Config) -> tuple[Tensor, ...]:
    """float32 at every precision: it is 0.5 % of the work, and mask, arg-max and score hang on it."""
    name, d = "sam_mask_decoder", c.channels
    tensors: list[Tensor] = []

    def attention(prefix: str, inner: int) -> None:
        for part in "qkv":
            tensors.extend(_exact(f"{prefix}.{part}_proj", inner, d))
        tensors.extend(_exact(f"{prefix}.out_proj", d, inner))

    def mlp(prefix: str, *sizes: int) -> None:
        for i, (inner, out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            tensors.extend(_exact(f"{prefix}.layers.{i}", out, inner))

    for n in range(c.decoder_layers):
        layer = f"{name}.transformer.layers.{n}"
        attention(f"{layer}.self_attn", d)
        attention(f"{layer}.cross_attn_token_to_image", d // 2)
        attention(f"{layer}.cross_attn_image_to_token", d // 2)
        mlp(f"{layer}.mlp", d, c.decoder_ffn, d)
        for i in (1, 2, 3, 4):
            tensors += _norm(f"{layer}.norm{i}", d)
    attention(f"{name}.transformer.final_attn_token_to_image", d // 2)
    tensors += _norm(f"{name}.transformer.norm_final_attn", d)
    tensors += (Tensor(f"{name}.{token}.weight", (1, d)) for token in ("obj_score_token", "iou_token"))
    tensors.append(Tensor(f"{name}.mask_tokens.weight", (c.mask_tokens, d)))
    for i, inner, out in ((0, d, d // 4), (3, d // 4, d // 8)):  # transposed convolutions: [in, out, 2, 2]
        tensors.append(Tensor(f"{name}.output_upscaling.{i}.weight", (inner, out, 2, 2)))
        tensors.append(Tensor(f"{name}.output_upscaling.{i}.bias", (out,)))
    tensors += _norm(f"{name}.output_upscaling.1", d // 4)
    for i in range(c.mask_tokens):
        mlp(f"{name}.output_hypernetworks_mlps.{i}", d, d, d, d // 8)
    mlp(f"{name}.iou_prediction_head", d, d, d, c.mask_tokens)
    mlp(f"{name}.pred_obj_score_head", d, d, d, 1)
    mlp("obj_ptr_proj", d, d, d, d)
    tensors.append(Tensor(NO_POINTER, (1, d)))
    return tuple(tensors)
