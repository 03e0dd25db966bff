"""Editable models: what is refused, what a fingerprint sees, and parts that equal the whole."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from rome import models
from rome.models import EditableModel, families, files
from rome.models.editable import checksum
from rome.models.families import FAMILIES, UnsupportedModelError
from tests.support import tiny
from tests.support.tiny import close


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("mixtral", "'mixtral' is a mixture of 8 experts"),
        ("qwen3_moe", "'qwen3_moe' is a mixture"),
        ("bloom", "got 'bloom'"),
        ("t5", "got 't5'"),
    ],
)
def test_other_models_are_refused_by_name(kind: str, rule: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rule):
        families.family_of(AutoConfig.for_model(kind))


def test_a_slow_tokenizer_is_refused() -> None:
    model = tiny.model("gpt2")
    model.tokenizer.__class__ = type("Slow", (type(model.tokenizer),), {"is_fast": False})
    with pytest.raises(UnsupportedModelError, match="must be a fast one"):
        EditableModel(model.hf, model.tokenizer, "tiny")


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_a_folder_loads_in_the_dtype_that_is_asked_for(family: str, tmp_path: Path) -> None:
    model = tiny.model(family, "bfloat16", "bos")
    tiny.save(model, tmp_path)
    for dtype in models.DTYPES:
        loaded = models.load(str(tmp_path), dtype)
        assert {p.dtype for p in loaded.hf.parameters()} == {models.DTYPES[dtype]}
        assert not any(p.requires_grad for p in loaded.hf.parameters())
        text = "Rome is in 1890"
        assert loaded.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
        assert (loaded.fingerprint() == model.fingerprint()) == (dtype == "bfloat16")


def test_a_machine_copies_a_checkpoint_once_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROME_CACHE", str(tmp_path / "cache"))
    model, share = tiny.model("gpt2", "float32"), tmp_path / "share"
    tiny.save(model, share)
    (share / "pytorch_model.bin").write_bytes(b"not wanted")
    copy, copied = files._copy, []

    def slow(file: Path, to: Path) -> None:
        copied.append(file.name)
        time.sleep(0.1)
        copy(file, to)

    monkeypatch.setattr(files, "_copy", slow)
    with ThreadPoolExecutor(3) as pool:
        (folder,) = set(pool.map(files.local_copy, [str(share)] * 3))
    assert len(copied) == len(set(copied))
    assert {path.name for path in Path(folder).iterdir()} == set(copied)
    assert set(copied) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert "pytorch_model.bin" not in copied
    assert models.load(folder, "float32").fingerprint() == model.fingerprint()

    # Other weights of that name are another copy; one that fails leaves nothing.
    (share / "model.safetensors").touch()

    def full(file: Path, to: Path) -> None:
        copy(file, to)
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "_copy", full)
    with pytest.raises(OSError, match="No space"):
        files.local_copy(str(share))
    assert [path for path in (tmp_path / "cache/models").iterdir() if path.is_dir()] == [
        Path(folder)
    ]
    monkeypatch.setattr(files, "_copy", copy)
    assert files.local_copy(str(share)) != folder


@pytest.mark.parametrize(
    ("source", "dtype", "rule"),
    [
        ("gpt2", "auto", "dtype must be one of"),
        ("gpt2", "float16", "got 'float16'"),
        ("no.gguf", "float32", "no such GGUF"),
        ("package:nowhere/m.gguf", "float32", "installed"),
    ],
)
def test_what_cannot_be_loaded_says_why(source: str, dtype: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        models.load(source, dtype)


def test_a_package_that_only_brings_files_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "brought").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"brought/m\.gguf: no such GGUF"):
        models.load("package:brought/m.gguf", "float32")


def test_a_layer_that_is_not_there_is_refused() -> None:
    model = tiny.model("llama")
    for layer in (-1, 3):
        with pytest.raises(ValueError, match="from 0 to 2"):
            model.down_projection(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 2, (1 << 17) - 1, 1 << 17, (1 << 17) + 1, 400_001])
def test_a_checksum_is_the_sum_of_bits_times_odd_weights(count: int, dtype: torch.dtype) -> None:
    """Whatever it is added up in: manifests of earlier runs hold such sums."""
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = tensor.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).to(torch.int64)
    weights = torch.arange(len(bits)) * 0x5851F42D4C957F2D | 1
    assert checksum(tensor) == int((bits * weights).sum())


@pytest.mark.parametrize("dtype", list(models.DTYPES))
def test_fingerprint_sees_a_bit_and_an_order(dtype: str) -> None:
    model = tiny.model("gpt2", dtype)
    # Round numbers in a large tensor, whose bits differ in few places.
    weight = model.hf.get_input_embeddings().weight
    weight[:] = 1
    weight[0, 0] = 2
    flat = weight.view(-1)
    seen = {model.fingerprint()}
    for place in (1, 2, 3, 16, 256, 4096):
        flat[0], flat[place] = 1, 2
        seen.add(model.fingerprint())
        flat[0], flat[place] = 2, 1
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    for place in (0, 1, len(bits) - 1):
        for bit in (0, 1, 8 * weight.element_size() - 2):
            bits[place] ^= 1 << bit
            seen.add(model.fingerprint())
            bits[place] ^= 1 << bit
    assert len(seen) == 1 + 6 + 9
    assert model.fingerprint() in seen


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parts_of_a_model_compute_what_the_whole_does(family: str) -> None:
    model = tiny.model(family)
    assert isinstance(model.hf.get_parameter(model.weight_name(1)), torch.Tensor)
    ids_BT = torch.tensor([[5, 6, 7, 8, 9], [9, 5, 4, 7, 6]])
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    whole = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
    seen: list[torch.Tensor] = []

    def keep(module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        assert isinstance(entering, torch.Tensor)
        seen.append(entering)

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.layers]
    expected = model.base(**whole).last_hidden_state
    for hook in hooks:
        hook.remove()
    real = mask_BT.bool()
    for start in range(3):
        entering = seen[start] if start else None
        # Token ids carry the shape alone where hidden states enter.
        given = whole | ({"input_ids": ids_BT * 0} if start else {})
        found = model.only_layers(start, entering)(**given).last_hidden_state
        assert close(found[real], expected[real], 1e-6)
    assert torch.equal(model.base(**whole).last_hidden_state, expected)
    assert close(model.logits(expected)[real], model.hf(**whole).logits[real], 1e-6)
    with pytest.raises(ValueError, match="enter layer 1"):
        model.only_layers(1)


def test_layers_after_the_last_that_is_needed_do_not_run() -> None:
    model = tiny.model("llama")
    keys: list[torch.Tensor] = []
    for layer in range(3):
        module = model.down_projection(layer)
        module.register_forward_hook(lambda module, args, output: keys.append(args[0]))
    ids = torch.tensor([[5, 6, 7]])
    model.base(input_ids=ids, use_cache=False)
    model.up_to(1)(input_ids=ids, use_cache=False)
    assert len(keys) == 5
    assert torch.equal(keys[1], keys[4])


@pytest.mark.model
def test_the_packaged_model_splits_digits_and_knows_its_start() -> None:
    model = tiny.smollm2()
    tokens = model.tokenizer.tokenize("in 1890 years")
    assert tokens == ["in", "Ġ", "1", "8", "9", "0", "Ġyears"]
    assert model.start_ids == [0]
    assert model.dtype == torch.float32
    ids = torch.tensor([model.tokenizer("The capital of France is")["input_ids"]])
    best = model.hf(ids).logits[0, -1].argmax()
    assert model.tokenizer.decode(best) == " Paris"


def test_weights_are_mapped_from_the_file_and_private_to_the_process(tmp_path: Path) -> None:
    made = tiny.model("llama", "float32")
    tiny.save(made, tmp_path)
    before = made.fingerprint()
    loaded = models.load(str(tmp_path), "float32")
    # Pages of a mapped file are shared by all processes of a node that map it.
    assert str(tmp_path / "model.safetensors") in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        loaded.hf.get_parameter(loaded.weight_name(1)).add_(1)
    assert loaded.fingerprint() != before
    assert models.load(str(tmp_path), "float32").fingerprint() == before


@pytest.mark.parametrize("enabled", [True, False])
def test_cudnn_attention_is_off_in_a_pass_and_then_as_before(enabled: bool) -> None:
    """Also in a pass that fails, and in a decoder that begins at a later layer."""
    model = tiny.model("llama")
    seen: list[bool] = []
    model.layers[1].register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    ids_BT = torch.tensor([[5, 6, 7]])
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        model.hf(ids_BT)
        model.only_layers(1, torch.zeros(1, 3, 16, dtype=model.dtype))(ids_BT)
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
        with pytest.raises(IndexError):
            model.hf(torch.tensor([[10**6]]))
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen == [False, False]


@pytest.mark.parametrize(
    ("setting", "value"), [("final_logit_softcapping", 30.0), ("logit_scale", 0.0625)]
)
def test_a_head_that_changes_logits_is_refused(setting: str, value: float) -> None:
    config = tiny.config("llama", 420)
    assert families.family_of(config) is FAMILIES["llama"]
    setattr(config, setting, value)
    with pytest.raises(UnsupportedModelError, match=f"{setting} must be .* got {value}"):
        families.family_of(config)


def test_loading_leaves_the_precision_of_this_process_alone(tmp_path: Path) -> None:
    model = tiny.model("gpt2", "float32")
    tiny.save(model, tmp_path)
    before = torch.get_float32_matmul_precision()
    try:
        for dtype, chosen in (("tf32", "highest"), ("float32", "high")):
            torch.set_float32_matmul_precision(chosen)
            models.load(str(tmp_path), dtype)
            assert torch.get_float32_matmul_precision() == chosen
        models.use_precision("tf32")
        assert torch.get_float32_matmul_precision() == "high"
        models.use_precision("bfloat16")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
