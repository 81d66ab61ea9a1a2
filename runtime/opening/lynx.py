"""Lynx in an open model: which of its files are there, and which adapters act in a job."""

from dataclasses import dataclass

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.lynx import Lynx
from trt_wan.errors import TrtWanError, UsageError, WeightsError, shell_command, with_commands
from trt_wan.runtime.events import Note
from trt_wan.runtime.identity import FaceIdentity
from trt_wan.runtime.settings import WeightFiles
from trt_wan.runtime.weights.lynx import LynxFiles, find_lynx


@dataclass
class LynxSearch:
    """Lynx's files, looked for when a job first needs them. `random`: seeded noise, of the full kind."""

    weights: WeightFiles | None = None
    random: bool = False
    _found: LynxFiles | None = None

    def adapters(self, config: ModelConfig, identity: FaceIdentity) -> Lynx:
        """The adapters that act for a face. Raises WeightsError, UsageError if none can."""
        files = LynxFiles() if self.random else self.files(config)
        has_ip, has_ref = (self.random or part is not None for part in (files.ip, files.ref))
        ip = identity.ip_scale > 0 and has_ip and identity.embedder is not None
        ref = identity.ref_scale > 0 and has_ref
        if not (ip or ref):
            raise _no_adapter(identity, has_ip, has_ref)
        return Lynx(ip, ref, files.kind)

    def files(self, config: ModelConfig) -> LynxFiles:
        if self._found is None:
            weights = self.weights
            self._found = LynxFiles() if weights is None else find_lynx(config, weights.folders, weights.lynx)
        return self._found


def _no_adapter(identity: FaceIdentity, has_ip: bool, has_ref: bool) -> TrtWanError:
    if has_ip and identity.ip_scale > 0:
        return UsageError(
            "The IP adapter of Lynx needs a face embedder, and nothing else of Lynx can act.",
            "Add --face-embedder FILE, or the ref adapter, which needs none, to the weights.",
        )
    wanted = [name for name, scale in (("IP", identity.ip_scale), ("ref", identity.ref_scale)) if scale > 0]
    return WeightsError(
        f"There is no {' and no '.join(wanted)} adapter of Lynx among the weights.",
        with_commands("Name it with --lynx FILE, or fetch the adapters:", shell_command(("pull", "lynx"))),
    )


def acting_adapters(adapters: Lynx, identity: FaceIdentity) -> Note:
    """Names the adapters that act, and why another does not."""
    acting = [
        f"the {name} adapter ({told}, scale {scale:g})"
        for name, told, scale, acts in (
            ("IP", adapters.kind, identity.ip_scale, adapters.ip),
            ("ref", "of a picture", identity.ref_scale, adapters.ref),
        )
        if acts
    ]
    left = ""
    if not adapters.ip and identity.ip_scale > 0:
        left = "; no IP adapter: there is no file of it"
        if identity.embedder is None:
            left = "; no IP adapter: there is no --face-embedder"
    if not adapters.ref and identity.ref_scale > 0:
        left = "; no ref adapter: there is no file of it"
    data = {"ip": adapters.ip, "ref": adapters.ref, "kind": adapters.kind}
    return Note(f"identity: {' and '.join(acting)}{left}", "identity", data)
