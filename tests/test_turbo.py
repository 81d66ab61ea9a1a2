"""The tier turbo: its network's graph and reference against numpy, where it runs, and its options."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from block_choice import order_of, sparse_attention
from click.testing import CliRunner

from trt_wan.build.export import export
from trt_wan.build.models import GRAPHS
from trt_wan.build.realistic import realistic
from trt_wan.build.reference import reference
from trt_wan.cli.main import cli
from trt_wan.engines.choice.candidates import SPARSE, TIERS, has_engine, may_use
from trt_wan.engines.config import TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.contracts.sparse_attention import block_order
from trt_wan.engines.shape import Plan
from trt_wan.errors import UsageError
from trt_wan.runtime.context.settings import Context
from trt_wan.runtime.denoise import Branch, dense_steps, predict_window
from trt_wan.runtime.guidance import StepSettings
from trt_wan.runtime.job import Load
from trt_wan.runtime.networks.transformer import WindowCondition
from trt_wan.runtime.opening import model as opening
from trt_wan.runtime.settings import Settings, WeightFiles

PLAN = Plan(192, 160, 13)  # four blocks of 128 tokens, and one of 88; its sides are no multiples of 8
GRID = (5, 10, 12)  # slots, rows, columns


def inputs(keep: float) -> dict[str, Any]:
    values = realistic(networks(TINY, PLAN)["sparse_attention"], seed=2)
    k = values["k"].reshape(2, -1, 12, 128)  # tokens that stand together are alike, so that blocks differ
    values["k"] = (k + 2 * k[:, :, :1]).reshape(values["k"].shape)
    return values | {"keep": np.array([keep], np.float32)}


def relative(made: Any, wanted: Any) -> float:
    return float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))


def oracle(values: dict[str, Any], keep: float) -> Any:
    return sparse_attention(values["q"], values["k"], values["v"], keep, *GRID)


@pytest.mark.parametrize("keep", [0.01, 0.7, 1.0])
def test_graph_and_reference_keep_the_blocks_of_numpy(keep: float) -> None:
    """0.01 keeps what is always kept; with 1 it is dense attention."""
    values = inputs(keep)
    wanted = oracle(values, keep)
    tensors = [torch.from_numpy(values[name]) for name in ("q", "k", "v", "keep")]
    (made,) = GRAPHS["sparse_attention"](*tensors, w={}, model=TINY, plan=PLAN)
    assert relative(made.numpy(), wanted) < 2e-6
    tokens = np.random.default_rng(0).choice(PLAN.tokens, 64, replace=False)
    sampled = reference("sparse_attention", TINY, values, tokens, PLAN)["attended"]
    assert relative(sampled, wanted[tokens]) < 2e-6
    dense = reference("attention", TINY, values, tokens)["attended"]
    assert (relative(sampled, dense) < 2e-6) == (keep == 1)


@pytest.mark.long
def test_the_exported_graph_takes_its_share_as_an_input(tmp_path: Any) -> None:
    path = tmp_path / "sparse_attention.onnx"
    export(networks(TINY, PLAN)["sparse_attention"], TINY, PLAN, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for keep in (0.01, 0.7):
        values = inputs(keep)
        (made,) = session.run(["attended"], values)
        assert relative(made, oracle(values, keep)) < 2e-6
    assert relative(made, oracle(values, 0.01)) > 1e-2


def test_the_mean_of_a_skipped_block_counts() -> None:
    """With keys that are equal within their blocks nothing is lost."""
    values, order = inputs(0.01), order_of(*GRID)
    assert block_order(PLAN).tolist() == order and sorted(order[:120]) == list(range(120))
    values["k"][:, order] = np.repeat(values["k"][:, ::128], 128, axis=1)[:, : PLAN.tokens]
    tokens = np.arange(0, PLAN.tokens, 9)
    dense = reference("attention", TINY, values, tokens)["attended"]
    assert relative(reference("sparse_attention", TINY, values, tokens, PLAN)["attended"], dense) < 1e-5


class Recording:
    """A model that computes nothing and remembers the attention of every block."""

    def __init__(self, keep: float | None) -> None:
        self.config = SimpleNamespace(transformer=SimpleNamespace(layers=4, fuser_interval=2))
        self.keep, self.executor = keep, self
        self.split, self.sequence = "tokens", None
        self.seen: list[tuple[str, int, float | None]] = []
        self.block = 0

    def run(self, name: str, *given: Any, n: int = 0) -> tuple[Any, ...]:
        if name == "attn_in":
            self.block = n
        if name in ("attention", "sparse_attention"):
            self.seen.append((name, self.block, float(given[3][0]) if len(given) == 4 else None))
        return given[:1] * (3 if name == "attn_in" else 2 if name == "attn_out" else 1)

    def place(self, array: Any) -> Any:
        return array

    def combine(self, terms: Any) -> Any:
        return terms[0][1]


def attentions(keep: float | None, steps: int, guidance: float = 1.0) -> list[list[tuple[str, int, Any]]]:
    """Of each step."""
    model: Any = Recording(keep)
    one = np.ones(1, np.float32)
    window = WindowCondition(one, one, one, None, one)
    prepared: Any = SimpleNamespace(times=[(None, None)] * steps, rope=(None, None))
    settings = [StepSettings(guidance, pose=True, face=True)] * steps
    predict = predict_window(model, prepared, [Branch([()] * 4, window)] * 2, settings)
    made = []
    for step in range(steps):
        model.seen.clear()
        predict(step, one)
        made.append([*model.seen])
    return made


def test_the_first_steps_and_the_first_blocks_are_dense() -> None:
    dense = [("attention", n, None) for n in range(4)]
    keep = float(np.float32(0.3))
    sparse = [*dense[:2], *(("sparse_attention", n, keep) for n in (2, 3))]
    assert attentions(0.3, 4) == [dense, sparse, sparse, sparse]
    assert attentions(0.3, 6)[:3] == [dense, dense, sparse]
    assert attentions(0.3, 1) == [sparse]
    assert attentions(None, 2) == [dense, dense]
    assert attentions(0.3, 2, guidance=5.0) == [dense * 2, sparse * 2]
    assert [dense_steps(count) for count in (1, 2, 4, 5, 8, 20)] == [0, 1, 1, 2, 2, 5]


def test_each_tier_may_use_what_those_before_it_may() -> None:
    assert [[may_use(tier, lowest) for lowest in TIERS] for tier in TIERS] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert not has_engine(SPARSE.network) and has_engine("attention") and has_engine("head")


def test_the_share_of_turbo() -> None:
    assert Settings().keep is Settings(tier="fast").keep is None
    assert Settings(tier="turbo").keep == 0.5 and Settings(tier="turbo", attention_keep=0.3).keep == 0.3
    with pytest.raises(UsageError, match="The tier fast attends to everything") as refused:
        Settings(tier="fast", attention_keep=0.3)
    assert "--tier turbo" in refused.value.hint
    for share in (0.0, 1.0, -1.0, 50.0, float("nan")):
        with pytest.raises(UsageError, match="of the key blocks is not possible"):
            Settings(tier="turbo", attention_keep=share)


def test_the_option_reaches_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import trt_wan.cli.run

    seen: list[Any] = []
    monkeypatch.setattr(
        trt_wan.cli.run, "render_prepared", lambda *given, **_: seen.extend(given) or (None, {})
    )
    command = ["run", "--inputs", str(tmp_path), "-o", "x.mp4"]
    ran = CliRunner().invoke(cli, [*command, "--tier", "turbo", "--attention-keep", "0.3"])
    assert ran.exit_code == 0, ran.output
    assert seen[3].settings().keep == 0.3


def test_the_record_of_a_run_names_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "chosen_candidates", lambda *given: {"sparse_attention": "native sparse"})
    weights: Any = SimpleNamespace(config=TINY, load_of=lambda job, progress: job.load)
    job: Any = SimpleNamespace(load=Load(), acting_camera=None, acting_identity=None, context=Context())
    place: Any = (None, SimpleNamespace(name="tensorrt_rtx"))

    def recorded(settings: Settings) -> dict[str, str]:
        return opening.Basis(weights, place, "fp8", settings, WeightFiles(random="tiny")).choices(PLAN, job)

    turbo = recorded(Settings(tier="turbo"))
    assert turbo["tier"] == "turbo" and turbo["attention_keep"] == "0.5"
    assert recorded(Settings(tier="turbo", attention_keep=0.3))["attention_keep"] == "0.3"
    assert recorded(Settings(gpus=2))["gpus"] == "2"
    assert not {"attention_keep", "gpus"} & recorded(Settings(tier="fast")).keys()
