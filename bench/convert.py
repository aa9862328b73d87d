"""g2conv against copying, against raw tensorstore reads, and against what people run instead.

    python bench/convert.py --size 2b            # everything, three rounds in alternation
    python bench/convert.py --size 27b --memory  # from generated weights: time and peak memory only

Sources are random checkpoints of real shapes (bench/synthetic.py): Hugging Face safetensors, and Flax as Orbax writes it
(OCDBT, one zstd chunk per tensor). Every method runs as its own process, all methods once per round; printed are medians,
rates over the checkpoint's bytes, and the ratio to the named baseline. Caches are warm where memory allows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from measure import Run, idle, run
from sizes import PRESETS, model_config
from sources import in_child, make_source

if TYPE_CHECKING:  # the parent process stays small
    from g2kit.model.config import GemmaConfig


def write_ocdbt(hf: Path, out: Path, config: GemmaConfig) -> None:
    """The FLAT tree as Orbax writes it by default: one OCDBT store, one zstd-compressed chunk per tensor."""
    import numpy as np
    import tensorstore as ts

    from g2kit.convert.layout import Layout
    from g2kit.convert.open import open_checkpoint
    from g2kit.convert.targets import TARGETS, target_variant

    layout = Layout(target_variant(TARGETS["flax"], "flat", config, None), config, 256_128)
    tree = {}
    with open_checkpoint(hf, config=config) as source:
        for row in layout.rows.values():
            array = np.zeros(row.shape, "bfloat16")
            for p in row.parts:
                if p.canonical in source.tensors:
                    box = tuple(slice(a, a + n) for a, n in zip(p.start, p.size, strict=True))
                    value = source.tensors[p.canonical].read()
                    array[box] = p.reorder.to_foreign(value).reshape(p.size)
            outer, _, leaf = row.name.rpartition("/")
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": f"file://{out.absolute()}/", "path": f"{outer}.{leaf}/"},
                "metadata": {
                    "dtype": "bfloat16",
                    "shape": row.shape,
                    "chunks": row.shape,
                    "compressor": {"id": "zstd", "level": 1},
                },
                "create": True,
            }  # fmt: skip
            ts.open(spec).result().write(array).result()
            keys = [{"key": k, "key_type": 2} for k in (outer, leaf)]
            tree[str((outer, leaf))] = {
                "key_metadata": keys,
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
    meta = {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False}
    (out / "_METADATA").write_text(json.dumps(meta))


RAW_READ = """
import json, sys, tensorstore as ts
root = sys.argv[1]
for entry in json.load(open(root + "/_METADATA"))["tree_metadata"].values():
    name = ".".join(k["key"] for k in entry["key_metadata"])
    kv = {"driver": "ocdbt", "base": "file://" + root + "/", "path": name + "/"}
    ts.open({"driver": "zarr", "kvstore": kv}, open=True, read=True).result().read().result()
"""
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
m.save_pretrained(sys.argv[2], max_shard_size="5GB")
"""
LOAD_ALL = """
import sys, json, numpy as np, ml_dtypes, orbax.checkpoint as ocp
from safetensors.numpy import save_file
t = ocp.PyTreeCheckpointer().restore(sys.argv[1])
o = {"model.embed_tokens.weight": t["transformer/embedder"]["input_embedding"][:256000]}
o["model.norm.weight"] = t["transformer/final_norm"]["scale"]
i = 0
norms = {"pre_attention_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
         "pre_ffw_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
while f"transformer/layer_{i}/attn/q_einsum" in t:
    f, h = f"transformer/layer_{i}/", f"model.layers.{i}."
    q, kv = t[f + "attn/q_einsum"]["w"], t[f + "attn/kv_einsum"]["w"]
    d = q.shape[1]
    flat = lambda w: np.ascontiguousarray(w.transpose(0, 2, 1)).reshape(-1, d)
    o[h + "self_attn.q_proj.weight"] = flat(q)
    o[h + "self_attn.k_proj.weight"], o[h + "self_attn.v_proj.weight"] = flat(kv[0]), flat(kv[1])
    o[h + "self_attn.o_proj.weight"] = np.ascontiguousarray(t[f + "attn/attn_vec_einsum"]["w"].reshape(-1, d).T)
    g = t[f + "mlp/gating_einsum"]["w"]
    g = g if g.shape[2] == d else g.transpose(0, 2, 1)
    o[h + "mlp.gate_proj.weight"], o[h + "mlp.up_proj.weight"] = np.ascontiguousarray(g[0]), np.ascontiguousarray(g[1])
    o[h + "mlp.down_proj.weight"] = np.ascontiguousarray(t[f + "mlp/linear"]["w"].T)
    for a, b in norms.items():
        o[h + b + ".weight"] = t[f + a]["scale"]
    i += 1
import os
os.makedirs(sys.argv[2])
save_file(o, sys.argv[2] + "/model.safetensors")
"""


def methods(size: str, root: Path, peers: bool) -> dict[str, tuple[list[str], str | None]]:
    """Name -> (command writing to root/out, baseline's name)."""
    hf, flax, torch, out = (str(root / n) for n in ("hf", "flax", "torch", "out"))
    g2conv = [str(Path(sys.executable).with_name("g2conv"))]
    quiet = ["--quiet"]
    sync = f"cp -r {hf} {out} && find {out} -type f -exec sync {{}} +"
    config = ["--config", hf]
    table: dict[str, tuple[list[str], str | None]] = {
        "cp -r + fsync": (["sh", "-c", sync], None),
        "safetensors-to-torch": (
            [*g2conv, "safetensors-to-torch", hf, torch, *quiet],
            "cp -r + fsync",
        ),
        "torch-to-safetensors": (
            [*g2conv, "torch-to-safetensors", torch, out, *quiet, *config],
            "cp -r + fsync",
        ),
        "re-shard to 1 GB": (
            [*g2conv, "safetensors-to-safetensors", hf, out, "--max-shard-size", "1GB", *quiet],
            "cp -r + fsync",
        ),
        "tensorstore read of all leaves": ([sys.executable, "-c", RAW_READ, flax], None),
        "flax-to-safetensors": (
            [*g2conv, "flax-to-safetensors", flax, out, *quiet, *config],
            "tensorstore read of all leaves",
        ),
    }
    for name, (command, base) in list(table.items()):
        if command[0] == g2conv[0]:
            table[f"{name}, --check none"] = ([*command, "--check", "none"], base)
    if peers:
        table["transformers load + save"] = (
            [sys.executable, "-c", TRANSFORMERS, hf, out],
            "cp -r + fsync",
        )
        table["orbax load all + save_file"] = (
            [sys.executable, "-c", LOAD_ALL, flax, out],
            "tensorstore read of all leaves",
        )
    return table


def compare(size: str, root: Path, rounds: int, peers: bool, only: str) -> None:
    """All methods of a group in alternation, the group that reads Flax first; then the table."""
    table = {n: m for n, m in methods(size, root, peers).items() if only in n or m[1] is None}
    nbytes = sum(f.stat().st_size for f in (root / "hf").rglob("*") if f.is_file())
    runs: dict[str, list[Run]] = {name: [] for name in table}
    flax = [n for n, (command, _) in table.items() if any(str(root / "flax") in c for c in command)]
    for group in (flax, [n for n in table if n not in flax]):
        if group is not flax and shutil.disk_usage(root).free < 2.2 * nbytes:
            shutil.rmtree(root / "flax", ignore_errors=True)  # make room for two copies
        for k in range(rounds):
            for name in group:
                prepare(size, root, name)
                done = run(table[name][0])
                runs[name].append(done)
                print(
                    f"round {k}: {name}: {done.wall:.1f} s, {done.peak_mib:.0f} MiB",
                    file=sys.stderr,
                )
    for leftover in ("out", "torch"):
        shutil.rmtree(root / leftover, ignore_errors=True)
    show(size, root, nbytes, rounds, table, runs)


def prepare(size: str, root: Path, name: str) -> None:
    """Remove earlier outputs; make the torch checkpoint that some methods read."""
    shutil.rmtree(root / "out", ignore_errors=True)
    if not name.startswith("torch-to-"):
        shutil.rmtree(root / "torch", ignore_errors=True)
    elif not (root / "torch").exists():
        run(methods(size, root, False)["safetensors-to-torch, --check none"][0])


def show(
    size: str,
    root: Path,
    nbytes: int,
    rounds: int,
    table: dict[str, tuple[list[str], str | None]],
    runs: dict[str, list[Run]],
) -> None:
    """The table in Markdown."""
    base_mib = idle()
    print(
        f"\n{PRESETS[size]} ({root.name}), {nbytes / 1e9:.2f} GB, {rounds} rounds, medians; idle interpreter {base_mib:.0f} MiB\n"
    )
    print("| method | s | GB/s | rate / baseline | CPU s | peak MiB above idle |")
    print("|---|---|---|---|---|---|")
    for name, (_, base) in table.items():
        wall = statistics.median(r.wall for r in runs[name])
        cpu = statistics.median(r.cpu for r in runs[name])
        peak = max(r.peak_mib for r in runs[name]) - base_mib
        ratio = "-"
        if base:
            pairs = zip(runs[base], runs[name], strict=True)
            ratio = f"{statistics.median(b.wall / r.wall for b, r in pairs):.2f} of {base}"
        print(
            f"| {name} | {wall:.1f} | {nbytes / wall / 1e9:.2f} | {ratio} | {cpu:.1f} | {peak:.0f} |"
        )


def memory(size: str, root: Path, to: str, layers: int | None) -> None:
    """Convert generated weights; time and peak memory of this process."""
    import resource
    import time

    from synthetic import checkpoint, noise

    from g2kit.convert.api import convert_checkpoint
    from g2kit.convert.plan import Options

    config = model_config(size, layers)
    noise()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.monotonic()
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    report = convert_checkpoint(checkpoint(config), out, Options(to))
    wall = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    shutil.rmtree(out, ignore_errors=True)
    print(
        f"{PRESETS[size]} with {config.num_hidden_layers} layers, generated, to {to}: "
        f"{report['output']['bytes'] / 1e9:.1f} GB in {wall:.0f} s, checked; peak {peak:.0f} MiB, "
        f"{peak - before:.0f} above the interpreter with the generator loaded"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=PRESETS, default="2b")
    parser.add_argument("--dir", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory", action="store_true", help="generated weights, memory figure only"
    )
    parser.add_argument("--to", default="flax", help="with --memory: the target")
    parser.add_argument("--layers", type=int, help="this many layers instead of all")
    parser.add_argument(
        "--only", default="", help="methods whose name contains this, and baselines"
    )
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    root = args.dir.absolute() / (f"{args.size}-{args.layers}" if args.layers else args.size)
    if args.memory:
        memory(args.size, root, args.to, args.layers)
        return
    make_source(args.size, root, args.layers, "safetensors")
    if not (root / "flax").exists():
        print(f"writing {root / 'flax'}", file=sys.stderr)
        in_child(write_ocdbt, root / "hf", root / "flax", model_config(args.size, args.layers))
    compare(args.size, root, args.rounds, not args.no_peers, args.only)


if __name__ == "__main__":
    main()
