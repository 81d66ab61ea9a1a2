"""`--help` in sections, for commands with many options."""

import click

# By section the names of parameters, in the order of --help. An option in none of them comes last.
SECTIONS = {
    "Video": (
        *(
            "source",
            "pictures",
            "inputs",
            "output",
            "hold",
            "overwrite",
            "mode",
            "size",
            "fit",
            "rate",
            "start",
            "end",
        ),
        *("window", "overlap", "audio", "more_references", "reference_as", "reference_background"),
        *("trim_to_shortest", "paste_back"),
        *("start_frame", "extend", "codec", "crf", "encoder", "frames"),
        *("dry_run", "resume", "repeated", "redo", "sidecar"),
    ),
    "Context windows": (
        *("context", "context_frames", "context_stride", "context_overlap", "context_fuse", "freenoise"),
    ),
    "Sampling": (
        *("preset", "prompt", "steps", "seed", "sampler", "grid", "shift"),
        *("sigmas", "init", "denoise_strength", "start_step", "end_step"),
        *("step_cache", "step_cache_most", "step_cache_retention", "step_cache_ratios"),
        *("colour_match", "colour_anchor"),
    ),
    "Guidance": (
        *("guidance", "negative_prompt", "cfg_zero_star", "nag_prompt", "nag_scale", "nag_tau", "nag_alpha"),
        *("pose_strength", "pose_start", "pose_end", "face_strength", "face_start", "face_end"),
        *("clip_image_2", "clip_strength", "clip_strength_2", "clip_tiles", "clip_tile_ratio", "no_clip"),
    ),
    "Camera": ("camera", "camera_strength", "camera_start", "camera_end"),
    "Identity": (
        *("identity", "identity_landmarks", "identity_ip_scale", "identity_ref_scale"),
        *("identity_start", "identity_end", "face_embedder", "lynx"),
    ),
    "People": (
        *("person", "point", "box", "keypoints", "detector", "pose", "hands", "head", "face", "face_padding"),
        *("retarget", "edited_reference", "edited_driving", "compat"),
    ),
    "Masks (mode replace)": ("segmenter", "sam2", "grow", "block", "fill", "mask_paint"),
    "Weights": (
        *("weights", "transformer", "vae", "text_encoder", "image_encoder", "tokenizer", "random_weights"),
        *("camera_control",),
        *("loras", "text_cache"),
    ),
    "Machine": (
        *("executor", "precision", "tier", "attention_keep", "vram", "gpus"),
        *("flavour", "segments", "build"),
    ),
}
OTHERS = "Other"


def section_of(name: str | None) -> str:
    return next((section for section, names in SECTIONS.items() if name in names), OTHERS)


class SectionedCommand(click.Command):
    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {section: [] for section in (*SECTIONS, OTHERS)}
        order = [name for names in SECTIONS.values() for name in names]
        known = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        known.sort(key=lambda param: order.index(param.name) if param.name in order else len(order))
        for param in known:
            if (record := param.get_help_record(ctx)) is not None:
                rows[section_of(param.name)].append(record)
        for section, records in rows.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)
