"""Second moments: sums, files, C^-1 k, and the reference's u."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rome.second_moment import (
    MomentOrigin,
    SecondMoment,
    SpoiledError,
    accumulate,
    import_npz,
    load,
    load_solver,
    save,
)
from rome.solver import UnsolvableError
from tests.support import tiny

REFERENCE = Path(__file__).parents[2] / "shared" / "data" / "reference"

ORIGIN = MomentOrigin(
    model="tiny",
    model_fingerprint="abc",
    layer=3,
    weight="model.layers.3.mlp.down_proj.weight",
    corpus="passages",
    corpus_fingerprint="def",
)


def random_keys(tokens: int, key_size: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, key_size, generator=generator).double() + 0.5


def moment_of(*batches: Tensor) -> SecondMoment:
    moment = SecondMoment.zeros(batches[0].shape[1])
    for keys_TK in batches:
        moment.add(keys_TK)
    return moment


def test_mean_is_the_uncentred_second_moment() -> None:
    keys_TK = random_keys(50)
    expected = sum(torch.outer(k, k) for k in keys_TK.double()) / 50
    moment = moment_of(*keys_TK.chunk(7))
    assert moment.count == 50
    assert moment.mean().dtype == torch.float64
    torch.testing.assert_close(moment.mean(), expected, rtol=1e-13, atol=1e-13)


def test_a_key_that_is_not_finite_is_refused() -> None:
    moment = moment_of(random_keys(5))
    keys_TK = random_keys(3)
    keys_TK[1, 2] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        moment.add(keys_TK)
    assert moment.count == 5


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    moment = moment_of(random_keys(40))
    path = tmp_path / "deep" / "c.safetensors"
    save(path, moment, ORIGIN)
    loaded, origin = load(path)
    assert origin == ORIGIN
    assert loaded.count == moment.count
    torch.testing.assert_close(loaded.sum_KK, moment.sum_KK, rtol=1e-13, atol=1e-13)
    mapped = load_solver(path)
    assert torch.equal(mapped.solve(random_keys(3)), moment.solver().solve(random_keys(3)))
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]
    for number in range(8):  # The library's order of metadata is another each time.
        again = tmp_path / f"{number}.safetensors"
        save(again, moment, ORIGIN)
        assert again.read_bytes() == path.read_bytes()


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(path, moment_of(random_keys(40)), ORIGIN)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged.*compute it again"):
        load(path)
    path.write_bytes(data[:1000])
    with pytest.raises(ValueError, match=r"damaged.*compute it again"):
        load(path)
    save_file({"weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"holds \['weight'\]"):
        load(path)


def test_a_file_of_the_mean_is_read(tmp_path: Path) -> None:
    moment = moment_of(random_keys(40))
    path = tmp_path / "mean.safetensors"
    save_file({"second_moment": moment.mean().float(), "count": torch.tensor(40)}, path)
    loaded, origin = load(path)
    assert origin is None
    assert loaded.count == 40
    torch.testing.assert_close(loaded.mean(), moment.mean(), rtol=1e-6, atol=0)


def test_the_authors_npz_holds_the_sum(tmp_path: Path) -> None:
    moment = moment_of(random_keys(40))
    path = tmp_path / "stats.npz"
    entries = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": 40,
        "mom2.mom2": moment.sum_KK.float().numpy(),
        "sample_size": 100000,
    }
    np.savez(path, **entries)  # type: ignore[arg-type]
    imported = import_npz(path)
    assert imported.count == 40
    assert imported.sum_KK.dtype == torch.float64
    torch.testing.assert_close(imported.mean(), moment.mean(), rtol=1e-6, atol=0)

    np.savez(path, **{"mean.count": np.array(40)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lacks \['mom2.count', 'mom2.mom2'\]"):
        import_npz(path)
    np.savez(path, **{"mom2.count": np.array(40), "mom2.mom2": np.zeros((3, 4))})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"square.*\(3, 4\)"):
        import_npz(path)


def test_solve_inverts() -> None:
    moment = moment_of(random_keys(200))
    solver = moment.solver()
    keys_EK = random_keys(5).float()
    solved_EK = solver.solve(keys_EK)
    assert solved_EK.shape == keys_EK.shape
    torch.testing.assert_close(solved_EK @ moment.mean(), keys_EK.double(), rtol=1e-10, atol=1e-10)
    expected = np.linalg.cond(moment.mean().numpy())
    assert solver.condition_number() == pytest.approx(expected, rel=1e-3)


def test_too_few_tokens_say_how_many_more() -> None:
    with pytest.raises(UnsolvableError, match=r"7 tokens span 7 of 12.* at least 5 more tokens"):
        moment_of(random_keys(7)).solver()


@pytest.mark.parametrize("tokens", [9, 12, 500])
def test_repeated_tokens_do_not_help(tokens: int) -> None:
    few = random_keys(9)
    keys_TK = few.repeat(tokens // 9 + 1, 1)[:tokens]
    with pytest.raises(UnsolvableError, match=f"{tokens} tokens span 9 of 12.* at least 3 more"):
        moment_of(keys_TK).solver()


def test_a_dead_neuron_is_unsolvable_whatever_the_tokens() -> None:
    keys_TK = random_keys(100)
    keys_TK[:, 4] = 0
    with pytest.raises(UnsolvableError, match="span 11 of 12"):
        moment_of(keys_TK).solver()


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference's results are not here")
def test_u_of_every_reference_case() -> None:
    moment, _ = load(REFERENCE / "second_moment_layer6.safetensors")
    assert moment.count == 97947
    solver = moment.solver()
    files = sorted(REFERENCE.glob("*/case_*.safetensors"))
    cases = [load_file(path) for path in files]
    assert len(cases) == sum(
        len(json.loads(path.read_text())) for path in REFERENCE.glob("*/records.json")
    )
    solved_EK = solver.solve(torch.stack([case["k_star"] for case in cases]))
    u_EK = solved_EK / solved_EK.norm(dim=1, keepdim=True)
    expected_EK = torch.stack([case["u"] for case in cases]).double()
    errors_E = (u_EK - expected_EK).norm(dim=1) / expected_EK.norm(dim=1)
    assert errors_E.max() < 1e-4


@pytest.mark.parametrize("rows", [1, 5, 12, 13, 60])
def test_keys_are_solved_with_their_own_sum(rows: int) -> None:
    """In either space: of 12 key dimensions, and of fewer or more rows."""
    generator = torch.Generator().manual_seed(rows)
    keys_TK = torch.randn(80, 12, generator=generator, dtype=torch.float64)
    moment = SecondMoment.zeros(12)
    moment.add(keys_TK)
    keys_GNK = torch.randn(2, rows, 12, generator=generator, dtype=torch.float64)
    found_GNK = moment.solver().solve_with(keys_GNK, 3.0)
    for keys_NK, found_NK in zip(keys_GNK, found_GNK, strict=True):
        sum_KK = 3.0 * moment.mean() + keys_NK.T @ keys_NK
        assert torch.allclose(found_NK, keys_NK @ sum_KK.inverse(), rtol=1e-9, atol=1e-12)


def test_products_in_float32_are_as_good_as_in_float64() -> None:
    """Keys of a network are mostly positive or mostly zero, so that nothing cancels."""
    keys_TK = torch.randn(50_000, 24, generator=torch.Generator().manual_seed(0)).relu() ** 2
    moment, exact = SecondMoment.zeros(24), SecondMoment.zeros(24)
    for some_TK in keys_TK.split(8192):
        moment.add(some_TK)
        exact.add(some_TK.double())
    error = (moment.sum_KK - exact.sum_KK).norm() / exact.sum_KK.norm()
    assert 0 < error < 2e-7


def test_memory_that_ends_within_a_sum_counts_no_token_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model("gpt2")
    add, calls = SecondMoment.add, []

    def short(self: SecondMoment, keys_TK: Tensor) -> None:
        calls.append(len(keys_TK))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        add(self, keys_TK)

    monkeypatch.setattr(SecondMoment, "add", short)
    texts = [list(range(5, 15)), list(range(7, 30))]
    with pytest.raises(SpoiledError, match=r"layers \[0, 1\] do not fit into memory"):
        accumulate(model, [0, 1], texts)
    assert len(calls) == 2
