"""How fast and in how much memory a quantized checkpoint loads.

    python -m experiments.bench_load --layers=8 --output=experiments/results/load.jsonl

Writes a synthetic GPTQ checkpoint (4 bits, groups of 128, random codes) with the layers of Llama-3-8B and a small
vocabulary into a temporary folder and loads it in fresh processes from a warm page cache. Reports the rate, and the
peak of anonymous memory (RssAnon) above that after the imports, beside the size of the converted model; then a profile.
"""

import cProfile
import io
import json
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from safetensors.numpy import save_file

import specjax
from experiments.shared import common, environment, flag_groups
from specjax.models import prepare

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB, GROUP = 4096, 14336, 32, 8, 1024, 128


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_integer("layers", 8, "Decoder layers.", lower_bound=1, flag_values=values)
        flags.DEFINE_string("folder", None, "Only load this folder and report.", flag_values=values)
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_bool("profile", False, "Profile that load.", flag_values=values)
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "Result file (JSONL), appended to.", flag_values=values)


def write_checkpoint(folder: Path, layers: int) -> None:
    """A GPTQ v1 folder of Llama-3-8B layers, one shard per layer."""
    rng = np.random.default_rng(0)
    index = {}

    def save(name: str, tensors: dict) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    def gptq(prefix: str, outputs: int, inputs: int) -> dict:
        words = rng.integers(0, 2**32, (inputs // 8, outputs), np.uint32).view(np.int32)
        zeros = np.full((inputs // GROUP, outputs // 8), 0x77777777, np.int32)
        scales = rng.uniform(1e-3, 2e-3, (inputs // GROUP, outputs)).astype(np.float16)
        g_idx = np.arange(inputs, dtype=np.int32) // GROUP
        parts = {"qweight": words, "qzeros": zeros, "scales": scales, "g_idx": g_idx}
        return {f"{prefix}.{name}": tensor for name, tensor in parts.items()}

    kv_width = HIDDEN // HEADS * KV_HEADS
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv_width, HIDDEN)}
    shapes |= {"self_attn.v_proj": (kv_width, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    shapes |= {"mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN)}
    shapes |= {"mlp.down_proj": (HIDDEN, FFN)}
    for layer in range(layers):
        prefix, tensors = f"model.layers.{layer}", {}
        for name, shape in shapes.items():
            tensors |= gptq(f"{prefix}.{name}", *shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = np.ones(HIDDEN, np.float16)
        save(f"layer-{layer:05}.safetensors", tensors)
    table = rng.standard_normal((VOCAB, HIDDEN)).astype(np.float16)
    rest = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    save("rest.safetensors", rest | {"model.norm.weight": np.ones(HIDDEN, np.float16)})
    weight_map = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    (folder / "config.json").write_text(json.dumps(_config(layers)))


def _config(layers: int) -> dict:
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}
    quantization |= {"desc_act": False, "checkpoint_format": "gptq"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "quantization_config": quantization,
    }


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def measure(folder: Path, profile: bool) -> dict:
    """Loads the folder with its codes kept; runs in a fresh process."""
    file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for path in folder.glob("*.safetensors"):
        path.read_bytes()  # warms the page cache
    jax.block_until_ready(jax.numpy.zeros(1))
    before = peak = anonymous_bytes()
    running = True

    def watch():
        nonlocal peak
        while running:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    if not profile:  # it would stand in the profile
        watcher.start()
    profiler = cProfile.Profile()
    clock = time.perf_counter()
    if profile:
        profiler.enable()
    model = specjax.load(folder, dtype="float16", dequantize="never")
    jax.block_until_ready(jax.tree.leaves(model.module))
    profiler.disable()
    seconds = time.perf_counter() - clock
    running = False
    if not profile:
        watcher.join()
    layers = model.module.model.layers
    row = {
        "file_bytes": file_bytes,
        "seconds": seconds,
        "mb_per_s": file_bytes / seconds / 1e6,
        "peak_anonymous_bytes": peak - before,
        "converted_bytes": prepare.weight_bytes(model.module),
        "layer_bytes": prepare.weight_bytes(layers[0]),
    }
    row["limit_bytes"] = row["converted_bytes"] + 2 * row["layer_bytes"] + 200_000_000
    if profile:
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(12)
        row["profile"] = text.getvalue().splitlines()
    return row


def main(values: flags.FlagValues) -> None:
    """Writes a checkpoint, loads it in two fresh processes (plainly and profiled), prints and records."""
    if values.folder:
        print(json.dumps(measure(Path(values.folder), values.profile)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"writing {values.layers} layers")
        write_checkpoint(Path(folder), values.layers)
        command = [sys.executable, "-m", "experiments.bench_load", f"--folder={folder}"]
        row, profiled = _fresh(command), _fresh([*command, "--profile"])
    print(f"{row['mb_per_s']:.0f} MB/s")
    for name, size in row.items():
        if name.endswith("_bytes"):
            print(f"{name:22} {size / 1e6:8.0f} MB")
    print(*profiled["profile"], sep="\n")
    if values.output:
        with open(values.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(row | environment.record()) + "\n")


def _fresh(command: list[str]) -> dict:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    common.run(define_flags, main)
