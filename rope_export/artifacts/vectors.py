"""Test vectors in the layout of ONNX's own backend tests."""

from __future__ import annotations

import itertools
import re
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rope_export.artifacts.comparison import Bound, Errors
from rope_export.artifacts.files import VECTORS
from rope_export.errors import BadInputError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Vector:
    """A stored test vector.

    Attributes:
        name: what it covers.
        folder: ``test_data_set_K``.
        batch: rows.
        sequence: new tokens.
        past: cached tokens before them.
        bounds: for each graph output, PyTorch's own errors at export and what is tolerated.
        steps: when not empty, the vector is one full pass that is run in several calls: how many
            tokens each row is given in each.
    """

    name: str
    folder: str
    batch: int
    sequence: int
    past: int
    bounds: dict[str, Bound]
    steps: tuple[tuple[int, ...], ...] = ()


def write_vector(
    root: Path, vector: Vector, inputs: dict[str, Array], outputs: dict[str, Array]
) -> None:
    """Write one vector in the layout of ONNX's backend tests (``input_K.pb``, ``output_K.pb``)."""
    from onnx import numpy_helper

    folder = root / vector.folder
    folder.mkdir()
    for kind, arrays in (("input", inputs), ("output", outputs)):
        for index, (name, array) in enumerate(arrays.items()):
            tensor = numpy_helper.from_array(np.asarray(array, order="C"), name)
            (folder / f"{kind}_{index}.pb").write_bytes(tensor.SerializeToString())


def read_vector(root: Path, vector: Vector) -> tuple[dict[str, Array], dict[str, Array]]:
    """Read one vector: inputs and expected outputs by name.

    Raises:
        BadInputError: a file is not a tensor; the message names it.
    """
    from google.protobuf.message import DecodeError
    from onnx import TensorProto, numpy_helper

    found: dict[str, dict[str, Array]] = {"input": {}, "output": {}}
    for kind, arrays in found.items():
        folder = root / vector.folder
        for index in itertools.count():
            file = folder / f"{kind}_{index}.pb"
            if not file.is_file():
                break
            tensor = TensorProto()
            try:
                tensor.ParseFromString(file.read_bytes())
                arrays[tensor.name] = numpy_helper.to_array(tensor)
            except (DecodeError, ValueError, TypeError) as error:
                raise BadInputError(f"{file}: not an ONNX tensor: {error}") from error
    return found["input"], found["output"]


def _bound(entry: dict[str, Any]) -> Bound:
    errors = {key: Errors(**entry[key]) for key in ("eager", "tolerance")}
    if not isinstance(entry["dtype"], str):
        raise TypeError(f"dtype is {entry['dtype']!r}")
    loss = entry.get("loss")
    if loss is not None and not (type(loss) is float and 0 <= loss < 1e300):
        raise ValueError(f"loss is {loss!r}")
    return Bound(**errors, dtype=entry["dtype"], loss=loss)


def vector_from_json(entry: dict[str, Any]) -> Vector:
    """Read a vector's description back from ``config.json``.

    Raises:
        KeyError, TypeError, ValueError: something in it is not as `export` writes it.
    """
    bounds = {str(name): _bound(bound) for name, bound in entry["bounds"].items()}
    steps = tuple(tuple(step) for step in entry.get("steps", ()))
    vector = Vector(**entry | {"bounds": bounds, "steps": steps})
    if not isinstance(vector.name, str) or not re.fullmatch(rf"{VECTORS}\d+", vector.folder):
        raise ValueError(f"unexpected test vector {vector.folder!r}")
    for name, least in (("batch", 1), ("sequence", 1), ("past", 0)):
        value = getattr(vector, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} of {vector.folder} is {value!r}")
    for bound in vector.bounds.values():
        numbers = [*astuple(bound.eager), *astuple(bound.tolerance)]
        positive = (bound.tolerance.rel, bound.tolerance.row)
        if not all(type(n) in (int, float) and 0 <= n < 1e300 for n in numbers) or 0 in positive:
            raise ValueError(f"errors and tolerances of {vector.folder} must be finite, above 0")
    if not vector.bounds:
        raise ValueError(f"{vector.folder} has no bound for an output")
    for step in vector.steps:
        if len(step) != vector.batch or not all(type(n) is int and n >= 0 for n in step):
            raise ValueError(f"steps of {vector.folder} must say how many tokens each row gets")
    if any(sum(row) > vector.sequence for row in zip(*vector.steps, strict=True)):
        raise ValueError(f"steps of {vector.folder} take more tokens than there are")
    return vector
