"""Where each weight lies on a device mesh: heads, feed-forward and vocabulary over ``model``, the batch over ``data``."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...formats.errors import ResourceError, UsageError

Spec: Any = PartitionSpec  # untyped in JAX
MESH_AXES = ("data", "model")
MODEL_AXES = frozenset("nkfv")  # of jax_math.AXES; those that the mesh's model axis divides


def make_mesh(text: str, platform: str | None) -> Mesh:
    """``data=2,model=4`` as a mesh over the first devices; an axis left out has size 1.

    Raises:
        UsageError: it reads otherwise.
        ResourceError: there are fewer devices.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(","):
        found = re.fullmatch(r"\s*(data|model)\s*=\s*([1-9][0-9]{0,5})\s*", part)
        if not found:
            raise UsageError(
                f"mesh {text!r} is not of the form data=2,model=4.",
                fix="give each axis, data and model, a number of devices from 1; one left out has 1.",
            )
        sizes[found[1]] = int(found[2])
    devices, need = jax.devices(platform), math.prod(sizes.values())
    if len(devices) < need:
        raise ResourceError(
            f"mesh {text!r} needs {need} devices, JAX has {len(devices)} ({devices[0].platform}).",
            fix="use a smaller mesh; on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N gives N devices.",
        )
    return Mesh(np.array(devices[:need]).reshape(tuple(sizes.values())), MESH_AXES)


def weight_sharding(mesh: Mesh, axes: str, shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of a weight with one-letter ``axes``; an axis the mesh does not divide evenly is replicated."""
    size = mesh.shape["model"]
    spec = [
        "model" if axis in MODEL_AXES and n % size == 0 else None
        for axis, n in zip(axes, shape, strict=True)
    ]
    return NamedSharding(mesh, Spec(*spec))


def batch_sharding(mesh: Mesh, rows: int, rank: int) -> NamedSharding:
    """Sharding of activations by their first axis; replicated where ``data`` does not divide it."""
    first = "data" if rows % mesh.shape["data"] == 0 else None
    return NamedSharding(mesh, Spec(first, *[None] * (rank - 1)))
