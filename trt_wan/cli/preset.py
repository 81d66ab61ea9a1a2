"""`--preset`: the settings and LoRAs of a preset, the options that win over it, and the note about both."""

from pathlib import Path
from typing import Any

from trt_wan.cli.command import note
from trt_wan.cli.options import is_typed
from trt_wan.cli.report import Report
from trt_wan.runtime.presets import RECIPE_FIELDS, differences, preset_named


def with_preset(report: Report, name: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """`given` with the settings of the preset, but for those of the command line. Says how the result differs
    from the official recipe.
    """
    if name is None:
        return given
    from trt_wan.runtime.preset_loras import find_loras
    from trt_wan.runtime.weights_folders import searched_folders

    preset = preset_named(name)
    own = {field for field in RECIPE_FIELDS if is_typed(field)}
    recipe = {field: getattr(preset.recipe, field) for field in RECIPE_FIELDS if field not in own}
    won = {field: given[field] for field in own if given[field] != getattr(preset.recipe, field)}
    loras = given["loras"]
    if given["random_weights"] is None:
        loras = find_loras(preset, given["mode"], searched_folders(given["weights"]), loras)
    made = {**given, **recipe, "loras": loras}
    official = differences(made)
    said = [f"{field} {value} (officially {other})" for field, (value, other) in official.items()]
    said += [f"the LoRA {lora.file.name} at {lora.strength:g}" for lora in loras]
    text = f"preset = {name}, {preset.about}."
    text += f" Not the official recipe: {', '.join(said)}." if said else " It is the official recipe."
    if won:
        text += f" Given: {', '.join(f'{field} {value}' for field, value in won.items())}."
    data: dict[str, Any] = {
        "preset": name,
        "official": {field: other for field, (_, other) in official.items()},
        "settings": {field: made[field] for field in RECIPE_FIELDS},
        "given": won,
        "loras": [{"file": str(Path(lora.file)), "strength": lora.strength} for lora in loras],
    }
    note(report, text, "preset", **data)
    return made
