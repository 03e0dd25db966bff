"""C = E[k k^T], the uncentred second moment of a layer's keys, and C^-1 k.

Section 3.1 and Appendix E of the ROME paper; `rome/layer_stats.py` in its code. A key is the input
of an MLP's down-projection at one token.

Shapes: B texts, T tokens, E edits, K key size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rome import files, headers
from rome.json_text import JsonError, parsed
from rome.models import EditableModel, memory, prompts
from rome.models.hooks import hooked
from rome.solver import Solver

MOST_BYTES = 16 << 30
"""Of an array in a .npz: a small file that unpacks to more is made to fill the memory."""


class SpoiledError(Exception):
    """A sum lacks a part or holds one twice, so it is of no use."""


@dataclass(frozen=True, kw_only=True)
class MomentOrigin:
    """The model and corpus behind a second moment."""

    model: str
    model_fingerprint: str
    layer: int
    weight: str
    corpus: str
    corpus_fingerprint: str


_PRODUCT_TOKENS = 1024


@contextmanager
def _whole_products() -> Iterator[None]:
    """A GPU does not round what it multiplies, whatever a run lets it do elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class SecondMoment:
    """The sum of k k^T over tokens, in float64, and the number of tokens.

    Products are those of the keys' own precision, float32 at least, over so few tokens at a time
    that the float64 sum of all is within 1e-6 of one whose products are float64 as well.
    """

    sum_KK: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, key_size: int, device: torch.device | str = "cpu") -> SecondMoment:
        return cls(torch.zeros(key_size, key_size, dtype=torch.float64, device=device))

    def add(self, keys_TK: Tensor) -> None:
        """Add one row per token. Raises ValueError where a key is not finite."""
        if not keys_TK.isfinite().all():
            raise ValueError(
                "a key is not finite, and one such token would spoil the whole second moment; "
                "run the model in float32, or leave out the text that causes it"
            )
        wide = torch.promote_types(keys_TK.dtype, torch.float32)
        with _whole_products():
            for some_TK in keys_TK.to(self.sum_KK.device, wide).split(_PRODUCT_TOKENS):
                self.sum_KK += some_TK.T @ some_TK
        self.count += len(keys_TK)

    def mean(self) -> Tensor:
        """C [K, K], float64: sum / count, not centred, no damping."""
        return self.sum_KK / self.count

    def solver(self) -> Solver:
        """C, factored. Raises UnsolvableError where it is singular."""
        return Solver(self.mean(), self.count)

    def fingerprint(self) -> str:
        """sha256 of the numbers."""
        digest = hashlib.sha256(f"{self.count} {tuple(self.sum_KK.shape)} ".encode())
        digest.update(self.sum_KK.cpu().contiguous().numpy().data.cast("B"))
        return digest.hexdigest()


# Another batch would round the sums otherwise, so that this is no setting.
_BATCH_TOKENS = 8192


@torch.no_grad()
def accumulate(
    model: EditableModel,
    layers: Sequence[int],
    texts: Sequence[Sequence[int]],
    sums: Mapping[int, SecondMoment] = MappingProxyType({}),
) -> dict[int, SecondMoment]:
    """The second moment of each layer over every token of the texts, which are token ids; added to
    `sums`, if they are given, in place.

    One forward pass for all layers, as far as the last of them. Raises ValueError where a key is
    not finite, or the model has no such layer, and SpoiledError where memory ends within a sum.
    """
    weights = {layer: model.weight_name(layer) for layer in layers}
    moments = dict(sums) or {
        layer: SecondMoment.zeros(model.sizes(name)[1], model.hf.get_parameter(name).device)
        for layer, name in weights.items()
    }
    seen: dict[int, Tensor] = {}
    hooks = [
        model.down_projection(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: seen.update({layer: args[0]})
        )
        for layer in layers
    ]
    base = model.up_to(max(layers))

    def add(rows: Sequence[Sequence[int]]) -> list[None]:
        batch = prompts.pad(rows, model.device)
        model.run(batch.ids_BT, batch.mask_BT, batch.positions_BT, base=base)
        real_BT = batch.mask_BT.bool()
        # Once a sum has changed, a batch cannot be tried again in halves.
        keys = {n: seen[n][real_BT.to(seen[n].device)] for n in layers}
        try:
            for layer, keys_TK in keys.items():
                moments[layer].add(keys_TK)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not memory.out_of_memory(error):
                raise
            raise SpoiledError(
                f"the products of keys of layers {list(layers)} do not fit into memory beside the "
                "model: give each worker more of it, or compute fewer layers at a time"
            ) from None
        return [None] * len(rows)

    with hooked(*hooks):
        memory.in_batches(
            texts, memory.by_length([len(text) for text in texts], _BATCH_TOKENS), add
        )
    return moments


def save(path: str | os.PathLike[str], moment: SecondMoment, origin: MomentOrigin) -> Solver:
    """Write a second moment as the factor of C (safetensors), whole or not at all.

    Raises UnsolvableError as `Solver` does.
    """
    solver = moment.solver()
    factor_KK = solver.factor_KK.cpu().contiguous()
    metadata = {
        "origin": json.dumps(asdict(origin)),
        "fingerprint": SecondMoment(factor_KK, moment.count).fingerprint(),
    }
    tensors = {"factor": factor_KK, "count": torch.tensor(moment.count)}
    with files.replacing(path) as temporary:
        save_file(tensors, temporary, metadata)
        headers.sort_metadata(temporary)
    return solver


def load(path: str | os.PathLike[str]) -> tuple[SecondMoment, MomentOrigin | None]:
    """A second moment that `save` wrote, checked against its fingerprint.

    Also reads files of the tensors `second_moment` (the mean) and `count`, which say nothing of
    their origin. Raises ValueError where the file holds neither, or is damaged.
    """
    if found := load_factor(path):
        factor_KK, count, origin = found
        return SecondMoment(count * (factor_KK @ factor_KK.T), count), origin
    tensors, _ = _read(path)
    count = int(tensors["count"])
    return _checked(SecondMoment(tensors["second_moment"].double() * count, count), path), None


def load_factor(path: str | os.PathLike[str]) -> tuple[Tensor, int, MomentOrigin] | None:
    """The factor of C, its tokens and its origin from a file that `save` wrote, checked against its
    fingerprint; None where the file holds the mean instead. Raises ValueError as `load` does."""
    tensors, metadata = _read(path)
    if {"second_moment", "count"} <= tensors.keys():
        return None
    if not {"factor", "count"} <= tensors.keys() or "fingerprint" not in metadata:
        raise ValueError(
            f"{os.fspath(path)} is not a second moment: it holds {sorted(tensors)}, expected "
            "'factor' and 'count' with their origin. Write it with rome.second_moment.save."
        )
    factor = _checked(SecondMoment(tensors["factor"], int(tensors["count"])), path)
    if factor.fingerprint() != metadata["fingerprint"]:
        raise ValueError(
            f"{os.fspath(path)} is damaged: its numbers have the fingerprint "
            f"{factor.fingerprint()}, it says {metadata['fingerprint']}. "
            "Delete it and compute it again."
        )
    try:
        origin = MomentOrigin(**parsed(metadata["origin"]))
    except (KeyError, TypeError, JsonError) as error:
        raise ValueError(
            f"{os.fspath(path)} is damaged: its metadata 'origin' does not say of which weights it "
            f"is ({error}). Delete it and compute it again."
        ) from None
    return factor.sum_KK, factor.count, origin


def held(folder: Path, model: EditableModel, layers: Sequence[int]) -> str | None:
    """The newest files in a folder of folders, as `jobs.second_moment` writes them, that hold C at
    each of the layers of these very weights; `{layer}` stands for the layer in the answer."""
    fingerprint = model.fingerprint()
    found = sorted(folder.glob(f"*/layer-{layers[0]}-*"), key=lambda path: -path.stat().st_mtime)
    for path in found:
        key = path.name.partition(f"layer-{layers[0]}-")[2]
        files = [path.with_name(f"layer-{layer}-{key}") for layer in layers]
        if all(file.exists() for file in files):
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("origin", "")
            if f'"{fingerprint}"' in text:  # Whole or not, `load` will say.
                return str(path.with_name(f"layer-{{layer}}-{key}"))
    return None


def load_solver(path: str | os.PathLike[str]) -> Solver:
    """The solver of a file that `save` wrote, whose hash the caller has checked.

    The factor is mapped from the file: processes of a node share its memory.
    """
    return Solver.of_factor(_read(path)[0]["factor"])


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{os.fspath(path)} is damaged ({error}). Delete it and compute it again."
        ) from error


def import_npz(path: str | os.PathLike[str]) -> SecondMoment:
    """A second moment from an `.npz` file as the authors of ROME publish them.

    `util/runningstats.py` there: `mom2.mom2` is the sum, `mom2.count` the number of tokens.
    Raises ValueError where the file has no such entries, is damaged, or unpacks to more than
    MOST_BYTES.
    """
    import numpy as np

    where, names = os.fspath(path), ("mom2.mom2", "mom2.count")
    try:
        with zipfile.ZipFile(path) as archive:
            held = {info.filename.removesuffix(".npy") for info in archive.infolist()}
            if missing := {*names} - held:
                raise ValueError(
                    f"{where} lacks {sorted(missing)}; it holds {sorted(held)}. "
                    "Give a file of statistics collected with 'mom2', such as "
                    "transformer.h.17.mlp.c_proj_float32_mom2_100000.npz"
                )
            for name in names:
                with archive.open(f"{name}.npy") as entry:
                    _refuse_too_large(where, name, entry)
        with np.load(path, allow_pickle=False) as file:
            sum_KK = torch.from_numpy(file["mom2.mom2"]).double()
            count = int(file["mom2.count"])
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(f"{where} is damaged or no .npz ({error!r}). Fetch it again.") from error
    return _checked(SecondMoment(sum_KK, count), path)


def _refuse_too_large(where: str, name: str, entry: IO[bytes]) -> None:
    """By what the header of an array says, before its numbers are unpacked."""
    from numpy.lib import format as npy

    try:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        shape, _, dtype = read[npy.read_magic(entry)](entry)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{where}: {name} is damaged ({error}). Fetch it again.") from error
    if dtype.hasobject:
        raise ValueError(f"{where}: {name} must hold numbers, and holds Python objects")
    if (size := math.prod(shape) * dtype.itemsize) > MOST_BYTES:
        raise ValueError(
            f"{where}: {name} must be of {MOST_BYTES >> 30} GiB at most, and says that it is of "
            f"shape {shape}, {size / 2**30:.0f} GiB"
        )


def _checked(moment: SecondMoment, path: str | os.PathLike[str]) -> SecondMoment:
    shape = tuple(moment.sum_KK.shape)
    if len(shape) != 2 or shape[0] != shape[1] or moment.count < 1:
        raise ValueError(
            f"{os.fspath(path)} is not a second moment: expected a square matrix over at least one "
            f"token, got shape {shape} over {moment.count} tokens"
        )
    return moment
