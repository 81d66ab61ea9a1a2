"""umT5: tokens and features against transformers, the position rule bit for bit, the tiny tokenizer."""

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import sentencepiece
import tokenizers
import torch
from diffusers.pipelines.wan.pipeline_wan_animate import prompt_clean
from oracles import umt5_config
from transformers import PreTrainedTokenizerFast, T5Tokenizer, UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from trt_wan.build.export import export
from trt_wan.engines.checkpoint import FINAL_TEXT_NORM, TOKEN_EMBEDDING, required_tensors
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.errors import WeightsError
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.text_encoder import encode_texts, position_buckets
from trt_wan.runtime.networks.tokenizer import Tokenizer, clean, load_sentencepiece, load_tokenizer_json
from trt_wan.runtime.weights.random import random_tensor
from trt_wan.runtime.weights.tiny_tokenizer import write_tiny_tokenizer

ROOT = Path(__file__).parents[1]
LENGTH = TINY.text.length
CHINESE = "视频中的人在做动作"
PROMPTS = {
    "empty": "",
    "short": "the person in the video is making movements",
    "chinese": CHINESE,
    "mixed": "  a < cat &amp;lt;3\n\tthe rain, ｆｕｌｌ width; schÃ¶n ﬁne  ",
    "unseen": "naïve 😀 ∑ 象 \U00020000",
    "long": "the person walks and a cat sits. " * 90,
}
CORPUS = [
    PROMPTS["short"],
    "a cat sits on the mat, fine.",
    CHINESE,
    "色调艳丽，过曝，静态，细节模糊不清",
    "she walks slowly through the rain; two dancers <3",
    "the quick brown fox jumps over the lazy dog 0123456789",
    "full width schön",
] * 4


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """A SentencePiece model of umT5's kind, trained here: Unigram, with bytes for unseen characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="unigram",
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, spiece: bytes) -> Path:
    """The same pieces as `spiece.model` and, converted by transformers, as `tokenizer.json`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "spiece.model").write_bytes(spiece)
    converted = json.loads(T5Tokenizer.from_pretrained(folder, extra_ids=0).backend_tokenizer.to_str())
    converted["model"]["byte_fallback"] = True  # as in umT5's own file; T5's has none
    (folder / "tokenizer.json").write_text(json.dumps(converted))
    return folder


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tokenizer.json"
    write_tiny_tokenizer(path, TINY.text.vocabulary)
    return path


@pytest.fixture(scope="module")
def umt5() -> UMT5EncoderModel:
    encoder = UMT5EncoderModel(umt5_config(TINY.text)).eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    for name, parameter in encoder.named_parameters():
        parameter.copy_(torch.from_numpy(random_tensor(name, tuple(parameter.shape), rng)))
    return encoder


@pytest.fixture(scope="module")
def weights(umt5: UMT5EncoderModel) -> dict[str, Array]:
    stored = {name: value.numpy() for name, value in umt5.state_dict().items()}
    del stored["encoder.embed_tokens.weight"]  # the same tensor as shared.weight
    return stored


def expected_features(umt5: UMT5EncoderModel, ids: list[int]) -> Array:
    """As Wan uses it: padded to the full length with an attention mask, the padding's rows zeroed."""
    padded = torch.tensor([ids + [0] * (LENGTH - len(ids))])
    mask = (torch.arange(LENGTH) < len(ids))[None]
    features = umt5(input_ids=padded, attention_mask=mask.long()).last_hidden_state[0]
    return (features * mask[0, :, None]).numpy()


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_features_equal_transformers(prompt, make_model, umt5, weights, tiny_tokenizer):
    tokenizer = load_tokenizer_json(tiny_tokenizer, LENGTH)
    model = make_model(TINY, Plan(), {"text_encoder": weights})
    (features,) = encode_texts(model, tokenizer, [prompt])
    expected = expected_features(umt5, tokenizer.encode(prompt))
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=0, atol=2e-5)
    assert 0.5 < expected[0].std() < 2  # the tolerance is relative to values of order 1


def test_prompts_share_one_pass_over_the_layers(make_model, weights, tiny_tokenizer):
    tokenizer = load_tokenizer_json(tiny_tokenizer, LENGTH)
    model: Model = make_model(TINY, Plan(), {"text_encoder": weights})
    alone = [encode_texts(model, tokenizer, [prompt])[0] for prompt in PROMPTS.values()]
    layers: list[int] = []
    run = model.executor.run

    class Watched:
        def run(self, network, n, inputs):
            layers.append(n)
            return run(network, n, inputs)

    watched = Model(model.config, model.plan, Watched(), model.weights)  # type: ignore[arg-type]
    together = encode_texts(watched, tokenizer, list(PROMPTS.values()))
    assert layers == [n for n in range(TINY.text.layers) for _ in PROMPTS]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


def test_weights_are_those_of_transformers(weights):
    assert {name: w.shape for name, w in weights.items()} == required_tensors(TINY, "text_encoder")


def test_only_the_rows_of_the_prompt_are_read(make_model, weights, tiny_tokenizer):
    class Lazy(Mapping[str, Array]):
        read: list[list[int]] = []

        def rows(self, name: str, indices: Sequence[int]) -> Array:
            self.read.append(list(indices))
            return weights[name][indices].astype(np.float16)

        def __getitem__(self, key: str) -> Array:
            assert key != TOKEN_EMBEDDING, "the whole table was loaded"
            return weights[key]

        def __iter__(self) -> Iterator[str]:
            return iter(weights)

        def __len__(self) -> int:
            return len(weights)

    tokenizer = load_tokenizer_json(tiny_tokenizer, LENGTH)
    lazy = Lazy()
    (features,) = encode_texts(make_model(TINY, Plan(), {"text_encoder": lazy}), tokenizer, ["two cats"])
    assert lazy.read == [tokenizer.encode("two cats")]
    halved = weights | {TOKEN_EMBEDDING: weights[TOKEN_EMBEDDING].astype(np.float16)}
    (plain,) = encode_texts(make_model(TINY, Plan(), {"text_encoder": halved}), tokenizer, ["two cats"])
    np.testing.assert_array_equal(features, plain)


def test_foreign_tokenizer_is_refused(make_model, weights):
    foreign = Tokenizer(lambda text: [TINY.text.vocabulary], 1, LENGTH)
    model: Model = make_model(TINY, Plan(), {"text_encoder": weights})
    with pytest.raises(WeightsError, match="knows 512 pieces") as error:
        encode_texts(model, foreign, ["a"])
    assert error.value.hint


def test_position_buckets_equal_transformers_for_every_offset():
    config = UMT5Config(d_model=8, d_kv=4, num_heads=2, is_decoder=False)
    rule = UMT5Attention(config, has_relative_attention_bias=True)._relative_position_bucket
    positions = torch.arange(LENGTH)
    expected = rule(positions[None, :] - positions[:, None]).numpy()  # holds every offset from -511 to 511
    buckets = position_buckets(ANIMATE_14B.text)
    assert buckets.dtype == np.int64
    np.testing.assert_array_equal(buckets, expected)


@pytest.mark.parametrize("length", [LENGTH, 7, 1])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_ids_equal_transformers(prompt, length, folder, spiece):
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>"
    )
    expected = oracle(prompt_clean(prompt), truncation=True, max_length=length).input_ids
    assert load_tokenizer_json(folder / "tokenizer.json", length).encode(prompt) == expected
    assert load_sentencepiece(folder / "spiece.model", length).encode(prompt) == expected
    assert load_sentencepiece(spiece, length).encode(prompt) == expected
    assert expected[-1] == 1 and len(expected) <= length


@pytest.mark.parametrize("name", ["empty", "short", "chinese", "mixed", "long"])  # T5's class knows no bytes
def test_ids_equal_the_class_transformers_has_for_spiece_models(name, folder):
    oracle = T5Tokenizer.from_pretrained(folder, extra_ids=0)
    expected = oracle(prompt_clean(PROMPTS[name]), truncation=True, max_length=LENGTH).input_ids
    assert load_sentencepiece(folder / "spiece.model", LENGTH).encode(PROMPTS[name]) == expected


def test_unseen_characters_become_bytes(spiece):
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    ids = load_sentencepiece(spiece, LENGTH).encode("😀")
    assert processor.id_to_piece(ids)[1:-1] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]


def test_stored_truncation_and_padding_are_ignored(folder, tmp_path):
    stored = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored.enable_truncation(4)
    stored.enable_padding(length=40)
    stored.save(str(tmp_path / "tokenizer.json"))
    ids = load_tokenizer_json(tmp_path / "tokenizer.json", LENGTH).encode(PROMPTS["short"])
    assert ids == load_tokenizer_json(folder / "tokenizer.json", LENGTH).encode(PROMPTS["short"])


def test_clean():
    assert clean(" \u3000a\n\n b\t&amp;lt;c&amp;gt; ") == "a b <c>"
    assert clean("< &amp;lt;") == "< <"  # ftfy leaves entities alone once it has seen a tag's bracket
    assert clean("schÃ¶n") == "schön"
    assert clean("a\udcffb") == "a\ufffdb"  # a shell passes bytes that are not UTF-8 this way


def test_unreadable_tokenizers_name_the_fix(tmp_path, folder, spiece):
    broken = tmp_path / "broken"
    broken.write_bytes(spiece[: len(spiece) // 2])
    (tmp_path / "list.json").write_text("[]")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["pre_tokenizer"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "x" * 9000}
    (tmp_path / "long.json").write_text(json.dumps(tree))
    endless = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0)]))
    endless.save(str(tmp_path / "endless.json"))
    for load, source in (
        (load_tokenizer_json, tmp_path / "missing"),
        (load_tokenizer_json, tmp_path),
        (load_tokenizer_json, folder / "spiece.model"),
        (load_tokenizer_json, tmp_path / "list.json"),
        (load_tokenizer_json, tmp_path / "endless.json"),
        (load_tokenizer_json, tmp_path / "long.json"),
        (load_sentencepiece, tmp_path / "missing"),
        (load_sentencepiece, tmp_path),
        (load_sentencepiece, broken),
        (load_sentencepiece, folder / "tokenizer.json"),
        (load_sentencepiece, b""),
    ):
        with pytest.raises(WeightsError, match="tokenizer") as error:
            load(source, LENGTH)
        assert len(error.value.message) < 400
        assert "google/umt5-xxl" in error.value.hint


def test_a_piece_that_would_overflow_the_stack_is_refused(tmp_path, tiny_tokenizer):
    """In a process of its own, because the package ends the process that frees such a piece."""
    tree = json.loads(tiny_tokenizer.read_text())
    tree["model"]["vocab"][20][0] = "x" * 200_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    code = (
        "from trt_wan.runtime.networks.tokenizer import load_tokenizer_json\n"
        "import pathlib, sys\n"
        "load_tokenizer_json(pathlib.Path(sys.argv[1]), 512)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert ended.returncode == 1 and "a piece of more than 10000 bytes" in ended.stderr, ended


def test_a_long_table_of_characters_is_no_piece(tmp_path, folder):
    """umT5's table has 300,000 characters. Spaces and line ends around its colon do not matter."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    text = json.dumps(tree | {"normalizer": None}, indent=1)
    place = text.index('"model"')
    table = '"precompiled_charsmap" : \n "' + "A" * 300_000 + '",'
    path = tmp_path / "tokenizer.json"
    path.write_text(text[:place] + table + text[place:])
    with pytest.raises(WeightsError, match="cannot be read") as caught:  # it is no field of the top level
        load_tokenizer_json(path, LENGTH)
    assert "piece" not in caught.value.message
    path.write_text(path.read_text().replace("precompiled_charsmap", "vocab"))
    with pytest.raises(WeightsError, match="a piece of more than 10000 bytes"):
        load_tokenizer_json(path, LENGTH)


def test_tiny_tokenizer_spells_any_text_and_is_deterministic(tiny_tokenizer, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(tiny_tokenizer))
    assert backend.get_vocab_size() == TINY.text.vocabulary
    assert [backend.token_to_id(piece) for piece in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]

    every_block = "".join(map(chr, range(0x21, 0xD800, 37))) + "".join(
        map(chr, range(0xE000, 0x110000, 4099))
    )
    for text in (*map(clean, PROMPTS.values()), every_block, "<0x41> I'd", "\x00\x1f"):
        ids = backend.encode(text).ids
        assert 2 not in ids and ids[-1] == 1
        assert backend.decode(ids) == text
    assert backend.encode(PROMPTS["short"]).tokens[1:3] == ["▁person", "▁in"]
    assert (
        len(backend.encode(CHINESE).ids) == len(CHINESE) + 2
    )  # a piece for each, "▁" before and "</s>" after

    write_tiny_tokenizer(tmp_path / "again.json", TINY.text.vocabulary)
    assert (tmp_path / "again.json").read_bytes() == tiny_tokenizer.read_bytes()


def test_full_size_has_the_parameters_of_umt5_xxl():
    shapes = required_tensors(ANIMATE_14B, "text_encoder")
    assert sum(map(math.prod, shapes.values())) == 5_680_910_336
    assert shapes["encoder.block.23.layer.1.DenseReluDense.wo.weight"] == (4096, 10240)
    assert shapes[FINAL_TEXT_NORM] == (4096,)


def test_full_size_exports(tmp_path):
    path = tmp_path / "layer.onnx"
    export(networks(ANIMATE_14B, Plan())["text_encoder_layer"], ANIMATE_14B, Plan(), path)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("Softmax") == 1 and "Attention" not in operators
    assert (
        operators.count("MatMul") + operators.count("Gemm") == 9
    )  # q, k, v, o, wi_0, wi_1, wo and attention's two
